/** `chaos-proxy` as its users meet it: what it prints, and how it exits. */

import {
  assert,
  assertEquals,
  assertInstanceOf,
  assertLessOrEqual,
  assertMatch,
  assertRejects,
  assertStringIncludes,
} from "@std/assert";
import { ChaosProxy, type ConfigOptions, ListenError } from "../main.ts";
import {
  Api,
  Cli,
  echo,
  isDisconnect,
  type LogEvent,
  nowhere,
  readAll,
  readExactly,
  ROOT,
  RUN_FLAGS,
  send,
  signalTo,
  soon,
  steadyPort,
  TempFile,
  text,
  until,
  untilRefused,
  type Upstream,
} from "./helpers.ts";

const WINDOWS = Deno.build.os === "windows";
const DENO_JSON = import.meta.dirname + "/../deno.json";

interface Outcome {
  code: number;
  stdout: string;
  stderr: string;
}

/** Runs to the end. */
async function run(...args: string[]): Promise<Outcome> {
  await using cli = new Cli(...args);
  const { code } = await cli.status;
  return { code, stdout: cli.stdout, stderr: cli.stderr };
}

/** Runs on what a file holds, to the end. */
async function runOn(
  content: string | Uint8Array,
  ...args: string[]
): Promise<Outcome & { path: string }> {
  await using file = await TempFile.with(content);
  return { path: file.path, ...await run(...args, file.path) };
}

function jsonConfig(...routes: Record<string, unknown>[]): string {
  return JSON.stringify({
    seed: 42,
    routes: routes.map((route) => ({
      localPort: 0,
      upstream: "localhost:5432",
      ...route,
    })),
  });
}

/** Arguments to run main.ts from any folder, with just these permissions. */
function denoArgs(permissions: string[], args: string[]): string[] {
  const path = (name: string) => `${import.meta.dirname}/../${name}`;
  const npm = import.meta.resolve("@std/yaml").startsWith("file:");
  return [
    "run",
    "--no-prompt",
    "--config",
    path("deno.json"),
    ...(npm
      ? [
        "--import-map",
        path("npm/imports.json"),
        "--lock",
        path("npm/deno.lock"),
        "--frozen",
      ]
      : []),
    ...permissions,
    path("main.ts"),
    ...args,
  ];
}

async function runWith(
  permissions: string[],
  args: string[],
  cwd?: string,
): Promise<Outcome> {
  const { code, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
    args: denoArgs(permissions, args),
    cwd,
    env: { NO_COLOR: "1" },
  }).output();
  return { code, stdout: text(stdout), stderr: text(stderr) };
}

/** A process of which the output is read up to what a test waits for. */
class Watched implements AsyncDisposable {
  output = "";
  readonly #child: Deno.ChildProcess;
  readonly #reader: ReadableStreamDefaultReader<string>;

  constructor(command: string, args: string[]) {
    this.#child = new Deno.Command(command, {
      args,
      env: { NO_COLOR: "1" },
      stdin: "null",
      stdout: "piped",
      stderr: "inherit",
    }).spawn();
    this.#reader = this.#child.stdout.pipeThrough(new TextDecoderStream())
      .getReader();
  }

  async until(pattern: RegExp): Promise<RegExpExecArray> {
    for (;;) {
      const found = pattern.exec(this.output);
      if (found) return found;
      if (!await this.#readMore()) {
        throw new Error(`no ${pattern} in ${this.output}`);
      }
    }
  }

  /** Stops it, and reads to the end of its output. */
  async stop(signal: Deno.Signal = "SIGTERM"): Promise<number> {
    signalTo(this.#child, signal);
    while (await this.#readMore());
    return (await this.#child.status).code;
  }

  async #readMore(): Promise<boolean> {
    const { value, done } = await this.#reader.read();
    this.output += value ?? "";
    return !done;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    signalTo(this.#child, "SIGKILL");
    await this.#reader.cancel();
    await this.#child.status;
  }
}

/**
 * A port that is free, and stays so: systems give ports from 32768 on to those
 * who ask for any.
 */
function quietPort(): number {
  for (;;) {
    const port = 20_000 + Math.floor(Math.random() * 12_000);
    try {
      Deno.listen({ hostname: "127.0.0.1", port }).close();
      return port;
    } catch (error) {
      assertInstanceOf(error, Deno.errors.AddrInUse);
    }
  }
}

// ---- Arguments ---------------------------------------------------------------

Deno.test("--help fits a screen, names every option and shows an example", async () => {
  const [long, short, among] = await Promise.all([
    run("--help"),
    run("-h"),
    run("--check", "--help", "nowhere.yaml"),
  ]);
  assertEquals(long.code, 0);
  assertEquals(long.stderr, "");
  assertEquals(short, long);
  assertEquals(among, long);
  const lines = long.stdout.split("\n");
  assertEquals(lines.pop(), "");
  assertLessOrEqual(lines.length, 24);
  for (const line of lines) assertLessOrEqual(line.length, 80);
  const options = [
    "<config>",
    "--api",
    "--check",
    "--seed",
    "--log-level",
    "--log-format",
    "--demo",
    "-h, --help",
    "-V, --version",
  ];
  for (const option of options) {
    assert(lines.some((line) => line.trim().startsWith(option)), option);
  }
  assertMatch(long.stdout, /\nExample:\n +chaos-proxy .*config\.yaml\n/);
  assertStringIncludes(long.stdout, "SIGTERM");
  assertMatch(long.stdout, /Exit codes: 0 .* 1 .* 2 /s);
});

Deno.test("--version prints deno.json's", async () => {
  const { version } = JSON.parse(
    await Deno.readTextFile(new URL("deno.json", ROOT)),
  );
  for (const option of ["--version", "-V"]) {
    assertEquals(await run(option), {
      code: 0,
      stdout: `chaos-proxy ${version}\n`,
      stderr: "",
    });
  }
});

Deno.test("a wrong command line is a usage error", async () => {
  const seed = "--seed: expected an integer from 0 to 9007199254740991, found";
  const drain =
    "--drain-timeout: expected an integer from 0 to 2147483647, found";
  const level = "--log-level: expected debug or info or warn or error, found";
  const format = "--log-format: expected text or json, found";
  const wrong: [args: string[], message: string][] = [
    [
      [],
      "expected a config file, or --api 8474 to be controlled by the API " +
      "alone, found no argument",
    ],
    [["--check"], "expected a config file, found no argument"],
    [["a.yaml", "b.yaml"], "expected one config file, found 2: a.yaml, b.yaml"],
    [["--chekc", "a"], "unknown option --chekc; did you mean --check?"],
    [["--sed=5", "a"], "unknown option --sed; did you mean --seed?"],
    [
      ["--loglevel", "warn", "a"],
      "unknown option --loglevel; did you mean --log-level?",
    ],
    [["--prot", "5", "a"], "unknown option --prot; did you mean --port?"],
    [["-x", "a"], "unknown option -x"],
    [["--constructor", "a"], "unknown option --constructor"],
    [["--check=false", "a"], "--check takes no value"],
    [["--seed", "abc", "a"], `${seed} "abc"`],
    [["--seed=-1", "a"], `${seed} "-1"`],
    [["--seed", "-1", "a"], `${seed} "-1"`],
    [["-seed", "-1", "a"], `${seed} "-1"`],
    [["--drain-timeout", "-5", "a"], `${drain} "-5"`],
    [["-1", "a"], "unknown option -1"],
    [["--seed", "1.5", "a"], `${seed} "1.5"`],
    [["--seed", "1e3", "a"], `${seed} "1e3"`],
    [["--seed", "9007199254740992", "a"], `${seed} "9007199254740992"`],
    [["--log-level", "loud", "a"], `${level} "loud"`],
    [["--log-level", "INFO", "a"], `${level} "INFO"`],
    [["--log-format", "xml", "a"], `${format} "xml"`],
  ];
  const found = await Promise.all(wrong.map(([args]) => run(...args)));
  assertEquals(
    found,
    wrong.map(([, message]) => ({
      code: 2,
      stdout: "",
      stderr: `chaos-proxy: ${message}; see chaos-proxy --help\n`,
    })),
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
everything  [::1]:0          [::1]:80        drop 10%, time out 2.5% for 5000 ms, latency 150±50 ms
hang        127.0.0.1:1      a:1             time out 100% until the client leaves, latency 5 ms
`;
  const [plain, seeded, seedless] = await Promise.all([
    runOn(config, "--check"),
    runOn(config, "--check", "--seed", "42"),
    runOn("routes: [{ localPort: 1, upstream: a:1 }]", "--check"),
  ]);
  assertEquals(plain, {
    path: plain.path,
    code: 0,
    stdout: `${plain.path}: 3 routes, seed 7, drain without a limit\n${routes}`,
    stderr: "",
  });
  assertStringIncludes(seeded.stdout, ": 3 routes, seed 42, drain without");
  assertStringIncludes(
    seedless.stdout,
    ": 1 route, a random seed, drain within 30000 ms\n",
  );
});

Deno.test("faults that do nothing by themselves are warned of", async () => {
  const config = `routes:
  - { name: a, localPort: 0, upstream: "a:1", timeoutMs: 5 }
  - { name: b, localPort: 0, upstream: "a:1", jitterMs: 5 }
  - { name: c, localPort: 0, upstream: "a:1", timeoutMs: 5, timeoutRate: 1 }
  - { name: d, localPort: 0, upstream: "a:1", jitterMs: 5, latencyMs: 5 }
`;
  const warnings = [
    "a: timeoutMs does nothing without timeoutRate",
    "b: jitterMs without latencyMs delays half of the connections",
  ];
  const { code, stdout } = await runOn(config, "--check");
  assertEquals(code, 0);
  assertEquals(
    stdout.split("\n").filter((line) => line.startsWith("warning: ")),
    warnings.map((each) => `warning: ${each}`),
  );
  await using file = await TempFile.with(config);
  await using cli = new Cli("--log-format", "json", file.path);
  await cli.log.first("started", 1);
  assertEquals(
    cli.log.of("config_warning").flatMap(({ warnings }) => warnings),
    warnings,
  );
});

Deno.test("--check on the example, which --demo takes from any folder", async () => {
  const elsewhere = await Deno.makeTempDir();
  try {
    const [here, there] = await Promise.all([
      run("--check", "config.example.yaml"),
      runWith(
        ["--allow-net", "--allow-read"],
        ["--demo", "--check"],
        elsewhere,
      ),
    ]);
    assertEquals([here.code, here.stderr], [0, ""]);
    assertEquals([there.code, there.stderr], [0, ""]);
    const table = (outcome: Outcome) => outcome.stdout.split("\n").slice(1);
    assertEquals(table(there), table(here));
    assertMatch(
      here.stdout,
      /^ROUTE +LISTEN +UPSTREAM +FAULTS\nhello +127\.0\.0\.1:18080 +127\.0\.0\.1:18000 +no faults$/m,
    );
  } finally {
    await Deno.remove(elsewhere);
  }
});

Deno.test("a bad config exits with 2, with or without --check", async () => {
  const bad = jsonConfig({ localPort: "abc" }, { localPort: 1, dropRat: 1 });
  for (const args of [["--check"], [], ["--log-format", "json"]]) {
    const { path, ...outcome } = await runOn(bad, ...args);
    assertEquals(outcome, {
      code: 2,
      stdout: "",
      stderr: `chaos-proxy: ${path}: 2 problems
  routes[0].localPort: expected an integer from 0 to 65535, found "abc"
  routes[1].dropRat: unknown key; did you mean dropRate?
`,
    });
  }
});

Deno.test("a file that is no config is told why", async () => {
  const folder = await Deno.makeTempDir();
  const missing = `${folder}/missing.yaml`;
  const tooLarge = "expected at most 1 MiB of text, found more";
  const files: [content: string | Uint8Array, problem: string][] = [
    ["", "the file is empty; expected routes"],
    [" \n", "the file is empty; expected routes"],
    [
      new Uint8Array([0xff, 0xfe, 0x00]),
      "expected text in UTF-8, found other bytes",
    ],
    [
      new Uint8Array([0x66, 0xc3, 0x28]),
      "expected text in UTF-8, found other bytes",
    ],
    [new Uint8Array(10 * 1024 * 1024).fill(0x23), tooLarge],
    ["hello", 'expected a mapping with routes, found "hello"'],
    ["- localPort: 1", "expected a mapping with routes, found a list"],
    ["- a", '[0]: expected a mapping with name and upstream, found "a"'],
  ];
  const paths: [path: string, problem: string][] = [
    [missing, "there is no such file"],
    [folder, "expected a YAML or JSON file, found a directory"],
  ];
  if (!WINDOWS) paths.push(["/dev/zero", tooLarge]);
  try {
    await Promise.all([
      ...files.map(async ([content, problem]) => {
        const { path, ...outcome } = await runOn(content, "--check");
        assertRefused(outcome, path, problem);
      }),
      ...paths.map(async ([path, problem]) => {
        assertRefused(await run("--check", path), path, problem);
      }),
    ]);
  } finally {
    await Deno.remove(folder);
  }
});

function assertRefused(outcome: Outcome, path: string, problem: string): void {
  assertEquals(outcome, {
    code: 2,
    stdout: "",
    stderr: `chaos-proxy: ${path}: ${problem}\n`,
  });
}

Deno.test("a file that may not be read is told so", async () => {
  await using file = await TempFile.with(jsonConfig({}));
  if (!WINDOWS) await Deno.chmod(file.path, 0o000);
  try {
    await Deno.readFile(file.path);
    console.log("skipped: this user may read every file");
    return;
  } catch (error) {
    assertInstanceOf(error, Deno.errors.PermissionDenied);
  }
  assertRefused(
    await run("--check", file.path),
    file.path,
    "there is no permission to read the file",
  );
});

Deno.test("a file that starts with a byte order mark is read", async () => {
  const { code, stderr } = await runOn("\ufeff" + jsonConfig({}), "--check");
  assertEquals([code, stderr], [0, ""]);
});

// ---- Permissions -------------------------------------------------------------

Deno.test("--allow-net and --allow-read suffice, and without one it says so", async () => {
  await using file = await TempFile.with(jsonConfig({ name: "db" }));
  const [withoutRead, withoutNet, withoutNetDemo] = await Promise.all([
    runWith(["--allow-net"], [file.path]),
    runWith(["--allow-read"], [file.path]),
    runWith(["--allow-read"], ["--demo"]),
  ]);
  assertEquals([withoutRead.code, withoutRead.stdout], [2, ""]);
  assertMatch(
    withoutRead.stderr,
    /^chaos-proxy: [^\n]*read[^\n]*--allow-read[^\n]*\n$/,
  );
  assertEquals([withoutNet.code, withoutNet.stdout], [1, ""]);
  assertMatch(
    withoutNet.stderr,
    /^chaos-proxy: route db: [^\n]*net[^\n]*--allow-net[^\n]*\n$/,
  );
  assertEquals([withoutNetDemo.code, withoutNetDemo.stdout], [1, ""]);
  assertMatch(
    withoutNetDemo.stderr,
    /^chaos-proxy: [^\n]*net[^\n]*--allow-net[^\n]*\n$/,
  );
});

// ---- Listening ---------------------------------------------------------------

Deno.test("a port in use ends the start, and exits with 1", async () => {
  using busy = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const { port } = busy.addr;
  const { path: _, ...outcome } = await runOn(
    jsonConfig({ name: "first" }, { name: "second", localPort: port }),
  );
  assertEquals(outcome, {
    code: 1,
    stdout: "",
    stderr:
      `chaos-proxy: route second: cannot listen on 127.0.0.1:${port}: the port is already in use\n`,
  });
});

Deno.test("when a route cannot be listened on, none is", async () => {
  using busy = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const upstream = "localhost:5432";
  const port = quietPort();
  const events: LogEvent[] = [];
  const error = await assertRejects(
    () =>
      ChaosProxy.start({
        routes: [
          { localPort: port, upstream },
          { name: "busy", localPort: busy.addr.port, upstream },
        ],
      }, { onEvent: (event) => events.push(event) }),
    ListenError,
  );
  assertStringIncludes(error.message, "route busy: ");
  assertInstanceOf(error.cause, Deno.errors.AddrInUse);
  assertEquals(events, []);
  Deno.listen({ hostname: "127.0.0.1", port }).close();
});

Deno.test("an address that is not this machine's ends the start", async () => {
  const error = await assertRejects(
    () =>
      ChaosProxy.start({
        routes: [{
          name: "away",
          localPort: 0,
          host: "192.0.2.1",
          upstream: "localhost:5432",
        }],
      }),
    ListenError,
  );
  assertMatch(
    error.message,
    /^route away: cannot listen on 192\.0\.2\.1:0: \S.*\S$/,
  );
});

/** A port that only privileged users may listen on, if this user is none. */
function privilegedPort(): number | undefined {
  for (const port of [81, 82, 83]) {
    try {
      Deno.listen({ hostname: "127.0.0.1", port }).close();
    } catch (error) {
      if (error instanceof Deno.errors.PermissionDenied) return port;
    }
  }
}

Deno.test("a privileged port ends the start, and exits with 1", async () => {
  const port = privilegedPort();
  if (port === undefined) {
    console.log("skipped: this user may listen on every port");
    return;
  }
  const { path: _, ...outcome } = await runOn(
    jsonConfig({ name: "first" }, { name: "web", localPort: port }),
  );
  assertEquals(outcome, {
    code: 1,
    stdout: "",
    stderr:
      `chaos-proxy: route web: cannot listen on 127.0.0.1:${port}: permission denied; ports below 1024 are for privileged users\n`,
  });
});

// ---- --demo ------------------------------------------------------------------

Deno.test("--demo serves the example's upstream, once", async () => {
  try {
    Deno.listen({ hostname: "127.0.0.1", port: 18000 }).close();
  } catch (error) {
    assertInstanceOf(error, Deno.errors.AddrInUse);
    console.log("skipped: port 18000 is in use");
    return;
  }
  const demo: ConfigOptions = {
    seed: 42,
    routes: [{ localPort: 0, upstream: "127.0.0.1:18000" }],
  };
  await using cli = await Cli.start(demo, "--demo");
  const url = `http://127.0.0.1:${cli.port()}/`;
  const client = Deno.createHttpClient({ poolMaxIdlePerHost: 0 });
  try {
    const get = await fetch(url, { client });
    assertEquals(get.status, 200);
    assertEquals(await get.text(), "Hello from behind the proxy!\n");
    const post = await fetch(url, { client, method: "POST", body: "an echo" });
    assertEquals(await post.text(), "an echo");
  } finally {
    client.close();
  }
  await using file = await TempFile.with(JSON.stringify(demo), ".json");
  const { code, stdout, stderr } = await run("--demo", file.path);
  assertEquals([code, stdout], [1, ""]);
  assertMatch(
    stderr,
    /^chaos-proxy: [^\n]*127\.0\.0\.1:18000[^\n]*already in use[^\n]*\n$/,
  );
});

// ---- Logs --------------------------------------------------------------------

const is: Record<string, (value: unknown) => boolean> = {
  text: (value) => typeof value === "string" && value !== "",
  count: (value) => Number.isSafeInteger(value) && Number(value) >= 0,
  number: (value) => Number.isSafeInteger(value) && Number(value) >= 1,
  ms: (value) => typeof value === "number" && value >= 0,
  flag: (value) => typeof value === "boolean",
  names: (value) =>
    Array.isArray(value) && value.every((each) => typeof each === "string"),
  address: (value) => /^(?:[\d.]+|\[[\da-f:.]+\]):\d+$/.test(String(value)),
  ending: (value) =>
    /^(?:(?:client|upstream)(?:_reset)?|upstream_failed|fault|cut|drain)$/
      .test(String(value)),
};

const CONNECTION = { route: "text", connection: "number", client: "address" };
const ROUTE = {
  route: "text",
  upstream: "text",
  enabled: "flag",
  faults: "text",
};

/** The fields of each event, as the README has them; `?`: may be absent. */
const FIELDS: Record<LogEvent["event"], Record<string, string>> = {
  listening: {
    route: "text",
    address: "address",
    upstream: "text",
    faults: "text",
  },
  started: { routes: "number", seed: "count" },
  accepted: { ...CONNECTION, upstream: "text" },
  dropped: CONNECTION,
  timed_out: { ...CONNECTION, timeoutMs: "ms" },
  delayed: { ...CONNECTION, delayMs: "ms" },
  connected: {
    ...CONNECTION,
    upstream: "text",
    address: "address",
    dialMs: "ms",
    toxics: "names",
  },
  upstream_failed: { ...CONNECTION, upstream: "text", cause: "text" },
  closed: {
    ...CONNECTION,
    why: "ending",
    "cause?": "text",
    "toxic?": "text",
    bytesUp: "count",
    bytesDown: "count",
    durationMs: "ms",
  },
  config_warning: { route: "text", warnings: "names" },
  accept_failed: { route: "text", cause: "text" },
  route_added: ROUTE,
  route_changed: ROUTE,
  route_removed: { route: "text" },
  toxic_added: { route: "text", toxic: "text", effect: "text" },
  toxic_changed: { route: "text", toxic: "text", effect: "text" },
  toxic_removed: { route: "text", toxic: "text" },
  reseeded: { seed: "count" },
  api_listening: { address: "address" },
  api: {
    request: "text",
    method: "text",
    path: "text",
    status: "number",
    "error?": "text",
    "ignored?": "names",
    durationMs: "ms",
  },
  api_failed: { cause: "text" },
  log_dropped: { lines: "count" },
  sighup_ignored: {},
  draining: { connections: "count", timeoutMs: "count" },
  drained: { cut: "count", durationMs: "ms" },
};

const LEVELS: Partial<Record<LogEvent["event"], string>> = {
  upstream_failed: "warn",
  config_warning: "warn",
  accept_failed: "warn",
  api_failed: "warn",
  log_dropped: "warn",
  sighup_ignored: "warn",
  api: "debug",
};

/** Checks that a line holds an event with just the fields of the table. */
function assertEvent(line: Record<string, unknown>): void {
  const { time, level, event, ...fields } = line;
  const shown = JSON.stringify(line);
  assertEquals(Object.keys(line).slice(0, 3), ["time", "level", "event"]);
  assertEquals(new Date(String(time)).toISOString(), time);
  const name = event as LogEvent["event"];
  assert(Object.hasOwn(FIELDS, name), shown);
  assertEquals(level, LEVELS[name] ?? "info", shown);
  const expected = Object.entries(FIELDS[name]).filter(([field]) =>
    !field.endsWith("?") || field.slice(0, -1) in fields
  );
  const names = expected.map(([field]) => field.replace("?", ""));
  assertEquals(Object.keys(fields).sort(), names.sort(), shown);
  for (const [field, kind] of expected) {
    assert(is[kind](fields[field.replace("?", "")]), `${field} of ${shown}`);
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
    if (!isDisconnect(error)) throw error;
    return "";
  }
}

Deno.test("each line of a JSON log is an event with its fields", async () => {
  await using upstream = echo();
  const dead = nowhere().address;
  await using cli = await Cli.start({
    seed: 42,
    routes: [
      { name: "drop", upstream: upstream.address, dropRate: 1 },
      {
        name: "hold",
        upstream: upstream.address,
        timeoutRate: 1,
        timeoutMs: 1,
      },
      { name: "slow", upstream: upstream.address, latencyMs: 3, jitterMs: 1 },
      { name: "dead", upstream: dead },
    ].map((route) => ({ localPort: 0, ...route })),
  });
  const answers = await Promise.all(
    [0, 1, 2, 3].map((route) => converse(cli.port(route))),
  );
  assertEquals(answers, ["", "", "hello", ""]);
  await cli.log.first("closed", 4);
  if (!WINDOWS) {
    cli.kill("SIGTERM");
    assertEquals((await cli.status).code, 0);
  }
  for (const event of cli.log.all) assertEvent({ ...event });

  const steps = (route: string) =>
    cli.log.all.filter((each) => "route" in each && each.route === route)
      .map((each) => each.event === "closed" ? each.why : each.event);
  assertEquals(steps("drop"), ["listening", "accepted", "dropped", "fault"]);
  assertEquals(steps("hold"), ["listening", "accepted", "timed_out", "fault"]);
  assertEquals(steps("slow"), [
    "listening",
    "accepted",
    "delayed",
    "connected",
    "client",
  ]);
  assertEquals(steps("dead"), [
    "listening",
    "accepted",
    "upstream_failed",
    "upstream_failed",
  ]);
  const others = cli.log.all.filter((each) => !("route" in each))
    .map((each) => each.event);
  assertEquals(
    others,
    WINDOWS ? ["started"] : ["started", "draining", "drained"],
  );
  const slow = cli.log.of("closed").find(({ route }) => route === "slow")!;
  assertEquals([slow.bytesUp, slow.bytesDown], [5, 5]);
  const [connected] = cli.log.of("connected");
  assertEquals(connected.address, upstream.address);
  assertEquals(cli.stdout.trim().split("\n").length, cli.log.all.length);
  assertEquals(cli.stderr, "");
});

Deno.test("when descriptors run out it says so, and goes on", async () => {
  if (WINDOWS) {
    console.log("skipped: Windows knows no limit on descriptors");
    return;
  }
  await using file = await TempFile.with(
    jsonConfig({ name: "db", timeoutRate: 1 }),
  );
  const args = denoArgs(
    ["--allow-net", "--allow-read"],
    ["--log-format", "json", file.path],
  );
  await using proxy = new Watched("sh", [
    "-c",
    'ulimit -n 128 && exec "$0" "$@"',
    Deno.execPath(),
    ...args,
  ]);
  const [, digits] = await proxy.until(/"address":"127.0.0.1:(\d+)"/);
  const port = Number(digits);
  const clients = await Promise.all(
    Array.from({ length: 128 }, () => Deno.connect({ port })),
  );
  try {
    const [line] = await proxy.until(/^.*"accept_failed".*(?=\n)/m);
    assertEvent(JSON.parse(line));
    assertMatch(JSON.parse(line).cause, /open files/i);
  } finally {
    for (const client of clients) client.close();
  }
  await proxy.until(/"accepted".*"connection":128,/);
  await converse(port);
  await proxy.until(/"closed".*"connection":129,/);
  assertEquals(await proxy.stop(), 0);
});

Deno.test("a text log has a line an event, aligned", async () => {
  await using upstream = echo();
  const dead = nowhere().address;
  await using file = await TempFile.with(jsonConfig(
    { name: "a", upstream: upstream.address, latencyMs: 2 },
    { name: "longer", upstream: upstream.address, dropRate: 1 },
    { name: "hold", upstream: upstream.address, timeoutRate: 1, timeoutMs: 1 },
    {
      name: "dead",
      upstream: dead,
      dropRate: 0.000001,
      latencyMs: 1,
      jitterMs: 1,
    },
  ));
  await using proxy = new Watched(
    Deno.execPath(),
    denoArgs(["--allow-net", "--allow-read"], [file.path]),
  );
  await proxy.until(/started 4 routes, seed 42\n/);
  const ports = [...proxy.output.matchAll(/listening 127\.0\.0\.1:(\d+)/g)]
    .map(([, digits]) => Number(digits));
  await Promise.all(ports.map(converse));
  for (const route of ["a", "longer", "hold", "dead"]) {
    await proxy.until(new RegExp(` ${route} .* closed by .*\n`));
  }
  assertEquals(
    await proxy.stop(WINDOWS ? "SIGKILL" : "SIGTERM") === 0,
    !WINDOWS,
  );

  const lines = proxy.output.trimEnd().split("\n");
  const column = lines[0].indexOf("listening");
  const before =
    /^\S{24} (?:INFO |WARN ) (?:a|longer|hold|dead|) +(?:#\d+ +127\.0\.0\.1:\d+)? +$/;
  for (const line of lines) {
    assertMatch(line.slice(0, column), before);
    const [word] = line.slice(column).split(" ");
    assert(Object.hasOwn(FIELDS, word), line);
  }

  const words = (route: string) =>
    lines.filter((line) => line.split(/ +/)[2] === route)
      .map((line) =>
        line.slice(column).replace(/[\d.]+ ms$/, "T ms").replace(
          `:${ports[["a", "longer", "hold", "dead"].indexOf(route)]} `,
          ":P ",
        )
      );
  assertEquals(words("longer"), [
    `listening 127.0.0.1:P -> ${upstream.address} (drop 100%)`,
    `accepted -> ${upstream.address}`,
    "dropped",
    "closed by fault, 0 B up, 0 B down, T ms",
  ]);
  assertEquals(words("a").slice(0, 3), [
    `listening 127.0.0.1:P -> ${upstream.address} (latency 2 ms)`,
    `accepted -> ${upstream.address}`,
    "delayed T ms",
  ]);
  assertMatch(words("a")[3], /^connected .*127\.0\.0\.1:.* in T ms$/);
  assertEquals(words("a")[4], "closed by client, 5 B up, 5 B down, T ms");
  assertStringIncludes(
    words("dead")[0],
    `-> ${dead} (drop 0.0001%, latency 1±1 ms)`,
  );
  assertStringIncludes(words("hold")[0], "(time out 100% for 1 ms)");
  assertEquals(words("hold")[2], "timed_out for T ms");
});

/** Connects as soon as someone listens, and waits for the end. */
async function converseWhenUp(port: number): Promise<void> {
  for (;;) {
    try {
      using client = await Deno.connect({ port });
      await readAll(client);
      return;
    } catch (error) {
      assertInstanceOf(error, Deno.errors.ConnectionRefused);
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
  }
}

Deno.test("--log-level leaves out what matters less", async () => {
  const events = async (level: string) => {
    const localPort = quietPort();
    await using file = await TempFile.with(
      jsonConfig({ localPort, upstream: nowhere().address }),
    );
    await using cli = new Cli(
      "--log-format",
      "json",
      "--log-level",
      level,
      file.path,
    );
    await converseWhenUp(localPort);
    if (level === "debug" || level === "info") {
      await cli.log.first("closed", 1);
    }
    cli.kill(WINDOWS ? "SIGKILL" : "SIGTERM");
    await cli.status;
    assertEquals(cli.stderr, "");
    return cli.log.all.map(({ event }) => event);
  };
  const [debug, info, warn, error] = await Promise.all(
    ["debug", "info", "warn", "error"].map(events),
  );
  assertEquals(info, [
    "listening",
    "started",
    "accepted",
    "upstream_failed",
    "closed",
    ...(WINDOWS ? [] : ["draining", "drained"]),
  ]);
  assertEquals(debug, info);
  assertEquals(warn, ["upstream_failed"]);
  assertEquals(error, []);
});

/** A process of which the output goes elsewhere, or is not read at first. */
class Redirected implements AsyncDisposable {
  readonly child: Deno.ChildProcess;
  readonly status: Promise<Deno.CommandStatus>;

  constructor(redirection: string, ...args: string[]) {
    this.child = new Deno.Command("sh", {
      args: [
        ...["-c", `exec "$0" "$@" ${redirection}`, Deno.execPath()],
        ...denoArgs(["--allow-net", "--allow-read"], args),
      ],
      env: { NO_COLOR: "1" },
      stdin: "null",
      stdout: "piped",
      stderr: "null",
    }).spawn();
    this.status = this.child.status;
  }

  /** One with a route on a port, where it listens by now. */
  static async start(
    redirection: string,
    port: number,
    upstream: Upstream,
  ): Promise<Redirected> {
    await using file = await TempFile.with(
      jsonConfig({ localPort: port, upstream: upstream.address }),
    );
    const args = ["--log-format", "json", file.path];
    const started = new Redirected(redirection, ...args);
    await until(async () => {
      try {
        await ask(port);
        return true;
      } catch (error) {
        if (error instanceof Deno.errors.ConnectionRefused) return false;
        throw error;
      }
    }, "an answer");
    return started;
  }

  async code(): Promise<number> {
    return (await soon(this.status, "end")).code;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    signalTo(this.child, "SIGKILL");
    await this.status;
    if (!this.child.stdout.locked) await this.child.stdout.cancel();
  }
}

/** A round trip through a route to an echo. */
async function ask(port: number): Promise<void> {
  using conn = await Deno.connect({ port });
  await send(conn, "x");
  assertEquals(text(await readExactly(conn, 1)), "x");
}

/** So many connections, a few at a time: more lines than can be queued. */
async function askOften(port: number, count: number): Promise<void> {
  let left = count;
  await Promise.all(Array.from({ length: 20 }, async () => {
    while (left-- > 0) await ask(port);
  }));
}

const MANY = 2500;
const onLinux = { ignore: Deno.build.os !== "linux" };

Deno.test("a full disk under the log ends nothing", onLinux, async () => {
  const full = ">/dev/full 2>/dev/full";
  const port = steadyPort();
  await using upstream = echo();
  {
    await using cli = await Redirected.start(full, port, upstream);
    await askOften(port, MANY);
    cli.child.kill("SIGTERM");
    assertEquals(await cli.code(), 0);
  }
  await using wrong = new Redirected(full, "--bogus");
  assertEquals(await wrong.code(), 2);
  await using cli = await Redirected.start(full, port, upstream);
  await using file = await TempFile.with(jsonConfig({ localPort: port }));
  await using second = new Redirected(full, file.path);
  assertEquals(await second.code(), 1);
  using held = await Deno.connect({ port });
  await send(held, "x");
  await readExactly(held, 1);
  cli.child.kill("SIGTERM");
  await untilRefused(port);
  let ended = false;
  const code = cli.code().finally(() => ended = true);
  while (!ended) { // each but the first is a second signal, once it is later
    await new Promise((resolve) => setTimeout(resolve, 20));
    signalTo(cli.child, "SIGTERM");
  }
  assertEquals(await code, 1);
});

Deno.test("a log that nobody reads holds up nothing", onLinux, async () => {
  const port = steadyPort();
  await using upstream = echo();
  await using cli = await Redirected.start("2>&1", port, upstream);
  await askOften(port, MANY);
  cli.child.kill("SIGTERM");
  assertEquals(await cli.code(), 0);
});

Deno.test(
  "a log that is read again says how many lines it lacks",
  onLinux,
  async () => {
    const port = steadyPort();
    await using upstream = echo();
    await using cli = await Redirected.start("", port, upstream);
    await askOften(port, MANY - 2);
    const events: LogEvent[] = [];
    const read = (async () => {
      let rest = "";
      const stream = cli.child.stdout.pipeThrough(new TextDecoderStream());
      for await (const part of stream) {
        const lines = (rest + part).split("\n");
        rest = lines.pop()!;
        events.push(...lines.map((line) => JSON.parse(line)));
      }
      assertEquals(rest, "");
    })();
    const dropped = () =>
      events.flatMap((each) =>
        each.event === "log_dropped" ? [each.lines] : []
      );
    await until(() => dropped().length > 0, "a line about those dropped");
    await ask(port);
    cli.child.kill("SIGTERM");
    assertEquals(await cli.code(), 0);
    await read;
    for (const event of events) assertEvent({ ...event });
    assertEquals(events.at(-1)?.event, "drained");
    const closed = events.flatMap((each) =>
      each.event === "closed" ? [each.connection] : []
    );
    assert(closed.includes(MANY), "nothing but what came first");
    // Two at the start and at the end, and three of each connection.
    const written = events.length - dropped().length;
    const lost = dropped().reduce((sum, each) => sum + each);
    assertEquals(written + lost, 2 + 3 * MANY + 2);
  },
);

Deno.test("--seed takes the place of the config's, and is logged", async () => {
  const config = { seed: 1, routes: [{ localPort: 0, upstream: "a:1" }] };
  const { seed: _, ...seedless } = config;
  const seeds = await Promise.all([
    seedOf(config),
    seedOf(config, "--seed", "7"),
    seedOf(config, "--seed=0"),
    seedOf(config, "--seed", "3", "--seed", "4"),
  ]);
  assertEquals(seeds, [1, 7, 0, 4]);
  const random = await Promise.all([seedOf(seedless), seedOf(seedless)]);
  assert(random.every(Number.isSafeInteger));
  assert(random[0] !== random[1]);
});

async function seedOf(
  config: ConfigOptions,
  ...args: string[]
): Promise<number> {
  await using cli = await Cli.start(config, ...args);
  return cli.log.of("started")[0].seed;
}

Deno.test("--drain-timeout takes the place of the config's", async () => {
  await using upstream = echo();
  const routes = [{ localPort: 0, upstream: upstream.address }];
  await using cli = await Cli.start(
    { drainTimeoutMs: 0, routes },
    "--drain-timeout",
    "1",
  );
  using _held = await Deno.connect({ port: cli.port() });
  await cli.log.first("connected", 1);
  cli.kill();
  assertEquals((await cli.status).code, 1);
  const [{ timeoutMs, connections }] = cli.log.of("draining");
  assertEquals([timeoutMs, connections], [1, 1]);
  assertEquals(cli.log.of("drained")[0].cut, 1);
});

Deno.test("without a config the API's connections are cut soon, with 0", async () => {
  await using upstream = echo();
  await using cli = new Cli("--log-format", "json", "--api", "0");
  const [{ address }] = await cli.log.first("api_listening", 1);
  await using api = Api.at(address);
  await api.post("/proxies", { name: "a", upstream: upstream.address });
  await cli.log.first("listening", 1);
  using _held = await Deno.connect({ port: cli.port() });
  await cli.log.first("connected", 1);
  cli.kill();
  assertEquals((await cli.status).code, 0);
  assertEquals(cli.log.of("draining")[0].timeoutMs, 1000);
  assertEquals(cli.log.of("drained")[0].cut, 1);
});

Deno.test("the text of the log says how long it drains, and how to end it", async () => {
  await using file = await TempFile.with(jsonConfig({ localPort: 0 }));
  await using cli = new Cli("--drain-timeout", "1234", file.path);
  await cli.says(/(started) /);
  cli.kill();
  await cli.status;
  assertMatch(
    cli.stdout,
    /draining 0 connections in flight for up to 1234 ms; a second signal ends/,
  );
});

Deno.test(
  "SIGHUP is logged, and ends nothing",
  { ignore: WINDOWS },
  async () => {
    await using upstream = echo();
    await using cli = await Cli.start({
      routes: [{ localPort: 0, upstream: upstream.address }],
    });
    cli.kill("SIGHUP");
    const [ignored] = await cli.log.first("sighup_ignored", 1);
    assertEvent({ ...ignored });
    await ask(cli.port());
    cli.kill();
    assertEquals((await cli.status).code, 0);
  },
);

Deno.test("toxiproxy-server's command line works unchanged", async () => {
  await using upstream = echo();
  await using file = await TempFile.with(
    JSON.stringify([{
      name: "a",
      listen: "127.0.0.1:0",
      upstream: upstream.address,
      enabled: true,
    }]),
    ".json",
  );
  for (
    const args of [
      ["-host", "127.0.0.1", "-port", "PORT"],
      ["-host=localhost", "-port=PORT", "-proxy-metrics", "-runtime-metrics"],
      ["--host=0.0.0.0", "--port", "PORT", "--proxy-metrics=true"],
      ["-port=PORT", "-config", file.path, "-seed=42"],
      ["-config=" + file.path, "-port", "PORT", "-runtime-metrics=false"],
    ]
  ) {
    const port = `${steadyPort()}`;
    await using cli = new Cli(
      ...["--log-format", "json"],
      ...args.map((arg) => arg.replace("PORT", port)),
    );
    const [{ address }] = await cli.log.first("api_listening", 1);
    assertEquals(address.split(":")[1], port);
    await using api = Api.at(address);
    const names = Object.keys((await api.get("/proxies")).body);
    const hasConfig = args.some((arg) => arg.startsWith("-config"));
    assertEquals(names, hasConfig ? ["a"] : []);
    if (args.includes("-seed=42")) {
      assertEquals(cli.log.of("started")[0].seed, 42);
    }
    cli.kill();
    assertEquals((await cli.status).code, 0);
  }
  assertMatch((await run("-version")).stdout, /^chaos-proxy \d/);
  for (
    const [args, message] of [
      [["-port", "1", "--api", "2"], /--api and --host or --port contradict/],
      [["-port", "x"], /--host and --port: expected .* "localhost:NaN"/],
      [["-config", "a", "b"], /expected one config file, found 2: b, a/],
    ] as const
  ) {
    const { code, stderr } = await run(...args);
    assertEquals(code, 2);
    assertMatch(stderr, message);
  }
});

Deno.test("the image's command line starts the API on all addresses", async () => {
  const dockerfile = await Deno.readTextFile(new URL("Dockerfile", ROOT));
  const of = (instruction: string): string[] =>
    JSON.parse(new RegExp(`^${instruction} (.*)$`, "m").exec(dockerfile)![1]);
  const [deno, run, ...entry] = of("ENTRYPOINT");
  assertEquals([deno, run, entry.pop()], ["deno", "run", "/app/main.ts"]);
  assertEquals(entry, ["--cached-only", "--allow-net", "--allow-read"]);
  const port = `${steadyPort()}`;
  await using cli = new Cli(...of("CMD"), "-port", port);
  assertEquals(await cli.says(/api_listening (\S+);/), `0.0.0.0:${port}`);
  cli.kill();
  assertEquals((await cli.status).code, 0);
});

Deno.test("loaded from a server it has its example, too", async () => {
  const types = { ts: "application/typescript", json: "application/json" };
  await using server = Deno.serve(
    { hostname: "127.0.0.1", port: 0, onListen: () => {} },
    async ({ url }) => {
      const { pathname } = new URL(url);
      const type = Object.entries(types).find(([end]) =>
        pathname.endsWith(end)
      );
      const body = await Deno.readTextFile(new URL(`.${pathname}`, ROOT));
      return new Response(body, {
        headers: { "content-type": type?.[1] ?? "text/plain" },
      });
    },
  );
  const from = `http://127.0.0.1:${server.addr.port}`;
  const { imports } = JSON.parse(
    await Deno.readTextFile(new URL("npm/imports.json", ROOT)),
  );
  const map = Object.entries<string>(imports).map(([name, to]) => [
    name,
    to.replace(/^\./, `${from}/npm`),
  ]);
  await using file = await TempFile.with(
    JSON.stringify({ imports: Object.fromEntries(map) }),
    ".json",
  );
  const { code, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
    args: [
      ...[
        "run",
        "--no-prompt",
        "--no-config",
        "--no-lock",
        "--allow-net",
        "--allow-read",
      ],
      ...["--import-map", file.path, `${from}/main.ts`, "--demo", "--check"],
    ],
    env: { NO_COLOR: "1" },
  }).output();
  assertEquals(code, 0, text(stderr));
  assertMatch(text(stdout), /^config\.example\.yaml: \d+ routes/);
});

Deno.test("the task takes a config from where it is called", async () => {
  const folder = await Deno.makeTempDir({ prefix: "chaos proxy " });
  await Deno.writeTextFile(
    `${folder}/my own.yaml`,
    "routes: [{ localPort: 1, upstream: 'a:1' }]\n",
  );
  // The one of the task that runs the tests would be taken over.
  const { INIT_CWD: _, ...env } = Deno.env.toObject();
  const { code, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
    args: [
      ...["task", "--config", DENO_JSON],
      ...["start", "--check", "my own.yaml"],
    ],
    cwd: folder,
    clearEnv: true,
    env: { ...env, NO_COLOR: "1" },
  }).output();
  await Deno.remove(folder, { recursive: true });
  assertEquals(code, 0, text(stderr));
  assertMatch(text(stdout), /^my own\.yaml: 1 route/);
});

for (const resettable of [false, true]) {
  const kind = resettable ? "Node's" : "Deno's";
  Deno.test(`before it starts, a process forwards connections of its own, on ${kind} sockets`, async () => {
    await using script = await TempFile.with(
      `
      import { ChaosProxy } from ${JSON.stringify(`${ROOT}main.ts`)};
      const { connect } = Deno;
      let answers = 0;
      Deno.connect = async (options) => {
        const conn = await connect(options);
        const read = conn.read.bind(conn);
        conn.read = async (buffer) => {
          const size = await read(buffer);
          if (size === 64) answers++;
          return size;
        };
        return conn;
      };
      const config = { routes: [{ localPort: 0, upstream: "a:1" }] };
      await (await ChaosProxy.start(config, { resettable: ${resettable} })).stop();
      console.log(answers);
      `,
      ".ts",
    );
    const { stdout, stderr } = await new Deno.Command(Deno.execPath(), {
      args: [
        ...["run", "--config", DENO_JSON, "--no-check", "--allow-net"],
        ...[...RUN_FLAGS, script.path],
      ],
      cwd: ROOT,
      env: { NO_COLOR: "1" },
    }).output();
    // Each has an answer, which is read from the upstream before.
    assertEquals(text(stdout), resettable ? "3\n" : "6\n", text(stderr));
  });
}
