import {
  assert,
  assertEquals,
  assertGreaterOrEqual,
  assertMatch,
} from "@std/assert";
import { ChaosProxy, type ConfigOptions, type RouteOptions } from "../main.ts";
import {
  assertBytes,
  assertClosed,
  assertEchoes,
  Cli,
  echo,
  EventLog,
  flood,
  IS_LINUX,
  IS_WINDOWS,
  LONG_MS,
  nextTurn,
  only,
  openEcho,
  openEnds,
  readAll,
  readExactly,
  readToEnd,
  send,
  soon,
  testBytes,
  text,
  times,
  unanswering,
  untilRefused,
  untilStalled,
  Upstream,
  WatchedProxy,
  writeAll,
  writeAndEnd,
} from "./helpers.ts";

if (IS_WINDOWS) {
  console.warn("Windows cannot be sent signals: draining by them is skipped");
}

/** A test that sends signals. */
function testSignals(name: string, fn: () => Promise<void>): void {
  Deno.test(name, { ignore: IS_WINDOWS }, fn);
}

for (const signal of ["SIGTERM", "SIGINT"] as const) {
  testSignals(
    `on ${signal} a transfer in flight completes while new connections are refused`,
    async () => {
      const answer = testBytes(8_000_003);
      const goOn = Promise.withResolvers<void>();
      await using upstream = new Upstream(async (conn) => {
        await writeAll(conn, answer.subarray(0, 1000));
        await goOn.promise;
        await writeAndEnd(conn, answer.subarray(1000));
        assertEquals(text(await readAll(conn)), "a request, and its end");
      });
      await using cli = await startCli(upstream);
      using client = await Deno.connect({ port: cli.port() });
      await send(client, "a request, ");
      assertEquals(await readExactly(client, 1000), answer.slice(0, 1000));

      cli.kill(signal);
      const [draining] = await cli.log.first("draining", 1);
      assertEquals(draining.connections, 1);
      await untilRefused(cli.port()).finally(goOn.resolve);
      const rest = await readAll(client);
      await send(client, "and its end");
      await client.closeWrite();

      await assertDrained(cli);
      assertBytes(rest, answer.slice(1000));
      assertEquals(whys(cli), ["upstream"]);
      assertEquals(cli.log.all.at(-1)?.event, "drained");
      assertEquals(cli.stderr, "");
    },
  );
}

testSignals("with nothing in flight a drain is over at once", async () => {
  await using upstream = echo();
  await using cli = await startCli(upstream, { drainTimeoutMs: LONG_MS });
  const client = await Deno.connect({ port: cli.port() });
  await cli.log.first("connected", 1);
  client.close();
  await cli.log.first("closed", 1); // the program is past its start
  cli.kill();
  await assertDrained(cli);
  assertEquals(cli.log.of("draining").map((each) => each.connections), [0]);
});

testSignals(
  "what is left after drainTimeoutMs is cut, and the exit code is 1",
  async () => {
    const drainTimeoutMs = 300;
    await using upstream = echo();
    await using cli = await startCli(upstream, { drainTimeoutMs });
    using client = await Deno.connect({ port: cli.port() });
    await assertEchoes(client);
    cli.kill();
    assertEquals(await readToEnd(client), 0);
    assertEquals((await cli.status).code, 1);
    await assertClosed(cli, { why: "drain", bytesUp: 5, bytesDown: 5 });
    const drained = cli.log.only("drained");
    assertEquals(drained.cut, 1);
    assertGreaterOrEqual(drained.durationMs, drainTimeoutMs - 1);
    assertEquals(cli.stderr, "");
  },
);

testSignals("a signal right after the start drains", async () => {
  await using upstream = echo();
  await times(4, async () => {
    await using cli = await startCli(upstream);
    cli.kill();
    await assertDrained(cli);
  });
});

testSignals("a second signal ends a drain at once", async () => {
  await using upstream = echo();
  await using cli = await startCli(upstream, { drainTimeoutMs: LONG_MS });
  using client = await Deno.connect({ port: cli.port() });
  await assertEchoes(client);
  cli.kill("SIGINT");
  cli.kill("SIGTERM"); // the same stop, passed on by two
  await cli.log.first("draining", 1);
  await assertEchoes(client, "more");
  const again = setInterval(() => cli.kill("SIGTERM"), 100);
  const { code } = await cli.status;
  clearInterval(again);
  assertEquals(code, 1);
  assertMatch(cli.stderr, /second signal/);
  assertEquals(cli.log.of("drained"), []);
  assertEquals(await readToEnd(client), 0);
});

testSignals(
  "with drainTimeoutMs 0 a drain waits for the last connection",
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
    await assertEchoes(last, "still here?");
    assertEquals(cli.log.of("drained"), []);
    await last.closeWrite();
    await assertDrained(cli);
  },
);

Deno.test("connections counts those in flight", async () => {
  await using ends = await openEcho();
  const { client: one, watched } = ends;
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
  await using ends = await openEcho();
  const { client, watched } = ends;
  await watched.log.first("connected", 1);
  const both = Promise.all([watched.proxy.drain(0), watched.proxy.drain(0)]);
  await untilRefused(watched.port());
  await assertEchoes(client);
  await client.closeWrite();
  assertEquals(await both, [0, 0]);
  assertEquals(await watched.proxy.drain(0), 0);
  assertEquals(whys(watched), ["client"]);
  assertEquals(watched.proxy.connections, 0);
});

Deno.test("drain returns how many it had to cut", async () => {
  await using ends = await openEcho();
  const { client, watched } = ends;
  using other = await watched.connect();
  await watched.log.first("connected", 2);
  assertEquals(await watched.proxy.drain(1), 2);
  assertEquals(await readToEnd(client), 0);
  assertEquals(await readToEnd(other), 0);
  assertEquals(whys(watched), ["drain", "drain"]);
  assertEquals(watched.log.only("drained").cut, 2);
});

Deno.test("stop ends a drain", async () => {
  await using ends = await openEcho();
  const { client, watched } = ends;
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
    port = only(proxy.routes).localPort;
    using _client = await Deno.connect({ port });
    await log.first("connected", 1);
  }
  assertEquals(log.of("closed").length, 1);
  await untilRefused(port);
});

const STATES = [
  { state: "in its delay", route: { latencyMs: LONG_MS }, event: "delayed" },
  ...[0, LONG_MS].map((timeoutMs) => ({
    state: `timed out for ${timeoutMs} ms`,
    route: { timeoutRate: 1, timeoutMs },
    event: "timed_out" as const,
  })),
  { state: "that is idle", route: {}, event: "connected" },
] as const;

for (const { state, route, event } of STATES) {
  Deno.test(`stop cuts a connection ${state}`, async () => {
    await using upstream = echo();
    await assertCut(upstream, route, event);
    assertEquals(upstream.accepted, event === "connected" ? 1 : 0);
  });
}

Deno.test("stop cuts a connection while its upstream is dialled", {
  ignore: !IS_LINUX,
}, async () => {
  await using upstream = await unanswering();
  await assertCut(upstream, { connectTimeoutMs: LONG_MS }, "accepted");
});

for (const stalled of ["client", "upstream"] as const) {
  Deno.test(`stop cuts a connection whose ${stalled} does not read`, async () => {
    await using ends = await openEnds();
    const { client, upstream, watched } = ends;
    const flow = flood(stalled === "client" ? upstream : client);
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
    routes: STATES.map(({ route }, i) => ({
      localPort: 0,
      name: `route-${i}`,
      upstream: upstream.address,
      ...route,
    })),
  });
  const clients = await times(80, (i) => watched.connect(i % STATES.length));
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
  await soon(watched.proxy.stop(), "stop");
  assert(await readToEnd(client) <= 5); // an answer may have been under way
  assertEquals(whys(watched), ["drain"]);
  assertEquals(watched.log.of("upstream_failed"), []);
  assertEquals(watched.proxy.connections, 0);
}

/** The program ends by itself, and has cut nothing. */
async function assertDrained(cli: Cli): Promise<void> {
  assertEquals((await cli.status).code, 0, cli.stderr);
  assertEquals(cli.log.of("drained").map((each) => each.cut), [0]);
}

function whys({ log }: { log: EventLog }): string[] {
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
