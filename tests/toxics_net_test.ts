import {
  assert,
  assertEquals,
  assertGreaterOrEqual,
  assertLess,
  assertRejects,
} from "@std/assert";
import { decide, type RouteOptions, type ToxicType } from "../main.ts";
import {
  assertBytes,
  assertClosed,
  assertEchoes,
  assertEndedBy,
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

/** At least so much time has passed since the start. */
function assertLasted(ms: number, start: number): void {
  assertGreaterOrEqual(performance.now() - start, ms - 1);
}

/** An upstream that answers with bytes, whatever it is asked. */
function answering(bytes: Uint8Array): Upstream {
  return new Upstream(async (conn) => {
    await conn.read(new Uint8Array(1000));
    await writeAndEnd(conn, bytes);
    await readAll(conn);
  });
}

const WHOLE: [name: string, minMs: number, size: number, ...string[]][] = [
  ...STREAMS.map((stream): [string, number, number, string] => [
    `latency holds what goes ${stream}, and loses nothing`,
    ...[150, 3_000_001] as const,
    `latency ${stream} latency=150`,
  ]),
  [
    "latency over bandwidth over slicer is what the three do together",
    ...[380, 300_000] as const,
    "latency latency=100 jitter=20",
    "bandwidth rate=1000",
    "slicer average_size=500 delay=10",
  ],
  [
    "bandwidth lets a flood through at its rate",
    ...[200, 100_000] as const,
    "bandwidth upstream rate=500",
  ],
];

for (const [name, minMs, size, ...lines] of WHOLE) {
  Deno.test(name, async () => {
    await using ends = await openEcho(having(...lines));
    const { client, watched } = ends;
    const bytes = testBytes(size);
    const start = performance.now();
    assertBytes(await exchange(client, bytes), bytes);
    assertLasted(minMs, start);
    const [{ toxics }] = await watched.log.first("connected", 1);
    assertEquals(
      toxics,
      watched.proxy.route("r").toxics.map(({ name }) => name),
    );
    await assertClosed(watched, { why: "client", toxic: undefined });
  });
}

Deno.test("none of them has an effect with a toxicity of 0", async () => {
  const attributes: Record<ToxicType, string> = {
    latency: `latency=${HOUR_MS}`,
    bandwidth: "rate=1",
    slow_close: `delay=${HOUR_MS}`,
    timeout: "timeout=1",
    reset_peer: "timeout=0",
    slicer: "average_size=1 delay=1000000",
    limit_data: "bytes=1",
    packet_loss: "loss_rate=1",
    corrupt: "rate=1",
    limit_time: "time=1",
    noop: "",
  };
  const lines = Object.entries(attributes).flatMap(([type, attributes]) =>
    STREAMS.map((stream) => `${type} ${stream} toxicity=0 ${attributes}`)
  );
  await using ends = await openEcho(having(...lines));
  const bytes = testBytes(2_000_003);
  assertBytes(await exchange(ends.client, bytes), bytes);
  await assertClosed(ends.watched, { why: "client", toxic: undefined });
  const [connected] = await ends.watched.log.first("connected", 1);
  assertEquals(connected.toxics, []);
});

Deno.test("slow_close delays the end, not the data", async () => {
  await using ends = await openEcho(having("slow_close delay=200"));
  await assertEchoes(ends.client);
  const start = performance.now();
  await ends.client.closeWrite();
  assertEquals(await ends.client.read(new Uint8Array(1)), null);
  assertLasted(200, start);
});

for (const stream of STREAMS) {
  Deno.test(`timeout lets nothing go ${stream}, and ends the connection`, async () => {
    await using ends = await openEnds(having(`timeout ${stream} timeout=150`));
    const { client, upstream, watched } = ends;
    await send(client, "hello");
    await send(upstream, "hello");
    const held = stream === "upstream" ? upstream : client;
    assertEquals(await readAll(held), testBytes(0));
    const { durationMs } = await assertEndedBy(watched, `timeout_${stream}`);
    assertGreaterOrEqual(durationMs, 150);
  });
}

Deno.test("a timeout of 0 lasts until the client leaves", async () => {
  await using ends = await openEcho(having("timeout upstream"));
  assertEquals(await exchange(ends.client, testBytes(5)), testBytes(0));
  await assertClosed(ends.watched, { why: "client", bytesUp: 5 });
});

Deno.test("reset_peer sends a RST to both sides", async () => {
  const start = performance.now();
  await using ends = await openEnds(having("reset_peer timeout=100"));
  await send(ends.upstream, "hello");
  for (const conn of [ends.client, ends.upstream]) {
    await assertRejects(() => readAll(conn), Deno.errors.ConnectionReset);
  }
  assertLasted(100, start);
  await assertEndedBy(ends.watched, "reset_peer_downstream");
});

Deno.test("Node's client sees ECONNRESET", async () => {
  await using ends = await openNodeClient(having("reset_peer upstream"));
  ends.client.write("hello");
  await Promise.race([ends.client.closed, ends.client.ended]);
  assertEquals(ends.client.error?.code, "ECONNRESET");
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
  assertGreaterOrEqual(got.length, 2); // five, but for a slow reader
});

Deno.test("limit_data delivers its last byte, and closes", async () => {
  const bytes = testBytes(5_000_000);
  const lines = ["limit_data bytes=1234567", "latency latency=50"];
  await using ends = await connectTo(answering(bytes), [having(...lines)]);
  await send(ends.client, "please");
  assertBytes(await readAll(ends.client), bytes.subarray(0, 1_234_567));
  ends.client.close();
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

Deno.test("limit_time closes under constant traffic", async () => {
  const start = performance.now();
  await using ends = await openEcho(having("limit_time time=200"));
  const bytes = testBytes(1000);
  const { done } = flood(ends.client, bytes);
  assert(await readToEnd(ends.client, bytes) > 0);
  await done;
  assertLasted(200, start);
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
    await using ends = await openNodeClient(
      having("bandwidth upstream rate=10"),
      on,
    );
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

  Deno.test(`a drain cuts what is held for too long, on ${sockets}`, async () => {
    const route = having(`latency latency=${HOUR_MS}`);
    await using ends = await openEcho(route, on);
    await send(ends.client, "held");
    await ends.client.closeWrite();
    await ends.watched.log.first("connected", 1);
    assertEquals(await soon(ends.watched.proxy.drain(50), "drain"), 1);
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
    const route = having(
      "latency upstream latency=30",
      "slow_close upstream delay=30",
    );
    await using ends = await openEnds(route, on);
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
  for (let last = -1, same = 0; same < 10;) {
    await new Promise((resolve) => setTimeout(resolve, 10));
    const now = only(watched.proxy.stats()).sent.downstream;
    same = now > 0 && now === last ? same + 1 : 0;
    last = now;
  }
  assertBytes(await readAll(client), bytes);
}

Deno.test("each connection meets what the seed decides for it", async () => {
  await using upstream = echo();
  await using watched = await WatchedProxy.to(
    upstream,
    having(
      "latency name=a toxicity=0.5",
      "latency upstream name=b toxicity=0.3",
    ),
  );
  const route = watched.proxy.route("r");
  await times(30, async () => {
    using conn = await watched.connect();
    await exchange(conn, testBytes(10));
  });
  const connected = await watched.log.first("connected", 30);
  for (const { connection, toxics } of connected) {
    const decision = decide(1, route, connection);
    assert(decision.kind === "forward");
    assertEquals(toxics, decision.toxics.map(({ name }) => name));
  }
  const mixes = new Set(connected.map(({ toxics }) => toxics.join()));
  assertEquals(mixes.size, 4);
});

Deno.test("a flood against 10 KB/s is held up within the bound", async () => {
  await using ends = await openEnds(having("bandwidth upstream rate=10"));
  const flow = flood(ends.client);
  await readExactly(ends.upstream, 5000); // in half a second, not earlier
  assertLess(flow.sent, 128 * MIB);
  await ends.watched.proxy.stop();
  await flow.done;
  assertLess(flow.sent, 128 * MIB);
});
