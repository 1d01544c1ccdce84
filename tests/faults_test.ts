import {
  assert,
  assertEquals,
  assertGreater,
  assertGreaterOrEqual,
  assertLess,
} from "@std/assert";
import { decide } from "../main.ts";
import {
  assertBytes,
  assertClosed,
  assertEchoes,
  connectTo,
  defined,
  echo,
  exchange,
  LONG_MS,
  NodeEnd,
  only,
  openEcho,
  readAll,
  readToEnd,
  send,
  SOCKETS,
  testBytes,
  text,
  times,
  unlessDisconnected,
  Upstream,
  WatchedProxy,
  writeAll,
} from "./helpers.ts";

const CLOCK_MS = 1; // what two readings of the clock may disagree by

Deno.test("a dropped connection is closed at once, the upstream not dialled", async () => {
  await using upstream = echo();
  await using watched = await WatchedProxy.to(upstream, { dropRate: 1 });
  for (const [i, words] of ["", "is anybody there?"].entries()) {
    using client = await watched.connect();
    await send(client, words).catch(unlessDisconnected);
    assertEquals(await readToEnd(client), 0);
    const none = { why: "fault", bytesUp: 0, bytesDown: 0 } as const;
    await assertClosed(watched, none, i + 1);
    assertEquals(eventsOf(watched, i + 1), ["accepted", "dropped", "closed"]);
  }
  assertEquals(upstream.accepted, 0);
});

Deno.test("a timed-out connection takes all, answers nothing and is closed in time", async () => {
  const timeoutMs = 700;
  const start = performance.now();
  await using ends = await openEcho({ timeoutRate: 1, timeoutMs });
  const { client, server, watched } = ends;
  const sending = writeAll(client, testBytes(4_000_001))
    .catch(unlessDisconnected);
  assertEquals(await readToEnd(client), 0);
  assertGreaterOrEqual(performance.now() - start, timeoutMs - CLOCK_MS);
  await sending;

  const { durationMs } = await assertClosed(watched, {
    why: "fault",
    bytesDown: 0,
  });
  assertGreaterOrEqual(durationMs, timeoutMs);
  assertEquals(watched.log.only("timed_out").timeoutMs, timeoutMs);
  assertEquals(eventsOf(watched, 1), ["accepted", "timed_out", "closed"]);
  assertEquals(server.accepted, 0);
});

Deno.test("a timed-out connection takes all that the client sends", async () => {
  await using ends = await openEcho({ timeoutRate: 1 });
  const sent = testBytes(8_000_001);
  assertEquals(await exchange(ends.client, sent), testBytes(0));
  await assertClosed(ends.watched, { bytesUp: sent.length, bytesDown: 0 });
  assertEquals(ends.server.accepted, 0);
});

Deno.test("a timed-out client that ends its stream is held all the same", async () => {
  const timeoutMs = 300;
  const start = performance.now();
  await using ends = await openEcho({ timeoutRate: 1, timeoutMs });
  assertEquals(await exchange(ends.client, testBytes(5)), testBytes(0));
  assertGreaterOrEqual(performance.now() - start, timeoutMs - CLOCK_MS);
  const expected = { why: "fault", bytesUp: 5 } as const;
  const { durationMs } = await assertClosed(ends.watched, expected);
  assertGreaterOrEqual(durationMs, timeoutMs);
});

Deno.test("with timeoutMs 0 a connection is held until the client leaves", async () => {
  await using ends = await openEcho({ timeoutRate: 1 });
  const { client, server, watched } = ends;
  await send(client, "hello");
  await watched.log.first("timed_out", 1);
  using other = await watched.connect(); // the first one does not end meanwhile
  assertEquals(await exchange(other, testBytes(5)), testBytes(0));
  await assertClosed(watched, { connection: 2 });
  client.close();
  const expected = { connection: 1, why: "client", bytesUp: 5 } as const;
  await assertClosed(watched, expected, 2);
  assertEquals(server.accepted, 0);
});

Deno.test("an upstream is never dialled before the delay is over", async () => {
  const dialled: number[] = [];
  await using upstream = new Upstream(async (conn) => {
    dialled.push(performance.now());
    await send(conn, "welcome");
  });
  const faults = { latencyMs: 60, jitterMs: 40 };
  await using watched = await WatchedProxy.to(upstream, faults);
  const expected = delaysOf(watched, 8);
  for (const [i, delayMs] of expected.entries()) {
    const start = performance.now();
    using client = await watched.connect();
    assertEquals(text(await readAll(client)), "welcome");
    assertEquals(dialled.length, i + 1);
    assertGreaterOrEqual(defined(dialled[i]) - start, delayMs - CLOCK_MS);
    assert(delayMs >= 20 && delayMs <= 100, `${delayMs} ms`);
  }
  assertEquals(
    watched.log.of("delayed").map((each) => [each.connection, each.delayMs]),
    expected.map((delayMs, i) => [i + 1, delayMs]),
  );
  assertGreater(new Set(expected).size, 1);
});

Deno.test("jitter makes no delay negative", async () => {
  await using upstream = echo();
  await using watched = await WatchedProxy.to(upstream, { jitterMs: 20 });
  const expected = delaysOf(watched, 8).filter((delayMs) => delayMs > 0);
  for (let number = 1; number <= 8; number++) {
    using client = await watched.connect();
    await assertEchoes(client);
  }
  assert(expected.length > 0 && expected.length < 8);
  assertEquals(
    watched.log.of("delayed").map((each) => each.delayMs),
    expected,
  );
});

Deno.test("what is sent before closing during the delay arrives", async () => {
  const got = Promise.withResolvers<string>();
  const upstream = new Upstream(async (conn) =>
    got.resolve(text(await readAll(conn)))
  );
  await using ends = await connectTo(upstream, [{ latencyMs: 100 }]);
  await send(ends.client, "fire and forget");
  ends.client.close();
  assertEquals(await got.promise, "fire and forget");
  await assertClosed(ends.watched, { why: "client", bytesUp: 15 });
});

Deno.test("delays pass at the same time, not one after another", async () => {
  const [count, latencyMs] = [50, 1000];
  await using upstream = echo();
  await using watched = await WatchedProxy.to(upstream, { latencyMs });
  const start = performance.now();
  await times(count, async () => {
    using client = await watched.connect();
    await assertEchoes(client);
  });
  assertLess(performance.now() - start, count * latencyMs / 2);
  for (const closed of await watched.log.first("closed", count)) {
    assertGreaterOrEqual(closed.durationMs, latencyMs);
  }
});

for (const timeoutMs of [0, LONG_MS]) {
  Deno.test(`a reset ends a connection timed out for ${timeoutMs} ms`, async () => {
    await using upstream = echo();
    const faults = { timeoutRate: 1, timeoutMs };
    await using watched = await WatchedProxy.to(upstream, faults);
    await using client = await NodeEnd.connect(watched);
    await watched.log.first("timed_out", 1);
    await client.reset();
    assert((await assertClosed(watched, { why: "client_reset" })).cause);
    assertEquals(upstream.accepted, 0);
  });
}

for (const { sockets, resettable } of SOCKETS) {
  Deno.test(`a client that leaves during the delay is not waited for, on ${sockets}`, async () => {
    const route = { latencyMs: LONG_MS };
    await using ends = await openEcho(route, { resettable });
    const { client: quiet, server, watched } = ends;
    await watched.log.first("delayed", 1);
    quiet.close();
    await assertClosed(watched, { why: "client" });

    await using talking = await NodeEnd.connect(watched);
    talking.write("hello");
    await watched.log.first("delayed", 2);
    await talking.reset();
    assert((await assertClosed(watched, { why: "client_reset" }, 2)).cause);
    assertEquals(server.accepted, 0);
    assertEquals(eventsOf(watched, 2), ["accepted", "delayed", "closed"]);
  });

  Deno.test(`what a client sends during the delay arrives, also with its end, on ${sockets}`, async () => {
    await using ends = await openEcho({ latencyMs: 300 }, { resettable });
    const sent = testBytes(3_000_001);
    assertBytes(await exchange(ends.client, sent), sent);
  });
}

/** How long the seed has the first connections wait. */
function delaysOf({ proxy }: WatchedProxy, count: number): number[] {
  return Array.from({ length: count }, (_, i) => {
    const decision = decide(proxy.seed, only(proxy.routes), i + 1);
    assert(decision.kind === "forward");
    return decision.delayMs;
  });
}

function eventsOf(watched: WatchedProxy, connection: number): string[] {
  return watched.log.all
    .filter((each) => "connection" in each && each.connection === connection)
    .map((each) => each.event);
}
