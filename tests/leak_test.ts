import {
  assert,
  assertEquals,
  assertLess,
  assertLessOrEqual,
  assertMatch,
} from "@std/assert";
import {
  Api,
  assertEchoes,
  Cli,
  echo,
  IS_LINUX,
  IS_WINDOWS,
  memory,
  MIB,
  readExactly,
  soon,
  testBytes,
  text,
  times,
  until,
  writeAll,
} from "./helpers.ts";

if (!IS_LINUX) {
  console.warn("descriptors and memory are counted on Linux only");
}

Deno.test("thousands of connections leave nothing behind", async () => {
  const atOnce = await affordable(1000);
  await using upstream = echo();
  await using cli = await Cli.start({
    routes: [{ localPort: 0, upstream: upstream.address }],
  });
  await exchangeInLanes(cli, 100, 20);
  await cli.log.first("closed", 100);
  const before = await descriptors(cli);

  const clients = await connect(cli.port(), atOnce);
  await Promise.all(clients.map(exchange));
  clients.forEach((client) => client.close());
  await exchangeInLanes(cli, 1500, 20);
  await cli.log.first("closed", 100 + atOnce + 1500);
  const halfWay = IS_LINUX ? await memory(cli, "RSS") : 0;
  await exchangeInLanes(cli, 1500, 20);
  const count = 100 + atOnce + 3000;
  await cli.log.first("closed", count);

  assertEquals(cli.log.of("accepted").length, count);
  const whys = new Set(cli.log.of("closed").map((each) => each.why));
  assertEquals([...whys], ["client"]);
  assertEquals(upstream.accepted, count);
  if (!IS_LINUX) return;
  // A descriptor is given back a moment after the event.
  for (let look = 0; look < 100 && await descriptors(cli) > before; look++) {
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  assertLessOrEqual(await descriptors(cli), before);
  assertLess(await memory(cli, "RSS") - halfWay, 48 * MIB);
});

const SURVIVED = "running out of descriptors is survived";
const ALONE = "a dialling that finds no descriptor fails alone";
// Of the limits on dialling an odd one is taken by a connection, an even one by
// the dialling for it. With the API the shortage may be seen before there is one.
const SHORTAGES: [string, number, "accept_failed" | "upstream_failed", 0?][] = [
  [SURVIVED, 64, "accept_failed"],
  [`${SURVIVED}, also with the API`, 64, "accept_failed", 0],
  [ALONE, 64, "upstream_failed"],
  [`${ALONE}, also with the API and 64`, 64, "upstream_failed", 0],
  [`${ALONE}, also with the API and 65`, 65, "upstream_failed", 0],
];

for (const [name, limit, event, api] of SHORTAGES) {
  testShortage(name, async () => {
    const dials = event === "upstream_failed";
    await using upstream = echo();
    const route = { localPort: 0, upstream: upstream.address };
    await using cli = await limited(limit).start({
      api,
      routes: [
        { name: "echo", ...route },
        { name: "many", timeoutRate: dials ? 0 : 1, ...route },
      ],
    });
    using early = await Deno.connect({ port: cli.port() });
    await exchange(early, 1);
    const clients = await connect(cli.port(1), 80);
    const [failed] = await Promise.race([
      cli.log.first(event, 1),
      ...api === undefined ? [] : [cli.log.first("accept_failed", 1)],
    ]);
    assert(failed.cause);
    await exchange(early, 2);
    if (api !== undefined && !dials) {
      using _call = await Deno.connect({ port: await apiPort(cli) })
        .catch(() => null); // as it listens again
      const [{ cause }] = await cli.log.first("api_failed", 1);
      assertMatch(cause, /^Too many open files/);
    }
    clients.forEach((client) => client.close());
    if (api === undefined) {
      assertEquals(failed.route, "many");
      await cli.log.first("closed", 80);
      assertEquals(cli.log.of("accepted").length, 81); // none is forgotten
      using late = await Deno.connect({ port: cli.port() });
      await exchange(late, 3);
    } else {
      await untilServed(cli);
      await using client = Api.at(`:${await apiPort(cli)}`);
      await until(
        () => client.get("/version").then(() => true, () => false),
        "the API answers again",
      );
    }
    assertEquals(cli.stderr, "");
  });
}

testShortage(
  "no shortage of descriptors, however short, leaves a listener deaf",
  async () => {
    await using upstream = echo();
    await using cli = await limited(256).start({
      api: 0,
      routes: [{ localPort: 0, upstream: upstream.address }],
    });
    const open = (port: number, count: number) =>
      times(count, () => Deno.connect({ port }).catch(() => null));
    for (const client of await open(cli.port(), 60)) client?.close();
    await cli.log.first("closed", 60);
    const idle = await open(await apiPort(cli), 180);
    for (let burst = 0; burst < 10; burst++) {
      const clients = await open(cli.port(), 100);
      await new Promise((resolve) => setTimeout(resolve, 20));
      for (const client of clients) client?.close();
    }
    for (const client of idle) client?.close();
    await untilServed(cli);
  },
);

/** A test in which descriptors run out. */
function testShortage(name: string, fn: () => Promise<void>): void {
  Deno.test(name, { ignore: IS_WINDOWS }, fn);
}

/** The program, held to so many descriptors. */
function limited(limit: number) {
  return class extends Cli {
    override get command(): string[] {
      const script = `ulimit -n ${limit} && exec "$@"`;
      return ["sh", "-c", script, "sh", Deno.execPath()];
    }
  };
}

function connect(port: number, count: number): Promise<Deno.TcpConn[]> {
  return times(count, () => Deno.connect({ port }));
}

async function apiPort(cli: Cli): Promise<number> {
  const [{ address }] = await cli.log.first("api_listening", 1);
  return Number(address.split(":")[1]);
}

/** Waits until the first route serves; what it does not accept, it resets. */
async function untilServed(cli: Cli): Promise<void> {
  for (let attempt = 1;; attempt++) {
    try {
      using conn = await Deno.connect({ port: cli.port() });
      return await soon(exchange(conn, 10 + attempt), "answer", 1000);
    } catch (error) {
      if (attempt === 30) throw error;
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
  }
}

/** Sends what is this connection's alone, and gets it back. */
async function exchange(conn: Deno.Conn, number: number): Promise<void> {
  const sent = testBytes(3001, number);
  const [got] = await Promise.all([
    readExactly(conn, sent.length),
    writeAll(conn, sent),
  ]);
  assertEquals(got, sent);
}

/** Connects so many times, in lanes in which one follows another. */
async function exchangeInLanes(
  cli: Cli,
  count: number,
  lanes: number,
): Promise<void> {
  let left = count;
  await times(lanes, async () => {
    while (left > 0) {
      const number = left--;
      using client = await Deno.connect({ port: cli.port() });
      await assertEchoes(client, `connection ${number}`);
    }
  });
}

async function descriptors({ pid }: Cli): Promise<number> {
  if (!IS_LINUX) return 0;
  return (await Array.fromAsync(Deno.readDir(`/proc/${pid}/fd`))).length;
}

/** As many connections as this process, being both ends, has descriptors for. */
async function affordable(wanted: number): Promise<number> {
  if (IS_WINDOWS) return wanted;
  const { stdout } = await new Deno.Command("sh", {
    args: ["-c", "ulimit -n"],
  }).output();
  const limit = Number(text(stdout)); // NaN: unlimited
  const most = Math.max(1, Math.floor((limit - 100) / 2));
  if (!(most < wanted)) return wanted;
  console.warn(`ulimit -n is ${limit}: ${most} connections, not ${wanted}`);
  return most;
}
