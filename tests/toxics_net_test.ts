import { assert, assertEquals, assertRejects, assertThrows } from "@std/assert";
import {
  assertBytes,
  assertClosed,
  assertEchoes,
  assertEndedBy,
  assertReads,
  assertSince,
  connectTo,
  exchange,
  flood,
  having,
  heldBy,
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
  sum,
  testBytes,
  testsOf,
  until,
  untilStalled,
  Upstream,
  writeAndEnd,
} from "./helpers.ts";

const HOUR_MS = 3_600_000;
const STREAMS = ["upstream", "downstream"] as const;
const onEcho = testsOf(openEcho);
const onEnds = testsOf(openEnds);
const onNodeClient = testsOf(openNodeClient);

/** Toxics that lose nothing, and how long they take at least. */
const WHOLE = [
  "latency upstream latency=150 | 3000001 bytes take 150 ms",
  "latency latency=150 | 3000001 bytes take 150 ms",
  "bandwidth upstream rate=500 | 100000 bytes take 200 ms",
  "bandwidth upstream rate=500 shared=1 | 100000 bytes take 200 ms",
  "stall upstream rate=1 duration=150 | 100000 bytes take 150 ms",
  "latency latency=100 jitter=20, bandwidth rate=1000, " +
  "slicer average_size=500 delay=10 | 300000 bytes take 380 ms",
  "latency latency=30, bandwidth rate=1000 shared=1, " +
  "slicer average_size=500 delay=10 | 300000 bytes take 330 ms",
  // It leaves no timer behind.
  `limit_time time=${HOUR_MS} | 10 bytes take 0 ms`,
];

for (const each of WHOLE) {
  onEcho.test(`${each}, and none is lost`, async ({ client, watched }) => {
    const [, size, minMs] = /(\d+) bytes take (\d+) ms/.exec(each) ?? [];
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
  onEnds.test(`timeout ${stream} timeout=150 | nothing gets through, and the connection ends`, async (ends) => {
    await send(ends.client, "hello");
    await send(ends.upstream, "hello");
    const held = stream === "upstream" ? ends.upstream : ends.client;
    assertEquals(await readAll(held), testBytes(0));
    const closed = await assertEndedBy(ends.watched, `timeout_${stream}`);
    assert(closed.durationMs >= 150, `${closed.durationMs} ms`);
  });
}

const RESETS = {
  "reset_peer timeout=100": 100,
  "random_close rate=1 reset=1": 0,
};
for (const [line, minMs] of Object.entries(RESETS)) {
  onEnds.test(`${line} | both sides get a RST`, async (ends) => {
    const start = performance.now();
    await send(ends.upstream, "hello");
    for (const conn of [ends.client, ends.upstream]) {
      await assertRejects(() => readAll(conn), Deno.errors.ConnectionReset);
    }
    assertSince(start, minMs);
    await assertEndedBy(ends.watched, line.replace(/ .*/, "_downstream"));
  });
}

onNodeClient.test("reset_peer upstream | both sides get a RST after an end without data", async ({ client, upstream, watched }) => {
  client.closeWrite();
  await soon(Promise.race([client.closed, client.ended]), "reset");
  assertEquals(client.error?.code, "ECONNRESET");
  await assertRejects(() => readAll(upstream), Deno.errors.ConnectionReset);
  await assertEndedBy(watched, "reset_peer_upstream");
  await soon(watched.proxy.stop(), "stop");
});

onEnds.test("reset_peer upstream | a client that is being sent to is reset", async ({ client, upstream }) => {
  const flow = flood(upstream);
  await readExactly(client, MIB);
  await send(client, "x");
  await assertRejects(() => readAll(client), Deno.errors.ConnectionReset);
  await flow.done;
});

onEnds.test("slicer upstream average_size=10 delay=20000 | slices are not merged on the way out", async ({ client, upstream }) => {
  const sending = writeAndEnd(client, testBytes(50));
  const got: number[] = [];
  const buffer = new Uint8Array(1000);
  for (let size; (size = await upstream.read(buffer)) !== null;) got.push(size);
  await sending;
  assertEquals(sum(got), 50);
  assert(got.length >= 2); // five, but for a slow reader
});

for (const stream of STREAMS) {
  onEnds.test(`limit_data ${stream} bytes=1234567, latency latency=50 | the last byte arrives`, async ({ client, upstream, watched }) => {
    const bytes = testBytes(5_000_000);
    const ends = [client, upstream] as const;
    const [from, to] = stream === "upstream" ? ends : ends.toReversed();
    const { done } = flood(from, bytes, bytes.length);
    assertBytes(await readAll(to), bytes.subarray(0, 1_234_567));
    to.close();
    await done;
    await assertEndedBy(watched, `limit_data_${stream}`);
  });
}

onEcho.test("limit_data bytes=400000 | the last byte reaches a client that goes on sending", async ({ client }) => {
  const bytes = testBytes(400_000);
  const { done } = flood(client, bytes);
  assertBytes(await readExactly(client, bytes.length), bytes);
  assertEquals(await client.read(new Uint8Array(1)), null);
  await done;
});

const WAVE = "latency upstream latency=100 " +
  "wave=square amplitude=100 period=7200000 phase=0.5";

onEcho.test(`${WAVE} | it goes by when the proxy started or was reseeded, for all connections`, async ({ client, watched }) => {
  const assertLate = async (conn: Deno.TcpConn) => {
    const start = performance.now();
    await assertEchoes(conn);
    assertSince(start, 200);
  };
  await assertEchoes(client); // in the half that takes 100 - 100 ms
  const { now } = performance;
  performance.now = () => now.call(performance) + HOUR_MS;
  try {
    using second = await watched.connect();
    for (const conn of [client, second]) await assertLate(conn);
    const attributes = { phase: 0 };
    watched.proxy.updateToxic("r", "latency_upstream", { attributes });
    watched.proxy.reseed(1);
    await assertLate(client);
  } finally {
    performance.now = now;
  }
});

const PARETO = "latency latency=1 " +
  "jitter=5 distribution=pareto shape=2 correlation=0.5";

onEcho.test(`${PARETO} | an update drops what its new values leave without meaning`, async ({ client, watched }) => {
  const attributesWith = (attributes: Record<string, number | string>) =>
    watched.proxy.updateToxic("r", "latency_downstream", { attributes })
      .attributes;
  const normal = attributesWith({ distribution: "normal" });
  const rest = { latency: 1, jitter: 5, correlation: 0.5 };
  assertEquals(normal, { ...rest, distribution: "normal" });
  assertEquals(attributesWith({ jitter: 0 }), { latency: 1, jitter: 0 });
  await assertEchoes(client);
});

onEnds.test("random_close rate=0 | with a rate of 1 it delivers what came before, and closes", async ({ client, upstream, watched }) => {
  await send(upstream, "before");
  await assertReads(client, "before");
  const closes = { attributes: { rate: 1 } };
  watched.proxy.updateToxic("r", "random_close_downstream", closes);
  await send(upstream, "after");
  assertEquals(await readAll(client), testBytes(0));
  client.close();
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

onEcho.test("reorder upstream rate=1 | what it keeps leaves when it is removed", async ({ client, watched }) => {
  await send(client, "a");
  const isHeld = () => heldBy(watched, "upstream") === 1;
  await until(isHeld, "the packet is read");
  watched.proxy.removeToxic("r", "reorder_upstream");
  await assertReads(client, "a");
  await assertEchoes(client, "b");
});

onEcho.test("limit_time time=200 | it closes under constant traffic", async ({ client, watched }) => {
  const bytes = testBytes(1000);
  const { done } = flood(client, bytes);
  assert(await readToEnd(client, bytes) > 0);
  await done;
  const { durationMs } = await assertEndedBy(watched, "limit_time_downstream");
  assert(durationMs >= 200, `${durationMs} ms`);
});

const TWICE = "duplicate upstream rate=1, reorder rate=0.2, stall duration=1";

onEcho.test(`${TWICE} | each byte comes twice, in any order`, async ({ client, watched }) => {
  const bytes = testBytes(MIB);
  const got = await exchange(client, bytes);
  const twice = new Uint8Array([...bytes, ...bytes]);
  assertBytes(got.toSorted(), twice.toSorted());
  await assertClosed(watched, { why: "client", toxic: undefined });
});

onNodeClient.test("bandwidth upstream rate=10 | a reset lets what is held arrive", async ({ client, upstream, watched }) => {
  const bytes = testBytes(3000); // one segment, so one read
  client.write(bytes);
  const first = await readExactly(upstream, 1); // the rest is held
  client.reset();
  const rest = await readAll(upstream);
  assertBytes(new Uint8Array([...first, ...rest]), bytes);
  upstream.close();
  await assertClosed(watched, { why: "client_reset", bytesUp: 3000 });
});

onNodeClient.test(`latency latency=${HOUR_MS} | a receiver that resets ends what is held for it`, async ({ client, upstream, watched }) => {
  await send(upstream, "answer");
  await until(() => heldBy(watched, "downstream") === 6, "all is held");
  client.reset();
  await assertClosed(watched, { why: "client_reset" });
});

for (const stream of STREAMS) {
  onEcho.test(`latency ${stream} latency=${HOUR_MS} | stop ends what is held`, async ({ client, watched }) => {
    using halfClosed = await watched.connect();
    await watched.log.first("connected", 2);
    await send(client, "held");
    await send(halfClosed, "held");
    await halfClosed.closeWrite();
    await until(() => heldBy(watched, stream) === 8, "all is held");
    await soon(watched.proxy.stop(), "stop");
    const closed = watched.log.of("closed");
    assertEquals(closed.map(({ why }) => why), ["drain", "drain"]);
  });
}

const DELAYS = "latency latency=30 jitter=10, bandwidth rate=1000, " +
  "slicer average_size=500, slow_close delay=20";

onEcho.test(`${DELAYS} | a drain waits for what is delayed`, async ({ client, watched }) => {
  const bytes = testBytes(100_000);
  const got = exchange(client, bytes);
  await watched.log.first("connected", 1);
  assertEquals(await soon(watched.proxy.drain(), "drain"), 0);
  assertBytes(await got, bytes);
});

onEcho.test("limit_data upstream bytes=3, timeout upstream | the limit closes over the timeout", async ({ client, watched }) => {
  assertEquals((await exchange(client, testBytes(5))).length, 0);
  client.close();
  await soon(assertEndedBy(watched, "limit_data_upstream"), "close");
  await soon(watched.proxy.stop(), "stop");
});

const LATE = "latency upstream latency=30, slow_close upstream delay=30";

onEnds.test(`${LATE} | the other way goes on after one has ended`, async ({ client, upstream, watched }) => {
  await upstream.closeWrite(); // before it has read anything
  assertEquals((await readAll(client)).length, 0);
  const bytes = testBytes(200_001);
  const sent = writeAndEnd(client, bytes);
  assertBytes(await readAll(upstream), bytes);
  await sent;
  await assertClosed(watched, { why: "upstream", bytesUp: 200_001 });
});

onNodeClient.test("timeout upstream | it ends with a client that resets", async ({ client, watched }) => {
  await client.write("hello");
  client.reset();
  await assertClosed(watched, { why: "client_reset" });
});

for (const { sockets, resettable } of SOCKETS) {
  const ends = "a client that has ended its stream gets a long answer whole";
  Deno.test(`${ends}, on ${sockets}`, () =>
    assertAnswered("please", resettable));

  // On Node's sockets it may get a RST, but never a part that looks whole.
  Deno.test(`${ends}, also if it has sent no byte, on ${sockets}`, () =>
    assertAnswered("", resettable).catch((error) => {
      if (!resettable) throw error;
      assert(error instanceof Deno.errors.ConnectionReset, `${error}`);
    }));
}

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
  await untilStalled(Object.defineProperty({ sent: 0 }, "sent", { get: sent }));
  assertBytes(await readAll(client), bytes);
}
