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
  type ICreateToxicBody,
  type Latency,
  type Timeout,
  Toxiproxy,
  ToxiproxyError,
} from "npm:toxiproxy-node-client@4.1.0";
import {
  assertEchoes,
  Cli,
  defined,
  echo,
  readToEnd,
  steadyPort,
  untilRefused,
} from "./helpers.ts";

/** A test with the program as Toxiproxy is started, and an upstream. */
function test(
  name: string,
  run: (given: { client: Toxiproxy; upstream: string }) => Promise<void>,
): void {
  const fn = async () => {
    await using upstream = echo();
    await using cli = new Cli("--log-format", "json", "--api", "0");
    const [{ address }] = await cli.log.first("api_listening", 1);
    const client = new Toxiproxy(`http://${address}`);
    await run({ client, upstream: upstream.address });
  };
  // `fetch` as the client calls it keeps connections open for the next call.
  Deno.test({ name, fn, sanitizeResources: false, sanitizeOps: false });
}

const portOf = ({ listen }: { listen: string }) =>
  Number(listen.split(":").at(-1));

/** How long an answer takes, in milliseconds. */
async function ask(conn: Deno.TcpConn): Promise<number> {
  const start = performance.now();
  await assertEchoes(conn);
  return performance.now() - start;
}

async function assertAnswers(proxy: { listen: string }): Promise<void> {
  using conn = await Deno.connect({ port: portOf(proxy) });
  await ask(conn);
}

test("toxiproxy-node-client: proxies", async ({ client, upstream }) => {
  const body = { name: "redis", listen: `localhost:${steadyPort()}`, upstream };
  const proxy = await client.createProxy(body);
  const { name, enabled, listen } = proxy;
  assertEquals([name, enabled, proxy.upstream], ["redis", true, upstream]);
  assertStringIncludes(listen, "127.0.0.1:");
  assertEquals(proxy.getHost(), client.host);
  await assertAnswers(proxy);

  assertEquals((await client.get("redis")).toJson(), proxy.toJson());
  assertEquals(Object.keys(await client.getAll()), ["redis"]);
  await assertRejects(() => client.createProxy(body), ToxiproxyError, "409");
  await assertRejects(() => client.get("none"), ToxiproxyError, "404");

  const off = await proxy.update({ enabled: false, listen, upstream });
  assertEquals([off.enabled, off.listen], [false, listen]);
  await untilRefused(portOf(proxy));
  await client.reset();
  assertEquals((await client.get("redis")).enabled, true);
  await assertAnswers(proxy);

  const other = { name: "other", listen: "localhost:0", upstream };
  const populated = await client.populate([{ ...body, listen }, other]);
  assertEquals(Object.keys(populated), ["redis", "other"]);
  assertEquals(populated["redis"]?.listen, listen);
  await assertAnswers(defined(populated["other"]));

  await proxy.remove();
  await untilRefused(portOf(proxy));
  assertEquals(Object.keys(await client.getAll()), ["other"]);
  assertEquals(JSON.parse(await client.getVersion()).version, "2.12.0");
});

test("toxiproxy-node-client: toxics, on a connection that stays open", async ({ client, upstream }) => {
  const listen = "localhost:0";
  const proxy = await client.createProxy({ name: "redis", listen, upstream });
  using conn = await Deno.connect({ port: portOf(proxy) });
  await ask(conn);

  const latency = { type: "latency", attributes: { latency: 80 } };
  const toxic = await proxy.addToxic(latency as ICreateToxicBody<Latency>);
  assertEquals(toxic.toJson(), {
    ...{ name: "latency_downstream", type: "latency", stream: "downstream" },
    ...{ toxicity: 1, attributes: { latency: 80, jitter: 0 } },
  });
  assertGreaterOrEqual(await ask(conn), 79);

  const attributes = { latency: 40, jitter: 0 };
  const changed = await toxic.update({ ...toxic.toJson(), attributes });
  assertEquals(changed.attributes, attributes);
  const get = () => proxy.getToxic<Latency>("latency_downstream");
  assertEquals((await get()).toJson(), changed.toJson());
  assertGreaterOrEqual(await ask(conn), 39);
  await toxic.remove();
  await assertRejects(get, ToxiproxyError, "404");

  // Toxics and attributes that only this proxy has.
  const more = {
    latency: { latency: 0, jitter: 1, distribution: "normal" },
    stall: { rate: 1, duration: 20 },
  };
  for (const [type, attributes] of Object.entries(more)) {
    const body = { type, attributes } as unknown as ICreateToxicBody<Latency>;
    const own = await proxy.addToxic(body);
    assertEquals<unknown>(own.attributes, attributes);
    const same = await own.update(own.toJson());
    assertEquals(same.toJson(), own.toJson());
  }
  assertEquals((await client.getAll())["redis"]?.name, "redis");
  assertGreaterOrEqual(await ask(conn), 19);
  await client.reset();

  const way = { stream: "upstream", toxicity: 1 } as const;
  const limit = { type: "bandwidth", attributes: { rate: 1 } } as const;
  const end = { type: "timeout", attributes: { timeout: 1 } } as const;
  const slow = { name: "slow", ...way, ...limit };
  const limited = await proxy.addToxic<Bandwidth>(slow);
  assertEquals(limited.getPath(), `${proxy.getPath()}/toxics/slow`);
  assertGreaterOrEqual(await ask(conn), 3);
  await client.reset();
  await proxy.addToxic<Timeout>({ name: "end", ...way, ...end });
  assertEquals(await readToEnd(conn), 0);
});
