import { assert, assertEquals, assertLessOrEqual } from "@std/assert";
import { beginToxic, parseConfig, type RouteOptions } from "../main.ts";
import {
  assertBytes,
  assertClosed,
  assertReads,
  assertSince,
  defined,
  exchange,
  flood,
  MIB,
  only,
  openEcho,
  openEnds,
  pause,
  readToEnd,
  send,
  Silent,
  SOCKETS,
  testBytes,
  toxic,
  until,
  untilStalled,
  WatchedProxy,
} from "./helpers.ts";

/** A route with these toxics. */
function having(...lines: string[]): Partial<RouteOptions> {
  return { name: "r", toxics: lines.map(toxic) };
}

/** Connections whose upstream sends without an end, and what each has got. */
async function openFlooded(rate: number, resettable: boolean, count: number) {
  const open = new AsyncDisposableStack();
  const server = open.use(new Silent());
  const route = having(`bandwidth rate=${rate} shared=1`);
  const options = { resettable };
  const start = performance.now();
  const watched = open.use(
    await WatchedProxy.to(server, route, {}, options),
  );
  const got: number[] = [];
  const largest: number[] = [];
  const add = async (floods = true) => {
    const client = open.use(await watched.connect());
    const upstream = await server.accept();
    if (floods) flood(upstream);
    return { client, upstream };
  };
  const ends = [];
  for (let i = 0; i < count; i++) {
    const { client } = await add();
    ends.push(client);
    got[i] = largest[i] = 0;
    const buffer = new Uint8Array(MIB);
    (async () => {
      for (let size; (size = await client.read(buffer)) !== null;) {
        got[i] = defined(got[i]) + size;
        largest[i] = Math.max(defined(largest[i]), size);
      }
    })().catch(() => {}); // it was closed
  }
  const sum = () => {
    const all = got.reduce((sum, each) => sum + each, 0);
    assertLessOrEqual(all, (performance.now() - start) * rate + 1);
    return all;
  };
  const close = () => open.disposeAsync();
  return { watched, add, got, largest, sum, [Symbol.asyncDispose]: close };
}

for (const { sockets, resettable } of SOCKETS) {
  Deno.test(`16 connections share a bandwidth evenly, and never exceed it, on ${sockets}`, async () => {
    await using line = await openFlooded(1000, resettable, 16);
    // A slow machine reads some later: then another half second shows it.
    await until(async () => {
      const [before, start] = [[...line.got], line.sum()];
      await until(() => line.sum() >= start + 500_000, "500 KB more");
      const shares = line.got.map((got, i) =>
        (got - defined(before[i])) * 16 / (line.sum() - start)
      );
      return shares.every((share) => share > 0.9 && share < 1.1);
    }, "each within 10 % of its share");
  });

  Deno.test(`changes of a shared bandwidth give no more than its rate, on ${sockets}`, async () => {
    await using line = await openFlooded(1000, resettable, 16);
    const { proxy } = line.watched;
    const [start, before] = [performance.now(), line.sum()];
    while (line.sum() < before + 600_000) {
      const attributes = { rate: 1000 };
      proxy.updateToxic("r", "bandwidth_downstream", { attributes });
      await pause(20);
    }
    assertSince(start, 400); // some were on their way
  });

  Deno.test(`a line behind a shared one has its buffer, on ${sockets}`, async () => {
    const lines = ["rate=5000 shared=1", "rate=10 name=second"];
    const route = having(...lines.map((each) => `bandwidth upstream ${each}`));
    await using ends = await openEnds(route, { resettable });
    const flow = flood(ends.client);
    await untilStalled(flow);
    const { received, sent } = only(ends.watched.proxy.stats());
    assertLessOrEqual(received.upstream - sent.upstream, 2 * MIB);
    await ends.watched.proxy.stop();
    await flow.done;
  });

  Deno.test(`a full queue keeps no other connection waiting, on ${sockets}`, async () => {
    await using line = await openFlooded(100, resettable, 1);
    const { client, upstream } = await line.add(false);
    const held = () => {
      const { received, sent } = only(line.watched.proxy.stats());
      return received.downstream - sent.downstream;
    };
    await until(() => held() >= 64 * 1024, "full queue");
    // On a slow machine some take longer; behind the queue, most would.
    let inRow = 0;
    await until(async () => {
      const before = line.sum();
      await send(upstream, "hello");
      await assertReads(client, "hello");
      inRow = line.sum() - before < 20_000 ? inRow + 1 : 0;
      return inRow === 5;
    }, "5 answers, each before a third of the queue");
  });

  Deno.test(`connections that have gone leave nothing reserved, on ${sockets}`, async () => {
    await using line = await openFlooded(1000, resettable, 60);
    const { proxy } = line.watched;
    await until(() => line.got.every((got) => got > 0), "data everywhere");
    for (const { id } of proxy.liveConnections().slice(1)) {
      proxy.cutConnection(id);
    }
    line.largest[0] = 0;
    await until(() => defined(line.largest[0]) >= 10_000, "turns of 10 ms");
    line.sum();
  });

  const whole = [
    "bandwidth upstream rate=500 shared=1 | 200 ms for 100000",
    "latency latency=30, bandwidth rate=1000 shared=1, " +
    "slicer average_size=500 delay=10 | 330 ms for 300000",
  ];
  for (const each of whole) {
    Deno.test(`nothing is lost, and it takes its time: ${each}, on ${sockets}`, async () => {
      const [lines = "", ms, size] = each.split(/ \| | ms for /);
      const route = having(...lines.split(", "));
      await using ends = await openEcho(route, { resettable });
      const bytes = testBytes(Number(size));
      const start = performance.now();
      assertBytes(await exchange(ends.client, bytes), bytes);
      assertSince(start, Number(ms));
      await assertClosed(ends.watched, { why: "client", toxic: undefined });
    });
  }

  Deno.test(`a shared bandwidth changes at once, however often, on ${sockets}`, async () => {
    const route = having("bandwidth rate=0 shared=1");
    await using ends = await openEcho(route, { resettable });
    const { proxy } = ends.watched;
    const update = (attributes: Record<string, number | boolean>) =>
      proxy.updateToxic("r", "bandwidth_downstream", { attributes });
    const bytes = testBytes(300_000);
    let done = false;
    const got = exchange(ends.client, bytes).finally(() => done = true);
    const read = () => only(proxy.stats()).received.downstream;
    await until(() => read() > 64 * 1024, "full queue");
    assertEquals(only(proxy.stats()).sent.downstream, 0);
    await pause(150); // which counts for nothing
    const start = performance.now();
    update({ rate: 1000 });
    for (let i = 0; !done; i++) {
      update({ rate: 1000 + i % 2, shared: i % 7 > 0 });
      await pause();
    }
    assertBytes(await got, bytes);
    assertSince(start, 299);
  });

  Deno.test(`what waits for a shared bandwidth is released when it is removed, on ${sockets}`, async () => {
    const route = having("bandwidth rate=1 shared=1");
    await using ends = await openEcho(route, { resettable });
    const { proxy } = ends.watched;
    const bytes = testBytes(60_000);
    const got = exchange(ends.client, bytes);
    const read = () => only(proxy.stats()).received.downstream;
    await until(() => read() === bytes.length, "all of it");
    proxy.removeToxic("r", "bandwidth_downstream");
    assertBytes(await got, bytes);
  });

  for (const shared of [0, 1]) {
    for (const before of [[], ["latency upstream latency=50"]]) {
      Deno.test(`a buffer bounds what waits: ${before}, shared=${shared}, on ${sockets}`, async () => {
        const line = `bandwidth upstream rate=10 shared=${shared}`;
        const held: number[] = [];
        for (const buffer of [1, undefined, 2 * MIB]) {
          const own = buffer ? `${line} buffer=${buffer}` : line;
          await using ends = await openEnds(having(...before, own), {
            resettable,
          });
          const flow = flood(ends.client);
          await untilStalled(flow);
          const { received, sent } = only(ends.watched.proxy.stats());
          held.push(received.upstream - sent.upstream);
          flow.isEnough = true;
          ends.watched.proxy.removeToxic("r", "bandwidth_upstream");
          await readToEnd(ends.upstream, testBytes(MIB));
          await flow.done;
        }
        const [least = 0, usual = 0, most = 0] = held;
        // The last read, one in the stream, and what leaves within 100 ms.
        const READS = 512 * 1024 + 1000;
        assert(least <= 1 + READS, `${least}`);
        assert(
          usual > 64 * 1024 && usual <= 64 * 1024 + READS,
          `${usual}`,
        );
        assert(most > 2 * MIB && most <= 2 * MIB + READS, `${most}`);
      });
    }
  }
}

Deno.test("a shared bandwidth is written as true or 1, and shown as a number", () => {
  const shown = (written: string) => {
    const toxic = `{type: bandwidth, attributes: {rate: 1${written}}}`;
    const route = `{localPort: 1, upstream: "a:1", toxics: [${toxic}]}`;
    const { routes } = parseConfig(`routes: [${route}]`);
    return only(only(routes).toxics).attributes;
  };
  assertEquals(shown(""), { rate: 1 });
  assertEquals(shown(", shared: true"), { rate: 1, shared: 1 });
  assertEquals(shown(", shared: false"), { rate: 1, shared: 0 });
  assertEquals(shown(", shared: 1, buffer: 5"), {
    ...{ rate: 1, shared: 1, buffer: 5 },
  });
});

Deno.test("a shared bandwidth without a proxy holds all data", () => {
  const passed: number[] = [];
  const line = toxic("bandwidth rate=100 shared=1");
  const active = beginToxic(line, 1, {
    pass: ({ at }) => passed.push(at),
    cut() {},
  });
  active.take({ at: 5, what: new Uint8Array(10) });
  active.take({ at: 6, what: "end" });
  assertEquals(passed, [Infinity, Infinity]);
});
