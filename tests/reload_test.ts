/** A config that is read again while the proxy runs. */

import { assertEquals, assertMatch, assertRejects } from "@std/assert";
import { ListenError, type RouteOptions } from "../main.ts";
import {
  assertEchoes,
  assertReads,
  casesIn,
  Cli,
  defined,
  echo,
  IS_WINDOWS,
  LONG_MS,
  pause,
  readToEnd,
  send,
  steadyPort,
  TempFile,
  toxic,
  until,
  WatchedProxy,
} from "./helpers.ts";

/** Toxics as `a1 b2`: a latency of 1 ms called a, and one of 2 ms called b. */
const toxicsOf = (words: string) =>
  [...words.matchAll(/([a-z])(\d+)/g)]
    .map(([, name, ms]) => toxic(`latency latency=${ms} name=${name}`));

/** A proxy to an echo, whose config can be changed. */
async function open(given: Partial<RouteOptions>[]) {
  const all = new AsyncDisposableStack();
  const { address: upstream } = all.use(echo());
  const configOf = (routes: typeof given, more: object = { seed: 1 }) => ({
    ...more,
    routes: routes.map((each) => ({ localPort: 0, upstream, ...each })),
  });
  const watched = all.use(await WatchedProxy.start(configOf(given)));
  const { proxy, log } = watched;
  return {
    ...{ proxy, log, upstream, connect: (route = 0) => watched.connect(route) },
    reload: (...config: Parameters<typeof configOf>) =>
      proxy.reload(configOf(...config)),
    async converse(name: string) {
      const { localPort: port } = proxy.route(name);
      const client = all.use(await Deno.connect({ port }));
      await assertEchoes(client);
      return client;
    },
    /** What the last reload has added, changed and removed. */
    last() {
      const last = defined(log.of("reloaded").at(-1));
      return [last.added, last.changed, last.removed].join(" | ");
    },
    [Symbol.asyncDispose]: () => all.disposeAsync(),
  };
}

Deno.test("a reload changes what differs, and leaves the other routes alone", async () => {
  const [one, two] = [steadyPort(), steadyPort()];
  const before = [
    { name: "same", profile: "cable" },
    { name: "faults" },
    { name: "moved", localPort: one },
    { name: "turned" },
    { name: "gone", localPort: two },
    { name: "toxics", toxics: toxicsOf(`a${LONG_MS}`) },
  ];
  await using stage = await open(before);
  const { proxy, log } = stage;
  using held = await stage.connect(5);
  await send(held, "held");
  const others = before.slice(0, 5).map(({ name }) => name);
  const clients = await Array.fromAsync(others, stage.converse);
  await stage.reload(before);
  assertEquals(stage.last(), " |  | ");
  const upstream = stage.upstream.replace("127.0.0.1", "localhost");
  await stage.reload([
    { name: "new", localPort: one },
    { name: "toxics", toxics: toxicsOf("a0") },
    { name: "same", profile: "cable" },
    { name: "faults", dropRate: 1 },
    { name: "moved", localPort: two },
    { name: "turned", upstream },
  ]);
  assertEquals(stage.last(), "new | toxics,faults,moved,turned | gone");
  await assertReads(held, "held"); // by the toxic
  for (const kept of clients.slice(0, 2)) await assertEchoes(kept);
  for (const cut of clients.slice(2)) assertEquals(await readToEnd(cut), 0);
  const listening = log.of("listening").map(({ route }) => route);
  assertEquals(listening.slice(6), ["moved", "new"]); // the others did already
  assertEquals(proxy.route("turned").upstream, upstream);
  using _dropped = await stage.connect(1);
  assertEquals((await log.first("dropped", 1))[0].connection, 2);
  for (const name of ["new", "moved", "turned"]) await stage.converse(name);
});

/** The file's toxics, what the API sets or removes, the file's then; the end. */
const TOXICS = `
a1 b1 |       | b1 a1 | b1 a1
a1 b1 |       | b2    | b2
a1 b1 | a9    | a1 b2 | a9 b2
a1 b1 | a9    | a2 b1 | a2 b1
a1 b1 | a9    | b1    | b1
a1 b1 | -a    | a1 b2 | b2
a1 b1 | -a    | a2 b1 | a2 b1
a1 b1 | -a c9 | b1    | b1 c9
a1    | c9    | a1 c1 | a1 c1
a1    | a9 c9 | a1    | a9 c9
`;

for (const line of TOXICS.trim().split("\n")) {
  Deno.test(`a reload sets the toxics that differ: ${line}`, async () => {
    const [before = "", api = "", after = "", end = ""] = line.split("|");
    await using stage = await open([{ name: "r", toxics: toxicsOf(before) }]);
    const { proxy } = stage;
    if (api.includes("a")) proxy.removeToxic("r", "a");
    for (const each of toxicsOf(api)) proxy.addToxic("r", each);
    await stage.reload([{ name: "r", toxics: toxicsOf(after) }]);
    const stands = proxy.toxics("r")
      .map(({ name, attributes }) => `${name}${attributes["latency"]}`);
    assertEquals(stands.join(" "), end.trim());
  });
}

Deno.test("what the API did to routes stands, unless the file differs there", async () => {
  await using stage = await open([..."abcd"].map((name) => ({ name })));
  const { proxy, upstream } = stage;
  await stage.converse("d");
  await proxy.updateRoute("a", { latencyMs: 1, jitterMs: 1 });
  await proxy.updateRoute("d", { jitterMs: 1, profile: "offline" });
  for (const name of "bc") await proxy.removeRoute(name);
  const added = { localPort: 0, upstream, toxics: toxicsOf("x1") };
  for (const name of "ef") await proxy.addRoute({ name, ...added });
  await stage.reload([
    { name: "a", latencyMs: 2 },
    { name: "b", jitterMs: 2 },
    { name: "c" },
    { name: "d" },
    { name: "e", jitterMs: 2, toxics: toxicsOf("y1") },
  ]);
  assertEquals(stage.last(), "b | a,e | ");
  const stands = proxy.routes.map(({ name, latencyMs, jitterMs, toxics }) =>
    [name, latencyMs, jitterMs, ...toxics.map(({ name }) => name)].join(" ")
  );
  assertEquals(
    stands.join(", "),
    "a 2 1, d 0 1 bandwidth_downstream bandwidth_upstream, e 0 2 y, f 0 0 x, b 0 2",
  );
  assertEquals(proxy.connections, 1);
  await stage.reload([]);
  assertEquals(stage.last(), " |  | a,d,e,b");
});

/** What a toxic becomes that holds all data, and keeps its name. */
const REPLACED = {
  type: toxic("limit_data bytes=3"),
  stream: toxic(`latency upstream latency=${LONG_MS}`),
  trigger: { ...toxic(`latency latency=${LONG_MS}`), after: { bytes: 9 } },
};

for (const [what, next] of Object.entries(REPLACED)) {
  Deno.test(`a toxic of another ${what} replaces the one at work`, async () => {
    const first = toxic(`latency latency=${LONG_MS} name=x`);
    if (what === "trigger") first.after = { bytes: 1 };
    await using stage = await open([{ name: "r", toxics: [first] }]);
    using client = await stage.connect();
    await send(client, "held");
    const isHeld = () => stage.proxy.stats()[0]?.received.downstream === 4;
    await until(isHeld, "the answer");
    await stage.reload([{ name: "r", toxics: [{ ...next, name: "x" }] }]);
    await assertReads(client, "held");
    if (what !== "type") return;
    await send(client, "1234");
    assertEquals(await readToEnd(client), 3);
    await client.closeWrite();
    assertEquals((await stage.log.first("closed", 1))[0].toxic, "x");
  });
}

Deno.test("a toxic that the API adds while a route waits for its port stays", async () => {
  await using stage = await open([{ name: "r", toxics: toxicsOf("a1") }]);
  const busy = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const moved = { name: "r", localPort: busy.addr.port };
  const reloading = stage.reload([{ ...moved, toxics: toxicsOf("a2") }]);
  await pause(); // in which it is found to be in use
  stage.proxy.addToxic("r", defined(toxicsOf("b1")[0]));
  busy.close();
  await reloading;
  const names = stage.proxy.toxics("r").map(({ name }) => name);
  assertEquals(names, ["a", "b"]);
});

for (const [before, after] of [["", "transatlantic"], ["transatlantic", ""]]) {
  Deno.test(`a reload replaces the API's profile, from "${before}" to "${after}"`, async () => {
    const route = { name: "r", toxics: toxicsOf("a1") };
    await using stage = await open([{ ...route, profile: before }]);
    await stage.proxy.updateRoute("r", { profile: "3g" });
    await stage.reload([{ ...route, profile: after }]);
    const names = stage.proxy.toxics("r").map(({ name }) => name);
    const far = ["latency_downstream", "latency_upstream"];
    assertEquals(names, after ? [...far, "a"] : ["a"]);
  });
}

Deno.test("what the API did to a route stands when a reload fails for it", async () => {
  await using stage = await open([{ name: "r" }]);
  await stage.proxy.updateRoute("r", { latencyMs: 7 });
  using busy = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const moved = { name: "r", localPort: busy.addr.port };
  await assertRejects(() => stage.reload([moved]), ListenError);
  await stage.reload([{ name: "r" }]);
  assertEquals(stage.proxy.route("r").latencyMs, 7);
});

Deno.test("a reload warns of what does nothing, where the file differs", async () => {
  await using stage = await open([{ name: "r", timeoutMs: 1 }]);
  const unused = [{ name: "r", timeoutMs: 1 }, { name: "s", timeoutMs: 1 }];
  for (let i = 0; i < 2; i++) await stage.reload(unused);
  const routes = stage.log.of("config_warning").map(({ route }) => route);
  assertEquals(routes, ["r", "s"]);
});

const A = '{"name": "a", "localPort": 0, "upstream": "a:1"';
/** What is refused. There is a route of the API's on port API, to route b. */
const REFUSED = `
{"seed": -1, "routes": [${A}, "dropRate": 2, "upstrem": ""}, ${A}}]}
  ConfigError: config: 4 problems
  seed: expected an integer from 0 to 9007199254740991, found -1
  routes[0].upstrem: unknown key; did you mean upstream?
  routes[0].dropRate: expected a number from 0 to 1, found 2
  routes[1].name: a is already taken by routes[0]
{"routes": [${A}}, {"name": "b", "localPort": 0, "upstream": "localhost:API"}]}
  ConfigError: route b: upstream: connections would go in a circle, b -> api -> b; write the address of the server behind it
{"routes": [{"localPort": 0, "upstream": "a:1"}, ${A}, "toxics": [{"type": "reset_peer"}]}]}
  NotSupported: route a: its connections cannot be reset; start it with --api or --watch; in code, resettable: true
{"api": 8474}
  ConfigError: config: api: cannot change; restart the proxy
`;

for (const [given, expected] of casesIn(REFUSED)) {
  Deno.test(`a reload that is refused changes nothing: ${given}`, async () => {
    await using stage = await open([{ name: "a" }, { name: "b" }]);
    const { proxy, log } = stage;
    const upstream = `127.0.0.1:${proxy.route("b").localPort}`;
    const api = await proxy.addRoute({ name: "api", localPort: 0, upstream });
    await stage.converse("a");
    const before = [proxy.routes, log.all.length];
    const config = JSON.parse(given.replace("API", `${api.localPort}`));
    const error = await assertRejects(() => proxy.reload(config), Error);
    assertEquals(`${error.name}: ${error.message}`, expected.join("\n  "));
    assertEquals([proxy.routes, log.all.length], before);
  });
}

Deno.test("where a port is in use the rest is done, and the next reload tries again", async () => {
  await using stage = await open([{ name: "moves" }, { name: "last" }]);
  const client = await stage.converse("moves");
  const hostname = "127.0.0.1";
  const busy = [0, 1].map(() => Deno.listen({ hostname, port: 0 }));
  const [one, two] = busy.map(({ addr }) => addr.port);
  const reload = () =>
    stage.reload([
      { name: "new", localPort: one },
      { name: "moves", localPort: two },
      { name: "last", jitterMs: 1 },
    ]);
  const { message } = await assertRejects(reload, ListenError);
  const inUse = `:${two}: the port is already in use\n  route new: .*:${one}: `;
  assertMatch(message, RegExp(`^route moves: cannot .*${inUse}`));
  assertEquals(stage.last(), " | last | ");
  await assertEchoes(client); // it is where it was
  for (const listener of busy) listener.close();
  await reload();
  assertEquals(stage.last(), "new | moves | ");
  for (const name of ["new", "moves"]) await stage.converse(name);
  using again = Deno.listen({ hostname, port: 0 });
  const moves = { name: "moves", localPort: again.addr.port };
  await assertRejects(() => stage.reload([moves]), ListenError);
  await stage.reload([]);
  assertEquals(stage.last(), " |  | moves");
});

Deno.test("a changed seed reseeds, and a changed drain timeout applies", async () => {
  await using stage = await open([{ name: "a" }]);
  const { proxy, log } = stage;
  await stage.converse("a");
  proxy.reseed(5);
  await stage.reload([{ name: "a" }]); // whose seed is the same as before
  await stage.reload([{ name: "a" }], { seed: 2, drainTimeoutMs: 1 });
  await stage.reload([{ name: "a" }], { drainTimeoutMs: 1 }); // keeps the seed
  await stage.reload([{ name: "a" }], { seed: 2, drainTimeoutMs: 1 });
  assertEquals(log.of("reseeded").map(({ seed }) => seed), [5, 2]);
  assertEquals([await proxy.drain(), log.only("draining").timeoutMs], [1, 1]);
  await assertRejects(() => stage.reload([]), Deno.errors.BadResource);
});

/** The program on a file with routes of one letter, which the test changes. */
async function openFile(...args: string[]) {
  const all = new AsyncDisposableStack();
  const { address: upstream } = all.use(echo());
  const { path } = all.use(await TempFile.with(""));
  const write = (names: string, to = path, end?: number) => {
    const routes = [...names].map((name) => ({ name, localPort: 0, upstream }));
    const text = JSON.stringify({ seed: names.length, routes });
    return Deno.writeTextFile(to, text.slice(0, end));
  };
  await write("a");
  const cli = all.use(new Cli(...args, path));
  await cli.says(/started/);
  let told = 0;
  const news = () => [...cli.stdout.matchAll(/ reload(?:ed|_failed) (.*)\n/g)];
  return {
    ...{ cli, path, write },
    /** What the log tells of the next reload, which a signal may ask for. */
    async next(signal?: Deno.Signal) {
      if (signal) cli.kill(signal);
      await until(() => news().length > told, "reload");
      return defined(news()[told++]?.[1]).replace(path, "FILE");
    },
    /** Drains it while the file changes again, after which it ends. */
    async drain(meanwhile: () => Promise<void>) {
      const port = Number(await cli.says(/listening \S+:(\d+)/));
      using client = await Deno.connect({ port });
      await assertEchoes(client);
      cli.kill();
      await cli.says(/draining/);
      await write("a");
      await meanwhile();
      await client.closeWrite();
      assertEquals((await cli.status).code, 0, cli.stderr);
      assertEquals(news().length, told);
    },
    [Symbol.asyncDispose]: () => all.disposeAsync(),
  };
}

Deno.test("SIGHUP reloads the config", { ignore: IS_WINDOWS }, async () => {
  await using file = await openFile("--seed", "7");
  const hangUp = () => file.next("SIGHUP");
  await file.write("abc");
  assertEquals(await hangUp(), "added=b,c changed=[] removed=[]");
  await Deno.writeTextFile(file.path, "drainTimeoutMs: x\nroutes: []");
  assertMatch(
    await hangUp(),
    /^cause="FILE: 2 problems; drain\w+: .*; routes: /,
  );
  await file.drain(async () => {
    assertEquals(await hangUp(), 'cause="the proxy is shutting down"');
  });
  assertMatch(file.cli.stdout, /^(?!.* reseeded ).*WARN .* reload_failed /s);
});

Deno.test("--watch reloads the config", { ignore: IS_WINDOWS }, async () => {
  await using file = await openFile("--watch");
  const { path, write } = file;
  await write("ab", `${path}.new`);
  await Deno.rename(`${path}.new`, path);
  assertEquals(await file.next(), "added=b changed=[] removed=[]");
  let longest = 0;
  for (let size = 1; size < 100; size++) {
    const start = performance.now();
    await write("ac", path, size); // in place, part by part
    await pause(15);
    longest = Math.max(longest, performance.now() - start);
  }
  if (longest > 250) return console.warn("this machine is too busy for this");
  await write("ac");
  assertEquals(await file.next(), "added=c changed=[] removed=b");
  await Deno.remove(path);
  assertMatch(await file.next(), /^cause="FILE: No such file/);
  await pause(1200); // for two looks
  await write("ad", path, -9);
  assertMatch(
    await file.next(),
    /^cause="FILE: line 2, column 1: invalid YAML: /,
  );
  await write("ad");
  assertEquals(await file.next(), "added=d changed=[] removed=c");
  await file.drain(() => pause(1200));
});
