import { assert, assertEquals } from "@std/assert";
import { decide } from "../main.ts";
import {
  assertBytes,
  assertClosed,
  assertEchoes,
  assertSince,
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
  Silent,
  SOCKETS,
  testBytes,
  text,
  times,
  unlessDisconnected,
  until,
  Upstream,
  WatchedProxy,
  writeAll,
  writeAndEnd,
} from "./helpers.ts";

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

for (const write of [writeAll, writeAndEnd]) {
  const sends = write === writeAll ? "sends" : "ends its stream";
  Deno.test(`a timed-out client that ${sends} is answered nothing, and held for its time`, async () => {
    const timeoutMs = 400;
    const start = performance.now();
    await using ends = await openEcho({ timeoutRate: 1, timeoutMs });
    const { client, server, watched } = ends;
    await write(client, testBytes(5));
    assertEquals(await readToEnd(client), 0);
    assertSince(start, timeoutMs);
    const expected = { why: "fault", bytesUp: 5, bytesDown: 0 } as const;
    const { durationMs } = await assertClosed(watched, expected);
    assert(durationMs >= timeoutMs, `${durationMs} ms`);
    assertEquals(watched.log.only("timed_out").timeoutMs, timeoutMs);
    assertEquals(eventsOf(watched, 1), ["accepted", "timed_out", "closed"]);
    assertEquals(server.accepted, 0);
  });
}

Deno.test("with timeoutMs 0 a connection takes all, and is held until the client leaves", async () => {
  await using ends = await openEcho({ timeoutRate: 1 });
  const { client, server, watched } = ends;
  await send(client, "hello");
  await watched.log.first("timed_out", 1);
  using other = await watched.connect(); // the first one does not end meanwhile
  const sent = testBytes(8_000_001);
  assertEquals(await exchange(other, sent), testBytes(0));
  const expected = { connection: 2, bytesUp: sent.length, bytesDown: 0 };
  await assertClosed(watched, expected);
  client.close();
  await assertClosed(watched, { connection: 1, why: "client", bytesUp: 5 }, 2);
  assertEquals(server.accepted, 0);
});

for (const [latencyMs, jitterMs] of [[60, 40], [0, 20]] as const) {
  Deno.test(`an upstream is dialled after ${latencyMs}±${jitterMs} ms, never before`, async () => {
    const dialled: number[] = [];
    await using upstream = new Upstream((conn) => {
      dialled.push(performance.now());
      return send(conn, "welcome");
    });
    const faults = { latencyMs, jitterMs };
    await using watched = await WatchedProxy.to(upstream, faults);
    const expected: [connection: number, delayMs: number][] = [];
    for (let number = 1; number <= 8; number++) {
      const decision = decide(1, only(watched.proxy.routes), number);
      assert(decision.kind === "forward");
      const { delayMs } = decision;
      if (delayMs > 0) expected.push([number, delayMs]);
      const start = performance.now();
      using client = await watched.connect();
      assertEquals(text(await readAll(client)), "welcome");
      assertEquals(dialled.length, number);
      assert(defined(dialled.at(-1)) - start >= delayMs - 1, `${delayMs} ms`);
    }
    const delayed = watched.log.of("delayed");
    assertEquals(
      delayed.map((each) => [each.connection, each.delayMs]),
      expected,
    );
    assertEquals(expected.length < 8, jitterMs > latencyMs);
  });
}

Deno.test("delays pass at the same time, not one after another", async () => {
  const [count, latencyMs] = [50, 1000];
  await using upstream = echo();
  await using watched = await WatchedProxy.to(upstream, { latencyMs });
  const start = performance.now();
  await times(count, async () => {
    using client = await watched.connect();
    await assertEchoes(client);
  });
  const passed = performance.now() - start;
  assert(passed < count * latencyMs / 2, `${passed} ms`);
  for (const { durationMs } of await watched.log.first("closed", count)) {
    assert(durationMs >= latencyMs, `${durationMs} ms`);
  }
});

for (const timeoutMs of [0, LONG_MS]) {
  Deno.test(`a reset ends a connection timed out for ${timeoutMs} ms`, async () => {
    const route = { timeoutRate: 1, timeoutMs };
    await using ends = await connectTo(echo(), [route], NodeEnd.connect);
    const { client, server, watched } = ends;
    await watched.log.first("timed_out", 1);
    await client.reset();
    assert((await assertClosed(watched, { why: "client_reset" })).cause);
    assertEquals(server.accepted, 0);
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
    using brief = await ends.watched.connect();
    const sent = testBytes(3_000_001);
    const got = exchange(ends.client, sent);
    assertEquals(await exchange(brief, testBytes(5)), testBytes(5));
    assertBytes(await got, sent);
  });

  for (const why of ["client", "client_reset"] as const) {
    const left = why === "client" ? "closed" : "reset";
    Deno.test(`what a client sends during the delay arrives although it is ${left}, on ${sockets}`, async () => {
      const how: [object, object] = [{ latencyMs: 500 }, { resettable }];
      await using ends = await connectTo(new Silent(), how, NodeEnd.connect);
      const { client, server, watched: { proxy, log } } = ends;
      const sent = testBytes(5 * 64 * 1024 + 20_000);
      await client.write(sent);
      // It is read ahead so far; what is behind that waits in the socket.
      const isAhead = () =>
        proxy.liveConnections().some(({ bytesUp }) => bytesUp > 256 * 1024);
      await until(isAhead, "what is read ahead");
      await (left === "reset" ? client.reset() : client[Symbol.asyncDispose]());
      const upstream = await server.accept();
      assertBytes(await readAll(upstream), sent);
      upstream.close();
      await assertClosed({ log }, { why, bytesUp: sent.length });
    });
  }
}

function eventsOf(watched: WatchedProxy, connection: number): string[] {
  return watched.log.all
    .filter((each) => "connection" in each && each.connection === connection)
    .map((each) => each.event);
}
