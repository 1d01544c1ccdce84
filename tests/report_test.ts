/** What the report says of a run, how it is written, and the health. */

import { assert, assertEquals, assertGreater, assertMatch } from "@std/assert";
import {
  ChaosProxy,
  type ConfigOptions,
  controlApi,
  parseConfig,
  type Report,
} from "../main.ts";
import {
  Api,
  assertEchoes,
  assertExits,
  captured,
  Cli,
  defined,
  echo,
  exchange,
  IS_WINDOWS,
  LONG_MS,
  nowhere,
  only,
  openEcho,
  PERMISSIONS,
  readToEnd,
  ROOT,
  soon,
  startedBy,
  steadyPort,
  TempFile,
  testBytes,
  times,
  toxic,
  unlessDisconnected,
  WatchedProxy,
} from "./helpers.ts";

/** A test that sends signals. */
function test(name: string, fn: () => Promise<void>): void {
  Deno.test(name, { ignore: IS_WINDOWS }, fn);
}

/** So many connections, some at once; each sends five bytes, and ends. */
async function connectOften(watched: WatchedProxy, count: number, atOnce = 1) {
  for (let done = 0; done < count; done += atOnce) {
    await times(Math.min(atOnce, count - done), async () => {
      using client = await watched.connect();
      await exchange(client, testBytes(5)).catch(unlessDisconnected);
    });
  }
  await watched.log.first("closed", count);
}

const numbersTo = (last: number) =>
  Array.from({ length: last }, (_, index) => index + 1);

// ---- What it says ------------------------------------------------------------

Deno.test("a report has each connection's decision, the toxics that acted, and its outcome", async () => {
  await using upstream = echo();
  const own = { localPort: 0, upstream: upstream.address };
  const toxics = ["noop name=constructor", "limit_data bytes=3 name=bye"]
    .map(toxic);
  await using watched = await WatchedProxy.start({
    seed: 1,
    routes: [
      { ...own, name: "drop", dropRate: 1 },
      { ...own, name: "hold", timeoutRate: 1 },
      { ...own, name: "dead", upstream: nowhere().address },
      { ...own, name: "slow", latencyMs: 2, toxics },
      { ...own, name: "open" },
    ],
  });
  const { proxy, log } = watched;
  for (const route of [0, 1, 2, 3]) {
    using client = await watched.connect(route);
    await exchange(client, testBytes(5)).catch(unlessDisconnected);
    await log.first("closed", route + 1);
  }
  using client = await watched.connect(4);
  await assertEchoes(client);
  proxy.addToxic("open", toxic("latency"));
  proxy.removeToxic("open", "latency_downstream");
  proxy.addToxic("open", toxic("latency"));

  const { cause } = log.only("upstream_failed");
  const report = proxy.report();
  const records = report.routes.map(({ first }) => only(first));
  const none = { number: 1, delayMs: 0, toxics: [] };
  const forward = { ...none, decision: "forward" } as const;
  const failed = { why: "upstream_failed", cause: defined(cause) } as const;
  const bye = { why: "fault", toxic: "bye" } as const;
  assertEquals(records, [
    { ...none, decision: "drop", outcome: { why: "fault" } },
    { ...none, decision: "timeout", outcome: { why: "client" } },
    { ...forward, outcome: failed },
    { ...forward, delayMs: 2, toxics: ["constructor", "bye"], outcome: bye },
    { ...forward, toxics: ["latency_downstream"], outcome: null },
  ]);
  const counts = report.routes.map((each) => [each.connections, each.open]);
  assertEquals(counts, [[1, 0], [1, 0], [1, 0], [1, 0], [1, 1]]);
  const [, , , slow, open] = report.routes;
  assertEquals(slow?.faults, { latencyMs: 1, noop: 1, limit_data: 1 });
  assertEquals(slow?.toxics, { constructor: 1, bye: 1 });
  assertEquals(slow?.ended, { fault: 1 });
  assertEquals(open?.toxics, { latency_downstream: 2 });
  assertEquals([slow?.received.upstream, open?.sent.downstream], [5, 5]);
  assertEquals([slow?.dials.count, report.seed], [1, 1]);

  await using api = Api.of(watched);
  const { status, body } = await api.get("/report");
  const { durationMs } = body;
  assertEquals([status, body], [200, { ...report, durationMs }]);
  assert(0 < report.durationMs && report.durationMs <= durationMs);

  client.close();
  await log.first("closed", 5);
  assertEquals(records.at(-1)?.outcome, null, "the report is no snapshot");
});

Deno.test("connection by connection the records are the same at 1, 10 and 100 at once", async () => {
  const count = 200;
  const recordsAt = async (atOnce: number) => {
    await using upstream = echo();
    await using watched = await WatchedProxy.to(upstream, {
      name: "db",
      dropRate: 0.1,
      timeoutRate: 0.1,
      timeoutMs: 1,
      latencyMs: 2,
      jitterMs: 4,
      toxics: [
        toxic("limit_data bytes=3 toxicity=0.3 name=bye"),
        toxic("slicer upstream average_size=2 toxicity=0.5"),
      ],
    }, { seed: 7 });
    await connectOften(watched, count, atOnce);
    const { warnings, routes } = watched.proxy.report();
    assertEquals(warnings, []);
    return only(routes).first;
  };
  const all = await Promise.all([1, 10, 100].map(recordsAt));
  const [first] = all;
  assertEquals(all, [first, first, first]);
  assertEquals(first?.map(({ number }) => number), numbersTo(count));
  const met = new Set(
    first?.map(({ decision, toxics, outcome }) =>
      `${decision} ${toxics} ${outcome?.why} ${outcome?.toxic ?? ""}`.trim()
    ),
  );
  assertEquals([...met].sort(), [
    "drop  fault",
    "forward  client",
    "forward bye fault bye",
    "forward slicer_upstream client",
    "forward slicer_upstream,bye fault bye",
    "timeout  fault",
  ]);
});

Deno.test("there is a record of the first 1,000 connections, again after a new seed", async () => {
  await using watched = await WatchedProxy.to(nowhere(), { dropRate: 1 });
  const { proxy, log } = watched;
  await connectOften(watched, 1020, 20);
  const { connections, first } = only(proxy.report().routes);
  assertEquals(connections, 1020);
  const numbers = first.map(({ number }) => number);
  assertEquals(numbers, numbersTo(1000));

  proxy.reseed(9);
  const reseeded = proxy.report();
  assertEquals([reseeded.seed, only(reseeded.routes).first], [9, []]);
  await connectOften(watched, 1);
  await log.first("closed", 1021);
  const again = only(proxy.report().routes);
  assertEquals(again.first.map(({ number }) => number), [1]);
  assertEquals([again.connections, again.ended], [1021, { fault: 1021 }]);
});

Deno.test("docs/report.md shows the report of the README's config", async () => {
  const read = (name: string) => Deno.readTextFileSync(new URL(name, ROOT));
  const config = captured(/^`{3}yaml\n(.*?)^`{3}$/ms, read("README.md"));
  const shown = captured(/^`{3}json\n(.*?)^`{3}$/ms, read("docs/report.md"));
  await using upstream = echo();
  const { seed, routes } = parseConfig(config);
  const own = { localPort: 0, upstream: upstream.address, timeoutMs: 1 };
  await using watched = await WatchedProxy.start({
    seed,
    routes: [{ ...only(routes), ...own }],
  });
  await connectOften(watched, 5);
  // Only the keys that are shown.
  const keys = Array.from(shown.matchAll(/"(\w+)":/g), ([, key = ""]) => key);
  const report = JSON.stringify(watched.proxy.report(), keys);
  assertEquals(JSON.parse(report), JSON.parse(shown));
});

// ---- Warnings ----------------------------------------------------------------

Deno.test("a fault that acted on no connection is warned of; one by chance acts once it hits", async () => {
  await using upstream = echo();
  const rates = { dropRate: 1e-9, timeoutRate: 1e-9 };
  const toxics = ["toxicity=0 name=never", "toxicity=0 name=constructor"]
    .concat("name=always").map((words) => toxic(`noop ${words}`));
  const byChance = [
    "stall upstream rate=1 duration=1",
    "corrupt upstream rate=1",
    "packet_loss upstream loss_rate=1e-9",
    "duplicate rate=0",
  ].map(toxic);
  const route = { localPort: 0, upstream: upstream.address };
  await using watched = await WatchedProxy.start({
    seed: 1,
    routes: [
      { ...route, name: "a", ...rates, toxics },
      { ...route, name: "b", dropRate: 1, latencyMs: 5 },
      { ...route, name: "acted", dropRate: 1 },
      { ...route, name: "plain" },
      { ...route, name: "chance", toxics: byChance },
      { ...route, name: "unused", ...rates, toxics },
      { ...route, name: "later", outages: [{ afterMs: LONG_MS, forMs: 1 }] },
      { ...route, name: "off", enabled: false, ...rates },
    ],
  });
  for (const index of [0, 0, 1, 2, 3, 4, 6]) {
    using client = await watched.connect(index);
    await exchange(client, testBytes(5000)).catch(unlessDisconnected);
  }
  await watched.log.first("closed", 7);
  const { routes, warnings } = watched.proxy.report();
  assertEquals(warnings, [
    "a: dropRate 1e-9: acted on none of 2 connections",
    "a: timeoutRate 1e-9: acted on none of 2 connections",
    "a: toxic never: acted on none of 2 connections",
    "a: toxic constructor: acted on none of 2 connections",
    "b: latencyMs 5: acted on none of 1 connection",
    "chance: toxic packet_loss_upstream: acted on none of 1 connection",
    "chance: toxic duplicate_downstream: acted on none of 1 connection",
    "unused: no connection",
    "later: outage 1 (refuse): never began",
    "off: no connection",
  ]);
  const { faults, first } = defined(routes[4]);
  assertEquals(faults, { stall: 1, corrupt: 1 }); // once a connection
  assertEquals(only(first).toxics, ["stall_upstream", "corrupt_upstream"]);
});

// ---- The file ----------------------------------------------------------------

/** The program with these permissions. */
function permitted(permissions: string[], Program: typeof Cli = Cli) {
  return class extends Program {
    override get permissions() {
      return permissions;
    }
  };
}

const WRITES = [...PERMISSIONS, "--allow-write"];
const Writer = permitted(WRITES);

/** A folder with an old report. */
async function oldReport() {
  const path = await Deno.makeTempDir({ prefix: "a report " });
  const file = `${path}/report.json`;
  await Deno.writeTextFile(file, "old");
  return {
    file,
    path,
    read: () => Deno.readTextFileSync(file),
    names: () => Array.from(Deno.readDirSync(path), ({ name }) => name),
    /** It is as it was. */
    assertOld() {
      assertEquals(this.read(), "old");
      assertEquals(this.names(), ["report.json"]);
    },
    [Symbol.asyncDispose]: () => Deno.remove(path, { recursive: true }),
  };
}

const CONFIG: ConfigOptions = {
  seed: 42,
  drainTimeoutMs: LONG_MS,
  routes: [
    { name: "drop", localPort: 0, upstream: "localhost:1", dropRate: 1 },
    { name: "none", localPort: 0, upstream: "localhost:1" },
  ],
};
const DROPS = { ...CONFIG, routes: defined(CONFIG.routes).slice(0, 1) };
const WARNINGS = ["none: no connection"];

/** Lets a program drop a connection. */
async function drop(cli: Cli): Promise<void> {
  using client = await Deno.connect({ port: cli.port() });
  await readToEnd(client);
}

/** A report of the config, after a connection was dropped. */
function assertReported(text: string, warnings = WARNINGS): void {
  const report: Report = JSON.parse(text);
  assertEquals([report.version, report.seed], [defined(report.version), 42]);
  assertEquals(report.warnings, warnings);
  const [dropped, ...others] = report.routes;
  assertEquals([dropped?.connections, dropped?.faults], [1, { dropRate: 1 }]);
  const unused = others.map(({ connections }) => connections);
  assertEquals(unused, warnings.map(() => 0));
}

test("--report writes a file once all has ended, and sums it up", async () => {
  await using folder = await oldReport();
  const There = startedBy(`cd "${folder.path}" && exec "$@"`);
  const Program = permitted(WRITES, There);
  await using cli = await Program.start(CONFIG, "--report", "report.json");
  await drop(cli);
  await cli.log.first("closed", 1);
  folder.assertOld();
  await assertExits(cli);
  assertReported(folder.read());
  assertMatch(folder.read(), /^{\n {2}"version"/);
  assertEquals(folder.names(), ["report.json"]);
  const last = defined(cli.log.all.at(-1));
  const expected = {
    level: "warn",
    event: "report",
    summary: "1 connection, 1 fault injected",
    warnings: WARNINGS,
    file: "report.json",
  };
  assertEquals(last, { ...last, ...expected } as never);
});

for (const isFile of [true, false]) {
  const where = isFile ? "in a file" : "behind the log";
  test(`a second signal ends a drain at once, and leaves a long report whole, ${where}`, async () => {
    await using upstream = echo();
    await using folder = await oldReport();
    const held = { localPort: 0, upstream: upstream.address };
    const off = { enabled: false, localPort: 0, upstream: "localhost:1" };
    const many = numbersTo(900).map((i) => ({ name: `off${i}`, ...off }));
    const config = { ...CONFIG, routes: [held, ...many] };
    const option = `--report=${isFile ? folder.file : "-"}`;
    await using cli = await Writer.start(config, option);
    using client = await Deno.connect({ port: cli.port() });
    await assertEchoes(client);
    cli.kill("SIGINT");
    cli.kill("SIGTERM"); // the same stop, passed on by two
    await cli.log.first("draining", 1);
    folder.assertOld();
    await assertEchoes(client, "more");
    await assertExits(cli, 1, { again: true });
    assertMatch(cli.stderr, /^.*second signal\n$/);
    assertEquals([cli.log.of("drained"), await readToEnd(client)], [[], 0]);
    const last = defined(cli.stdout.trimEnd().split("\n").at(-1));
    const text = isFile ? folder.read() : last;
    assertGreater(text.length, 256 * 1024); // more than a pipe takes at once
    const [open, ...others] = (JSON.parse(text) as Report).routes;
    assertEquals([open?.open, open?.first[0]?.outcome], [1, null]);
    assertEquals(others.length, many.length);
    assertEquals(folder.names(), ["report.json"]);
    assertEquals(cli.log.only("report").file, isFile ? folder.file : "-");
  });
}

for (
  const [args, config, level, warnings] of [
    [["--report", "-"], CONFIG, "warn", WARNINGS],
    [["--report=-"], CONFIG, "warn", WARNINGS],
    [["-report", "-"], DROPS, "info", []],
  ] as const
) {
  test(`${args.join(" ")} writes a line behind the log, at ${level}`, async () => {
    await using cli = await Cli.start(config, ...args, "--log-level", "info");
    await drop(cli);
    await assertExits(cli);
    const lines = cli.stdout.trimEnd().split("\n");
    assertReported(defined(lines.pop()), [...warnings]);
    const told = JSON.parse(defined(lines.pop()));
    assertEquals(told, { ...told, level, event: "report", warnings });
  });
}

test("in a text log the last line sums the report up", async () => {
  await using folder = await oldReport();
  await using file = await TempFile.with(JSON.stringify(CONFIG), ".json");
  await using cli = new Writer("--report", folder.file, file.path);
  await cli.says(/ (started) /);
  await assertExits(cli);
  const last = defined(cli.stdout.trimEnd().split("\n").at(-1));
  assertMatch(last, /Z WARN /);
  assertMatch(last, / summary="0 connections, 0 faults injected" warnings=/);
  assert(last.endsWith(` file=${JSON.stringify(folder.file)}`), last);
});

Deno.test("a report that cannot be written is told before it listens, and asks nothing", async () => {
  await using folder = await oldReport();
  const { file, path } = folder;
  const sealed = `${path}/sealed`;
  await Deno.mkdir(sealed);
  if (!IS_WINDOWS) await Deno.chmod(sealed, 0o500);
  const isSealed = await Deno.writeTextFile(`${sealed}/x`, "")
    .then(() => console.log("this user may write everywhere"), () => true);
  const without = (name: string) => WRITES.filter((each) => each !== name);
  const IN_SYSTEMS_WORDS = /^[^':]+$/;
  const reports: [report: string, cause: RegExp, permissions?: string[]][] = [
    [path, /^it is not a file$/],
    [`${path}/none/r.json`, IN_SYSTEMS_WORDS],
    [`${file}/r.json`, IN_SYSTEMS_WORDS],
    [file, /^it takes --allow-read$/, without("--allow-read")],
    [file, /^it takes --allow-write$/, without("--allow-write")],
  ];
  if (isSealed) reports.push([`${sealed}/r.json`, /^Permission denied$/]);
  if (!IS_WINDOWS) reports.push(["/dev/null", /^it is not a file$/]);
  await Promise.all(
    reports.map(async ([report, cause, permissions = WRITES]) => {
      const Program = permitted(permissions);
      await using cli = new Program("--api", "0", "--report", report);
      assertEquals((await soon(cli.status, "end")).code, 2, report);
      const begin = `chaos-proxy: --report ${report}: cannot be written: `;
      assertEquals([cli.stdout, cli.stderr.startsWith(begin)], ["", true]);
      assertMatch(cli.stderr.slice(begin.length).trimEnd(), cause);
    }),
  );
  assertEquals(folder.names().sort(), ["report.json", "sealed"]);
  assertEquals(folder.read(), "old");
});

Deno.test("a proxy that does not start leaves an old report as it is", async () => {
  using busy = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const routes = [{ localPort: busy.addr.port, upstream: "localhost:1" }];
  await using file = await TempFile.with(JSON.stringify({ routes }), ".json");
  await using folder = await oldReport();
  await using cli = new Writer("--report", folder.file, file.path);
  assertEquals((await soon(cli.status, "end")).code, 1);
  folder.assertOld();
});

test("a report that cannot be written at the end is told", async () => {
  const folder = await oldReport();
  await using cli = await Writer.start(CONFIG, "--report", folder.file);
  await folder[Symbol.asyncDispose]();
  await assertExits(cli, 2);
  assertMatch(
    cli.stderr,
    /^chaos-proxy: --report .*: cannot be written: No such[^']*\n$/,
  );
  assertEquals(cli.log.of("report"), []);
});

// ---- Health ------------------------------------------------------------------

Deno.test("GET /health, and the image's check, is good while it accepts, and bad while it drains", async () => {
  const dockerfile = await Deno.readTextFile(new URL("Dockerfile", ROOT));
  const check = captured(/^HEALTHCHECK [^[]*(\[.*\])$/m, dockerfile);
  const [command, ...args]: string[] = JSON.parse(check);
  assertEquals(command, "deno");
  const codeOf = async (port: number) => {
    const { code } = await new Deno.Command(Deno.execPath(), {
      args: args.map((arg) => arg.replace(":8474/", `:${port}/`)),
    }).output();
    return code;
  };
  await using at = await openEcho();
  await assertEchoes(at.client);
  const { watched } = at;
  await using api = Api.of(watched);
  const { status, body } = await api.get("/health");
  const { version, uptimeMs, elapsedMs } = body;
  const times = { uptimeMs, elapsedMs };
  assertEquals([status, body], [200, { status: "ok", version, ...times }]);
  assertEquals(version, (await api.get("/version")).body.chaosProxyVersion);
  assertEquals(await codeOf(api.port), 0);
  const drained = watched.proxy.drain(LONG_MS);
  const later = await api.get("/health");
  assertEquals([later.status, later.body.status], [503, "draining"]);
  assert(later.body.uptimeMs > uptimeMs && uptimeMs > 0);
  assertEquals(await codeOf(api.port), 1);
  assertEquals(await codeOf(steadyPort()), 1);
  at.client.close();
  await drained;
  assertEquals((await api.get("/health")).status, 503);
});

Deno.test("a probe may ask for the health by any IP address", async () => {
  await using proxy = await ChaosProxy.start({});
  const answer = controlApi(proxy);
  const statuses = { "10.1.2.3:8474": 200, "[fe80::1]:8474": 200, "a.b": 403 };
  for (const [host, expected] of Object.entries(statuses)) {
    for (const method of ["GET", "HEAD"]) {
      const asked = new Request(`http://${host}/health`, { method });
      const { status, body } = await answer(asked);
      await body?.cancel();
      assertEquals(status, expected, `${method} ${host}`);
    }
  }
});
