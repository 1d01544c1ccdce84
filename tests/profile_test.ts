import {
  assert,
  assertEquals,
  assertRejects,
  assertStringIncludes,
  assertThrows,
} from "@std/assert";
import { ChaosProxy, ConfigError, parseConfig, type Toxic } from "../main.ts";
import {
  Api,
  assertEchoes,
  assertReads,
  assertSince,
  checkConfig,
  echo,
  exchange,
  only,
  openEcho,
  openEnds,
  ROOT,
  send,
  SOCKETS,
  testBytes,
  toxic,
  until,
  WatchedProxy,
} from "./helpers.ts";

const DOCS = Deno.readTextFileSync(new URL("docs/profiles.md", ROOT));
/** The rows of the table in the docs: a name, and figures. */
const PROFILES = Array.from(
  DOCS.matchAll(/^\| `([\w-]+)` +\| (.*) \|$/gm),
  ([, name = "", row = ""]) => {
    const [down, up, roundTrip = 0, jitter = 0] = row.split("|").map(Number);
    return { name, kbits: [down, up], roundTrip, jitter };
  },
).slice(1); // without the heading
const NAMES = PROFILES.map(({ name }) => name);

/** What a route has, in short: `bandwidth_downstream 200`. */
const inShort = (toxics: readonly Toxic[]) =>
  toxics.map(({ name, attributes: { rate, latency } }) =>
    `${name} ${rate ?? latency ?? ""}`.trim()
  );

const configOf = (fields: object) =>
  JSON.stringify({ routes: [{ localPort: 1, upstream: "a:1", ...fields }] });
const routeOf = (fields: object) =>
  only(parseConfig(configOf(fields), "a.json").routes);

const SLOW = ["bandwidth_downstream 200", "latency_downstream 150"]
  .concat("bandwidth_upstream 96");

Deno.test("each profile stands for the toxics in the docs", () => {
  assertEquals(NAMES.length, 10);
  for (const { name, kbits, roundTrip, jitter } of PROFILES) {
    const lines = ["downstream", "upstream"].flatMap((stream, i) => [
      `bandwidth ${stream} rate=${Math.round(Number(kbits[i]) / 8)} shared=1`,
      `latency ${stream} latency=${roundTrip / 2} jitter=${jitter / 2}`,
    ]).filter((line) => !/rate=NaN|latency=0/.test(line));
    assert(lines.length >= 2, name);
    const expected = routeOf({ toxics: lines.map(toxic) }).toxics;
    assertEquals(routeOf({ profile: name }).toxics, expected, name);
  }
});

Deno.test("a route's own toxics replace a profile's, or come after it", () => {
  const own = ["noop", "latency latency=5", "bandwidth upstream rate=1"];
  const route = routeOf({ profile: "3g", toxics: own.map(toxic) });
  assertEquals(inShort(route.toxics), [
    "bandwidth_downstream 200",
    "latency_downstream 5",
    "bandwidth_upstream 1",
    "latency_upstream 150",
    "noop_downstream",
  ]);
  assertEquals(routeOf({ ...route }), route); // also written out
});

Deno.test("an unknown profile is refused, and the nearest named", () => {
  const expected = `expected ${NAMES.join(" or ")} or ""`;
  const cases: [unknown, string][] = [
    ["5g", 'found "5g"; did you mean 3g?'],
    ["3h", 'found "3h"; did you mean 3g?'],
    ["3G", 'found "3G"; did you mean 3g?'],
    ["wifi poor", 'found "wifi poor"; write wifi-poor'],
    ["carrier pigeon", 'found "carrier pigeon"'],
    ["toString", 'found "toString"'],
    [3, "found 3"],
    [null, "found null"],
  ];
  for (const [profile, found] of cases) {
    const { problems } = assertThrows(() => routeOf({ profile }), ConfigError);
    assertEquals(problems, [`routes[0].profile: ${expected}, ${found}`]);
  }
});

Deno.test("a route may have 500 toxics with those of its profile", async () => {
  const named = (_: unknown, i: number) => toxic(`noop name=n${i}`);
  const toxics = Array.from({ length: 498 }, named);
  await using upstream = echo();
  const route = { name: "r", profile: "transatlantic", toxics };
  await using watched = await WatchedProxy.to(upstream, route);
  const { proxy } = watched;
  assertEquals(proxy.route("r").toxics.length, 500);
  const most =
    "toxics: expected 500 at most with those of the profile, found 502";
  const change = () => proxy.updateRoute("r", { profile: "3g" });
  await assertRejects(change, ConfigError, most);
  assertThrows(() => routeOf({ ...route, profile: "3g" }), ConfigError, most);
  using client = await watched.connect();
  await assertEchoes(client);
  await proxy.updateRoute("r", { profile: "" });
  assertEquals(proxy.route("r").toxics.length, 498);
});

Deno.test("--check shows what a profile stands for", async () => {
  const all = "on every connection";
  assertStringIncludes(
    await checkConfig(configOf({ profile: "3g" })),
    `downstream: shares 200 KB/s ${all}, downstream: +150 ms ${all}, ` +
      `upstream: shares 96 KB/s ${all}, upstream: +150 ms ${all}`,
  );
});

Deno.test("the API puts a profile on, replaces it and takes it off", async () => {
  const toxics = [toxic("noop"), toxic("latency upstream latency=1")];
  await using ends = await openEcho({ name: "r", toxics });
  const { watched, client } = ends;
  const { proxy } = watched;
  await using api = Api.of(watched);
  await assertEchoes(client);
  const set = async (profile: string) => {
    const { body } = await api.post("/proxies/r", { profile });
    assertEquals(body.profile, profile);
    assertEquals((await api.get("/proxies/r")).body, body);
    const toxics = inShort(body.toxics);
    const live = only(proxy.liveConnections()).toxics;
    assertEquals(live, toxics.map((each) => each.replace(/ .*/, "")));
    return toxics;
  };
  const slow = [...SLOW, "latency_upstream 1", "noop_downstream"];
  assertEquals(await set("3g"), slow);
  const events = watched.log.all.length;
  assertEquals(await set("3g"), slow);
  const told = watched.log.all.slice(events).map(({ event }) => event);
  assertEquals(told.filter((each) => each.startsWith("toxic")), []);
  const attributes = { rate: 9 };
  await api.post("/proxies/r/toxics/bandwidth_downstream", { attributes });
  const own = [
    "latency_upstream 1",
    "bandwidth_downstream 9",
    "noop_downstream",
  ];
  const far = ["latency_downstream 39", ...own];
  assertEquals(await set("transatlantic"), far);
  assertEquals(await set(""), own);
  const start = performance.now();
  await set("edge");
  await assertEchoes(client);
  assertSince(start, 420);
  await api.post("/reset");
  const after = proxy.route("r");
  assertEquals([after.profile, after.toxics], ["", []]);
});

Deno.test("proxies are made, listed and loaded again with a profile", async () => {
  await using upstream = echo();
  const address = { upstream: upstream.address };
  const db = { name: "db", profile: "dsl" };
  const web = { name: "web", profile: "3g", ...address };
  const mail = { name: "mail", profile: "gprs", toxics: null, ...address };
  await using watched = await WatchedProxy.to(upstream, db);
  await using api = Api.of(watched);
  const made = await api.post("/proxies", web);
  assertEquals(made.status, 201);
  assertEquals(inShort(made.body.toxics), [...SLOW, "latency_upstream 150"]);
  const populated = await api.post("/populate", [mail]);
  assertEquals(populated.body.proxies[0].profile, "gprs");
  const { body } = await api.get("/proxies");
  const { routes } = parseConfig(JSON.stringify(body), "proxies.json");
  assertEquals(routes.map((each) => ({ ...each })), watched.proxy.routes);
  await using again = await ChaosProxy.start({
    routes: routes.map((each) => ({ ...each, localPort: 0 })),
  });
  await again.updateRoute("web", { profile: "" });
  assertEquals(again.route("web").toxics, []); // they were the profile's
  const refused = await api.post("/proxies/web", { profile: "3gg" });
  assertEquals(refused.status, 400);
  assert(refused.body.error.endsWith('found "3gg"; did you mean 3g?'));
});

for (const { sockets, resettable } of SOCKETS) {
  for (const [profile, ms] of [["3g", 300], ["satellite", 630]] as const) {
    Deno.test(`round trips through ${profile} take their time, and bytes are whole, on ${sockets}`, async () => {
      await using ends = await openEcho({ profile }, { resettable });
      for (let i = 0; i < 2; i++) {
        const start = performance.now();
        await assertEchoes(ends.client);
        assertSince(start, ms);
      }
      const start = performance.now();
      const bytes = testBytes(50_000);
      assertEquals(await exchange(ends.client, bytes), bytes);
      if (profile === "3g") assertSince(start, ms + 50_000 / 96);
    });
  }

  Deno.test(`offline holds all data until it is taken off, on ${sockets}`, async () => {
    const route = { name: "r", profile: "offline" };
    await using ends = await openEnds(route, { resettable });
    const { client, upstream, watched: { proxy } } = ends;
    await send(client, "question");
    await send(upstream, "answer");
    const stats = () => only(proxy.stats());
    await until(() => stats().received.upstream === 8, "question");
    await until(() => stats().received.downstream === 6, "answer");
    assertEquals(stats().sent, { upstream: 0, downstream: 0 });
    await proxy.updateRoute("r", { profile: "" });
    await assertReads(upstream, "question");
    await assertReads(client, "answer");
  });

  Deno.test(`toxics that a profile moves act in the new order at once, on ${sockets}`, async () => {
    const lines = ["limit_data bytes=3", "bandwidth rate=0", "latency"];
    const route = { name: "r", toxics: lines.map(toxic) };
    await using ends = await openEnds(route, { resettable });
    const { client, upstream, watched: { proxy } } = ends;
    await proxy.updateRoute("r", { profile: "3g" });
    const [first] = inShort(proxy.route("r").toxics);
    assertEquals(first, "bandwidth_downstream 0");
    await send(upstream, "hello");
    const read = () => only(proxy.stats()).received.downstream;
    await until(() => read() === 5, "hello");
    // It has not reached the limit yet: the bandwidth before it holds it.
    const attributes = { bytes: 9 };
    proxy.updateToxic("r", "limit_data_downstream", { attributes });
    proxy.removeToxic("r", "bandwidth_downstream");
    await assertReads(client, "hello");
  });
}
