/** Toxics of one live connection, mostly over the API. */

import { assert, assertEquals, assertRejects, assertThrows } from "@std/assert";
import type { RouteOptions, Stream, Toxic, ToxicTarget } from "../main.ts";
import {
  Api,
  assertBytes,
  assertClosed,
  casesIn,
  changes,
  defined,
  HOUR_MS,
  only,
  pause,
  readAll,
  readExactly,
  send,
  Silent,
  soon,
  STREAMS,
  testBytes,
  text,
  toxic,
  until,
  WatchedProxy,
  writeAll,
} from "./helpers.ts";

const OTHER = { upstream: "downstream", downstream: "upstream" } as const;

/** A proxy with a route called `r`, its API, and connections through it. */
async function openStage(
  route: Partial<RouteOptions> = {},
  options = { resettable: true },
) {
  const open = new AsyncDisposableStack();
  const server = open.use(new Silent());
  const given = { name: "r", ...route };
  const watched = open.use(await WatchedProxy.to(server, given, {}, options));
  const api = open.use(Api.of(watched));
  const { proxy, log } = watched;

  /** Opens a connection, with both of its ends. */
  async function connect() {
    const client = open.use(await watched.connect());
    const upstream = await server.accept();
    await log.first("connected", server.accepted);
    const { id } = defined(proxy.liveConnections().at(-1));
    const live = () =>
      defined(proxy.liveConnections().find((each) => each.id === id));
    const path = (name = "") =>
      `/connections/${id}/toxics${name && `/${name}`}`;
    const ok = async (call: ReturnType<Api["call"]>) => {
      const { status, body } = await call;
      assertEquals(status, body === undefined ? 204 : 200, body?.error);
      return body;
    };
    return {
      ...{ id, client, upstream },
      /** Where a stream comes from, and where it goes to. */
      ends: {
        upstream: [client, upstream],
        downstream: [upstream, client],
      } as const,
      /** Its own toxics. */
      list: (): Promise<Toxic[]> => ok(api.get(path())),
      get: (name: string): Promise<Toxic> => ok(api.get(path(name))),
      add: (line: string): Promise<Toxic> => ok(api.post(path(), toxic(line))),
      update: (name: string, words: string) =>
        ok(api.patch(path(name), changes(words))),
      remove: (name: string) => ok(api.delete(path(name))),
      /** The names of those that act on it. */
      acting: () => live().toxics,
      /** Sends bytes that the proxy is to hold, or lose. */
      async fill(stream: Stream, bytes: Uint8Array) {
        const key = stream === "upstream" ? "bytesUp" : "bytesDown";
        const before = live()[key];
        await writeAll(this.ends[stream][0], bytes);
        const isRead = () => live()[key] === before + bytes.length;
        await until(isRead, `${bytes.length} ${key}`);
      },
    };
  }

  return {
    ...{ api, connect, log, proxy, watched },
    addToRoute: (line: string) => proxy.addToxic("r", toxic(line)),
    [Symbol.asyncDispose]: () => open.disposeAsync(),
  };
}

type Stage = Awaited<ReturnType<typeof openStage>>;
type Line = Awaited<ReturnType<Stage["connect"]>>;

/** What comes of 64 bytes at the other end. */
async function carried({ ends }: Line, stream: Stream) {
  const [from, to] = ends[stream];
  await writeAll(from, testBytes(64));
  return await readExactly(to, 64);
}

/** Whatever is sent arrives as it was sent. */
async function assertIntact(line: Line, streams: readonly Stream[] = STREAMS) {
  for (const each of streams) {
    assertBytes(await carried(line, each), testBytes(64));
  }
}

async function assertAltered(line: Line, stream: Stream) {
  const got = text(await carried(line, stream));
  assert(got !== text(testBytes(64)), "it is as it was sent");
}

/** Its client gets no more than these words. */
async function assertEnds({ client }: Line, words: string) {
  assertEquals(text(await readAll(client)), words);
  await client.closeWrite();
}

function test(name: string, run: (stage: Stage) => Promise<void>): void {
  Deno.test(name, async () => {
    await using stage = await openStage();
    await soon(run(stage), "end of it");
  });
}

const namesOf = (toxics: readonly Toxic[]) => toxics.map(({ name }) => name);

for (const stream of STREAMS) {
  test(`a connection's ${stream} toxic acts on no other one, nor on a later one`, async ({ connect, proxy }) => {
    const [one, two] = [await connect(), await connect()];
    const { name } = await one.add(`corrupt rate=1 ${stream}`);
    await assertAltered(one, stream);
    await assertIntact(one, [OTHER[stream]]);
    for (const each of [two, await connect()]) {
      await assertIntact(each);
      assertEquals([each.acting(), await each.list()], [[], []]);
    }
    assertEquals(one.acting(), [name]);
    assertEquals(proxy.route("r").toxics, []);
  });

  test(`a connection's ${stream} toxic changes and goes, but not with the route's, and nothing is lost`, async (stage) => {
    const [line, bytes] = [await stage.connect(), testBytes(300_000)];
    const [, to] = line.ends[stream];
    const { name } = await line.add(`latency latency=${HOUR_MS} ${stream}`);
    await line.fill(stream, bytes);
    await line.update(name, "latency=1");
    assertBytes(await readExactly(to, bytes.length), bytes);
    await line.update(name, `latency=${HOUR_MS}`);
    await line.fill(stream, bytes);
    stage.addToRoute("slicer average_size=7");
    assertEquals(line.acting(), ["slicer_downstream", name]);
    stage.proxy.removeToxic("r", "slicer_downstream");
    await stage.proxy.updateRoute("r", { dropRate: 0 });
    assertEquals(line.acting(), [name]);
    await line.remove(name);
    assertBytes(await readExactly(to, bytes.length), bytes);
    await assertIntact(line);
  });
}

test("a connection's toxics act after the route's, in the order in which they came", async (stage) => {
  const line = await stage.connect();
  await line.add("limit_data bytes=3 name=limit");
  await line.add("packet_loss name=own");
  stage.addToRoute("packet_loss loss_rate=1 name=loss");
  assertEquals(line.acting(), ["loss", "limit", "own"]);
  assertEquals(namesOf(await line.list()), ["limit", "own"]);
  await line.fill("downstream", testBytes(5)); // all of which is lost
  stage.proxy.removeToxic("r", "loss");
  await line.update("own", "loss_rate=0");
  await send(line.upstream, "abcd");
  await assertEnds(line, "abc");
  await assertClosed(stage, { why: "fault", toxic: "limit" });

  const two = await stage.connect();
  await two.add("limit_data bytes=3 name=limit");
  await two.add("packet_loss loss_rate=1");
  await send(two.upstream, "abcd"); // which the other would lose first
  await assertEnds(two, "");
  await assertClosed(stage, { why: "fault", toxic: "limit" }, 2);
});

test("the seed decides for a connection's toxic as for a route's of its name", async ({ connect }) => {
  const some = "corrupt rate=0.5 toxicity=0.5 name=some";
  await using other = await openStage({ toxics: [toxic(some)] });
  let altered = 0;
  for (let number = 1; number <= 12; number++) {
    const [own, its] = [await connect(), await other.connect()];
    await own.add(some);
    const got = await carried(own, "downstream");
    assertBytes(got, await carried(its, "downstream"));
    assertEquals(namesOf(await own.list()), ["some"]);
    const acts = own.acting().length;
    assertEquals(text(got) === text(testBytes(64)), acts === 0);
    altered += acts;
  }
  assert(altered > 0 && altered < 12, `${altered} of 12`);
});

test("a connection's toxic replaces the route's of its name, until it is removed", async (stage) => {
  const [one, two] = [await stage.connect(), await stage.connect()];
  await one.add("limit_data bytes=100 name=x");
  await one.add("slicer average_size=9 name=own");
  await assertIntact(one); // 64 of 100 bytes
  stage.addToRoute("limit_data bytes=70 name=x");
  stage.addToRoute("noop name=y");
  assertEquals(one.acting(), ["y", "x", "own"]);
  assertEquals(two.acting(), ["x", "y"]);
  assertEquals((await one.list())[0]?.attributes, { bytes: 100 });
  await one.update("x", "bytes=1000");
  assertEquals((await one.get("x")).attributes, { bytes: 1000 });
  await assertIntact(one, ["downstream"]);
  await one.remove("x");
  assertEquals(one.acting(), ["x", "y", "own"]);
  await assertIntact(one, ["downstream"]); // the route's counts from now on
  await send(one.upstream, "123456789");
  await assertEnds(one, "123456");
  await assertClosed(stage, { why: "fault", toxic: "x" });
  await assertIntact(two);
});

test("a reset removes a connection's toxics, and releases what they hold", async (stage) => {
  const [line, bytes] = [await stage.connect(), testBytes(1000)];
  await line.add(`latency latency=${HOUR_MS} name=x`);
  stage.addToRoute("timeout name=x"); // which never acts on this one
  await line.fill("downstream", bytes);
  assertEquals((await stage.api.post("/reset")).status, 204);
  assertBytes(await readExactly(line.client, bytes.length), bytes);
  assertEquals([line.acting(), await line.list()], [[], []]);
  const gone = stage.log.of("toxic_removed").map((each) => each.connection);
  assertEquals(gone, [undefined, 1]);
  await assertIntact(line);
});

test("events and metrics tell of a connection's toxics", async (stage) => {
  const line = await stage.connect();
  const { port } = line.client.localAddr;
  await line.add("slow_close delay=5 name=x upstream");
  await line.update("x", "delay=6");
  await line.remove("x");
  const all = { route: "r", connection: 1, client: `127.0.0.1:${port}` };
  const effect = (delay: number) =>
    `upstream: ends ${delay} ms late on this connection`;
  assertEquals(stage.log.all.filter(({ event }) => /^toxic/.test(event)), [
    { event: "toxic_added", ...all, toxic: "x", effect: effect(5) },
    { event: "toxic_changed", ...all, toxic: "x", effect: effect(6) },
    { event: "toxic_removed", ...all, toxic: "x" },
  ]);
  assertEquals(only(stage.proxy.stats()).faults, { slow_close: 1 });
  await line.add("slow_close toxicity=0");
  const { text } = await stage.api.raw("GET", "/metrics");
  const counted = 'chaos_proxy_faults_total{proxy="r",kind="slow_close"} 1';
  assertEquals(text.match(/^chaos_proxy_faults.*/gm), [counted]);
});

test("a connection's reset_peer, or removed timeout, ends no other one", async (stage) => {
  const { connect } = stage;
  const [one, two, other] = [await connect(), await connect(), await connect()];
  await one.add("reset_peer");
  await send(one.upstream, "x");
  const { ConnectionReset } = Deno.errors;
  await assertRejects(() => readAll(one.client), ConnectionReset);
  const reset = { connection: 1, toxic: "reset_peer_downstream" };
  await assertClosed(stage, { why: "fault", ...reset });
  const { name } = await two.add("timeout");
  await two.remove(name);
  await assertEnds(two, "");
  await assertClosed(stage, { connection: 2, why: "fault", toxic: name }, 2);
  await assertIntact(other);
});

Deno.test("toxics that change before the upstream is reached act as they are then", async () => {
  const route = { latencyMs: 50, toxics: [toxic("timeout")] };
  await using stage = await openStage(route);
  const { connect, log, proxy } = stage;
  const connecting = connect();
  await log.first("delayed", 1);
  const own = { connection: only(proxy.liveConnections()).id };
  for (const each of STREAMS) {
    proxy.addToxic(own, toxic(`corrupt rate=1 ${each}`));
  }
  proxy.removeToxic(own, "corrupt_upstream");
  proxy.removeToxic("r", "timeout_downstream");
  stage.addToRoute("latency name=new");
  assertEquals(only(proxy.liveConnections()).toxics, []);
  const [{ toxics }] = await log.first("connected", 1);
  assertEquals(toxics, ["new", "corrupt_downstream"]);
  const line = await connecting;
  await assertAltered(line, "downstream");
  await assertIntact(line, ["upstream"]);
});

Deno.test("a connection that is never answered takes toxics, and is left alone", async () => {
  await using stage = await openStage({ timeoutRate: 1 });
  const { log, proxy, watched } = stage;
  using client = await watched.connect();
  await log.first("timed_out", 1);
  const { id } = only(proxy.liveConnections());
  proxy.addToxic({ connection: id }, toxic("limit_time time=1 name=own"));
  stage.addToRoute("limit_time time=1");
  const answered = client.read(new Uint8Array(1)).then(() => true, () => true);
  assertEquals(await Promise.race([answered, pause(50)]), undefined);
  assertEquals(only(proxy.liveConnections()).toxics, []);
  assertEquals(log.of("closed"), []);
});

const T = "/connections/1/toxics";
const ONE = `${T}/slow_close_downstream`;
const made = (delay: number, toxicity = 1) =>
  `{"name":"slow_close_downstream","type":"slow_close","stream":"downstream",` +
  `"toxicity":${toxicity},"attributes":{"delay":${delay}}}`;

Deno.test("the API answers for a connection's toxics as for a proxy's", async () => {
  await using stage = await openStage({ toxics: [toxic("noop name=its")] });
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
  400 bad request body: attributes.delay: expected an integer from 0 to 2147483647, in ms, found -1
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
  await line.add("noop");
  stage.proxy.cutConnection(1);
  await stage.log.first("closed", 1);
  await assertAnswers(`
GET ${T}
POST ${T} {"type": "noop"}
DELETE ${T}/noop_downstream
  404 connection not found
`);
});

Deno.test("what is wrong about toxics is said, and changes nothing", async () => {
  const route = { toxics: [toxic("latency name=its")] };
  await using stage = await openStage(route, { resettable: false });
  const { proxy } = stage;
  const line = await stage.connect();
  const own = { connection: line.id };
  const add = (to: ToxicTarget, line: string) => () =>
    proxy.addToxic(to, toxic(line));
  const update = (of: ToxicTarget, name: string, given: object) => () =>
    proxy.updateToxic(of, name, given);
  const remove = (of: ToxicTarget, name: string) => () =>
    proxy.removeToxic(of, name);
  add("r", "reset_peer name=reset toxicity=0")();
  add(own, "reset_peer name=x toxicity=0")();
  const unable = "route r: its connections cannot be reset; " +
    "start it with --api or --watch; in code, resettable: true";
  const refused = {
    "NotFound: there is no connection 99": [
      () => proxy.toxics({ connection: 99 }),
      () => proxy.cutConnection(99),
    ],
    "NotFound: there is no route x": [add("x", "latency")],
    "NotFound: route r has no toxic x": [
      remove("r", "x"),
      update("r", "x", {}),
    ],
    "NotFound: connection 1 has no toxic its": [remove(own, "its")],
    "AlreadyExists: route r has a toxic its already": [
      add("r", "noop name=its"),
    ],
    "AlreadyExists: connection 1 has a toxic x already": [
      add(own, "noop name=x"),
    ],
    "AlreadyExists: connection 1 has a toxic its already": [
      add(own, "noop name=its"),
    ],
    "ConfigError: toxic: type: expected latency or bandwidth": [
      add("r", "latensy"),
      add(own, "nop"),
    ],
    "ConfigError: toxic: attributes.latensy: unknown key; did you mean latency?":
      [update("r", "its", changes("latensy=1"))],
    "ConfigError: toxic: toxicity: expected a number from 0 to 1, found 2": [
      update("r", "its", { toxicity: 2 }),
    ],
    "ConfigError: toxic: type: unknown key": [
      update("r", "its", { type: "timeout" }),
    ],
    "RangeError: seed: expected an integer from 0": [() => proxy.reseed(-1)],
    [`NotSupported: ${unable}`]: [
      add("r", "reset_peer"),
      add(own, "reset_peer"),
      update("r", "reset", { toxicity: 1 }),
      update(own, "x", { toxicity: 1 }),
      () => proxy.cutConnection(line.id, "reset"),
    ],
  };
  for (const [problem, calls] of Object.entries(refused)) {
    for (const call of calls) {
      const error = assertThrows(call, Error);
      assert(`${error}`.startsWith(problem), `${error}, not ${problem}`);
    }
  }
  const answer = await stage.api.post(T, { type: "reset_peer" });
  assertEquals(answer, { status: 501, body: { error: unable, status: 501 } });
  assertEquals(namesOf(proxy.toxics("r")), ["its", "reset"]);
  const [x] = await line.list();
  assertEquals([defined(x).name, defined(x).toxicity], ["x", 0]);
  await assertIntact(line);
});

test("a connection and its route have up to 500 toxics, and bytes get through more", async (stage) => {
  const line = await stage.connect();
  const own = { connection: line.id };
  const add = (name: string) =>
    stage.proxy.addToxic(own, toxic(`noop ${name}`));
  stage.addToRoute("noop name=its");
  for (let i = 1; i < 500; i++) add(`name=own${i}`);
  const most =
    "toxics: expected 500 at most with those of the profile, found 501";
  const { message } = assertThrows(() => add("name=own500"), Error);
  assertEquals(message, `connection ${line.id}: ${most}`);
  for (let i = 1; i < 500; i++) stage.addToRoute(`noop name=its${i}`);
  assertEquals(line.acting().length, 999);
  await assertIntact(line);
});

test("an ended connection leaves no toxic in memory", async ({ connect, log, proxy }) => {
  const { id } = await connect();
  const add = () => proxy.addToxic({ connection: id }, toxic("noop"));
  const held = new WeakRef(add());
  proxy.cutConnection(id);
  await log.first("closed", 1);
  const isFreed = () => {
    Array.from({ length: 300_000 }, () => ({})); // for V8 to collect garbage
    return held.deref() === undefined;
  };
  await until(isFreed, "it is freed");
});
