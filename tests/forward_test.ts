import {
  assert,
  assertEquals,
  assertGreater,
  assertGreaterOrEqual,
  assertLess,
  assertMatch,
} from "@std/assert";
import { type AddressInfo, connect, createServer, type Socket } from "node:net";
import {
  Cli,
  echo,
  isDisconnect,
  nowhere,
  readAll,
  readExactly,
  send,
  testBytes,
  text,
  Upstream,
  WatchedProxy,
  writeAll,
} from "./helpers.ts";

const MIB = 2 ** 20;
const IS_LINUX = Deno.build.os === "linux";
const HAS_IPV6 = canListenOn("::1");
if (!HAS_IPV6) console.warn("there is no ::1: IPv6 is not tested");
if (!IS_LINUX) console.warn("connect timeouts and memory: tested on Linux");

const SIZES = [
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
    const port = upstream.address.split(":").at(-1);
    await using watched = await WatchedProxy.to({ address: `${dial}:${port}` });
    using client = await watched.connect();
    await send(client, "ping");
    assertEquals(text(await readExactly(client, 4)), "ping");
    const [connected] = await watched.log.first("connected", 1);
    assertEquals(connected.upstream, `${dial}:${port}`);
    assertEquals(connected.address, upstream.address);
  });
}

Deno.test("a route listens on IPv6", { ignore: !HAS_IPV6 }, async () => {
  await using upstream = echo();
  await using watched = await WatchedProxy.to(upstream, { host: "::1" });
  const { localPort: port } = watched.proxy.routes[0];
  using client = await Deno.connect({ hostname: "::1", port });
  await send(client, "ping");
  assertEquals(text(await readExactly(client, 4)), "ping");
  const [accepted] = await watched.log.first("accepted", 1);
  assertMatch(accepted.client, /^\[::1\]:\d+$/);
});

for (const [up, down] of SIZES) {
  Deno.test(`${up} bytes go up while ${down} come down`, async () => {
    await exchange(testBytes(up, 3), testBytes(down, 4), writeAll);
  });
}

Deno.test("bytes arrive exactly in whatever portions they come", async () => {
  await exchange(testBytes(3_000_001, 5), testBytes(2_999_999, 6), writeOddly);
});

Deno.test("a client that ends its stream still gets the whole answer", async () => {
  await using upstream = echo();
  await using watched = await WatchedProxy.to(upstream);
  using client = await watched.connect();
  const sent = testBytes(5_000_003);
  const [, got] = await Promise.all([
    writeAll(client, sent).then(() => client.closeWrite()),
    readAll(client),
  ]);
  assertBytes(got, sent);
  const [closed] = await watched.log.first("closed", 1);
  assertEquals(closed.why, "client");
});

Deno.test("an answer that begins after the client's end arrives whole", async () => {
  const answer = testBytes(3_000_001);
  await using ends = await Ends.open();
  const { client, upstream, watched } = ends;
  await send(client, "request");
  await client.closeWrite();
  assertEquals(text(await readAll(upstream)), "request");

  await send(upstream, "one");
  assertEquals(text(await readExactly(client, 3)), "one");
  await send(upstream, "two");
  assertEquals(text(await readExactly(client, 3)), "two");
  const [got] = await Promise.all([
    readAll(client),
    writeAll(upstream, answer).then(() => upstream.closeWrite()),
  ]);

  assertBytes(got, answer);
  const [closed] = await watched.log.first("closed", 1);
  assertEquals(closed.why, "client");
  assertEquals(closed.bytesUp, 7);
  assertEquals(closed.bytesDown, 6 + answer.length);
});

Deno.test("a request that goes on after the upstream's end arrives whole", async () => {
  const request = testBytes(3_000_001);
  await using ends = await Ends.open();
  const { client, upstream, watched } = ends;
  await send(upstream, "bye");
  await upstream.closeWrite();
  assertEquals(text(await readAll(client)), "bye");

  await send(client, "one");
  assertEquals(text(await readExactly(upstream, 3)), "one");
  await send(client, "two");
  assertEquals(text(await readExactly(upstream, 3)), "two");
  const [got] = await Promise.all([
    readAll(upstream),
    writeAll(client, request).then(() => client.closeWrite()),
  ]);

  assertBytes(got, request);
  const [closed] = await watched.log.first("closed", 1);
  assertEquals(closed.why, "upstream");
  assertEquals(closed.bytesUp, 6 + request.length);
  assertEquals(closed.bytesDown, 3);
});

Deno.test("small messages are not withheld", async () => {
  await using ends = await Ends.open();
  const { client, upstream } = ends;
  const [from, to] = [new Uint8Array(1), new Uint8Array(1)];
  for (let round = 0; round < 300; round++) {
    from[0] = round;
    await client.write(from);
    assertEquals(await upstream.read(to), 1);
    assertEquals(to[0], from[0]);
    from[0] = ~round;
    await upstream.write(from);
    assertEquals(await client.read(to), 1);
    assertEquals(to[0], from[0]);
  }
});

Deno.test("what a client sent before it closed arrives", async () => {
  await using ends = await Ends.open();
  const sent = testBytes(300_001);
  await writeAll(ends.client, sent);
  ends.client.close();
  assertBytes(await readAll(ends.upstream), sent);
});

Deno.test("what an upstream sent before it closed arrives", async () => {
  await using ends = await Ends.open();
  const sent = testBytes(300_001);
  await writeAll(ends.upstream, sent);
  ends.upstream.close();
  assertBytes(await readAll(ends.client), sent);
});

Deno.test("what was read from a client before its reset arrives", async () => {
  await using upstream = new Silent();
  await using watched = await WatchedProxy.to(upstream);
  await using client = await NodeEnd.connect(watched);
  const peer = await upstream.accept();
  const block = testBytes(MIB);
  await untilStalled(client.flood(block));
  await client.reset();
  const got = await readToEnd(peer, block);
  const [closed] = await watched.log.first("closed", 1);
  assertGreater(got, 0);
  assertEquals(closed.why, "client_reset");
  assertEquals(closed.bytesUp, got);
});

Deno.test(
  "what a client was told is received arrives after its reset, on Node's sockets too",
  {
    ignore: !IS_LINUX,
  },
  async () => {
    await using upstream = new Silent();
    const options = { resettable: true };
    await using watched = await WatchedProxy.to(upstream, {}, {}, options);
    await using client = await NodeEnd.connect(watched);
    const peer = await upstream.accept();
    const block = testBytes(4096);
    const flow = client.flood(block);
    await untilStalled(flow);
    const { localPort, remotePort } = client.socket;
    const [unacknowledged] = await queuesOf(localPort!, remotePort!);
    await client.reset();
    await send(peer, "an answer that cannot be delivered");
    const got = await readToEnd(peer, block);
    assertGreaterOrEqual(got, flow.sent - unacknowledged);
    const [closed] = await watched.log.first("closed", 1);
    assertEquals(closed.why, "client_reset");
    assertEquals(closed.bytesUp, got);
  },
);

Deno.test("what was read from an upstream before its reset arrives", async () => {
  await using upstream = await NodeUpstream.listen();
  await using watched = await WatchedProxy.to(upstream);
  using client = await watched.connect();
  await using peer = await upstream.accept();
  const block = testBytes(MIB);
  await untilStalled(peer.flood(block));
  await peer.reset();
  const got = await readToEnd(client, block);
  const [closed] = await watched.log.first("closed", 1);
  assertGreater(got, 0);
  assertEquals(closed.why, "upstream_reset");
  assertEquals(closed.bytesDown, got);
});

Deno.test("a client's reset ends an idle upstream", async () => {
  await using upstream = new Silent();
  await using watched = await WatchedProxy.to(upstream);
  await using client = await NodeEnd.connect(watched);
  const peer = await upstream.accept();
  client.socket.write("hello");
  await readExactly(peer, 5);
  await client.reset();
  assertEquals(await readToEnd(peer), 0);
  await assertReset(watched, "client");
});

Deno.test("an upstream's reset ends an idle client", async () => {
  await using upstream = await NodeUpstream.listen();
  await using watched = await WatchedProxy.to(upstream);
  using client = await watched.connect();
  await using peer = await upstream.accept();
  peer.socket.write("hello");
  await readExactly(client, 5);
  await peer.reset();
  assertEquals(await readToEnd(client), 0);
  await assertReset(watched, "upstream");
});

Deno.test("a client's reset ends an upstream that has ended its stream", async () => {
  await using upstream = new Silent();
  await using watched = await WatchedProxy.to(upstream);
  await using client = await NodeEnd.connect(watched);
  const peer = await upstream.accept();
  await peer.closeWrite();
  await client.ended;
  await client.reset();
  assertEquals(await readToEnd(peer), 0);
  await assertReset(watched, "client");
});

Deno.test("an upstream's reset ends a client that has ended its stream", async () => {
  await using upstream = await NodeUpstream.listen();
  await using watched = await WatchedProxy.to(upstream);
  using client = await watched.connect();
  await using peer = await upstream.accept();
  await client.closeWrite();
  await peer.ended;
  await peer.reset();
  assertEquals(await readToEnd(client), 0);
  await assertReset(watched, "upstream");
});

Deno.test("a client that ended its stream and then reset ends the upstream when it answers", async () => {
  await using upstream = new Silent();
  await using watched = await WatchedProxy.to(upstream);
  await using client = await NodeEnd.connect(watched);
  const peer = await upstream.accept();
  client.socket.end();
  assertEquals(await readToEnd(peer), 0);
  await client.reset();
  await writeUntilBroken(peer);
  await assertReset(watched, "client");
});

Deno.test("the reset of a client that does not read ends the upstream", async () => {
  await using upstream = await NodeUpstream.listen();
  await using watched = await WatchedProxy.to(upstream);
  await using client = await NodeEnd.connect(watched, { reading: false });
  await using peer = await upstream.accept();
  await untilStalled(peer.flood(testBytes(MIB)));
  await client.reset();
  await peer.closed;
  await assertReset(watched, "client");
});

Deno.test("the reset of an upstream that does not read ends the client", async () => {
  await using upstream = await NodeUpstream.listen({ reading: false });
  await using watched = await WatchedProxy.to(upstream);
  await using client = await NodeEnd.connect(watched);
  await using peer = await upstream.accept();
  await untilStalled(client.flood(testBytes(MIB)));
  await peer.reset();
  await client.closed;
  await assertReset(watched, "upstream");
});

for (const direction of ["down", "up"] as const) {
  Deno.test(`a reader that pauses stops the sender, bytes going ${direction}`, async () => {
    await using ends = await Ends.open();
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
  const before = await peakMemory(cli);
  using _client = await Deno.connect({ port: cli.port() });
  const flow = flood(await upstream.accept(), testBytes(MIB), 1024 * MIB);
  await untilStalled(flow);
  assertLess(flow.sent, 64 * MIB);
  assertLess(await peakMemory(cli) - before, 96 * MIB);
});

Deno.test("each connection accepted is closed once, with its bytes", async () => {
  await using upstream = new Upstream(async (conn) => {
    const request = await readAll(conn);
    await writeAll(conn, testBytes(2 * request.length + 1));
  });
  await using watched = await WatchedProxy.to(upstream);
  const sizes = Array.from({ length: 60 }, (_, i) => i * i * 13);
  const expected = await Promise.all(sizes.map(async (size) => {
    using client = await watched.connect();
    await writeAll(client, testBytes(size));
    await client.closeWrite();
    const answer = await readAll(client);
    assertEquals(answer.length, 2 * size + 1);
    const { port } = client.localAddr as Deno.NetAddr;
    return [`127.0.0.1:${port}`, `${size} up, ${answer.length} down`];
  }));
  await watched.log.first("closed", sizes.length);
  await watched.proxy.stop();

  const closed = watched.log.of("closed").map((each) => [
    each.client,
    `${each.bytesUp} up, ${each.bytesDown} down`,
  ]);
  assertEquals(closed.length, sizes.length);
  assertEquals(Object.fromEntries(closed), Object.fromEntries(expected));
  assertEquals(
    watched.log.of("closed").map((each) => each.connection).sort(),
    watched.log.of("accepted").map((each) => each.connection).sort(),
  );
});

Deno.test("an upstream that refuses costs that connection alone", async () => {
  await assertUnreachable(nowhere().address, /refused/i);
});

Deno.test("a name that does not resolve costs that connection alone", async () => {
  await assertUnreachable("no-such-host.invalid:80", /./);
});

Deno.test("an upstream that does not answer costs that connection alone", {
  ignore: !IS_LINUX,
}, async () => {
  const options = { hostname: "127.0.0.1", port: 0, tcpBacklog: 1 };
  using full = Deno.listen(options);
  const { port } = full.addr;
  const left = new AbortController();
  const fillers = Array.from(
    { length: 16 },
    () => Deno.connect({ port, signal: left.signal }),
  );
  await Promise.any(fillers);
  try {
    await assertUnreachable(`127.0.0.1:${port}`, /no answer within 300 ms/);
  } finally {
    left.abort();
    for (const filler of await Promise.allSettled(fillers)) {
      if (filler.status === "fulfilled") filler.value.close();
    }
  }
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
  await send(before, "one");
  assertEquals(text(await readExactly(before, 3)), "one");

  using silent = await watched.connect(1);
  using talking = await watched.connect(1);
  await send(talking, "is anybody there?");
  assertEquals(await readToEnd(silent), 0);
  assertEquals(await readToEnd(talking), 0);

  await send(before, "two");
  assertEquals(text(await readExactly(before, 3)), "two");
  using after = await watched.connect(0);
  await send(after, "three");
  assertEquals(text(await readExactly(after, 5)), "three");

  for (const failed of await watched.log.first("upstream_failed", 2)) {
    assertEquals(failed.route, "bad");
    assertEquals(failed.upstream, address);
    assertMatch(failed.cause, cause);
  }
  for (const closed of await watched.log.first("closed", 2)) {
    assertEquals(closed.route, "bad");
    assertEquals(closed.why, "upstream_failed");
    assertEquals(closed.bytesDown, 0);
  }
}

/** Both sides send all they have at once, and get all the other has. */
async function exchange(
  up: Uint8Array,
  down: Uint8Array,
  write: (conn: Deno.Conn, bytes: Uint8Array) => Promise<void>,
): Promise<void> {
  await using ends = await Ends.open();
  const { client, upstream, watched } = ends;
  const [atClient, atUpstream] = await Promise.all([
    readAll(client),
    readAll(upstream),
    write(client, up).then(() => client.closeWrite()),
    write(upstream, down).then(() => upstream.closeWrite()),
  ]);
  assertBytes(atUpstream, up);
  assertBytes(atClient, down);
  const [closed] = await watched.log.first("closed", 1);
  assertEquals(closed.bytesUp, up.length);
  assertEquals(closed.bytesDown, down.length);
}

async function writeOddly(conn: Deno.Conn, bytes: Uint8Array): Promise<void> {
  for (let sent = 0, turn = 0; sent < bytes.length; turn++) {
    const size = ODD_CHUNKS[turn % ODD_CHUNKS.length];
    await writeAll(conn, bytes.subarray(sent, sent + size));
    sent += size;
  }
}

function assertBytes(actual: Uint8Array, expected: Uint8Array): void {
  assertEquals(actual.length, expected.length);
  const wrong = actual.findIndex((byte, i) => byte !== expected[i]);
  assertEquals(wrong, -1, `the byte at ${wrong} is another one`);
}

async function assertReset(
  { log }: WatchedProxy,
  side: "client" | "upstream",
): Promise<void> {
  const [closed] = await log.first("closed", 1);
  assertEquals(closed.why, `${side}_reset`);
  assert(closed.cause);
  assertEquals(log.of("closed").length, 1);
}

/**
 * Reads to the end, be it a reset, and returns how much there was: repetitions
 * of the block.
 */
async function readToEnd(
  conn: Deno.Conn,
  block = new Uint8Array(1),
): Promise<number> {
  const buffer = new Uint8Array(256 * 1024);
  for (let got = 0;;) {
    const size = await conn.read(buffer).catch(endOrThrow);
    if (size === null) return got;
    for (let i = 0; i < size; i++) {
      if (buffer[i] === block[(got + i) % block.length]) continue;
      throw new Error(`the byte at ${got + i} is another one`);
    }
    got += size;
  }
}

async function writeUntilBroken(conn: Deno.Conn): Promise<void> {
  const bytes = new Uint8Array(1000);
  while (await conn.write(bytes).catch(endOrThrow) !== null);
}

function endOrThrow(error: unknown): null {
  if (isDisconnect(error)) return null;
  throw error;
}

interface Flow {
  /** How many bytes have left this program. */
  sent: number;
}

/** Sends repetitions of a block, until its end or the connection's. */
function flood(
  conn: Deno.Conn,
  block: Uint8Array,
  total: number,
): Flow & { done: Promise<void> } {
  const flow = { sent: 0, done: Promise.resolve() };
  const run = async () => {
    while (flow.sent < total) {
      flow.sent += await conn.write(block.subarray(flow.sent % block.length));
    }
    await conn.closeWrite();
  };
  flow.done = run().catch((error) => void endOrThrow(error));
  return flow;
}

/** Waits until nothing has left for a while. */
async function untilStalled(flow: Flow): Promise<void> {
  let last = -1;
  for (let same = 0; same < 8; same++) {
    await new Promise((resolve) => setTimeout(resolve, 25));
    if (flow.sent !== last) same = 0;
    last = flow.sent;
  }
}

/** A socket's line in the system's table, found by its two ports. */
async function socketLine(local: number, remote: number): Promise<string[]> {
  const hex = (port: number) =>
    port.toString(16).toUpperCase().padStart(4, "0");
  const lines = (await Deno.readTextFile("/proc/net/tcp")).split("\n")
    .map((line) => line.trim().split(/\s+/));
  const found = lines.find(([, from, to]) =>
    from?.endsWith(`:${hex(local)}`) && to?.endsWith(`:${hex(remote)}`)
  );
  assert(found, `no socket from ${local} to ${remote}`);
  return found;
}

/** How many bytes a socket has sent without an answer, and received unread. */
async function queuesOf(local: number, remote: number): Promise<number[]> {
  const [, , , , queues] = await socketLine(local, remote);
  return queues.split(":").map((each) => parseInt(each, 16));
}

async function peakMemory({ pid }: Cli): Promise<number> {
  const status = await Deno.readTextFile(`/proc/${pid}/status`);
  return Number(/^VmHWM:\s+(\d+) kB$/m.exec(status)![1]) * 1024;
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

/** An upstream that leaves it to the test what happens on its connections. */
class Silent implements AsyncDisposable {
  readonly address: string;
  readonly #listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  readonly #accepted: Deno.TcpConn[] = [];

  constructor() {
    this.address = `127.0.0.1:${this.#listener.addr.port}`;
  }

  async accept(): Promise<Deno.TcpConn> {
    const conn = await this.#listener.accept();
    this.#accepted.push(conn);
    return conn;
  }

  // deno-lint-ignore require-await
  async [Symbol.asyncDispose](): Promise<void> {
    for (const conn of this.#accepted) conn[Symbol.dispose]();
    this.#listener.close();
  }
}

/** Both ends of a connection through a proxy. */
class Ends implements AsyncDisposable {
  private constructor(
    readonly watched: WatchedProxy,
    readonly client: Deno.TcpConn,
    readonly upstream: Deno.TcpConn,
    readonly server: Silent,
  ) {}

  static async open(): Promise<Ends> {
    const server = new Silent();
    const watched = await WatchedProxy.to(server);
    const client = await watched.connect();
    return new Ends(watched, client, await server.accept(), server);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.client[Symbol.dispose]();
    await this.server[Symbol.asyncDispose]();
    await this.watched[Symbol.asyncDispose]();
  }
}

/** An end of a connection that can reset it, as Deno's own sockets cannot. */
class NodeEnd implements AsyncDisposable {
  /** The other side has ended its stream. */
  readonly ended: Promise<void>;
  readonly closed: Promise<void>;

  constructor(readonly socket: Socket, { reading = true } = {}) {
    this.ended = new Promise((resolve) => socket.once("end", resolve));
    this.closed = new Promise((resolve) =>
      socket.once("close", () => resolve())
    );
    socket.on("error", () => {}); // `close` follows
    if (reading) socket.resume();
  }

  static async connect(
    { proxy }: WatchedProxy,
    options?: { reading: boolean },
  ): Promise<NodeEnd> {
    const { localPort: port } = proxy.routes[0];
    const socket = connect({ port, host: "127.0.0.1", allowHalfOpen: true });
    await new Promise<void>((resolve) => socket.once("connect", resolve));
    return new NodeEnd(socket, options);
  }

  /** Sends repetitions of a block for as long as they are taken. */
  flood(block: Uint8Array): Flow {
    const flow = { sent: 0 };
    const next = () => {
      this.socket.write(block, (error) => {
        if (error) return;
        flow.sent += block.length;
        next();
      });
    };
    next();
    return flow;
  }

  reset(): Promise<void> {
    this.socket.resetAndDestroy();
    return this.closed;
  }

  [Symbol.asyncDispose](): Promise<void> {
    this.socket.destroy();
    return this.closed;
  }
}

/** An upstream that can reset its connections. */
class NodeUpstream implements AsyncDisposable {
  readonly #server = createServer({ allowHalfOpen: true });
  readonly #first: Promise<NodeEnd>;

  private constructor(options?: { reading: boolean }) {
    this.#first = new Promise((resolve) =>
      this.#server.once(
        "connection",
        (socket) => resolve(new NodeEnd(socket, options)),
      )
    );
  }

  static async listen(options?: { reading: boolean }): Promise<NodeUpstream> {
    const upstream = new NodeUpstream(options);
    await new Promise<void>((resolve) =>
      upstream.#server.listen(0, "127.0.0.1", resolve)
    );
    return upstream;
  }

  get address(): string {
    return `127.0.0.1:${(this.#server.address() as AddressInfo).port}`;
  }

  /** Its first connection. */
  accept(): Promise<NodeEnd> {
    return this.#first;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return new Promise((resolve) => this.#server.close(() => resolve()));
  }
}

for (const resettable of [false, true]) {
  const kind = resettable ? "Node's" : "Deno's";
  const options = { resettable };

  for (const side of ["client", "upstream"] as const) {
    Deno.test(`a connection is closed once the ${side} has ended its stream and nothing comes, on ${kind} sockets`, async () => {
      const halfCloseTimeoutMs = 300;
      await using upstream = new Silent();
      const route = { halfCloseTimeoutMs };
      await using watched = await WatchedProxy.to(upstream, route, {}, options);
      using client = await watched.connect();
      const peer = await upstream.accept();
      await send(client, "hello");
      await readExactly(peer, 5);
      await send(peer, "hello");
      await readExactly(client, 5);
      const start = performance.now();
      await (side === "client" ? client : peer).closeWrite();
      const [closed] = await watched.log.first("closed", 1);
      assertGreaterOrEqual(performance.now() - start, halfCloseTimeoutMs - 1);
      assertEquals(closed.why, side);
      const silent = side === "client" ? "upstream" : "client";
      assertEquals(closed.cause, `no byte from the ${silent} for 300 ms`);
      assertEquals(await readToEnd(client), 0);
      assertEquals(await readToEnd(peer), 0);
    });
  }

  Deno.test(`a half-closed connection stays while an answer comes, on ${kind} sockets`, async () => {
    await using upstream = new Silent();
    const toxics = [{
      type: "latency" as const,
      stream: "downstream" as const,
      attributes: { latency: 1500 },
    }];
    const route = { halfCloseTimeoutMs: 1000, toxics };
    await using watched = await WatchedProxy.to(upstream, route, {}, options);
    using client = await watched.connect();
    const peer = await upstream.accept();
    await client.closeWrite();
    await send(peer, "held longer than the timeout");
    assertEquals(
      text(await readExactly(client, 28)),
      "held longer than the timeout",
    );
    assertEquals(watched.log.of("closed"), []);
  });

  Deno.test(`both ends of a connection are kept alive, on ${kind} sockets`, {
    ignore: !IS_LINUX,
  }, async () => {
    await using upstream = new Silent();
    await using watched = await WatchedProxy.to(upstream, {}, {}, options);
    using client = await watched.connect();
    const peer = await upstream.accept();
    for (const { remoteAddr, localAddr } of [client, peer]) {
      const [ours, theirs] = [remoteAddr, localAddr] as Deno.NetAddr[];
      const [, , , , , timer] = await socketLine(ours.port, theirs.port);
      assertMatch(timer, /^02:/); // the one of keep-alive
    }
  });
}
