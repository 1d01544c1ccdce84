/** What the control API has for its page: events, schema, config, for whom. */

import {
  assert,
  assertEquals,
  assertGreater,
  assertMatch,
  assertStringIncludes,
} from "@std/assert";
import { controlApi, parseConfig } from "../main.ts";
import {
  Api,
  assertSince,
  captured,
  casesIn,
  Cli,
  defined,
  echo,
  IS_WINDOWS,
  pause,
  ROOT,
  soon,
  times,
  toxic,
  until,
  WatchedProxy,
} from "./helpers.ts";

type Message = { id?: string; event?: string; data: Record<string, unknown> };

/** Parses server-sent events. */
async function* messagesIn(body: ReadableStream<Uint8Array<ArrayBuffer>>) {
  let rest = "";
  for await (const part of body.pipeThrough(new TextDecoderStream())) {
    const blocks = (rest + part).split("\n\n");
    rest = defined(blocks.pop());
    for (const block of blocks) {
      const fields = block.split("\n").map((line) => line.split(/: (.*)/s));
      const { data, ...more } = Object.fromEntries(fields);
      yield { ...more, data: JSON.parse(data) } as Message;
    }
  }
}

async function open({ port }: Api, query = "", headers: HeadersInit = {}) {
  const url = `http://127.0.0.1:${port}/events${query}`;
  const { body, status, headers: answer } = await fetch(url, { headers });
  assertEquals([status, answer.get("content-type")], [
    200,
    "text/event-stream",
  ]);
  return messagesIn(defined(body));
}

/** Reads up to a message, and leaves. */
async function readUntil(
  messages: AsyncGenerator<Message>,
  isLast: (message: Message) => boolean,
): Promise<Message[]> {
  const all: Message[] = [];
  const read = async () => {
    for await (const each of messages) {
      all.push(each);
      if (isLast(each)) return;
    }
  };
  await soon(read(), "such an event");
  return all;
}

/** A proxy without routes that has had so many events, and its API. */
async function withEvents(count: number) {
  const stack = new AsyncDisposableStack();
  const watched = stack.use(await WatchedProxy.start({}));
  const api = stack.use(Api.of(watched));
  const add = () => watched.proxy.reseed(1);
  while (watched.log.all.length < count) add();
  const { proxy } = watched;
  const { firstId } = proxy["context"].history;
  return { stack, ...watched, proxy, api, add, firstId };
}

/** Counted from the first one of the proxy. */
const idsOf = (messages: Message[], firstId: number) =>
  messages.flatMap(({ id }) => id === undefined ? [] : Number(id) - firstId);
const missedIn = (messages: Message[]) =>
  messages.filter(({ event }) => event === "missed")
    .map(({ data }) => Number(data["missed"]));

Deno.test("the events are those of the log, but for calls, with ids in order", async () => {
  await using upstream = echo();
  await using watched = await WatchedProxy.to(upstream, { timeoutMs: 1 });
  await using api = Api.of(watched);
  await api.post("/proxies/0/toxics", { type: "latency" });
  await api.post("/proxies/0/toxics/latency_downstream", { toxicity: 9 });
  (await watched.connect()).close();
  await watched.log.first("closed", 1);
  await api.delete("/proxies/0");
  const all = watched.log.all
    .filter((each) => each.event !== "api" || each.ignored);
  const messages = await open(api, "?after=0");
  const { firstId } = watched.proxy["context"].history;
  const last = `${firstId + all.length}`;
  const found = (await readUntil(messages, ({ id }) => id === last))
    .filter(({ id }) => id);
  assertEquals(idsOf(found, firstId), all.map((_, i) => i + 1));
  const told = found.map(({ data: { time, level, ...event } }) => {
    assertMatch(`${time}`, /^\d{4}-\d\d-\d\dT.*Z$/);
    const { ignored } = event;
    const isWarning = ignored || /warning/.test(`${event["event"]}`);
    assertEquals(level, isWarning ? "warn" : "info");
    return event;
  });
  assertEquals<unknown>(told, all);
});

Deno.test(
  "the CLI's own events are among them",
  { ignore: IS_WINDOWS },
  async () => {
    await using cli = await Cli.start({ api: "127.0.0.1:0" });
    await using api = Api.at(
      (await cli.log.first("api_listening", 1))[0].address,
    );
    const messages = await open(api);
    await messages.next();
    cli.kill("SIGHUP");
    const [{ event, ...rest }] = await cli.log.first("reload_failed", 1);
    const all = await readUntil(
      messages,
      ({ data }) => data["event"] === event,
    );
    const { time: _, ...data } = defined(all.at(-1)).data;
    const { time: __, ...logged } = rest as Record<string, unknown>;
    assertEquals(data, { event, ...logged });
  },
);

Deno.test("they resume after an id, as far as the last 1,000 reach back", async () => {
  const { stack, api, add, firstId } = await withEvents(1500);
  await using _ = stack;
  const run = (count: number) => `${firstId + count}`;
  const cases: [
    query: string,
    lastId: string,
    missed: number,
    first: number,
  ][] = [
    ["", run(1400), 0, 1401],
    ["", run(100), 400, 501],
    [`?after=${run(1400)}`, run(1450), 0, 1451],
    [`?after=${run(1400)}`, "", 0, 1401],
    ["?after=0", "", 0, 501],
    ["", run(7777), 0, 501],
    ["", run(-7777), 0, 501], // of a proxy before a restart
    ["?after=0&max=200", "", 800, 1301],
  ];
  for (const [query, lastId, missed, first] of cases) {
    const headers = new Headers();
    if (lastId) headers.set("last-event-id", lastId);
    const messages = await open(api, query, headers);
    const all = await readUntil(messages, ({ id }) => id === run(1500));
    const ids = Array.from({ length: 1501 - first }, (_, i) => first + i);
    assertEquals(idsOf(all, firstId), ids, query + lastId);
    assertEquals(missedIn(all), missed ? [missed] : [], query + lastId);
    const begin = all.slice(0, missed ? 2 : 1).map(({ event }) => event);
    assertEquals(begin, missed ? ["stats", "missed"] : ["stats"]);
  }
  const messages = await open(api);
  await messages.next();
  add();
  const next = await readUntil(messages, ({ id }) => !!id);
  assertEquals(idsOf(next, firstId), [1501]);
});

Deno.test("a reader with a maximum gets no more in a second, and is told of the others", async () => {
  const { stack, api, add, firstId } = await withEvents(0);
  await using _ = stack;
  const messages = await open(api, "?after=0&max=5");
  const timer = setInterval(add, 10);
  let [seconds, read] = [0, 0];
  const all = await readUntil(messages, ({ event, id }) => {
    if (event === "stats") [seconds, read] = [seconds + 1, 0];
    if (id) read++;
    assert(read <= 5, `${read} in a second`);
    return seconds === 3;
  });
  clearInterval(timer);
  const [ids, missed] = [idsOf(all, firstId), missedIn(all)];
  assertEquals(ids.length, 10);
  assert(missed.length <= 3, `${missed.length} messages`); // not each 25 ms
  const last = ids.length + missed.reduce((sum, each) => sum + each, 0);
  assert(last >= ids.at(-1)!, `${last} of ${ids}`);
});

Deno.test("statistics come at once and each second", async () => {
  await using upstream = echo();
  const toxics = [toxic("noop")];
  await using watched = await WatchedProxy.to(upstream, { toxics });
  await using api = Api.of(watched);
  (await watched.connect()).close();
  await watched.log.first("closed", 1);
  const start = performance.now();
  const messages = await open(api);
  for (let second = 0; second < 3; second++) {
    const { value } = await messages.next();
    assertSince(start, 1000 * second);
    const { event, data: { time, elapsedMs, ...data } } = defined(
      value as Message,
    );
    assertEquals([event, typeof time], ["stats", "string"]);
    assertGreater(Number(elapsedMs), 1000 * second - 1);
    const routes = watched.proxy.stats()
      .map(({ route, first: _, ...counts }) => ({
        name: route.name,
        ...counts,
      }));
    assertEquals(data, { seed: 1, routes: JSON.parse(JSON.stringify(routes)) });
  }
  watched.proxy.reseed(2);
  const { uptimeMs, elapsedMs } = watched.proxy.health();
  assertGreater(uptimeMs - elapsedMs, 1999);
  await messages.return(undefined);
});

Deno.test("16 may read, places are freed, and closing the API ends all", async () => {
  const { stack, api } = await withEvents(0);
  await using _ = stack;
  for (const path of ["/events", "/events?after=x"]) {
    await times(20, () => api.raw("HEAD", path)); // reads nothing
  }
  const readers: AsyncGenerator<Message>[] = [];
  const add = async () => {
    const { port } = api;
    const answer = await fetch(`http://127.0.0.1:${port}/events`);
    if (answer.ok) readers.push(messagesIn(defined(answer.body)));
    else await answer.body?.cancel();
    return answer.status;
  };
  await until(async () => await add() === 503, "17 readers");
  assertEquals(readers.length, 16);
  const { body } = await api.get("/events");
  assertEquals(body, {
    error: "16 others read the events already",
    status: 503,
  });
  await readers[3]?.next();
  await readers[3]?.return(undefined);
  await until(async () => await add() === 200, "a place");
  await api.server?.close();
  const rest = readers.filter((_, i) => i !== 3);
  await Promise.all(rest.map(async (each) => {
    await readUntil(each, () => false).catch(() => {});
  }));
});

Deno.test("a reader that does not read makes nothing wait or grow, and is told what it missed", async () => {
  const { stack, api, proxy, log, firstId } = await withEvents(0);
  await using _ = stack;
  await proxy.addRoute({ localPort: 0, upstream: "a:1", name: "r" });
  const messages = await open(api, "?after=0"); // 14 MB, if it gets all
  const name = "x".repeat(255);
  while (log.all.length < 20_000) {
    for (let i = 0; i < 250; i++) {
      proxy.addToxic("r", { type: "noop", name });
      proxy.removeToxic("r", name);
    }
    await pause(30); // in which one that reads gets them
  }
  const last = log.all.filter(({ event }) => event !== "api").length;
  const end = `${firstId + last}`;
  const all = await readUntil(messages, ({ id }) => id === end);
  const missed = missedIn(all).reduce((sum, each) => sum + each, 0);
  assertGreater(missed, 0);
  assertEquals(missed + idsOf(all, firstId).length, last);
});

Deno.test("GET /schema is what --schema prints", async () => {
  const { stack, api } = await withEvents(0);
  await using _ = stack;
  const file = new URL("config.schema.json", ROOT);
  const { body } = await api.get("/schema");
  assertEquals(body, JSON.parse(await Deno.readTextFile(file)));
});

Deno.test("GET /config loads, and equals the state after changes", async () => {
  const { stack, api, proxy } = await withEvents(0);
  await using _ = stack;
  const toxics = Array.from({ length: 490 }, (_, i) => (
    { ...toxic("latency latency=5"), name: `${i}` }
  ));
  for (const name of ["a", "b", "c"]) {
    const all = { upstream: "x:1", toxics: name === "c" ? toxics : [] };
    await api.post("/proxies", { name, profile: "3g", ...all });
  }
  await api.post("/proxies/a/toxics", { type: "noop" });
  await api.patch("/proxies/a/toxics/latency_upstream", { toxicity: 0.5 });
  await api.delete("/proxies/b/toxics/latency_upstream");
  await api.patch("/proxies/b", { connections: ["2-"], latencyMs: 5 });
  const { text, headers } = await api.raw("GET", "/config");
  assertEquals(headers.get("content-type"), "text/yaml; charset=utf-8");
  const { routes, ...rest } = parseConfig(text);
  assertEquals(rest, { seed: proxy.seed, drainTimeoutMs: 30_000 });
  const [a, b, c] = proxy.routes;
  // No profile stands for what is left of its toxics.
  assertEquals<unknown>(routes, [a, { ...b, profile: "" }, c]);
  assertMatch(
    text,
    /name: a\n.*profile: 3g.*name: b\n(?!.*profile.*name: c).*/s,
  );
});

const HTML = { accept: "text/html,*/*" };

Deno.test("GET / is the page, for its own scripts and styles alone", async () => {
  await using watched = await WatchedProxy.start({});
  const answerTo = controlApi(watched.proxy);
  const nonces = await times(2, async () => {
    const request = new Request("http://evil.example/", { headers: HTML });
    const { status, headers } = await answerTo(request.clone());
    const page = await (await answerTo(request)).text();
    const policy = defined(headers.get("content-security-policy"));
    const nonce = captured(/script-src 'nonce-([^']+)'; style-src/, policy);
    assertEquals([status, headers.get("content-type")], [
      200,
      "text/html; charset=utf-8",
    ]);
    assertEquals(headers.get("x-content-type-options"), "nosniff");
    assertEquals(headers.get("cache-control"), "no-store");
    assertEquals(
      policy.replaceAll(nonce, "N"),
      "default-src 'none'; " +
        "script-src 'nonce-N'; style-src 'nonce-N'; connect-src 'self'; " +
        "img-src data:; base-uri 'none'; form-action 'none'; " +
        "frame-ancestors 'none'",
    );
    const own = Array.from(page.matchAll(/<(?:script|style)\b[^>]*/g), String);
    assertGreater(own.length, 1);
    for (const tag of own) assertMatch(tag, / nonce="[\da-f-]{36}"$/);
    const markup = page.replace(/<script.*<\/script>/s, "");
    assert(!/ (?:on\w+|style)="/.test(markup), "the policy would refuse it");
    return nonce;
  });
  assert(nonces[0] !== nonces[1]);
  const others: [method: string, headers: HeadersInit, page: boolean][] = [
    ["GET", {}, true],
    ["POST", HTML, true],
    ["GET", HTML, false],
  ];
  for (const [method, headers, page] of others) {
    const request = new Request("http://localhost/", { method, headers });
    const answer = await controlApi(watched.proxy, { page })(request);
    assertEquals([answer.status, await answer.text()], [
      404,
      "404 page not found\n",
    ]);
  }
});

Deno.test("--no-page serves no page, and refuses browsers", async () => {
  const args = ["--api", "127.0.0.1:0", "--log-format", "json"];
  for (
    const [option, expected] of [["--no-page", 404], ["--demo=false", 200]]
  ) {
    await using cli = new Cli(...args, `${option}`);
    const [{ address }] = await cli.log.first("api_listening", 1);
    const page = await fetch(`http://${address}/`, { headers: HTML });
    await page.body?.cancel();
    assertEquals(page.status, expected);
  }
});

/** What a browser may, by the address of the API: headers, then statuses. */
const BROWSERS = `
GET http://127.0.0.1:8474/version; site same-origin
GET http://localhost:8474/version; site none
GET http://[::1]:8474/version; site same-origin; origin http://[::1]:8474
GET http://192.0.2.1:8474/version
GET http://192.0.2.1:8474/version; site same-origin
HEAD http://[2001:db8::1]:8474/version
POST http://localhost:8474/reset; site same-origin; origin http://localhost:8474
POST http://192.0.2.1:8474/reset; origin http://192.0.2.1:8474
GET http://evil.example:8474/; site cross-site
  200
GET http://127.0.0.1:8474/version
GET http://localhost:8474/version
GET http://[::1]:8474/version
GET http://127.0.0.1:8474/version; site cross-site
GET http://localhost:8474/version; site same-site
GET http://192.0.2.1:8474/version; site cross-site
GET http://192.0.2.1:8474/version; origin http://evil.example
GET http://localhost:8474/version; site same-origin; origin http://127.0.0.1:8474
GET http://localhost:8474/version; site same-origin; origin https://localhost:8474
GET http://localhost:8474/version; site same-origin; origin http://localhost:1
GET http://localhost:8474/events; site none; origin null
GET http://evil.example:8474/version; site same-origin
GET http://localhost.evil.example:8474/version; site same-origin
GET http://127.0.0.1.evil.example:8474/version; site same-origin
GET http://proxy:8474/version
POST http://localhost:8474/reset; site same-origin
POST http://evil.example:8474/reset; site same-origin; origin http://evil.example:8474
POST http://192.0.2.1:8474/reset
POST http://localhost:8474/; site same-origin
DELETE http://localhost:8474/connections/1; site none
  403
`;

Deno.test("only a page from the API's own address may call from a browser", async () => {
  await using watched = await WatchedProxy.start({});
  for (const [line, [expected]] of casesIn(BROWSERS)) {
    const [call = "", ...more] = line.split("; ");
    const [method = "", url = ""] = call.split(" ");
    const headers = new Headers({ ...HTML, "user-agent": "Mozilla/5.0" });
    for (const each of more) {
      const [name = "", value = ""] = each.split(" ");
      headers.set(name.replace("site", "sec-fetch-site"), value);
    }
    // Wherever it listens.
    for (const loopback of [true, false]) {
      const answerTo = controlApi(watched.proxy, { loopback });
      const request = { url, method, headers, body: null } as Request;
      const answer = await answerTo(request);
      const text = await answer.text();
      assertEquals([answer.ok, answer.status], [
        expected === "200",
        answer.ok ? answer.status : Number(expected),
      ], line);
      if (!answer.ok) assertStringIncludes(text, "refused", line);
    }
    const without = controlApi(watched.proxy, { page: false });
    const request = { url, method, headers, body: null } as Request;
    const { status } = await without(request);
    assertEquals(status, url.endsWith("/") && method === "GET" ? 404 : 403);
  }
});
