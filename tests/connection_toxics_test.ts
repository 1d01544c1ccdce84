/** Toxics of one live connection, over the API and by the library. */

import { assert, assertEquals, assertRejects, assertThrows } from "@std/assert";
import type { ConfigOptions, RouteOptions, Stream, Toxic } from "../main.ts";
import {
  Api,
  assertBytes,
  assertClosed,
  casesIn,
  Cli,
  defined,
  echo,
  only,
  pause,
  readAll,
  readExactly,
  send,
  Silent,
  soon,
  testBytes,
  text,
  toxic,
  until,
  WatchedProxy,
  writeAll,
} from "./helpers.ts";

const HOUR_MS = 3_600_000;
const STREAMS = ["upstream", "downstream"] as const;
const OTHER = { upstream: "downstream", downstream: "upstream" } as const;

/** A connection through the proxy, with both of its ends. */
interface Line {
  readonly id: number;
  readonly client: Deno.TcpConn;
  readonly upstream: Deno.TcpConn;
}

type Awaitable<T> = T | Promise<T>;

/** What can be done with the toxics of a connection, by its id. */
interface Calls {
  list(id: number): Awaitable<readonly Toxic[]>;
  get(id: number, name: string): Awaitable<Toxic>;
  add(id: number, line: string): Awaitable<Toxic>;
  update(id: number, name: string, words: string): Awaitable<Toxic>;
  remove(id: number, name: string): Awaitable<void>;
}

/** What can be changed of a toxic: `toxicity=0.5 delay=100`. */
function changes(words: string) {
  const { toxicity, attributes } = toxic(`any ${words}`);
  return { toxicity, attributes };
}

const WAYS: Record<string, (watched: WatchedProxy, api: Api) => Calls> = {
  "by the library": ({ proxy }) => ({
    list: (id) => proxy.toxics({ connection: id }),
    get: (id, name) => proxy.toxic({ connection: id }, name),
    add: (id, line) => proxy.addToxic({ connection: id }, toxic(line)),
    update: (id, name, words) =>
      proxy.updateToxic({ connection: id }, name, changes(words)),
    remove: (id, name) => proxy.removeToxic({ connection: id }, name),
  }),
  "over the API"(_, api) {
    const path = (id: number, name = "") =>
      `/connections/${id}/toxics${name && `/${name}`}`;
    const ok = async (call: ReturnType<Api["call"]>) => {
      const { status, body } = await call;
      assertEquals(status, body === undefined ? 204 : 200, body?.error);
      return body;
    };
    return {
      list: (id) => ok(api.get(path(id))),
      get: (id, name) => ok(api.get(path(id, name))),
      add: (id, line) => ok(api.post(path(id), toxic(line))),
      update: (id, name, words) =>
        ok(api.patch(path(id, name), changes(words))),
      remove: (id, name) => ok(api.delete(path(id, name))),
    };
  },
};

/** A proxy with a route called `r`, its API, and connections through it. */
async function openStage(
  callsOf: (typeof WAYS)[string],
  route: Partial<RouteOptions> = {},
  { resettable = true, ...config }: ConfigOptions & { resettable?: boolean } =
    {},
) {
  const open = new AsyncDisposableStack();
  const server = open.use(new Silent());
  const given = { name: "r", ...route };
  const watched = open.use(
    await WatchedProxy.to(server, given, config, { resettable }),
  );
  const api = open.use(Api.of(watched));
  const { proxy, log } = watched;
  const live = (id: number) =>
    defined(proxy.liveConnections().find((each) => each.id === id));
  return {
    ...callsOf(watched, api),
    ...{ api, log, proxy, server, watched },
    /** Opens a connection, with both of its ends. */
    async connect(): Promise<Line> {
      const client = open.use(await watched.connect());
      const upstream = await server.accept();
      await log.first("connected", server.accepted);
      const { id } = defined(proxy.liveConnections().at(-1));
      return { id, client, upstream };
    },
    addToRoute: (line: string) => proxy.addToxic("r", toxic(line)),
    /** The names of those that act on a connection. */
    acting: (id: number) => live(id).toxics,
    /** Sends bytes that the proxy is to hold, or lose. */
    async fill(line: Line, stream: Stream, bytes: Uint8Array) {
      const key = stream === "upstream" ? "bytesUp" : "bytesDown";
      const before = live(line.id)[key];
      await writeAll(endsOf(line, stream)[0], bytes);
      const isRead = () => live(line.id)[key] === before + bytes.length;
      await until(isRead, `${bytes.length} ${key}`);
    },
    [Symbol.asyncDispose]: () => open.disposeAsync(),
  };
}

type Stage = Awaited<ReturnType<typeof openStage>>;

/** Where a stream comes from, and where it goes to. */
function endsOf({ client, upstream }: Line, stream: Stream) {
  return stream === "upstream"
    ? [client, upstream] as const
    : [upstream, client] as const;
}

/** What comes of so many bytes at the other end. */
async function carried(line: Line, stream: Stream, bytes = testBytes(64)) {
  const [from, to] = endsOf(line, stream);
  await writeAll(from, bytes);
  return await readExactly(to, bytes.length);
}

/** Whatever is sent arrives as it was sent. */
async function assertIntact(line: Line, streams: readonly Stream[] = STREAMS) {
  for (const each of streams) {
    assertBytes(await carried(line, each), testBytes(64));
  }
}

async function assertAltered(line: Line, stream: Stream = "downstream") {
  const got = text(await carried(line, stream));
  assert(got !== text(testBytes(64)), "it is as it was sent");
}

/** Its client gets no more than these words. */
async function assertEnds({ client }: Line, words: string) {
  assertEquals(text(await readAll(client)), words);
  await client.closeWrite();
}

function test(
  name: string,
  run: (stage: Stage) => Promise<void>,
  route: Partial<RouteOptions> = {},
): void {
  for (const [by, callsOf] of Object.entries(WAYS)) {
    Deno.test(`${name}, ${by}`, async () => {
      await using stage = await openStage(callsOf, route);
      await soon(run(stage), "end of it");
    });
  }
}

const namesOf = (toxics: readonly Toxic[]) => toxics.map(({ name }) => name);

for (const stream of STREAMS) {
  test(`a connection's ${stream} toxic acts on no other one, nor on a later one`, async (stage) => {
    const [one, two] = [await stage.connect(), await stage.connect()];
    const { name } = await stage.add(one.id, `corrupt rate=1 ${stream}`);
    await assertAltered(one, stream);
    await assertIntact(one, [OTHER[stream]]);
    const three = await stage.connect();
    for (const each of [two, three]) {
      await assertIntact(each);
      assertEquals(stage.acting(each.id), []);
      assertEquals(await stage.list(each.id), []);
    }
    assertEquals(stage.acting(one.id), [name]);
    assertEquals(stage.proxy.route("r").toxics, []);
  });

  test(`a connection's ${stream} toxic changes and goes, and nothing is lost`, async (stage) => {
    const [line, bytes] = [await stage.connect(), testBytes(300_000)];
    const late = `latency latency=${HOUR_MS} ${stream}`;
    const { name } = await stage.add(line.id, late);
    const [, to] = endsOf(line, stream);
    await stage.fill(line, stream, bytes);
    await stage.update(line.id, name, "latency=1");
    assertBytes(await readExactly(to, bytes.length), bytes);
    await stage.update(line.id, name, `latency=${HOUR_MS}`);
    await stage.fill(line, stream, bytes);
    await stage.remove(line.id, name);
    assertBytes(await readExactly(to, bytes.length), bytes);
    await assertIntact(line);
  });
}

test("a connection's toxics act after the route's, in the order in which they came", async (stage) => {
  const line = await stage.connect();
  await stage.add(line.id, "limit_data bytes=3 name=limit");
  await stage.add(line.id, "packet_loss name=own");
  stage.addToRoute("packet_loss loss_rate=1 name=loss");
  assertEquals(stage.acting(line.id), ["loss", "limit", "own"]);
  assertEquals(namesOf(await stage.list(line.id)), ["limit", "own"]);
  await stage.fill(line, "downstream", testBytes(5)); // all of which is lost
  stage.proxy.removeToxic("r", "loss");
  await stage.update(line.id, "own", "loss_rate=0");
  await send(line.upstream, "abcd");
  await assertEnds(line, "abc");
  await assertClosed(stage, { why: "fault", toxic: "limit" });

  const two = await stage.connect();
  await stage.add(two.id, "limit_data bytes=3 name=limit");
  await stage.add(two.id, "packet_loss loss_rate=1");
  await send(two.upstream, "abcd"); // which the other would lose first
  await assertEnds(two, "");
  await assertClosed(stage, { why: "fault", toxic: "limit" }, 2);
});

test("a connection's toxics stay when the route's change", async (stage) => {
  const [line, bytes] = [await stage.connect(), testBytes(1000)];
  const { name } = await stage.add(line.id, `latency latency=${HOUR_MS}`);
  await stage.fill(line, "downstream", bytes);
  stage.addToRoute("slicer average_size=7");
  assertEquals(stage.acting(line.id), ["slicer_downstream", name]);
  stage.proxy.removeToxic("r", "slicer_downstream");
  await stage.proxy.updateRoute("r", { dropRate: 0 });
  assertEquals(stage.acting(line.id), [name]);
  await stage.remove(line.id, name);
  assertBytes(await readExactly(line.client, bytes.length), bytes);
});

test("the seed decides for a connection's toxic as for a route's of its name", async (stage) => {
  const some = "corrupt rate=0.5 toxicity=0.5 name=some";
  const route = { toxics: [toxic(some)] };
  await using other = await openStage(defined(Object.values(WAYS)[0]), route);
  let altered = 0;
  for (let number = 1; number <= 12; number++) {
    const [own, its] = [await stage.connect(), await other.connect()];
    await stage.add(own.id, some);
    const got = await carried(own, "downstream");
    assertBytes(got, await carried(its, "downstream"));
    assertEquals(namesOf(await stage.list(own.id)), ["some"]);
    const acts = stage.acting(own.id).length;
    assertEquals(text(got) === text(testBytes(64)), acts === 0);
    altered += acts;
  }
  assert(altered > 0 && altered < 12, `${altered} of 12`);
});

test("a connection's toxic replaces the route's of its name, until it is removed", async (stage) => {
  const [one, two] = [await stage.connect(), await stage.connect()];
  await stage.add(one.id, "limit_data bytes=100 name=x");
  await stage.add(one.id, "slicer average_size=9 name=own");
  await assertIntact(one); // 64 of 100 bytes
  stage.addToRoute("limit_data bytes=70 name=x");
  stage.addToRoute("noop name=y");
  assertEquals(stage.acting(one.id), ["y", "x", "own"]);
  assertEquals(stage.acting(two.id), ["x", "y"]);
  const [own] = await stage.list(one.id);
  assertEquals(defined(own).attributes, { bytes: 100 });
  await stage.update(one.id, "x", "bytes=1000");
  assertEquals(defined(await stage.get(one.id, "x")).attributes, {
    bytes: 1000,
  });
  await assertIntact(one, ["downstream"]);
  await stage.remove(one.id, "x");
  assertEquals(stage.acting(one.id), ["x", "y", "own"]);
  await assertIntact(one, ["downstream"]); // the route's counts from now on
  await send(one.upstream, "123456789");
  await assertEnds(one, "123456");
  await assertClosed(stage, { why: "fault", toxic: "x" });
  await assertIntact(two);
});

test("a reset removes a connection's toxics, and releases what they hold", async (stage) => {
  const [line, bytes] = [await stage.connect(), testBytes(1000)];
  await stage.add(line.id, `latency latency=${HOUR_MS} name=x`);
  stage.addToRoute("timeout name=x"); // which never acts on this one
  await stage.fill(line, "downstream", bytes);
  assertEquals((await stage.api.post("/reset")).status, 204);
  assertBytes(await readExactly(line.client, bytes.length), bytes);
  assertEquals(await stage.list(line.id), []);
  assertEquals(stage.acting(line.id), []);
  const gone = stage.log.of("toxic_removed").map((each) => each.connection);
  assertEquals(gone, [undefined, 1]);
  await assertIntact(line);
});

test("events, metrics and lists tell of a connection's toxics", async (stage) => {
  const line = await stage.connect();
  const { port } = line.client.localAddr;
  await stage.add(line.id, "slow_close delay=5 name=x upstream");
  await stage.update(line.id, "x", "delay=6");
  await stage.remove(line.id, "x");
  const all = { route: "r", connection: 1, client: `127.0.0.1:${port}` };
  const effect = (delay: number) =>
    `upstream: ends ${delay} ms late on this connection`;
  assertEquals(stage.log.all.filter(({ event }) => /^toxic/.test(event)), [
    { event: "toxic_added", ...all, toxic: "x", effect: effect(5) },
    { event: "toxic_changed", ...all, toxic: "x", effect: effect(6) },
    { event: "toxic_removed", ...all, toxic: "x" },
  ]);
  assertEquals(only(stage.proxy.stats()).faults, { slow_close: 1 });
  await stage.add(line.id, "slow_close toxicity=0");
  const { text } = await stage.api.raw("GET", "/metrics");
  const faults = text.match(/^chaos_proxy_faults.*/gm);
  const counted = 'chaos_proxy_faults_total{proxy="r",kind="slow_close"} 1';
  assertEquals(faults, [counted]);
});

test("a connection's reset_peer resets it", async (stage) => {
  const [line, other] = [await stage.connect(), await stage.connect()];
  await stage.add(line.id, "reset_peer");
  await send(line.upstream, "x");
  const { ConnectionReset } = Deno.errors;
  await assertRejects(() => readAll(line.client), ConnectionReset);
  await assertClosed(stage, { why: "fault", toxic: "reset_peer_downstream" });
  await assertIntact(other);
});

test("removing a connection's timeout closes it, and no other", async (stage) => {
  const [line, other] = [await stage.connect(), await stage.connect()];
  const { name } = await stage.add(line.id, "timeout");
  await stage.remove(line.id, name);
  await assertEnds(line, "");
  await assertClosed(stage, { connection: 1, why: "fault", toxic: name });
  await assertIntact(other);
});

const byLibrary = defined(WAYS["by the library"]);

Deno.test("a connection's toxic that is added before the upstream is reached acts then", async () => {
  await using stage = await openStage(byLibrary, { latencyMs: 50 });
  const connecting = stage.connect();
  await stage.log.first("delayed", 1);
  const { id } = only(stage.proxy.liveConnections());
  for (const each of STREAMS) await stage.add(id, `corrupt rate=1 ${each}`);
  await stage.remove(id, "corrupt_upstream");
  assertEquals(stage.acting(id), []);
  const [{ toxics }] = await stage.log.first("connected", 1);
  assertEquals(toxics, ["corrupt_downstream"]);
  const line = await connecting;
  await assertAltered(line);
  await assertIntact(line, ["upstream"]);
});

Deno.test("a connection that is never answered takes toxics, and is left alone", async () => {
  await using stage = await openStage(byLibrary, { timeoutRate: 1 });
  using _client = await stage.watched.connect();
  await stage.log.first("timed_out", 1);
  const { id } = only(stage.proxy.liveConnections());
  await stage.add(id, "limit_time time=1");
  await pause(50);
  assertEquals(stage.acting(id), []);
  assertEquals(stage.log.of("closed"), []);
});

const T = "/connections/1/toxics";
const ONE = `${T}/slow_close_downstream`;
const made = (delay: number, toxicity = 1) =>
  `{"name":"slow_close_downstream","type":"slow_close","stream":"downstream",` +
  `"toxicity":${toxicity},"attributes":{"delay":${delay}}}`;

Deno.test("the API answers for a connection's toxics as for a proxy's", async () => {
  const route = { toxics: [toxic("noop name=its")] };
  await using stage = await openStage(byLibrary, route);
  const line = await stage.connect();
  assertEquals(line.id, 1);
  const assertAnswers = async (calls: string) => {
    for (const [call, [expected]] of casesIn(calls)) {
      const [, method, path, body] = /^(\S+) (\S+)(?: (.*))?$/.exec(call) ?? [];
      const { status, text } = await stage.api
        .raw(defined(method), defined(path), body);
      const said = status < 400 ? text : JSON.parse(text).error;
      assertEquals(`${status} ${said}`.trim(), expected, call);
    }
  };
  await assertAnswers(`
GET ${T}
  200 []
POST ${T} {"type": "slow_close", "attributes": {"delay": 5}}
GET ${ONE}
  200 ${made(5)}
PATCH ${ONE} {"attributes": {"delay": 6}}
  200 ${made(6)}
POST ${ONE} {"toxicity": 0.5, "name": "other"}
  200 ${made(6, 0.5)}
GET ${T}
  200 [${made(6, 0.5)}]
POST ${T} {"type": "slow_close"}
POST ${T} {"type": "noop", "name": "its"}
  409 toxic already exists
POST ${T} {"type": "slow_close", "stream": "sideways"}
  400 stream was invalid, can be either upstream or downstream
POST ${T} {"type": "slow_clos"}
  400 invalid toxic type; did you mean slow_close?
PATCH ${ONE} {"toxicity": 2, "attributes": {"delay": -1}}
  400 bad request body: attributes.delay: expected an integer from 0 to 2147483647, found -1
GET ${T}/its
GET ${T}/x
PATCH ${T}/x {}
DELETE ${T}/x
  404 toxic not found
GET /connections/99/toxics
POST /connections/x/toxics 5
GET /connections/99/toxics/x
POST /connections/99/toxics/x {}
DELETE /connections/99/toxics/x
  404 connection not found
PUT ${T}
  405 PUT is not for ${T}, which takes GET, POST
PUT ${ONE}
  405 PUT is not for ${ONE}, which takes GET, POST, PATCH, DELETE
DELETE ${ONE}
  204
GET ${T}
  200 []
`);
  assertEquals(namesOf(stage.proxy.route("r").toxics), ["its"]);
  await stage.add(1, "noop");
  stage.proxy.cutConnection(1);
  await stage.log.first("closed", 1);
  await assertAnswers(`
GET ${T}
POST ${T} {"type": "noop"}
DELETE ${T}/noop_downstream
  404 connection not found
`);
});

Deno.test("what is wrong about a connection's toxics is said, and changes nothing", async () => {
  const route = { toxics: [toxic("noop name=its")] };
  await using stage = await openStage(byLibrary, route, { resettable: false });
  const { proxy } = stage;
  const { id } = await stage.connect();
  const [own, none] = [{ connection: id }, { connection: 99 }];
  await stage.add(id, "reset_peer name=x toxicity=0");
  const gone = "there is no connection 99";
  const unable = "route r: its connections cannot be reset; " +
    "start the proxy with resettable: true";
  const there = `connection ${id} has a toxic`;
  const refused: [() => unknown, keyof typeof Deno.errors | "", string][] = [
    [() => proxy.toxics(none), "NotFound", gone],
    [() => proxy.toxic(none, "x"), "NotFound", gone],
    [() => proxy.addToxic(none, toxic("noop")), "NotFound", gone],
    [() => proxy.updateToxic(none, "x", {}), "NotFound", gone],
    [() => proxy.removeToxic(none, "x"), "NotFound", gone],
    [
      () => proxy.removeToxic(own, "its"),
      "NotFound",
      `connection ${id} has no toxic its`,
    ],
    ...["its", "x"].map((name): typeof refused[number] => [
      () => proxy.addToxic(own, toxic(`noop name=${name}`)),
      "AlreadyExists",
      `${there} ${name} already`,
    ]),
    [() => proxy.addToxic(own, toxic("nop")), "", "toxic: type: expected"],
    [() => proxy.addToxic(own, toxic("reset_peer")), "NotSupported", unable],
    [
      () => proxy.updateToxic(own, "x", { toxicity: 1 }),
      "NotSupported",
      unable,
    ],
  ];
  for (const [call, kind, message] of refused) {
    const error = assertThrows(call, Error);
    assertEquals(error.name, kind || "ConfigError", message);
    assert(error.message.startsWith(message), error.message);
  }
  const answer = await stage.api.post(T, { type: "reset_peer" });
  assertEquals(answer, { status: 501, body: { error: unable, status: 501 } });
  const [x] = await stage.list(id);
  assertEquals([defined(x).name, defined(x).toxicity], ["x", 0]);
});

Deno.test("a connection and its route have up to 500 toxics, and bytes get through more", async () => {
  await using stage = await openStage(byLibrary);
  const line = await stage.connect();
  stage.addToRoute("noop name=its");
  for (let i = 1; i < 500; i++) await stage.add(line.id, `noop name=own${i}`);
  const error = assertThrows(() => stage.add(line.id, "noop"), Error);
  const most = "has 500 toxics, the most that it may have";
  assertEquals(error.message, `toxic: connection ${line.id} ${most}`);
  for (let i = 1; i < 500; i++) stage.addToRoute(`noop name=its${i}`);
  assertEquals(stage.acting(line.id).length, 999);
  await assertIntact(line);
});

Deno.test("an ended connection leaves no toxic in memory", async () => {
  await using stage = await openStage(byLibrary);
  const line = await stage.connect();
  const add = () =>
    stage.proxy.addToxic({ connection: line.id }, toxic("noop"));
  const held = new WeakRef(add());
  stage.proxy.cutConnection(line.id);
  await stage.log.first("closed", 1);
  const isFreed = () => {
    Array.from({ length: 300_000 }, () => ({})); // for V8 to collect garbage
    return held.deref() === undefined;
  };
  await until(isFreed, "it is freed");
});

Deno.test("the log shows which connection a toxic is for", async () => {
  await using upstream = echo();
  await using cli = new Cli("--api", "0");
  await using api = Api.at(await cli.says(/api_listening (\S+)\n/));
  const proxy = { name: "r", upstream: upstream.address };
  const { body: { listen } } = await api.post("/proxies", proxy);
  using client = await Deno.connect({ port: Number(listen.split(":")[1]) });
  await cli.says(/connected/);
  await api.post(T, toxic("slow_close delay=5 name=x"));
  await api.delete(`${T}/x`);
  const said = /INFO +r +#1 +(\S+ +toxic_added x \(.*)\n.* toxic_removed x\n/;
  const line = await cli.says(said);
  const effect = "(downstream: ends 5 ms late on this connection)";
  const from = `127.0.0.1:${client.localAddr.port}`;
  assertEquals(line.replace(/ +/, " "), `${from} toxic_added x ${effect}`);
});
