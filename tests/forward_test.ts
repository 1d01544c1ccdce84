import {
  assert,
  assertEquals,
  assertGreater,
  assertGreaterOrEqual,
  assertLess,
  assertMatch,
} from "@std/assert";
import {
  assertBytes,
  assertClosed,
  assertEchoes,
  assertReads,
  captured,
  Cli,
  defined,
  echo,
  exchange,
  flood,
  IS_LINUX,
  memory,
  MIB,
  NodeEnd,
  NodeUpstream,
  nowhere,
  openEnds,
  openNodeClient,
  openNodeUpstream,
  readAll,
  readToEnd,
  send,
  Silent,
  SOCKETS,
  testBytes,
  text,
  times,
  toxic,
  unanswering,
  untilStalled,
  Upstream,
  WatchedProxy,
  writeAll,
  writeAndEnd,
} from "./helpers.ts";

const HAS_IPV6 = canListenOn("::1");
if (!HAS_IPV6) console.warn("there is no ::1: IPv6 is not tested");
if (!IS_LINUX) console.warn("connect timeouts and memory: tested on Linux");

const SIZES: [up: number, down: number][] = [
  [0, 0],
  [0, 1],
  [1, 0],
  [4095, 4096],
  [4096, 4097],
  [4097, 4095],
  [64 * 1024 - 1, 64 * 1024 + 1],
  [64 * 1024, 256 * 1024],
  [256 * 1024 - 1, 256 * 1024 + 1],
  [10_000_003, 0],
  [10_000_003, 10_000_003],
];
const ODD_CHUNKS = [1, 7, 4095, 1, 4096, 4097, 65_537, 262_145, 3];

Deno.test("each local port leads to its upstream", async () => {
  await using red = naming("red");
  await using green = naming("green");
  await using blue = naming("blue");
  const upstreams = [red, green, blue, green];
  await using watched = await WatchedProxy.start({
    routes: upstreams.map(({ address }, i) => ({
      localPort: 0,
      upstream: address,
      name: `route-${i}`,
    })),
  });

  const routes = [0, 1, 2, 3, 3, 2, 1, 0, 2, 2];
  const answers = await Promise.all(routes.map(async (route) => {
    using client = await watched.connect(route);
    return text(await readAll(client));
  }));

  const names = ["red", "green", "blue", "green"];
  assertEquals(answers, routes.map((route) => names[route]));
  const closed = await watched.log.first("closed", routes.length);
  assertEquals(
    closed.map((each) => each.route).sort(),
    routes.map((route) => `route-${route}`).sort(),
  );
  const ports = new Set(watched.proxy.routes.map((each) => each.localPort));
  assertEquals(ports.size, 4);
  assertEquals([red, green, blue].map((each) => each.accepted), [2, 4, 4]);
});

for (
  const { name, listen, dial, ignore } of [
    { name: "IPv4", listen: "127.0.0.1", dial: "127.0.0.1", ignore: false },
    { name: "IPv6", listen: "::1", dial: "[::1]", ignore: !HAS_IPV6 },
    { name: "name", listen: "127.0.0.1", dial: "localhost", ignore: false },
  ]
) {
  Deno.test(`an upstream is reached by ${name}`, { ignore }, async () => {
    await using upstream = echo(listen);
    const address = `${dial}:${upstream.address.split(":").at(-1)}`;
    await using watched = await WatchedProxy.to({ address });
    using client = await watched.connect();
    await assertEchoes(client);
    const [connected] = await watched.log.first("connected", 1);
    assertEquals(connected.upstream, address);
    assertEquals(connected.address, upstream.address);
  });
}

Deno.test("a route listens on IPv6", { ignore: !HAS_IPV6 }, async () => {
  await using upstream = echo();
  await using watched = await WatchedProxy.to(upstream, { host: "::1" });
  const [hostname, port] = ["::1", watched.port()];
  using client = await Deno.connect({ hostname, port });
  await assertEchoes(client);
  const [accepted] = await watched.log.first("accepted", 1);
  assertMatch(accepted.client, /^\[::1\]:\d+$/);
});

for (const [up, down] of SIZES) {
  Deno.test(`${up} bytes go up while ${down} come down`, () =>
    assertExchanged(testBytes(up, 3), testBytes(down, 4)));
}

Deno.test("bytes arrive exactly in whatever portions they come", () =>
  assertExchanged(
    testBytes(3_000_001, 5),
    testBytes(2_999_999, 6),
    writeOddly,
  ));

for (const first of ["client", "upstream"] as const) {
  Deno.test(`what comes after the ${first}'s end arrives whole`, async () => {
    await using ends = await openEnds();
    const [ended, other] = first === "client"
      ? [ends.client, ends.upstream]
      : [ends.upstream, ends.client];
    await send(ended, "bye");
    await ended.closeWrite();
    assertEquals(text(await readAll(other)), "bye");
    for (const words of ["one", "two"]) {
      await send(other, words);
      await assertReads(ended, words);
    }
    const rest = testBytes(3_000_001);
    const [got] = await Promise.all([readAll(ended), writeAndEnd(other, rest)]);
    assertBytes(got, rest);
    const [bytesUp, bytesDown] = first === "client"
      ? [3, 6 + rest.length]
      : [6 + rest.length, 3];
    await assertClosed(ends.watched, { why: first, bytesUp, bytesDown });
  });
}

Deno.test("small messages are not withheld", async () => {
  await using ends = await openEnds();
  for (let round = 0; round < 300; round++) {
    const [up, down] = [`${round % 10}`, `${round % 7}`];
    await send(ends.client, up);
    await assertReads(ends.upstream, up);
    await send(ends.upstream, down);
    await assertReads(ends.client, down);
  }
});

for (const side of ["client", "upstream"] as const) {
  Deno.test(`what the ${side} sent before it closed arrives`, async () => {
    await using ends = await openEnds();
    const sent = testBytes(300_001);
    await writeAll(ends[side], sent);
    ends[side].close();
    const other = side === "client" ? ends.upstream : ends.client;
    assertBytes(await readAll(other), sent);
  });
}

Deno.test("what was read from a client before its reset arrives", async () => {
  await using ends = await openNodeClient();
  const block = testBytes(MIB);
  await untilStalled(flood(ends.client, block));
  await ends.client.reset();
  const got = await readToEnd(ends.upstream, block);
  assertGreater(got, 0);
  await assertClosed(ends.watched, { why: "client_reset", bytesUp: got });
});

Deno.test(
  "what a client was told is received arrives after its reset, on Node's sockets too",
  { ignore: !IS_LINUX },
  async () => {
    await using ends = await openNodeClient({}, { resettable: true });
    const { client, upstream } = ends;
    const block = testBytes(4096);
    const flow = flood(client, block);
    await untilStalled(flow);
    const { localPort, remotePort } = client.socket;
    const state = await socketState(defined(localPort), defined(remotePort));
    const unacknowledged = parseInt(state, 16);
    await client.reset();
    await send(upstream, "an answer that cannot be delivered");
    const got = await readToEnd(upstream, block);
    assertGreaterOrEqual(got, flow.sent - unacknowledged);
    await assertClosed(ends.watched, { why: "client_reset", bytesUp: got });
  },
);

Deno.test("what was read from an upstream before its reset arrives", async () => {
  await using ends = await openNodeUpstream();
  const block = testBytes(MIB);
  await untilStalled(flood(ends.upstream, block));
  await ends.upstream.reset();
  const got = await readToEnd(ends.client, block);
  assertGreater(got, 0);
  await assertClosed(ends.watched, { why: "upstream_reset", bytesDown: got });
});

for (const side of ["client", "upstream"] as const) {
  const openResettable = side === "client" ? openNodeClient : openNodeUpstream;
  const other = side === "client" ? "upstream" : "client";
  const open = async () => {
    const ends = await openResettable();
    const [from, to] = [ends[side] as NodeEnd, ends[other] as Deno.TcpConn];
    return { ...ends, from, to };
  };

  Deno.test(`the ${side}'s reset ends an idle ${other}`, async () => {
    await using ends = await open();
    ends.from.write("hello");
    await assertReads(ends.to, "hello");
    await ends.from.reset();
    assertEquals(await readToEnd(ends.to), 0);
    await assertReset(ends.watched, side);
  });

  Deno.test(`the ${side}'s reset ends the ${other} that has ended its stream`, async () => {
    await using ends = await open();
    await ends.to.closeWrite();
    await ends.from.ended;
    await ends.from.reset();
    assertEquals(await readToEnd(ends.to), 0);
    await assertReset(ends.watched, side);
  });

  Deno.test(`the reset of the ${side} that does not read ends the ${other}`, async () => {
    const reading = side !== "upstream";
    await using upstream = await NodeUpstream.listen({ reading });
    await using watched = await WatchedProxy.to(upstream);
    await using client = await NodeEnd.connect(watched, { reading: !reading });
    const peer = await upstream.accept();
    const [from, to] = side === "client" ? [client, peer] : [peer, client];
    await untilStalled(flood(to));
    await from.reset();
    await to.closed;
    await assertReset(watched, side);
  });
}

Deno.test("a client that ended its stream and then reset ends the upstream when it answers", async () => {
  await using ends = await openNodeClient();
  ends.client.closeWrite();
  assertEquals(await readToEnd(ends.upstream), 0);
  await ends.client.reset();
  await flood(ends.upstream).done;
  await assertReset(ends.watched, "client");
});

for (const direction of ["down", "up"] as const) {
  Deno.test(`a reader that pauses stops the sender, bytes going ${direction}`, async () => {
    await using ends = await openEnds();
    const [sender, reader] = direction === "down"
      ? [ends.upstream, ends.client]
      : [ends.client, ends.upstream];
    const block = testBytes(MIB);
    const total = 192 * MIB;
    const flow = flood(sender, block, total);
    await untilStalled(flow);
    assertLess(flow.sent, 64 * MIB);
    assertEquals(await readToEnd(reader, block), total);
    await flow.done;
  });
}

Deno.test("a stalled client costs little memory", {
  ignore: !IS_LINUX,
}, async () => {
  await using upstream = new Silent();
  await using cli = await Cli.start({
    drainTimeoutMs: 1,
    routes: [{ localPort: 0, upstream: upstream.address }],
  });
  const before = await memory(cli, "HWM");
  using _client = await Deno.connect({ port: cli.port() });
  const flow = flood(await upstream.accept(), testBytes(MIB), 1024 * MIB);
  await untilStalled(flow);
  assertLess(flow.sent, 64 * MIB);
  assertLess(await memory(cli, "HWM") - before, 96 * MIB);
});

Deno.test("each connection accepted is closed once, with its bytes", async () => {
  await using upstream = new Upstream(async (conn) => {
    const request = await readAll(conn);
    await writeAll(conn, testBytes(2 * request.length + 1));
  });
  await using watched = await WatchedProxy.to(upstream);
  const count = 60;
  const expected = await times(count, async (i) => {
    const size = i * i * 13;
    using client = await watched.connect();
    const answer = await exchange(client, testBytes(size));
    assertEquals(answer.length, 2 * size + 1);
    const { port } = client.localAddr as Deno.NetAddr;
    return [`127.0.0.1:${port}`, [size, answer.length]];
  });
  await watched.log.first("closed", count);
  await watched.proxy.stop();

  const closed = watched.log.of("closed");
  assertEquals(closed.length, count);
  assertEquals(
    Object.fromEntries(
      closed.map((each) => [each.client, [each.bytesUp, each.bytesDown]]),
    ),
    Object.fromEntries(expected),
  );
  const numbers = (name: "accepted" | "closed") =>
    watched.log.of(name).map((each) => each.connection).sort();
  assertEquals(numbers("closed"), numbers("accepted"));
});

Deno.test("an upstream that refuses costs that connection alone", () =>
  assertUnreachable(nowhere().address, /refused/i));

Deno.test("a name that does not resolve costs that connection alone", () =>
  assertUnreachable("no-such-host.invalid:80", /./));

Deno.test("an upstream that does not answer costs that connection alone", {
  ignore: !IS_LINUX,
}, async () => {
  await using upstream = await unanswering();
  await assertUnreachable(upstream.address, /no answer within 300 ms/);
});

/** An upstream cannot be reached; what else there is does not suffer. */
async function assertUnreachable(
  address: string,
  cause: RegExp,
): Promise<void> {
  await using upstream = echo();
  await using watched = await WatchedProxy.start({
    routes: [
      { name: "good", localPort: 0, upstream: upstream.address },
      { name: "bad", localPort: 0, upstream: address, connectTimeoutMs: 300 },
    ],
  });
  using before = await watched.connect(0);
  await assertEchoes(before);

  using silent = await watched.connect(1);
  using talking = await watched.connect(1);
  await send(talking, "is anybody there?");
  assertEquals(await readToEnd(silent), 0);
  assertEquals(await readToEnd(talking), 0);

  await assertEchoes(before);
  using after = await watched.connect(0);
  await assertEchoes(after);

  for (const failed of await watched.log.first("upstream_failed", 2)) {
    assertEquals([failed.route, failed.upstream], ["bad", address]);
    assertMatch(failed.cause, cause);
  }
  for (const closed of await watched.log.first("closed", 2)) {
    assertEquals([closed.route, closed.why], ["bad", "upstream_failed"]);
    assertEquals(closed.bytesDown, 0);
  }
}

/** Both sides send all they have at once, and get all the other has. */
async function assertExchanged(
  up: Uint8Array,
  down: Uint8Array,
  write = writeAll,
): Promise<void> {
  await using ends = await openEnds();
  const [atClient, atUpstream] = await Promise.all([
    exchange(ends.client, up, write),
    exchange(ends.upstream, down, write),
  ]);
  assertBytes(atUpstream, up);
  assertBytes(atClient, down);
  const [bytesUp, bytesDown] = [up.length, down.length];
  await assertClosed(ends.watched, { bytesUp, bytesDown });
}

async function writeOddly(conn: Deno.Conn, bytes: Uint8Array): Promise<void> {
  for (let sent = 0; sent < bytes.length;) {
    for (const size of ODD_CHUNKS) {
      await writeAll(conn, bytes.subarray(sent, sent + size));
      sent += size;
    }
  }
}

async function assertReset(
  { log }: WatchedProxy,
  side: "client" | "upstream",
): Promise<void> {
  const { cause } = await assertClosed({ log }, { why: `${side}_reset` });
  assert(cause);
  assertEquals(log.of("closed").length, 1);
}

/** The queues and the timer of a socket on Linux, found by its two ports. */
async function socketState(local: number, remote: number): Promise<string> {
  const hex = (port: number) =>
    port.toString(16).toUpperCase().padStart(4, "0");
  const line = new RegExp(`:${hex(local)} \\S+:${hex(remote)} \\S+ (.*)`);
  return captured(line, await Deno.readTextFile("/proc/net/tcp"));
}

function naming(name: string): Upstream {
  return new Upstream((conn) => send(conn, name));
}

function canListenOn(hostname: string): boolean {
  try {
    Deno.listen({ hostname, port: 0 }).close();
    return true;
  } catch {
    return false;
  }
}

for (const { sockets, resettable } of SOCKETS) {
  for (const side of ["client", "upstream"] as const) {
    Deno.test(`a connection is closed once the ${side} has ended its stream and nothing comes, on ${sockets}`, async () => {
      const halfCloseTimeoutMs = 300;
      await using ends = await openEnds({ halfCloseTimeoutMs }, { resettable });
      const { client, upstream, watched } = ends;
      await send(client, "hello");
      await assertReads(upstream, "hello");
      await send(upstream, "hello");
      await assertReads(client, "hello");
      const start = performance.now();
      await ends[side].closeWrite();
      const silent = side === "client" ? "upstream" : "client";
      const cause = `no byte from the ${silent} for 300 ms`;
      await assertClosed(watched, { why: side, cause });
      assertGreaterOrEqual(performance.now() - start, halfCloseTimeoutMs - 1);
      assertEquals(await readToEnd(client), 0);
      assertEquals(await readToEnd(upstream), 0);
    });
  }

  Deno.test(`a half-closed connection stays while an answer comes, on ${sockets}`, async () => {
    const toxics = [toxic("latency latency=1500")];
    const route = { halfCloseTimeoutMs: 1000, toxics };
    await using ends = await openEnds(route, { resettable });
    await ends.client.closeWrite();
    await send(ends.upstream, "held longer than the timeout");
    await assertReads(ends.client, "held longer than the timeout");
    assertEquals(ends.watched.log.of("closed"), []);
  });

  Deno.test(`both ends of a connection are kept alive, on ${sockets}`, {
    ignore: !IS_LINUX,
  }, async () => {
    await using ends = await openEnds({}, { resettable });
    for (const { remoteAddr, localAddr } of [ends.client, ends.upstream]) {
      const state = await socketState(remoteAddr.port, localAddr.port);
      assertMatch(state, /^\S+ 02:/); // the timer is the one of keep-alive
    }
  });
}
