import { assert, assertEquals } from "@std/assert";
import {
  assertBytes,
  assertReads,
  assertSince,
  defined,
  exchange,
  flood,
  having,
  heldBy,
  MIB,
  only,
  openEcho,
  openEnds,
  pause,
  readToEnd,
  send,
  Silent,
  SOCKETS,
  sum,
  testBytes,
  testsOf,
  until,
  untilStalled,
  WatchedProxy,
} from "./helpers.ts";

const onEcho = testsOf(openEcho);
const onEnds = testsOf(openEnds);
const BUFFER = 64 * 1024;
/** The last read, one in the stream, and what leaves within 100 ms. */
const READS = 512 * 1024 + 1000;

/** Connections whose upstream sends without an end, and what each has got. */
async function openFlooded(rate: number, on: object, count: number) {
  const open = new AsyncDisposableStack();
  const server = open.use(new Silent());
  const route = having(`bandwidth rate=${rate} shared=1`);
  const start = performance.now();
  const watched = open.use(await WatchedProxy.to(server, route, {}, on));
  const readers: { got: number; largest: number }[] = [];
  const add = async () => {
    const client = open.use(await watched.connect());
    return { client, upstream: await server.accept() };
  };
  for (let i = 0; i < count; i++) {
    const { client, upstream } = await add();
    flood(upstream);
    const reader = { got: 0, largest: 0 };
    readers.push(reader);
    const read = async () => {
      const buffer = new Uint8Array(MIB);
      for (let size; (size = await client.read(buffer)) !== null;) {
        reader.got += size;
        reader.largest = Math.max(reader.largest, size);
      }
    };
    read().catch(() => {}); // it was closed
  }
  const total = () => {
    const all = sum(readers.map(({ got }) => got));
    assert(all <= (performance.now() - start) * rate + 1, `${all} bytes`);
    return all;
  };
  const close = () => open.disposeAsync();
  return { watched, add, readers, total, [Symbol.asyncDispose]: close };
}

for (const { sockets, resettable } of SOCKETS) {
  const on = { resettable };

  Deno.test(`16 connections share a bandwidth evenly, and never exceed it, on ${sockets}`, async () => {
    await using line = await openFlooded(1000, on, 16);
    // A slow machine reads some later: then another half second shows it.
    await until(async () => {
      const before = line.readers.map(({ got }) => got);
      const start = line.total();
      await until(() => line.total() >= start + 500_000, "500 KB more");
      const even = (line.total() - start) / 16;
      const shares = line.readers.map(({ got }, i) =>
        (got - defined(before[i])) / even
      );
      return shares.every((share) => share > 0.9 && share < 1.1);
    }, "each within 10 % of its share");
  });

  Deno.test(`changes of a shared bandwidth give no more than its rate, on ${sockets}`, async () => {
    await using line = await openFlooded(1000, on, 16);
    const { proxy } = line.watched;
    const [start, before] = [performance.now(), line.total()];
    while (line.total() < before + 600_000) {
      const attributes = { rate: 1000 };
      proxy.updateToxic("r", "bandwidth_downstream", { attributes });
      await pause(20);
    }
    assertSince(start, 400); // some were on their way
  });

  Deno.test(`a full queue keeps no other connection waiting, on ${sockets}`, async () => {
    await using line = await openFlooded(100, on, 1);
    const { client, upstream } = await line.add();
    const isFull = () => heldBy(line.watched, "downstream") >= BUFFER;
    await until(isFull, "full queue");
    // On a slow machine some take longer; behind the queue, most would.
    let inRow = 0;
    await until(async () => {
      const before = line.total();
      await send(upstream, "hello");
      await assertReads(client, "hello");
      inRow = line.total() - before < 20_000 ? inRow + 1 : 0;
      return inRow === 5;
    }, "5 answers, each before a third of the queue");
  });

  Deno.test(`connections that have gone leave nothing reserved, on ${sockets}`, async () => {
    await using line = await openFlooded(1000, on, 60);
    const { proxy } = line.watched;
    await until(() => line.readers.every(({ got }) => got > 0), "data for all");
    for (const { id } of proxy.liveConnections().slice(1)) {
      proxy.cutConnection(id);
    }
    const first = defined(line.readers[0]);
    first.largest = 0;
    await until(() => first.largest >= 10_000, "turns of 10 ms");
    line.total();
  });
}

const TWO = "bandwidth upstream rate=5000 shared=1, " +
  "bandwidth upstream rate=10 name=second";

onEnds.test(`${TWO} | the second has its buffer`, async ({ client, watched }) => {
  const flow = flood(client);
  await untilStalled(flow);
  const held = heldBy(watched, "upstream");
  assert(held <= 2 * MIB, `${held}`);
  await watched.proxy.stop();
  await flow.done;
});

onEcho.test("bandwidth rate=0 shared=1 | it changes at once, however often", async ({ client, watched }) => {
  const update = (attributes: Record<string, number | boolean>) =>
    watched.proxy.updateToxic("r", "bandwidth_downstream", { attributes });
  const bytes = testBytes(300_000);
  let done = false;
  const got = exchange(client, bytes).finally(() => done = true);
  await until(() => heldBy(watched, "downstream") > BUFFER, "full queue");
  assertEquals(only(watched.proxy.stats()).sent.downstream, 0);
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

onEcho.test("bandwidth rate=1 shared=1 | what waits is released when it is removed", async ({ client, watched }) => {
  const bytes = testBytes(60_000);
  const got = exchange(client, bytes);
  const read = () => only(watched.proxy.stats()).received.downstream;
  await until(() => read() === bytes.length, "all of it");
  watched.proxy.removeToxic("r", "bandwidth_downstream");
  assertBytes(await got, bytes);
});

for (const before of ["", "latency upstream latency=50, "]) {
  for (const shared of [0, 1]) {
    for (const buffer of [1, BUFFER, 2 * MIB]) {
      const own = buffer === BUFFER ? "" : ` buffer=${buffer}`; // the default
      const line = `bandwidth upstream rate=10 shared=${shared}${own}`;
      onEnds.test(`${before}${line} | the buffer bounds what waits`, async ({ client, upstream, watched }) => {
        const flow = flood(client);
        await untilStalled(flow);
        const held = heldBy(watched, "upstream");
        assert(held > buffer && held <= buffer + READS, `${held}`);
        flow.isEnough = true;
        watched.proxy.removeToxic("r", "bandwidth_upstream");
        const got = await readToEnd(upstream, testBytes(MIB));
        await flow.done;
        assertEquals(got, flow.sent);
      });
    }
  }
}
