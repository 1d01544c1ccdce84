// deno-lint-ignore-file no-import-prefix -- in deno.json each task would load it
/**
 * The npm registry's Toxiproxy client, unchanged, against the program: every
 * call that it has.
 */

import {
  assertEquals,
  assertGreaterOrEqual,
  assertRejects,
  assertStringIncludes,
} from "@std/assert";
import {
  type Bandwidth,
  type ICreateProxyBody,
  type ICreateToxicBody,
  type Latency,
  type Timeout,
  Toxiproxy,
  ToxiproxyError,
} from "npm:toxiproxy-node-client@4.1.0";
import {
  Cli,
  echo,
  readExactly,
  readToEnd,
  send,
  steadyPort,
  text,
  untilRefused,
} from "./helpers.ts";

/** `fetch` as the client calls it keeps connections open for the next call. */
function test(name: string, fn: () => Promise<void>): void {
  Deno.test({ name, fn, sanitizeResources: false, sanitizeOps: false });
}

/** The program as Toxiproxy is started, and its client. */
async function start(): Promise<{ cli: Cli; client: Toxiproxy }> {
  const cli = new Cli("--log-format", "json", "--api", "0");
  const [{ address }] = await cli.log.first("api_listening", 1);
  return { cli, client: new Toxiproxy(`http://${address}`) };
}

function portOf({ listen }: { listen: string }): number {
  return Number(listen.split(":").at(-1));
}

async function roundTrip(port: number): Promise<number> {
  const start = performance.now();
  using conn = await Deno.connect({ port });
  await send(conn, "ping");
  assertEquals(text(await readExactly(conn, 4)), "ping");
  return performance.now() - start;
}

test("toxiproxy-node-client: proxies", async () => {
  await using upstream = echo();
  const { cli, client } = await start();
  await using _cli = cli;
  const body: ICreateProxyBody = {
    name: "redis",
    listen: `localhost:${steadyPort()}`,
    upstream: upstream.address,
  };
  const proxy = await client.createProxy(body);
  assertEquals(
    [proxy.name, proxy.enabled, proxy.upstream],
    ["redis", true, upstream.address],
  );
  assertStringIncludes(proxy.listen, "127.0.0.1:");
  assertEquals(proxy.getHost(), client.host);
  await roundTrip(portOf(proxy));

  assertEquals((await client.get("redis")).toJson(), proxy.toJson());
  assertEquals(Object.keys(await client.getAll()), ["redis"]);
  await assertRejects(() => client.createProxy(body), ToxiproxyError, "409");
  await assertRejects(() => client.get("none"), ToxiproxyError, "404");

  const { listen } = proxy;
  const off = await proxy.update({
    enabled: false,
    listen,
    upstream: upstream.address,
  });
  assertEquals([off.enabled, off.listen], [false, listen]);
  await untilRefused(portOf(proxy));
  await client.reset();
  assertEquals((await client.get("redis")).enabled, true);
  await roundTrip(portOf(proxy));

  const populated = await client.populate([
    { ...body, listen },
    { name: "other", listen: "localhost:0", upstream: upstream.address },
  ]);
  assertEquals(Object.keys(populated), ["redis", "other"]);
  assertEquals(populated.redis.listen, listen);
  await roundTrip(portOf(populated.other));

  await proxy.remove();
  await untilRefused(portOf(proxy));
  assertEquals(Object.keys(await client.getAll()), ["other"]);
  assertEquals(JSON.parse(await client.getVersion()).version, "2.12.0");
});

test("toxiproxy-node-client: toxics, on a connection that stays open", async () => {
  await using upstream = echo();
  const { cli, client } = await start();
  await using _cli = cli;
  const proxy = await client.createProxy({
    name: "redis",
    listen: "localhost:0",
    upstream: upstream.address,
  });
  using conn = await Deno.connect({ port: portOf(proxy) });
  const ask = async () => {
    const start = performance.now();
    await send(conn, "ping");
    assertEquals(text(await readExactly(conn, 4)), "ping");
    return performance.now() - start;
  };
  await ask();

  const toxic = await proxy.addToxic<Latency>({
    type: "latency",
    attributes: { latency: 80 },
  } as ICreateToxicBody<Latency>);
  assertEquals(toxic.toJson(), {
    name: "latency_downstream",
    type: "latency",
    stream: "downstream",
    toxicity: 1,
    attributes: { latency: 80, jitter: 0 },
  });
  assertGreaterOrEqual(await ask(), 79);

  const changed = await toxic.update({
    ...toxic.toJson(),
    toxicity: 1,
    attributes: { latency: 40, jitter: 0 },
  });
  assertEquals(changed.attributes, { latency: 40, jitter: 0 });
  const got = await proxy.getToxic<Latency>("latency_downstream");
  assertEquals(got.toJson(), changed.toJson());
  assertGreaterOrEqual(await ask(), 39);
  await toxic.remove();
  await assertRejects(
    () => proxy.getToxic("latency_downstream"),
    ToxiproxyError,
    "404",
  );

  const limited = await proxy.addToxic<Bandwidth>({
    name: "slow",
    type: "bandwidth",
    stream: "upstream",
    toxicity: 1,
    attributes: { rate: 1 },
  });
  assertEquals(limited.getPath(), `${proxy.getPath()}/toxics/slow`);
  assertGreaterOrEqual(await ask(), 3);
  await client.reset();
  await proxy.addToxic<Timeout>({
    name: "end",
    type: "timeout",
    stream: "upstream",
    toxicity: 1,
    attributes: { timeout: 1 },
  });
  assertEquals(await readToEnd(conn), 0);
});
