import {
  assert,
  assertEquals,
  assertGreaterOrEqual,
  assertLess,
  assertMatch,
} from "@std/assert";
import { ChaosProxy, type ConfigOptions, type RouteOptions } from "../main.ts";
import {
  Cli,
  echo,
  EventLog,
  readAll,
  readExactly,
  readToEnd,
  send,
  testBytes,
  text,
  unlessDisconnected,
  untilRefused,
  Upstream,
  WatchedProxy,
  writeAll,
} from "./helpers.ts";

const IS_WINDOWS = Deno.build.os === "windows";
const IS_LINUX = Deno.build.os === "linux";
if (IS_WINDOWS) {
  console.warn("Windows cannot be sent signals: draining by them is skipped");
}
const onSignals = { ignore: IS_WINDOWS };
const LONG_MS = 1_000_000_000;

for (const signal of ["SIGTERM", "SIGINT"] as const) {
  Deno.test(
    `on ${signal} a transfer in flight completes while new connections are refused`,
    onSignals,
    async () => {
      const answer = testBytes(8_000_003);
      const goOn = Promise.withResolvers<void>();
      await using upstream = new Upstream(async (conn) => {
        await writeAll(conn, answer.subarray(0, 1000));
        await goOn.promise;
        await writeAll(conn, answer.subarray(1000));
        await conn.closeWrite();
        assertEquals(text(await readAll(conn)), "a request, and its end");
      });
      await using cli = await startCli(upstream);
      using client = await Deno.connect({ port: cli.port() });
      await send(client, "a request, ");
      const begin = await readExactly(client, 1000);

      cli.kill(signal);
      const [draining] = await cli.log.first("draining", 1);
      assertEquals(draining.connections, 1);
      await untilRefused(cli.port()).finally(goOn.resolve);
      const rest = await readAll(client);
      await send(client, "and its end");
      await client.closeWrite();

      assertEquals((await cli.status).code, 0);
      assertEquals(begin, answer.slice(0, 1000));
      assertEquals(rest.length, answer.length - 1000);
      assertEquals(rest, answer.slice(1000));
      assertEquals(cli.log.of("closed").map((each) => each.why), ["upstream"]);
      assertEquals(cli.log.of("drained").map((each) => each.cut), [0]);
      assertEquals(cli.log.all.at(-1)?.event, "drained");
      assertEquals(cli.stderr, "");
    },
  );
}

Deno.test(
  "with nothing in flight a drain is over at once",
  onSignals,
  async () => {
    await using upstream = echo();
    await using cli = await startCli(upstream, { drainTimeoutMs: LONG_MS });
    await connected(cli);
    cli.kill();
    assertEquals((await cli.status).code, 0);
    assertEquals(cli.log.of("draining").map((each) => each.connections), [0]);
    assertEquals(cli.log.of("drained").map((each) => each.cut), [0]);
  },
);

Deno.test(
  "what is left after drainTimeoutMs is cut, and the exit code is 1",
  onSignals,
  async () => {
    const drainTimeoutMs = 300;
    await using upstream = echo();
    await using cli = await startCli(upstream, { drainTimeoutMs });
    using client = await Deno.connect({ port: cli.port() });
    await send(client, "hello");
    await readExactly(client, 5);
    cli.kill();
    assertEquals(await readToEnd(client), 0);
    assertEquals((await cli.status).code, 1);
    const [closed] = cli.log.of("closed");
    assertEquals(closed.why, "drain");
    assertEquals(closed.bytesUp, 5);
    assertEquals(closed.bytesDown, 5);
    const [drained] = cli.log.of("drained");
    assertEquals(drained.cut, 1);
    assertGreaterOrEqual(drained.durationMs, drainTimeoutMs - 1);
    assertEquals(cli.stderr, "");
  },
);

Deno.test("a signal right after the start drains", onSignals, async () => {
  await using upstream = echo();
  const runs = Array.from({ length: 4 }, async () => {
    await using cli = await startCli(upstream);
    cli.kill();
    assertEquals((await cli.status).code, 0);
    assertEquals(cli.log.of("drained").length, 1);
  });
  await Promise.all(runs);
});

Deno.test("a second signal ends a drain at once", onSignals, async () => {
  await using upstream = echo();
  await using cli = await startCli(upstream, { drainTimeoutMs: LONG_MS });
  using client = await Deno.connect({ port: cli.port() });
  await send(client, "hello");
  await readExactly(client, 5);
  cli.kill("SIGINT");
  cli.kill("SIGTERM"); // the same stop, passed on by two
  await cli.log.first("draining", 1);
  await send(client, "more");
  assertEquals(text(await readExactly(client, 4)), "more");
  const again = setInterval(() => cli.kill("SIGTERM"), 100);
  const { code } = await cli.status;
  clearInterval(again);
  assertEquals(code, 1);
  assertMatch(cli.stderr, /second signal/);
  assertEquals(cli.log.of("drained"), []);
  assertEquals(await readToEnd(client), 0);
});

Deno.test(
  "with drainTimeoutMs 0 a drain waits for the last connection",
  onSignals,
  async () => {
    await using upstream = echo();
    await using cli = await startCli(upstream, { drainTimeoutMs: 0 });
    using first = await Deno.connect({ port: cli.port() });
    using last = await Deno.connect({ port: cli.port() });
    await cli.log.first("connected", 2);
    cli.kill();
    await cli.log.first("draining", 1);
    await first.closeWrite();
    await cli.log.first("closed", 1);
    await send(last, "still here?");
    assertEquals(text(await readExactly(last, 11)), "still here?");
    assertEquals(cli.log.of("drained"), []);
    await last.closeWrite();
    assertEquals((await cli.status).code, 0);
    assertEquals(cli.log.of("drained").map((each) => each.cut), [0]);
  },
);

Deno.test("connections counts those in flight", async () => {
  await using upstream = echo();
  await using watched = await WatchedProxy.to(upstream);
  assertEquals(watched.proxy.connections, 0);
  using one = await watched.connect();
  using two = await watched.connect();
  await watched.log.first("connected", 2);
  assertEquals(watched.proxy.connections, 2);
  for (const [client, left] of [[one, 1], [two, 0]] as const) {
    const closed = watched.log.next("closed");
    await client.closeWrite();
    await closed;
    await nextTurn();
    assertEquals(watched.proxy.connections, left);
  }
});

Deno.test("drain waits for what is in flight, and cuts nothing", async () => {
  await using upstream = echo();
  await using watched = await WatchedProxy.to(upstream);
  using client = await watched.connect();
  await watched.log.first("connected", 1);
  const draining = watched.proxy.drain(0);
  await untilRefused(watched.proxy.routes[0].localPort);
  await send(client, "hello");
  assertEquals(text(await readExactly(client, 5)), "hello");
  await client.closeWrite();
  assertEquals(await draining, 0);
  assertEquals(watched.proxy.connections, 0);
});

Deno.test("drain returns how many it had to cut", async () => {
  await using upstream = echo();
  await using watched = await WatchedProxy.to(upstream);
  using one = await watched.connect();
  using two = await watched.connect();
  await watched.log.first("connected", 2);
  assertEquals(await watched.proxy.drain(1), 2);
  assertEquals(await readToEnd(one), 0);
  assertEquals(await readToEnd(two), 0);
  assertEquals(whys(watched), ["drain", "drain"]);
  assertEquals(watched.log.of("drained")[0].cut, 2);
});

Deno.test("draining twice waits twice", async () => {
  await using upstream = echo();
  await using watched = await WatchedProxy.to(upstream);
  using client = await watched.connect();
  await watched.log.first("connected", 1);
  const both = Promise.all([watched.proxy.drain(0), watched.proxy.drain(0)]);
  await client.closeWrite();
  assertEquals(await both, [0, 0]);
  assertEquals(await watched.proxy.drain(0), 0);
  assertEquals(whys(watched), ["client"]);
});

Deno.test("stop ends a drain", async () => {
  await using upstream = echo();
  await using watched = await WatchedProxy.to(upstream);
  using client = await watched.connect();
  await watched.log.first("connected", 1);
  const draining = watched.proxy.drain(LONG_MS);
  await watched.proxy.stop();
  await draining;
  assertEquals(await readToEnd(client), 0);
  assertEquals(whys(watched), ["drain"]);
  await watched.proxy.stop();
});

Deno.test("await using stops the proxy", async () => {
  await using upstream = echo();
  const log = new EventLog();
  let port: number;
  {
    await using proxy = await ChaosProxy.start({
      routes: [{ localPort: 0, upstream: upstream.address }],
    }, { onEvent: log.add });
    port = proxy.routes[0].localPort;
    using _client = await Deno.connect({ port });
    await log.first("connected", 1);
  }
  assertEquals(log.of("closed").length, 1);
  await untilRefused(port);
});

Deno.test("stop cuts a connection in its delay", async () => {
  await using upstream = echo();
  await assertCut(upstream, { latencyMs: LONG_MS }, "delayed");
  assertEquals(upstream.accepted, 0);
});

for (const timeoutMs of [0, LONG_MS]) {
  Deno.test(`stop cuts a connection timed out for ${timeoutMs} ms`, async () => {
    await using upstream = echo();
    await assertCut(upstream, { timeoutRate: 1, timeoutMs }, "timed_out");
    assertEquals(upstream.accepted, 0);
  });
}

Deno.test("stop cuts an idle connection", async () => {
  await using upstream = echo();
  await assertCut(upstream, {}, "connected");
});

Deno.test("stop cuts a connection while its upstream is dialled", {
  ignore: !IS_LINUX,
}, async () => {
  const options = { hostname: "127.0.0.1", port: 0, tcpBacklog: 1 };
  using full = Deno.listen(options);
  const { port } = full.addr;
  const left = new AbortController();
  const fillers = Array.from(
    { length: 16 },
    () => Deno.connect({ port, signal: left.signal }),
  );
  await Promise.any(fillers);
  try {
    const route = { connectTimeoutMs: LONG_MS };
    await assertCut({ address: `127.0.0.1:${port}` }, route, "accepted");
  } finally {
    left.abort();
    for (const filler of await Promise.allSettled(fillers)) {
      if (filler.status === "fulfilled") filler.value.close();
    }
  }
});

for (const stalled of ["client", "upstream"] as const) {
  Deno.test(`stop cuts a connection whose ${stalled} does not read`, async () => {
    using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
    const address = `127.0.0.1:${listener.addr.port}`;
    await using watched = await WatchedProxy.to({ address });
    using client = await watched.connect();
    using upstream = await listener.accept();
    const sender = stalled === "client" ? upstream : client;
    const flow = flood(sender);
    await untilStalled(flow);
    await watched.proxy.stop();
    await flow.done;
    assertEquals(whys(watched), ["drain"]);
    assertEquals(watched.proxy.connections, 0);
    await nextTurn(); // in which a failure that nobody handled comes to light
  });
}

Deno.test("stop cuts many connections in every state at once", async () => {
  await using upstream = echo();
  await using watched = await WatchedProxy.start({
    routes: [
      {},
      { latencyMs: LONG_MS },
      { timeoutRate: 1 },
      { timeoutRate: 1, timeoutMs: LONG_MS },
    ].map((faults, i) => ({
      localPort: 0,
      name: `route-${i}`,
      upstream: upstream.address,
      ...faults,
    })),
  });
  const clients = await Promise.all(
    Array.from({ length: 80 }, (_, i) => watched.connect(i % 4)),
  );
  await watched.log.first("accepted", 80);
  await watched.proxy.stop();
  assertEquals(whys(watched), Array(80).fill("drain"));
  for (const client of clients) {
    assertEquals(await readToEnd(client), 0);
    client.close();
  }
});

async function assertCut(
  upstream: { address: string },
  route: Partial<RouteOptions>,
  state: "accepted" | "connected" | "delayed" | "timed_out",
): Promise<void> {
  await using watched = await WatchedProxy.to(upstream, route);
  using client = await watched.connect();
  await send(client, "hello");
  await watched.log.first(state, 1);
  await nextTurn();
  const start = performance.now();
  await watched.proxy.stop();
  assertLess(performance.now() - start, LONG_MS / 1000);
  assert(await readToEnd(client) <= 5); // an answer may have been under way
  assertEquals(whys(watched), ["drain"]);
  assertEquals(watched.log.of("upstream_failed"), []);
  assertEquals(watched.proxy.connections, 0);
}

function whys({ log }: WatchedProxy): string[] {
  return log.of("closed").map((each) => each.why);
}

function startCli(
  upstream: { address: string },
  config: Partial<ConfigOptions> = {},
): Promise<Cli> {
  return Cli.start({
    ...config,
    routes: [{ localPort: 0, upstream: upstream.address }],
  });
}

/** A connection has come and gone: the program is past its start. */
async function connected(cli: Cli): Promise<void> {
  const client = await Deno.connect({ port: cli.port() });
  await cli.log.first("connected", 1);
  client.close();
  await cli.log.first("closed", 1);
}

function nextTurn(): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, 1));
}

interface Flow {
  /** How many bytes have left this program. */
  sent: number;
  done: Promise<void>;
}

/** Sends for as long as the connection lasts. */
function flood(conn: Deno.Conn): Flow {
  const flow = { sent: 0, done: Promise.resolve() };
  const block = testBytes(2 ** 20);
  const run = async () => {
    for (;;) flow.sent += await conn.write(block);
  };
  flow.done = run().catch(unlessDisconnected);
  return flow;
}

/** Waits until nothing has left for a while. */
async function untilStalled(flow: Flow): Promise<void> {
  let last = -1;
  for (let same = 0; same < 8; same++) {
    await new Promise((resolve) => setTimeout(resolve, 25));
    if (flow.sent !== last) same = 0;
    last = flow.sent;
  }
}
