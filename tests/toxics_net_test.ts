import { assert, assertEquals, assertRejects, assertThrows } from "@std/assert";
import type { RouteOptions } from "../main.ts";
import {
  assertBytes,
  assertClosed,
  assertEchoes,
  assertEndedBy,
  assertReads,
  assertSince,
  connectTo,
  echo,
  exchange,
  flood,
  MIB,
  only,
  openEcho,
  openEnds,
  openNodeClient,
  readAll,
  readExactly,
  readToEnd,
  send,
  SOCKETS,
  soon,
  testBytes,
  text,
  times,
  toxic,
  until,
  untilStalled,
  Upstream,
  WatchedProxy,
  writeAndEnd,
} from "./helpers.ts";

const HOUR_MS = 3_600_000;
const STREAMS = ["upstream", "downstream"] as const;

/** Lets all that is ready go on for a while. */
async function turns(): Promise<void> {
  for (let i = 0; i < 200; i++) {
    await new Promise<void>((resolve) => setImmediate(resolve));
  }
}

/** A route with these toxics. */
function having(...lines: string[]): Partial<RouteOptions> {
  return { name: "r", toxics: lines.map(toxic) };
}

/** Toxics that lose nothing | how long they take for how many bytes. */
const WHOLE = [
  "latency upstream latency=150 | 150 ms for 3000001",
  "latency latency=150 | 150 ms for 3000001",
  "bandwidth upstream rate=500 | 200 ms for 100000",
  "latency latency=100 jitter=20, bandwidth rate=1000, " +
  "slicer average_size=500 delay=10 | 380 ms for 300000",
];

for (const each of WHOLE) {
  Deno.test(`nothing is lost, and it takes its time: ${each}`, async () => {
    const [lines = "", minMs, size] = each.split(/ \| | ms for /);
    await using ends = await openEcho(having(...lines.split(", ")));
    const { client, watched } = ends;
    const bytes = testBytes(Number(size));
    const start = performance.now();
    assertBytes(await exchange(client, bytes), bytes);
    assertSince(start, Number(minMs));
    const [{ toxics }] = await watched.log.first("connected", 1);
    const all = watched.proxy.route("r").toxics;
    assertEquals(toxics, all.map(({ name }) => name));
    await assertClosed(watched, { why: "client", toxic: undefined });
  });
}

for (const stream of STREAMS) {
  Deno.test(`timeout lets nothing go ${stream}, and ends the connection`, async () => {
    await using ends = await openEnds(having(`timeout ${stream} timeout=150`));
    const { client, upstream, watched } = ends;
    await send(client, "hello");
    await send(upstream, "hello");
    const held = stream === "upstream" ? upstream : client;
    assertEquals(await readAll(held), testBytes(0));
    const { durationMs } = await assertEndedBy(watched, `timeout_${stream}`);
    assert(durationMs >= 150, `${durationMs} ms`);
  });
}

Deno.test("reset_peer sends a RST to both sides", async () => {
  const start = performance.now();
  await using ends = await openEnds(having("reset_peer timeout=100"));
  await send(ends.upstream, "hello");
  for (const conn of [ends.client, ends.upstream]) {
    await assertRejects(() => readAll(conn), Deno.errors.ConnectionReset);
  }
  assertSince(start, 100);
  await assertEndedBy(ends.watched, "reset_peer_downstream");
});

Deno.test("reset_peer resets both sides after an end without data", async () => {
  await using ends = await openNodeClient(having("reset_peer upstream"));
  const { client, upstream, watched } = ends;
  client.closeWrite();
  await soon(Promise.race([client.closed, client.ended]), "reset");
  assertEquals(client.error?.code, "ECONNRESET");
  await assertRejects(() => readAll(upstream), Deno.errors.ConnectionReset);
  await assertEndedBy(watched, "reset_peer_upstream");
  await soon(watched.proxy.stop(), "stop");
});

Deno.test("reset_peer resets a client that is being sent to", async () => {
  await using ends = await openEnds(having("reset_peer upstream"));
  const { client, upstream } = ends;
  const flow = flood(upstream);
  await readExactly(client, MIB);
  await send(client, "x");
  await assertRejects(() => readAll(client), Deno.errors.ConnectionReset);
  await flow.done;
});

Deno.test("slices are not merged again on the way out", async () => {
  const slicer = "slicer upstream average_size=10 delay=20000";
  await using ends = await openEnds(having(slicer));
  const sending = writeAndEnd(ends.client, testBytes(50));
  const got: number[] = [];
  const buffer = new Uint8Array(1000);
  for (let size; (size = await ends.upstream.read(buffer)) !== null;) {
    got.push(size);
  }
  await sending;
  assertEquals(got.reduce((sum, each) => sum + each), 50);
  assert(got.length >= 2); // five, but for a slow reader
});

Deno.test("limit_data delivers its last byte, and closes", async () => {
  const bytes = testBytes(5_000_000);
  const lines = ["limit_data bytes=1234567", "latency latency=50"];
  await using ends = await openEnds(having(...lines));
  const { done } = flood(ends.upstream, bytes, bytes.length);
  assertBytes(await readAll(ends.client), bytes.subarray(0, 1_234_567));
  ends.client.close();
  await done;
  await assertEndedBy(ends.watched, "limit_data_downstream");
});

Deno.test("limit_data delivers its last byte to a client that goes on sending", async () => {
  await using ends = await openEcho(having("limit_data bytes=400000"));
  const bytes = testBytes(400_000);
  const { done } = flood(ends.client, bytes);
  assertBytes(await readExactly(ends.client, bytes.length), bytes);
  assertEquals(await ends.client.read(new Uint8Array(1)), null);
  await done;
});

Deno.test("limit_data cuts what goes upstream, to the byte", async () => {
  await using ends = await openEnds(having("limit_data upstream bytes=70001"));
  const bytes = testBytes(200_000);
  const { done } = flood(ends.client, bytes, bytes.length);
  assertBytes(await readAll(ends.upstream), bytes.subarray(0, 70_001));
  await done;
  await assertEndedBy(ends.watched, "limit_data_upstream");
});

Deno.test("packet_loss and corrupt repeat with the seed", async () => {
  const bytes = testBytes(50_000);
  const once = async (line: string, seed: number) => {
    await using upstream = echo();
    const route = having(line);
    await using watched = await WatchedProxy.to(upstream, route, { seed });
    using client = await watched.connect();
    return await exchange(client, bytes);
  };
  const first = await once("corrupt rate=0.01", 1);
  assertEquals(first.length, bytes.length);
  const differs = (other: Uint8Array) =>
    other.some((byte, i) => byte !== first[i]);
  assert(differs(bytes));
  assertBytes(await once("corrupt rate=0.01", 1), first);
  assert(differs(await once("corrupt rate=0.01", 2)));
  assertEquals((await once("packet_loss loss_rate=1", 1)).length, 0);
});

Deno.test("packet_loss loses whole chunks, and nothing of the others", async () => {
  const route = having("packet_loss upstream loss_rate=0.5");
  await using ends = await openEcho(route);
  // Each is sent when the one before has had its time, and so is a chunk of its
  // own or grows the next: whatever arrives is made of whole ones.
  for (let i = 0; i < 100; i++) {
    await send(ends.client, String.fromCharCode(33 + i % 90).repeat(10));
    await turns();
  }
  await ends.client.closeWrite();
  const got = text(await readAll(ends.client));
  assert(got.length > 0 && got.length < 1000);
  assert(got.match(/(.)\1{9}/g)?.join("") === got, got);
});

Deno.test("a wave goes by when the proxy started or was reseeded, for all connections", async () => {
  const wave = "wave=square amplitude=100 period=7200000 phase=0.5";
  const route = having(`latency upstream latency=100 ${wave}`);
  await using ends = await openEcho(route);
  const { watched } = ends;
  await assertEchoes(ends.client); // in the half that takes 100 - 100 ms
  const { now } = performance;
  performance.now = () => now.call(performance) + HOUR_MS;
  try {
    using second = await watched.connect();
    for (const client of [ends.client, second]) {
      const start = performance.now();
      await assertEchoes(client);
      assertSince(start, 200);
    }
  } finally {
    performance.now = now;
  }
  watched.proxy.updateToxic("r", "latency_upstream", {
    attributes: { phase: 0 },
  });
  performance.now = () => now.call(performance) + HOUR_MS;
  try {
    watched.proxy.reseed(1);
    const start = performance.now();
    await assertEchoes(ends.client);
    assertSince(start, 200);
  } finally {
    performance.now = now;
  }
});

Deno.test("an update drops what its new values leave without meaning", async () => {
  const pareto = "jitter=5 distribution=pareto shape=2 correlation=0.5";
  await using ends = await openEcho(having(`latency latency=1 ${pareto}`));
  const { proxy } = ends.watched;
  const attributesWith = (attributes: Record<string, number | string>) =>
    proxy.updateToxic("r", "latency_downstream", { attributes }).attributes;
  const normal = attributesWith({ distribution: "normal" });
  const rest = { latency: 1, jitter: 5, correlation: 0.5 };
  assertEquals(normal, { ...rest, distribution: "normal" });
  assertEquals(attributesWith({ jitter: 0 }), { latency: 1, jitter: 0 });
  await assertEchoes(ends.client);
});

/** Sends letters upstream, each when the one before has been read. */
async function sendEach(
  { client, watched }: { client: Deno.TcpConn; watched: WatchedProxy },
  letters: string,
): Promise<void> {
  for (const [i, letter] of Array.from(letters).entries()) {
    await send(client, letter);
    const read = () => only(watched.proxy.stats()).received.upstream;
    await until(() => read() > i, `byte ${i}`);
  }
}

Deno.test("stall holds what is sent, all of it, for its duration", async () => {
  const route = having("stall upstream rate=1 duration=150");
  await using ends = await openEcho(route);
  const bytes = testBytes(100_000);
  const start = performance.now();
  assertBytes(await exchange(ends.client, bytes), bytes);
  assertSince(start, 150);
  await assertClosed(ends.watched, { why: "client", toxic: undefined });
});

Deno.test("random_close delivers what came before, and closes", async () => {
  await using ends = await openEnds(having("random_close rate=0"));
  const { client, upstream, watched } = ends;
  await send(upstream, "before");
  await assertReads(client, "before");
  const closes = { attributes: { rate: 1 } };
  watched.proxy.updateToxic("r", "random_close_downstream", closes);
  await send(upstream, "after");
  assertEquals(await readAll(client), testBytes(0));
  await assertEndedBy(watched, "random_close_downstream");
});

Deno.test("random_close with reset sends a RST to both sides", async () => {
  await using ends = await openEnds(having("random_close rate=1 reset=1"));
  const { client, upstream, watched } = ends;
  await send(upstream, "hello");
  for (const conn of [client, upstream]) {
    await assertRejects(() => readAll(conn), Deno.errors.ConnectionReset);
  }
  await assertEndedBy(watched, "random_close_downstream");
});

Deno.test("random_close with reset needs a proxy whose connections can be reset", async () => {
  await using ends = await openEcho(having("random_close rate=0 reset=1"));
  const { proxy } = ends.watched;
  const change = (attributes: Record<string, number>) => () =>
    proxy.updateToxic("r", "random_close_downstream", { attributes });
  assertThrows(change({ rate: 0.1 }), Deno.errors.NotSupported);
  assertEquals(change({ rate: 0.1, reset: 0 })().toxicity, 1);
});

Deno.test("what reorder keeps leaves when it is removed", async () => {
  await using ends = await openEcho(having("reorder upstream rate=1"));
  await sendEach(ends, "a");
  ends.watched.proxy.removeToxic("r", "reorder_upstream");
  await assertReads(ends.client, "a");
  await assertEchoes(ends.client, "b");
});

for (const { sockets, resettable } of SOCKETS) {
  Deno.test(`duplicate and inject add to what is sent, and reorder loses none, on ${sockets}`, async () => {
    const through = async (line: string) => {
      await using ends = await openEnds(having(line), { resettable });
      const got = readAll(ends.upstream).then(text);
      await sendEach(ends, "abcde");
      await ends.client.closeWrite();
      return await got;
    };
    assertEquals(await through("duplicate upstream rate=1"), "aabbccddee");
    assertEquals(await through("reorder upstream rate=1"), "badce");
    const injected = await through("inject upstream rate=1 bytes=3");
    assert(/^.{1,3}a.{1,3}b.{1,3}c.{1,3}d.{1,3}e$/s.test(injected), injected);
  });

  Deno.test(`each byte comes twice, in any order, on ${sockets}`, async () => {
    const duplicate = "duplicate upstream rate=1";
    const route = having(duplicate, "reorder rate=0.2", "stall duration=1");
    await using ends = await openEcho(route, { resettable });
    const bytes = testBytes(MIB);
    const got = await exchange(ends.client, bytes);
    const twice = new Uint8Array([...bytes, ...bytes]);
    assertBytes(got.toSorted(), twice.toSorted());
    await assertClosed(ends.watched, { why: "client", toxic: undefined });
  });
}

Deno.test("limit_time closes under constant traffic", async () => {
  const start = performance.now();
  await using ends = await openEcho(having("limit_time time=200"));
  const bytes = testBytes(1000);
  const { done } = flood(ends.client, bytes);
  assert(await readToEnd(ends.client, bytes) > 0);
  await done;
  assertSince(start, 200);
  await assertEndedBy(ends.watched, "limit_time_downstream");
});

for (const { sockets, resettable } of SOCKETS) {
  const on = { resettable };

  Deno.test(`a bandwidth of 0 holds up the sender, and loses nothing, on ${sockets}`, async () => {
    await using ends = await openEnds(having("bandwidth upstream rate=0"), on);
    const { client, upstream, watched } = ends;
    const block = testBytes(MIB);
    const flow = flood(client, block);
    await untilStalled(flow);
    assertEquals(only(watched.proxy.stats()).sent.upstream, 0);
    flow.isEnough = true;
    watched.proxy.removeToxic("r", "bandwidth_upstream");
    const got = await readToEnd(upstream, block);
    await flow.done;
    assertEquals(got, flow.sent);
    await upstream.closeWrite();
    assertEquals(await readToEnd(client), 0);
    await assertClosed(watched, { why: "client", bytesUp: flow.sent });
  });

  Deno.test(`all bytes get through both ways, on ${sockets}`, async () => {
    await using ends = await openEcho({}, on);
    await times(20, async (i) => {
      using client = await ends.watched.connect();
      const bytes = testBytes(700_001 + i, i + 1);
      assertBytes(await exchange(client, bytes), bytes);
    });
    for (const { why } of await ends.watched.log.first("closed", 20)) {
      assertEquals(why, "client");
    }
  });

  Deno.test(`a reset lets what is held arrive, on ${sockets}`, async () => {
    const route = having("bandwidth upstream rate=10");
    await using ends = await openNodeClient(route, on);
    const bytes = testBytes(3000); // one segment, so one read
    ends.client.write(bytes);
    const first = await readExactly(ends.upstream, 1); // the rest is held
    ends.client.reset();
    const rest = await readAll(ends.upstream);
    assertBytes(new Uint8Array([...first, ...rest]), bytes);
    await assertClosed(ends.watched, { why: "client_reset", bytesUp: 3000 });
  });

  Deno.test(`a receiver that resets ends what is held for it, on ${sockets}`, async () => {
    const route = having(`latency latency=${HOUR_MS}`);
    await using ends = await openNodeClient(route, on);
    await send(ends.upstream, "answer");
    await turns(); // most likely it is held by now
    ends.client.reset();
    await assertClosed(ends.watched, { why: "client_reset" });
  });

  for (const stream of STREAMS) {
    Deno.test(`stop ends what is held ${stream} for an hour, on ${sockets}`, async () => {
      const route = having(`latency ${stream} latency=${HOUR_MS}`);
      await using ends = await openEcho(route, on);
      const { client: open, watched } = ends;
      using halfClosed = await watched.connect();
      await watched.log.first("connected", 2);
      await send(open, "held");
      await send(halfClosed, "held");
      await halfClosed.closeWrite();
      await turns(); // most likely it is held by now; else it never will be
      await soon(watched.proxy.stop(), "stop");
      const closed = watched.log.of("closed");
      assertEquals(closed.map(({ why }) => why), ["drain", "drain"]);
    });
  }

  Deno.test(`a drain waits for what is delayed, on ${sockets}`, async () => {
    const route = having(
      "latency latency=30 jitter=10",
      "bandwidth rate=1000",
      "slicer average_size=500",
      "slow_close delay=20",
    );
    await using ends = await openEcho(route, on);
    const bytes = testBytes(100_000);
    const got = exchange(ends.client, bytes);
    await ends.watched.log.first("connected", 1);
    assertEquals(await soon(ends.watched.proxy.drain(), "drain"), 0);
    assertBytes(await got, bytes);
  });

  // It has no timer left, or the sanitizer says so.
  Deno.test(`a toxic that acts by the clock goes with its connection, on ${sockets}`, async () => {
    const route = having(`limit_time time=${HOUR_MS}`);
    await using ends = await openEcho(route, on);
    assertEquals(await exchange(ends.client, testBytes(10)), testBytes(10));
    await assertClosed(ends.watched, { why: "client", toxic: undefined });
  });

  Deno.test(`limit_data closes also over a timeout, on ${sockets}`, async () => {
    const route = having("limit_data upstream bytes=3", "timeout upstream");
    await using ends = await openEcho(route, on);
    assertEquals((await exchange(ends.client, testBytes(5))).length, 0);
    ends.client.close();
    await soon(assertEndedBy(ends.watched, "limit_data_upstream"), "close");
    await soon(ends.watched.proxy.stop(), "stop");
  });

  Deno.test(`the other way goes on after one has ended, on ${sockets}`, async () => {
    const late = [
      "latency upstream latency=30",
      "slow_close upstream delay=30",
    ];
    await using ends = await openEnds(having(...late), on);
    await ends.upstream.closeWrite(); // before it has read anything
    assertEquals((await readAll(ends.client)).length, 0);
    const bytes = testBytes(200_001);
    const sent = writeAndEnd(ends.client, bytes);
    assertBytes(await readAll(ends.upstream), bytes);
    await sent;
    await assertClosed(ends.watched, { why: "upstream", bytesUp: 200_001 });
  });

  Deno.test(`a timeout of 0 ends with a client that resets, on ${sockets}`, async () => {
    await using ends = await openNodeClient(having("timeout upstream"), on);
    await ends.client.write("hello");
    ends.client.reset();
    await assertClosed(ends.watched, { why: "client_reset" });
  });

  Deno.test(`a client that has ended its stream gets a long answer whole, on ${sockets}`, () =>
    assertAnswered("please", resettable));
}

Deno.test("a client that ends its stream without a byte gets all on Deno's sockets", () =>
  assertAnswered("", false));

Deno.test("on Node's it gets all, or a RST, but never a part that looks whole", () =>
  assertAnswered("", true).catch((error) =>
    assert(error instanceof Deno.errors.ConnectionReset, `${error}`)
  ));

/**
 * A client gets a long answer that has filled the system's buffers when it
 * begins to read: it has ended its stream by then.
 */
async function assertAnswered(question: string, resettable: boolean) {
  const bytes = testBytes(40_000_000);
  const answers = new Upstream(async (conn) => {
    await readAll(conn);
    await writeAndEnd(conn, bytes);
  });
  await using ends = await connectTo(answers, [{}, { resettable }]);
  const { client, watched } = ends;
  await send(client, question);
  await client.closeWrite();
  const sent = () => only(watched.proxy.stats()).sent.downstream;
  await until(() => sent() > 0, "byte sent");
  await untilStalled({
    get sent() {
      return sent();
    },
  });
  assertBytes(await readAll(client), bytes);
}
