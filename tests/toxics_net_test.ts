import {
  assert,
  assertEquals,
  assertGreaterOrEqual,
  assertRejects,
} from "@std/assert";
import { connect as connectNode } from "node:net";
import type { ToxicOptions } from "../main.ts";
import {
  echo,
  isDisconnect,
  readAll,
  readExactly,
  send,
  testBytes,
  text,
  Upstream,
  WatchedProxy,
  writeAll,
} from "./helpers.ts";

const HOUR_MS = 3_600_000;

/** Sends all, ends, and reads to the end. */
async function exchange(
  conn: Deno.TcpConn,
  bytes: Uint8Array,
): Promise<Uint8Array> {
  const sent = writeAll(conn, bytes).then(() => conn.closeWrite());
  const [, got] = await Promise.all([sent, readAll(conn)]);
  return got;
}

/** A proxy to an echo, with toxics. */
async function withToxics(
  toxics: ToxicOptions[],
  run: (watched: WatchedProxy, conn: Deno.TcpConn) => Promise<void>,
): Promise<void> {
  await using upstream = echo();
  await using watched = await WatchedProxy.to(upstream, { toxics });
  using conn = await watched.connect();
  await run(watched, conn);
}

/** An upstream that answers so many bytes, whatever it is asked. */
function answering(bytes: Uint8Array): Upstream {
  return new Upstream(async (conn) => {
    await conn.read(new Uint8Array(1000));
    await writeAll(conn, bytes);
    await conn.closeWrite();
    await readAll(conn);
  });
}

for (const stream of ["upstream", "downstream"] as const) {
  Deno.test(`latency holds what goes ${stream}, and loses nothing`, () =>
    withToxics(
      [{ type: "latency", stream, attributes: { latency: 150 } }],
      async (watched, conn) => {
        const bytes = testBytes(3_000_001);
        const start = performance.now();
        assertEquals(await exchange(conn, bytes), bytes);
        assertGreaterOrEqual(performance.now() - start, 149);
        const [connected] = await watched.log.first("connected", 1);
        assertEquals(connected.toxics, [`latency_${stream}`]);
        const [closed] = await watched.log.first("closed", 1);
        assertEquals([closed.why, closed.toxic], ["client", undefined]);
      },
    ));
}

Deno.test("latency over bandwidth over slicer is what the three do together", () =>
  withToxics(
    [
      { type: "latency", attributes: { latency: 100, jitter: 20 } },
      { type: "bandwidth", attributes: { rate: 1000 } },
      { type: "slicer", attributes: { average_size: 500, delay: 10 } },
    ],
    async (_, conn) => {
      const bytes = testBytes(300_000);
      const start = performance.now();
      assertEquals(await exchange(conn, bytes), bytes);
      assertGreaterOrEqual(performance.now() - start, 379);
    },
  ));

Deno.test("bandwidth lets a ping through at once, and a flood at its rate", () =>
  withToxics(
    [{ type: "bandwidth", stream: "upstream", attributes: { rate: 500 } }],
    async (_, conn) => {
      const bytes = testBytes(100_000);
      const start = performance.now();
      assertEquals(await exchange(conn, bytes), bytes);
      assertGreaterOrEqual(performance.now() - start, 199);
    },
  ));

Deno.test("slow_close delays the end, not the data", () =>
  withToxics(
    [{ type: "slow_close", attributes: { delay: 200 } }],
    async (_, conn) => {
      await send(conn, "hello");
      assertEquals(text(await readExactly(conn, 5)), "hello");
      const start = performance.now();
      await conn.closeWrite();
      assertEquals(await conn.read(new Uint8Array(1)), null);
      assertGreaterOrEqual(performance.now() - start, 199);
    },
  ));

Deno.test("timeout lets nothing through, and ends the connection", () =>
  withToxics(
    [{ type: "timeout", attributes: { timeout: 200 } }],
    async (watched, conn) => {
      const start = performance.now();
      await send(conn, "hello");
      assertEquals((await readAll(conn)).length, 0);
      assertGreaterOrEqual(performance.now() - start, 150);
      const [closed] = await watched.log.first("closed", 1);
      assertEquals([closed.why, closed.toxic], ["fault", "timeout_downstream"]);
    },
  ));

Deno.test("a timeout of 0 lasts until the client leaves", () =>
  withToxics(
    [{ type: "timeout", stream: "upstream" }],
    async (watched, conn) => {
      await send(conn, "hello");
      await conn.closeWrite();
      assertEquals((await readAll(conn)).length, 0);
      const [closed] = await watched.log.first("closed", 1);
      assertEquals([closed.why, closed.bytesUp], ["client", 5]);
    },
  ));

Deno.test("reset_peer sends a RST to both sides", async () => {
  const atUpstream = Promise.withResolvers<unknown>();
  await using upstream = new Upstream(async (conn) => {
    try {
      await writeAll(conn, testBytes(10));
      await readAll(conn);
    } catch (error) {
      atUpstream.resolve(error);
    }
  });
  await using watched = await WatchedProxy.to(upstream, {
    toxics: [{ type: "reset_peer", attributes: { timeout: 100 } }],
  });
  const start = performance.now();
  using client = await watched.connect();
  await assertRejects(() => readAll(client), Deno.errors.ConnectionReset);
  assertGreaterOrEqual(performance.now() - start, 99);
  assert(await atUpstream.promise instanceof Deno.errors.ConnectionReset);
  const [closed] = await watched.log.first("closed", 1);
  assertEquals([closed.why, closed.toxic], ["fault", "reset_peer_downstream"]);
});

Deno.test("Node's client sees ECONNRESET", async () => {
  await using upstream = answering(testBytes(10));
  await using watched = await WatchedProxy.to(upstream, {
    toxics: [{ type: "reset_peer", stream: "upstream" }],
  });
  const socket = connectNode(watched.proxy.routes[0].localPort, "127.0.0.1");
  const failed = Promise.withResolvers<NodeJS.ErrnoException>();
  socket.on("error", failed.resolve);
  socket.on("end", () => failed.reject(new Error("ended without a reset")));
  socket.resume();
  socket.write("hello");
  assertEquals((await failed.promise).code, "ECONNRESET");
});

Deno.test("another client sees ECONNRESET, too", async (t) => {
  const python = `
import socket, sys
s = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
s.sendall(b"hello")
try:
    print("got", s.recv(10))
except ConnectionResetError:
    print("reset")
`;
  await using upstream = answering(testBytes(10));
  await using watched = await WatchedProxy.to(upstream, {
    toxics: [{ type: "reset_peer", stream: "upstream" }],
  });
  const port = `${watched.proxy.routes[0].localPort}`;
  const command = new Deno.Command("python3", { args: ["-c", python, port] });
  let output: Deno.CommandOutput;
  try {
    output = await command.output();
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
    console.log(`skipped: ${t.name}: python3 is not installed`);
    return;
  }
  assertEquals(text(output.stdout).trim(), "reset");
});

Deno.test("slices are not merged again on the way out", async () => {
  const got: number[] = [];
  await using upstream = new Upstream(async (conn) => {
    const buffer = new Uint8Array(1000);
    for (;;) {
      const size = await conn.read(buffer);
      if (size === null) break;
      got.push(size);
    }
    await conn.closeWrite();
  });
  await using watched = await WatchedProxy.to(upstream, {
    toxics: [{
      type: "slicer",
      stream: "upstream",
      attributes: { average_size: 10, delay: 20_000 },
    }],
  });
  using client = await watched.connect();
  await exchange(client, testBytes(50));
  assertEquals(got.reduce((sum, each) => sum + each), 50);
  assertGreaterOrEqual(got.length, 2); // five, but for a slow reader
});

Deno.test("limit_data delivers its last byte, and closes", async () => {
  const bytes = testBytes(5_000_000);
  await using upstream = answering(bytes);
  await using watched = await WatchedProxy.to(upstream, {
    toxics: [
      { type: "limit_data", attributes: { bytes: 1_234_567 } },
      { type: "latency", attributes: { latency: 50 } },
    ],
  });
  using client = await watched.connect();
  await send(client, "please");
  const got = await readAll(client);
  assertEquals(got.length, 1_234_567);
  assertEquals(got, bytes.subarray(0, got.length));
  client.close();
  const [closed] = await watched.log.first("closed", 1);
  assertEquals([closed.why, closed.toxic], ["fault", "limit_data_downstream"]);
});

Deno.test("limit_data delivers its last byte to a client that goes on sending", async () => {
  await using upstream = echo();
  await using watched = await WatchedProxy.to(upstream, {
    toxics: [{ type: "limit_data", attributes: { bytes: 400_000 } }],
  });
  using client = await watched.connect();
  const bytes = testBytes(400_000);
  const sending = (async () => {
    for (;;) await writeAll(client, bytes);
  })();
  const stopped = sending.catch((error) => assert(isDisconnect(error)));
  assertEquals(await readExactly(client, bytes.length), bytes);
  assertEquals(await client.read(new Uint8Array(1)), null);
  await stopped;
});

Deno.test("packet_loss and corrupt repeat with the seed", async () => {
  const bytes = testBytes(50_000);
  const once = async (toxic: ToxicOptions, seed: number) => {
    await using upstream = echo();
    await using watched = await WatchedProxy.to(
      upstream,
      { toxics: [toxic] },
      { seed },
    );
    using client = await watched.connect();
    return await exchange(client, bytes);
  };
  const corrupt: ToxicOptions = { type: "corrupt", attributes: { rate: 0.01 } };
  const first = await once(corrupt, 1);
  assertEquals(first.length, bytes.length);
  assert(first.some((byte, i) => byte !== bytes[i]));
  assertEquals(await once(corrupt, 1), first);
  assert((await once(corrupt, 2)).some((byte, i) => byte !== first[i]));
  const all: ToxicOptions = {
    type: "packet_loss",
    attributes: { loss_rate: 1 },
  };
  assertEquals((await once(all, 1)).length, 0);
});

Deno.test("limit_time closes under constant traffic", () =>
  withToxics(
    [{ type: "limit_time", attributes: { time: 200 } }],
    async (watched, conn) => {
      const start = performance.now();
      const bytes = testBytes(1000);
      try {
        for (;;) {
          await writeAll(conn, bytes);
          const got = await readExactly(conn, bytes.length);
          if (got.length < bytes.length) break;
          assertEquals(got, bytes);
        }
      } catch (error) {
        assert(isDisconnect(error));
      }
      assertGreaterOrEqual(performance.now() - start, 150);
      const [closed] = await watched.log.first("closed", 1);
      assertEquals(closed.toxic, "limit_time_downstream");
    },
  ));

Deno.test("a toxic that does not act has no effect whatever", () =>
  withToxics(
    (["latency", "timeout", "reset_peer", "limit_data", "limit_time"] as const)
      .map((type) => ({ type, toxicity: 0 })),
    async (watched, conn) => {
      const bytes = testBytes(2_000_003);
      assertEquals(await exchange(conn, bytes), bytes);
      const [closed] = await watched.log.first("closed", 1);
      assertEquals([closed.why, closed.toxic], ["client", undefined]);
      const [connected] = await watched.log.first("connected", 1);
      assertEquals(connected.toxics, []);
    },
  ));

for (const resettable of [false, true]) {
  const also: ToxicOptions[] = resettable
    ? [{ type: "reset_peer", toxicity: 1e-9 }] // never, but for all it knows
    : [];
  const sockets = resettable ? "Node's sockets" : "Deno's sockets";

  Deno.test(`a fast sender is held up by a slow toxic, on ${sockets}`, async () => {
    const stalled = Promise.withResolvers<void>();
    let sent = 0;
    await using upstream = echo();
    await using watched = await WatchedProxy.to(upstream, {
      toxics: [
        {
          type: "latency",
          stream: "upstream",
          attributes: { latency: HOUR_MS },
        },
        ...also,
      ],
    });
    using client = await watched.connect();
    const block = testBytes(1 << 20);
    const sending = (async () => {
      while (sent < 1 << 30) {
        const written = writeAll(client, block);
        let done = false;
        written.then(() => done = true, () => done = true);
        // Nothing moves on loopback for that long but for a wait without end.
        for (let i = 0; i < 40 && !done; i++) {
          await new Promise((resolve) => setTimeout(resolve, 25));
        }
        if (!done) stalled.resolve();
        await written;
        sent += block.length;
      }
    })();
    await Promise.race([stalled.promise, sending]);
    assert(sent < 128 << 20, `${sent} bytes were taken`);
    await watched.proxy.stop();
    await assertRejects(() => sending);
    const [closed] = await watched.log.first("closed", 1);
    assertEquals(closed.why, "drain");
  });

  Deno.test(`all bytes get through both ways, on ${sockets}`, async () => {
    await using upstream = echo();
    await using watched = await WatchedProxy.to(upstream, { toxics: also });
    await Promise.all(Array.from({ length: 20 }, async (_, i) => {
      using client = await watched.connect();
      const bytes = testBytes(700_001 + i, i + 1);
      assertEquals(await exchange(client, bytes), bytes);
    }));
    const closed = await watched.log.first("closed", 20);
    assert(closed.every(({ why }) => why === "client"));
  });

  Deno.test(`a reset lets what is held arrive, on ${sockets}`, async () => {
    const bytes = testBytes(20_000);
    const got = Promise.withResolvers<Uint8Array>();
    await using upstream = new Upstream((conn) =>
      readAll(conn).then(got.resolve, got.reject)
    );
    await using watched = await WatchedProxy.to(upstream, {
      toxics: [
        { type: "latency", stream: "upstream", attributes: { latency: 300 } },
        ...also,
      ],
    });
    const port = watched.proxy.routes[0].localPort;
    const client = connectNode(port, "127.0.0.1");
    await watched.log.first("connected", 1);
    await new Promise<void>((resolve) => client.write(bytes, () => resolve()));
    client.resetAndDestroy();
    const arrived = await got.promise;
    const [closed] = await watched.log.first("closed", 1);
    assertEquals(closed.why, "client_reset");
    assertEquals(arrived, bytes.subarray(0, closed.bytesUp));
  });
}

Deno.test("an HTTP client gets through slowly, is cut off, or is reset", async () => {
  const body = "x".repeat(20_000);
  await using server = Deno.serve(
    { hostname: "127.0.0.1", port: 0, onListen: () => {} },
    () => new Response(body),
  );
  const address = `127.0.0.1:${server.addr.port}`;
  const get = async (toxic: ToxicOptions, signal?: AbortSignal) => {
    await using watched = await WatchedProxy.to({ address }, {
      toxics: [toxic],
    });
    const client = Deno.createHttpClient({ poolMaxIdlePerHost: 0 });
    const url = `http://127.0.0.1:${watched.proxy.routes[0].localPort}/`;
    try {
      const response = await fetch(url, { client, signal });
      return await response.text();
    } finally {
      client.close();
    }
  };
  const start = performance.now();
  const slow: ToxicOptions = { type: "bandwidth", attributes: { rate: 100 } };
  assertEquals(await get(slow), body);
  assertGreaterOrEqual(performance.now() - start, 199);
  await assertRejects(() =>
    get({ type: "limit_data", attributes: { bytes: 1000 } })
  );
  await assertRejects(() => get({ type: "reset_peer" }));
  await assertRejects(() => get({ type: "timeout" }, AbortSignal.timeout(100)));
});
