import { assert, assertEquals } from "@std/assert";
import type { ChaosProxy, RouteOptions } from "../main.ts";
import {
  assertBytes,
  assertEchoes,
  Cli,
  echo,
  type EventLog,
  flood,
  IS_LINUX,
  IS_WINDOWS,
  LONG_MS,
  openEcho,
  openEnds,
  pause,
  readAll,
  readExactly,
  readToEnd,
  send,
  soon,
  steadyPort,
  testBytes,
  text,
  times,
  unanswering,
  until,
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
function test(name: string, fn: () => Promise<void>): void {
  Deno.test(name, { ignore: IS_WINDOWS }, fn);
}

for (const signal of ["SIGTERM", "SIGINT"] as const) {
  test(`on ${signal} a transfer in flight completes while new connections are refused`, async () => {
    const answer = testBytes(8_000_003);
    const goOn = Promise.withResolvers<void>();
    await using upstream = new Upstream(async (conn) => {
      await writeAll(conn, answer.subarray(0, 1000));
      await goOn.promise;
      await writeAndEnd(conn, answer.subarray(1000));
      assertEquals(text(await readAll(conn)), "a request, and its end");
    });
    await using cli = await Cli.to(upstream);
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
  });
}

test("with nothing in flight a drain is over at once, also right after the start", async () => {
  await using upstream = echo();
  await times(4, async () => {
    await using cli = await Cli.to(upstream, { drainTimeoutMs: LONG_MS });
    cli.kill();
    await assertDrained(cli);
    assertEquals(cli.log.only("draining").connections, 0);
  });
});

Deno.test("with drainTimeoutMs 0 a drain waits for the last connection, and cuts nothing", async () => {
  await using upstream = echo();
  const config = { drainTimeoutMs: 0 };
  await using watched = await WatchedProxy.to(upstream, {}, config);
  const { log, proxy } = watched;
  using client = await watched.connect();
  using other = await watched.connect();
  await log.first("connected", 2);
  const both = Promise.all([proxy.drain(), proxy.drain(0)]);
  await untilRefused(watched.port());
  for (const [left, each] of [[2, other], [1, client]] as const) {
    assertEquals(proxy.connections, left);
    await assertEchoes(each);
    await each.closeWrite();
    await log.first("closed", 3 - left);
    await pause();
  }
  assertEquals(await both, [0, 0]);
  assertEquals(await proxy.drain(0), 0);
  assertEquals(whys(watched), ["client", "client"]);
  assertEquals(proxy.connections, 0);
});

/** What cuts connections during a drain, which returns how many. */
const CUTS: Record<string, (proxy: ChaosProxy) => Promise<number>> = {
  "a drain that is over": (proxy) => proxy.drain(1),
  async "a stop during a drain"(proxy) {
    const stops = [proxy.drain(LONG_MS), proxy.stop(), proxy.stop()] as const;
    const [cut] = await Promise.all(stops);
    return cut;
  },
};

for (const [what, end] of Object.entries(CUTS)) {
  Deno.test(`${what} cuts what is in flight, and drain tells how many`, async () => {
    await using ends = await openEcho();
    const { client, watched } = ends;
    using other = await watched.connect();
    await watched.log.first("connected", 2);
    assertEquals(await end(watched.proxy), 2);
    for (const each of [client, other]) assertEquals(await readToEnd(each), 0);
    assertEquals(whys(watched), ["drain", "drain"]);
    assertEquals(watched.log.only("drained").cut, 2);
  });
}

Deno.test("an address that is closed in a moment can be listened on", async () => {
  await using watched = await WatchedProxy.start({});
  const localPort = steadyPort();
  const busy = Deno.listen({ hostname: "127.0.0.1", port: localPort });
  const adding = watched.proxy.addRoute({ localPort, upstream: "a:1" });
  await pause(); // in which it is found to be in use
  busy.close();
  assertEquals((await adding).localPort, localPort);
});

type Event = "accepted" | "connected" | "delayed" | "timed_out";
const STATES: [state: string, Event, Partial<RouteOptions>][] = [
  ["in their delay", "delayed", { latencyMs: LONG_MS }],
  ["timed out", "timed_out", { timeoutRate: 1 }],
  ["timed out for long", "timed_out", { timeoutRate: 1, timeoutMs: LONG_MS }],
  ["that are idle", "connected", {}],
  ["whose upstream is dialled", "accepted", { connectTimeoutMs: LONG_MS }],
];

for (const [state, event, faults] of STATES) {
  const isDialled = event === "accepted";
  const ignore = isDialled && !IS_LINUX;
  Deno.test(`stop cuts many connections ${state}`, { ignore }, async () => {
    await using upstream = isDialled ? await unanswering() : echo();
    const route = { localPort: 0, upstream: upstream.address, ...faults };
    await using watched = await WatchedProxy.start({
      routes: [{ name: "a", ...route }, { name: "b", ...route }],
    });
    const clients = await times(20, (i) => watched.connect(i % 2));
    for (const client of clients) await send(client, "hello");
    await watched.log.first(event, 20);
    const dialled = () => upstream instanceof Upstream ? upstream.accepted : 0;
    const expected = event === "connected" ? 20 : 0;
    await until(() => dialled() === expected, "dialling");
    await pause();
    await soon(watched.proxy[Symbol.asyncDispose](), "stop");
    await untilRefused(watched.port());
    assertEquals(watched.proxy.connections, 0);
    assertEquals(whys(watched), Array(20).fill("drain"));
    assertEquals(watched.log.of("upstream_failed"), []);
    assertEquals(dialled(), expected);
    for (const client of clients) {
      assert(await readToEnd(client) <= 5); // an answer may have been under way
      client.close();
    }
  });
}

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
    await pause(); // in which a failure that nobody handled comes to light
  });
}

/** The program ends by itself, and has cut nothing. */
async function assertDrained(cli: Cli): Promise<void> {
  assertEquals((await cli.status).code, 0, cli.stderr);
  assertEquals(cli.log.only("drained").cut, 0);
}

function whys({ log }: { log: EventLog }): string[] {
  return log.of("closed").map((each) => each.why);
}
