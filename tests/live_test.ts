/** Toxics that come, change and go while connections are open. */

import { assert, assertEquals, assertRejects } from "@std/assert";
import { type ChaosProxy, decide, type RouteOptions } from "../main.ts";
import {
  assertBytes,
  assertClosed,
  assertEchoes,
  assertEndedBy,
  assertSince,
  changes,
  defined,
  echo,
  exchange,
  HOUR_MS,
  only,
  openEcho,
  openEnds,
  pause,
  readAll,
  readExactly,
  readToEnd,
  send,
  SOCKETS,
  soon,
  STREAMS,
  testBytes,
  text,
  times,
  toxic,
  unlessDisconnected,
  until,
  untilRefused,
  Upstream,
  WatchedProxy,
  writeAll,
} from "./helpers.ts";

/** An idle connection through a proxy to an echo, on a route called `r`. */
async function openLine(resettable: boolean) {
  const ends = await openEcho({ name: "r" }, { resettable });
  const { client, watched: { proxy } } = ends;
  await assertEchoes(client);
  return {
    ...ends,
    proxy,
    /** Adds a toxic, and returns its name. */
    add: (line: string) => proxy.addToxic("r", toxic(line)).name,
    update: (name: string, words: string) =>
      proxy.updateToxic("r", name, changes(words)),
    remove: (name: string) => proxy.removeToxic("r", name),
    /** Sends bytes, and waits until the proxy has those that come back. */
    async fill(bytes: Uint8Array) {
      const { bytesDown } = only(proxy.liveConnections());
      await writeAll(client, bytes);
      await untilCarried(proxy, "bytesDown", bytesDown + bytes.length);
    },
    /** It ends without any data, closed by a toxic. */
    async assertClosedBy(toxic: string) {
      assertEquals(await readToEnd(client), 0);
      await client.closeWrite().catch(unlessDisconnected);
      await assertEndedBy(ends.watched, toxic);
    },
  };
}

type Line = Awaited<ReturnType<typeof openLine>>;

/** Waits until the proxy has read so much, on its first connection or another. */
async function untilCarried(
  proxy: ChaosProxy,
  direction: "bytesUp" | "bytesDown",
  bytes: number,
  index = 0,
): Promise<void> {
  const carried = () => proxy.liveConnections()[index]?.[direction] ?? 0;
  await until(() => carried() >= bytes, `${direction} ${bytes}`);
}

/** Lets other things happen, so many times. */
async function turns(count = 1): Promise<void> {
  for (let i = 0; i < count; i++) await pause();
}

/** Fails if anything comes while a good many turns go by. */
async function assertSilent(conn: Deno.TcpConn): Promise<void> {
  const came = conn.read(new Uint8Array(1)).then(() => true, () => true);
  const silent = turns(30).then(() => false);
  assert(!await Promise.race([came, silent]), "something has come");
}

/** The ways in which a toxic comes to act no more. */
const WAYS_TO_GO: Record<
  string,
  (proxy: ChaosProxy, name: string, none: string) => unknown
> = {
  removed: (proxy, name) => proxy.removeToxic("r", name),
  changed: (proxy, name, none) => proxy.updateToxic("r", name, changes(none)),
  reset: (proxy) => proxy.reset(),
};

for (const { sockets, resettable } of SOCKETS) {
  const on = { resettable };
  const it = (name: string, fn: () => Promise<void>) =>
    Deno.test(`${name}, on ${sockets}`, () => soon(fn(), "end of it"));
  const test = (name: string, fn: (line: Line) => Promise<void>) =>
    it(name, async () => {
      await using line = await openLine(resettable);
      await fn(line);
    });
  /** Starts a proxy to an upstream, on a route called `r`. */
  const watch = (
    upstream: { address: string },
    route: Partial<RouteOptions> = {},
    seed = 1,
  ) => WatchedProxy.to(upstream, { name: "r", ...route }, { seed }, on);

  const holding = ["latency latency", "slow_close delay", "reset_peer timeout"];
  for (const [type, attribute] of holding.map((each) => each.split(" "))) {
    for (const stream of STREAMS) {
      for (const [how, go] of Object.entries(WAYS_TO_GO)) {
        const resets = type === "reset_peer";
        if (resets && (!resettable || how === "changed")) continue;
        test(`what a ${type} holds ${stream} is released when it is ${how}`, async (line) => {
          const { client, proxy, watched } = line;
          const name = line.add(`${type} ${stream} ${attribute}=${HOUR_MS}`);
          const bytes = testBytes(100_001);
          await writeAll(client, bytes);
          await client.closeWrite();
          const direction = stream === "upstream" ? "bytesUp" : "bytesDown";
          await untilCarried(proxy, direction, 5 + bytes.length);
          await go(proxy, name, `${attribute}=0`);
          assertBytes(await readAll(client), bytes);
          await assertClosed(watched, { why: "client", toxic: undefined });
        });
      }
    }
  }

  test("a changed latency counts from when the data came", async (line) => {
    const name = line.add(`latency latency=${HOUR_MS}`);
    const start = performance.now();
    await line.fill(testBytes(1));
    // However often it changes, and however long: it counts from the first.
    for (let i = 0; i < 20; i++) {
      line.update(name, `latency=${HOUR_MS - i}`);
      await turns();
    }
    line.update(name, "latency=200");
    await readExactly(line.client, 1);
    assertSince(start, 200);
  });

  test("changes hundreds of times a second do not keep what is held", async (line) => {
    const bandwidth = line.add("bandwidth rate=10");
    const slicer = line.add("slicer average_size=50 delay=500");
    const latency = line.add("latency latency=30");
    const bytes = testBytes(2000);
    let done = false;
    const got = readExactly(line.client, 2000).finally(() => done = true);
    await writeAll(line.client, bytes);
    let changes = 0;
    while (!done) {
      line.update(bandwidth, `rate=${10 + changes++ % 2}`);
      line.update(slicer, `average_size=${50 + changes % 3}`);
      line.update(latency, `latency=${30 + changes % 2}`);
      await turns();
    }
    assertBytes(await got, bytes);
    assert(changes > 10, `${changes}`);
  });

  test("a bandwidth's new rate is that of what it holds", async (line) => {
    const { client, fill, update } = line;
    const name = line.add("bandwidth rate=500 buffer=1000000");
    const bytes = testBytes(300_001);
    await fill(bytes);
    const first = await readExactly(client, 150_000);
    const { sent } = only(line.proxy.stats());
    const left = 5 + bytes.length - sent.downstream;
    const start = performance.now();
    update(name, "rate=1000");
    const rest = await readExactly(client, bytes.length - first.length);
    assertSince(start, left / 2000 + 1); // and nothing of it at once
    assertBytes(new Uint8Array([...first, ...rest]), bytes);
    await assertEchoes(client);
    update(name, "rate=0");
    const held = readExactly(client, bytes.length);
    await fill(bytes);
    const changed = performance.now();
    update(name, "rate=1000");
    assertBytes(await held, bytes);
    assertSince(changed, 296); // from now on
  });

  const timings = [
    "timeout timeout=120",
    "timeout timeout=0, timeout=3600000, timeout=0, timeout=120",
    "limit_time time=3600000, time=120",
  ];
  for (const words of timings) {
    test(`a toxic closes an idle connection as long after it was added: ${words}`, async (line) => {
      const [first = "", ...later] = words.split(", ");
      const start = performance.now();
      const name = line.add(first);
      for (const change of later) line.update(name, change);
      await line.assertClosedBy(name);
      assertSince(start, 120);
    });
  }

  for (const stream of STREAMS) {
    for (const [how, go] of Object.entries(WAYS_TO_GO)) {
      it(`a timeout that is ${how} closes where it acted ${stream}, with or without data`, async () => {
        await using upstream = echo();
        await using watched = await watch(upstream, {}, 3);
        const { proxy, log } = watched;
        const count = 12;
        const conns: Deno.TcpConn[] = [];
        for (let i = 0; i < count; i++) {
          const conn = await watched.connect();
          await assertEchoes(conn, "x");
          conns.push(conn);
        }
        const added = toxic(`timeout ${stream} toxicity=0.5`);
        const { name } = proxy.addToxic("r", added);
        const live = proxy.liveConnections();
        const acted = live.map(({ toxics }) => toxics.length > 0);
        const affected = acted.filter(Boolean).length;
        assert(affected > 1 && affected < count, `${acted}`);
        // One of those that it acts on loses data by it.
        const loser = acted.indexOf(true);
        await send(defined(conns[loser]), "lost");
        await untilCarried(proxy, "bytesUp", 5, loser);
        await go(proxy, name, "toxicity=0");
        for (const { why, toxic } of await log.first("closed", affected)) {
          assertEquals([why, toxic], ["fault", name]);
        }
        for (const conn of conns.filter((_, i) => acted[i])) {
          assertEquals(await readToEnd(conn), 0);
        }
        assertEquals(proxy.connections, count - affected);
        for (const conn of conns) conn.close();
        await log.first("closed", count);
      });
    }
  }

  test("a limit_data that is removed limits nothing, and one below what has passed closes", async (line) => {
    const gone = line.add("limit_data bytes=100");
    await assertEchoes(line.client, "x".repeat(60));
    line.remove(gone);
    await assertEchoes(line.client, "x".repeat(60));
    const name = line.add("limit_data bytes=100");
    await assertEchoes(line.client, "y".repeat(60));
    line.update(name, "bytes=60");
    await line.assertClosedBy(name);
  });

  test("a limit_time that is removed or put off ends nothing", async (line) => {
    line.update(line.add("limit_time time=40"), `time=${HOUR_MS}`);
    line.remove(line.add("limit_time time=40 name=gone"));
    await pause(100);
    await assertEchoes(line.client);
  });

  test("toxics act in the order in which they came", async (line) => {
    line.add("limit_data bytes=4 name=limit");
    line.add(`latency latency=${HOUR_MS} name=late`);
    line.add("slicer average_size=2 name=cut");
    const names = () => line.proxy.route("r").toxics.map(({ name }) => name);
    assertEquals(names(), ["limit", "late", "cut"]);
    await line.fill(new TextEncoder().encode("123456"));
    line.remove("late"); // behind which the limit's close waits
    assertEquals(text(await readAll(line.client)), "1234");
    await line.assertClosedBy("limit");
    assertEquals(names(), ["limit", "cut"]);
  });

  test("a toxic that begins to act does so in its place", async (line) => {
    const name = line.add("limit_data bytes=4 toxicity=0");
    line.add("packet_loss loss_rate=1");
    line.update(name, "toxicity=1");
    await send(line.client, "123456"); // which the other would lose first
    await line.assertClosedBy(name);
  });

  test("what is overdue by a new latency keeps to the limits behind it", async (line) => {
    const name = line.add(`latency latency=${HOUR_MS}`);
    line.add("bandwidth rate=100");
    const bytes = testBytes(40_000);
    await line.fill(bytes);
    await pause(300); // overdue so long
    const start = performance.now();
    line.update(name, "latency=0");
    assertBytes(await readExactly(line.client, bytes.length), bytes);
    assertSince(start, 391);
  });

  for (const timeout of [0, HOUR_MS]) {
    it(`a timeout of ${timeout} ms that is removed closes also over an end`, async () => {
      const toxics = [toxic(`timeout upstream timeout=${timeout}`)];
      await using ends = await openEnds({ name: "r", toxics }, on);
      await send(ends.client, "lost");
      await ends.client.closeWrite();
      // Without a time limit the end gets through.
      if (timeout === 0) assertEquals(await readToEnd(ends.upstream), 0);
      else await assertSilent(ends.upstream);
      ends.watched.proxy.removeToxic("r", "timeout_upstream");
      assertEquals(await readToEnd(ends.client), 0);
      await assertEndedBy(ends.watched, "timeout_upstream");
    });
  }

  for (const how of ["cut", "left", "removed"] as const) {
    it(`a limit that closes over a reader that does not read is ${how}`, async () => {
      await using ends = await openEnds({ name: "r" }, on);
      const { proxy, log } = ends.watched;
      await log.first("connected", 1);
      const late = toxic(`latency upstream latency=${HOUR_MS}`);
      const { name } = proxy.addToxic("r", late);
      proxy.addToxic("r", toxic("limit_data upstream bytes=15000000"));
      const bytes = testBytes(16_000_000);
      await writeAll(ends.client, bytes);
      await untilCarried(proxy, "bytesUp", bytes.length);
      proxy.removeToxic("r", name); // more is released than the system buffers
      await turns();
      if (how === "cut") {
        proxy.cutConnection(only(proxy.liveConnections()).id);
      } else if (how === "removed") await proxy.removeRoute("r");
      ends.upstream.close();
      await log.first("closed", 1);
    });
  }

  it("connections that end in all ways at once all end", async () => {
    await using upstream = new Upstream(async (conn) => {
      for (;;) await writeAll(conn, testBytes(2000));
    });
    const toxics = [toxic("limit_data upstream bytes=10"), toxic("timeout")];
    await using watched = await watch(upstream, { toxics });
    await times(120, async (i) => {
      await turns(i % 40);
      using conn = await watched.connect();
      await turns();
      await send(conn, "x".repeat(20)).catch(unlessDisconnected);
      await readToEnd(conn);
    });
    await watched.log.first("closed", 120);
  });

  it("a toxicity of some acts on those that the seed says, at any time", async () => {
    await using upstream = echo();
    const toxics = [toxic("latency toxicity=0.5")];
    await using watched = await watch(upstream, { toxics }, 3);
    const { proxy } = watched;
    const conns = await times(20, () => watched.connect());
    const connected = await watched.log.first("connected", 20);
    const numbers = proxy.liveConnections().map(({ number }) => number);
    const acting = () =>
      proxy.liveConnections().filter(({ toxics }) => toxics.length > 0)
        .map(({ number }) => number);
    /** Those that act are the ones that are foretold. */
    const assertForetold = () => {
      const foretold = numbers.filter((number) => {
        const decision = decide(3, proxy.route("r"), number);
        return decision.kind === "forward" && decision.toxics.length > 0;
      });
      assertEquals(acting(), foretold);
      return foretold;
    };
    const name = "latency_downstream";
    const half = assertForetold();
    const told = connected.filter(({ toxics }) => toxics[0] === name);
    assertEquals(new Set(told.map((each) => each.connection)), new Set(half));
    assert(half.length > 0 && half.length < 20, `${half}`);
    proxy.updateToxic("r", name, { toxicity: 0.8 });
    const more = assertForetold();
    assert(half.every((each) => more.includes(each)));
    proxy.updateToxic("r", name, { toxicity: 0 });
    assertEquals(acting(), []);
    proxy.updateToxic("r", name, { toxicity: 1 });
    assertEquals(acting().length, 20);
    proxy.removeToxic("r", name);
    // Other toxics, and the order in which they come, make no difference.
    proxy.addToxic("r", toxic("latency toxicity=0.5 name=other"));
    assertForetold();
    proxy.removeToxic("r", "other");
    proxy.addToxic("r", toxic("latency toxicity=0.5"));
    assertEquals(acting(), half);
    for (const conn of conns) conn.close();
  });

  it("toxics change in a storm under traffic that is checked byte by byte", async () => {
    await using upstream = echo();
    await using watched = await watch(upstream);
    const { proxy } = watched;
    let over = false;
    const traffic = times(6, async (lane) => {
      for (let round = 0; !over; round++) {
        using conn = await watched.connect();
        const bytes = testBytes(1 + (round * 77_777) % 400_000, lane + 1);
        assertBytes(await exchange(conn, bytes), bytes);
      }
    });
    // None of these loses or changes anything, whatever it is changed to.
    const kinds: ((i: number) => string)[] = [
      (i) => `latency latency=${i % 20} jitter=${i % 7}`,
      (i) => `bandwidth rate=${(i % 9) * 3000}`,
      (i) =>
        `slicer average_size=${500 + i} size_variation=${i} delay=${i % 50}`,
      (i) => `slow_close delay=${i % 15}`,
      () => "limit_data bytes=1000000000000",
      (i) => `limit_time time=${HOUR_MS + i}`,
      () => "corrupt rate=0",
      () => "packet_loss loss_rate=0",
    ];
    // It holds all until it is removed in the next moment but one.
    if (resettable) kinds.push(() => `reset_peer timeout=${HOUR_MS}`);
    const storm = async (stream: typeof STREAMS[number]) => {
      for (let i = 0; i < 500; i++) {
        const line = defined(kinds[i % kinds.length])(i);
        const toxicity = i % 3 === 0 ? 0.5 : 1;
        const added = toxic(`${line} ${stream} toxicity=${toxicity}`);
        const { type, attributes } = added;
        const name = `${type}_${stream}`;
        const isThere = () =>
          proxy.route("r").toxics.some((each) => each.name === name);
        const holdsAll = type === "reset_peer";
        if (!isThere()) {
          proxy.addToxic("r", added);
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
    await traffic;
    const closed = watched.log.of("closed");
    assert(closed.length >= 6, `${closed.length}`);
    assertEquals(closed.filter(({ why }) => why !== "client"), []);
  });

  for (const end of ["stop", "drain"] as const) {
    it(`changes race with a ${end}, and harm nothing`, async () => {
      await using server = echo();
      const { address: upstream } = server;
      const unlessStopped = (error: unknown) =>
        assert(error instanceof Deno.errors.BadResource, `${error}`);
      for (let round = 0; round < 5; round++) {
        await using watched = await watch(server);
        const { proxy } = watched;
        const bytes = testBytes(50_000);
        const conns = await times(5, () => watched.connect());
        const flows = Promise.all(
          conns.map(async (conn) => {
            for (let got = bytes.length; got === bytes.length;) {
              await writeAll(conn, bytes);
              const echoed = await readExactly(conn, bytes.length);
              got = echoed.length;
              assertBytes(echoed, bytes.subarray(0, got));
            }
          }).map((flow) => flow.catch(unlessDisconnected)),
        );
        await watched.log.first("connected", 5);
        let over = false;
        const storm = (async () => {
          for (let i = 0; !over; i++) {
            const latency = toxic(`latency latency=${i % 4}`);
            const { name } = proxy.addToxic("r", latency);
            await turns();
            proxy.removeToxic("r", name);
            const changes: Promise<unknown>[] = [
              proxy.reset(),
              proxy.addRoute({ name: `extra${i}`, localPort: 0, upstream }),
              proxy.updateRoute("r", { upstream }),
            ];
            await Promise.all(changes.map((each) => each.catch(unlessStopped)));
          }
        })();
        await turns(round * 3);
        await (end === "stop" ? proxy.stop() : proxy.drain(30));
        over = true;
        await Promise.all([storm, flows]);
        assertEquals(proxy.connections, 0);
        for (const conn of conns) conn.close();
        for (const { localPort } of proxy.routes) await untilRefused(localPort);
      }
    });
  }
}

Deno.test("a changed reset_peer resets, counting from the first data", async () => {
  await using line = await openLine(true);
  const name = line.add(`reset_peer timeout=${HOUR_MS}`);
  const start = performance.now();
  await line.fill(testBytes(1));
  line.update(name, "timeout=100");
  const { ConnectionReset } = Deno.errors;
  await assertRejects(() => readAll(line.client), ConnectionReset);
  assertSince(start, 100);
  await assertEndedBy(line.watched, name);
});
