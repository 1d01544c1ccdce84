/** A resolver that does not answer holds up its own connections alone. */

import { assertEquals, assertRejects } from "@std/assert";
import { createSocket } from "node:dgram";
import { lookup } from "node:dns";
import dns from "node:dns/promises";
import { ChaosProxy, ConfigError } from "../main.ts";
import {
  Api,
  assertEchoes,
  assertExits,
  echo,
  SOCKETS,
  startedBy,
  steadyPort,
  TempFile,
  times,
} from "./helpers.ts";

const RESOLVER = "127.53.53.53";
const RESOLV_CONF = `nameserver ${RESOLVER}\noptions timeout:30 attempts:5\n`;

const unshare = new Deno.Command("unshare", { args: ["--mount", "true"] });
const { success } = await unshare.output().catch(() => ({ success: false }));
if (!success) console.warn("a silent resolver is tested as root on Linux only");

for (const { sockets, resettable } of SOCKETS) {
  Deno.test(`a silent resolver holds up nothing else, on ${sockets}`, {
    ignore: !success,
  }, async () => {
    const resolver = createSocket("udp4");
    await new Promise<void>((resolve) => resolver.bind(53, RESOLVER, resolve));
    const asked = new Promise((resolve) => resolver.once("message", resolve));
    await using upstream = echo();
    const port = upstream.address.split(":")[1];
    await using file = await TempFile.with(RESOLV_CONF);
    const mount = `mount --bind ${file.path} /etc/resolv.conf && exec "$@"`;
    const ResolvingCli = startedBy(mount, { before: ["unshare", "--mount"] });
    const route = { localPort: 0, connectTimeoutMs: 100_000 };
    await using cli = await ResolvingCli.start({
      api: resettable ? 0 : undefined,
      drainTimeoutMs: 100,
      routes: ["silent.example:80", `127.0.0.1:${port}`, `localhost:${port}`]
        .map((upstream, i) => ({ ...route, name: `r${i}`, upstream })),
    });
    const waiting = await times(100, () => Deno.connect({ port: cli.port() }));
    await cli.log.first("accepted", 100);
    await asked;
    for (const route of [1, 2]) {
      using client = await Deno.connect({ port: cli.port(route) });
      await assertEchoes(client);
    }
    if (resettable) {
      const [{ address }] = await cli.log.first("api_listening", 1);
      await using client = Api.at(address);
      assertEquals((await client.get("/version")).status, 200);
      // A change of a route that hangs does not hold up the end either.
      await cli.log.first("connected", 2);
      const listen = { listen: "silent.example:0" };
      client.patch("/proxies/r1", listen).catch(() => {});
      assertEquals((await client.get("/version")).status, 200);
    }
    await assertExits(cli, 1);
    assertEquals(cli.log.only("drained").cut, 100);
    assertEquals(cli.log.of("upstream_failed"), []);
    for (const client of waiting) client.close();
    resolver.close();
  });
}

Deno.test("a stop before a route's new host is looked up leaves no failure behind", async () => {
  const name = "r";
  const proxy = await ChaosProxy.start({
    routes: [{ name, localPort: 0, upstream: "localhost:1" }],
  });
  const updated = proxy.updateRoute(name, { host: "nowhere.invalid" });
  const refused = assertRejects(() => updated, Deno.errors.BadResource);
  await Promise.resolve(); // the change is under way
  await proxy.stop();
  await refused;
  // What failed unseen would be told, and fail this test, before this is.
  await new Promise((resolve) => lookup("nowhere.invalid", resolve));
});

const OWN_NAME = Deno.hostname();
const own = await dns.lookup(OWN_NAME, 4).catch(() => undefined);
const isOwn = own?.address.startsWith("127.") ?? false;
if (!isOwn) console.warn(`${OWN_NAME} is no name of loopback: not tested`);

Deno.test("a route to itself is refused, also if it listens on a name", {
  ignore: !isOwn,
}, async () => {
  const localPort = steadyPort();
  const upstream = `${own?.address}:${localPort}`;
  const routes = [{ host: OWN_NAME, localPort, upstream }];
  const start = () => ChaosProxy.start({ routes });
  await assertRejects(start, ConfigError, "circle");
});
