/** Toxics that come, change and go while connections are open. */

import {
  assert,
  assertEquals,
  assertGreater,
  assertGreaterOrEqual,
  assertRejects,
  assertThrows,
} from "@std/assert";
import {
  type ChaosProxy,
  decide,
  type RouteOptions,
  type ToxicOptions,
} from "../main.ts";
import {
  defined,
  echo,
  only,
  readAll,
  readExactly,
  readToEnd,
  send,
  soon,
  testBytes,
  text,
  unlessDisconnected,
  until,
  untilRefused,
  Upstream,
  WatchedProxy,
  writeAll,
} from "./helpers.ts";

const HOUR_MS = 3_600_000;
const BOTH = [false, true];
const STREAMS = ["upstream", "downstream"] as const;

/** A connection through a proxy to an echo, on a route called `r`. */
class Line implements AsyncDisposable {
  private constructor(
    readonly upstream: Upstream,
    readonly watched: WatchedProxy,
    readonly conn: Deno.TcpConn,
  ) {}

  /** Opens one on which bytes have gone to and fro, so that it is idle. */
  static async open(resettable: boolean): Promise<Line> {
    const upstream = echo();
    const watched = await watch(resettable, upstream);
    const line = new Line(upstream, watched, await watched.connect());
    await line.ask("hello");
    return line;
  }

  get proxy(): ChaosProxy {
    return this.watched.proxy;
  }

  async ask(question: string): Promise<void> {
    await send(this.conn, question);
    assertEquals(text(await readExactly(this.conn, question.length)), question);
  }

  /** Adds a toxic, and returns its name. */
  add(
    type: ToxicOptions["type"],
    attributes: ToxicOptions["attributes"] = {},
    rest: Partial<ToxicOptions> = {},
  ): string {
    return this.proxy.addToxic("r", { type, attributes, ...rest }).name;
  }

  update(name: string, attributes: Record<string, number>) {
    return this.proxy.updateToxic("r", name, { attributes });
  }

  remove(name: string): void {
    this.proxy.removeToxic("r", name);
  }

  /** Sends bytes, and waits until the proxy has those that come back. */
  async fill(bytes: Uint8Array): Promise<void> {
    const { bytesDown } = only(this.proxy.liveConnections());
    await writeAll(this.conn, bytes);
    await untilCarried(this.proxy, "bytesDown", bytesDown + bytes.length);
  }

  /** That it ends without any data, closed by a toxic. */
  async assertClosedBy(toxic: string): Promise<void> {
    assertEquals(await readToEnd(this.conn), 0);
    await this.assertEnded("fault", toxic);
  }

  /** Why it was closed, and by which toxic; its client leaves, too. */
  async assertEnded(expectedWhy: string, expectedToxic?: string) {
    await this.conn.closeWrite().catch(unlessDisconnected);
    const [{ why, toxic }] = await this.watched.log.first("closed", 1);
    assertEquals([why, toxic], [expectedWhy, expectedToxic]);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.conn.close();
    await this.proxy.stop();
    await this.upstream[Symbol.asyncDispose]();
  }
}

/** Waits until the proxy has read so much, on its first connection or another. */
async function untilCarried(
  proxy: ChaosProxy,
  direction: "bytesUp" | "bytesDown",
  bytes: number,
  index = 0,
): Promise<void> {
  const live = () => defined(proxy.liveConnections()[index]);
  await until(() => live()[direction] >= bytes, `${direction} ${bytes}`);
}

function pause(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}

/** Lets other things happen, so many times. */
async function turns(count = 1): Promise<void> {
  for (let i = 0; i < count; i++) await pause(1);
}

/** Fails if anything comes while a good many turns go by. */
async function assertSilent(conn: Deno.TcpConn): Promise<void> {
  const came = conn.read(new Uint8Array(1)).then(() => true, () => true);
  const silent = turns(30).then(() => false);
  assert(!await Promise.race([came, silent]), "something has come");
}

function assertSince(start: number, ms: number): void {
  assertGreaterOrEqual(performance.now() - start, ms);
}

/** Starts a proxy to an upstream, on a route called `r`. */
function watch(
  resettable: boolean,
  upstream: { address: string },
  route: Partial<RouteOptions> = {},
  seed = 1,
): Promise<WatchedProxy> {
  const named = { name: "r", ...route };
  return WatchedProxy.to(upstream, named, { seed }, { resettable });
}

/** The ways in which a toxic comes to act no more. */
const WAYS_TO_GO: Record<
  string,
  (proxy: ChaosProxy, name: string, none: Partial<ToxicOptions>) => unknown
> = {
  removed: (proxy, name) => proxy.removeToxic("r", name),
  changed: (proxy, name, none) => proxy.updateToxic("r", name, none),
  reset: (proxy) => proxy.reset(),
};

for (const resettable of BOTH) {
  const own = {
    test(name: string, fn: () => Promise<void>): void {
      const kind = resettable ? "Node's" : "Deno's";
      const run = () => soon(fn(), "end of it");
      Deno.test(`${name}, on ${kind} sockets`, run);
    },
  };
  const test = (name: string, fn: (line: Line) => Promise<void>) =>
    own.test(name, async () => {
      await using line = await Line.open(resettable);
      await fn(line);
    });

  test("a latency acts on an idle connection as soon as it is added", async (line) => {
    const name = line.add("latency", { latency: 120 });
    const start = performance.now();
    await line.ask("later");
    assertSince(start, 119);
    assertEquals(only(line.proxy.liveConnections()).toxics, [name]);
  });

  for (
    const [type, attribute] of [
      ["latency", "latency"],
      ["slow_close", "delay"],
      ["reset_peer", "timeout"],
    ] as const
  ) {
    for (const stream of STREAMS) {
      for (const [how, go] of Object.entries(WAYS_TO_GO)) {
        if (type === "reset_peer" && (!resettable || how === "changed")) {
          continue;
        }
        test(`what a ${type} holds ${stream} is released when it is ${how}`, async (line) => {
          const name = line.add(type, { [attribute]: HOUR_MS }, { stream });
          const bytes = testBytes(100_001);
          await writeAll(line.conn, bytes);
          await line.conn.closeWrite();
          const direction = stream === "upstream" ? "bytesUp" : "bytesDown";
          await untilCarried(line.proxy, direction, 5 + bytes.length);
          await go(line.proxy, name, { attributes: { [attribute]: 0 } });
          assertEquals(await readAll(line.conn), bytes);
          await line.assertEnded("client");
        });
      }
    }
  }

  test("a changed latency counts from when the data came", async (line) => {
    const name = line.add("latency", { latency: HOUR_MS });
    const start = performance.now();
    await line.fill(testBytes(1));
    // However often it changes, and however long: it counts from the first.
    for (let i = 0; i < 20; i++) {
      line.update(name, { latency: HOUR_MS - i });
      await turns();
    }
    line.update(name, { latency: 200 });
    await readExactly(line.conn, 1);
    assertSince(start, 199);
  });

  test("changes hundreds of times a second do not keep what is held", async (line) => {
    const name = line.add("bandwidth", { rate: 10 });
    line.add("slicer", { average_size: 50, delay: 500 });
    line.add("latency", { latency: 30 });
    const bytes = testBytes(2000);
    let done = false;
    const got = readExactly(line.conn, bytes.length).finally(() => done = true);
    await writeAll(line.conn, bytes);
    let changes = 0;
    while (!done) {
      line.update(name, { rate: 10 + changes++ % 2 });
      line.update("slicer_downstream", { average_size: 50 + changes % 3 });
      line.update("latency_downstream", { latency: 30 + changes % 2 });
      await turns();
    }
    assertEquals(await got, bytes);
    assertGreater(changes, 10);
  });

  test("a bandwidth's new rate is that of what it holds", async (line) => {
    const name = line.add("bandwidth", { rate: 1 });
    const bytes = testBytes(300_001);
    await line.fill(bytes);
    const start = performance.now();
    line.update(name, { rate: 1000 });
    assertEquals(await readExactly(line.conn, bytes.length), bytes);
    assertSince(start, 250); // 300 of it are left
    await line.ask("and goes on");
    line.update(name, { rate: 0 });
    const held = readExactly(line.conn, bytes.length);
    await line.fill(bytes);
    const changed = performance.now();
    line.update(name, { rate: 1000 });
    assertEquals(await held, bytes);
    assertSince(changed, 295); // from now on
  });

  for (
    const [title, type, attribute, times] of [
      ["a timeout closes an idle connection", "timeout", "timeout", [120]],
      ["a timeout's new time", "timeout", "timeout", [0, HOUR_MS, 0, 120]],
      ["a limit_time put forward", "limit_time", "time", [
        HOUR_MS,
        120,
      ]],
    ] as const
  ) {
    test(`${title}: it counts from when it was added`, async (line) => {
      const start = performance.now();
      const name = line.add(type, { [attribute]: times[0] });
      for (const time of times.slice(1)) {
        line.update(name, { [attribute]: time });
      }
      await line.assertClosedBy(name);
      assertSince(start, 119);
    });
  }

  for (const stream of STREAMS) {
    for (const [how, go] of Object.entries(WAYS_TO_GO)) {
      own.test(`a timeout that is ${how} closes where it acted ${stream}, with or without data`, async () => {
        const ends: Promise<number>[] = [];
        await using upstream = new Upstream(async (conn) => {
          await writeAll(conn, await readExactly(conn, 1));
          ends.push(readToEnd(conn));
          await ends.at(-1);
        });
        await using watched = await watch(resettable, upstream, {}, 3);
        const { proxy, log } = watched;
        const count = 12;
        const conns: Deno.TcpConn[] = [];
        for (let i = 0; i < count; i++) {
          const conn = await watched.connect();
          await send(conn, "x");
          await readExactly(conn, 1);
          conns.push(conn);
        }
        const toxic = { type: "timeout", stream, toxicity: 0.5 } as const;
        const { name } = proxy.addToxic("r", toxic);
        const acted = proxy.liveConnections().map(({ toxics }) =>
          toxics.length > 0
        );
        const affected = acted.filter(Boolean).length;
        assert(affected > 1 && affected < count, `${acted}`);
        // One of those that it acts on loses data by it.
        const loser = acted.indexOf(true);
        await send(defined(conns[loser]), "lost");
        await untilCarried(proxy, "bytesUp", 5, loser);
        await go(proxy, name, { toxicity: 0 });
        for (const { why, toxic } of await log.first("closed", affected)) {
          assertEquals([why, toxic], ["fault", name]);
        }
        for (const [i, conn] of conns.entries()) {
          if (!acted[i]) continue;
          assertEquals(await readToEnd(conn), 0);
          await ends[i];
        }
        assertEquals(proxy.connections, count - affected);
        for (const conn of conns) conn.close();
        await log.first("closed", count);
      });
    }
  }

  test("a removed timeout closes also a connection whose end it held back", async (line) => {
    const attributes = { timeout: HOUR_MS };
    const name = line.add("timeout", attributes, { stream: "upstream" });
    await line.conn.closeWrite();
    await assertSilent(line.conn);
    line.remove(name);
    await line.assertClosedBy(name);
  });

  test("a limit_data that is removed limits nothing, and one below what has passed closes", async (line) => {
    const gone = line.add("limit_data", { bytes: 100 });
    await line.ask("x".repeat(60));
    line.remove(gone);
    await line.ask("x".repeat(60));
    const name = line.add("limit_data", { bytes: 100 });
    await line.ask("y".repeat(60));
    line.update(name, { bytes: 60 });
    await line.assertClosedBy(name);
  });

  test("a limit_time that is removed or put off ends nothing", async (line) => {
    const name = line.add("limit_time", { time: 40 });
    line.update(name, { time: HOUR_MS });
    line.remove(line.add("limit_time", { time: 40 }, { name: "gone" }));
    await pause(100);
    await line.ask("still there");
  });

  test("toxics act in the order in which they came", async (line) => {
    line.add("limit_data", { bytes: 4 }, { name: "limit" });
    line.add("latency", { latency: HOUR_MS }, { name: "late" });
    line.add("slicer", { average_size: 2 }, { name: "cut" });
    const names = () => line.proxy.route("r").toxics.map(({ name }) => name);
    assertEquals(names(), ["limit", "late", "cut"]);
    await line.fill(new TextEncoder().encode("123456"));
    line.remove("late"); // behind which the limit's close waits
    assertEquals(text(await readAll(line.conn)), "1234");
    await line.assertEnded("fault", "limit");
    assertEquals(names(), ["limit", "cut"]);
  });

  test("a toxic that begins to act does so in its place", async (line) => {
    const name = line.add("limit_data", { bytes: 4 }, { toxicity: 0 });
    line.add("packet_loss", { loss_rate: 1 });
    line.proxy.updateToxic("r", name, { toxicity: 1 });
    await send(line.conn, "123456"); // all of which the other would lose first
    await line.assertClosedBy(name);
  });

  test("what is overdue by a new latency keeps to the limits behind it", async (line) => {
    const name = line.add("latency", { latency: HOUR_MS });
    line.add("bandwidth", { rate: 100 });
    const bytes = testBytes(40_000);
    await line.fill(bytes);
    await pause(300); // overdue so long
    const start = performance.now();
    line.update(name, { latency: 0 });
    assertEquals(await readExactly(line.conn, bytes.length), bytes);
    assertSince(start, 390);
  });

  own.test("a removed timeout also closes a connection whose side had ended", async () => {
    const ended = Promise.withResolvers<void>();
    const closed = Promise.withResolvers<void>();
    await using upstream = new Upstream(async (conn) => {
      assertEquals(await readToEnd(conn), 0);
      ended.resolve();
      await closed.promise;
    });
    const toxics = [{ type: "timeout", stream: "upstream" }] as const;
    await using watched = await watch(resettable, upstream, { toxics });
    using conn = await watched.connect();
    await send(conn, "lost");
    await conn.closeWrite();
    await ended.promise;
    watched.proxy.removeToxic("r", "timeout_upstream");
    assertEquals(await readToEnd(conn), 0);
    const [{ why, toxic }] = await watched.log.first("closed", 1);
    closed.resolve();
    assertEquals([why, toxic], ["fault", "timeout_upstream"]);
  });

  for (const how of ["cut", "left", "removed"] as const) {
    own.test(`a limit that closes over a reader that does not read is ${how}`, async () => {
      using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
      const address = `127.0.0.1:${listener.addr.port}`;
      await using watched = await watch(resettable, { address });
      const { proxy } = watched;
      using conn = await watched.connect();
      const reader = await listener.accept();
      await watched.log.first("connected", 1);
      const line = { stream: "upstream" } as const;
      const late = {
        type: "latency",
        attributes: { latency: HOUR_MS },
      } as const;
      const { name } = proxy.addToxic("r", { ...late, ...line });
      const attributes = { bytes: 15_000_000 };
      proxy.addToxic("r", { type: "limit_data", attributes, ...line });
      const bytes = testBytes(16_000_000);
      await writeAll(conn, bytes);
      await untilCarried(proxy, "bytesUp", bytes.length);
      proxy.removeToxic("r", name); // more is released than the system buffers
      await turns();
      if (how === "cut") proxy.cutConnection(only(proxy.liveConnections()).id);
      else if (how === "removed") await proxy.removeRoute("r");
      reader.close();
      await watched.log.first("closed", 1);
      await proxy.stop();
    });
  }

  own.test("connections that end in all ways at once all end", async () => {
    await using upstream = new Upstream(async (conn) => {
      for (;;) await writeAll(conn, testBytes(2000));
    });
    await using watched = await watch(resettable, upstream, {
      toxics: [
        { type: "limit_data", stream: "upstream", attributes: { bytes: 10 } },
        { type: "timeout" },
      ],
    });
    const count = 120;
    await Promise.all(Array.from({ length: count }, async (_, i) => {
      await turns(i % 40);
      using conn = await watched.connect();
      await turns();
      await send(conn, "x".repeat(20)).catch(unlessDisconnected);
      await readToEnd(conn);
    }));
    await watched.log.first("closed", count);
  });

  test("data behind a toxic that is added stays in order", async (line) => {
    line.add("latency", { latency: 60 }, { name: "a" });
    const bytes = testBytes(90_000);
    const got = readExactly(line.conn, bytes.length);
    const moves = [
      () => line.add("latency", {}, { name: "b" }),
      () => line.update("b", { latency: 40 }),
      () => line.add("bandwidth", { rate: 5000 }),
      () => line.remove("a"),
      () => line.update("b", { latency: 1 }),
      () => line.remove("bandwidth_downstream"),
    ];
    for (const [i, move] of moves.entries()) {
      await line.fill(bytes.subarray(i * 15_000, (i + 1) * 15_000));
      move();
    }
    assertEquals(await got, bytes);
  });

  own.test("a toxicity of some acts on those that the seed says, at any time", async () => {
    await using upstream = echo();
    await using watched = await watch(resettable, upstream, {}, 3);
    const { proxy } = watched;
    const conns = await Promise.all(
      Array.from({ length: 20 }, () => watched.connect()),
    );
    await watched.log.first("connected", 20);
    const acting = () =>
      proxy.liveConnections().filter(({ toxics }) => toxics.length > 0)
        .map(({ number }) => number);
    const foretold = (toxicity: number, name = "latency_downstream") => {
      const type = "latency" as const;
      const toxic = { type, stream: "downstream" as const, attributes: {} };
      const toxics = [{ ...toxic, name, toxicity }];
      return proxy.liveConnections().map(({ number }) => number)
        .filter((number) => {
          const fate = decide(3, { ...proxy.route("r"), toxics }, number);
          return fate.kind === "forward" && fate.toxics.length > 0;
        });
    };
    const toxic: ToxicOptions = { type: "latency", toxicity: 0.5 };
    const { name } = proxy.addToxic("r", toxic);
    const half = acting();
    assertEquals(half, foretold(0.5));
    assert(half.length > 0 && half.length < 20, `${half}`);
    proxy.updateToxic("r", name, { toxicity: 0.8 });
    assertEquals(acting(), foretold(0.8));
    assert(half.every((each) => acting().includes(each)));
    proxy.updateToxic("r", name, { toxicity: 0 });
    assertEquals(acting(), []);
    proxy.updateToxic("r", name, { toxicity: 1 });
    assertEquals(acting().length, 20);
    proxy.removeToxic("r", name);
    // Other toxics, and the order in which they come, make no difference.
    proxy.addToxic("r", { ...toxic, name: "other" });
    assertEquals(acting(), foretold(0.5, "other"));
    proxy.removeToxic("r", "other");
    proxy.addToxic("r", toxic);
    assertEquals(acting(), half);
    for (const conn of conns) conn.close();
  });

  test("toxics of one direction leave the other alone", async (line) => {
    line.add("timeout", {}, { stream: "upstream" });
    await send(line.conn, "x");
    await untilCarried(line.proxy, "bytesUp", 6);
    await assertSilent(line.conn);
    const { received } = only(line.proxy.stats());
    assertEquals(received, { upstream: 6, downstream: 5 });
  });

  own.test("toxics change in a storm under traffic that is checked byte by byte", async () => {
    await using upstream = echo();
    await using watched = await watch(resettable, upstream);
    const { proxy } = watched;
    let over = false;
    const traffic = Array.from({ length: 6 }, async (_, lane) => {
      let carried = 0;
      for (let round = 0; !over; round++) {
        using conn = await watched.connect();
        const bytes = testBytes(1 + (round * 77_777) % 400_000, lane + 1);
        const sending = writeAll(conn, bytes).then(() => conn.closeWrite());
        const [, got] = await Promise.all([sending, readAll(conn)]);
        assertEquals(got.length, bytes.length);
        assertEquals(got, bytes);
        carried += bytes.length;
      }
      return carried;
    });
    // None of these loses or changes anything, whatever it is changed to.
    type Change = [ToxicOptions["type"], ToxicOptions["attributes"]];
    const kinds: ((i: number) => Change)[] = [
      (i) => ["latency", { latency: i % 20, jitter: i % 7 }],
      (i) => ["bandwidth", { rate: (i % 9) * 3000 }],
      (i) => [
        "slicer",
        { average_size: 500 + i, size_variation: i, delay: i % 50 },
      ],
      (i) => ["slow_close", { delay: i % 15 }],
      () => ["limit_data", { bytes: 1e12 }],
      (i) => ["limit_time", { time: HOUR_MS + i }],
      () => ["corrupt", { rate: 0 }],
      () => ["packet_loss", { loss_rate: 0 }],
    ];
    // It holds all until it is removed in the next moment but one.
    if (resettable) kinds.push(() => ["reset_peer", { timeout: HOUR_MS }]);
    const storm = async (stream: typeof STREAMS[number]) => {
      for (let i = 0; i < 500; i++) {
        const [type, attributes] = defined(kinds[i % kinds.length])(i);
        const name = `${type}_${stream}`;
        const isThere = () =>
          proxy.route("r").toxics.some((each) => each.name === name);
        const holdsAll = type === "reset_peer";
        if (!isThere()) {
          const toxicity = i % 3 === 0 ? 0.5 : 1;
          proxy.addToxic("r", { type, stream, attributes, toxicity });
          if (holdsAll) await turns();
          if (holdsAll && isThere()) proxy.removeToxic("r", name);
        } else if (i % 2 === 0 && !holdsAll) {
          proxy.updateToxic("r", name, { toxicity: (i % 5) / 4, attributes });
        } else proxy.removeToxic("r", name);
        if (i % 97 === 0) await proxy.reset();
        await turns();
      }
    };
    await Promise.all(STREAMS.map(storm));
    await proxy.reset();
    over = true;
    const carried = (await Promise.all(traffic)).reduce((a, b) => a + b);
    const closed = watched.log.of("closed");
    assert(closed.every(({ why }) => why === "client"), JSON.stringify(closed));
    assertGreater(carried, 0);
  });

  for (const end of ["stop", "drain"] as const) {
    own.test(`changes race with a ${end}, and harm nothing`, async () => {
      await using upstream = echo();
      const { address } = upstream;
      for (let round = 0; round < 5; round++) {
        const watched = await watch(resettable, upstream);
        const { proxy } = watched;
        const conns = await Promise.all(
          Array.from({ length: 5 }, () => watched.connect()),
        );
        const flows = conns.map(async (conn) => {
          const bytes = testBytes(50_000);
          for (let got: Uint8Array = bytes; got.length === bytes.length;) {
            await writeAll(conn, bytes);
            got = await readExactly(conn, bytes.length);
            assertEquals(got, bytes.subarray(0, got.length));
          }
        });
        const settled = Promise.all(
          flows.map((flow) => flow.catch(unlessDisconnected)),
        );
        await watched.log.first("connected", 5);
        let over = false;
        const storm = (async () => {
          for (let i = 0; !over; i++) {
            const attributes = { latency: i % 4 };
            const toxic = { type: "latency", attributes } as const;
            const { name } = proxy.addToxic("r", toxic);
            await turns();
            proxy.removeToxic("r", name);
            const extra = {
              name: `extra${i}`,
              localPort: 0,
              upstream: address,
            };
            for (
              const change of [
                proxy.reset(),
                proxy.addRoute(extra),
                proxy.updateRoute("r", { upstream: address }),
              ]
            ) {
              await Promise.resolve(change).catch((error) =>
                assert(error instanceof Deno.errors.BadResource, `${error}`)
              );
            }
          }
        })();
        await turns(round * 3);
        await (end === "stop" ? proxy.stop() : proxy.drain(30));
        over = true;
        await Promise.all([storm, settled]);
        assertEquals(proxy.connections, 0);
        for (const conn of conns) conn.close();
        for (const { localPort } of proxy.routes) await untilRefused(localPort);
      }
    });
  }
}

for (const [first, ...changes] of [[80], [HOUR_MS, 100]] as const) {
  const title = changes.length > 0 ? "so changed" : "added";
  Deno.test(`a reset_peer that is ${title} resets, counting from the first data`, async () => {
    await using line = await Line.open(true);
    const name = line.add("reset_peer", { timeout: first });
    const start = performance.now();
    await send(line.conn, "x");
    for (const timeout of changes) {
      await untilCarried(line.proxy, "bytesDown", 6);
      line.update(name, { timeout });
    }
    await assertRejects(() => readAll(line.conn), Deno.errors.ConnectionReset);
    assertSince(start, (changes.at(-1) ?? first) - 1);
    await line.assertEnded("fault", name);
  });
}

Deno.test("a reset_peer is refused where it could not reset", async () => {
  await using line = await Line.open(false);
  const { proxy } = line;
  const refused = (call: () => unknown) =>
    assertThrows(call, Deno.errors.NotSupported).message;
  assertEquals(
    refused(() => line.add("reset_peer")),
    "route r: its connections cannot be reset; " +
      "start the proxy with resettable: true",
  );
  const name = line.add("reset_peer", {}, { toxicity: 0 });
  refused(() => proxy.updateToxic("r", name, { toxicity: 1 }));
  const { id } = only(proxy.liveConnections());
  refused(() => proxy.cutConnection(id, "reset"));
  await line.ask("none of which has done anything");
});

Deno.test("toxics that act while the upstream is dialled are those of then", async () => {
  await using upstream = echo();
  const route: Partial<RouteOptions> = {
    latencyMs: 50,
    toxics: [{ type: "timeout" }],
  };
  await using watched = await watch(false, upstream, route);
  using conn = await watched.connect();
  await watched.log.first("delayed", 1);
  watched.proxy.removeToxic("r", "timeout_downstream");
  watched.proxy.addToxic("r", { type: "latency", name: "new" });
  const [connected] = await watched.log.first("connected", 1);
  assertEquals(connected.toxics, ["new"]);
  await send(conn, "x");
  assertEquals(text(await readExactly(conn, 1)), "x");
});

Deno.test("a connection that is never answered is left alone by toxics", async () => {
  await using upstream = echo();
  await using watched = await watch(false, upstream, { timeoutRate: 1 });
  using conn = await watched.connect();
  await watched.log.first("timed_out", 1);
  watched.proxy.addToxic("r", { type: "limit_time", attributes: { time: 1 } });
  await assertSilent(conn);
  assertEquals(only(watched.proxy.liveConnections()).toxics, []);
  assertEquals(watched.log.of("closed"), []);
});

Deno.test("a sender that waits for room goes on when the toxic goes", async () => {
  let got = 0;
  const all = 100 << 20;
  const ended = Promise.withResolvers<void>();
  await using upstream = new Upstream(async (conn) => {
    const buffer = new Uint8Array(1 << 18);
    for (let size; (size = await conn.read(buffer)) !== null;) got += size;
    ended.resolve();
  });
  await using watched = await watch(false, upstream);
  using conn = await watched.connect();
  await watched.log.first("connected", 1);
  const { proxy } = watched;
  const { name } = proxy.addToxic("r", {
    type: "latency",
    stream: "upstream",
    attributes: { latency: HOUR_MS },
  });
  const block = testBytes(1 << 20);
  let sent = 0;
  const sending = (async () => {
    for (; sent < all; sent += block.length) await writeAll(conn, block);
    await conn.closeWrite();
  })();
  for (let last = -1, same = 0; same < 20 && sent < all;) {
    await pause(10);
    same = sent === last ? same + 1 : 0;
    last = sent;
  }
  assert(sent < all, "nothing held the sender up");
  assertEquals(got, 0);
  proxy.removeToxic("r", name);
  await soon(Promise.all([sending, ended.promise]), "room");
  assertEquals(got, all);
});

Deno.test("a toxic is not found, or is there already, in so many words", async () => {
  await using line = await Line.open(false);
  const { proxy } = line;
  const name = line.add("latency");
  const update = (options: unknown) =>
    proxy.updateToxic("r", name, options as Partial<ToxicOptions>);
  const refused: [() => unknown, string][] = [
    [() => line.add("latency"), `route r has a toxic ${name} already`],
    [() => line.remove("x"), "route r has no toxic x"],
    [() => line.update("x", {}), "route r has no toxic x"],
    [() => proxy.addToxic("x", { type: "latency" }), "there is no route x"],
    [
      () => line.add("latensy" as "latency"),
      "toxic: type: expected latency or bandwidth",
    ],
    [
      () => line.update(name, { latensy: 1 }),
      "toxic: attributes.latensy: unknown key; did you mean latency?",
    ],
    [
      () => update({ toxicity: 2 }),
      "toxic: toxicity: expected a number from 0 to 1, found 2",
    ],
    [() => update({ type: "timeout" }), "toxic: type: unknown key"],
    [() => proxy.cutConnection(99), "there is no connection 99"],
    [() => proxy.reseed(-1), "seed: expected an integer from 0"],
  ];
  for (const [call, message] of refused) {
    const error = assertThrows(call, Error);
    assert(error.message.startsWith(message), error.message);
  }
  assertEquals(proxy.route("r").toxics.map(({ name }) => name), [name]);
  await line.ask("which has cost nobody anything");
});
