/** The control API: what it answers, and what comes of it. */

import {
  assert,
  assertEquals,
  assertGreater,
  assertGreaterOrEqual,
  assertMatch,
  assertRejects,
  assertStringIncludes,
  assertThrows,
} from "@std/assert";
import deno from "../deno.json" with { type: "json" };
import {
  ChaosProxy,
  ConfigError,
  controlApi,
  DIAL_BOUNDS_MS,
  ListenError,
  parseConfig,
  type Route,
  serveApi,
} from "../main.ts";
import {
  Api,
  captured,
  Cli,
  defined,
  echo,
  only,
  readAll,
  readExactly,
  readToEnd,
  send,
  steadyPort,
  TempFile,
  testBytes,
  text,
  until,
  untilRefused,
  Upstream,
  WatchedProxy,
  writeAll,
} from "./helpers.ts";

const HOUR_MS = 3_600_000;
const BAD = "bad request body: ";
const TOXICS = "/proxies/p/toxics";
const IS_LINUX = Deno.build.os === "linux"; // has 127.0.0.2 as it is
const notOnWindows = { ignore: Deno.build.os === "windows" };

type Json = Record<string, unknown>;

/** A proxy, its API, and an upstream that echoes. */
type Stage = ReturnType<typeof stageOf>;

function stageOf(upstream: Upstream, { proxy, log }: WatchedProxy, api: Api) {
  return {
    ...callsOf(api),
    api,
    proxy,
    log,
    upstream,
    /** Creates a proxy called `p` to the upstream, and returns its port. */
    async create(more: Json = {}): Promise<number> {
      const { status, body } = await api.post("/proxies", {
        name: "p",
        listen: `127.0.0.1:${steadyPort()}`,
        upstream: upstream.address,
        ...more,
      });
      assertEquals(status, 201, JSON.stringify(body));
      return portOf(body);
    },
    /** The proxy `p` as the API shows it. */
    show: async () => (await api.get("/proxies/p")).body,
    /** Changes the proxy `p`, and returns it as it is then. */
    async change(changes: Json) {
      const { status, body } = await api.patch("/proxies/p", changes);
      assertEquals(status, 200, JSON.stringify(body));
      return body;
    },
  };
}

function test(name: string, run: (stage: Stage) => Promise<void>): void {
  Deno.test(name, async () => {
    await using upstream = echo();
    await using watched = await WatchedProxy.start(
      { seed: 1, drainTimeoutMs: 1 },
      { resettable: true },
    );
    await using api = Api.of(watched);
    await run(stageOf(upstream, watched, api));
  });
}

/**
 * What is given, a line a case, and what comes of it, in the indented lines
 * below. Cases of which the same comes stand together.
 */
function casesIn(text: string): [given: string, expected: string[]][] {
  return text.trim().split(/(?<=\n .*)\n(?=\S)/).flatMap((block) => {
    const lines = block.split("\n");
    const given = lines.filter((line) => !line.startsWith(" "));
    const expected = lines.slice(given.length).map((line) => line.trim());
    return given.map((each): [string, string[]] => [each, expected]);
  });
}

/** Calls of an API as text, such as `PATCH /proxies/p {"enabled": true}`. */
function callsOf(api: Api) {
  const make = (call: string) => {
    const [, method, path, body] = /^(\S+) (\S+)(?: (.*))?$/.exec(call) ?? [];
    return api.raw(defined(method), defined(path), body);
  };
  /** That calls are answered so: with a status, and an error. */
  const assertRefused = async (calls: string) => {
    for (const [call, [expected]] of casesIn(calls)) {
      const answer = await make(call);
      const { status, headers } = answer;
      const { error, ...rest } = JSON.parse(answer.text);
      assertEquals(`${status} ${error}`, expected, call);
      assertEquals(rest, { status }, call);
      assertEquals(headers.get("content-type"), "application/json", call);
      const allowed = status === 405 ? error.split(" takes ")[1] : null;
      assertEquals(headers.get("allow"), allowed, call);
    }
  };
  return { make, assertRefused };
}

// deno-lint-ignore no-explicit-any
function portOf(proxy: any): number {
  return Number(captured(/:(\d+)$/, proxy.listen));
}

/** That what is sent to a port comes back. */
async function assertEchoes(port: number): Promise<void> {
  using _ = await connected(port);
}

async function assertEchoesOn(conn: Deno.TcpConn): Promise<void> {
  await send(conn, "hello");
  assertEquals(text(await readExactly(conn, 5)), "hello");
}

/** A connection on which something has gone to and fro. */
async function connected(port: number): Promise<Deno.TcpConn> {
  const conn = await Deno.connect({ port });
  await assertEchoesOn(conn);
  return conn;
}

/** An address that is taken. */
function takenAddress() {
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const listen = `127.0.0.1:${listener.addr.port}`;
  return { listen, [Symbol.dispose]: () => listener.close() };
}

// ---- Proxies -----------------------------------------------------------------

test("POST /proxies makes a proxy, with faults and toxics, and GET shows it", async ({ api, upstream }) => {
  assertEquals(await api.get("/proxies"), { status: 200, body: {} });
  const latency = { type: "latency", attributes: { latency: 5 } };
  const slicer = {
    name: "cut",
    type: "slicer",
    stream: "upstream",
    toxicity: 0.5,
    attributes: { average_size: 10, size_variation: 1, delay: 2 },
  };
  const defaults = {
    dropRate: 0,
    timeoutRate: 0,
    timeoutMs: 0,
    latencyMs: 0,
    jitterMs: 0,
    connectTimeoutMs: 10_000,
    halfCloseTimeoutMs: 60_000,
  };
  const faults = {
    dropRate: 0.25,
    timeoutRate: 0.5,
    timeoutMs: 7,
    latencyMs: 8,
    jitterMs: 9,
    connectTimeoutMs: 10,
    halfCloseTimeoutMs: 11,
  };
  const all: Json = {};
  const toxics = [{
    name: "latency_downstream",
    type: "latency",
    stream: "downstream",
    toxicity: 1,
    attributes: { latency: 5, jitter: 0 },
  }, slicer];
  const proxies: [name: string, given: Json, shown: Json][] = [
    ["db", {}, { toxics: [], ...defaults }],
    ["p", { ...faults, toxics: [latency, slicer] }, { ...faults, toxics }],
  ];
  for (const [name, given, rest] of proxies) {
    const address = { listen: "localhost:0", upstream: upstream.address };
    const created = await api.post("/proxies", { name, ...address, ...given });
    const port = portOf(created.body);
    const listen = `127.0.0.1:${port}`;
    const body = { name, ...address, listen, enabled: true, ...rest };
    assertEquals(created, { status: 201, body });
    assertGreater(port, 0);
    assertEquals(await api.get(`/proxies/${name}`), { status: 200, body });
    all[name] = body;
  }
  assertEquals(await api.get("/proxies"), { status: 200, body: all });
});

test("its faults are injected from the first connection on", async ({ change, create, log, upstream }) => {
  const port = await create({ dropRate: 1 });
  using conn = await Deno.connect({ port });
  assertEquals(await readToEnd(conn), 0);
  assertEquals(upstream.accepted, 0);
  await change({ dropRate: 0, latencyMs: 60 });
  const start = performance.now();
  await assertEchoes(port);
  assertGreaterOrEqual(performance.now() - start, 59);
  const delays = log.of("delayed").map(({ delayMs }) => delayMs);
  assertEquals(delays, [60]);
});

test("a listen address may be any that Toxiproxy takes", async ({ api, create }) => {
  const listens: [given: string | null | undefined, shown: RegExp][] = [
    [undefined, /^127\.0\.0\.1:[1-9]\d*$/],
    [null, /^127\.0\.0\.1:[1-9]\d*$/],
    ["", /^127\.0\.0\.1:[1-9]\d*$/],
    [":0", /^0\.0\.0\.0:[1-9]\d*$/],
    ["0.0.0.0:0", /^0\.0\.0\.0:[1-9]\d*$/],
    ["localhost:0", /^127\.0\.0\.1:[1-9]\d*$/],
    ["[::1]:0", /^\[::1\]:[1-9]\d*$/],
  ];
  for (const [i, [listen, shown]] of listens.entries()) {
    const port = await create({ name: `${i}`, listen });
    assertMatch((await api.get(`/proxies/${i}`)).body.listen, shown);
    const hostname = listen === "[::1]:0" ? "::1" : "127.0.0.1";
    using conn = await Deno.connect({ hostname, port });
    await assertEchoesOn(conn);
  }
});

test("PATCH and POST /proxies/{name} change what is given alone", async ({ api, create, show }) => {
  const port = await create({ latencyMs: 1, toxics: [{ type: "latency" }] });
  const before = await show();
  for (const method of ["PATCH", "POST"]) {
    const answer = await api.call(method, "/proxies/p", {});
    assertEquals(answer, { status: 200, body: before });
    const changed = await api.call(method, "/proxies/p", { jitterMs: 1 });
    assertEquals(changed.body, { ...before, jitterMs: 1 });
    await api.call(method, "/proxies/p", { jitterMs: 0, enabled: null });
  }
  // A client sends back all that it has read, toxics included; these may have
  // changed since, and have calls of their own.
  await api.post(TOXICS, { type: "timeout", toxicity: 0 });
  for (const all of [{ ...before, toxics: null }, before]) {
    assertEquals((await api.post("/proxies/p", all)).status, 200);
  }
  assertEquals((await api.get(TOXICS)).body.length, 2);
  await assertEchoes(port);
});

test("the same addresses, however written, leave the connections alone", async (stage) => {
  const { api, upstream: { address: upstream } } = stage;
  const toxics = [{ type: "latency" }];
  const port = await stage.create({ listen: "127.0.0.1:0", toxics });
  using conn = await connected(port);
  for (const host of ["127.0.0.1", "localhost"]) {
    const same = { name: "p", listen: `${host}:${port}`, upstream };
    const changed = await stage.change({ ...same, enabled: true });
    assertEquals(portOf(changed), port);
    const { body: { proxies } } = await api.post("/populate", [same]);
    assertEquals(proxies[0].toxics.length, 1);
  }
  await assertEchoesOn(conn);
});

test("a listen on port 0 in an update takes a new port", async ({ change, create, proxy }) => {
  let port = await create({ listen: "localhost:0" });
  using conn = await connected(port);
  for (const listen of ["localhost:0", "127.0.0.1:0"]) {
    const body = await change({ listen });
    await untilRefused(port);
    assert(portOf(body) !== port);
    port = portOf(body);
    await assertEchoes(port);
  }
  assertEquals(await readToEnd(conn), 0);
  const route = await proxy.updateRoute("p", { localPort: 0 });
  await untilRefused(port);
  await assertEchoes(route.localPort);
});

test("another upstream cuts the connections, and counts from none", async ({ change, create, log, proxy }) => {
  await using other = echo();
  const port = await create();
  await assertEchoes(port);
  await log.first("closed", 1);
  using conn = await connected(port);
  const body = await change({ upstream: other.address });
  assertEquals([portOf(body), body.upstream], [port, other.address]);
  const received = () => only(proxy.stats()).received;
  assertEquals(received(), { upstream: 0, downstream: 0 });
  assertEquals(await readToEnd(conn), 0);
  const [, closed] = await log.first("closed", 2);
  assertEquals(closed?.why, "cut");
  await assertEchoes(port);
  assertEquals(other.accepted, 1);
  assertEquals(received().upstream, 5);
});

test("another listen address cuts the connections, and listens there", async ({ change, create }) => {
  const port = await create();
  using conn = await connected(port);
  const other = steadyPort();
  const { listen } = await change({ listen: `127.0.0.1:${other}` });
  assertEquals(listen, `127.0.0.1:${other}`);
  assertEquals(await readToEnd(conn), 0);
  await untilRefused(port);
  await assertEchoes(other);
  // On the same port of all addresses, for which it has to make way for itself.
  const wider = await change({ listen: `:${other}` });
  assertEquals(wider.listen, `0.0.0.0:${other}`);
  await assertEchoes(other);
});

test("an address that cannot be listened on leaves all as it was", async ({ api, assertRefused, create, show }) => {
  const port = await create();
  using conn = await connected(port);
  using taken = takenAddress();
  const { listen } = taken;
  const before = await show();
  await assertRefused(`
PATCH /proxies/p {"listen": "${listen}", "dropRate": 1}
POST /proxies {"name": "q", "listen": "${listen}", "upstream": "a:1"}
  500 listen tcp ${listen}: bind: address already in use
`);
  assertEquals((await api.get("/proxies")).body, { p: before });
  await assertEchoesOn(conn);
  await assertEchoes(port);
  // Not even where it had to make way for itself.
  if (!IS_LINUX) return;
  using _other = Deno.listen({ hostname: "127.0.0.2", port });
  await assertRefused(`
PATCH /proxies/p {"listen": ":${port}"}
  500 listen tcp 0.0.0.0:${port}: bind: address already in use
`);
  assertEquals(await show(), before);
  await assertEchoes(port);
});

test("enabled: false stops listening and cuts, true starts again", async ({ change, create, show }) => {
  const address = `127.0.0.1:${steadyPort()}`;
  const listen = address.replace("127.0.0.1", "localhost");
  const toxics = [{ type: "latency" }];
  const port = await create({ enabled: false, listen, toxics });
  const created = await show();
  assertEquals([created.enabled, created.listen], [false, listen]);
  await untilRefused(port);
  const enabled = await change({ enabled: true });
  assertEquals([enabled.enabled, enabled.listen], [true, address]);
  for (let round = 0; round < 3; round++) {
    using conn = await connected(port);
    const off = await change({ enabled: false });
    assertEquals([off.enabled, portOf(off)], [false, port]);
    assertEquals(await readToEnd(conn), 0);
    await untilRefused(port);
    assertEquals(await change({ enabled: false }), off);
    const on = await change({ enabled: true });
    assertEquals([on.enabled, portOf(on)], [true, port]);
    assertEquals(on.toxics.length, 1);
    await assertEchoes(port);
  }
});

test("DELETE /proxies/{name} stops listening, cuts, and forgets", async ({ api, create }) => {
  const port = await create();
  using conn = await connected(port);
  const deleted = await api.delete("/proxies/p");
  assertEquals(deleted, { status: 204, body: undefined });
  assertEquals(await readToEnd(conn), 0);
  await untilRefused(port);
  assertEquals((await api.get("/proxies")).body, {});
  await create({ listen: `127.0.0.1:${port}` });
  await assertEchoes(port);
});

test("names are found as they are written in a path, encoded or not", async ({ api, create }) => {
  const plain = "10.96.1.2:9094_us@host";
  for (const name of [plain, "größe", "a/b", "100%", "x".repeat(255)]) {
    await create({ name });
    const path = `/proxies/${encodeURIComponent(name)}`;
    assertEquals((await api.get(path)).body.name, name);
  }
  assertEquals((await api.get(`/proxies/${plain}`)).body.name, plain);
});

test("POST /populate creates, replaces what differs, and leaves the rest alone", async (stage) => {
  await using other = echo();
  const { api, proxy } = stage;
  const populate = async (list: unknown[]) => {
    const { status, body } = await api.post("/populate", list);
    assertEquals(status, 201, JSON.stringify(body));
    return body.proxies;
  };
  const listen = "localhost:0";
  const { address } = stage.upstream;
  const proxies = await populate(
    ["a", "b", "c"].map((name) => ({ name, listen, upstream: address })),
  );
  const [a, b, c] = proxies;
  assertEquals([a.name, b.name, c.name, proxies.length], ["a", "b", "c", 3]);
  for (const each of proxies) await assertEchoes(portOf(each));
  await api.post("/proxies/a/toxics", { type: "latency" });
  await api.post("/proxies/b/toxics", { type: "latency" });
  using left = await connected(portOf(a));
  using cut = await connected(portOf(b));

  const [a2, b2, c2, d2] = await populate([
    { name: "a", listen: a.listen, upstream: a.upstream, toxics: null },
    { name: "b", listen: b.listen, upstream: other.address },
    { name: "c", listen, upstream: c.upstream, enabled: false },
    { name: "d", listen, upstream: other.address, enabled: false },
  ]);
  assertEquals([a2.toxics.length, a2.enabled], [1, true]);
  assertEquals([b2.upstream, b2.toxics], [other.address, []]);
  assertEquals(portOf(b2), portOf(b));
  assertEquals(c2, c); // also that it is enabled is left alone
  assertEquals(d2.enabled, false);
  await assertEchoesOn(left);
  assertEquals(await readToEnd(cut), 0);
  using _replaced = await connected(portOf(b));
  assertEquals(other.accepted, 1);
  const toB = proxy.liveConnections().filter(({ route }) => route === "b");
  assertEquals(toB.map(({ number }) => number), [1]);
  assertEquals(await populate([]), []);
});

test("POST /populate that cannot listen leaves what came before", async ({ api, assertRefused, upstream }) => {
  using taken = takenAddress();
  const to = `"upstream": "${upstream.address}"`;
  await assertRefused(`
POST /populate [{"name": "a", ${to}}, {"name": "b", "listen": "${taken.listen}", ${to}}, {"name": "c", ${to}}]
  500 listen tcp ${taken.listen}: bind: address already in use
`);
  const { body } = await api.get("/proxies");
  assertEquals(Object.keys(body), ["a"]);
  await assertEchoes(portOf(body.a));
});

// ---- Toxics ------------------------------------------------------------------

test("a toxic is added, shown, changed by either method, and removed", async ({ api, create }) => {
  await create();
  assertEquals(await api.get(TOXICS), { status: 200, body: [] });

  const toxic = {
    name: "latency_downstream",
    type: "latency",
    stream: "downstream",
    toxicity: 1,
    attributes: { latency: 80, jitter: 0 },
  };
  const given = { type: "latency", attributes: { latency: 80 } };
  assertEquals(await api.post(TOXICS, given), { status: 200, body: toxic });
  assertEquals(await api.get(TOXICS), { status: 200, body: [toxic] });
  const path = `${TOXICS}/${toxic.name}`;
  assertEquals(await api.get(path), { status: 200, body: toxic });

  const jittery = { ...toxic, attributes: { latency: 80, jitter: 3 } };
  const changes: [method: string, changes: unknown, toxic: unknown][] = [
    ["PATCH", { attributes: { jitter: 3 } }, jittery],
    ["POST", { toxicity: 0.5 }, { ...jittery, toxicity: 0.5 }],
    // Some clients always send all there is, and not always as it is.
    [
      "PATCH",
      { ...toxic, name: "x", stream: "UpStream", attributes: null },
      jittery,
    ],
  ];
  for (const [method, changed, body] of changes) {
    assertEquals(await api.call(method, path, changed), { status: 200, body });
  }

  assertEquals(await api.delete(path), { status: 204, body: undefined });
  assertEquals((await api.get(path)).status, 404);
  assertEquals(await api.get(TOXICS), { status: 200, body: [] });
});

test("every type is added with all its attributes, in numbers", async ({ api, create }) => {
  await create();
  const defaults: Record<string, Record<string, number>> = {
    latency: { latency: 0, jitter: 0 },
    bandwidth: { rate: 0 },
    slow_close: { delay: 0 },
    timeout: { timeout: 0 },
    reset_peer: { timeout: 0 },
    slicer: { average_size: 7, size_variation: 0, delay: 0 },
    limit_data: { bytes: 0 },
    packet_loss: { loss_rate: 0.1, correlation: 0 },
    corrupt: { rate: 0.001 },
    limit_time: { time: 0 },
    noop: {},
  };
  for (const [type, attributes] of Object.entries(defaults)) {
    const { status, body } = await api.post(TOXICS, {
      name: "",
      type,
      attributes: type === "slicer" ? { average_size: 7 } : null,
    });
    assertEquals([status, body.attributes], [200, attributes], type);
    assertEquals(body.name, `${type}_downstream`);
  }
});

test("a connection that is cut as Testcontainers does it comes back", async ({ api, create, proxy }) => {
  using conn = await connected(await create());
  // As its setConnectionCut: by the names it gives, and with a rate of 0.
  const add = async (stream: string, attributes: Record<string, number>) => {
    const name = `CUT_CONNECTION_${stream}`;
    const toxic = { name, type: "bandwidth", stream, toxicity: 1, attributes };
    const { body } = await api.post(TOXICS, toxic);
    assertEquals(body.attributes, { rate: 0 });
    return `${TOXICS}/${name}`;
  };
  const up = await add("upstream", { rate: 0 });
  const down = await add("downstream", {}); // which is 0, too
  const bytes = testBytes(100_000);
  const total = 5 + bytes.length;
  const sending = writeAll(conn, bytes);
  const got = readExactly(conn, bytes.length);
  const untilRead = (side: "bytesUp" | "bytesDown") =>
    until(() => only(proxy.liveConnections())[side] === total, `${side} read`);
  await untilRead("bytesUp");
  assertEquals((await api.delete(up)).status, 204);
  await untilRead("bytesDown");
  assertEquals(only(proxy.stats()).sent, { upstream: total, downstream: 5 });
  assertEquals((await api.delete(down)).status, 204);
  await sending;
  assertEquals(await got, bytes);
});

test("what Toxiproxy ignores is ignored, and named", async ({ api, log, make }) => {
  const proxy = '"listen": "localhost:0", "upstream": "a:1"';
  const calls = `
POST /proxies {"name": "p", ${proxy}}
PATCH /proxies/p {"name": "p", "upstream": "a:1", "listen": null, "toxics": []}
  nothing
PATCH /proxies/p {"Logger": {}, "toxics": [{"type": "latency"}]}
  Logger
  toxics
POST ${TOXICS} {"type": "latency", "toxicity": 1}
PATCH /proxies/p {"toxics": [{"attributes": {"jitter": 0, "latency": 0}, "name": "latency_downstream", "type": "latency", "stream": "downstream", "toxicity": 1}]}
  nothing
POST ${TOXICS} {"name": "l", "type": "latency", "toxicity": 80, "attributes": {"latency": 0, "timeout": 5}}
  toxicity: 80 counts as 1
  attributes.timeout
PATCH ${TOXICS}/l {"name": "l", "type": "latency"}
  nothing
POST ${TOXICS}/l {"type": "timeout", "stream": "UPSTREAM", "toxicity": 1.5, "delay": 5}
  delay
  toxicity: 1.5 counts as 1
  type: stays latency
  stream: stays downstream
POST /populate [{"name": "q", ${proxy}, "toxics": [{"type": "latency", "id": 1, "attributes": {"latency": 0, "delay": 1}}], "ünknown": 1}]
  [0]."ünknown"
  [0].toxics[0].id
  [0].toxics[0].attributes.delay
PUT /seed {"seed": 1, "sede": 2}
  sede
`;
  const header = "X-Chaos-Proxy-Ignored";
  for (const [call, expected] of casesIn(calls)) {
    const answer = await make(call);
    assert(answer.status < 300, `${call}: ${answer.text}`);
    const names = expected[0] === "nothing" ? undefined : expected;
    const shown = names?.join(", ").replace("ü", "?") ?? null;
    assertEquals(answer.headers.get(header), shown, call);
    assertEquals(defined(log.of("api").at(-1)).ignored, names, call);
  }
  const { body } = await api.get(`${TOXICS}/l`);
  assertEquals([body.type, body.toxicity], ["latency", 1]);

  // Also where the call fails, which may be why; and never at any length.
  const failed = await make('POST /proxies {"nmae": "x", "upstream": "a:1"}');
  assertEquals([failed.status, failed.headers.get(header)], [400, "nmae"]);
  const keys = Array.from({ length: 60_000 }, (_, i) => [`key${i}`, 1]);
  const many = Object.fromEntries(keys);
  const answer = await api.raw("PATCH", "/proxies/p", many);
  assertEquals(answer.status, 200);
  const shown = defined(answer.headers.get(header));
  assertMatch(shown, /^key0, .* \.\.\. and 59950 more$/);
  assertEquals(log.of("api").at(-1)?.ignored?.length, 51);
});

test("an upstream without a port is taken, and its connections fail", async (stage) => {
  const { create, log, make, proxy, upstream: { address } } = stage;
  const port = await create({ upstream: "one.example" });
  const { headers } = await make('PATCH /proxies/p {"upstream": "[::1]"}');
  assertEquals(
    headers.get("X-Chaos-Proxy-Ignored"),
    "upstream: [::1] has no port; its connections fail",
  );
  using conn = await Deno.connect({ port });
  assertEquals(await readToEnd(conn), 0);
  const [failed] = await log.first("upstream_failed", 1);
  assertEquals(failed.upstream, "[::1]");
  assertEquals(failed.cause, "the upstream has no port; expected host:port");
  // Without a host it is one of localhost.
  const upstream = address.replace("127.0.0.1", "");
  const changed = await stage.change({ upstream });
  assertEquals(changed.upstream, `localhost${upstream}`);
  await assertEchoes(port);
  // A route takes none.
  for (
    const attempt of [
      () => proxy.updateRoute("p", { upstream: "one.example" }),
      () => proxy.addRoute({ localPort: 0, upstream: "one.example" }),
    ]
  ) {
    const problem = "upstream: expected host:port or [ipv6]:port";
    await assertRejects(attempt, ConfigError, problem);
  }
});

test("keys in any case are known, as Toxiproxy knows them", async ({ make, show }) => {
  const calls = `
POST /proxies {"Name": "p", "UPSTREAM": "a:1", "Enabled": false, "LATENCYMS": 1}
  201
POST ${TOXICS} {"Name": "slow", "Type": "latency", "Stream": "UpStream", "Toxicity": 0.25, "Attributes": {"Latency": 3, "JITTER": 1}, "condition": null}
POST ${TOXICS}/slow {"Toxicity": null, "Attributes": {"Latency": 5}}
  200
`;
  for (const [call, [status]] of casesIn(calls)) {
    assertEquals(`${(await make(call)).status}`, status, call);
  }
  const { upstream, enabled, latencyMs, toxics } = await show();
  assertEquals([upstream, enabled, latencyMs], ["a:1", false, 1]);
  assertEquals(toxics, [{
    name: "slow",
    type: "latency",
    stream: "upstream",
    toxicity: 0.25,
    attributes: { latency: 5, jitter: 1 },
  }]);
});

test("POST /reset enables every proxy, and removes all toxics", async ({ api, create }) => {
  const port = await create({
    dropRate: 0.5,
    toxics: [{ type: "timeout" }, { type: "latency" }],
  });
  const toxics = [{ type: "reset_peer" }];
  await create({ name: "off", enabled: false, toxics });
  for (const body of [undefined, "", "{}", "not looked at"]) {
    const answer = await api.post("/reset", body);
    assertEquals(answer, { status: 204, body: undefined });
  }
  const { p, off } = (await api.get("/proxies")).body;
  assertEquals([p.toxics, off.toxics], [[], []]);
  assertEquals([p.enabled, off.enabled], [true, true]);
  assertEquals([portOf(p), p.dropRate], [port, 0.5]);
  await assertEchoes(portOf(off));
});

test("POST /reset does what it can, and says what it could not", async ({ api, assertRefused, create }) => {
  using taken = takenAddress();
  const { listen } = taken;
  await create({ name: "a", listen, enabled: false });
  const port = await create({ name: "b", toxics: [{ type: "timeout" }] });
  await assertRefused(`
POST /reset
  500 listen tcp ${listen}: bind: address already in use
`);
  assertEquals((await api.get("/proxies/a")).body.enabled, false);
  await assertEchoes(port);
});

// ---- Refusals ----------------------------------------------------------------

/** Calls that are refused, by the name of their test. */
const REFUSALS = {
  "what POST /proxies refuses, it says, and makes nothing": `
POST /proxies {"listen": "127.0.0.1:0", "upstream": "127.0.0.1:9"}
POST /proxies {"name": "", "upstream": "127.0.0.1:9"}
POST /proxies {"name": null, "upstream": "127.0.0.1:9"}
POST /proxies {}
  400 missing required field: name
POST /proxies {"name": "x", "listen": "127.0.0.1:0"}
POST /proxies {"name": "x", "upstream": ""}
  400 missing required field: upstream
POST /proxies {"name": "p", "upstream": "127.0.0.1:9"}
  409 proxy already exists
POST /proxies {"name": "a b", "upstream": "127.0.0.1:9"}
  400 ${BAD}name: expected 1 to 255 characters without white space, not . or .., found "a b"; write a-b
POST /proxies {"name": ".", "upstream": "127.0.0.1:9"}
  400 ${BAD}name: expected 1 to 255 characters without white space, not . or .., found "."
POST /proxies {"name": "..", "upstream": "127.0.0.1:9"}
  400 ${BAD}name: expected 1 to 255 characters without white space, not . or .., found ".."
POST /proxies {"name": "x", "upstream": "a:b"}
  400 ${BAD}upstream: expected host:port or [ipv6]:port, the port from 1 to 65535, found "a:b"
POST /proxies {"name": "x", "upstream": "a:1", "listen": "nowhere"}
  400 ${BAD}listen: expected host:port, [ipv6]:port or :port, the port from 0 to 65535, found "nowhere"
POST /proxies {"name": "x", "upstream": "a:1", "enabled": "yes"}
  400 ${BAD}enabled: expected true or false, found "yes"
POST /proxies {"name": "x", "upstream": "a:1", "dropRate": 2}
  400 ${BAD}dropRate: expected a number from 0 to 1, found 2
POST /proxies {"name": "x", "upstream": "a:1", "toxics": [{"type": "latency", "attributes": {"latency": "1"}}]}
  400 ${BAD}toxics[0].attributes.latency: expected an integer from 0 to 2147483647, found "1"; remove the quotes
POST /proxies []
  400 ${BAD}expected a mapping with name and upstream, found a list
POST /proxies 5
  400 ${BAD}expected a mapping with name and upstream, found 5
POST /proxies {
  400 ${BAD}line 1, column 2: invalid JSON: expected a key in double quotes, found the end
POST /proxies
  400 ${BAD}line 1, column 1: invalid JSON: expected a value, found the end
`,
  "what PATCH /proxies/{name} refuses, it says, and changes nothing": `
PATCH /proxies/p {"name": "q"}
  400 ${BAD}name: expected p, which cannot be changed, found "q"
PATCH /proxies/p {"upstream": "a:b", "enabled": 1}
  400 ${BAD}enabled: expected true or false, found 1; upstream: expected host:port or [ipv6]:port, the port from 1 to 65535, found "a:b"
PATCH /proxies/p []
  400 ${BAD}expected a mapping, found a list
PATCH /proxies/p
  400 ${BAD}line 1, column 1: invalid JSON: expected a value, found the end
`,
  "a proxy that is not there is not found, by any call": `
GET /proxies/none
POST /proxies/none {"type": "latency"}
PATCH /proxies/none {"type": "latency"}
DELETE /proxies/none
GET /proxies/none/toxics
POST /proxies/none/toxics {"type": "latency"}
GET /proxies/none/toxics/x
PATCH /proxies/none/toxics/x {"type": "latency"}
DELETE /proxies/none/toxics/x
GET /proxies/%zz
  404 proxy not found
`,
  "what POST /populate refuses, it says, and changes nothing": `
POST /populate [{"upstream": "a:1"}]
  400 missing required field: name at proxy 1
POST /populate [{"name": "p", "upstream": "a:1"}, {"name": "b"}]
  400 missing required field: upstream at proxy 2
POST /populate [{"name": "p", "upstream": "a:1"}, {"name": "", "upstream": "a:1"}]
  400 missing required field: name at proxy 2
POST /populate {}
  400 ${BAD}expected a list of proxies, found a mapping
POST /populate [5]
  400 ${BAD}[0]: expected a mapping with name and upstream, found 5
POST /populate [{"name": "p", "upstream": "a:1"}, {"name": "p", "upstream": "a:1"}]
  400 ${BAD}[1].name: p is already taken by [0]
POST /populate [{"name": "p", "listen": "127.0.0.1:5", "upstream": "a:1"}, {"name": "q", "listen": "127.0.0.1:5", "upstream": "a:1"}]
  400 ${BAD}[1].listen: 127.0.0.1:5 is already taken by [0]
POST /populate [{"name": "p", "upstream": "a:1"}, {"name": "q", "upstream": "a:1", "toxics": [{"type": "x"}]}]
  400 ${BAD}[1].toxics[0].type: expected latency or bandwidth or slow_close or timeout or reset_peer or slicer or limit_data or packet_loss or corrupt or limit_time or noop, found "x"
`,
  "what a toxic's calls refuse, they say, and change nothing": `
POST ${TOXICS} {"type": "latency"}
  409 toxic already exists
POST ${TOXICS} {"type": "latency", "stream": "sideways"}
POST ${TOXICS} {"type": "latency", "stream": ""}
  400 stream was invalid, can be either upstream or downstream
POST ${TOXICS} {"type": "lattency"}
  400 invalid toxic type; did you mean latency?
POST ${TOXICS} {"type": "constructor"}
POST ${TOXICS} {"type": null}
POST ${TOXICS} {}
  400 invalid toxic type
POST ${TOXICS} {"type": "bandwidth", "attributes": []}
  400 ${BAD}attributes: expected a mapping, found a list
POST ${TOXICS} {"type": "timeout", "attributes": {"timeout": -1}}
  400 ${BAD}attributes.timeout: expected an integer from 0 to 2147483647, found -1
POST ${TOXICS} {"type": "timeout", "toxicity": "80"}
  400 ${BAD}toxicity: expected a number from 0 to 1, found "80"
POST ${TOXICS} {"type": "timeout", "stream": 5}
  400 ${BAD}stream: expected upstream or downstream, found 5
POST ${TOXICS} {"type": "slicer"}
  400 ${BAD}attributes.average_size: missing; expected an integer from 1 to 9007199254740991
POST ${TOXICS} {"type": "noop", "name": "."}
  400 ${BAD}name: expected 1 to 255 characters without white space, not . or .., found "."
POST ${TOXICS} {"type": "noop", "name": ".."}
  400 ${BAD}name: expected 1 to 255 characters without white space, not . or .., found ".."
POST ${TOXICS} []
  400 ${BAD}expected a mapping with type, found a list
POST ${TOXICS} {]
  400 ${BAD}line 1, column 2: invalid JSON: expected a key in double quotes, found "]"
PATCH ${TOXICS}/latency_downstream {"attributes": {"latency": "x"}}
  400 ${BAD}attributes.latency: expected an integer from 0 to 2147483647, found "x"
PATCH ${TOXICS}/latency_downstream {"toxicity": -1}
  400 ${BAD}toxicity: expected a number from 0 to 1, found -1
PATCH ${TOXICS}/latency_downstream 5
  400 ${BAD}expected a mapping, found 5
GET ${TOXICS}/x
PATCH ${TOXICS}/x {}
POST ${TOXICS}/x {}
DELETE ${TOXICS}/x
  404 toxic not found
`,
  "a key that stands twice in different case is refused": `
POST /proxies {"name": "x", "upstream": "a:1", "Upstream": "b:1"}
  400 ${BAD}Upstream: the same key as upstream; write one
POST /populate [{"name": "x", "upstream": "a:1", "Upstream": "b:1"}]
  400 ${BAD}[0].Upstream: the same key as upstream; write one
POST /proxies/p {"ENABLED": true, "enabled": false}
  400 ${BAD}enabled: the same key as ENABLED; write one
POST ${TOXICS} {"type": "noop", "Type": null}
  400 ${BAD}Type: the same key as type; write one
POST ${TOXICS}/latency_downstream {"attributes": {"latency": 1, "Latency": 2}}
  400 ${BAD}attributes.Latency: the same key as latency; write one
POST /proxies {"name": "x", "upstream": "a:1", "Upstream": null, "toxics": [{"type": "noop", "TYPE": "noop"}]}
  400 ${BAD}Upstream: the same key as upstream; write one; toxics[0].TYPE: the same key as type; write one
`,
  "what PUT /seed refuses, it says, and changes nothing": `
PUT /seed {"seed": -1}
  400 ${BAD}seed: expected an integer from 0 to 9007199254740991, found -1
PUT /seed {"seed": "1"}
  400 ${BAD}seed: expected an integer from 0 to 9007199254740991, found "1"; remove the quotes
PUT /seed {}
PUT /seed {"seed": null}
  400 missing required field: seed
PUT /seed 5
  400 ${BAD}expected a mapping, found 5
`,
  "a body of hundreds of thousands of wrong things gets 400": `
POST /proxies {"name": "x", "upstream": "a:1", "toxics": ZEROS}
  400 ${BAD}toxics: expected a list of toxics, 500 at most, found a list of 340000
POST /populate [{"name": "x", "upstream": "a:1", "toxics": ZEROS}]
  400 ${BAD}expected at most 10000 toxics in all, found 340000
POST ${TOXICS} ZEROS
  400 ${BAD}expected a mapping with type, found a list of 340000
PATCH /proxies/p {"enabled": 5, "toxics": ZEROS}
  400 ${BAD}enabled: expected true or false, found 5
`,
  "a connection that is not there is not found": `
DELETE /connections/x
  404 connection not found
`,
  "a method that is not for a path is refused, with those that are": `
PUT /proxies
  405 PUT is not for /proxies, which takes GET, POST
GET /reset
  405 GET is not for /reset, which takes POST
POST /connections
  405 POST is not for /connections, which takes GET
`,
};

for (const [name, calls] of Object.entries(REFUSALS)) {
  test(name, async ({ api, assertRefused, create }) => {
    const port = await create({ toxics: [{ type: "latency" }] });
    using conn = await connected(port);
    const all = async () => [await api.get("/proxies"), await api.get("/seed")];
    const before = await all();
    const zeros = JSON.stringify(Array(340_000).fill(0));
    await assertRefused(calls.replaceAll("ZEROS", zeros));
    assertEquals(await all(), before);
    await assertEchoesOn(conn);
    await assertEchoes(port);
  });
}

// ---- Beyond Toxiproxy --------------------------------------------------------

test("GET /connections lists the live ones, and DELETE cuts one", async ({ api, assertRefused, create, log, upstream }) => {
  const toxics = [{ type: "latency", name: "slow" }];
  const port = await create({ toxics });
  assertEquals(await api.get("/connections"), { status: 200, body: [] });
  using one = await connected(port);
  using two = await connected(port);
  const { body } = await api.get("/connections");
  const { hostname, port: from } = one.localAddr;
  const { id, ageMs } = body[0];
  assertGreater(ageMs, 0);
  assertEquals(body[0], {
    id,
    number: 1,
    proxy: "p",
    client: `${hostname}:${from}`,
    upstream: upstream.address,
    bytesUp: 5,
    bytesDown: 5,
    ageMs,
    toxics: ["slow"],
  });
  assertEquals(body[1].number, 2);

  const path = `/connections/${id}`;
  assertEquals(await api.delete(path), { status: 204, body: undefined });
  assertEquals(await readToEnd(one), 0);
  await log.first("closed", 1);
  await assertEchoesOn(two);
  const other = `/connections/${body[1].id}`;
  await assertRefused(`
DELETE ${path}
  404 connection not found
DELETE ${other}?reset=yes
  400 expected reset=0 or 1, found "yes"
`);
  assertEquals((await api.delete(`${other}?reset=1`)).status, 204);
  await assertRejects(() => readAll(two), Deno.errors.ConnectionReset);
  const closed = await log.first("closed", 2);
  assertEquals(closed.map(({ why }) => why), ["cut", "cut"]);
});

test("a connection that is cut with a RST resets its upstream, too", async ({ api, create }) => {
  const atUpstream = Promise.withResolvers<unknown>();
  await using upstream = new Upstream(async (conn) => {
    await send(conn, "hello");
    await readAll(conn).then(atUpstream.resolve, atUpstream.resolve);
  });
  const port = await create({ upstream: upstream.address });
  using conn = await Deno.connect({ port });
  await readExactly(conn, 5);
  const { body } = await api.get("/connections");
  await api.delete(`/connections/${body[0].id}?reset=1`);
  assert(await atUpstream.promise instanceof Deno.errors.ConnectionReset);
});

test("PUT /seed sets the seed, and a test can replay", async ({ api, create, log }) => {
  const port = await create({ dropRate: 0.5 });
  assertEquals(await api.get("/seed"), { status: 200, body: { seed: 1 } });
  const outcomes = async () => {
    const before = log.of("closed").length;
    for (let i = 0; i < 16; i++) {
      using conn = await Deno.connect({ port });
      await conn.closeWrite();
      await readToEnd(conn);
      await log.first("closed", before + i + 1);
    }
    return log.of("closed").slice(before)
      .map(({ connection, why }) => `${connection} ${why}`).join();
  };
  const play = async (seed: number) => {
    const answer = await api.call("PUT", "/seed", { seed });
    assertEquals(answer, { status: 200, body: { seed } });
    return await outcomes();
  };
  const first = await play(42);
  assertMatch(first, /^1 .*fault.*,16 /);
  assertStringIncludes(first, "client");
  assert(await play(43) !== first);
  assertEquals(await play(42), first);
  assert(await outcomes() !== first); // the numbers go on
  assertEquals((await api.get("/seed")).body, { seed: 42 });
});

// ---- Metrics -----------------------------------------------------------------

test("GET /metrics counts bytes as Toxiproxy does, and what is this tool's own", async ({ api, create, log, proxy, upstream: { address } }) => {
  await using upstream = new Upstream(async (conn) => {
    await readExactly(conn, 3);
    await send(conn, "hello!");
    await readToEnd(conn);
  });
  const port = await create({
    upstream: upstream.address,
    toxics: [{ type: "slow_close" }],
  });
  const dropping = await create({ name: 'a"b\\c', dropRate: 1 });
  using open = await Deno.connect({ port });
  using ended = await Deno.connect({ port });
  for (const conn of [open, ended]) {
    await send(conn, "abc");
    assertEquals(text(await readExactly(conn, 6)), "hello!");
  }
  await ended.closeWrite();
  await readToEnd(ended);
  using dropped = await Deno.connect({ port: dropping });
  await readToEnd(dropped);
  await log.first("closed", 2);

  const answer = await api.raw("GET", "/metrics");
  assertEquals(answer.status, 200);
  assertEquals(
    answer.headers.get("content-type"),
    "text/plain; version=0.0.4; charset=utf-8",
  );
  const p =
    `listener="127.0.0.1:${port}",proxy="p",upstream="${upstream.address}"`;
  const odd = 'proxy="a\\"b\\\\c"';
  const d = `listener="127.0.0.1:${dropping}",${odd},upstream="${address}"`;
  const exact = answer.text
    .replace(/^# HELP (\w+) \S.*\n# TYPE \1 /gm, "# $1 ")
    .replace(/^\w+_seconds_(?:bucket\{.*,le="[\d.]+"|sum\{.*").*\n/gm, "");
  assertEquals(
    exact,
    `# toxiproxy_proxy_received_bytes_total counter
toxiproxy_proxy_received_bytes_total{direction="upstream",${p}} 6
toxiproxy_proxy_received_bytes_total{direction="downstream",${p}} 12
toxiproxy_proxy_received_bytes_total{direction="upstream",${d}} 0
toxiproxy_proxy_received_bytes_total{direction="downstream",${d}} 0
# toxiproxy_proxy_sent_bytes_total counter
toxiproxy_proxy_sent_bytes_total{direction="upstream",${p}} 6
toxiproxy_proxy_sent_bytes_total{direction="downstream",${p}} 12
toxiproxy_proxy_sent_bytes_total{direction="upstream",${d}} 0
toxiproxy_proxy_sent_bytes_total{direction="downstream",${d}} 0
# chaos_proxy_connections_total counter
chaos_proxy_connections_total{proxy="p",outcome="client"} 1
chaos_proxy_connections_total{${odd},outcome="fault"} 1
# chaos_proxy_connections_open gauge
chaos_proxy_connections_open{proxy="p"} 1
chaos_proxy_connections_open{${odd}} 0
# chaos_proxy_dial_seconds histogram
chaos_proxy_dial_seconds_bucket{proxy="p",le="+Inf"} 2
chaos_proxy_dial_seconds_count{proxy="p"} 2
chaos_proxy_dial_seconds_bucket{${odd},le="+Inf"} 0
chaos_proxy_dial_seconds_count{${odd}} 0
# chaos_proxy_faults_total counter
chaos_proxy_faults_total{proxy="p",kind="slow_close"} 2
chaos_proxy_faults_total{${odd},kind="dropRate"} 1
# chaos_proxy_build_info gauge
chaos_proxy_build_info{version="${deno.version}",deno="${Deno.version.deno}"} 1
`,
  );
  const dials = (rest: string) =>
    [...answer.text.matchAll(RegExp(`_seconds_${rest} (\\S+)$`, "gm"))]
      .map(([, value]) => Number(value));
  const buckets = dials('bucket\\{proxy="p",le="[\\d.]+"\\}');
  assertEquals(buckets, buckets.toSorted((a, b) => a - b));
  assertEquals(buckets.length, DIAL_BOUNDS_MS.length);
  assertGreater(dials('sum\\{proxy="p"\\}')[0], 0);

  const attributes = { latency: HOUR_MS };
  await api.post(TOXICS, { type: "latency", stream: "upstream", attributes });
  await send(open, "held");
  const hasRead = () => proxy.liveConnections()[0]?.bytesUp === 7;
  await until(hasRead, "what is held has been read");
  const after = (await api.raw("GET", "/metrics")).text;
  for (
    const line of [
      'chaos_proxy_faults_total{proxy="p",kind="latency"} 1', // the open one
      `toxiproxy_proxy_received_bytes_total{direction="upstream",${p}} 10`,
      `toxiproxy_proxy_sent_bytes_total{direction="upstream",${p}} 6`,
    ]
  ) assertStringIncludes(after, `\n${line}\n`);
});

// ---- The HTTP of it ------------------------------------------------------------

test("every answer has an id of its own, and no path is told in Go's words", async ({ make }) => {
  const unknown = ["/", "/proxies/", "/proxies/x/y", "/constructor"];
  const ids = new Set<string | null>([null]);
  for (const path of ["/proxies", "/metrics", "/reset", "/none", ...unknown]) {
    const { status, headers, text } = await make(`GET ${path}`);
    const id = headers.get("X-Toxiproxy-Request-Id");
    assert(!ids.has(id), path);
    ids.add(id);
    if (!unknown.includes(path)) continue;
    assertEquals([status, text], [404, "404 page not found\n"], path);
    const type = headers.get("content-type");
    assertEquals(type, "text/plain; charset=utf-8", path);
  }
});

test("a body of more than 1 MiB gets 413, and costs nobody else anything", async ({ api, assertRefused, create }) => {
  using conn = await connected(await create());
  const most = '{"latencyMs": 1}'.padEnd(1024 * 1024);
  assertEquals((await api.patch("/proxies/p", most)).status, 200);
  await assertRefused(`
PATCH /proxies/p ${most}\u0020
  413 expected a body of at most 1 MiB, found more
`);
  await assertEchoesOn(conn);
  const notText = new Uint8Array([0x22, 0xff, 0x22]);
  const error = `${BAD}expected UTF-8 text, found other bytes`;
  const refused = { status: 400, body: { error, status: 400 } };
  assertEquals(await api.post("/proxies", notText), refused);
});

test("of very many problems the answer shows the first", async ({ api }) => {
  // Each spelling of a key is a problem of its own.
  const spellings = Array.from({ length: 2 ** 15 }, (_, bits) => [
    [..."CONNECTTIMEOUTMS"].map((letter, i) =>
      bits & 1 << i ? letter : letter.toLowerCase()
    ).join(""),
    1,
  ]);
  const proxy = { name: "x", upstream: "a:1" };
  const bodies: [path: string, body: unknown][] = [
    ["/populate", Array(1000).fill(0)],
    ["/proxies", { ...proxy, ...Object.fromEntries(spellings) }],
  ];
  for (const [path, body] of bodies) {
    const { status, body: { error } } = await api.post(path, body);
    assertEquals(status, 400, path);
    assertMatch(error, /^bad request body: .*; … and \d+ more$/);
    assert(error.length < 20_000, `${path}: ${error.length}`);
  }
});

test("a route has up to 500 toxics, through which the bytes get", async ({ api, assertRefused, create }) => {
  const toxics = Array.from({ length: 499 }, (_, i) => ({
    type: "noop",
    name: `${i}`,
  }));
  const port = await create({ toxics });
  assertEquals((await api.post(TOXICS, { type: "noop" })).status, 200);
  await assertEchoes(port);
  await assertRefused(`
POST ${TOXICS} {"type": "noop", "stream": "upstream"}
  400 ${BAD}route p has 500 toxics, the most that it may have
`);
});

Deno.test("loopback is guarded however it is written", async () => {
  await using watched = await WatchedProxy.start({});
  const addresses = ["127.1:0", "localhost:0"];
  if (IS_LINUX) addresses.push("127.0.0.2:0");
  for (const address of addresses) {
    await using server = serveApi(watched.proxy, address);
    const [hostname, port] = server.address.split(":");
    using conn = await Deno.connect({ hostname, port: Number(port) });
    await send(
      conn,
      "GET /version HTTP/1.1\r\nHost: page.example\r\nConnection: close\r\n\r\n",
    );
    assertMatch(text(await readAll(conn)), /^HTTP\/1.1 403 /, address);
  }
});

test("what a browser sends for a web page is refused", async ({ api, create }) => {
  await create();
  const { port } = api;
  const cases: Record<number, Record<string, string>[]> = {
    400: [{ host: "a b" }, { host: "[" }, { host: "loc%alhost" }],
    403: [
      { "user-agent": "Mozilla/5.0 (X11; Linux x86_64)" },
      { origin: "https://evil.example" },
      { origin: "null" },
      { origin: `http://127.0.0.1:${port + 1}` },
      { origin: `https://127.0.0.1:${port}` },
      { host: "evil.example" },
      { host: `evil.example:${port}` },
      { host: "localhost.evil.example" },
      { host: "127.0.0.1.evil.example" },
      { host: "0.0.0.0.evil.example" },
      { host: `0.0.0.0:${port}`, origin: "https://evil.example" },
      { host: `10.0.0.1:${port}`, origin: `http://127.0.0.1:${port}` },
    ],
    200: [
      { "user-agent": "toxiproxy-cli/v2.12.0 (linux/amd64)" },
      { host: `127.0.0.1:${port}`, origin: `http://127.0.0.1:${port}` },
      { host: `localhost:${port}` },
      { host: "LOCALHOST" },
      { host: "127.0.0.2:1" },
      { host: `[::1]:${port}` },
      { host: `0.0.0.0:${port}` },
      { host: "10.0.0.1" },
      { host: `[2001:db8::1]:${port}` },
      { host: `0.0.0.0:${port}`, origin: `http://0.0.0.0:${port}` },
    ],
  };
  for (const [expected, requests] of Object.entries(cases)) {
    for (const headers of requests) {
      const shown = JSON.stringify(headers);
      const answer = await api.plain("GET", "/proxies", headers);
      assertEquals(answer.status, Number(expected), shown);
      if (answer.status !== 403) continue;
      const { error, status } = JSON.parse(answer.text);
      assertEquals(status, 403, shown);
      assert(error.length > 10, error);
      const deleted = await api.plain("DELETE", "/proxies/p", headers);
      assertEquals(deleted.status, 403, shown);
    }
  }
});

Deno.test("on another address than loopback any Host will do", async () => {
  await using watched = await WatchedProxy.start({});
  await using api = Api.of(watched, "0.0.0.0:0");
  const host = "toxiproxy:8474";
  const named = await api.plain("GET", "/version", { host });
  assertEquals(named.status, 200);
  // A page's own name may lead here, so that its origin is as foreign as any.
  for (const origin of ["http://elsewhere", `http://${host}`]) {
    const browser = await api.plain("GET", "/version", { host, origin });
    assertEquals(browser.status, 403, origin);
  }
});

test("peers that speak no HTTP, or leave, cost nobody else anything", async ({ api }) => {
  const requests = [
    "",
    "GET",
    "hello\r\n\r\n",
    "GET / HTTP/1.1\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
    "GET //evil HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "POST /proxies HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{",
    "POST /proxies HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nx",
    "GET /version HTTP/1.0\r\n\r\n",
    "\u0000".repeat(1000),
  ];
  for (const request of requests) {
    using conn = await Deno.connect({ port: api.port });
    await send(conn, request);
    await conn.closeWrite();
    await readToEnd(conn);
  }
  assertEquals((await api.get("/version")).status, 200);
});

Deno.test("it serves as a function, without an address of its own", async () => {
  await using watched = await WatchedProxy.start({});
  const handler = controlApi(watched.proxy);
  const answer = await handler(new Request("http://localhost/version"));
  assertEquals(await answer.json(), {
    version: "2.12.0", // Toxiproxy's, whose protocol it is
    name: "chaos-proxy",
    chaosProxyVersion: deno.version,
  });
  const page = await handler(new Request("http://page.example/version"));
  assertEquals([page.status, (await page.json()).status], [403, 403]);
});

Deno.test("an address that is none, or is taken, is told", async () => {
  await using watched = await WatchedProxy.start({});
  const { proxy } = watched;
  for (const address of ["x", "a:b", "localhost:99999", -1, 1.5, ""]) {
    const listen = () => serveApi(proxy, address);
    assertThrows(listen, TypeError, "address: expected", `${address}`);
  }
  using taken = takenAddress();
  const error = assertThrows(() => serveApi(proxy, portOf(taken)), ListenError);
  assertEquals(
    error.message,
    `control API: cannot listen on ${taken.listen}: the port is already in use`,
  );
});

test("calls that race change each proxy one after the other", async ({ api, upstream }) => {
  const statusesOf = async (count: number, call: (i: number) => unknown) => {
    const calls = Array.from({ length: count }, (_, i) => call(i));
    const answers = await Promise.all(calls as Promise<{ status: number }>[]);
    return answers.map(({ status }) => status).toSorted();
  };
  const proxy = { name: "p", upstream: upstream.address };
  const created = await statusesOf(3, () => api.post("/proxies", proxy));
  assertEquals(created, [201, 409, 409]);
  const change = (changes: unknown) => api.patch("/proxies/p", changes);
  const all = await Promise.all([
    statusesOf(30, (i) => change({ enabled: i % 2 === 0 })),
    statusesOf(10, (i) => change({ listen: i % 2 ? ":0" : "127.0.0.1:0" })),
    statusesOf(10, () => api.post(TOXICS, { type: "latency" })),
  ]);
  assertEquals(all, [
    Array(30).fill(200),
    Array(10).fill(200),
    [200, ...Array(9).fill(409)],
  ]);
  const { body } = await change({ enabled: true });
  await assertEchoes(portOf(body));
  const removals = await Promise.all([
    api.delete("/proxies/p"),
    api.delete("/proxies/p"),
    change({ enabled: false }),
  ]);
  assertEquals(removals.map(({ status }) => status), [204, 404, 404]);
});

test("a proxy that forwards to itself is refused, also by way of others", async ({ make, proxy }) => {
  const [a, b] = [steadyPort(), steadyPort()];
  const create = (name: string, port: number, to: number) =>
    `POST /proxies {"name": "${name}", "listen": "127.0.0.1:${port}", "upstream": "localhost:${to}"}`;
  const assertRefused = async (call: string, error: RegExp) => {
    const { status, text } = await make(call);
    assertEquals(status, 400, call);
    assertMatch(text, error, call);
  };
  await assertRefused(
    create("a", a, a),
    /"bad request body: upstream: .* is where the route itself listens/,
  );
  assertEquals((await make(create("a", a, b))).status, 201);
  const circle = /circle, (?:a -> b -> a|b -> a -> b)/;
  await assertRefused(create("b", b, a), circle);
  assertEquals((await make(create("b", b, 1))).status, 201);
  const back = `PATCH /proxies/b {"upstream": "[::]:${a}"}`;
  await assertRefused(back, circle);
  assertEquals(proxy.route("b").upstream, "localhost:1");
  assertEquals(proxy.routes.length, 2);
});

// ---- The library -------------------------------------------------------------

/** A route whose upstream is never asked for anything. */
function routeAt(localPort: number) {
  return { name: "r", localPort, upstream: "127.0.0.1:1" };
}

Deno.test("the same operations are methods", async () => {
  await using upstream = echo();
  await using watched = await WatchedProxy.start({});
  const { proxy } = watched;
  assertEquals(proxy.routes, []);
  const options = { name: "r", localPort: 0, upstream: upstream.address };
  const route: Route = await proxy.addRoute(options);
  assertEquals(proxy.route("r"), route);
  await assertEchoes(route.localPort);
  const again = () => proxy.addRoute(route);
  const { AlreadyExists, BadResource, NotFound } = Deno.errors;
  await assertRejects(again, AlreadyExists, "there is a route r already");
  const changed = await proxy.updateRoute("r", { latencyMs: 5 });
  assertEquals(changed, { ...route, latencyMs: 5 });
  const [left, added] = await proxy.populate([
    route,
    { ...options, name: "s", enabled: false },
  ]);
  assertEquals(left, changed);
  assertEquals([added?.enabled, added?.localPort], [false, 0]);
  await proxy.reset();
  assert(proxy.route("s").enabled);
  await proxy.removeRoute("r");
  assertThrows(() => proxy.route("r"), NotFound);
  await assertRejects(() => proxy.removeRoute("r"), NotFound);
  for (const bad of [{ host: "a b" }, { localPort: -1 }, { upstream: "x" }]) {
    const add = () => proxy.addRoute({ ...route, name: "bad", ...bad });
    await assertRejects(add, ConfigError);
    await assertRejects(() => proxy.updateRoute("s", bad), ConfigError);
  }
  await assertRejects(
    () => proxy.updateRoute("s", { toxics: [] } as { latencyMs?: number }),
    Error,
    "route s: toxics: unknown key",
  );
  await proxy.drain();
  await assertRejects(again, BadResource, "the proxy is shutting down");
});

for (const resettable of [false, true]) {
  const kind = resettable ? "Node's" : "Deno's";
  Deno.test(`an address is free as soon as a call has returned, on ${kind} sockets`, async () => {
    await using upstream = echo();
    await using watched = await WatchedProxy.start({}, { resettable });
    const { proxy } = watched;
    const localPort = steadyPort();
    const route = { name: "r", localPort, upstream: upstream.address };
    await proxy.addRoute(route);
    for (let round = 0; round < 5; round++) {
      await assertEchoes(localPort);
      await proxy.updateRoute("r", { enabled: false });
      await proxy.updateRoute("r", { enabled: true });
      await proxy.updateRoute("r", { host: "0.0.0.0" });
      await assertEchoes(localPort);
      await proxy.updateRoute("r", { host: "localhost" });
      await proxy.removeRoute("r");
      await unlessStarting(() => proxy.addRoute(route));
    }
    await assertEchoes(localPort);
    await proxy.stop();
    await using again = await unlessStarting(() =>
      WatchedProxy.start({ routes: [route] })
    );
    assertEquals(again.port(), localPort);
  });
}

/** Tries again while a process that another test starts has the port open. */
async function unlessStarting<T>(listen: () => Promise<T>): Promise<T> {
  for (let attempt = 1;; attempt++) {
    try {
      return await listen();
    } catch (error) {
      if (!(error instanceof ListenError) || attempt === 100) throw error;
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
  }
}

Deno.test("stop gives the addresses back, on Deno's sockets", async () => {
  const routes = [routeAt(steadyPort())];
  let regained = 0;
  for (let round = 0; round < 20; round++) {
    const { proxy } = await unlessStarting(() =>
      WatchedProxy.start({ routes })
    );
    await new Promise((resolve) => setTimeout(resolve, 1)); // it accepts
    await proxy.stop();
    try {
      await using _ = await WatchedProxy.start({ routes });
      regained++;
    } catch (error) {
      assert(error instanceof ListenError); // a process is being started
    }
  }
  assertGreater(regained, 0);
});

Deno.test("a route that is being changed when the proxy stops does not listen", async () => {
  for (const resettable of [false, true]) {
    for (let ticks = 0; ticks < 12; ticks++) {
      await using watched = await WatchedProxy.start({
        routes: [routeAt(0)],
      }, { resettable });
      const localPort = steadyPort();
      const changing = watched.proxy.updateRoute("r", { localPort })
        .then(() => {}, () => {});
      for (let i = 0; i < ticks; i++) await null;
      await watched.proxy.stop();
      await changing;
      await untilRefused(localPort);
    }
  }
});

Deno.test("a listener for events may stop the proxy at once", async () => {
  let stops = false;
  const proxy = await ChaosProxy.start({ routes: [routeAt(0)] }, {
    onEvent({ event }) {
      if (stops && event === "listening") proxy.stop();
    },
  });
  stops = true;
  await proxy.updateRoute("r", { localPort: steadyPort() });
  await proxy.stop();
  assertEquals(proxy.connections, 0);
});

test("a route that is still being added when the proxy stops is not", async ({ proxy }) => {
  const localPort = steadyPort();
  const adding = assertRejects(
    () => proxy.addRoute(routeAt(localPort)),
    Deno.errors.BadResource,
  );
  await Promise.resolve(); // it listens by now
  await proxy.stop();
  await adding;
  assertEquals(proxy.routes, []);
  await untilRefused(localPort);
});

// ---- The program -------------------------------------------------------------

/** The program with the API on a free port, and a client of it. */
async function startProgram(...args: string[]) {
  const cli = new Cli("--log-format", "json", "--api", "0", ...args);
  const [{ address }] = await cli.log.first("api_listening", 1)
    .catch((cause) => {
      throw new Error(`did not start: ${cli.stderr}`, { cause });
    });
  const api = Api.at(address);
  return {
    cli,
    api,
    async [Symbol.asyncDispose]() {
      await api[Symbol.asyncDispose]();
      await cli[Symbol.asyncDispose]();
    },
  };
}

/** What `--check` says of a config. */
async function checkConfig(config: string) {
  await using file = await TempFile.with(config);
  await using cli = new Cli("--check", file.path);
  const { code } = await cli.status;
  return { code, stdout: cli.stdout };
}

Deno.test("--api without a config starts empty, on loopback", async () => {
  await using upstream = echo();
  await using program = await startProgram("--seed", "7");
  const { api, cli: { log } } = program;
  assertMatch(log.only("api_listening").address, /^127\.0\.0\.1:\d+$/);
  const { routes, seed } = log.only("started");
  assertEquals([routes, seed], [0, 7]);
  assertEquals((await api.get("/proxies")).body, {});
  const { body } = await api.post("/proxies", {
    name: "p",
    upstream: upstream.address,
    toxics: [{ type: "reset_peer", stream: "upstream" }],
  });
  using conn = await Deno.connect({ port: portOf(body) });
  await send(conn, "x");
  await assertRejects(() => readAll(conn), Deno.errors.ConnectionReset);
});

Deno.test("each of Toxiproxy's forms is a config", () => {
  const proxy = (name?: string) => ({
    ...(name && { name }),
    listen: "127.0.0.1:0",
    upstream: ":80",
    enabled: true,
    Logger: {},
    toxics: [],
  });
  const names = (value: unknown, path = "proxies.json") => {
    const { routes } = parseConfig(JSON.stringify(value), path);
    for (const { upstream } of routes) assertEquals(upstream, "localhost:80");
    return routes.map(({ name }) => name);
  };
  for (const path of ["proxies.json", "proxies.yaml"]) {
    const byName = { a: proxy("a"), b: proxy(), c: proxy("d") };
    assertEquals(names([proxy("a"), proxy("b")], path), ["a", "b"]);
    assertEquals(names(byName, path), ["a", "b", "d"]);
    const unnamed = { a: { ...proxy(), Name: null } };
    assertEquals(names(unnamed, path), ["a"]);
    assertEquals(names({ proxies: [proxy("a")] }, path), ["a"]);
    assertEquals(names({ proxies: byName }, path), ["a", "b", "d"]);
  }
  const named = ["routes", "proxies", "seed", "api", "upstream", "listen"];
  const odd = Object.fromEntries(named.map((name) => [name, proxy(name)]));
  assertEquals(names(odd), named);
  assertEquals(names({ proxies: odd }), named);
  assertEquals(names({ proxies: proxy("proxies") }), ["proxies"]);
  const seeded = JSON.stringify({ seed: 7, proxies: [proxy("a")] });
  assertEquals(parseConfig(seeded).seed, 7);
  assertEquals(parseConfig('{"proxies": {}}', "a.json", { api: 0 }).routes, []);
  const [route] = parseConfig(
    '[{"Name": "c", "listen": null, "upstream": "a:1", "toxics": [{"type": "latency", "stream": "Upstream", "attributes": null}, {"type": "bandwidth"}], "dropRate": 0}]',
  ).routes;
  assertEquals(route?.toxics.map((each) => [each.name, each.attributes]), [
    ["latency_upstream", { latency: 0, jitter: 0 }],
    ["bandwidth_downstream", { rate: 0 }],
  ]);
});

test("what GET /proxies shows starts the same proxies", async ({ api, create, proxy }) => {
  await create({ toxics: [{ type: "noop" }], latencyMs: 3 });
  const { text } = await api.raw("GET", "/proxies");
  assertEquals(parseConfig(text).routes, proxy.routes);
});

Deno.test("a config's form is told apart, and its errors keep their paths", () => {
  const known = "known are seed, drainTimeoutMs, api";
  const anyProxies =
    "expected a list of proxies, or an object of them by name, at least one";
  const configs = `
{"proxies": 5}
  proxies: ${anyProxies}, found 5
{"proxies": []}
  proxies: ${anyProxies}, found a list
{"proxies": [5]}
  proxies[0]: expected a mapping with name and upstream, found 5
{"proxies": {"a": 5}}
  proxies.a: expected a mapping with name and upstream, found 5
{"a": {"upstream": "a:1"}, "b": {}}
  b.upstream: missing; expected host:port or [ipv6]:port, the port from 1 to 65535
{"a b": {"upstream": "a:1", "toxics": [{"type": "noop", "stream": 5}]}}
  "a b".name: expected 1 to 255 characters without white space, not . or .., found "a b"; write a-b
  "a b".toxics[0].stream: expected upstream or downstream, found 5
{"proxies": {"a": {"upstream": "a:1"}, "b": {"upstream": "a:1", "name": "a"}}}
  proxies.b.name: a is already taken by proxies.a
{"a": {"listen": ":0", "upstream": "a:1", "Listen": ":1"}}
  a.Listen: the same key as listen; write one
{"proxies": [{"upstream": "a:1"}], "seeds": 1}
  seeds: unknown key; did you mean seed?
  proxies[0].name: missing; expected 1 to 255 characters without white space, not . or ..
{"routes": {"listen": "127.0.0.1:0", "upstream": "a:1"}}
{"routes": {"db": {"localPort": 1, "upstream": "a:1"}}}
  routes: expected a list of routes, at least one, found a mapping; write a list, of which each item begins with "- "
{"routes": [{"localPort": 1, "upstream": "a:1"}], "proxies": [{"upstream": "a:1"}]}
  proxies: unknown key; ${known}, routes
{"db": {"localPort": 1, "upstream": "a:1"}}
{"db": {"upstream": "a:1"}, "seed": 5}
  db: unknown key; ${known}, routes
  routes: missing; expected a list of routes, at least one
[{"localPort": 1, "upstream": "a:1"}]
  expected a mapping with routes, found a list
[{"name": "a", "listen": "localhost:5", "upstream": "a:1"}, {"name": "b", "listen": "localhost:5", "upstream": "a:1"}, {"name": "c", "listen": "localhost:5", "upstream": "a:1", "enabled": false}, {"name": "a", "listen": "localhost:6", "upstream": "a:1"}, {"name": "d", "listen": "x", "upstream": "a:b"}, 5]
  [4].upstream: expected host:port or [ipv6]:port, the port from 1 to 65535, found "a:b"
  [4].listen: expected host:port, [ipv6]:port or :port, the port from 0 to 65535, found "x"
  [5]: expected a mapping with name and upstream, found 5
  [1].listen: 127.0.0.1:5 is already taken by [0]
  [3].name: a is already taken by [0]
{"api": "nowhere"}
  api: expected a port or host:port, the port from 0 to 65535, found "nowhere"
{"api": [8474]}
  api: expected a port or host:port, the port from 0 to 65535, found a list
{"api": 8474, "routes": [{"localPort": 1, "upstream": "a:1"}, {"localPort": 8474, "upstream": "a:1"}]}
  api: 8474 is already taken by routes[1]
{"api": 8474, "proxies": [{"name": "a", "listen": "localhost:8474", "upstream": "a:1"}]}
{"api": 8474, "proxies": [{"name": "a", "listen": ":8474", "upstream": "a:1"}]}
  api: 8474 is already taken by proxies[0]
[{"localPort": 1, "upstream": "a:1"}]
  expected a mapping with routes, found a list
`;
  for (const [config, expected] of casesIn(configs)) {
    const parse = () => parseConfig(config, "config.json");
    const { problems } = assertThrows(parse, ConfigError, "", config);
    assertEquals(problems, expected, config);
  }
});

Deno.test("what is ignored in Toxiproxy's own file is told by --check and in the log", async () => {
  const list = `[
  {"name": "plain", "listen": "localhost:0", "upstream": "a.example:1"},
  {"name": "odd", "listen": "localhost:0", "upstream": "a.example", "Logger": {},
    "toxics": [{"type": "noop", "toxicity": 2, "attributes": {"noop": 1}}]}
]`;
  const ignored = [
    "[1].Logger",
    "[1].upstream: a.example has no port; its connections fail",
    "[1].toxics[0].toxicity: 2 counts as 1",
    "[1].toxics[0].attributes.noop",
  ];
  const { code, stdout } = await checkConfig(list);
  assertEquals(code, 0);
  const warnings = ignored.map((each) => `\nwarning: ${each}`).join("") + "\n";
  assertStringIncludes(stdout, warnings);
  await using file = await TempFile.with(list, ".json");
  await using cli = new Cli("--log-format", "json", file.path);
  await cli.log.first("started", 1); // also without the API
  const told = cli.log.of("config_warning");
  assertEquals(told.map((each) => [each.route, each.warnings]), [
    ["odd", ignored],
  ]);
  await using text = new Cli(file.path);
  await text.says(/WARN +odd .* config_warning \[1\]\.Logger, \[1\]\.upstream/);
});

test("the config, the start and populate agree on what is taken", async ({ api, assertRefused, proxy }) => {
  const port = steadyPort();
  const upstream = "127.0.0.1:9";
  const proxies = (...hosts: [host: string, enabled: boolean][]) =>
    hosts.map(([host, enabled], i) => ({
      name: "abc"[i],
      listen: `${host}:${port}`,
      upstream,
      enabled,
    }));
  const good = [
    proxies(["127.0.0.1", false], ["localhost", false]),
    proxies(["127.0.0.1", false], ["", true], ["[::]", false]),
    proxies(["0.0.0.0", true], ["[::1]", true]),
  ];
  if (IS_LINUX) good.push(proxies(["127.0.0.1", true], ["127.0.0.2", true]));
  for (const list of good) {
    const config = parseConfig(JSON.stringify(list), "proxies.json");
    const started = await ChaosProxy.start({ ...config, seed: 1 });
    assertEquals(started.routes.length, list.length);
    await started.stop();
    assertEquals((await api.post("/populate", list)).status, 201);
    for (const { name } of list) await api.delete(`/proxies/${name}`);
  }

  const taken = `127.0.0.1:${port} is already taken by [0]`;
  const bad: [one: string, other: string, problem: string][] = [
    ["127.0.0.1", "LOCALHOST", taken],
    ["0.0.0.0", "127.1", `${taken}, on 0.0.0.0:${port}`],
    ["[0::0]", "127.0.0.1", `${taken}, on [::]:${port}`],
    [
      "127.0.0.1",
      "",
      `0.0.0.0:${port} is already taken by [0], on 127.0.0.1:${port}`,
    ],
  ];
  for (const [one, other, problem] of bad) {
    const list = proxies([one, true], [other, true]);
    const parse = () => parseConfig(JSON.stringify(list), "proxies.json");
    const { problems } = assertThrows(parse, ConfigError);
    assertEquals(problems, [`[1].listen: ${problem}`]);
    await assertRefused(`
POST /populate ${JSON.stringify(list)}
  400 ${BAD}[1].listen: ${problem}
`);
  }

  // In routes it is the port that is unique, whatever the host.
  const route = { name: "a", host: "127.0.0.1", localPort: port, upstream };
  const routes = [route, { ...route, name: "b", host: "127.0.0.2" }];
  const problem = `routes[1].localPort: ${port} is already taken by routes[0]`;
  const covered = [{ ...route, host: "::" }];
  const attempts: [attempt: () => unknown, problem: string][] = [
    [() => parseConfig(JSON.stringify({ routes }), "config.json"), problem],
    [() => ChaosProxy.start({ routes }), problem],
    [() => proxy.populate(routes), problem],
    [
      () => ChaosProxy.start({ api: `127.0.0.1:${port}`, routes: covered }),
      `api: ${port} is already taken by routes[0]`,
    ],
  ];
  for (const [attempt, problem] of attempts) {
    const error = await assertRejects(async () => await attempt(), ConfigError);
    assertEquals(error.problems, [problem]);
  }
});

Deno.test("api in the config serves it, and --api takes its place", async () => {
  const config = { api: "127.0.0.1:0", seed: 3 };
  await using file = await TempFile.with(JSON.stringify(config), ".json");
  await using cli = new Cli("--log-format", "json", file.path);
  const [{ address }] = await cli.log.first("api_listening", 1);
  await using api = Api.at(address);
  assertEquals((await api.get("/seed")).body, { seed: 3 });

  const taken = JSON.stringify({ ...config, api: api.port });
  await using other = await TempFile.with(taken, ".json");
  await using clash = new Cli(other.path);
  assertEquals((await clash.status).code, 1);
  assertEquals(
    clash.stderr,
    `chaos-proxy: control API: cannot listen on ${address}: ` +
      "the port is already in use\n",
  );
  await using second = await startProgram(other.path);
  assertEquals((await second.api.get("/seed")).body, { seed: 3 });
});

Deno.test("an --api that is none is refused, and one that checks nothing", async () => {
  const expected = "expected a port or host:port, the port from 0 to 65535";
  const refused: [args: string[], says: string][] = [
    [
      ["--api", "1:2:3"],
      `--api: ${expected}, found "1:2:3"\n`,
    ],
    [["--api"], "--api"],
    [["--api", "0", "--check"], "<config>: expected one file"],
  ];
  await Promise.all(refused.map(async ([args, says]) => {
    await using cli = new Cli(...args);
    assertEquals((await cli.status).code, 2, says);
    assert(cli.stderr.startsWith(`chaos-proxy: ${says}`), cli.stderr);
  }));
});

Deno.test("an api may have the port of a disabled route, or of another address", async () => {
  const list = [
    { name: "a", listen: "127.0.0.2:8474", upstream: "a:1" },
    { name: "b", listen: "127.0.0.3:8474", upstream: "a:1" },
  ];
  parseConfig(JSON.stringify(list), "a.json", { api: 8474 });
  const config = `
api: 8474
seed: 1
routes:
  - { name: r, localPort: 8474, upstream: "a:1", enabled: false, dropRate: 1 }
`;
  const { code, stdout } = await checkConfig(config);
  assertEquals(code, 0);
  const summary = "1 route, seed 1, drain within 30000 ms, api 127.0.0.1:8474";
  assertStringIncludes(stdout, `${summary}\n`);
  assertMatch(stdout, /\nr +127\.0\.0\.1:8474 +a:1 +disabled, drop 100%\n/);
});

Deno.test("calls are logged at debug, and changes at info", async () => {
  await using upstream = echo();
  await using program = await startProgram("--log-level", "debug");
  const { api, cli: { log } } = program;
  const toxic = `${TOXICS}/latency_downstream`;
  await api.post("/proxies", { name: "p", upstream: upstream.address });
  await api.post(TOXICS, { type: "latency", attributes: { latency: 5 } });
  await api.patch(toxic, { toxicity: 0.5 });
  await api.delete(toxic);
  await api.patch("/proxies/p", { enabled: false });
  await api.call("PUT", "/seed", { seed: 9 });
  await api.delete("/proxies/p");
  const { headers } = await api.raw("GET", "/none?x=1");
  await log.first("api", 8);
  const told = log.all.filter(({ event }) =>
    /^(route|toxic|reseeded|listening)/.test(event)
  ).map(({ event, ...fields }) => {
    const { toxic, effect, enabled, seed } = fields as Record<string, unknown>;
    return [event, toxic ?? enabled ?? seed, effect];
  });
  const name = "latency_downstream";
  assertEquals(told, [
    ["route_added", true, undefined],
    ["listening", undefined, undefined],
    ["toxic_added", name, "downstream: +5 ms on every connection"],
    ["toxic_changed", name, "downstream: +5 ms on 50% of connections"],
    ["toxic_removed", name, undefined],
    ["route_changed", false, undefined],
    ["reseeded", 9, undefined],
    ["route_removed", undefined, undefined],
  ]);
  const last = defined(log.of("api").at(-1));
  assertEquals(last, {
    ...last,
    method: "GET",
    path: "/none?x=1",
    status: 404,
    error: "404 page not found",
    request: defined(headers.get("x-toxiproxy-request-id")),
  });
});

Deno.test("an API that others can reach says so at warn", async () => {
  await using cli = new Cli("--api", "0.0.0.0:0");
  await cli.says(
    /WARN .* api_listening 0\.0\.0\.0:\d+; whoever reaches it can control it\n/,
  );
});

Deno.test("the log's text tells of changes in words", async () => {
  await using cli = new Cli("--api", "0", "--log-level", "debug");
  const address = await cli.says(/INFO .* api_listening (127\.0\.0\.1:\d+)\n/);
  await using api = Api.at(address);
  const name = "a-rather-long-name";
  await api.post("/proxies", { name, upstream: "a:1", enabled: false });
  await api.post(`/proxies/${name}/toxics`, { type: "timeout" });
  await api.post(`/proxies/${name}`, { Logger: {}, id: 1 });
  for (
    const line of [
      /INFO +a-rather-long-name .* route_added -> \S+ \(disabled\)/,
      /INFO +a-rather-long-name .* toxic_added timeout_downstream \(downstream: nothing gets through on every connection\)/,
      /WARN .* api POST \/\S+: 200, .*, ignored Logger, id/,
      /DEBUG .* api POST \/proxies: 201, [\d.]+ ms, [\da-f-]{36}/,
    ]
  ) await cli.says(line);
});

Deno.test(
  "a drain can be watched and helped by the API, but nothing is added",
  notOnWindows,
  async () => {
    await using upstream = echo();
    await using program = await startProgram();
    const { api, cli } = program;
    const { assertRefused } = callsOf(api);
    const proxy = { name: "p", upstream: upstream.address };
    const port = portOf((await api.post("/proxies", proxy)).body);
    using held = await connected(port);
    using idle = await connected(port);
    const attributes = { latency: HOUR_MS };
    await api.post(TOXICS, { type: "latency", attributes });
    await send(held, "held");
    await held.closeWrite();
    cli.kill();
    await cli.log.first("draining", 1);
    await untilRefused(port);
    await assertRefused(`
POST /proxies {"name": "q", "upstream": "a:1"}
POST /populate [{"name": "q", "upstream": "a:1"}]
PATCH /proxies/p {"enabled": false}
DELETE /proxies/p
POST /reset
  503 the proxy is shutting down
`);
    const { body: live } = await api.get("/connections");
    assertEquals(live.length, 2);
    await api.delete(`${TOXICS}/latency_downstream`);
    assertEquals(text(await readAll(held)), "held");
    await api.delete(`/connections/${live[1].id}`);
    assertEquals(await readToEnd(idle), 0);
    assertEquals((await cli.status).code, 0);
    assertEquals(cli.log.of("drained").map(({ cut }) => cut), [0]);
  },
);

Deno.test(
  "a signal during calls ends it, whatever is under way",
  notOnWindows,
  async () => {
    await using upstream = echo();
    await using program = await startProgram();
    const { api, cli } = program;
    using idle = await Deno.connect({ port: api.port });
    await send(
      idle,
      "POST /proxies HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n{",
    );
    let signalled = false;
    const calls = (async () => {
      for (let i = 0;; i++) {
        const name = `p${i}`;
        try {
          await api.post("/proxies", { name, upstream: upstream.address });
          await api.post(`/proxies/${name}/toxics`, { type: "latency" });
        } catch (error) {
          if (signalled) return;
          throw error;
        }
      }
    })();
    await cli.log.first("toxic_added", 3);
    signalled = true;
    cli.kill();
    assertEquals((await cli.status).code, 0);
    await calls;
    assertEquals(cli.stderr, "");
  },
);
