/** What the report says of a run, how it is written, and the health. */

import {
  assert,
  assertEquals,
  assertGreater,
  assertMatch,
  assertStringIncludes,
} from "@std/assert";
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
  readExactly,
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
  writeAll,
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

Deno.test("a connection's record has its decision, the toxics that acted, and its outcome", async () => {
  await using upstream = echo();
  const { address } = upstream;
  await using watched = await WatchedProxy.start({
    seed: 1,
    routes: [
      { name: "drop", localPort: 0, upstream: address, dropRate: 1 },
      { name: "hold", localPort: 0, upstream: address, timeoutRate: 1 },
      { name: "dead", localPort: 0, upstream: nowhere().address },
      {
        name: "slow",
        localPort: 0,
        upstream: address,
        latencyMs: 2,
        toxics: [toxic("noop"), toxic("limit_data bytes=3 name=bye")],
      },
      { name: "open", localPort: 0, upstream: address },
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
  assertEquals(records, [
    { ...none, decision: "drop", outcome: { why: "fault" } },
    { ...none, decision: "timeout", outcome: { why: "client" } },
    {
      ...none,
      decision: "forward",
      outcome: { why: "upstream_failed", cause: defined(cause) },
    },
    {
      ...none,
      decision: "forward",
      delayMs: 2,
      toxics: ["noop_downstream", "bye"],
      outcome: { why: "fault", toxic: "bye" },
    },
    {
      ...none,
      decision: "forward",
      toxics: ["latency_downstream"],
      outcome: null,
    },
  ]);
  const counts = report.routes.map((each) => [each.connections, each.open]);
  assertEquals(counts, [[1, 0], [1, 0], [1, 0], [1, 0], [1, 1]]);
  const [, , , slow, open] = report.routes;
  assertEquals(slow?.faults, { latencyMs: 1, noop: 1, limit_data: 1 });
  assertEquals(slow?.toxics, { noop_downstream: 1, bye: 1 });
  assertEquals(slow?.ended, { fault: 1 });
  assertEquals(open?.toxics, { latency_downstream: 2 });
  assertEquals([slow?.received.upstream, open?.sent.downstream], [5, 5]);
  assertEquals([slow?.dials.count, report.seed], [1, 1]);

  client.close();
  await log.first("closed", 5);
  assertEquals(records.at(-1)?.outcome, null, "the report is no snapshot");
});

Deno.test("GET /report is what the library says", async () => {
  await using at = await openEcho({ toxics: [toxic("noop name=constructor")] });
  await assertEchoes(at.client);
  await using api = Api.of(at.watched);
  const { status, body } = await api.get("/report");
  const report = at.watched.proxy.report();
  assert(0 < body.durationMs && body.durationMs <= report.durationMs);
  const { durationMs } = body;
  assertEquals([status, body], [200, { ...report, durationMs }]);
  assertEquals(only(report.routes).toxics, { constructor: 1 });
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
    return only(watched.proxy.report().routes).first;
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
  await times(20, async () => {
    for (let i = 0; i < 51; i++) {
      using client = await watched.connect();
      await readToEnd(client);
    }
  });
  await log.first("closed", 1020);
  const { connections, first } = only(proxy.report().routes);
  assertEquals(connections, 1020);
  const numbers = first.map(({ number }) => number);
  assertEquals(numbers, numbersTo(1000));

  proxy.reseed(9);
  const reseeded = proxy.report();
  assertEquals([reseeded.seed, only(reseeded.routes).first], [9, []]);
  using client = await watched.connect();
  await readToEnd(client);
  await log.first("closed", 1021);
  const again = only(proxy.report().routes);
  assertEquals(again.first.map(({ number }) => number), [1]);
  assertEquals([again.connections, again.ended], [1021, { fault: 1021 }]);
});

/** What is shown, and no more, of what there is. */
function partOf(all: unknown, shown: unknown): unknown {
  if (Array.isArray(shown) && Array.isArray(all)) {
    return all.map((each, index) => partOf(each, shown[index]));
  }
  if (typeof shown !== "object" || shown === null) return all;
  const keys = Object.keys(shown) as (keyof typeof shown)[];
  const part = keys.map((key) => [
    key,
    partOf((all as typeof shown)?.[key], shown[key]),
  ]);
  return Object.fromEntries(part);
}

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
  const expected = JSON.parse(shown);
  assertEquals(partOf(watched.proxy.report(), expected), expected);
});

// ---- Warnings ----------------------------------------------------------------

Deno.test("a fault that acted on no connection is warned of", async () => {
  await using upstream = echo();
  const rates = { dropRate: 1e-9, timeoutRate: 1e-9 };
  const toxics = [
    toxic("noop toxicity=0 name=never"),
    toxic("noop toxicity=0 name=constructor"),
    toxic("noop name=always"),
  ];
  const route = { localPort: 0, upstream: upstream.address };
  await using watched = await WatchedProxy.start({
    seed: 1,
    routes: [
      { ...route, name: "a", ...rates, toxics },
      { ...route, name: "b", dropRate: 1, latencyMs: 5 },
      { ...route, name: "acted", dropRate: 1 },
      { ...route, name: "plain" },
      { ...route, name: "unused", ...rates, toxics },
      { ...route, name: "off", enabled: false, ...rates },
    ],
  });
  for (const index of [0, 0, 1, 2, 3]) {
    using client = await watched.connect(index);
    await exchange(client, testBytes(5)).catch(unlessDisconnected);
  }
  await watched.log.first("closed", 5);
  assertEquals(watched.proxy.report().warnings, [
    "a: dropRate 1e-9: acted on none of 2 connections",
    "a: timeoutRate 1e-9: acted on none of 2 connections",
    "a: toxic never: acted on none of 2 connections",
    "a: toxic constructor: acted on none of 2 connections",
    "b: latencyMs 5: acted on none of 1 connection",
    "unused: no connection",
    "off: no connection",
  ]);
});

Deno.test("faults that acted are not warned of", async () => {
  await using watched = await WatchedProxy.to(nowhere(), {
    dropRate: 0.4,
    timeoutRate: 0.4,
    timeoutMs: 1,
    latencyMs: 1,
  });
  await connectOften(watched, 20);
  const { warnings, routes } = watched.proxy.report();
  assertEquals(warnings, []);
  const kinds = Object.keys(only(routes).faults).sort();
  assertEquals(kinds, ["dropRate", "latencyMs", "timeoutRate"]);
});

Deno.test("a toxic that acts by chance counts once it hits, once a connection", async () => {
  await using upstream = echo();
  const toxics = [
    "stall upstream rate=1 duration=1",
    "corrupt upstream rate=1",
    "packet_loss upstream loss_rate=1e-9",
    "duplicate rate=0",
  ].map(toxic);
  await using watched = await WatchedProxy.to(upstream, { name: "r", toxics });
  using client = await watched.connect();
  for (const size of [5, 5000]) {
    await writeAll(client, testBytes(size));
    await readExactly(client, size);
  }
  const { warnings, routes } = watched.proxy.report();
  const { faults, first } = only(routes);
  assertEquals(faults, { stall: 1, corrupt: 1 });
  assertEquals(only(first).toxics, ["stall_upstream", "corrupt_upstream"]);
  assertEquals(warnings, [
    "r: toxic packet_loss_upstream: acted on none of 1 connection",
    "r: toxic duplicate_downstream: acted on none of 1 connection",
  ]);
});

// ---- The file ----------------------------------------------------------------

const WRITES = [...PERMISSIONS, "--allow-write"];

/** The program with the permission to write. */
class Writer extends Cli {
  override get permissions() {
    return WRITES;
  }
}

/** A folder with an old report. */
async function folderWith(old: string) {
  const path = await Deno.makeTempDir({ prefix: "a report " });
  const file = `${path}/report.json`;
  await Deno.writeTextFile(file, old);
  return {
    file,
    path,
    names: () => Array.from(Deno.readDirSync(path), ({ name }) => name),
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
const WARNINGS = ["none: no connection"];
const SUMMARY = "2 routes, 1 connection, 1 fault injected, 1 warning";

/** Lets a program drop a connection. */
async function drop(cli: Cli): Promise<void> {
  using client = await Deno.connect({ port: cli.port() });
  await readToEnd(client);
  await cli.log.first("closed", 1);
}

function assertReported(text: string): void {
  const { version, seed, warnings, routes }: Report = JSON.parse(text);
  assertEquals([version, seed], [defined(version), 42]);
  assertEquals(warnings, WARNINGS);
  assertEquals(routes.map(({ connections }) => connections), [1, 0]);
  assertEquals(routes[0]?.faults, { dropRate: 1 });
}

test("--report writes a file once all has ended, and sums it up", async () => {
  await using folder = await folderWith("old");
  await using cli = await Writer.start(CONFIG, "--report", folder.file);
  await drop(cli);
  assertEquals(await Deno.readTextFile(folder.file), "old");
  assertEquals(folder.names(), ["report.json"]);
  cli.kill();
  assertEquals((await soon(cli.status, "end")).code, 0);
  const text = await Deno.readTextFile(folder.file);
  assertReported(text);
  assertMatch(text, /^{\n {2}"version"/);
  assertEquals(folder.names(), ["report.json"]);
  const { file } = folder;
  const event = { event: "report", summary: SUMMARY, warnings: WARNINGS, file };
  const last = defined(cli.log.all.at(-1));
  assertEquals(last, { ...last, level: "warn", ...event } as never);
});

test("a report without warnings is at info, and relative to where one stands", async () => {
  await using folder = await folderWith("old");
  class There extends startedBy(`cd "${folder.path}" && exec "$@"`) {
    override get permissions() {
      return WRITES;
    }
  }
  const routes = defined(CONFIG.routes).slice(0, 1);
  await using cli = await There.start(
    { ...CONFIG, routes },
    ...["--report", "report.json"],
  );
  await drop(cli);
  cli.kill();
  assertEquals((await soon(cli.status, "end")).code, 0);
  const { warnings }: Report = JSON.parse(Deno.readTextFileSync(folder.file));
  assertEquals(warnings, []);
  assertStringIncludes(cli.stdout, '"level":"info","event":"report"');
});

test("a second signal leaves a report, too", async () => {
  await using upstream = echo();
  await using folder = await folderWith("old");
  const config = {
    ...CONFIG,
    routes: [{ localPort: 0, upstream: upstream.address }],
  };
  await using cli = await Writer.start(config, "--report", folder.file);
  using client = await Deno.connect({ port: cli.port() });
  await assertEchoes(client);
  cli.kill("SIGINT");
  await cli.log.first("draining", 1);
  assertEquals(await Deno.readTextFile(folder.file), "old");
  const again = setInterval(() => cli.kill("SIGTERM"), 100);
  const { code } = await cli.status;
  clearInterval(again);
  assertEquals(code, 1);
  assertMatch(cli.stderr, /^.*second signal\n$/);
  const report: Report = JSON.parse(await Deno.readTextFile(folder.file));
  const { open, first } = only(report.routes);
  assertEquals([open, only(first).outcome], [1, null]);
  assertEquals(folder.names(), ["report.json"]);
  assertEquals(cli.log.only("report").file, folder.file);
});

test("a second signal leaves a long report whole, also behind the log", async () => {
  await using upstream = echo();
  const held = { localPort: 0, upstream: upstream.address };
  const routes = [...defined(CONFIG.routes).slice(0, 1), held];
  await using cli = await Cli.start({ ...CONFIG, routes }, "--report=-");
  await times(20, async () => {
    for (let i = 0; i < 50; i++) {
      using client = await Deno.connect({ port: cli.port() });
      await readToEnd(client);
    }
  });
  using client = await Deno.connect({ port: cli.port(1) });
  await assertEchoes(client);
  cli.kill("SIGINT");
  await cli.log.first("draining", 1);
  const again = setInterval(() => cli.kill("SIGTERM"), 100);
  const { code } = await cli.status;
  clearInterval(again);
  assertEquals(code, 1);
  const last = defined(cli.stdout.trimEnd().split("\n").at(-1));
  assertGreater(last.length, 64 * 1024); // more than a pipe takes at once
  assertEquals(JSON.parse(last).routes[0].first.length, 1000);
});

for (const args of [["--report", "-"], ["--report=-"], ["-report", "-"]]) {
  test(`${args.join(" ")} writes a line behind the log`, async () => {
    await using cli = await Cli.start(CONFIG, ...args, "--log-level", "info");
    await drop(cli);
    cli.kill();
    assertEquals((await soon(cli.status, "end")).code, 0, cli.stderr);
    const lines = cli.stdout.trimEnd().split("\n");
    assertReported(defined(lines.pop()));
    const { event, warnings } = JSON.parse(defined(lines.pop()));
    assertEquals([event, warnings], ["report", WARNINGS]);
  });
}

test("in a text log the last line sums the report up", async () => {
  await using folder = await folderWith("old");
  await using file = await TempFile.with(JSON.stringify(CONFIG), ".json");
  await using cli = new Writer("--report", folder.file, file.path);
  await cli.says(/ (started) /);
  cli.kill();
  assertEquals((await soon(cli.status, "end")).code, 0);
  const last = defined(cli.stdout.trimEnd().split("\n").at(-1));
  assertMatch(last, /Z WARN /);
  const summary = "2 routes, 0 connections, 0 faults injected, 2 warnings";
  const text = ` report ${summary}; written to ${folder.file}`;
  assert(last.endsWith(text), last);
});

Deno.test("a report that cannot be written is told before it listens", async () => {
  await using folder = await folderWith("old");
  await using file = await TempFile.with(JSON.stringify(CONFIG), ".json");
  const { path } = folder;
  const sealed = `${path}/sealed`;
  await Deno.mkdir(sealed);
  if (!IS_WINDOWS) await Deno.chmod(sealed, 0o500);
  const isSealed = await Deno.writeTextFile(`${sealed}/x`, "")
    .then(() => console.log("this user may write everywhere"), () => true);
  const causes: Record<string, RegExp> = {
    [path]: /^it is not a file$/,
    [`${path}/none/r.json`]: /^[^':]+$/, // in the system's words
    [`${folder.file}/r.json`]: /^[^':]+$/,
    ...(isSealed && { [`${sealed}/r.json`]: /^Permission denied$/ }),
    ...(!IS_WINDOWS && { "/dev/null": /^it is not a file$/ }),
  };
  await Promise.all(
    Object.entries(causes).map(async ([report, cause]) => {
      await using cli = new Writer("--report", report, file.path);
      assertEquals((await soon(cli.status, "end")).code, 2, report);
      const begin = `chaos-proxy: --report ${report}: cannot be written: `;
      assertEquals([cli.stdout, cli.stderr.startsWith(begin)], ["", true]);
      assertMatch(cli.stderr.slice(begin.length).trimEnd(), cause);
    }),
  );
  await using empty = new Writer("--report", "", file.path);
  assertEquals((await empty.status).code, 2);
  assertStringIncludes(
    empty.stderr,
    '--report: expected the name of a file; - is standard output, found "',
  );
  assertEquals(folder.names().sort(), ["report.json", "sealed"]);
  assertEquals(await Deno.readTextFile(folder.file), "old");
});

for (const permission of ["read", "write"]) {
  Deno.test(`--report without --allow-${permission} says so, and asks nothing`, async () => {
    class Lacking extends Cli {
      override get permissions() {
        return ["--allow-net", "--allow-read", "--allow-write"]
          .filter((each) => each !== `--allow-${permission}`);
      }
    }
    await using folder = await folderWith("old");
    await using cli = new Lacking("--api", "0", "--report", folder.file);
    assertEquals((await soon(cli.status, "end")).code, 2);
    assertEquals(cli.stdout, "");
    const cause = `: it takes --allow-${permission}\n`;
    assert(cli.stderr.endsWith(cause), cli.stderr);
  });
}

Deno.test("a proxy that does not start leaves an old report as it is", async () => {
  using busy = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const routes = [{ localPort: busy.addr.port, upstream: "localhost:1" }];
  await using file = await TempFile.with(JSON.stringify({ routes }), ".json");
  await using folder = await folderWith("old");
  await using cli = new Writer("--report", folder.file, file.path);
  assertEquals((await soon(cli.status, "end")).code, 1);
  assertEquals(await Deno.readTextFile(folder.file), "old");
  assertEquals(folder.names(), ["report.json"]);
});

test("a report that cannot be written at the end is told", async () => {
  const folder = await folderWith("old");
  await using cli = await Writer.start(CONFIG, "--report", folder.file);
  await folder[Symbol.asyncDispose]();
  cli.kill();
  assertEquals((await soon(cli.status, "end")).code, 2);
  assertMatch(
    cli.stderr,
    /^chaos-proxy: --report .*: cannot be written: No such[^']*\n$/,
  );
  assertEquals(cli.log.of("report"), []);
});

// ---- Health ------------------------------------------------------------------

Deno.test("GET /health is 200 while it accepts, and 503 while it drains", async () => {
  await using at = await openEcho();
  await assertEchoes(at.client);
  const { watched } = at;
  await using api = Api.of(watched);
  const { status, body } = await api.get("/health");
  const { version, uptimeMs } = body;
  assertEquals([status, body], [200, { status: "ok", version, uptimeMs }]);
  assertEquals(version, (await api.get("/version")).body.chaosProxyVersion);
  const drained = watched.proxy.drain(LONG_MS);
  const later = await api.get("/health");
  assertEquals([later.status, later.body.status], [503, "draining"]);
  assert(later.body.uptimeMs > uptimeMs && uptimeMs > 0);
  at.client.close();
  await drained;
  assertEquals((await api.get("/health")).status, 503);
});

Deno.test("a probe may ask for the health by any IP address", async () => {
  await using proxy = await ChaosProxy.start({});
  const answer = controlApi(proxy);
  const statusOf = async (host: string) => {
    const response = await answer(new Request(`http://${host}/health`));
    await response.body?.cancel();
    return response.status;
  };
  assertEquals(await statusOf("10.1.2.3:8474"), 200);
  assertEquals(await statusOf("[fe80::1]:8474"), 200);
  assertEquals(await statusOf("example.com"), 403);
});

Deno.test("the image's health check says whether the API is healthy", async () => {
  const dockerfile = await Deno.readTextFile(new URL("Dockerfile", ROOT));
  const check = captured(/^HEALTHCHECK [^[]*(\[.*\])$/m, dockerfile);
  const [command, ...args]: string[] = JSON.parse(check);
  assertEquals(command, "deno");
  await using at = await openEcho();
  await assertEchoes(at.client);
  await using api = Api.of(at.watched);
  const codeOf = async (port: number) => {
    const { code } = await new Deno.Command(Deno.execPath(), {
      args: args.map((arg) => arg.replace(":8474/", `:${port}/`)),
    }).output();
    return code;
  };
  assertEquals(await codeOf(api.port), 0);
  assertEquals(await codeOf(steadyPort()), 1);
  const drained = at.watched.proxy.drain(LONG_MS);
  assertEquals(await codeOf(api.port), 1);
  at.client.close();
  await drained;
});
