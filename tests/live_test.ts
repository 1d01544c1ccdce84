/** Toxics that come, change and go while connections are open. */

import {
  assert,
  assertEquals,
  assertGreater,
  assertGreaterOrEqual,
  assertRejects,
  assertThrows,
} from "@std/assert";
import { decide, type RouteOptions, type ToxicOptions } from "../main.ts";
import {
  echo,
  isDisconnect,
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

/** A connection through a proxy to an echo, on a route called `r`. */
class Line implements AsyncDisposable {
  private constructor(
    readonly upstream: Upstream,
    readonly watched: WatchedProxy,
    readonly conn: Deno.TcpConn,
  ) {}

  /** Opens one on which bytes have gone to and fro, so that it is idle. */
  static async open(
    resettable: boolean,
    route: Partial<RouteOptions> = {},
  ): Promise<Line> {
    const upstream = echo();
    const watched = await WatchedProxy.to(
      upstream,
      { name: "r", ...route },
      {},
      { resettable },
    );
    const line = new Line(upstream, watched, await watched.connect());
    if (route.toxics === undefined) await line.ask("hello");
    else await watched.log.first("connected", 1);
    return line;
  }

  async ask(question: string): Promise<void> {
    await send(this.conn, question);
    assertEquals(text(await readExactly(this.conn, question.length)), question);
  }

  add(options: ToxicOptions) {
    return this.watched.proxy.addToxic("r", options);
  }

  update(name: string, attributes: Record<string, number>) {
    return this.watched.proxy.updateToxic("r", name, { attributes });
  }

  remove(name: string): void {
    this.watched.proxy.removeToxic("r", name);
  }

  /** Why it was closed, and by which toxic; its client leaves, too. */
  async ended(): Promise<unknown[]> {
    await this.conn.closeWrite().catch(unlessDisconnected);
    const [{ why, toxic }] = await this.watched.log.first("closed", 1);
    return [why, toxic];
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.conn.close();
    await this.watched.proxy.stop();
    await this.upstream[Symbol.asyncDispose]();
  }
}

/** Waits until the proxy has read so much from the client. */
async function untilRead({ watched }: Line, bytes: number): Promise<void> {
  await until(
    () => watched.proxy.liveConnections()[0].bytesUp >= bytes,
    `${bytes} bytes read`,
  );
}

/** Waits until so much of the upstream has come, if the proxy holds it. */
async function untilAnswered({ watched }: Line, bytes: number): Promise<void> {
  await until(
    () => watched.proxy.liveConnections()[0].bytesDown >= bytes,
    `${bytes} bytes answered`,
  );
}

function turn(): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, 1));
}

/** Fails if anything comes while a good many turns go by. */
async function assertSilent(conn: Deno.TcpConn): Promise<void> {
  const came = conn.read(new Uint8Array(1)).then(() => true, () => true);
  const turns = (async () => {
    for (let i = 0; i < 30; i++) await turn();
    return false;
  })();
  assert(!await Promise.race([came, turns]), "something has come");
}

for (const resettable of BOTH) {
  const test = (name: string, fn: () => Promise<void>) =>
    Deno.test(
      `${name}, on ${resettable ? "Node's" : "Deno's"} sockets`,
      () => soon(fn(), "end of it"),
    );

  test("a latency acts on an idle connection as soon as it is added", async () => {
    await using line = await Line.open(resettable);
    const { name } = line.add({
      type: "latency",
      attributes: { latency: 120 },
    });
    const start = performance.now();
    await line.ask("later");
    assertGreaterOrEqual(performance.now() - start, 119);
    assertEquals(line.watched.proxy.liveConnections()[0].toxics, [name]);
  });

  for (const type of ["latency", "slow_close"] as const) {
    const attributes: Record<string, number> = type === "latency"
      ? { latency: HOUR_MS }
      : { delay: HOUR_MS };
    const none: Record<string, number> = type === "latency"
      ? { latency: 0 }
      : { delay: 0 };
    for (const stream of ["upstream", "downstream"] as const) {
      for (const how of ["removed", "changed", "reset"] as const) {
        test(`what a ${type} holds ${stream} is let go when it is ${how}`, async () => {
          await using line = await Line.open(resettable);
          const { name } = line.add({ type, stream, attributes });
          const bytes = testBytes(100_001);
          await writeAll(line.conn, bytes);
          await line.conn.closeWrite();
          await untilRead(line, 5 + bytes.length);
          if (stream === "downstream") {
            await untilAnswered(line, 5 + bytes.length);
          }
          if (how === "removed") line.remove(name);
          else if (how === "changed") line.update(name, none);
          else await line.watched.proxy.reset();
          assertEquals(await readAll(line.conn), bytes);
          assertEquals(await line.ended(), ["client", undefined]);
        });
      }
    }
  }

  test("a changed latency counts from when the data came", async () => {
    await using line = await Line.open(resettable);
    const { name } = line.add({
      type: "latency",
      attributes: { latency: HOUR_MS },
    });
    const start = performance.now();
    await send(line.conn, "x");
    await untilAnswered(line, 6);
    // However often it changes, and however long: it counts from the first.
    for (let i = 0; i < 20; i++) {
      line.update(name, { latency: HOUR_MS - i });
      await turn();
    }
    line.update(name, { latency: 200 });
    await readExactly(line.conn, 1);
    assertGreaterOrEqual(performance.now() - start, 199);
  });

  test("changes hundreds of times a second do not keep what is held", async () => {
    await using line = await Line.open(resettable);
    const attributes = { rate: 10 };
    const { name } = line.add({ type: "bandwidth", attributes });
    line.add({ type: "slicer", attributes: { average_size: 50, delay: 500 } });
    line.add({ type: "latency", attributes: { latency: 30 } });
    const bytes = testBytes(2000);
    let done = false;
    const got = readExactly(line.conn, bytes.length).finally(() => done = true);
    await writeAll(line.conn, bytes);
    let changes = 0;
    while (!done) {
      line.update(name, { rate: 10 + changes++ % 2 });
      line.update("slicer_downstream", { average_size: 50 + changes % 3 });
      line.update("latency_downstream", { latency: 30 + changes % 2 });
      await turn();
    }
    assertEquals(await got, bytes);
    assertGreater(changes, 10);
  });

  test("a bandwidth's new rate is that of what it holds", async () => {
    await using line = await Line.open(resettable);
    const { name } = line.add({ type: "bandwidth", attributes: { rate: 1 } });
    const bytes = testBytes(300_001);
    await writeAll(line.conn, bytes);
    await untilAnswered(line, 5 + bytes.length);
    const start = performance.now();
    line.update(name, { rate: 1000 });
    assertEquals(await readExactly(line.conn, bytes.length), bytes);
    assertGreaterOrEqual(performance.now() - start, 250); // 300 of it are left
    await line.ask("and goes on");
    line.update(name, { rate: 0 });
    const held = readExactly(line.conn, bytes.length);
    await writeAll(line.conn, bytes);
    await untilAnswered(line, 16 + 2 * bytes.length);
    const changed = performance.now();
    line.update(name, { rate: 1000 });
    assertEquals(await held, bytes);
    assertGreaterOrEqual(performance.now() - changed, 295); // from now on
  });

  test("a slicer's new sizes and pauses are those of what it holds", async () => {
    await using line = await Line.open(resettable);
    const { name } = line.add({
      type: "slicer",
      attributes: { average_size: 100, delay: 1_000_000_000 },
    });
    const bytes = testBytes(1000);
    await writeAll(line.conn, bytes);
    assertEquals(
      await readExactly(line.conn, 100),
      bytes.subarray(0, 100),
    );
    await untilAnswered(line, 5 + bytes.length);
    const start = performance.now();
    line.update(name, { average_size: 90, delay: 10_000 });
    assertEquals(await readExactly(line.conn, 900), bytes.subarray(100));
    assertGreaterOrEqual(performance.now() - start, 80);
  });

  test("a timeout closes an idle connection, so long after it was added", async () => {
    await using line = await Line.open(resettable);
    const start = performance.now();
    const { name } = line.add({
      type: "timeout",
      attributes: { timeout: 120 },
    });
    assertEquals(await readToEnd(line.conn), 0);
    assertGreaterOrEqual(performance.now() - start, 119);
    assertEquals(await line.ended(), ["fault", name]);
  });

  for (const stream of ["upstream", "downstream"] as const) {
    for (const how of ["removed", "changed", "reset"] as const) {
      test(`a timeout that is ${how} closes where it acted ${stream}, with or without data`, async () => {
        const ends: Promise<number>[] = [];
        await using upstream = new Upstream(async (conn) => {
          await writeAll(conn, await readExactly(conn, 1));
          ends.push(readToEnd(conn));
          await ends.at(-1);
        });
        await using watched = await WatchedProxy.to(
          upstream,
          { name: "r" },
          { seed: 3 },
          { resettable },
        );
        const { proxy, log } = watched;
        const count = 12;
        const conns: Deno.TcpConn[] = [];
        for (let i = 0; i < count; i++) {
          const conn = await watched.connect();
          await send(conn, "x");
          await readExactly(conn, 1);
          conns.push(conn);
        }
        const { name } = proxy.addToxic("r", {
          ...{ type: "timeout", stream, toxicity: 0.5 },
        });
        const acted = proxy.liveConnections().map(({ toxics }) =>
          toxics.length > 0
        );
        assert(acted.includes(false) && acted.filter(Boolean).length > 1);
        // One of those that it acts on loses data by it.
        await send(conns[acted.indexOf(true)], "lost");
        await until(
          () => proxy.liveConnections()[acted.indexOf(true)].bytesUp === 5,
          "the data read",
        );
        if (how === "removed") proxy.removeToxic("r", name);
        else if (how === "changed") {
          proxy.updateToxic("r", name, { toxicity: 0 });
        } else await proxy.reset();
        const closed = await log.first("closed", acted.filter(Boolean).length);
        for (const [i, conn] of conns.entries()) {
          if (acted[i]) {
            assertEquals(await readToEnd(conn), 0);
            await ends[i];
            conn.close();
          }
        }
        assert(
          closed.every(({ why, toxic }) => why === "fault" && toxic === name),
        );
        assertEquals(proxy.connections, acted.filter((each) => !each).length);
        conns.forEach((conn, i) => acted[i] || conn.close());
        await log.first("closed", count);
      });
    }
  }

  test("a removed timeout closes also a connection whose end it held back", async () => {
    await using line = await Line.open(resettable);
    const { name } = line.add({
      type: "timeout",
      stream: "upstream",
      attributes: { timeout: HOUR_MS },
    });
    await line.conn.closeWrite();
    await assertSilent(line.conn);
    line.remove(name);
    assertEquals(await readToEnd(line.conn), 0);
    assertEquals(await line.ended(), ["fault", name]);
  });

  test("a timeout's new time counts from when it was added", async () => {
    await using line = await Line.open(resettable);
    const start = performance.now();
    const { name } = line.add({ type: "timeout" });
    line.update(name, { timeout: HOUR_MS });
    line.update(name, { timeout: 0 });
    line.update(name, { timeout: 120 });
    assertEquals(await readToEnd(line.conn), 0);
    assertGreaterOrEqual(performance.now() - start, 119);
  });

  test("limit_data's count goes on when the limit changes", async () => {
    await using line = await Line.open(resettable);
    const { name } = line.add({
      type: "limit_data",
      attributes: { bytes: 100 },
    });
    await line.ask("x".repeat(60));
    line.update(name, { bytes: 80 });
    await send(line.conn, "y".repeat(60));
    assertEquals(text(await readAll(line.conn)), "y".repeat(20));
    assertEquals(await line.ended(), ["fault", name]);
  });

  test("a limit_data below what has passed closes at once", async () => {
    await using line = await Line.open(resettable);
    const { name } = line.add({
      type: "limit_data",
      attributes: { bytes: 100 },
    });
    await line.ask("x".repeat(60));
    line.update(name, { bytes: 60 });
    assertEquals(await readToEnd(line.conn), 0);
    assertEquals(await line.ended(), ["fault", name]);
  });

  test("a limit_data that is removed in time limits nothing", async () => {
    await using line = await Line.open(resettable);
    const { name } = line.add({
      type: "limit_data",
      attributes: { bytes: 100 },
    });
    await line.ask("x".repeat(60));
    line.remove(name);
    await line.ask("y".repeat(60));
  });

  test("limit_time counts from when it was added, and can be put off", async () => {
    await using line = await Line.open(resettable);
    const start = performance.now();
    const { name } = line.add({
      type: "limit_time",
      attributes: { time: HOUR_MS },
    });
    line.update(name, { time: 120 });
    assertEquals(await readToEnd(line.conn), 0);
    assertGreaterOrEqual(performance.now() - start, 119);
    assertEquals(await line.ended(), ["fault", name]);
  });

  test("a limit_time that is removed or put off ends nothing", async () => {
    await using line = await Line.open(resettable);
    const { name } = line.add({ type: "limit_time", attributes: { time: 40 } });
    line.update(name, { time: HOUR_MS });
    line.add({ type: "limit_time", name: "gone", attributes: { time: 40 } });
    line.remove("gone");
    await new Promise((resolve) => setTimeout(resolve, 100));
    await line.ask("still there");
  });

  test("packet_loss and corrupt begin, change and end at once", async () => {
    await using line = await Line.open(resettable);
    for (const type of ["packet_loss", "corrupt"] as const) {
      const key = type === "corrupt" ? "rate" : "loss_rate";
      const { name } = line.add({ type, attributes: { [key]: 1e-300 } });
      await line.ask("spared");
      line.update(name, { [key]: 1 });
      await send(line.conn, "struck");
      if (type === "corrupt") {
        const got = text(await readExactly(line.conn, 6));
        assert(got !== "struck", got);
      } else await untilAnswered(line, 17);
      line.update(name, { [key]: 0 });
      await line.ask("spared again");
      line.update(name, { [key]: 1 });
      line.remove(name);
      await line.ask("spared for good");
    }
  });

  test("toxics act in the order in which they came", async () => {
    await using line = await Line.open(resettable);
    const { proxy } = line.watched;
    line.add({ type: "limit_data", name: "limit", attributes: { bytes: 4 } });
    line.add({
      type: "latency",
      name: "late",
      attributes: { latency: HOUR_MS },
    });
    line.add({ type: "slicer", name: "cut", attributes: { average_size: 2 } });
    const names = () => proxy.route("r").toxics.map(({ name }) => name);
    assertEquals(names(), ["limit", "late", "cut"]);
    await send(line.conn, "123456");
    await untilAnswered(line, 11);
    line.remove("late"); // behind which the limit's close waits
    assertEquals(text(await readAll(line.conn)), "1234");
    assertEquals(await line.ended(), ["fault", "limit"]);
    assertEquals(names(), ["limit", "cut"]);
  });

  test("a toxic that begins to act does so in its place", async () => {
    await using line = await Line.open(resettable);
    const { name } = line.add({
      type: "limit_data",
      toxicity: 0,
      attributes: { bytes: 4 },
    });
    line.add({ type: "packet_loss", attributes: { loss_rate: 1 } });
    line.watched.proxy.updateToxic("r", name, { toxicity: 1 });
    await send(line.conn, "123456"); // all of which the other would lose first
    assertEquals(await readToEnd(line.conn), 0);
    assertEquals(await line.ended(), ["fault", name]);
  });

  test("what is overdue by a new latency keeps to the limits behind it", async () => {
    await using line = await Line.open(resettable);
    const { name } = line.add({
      type: "latency",
      attributes: { latency: HOUR_MS },
    });
    line.add({ type: "bandwidth", attributes: { rate: 100 } });
    const bytes = testBytes(40_000);
    await writeAll(line.conn, bytes);
    await untilAnswered(line, 5 + bytes.length);
    await new Promise((resolve) => setTimeout(resolve, 300)); // overdue so long
    const start = performance.now();
    line.update(name, { latency: 0 });
    assertEquals(await readExactly(line.conn, bytes.length), bytes);
    assertGreaterOrEqual(performance.now() - start, 390);
  });

  test("a removed timeout also closes a connection whose side had ended", async () => {
    const ended = Promise.withResolvers<void>();
    await using upstream = new Upstream(async (conn) => {
      assertEquals(await readToEnd(conn), 0);
      ended.resolve();
      await new Promise<void>((resolve) => closed.promise.then(resolve));
    });
    const closed = Promise.withResolvers<void>();
    await using watched = await WatchedProxy.to(
      upstream,
      { name: "r", toxics: [{ type: "timeout", stream: "upstream" }] },
      {},
      { resettable },
    );
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
    test(`a limit that closes over a reader that does not read is ${how}`, async () => {
      using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
      await using watched = await WatchedProxy.to(
        { address: `127.0.0.1:${listener.addr.port}` },
        { name: "r" },
        {},
        { resettable },
      );
      const { proxy } = watched;
      using conn = await watched.connect();
      const reader = await listener.accept();
      await watched.log.first("connected", 1);
      const stream = "upstream";
      const { name } = proxy.addToxic("r", {
        type: "latency",
        stream,
        attributes: { latency: HOUR_MS },
      });
      proxy.addToxic("r", {
        type: "limit_data",
        stream,
        attributes: { bytes: 15_000_000 },
      });
      const bytes = testBytes(16_000_000);
      await writeAll(conn, bytes);
      await until(
        () => proxy.liveConnections()[0].bytesUp >= bytes.length,
        "all of it read",
      );
      proxy.removeToxic("r", name); // more is let go than the system buffers
      await turn();
      if (how === "cut") proxy.cutConnection(proxy.liveConnections()[0].id);
      else if (how === "removed") await proxy.removeRoute("r");
      reader.close();
      await watched.log.first("closed", 1);
      await proxy.stop();
    });
  }

  test("connections that end in all ways at once all end", async () => {
    await using upstream = new Upstream(async (conn) => {
      for (;;) await writeAll(conn, testBytes(2000));
    });
    await using watched = await WatchedProxy.to(
      upstream,
      {
        name: "r",
        toxics: [
          { type: "limit_data", stream: "upstream", attributes: { bytes: 10 } },
          { type: "timeout" },
        ],
      },
      {},
      { resettable },
    );
    const count = 120;
    await Promise.all(Array.from({ length: count }, async (_, i) => {
      for (let late = 0; late < i % 40; late++) await turn();
      using conn = await watched.connect();
      await turn();
      await send(conn, "x".repeat(20)).catch(unlessDisconnected);
      await readToEnd(conn);
    }));
    await watched.log.first("closed", count);
  });

  test("data behind a toxic that is added stays in order", async () => {
    await using line = await Line.open(resettable);
    line.add({ type: "latency", name: "a", attributes: { latency: 60 } });
    const bytes = testBytes(90_000);
    const got = readExactly(line.conn, bytes.length);
    const moves: [() => void, number][] = [
      [() => line.add({ type: "latency", name: "b" }), 0],
      [() => line.update("b", { latency: 40 }), 0],
      [() => line.add({ type: "bandwidth", attributes: { rate: 5000 } }), 0],
      [() => line.remove("a"), 0],
      [() => line.update("b", { latency: 1 }), 0],
      [() => line.remove("bandwidth_downstream"), 0],
    ];
    for (const [i, [move]] of moves.entries()) {
      const part = bytes.subarray(i * 15_000, (i + 1) * 15_000);
      await writeAll(line.conn, part);
      await untilAnswered(line, 5 + (i + 1) * 15_000);
      move();
    }
    assertEquals(await got, bytes);
  });

  test("a toxicity of some acts on those that the seed says, at any time", async () => {
    await using upstream = echo();
    await using watched = await WatchedProxy.to(
      upstream,
      { name: "r" },
      { seed: 3 },
      { resettable },
    );
    const { proxy } = watched;
    const toxic: ToxicOptions = { type: "latency", toxicity: 0.5 };
    const conns = await Promise.all(
      Array.from({ length: 20 }, () => watched.connect()),
    );
    await watched.log.first("connected", 20);
    const acting = () =>
      proxy.liveConnections().filter(({ toxics }) => toxics.length > 0)
        .map(({ number }) => number);
    const foretold = (toxicity: number, name = "latency_downstream") => {
      const route = {
        ...proxy.route("r"),
        toxics: [{
          ...{ type: "latency" as const, stream: "downstream" as const },
          ...{ name, toxicity, attributes: {} },
        }],
      };
      return proxy.liveConnections().map(({ number }) => number)
        .filter((number) => {
          const fate = decide(3, route, number);
          return fate.kind === "forward" && fate.toxics.length > 0;
        });
    };
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

  test("toxics of one direction leave the other alone", async () => {
    await using line = await Line.open(resettable);
    line.add({ type: "timeout", stream: "upstream" });
    await send(line.conn, "x");
    await untilRead(line, 6);
    await assertSilent(line.conn);
    assertEquals(line.watched.proxy.stats()[0].received, {
      upstream: 6,
      downstream: 5,
    });
  });

  test("toxics change in a storm under traffic that is checked byte by byte", async () => {
    await using upstream = echo();
    await using watched = await WatchedProxy.to(
      upstream,
      { name: "r" },
      {},
      { resettable },
    );
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
    const kinds: ((i: number) => ToxicOptions)[] = [
      (i) => ({
        type: "latency",
        attributes: { latency: i % 20, jitter: i % 7 },
      }),
      (i) => ({ type: "bandwidth", attributes: { rate: (i % 9) * 3000 } }),
      (i) => ({
        type: "slicer",
        attributes: { average_size: 500 + i, size_variation: i, delay: i % 50 },
      }),
      (i) => ({ type: "slow_close", attributes: { delay: i % 15 } }),
      () => ({ type: "limit_data", attributes: { bytes: 1e12 } }),
      (i) => ({ type: "limit_time", attributes: { time: HOUR_MS + i } }),
      () => ({ type: "corrupt", attributes: { rate: 0 } }),
      () => ({ type: "packet_loss", attributes: { loss_rate: 0 } }),
    ];
    if (resettable) {
      // It holds all until it is removed in the next moment but one.
      kinds.push(() => ({
        type: "reset_peer",
        attributes: { timeout: HOUR_MS },
      }));
    }
    const storm = async (stream: "upstream" | "downstream") => {
      for (let i = 0; i < 500; i++) {
        const options = { ...kinds[i % kinds.length](i), stream };
        const name = `${options.type}_${stream}`;
        const { toxics } = proxy.route("r");
        const there = toxics.some((each) => each.name === name);
        if (!there) {
          proxy.addToxic("r", { ...options, toxicity: i % 3 === 0 ? 0.5 : 1 });
        } else if (i % 2 === 0 && options.type !== "reset_peer") {
          proxy.updateToxic("r", name, {
            toxicity: (i % 5) / 4,
            attributes: options.attributes,
          });
        } else proxy.removeToxic("r", name);
        if (i % 97 === 0) await proxy.reset();
        if (options.type === "reset_peer" && !there) {
          await turn();
          if (proxy.route("r").toxics.some((each) => each.name === name)) {
            proxy.removeToxic("r", name);
          }
        }
        await turn();
      }
    };
    await Promise.all([storm("upstream"), storm("downstream")]);
    await proxy.reset();
    over = true;
    const carried = (await Promise.all(traffic)).reduce((a, b) => a + b);
    const closed = watched.log.of("closed");
    assert(closed.every(({ why }) => why === "client"), JSON.stringify(closed));
    assertGreater(carried, 0);
  });

  for (const end of ["stop", "drain"] as const) {
    test(`changes race with a ${end}, and harm nothing`, async () => {
      await using upstream = echo();
      for (let round = 0; round < 5; round++) {
        const watched = await WatchedProxy.to(
          upstream,
          { name: "r" },
          {},
          { resettable },
        );
        const { proxy } = watched;
        const conns = await Promise.all(
          Array.from({ length: 5 }, () => watched.connect()),
        );
        const flows = conns.map(async (conn) => {
          const bytes = testBytes(50_000);
          for (;;) {
            await writeAll(conn, bytes);
            const got = await readExactly(conn, bytes.length);
            assertEquals(got, bytes.subarray(0, got.length));
            if (got.length < bytes.length) return;
          }
        });
        const settled = Promise.all(
          flows.map((flow) => flow.catch(unlessDisconnected)),
        );
        await watched.log.first("connected", 5);
        let over = false;
        const storm = (async () => {
          for (let i = 0; !over; i++) {
            const { name } = proxy.addToxic("r", {
              type: "latency",
              attributes: { latency: i % 4 },
            });
            await turn();
            proxy.removeToxic("r", name);
            for (
              const change of [
                proxy.reset(),
                proxy.addRoute({
                  name: `extra${i}`,
                  localPort: 0,
                  upstream: upstream.address,
                }),
                proxy.updateRoute("r", { upstream: upstream.address }),
              ]
            ) {
              await change.then(
                () => {},
                (error) =>
                  assert(error instanceof Deno.errors.BadResource, `${error}`),
              );
            }
          }
        })();
        for (let i = 0; i < round * 3; i++) await turn();
        if (end === "stop") await proxy.stop();
        else await proxy.drain(30);
        over = true;
        await Promise.all([storm, settled]);
        assertEquals(proxy.connections, 0);
        for (const conn of conns) conn.close();
        for (const { localPort } of proxy.routes) {
          await untilRefused(localPort);
        }
      }
    });
  }
}

Deno.test("reset_peer resets an open connection to which it is added", async () => {
  await using line = await Line.open(true);
  const { name } = line.add({
    type: "reset_peer",
    attributes: { timeout: 80 },
  });
  const start = performance.now();
  await send(line.conn, "x");
  await assertRejects(() => readAll(line.conn), Deno.errors.ConnectionReset);
  assertGreaterOrEqual(performance.now() - start, 79);
  assertEquals(await line.ended(), ["fault", name]);
});

Deno.test("what a reset_peer holds is let go when it is removed in time", async () => {
  await using line = await Line.open(true);
  const { name } = line.add({
    type: "reset_peer",
    attributes: { timeout: HOUR_MS },
  });
  const bytes = testBytes(100_001);
  await writeAll(line.conn, bytes);
  await line.conn.closeWrite();
  await untilAnswered(line, 5 + bytes.length);
  line.remove(name);
  assertEquals(await readAll(line.conn), bytes);
  assertEquals(await line.ended(), ["client", undefined]);
});

Deno.test("a reset_peer's new time counts from the first data", async () => {
  await using line = await Line.open(true);
  const { name } = line.add({
    type: "reset_peer",
    attributes: { timeout: HOUR_MS },
  });
  const start = performance.now();
  await send(line.conn, "x");
  await untilAnswered(line, 6);
  line.update(name, { timeout: 100 });
  await assertRejects(() => readAll(line.conn), Deno.errors.ConnectionReset);
  assertGreaterOrEqual(performance.now() - start, 99);
});

Deno.test("a reset_peer is refused where it could not reset", async () => {
  await using line = await Line.open(false);
  const reset: ToxicOptions = { type: "reset_peer" };
  const error = assertThrows(() => line.add(reset), Deno.errors.NotSupported);
  assertEquals(
    error.message,
    "route r: its connections cannot be reset; " +
      "start the proxy with resettable: true",
  );
  const { name } = line.add({ ...reset, toxicity: 0 });
  const { proxy } = line.watched;
  assertThrows(
    () => proxy.updateToxic("r", name, { toxicity: 1 }),
    Deno.errors.NotSupported,
  );
  const [{ id }] = proxy.liveConnections();
  assertThrows(
    () => proxy.cutConnection(id, "reset"),
    Deno.errors.NotSupported,
  );
  await line.ask("none of which has done anything");
});

Deno.test("toxics that act while the upstream is dialled are those of then", async () => {
  await using upstream = echo();
  await using watched = await WatchedProxy.to(
    upstream,
    { name: "r", latencyMs: 50, toxics: [{ type: "timeout" }] },
  );
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
  await using watched = await WatchedProxy.to(
    upstream,
    { name: "r", timeoutRate: 1 },
  );
  using conn = await watched.connect();
  await watched.log.first("timed_out", 1);
  watched.proxy.addToxic("r", { type: "limit_time", attributes: { time: 1 } });
  await assertSilent(conn);
  assertEquals(watched.proxy.liveConnections()[0].toxics, []);
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
  await using watched = await WatchedProxy.to(upstream, { name: "r" });
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
    while (sent < all) {
      await writeAll(conn, block);
      sent += block.length;
    }
    await conn.closeWrite();
  })();
  for (let last = -1, same = 0; same < 20 && sent < all;) {
    await new Promise((resolve) => setTimeout(resolve, 10));
    same = sent === last ? same + 1 : 0;
    last = sent;
  }
  assert(sent < all, "nothing held the sender up");
  assertEquals(got, 0);
  proxy.removeToxic("r", name);
  await sending;
  await ended.promise;
  assertEquals(got, all);
});

Deno.test("a toxic is not found, or is there already, in so many words", async () => {
  await using line = await Line.open(false);
  const { proxy } = line.watched;
  line.add({ type: "latency" });
  const refused: [() => unknown, string][] = [
    [
      () => line.add({ type: "latency" }),
      "route r has a toxic latency_downstream already",
    ],
    [() => line.remove("x"), "route r has no toxic x"],
    [() => line.update("x", {}), "route r has no toxic x"],
    [() => proxy.addToxic("x", { type: "latency" }), "there is no route x"],
    [
      () => line.add({ type: "latensy" as "latency" }),
      "toxic: type: expected latency or bandwidth",
    ],
    [
      () => line.update("latency_downstream", { latensy: 1 }),
      "toxic: attributes.latensy: unknown key; did you mean latency?",
    ],
    [
      () => proxy.updateToxic("r", "latency_downstream", { toxicity: 2 }),
      "toxic: toxicity: expected a number from 0 to 1, found 2",
    ],
    [
      () =>
        proxy.updateToxic("r", "latency_downstream", {
          type: "timeout",
        } as unknown as { toxicity: number }),
      "toxic: type: unknown key",
    ],
    [() => proxy.cutConnection(99), "there is no connection 99"],
    [() => proxy.reseed(-1), "seed: expected an integer from 0"],
  ];
  for (const [call, message] of refused) {
    const error = assertThrows(call, Error);
    assert(error.message.startsWith(message), error.message);
  }
  assertEquals(proxy.route("r").toxics.map(({ name }) => name), [
    "latency_downstream",
  ]);
  await line.ask("which has cost nobody anything").catch((error) =>
    assert(!isDisconnect(error))
  );
});
