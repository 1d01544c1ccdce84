import { assert, assertEquals, assertLess, assertMatch } from "@std/assert";
import {
  Api,
  assertEchoes,
  Cli,
  echo,
  IS_LINUX,
  IS_WINDOWS,
  memory,
  MIB,
  pause,
  soon,
  startedBy,
  text,
  times,
  until,
} from "./helpers.ts";

if (!IS_LINUX) {
  console.warn("descriptors and memory are counted on Linux only");
}

Deno.test("thousands of connections leave nothing behind", async () => {
  const atOnce = await affordable(1000);
  await using upstream = echo();
  await using cli = await Cli.to(upstream);
  await exchangeInLanes(cli, 100);
  await cli.log.first("closed", 100);
  const before = IS_LINUX ? await descriptors(cli) : 0;

  const clients = await connect(cli.port(), atOnce);
  await Promise.all(clients.map(exchange));
  clients.forEach((client) => client.close());
  await exchangeInLanes(cli, 1500);
  await cli.log.first("closed", 100 + atOnce + 1500);
  const halfWay = IS_LINUX ? await memory(cli, "RSS") : 0;
  await exchangeInLanes(cli, 1500);
  const count = 100 + atOnce + 3000;
  const closed = await cli.log.first("closed", count);

  assertEquals(cli.log.of("accepted").length, count);
  assertEquals([...new Set(closed.map((each) => each.why))], ["client"]);
  assertEquals(upstream.accepted, count);
  if (!IS_LINUX) return;
  // A descriptor is given back a moment after the event.
  const areBack = async () => await descriptors(cli) <= before;
  await until(areBack, `only ${before} descriptors`);
  assertLess(await memory(cli, "RSS") - halfWay, 48 * MIB);
});

const ignore = IS_WINDOWS; // which limits no descriptors
const SURVIVED = "running out of descriptors is survived";
const ALONE = "a dialling that finds no descriptor fails alone";
// The last descriptor is taken by a connection at one of two limits, and by the
// dialling for it at the other: which one depends on what else is open.
const SHORTAGES: [string, number, "accept_failed" | "upstream_failed", 0?][] = [
  [SURVIVED, 64, "accept_failed"],
  [`${SURVIVED}, also with the API`, 64, "accept_failed", 0],
  [ALONE, 64, "upstream_failed"],
  [`${ALONE}, and of 65`, 65, "upstream_failed"],
  [`${ALONE}, also with the API and 64`, 64, "upstream_failed", 0],
  [`${ALONE}, also with the API and 65`, 65, "upstream_failed", 0],
];

for (const [name, limit, event, api] of SHORTAGES) {
  Deno.test(name, { ignore }, async () => {
    const dials = event === "upstream_failed";
    await using upstream = echo();
    const route = { localPort: 0, upstream: upstream.address };
    await using cli = await startedBy(`ulimit -n ${limit} && exec "$@"`).start({
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
      ...dials ? [cli.log.first("accept_failed", 1)] : [],
    ]);
    assert(failed.cause);
    await exchange(early, 2);
    if (api === undefined && !dials) { // it tries again, never too early
      const failures = await cli.log.first("accept_failed", 2);
      const [first = 0, second = 0] = failures.map((each) =>
        Date.parse(Reflect.get(each, "time"))
      );
      assert(second - first >= 98, `${second - first} ms`);
    }
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
      const isUp = () => client.get("/version").then(() => true, () => false);
      await until(isUp, "the API answers again");
    }
    assertEquals(cli.stderr, "");
  });
}

Deno.test("no shortage of descriptors, however short, leaves a listener deaf", {
  ignore,
}, async () => {
  await using upstream = echo();
  await using cli = await startedBy('ulimit -n 256 && exec "$@"')
    .to(upstream, { api: 0 });
  const open = (port: number, count: number) =>
    times(count, () => Deno.connect({ port }).catch(() => null));
  for (const client of await connect(cli.port(), 60)) client.close();
  await cli.log.first("closed", 60);
  const idle = await open(await apiPort(cli), 180);
  for (let burst = 0; burst < 10; burst++) {
    const clients = await open(cli.port(), 100);
    await pause(20);
    for (const client of clients) client?.close();
  }
  for (const client of idle) client?.close();
  await untilServed(cli);
});

function connect(port: number, count: number): Promise<Deno.TcpConn[]> {
  return times(count, () => Deno.connect({ port }));
}

async function apiPort(cli: Cli): Promise<number> {
  const [{ address }] = await cli.log.first("api_listening", 1);
  return Number(address.split(":")[1]);
}

/** Waits until the first route serves; what it does not accept, it resets. */
async function untilServed(cli: Cli): Promise<void> {
  const serves = async () => {
    using conn = await Deno.connect({ port: cli.port() });
    await soon(exchange(conn, 10), "answer", 1000);
    return true;
  };
  await until(() => serves().catch(() => false), "the first route serves");
}

/** Sends what is this connection's alone, and gets it back. */
function exchange(conn: Deno.Conn, number: number): Promise<void> {
  return assertEchoes(conn, `connection ${number}, `.repeat(200));
}

/** Connects so many times, in 20 lanes in which one follows another. */
async function exchangeInLanes(cli: Cli, count: number): Promise<void> {
  await times(20, async () => {
    while (count > 0) {
      const number = count--;
      using client = await Deno.connect({ port: cli.port() });
      await assertEchoes(client, `connection ${number}`);
    }
  });
}

/** How many files a process has open, on Linux. */
async function descriptors({ pid }: Cli): Promise<number> {
  return (await Array.fromAsync(Deno.readDir(`/proc/${pid}/fd`))).length;
}

/** As many connections as this process, being both ends, has descriptors for. */
async function affordable(wanted: number): Promise<number> {
  if (IS_WINDOWS) return wanted;
  const ulimit = new Deno.Command("sh", { args: ["-c", "ulimit -n"] });
  const limit = Number(text((await ulimit.output()).stdout)); // or unlimited
  return limit ? Math.min(wanted, Math.ceil((limit - 100) / 2)) : wanted;
}
