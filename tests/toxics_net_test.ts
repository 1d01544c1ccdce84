import {
  assert,
  assertEquals,
  assertGreaterOrEqual,
  assertRejects,
  assertStringIncludes,
} from "@std/assert";
import { connect as connectNode } from "node:net";
import { decide, type ToxicOptions, type ToxicType } from "../main.ts";
import {
  echo,
  isDisconnect,
  readAll,
  readExactly,
  send,
  soon,
  testBytes,
  text,
  Upstream,
  WatchedProxy,
  writeAll,
} from "./helpers.ts";

const HOUR_MS = 3_600_000;

/** A test that leaves nothing behind: Deno checks that only when asked to. */
function test(
  name: string,
  fn: (t: Deno.TestContext) => void | Promise<void>,
): void {
  Deno.test({ name, fn, sanitizeOps: true, sanitizeResources: true });
}

/** Sends all, ends, and reads to the end. */
async function exchange(
  conn: Deno.TcpConn,
  bytes: Uint8Array,
): Promise<Uint8Array> {
  const sent = writeAll(conn, bytes).then(() => conn.closeWrite());
  const [, got] = await Promise.all([sent, readAll(conn)]);
  return got;
}

/** Lets all that is ready go on for a while. */
async function turns(): Promise<void> {
  for (let i = 0; i < 200; i++) {
    await new Promise<void>((resolve) => setImmediate(resolve));
  }
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
  test(`latency holds what goes ${stream}, and loses nothing`, () =>
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

test("latency over bandwidth over slicer is what the three do together", () =>
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

test("bandwidth lets a ping through at once, and a flood at its rate", () =>
  withToxics(
    [{ type: "bandwidth", stream: "upstream", attributes: { rate: 500 } }],
    async (_, conn) => {
      const bytes = testBytes(100_000);
      const start = performance.now();
      assertEquals(await exchange(conn, bytes), bytes);
      assertGreaterOrEqual(performance.now() - start, 199);
    },
  ));

test("slow_close delays the end, not the data", () =>
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

test("timeout lets nothing through, and ends the connection", () =>
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

test("a timeout of 0 lasts until the client leaves", () =>
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

test("reset_peer sends a RST to both sides", async () => {
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

test("Node's client sees ECONNRESET", async () => {
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

test("another client sees ECONNRESET, too", async (t) => {
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

test("slices are not merged again on the way out", async () => {
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

test("limit_data delivers its last byte, and closes", async () => {
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

test("limit_data delivers its last byte to a client that goes on sending", async () => {
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

test("packet_loss and corrupt repeat with the seed", async () => {
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

test("limit_time closes under constant traffic", () =>
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

test("a toxic that does not act has no effect whatever", () =>
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

/** Sends blocks until one is not taken; `sending` goes on with it. */
async function untilStalled(client: Deno.TcpConn, block: Uint8Array) {
  const stalled = Promise.withResolvers<void>();
  let sent = 0;
  let isEnough = false;
  const sending = (async () => {
    while (sent < 1 << 30 && !isEnough) {
      const written = writeAll(client, block);
      let done = false;
      written.then(() => done = true, () => done = true);
      // Nothing moves on loopback for that long but for a wait without end.
      for (let i = 0; i < 16 && !done; i++) {
        await new Promise((resolve) => setTimeout(resolve, 25));
      }
      if (!done) {
        isEnough = true;
        stalled.resolve();
      }
      await written;
      sent += block.length;
    }
    return sent;
  })();
  await Promise.race([stalled.promise, sending]);
  assert(sent < 128 << 20, `${sent} bytes were taken`);
  return { sending };
}

for (const resettable of [false, true]) {
  const also: ToxicOptions[] = resettable
    ? [{ type: "reset_peer", toxicity: 1e-9 }] // never, but for all it knows
    : [];
  const sockets = resettable ? "Node's sockets" : "Deno's sockets";

  test(`a bandwidth of 0 holds up the sender, and loses nothing, on ${sockets}`, async () => {
    const count = Promise.withResolvers<number>();
    const block = testBytes(1 << 20);
    await using upstream = new Upstream(async (conn) => {
      let blocks = 0;
      for (;; blocks++) {
        const got = await readExactly(conn, block.length);
        if (got.length === 0) break;
        // Comparing 100 MB byte by byte with assertEquals takes too long.
        assertEquals(got.length, block.length);
        if (!got.every((byte, i) => byte === block[i])) break;
      }
      count.resolve(blocks);
      await conn.closeWrite();
    });
    const stream = "upstream";
    await using watched = await WatchedProxy.to(upstream, {
      name: "r",
      toxics: [{ type: "bandwidth", stream, attributes: { rate: 0 } }, ...also],
    });
    using client = await watched.connect();
    const { sending } = await untilStalled(client, block);
    assertEquals(watched.proxy.stats()[0].sent.upstream, 0);
    watched.proxy.removeToxic("r", "bandwidth_upstream");
    const sent = await sending;
    await client.closeWrite();
    assertEquals(await count.promise, sent / block.length);
    assertEquals((await readAll(client)).length, 0);
    const [closed] = await watched.log.first("closed", 1);
    assertEquals([closed.why, closed.bytesUp], ["client", sent]);
  });

  test(`a bandwidth of 0 lets an end without data pass, on ${sockets}`, async () => {
    await using upstream = echo();
    const attributes = { rate: 0 };
    await using watched = await WatchedProxy.to(upstream, {
      toxics: [{ type: "bandwidth", attributes }, ...also],
    });
    using client = await watched.connect();
    assertEquals((await exchange(client, testBytes(0))).length, 0);
    const [closed] = await watched.log.first("closed", 1);
    assertEquals(closed.why, "client");
  });

  test(`a fast sender is held up by a slow toxic, on ${sockets}`, async () => {
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
    const { sending } = await untilStalled(client, testBytes(1 << 20));
    await watched.proxy.stop();
    await assertRejects(() => sending);
    const [closed] = await watched.log.first("closed", 1);
    assertEquals(closed.why, "drain");
  });

  test(`all bytes get through both ways, on ${sockets}`, async () => {
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

  test(`a reset lets what is held arrive, on ${sockets}`, async () => {
    const bytes = testBytes(3000); // one segment, so one read
    const first = Promise.withResolvers<void>();
    const got = Promise.withResolvers<Uint8Array>();
    await using upstream = new Upstream(async (conn) => {
      const one = await readExactly(conn, 1);
      first.resolve();
      const rest = await readAll(conn);
      got.resolve(new Uint8Array([...one, ...rest]));
    });
    await using watched = await WatchedProxy.to(upstream, {
      toxics: [
        { type: "bandwidth", stream: "upstream", attributes: { rate: 10 } },
        ...also,
      ],
    });
    const port = watched.proxy.routes[0].localPort;
    const client = connectNode(port, "127.0.0.1");
    client.write(bytes);
    await first.promise; // the rest is held
    client.resetAndDestroy();
    assertEquals(await got.promise, bytes);
    const [closed] = await watched.log.first("closed", 1);
    assertEquals([closed.why, closed.bytesUp], ["client_reset", 3000]);
  });

  test(`a receiver that resets ends what is held for it, on ${sockets}`, async () => {
    const sent = Promise.withResolvers<void>();
    await using upstream = new Upstream(async (conn) => {
      await readExactly(conn, 1);
      await send(conn, "answer");
      sent.resolve();
      await readAll(conn);
    });
    await using watched = await WatchedProxy.to(upstream, {
      toxics: [
        { type: "latency", attributes: { latency: HOUR_MS } },
        ...also,
      ],
    });
    const port = watched.proxy.routes[0].localPort;
    const client = connectNode(port, "127.0.0.1");
    client.write("x");
    await sent.promise;
    client.resetAndDestroy();
    const [closed] = await watched.log.first("closed", 1);
    assertEquals(closed.why, "client_reset");
  });

  for (const stream of ["upstream", "downstream"] as const) {
    test(`stop ends what is held ${stream} for an hour, on ${sockets}`, async () => {
      await using upstream = echo();
      const toxics: ToxicOptions[] = [
        { type: "latency", stream, attributes: { latency: HOUR_MS } },
        ...also,
      ];
      const watched = await WatchedProxy.to(upstream, { toxics });
      using open = await watched.connect();
      using halfClosed = await watched.connect();
      await watched.log.first("connected", 2);
      await send(open, "held");
      await send(halfClosed, "held");
      await halfClosed.closeWrite();
      await turns(); // most likely it is held by now; else it never will be
      await soon(watched.proxy.stop(), "stop");
      const closed = watched.log.of("closed");
      assertEquals(closed.map(({ why }) => why), ["drain", "drain"]);
    });
  }

  test(`a drain waits for what is delayed, on ${sockets}`, async () => {
    await using upstream = echo();
    await using watched = await WatchedProxy.to(upstream, {
      toxics: [
        { type: "latency", attributes: { latency: 30, jitter: 10 } },
        { type: "bandwidth", attributes: { rate: 1000 } },
        { type: "slicer", attributes: { average_size: 500 } },
        { type: "slow_close", attributes: { delay: 20 } },
        ...also,
      ],
    });
    using conn = await watched.connect();
    await watched.log.first("connected", 1);
    const bytes = testBytes(100_000);
    const got = exchange(conn, bytes);
    await watched.log.first("connected", 1);
    const cut = await soon(watched.proxy.drain(), "drain");
    assertEquals([cut, await got], [0, bytes]);
  });

  test(`a drain cuts what is held for too long, on ${sockets}`, async () => {
    await using upstream = echo();
    const watched = await WatchedProxy.to(upstream, {
      toxics: [
        { type: "latency", attributes: { latency: HOUR_MS } },
        ...also,
      ],
    });
    using conn = await watched.connect();
    await send(conn, "held");
    await conn.closeWrite();
    await watched.log.first("connected", 1);
    assertEquals(await soon(watched.proxy.drain(50), "drain"), 1);
  });

  test(`a toxic that acts by the clock goes with its connection, on ${sockets}`, async () => {
    await using upstream = echo();
    await using watched = await WatchedProxy.to(upstream, {
      toxics: [
        { type: "limit_time", attributes: { time: HOUR_MS } },
        ...also,
      ],
    });
    using conn = await watched.connect();
    assertEquals(await exchange(conn, testBytes(10)), testBytes(10));
    const [closed] = await watched.log.first("closed", 1);
    assertEquals([closed.why, closed.toxic], ["client", undefined]);
  }); // it has no timer left, or the sanitizer says so

  test(`limit_data closes also over a timeout, on ${sockets}`, async () => {
    await using upstream = echo();
    const stream = "upstream";
    const watched = await WatchedProxy.to(upstream, {
      toxics: [
        { type: "limit_data", stream, attributes: { bytes: 3 } },
        { type: "timeout", stream },
        ...also,
      ],
    });
    const conn = await watched.connect();
    await send(conn, "hello");
    await conn.closeWrite();
    const ended = readAll(conn).then(() => conn.close());
    const closed = await soon(watched.log.first("closed", 1), "close");
    assertEquals(closed[0].toxic, "limit_data_upstream");
    await ended;
    await soon(watched.proxy.stop(), "stop");
  });

  test(`the other way goes on after one has ended, on ${sockets}`, async () => {
    await using upstream = new Upstream(async (conn) => {
      await conn.closeWrite(); // before it has read anything
      assertEquals((await readAll(conn)).length, 200_001);
    });
    await using watched = await WatchedProxy.to(upstream, {
      toxics: [
        { type: "latency", stream: "upstream", attributes: { latency: 30 } },
        { type: "slow_close", stream: "upstream", attributes: { delay: 30 } },
        ...also,
      ],
    });
    using conn = await watched.connect();
    assertEquals((await readAll(conn)).length, 0);
    await writeAll(conn, testBytes(200_001));
    await conn.closeWrite();
    const [closed] = await watched.log.first("closed", 1);
    assertEquals([closed.why, closed.bytesUp], ["upstream", 200_001]);
  });

  test(`a timeout of 0 ends with a client that resets, on ${sockets}`, async () => {
    await using upstream = echo();
    await using watched = await WatchedProxy.to(upstream, {
      toxics: [{ type: "timeout", stream: "upstream" }, ...also],
    });
    const port = watched.proxy.routes[0].localPort;
    const client = connectNode(port, "127.0.0.1");
    await watched.log.first("connected", 1);
    client.write("hello", () => client.resetAndDestroy());
    const [closed] = await watched.log.first("closed", 1);
    assertEquals(closed.why, "client_reset");
  });
}

test("reset_peer resets both sides after an end without data", async () => {
  const atUpstream = Promise.withResolvers<unknown>();
  await using upstream = new Upstream(async (conn) => {
    await send(conn, "hi");
    await readAll(conn).then(atUpstream.resolve, atUpstream.resolve);
  });
  const watched = await WatchedProxy.to(upstream, {
    toxics: [{ type: "reset_peer", stream: "upstream" }],
  });
  const port = watched.proxy.routes[0].localPort;
  const socket = connectNode({ port, host: "127.0.0.1", allowHalfOpen: true });
  const failed = Promise.withResolvers<NodeJS.ErrnoException>();
  socket.on("error", failed.resolve);
  socket.on("end", () => failed.reject(new Error("ended without a reset")));
  socket.once("data", () => socket.end()); // by now the upstream is there
  assertEquals((await soon(failed.promise, "reset")).code, "ECONNRESET");
  assert(
    await soon(atUpstream.promise, "reset") instanceof
      Deno.errors.ConnectionReset,
  );
  const [closed] = await soon(watched.log.first("closed", 1), "close");
  assertEquals([closed.why, closed.toxic], ["fault", "reset_peer_upstream"]);
  await soon(watched.proxy.stop(), "stop");
});

test("reset_peer resets a client that is being sent to", async () => {
  const flowing = Promise.withResolvers<void>();
  await using upstream = new Upstream(async (conn) => {
    for (;;) await writeAll(conn, testBytes(65_536)).then(flowing.resolve);
  });
  await using watched = await WatchedProxy.to(upstream, {
    toxics: [{ type: "reset_peer", stream: "upstream" }],
  });
  using client = await watched.connect();
  await flowing.promise;
  await send(client, "x");
  await assertRejects(() => readAll(client), Deno.errors.ConnectionReset);
});

test("limit_data cuts what goes upstream, to the byte", async () => {
  const got = Promise.withResolvers<Uint8Array>();
  await using upstream = new Upstream((conn) =>
    readAll(conn).then(got.resolve, got.reject)
  );
  await using watched = await WatchedProxy.to(upstream, {
    toxics: [{
      type: "limit_data",
      stream: "upstream",
      attributes: { bytes: 70_001 },
    }],
  });
  using client = await watched.connect();
  const bytes = testBytes(200_000);
  const sending = writeAll(client, bytes).catch((error) =>
    assert(isDisconnect(error))
  );
  assertEquals(await got.promise, bytes.subarray(0, 70_001));
  await sending;
  const [closed] = await watched.log.first("closed", 1);
  assertEquals([closed.why, closed.toxic], ["fault", "limit_data_upstream"]);
});

test("timeout holds back what goes upstream, and closes", async () => {
  let arrived = 0;
  await using upstream = new Upstream(async (conn) => {
    arrived += (await readAll(conn)).length;
  });
  await using watched = await WatchedProxy.to(upstream, {
    toxics: [{
      type: "timeout",
      stream: "upstream",
      attributes: { timeout: 100 },
    }],
  });
  using client = await watched.connect();
  await send(client, "hello");
  await readAll(client).catch((error) => assert(isDisconnect(error)));
  const [closed] = await watched.log.first("closed", 1);
  assertEquals([closed.why, closed.toxic], ["fault", "timeout_upstream"]);
  assertGreaterOrEqual(closed.durationMs, 100);
  assertEquals(arrived, 0);
});

test("packet_loss loses whole chunks, and nothing of the others", () =>
  withToxics(
    [{
      type: "packet_loss",
      stream: "upstream",
      attributes: { loss_rate: 0.5 },
    }],
    async (_, conn) => {
      // Each is sent when the one before has had its time, and so is a chunk
      // of its own or grows the next: whatever arrives is made of whole ones.
      for (let i = 0; i < 100; i++) {
        await send(conn, String.fromCharCode(33 + i % 90).repeat(10));
        await turns();
      }
      await conn.closeWrite();
      const got = text(await readAll(conn));
      assert(got.length > 0 && got.length < 1000);
      assert(got.match(/(.)\1{9}/g)?.join("") === got, got);
    },
  ));

test("each connection meets what the seed decides for it", async () => {
  const toxics: ToxicOptions[] = [
    { type: "latency", name: "a", toxicity: 0.5 },
    { type: "latency", name: "b", stream: "upstream", toxicity: 0.3 },
  ];
  await using upstream = echo();
  await using watched = await WatchedProxy.to(upstream, { toxics });
  const [route] = watched.proxy.routes;
  await Promise.all(Array.from({ length: 30 }, async () => {
    using conn = await watched.connect();
    await exchange(conn, testBytes(10));
  }));
  const connected = await watched.log.first("connected", 30);
  for (const { connection, toxics } of connected) {
    const fate = decide(1, route, connection);
    assert(fate.kind === "forward");
    assertEquals(toxics, fate.toxics.map(({ name }) => name));
  }
  const mixes = new Set(connected.map(({ toxics }) => toxics.join()));
  assertEquals(mixes.size, 4);
});

test("10 MB get through both ways at once, where a reset could come", async () => {
  const down = testBytes(10_000_000, 2);
  const atUpstream = Promise.withResolvers<Uint8Array>();
  await using upstream = new Upstream(async (conn) => {
    const sent = writeAll(conn, down).then(() => conn.closeWrite());
    const [got] = await Promise.all([readAll(conn), sent]);
    atUpstream.resolve(got);
  });
  await using watched = await WatchedProxy.to(upstream, {
    toxics: [{ type: "reset_peer", toxicity: 1e-9 }],
  });
  using conn = await watched.connect();
  const up = testBytes(10_000_000, 3);
  const same = (a: Uint8Array, b: Uint8Array) =>
    a.length === b.length && a.every((byte, i) => byte === b[i]);
  assert(same(await exchange(conn, up), down));
  assert(same(await atUpstream.promise, up));
});

test("none of them has an effect with a toxicity of 0", async () => {
  const attributes: Record<ToxicType, Record<string, number>> = {
    latency: { latency: HOUR_MS },
    bandwidth: { rate: 1 },
    slow_close: { delay: HOUR_MS },
    timeout: { timeout: 1 },
    reset_peer: {},
    slicer: { average_size: 1, delay: 1_000_000 },
    limit_data: { bytes: 1 },
    packet_loss: { loss_rate: 1 },
    corrupt: { rate: 1 },
    limit_time: { time: 1 },
    noop: {},
  };
  const types = Object.keys(attributes) as ToxicType[];
  const toxics = types.flatMap((type) =>
    (["upstream", "downstream"] as const).map((stream) => ({
      type,
      stream,
      toxicity: 0,
      attributes: attributes[type],
    }))
  );
  await using upstream = echo();
  await using watched = await WatchedProxy.to(upstream, { toxics });
  using conn = await watched.connect();
  const bytes = testBytes(500_001);
  assertEquals(await exchange(conn, bytes), bytes);
  const [closed] = await watched.log.first("closed", 1);
  assertEquals([closed.why, closed.toxic], ["client", undefined]);
});

test("a flood against 10 KB/s is held up within the bound", async () => {
  const some = Promise.withResolvers<void>();
  await using upstream = new Upstream(async (conn) => {
    await readExactly(conn, 5000); // in half a second, by no means earlier
    some.resolve();
    await readAll(conn);
  });
  await using watched = await WatchedProxy.to(upstream, {
    toxics: [{
      type: "bandwidth",
      stream: "upstream",
      attributes: { rate: 10 },
    }],
  });
  using client = await watched.connect();
  let sent = 0;
  const block = testBytes(1 << 20);
  const sending = (async () => {
    while (sent < 1 << 30) {
      sent += await client.write(block);
    }
  })();
  const stopped = sending.catch((error) => assert(isDisconnect(error)));
  await some.promise;
  assert(sent < 128 << 20, `${sent} bytes were taken`);
  await watched.proxy.stop();
  await stopped;
  assert(sent < 128 << 20, `${sent} bytes were taken`);
});

test("an HTTP client gets through slowly, is cut off, or is reset", async () => {
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
  await assertRejects(
    () => get({ type: "limit_data", attributes: { bytes: 1000 } }),
    TypeError,
    "body",
  );
  const reset = await assertRejects(
    () => get({ type: "reset_peer", stream: "upstream" }),
    TypeError,
  );
  assertStringIncludes(Deno.inspect(reset), "reset");
  const timedOut = await assertRejects(
    () => get({ type: "timeout" }, AbortSignal.timeout(100)),
    DOMException,
  );
  assertEquals(timedOut.name, "TimeoutError");
});

/**
 * What a client gets of a long answer that has filled the system's buffers when
 * it begins to read: it has ended its stream by then.
 */
async function answerAfterEnd(
  question: string,
  resettable: boolean,
): Promise<{ watched: WatchedProxy; bytes: Uint8Array; got: Uint8Array }> {
  const bytes = testBytes(40_000_000);
  await using upstream = new Upstream(async (conn) => {
    await readAll(conn);
    await writeAll(conn, bytes);
    await conn.closeWrite();
  });
  await using watched = await WatchedProxy.to(upstream, {}, {}, { resettable });
  using client = await watched.connect();
  await send(client, question);
  await client.closeWrite();
  for (let last = -1, same = 0; same < 10;) {
    await new Promise((resolve) => setTimeout(resolve, 10));
    const now = watched.proxy.stats()[0].sent.downstream;
    same = now > 0 && now === last ? same + 1 : 0;
    last = now;
  }
  return { watched, bytes, got: await readAll(client) };
}

for (const resettable of [false, true]) {
  const sockets = resettable ? "Node's sockets" : "Deno's sockets";
  test(`a client that has ended its stream gets a long answer whole, on ${sockets}`, async () => {
    const { bytes, got } = await answerAfterEnd("please", resettable);
    assertEquals(got.length, bytes.length);
    assertEquals(got, bytes);
  });
}

test("a client that ends its stream without a byte gets all on Deno's sockets", async () => {
  const { bytes, got } = await answerAfterEnd("", false);
  assertEquals(got.length, bytes.length);
  assertEquals(got, bytes);
});

test("on Node's it gets all, or a RST, but never a part that looks whole", async () => {
  try {
    const { bytes, got } = await answerAfterEnd("", true);
    assertEquals(got.length, bytes.length);
    assertEquals(got, bytes);
  } catch (error) {
    assert(error instanceof Deno.errors.ConnectionReset, `${error}`);
  }
});
