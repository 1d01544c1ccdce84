import {
  assert,
  assertEquals,
  assertGreater,
  assertGreaterOrEqual,
  assertLess,
} from "@std/assert";
import { connect, type Socket } from "node:net";
import { decide } from "../main.ts";
import {
  echo,
  readAll,
  readExactly,
  readToEnd,
  send,
  testBytes,
  text,
  unlessDisconnected,
  Upstream,
  WatchedProxy,
  writeAll,
} from "./helpers.ts";

const CLOCK_MS = 1; // what two readings of the clock may disagree by

Deno.test("a dropped connection is closed at once, the upstream not dialled", async () => {
  await using upstream = echo();
  await using watched = await WatchedProxy.to(upstream, { dropRate: 1 });
  for (const words of ["", "is anybody there?"]) {
    using client = await watched.connect();
    await send(client, words).catch(unlessDisconnected);
    assertEquals(await readToEnd(client), 0);
  }
  const events = (await watched.log.first("closed", 2)).map((closed) => {
    assertEquals(closed.why, "fault");
    assertEquals(closed.bytesUp, 0);
    assertEquals(closed.bytesDown, 0);
    return eventsOf(watched, closed.connection);
  });
  assertEquals(events, [
    ["accepted", "dropped", "closed"],
    ["accepted", "dropped", "closed"],
  ]);
  assertEquals(upstream.accepted, 0);
});

Deno.test("a timed-out connection takes all, answers nothing and is closed in time", async () => {
  const timeoutMs = 700;
  await using upstream = echo();
  await using watched = await WatchedProxy.to(upstream, {
    timeoutRate: 1,
    timeoutMs,
  });
  const start = performance.now();
  using client = await watched.connect();
  const sent = testBytes(4_000_001);
  const sending = writeAll(client, sent).catch(unlessDisconnected);
  assertEquals(await readToEnd(client), 0);
  assertGreaterOrEqual(performance.now() - start, timeoutMs - CLOCK_MS);
  await sending;

  const [closed] = await watched.log.first("closed", 1);
  assertEquals(closed.why, "fault");
  assertEquals(closed.bytesDown, 0);
  assertGreaterOrEqual(closed.durationMs, timeoutMs);
  assertEquals(watched.log.of("timed_out")[0].timeoutMs, timeoutMs);
  assertEquals(eventsOf(watched, 1), ["accepted", "timed_out", "closed"]);
  assertEquals(upstream.accepted, 0);
});

Deno.test("a timed-out connection takes all that the client sends", async () => {
  await using upstream = echo();
  await using watched = await WatchedProxy.to(upstream, { timeoutRate: 1 });
  using client = await watched.connect();
  const sent = testBytes(8_000_001);
  await writeAll(client, sent);
  await client.closeWrite();
  assertEquals(await readToEnd(client), 0);
  const [closed] = await watched.log.first("closed", 1);
  assertEquals(closed.bytesUp, sent.length);
  assertEquals(closed.bytesDown, 0);
  assertEquals(upstream.accepted, 0);
});

Deno.test("a timed-out client that ends its stream is held all the same", async () => {
  const timeoutMs = 300;
  await using upstream = echo();
  await using watched = await WatchedProxy.to(upstream, {
    timeoutRate: 1,
    timeoutMs,
  });
  const start = performance.now();
  using client = await watched.connect();
  await send(client, "hello");
  await client.closeWrite();
  assertEquals(await readToEnd(client), 0);
  assertGreaterOrEqual(performance.now() - start, timeoutMs - CLOCK_MS);
  const [closed] = await watched.log.first("closed", 1);
  assertEquals(closed.why, "fault");
  assertEquals(closed.bytesUp, 5);
  assertGreaterOrEqual(closed.durationMs, timeoutMs);
});

Deno.test("with timeoutMs 0 a connection is held until the client leaves", async () => {
  await using upstream = echo();
  await using watched = await WatchedProxy.to(upstream, { timeoutRate: 1 });
  const client = await watched.connect();
  await send(client, "hello");
  await watched.log.first("timed_out", 1);
  using other = await watched.connect(); // the first one does not end meanwhile
  await send(other, "hello");
  await other.closeWrite();
  assertEquals(await readToEnd(other), 0);
  assertEquals(
    watched.log.of("closed").map((each) => each.connection),
    [2],
  );
  client.close();
  const closed = await watched.log.first("closed", 2);
  assertEquals(closed[1].connection, 1);
  assertEquals(closed[1].why, "client");
  assertEquals(closed[1].bytesUp, 5);
  assertEquals(upstream.accepted, 0);
});

for (const timeoutMs of [0, 1_000_000_000]) {
  Deno.test(`a reset ends a connection timed out for ${timeoutMs} ms`, async () => {
    await using upstream = echo();
    await using watched = await WatchedProxy.to(upstream, {
      timeoutRate: 1,
      timeoutMs,
    });
    const client = await connectResettable(watched);
    await watched.log.first("timed_out", 1);
    await reset(client);
    const [closed] = await watched.log.first("closed", 1);
    assertEquals(closed.why, "client_reset");
    assert(closed.cause);
    assertEquals(upstream.accepted, 0);
  });
}

Deno.test("an upstream is never dialled before the delay is over", async () => {
  const dialled: number[] = [];
  await using upstream = new Upstream(async (conn) => {
    dialled.push(performance.now());
    await send(conn, "welcome");
  });
  await using watched = await WatchedProxy.to(upstream, {
    latencyMs: 60,
    jitterMs: 40,
  });
  const { seed, routes } = watched.proxy;
  const numbers = Array.from({ length: 8 }, (_, i) => i + 1);
  for (const number of numbers) {
    const fate = decide(seed, routes[0], number);
    assert(fate.kind === "forward");
    const start = performance.now();
    using client = await watched.connect();
    assertEquals(text(await readAll(client)), "welcome");
    assertEquals(dialled.length, number);
    assertGreaterOrEqual(
      dialled[number - 1] - start,
      fate.delayMs - CLOCK_MS,
    );
  }
  const delayed = watched.log.of("delayed");
  assertEquals(
    delayed.map(({ connection, delayMs }) => ({ connection, delayMs })),
    numbers.map((connection) => {
      const fate = decide(seed, routes[0], connection);
      assert(fate.kind === "forward");
      return { connection, delayMs: fate.delayMs };
    }),
  );
  assertGreater(new Set(delayed.map((each) => each.delayMs)).size, 1);
  for (const { delayMs } of delayed) {
    assert(delayMs >= 20 && delayMs <= 100, `${delayMs} ms`);
  }
});

Deno.test("jitter makes no delay negative", async () => {
  await using upstream = echo();
  await using watched = await WatchedProxy.to(upstream, {
    latencyMs: 0,
    jitterMs: 20,
  });
  const { seed, routes } = watched.proxy;
  const expected: number[] = [];
  for (let number = 1; number <= 8; number++) {
    const fate = decide(seed, routes[0], number);
    assert(fate.kind === "forward");
    if (fate.delayMs > 0) expected.push(fate.delayMs);
    using client = await watched.connect();
    await send(client, "ping");
    assertEquals(text(await readExactly(client, 4)), "ping");
  }
  assert(expected.length > 0 && expected.length < 8);
  assertEquals(
    watched.log.of("delayed").map((each) => each.delayMs),
    expected,
  );
});

Deno.test("what is sent during the delay arrives", async () => {
  await using upstream = echo();
  await using watched = await WatchedProxy.to(upstream, { latencyMs: 100 });
  using client = await watched.connect();
  const sent = testBytes(1_000_001);
  const [, got] = await Promise.all([
    writeAll(client, sent).then(() => client.closeWrite()),
    readAll(client),
  ]);
  assertEquals(got.length, sent.length);
  assertEquals(got, sent);
});

Deno.test("what is sent before closing during the delay arrives", async () => {
  const got = Promise.withResolvers<string>();
  await using upstream = new Upstream(async (conn) =>
    got.resolve(text(await readAll(conn)))
  );
  await using watched = await WatchedProxy.to(upstream, { latencyMs: 100 });
  const client = await watched.connect();
  await send(client, "fire and forget");
  client.close();
  assertEquals(await got.promise, "fire and forget");
  const [closed] = await watched.log.first("closed", 1);
  assertEquals(closed.why, "client");
  assertEquals(closed.bytesUp, 15);
});

Deno.test("a client that resets during the delay leaves nothing behind", async () => {
  await using upstream = echo();
  await using watched = await WatchedProxy.to(upstream, { latencyMs: 100 });
  const client = await connectResettable(watched);
  await watched.log.first("delayed", 1);
  await reset(client);
  const [closed] = await watched.log.first("closed", 1);
  assertEquals(closed.why, "client_reset");
  await watched.proxy.drain();
  assertEquals(watched.proxy.connections, 0);
});

Deno.test("delays pass at the same time, not one after another", async () => {
  const [count, latencyMs] = [50, 1000];
  await using upstream = echo();
  await using watched = await WatchedProxy.to(upstream, { latencyMs });
  const start = performance.now();
  await Promise.all(Array.from({ length: count }, async () => {
    using client = await watched.connect();
    await send(client, "ping");
    assertEquals(text(await readExactly(client, 4)), "ping");
  }));
  assertLess(performance.now() - start, count * latencyMs / 2);
  for (const closed of await watched.log.first("closed", count)) {
    assertGreaterOrEqual(closed.durationMs, latencyMs);
  }
});

function eventsOf(watched: WatchedProxy, connection: number): string[] {
  return watched.log.all
    .filter((each) => "connection" in each && each.connection === connection)
    .map((each) => each.event);
}

/** A client that can reset its connection, as Deno's own sockets cannot. */
async function connectResettable({ proxy }: WatchedProxy): Promise<Socket> {
  const socket = connect(proxy.routes[0].localPort, "127.0.0.1");
  await new Promise<void>((resolve) => socket.once("connect", resolve));
  return socket;
}

function reset(socket: Socket): Promise<void> {
  return new Promise((resolve) => {
    socket.once("close", () => resolve());
    socket.resetAndDestroy();
  });
}

for (const resettable of [false, true]) {
  const kind = resettable ? "Node's" : "Deno's";
  const options = { resettable };
  const route = { latencyMs: 1_000_000_000 };

  Deno.test(`a client that leaves during the delay is not waited for, on ${kind} sockets`, async () => {
    await using upstream = echo();
    await using watched = await WatchedProxy.to(upstream, route, {}, options);
    const quiet = await watched.connect();
    await watched.log.first("delayed", 1);
    quiet.close();
    const [closed] = await watched.log.first("closed", 1);
    assertEquals(closed.why, "client");

    const talking = await connectResettable(watched);
    talking.write("hello");
    await watched.log.first("delayed", 2);
    await reset(talking);
    const [, cut] = await watched.log.first("closed", 2);
    assertEquals(cut.why, "client_reset");
    assert(cut.cause);
    assertEquals(upstream.accepted, 0);
    assertEquals(eventsOf(watched, 2), ["accepted", "delayed", "closed"]);
  });

  Deno.test(`what a client sends during the delay arrives, also with its end, on ${kind} sockets`, async () => {
    await using upstream = echo();
    await using watched = await WatchedProxy.to(
      upstream,
      { latencyMs: 300 },
      {},
      options,
    );
    using client = await watched.connect();
    const sent = testBytes(3_000_001);
    const sending = writeAll(client, sent).then(() => client.closeWrite());
    assertEquals(await readAll(client), sent);
    await sending;
  });
}
