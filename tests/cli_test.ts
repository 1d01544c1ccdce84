/** `chaos-proxy` as its users meet it: what it prints, and how it exits. */

import {
  assert,
  assertEquals,
  assertMatch,
  assertRejects,
  assertStringIncludes,
} from "@std/assert";
import { ChaosProxy, type ConfigOptions, ListenError } from "../main.ts";
import {
  Api,
  assertClosed,
  assertEchoes,
  assertExits,
  captured,
  Cli,
  defined,
  echo,
  EventLog,
  IS_LINUX,
  IS_WINDOWS,
  type LogEvent,
  nowhere,
  PERMISSIONS,
  readAll,
  readToEnd,
  ROOT,
  RUN_FLAGS,
  runArgs,
  send,
  SOCKETS,
  soon,
  startedBy,
  steadyPort,
  TempFile,
  text,
  times,
  unlessDisconnected,
  until,
} from "./helpers.ts";

const LOOPBACK = "127.0.0.1";
const ignore = IS_WINDOWS; // which limits no descriptors, and sends no signals

type Outcome = Record<"stdout" | "stderr", string> & { code: number };

/** Runs Deno to the end. */
async function deno(args: string[], options: Deno.CommandOptions = {}) {
  const { code, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
    args,
    cwd: ROOT,
    env: { NO_COLOR: "1" },
    ...options,
  }).output();
  return { code, stdout: text(stdout), stderr: text(stderr) };
}

/** Runs the program to the end. */
const run = (...args: string[]) => deno(runArgs(args));

/** Runs it on what a file holds, to the end; says FILE for its path. */
async function runOn(content: BlobPart, ...args: string[]): Promise<Outcome> {
  await using file = await TempFile.with(content);
  const { code, stdout, stderr } = await run(...args, file.path);
  const named = (text: string) => text.replaceAll(file.path, "FILE");
  return { code, stdout: named(stdout), stderr: named(stderr) };
}

/** That it ended with a code, and one message. */
function assertFailed(outcome: Outcome, code: number, message: string): void {
  const stderr = `chaos-proxy: ${message}\n`;
  assertEquals(outcome, { code, stdout: "", stderr });
}

/** Why a file cannot be opened, in the system's words. */
async function unreadable(path: string): Promise<string> {
  const { message } = await assertRejects(() => Deno.open(path), Error);
  return message.replace(/ \(os error \d+\)/, "");
}

function configOf(...routes: Record<string, unknown>[]): ConfigOptions {
  const defaults = { localPort: 0, upstream: "localhost:5432" };
  return { seed: 42, routes: routes.map((each) => ({ ...defaults, ...each })) };
}

const jsonConfig = (...routes: Record<string, unknown>[]) =>
  JSON.stringify(configOf(...routes));

const readFile = (path: string) => Deno.readTextFileSync(new URL(path, ROOT));
const readJson = (path: string) => JSON.parse(readFile(path));

// ---- Arguments ---------------------------------------------------------------

Deno.test("--help fits a screen, names every option and shows an example", async () => {
  const [long, ...others] = await Promise.all([
    run("--help"),
    run("-h"),
    run("--check", "--help", "nowhere.yaml"),
  ]);
  assertEquals([long.code, long.stderr], [0, ""]);
  assertEquals(others, [long, long]);
  const lines = long.stdout.split("\n");
  assertEquals(lines.pop(), "");
  assert(lines.length <= 30, `${lines.length} lines`);
  for (const line of lines) assert(line.length <= 80, line);
  const options = ["<config>", "--api", "--check", "--seed", "--drain-timeout"]
    .concat("--log-level", "--log-format", "--report", "--watch", "--demo")
    .concat("--no-page")
    .concat("<route>", "--print-config", "--preview", "--schema")
    .concat("-h, --help", "-V, --version");
  for (const option of options) {
    assert(lines.some((line) => line.trim().startsWith(option)), option);
  }
  assertMatch(long.stdout, /\nExample:\n +chaos-proxy .*config\.yaml\n/);
  for (const signal of ["SIGHUP", "SIGTERM"]) {
    assertStringIncludes(long.stdout, signal);
  }
  assertMatch(long.stdout, /Exit codes: 0 .* 1 .* 2 /s);
});

Deno.test("--version prints deno.json's", async () => {
  const stdout = `chaos-proxy ${readJson("deno.json").version}\n`;
  for (const option of ["--version", "-V", "-version"]) {
    assertEquals(await run(option), { code: 0, stdout, stderr: "" });
  }
});

Deno.test("a wrong command line is a usage error", async () => {
  const integer = "expected an integer from 0 to";
  const seed = `--seed: ${integer} 9007199254740991, found`;
  const api = "expected a port or host:port, the port from 0 to 65535";
  const known = "known are --check, --print-config, --demo, --no-page, " +
    "--watch, --help, --schema, --version, --proxy-metrics, " +
    "--runtime-metrics, --api, --drain-timeout, --log-format, --log-level, " +
    "--report, --config, --host, --port, --seed, --preview";
  const none = "found none; to run without one, write --api 8474";
  const negative = "unknown option; no option takes a negative number";
  const named = "write the name of a config file, and no routes";
  const wrong = {
    "": `<config>: expected one file, ${none}`,
    "--check": "<config>: expected one file, found none",
    "''": `<config>: expected one file, ${none}`, // an unset "$CONFIG"
    "--api 0 ''": `<config>: expected one file, ${none}`,
    "a.yaml b": "<config>: expected one file, found a.yaml and b",
    "-config a b": "<config>: expected one file, found b and a",
    "-- -a": `-a: ${await unreadable("-a")}`,
    "-config a=b": `a=b: ${await unreadable("a=b")}`,
    "1e3": `1e3: ${await unreadable("1e3")}`,
    "--watch --demo": `--watch: ${named}`,
    "--watch --api 0": `--watch: ${named}`,
    "--watch -": `--watch: ${named}`,
    "--chekc a": "--chekc: unknown option; did you mean --check?",
    "--sed=5 a": "--sed: unknown option; did you mean --seed?",
    "--loglevel a": "--loglevel: unknown option; did you mean --log-level?",
    "--prot 5 a": "--prot: unknown option; did you mean --port?",
    "-x a": `-x: unknown option; ${known}`,
    "--check=5 a": "--check=5: expected true or false, or no value",
    "--constructor": `--constructor: unknown option; ${known}`,
    "-1 a": `-1: ${negative}`,
    "--seed -1 a": `-1: ${negative}`,
    "--seed abc a": `${seed} "abc"`,
    "-seed=-1 a": `${seed} "-1"`,
    "--seed 1.5 a": `${seed} "1.5"`,
    "--seed 1e3 a": `${seed} "1e3"; write it in plain decimal digits`,
    "--seed 9007199254740992 a": `${seed} "9007199254740992"`,
    "--drain-timeout 5s a":
      `--drain-timeout: ${integer} 2147483647, found "5s"; write 5000`,
    "--log-level loud a":
      '--log-level: expected debug or info or warn or error, found "loud"',
    "--log-format JSON a":
      '--log-format: expected text or json, found "JSON"; did you mean json?',
    "-port 1 --api 2": "--api: write either this, or --host and --port",
    "-port x": `--port: ${integer} 65535, found "x"`,
    "--report= a":
      '--report: expected the name of a file; - is standard output, found ""',
    "--api 1:2:3": `--api: ${api}, found "1:2:3"`,
    "--api": `--api: ${api}, found ""`,
    "--api 0 --check": "<config>: expected one file, found none",
    "-host a:1": '--host: expected a host name or an IP address, found "a:1"',
  };
  await Promise.all(
    Object.entries(wrong).map(async ([args, message]) => {
      const written = args.split(" ").filter((arg) => arg !== "");
      const outcome = await run(...written.map((arg) => arg.replace("''", "")));
      assertFailed(outcome, 2, message);
    }),
  );
});

// ---- --check -----------------------------------------------------------------

Deno.test("--check prints the routes and their faults", async () => {
  const config = `
seed: 7
drainTimeoutMs: 0
routes:
  - { localPort: 15432, upstream: "localhost:5432" }
  - name: everything
    localPort: 0
    host: "::1"
    upstream: "[::1]:80"
    dropRate: 0.1
    timeoutRate: 0.025
    timeoutMs: 5000
    latencyMs: 150
    jitterMs: 50
  - { name: hang, localPort: 1, upstream: "a:1", timeoutRate: 1, latencyMs: 5 }
`;
  const routes = `ROUTE       LISTEN           UPSTREAM        FAULTS
15432       127.0.0.1:15432  localhost:5432  no faults
everything  [::1]:0          [::1]:80        dropRate 0.1, timeoutRate 0.025, timeoutMs 5000, latencyMs 150, jitterMs 50
hang        127.0.0.1:1      a:1             timeoutRate 1, latencyMs 5
`;
  const [plain, seeded, seedless] = await Promise.all([
    runOn(config, "--check"),
    runOn(config, "--check", "--seed", "42"),
    runOn("routes: [{ localPort: 1, upstream: a:1 }]", "--check"),
  ]);
  const stdout = `FILE: 3 routes, seed 7, drain without a limit\n${routes}`;
  assertEquals(plain, { code: 0, stdout, stderr: "" });
  assertStringIncludes(seeded.stdout, ": 3 routes, seed 42, drain without");
  const random = ": 1 route, a random seed, drain within 30000 ms\n";
  assertStringIncludes(seedless.stdout, random);
});

Deno.test("faults that do nothing by themselves are warned of", async () => {
  const config = configOf(
    { name: "a", timeoutMs: 5 },
    { name: "b", jitterMs: 5 },
    { name: "c", timeoutMs: 5, timeoutRate: 1 },
    { name: "d", jitterMs: 5, latencyMs: 5 },
  );
  const warnings = [
    "a: timeoutMs does nothing without timeoutRate",
    "b: jitterMs without latencyMs delays half of the connections",
  ];
  const { code, stdout } = await runOn(JSON.stringify(config), "--check");
  const shown = stdout.match(/^warning: .*/gm);
  assertEquals([code, shown], [0, warnings.map((each) => `warning: ${each}`)]);
  await using cli = await Cli.start(config);
  const logged = cli.log.of("config_warning");
  assertEquals(logged.flatMap(({ warnings }) => warnings), warnings);
});

Deno.test("a bad config exits with 2, with or without --check", async () => {
  const bad = jsonConfig({ localPort: "abc" }, { localPort: 1, dropRat: 1 });
  for (const args of [["--check"], [], ["--log-format", "json"]]) {
    const message = `FILE: 2 problems
  routes[0].localPort: expected an integer from 0 to 65535, found "abc"
  routes[1].dropRat: unknown key; did you mean dropRate?`;
    assertFailed(await runOn(bad, ...args), 2, message);
  }
});

Deno.test("a file that is no config is told why", async () => {
  const folder = await Deno.makeTempDir();
  const missing = `${folder}/missing.yaml`;
  await using secret = await TempFile.with(jsonConfig({}));
  if (!IS_WINDOWS) await Deno.chmod(secret.path, 0o000);
  const isSecret = await Deno.readFile(secret.path)
    .then(() => console.log("this user may read every file"), () => true);
  const otherBytes = "expected text in UTF-8, found other bytes";
  const tooLarge = "expected at most 1 MiB of text, found more";
  const files: [content: BlobPart, problem: string][] = [
    ["", "the file is empty; expected routes"],
    [new Uint8Array([0xff, 0xfe, 0x00]), otherBytes],
    [new Uint8Array([0x66, 0xc3, 0x28]), otherBytes],
    [new Uint8Array([0x66, 0xc3]), otherBytes],
    ["#".repeat(10 * 1024 * 1024), tooLarge],
  ];
  const paths: Record<string, string> = {
    [missing]: await unreadable(missing),
    ...(!IS_WINDOWS && { [folder]: "Is a directory" }),
    ...(isSecret && { [secret.path]: await unreadable(secret.path) }),
    ...(IS_LINUX && { "/dev/zero": tooLarge }),
  };
  await Promise.all([
    ...files.map(async ([content, problem]) =>
      assertFailed(await runOn(content, "--check"), 2, `FILE: ${problem}`)
    ),
    ...Object.entries(paths).map(async ([path, problem]) =>
      assertFailed(await run("--check", path), 2, `${path}: ${problem}`)
    ),
  ]);
  await Deno.remove(folder);
});

// ---- Permissions -------------------------------------------------------------

Deno.test("--allow-net and --allow-read suffice, and without one it says so", async () => {
  await using file = await TempFile.with(jsonConfig({ name: "db" }));
  const lacking = [
    ["--allow-net", file.path, 2, /^chaos-proxy: .*read.*--allow-read.*\n$/],
    ["--allow-read", file.path, 1, /^chaos-proxy: route db.*--allow-net.*\n$/],
    ["--allow-read", "--demo", 1, /^chaos-proxy: demo .*--allow-net.*\n$/],
  ] as const;
  await Promise.all(lacking.map(async ([permission, arg, code, message]) => {
    const outcome = await deno(runArgs([arg], [permission]));
    assertEquals([outcome.code, outcome.stdout], [code, ""]);
    assertMatch(outcome.stderr, message);
  }));
});

// ---- Listening ---------------------------------------------------------------

/** Why a port cannot be listened on, if so. */
function refusalOf(port: number): unknown {
  try {
    Deno.listen({ hostname: "127.0.0.1", port }).close();
  } catch (error) {
    return error;
  }
}

Deno.test("when a route cannot be listened on, none is, and it exits with 1", async () => {
  using busy = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const refused: [object, cause: string, why: string][] = [
    [{ localPort: busy.addr.port }, "AddrInUse", "the port is already in use"],
    [{ host: "192.0.2.1" }, "AddrNotAvailable", ""],
  ];
  if (refusalOf(81) instanceof Deno.errors.PermissionDenied) {
    const why = "permission denied; ports below 1024 are for privileged users";
    refused.push([{ localPort: 81 }, "PermissionDenied", why]);
  } else console.log("not tried: a port on which this user may not listen");
  for (const [route, cause, why] of refused) {
    const first = steadyPort();
    const log = new EventLog();
    const config = configOf({ localPort: first }, { name: "bad", ...route });
    const start = () => ChaosProxy.start(config, { onEvent: log.add });
    const error = await assertRejects(start, ListenError);
    const begin = `route bad: cannot listen on ${error.address}: ${why}`;
    assert(error.message.startsWith(begin), error.message);
    assertEquals((error.cause as Error).name, cause);
    assertEquals(log.all, []);
    assertEquals(refusalOf(first), undefined);
    assertFailed(await runOn(JSON.stringify(config)), 1, error.message);
  }
});

// ---- --demo ------------------------------------------------------------------

Deno.test("--demo serves the example's upstream, once", async () => {
  if (refusalOf(18000) instanceof Deno.errors.AddrInUse) {
    return console.log("skipped: port 18000 is in use");
  }
  const demo = configOf({ upstream: "127.0.0.1:18000" });
  await using cli = await Cli.start(demo, "--demo");
  const url = `http://127.0.0.1:${cli.port()}/`;
  using client = Deno.createHttpClient({ poolMaxIdlePerHost: 0 });
  const get = await fetch(url, { client });
  assertEquals(get.status, 200);
  assertEquals(await get.text(), "Hello from behind the proxy!\n");
  const post = await fetch(url, { client, method: "POST", body: "an echo" });
  assertEquals(await post.text(), "an echo");
  const { code, stdout, stderr } = await runOn(JSON.stringify(demo), "--demo");
  assertEquals([code, stdout], [1, ""]);
  const inUse = /^chaos-proxy: .*127\.0\.0\.1:18000.*already in use.*\n$/;
  assertMatch(stderr, inUse);
});

// ---- Logs --------------------------------------------------------------------

/** What a field of an event holds, as JSON, by its name; the last is a text. */
const HOLDS: [name: RegExp, value: RegExp][] = [
  [/^(?:address|client)$/, /^"(?:[\d.]+|\[[\da-f:.]+\]):\d+"$/],
  [/^(?:connection|routes)$/, /^[1-9]\d*$/],
  [/^(?:bytes\w+|connections|cut|lines|seed|timeoutMs)$/, /^\d+$/],
  [/Ms$/, /^[\d.]+$/],
  [/^toxics$/, /^\[\]$/],
  [
    /^why$/,
    /^"(?:(?:client|upstream)(?:_reset)?|upstream_failed|fault|cut|drain)"$/,
  ],
  [/^/, /^".+"$/],
];

const OF_CONNECTION = "route connection client";

/** The fields of the events that come here. */
const EVENTS: Partial<Record<LogEvent["event"], string>> = {
  listening: "route address upstream faults",
  started: "routes seed",
  accepted: `${OF_CONNECTION} upstream`,
  dropped: OF_CONNECTION,
  timed_out: `${OF_CONNECTION} timeoutMs`,
  delayed: `${OF_CONNECTION} delayMs`,
  connected: `${OF_CONNECTION} upstream address dialMs toxics`,
  upstream_failed: `${OF_CONNECTION} upstream cause`,
  closed: `${OF_CONNECTION} why bytesUp bytesDown durationMs`,
  accept_failed: "route cause",
  log_dropped: "lines",
  sighup_ignored: "",
  draining: "connections timeoutMs",
  drained: "cut durationMs",
};

const WARNINGS = ["upstream_failed", "accept_failed", "log_dropped"]
  .concat("sighup_ignored");
const END = IS_WINDOWS ? [] : ["draining", "drained"];

/** Checks that a line holds an event with just the fields of the table. */
function assertEvent(line: LogEvent): void {
  const shown = JSON.stringify(line);
  const isWarning = WARNINGS.includes(line.event) ||
    ("cut" in line && line.cut > 0);
  const begin = `"level":"${isWarning ? "warn" : "info"}","event":"`;
  assertMatch(shown, RegExp(`^{"time":"[-\\dT:.]{23}Z",${begin}`));
  const fields = Object.entries(line).slice(3);
  const names = fields.map(([name]) => name).filter((name) =>
    line.event !== "closed" || !/^(?:cause|toxic)$/.test(name) // may be absent
  );
  const expected = EVENTS[line.event]?.match(/\w+/g) ?? [];
  assertEquals(names.sort(), expected.sort(), shown);
  for (const [name, value] of fields) {
    const [, holds] = defined(HOLDS.find(([names]) => names.test(name)));
    assertMatch(JSON.stringify(value), holds, `${name} of ${shown}`);
  }
}

/** Says something, and waits until the proxy has closed the connection. */
async function converse(port: number): Promise<string> {
  using client = await Deno.connect({ port });
  try {
    await send(client, "hello");
    await client.closeWrite();
    return text(await readAll(client));
  } catch (error) {
    unlessDisconnected(error);
    return "";
  }
}

/** Routes on which a connection meets each fault. */
const logged = ({ address: upstream }: { address: string }, dead: string) => [
  { name: "a", upstream, latencyMs: 2 },
  { name: "longer", upstream, dropRate: 1 },
  { name: "hold", upstream, timeoutRate: 1, timeoutMs: 1 },
  { name: "dead", upstream: dead, dropRate: 1e-6, latencyMs: 1, jitterMs: 1 },
];

Deno.test("each line of a JSON log is an event with its fields", async () => {
  await using upstream = echo();
  const config = configOf(...logged(upstream, nowhere().address));
  await using cli = await Cli.start(config);
  const answers = await times(4, (route) => converse(cli.port(route)));
  assertEquals(answers, ["hello", "", "", ""]);
  await cli.log.first("closed", 4);
  await assertExits(cli);
  for (const event of cli.log.all) assertEvent(event);

  const steps = (route?: string) =>
    cli.log.all.filter((each) => ("route" in each ? each.route : "") === route)
      .map((each) => each.event === "closed" ? each.why : each.event);
  const begin = ["listening", "accepted"];
  const failed = "upstream_failed";
  assertEquals(steps("a"), [...begin, "delayed", "connected", "client"]);
  assertEquals(steps("longer"), [...begin, "dropped", "fault"]);
  assertEquals(steps("hold"), [...begin, "timed_out", "fault"]);
  assertEquals(steps("dead"), [...begin, "delayed", failed, failed]);
  assertEquals(steps(""), ["started", ...END]);
  const slow = cli.log.of("closed").find(({ route }) => route === "a");
  assertEquals([slow?.bytesUp, slow?.bytesDown], [5, 5]);
  assertEquals(cli.log.only("connected").address, upstream.address);
  assertEquals(cli.stdout.trim().split("\n").length, cli.log.all.length);
  assertEquals(cli.stderr, "");
});

Deno.test("that descriptors run out is logged", { ignore }, async () => {
  const Limited = startedBy('ulimit -n 128 && exec "$@"');
  await using cli = await Limited.start(configOf({ timeoutRate: 1 }));
  const clients = await times(128, () => Deno.connect({ port: cli.port() }));
  const [event] = await cli.log.first("accept_failed", 1);
  assertEvent(event);
  assertMatch(event.cause, /open files/i);
  for (const client of clients) client.close();
});

Deno.test("a text log has a line an event, aligned", async () => {
  await using upstream = echo();
  const { address } = upstream;
  const dead = nowhere().address;
  await using file = await TempFile.with(jsonConfig(...logged(upstream, dead)));
  await using cli = new Cli("--drain-timeout", "1234", file.path);
  await cli.says(/started routes=4 seed=42\n/);
  const ports = [...cli.stdout.matchAll(/listening (\S+:(\d+))/g)];
  await Promise.all(ports.map(([, , port]) => converse(Number(port))));
  await cli.says(/(?: closed why=[^]*){4}\n/);
  await assertExits(cli);

  const lines = cli.stdout.trimEnd().split("\n");
  const column = cli.stdout.indexOf("listening");
  const before =
    /^\S{24} (?:INFO |WARN ) (?:a|longer|hold|dead|) +(?:#\d+ +127\.0\.0\.1:\d+)? +$/;
  for (const line of lines) {
    assertMatch(line.slice(0, column), before);
    const word = captured(/^(\S+)/, line.slice(column));
    assert(Object.hasOwn(EVENTS, word), line);
  }
  const said = lines.map((line) =>
    `${line.split(/ +/)[2]} ${line.slice(column)}`
      .replace(/Ms=[\d.]+/, "Ms=T").replace(/(?<=listening )\S+/, "HERE")
  );
  // The first lines of each route.
  const expected = `
a listening HERE -> ${address} (latencyMs 2)
a accepted upstream=${address}
a delayed delayMs=T
a connected upstream=${address} address=${address} dialMs=T toxics=[]
a closed why=client bytesUp=5 bytesDown=5 durationMs=T
longer listening HERE -> ${address} (dropRate 1)
longer accepted upstream=${address}
longer dropped
longer closed why=fault bytesUp=0 bytesDown=0 durationMs=T
hold listening HERE -> ${address} (timeoutRate 1, timeoutMs 1)
hold accepted upstream=${address}
hold timed_out timeoutMs=T
dead listening HERE -> ${dead} (dropRate 0.000001, latencyMs 1, jitterMs 1)`
    .split("\n");
  for (const name of ["a", "longer", "hold", "dead"]) {
    const isOf = (line: string) => line.startsWith(`${name} `);
    const first = expected.filter(isOf);
    assertEquals(said.filter(isOf).slice(0, first.length), first);
  }
  if (IS_WINDOWS) return;
  assertMatch(
    cli.stdout,
    /draining connections=0 timeoutMs=1234; a second signal ends/,
  );
  assertMatch(cli.stdout, /drained cut=0 durationMs=[\d.]+\n$/);
});

/** Does something with a port as soon as it is listened on. */
function whenListening(port: number, fn: (port: number) => Promise<unknown>) {
  const hasDone = () =>
    fn(port).then(() => true, (error) => {
      if (!(error instanceof Deno.errors.ConnectionRefused)) throw error;
      return false;
    });
  return until(hasDone, `port ${port} is listened on`);
}

Deno.test("--log-level leaves out what matters less", async () => {
  const events = async (level: string) => {
    const localPort = steadyPort();
    const config = jsonConfig({ localPort, upstream: nowhere().address });
    await using file = await TempFile.with(config);
    const options = ["--log-format", "json", "--log-level", level];
    await using cli = new Cli(...options, file.path);
    await whenListening(localPort, converse);
    if (["debug", "info"].includes(level)) await cli.log.first("closed", 1);
    await assertExits(cli);
    assertEquals(cli.stderr, "");
    return cli.log.all.map(({ event }) => event);
  };
  const [debug, info, warn, error] = await Promise.all(
    ["debug", "info", "warn", "error"].map(events),
  );
  const all = ["listening", "started", "accepted", "upstream_failed", "closed"];
  assertEquals(info, [...all, ...END]);
  assertEquals([debug, warn, error], [info, ["upstream_failed"], []]);
});

/** A round trip through a route to an echo. */
async function ask(port: number): Promise<void> {
  using conn = await Deno.connect({ port });
  await assertEchoes(conn, "x");
}

/** So many connections, a few at a time. */
async function askOften(port: number, count: number): Promise<void> {
  let left = count;
  await times(20, async () => {
    while (left-- > 0) await ask(port);
  });
}

/** Of these there are more lines than can be queued. */
const MANY = 2500;
const CANNOT_WRITE = "chaos-proxy: cannot write the log";

/** Starts the program by a script for a shell. */
type Start = (script: string, unread?: Promise<void>) => Promise<Cli>;

/** A test on Linux of a log that is not read, and a route to an echo. */
function test(
  name: string,
  run: (given: { start: Start; port: number }) => Promise<void>,
): void {
  Deno.test(name, { ignore: !IS_LINUX }, async () => {
    await using upstream = echo();
    const localPort = steadyPort();
    const config = jsonConfig({ localPort, upstream: upstream.address });
    await using file = await TempFile.with(config);
    const start: Start = async (script, unread) => {
      const Program = startedBy(script, { unread });
      const cli = new Program("--log-format", "json", file.path);
      await whenListening(localPort, ask);
      return cli;
    };
    await run({ start, port: localPort });
  });
}

test("a full disk under the log is told, and ends nothing", async ({ start, port }) => {
  await using cli = await start('exec "$@" >/dev/full');
  await askOften(port, MANY);
  await assertExits(cli);
  assertEquals(cli.stderr, `${CANNOT_WRITE}: No space left on device\n`);
});

test("with nowhere to write, codes and signals are the same", async ({ start, port }) => {
  const script = 'exec "$@" >/dev/full 2>/dev/full';
  await using cli = await start(script);
  await using file = await TempFile.with(jsonConfig({ localPort: port }));
  const Full = startedBy(script);
  for (const [arg, expected] of [["--bogus", 2], [file.path, 1]] as const) {
    await using wrong = new Full(arg);
    assertEquals((await soon(wrong.status, "end")).code, expected);
  }
  using held = await Deno.connect({ port });
  await assertEchoes(held);
  await assertExits(cli, 1, { again: true });
});

test("what cannot be written is written as soon as it can", async ({ start, port }) => {
  await using file = await TempFile.with("");
  const limit = 32 * 1024; // half of what there is to write
  const script = `trap "" XFSZ && ulimit -f ${limit / 512} && exec "$@"`;
  await using cli = await start(`${script} >>${file.path}`);
  await askOften(port, 99);
  let written = "";
  await until(async () => {
    const part = await Deno.readTextFile(file.path);
    const closed = (written + part).matchAll(/"closed".*?"connection":(\d+)/g);
    if (part.length === limit) {
      await Deno.truncate(file.path);
      written += part;
    }
    return new Set(Array.from(closed, ([, number]) => number)).size === 100;
  }, "each connection");
  assert(written, "there was no limit");
  await assertExits(cli);
  assertEquals(cli.stderr, `${CANNOT_WRITE}: File too large\n`);
});

test("a log that nobody reads holds up nothing", async ({ start, port }) => {
  const never = new Promise<void>(() => {});
  await using cli = await start('exec "$@" 2>&1', never);
  await askOften(port, MANY);
  await assertExits(cli);
});

test("a log that is read again says how many lines it lacks", async ({ start, port }) => {
  const { promise, resolve } = Promise.withResolvers<void>();
  await using cli = await start('exec "$@"', promise);
  await askOften(port, MANY - 2);
  resolve();
  await soon(cli.log.first("log_dropped", 1), "log_dropped");
  await ask(port);
  await assertExits(cli);
  const { log } = cli;
  for (const event of log.all) assertEvent(event);
  assertEquals(log.all.at(-1)?.event, "drained");
  const closed = log.of("closed").map(({ connection }) => connection);
  assert(closed.includes(MANY), "nothing but what came first");
  // Two at the start and at the end, and three of each connection.
  const dropped = log.of("log_dropped");
  const written = log.all.length - dropped.length;
  const lost = dropped.reduce((sum, { lines }) => sum + lines, 0);
  assertEquals(written + lost, 2 + 3 * MANY + 2);
});

// ---- Options that stand in for the config's ----------------------------------

Deno.test("--seed takes the place of the config's, and is logged", async () => {
  const seedOf = async (seed: number | undefined, ...args: string[]) => {
    await using cli = await Cli.start({ ...configOf({}), seed }, ...args);
    return cli.log.only("started").seed;
  };
  const [one, another, ...seeds] = await Promise.all([
    seedOf(undefined),
    seedOf(undefined),
    seedOf(1),
    seedOf(1, "--seed", "7"),
    seedOf(1, "--seed=0"),
    seedOf(1, "--seed", "3", "--seed", "4"),
  ]);
  assertEquals(seeds, [1, 7, 0, 4]);
  assert(Number.isSafeInteger(one) && Number.isSafeInteger(another));
  assert(one !== another, `${one} twice`);
});

Deno.test(
  "what --drain-timeout leaves is cut, with 1",
  { ignore },
  async () => {
    await using upstream = echo();
    const { routes } = configOf({ upstream: upstream.address });
    const args = ["--drain-timeout", "300"];
    await using cli = await Cli.start({ drainTimeoutMs: 0, routes }, ...args);
    using client = await Deno.connect({ port: cli.port() });
    await assertEchoes(client);
    await assertExits(cli, 1);
    await assertClosed(cli, { why: "drain", bytesUp: 5, bytesDown: 5 });
    const { timeoutMs, connections } = cli.log.only("draining");
    const { cut, durationMs } = cli.log.only("drained");
    assertEquals([timeoutMs, connections, cut], [300, 1, 1]);
    assert(durationMs >= 299, `${durationMs} ms`);
    assertEquals([await readToEnd(client), cli.stderr], [0, ""]);
    for (const event of cli.log.all) assertEvent(event);
  },
);

Deno.test(
  "the API's connections are cut soon, with 0",
  { ignore },
  async () => {
    await using upstream = echo();
    await using cli = new Cli("--log-format", "json", "--api", "0");
    const [{ address }] = await cli.log.first("api_listening", 1);
    await using api = Api.at(address);
    await api.post("/proxies", { name: "a", upstream: upstream.address });
    await cli.log.first("listening", 1);
    using _held = await Deno.connect({ port: cli.port() });
    await cli.log.first("connected", 1);
    await assertExits(cli);
    const { timeoutMs } = cli.log.only("draining"); // without a config
    assertEquals([timeoutMs, cli.log.only("drained").cut], [1000, 1]);
  },
);

Deno.test(
  "SIGHUP without a config is logged, and no end",
  { ignore },
  async () => {
    await using cli = new Cli("--log-format", "json", "--api", "0");
    await cli.log.first("api_listening", 1);
    cli.kill("SIGHUP");
    assertEvent((await cli.log.first("sighup_ignored", 1))[0]);
    await assertExits(cli);
  },
);

// ---- Other ways to start -----------------------------------------------------

Deno.test("the command line of toxiproxy-server, and of the image, starts the API", async () => {
  const dockerfile = readFile("Dockerfile");
  const of = (instruction: string): string[] =>
    JSON.parse(captured(new RegExp(`^${instruction} (.*)$`, "m"), dockerfile));
  const [deno, run, ...entry] = of("ENTRYPOINT");
  assertEquals([deno, run, entry.pop()], ["deno", "run", "/app/main.ts"]);
  assertEquals(entry, ["--cached-only", ...PERMISSIONS, "--allow-write"]);
  const image = of("CMD").join(" ");

  await using upstream = echo();
  const proxy = { name: "a", listen: "127.0.0.1:0", enabled: true };
  const list = JSON.stringify([{ ...proxy, upstream: upstream.address }]);
  await using file = await TempFile.with(list, ".json");
  const config = `-config=${file.path}`;
  for (
    const [args, host, seed, ...expected] of [
      ["-host 127.0.0.1 -port PORT", LOOPBACK],
      ["-host=localhost -port=PORT -proxy-metrics -runtime-metrics", LOOPBACK],
      ["--host=0.0.0.0 --port PORT --proxy-metrics=true", "0.0.0.0"],
      [`-port=PORT -config ${file.path} -seed=42`, LOOPBACK, 42, "a"],
      [`${config} -port PORT -runtime-metrics=false`, LOOPBACK, null, "a"],
      [`${image} -port PORT`, "0.0.0.0"],
    ]
  ) {
    const port = `${steadyPort()}`;
    const written = `${args}`.replace("PORT", port).split(" ");
    await using cli = new Cli("--log-format", "json", ...written);
    const [{ address }] = await cli.log.first("api_listening", 1);
    assertEquals(address, `${host}:${port}`);
    await using api = Api.at(address);
    assertEquals(Object.keys((await api.get("/proxies")).body), expected);
    if (seed) assertEquals(cli.log.only("started").seed, seed);
    await assertExits(cli);
  }
});

Deno.test("loaded from a server, in any folder, it has its example, which --demo takes", async () => {
  await using server = Deno.serve(
    { hostname: "127.0.0.1", port: 0, onListen: () => {} },
    ({ url }) => new Response(readFile(`.${new URL(url).pathname}`)),
  );
  const from = `http://127.0.0.1:${server.addr.port}`;
  const map = readFile("npm/imports.json").replaceAll('"./', `"${from}/npm/`);
  await using file = await TempFile.with(map, ".json");
  const cwd = await Deno.makeTempDir();
  const there = await deno([
    ...["run", "--no-prompt", "--no-config", "--no-lock", ...PERMISSIONS],
    `--reload=${from}`, // an earlier run may have had the same port
    ...["--import-map", file.path, `${from}/main.ts`, "--demo", "--check"],
  ], { cwd });
  await Deno.remove(cwd);
  const here = await run("--check", "config.example.yaml");
  assertEquals([here.code, here.stderr], [0, ""]);
  assertEquals([there.code, there.stdout], [0, here.stdout], there.stderr);
  assertMatch(
    here.stdout,
    /^ROUTE +LISTEN +UPSTREAM +FAULTS\nhello +127\.0\.0\.1:18080 +127\.0\.0\.1:18000 +no faults$/m,
  );
});

Deno.test("the task to start downloads nothing that only tests need", () => {
  const { tasks, imports } = readJson("deno.json");
  const lock = captured(/(npm\/\w+\.lock)/, tasks.start.command);
  const { specifiers } = readJson(lock);
  const fromNpm = (map: Record<string, string>) =>
    Object.values(map).filter((to) => to.startsWith("npm:")).sort();
  const needed = fromNpm(readJson("npm/imports.json").imports);
  assertEquals(Object.keys(specifiers).sort(), needed);
  assertEquals(fromNpm(imports), []); // each task downloads these
});

Deno.test("the task takes a config from where it is called", async () => {
  const cwd = await Deno.makeTempDir({ prefix: "chaos proxy " });
  await Deno.writeTextFile(`${cwd}/my own.yaml`, jsonConfig({}));
  // The one of the task that runs the tests would be taken over.
  const { INIT_CWD: _, ...env } = Deno.env.toObject();
  const config = `${import.meta.dirname}/../deno.json`;
  const { code, stdout, stderr } = await deno(
    ["task", "--config", config, "start", "--check", "my own.yaml"],
    { cwd, clearEnv: true, env: { ...env, NO_COLOR: "1" } },
  );
  await Deno.remove(cwd, { recursive: true });
  assertEquals(code, 0, stderr);
  assertMatch(stdout, /^my own\.yaml: 1 route/);
});

/** Runs a script that starts a proxy, and has done something to `Deno.connect`. */
async function runStart(onConnect: string, options = {}, end = "") {
  await using script = await TempFile.with(
    `
    import { ChaosProxy } from ${JSON.stringify(`${ROOT}main.ts`)};
    const { connect } = Deno;
    Deno.connect = async (options) => {
      const conn = await connect(options);
      ${onConnect};
      return conn;
    };
    const config = { routes: [{ localPort: 0, upstream: "a:1" }] };
    const start = performance.now();
    const proxy = await ChaosProxy.start(config, ${JSON.stringify(options)});
    await proxy.stop();
    console.log(${end});
    `,
    ".ts",
  );
  const flags = ["--no-check", "--allow-net", ...RUN_FLAGS];
  return await deno(["run", ...flags, script.path]);
}

for (const { sockets, resettable } of SOCKETS) {
  Deno.test(`before it starts, a process forwards connections of its own, on ${sockets}`, async () => {
    const countAnswers = `
      const read = conn.read.bind(conn);
      conn.read = async (buffer) => {
        const size = await read(buffer);
        if (size === 64) globalThis.answers = (globalThis.answers ?? 0) + 1;
        return size;
      }`;
    // After a second it does without, as on a machine with much else to do.
    const end =
      'performance.now() > start + 1000 ? "slow" : globalThis.answers';
    const runOnce = () => runStart(countAnswers, { resettable }, end);
    let { stdout, stderr } = await runOnce();
    // One that hangs is always slow, a busy machine is not.
    for (let attempt = 1; stdout === "slow\n" && attempt < 20; attempt++) {
      ({ stdout, stderr } = await runOnce());
    }
    // Each has an answer, which is read from the upstream before.
    assertEquals(stdout, resettable ? "3\n" : "6\n", stderr);
  });
}

Deno.test("a handler of events that throws stops the waits of no other route", async () => {
  await using script = await TempFile.with(
    `
    import { ChaosProxy } from ${JSON.stringify(`${ROOT}main.ts`)};
    setTimeout(() => Deno.exit(1), 60_000); // it waits for ever if it fails
    const thrown = Promise.withResolvers();
    for (const type of ["error", "unhandledrejection"]) {
      addEventListener(type, (event) => {
        event.preventDefault(); // or it would end the process
        thrown.resolve();
      });
    }
    const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
    const upstream = "127.0.0.1:" + listener.addr.port;
    const toxics = [{ type: "latency", attributes: { latency: 20 } }];
    const outages = [{ afterMs: 50, forMs: 1000, mode: "drop" }];
    const routes = [
      { name: "slow", localPort: 0, upstream, toxics },
      { name: "planned", localPort: 0, upstream, outages },
    ];
    const onEvent = ({ event }) => {
      if (event === "outage_on") throw new Error("a bug in the handler");
    };
    const proxy = await ChaosProxy.start({ routes }, { onEvent });
    await thrown.promise;
    const { localPort: port } = proxy.route("slow");
    const client = await Deno.connect({ port });
    const server = await listener.accept();
    await server.write(new Uint8Array(5));
    console.log(await client.read(new Uint8Array(9)));
    Deno.exit();
    `,
    ".ts",
  );
  const flags = ["--no-check", "--allow-net", ...RUN_FLAGS];
  const { stdout, stderr } = await deno(["run", ...flags, script.path]);
  assertEquals(stdout, "5\n", stderr);
});

Deno.test("a proxy that serves several tests leaves no timer in one of them", async () => {
  await using script = await TempFile.with(
    `
    import { ChaosProxy } from ${JSON.stringify(`${ROOT}main.ts`)};
    const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
    const upstream = "127.0.0.1:" + listener.addr.port;
    const routes = [{ localPort: 0, upstream }];
    const proxy = await ChaosProxy.start({ routes });
    const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
    async function connect() {
      const client = await Deno.connect({ port: proxy.routes[0].localPort });
      const server = await listener.accept();
      for (const conn of [client, server]) conn.close();
      while (proxy.connections > 0) await wait(5);
      await wait(60); // the timer is cleared within 20
    }
    Deno.test("first", connect);
    Deno.test("second", connect);
    `,
    "_test.ts",
  );
  const sanitize = ["--sanitize-ops", "--sanitize-resources"];
  const flags = ["--no-check", "--allow-net", ...sanitize, ...RUN_FLAGS];
  const { code, stdout } = await deno(["test", ...flags, script.path]);
  assertEquals(code, 0, stdout);
});

Deno.test("a process that is held up before it starts, starts all the same", async () => {
  const holdUp = `
    globalThis.dialled = (globalThis.dialled ?? 0) + 1;
    const until = performance.now() + (globalThis.dialled === 4 ? 1100 : 0);
    while (performance.now() < until)`;
  const { stdout, stderr } = await runStart(holdUp, {}, '"started"');
  assertEquals(stdout, "started\n", stderr);
});
