/** The control API: what it answers, and what comes of it. */

import {
  assert,
  assertEquals,
  assertMatch,
  assertRejects,
  assertThrows,
} from "@std/assert";
import deno from "../deno.json" with { type: "json" };
import {
  ChaosProxy,
  ConfigError,
  DIAL_BOUNDS_MS,
  ListenError,
  parseConfig,
  type ProxyEvent,
  type Route,
  serveApi,
} from "../main.ts";
import {
  Api,
  assertClosed,
  assertEchoes,
  assertReads,
  captured,
  casesIn,
  checkConfig,
  Cli,
  defined,
  echo,
  IS_LINUX,
  IS_WINDOWS,
  LONG_MS,
  only,
  pause,
  readAll,
  readToEnd,
  send,
  Silent,
  SOCKETS,
  steadyPort,
  TempFile,
  text,
  times,
  toxic,
  until,
  untilRefused,
  Upstream,
  WatchedProxy,
} from "./helpers.ts";

const BAD = "bad request body: ";
const TOXICS = "/proxies/p/toxics";

type Json = Record<string, unknown>;

/** A proxy, its API, and an upstream that echoes. */
type Stage = ReturnType<typeof stageOf>;

function stageOf(upstream: Upstream, { proxy, log }: WatchedProxy, api: Api) {
  return {
    ...callsOf(api),
    ...{ api, proxy, log, upstream },
    create: (more: Json = {}) => createProxy(api, upstream, more),
    /** The proxy `p` as the API shows it. */
    show: () => bodyOf(api.get("/proxies/p")),
    /** Changes the proxy `p`, and returns it as it is then. */
    change: (changes: Json) => bodyOf(api.patch("/proxies/p", changes)),
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

/** What a call is answered, with this status. */
async function bodyOf(call: ReturnType<Api["call"]>, expected = 200) {
  const { status, body } = await call;
  assertEquals(status, expected, JSON.stringify(body));
  return body;
}

/** Calls of an API as text, such as `PATCH /proxies/p {"enabled": true}`. */
function callsOf(api: Api) {
  const make = (call: string) => {
    const [, method, path, body] = /^(\S+) (\S+)(?: (.*))?$/.exec(call) ?? [];
    return api.raw(defined(method), defined(path), body);
  };
  const parse = (text: string) => text && JSON.parse(text);
  /** That calls are answered so: with a status, and a body or an error. */
  const assertAnswers = async (calls: string) => {
    for (const [call, [expected = ""]] of casesIn(calls)) {
      const { status, headers, text } = await make(call);
      const [code = "", ...words] = expected.split(" ");
      assertEquals(`${status}`, code, `${call}: ${text}`);
      const said = words.join(" ");
      const isError = status >= 400;
      const body = isError ? JSON.stringify({ error: said, status }) : said;
      if (body || status === 204) assertEquals(parse(text), parse(body), call);
      const allowed = status === 405 ? said.split(" takes ")[1] : null;
      assertEquals(headers.get("allow"), allowed, call);
      const type = headers.get("content-type");
      if (isError) assertEquals(type, "application/json", call);
    }
  };
  return { make, assertAnswers };
}

function portOf({ listen }: { listen: string }): number {
  return Number(captured(/:(\d+)$/, listen));
}

/** Creates a proxy called `p` to an upstream, and returns its port. */
async function createProxy(api: Api, upstream: Upstream, more: Json = {}) {
  const listen = `127.0.0.1:${steadyPort()}`;
  const given = { name: "p", listen, upstream: upstream.address, ...more };
  return portOf(await bodyOf(api.post("/proxies", given), 201));
}

/** A connection on which something has gone to and fro. */
async function connected(port: number, hostname = "127.0.0.1") {
  const conn = await Deno.connect({ hostname, port });
  await assertEchoes(conn);
  return conn;
}

/** That what is sent to a port comes back. */
async function assertEchoesAt(port: number, hostname?: string): Promise<void> {
  using _ = await connected(port, hostname);
}

/** Takes an address. */
const take = () => Deno.listen({ hostname: "127.0.0.1", port: 0 });

// ---- Proxies -----------------------------------------------------------------

test("POST /proxies makes a proxy, with faults and toxics, and GET shows it", async ({ assertAnswers, make, proxy, upstream }) => {
  const p =
    `"name": "p", "listen": "127.0.0.1:${steadyPort()}", "upstream": "${upstream.address}"`;
  const faults =
    '"dropRate": 0.25, "timeoutRate": 0.5, "timeoutMs": 7, "jitterMs": 9, "connectTimeoutMs": 10, "halfCloseTimeoutMs": 11, "profile": "", "connections": "1-", "outages": []';
  const cut =
    '{"name": "cut", "type": "slicer", "stream": "upstream", "toxicity": 0.5, "attributes": {"average_size": 10, "size_variation": 1, "delay": 2}}';
  const pShown =
    `{${p}, "enabled": true, "latencyMs": 0, ${faults}, "toxics": [{"name": "latency_downstream", "type": "latency", "stream": "downstream", "toxicity": 1, "attributes": {"latency": 5, "jitter": 0}}, ${cut}]}`;
  const qShown =
    '{"name": "q", "upstream": "a:1", "listen": "127.0.0.1:5", "enabled": false, "latencyMs": 8, "toxics": [], "dropRate": 0, "timeoutRate": 0, "timeoutMs": 0, "jitterMs": 0, "connectTimeoutMs": 10000, "halfCloseTimeoutMs": 60000, "profile": "", "connections": "1-", "outages": []}';
  await assertAnswers(`
GET /proxies => 200 {}
POST /proxies {"Name": "q", "UPSTREAM": "a:1", "LISTEN": "127.0.0.1:5", "Enabled": false, "LATENCYMS": 8}
  201 ${qShown}
POST /proxies {${p}, ${faults}, "toxics": [{"type": "latency", "attributes": {"latency": 5}}, ${cut}]} => 201 ${pShown}
GET /proxies/q => 200 ${qShown}
GET /proxies/p => 200 ${pShown}
GET /proxies => 200 {"q": ${qShown}, "p": ${pShown}}
`);
  const { text } = await make("GET /proxies"); // it is a config, too
  assertEquals(parseConfig(text).routes, proxy.routes);
});

test("a listen address may be any that Toxiproxy takes", async ({ api, create, show }) => {
  const listens = {
    "127.0.0.1": [undefined, null, "", "localhost:0"],
    "0.0.0.0": [":0", "0.0.0.0:0"],
    "[::1]": ["[::1]:0"],
  };
  for (const [host, ways] of Object.entries(listens)) {
    for (const listen of ways) {
      const port = await create({ listen });
      assertEquals((await show()).listen, `${host}:${port}`, `${listen}`);
      assert(port > 0);
      await assertEchoesAt(port, host === "[::1]" ? "::1" : undefined);
      await api.delete("/proxies/p");
    }
  }
});

test("what an update does not change is left alone, also the connections", async ({ assertAnswers, create, show, upstream }) => {
  const toxics = [{ type: "latency" }];
  const port = await create({ listen: "127.0.0.1:0", latencyMs: 1, toxics });
  using conn = await connected(port);
  const before = await show();
  const shown = JSON.stringify(before);
  const jittery = JSON.stringify({ ...before, jitterMs: 1 });
  /** The same addresses, which can be written in two ways. */
  const sameAt = (host: string) =>
    `{"name": "p", "listen": "${host}:${port}", "upstream": "${upstream.address}", "enabled": true}`;
  for (const method of ["PATCH", "POST"]) {
    await assertAnswers(`
${method} /proxies/p {}
${method} /proxies/p {"enabled": null, "toxics": null}
${method} /proxies/p ${shown}
${method} /proxies/p ${sameAt("127.0.0.1")}
${method} /proxies/p ${sameAt("localhost")}
  200 ${shown}
${method} /proxies/p {"jitterMs": 1} => 200 ${jittery}
${method} /proxies/p {"jitterMs": 0} => 200 ${shown}
POST /populate [${sameAt("127.0.0.1")}]
POST /populate [${sameAt("localhost")}]
  201 {"proxies": [${shown}]}
`);
  }
  await assertEchoes(conn);
  await assertEchoesAt(port);
});

test("another address or upstream cuts the connections, and counts from none", async ({ change, create, log, proxy }) => {
  await using other = echo();
  let port = await create({ listen: "localhost:0" });
  const next = steadyPort();
  const toNewPort = { localPort: 0 };
  const changes: [change: Json, port?: number][] = [
    [{ upstream: other.address }, port],
    [{ listen: `127.0.0.1:${next}` }, next],
    [{ listen: "localhost:0" }],
    [{ listen: "127.0.0.1:0" }],
    [toNewPort],
  ];
  for (const [i, [given, expected]] of changes.entries()) {
    await assertEchoesAt(port);
    await assertClosed({ log }, { why: "client" }, 2 * i + 1);
    using conn = await connected(port);
    const before = port;
    port = given === toNewPort
      ? (await proxy.updateRoute("p", given)).localPort
      : portOf(await change(given));
    if (expected === undefined) assert(port !== before);
    else assertEquals(port, expected);
    const { received } = only(proxy.stats());
    assertEquals(received, { upstream: 0, downstream: 0 });
    assertEquals(await readToEnd(conn), 0);
    await assertClosed({ log }, { why: "cut" }, 2 * i + 2);
    if (port !== before) await untilRefused(before);
  }
  await assertEchoesAt(port);
  assertEquals(other.accepted, 2 * changes.length - 1);
  const numbers = log.of("accepted").map(({ connection }) => connection);
  assertEquals(numbers, numbers.map((_, i) => 1 + i % 2));
  assertEquals(only(proxy.stats()).received.upstream, 5);
});

test("an address that cannot be listened on leaves all as it was", async ({ api, assertAnswers, create, log, show, upstream }) => {
  const port = await create();
  using conn = await connected(port);
  using taken = take();
  const listen = `127.0.0.1:${taken.addr.port}`;
  const before = await show();
  await assertAnswers(`
PATCH /proxies/p {"listen": "${listen}", "dropRate": 1}
POST /proxies {"name": "q", "listen": "${listen}", "upstream": "a:1"}
  500 listen tcp ${listen}: bind: address already in use
`);
  assertEquals(await bodyOf(api.get("/proxies")), { p: before });
  await assertEchoes(conn);
  await assertEchoesAt(port);
  // What comes before it in a list stays.
  const to = `"upstream": "${upstream.address}"`;
  await assertAnswers(`
POST /populate [{"name": "a", ${to}}, {"name": "b", "listen": "${listen}", ${to}}, {"name": "c", ${to}}]
  500 listen tcp ${listen}: bind: address already in use
`);
  const { a, ...others } = await bodyOf(api.get("/proxies"));
  await assertEchoesAt(portOf(a));
  assertEquals(others, { p: before });
  // Where it has to make way for itself, it listens again.
  if (!IS_LINUX) return;
  using _other = Deno.listen({ hostname: "127.0.0.2", port });
  await assertAnswers(`
PATCH /proxies/p {"listen": ":${port}"} => 500 listen tcp 0.0.0.0:${port}: bind: address already in use
PATCH /proxies/p {"dropRate": 0} => 200 ${JSON.stringify(before)}
`);
  await assertEchoes(conn);
  await until(() => log.of("listening").length > 2, "it listens again");
  await assertEchoesAt(port);
});

test("enabled: false and DELETE stop listening and cut, and it starts again", async ({ assertAnswers, create, show }) => {
  const address = `127.0.0.1:${steadyPort()}`;
  const listen = address.replace("127.0.0.1", "localhost");
  const toxics = [{ type: "latency" }];
  const port = await create({ enabled: false, listen, toxics });
  const created = await show();
  assertEquals([created.enabled, created.listen], [false, listen]);
  const off = JSON.stringify({ ...created, listen: address });
  const on = JSON.stringify({ ...created, listen: address, enabled: true });
  for (let round = 0; round < 3; round++) {
    await untilRefused(port);
    await assertAnswers(`PATCH /proxies/p {"enabled": true} => 200 ${on}`);
    using conn = await connected(port);
    await assertAnswers(`PATCH /proxies/p {"enabled": false} => 200 ${off}`);
    assertEquals(await readToEnd(conn), 0);
    await assertAnswers(`PATCH /proxies/p {"enabled": false} => 200 ${off}`);
  }
  await assertAnswers(`PATCH /proxies/p {"enabled": true} => 200 ${on}`);
  using conn = await connected(port);
  await assertAnswers("DELETE /proxies/p => 204\nGET /proxies => 200 {}");
  assertEquals(await readToEnd(conn), 0);
  await untilRefused(port);
  await create({ listen });
  await assertEchoesAt(port);
});

test("names are found as they are written in a path, encoded or not", async ({ api, create }) => {
  const plain = "10.96.1.2:9094_us@host";
  const names = [plain, "größe", "a/b", "100%", "x".repeat(255)];
  for (const name of names) await create({ name });
  for (const path of [...names.map(encodeURIComponent), plain, "100%"]) {
    const { name } = await bodyOf(api.get(`/proxies/${path}`));
    assert([name, encodeURIComponent(name)].includes(path), path);
  }
});

test("POST /populate creates, replaces what differs, and leaves the rest alone", async (stage) => {
  await using other = echo();
  const { api, proxy } = stage;
  const populate = async (proxies: unknown) =>
    (await bodyOf(api.post("/populate", proxies), 201)).proxies;
  const listen = "localhost:0";
  const { address: upstream } = stage.upstream;
  const names = ["a", "b", "c"];
  const made = await populate(
    names.map((name) => ({ name, listen, upstream })),
  );
  assertEquals(made.map(({ name }: Route) => name), names);
  for (const each of made) await assertEchoesAt(portOf(each));
  const [a, b, c] = made;
  for (const name of ["a", "b"]) {
    await api.post(`/proxies/${name}/toxics`, { type: "latency" });
  }
  using left = await connected(portOf(a));
  using cut = await connected(portOf(b));

  const [a2, b2, c2, d2] = await populate([
    { name: "a", listen: a.listen, upstream, toxics: null },
    { name: "b", listen: b.listen, upstream: other.address },
    { name: "c", listen, upstream, enabled: false },
    { name: "d", listen, upstream: other.address, enabled: false },
  ]);
  assertEquals([a2.toxics.length, a2.enabled], [1, true]);
  assertEquals(b2, { ...b, upstream: other.address });
  assertEquals(c2, c); // also that it is enabled is left alone
  assertEquals(d2.enabled, false);
  await assertEchoes(left);
  assertEquals(await readToEnd(cut), 0);
  using _replaced = await connected(portOf(b));
  assertEquals(other.accepted, 1);
  const toB = proxy.liveConnections().filter(({ route }) => route === "b");
  assertEquals(only(toB).number, 1);
  assertEquals(await populate([]), []);
  const { body: shown } = await api.get("/proxies");
  assertEquals(await populate(shown), Object.values(shown));
});

// ---- Toxics ------------------------------------------------------------------

test("a toxic is added, shown, changed by either method, and removed, its keys in any case", async ({ assertAnswers, create }) => {
  await create();
  const slow = (toxicity: number, latency: number) =>
    `{"name": "slow", "type": "latency", "stream": "upstream", "toxicity": ${toxicity}, "attributes": {"latency": ${latency}, "jitter": 1}}`;
  await assertAnswers(`
GET ${TOXICS} => 200 []
POST ${TOXICS} {"Name": "slow", "Type": "latency", "Stream": "UpStream", "Toxicity": 0.25, "Attributes": {"Latency": 3, "JITTER": 1}, "condition": null}
GET ${TOXICS}/slow
  200 ${slow(0.25, 3)}
GET ${TOXICS} => 200 [${slow(0.25, 3)}]
POST ${TOXICS}/slow {"Toxicity": null, "Attributes": {"Latency": 5}}
  200 ${slow(0.25, 5)}
PATCH ${TOXICS}/slow {"name": "x", "type": "latency", "stream": "DownStream", "toxicity": 1, "attributes": null}
  200 ${slow(1, 5)}
DELETE ${TOXICS}/slow => 204
GET ${TOXICS}/slow => 404 toxic not found
GET ${TOXICS} => 200 []
`);
});

test("every type is added with all its attributes, in numbers", async ({ api, create }) => {
  await create();
  const toxics = [
    "latency latency=0 jitter=0",
    "bandwidth rate=0",
    "slow_close delay=0",
    "timeout timeout=0",
    "reset_peer timeout=0",
    "slicer average_size=7 size_variation=0 delay=0",
    "limit_data bytes=0",
    "packet_loss loss_rate=0.1 correlation=0",
    "corrupt rate=0.001",
    "limit_time time=0",
    "noop",
  ];
  for (const { type, attributes } of toxics.map(toxic)) {
    const given = type === "slicer" ? { average_size: 7 } : null;
    const call = api.post(TOXICS, { name: "", type, attributes: given });
    const added = await bodyOf(call);
    assertEquals(added.attributes, attributes, type);
    assertEquals(added.name, `${type}_downstream`);
  }
});

test("what Toxiproxy ignores is ignored, and named", async ({ api, log, make }) => {
  const proxy = '"listen": "localhost:0", "upstream": "a:1"';
  const calls = `
POST /proxies {"name": "p", ${proxy}}
PATCH /proxies/p {"name": "p", "upstream": "a:1", "listen": null, "toxics": []}
  nothing
PATCH /proxies/p {"name": "q", "toxics": [{"type": "latency"}]}
  name: stays p
  toxics
POST ${TOXICS} {"type": "latency", "toxicity": 1}
PATCH /proxies/p {"toxics": [{"attributes": {"jitter": 0, "latency": 0}, "name": "latency_downstream", "type": "latency", "stream": "downstream", "toxicity": 1}]}
  nothing
POST ${TOXICS} {"name": "l", "type": "latency", "toxicity": 80, "attributes": {"latency": 0, "timeout": 5}}
  toxicity: 80 counts as 1
  attributes.timeout
PATCH ${TOXICS}/l {"name": "l", "type": "latency", "stream": "DownStream"} => nothing
POST ${TOXICS}/l {"type": "timeout", "stream": "UPSTREAM", "toxicity": 1.5, "delay": 5}
  delay
  toxicity: 1.5 counts as 1
  type: stays latency
  stream: stays downstream
POST /populate [{"name": "q", ${proxy}, "toxics": [{"type": "latency", "id": 1, "attributes": {"latency": 0, "delay": 1}}], "ünknown": 1}]
  [0]."ünknown"
  [0].toxics[0].id
  [0].toxics[0].attributes.delay
PATCH /proxies/p {"upstream": "[::1]"} => upstream: [::1] has no port; its connections fail
PUT /seed {"seed": 1, "sede": 2} => sede
`;
  const header = "X-Chaos-Proxy-Ignored";
  const ignored = () => log.of("api").at(-1)?.ignored;
  for (const [call, expected] of casesIn(calls)) {
    const answer = await make(call);
    assert(answer.status < 300, `${call}: ${answer.text}`);
    const names = expected[0] === "nothing" ? undefined : expected;
    const shown = names?.join(", ").replace("ü", "?") ?? null;
    assertEquals(answer.headers.get(header), shown, call);
    assertEquals(ignored(), names, call);
  }
  const { type, toxicity } = await bodyOf(api.get(`${TOXICS}/l`));
  assertEquals([type, toxicity], ["latency", 1]);

  // Also where the call fails, which may be why; and never at any length.
  const failed = await make('POST /proxies {"nmae": "x", "upstream": "a:1"}');
  assertEquals([failed.status, failed.headers.get(header)], [400, "nmae"]);
  const many: [key: string, shown: RegExp][] = [
    ["key", /^key0, .* \.\.\. and 9950 more$/],
    ["k".repeat(50), /^k{50}0, .{1947}$/],
  ];
  for (const [key, shown] of many) {
    const keys = Array.from({ length: 10_000 }, (_, i) => [key + i, 1]);
    const body = JSON.stringify(Object.fromEntries(keys));
    const { status, headers } = await make(`PATCH /proxies/p ${body}`);
    assertEquals(status, 200);
    assertMatch(defined(headers.get(header)), shown);
    assertEquals(ignored()?.length, 51);
  }
});

test("an upstream without a port is taken, and its connections fail", async (stage) => {
  const { create, change, log, proxy, upstream: { address } } = stage;
  const port = await create({ upstream: "one.example" });
  await change({ upstream: "[::1]" });
  using conn = await Deno.connect({ port });
  assertEquals(await readToEnd(conn), 0);
  const [{ upstream, cause }] = await log.first("upstream_failed", 1);
  assertEquals(upstream, "[::1]");
  assertEquals(cause, "the upstream has no port; expected host:port");
  // Without a host it is one of localhost.
  const own = address.replace("127.0.0.1", "");
  const changed = await change({ upstream: own });
  assertEquals(changed.upstream, `localhost${own}`);
  await assertEchoesAt(port);
  // A route takes none.
  const bad = { localPort: 0, upstream: "one.example" };
  const problem = "upstream: expected host:port or [ipv6]:port";
  const update = () => proxy.updateRoute("p", bad);
  await assertRejects(update, ConfigError, problem);
  await assertRejects(() => proxy.addRoute(bad), ConfigError, problem);
});

test("POST /reset enables every proxy that it can, and removes all toxics", async ({ api, assertAnswers, create }) => {
  const taken = take();
  const listen = `127.0.0.1:${taken.addr.port}`;
  const toxics = [{ type: "timeout" }, { type: "reset_peer" }];
  await create({ name: "a", enabled: false, listen, toxics });
  await create({ name: "b", enabled: false, toxics });
  const port = await create({ dropRate: 0.5, toxics });
  await assertAnswers(`
POST /reset => 500 listen tcp ${listen}: bind: address already in use
`);
  const { a, b, p } = await bodyOf(api.get("/proxies"));
  assertEquals([a.toxics, b.toxics, p.toxics], [[], [], []]);
  assertEquals([a.enabled, b.enabled, p.enabled], [false, true, true]);
  assertEquals([portOf(p), p.dropRate], [port, 0.5]);
  await assertEchoesAt(portOf(b));
  taken.close();
  await assertAnswers(`
POST /reset {}
POST /reset not looked at
  204
`);
  await assertEchoesAt(portOf(a));
});

// ---- Refusals ----------------------------------------------------------------

const NAME = "1 to 255 characters without white space, not . or ..";

/** Calls that are refused, by the name of their test. */
const REFUSALS = {
  "what proxies are refused is said, and changes nothing": `
POST /proxies {"listen": "127.0.0.1:0", "upstream": "127.0.0.1:9"}
POST /proxies {"name": "", "upstream": "127.0.0.1:9"}
POST /proxies {"name": null, "upstream": "127.0.0.1:9"}
POST /proxies {}
  400 missing required field: name
POST /proxies {"name": "x", "listen": "nowhere"}
POST /proxies {"name": "x", "upstream": ""}
  400 missing required field: upstream
POST /proxies {"name": "p", "upstream": "127.0.0.1:9"} => 409 proxy already exists
POST /proxies {"name": "a b", "upstream": "a:b", "enabled": "yes", "dropRate": 2, "listen": "nowhere", "toxics": [{"type": "latency", "attributes": {"latency": "1"}}]}
  400 ${BAD}name: expected ${NAME}, found "a b"; write a-b; enabled: expected true or false, found "yes"; upstream: expected host:port or [ipv6]:port, the port from 1 to 65535, found "a:b"; dropRate: expected a number from 0 to 1, found 2; listen: expected host:port, [ipv6]:port or :port, the port from 0 to 65535, found "nowhere"; toxics[0].attributes.latency: expected an integer from 0 to 2147483647, in ms, found "1"; write 1
POST /proxies {"name": ".", "upstream": "a:1", "toxics": [{"type": "noop", "name": ".."}]}
  400 ${BAD}name: expected ${NAME}, found "."; toxics[0].name: expected ${NAME}, found ".."
POST /proxies { => 400 ${BAD}line 1, column 2: invalid JSON: Expected property name or '}'
POST /proxies => 400 ${BAD}line 1, column 1: invalid JSON: unexpected end
PATCH /proxies/p {"upstream": "a:b", "enabled": 1}
  400 ${BAD}enabled: expected true or false, found 1; upstream: expected host:port or [ipv6]:port, the port from 1 to 65535, found "a:b"
POST /populate [{"upstream": "a:1"}] => 400 missing required field: name at proxy 1
POST /populate [{"name": "p", "upstream": "a:1"}, {"name": "b"}] => 400 missing required field: upstream at proxy 2
POST /populate [{"name": "missing", "upstream": "a:b"}, {"name": "", "upstream": "a:1"}]
  400 missing required field: name at proxy 2
POST /populate 5 => 400 ${BAD}expected a list of routes, 1000 at most, found 5
POST /populate [5, {"name": "q", "upstream": "a:1", "toxics": [{"type": "x"}]}]
  400 ${BAD}[0]: expected a mapping, found 5; [1].toxics[0].type: expected latency or bandwidth or slow_close or timeout or reset_peer or slicer or limit_data or packet_loss or corrupt or limit_time or stall or random_close or duplicate or inject or reorder or noop, found "x"
POST /populate [{"name": "missing", "listen": "127.0.0.1:5", "upstream": "a:1"}, {"name": "missing", "listen": "127.0.0.1:5", "upstream": "a:1"}]
  400 ${BAD}[1].listen: 127.0.0.1:5 is already taken by [0]; [1].name: missing is already taken by [0]
`,
  "what toxics are refused is said, and changes nothing": `
POST ${TOXICS} {"type": "latency"} => 409 toxic already exists
POST ${TOXICS} {"type": "latency", "stream": "sideways"}
POST ${TOXICS} {"type": "x", "stream": ""}
  400 stream was invalid, can be either upstream or downstream
POST ${TOXICS} {"type": "lattency"} => 400 invalid toxic type; did you mean latency?
POST ${TOXICS} {"type": "constructor", "toxicity": 5}
POST ${TOXICS} {"type": null}
POST ${TOXICS} {}
  400 invalid toxic type
POST ${TOXICS} {"type": "bandwidth", "attributes": []} => 400 ${BAD}attributes: expected a mapping, found a list
POST ${TOXICS} {"name": ".", "type": "timeout", "stream": 5, "toxicity": "80", "attributes": {"timeout": -1}}
  400 ${BAD}name: expected ${NAME}, found "."; stream: expected upstream or downstream, found 5; toxicity: expected a number from 0 to 1, found "80"; attributes.timeout: expected an integer from 0 to 2147483647, in ms, found -1
POST ${TOXICS} {"type": "slicer"}
  400 ${BAD}attributes.average_size: missing; expected an integer from 1 to 9007199254740991, in bytes
PATCH ${TOXICS}/latency_downstream {"attributes": {"latency": "x"}}
  400 ${BAD}attributes.latency: expected an integer from 0 to 2147483647, in ms, found "x"
PATCH ${TOXICS}/latency_downstream {"toxicity": -1} => 400 ${BAD}toxicity: expected a number from 0 to 1, found -1
`,
  "what is not there, or not called so, is told": `
GET /proxies/none
POST /proxies/none {"type": "latency"}
PATCH /proxies/none {"type": "latency"}
DELETE /proxies/none
GET /proxies/none/toxics
POST /proxies/none/toxics {"type": "x"}
GET /proxies/none/toxics/x
PATCH /proxies/none/toxics/x {"type": "latency"}
DELETE /proxies/none/toxics/x
GET /proxies/%zz
  404 proxy not found
GET ${TOXICS}/x
PATCH ${TOXICS}/x {}
POST ${TOXICS}/x {}
DELETE ${TOXICS}/x
  404 toxic not found
PUT /proxies => 405 PUT is not for /proxies, which takes GET, POST
GET /reset => 405 GET is not for /reset, which takes POST
POST /connections => 405 POST is not for /connections, which takes GET
`,
  "a body that is too large, no mapping, or without a seed is refused": `
POST /proxies []
PATCH /proxies/p []
POST ${TOXICS} []
  400 ${BAD}expected a mapping, found a list
PATCH ${TOXICS}/latency_downstream 5
PUT /seed 5
  400 ${BAD}expected a mapping, found 5
PUT /seed {"seed": -1} => 400 ${BAD}seed: expected an integer from 0 to 9007199254740991, found -1
PUT /seed {}
PUT /seed {"seed": null}
  400 missing required field: seed
POST /proxies {"name": "x", "upstream": "a:1", "toxics": ZEROS}
  400 ${BAD}toxics: expected a list of toxics, 500 at most, found a list of 340000
POST /populate [{"name": "x", "upstream": "a:1", "toxics": ZEROS}]
  400 ${BAD}[0].toxics: expected a list of toxics, 500 at most, found a list of 340000
PATCH /proxies/p {"enabled": 5, "toxics": ZEROS} => 400 ${BAD}enabled: expected true or false, found 5
PATCH /proxies/p FULL => 200
PATCH /proxies/p FULL\u0020 => 413 expected a body of at most 1 MiB, found more
`,
  "a proxy that forwards to itself is refused, also by way of others": `
POST /proxies {"name": "x", "listen": "127.0.0.1:FREE", "upstream": "localhost:FREE"}
  400 ${BAD}upstream: connections would go in a circle, x -> x; write the address of the server behind it
POST /proxies {"name": "x", "listen": "127.0.0.1:FREE", "upstream": "a:1"} => 201
PATCH /proxies/x {"upstream": "localhost:OWN"} => 200
PATCH /proxies/p {"upstream": "[::]:FREE"}
  400 ${BAD}upstream: connections would go in a circle, p -> x -> p; write the address of the server behind it
DELETE /proxies/x => 204
POST /proxies {"name": "x", "listen": "127.0.0.1:ECHO", "upstream": "localhost:OWN", "enabled": false}
  400 ${BAD}upstream: connections would go in a circle, p -> x -> p; write the address of the server behind it
`,
  "a key that stands twice in different case is refused": `
POST /populate [{"name": "x", "upstream": "a:1", "Upstream": "b:1"}]
  400 ${BAD}[0].Upstream: the same key as upstream; write one
POST ${TOXICS} {"type": "noop", "Type": null} => 400 ${BAD}Type: the same key as type; write one
POST ${TOXICS}/latency_downstream {"attributes": {"latency": 1, "Latency": 2}}
  400 ${BAD}attributes.Latency: the same key as latency; write one
POST /proxies {"name": "x", "upstream": "a:1", "Upstream": null, "toxics": [{"type": "noop", "TYPE": "noop"}]}
  400 ${BAD}Upstream: the same key as upstream; write one; toxics[0].TYPE: the same key as type; write one
`,
};

for (const [name, calls] of Object.entries(REFUSALS)) {
  test(name, async ({ api, assertAnswers, create, upstream }) => {
    const port = await create({ toxics: [{ type: "latency" }] });
    using conn = await connected(port);
    const all = async () => [await api.get("/proxies"), await api.get("/seed")];
    const before = await all();
    const words = {
      ZEROS: JSON.stringify(Array(340_000).fill(0)),
      FULL: '{"latencyMs": 0}'.padEnd(1024 * 1024),
      OWN: `${port}`,
      ECHO: captured(/:(\d+)$/, upstream.address),
      FREE: `${steadyPort()}`,
    };
    await assertAnswers(
      Object.entries(words).reduce(
        (all, each) => all.replaceAll(...each),
        calls,
      ),
    );
    assertEquals(await all(), before);
    await assertEchoes(conn);
    await assertEchoesAt(port);
  });
}

// ---- Beyond Toxiproxy --------------------------------------------------------

test("GET /connections lists the live ones, and DELETE cuts one", async ({ api, assertAnswers, create, log, upstream }) => {
  const port = await create({ toxics: [toxic("latency name=slow")] });
  assertEquals(await bodyOf(api.get("/connections")), []);
  using one = await connected(port);
  using two = await connected(port);
  const [first, second] = await bodyOf(api.get("/connections"));
  const { id, ageMs } = first;
  assert(ageMs > 0);
  assertEquals(first, {
    id,
    number: 1,
    proxy: "p",
    client: `127.0.0.1:${one.localAddr.port}`,
    upstream: upstream.address,
    bytesUp: 5,
    bytesDown: 5,
    ageMs,
    toxics: ["slow"],
  });
  assertEquals(second.number, 2);

  await assertAnswers(`DELETE /connections/${id} => 204`);
  assertEquals(await readToEnd(one), 0);
  await assertClosed({ log }, { why: "cut" });
  await assertEchoes(two);
  await assertAnswers(`
DELETE /connections/${id}
DELETE /connections/x
  404 connection not found
DELETE /connections/${second.id}?reset=yes => 400 expected reset=0 or 1, found "yes"
DELETE /connections/${second.id}?reset=1 => 204
`);
  await assertRejects(() => readAll(two), Deno.errors.ConnectionReset);
  await assertClosed({ log }, { why: "cut" }, 2);
});

test("a connection that is cut with a RST resets its upstream, too", async ({ api, create }) => {
  await using upstream = new Silent();
  const port = await create({ upstream: upstream.address });
  using _client = await Deno.connect({ port });
  const server = await upstream.accept();
  const [{ id }] = await bodyOf(api.get("/connections"));
  await api.delete(`/connections/${id}?reset=1`);
  await assertRejects(() => readAll(server), Deno.errors.ConnectionReset);
});

test("PUT /seed sets the seed, and a test can replay", async ({ api, assertAnswers, create, log }) => {
  const port = await create({ dropRate: 0.5 });
  await assertAnswers('GET /seed => 200 {"seed": 1}');
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
  assertMatch(first, /^1 (?=.*client).*fault.*,16 /);
  assert(await play(43) !== first);
  assertEquals(await play(42), first);
  assert(await outcomes() !== first); // the numbers go on
  await assertAnswers('GET /seed => 200 {"seed": 42}');
});

// ---- Metrics -----------------------------------------------------------------

test("GET /metrics counts bytes as Toxiproxy does, and what is this tool's own", async ({ api, create, log, proxy, upstream: { address } }) => {
  await using upstream = new Upstream(async (conn) => {
    await assertReads(conn, "abc");
    await send(conn, "hello!");
    await readToEnd(conn);
  });
  const toxics = [{ type: "slow_close" }];
  const port = await create({ upstream: upstream.address, toxics });
  const dropping = await create({ name: 'a"b\\c', dropRate: 1 });
  using open = await Deno.connect({ port });
  using ended = await Deno.connect({ port });
  for (const conn of [open, ended]) {
    await send(conn, "abc");
    await assertReads(conn, "hello!");
  }
  await ended.closeWrite();
  await readToEnd(ended);
  using dropped = await Deno.connect({ port: dropping });
  await readToEnd(dropped);
  await log.first("closed", 2);

  const { status, headers, text } = await api.raw("GET", "/metrics");
  assertEquals(status, 200);
  const type = "text/plain; version=0.0.4; charset=utf-8";
  assertEquals(headers.get("content-type"), type);
  const p =
    `listener="127.0.0.1:${port}",proxy="p",upstream="${upstream.address}"`;
  const odd = 'proxy="a\\"b\\\\c"';
  const d = `listener="127.0.0.1:${dropping}",${odd},upstream="${address}"`;
  const exact = text
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
# chaos_proxy_scheduled_on gauge
# chaos_proxy_build_info gauge
chaos_proxy_build_info{version="${deno.version}",deno="${Deno.version.deno}"} 1
`,
  );
  const dialMs = log.of("connected").map(({ dialMs }) => dialMs);
  const dials = (rest: string) =>
    [...text.matchAll(RegExp(`_seconds_${rest} (\\S+)$`, "gm"))]
      .map(([, value]) => Number(value));
  assertEquals(
    dials('bucket\\{proxy="p",le="[\\d.]+"\\}'),
    DIAL_BOUNDS_MS.map((bound) => dialMs.filter((ms) => ms <= bound).length),
  );
  const total = dialMs.reduce((sum, ms) => sum + ms, 0);
  assertEquals(dials('sum\\{proxy="p"\\}'), [total / 1000]);

  await api.post(TOXICS, toxic(`latency upstream latency=${LONG_MS}`));
  await send(open, "held");
  const hasRead = () => proxy.liveConnections()[0]?.bytesUp === 7;
  await until(hasRead, "what is held has been read");
  const after = (await api.raw("GET", "/metrics")).text.split("\n");
  const expected = [
    'chaos_proxy_faults_total{proxy="p",kind="latency"} 1', // the open one
    `toxiproxy_proxy_received_bytes_total{direction="upstream",${p}} 10`,
    `toxiproxy_proxy_sent_bytes_total{direction="upstream",${p}} 6`,
  ];
  assertEquals(expected.filter((line) => !after.includes(line)), []);
});

// ---- The HTTP of it ------------------------------------------------------------

test("every answer has an id of its own, and no path is told in Go's words", async ({ assertAnswers, log, make }) => {
  await assertAnswers(`
GET /version => 200 {"version": "2.12.0", "name": "chaos-proxy", "chaosProxyVersion": "${deno.version}"}
`);
  const unknown = ["/", "/proxies/", "/proxies/x/y?z=1", "/constructor"];
  const ids = new Set<string>();
  for (const path of ["/proxies", "/metrics", "/reset", ...unknown]) {
    const { status, headers, text } = await make(`GET ${path}`);
    const request = defined(headers.get("X-Toxiproxy-Request-Id"));
    assert(!ids.has(request), path);
    ids.add(request);
    if (!unknown.includes(path)) continue;
    assertEquals([status, text], [404, "404 page not found\n"], path);
    const type = headers.get("content-type");
    assertEquals(type, "text/plain;charset=UTF-8", path);
    const { durationMs, ...told } = defined(log.of("api").at(-1));
    const call = { request, method: "GET", path, status };
    assertEquals(told, { event: "api", ...call });
    assert(durationMs >= 0);
  }
});

test("a route has up to 500 toxics, through which the bytes get", async ({ assertAnswers, create }) => {
  const toxics = Array.from({ length: 499 }, (_, i) => toxic(`noop name=${i}`));
  const port = await create({ toxics });
  await assertAnswers(`
POST ${TOXICS} {"type": "noop"} => 200
POST ${TOXICS} {"type": "noop", "stream": "upstream"} => 400 ${BAD}toxics: expected 500 at most with those of the profile, found 501
`);
  await assertEchoesAt(port);
});

/** Statuses of requests with these headers, to an API at an address. */
const GUARDED: Record<string, string> = {
  "127.0.0.1:0": `
host: a b
host: [
host: loc%alhost
  400
user-agent: Mozilla/5.0 (Windows NT 10.0)
origin: https://evil.example
origin: null
origin: http://127.0.0.1:1
origin: https://127.0.0.1:PORT
host: evil.example
host: evil.example:PORT
host: localhost.evil.example
host: 127.0.0.1.evil.example
host: 0.0.0.0.evil.example
host: 0.0.0.0:PORT; origin: https://evil.example
host: 10.0.0.1:PORT; origin: http://127.0.0.1:PORT
  403
user-agent: toxiproxy-cli/v2.12.0 (linux/amd64)
host: 127.0.0.1:PORT; origin: http://127.0.0.1:PORT
host: localhost:PORT
host: LOCALHOST
host: 127.0.0.2:1
host: [::1]:PORT
host: 0.0.0.0:PORT
host: 10.0.0.1
host: [2001:db8::1]:PORT
host: 0.0.0.0:PORT; origin: http://0.0.0.0:PORT
  200
`,
  // However loopback is written.
  "127.1:0": "host: page.example => 403",
  "localhost:0": "host: page.example => 403",
  ...(IS_LINUX && { "127.0.0.2:0": "host: page.example => 403" }),
  // On another address any host will do. A page's own name may lead here, so that
  // its origin is as foreign as any.
  "0.0.0.0:0": `
host: toxiproxy:8474 => 200
host: toxiproxy:8474; origin: http://elsewhere
host: toxiproxy:8474; origin: http://toxiproxy:8474
  403
`,
};

for (const [address, requests] of Object.entries(GUARDED)) {
  Deno.test(`at ${address} what a browser sends for a web page is refused`, async () => {
    await using watched = await WatchedProxy.start({});
    await using server = serveApi(watched.proxy, address);
    const [, at, port = ""] = /^(.*):(\d+)$/.exec(server.address) ?? [];
    const hostname = at === "0.0.0.0" ? "127.0.0.1" : at;
    const cases = casesIn(requests.replaceAll("PORT", port));
    for (const [line, [expected]] of cases) {
      const headers = line.split("; ");
      if (!line.startsWith("host")) headers.push("host: localhost");
      for (const call of ["GET /version", "DELETE /connections/0"]) {
        using conn = await Deno.connect({ hostname, port: Number(port) });
        const lines = [`${call} HTTP/1.1`, "connection: close", ...headers];
        await send(conn, `${lines.join("\r\n")}\r\n\r\n`);
        const answer = text(await readAll(conn));
        const found = captured(/^HTTP\/1.1 (\d+) /, answer);
        assertEquals(found === "404" ? "200" : found, expected, line);
        const refusal = /"error":"[^"]{10,}.*","status":4..}$/;
        if (expected !== "200") assertMatch(answer, refusal, line);
      }
    }
  });
}

test("calls full of problems, and of peers that speak no HTTP, cost nobody else anything", async ({ api }) => {
  // Each spelling of a key is a problem of its own. The answer shows the first.
  const spellings = Array.from({ length: 2 ** 15 }, (_, bits) => [
    [..."CONNECTTIMEOUTMS"].map((letter, i) =>
      bits & 1 << i ? letter : letter.toLowerCase()
    ).join(""),
    1,
  ]);
  const proxy = { name: "x", upstream: "a:1" };
  const bodies = {
    "/populate": Array(1000).fill(0),
    "/proxies": { ...proxy, ...Object.fromEntries(spellings) },
  };
  for (const [path, body] of Object.entries(bodies)) {
    const { error } = await bodyOf(api.post(path, body), 400);
    assertMatch(error, /^bad request body: .*; … and \d+ more$/);
    assert(error.length < 20_000, `${path}: ${error.length}`);
  }
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

test("calls that race change each proxy one after the other", async ({ api, change, upstream }) => {
  type Call = (i: number) => ReturnType<Api["call"]>;
  const statusesOf = async (count: number, call: Call) =>
    (await times(count, call)).map(({ status }) => status).toSorted();
  const proxy = { name: "p", upstream: upstream.address };
  const created = await statusesOf(3, () => api.post("/proxies", proxy));
  assertEquals(created, [201, 409, 409]);
  const patch = (changes: unknown) => api.patch("/proxies/p", changes);
  const all = await Promise.all([
    statusesOf(30, (i) => patch({ enabled: i % 2 === 0 })),
    statusesOf(10, (i) => patch({ listen: i % 2 ? ":0" : "127.0.0.1:0" })),
    statusesOf(10, () => api.post(TOXICS, { type: "latency" })),
  ]);
  const added = [200, ...Array(9).fill(409)];
  assertEquals(all, [Array(30).fill(200), Array(10).fill(200), added]);
  await assertEchoesAt(portOf(await change({ enabled: true })));
  const removals = await Promise.all([
    api.delete("/proxies/p"),
    api.delete("/proxies/p"),
    patch({ enabled: false }),
  ]);
  assertEquals(removals.map(({ status }) => status), [204, 404, 404]);
});

// ---- The library -------------------------------------------------------------

/** A route whose upstream is never asked for anything. */
function routeAt(localPort: number) {
  return { name: "r", localPort, upstream: "127.0.0.1:1" };
}

Deno.test("a method throws what is wrong, or that it is too late", async () => {
  await using watched = await WatchedProxy.start({ routes: [routeAt(0)] });
  const { proxy } = watched;
  const route: Route = proxy.route("r");
  const again = () => proxy.addRoute(route);
  const { AlreadyExists, BadResource, NotFound } = Deno.errors;
  await assertRejects(again, AlreadyExists, "there is a route r already");
  assertThrows(() => proxy.route("s"), NotFound, "there is no route s");
  await assertRejects(() => proxy.removeRoute("s"), NotFound);
  for (const bad of [{ host: "a b" }, { localPort: -1 }, { upstream: "x" }]) {
    const add = () => proxy.addRoute({ ...route, name: "bad", ...bad });
    await assertRejects(add, ConfigError);
    await assertRejects(() => proxy.updateRoute("r", bad), ConfigError);
  }
  const toxics = { toxics: [] } as { latencyMs?: number };
  const change = () => proxy.updateRoute("r", toxics);
  await assertRejects(change, ConfigError, "route r: toxics: unknown key");
  assertEquals(proxy.routes, [route]);
  await proxy.drain();
  await assertRejects(again, BadResource, "the proxy is shutting down");

  const serve = (address: number | string) => () => serveApi(proxy, address);
  for (const address of ["x", "a:b", "localhost:99999", -1, 1.5, ""]) {
    assertThrows(serve(address), RangeError, "address: expected", `${address}`);
  }
  using taken = take();
  const { port } = taken.addr;
  const error = assertThrows(serve(port), ListenError);
  const why = `127.0.0.1:${port}: the port is already in use`;
  assertEquals(error.message, `control API: cannot listen on ${why}`);
});

for (const { sockets, resettable } of SOCKETS) {
  Deno.test(`an address is free as soon as a call has returned, on ${sockets}`, async () => {
    await using upstream = echo();
    const localPort = steadyPort();
    const route = { name: "r", localPort, upstream: upstream.address };
    const start = () => WatchedProxy.start({ routes: [route] }, { resettable });
    const regained = { removed: 0, stopped: 0 };
    for (let round = 0; round < 20; round++) {
      const { proxy } = await unlessStarting(start, () => regained.stopped++);
      await assertEchoesAt(localPort);
      await proxy.updateRoute("r", { enabled: false });
      await proxy.updateRoute("r", { enabled: true });
      await proxy.updateRoute("r", { host: "0.0.0.0" });
      await assertEchoesAt(localPort);
      await proxy.updateRoute("r", { host: "localhost" });
      await proxy.removeRoute("r");
      const add = () => proxy.addRoute(route);
      await unlessStarting(add, () => regained.removed++);
      await pause(); // it accepts
      await proxy.stop();
    }
    assert(
      regained.removed > 0 && regained.stopped > 1,
      Deno.inspect(regained),
    );
  });
}

/** Tries again while a process that another test starts has the port open. */
async function unlessStarting<T>(
  listen: () => Promise<T>,
  atOnce: () => void,
): Promise<T> {
  for (let attempt = 1;; attempt++) {
    try {
      const listening = await listen();
      if (attempt === 1) atOnce();
      return listening;
    } catch (error) {
      if (!(error instanceof ListenError) || attempt === 100) throw error;
      await pause(10);
    }
  }
}

type Change = (proxy: ChaosProxy, localPort: number) => Promise<unknown>;
const CHANGES: Record<string, Change> = {
  added: (proxy, port) => proxy.addRoute({ ...routeAt(port), name: "added" }),
  changed: (proxy, localPort) => proxy.updateRoute("r", { localPort }),
};

for (const [how, change] of Object.entries(CHANGES)) {
  Deno.test(`a route that is being ${how} when the proxy stops does not listen`, async () => {
    const config = { routes: [routeAt(0)] };
    for (const { resettable } of SOCKETS) {
      for (let ticks = 0; ticks < 20; ticks++) {
        await using watched = await WatchedProxy.start(config, { resettable });
        const { proxy } = watched;
        const { routes } = proxy;
        const localPort = steadyPort();
        const changing = change(proxy, localPort).catch((error) => error);
        for (let i = 0; i < ticks; i++) await null;
        await proxy.stop();
        const error = await changing;
        const isLate = error instanceof Deno.errors.BadResource;
        if (isLate) assertEquals(proxy.routes, routes);
        else assertEquals(proxy.routes.at(-1)?.localPort, localPort);
        if (ticks < 2) assert(isLate, `${error}`);
        await untilRefused(localPort);
      }
    }
  });
}

Deno.test("a listener for events may stop the proxy at once", async () => {
  let stops = false;
  const onEvent = ({ event }: ProxyEvent) => {
    if (stops && event === "listening") proxy.stop();
  };
  const proxy = await ChaosProxy.start({ routes: [routeAt(0)] }, { onEvent });
  stops = true;
  await proxy.updateRoute("r", { localPort: steadyPort() });
  await proxy.stop();
  assertEquals(proxy.connections, 0);
});

// ---- The program -------------------------------------------------------------

/** The program with the API on a free port, and a client of it. */
async function startProgram(...args: string[]) {
  const open = new AsyncDisposableStack();
  const cli = open.use(
    new Cli("--log-format", "json", "--api", "0", ...args),
  );
  const [{ address }] = await cli.log.first("api_listening", 1);
  const api = open.use(Api.at(address));
  const close = () => open.disposeAsync();
  return { cli, api, ...callsOf(api), [Symbol.asyncDispose]: close };
}

Deno.test("each of Toxiproxy's forms is a config", () => {
  const some =
    '"listen": "127.0.0.1:0", "upstream": ":80", "enabled": true, "Logger": {}, "toxics": []';
  const byName =
    `{"a": {"name": "a", ${some}}, "b": {${some}}, "c": {"name": "d", ${some}}}`;
  const keys = ["routes", "proxies", "seed", "api", "upstream", "listen"];
  const odd = keys.map((key) => `"${key}": {"name": "${key}", ${some}}`);
  const forms = `
[{"name": "a", ${some}}, {"name": "b", ${some}}] => a b
{"a": {"Name": null, ${some}}} => a
{"proxies": [{"name": "a", ${some}}]} => a
{"proxies": {"name": "proxies", ${some}}} => proxies
${byName}
{"proxies": ${byName}}
  a b d
{${odd}}
{"proxies": {${odd}}}
  ${keys.join(" ")}
`;
  for (const [form, [names]] of casesIn(forms)) {
    for (const path of ["proxies.json", "proxies.yaml"]) {
      const { routes } = parseConfig(form, path);
      assertEquals(routes.map(({ name }) => name).join(" "), names, form);
      for (const { upstream } of routes) assertEquals(upstream, "localhost:80");
    }
  }
  const seeded = `{"seed": 7, "proxies": ${byName}}`;
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

Deno.test("a config's form is told apart, and its errors keep their paths", () => {
  const known = "known are seed, drainTimeoutMs, api, routes";
  const list = "expected a list of routes, 1000 at most";
  const none = "expected at least one route";
  const api = "api: expected a port or host:port, the port from 0 to 65535";
  const configs = `
{"proxies": 5} => proxies: ${list}, found 5
{"proxies": []} => proxies: ${none}
{"proxies": [5]} => proxies[0]: expected a mapping, found 5
{"proxies": {"a": 5}} => proxies.a: expected a mapping, found 5
{"a": {"upstream": "a:1"}, "b": {}} => b.upstream: missing; expected host:port or [ipv6]:port, the port from 1 to 65535
{"a b": {"upstream": "a:1", "toxics": [{"type": "noop", "stream": 5}]}}
  "a b".name: expected ${NAME}, found "a b"; write a-b
  "a b".toxics[0].stream: expected upstream or downstream, found 5
{"proxies": {"a": {"upstream": "a:1"}, "b": {"upstream": "a:1", "name": "a"}}}
  proxies.b.name: a is already taken by proxies.a
{"a": {"listen": ":0", "upstream": "a:1", "Listen": ":1"}} => a.Listen: the same key as listen; write one
{"proxies": [{"upstream": "a:1"}], "seeds": 1}
  seeds: unknown key; did you mean seed?
  proxies[0].name: missing; expected ${NAME}
{"routes": {"listen": "127.0.0.1:0", "upstream": "a:1"}}
{"routes": {"db": {"localPort": 1, "upstream": "a:1"}}}
  routes: ${list}, found a mapping; write a list, of which each item begins with "- "
{"routes": [{"localPort": 1, "upstream": "a:1"}], "proxies": [{"upstream": "a:1"}]} => proxies: unknown key; ${known}
{"db": {"localPort": 1, "upstream": "a:1"}}
{"db": {"upstream": "a:1"}, "seed": 5}
  db: unknown key; ${known}
  routes: ${none}
[{"localPort": 1, "upstream": "a:1"}]
  expected a mapping, found a list
  routes: ${none}
[{"name": "a", "listen": "localhost:5", "upstream": "a:1"}, {"name": "b", "listen": "localhost:5", "upstream": "a:1"}, {"name": "c", "listen": "localhost:5", "upstream": "a:1", "enabled": false}, {"name": "a", "listen": "localhost:6", "upstream": "a:1"}, {"name": "d", "listen": "x", "upstream": "a:b"}, 5]
  [4].upstream: expected host:port or [ipv6]:port, the port from 1 to 65535, found "a:b"
  [4].listen: expected host:port, [ipv6]:port or :port, the port from 0 to 65535, found "x"
  [5]: expected a mapping, found 5
  [1].listen: 127.0.0.1:5 is already taken by [0]
  [3].name: a is already taken by [0]
{"api": "nowhere"}
  ${api}, found "nowhere"
  routes: ${none}
{"api": [8474]}
  ${api}, found a list
  routes: ${none}
{"api": 8474, "routes": [{"localPort": 1, "upstream": "a:1"}, {"localPort": 8474, "upstream": "a:1"}]}
  routes[1].localPort: 8474 is already taken by api
{"api": 8474, "proxies": [{"name": "a", "listen": "localhost:8474", "upstream": "a:1"}]}
  proxies[0].listen: 127.0.0.1:8474 is already taken by api
{"api": 8474, "proxies": [{"name": "a", "listen": ":8474", "upstream": "a:1"}]}
  proxies[0].listen: 0.0.0.0:8474 is already taken by api
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
  const warnings = ignored.map((each) => `\nwarning: ${each}`).join("") + "\n";
  assert((await checkConfig(list)).includes(warnings));
  await using file = await TempFile.with(list, ".json");
  await using cli = new Cli("--log-format", "json", file.path);
  await cli.log.first("started", 1); // also without the API
  const { route, warnings: told } = cli.log.only("config_warning");
  assertEquals([route, told], ["odd", ignored]);
  await using text = new Cli(file.path);
  await text.says(/WARN +odd .* config_warning warnings="?\[?"?\[1\]\.Logger/);
});

test("the config, the start and populate agree on what is taken", async ({ api, assertAnswers, proxy }) => {
  const port = steadyPort();
  const upstream = "127.0.0.1:9";
  const taken = `127.0.0.1:${port} is already taken by [0]`;
  // The hosts of proxies on that port; `*` is none, and -off is disabled.
  const cases = `
127.0.0.1-off localhost-off
127.0.0.1-off * [::]-off
0.0.0.0 [::1]
127.0.0.1 127.0.0.2${IS_LINUX ? "" : "-off"}
  all are taken
127.0.0.1 LOCALHOST => ${taken}
0.0.0.0 127.1 => ${taken}
[0::0] 127.0.0.1 => ${taken}
127.0.0.1 * => 0.0.0.0:${port} is already taken by [0]
`;
  for (const [hosts, [problem]] of casesIn(cases)) {
    const proxies = hosts.split(" ").map((host, i) => ({
      name: "abc"[i],
      listen: `${host.replace(/^\*|-off$/, "")}:${port}`,
      upstream,
      enabled: !host.endsWith("-off"),
    }));
    const list = JSON.stringify(proxies);
    const parse = () => parseConfig(list, "proxies.json");
    if (problem === "all are taken") {
      await using started = await ChaosProxy.start({ ...parse(), seed: 1 });
      assertEquals(started.routes.length, proxies.length);
      await started.stop();
      await assertAnswers(`POST /populate ${list} => 201`);
      for (const { name } of proxies) await api.delete(`/proxies/${name}`);
      continue;
    }
    const { problems } = assertThrows(parse, ConfigError);
    assertEquals(problems, [`[1].listen: ${problem}`]);
    const error = `${BAD}[1].listen: ${problem}`;
    await assertAnswers(`POST /populate ${list} => 400 ${error}`);
  }

  // In routes it is the port that is unique, whatever the host.
  const route = { name: "a", host: "127.0.0.1", localPort: port, upstream };
  const routes = [route, { ...route, name: "b", host: "127.0.0.2" }];
  const start = {
    api: `127.0.0.1:${port}`,
    routes: [{ ...route, host: "::" }],
  };
  const assertTaken = async (attempt: () => unknown, problem: string) => {
    const error = await assertRejects(async () => await attempt(), ConfigError);
    assertEquals(error.problems, [problem]);
  };
  const twice = `routes[1].localPort: ${port} is already taken by routes[0]`;
  const json = JSON.stringify({ routes });
  await assertTaken(() => parseConfig(json, "config.json"), twice);
  await assertTaken(() => ChaosProxy.start({ routes }), twice);
  await assertTaken(() => proxy.populate(routes), twice);
  const byApi = `routes[0].localPort: ${port} is already taken by api`;
  await assertTaken(() => ChaosProxy.start(start), byApi);
});

Deno.test("--api without a config starts empty, on loopback", async () => {
  await using upstream = echo();
  await using program = await startProgram("--seed", "7");
  const { api, cli: { log } } = program;
  assertMatch(log.only("api_listening").address, /^127\.0\.0\.1:\d+$/);
  const { routes, seed } = log.only("started");
  assertEquals([routes, seed], [0, 7]);
  assertEquals(await bodyOf(api.get("/proxies")), {});
  const toxics = [toxic("reset_peer upstream")];
  const port = await createProxy(api, upstream, { toxics });
  using conn = await Deno.connect({ port });
  await send(conn, "x");
  await assertRejects(() => readAll(conn), Deno.errors.ConnectionReset);
});

Deno.test("api in the config serves it, and --api takes its place", async () => {
  const config = { api: "127.0.0.1:0", seed: 3 };
  await using cli = await Cli.start(config);
  const [{ address }] = await cli.log.first("api_listening", 1);
  await using api = Api.at(address);
  assertEquals(await bodyOf(api.get("/seed")), { seed: 3 });

  const taken = JSON.stringify({ ...config, api: api.port });
  await using file = await TempFile.with(taken, ".json");
  await using clash = new Cli(file.path);
  assertEquals((await clash.status).code, 1);
  const why = `cannot listen on ${address}: the port is already in use`;
  assertEquals(clash.stderr, `chaos-proxy: control API: ${why}\n`);
  await using second = await startProgram(file.path);
  await second.assertAnswers('GET /seed => 200 {"seed": 3}');
});

Deno.test("an api may have the port of a disabled route, or of another address", async () => {
  const list =
    '[{"name": "a", "listen": "127.0.0.2:8474", "upstream": "a:1"}, {"name": "b", "listen": "127.0.0.3:8474", "upstream": "a:1"}]';
  parseConfig(list, "a.json", { api: 8474 });
  const said = await checkConfig(`
api: 8474
seed: 1
routes:
  - { name: r, localPort: 8474, upstream: "a:1", enabled: false, dropRate: 1 }
`);
  const summary = "1 route, seed 1, drain within 30000 ms, api 127.0.0.1:8474";
  assert(said.includes(`${summary}\n`), said);
  assertMatch(said, /\nr +127\.0\.0\.1:8474 +a:1 +disabled, dropRate 1\n/);
});

Deno.test("calls are logged at debug, and changes at info", async () => {
  await using cli = new Cli("--api", "0", "--log-level", "debug");
  const address = await cli.says(
    /INFO .* api_listening address=(127\.0\.0\.1:\d+)\n/,
  );
  await using api = Api.at(address);
  const { make } = callsOf(api);
  const toxics = "/proxies/long-name/toxics";
  const calls = `POST /proxies {"name": "long-name", "upstream": "a:1"}
POST ${toxics} {"type": "latency", "attributes": {"latency": 5}}
PATCH ${toxics}/latency_downstream {"toxicity": 0.5}
DELETE ${toxics}/latency_downstream
POST ${toxics} {"type": "timeout"}
PATCH /proxies/long-name {"enabled": false, "Logger": {}, "id": 1}
PUT /seed {"seed": 9}
DELETE /proxies/long-name
GET /none?x=1`;
  for (const call of calls.split("\n")) await make(call);
  await cli.says(
    /DEBUG .* api request=[\da-f-]{36} method=POST path=\/proxies status=201 /,
  );
  await cli.says(/WARN .* method=PATCH path=\S+ status=200 ignored=Logger,id /);
  await cli.says(/DEBUG .* method=GET path="\/none\?x=1" status=404 /);
  const changes = cli.stdout
    .match(/(?<= INFO +(long-name)? +)(?:route|toxic|reseed|listen).*$/gm);
  const latency = "toxic=latency_downstream";
  const timeout = "downstream: nothing gets through on every connection";
  assertEquals(changes?.map((line) => line.replace(/ 127\S+/, "")), [
    'route_added upstream=a:1 enabled=true faults="no faults"',
    "listening -> a:1 (no faults)",
    `toxic_added ${latency} effect="downstream: +5 ms on every connection"`,
    `toxic_changed ${latency} effect="downstream: +5 ms on 50% of connections"`,
    `toxic_removed ${latency}`,
    `toxic_added toxic=timeout_downstream effect="${timeout}"`,
    `route_changed upstream=a:1 enabled=false faults="disabled, ${timeout}"`,
    "reseeded seed=9",
    "route_removed",
  ]);

  await using open = new Cli("--api", "0.0.0.0:0");
  await open.says(
    /WARN .* api_listening address=0\.0\.0\.0:\d+ warning="whoever reaches .*"\n/,
  );
});

const testOnUnix = IS_WINDOWS ? Deno.test.ignore : Deno.test; // it has no signals

testOnUnix("the API watches and helps a drain, but adds nothing", async () => {
  await using upstream = echo();
  await using program = await startProgram();
  const { api, cli, assertAnswers } = program;
  const port = await createProxy(api, upstream);
  using held = await connected(port);
  using idle = await connected(port);
  await api.post(TOXICS, toxic(`latency latency=${LONG_MS}`));
  await send(held, "held");
  await held.closeWrite();
  cli.kill();
  await cli.log.first("draining", 1);
  await untilRefused(port);
  await assertAnswers(`
POST /proxies {"name": "q", "upstream": "a:1"}
POST /populate [{"name": "q", "upstream": "a:1"}]
PATCH /proxies/p {"enabled": false}
DELETE /proxies/p
POST /reset
  503 the proxy is shutting down
`);
  const live = await bodyOf(api.get("/connections"));
  assertEquals(live.length, 2);
  await api.delete(`${TOXICS}/latency_downstream`);
  assertEquals(text(await readAll(held)), "held");
  await api.delete(`/connections/${live[1].id}`);
  assertEquals(await readToEnd(idle), 0);
  assertEquals((await cli.status).code, 0);
  assertEquals(cli.log.only("drained").cut, 0);
});

testOnUnix("a signal during calls ends it, whatever is under way", async () => {
  await using upstream = echo();
  await using program = await startProgram();
  const { api, cli } = program;
  using idle = await Deno.connect({ port: api.port });
  const head = "POST /proxies HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5";
  await send(idle, `${head}\r\n\r\n{`);
  let signalled = false;
  const addForEver = async () => {
    for (let i = 0;; i++) {
      await createProxy(api, upstream, { name: `p${i}` });
      await api.post(`/proxies/p${i}/toxics`, { type: "latency" });
    }
  };
  const calls = addForEver().catch((error) => assert(signalled, `${error}`));
  await cli.log.first("toxic_added", 3);
  signalled = true;
  cli.kill();
  assertEquals((await cli.status).code, 0);
  await calls;
  assertEquals(cli.stderr, "");
});
