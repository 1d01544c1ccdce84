import { assert, assertEquals, assertLess, assertMatch } from "@std/assert";
import {
  assertBytes,
  assertClosed,
  assertEchoes,
  assertReads,
  assertSince,
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
  only,
  openEnds,
  openNodeClient,
  openNodeUpstream,
  pause,
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

const HAS_IPV6 = Deno.networkInterfaces()
  .some(({ address }) => address === "::1");
if (!HAS_IPV6) console.warn("there is no ::1: IPv6 is not tested");
const ignore = !IS_LINUX;
if (ignore) console.warn("connect timeouts and memory: tested on Linux");

/** As many bytes go up as a number says, while the next number comes down. */
const SIZES = [
  ...[0, 0, 1, 0, 4095, 4096, 4097, 65_535, 65_536, 65_537, 262_143, 262_145],
  ...[10_000_003, 10_000_003, 0],
];
const SIDES = ["client", "upstream"] as const;
const OTHER = { client: "upstream", upstream: "client" } as const;
const BYTES_OF = { client: "bytesUp", upstream: "bytesDown" } as const;
const ODD_CHUNKS = [1, 7, 4095, 1, 4096, 4097, 65_537, 262_145, 3];

Deno.test("with halfCloseTimeoutMs 0 a client may half-close during its delay", async () => {
  await using upstream = new Upstream(async (conn) => {
    await pause(100); // of silence
    await send(conn, "an answer");
  });
  const route = { halfCloseTimeoutMs: 0, latencyMs: 50 };
  await using watched = await WatchedProxy.to(upstream, route);
  using client = await watched.connect();
  assertEquals(text(await exchange(client, testBytes(1))), "an answer");
});

Deno.test("each local port leads to its upstream", async () => {
  await using stack = new AsyncDisposableStack();
  const open = (name: string) =>
    stack.use(new Upstream((conn) => send(conn, name)));
  const [red, green, blue] = [open("red"), open("green"), open("blue")];
  const upstreams = [red, green, blue, green];
  const names = ["red", "green", "blue", "green"];
  await using watched = await WatchedProxy.start({
    routes: upstreams.map(({ address: upstream }, i) => {
      return { localPort: 0, upstream, name: `route-${i}` };
    }),
  });

  const routes = [0, 1, 2, 3, 3, 2, 1, 0, 2, 2];
  const answers = await times(routes.length, async (i) => {
    using client = await watched.connect(routes[i]);
    return text(await readAll(client));
  });

  assertEquals(answers, routes.map((route) => names[route]));
  const closed = await watched.log.first("closed", routes.length);
  const taken = closed.map((each) => each.route).sort();
  assertEquals(taken, routes.map((route) => `route-${route}`).sort());
  const ports = new Set(watched.proxy.routes.map((each) => each.localPort));
  assertEquals(ports.size, 4);
  assertEquals(upstreams.map((each) => each.accepted), [2, 4, 4, 4]);
});

const NAMES = [
  { name: "IPv4", host: "127.0.0.1", dialled: "127.0.0.1" },
  { name: "IPv6", host: "::1", dialled: "[::1]" },
  { name: "a name", host: "127.0.0.1", dialled: "localhost" },
  { name: "a name on IPv6 alone", host: "::1", dialled: "localhost" },
];
for (const { name, host, dialled } of NAMES) {
  const ignore = host === "::1" && !HAS_IPV6;
  Deno.test(`an upstream is reached by ${name}`, { ignore }, async () => {
    await using upstream = echo(host);
    const address = upstream.address.replace(/.*:/, `${dialled}:`);
    await using watched = await WatchedProxy.to({ address }, { host });
    using client = await Deno.connect({ hostname: host, port: watched.port() });
    await assertEchoes(client);
    const [connected] = await watched.log.first("connected", 1);
    assertEquals(connected.upstream, address);
    assertEquals(connected.address, upstream.address);
    const own = `:${client.localAddr.port}`;
    assertEquals(connected.client, upstream.address.replace(/:\d+$/, own));
  });
}

SIZES.slice(1).forEach((down, i) => {
  const up = defined(SIZES[i]);
  Deno.test(`${up} bytes go up while ${down} come down`, () =>
    assertExchanged(testBytes(up, 3), testBytes(down, 4)));
});

Deno.test("bytes arrive exactly in whatever portions they come", () =>
  assertExchanged(testBytes(3_000_001), testBytes(2_999_999, 6), writeOddly));

for (const side of SIDES) {
  Deno.test(`what comes after the ${side}'s end arrives whole`, async () => {
    await using ends = await openEnds();
    const [ended, other] = [ends[side], ends[OTHER[side]]];
    await send(ended, "bye");
    await ended.closeWrite();
    assertEquals(text(await readAll(other)), "bye");
    for (const words of ["one", "two"]) {
      await assertArrives(other, ended, words);
    }
    const rest = testBytes(3_000_001);
    const [got] = await Promise.all([readAll(ended), writeAndEnd(other, rest)]);
    assertBytes(got, rest);
    const expected = { why: side, [BYTES_OF[side]]: 3 };
    const { bytesUp, bytesDown } = await assertClosed(ends.watched, expected);
    assertEquals(bytesUp + bytesDown, 3 + 6 + rest.length);
  });

  Deno.test(`what the ${side} sent before it closed arrives`, async () => {
    await using ends = await openEnds();
    const sent = testBytes(300_001);
    await writeAll(ends[side], sent);
    ends[side].close();
    assertBytes(await readAll(ends[OTHER[side]]), sent);
  });

  Deno.test(`a reader that pauses stops the ${side} that sends`, async () => {
    await using ends = await openEnds();
    const block = testBytes(MIB);
    const total = 192 * MIB;
    const flow = flood(ends[side], block, total);
    await untilStalled(flow);
    assertLess(flow.sent, 64 * MIB);
    assertEquals(await readToEnd(ends[OTHER[side]], block), total);
    await flow.done;
  });
}

Deno.test("bytes that wait for slow readers are safe from other connections", async () => {
  await using open = new AsyncDisposableStack();
  await using busy = await openEnds();
  const [block, other] = [testBytes(MIB, 1), testBytes(MIB, 2)];
  const portion = MIB / 4;
  const waiting = [];
  for (let i = 0; i < 4; i++) {
    const ends = open.use(await openEnds());
    let size = 0;
    const hasLeft = () => only(ends.watched.proxy.stats()).sent.upstream < size;
    while (!hasLeft()) { // the last portion waits, with none behind it
      const start = size % MIB;
      size += portion;
      await writeAll(ends.client, block.subarray(start, start + portion));
      for (let look = 0; look < 8 && hasLeft(); look++) await pause(25);
    }
    waiting.push({ ...ends, size });
  }
  const total = 24 * MIB;
  const passed = flood(busy.client, other, total);
  assertEquals(await readToEnd(busy.upstream, other), total);
  await passed.done;
  for (const { client, upstream, size } of waiting) {
    await client.closeWrite();
    assertEquals(await readToEnd(upstream, block), size);
  }
});

Deno.test(
  "what a client was told is received arrives after its reset, on Node's sockets too",
  { ignore },
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
    const least = flow.sent - unacknowledged;
    assert(got >= least, `${got} of ${least}`);
    await assertReset(ends.watched, "client", got);
  },
);

for (const side of SIDES) {
  const openResettable = side === "client" ? openNodeClient : openNodeUpstream;
  const other = OTHER[side];
  const open = async () => {
    const ends = await openResettable();
    const [from, to] = [ends[side] as NodeEnd, ends[other] as Deno.TcpConn];
    return { ...ends, from, to };
  };

  Deno.test(`what was read from the ${side} before its reset arrives`, async () => {
    await using ends = await open();
    const block = testBytes(MIB);
    await untilStalled(flood(ends.from, block));
    await ends.from.reset();
    const got = await readToEnd(ends.to, block);
    assert(got > 0);
    await assertReset(ends.watched, side, got);
  });

  for (const isIdle of [true, false]) {
    const state = isIdle ? "is idle" : "has ended its stream";
    Deno.test(`the ${side}'s reset ends the ${other} that ${state}`, async () => {
      await using ends = await open();
      if (isIdle) {
        ends.from.write("hello");
        await assertReads(ends.to, "hello");
      } else {
        await ends.to.closeWrite();
        await ends.from.ended;
      }
      await ends.from.reset();
      assertEquals(await readToEnd(ends.to), 0);
      await assertReset(ends.watched, side, isIdle ? 5 : 0);
    });
  }

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
    await assertReset(watched, side, 0);
  });
}

Deno.test("a client that ended its stream and then reset ends the upstream when it answers", async () => {
  await using ends = await openNodeClient();
  ends.client.closeWrite();
  assertEquals(await readToEnd(ends.upstream), 0);
  await ends.client.reset();
  await flood(ends.upstream).done;
  await assertReset(ends.watched, "client", 0);
});

Deno.test("a stalled client costs little memory", { ignore }, async () => {
  await using upstream = new Silent();
  await using cli = await Cli.to(upstream, { drainTimeoutMs: 1 });
  const before = await memory(cli, "HWM");
  using _client = await Deno.connect({ port: cli.port() });
  const flow = flood(await upstream.accept(), testBytes(MIB), 1024 * MIB);
  await untilStalled(flow);
  assertLess(flow.sent, 64 * MIB);
  assertLess(await memory(cli, "HWM") - before, 96 * MIB);
});

/** An upstream cannot be reached; what else there is does not suffer. */
async function assertUnreachable(
  address: string,
  cause: RegExp,
  resettable: boolean,
): Promise<void> {
  await using upstream = echo();
  await using watched = await WatchedProxy.start({
    routes: [
      { name: "good", localPort: 0, upstream: upstream.address },
      { name: "bad", localPort: 0, upstream: address, connectTimeoutMs: 300 },
    ],
  }, { resettable });
  using before = await watched.connect(0);
  await assertEchoes(before);

  await Promise.all(["", "is anybody there?"].map(async (words) => {
    using client = await watched.connect(1);
    await send(client, words);
    assertEquals(await readToEnd(client), 0);
  }));

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

/** Words sent at one end arrive at the other. */
async function assertArrives(from: Deno.Conn, to: Deno.Conn, words: string) {
  await send(from, words);
  await assertReads(to, words);
}

async function writeOddly(conn: Deno.Conn, bytes: Uint8Array): Promise<void> {
  for (let sent = 0; sent < bytes.length;) {
    for (const size of ODD_CHUNKS) {
      await writeAll(conn, bytes.subarray(sent, sent + size));
      sent += size;
    }
  }
}

/** A side's reset has ended the connection, after so many of its bytes. */
async function assertReset(
  { log }: WatchedProxy,
  side: typeof SIDES[number],
  bytes: number,
): Promise<void> {
  const why = `${side}_reset` as const;
  const expected = { why, [BYTES_OF[side]]: bytes };
  assert((await assertClosed({ log }, expected)).cause);
  log.only("closed");
}

/** The queues and the timer of a socket on Linux, found by its two ports. */
async function socketState(local: number, remote: number): Promise<string> {
  const hex = (port: number) =>
    port.toString(16).toUpperCase().padStart(4, "0");
  const line = new RegExp(`:${hex(local)} \\S+:${hex(remote)} \\S+ (.*)`);
  return captured(line, await Deno.readTextFile("/proc/net/tcp"));
}

for (const { sockets, resettable } of SOCKETS) {
  Deno.test(`all bytes come back, and each connection is closed once with its bytes, on ${sockets}`, async () => {
    await using upstream = echo();
    const on = { resettable };
    await using watched = await WatchedProxy.to(upstream, {}, {}, on);
    const expected = await times(60, async (i) => {
      using client = await watched.connect();
      const bytes = testBytes(i * i * 301, i + 1);
      assertBytes(await exchange(client, bytes), bytes);
      return `127.0.0.1:${client.localAddr.port}: client, ${bytes.length}`;
    });
    const { log, proxy } = watched;
    await log.first("closed", expected.length);
    await proxy.stop();
    const closed = log.of("closed").map(
      ({ client, why, bytesUp, bytesDown }) => {
        assertEquals(bytesUp, bytesDown);
        return `${client}: ${why}, ${bytesUp}`;
      },
    );
    assertEquals(closed.sort(), expected.sort());
    const numbers = (event: "accepted" | "closed") =>
      log.of(event).map(({ connection }) => connection).sort();
    assertEquals(numbers("closed"), numbers("accepted"));
  });

  const alone = `costs that connection alone, on ${sockets}`;
  Deno.test(`an upstream that refuses ${alone}`, () =>
    assertUnreachable(nowhere().address, /refused/i, resettable));

  Deno.test(`a name that does not resolve ${alone}`, () =>
    assertUnreachable("no-such-host.invalid:80", /./, resettable));

  Deno.test(`an upstream that never answers ${alone}`, { ignore }, async () => {
    await using upstream = await unanswering();
    const cause = /no answer within 300 ms/;
    await assertUnreachable(upstream.address, cause, resettable);
  });

  for (const side of SIDES) {
    Deno.test(`a connection is closed once the ${side} has ended its stream and nothing comes, on ${sockets}`, async () => {
      const halfCloseTimeoutMs = 300;
      await using ends = await openEnds({ halfCloseTimeoutMs }, { resettable });
      const { client, upstream, watched } = ends;
      await assertArrives(client, upstream, "hello");
      await assertArrives(upstream, client, "hello");
      const start = performance.now();
      await ends[side].closeWrite();
      const cause = `no byte from the ${OTHER[side]} for 300 ms`;
      await assertClosed(watched, { why: side, cause });
      assertSince(start, halfCloseTimeoutMs);
      assertEquals(await readToEnd(client), 0);
      assertEquals(await readToEnd(upstream), 0);
    });
  }

  Deno.test(`a half-closed connection stays while an answer comes, on ${sockets}`, async () => {
    const toxics = [toxic("latency latency=1500")];
    const route = { halfCloseTimeoutMs: 1000, toxics };
    await using ends = await openEnds(route, { resettable });
    const { client, upstream, watched } = ends;
    await client.closeWrite();
    await assertArrives(upstream, client, "held longer than the timeout");
    assertEquals(watched.log.of("closed"), []);
  });

  for (
    const [line, ms] of [
      ["slow_close upstream delay=450", 450],
      ["latency upstream latency=450", 450],
    ] as const
  ) {
    Deno.test(`with ${line} the silence after half-closing begins when the end was delivered, on ${sockets}`, async () => {
      const route = { halfCloseTimeoutMs: 300, toxics: [toxic(line)] };
      await using ends = await openEnds(route, { resettable });
      const { client, watched } = ends;
      const start = performance.now();
      await client.closeWrite();
      const cause = "no byte from the upstream for 300 ms";
      await assertClosed(watched, { why: "client", cause });
      assertSince(start, ms + 300);
    });
  }

  Deno.test(`both ends of a connection are kept alive, on ${sockets}`, {
    ignore,
  }, async () => {
    await using ends = await openEnds({}, { resettable });
    for (const { remoteAddr, localAddr } of [ends.client, ends.upstream]) {
      const state = await socketState(remoteAddr.port, localAddr.port);
      assertMatch(state, /^\S+ 02:/); // the timer is the one of keep-alive
    }
  });
}
