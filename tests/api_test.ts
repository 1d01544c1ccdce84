/** The control API: what it answers, and what comes of it. */

import {
  assert,
  assertEquals,
  assertGreater,
  assertGreaterOrEqual,
  assertMatch,
  assertRejects,
  assertStringIncludes,
  assertThrows,
} from "@std/assert";
import deno from "../deno.json" with { type: "json" };
import {
  ChaosProxy,
  ConfigError,
  controlApi,
  ListenError,
  parseConfig,
  type Route,
  type RouteOptions,
  serveApi,
} from "../main.ts";
import {
  Api,
  Cli,
  echo,
  EventLog,
  readAll,
  readExactly,
  readToEnd,
  send,
  steadyPort,
  TempFile,
  testBytes,
  text,
  until,
  untilRefused,
  Upstream,
  WatchedProxy,
  writeAll,
} from "./helpers.ts";

const HOUR_MS = 3_600_000;

const FAULTS = {
  dropRate: 0,
  timeoutRate: 0,
  timeoutMs: 0,
  latencyMs: 0,
  jitterMs: 0,
  connectTimeoutMs: 10_000,
  halfCloseTimeoutMs: 60_000,
};

/** A proxy, its API, and an upstream that greets with its name. */
class Stage implements AsyncDisposable {
  private constructor(
    readonly upstream: Upstream,
    readonly watched: WatchedProxy,
    readonly api: Api,
  ) {}

  static async open(routes: RouteOptions[] = []): Promise<Stage> {
    const upstream = echo();
    const watched = await WatchedProxy.start(
      { seed: 1, drainTimeoutMs: 1, routes },
      { resettable: true },
    );
    return new Stage(upstream, watched, Api.of(watched));
  }

  /** Creates a proxy called `p` to the upstream, and returns its port. */
  async create(more: Record<string, unknown> = {}): Promise<number> {
    const { status, body } = await this.api.post("/proxies", {
      name: "p",
      listen: `127.0.0.1:${steadyPort()}`,
      upstream: this.upstream.address,
      ...more,
    });
    assertEquals(status, 201, JSON.stringify(body));
    return portOf(body);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.api[Symbol.asyncDispose]();
    await this.watched.proxy.stop();
    await this.upstream[Symbol.asyncDispose]();
  }
}

// deno-lint-ignore no-explicit-any
function portOf(proxy: any): number {
  return Number(/:(\d+)$/.exec(proxy.listen)![1]);
}

/** That what is sent to a port comes back. */
async function assertEchoes(port: number): Promise<void> {
  using conn = await Deno.connect({ port });
  await assertEchoesOn(conn);
}

async function assertEchoesOn(conn: Deno.TcpConn): Promise<void> {
  await send(conn, "hello");
  assertEquals(text(await readExactly(conn, 5)), "hello");
}

/** A connection on which something has gone to and fro. */
async function connected(port: number): Promise<Deno.TcpConn> {
  const conn = await Deno.connect({ port });
  await assertEchoesOn(conn);
  return conn;
}

function greeting(name: string): Upstream {
  return new Upstream(async (conn) => {
    await send(conn, name);
    await readToEnd(conn);
  });
}

async function greetingAt(port: number, length: number): Promise<string> {
  using conn = await Deno.connect({ port });
  return text(await readExactly(conn, length));
}

// ---- Proxies -----------------------------------------------------------------

Deno.test("POST /proxies makes a proxy, and GET shows it", async () => {
  await using stage = await Stage.open();
  const { api, upstream } = stage;
  assertEquals(await api.get("/proxies"), { status: 200, body: {} });
  const created = await api.post("/proxies", {
    name: "db",
    listen: "localhost:0",
    upstream: upstream.address,
  });
  const proxy = {
    name: "db",
    listen: `127.0.0.1:${portOf(created.body)}`,
    upstream: upstream.address,
    enabled: true,
    toxics: [],
    ...FAULTS,
  };
  assertEquals(created, { status: 201, body: proxy });
  assertGreater(portOf(proxy), 0);
  await assertEchoes(portOf(proxy));
  assertEquals(await api.get("/proxies"), { status: 200, body: { db: proxy } });
  assertEquals(await api.get("/proxies/db"), { status: 200, body: proxy });
});

Deno.test("POST /proxies takes the faults and toxics in one step", async () => {
  await using stage = await Stage.open();
  const { api } = stage;
  const faults = {
    dropRate: 0.25,
    timeoutRate: 0.5,
    timeoutMs: 7,
    latencyMs: 8,
    jitterMs: 9,
    connectTimeoutMs: 10,
    halfCloseTimeoutMs: 11,
  };
  await stage.create({
    ...faults,
    toxics: [
      { type: "latency", attributes: { latency: 5 } },
      { type: "slicer", stream: "upstream", attributes: { average_size: 10 } },
    ],
  });
  const { body } = await api.get("/proxies/p");
  assertEquals(body, {
    name: "p",
    listen: body.listen,
    upstream: stage.upstream.address,
    enabled: true,
    toxics: [
      {
        name: "latency_downstream",
        type: "latency",
        stream: "downstream",
        toxicity: 1,
        attributes: { latency: 5, jitter: 0 },
      },
      {
        name: "slicer_upstream",
        type: "slicer",
        stream: "upstream",
        toxicity: 1,
        attributes: { average_size: 10, size_variation: 0, delay: 0 },
      },
    ],
    ...faults,
  });
});

Deno.test("its faults are injected from the first connection on", async () => {
  await using stage = await Stage.open();
  const port = await stage.create({ dropRate: 1 });
  using conn = await Deno.connect({ port });
  assertEquals(await readToEnd(conn), 0);
  assertEquals(stage.upstream.accepted, 0);
  await stage.api.patch("/proxies/p", { dropRate: 0, latencyMs: 60 });
  const start = performance.now();
  await assertEchoes(port);
  assertGreaterOrEqual(performance.now() - start, 59);
  assertEquals(
    stage.watched.log.of("delayed").map(({ delayMs }) => delayMs),
    [60],
  );
});

Deno.test("a proxy that is created disabled does not listen until it is enabled", async () => {
  await using stage = await Stage.open();
  const address = `127.0.0.1:${steadyPort()}`;
  const listen = address.replace("127.0.0.1", "localhost");
  const port = await stage.create({ enabled: false, listen });
  const { body } = await stage.api.get("/proxies/p");
  assertEquals([body.enabled, body.listen], [false, listen]);
  await untilRefused(port);
  const enabled = await stage.api.post("/proxies/p", { enabled: true });
  assertEquals(
    [enabled.status, enabled.body.enabled, enabled.body.listen],
    [200, true, address],
  );
  await assertEchoes(port);
});

Deno.test("what POST /proxies refuses, it says, and makes nothing", async () => {
  await using stage = await Stage.open();
  const { api } = stage;
  const port = await stage.create();
  const good = { name: "x", listen: "127.0.0.1:0", upstream: "127.0.0.1:9" };
  const bad = "bad request body: ";
  const refused: [body: unknown, status: number, error: string | RegExp][] = [
    [{ ...good, name: undefined }, 400, "missing required field: name"],
    [{ ...good, name: "" }, 400, "missing required field: name"],
    [{ ...good, name: null }, 400, "missing required field: name"],
    [{}, 400, "missing required field: name"],
    [{ ...good, upstream: undefined }, 400, "missing required field: upstream"],
    [{ ...good, upstream: "" }, 400, "missing required field: upstream"],
    [{ ...good, name: "p" }, 409, "proxy already exists"],
    [
      { ...good, name: "a b" },
      400,
      `${bad}name: expected 1 to 255 characters without white space, not . or .., found "a b"; write a-b`,
    ],
    [
      { ...good, upstream: "a:b" },
      400,
      `${bad}upstream: expected host:port or [ipv6]:port, the port from 1 to 65535, found "a:b"`,
    ],
    [
      { ...good, listen: "nowhere" },
      400,
      `${bad}listen: expected host:port, [ipv6]:port or :port, the port from 0 to 65535, found "nowhere"`,
    ],
    [
      { ...good, enabled: "yes" },
      400,
      `${bad}enabled: expected true or false, found "yes"`,
    ],
    [
      { ...good, dropRate: 2 },
      400,
      `${bad}dropRate: expected a number from 0 to 1, found 2`,
    ],
    [
      { ...good, toxics: [{ type: "latency", attributes: { latency: "1" } }] },
      400,
      `${bad}toxics[0].attributes.latency: expected an integer from 0 to 2147483647, found "1"; remove the quotes`,
    ],
    [[], 400, `${bad}expected a mapping with name and upstream, found a list`],
    [5, 400, `${bad}expected a mapping with name and upstream, found 5`],
    [
      "{",
      400,
      `${bad}line 1, column 2: invalid JSON: expected a key in double quotes, found the end`,
    ],
    [
      "",
      400,
      `${bad}line 1, column 1: invalid JSON: expected a value, found the end`,
    ],
    [
      new Uint8Array([0x22, 0xff, 0x22]),
      400,
      `${bad}expected text in UTF-8, found other bytes`,
    ],
    [
      { ...good, listen: `127.0.0.1:${port}` },
      500,
      `listen tcp 127.0.0.1:${port}: bind: address already in use`,
    ],
  ];
  for (const [body, status, error] of refused) {
    const answer = await api.post("/proxies", body);
    assertEquals(answer, { status, body: { error, status } });
  }
  assertEquals(Object.keys((await api.get("/proxies")).body), ["p"]);
  await assertEchoes(port);
});

Deno.test("a listen address may be any that Toxiproxy takes", async () => {
  await using stage = await Stage.open();
  const { api, upstream } = stage;
  const listens: [given: string | null | undefined, shown: RegExp][] = [
    [undefined, /^127\.0\.0\.1:[1-9]\d*$/],
    [null, /^127\.0\.0\.1:[1-9]\d*$/],
    ["", /^127\.0\.0\.1:[1-9]\d*$/],
    [":0", /^0\.0\.0\.0:[1-9]\d*$/],
    ["0.0.0.0:0", /^0\.0\.0\.0:[1-9]\d*$/],
    ["localhost:0", /^127\.0\.0\.1:[1-9]\d*$/],
    ["[::1]:0", /^\[::1\]:[1-9]\d*$/],
  ];
  for (const [i, [listen, shown]] of listens.entries()) {
    const { status, body } = await api.post("/proxies", {
      name: `${i}`,
      listen,
      upstream: upstream.address,
    });
    assertEquals(status, 201);
    assertMatch(body.listen, shown);
    const hostname = listen === "[::1]:0" ? "::1" : "127.0.0.1";
    using conn = await Deno.connect({ hostname, port: portOf(body) });
    await assertEchoesOn(conn);
  }
});

Deno.test("PATCH and POST /proxies/{name} change what is given alone", async () => {
  await using stage = await Stage.open();
  const port = await stage.create({
    latencyMs: 1,
    toxics: [{ type: "latency" }],
  });
  const before = (await stage.api.get("/proxies/p")).body;
  for (const method of ["PATCH", "POST"]) {
    const answer = await stage.api.call(method, "/proxies/p", {});
    assertEquals(answer, { status: 200, body: before });
    const changed = await stage.api.call(method, "/proxies/p", { jitterMs: 1 });
    assertEquals(changed.body, { ...before, jitterMs: 1 });
    await stage.api.call(method, "/proxies/p", { jitterMs: 0, enabled: null });
  }
  // A client sends back all that it has read, toxics included; these may have
  // changed since, and have calls of their own.
  await stage.api.post("/proxies/p/toxics", { type: "timeout", toxicity: 0 });
  const all = await stage.api.post("/proxies/p", { ...before, toxics: null });
  assertEquals(all.status, 200);
  assertEquals((await stage.api.post("/proxies/p", before)).status, 200);
  const { body } = await stage.api.get("/proxies/p/toxics");
  assertEquals(body.length, 2);
  await assertEchoes(port);
});

Deno.test("PATCH with the same addresses leaves the connections alone", async () => {
  await using stage = await Stage.open();
  const port = await stage.create({ listen: "127.0.0.1:0" });
  using conn = await connected(port);
  const { upstream } = stage;
  for (const host of ["127.0.0.1", "localhost"]) {
    const listen = `${host}:${port}`;
    const patch = { listen, upstream: upstream.address, enabled: true };
    const { status, body } = await stage.api.patch("/proxies/p", patch);
    assertEquals([status, portOf(body)], [200, port]);
  }
  await assertEchoesOn(conn);
});

Deno.test("a listen on port 0 in an update takes a new port", async () => {
  await using stage = await Stage.open();
  let port = await stage.create({ listen: "localhost:0" });
  using conn = await connected(port);
  for (const listen of ["localhost:0", "127.0.0.1:0"]) {
    const { body } = await stage.api.patch("/proxies/p", { listen });
    await untilRefused(port);
    assert(portOf(body) !== port);
    port = portOf(body);
    await assertEchoes(port);
  }
  assertEquals(await readToEnd(conn), 0);
  const route = await stage.watched.proxy.updateRoute("p", { localPort: 0 });
  await untilRefused(port);
  await assertEchoes(route.localPort);
});

Deno.test("another upstream cuts the connections, and is where new ones go", async () => {
  await using stage = await Stage.open();
  await using other = greeting("other");
  const port = await stage.create();
  using conn = await connected(port);
  const { status, body } = await stage.api.patch("/proxies/p", {
    upstream: other.address,
  });
  assertEquals([status, portOf(body)], [200, port]);
  assertEquals(body.upstream, other.address);
  assertEquals(await readToEnd(conn), 0);
  const [closed] = await stage.watched.log.first("closed", 1);
  assertEquals(closed.why, "cut");
  assertEquals(await greetingAt(port, 5), "other");
});

Deno.test("another listen address cuts the connections, and listens there", async () => {
  await using stage = await Stage.open();
  const port = await stage.create();
  using conn = await connected(port);
  const address = `127.0.0.1:${steadyPort()}`;
  const { status, body } = await stage.api.patch("/proxies/p", {
    listen: address,
  });
  assertEquals([status, body.listen], [200, address]);
  assertEquals(await readToEnd(conn), 0);
  await untilRefused(port);
  await assertEchoes(portOf(body));
  // On the same port of all addresses, for which it has to make way for itself.
  const wider = await stage.api.patch("/proxies/p", {
    listen: `:${portOf(body)}`,
  });
  assertEquals([wider.status, wider.body.listen], [
    200,
    `0.0.0.0:${portOf(body)}`,
  ]);
  await assertEchoes(portOf(body));
});

Deno.test("an address that cannot be listened on leaves all as it was", async () => {
  await using stage = await Stage.open();
  const port = await stage.create();
  using conn = await connected(port);
  using taken = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const before = (await stage.api.get("/proxies/p")).body;
  const { status, body } = await stage.api.patch("/proxies/p", {
    listen: `127.0.0.1:${taken.addr.port}`,
    dropRate: 1,
  });
  assertEquals(status, 500);
  assertEquals(
    body.error,
    `listen tcp 127.0.0.1:${taken.addr.port}: bind: address already in use`,
  );
  assertEquals((await stage.api.get("/proxies/p")).body, before);
  await assertEchoesOn(conn);
  await assertEchoes(port);
  // Not even where it had to make way for itself.
  if (Deno.build.os !== "linux") return; // has 127.0.0.2 as it is
  using other = Deno.listen({ hostname: "127.0.0.2", port });
  const wider = await stage.api.patch("/proxies/p", { listen: `:${port}` });
  assertEquals(wider.status, 500);
  assertEquals((await stage.api.get("/proxies/p")).body, before);
  assertEquals(other.addr.port, port);
  await assertEchoes(port);
});

Deno.test("enabled: false stops listening and cuts, true starts again", async () => {
  await using stage = await Stage.open();
  const port = await stage.create({ toxics: [{ type: "latency" }] });
  for (let round = 0; round < 3; round++) {
    using conn = await connected(port);
    const off = await stage.api.post("/proxies/p", { enabled: false });
    assertEquals([off.status, off.body.enabled], [200, false]);
    assertEquals(portOf(off.body), port);
    assertEquals(await readToEnd(conn), 0);
    await untilRefused(port);
    const again = await stage.api.post("/proxies/p", { enabled: false });
    assertEquals(again.body, off.body);
    const on = await stage.api.post("/proxies/p", { enabled: true });
    assertEquals([on.status, on.body.enabled], [200, true]);
    assertEquals(portOf(on.body), port);
    assertEquals(on.body.toxics.length, 1);
    await assertEchoes(port);
  }
});

Deno.test("what PATCH refuses, it says, and changes nothing", async () => {
  await using stage = await Stage.open();
  await stage.create();
  const before = (await stage.api.get("/proxies/p")).body;
  const bad = "bad request body: ";
  const refused: [body: unknown, error: string][] = [
    [{ name: "q" }, `${bad}name: cannot be changed to "q"`],
    [
      { upstream: "a:b", enabled: 1 },
      `${bad}enabled: expected true or false, found 1; upstream: expected host:port or [ipv6]:port, the port from 1 to 65535, found "a:b"`,
    ],
    [[], `${bad}expected a mapping, found a list`],
    [
      "",
      `${bad}line 1, column 1: invalid JSON: expected a value, found the end`,
    ],
  ];
  for (const [body, error] of refused) {
    assertEquals(await stage.api.patch("/proxies/p", body), {
      status: 400,
      body: { error, status: 400 },
    });
  }
  assertEquals((await stage.api.get("/proxies/p")).body, before);
});

Deno.test("DELETE /proxies/{name} stops listening, cuts, and forgets", async () => {
  await using stage = await Stage.open();
  const port = await stage.create();
  using conn = await connected(port);
  assertEquals(await stage.api.delete("/proxies/p"), {
    status: 204,
    body: undefined,
  });
  assertEquals(await readToEnd(conn), 0);
  await untilRefused(port);
  assertEquals((await stage.api.get("/proxies")).body, {});
  await stage.create({ listen: `127.0.0.1:${port}` });
  await assertEchoes(port);
});

Deno.test("a proxy that is not there is not found, by any call", async () => {
  await using stage = await Stage.open();
  const calls: [method: string, path: string][] = [
    ...["GET", "POST", "PATCH", "DELETE"].map((method): [string, string] => [
      method,
      "/proxies/none",
    ]),
    ["GET", "/proxies/none/toxics"],
    ["POST", "/proxies/none/toxics"],
    ["GET", "/proxies/none/toxics/x"],
    ["PATCH", "/proxies/none/toxics/x"],
    ["DELETE", "/proxies/none/toxics/x"],
    ["GET", "/proxies/%zz"],
  ];
  for (const [method, path] of calls) {
    const body = method === "POST" || method === "PATCH"
      ? { type: "latency" }
      : undefined;
    assertEquals(await stage.api.call(method, path, body), {
      status: 404,
      body: { error: "proxy not found", status: 404 },
    }, `${method} ${path}`);
  }
});

Deno.test("names are found as they are written in a path, encoded or not", async () => {
  await using stage = await Stage.open();
  const names = [
    "10.96.1.2:9094_us@host",
    "größe",
    "a/b",
    "100%",
    "x".repeat(255),
  ];
  for (const name of names) {
    await stage.create({ name });
    const path = `/proxies/${encodeURIComponent(name)}`;
    assertEquals((await stage.api.get(path)).body.name, name);
  }
  const { body } = await stage.api.get("/proxies/10.96.1.2:9094_us@host");
  assertEquals(body.name, names[0]);
});

Deno.test("POST /populate creates, replaces what differs, and leaves the rest alone", async () => {
  await using stage = await Stage.open();
  await using other = greeting("other");
  const { api, upstream } = stage;
  const list = ["a", "b", "c"].map((name) => ({
    name,
    listen: "localhost:0",
    upstream: upstream.address,
  }));
  const first = await api.post("/populate", list);
  assertEquals(first.status, 201);
  const proxies = first.body.proxies;
  assertEquals(proxies.map(({ name }: { name: string }) => name), [
    "a",
    "b",
    "c",
  ]);
  for (const proxy of proxies) await assertEchoes(portOf(proxy));
  await api.post("/proxies/a/toxics", { type: "latency" });
  await api.post("/proxies/b/toxics", { type: "latency" });
  using left = await connected(portOf(proxies[0]));
  using cut = await connected(portOf(proxies[1]));

  const [a, b, c] = proxies;
  const second = await api.post("/populate", [
    { name: "a", listen: a.listen, upstream: a.upstream, toxics: null },
    { name: "b", listen: b.listen, upstream: other.address },
    { ...list[2], enabled: false },
    {
      name: "d",
      listen: "127.0.0.1:0",
      upstream: other.address,
      enabled: false,
    },
  ]);
  assertEquals(second.status, 201);
  const [a2, b2, c2, d2] = second.body.proxies;
  assertEquals([a2.toxics.length, a2.enabled], [1, true]);
  assertEquals([b2.upstream, b2.toxics], [other.address, []]);
  assertEquals(portOf(b2), portOf(b));
  assertEquals(c2, c); // also that it is enabled is left alone
  assertEquals(d2.enabled, false);
  await assertEchoesOn(left);
  assertEquals(await readToEnd(cut), 0);
  assertEquals(await greetingAt(portOf(b), 5), "other");
  const replaced = (await api.get("/connections")).body
    .filter(({ proxy }: { proxy: string }) => proxy === "b");
  assert(replaced.every(({ number }: { number: number }) => number === 1));
  assertEquals(await api.post("/populate", []), {
    status: 201,
    body: { proxies: [] },
  });
});

Deno.test("what POST /populate refuses, it says, and changes nothing", async () => {
  await using stage = await Stage.open();
  const port = await stage.create();
  using conn = await connected(port);
  const good = { name: "p", listen: "127.0.0.1:0", upstream: "127.0.0.1:9" };
  const bad = "bad request body: ";
  const refused: [body: unknown, error: string][] = [
    [[{ upstream: "a:1" }], "missing required field: name at proxy 1"],
    [[good, { name: "b" }], "missing required field: upstream at proxy 2"],
    [[good, { ...good, name: "" }], "missing required field: name at proxy 2"],
    [{}, `${bad}expected a list of proxies, found a mapping`],
    [[5], `${bad}[0]: expected a mapping with name and upstream, found 5`],
    [[good, good], `${bad}[1].name: p is already taken by [0]`],
    [
      [{ ...good, listen: "127.0.0.1:5" }, {
        ...good,
        name: "q",
        listen: "127.0.0.1:5",
      }],
      `${bad}[1].listen: 127.0.0.1:5 is already taken by [0]`,
    ],
    [
      [good, { ...good, name: "q", toxics: [{ type: "x" }] }],
      `${bad}[1].toxics[0].type: expected latency or bandwidth or slow_close or timeout or reset_peer or slicer or limit_data or packet_loss or corrupt or limit_time or noop, found "x"`,
    ],
  ];
  for (const [body, error] of refused) {
    assertEquals(await stage.api.post("/populate", body), {
      status: 400,
      body: { error, status: 400 },
    });
  }
  assertEquals(Object.keys((await stage.api.get("/proxies")).body), ["p"]);
  await assertEchoesOn(conn);
});

Deno.test("POST /populate that cannot listen leaves what came before", async () => {
  await using stage = await Stage.open();
  using taken = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const listen = `127.0.0.1:${taken.addr.port}`;
  const { address: upstream } = stage.upstream;
  const { status, body } = await stage.api.post("/populate", [
    { name: "a", upstream },
    { name: "b", listen, upstream },
    { name: "c", upstream },
  ]);
  assertEquals(status, 500);
  assertStringIncludes(body.error, `listen tcp ${listen}: bind: `);
  const { body: there } = await stage.api.get("/proxies");
  assertEquals(Object.keys(there), ["a"]);
  await assertEchoes(portOf(there.a));
});

Deno.test("localhost is 127.0.0.1 to whom it is written otherwise", async () => {
  await using stage = await Stage.open();
  const port = await stage.create({ toxics: [{ type: "latency" }] });
  using conn = await connected(port);
  const same = {
    name: "p",
    listen: `localhost:${port}`,
    upstream: stage.upstream.address,
  };
  const { body } = await stage.api.post("/populate", [same]);
  assertEquals(body.proxies[0].toxics.length, 1);
  assertEquals((await stage.api.patch("/proxies/p", same)).status, 200);
  await assertEchoesOn(conn);
});

// ---- Toxics ------------------------------------------------------------------

Deno.test("a toxic is added, shown, changed by either method, and removed", async () => {
  await using stage = await Stage.open();
  const { api } = stage;
  const port = await stage.create();
  using conn = await connected(port);
  const toxics = "/proxies/p/toxics";
  assertEquals(await api.get(toxics), { status: 200, body: [] });

  const toxic = {
    name: "latency_downstream",
    type: "latency",
    stream: "downstream",
    toxicity: 1,
    attributes: { latency: 80, jitter: 0 },
  };
  assertEquals(
    await api.post(toxics, { type: "latency", attributes: { latency: 80 } }),
    { status: 200, body: toxic },
  );
  assertEquals(await api.get(toxics), { status: 200, body: [toxic] });
  const path = `${toxics}/${toxic.name}`;
  assertEquals(await api.get(path), { status: 200, body: toxic });
  const start = performance.now();
  await assertEchoesOn(conn);
  assertGreaterOrEqual(performance.now() - start, 79);

  const jittery = { latency: 80, jitter: 3 };
  assertEquals(await api.patch(path, { attributes: { jitter: 3 } }), {
    status: 200,
    body: { ...toxic, attributes: jittery },
  });
  assertEquals(await api.post(path, { toxicity: 0.5 }), {
    status: 200,
    body: { ...toxic, toxicity: 0.5, attributes: jittery },
  });
  // Some clients always send all there is, and not always as it is.
  const all = { ...toxic, name: "x", stream: "UpStream", attributes: null };
  assertEquals((await api.patch(path, all)).body, {
    ...toxic,
    attributes: jittery,
  });

  const hour = { attributes: { latency: HOUR_MS, jitter: 0 } };
  assertEquals((await api.patch(path, hour)).status, 200);
  await send(conn, "held");
  await until(
    () => stage.watched.proxy.liveConnections()[0].bytesDown >= 14,
    "the answer read",
  );
  assertEquals(await api.delete(path), { status: 204, body: undefined });
  assertEquals(text(await readExactly(conn, 4)), "held");
  assertEquals(await api.get(path), {
    status: 404,
    body: { error: "toxic not found", status: 404 },
  });
  assertEquals(await api.get(toxics), { status: 200, body: [] });
});

Deno.test("every type is added with all its attributes, in numbers", async () => {
  await using stage = await Stage.open();
  await stage.create();
  const defaults: Record<string, Record<string, number>> = {
    latency: { latency: 0, jitter: 0 },
    bandwidth: { rate: 0 },
    slow_close: { delay: 0 },
    timeout: { timeout: 0 },
    reset_peer: { timeout: 0 },
    slicer: { average_size: 7, size_variation: 0, delay: 0 },
    limit_data: { bytes: 0 },
    packet_loss: { loss_rate: 0.1, correlation: 0 },
    corrupt: { rate: 0.001 },
    limit_time: { time: 0 },
    noop: {},
  };
  for (const [type, attributes] of Object.entries(defaults)) {
    const { status, body } = await stage.api.post("/proxies/p/toxics", {
      name: "",
      type,
      attributes: type === "slicer" ? { average_size: 7 } : null,
    });
    assertEquals([status, body.attributes], [200, attributes]);
    assertEquals(body.name, `${type}_downstream`);
  }
});

Deno.test("a connection that is cut as Testcontainers does it comes back", async () => {
  await using stage = await Stage.open();
  const port = await stage.create();
  using conn = await connected(port);
  const toxics = "/proxies/p/toxics";
  const streams = ["upstream", "downstream"] as const;
  // As its setConnectionCut: by the names it gives, and with a rate of 0.
  const names = streams.map((stream) => `CUT_CONNECTION_${stream}`);
  for (const [i, stream] of streams.entries()) {
    const { body } = await stage.api.post(toxics, {
      ...{ name: names[i], type: "bandwidth", stream, toxicity: 1 },
      attributes: stream === "upstream" ? { rate: 0 } : {}, // which is 0, too
    });
    assertEquals(body.attributes, { rate: 0 });
  }
  const bytes = testBytes(100_000);
  const sending = writeAll(conn, bytes);
  const got = readExactly(conn, bytes.length);
  const { proxy } = stage.watched;
  await until(
    () => proxy.liveConnections()[0].bytesUp === 5 + bytes.length,
    "the client's bytes read",
  );
  assertEquals((await stage.api.delete(`${toxics}/${names[0]}`)).status, 204);
  await until(
    () => proxy.liveConnections()[0].bytesDown === 5 + bytes.length,
    "the answer read",
  );
  assertEquals(proxy.stats()[0].sent, {
    upstream: 5 + bytes.length,
    downstream: 5,
  });
  assertEquals((await stage.api.delete(`${toxics}/${names[1]}`)).status, 204);
  await sending;
  assertEquals(await got, bytes);
});

Deno.test("what Toxiproxy ignores is ignored, and named", async () => {
  await using stage = await Stage.open();
  const { api, upstream: { address: upstream } } = stage;
  const proxy = { name: "p", listen: "localhost:0", upstream };
  const toxics = [
    { type: "latency", id: 1, attributes: { latency: 0, delay: 1 } },
  ];
  const read = [{
    attributes: { jitter: 0, latency: 0 },
    name: "latency_downstream",
    type: "latency",
    stream: "downstream",
    toxicity: 1,
  }];
  const header = "X-Chaos-Proxy-Ignored";
  const path = "/proxies/p/toxics";
  const calls: [
    method: string,
    path: string,
    body: unknown,
    names: string[],
  ][] = [
    ["POST", "/proxies", proxy, []],
    ["PATCH", "/proxies/p", { ...proxy, listen: null, toxics: [] }, []],
    ["PATCH", "/proxies/p", { Logger: {}, toxics }, ["Logger", "toxics"]],
    ["POST", path, { type: "latency", toxicity: 1 }, []],
    ["PATCH", "/proxies/p", { toxics: read }, []],
    [
      "POST",
      path,
      {
        name: "l",
        type: "latency",
        toxicity: 80,
        attributes: { latency: 0, timeout: 5 },
      },
      ["toxicity: 80 counts as 1", "attributes.timeout"],
    ],
    ["PATCH", `${path}/l`, { name: "l", type: "latency" }, []],
    [
      "POST",
      `${path}/l`,
      { type: "timeout", stream: "UPSTREAM", toxicity: 1.5, delay: 5 },
      [
        "delay",
        "toxicity: 1.5 counts as 1",
        "type: stays latency",
        "stream: stays downstream",
      ],
    ],
    [
      "POST",
      "/populate",
      [{ ...proxy, name: "q", toxics, ünknown: 1 }],
      [
        '[0]."ünknown"',
        "[0].toxics[0].id",
        "[0].toxics[0].attributes.delay",
      ],
    ],
    ["PUT", "/seed", { seed: 1, sede: 2 }, ["sede"]],
  ];
  for (const [method, path, body, names] of calls) {
    const shown = `${method} ${path} ${JSON.stringify(body)}`;
    const answer = await api.raw(method, path, body);
    assert(answer.status < 300, `${shown}: ${answer.text}`);
    const expected = names.length > 0
      ? names.join(", ").replace("ü", "?")
      : null;
    assertEquals(answer.headers.get(header), expected, shown);
    const { ignored } = stage.watched.log.of("api").at(-1)!;
    assertEquals(ignored, names.length > 0 ? names : undefined, shown);
  }
  const { body } = await api.get("/proxies/p/toxics/l");
  assertEquals([body.type, body.toxicity], ["latency", 1]);

  // Also where the call fails, which may be why; and never at any length.
  const failed = await api.raw("POST", "/proxies", { nmae: "x", upstream });
  assertEquals([failed.status, failed.headers.get(header)], [400, "nmae"]);
  const keys = Array.from({ length: 60_000 }, (_, i) => [`key${i}`, 1]);
  const many = Object.fromEntries(keys);
  const answer = await api.raw("PATCH", "/proxies/p", many);
  assertEquals(answer.status, 200);
  assertMatch(answer.headers.get(header)!, /^key0, .* \.\.\. and 59950 more$/);
  const { length } = stage.watched.log.of("api").at(-1)!.ignored!;
  assertEquals(length, 51);
});

Deno.test("an upstream without a port is taken, and its connections fail", async () => {
  await using stage = await Stage.open();
  const port = await stage.create({ upstream: "one.example" });
  const answer = await stage.api.raw("PATCH", "/proxies/p", {
    upstream: "[::1]",
  });
  assertEquals(JSON.parse(answer.text).upstream, "[::1]");
  assertEquals(
    answer.headers.get("X-Chaos-Proxy-Ignored"),
    "upstream: [::1] has no port; its connections fail",
  );
  using conn = await Deno.connect({ port });
  assertEquals(await readToEnd(conn), 0);
  const [failed] = await stage.watched.log.first("upstream_failed", 1);
  assertEquals([failed.upstream, failed.cause], [
    "[::1]",
    "the upstream has no port; expected host:port",
  ]);
  const { body } = await stage.api.patch("/proxies/p", {
    upstream: stage.upstream.address,
  });
  assertEquals(body.upstream, stage.upstream.address);
  await assertEchoes(port);
  // A route takes none.
  const { proxy } = stage.watched;
  const problem = "upstream: expected host:port or [ipv6]:port";
  await assertRejects(
    () => proxy.updateRoute("p", { upstream: "one.example" }),
    ConfigError,
    problem,
  );
  await assertRejects(
    () => proxy.addRoute({ localPort: 0, upstream: "one.example" }),
    ConfigError,
    problem,
  );
});

Deno.test("an upstream without a host is one of localhost", async () => {
  await using stage = await Stage.open();
  const upstream = stage.upstream.address.replace(/^.*:/, ":");
  const port = await stage.create({ upstream });
  await assertEchoes(port);
  const { body } = await stage.api.get("/proxies/p");
  assertEquals(body.upstream, `localhost${upstream}`);
  const { body: { proxies } } = await stage.api.post("/populate", [
    { name: "q", upstream },
  ]);
  await assertEchoes(portOf(proxies[0]));
  await stage.api.patch("/proxies/p", { upstream: "127.0.0.1:9" });
  await stage.api.patch("/proxies/p", { upstream });
  await assertEchoes(port);
});

Deno.test("keys in any case are known, as Toxiproxy knows them", async () => {
  await using stage = await Stage.open();
  const port = await stage.create({
    name: undefined,
    upstream: undefined,
    Name: "p",
    Upstream: stage.upstream.address,
    Enabled: true,
    LATENCYMS: 1,
  });
  const { status, body } = await stage.api.post("/proxies/p/toxics", {
    Name: "slow",
    Type: "latency",
    Stream: "UpStream",
    Toxicity: 0.25,
    Attributes: { Latency: 3, JITTER: 1 },
    condition: null,
  });
  assertEquals([status, body], [200, {
    name: "slow",
    type: "latency",
    stream: "upstream",
    toxicity: 0.25,
    attributes: { latency: 3, jitter: 1 },
  }]);
  const changed = await stage.api.post("/proxies/p/toxics/slow", {
    Toxicity: null,
    Attributes: { Latency: 5 },
  });
  assertEquals(changed.body.attributes, { latency: 5, jitter: 1 });
  assertEquals(changed.body.toxicity, 0.25);
  assertEquals((await stage.api.get("/proxies/p")).body.latencyMs, 1);
  await assertEchoes(port);
});

Deno.test("what a toxic's calls refuse, they say, and change nothing", async () => {
  await using stage = await Stage.open();
  const port = await stage.create({ toxics: [{ type: "latency" }] });
  using conn = await connected(port);
  const bad = "bad request body: ";
  const ms = "an integer from 0 to 2147483647";
  const added: [body: unknown, status: number, error: string][] = [
    [{ type: "latency" }, 409, "toxic already exists"],
    [
      { type: "latency", stream: "sideways" },
      400,
      "stream was invalid, can be either upstream or downstream",
    ],
    [
      { type: "latency", stream: "" },
      400,
      "stream was invalid, can be either upstream or downstream",
    ],
    [
      { type: "lattency" },
      400,
      "invalid toxic type; did you mean latency?",
    ],
    [{ type: "constructor" }, 400, "invalid toxic type"],
    [{ type: null }, 400, "invalid toxic type"],
    [{}, 400, "invalid toxic type"],
    [
      { type: "bandwidth", attributes: [] },
      400,
      `${bad}attributes: expected a mapping, found a list`,
    ],
    [
      { type: "timeout", attributes: { timeout: -1 } },
      400,
      `${bad}attributes.timeout: expected ${ms}, found -1`,
    ],
    [
      { type: "timeout", toxicity: "80" },
      400,
      `${bad}toxicity: expected a number from 0 to 1, found "80"`,
    ],
    [
      { type: "timeout", stream: 5 },
      400,
      `${bad}stream: expected upstream or downstream, found 5`,
    ],
    [
      { type: "slicer" },
      400,
      `${bad}attributes.average_size: missing; expected an integer from 1 to 9007199254740991`,
    ],
    [[], 400, `${bad}expected a mapping with type, found a list`],
    [
      "{]",
      400,
      `${bad}line 1, column 2: invalid JSON: expected a key in double quotes, found "]"`,
    ],
  ];
  for (const [body, status, error] of added) {
    assertEquals(await stage.api.post("/proxies/p/toxics", body), {
      status,
      body: { error, status },
    });
  }
  const changed: [body: unknown, error: string][] = [
    [
      { attributes: { latency: "x" } },
      `${bad}attributes.latency: expected ${ms}, found "x"`,
    ],
    [
      { toxicity: -1 },
      `${bad}toxicity: expected a number from 0 to 1, found -1`,
    ],
    [5, `${bad}expected a mapping, found 5`],
  ];
  for (const [body, error] of changed) {
    assertEquals(
      await stage.api.patch("/proxies/p/toxics/latency_downstream", body),
      { status: 400, body: { error, status: 400 } },
    );
  }
  for (const method of ["GET", "PATCH", "POST", "DELETE"]) {
    const body = method === "PATCH" || method === "POST" ? {} : undefined;
    assertEquals(await stage.api.call(method, "/proxies/p/toxics/x", body), {
      status: 404,
      body: { error: "toxic not found", status: 404 },
    });
  }
  const { body } = await stage.api.get("/proxies/p/toxics");
  assertEquals(body.length, 1);
  assertEquals(body[0].attributes, { latency: 0, jitter: 0 });
  await assertEchoesOn(conn);
});

Deno.test("POST /reset enables every proxy, and removes all toxics", async () => {
  await using stage = await Stage.open();
  const port = await stage.create({
    dropRate: 0.5,
    toxics: [{ type: "timeout" }, { type: "latency" }],
  });
  await stage.api.post("/proxies", {
    name: "off",
    upstream: stage.upstream.address,
    enabled: false,
    toxics: [{ type: "reset_peer" }],
  });
  for (const body of [undefined, "", "{}", "not looked at"]) {
    assertEquals(await stage.api.call("POST", "/reset", body), {
      status: 204,
      body: undefined,
    });
  }
  const { body } = await stage.api.get("/proxies");
  assertEquals([body.p.toxics, body.off.toxics], [[], []]);
  assertEquals([body.p.enabled, body.off.enabled], [true, true]);
  assertEquals([portOf(body.p), body.p.dropRate], [port, 0.5]);
  await assertEchoes(portOf(body.off));
});

Deno.test("POST /reset does what it can, and says what it could not", async () => {
  await using stage = await Stage.open();
  using taken = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const listen = `127.0.0.1:${taken.addr.port}`;
  await stage.create({ name: "a", listen, enabled: false });
  const port = await stage.create({ name: "b", toxics: [{ type: "timeout" }] });
  const { status, body } = await stage.api.post("/reset");
  assertEquals(status, 500);
  assertStringIncludes(body.error, `listen tcp ${listen}: bind: `);
  assertEquals((await stage.api.get("/proxies/a")).body.enabled, false);
  await assertEchoes(port);
});

// ---- Beyond Toxiproxy --------------------------------------------------------

Deno.test("GET /version is Toxiproxy's, and this tool's own", async () => {
  await using stage = await Stage.open();
  assertEquals(await stage.api.get("/version"), {
    status: 200,
    body: {
      version: "2.12.0",
      name: "chaos-proxy",
      chaosProxyVersion: deno.version,
    },
  });
});

Deno.test("GET /connections lists the live ones, and DELETE cuts one", async () => {
  await using stage = await Stage.open();
  const { api } = stage;
  const port = await stage.create({
    toxics: [{ type: "latency", name: "slow" }],
  });
  assertEquals(await api.get("/connections"), { status: 200, body: [] });
  using one = await connected(port);
  using two = await connected(port);
  const { body } = await api.get("/connections");
  const { hostname, port: from } = one.localAddr;
  assertGreater(body[0].ageMs, 0);
  assertEquals(body[0], {
    id: body[0].id,
    number: 1,
    proxy: "p",
    client: `${hostname}:${from}`,
    upstream: stage.upstream.address,
    bytesUp: 5,
    bytesDown: 5,
    ageMs: body[0].ageMs,
    toxics: ["slow"],
  });
  assertEquals(body[1].number, 2);

  const path = `/connections/${body[0].id}`;
  assertEquals(await api.delete(path), { status: 204, body: undefined });
  assertEquals(await readToEnd(one), 0);
  await stage.watched.log.first("closed", 1);
  await assertEchoesOn(two);
  const gone = { error: "connection not found", status: 404 };
  assertEquals(await api.delete(path), { status: 404, body: gone });
  assertEquals(await api.delete("/connections/x"), { status: 404, body: gone });

  const other = `/connections/${body[1].id}`;
  assertEquals(await api.delete(`${other}?reset=yes`), {
    status: 400,
    body: { error: 'reset: expected 0 or 1, found "yes"', status: 400 },
  });
  assertEquals((await api.delete(`${other}?reset=1`)).status, 204);
  await assertRejects(() => readAll(two), Deno.errors.ConnectionReset);
  const closed = await stage.watched.log.first("closed", 2);
  assertEquals(closed.map(({ why }) => why), ["cut", "cut"]);
});

Deno.test("a connection that is cut with a RST resets its upstream, too", async () => {
  const atUpstream = Promise.withResolvers<unknown>();
  await using upstream = new Upstream(async (conn) => {
    await send(conn, "hello");
    await readAll(conn).then(atUpstream.resolve, atUpstream.resolve);
  });
  await using stage = await Stage.open();
  const port = await stage.create({ upstream: upstream.address });
  using conn = await Deno.connect({ port });
  await readExactly(conn, 5);
  const { body } = await stage.api.get("/connections");
  await stage.api.delete(`/connections/${body[0].id}?reset=1`);
  assert(await atUpstream.promise instanceof Deno.errors.ConnectionReset);
});

Deno.test("PUT /seed sets the seed, and a test can replay", async () => {
  await using stage = await Stage.open();
  const { api, watched } = stage;
  const port = await stage.create({ dropRate: 0.5 });
  assertEquals(await api.get("/seed"), { status: 200, body: { seed: 1 } });
  const outcomes = async () => {
    const before = watched.log.of("closed").length;
    for (let i = 0; i < 16; i++) {
      using conn = await Deno.connect({ port });
      await conn.closeWrite();
      await readToEnd(conn);
      await watched.log.first("closed", before + i + 1);
    }
    return watched.log.of("closed").slice(before)
      .map(({ connection, why }) => `${connection} ${why}`).join();
  };
  const play = async (seed: number) => {
    assertEquals(await api.call("PUT", "/seed", { seed }), {
      status: 200,
      body: { seed },
    });
    return await outcomes();
  };
  const first = await play(42);
  assertMatch(first, /^1 .*fault.*,16 /);
  assertStringIncludes(first, "client");
  assert(await play(43) !== first);
  assertEquals(await play(42), first);
  assert(await outcomes() !== first); // the numbers go on

  const expected = "expected an integer from 0 to 9007199254740991, found";
  const refused: [body: unknown, error: string][] = [
    [{ seed: -1 }, `bad request body: seed: ${expected} -1`],
    [
      { seed: "1" },
      `bad request body: seed: ${expected} "1"; remove the quotes`,
    ],
    [{}, "missing required field: seed"],
    [{ seed: null }, "missing required field: seed"],
    [5, "bad request body: expected a mapping, found 5"],
  ];
  for (const [body, error] of refused) {
    assertEquals(await api.call("PUT", "/seed", body), {
      status: 400,
      body: { error, status: 400 },
    });
  }
  assertEquals((await api.get("/seed")).body, { seed: 42 });
});

// ---- Metrics -----------------------------------------------------------------

/** A metric's samples by name and labels. */
function samplesOf(metrics: string): Map<string, number> {
  const samples = metrics.split("\n").filter((line) => /^[^#]/.test(line));
  return new Map(samples.map((line) => {
    const at = line.lastIndexOf(" ");
    return [line.slice(0, at), Number(line.slice(at + 1))];
  }));
}

Deno.test("GET /metrics counts bytes as Toxiproxy does, and what is this tool's own", async () => {
  await using stage = await Stage.open();
  const port = await stage.create({ toxics: [{ type: "slow_close" }] });
  const dropping = await stage.create({ name: "d", dropRate: 1 });
  const answer = new Upstream(async (conn) => {
    await readExactly(conn, 3);
    await send(conn, "hello!");
    await readToEnd(conn);
  });
  await using upstream = answer;
  await stage.api.patch("/proxies/p", { upstream: upstream.address });
  using open = await Deno.connect({ port });
  using ended = await Deno.connect({ port });
  for (const conn of [open, ended]) {
    await send(conn, "abc");
    assertEquals(text(await readExactly(conn, 6)), "hello!");
  }
  await ended.closeWrite();
  await readToEnd(ended);
  using dropped = await Deno.connect({ port: dropping });
  await readToEnd(dropped);
  await stage.watched.log.first("closed", 2);

  const { status, text: metrics, headers } = await stage.api.raw(
    "GET",
    "/metrics",
  );
  assertEquals(status, 200);
  assertEquals(
    headers.get("content-type"),
    "text/plain; version=0.0.4; charset=utf-8",
  );
  const samples = samplesOf(metrics);
  const bytes = (name: string, direction: string) =>
    samples.get(
      `toxiproxy_proxy_${name}_bytes_total{direction="${direction}",` +
        `listener="127.0.0.1:${port}",proxy="p",upstream="${upstream.address}"}`,
    );
  assertEquals(bytes("received", "upstream"), 6);
  assertEquals(bytes("sent", "upstream"), 6);
  assertEquals(bytes("received", "downstream"), 12);
  assertEquals(bytes("sent", "downstream"), 12);
  const own: Record<string, number> = {
    'connections_total{proxy="p",outcome="client"}': 1,
    'connections_total{proxy="d",outcome="fault"}': 1,
    'connections_open{proxy="p"}': 1,
    'connections_open{proxy="d"}': 0,
    'dial_seconds_count{proxy="p"}': 2,
    'dial_seconds_bucket{proxy="p",le="+Inf"}': 2,
    'dial_seconds_count{proxy="d"}': 0,
    'faults_total{proxy="d",kind="dropRate"}': 1,
    'faults_total{proxy="p",kind="slow_close"}': 2,
    [`build_info{version="${deno.version}",deno="${Deno.version.deno}"}`]: 1,
  };
  for (const [name, value] of Object.entries(own)) {
    assertEquals(samples.get(`chaos_proxy_${name}`), value, name);
  }
  assertGreater(samples.get('chaos_proxy_dial_seconds_sum{proxy="p"}')!, 0);
  const buckets = [...samples].filter(([name]) =>
    name.startsWith('chaos_proxy_dial_seconds_bucket{proxy="p"')
  ).map(([, value]) => value);
  assertEquals(buckets, buckets.toSorted((a, b) => a - b));
  assertWellFormed(metrics);

  await stage.api.post("/proxies/p/toxics", { type: "latency" });
  const after = samplesOf((await stage.api.raw("GET", "/metrics")).text);
  assertEquals(
    after.get('chaos_proxy_faults_total{proxy="p",kind="latency"}'),
    1, // the one that is open
  );
});

/** That a text is what Prometheus reads: help, type, then the samples. */
function assertWellFormed(metrics: string): void {
  assert(metrics.endsWith("\n"));
  let current = "";
  const seen = new Set<string>();
  for (const line of metrics.slice(0, -1).split("\n")) {
    const help = /^# HELP ([a-z_]+) \S.*$/.exec(line);
    if (help) current = help[1];
    else if (line.startsWith("#")) {
      assertMatch(
        line,
        new RegExp(`^# TYPE ${current} (counter|gauge|histogram)$`),
      );
      assert(!seen.has(current));
      seen.add(current);
    } else {
      assertMatch(
        line,
        new RegExp(
          `^${current}(_bucket|_sum|_count)?` +
            `\\{[a-z_]+="(?:[^"\\\\]|\\\\.)*"(,[a-z_]+="(?:[^"\\\\]|\\\\.)*")*\\} [\\d.e+-]+$`,
        ),
      );
    }
  }
}

Deno.test("names in metrics are escaped", async () => {
  await using stage = await Stage.open();
  await stage.create({ name: 'a"b\\c' });
  const { text: metrics } = await stage.api.raw("GET", "/metrics");
  assertStringIncludes(metrics, 'proxy="a\\"b\\\\c"');
  assertWellFormed(metrics);
});

Deno.test("bytes to another upstream are counted from none", async () => {
  await using stage = await Stage.open();
  await using other = echo();
  const port = await stage.create();
  await assertEchoes(port);
  await stage.watched.log.first("closed", 1);
  await stage.api.patch("/proxies/p", { upstream: other.address });
  const [{ received }] = stage.watched.proxy.stats();
  assertEquals(received, { upstream: 0, downstream: 0 });
  await assertEchoes(port);
  assertEquals(stage.watched.proxy.stats()[0].received.upstream, 5);
});

// ---- The HTTP of it ------------------------------------------------------------

Deno.test("every answer has an id of its own, and errors but one are JSON", async () => {
  await using stage = await Stage.open();
  const calls: [
    method: string,
    path: string,
    status: number,
    error?: string,
  ][] = [
    ["GET", "/proxies", 200],
    ["POST", "/reset", 204],
    ["GET", "/metrics", 200],
    ["GET", "/", 404, "404 page not found"],
    ["GET", "/proxies/", 404, "404 page not found"],
    ["GET", "/proxies/x/y", 404, "404 page not found"],
    ["GET", "/constructor", 404, "404 page not found"],
    [
      "PUT",
      "/proxies",
      405,
      "PUT is not for /proxies, which takes GET, POST",
    ],
    ["GET", "/reset", 405, "GET is not for /reset, which takes POST"],
    [
      "POST",
      "/connections",
      405,
      "POST is not for /connections, which takes GET",
    ],
  ];
  const ids = new Set<string>();
  for (const [method, path, status, error] of calls) {
    const answer = await stage.api.raw(method, path);
    assertEquals(answer.status, status, `${method} ${path}`);
    const id = answer.headers.get("X-Toxiproxy-Request-Id");
    assert(id && !ids.has(id));
    ids.add(id);
    if (status === 405) {
      assertEquals(
        answer.headers.get("allow"),
        error!.slice(error!.lastIndexOf("takes ") + 6),
      );
    }
    if (status === 404) {
      const type = answer.headers.get("content-type");
      assertEquals([type, answer.text], [
        "text/plain; charset=utf-8",
        `${error}\n`,
      ]);
    } else if (error) {
      assertEquals(answer.headers.get("content-type"), "application/json");
      assertEquals(JSON.parse(answer.text), { error, status });
    }
  }
});

Deno.test("a body of more than 1 MiB gets 413, and costs nobody else anything", async () => {
  await using stage = await Stage.open();
  const port = await stage.create();
  using conn = await connected(port);
  const most = JSON.stringify({ latencyMs: 1 }).padEnd(1024 * 1024);
  assertEquals((await stage.api.patch("/proxies/p", most)).status, 200);
  assertEquals(await stage.api.patch("/proxies/p", most + " "), {
    status: 413,
    body: {
      error: "expected a body of at most 1 MiB, found more",
      status: 413,
    },
  });
  await assertEchoesOn(conn);
});

Deno.test("of very many problems the answer shows the first", async () => {
  await using stage = await Stage.open();
  const bodies: [path: string, body: unknown][] = [
    ["/populate", Array(1000).fill(0)],
  ];
  for (const [path, body] of bodies) {
    const { status, body: { error } } = await stage.api.post(path, body);
    assertEquals(status, 400);
    assertMatch(error, /^bad request body: .*; … and \d+ more$/);
    assert(error.length < 20_000, `${error.length}`);
  }
});

Deno.test("a body of hundreds of thousands of wrong things gets 400", async () => {
  await using stage = await Stage.open();
  await stage.create();
  const wrong = Array(340_000).fill(0);
  const proxy = { name: "x", upstream: "a:1" };
  const bad = "bad request body: ";
  const tooMany = "expected a list of toxics, 500 at most, found a list of";
  const bodies: [method: string, path: string, body: unknown, error: string][] =
    [
      [
        "POST",
        "/proxies",
        { ...proxy, toxics: wrong },
        `${bad}toxics: ${tooMany} 340000`,
      ],
      [
        "POST",
        "/populate",
        [{ ...proxy, toxics: wrong }],
        `${bad}expected at most 10000 toxics in all, found 340000`,
      ],
      [
        "POST",
        "/proxies/p/toxics",
        wrong,
        `${bad}expected a mapping with type, found a list of 340000`,
      ],
      [
        "PATCH",
        "/proxies/p",
        { enabled: 5, toxics: wrong },
        `${bad}enabled: expected true or false, found 5`,
      ],
    ];
  for (const [method, path, body, error] of bodies) {
    assertEquals(await stage.api.call(method, path, body), {
      status: 400,
      body: { error, status: 400 },
    });
  }
  // Each spelling of a key is a problem of its own.
  const spellings = Array.from({ length: 2 ** 15 }, (_, bits) => [
    [..."CONNECTTIMEOUTMS"].map((letter, i) =>
      bits & 1 << i ? letter : letter.toLowerCase()
    ).join(""),
    1,
  ]);
  const { status, body } = await stage.api.post("/proxies", {
    ...proxy,
    ...Object.fromEntries(spellings),
  });
  assertEquals(status, 400);
  assertMatch(body.error, /^bad request body: .*; … and \d+ more$/);
  assert(body.error.length < 20_000);
});

Deno.test("a route has up to 500 toxics, through which the bytes get", async () => {
  await using stage = await Stage.open();
  const toxics = Array.from({ length: 499 }, (_, i) => ({
    type: "noop",
    name: `${i}`,
  }));
  const port = await stage.create({ toxics });
  const path = "/proxies/p/toxics";
  const full = {
    error:
      "bad request body: route p has 500 toxics, the most that it may have",
    status: 400,
  };
  assertEquals((await stage.api.post(path, { type: "noop" })).status, 200);
  await assertEchoes(port);
  assertEquals(
    await stage.api.post(path, { type: "noop", stream: "upstream" }),
    { status: 400, body: full },
  );
});

Deno.test("names that no path can hold are refused, for proxies and toxics", async () => {
  await using stage = await Stage.open();
  await stage.create();
  for (const name of [".", ".."]) {
    const error = "bad request body: name: expected 1 to 255 characters " +
      `without white space, not . or .., found "${name}"`;
    const refused = { status: 400, body: { error, status: 400 } };
    const proxy = { name, upstream: "a:1" };
    assertEquals(await stage.api.post("/proxies", proxy), refused);
    const toxic = { name, type: "noop" };
    assertEquals(await stage.api.post("/proxies/p/toxics", toxic), refused);
  }
});

Deno.test("a key that stands twice in different case is refused", async () => {
  await using stage = await Stage.open();
  await stage.create({ toxics: [{ type: "latency" }] });
  const proxy = { name: "x", upstream: "a:1", Upstream: "b:1" };
  const same = (one: string, other: string, path = "") =>
    `bad request body: ${path}${other}: the same key as ${one}; write one`;
  const twice: [path: string, body: unknown, error: string][] = [
    ["/proxies", proxy, same("upstream", "Upstream")],
    ["/populate", [proxy], same("upstream", "Upstream", "[0].")],
    [
      "/proxies/p",
      { ENABLED: true, enabled: false },
      same("ENABLED", "enabled"),
    ],
    [
      "/proxies/p/toxics",
      { type: "noop", Type: null },
      same("type", "Type"),
    ],
    [
      "/proxies/p/toxics/latency_downstream",
      { attributes: { latency: 1, Latency: 2 } },
      same("latency", "Latency", "attributes."),
    ],
    [
      "/proxies",
      { ...proxy, Upstream: null, toxics: [{ type: "noop", TYPE: "noop" }] },
      `${same("upstream", "Upstream")}; ${
        same("type", "TYPE", "toxics[0].").slice("bad request body: ".length)
      }`,
    ],
  ];
  for (const [path, body, error] of twice) {
    assertEquals(await stage.api.post(path, body), {
      status: 400,
      body: { error, status: 400 },
    });
  }
});

Deno.test("a Host that is none gets 400", async () => {
  await using stage = await Stage.open();
  for (const host of ["a b", "[", "loc%alhost"]) {
    const { status } = await stage.api.plain("GET", "/version", { host });
    assertEquals(status, 400, host);
  }
});

Deno.test("loopback is guarded however it is written", async () => {
  await using watched = await WatchedProxy.start({});
  for (const address of ["127.1:0", "localhost:0", "127.0.0.2:0"]) {
    if (address.startsWith("127.0.0.2") && Deno.build.os !== "linux") continue;
    const log = new EventLog();
    await using server = serveApi(watched.proxy, address, { onEvent: log.add });
    const [hostname, port] = server.address.split(":");
    using conn = await Deno.connect({ hostname, port: Number(port) });
    await send(
      conn,
      "GET /version HTTP/1.1\r\nHost: page.example\r\nConnection: close\r\n\r\n",
    );
    assertMatch(text(await readAll(conn)), /^HTTP\/1.1 403 /);
  }
});

Deno.test("what a browser sends for a web page is refused", async () => {
  await using stage = await Stage.open();
  await stage.create();
  const { port } = stage.api;
  const refused: Record<string, string>[] = [
    { "user-agent": "Mozilla/5.0 (X11; Linux x86_64)" },
    { origin: "https://evil.example" },
    { origin: "null" },
    { origin: `http://127.0.0.1:${port + 1}` },
    { origin: `https://127.0.0.1:${port}` },
    { host: "evil.example" },
    { host: `evil.example:${port}` },
    { host: "localhost.evil.example" },
    { host: "127.0.0.1.evil.example" },
    { host: "0.0.0.0.evil.example" },
    { host: `0.0.0.0:${port}`, origin: "https://evil.example" },
    { host: `10.0.0.1:${port}`, origin: `http://127.0.0.1:${port}` },
  ];
  for (const headers of refused) {
    for (
      const [method, path] of [["GET", "/proxies"], ["DELETE", "/proxies/p"]]
    ) {
      const answer = await stage.api.plain(method, path, headers);
      assertEquals(answer.status, 403, JSON.stringify(headers));
      const { error, status } = JSON.parse(answer.text);
      assertEquals(status, 403);
      assert(error.length > 10, error);
    }
  }
  const welcome: Record<string, string>[] = [
    { "user-agent": "toxiproxy-cli/v2.12.0 (linux/amd64)" },
    { host: `127.0.0.1:${port}`, origin: `http://127.0.0.1:${port}` },
    { host: `localhost:${port}` },
    { host: "LOCALHOST" },
    { host: "127.0.0.2:1" },
    { host: `[::1]:${port}` },
    { host: `0.0.0.0:${port}` },
    { host: "10.0.0.1" },
    { host: `[2001:db8::1]:${port}` },
    { host: `0.0.0.0:${port}`, origin: `http://0.0.0.0:${port}` },
  ];
  for (const headers of welcome) {
    const answer = await stage.api.plain("GET", "/proxies", headers);
    assertEquals(answer.status, 200, JSON.stringify(headers));
  }
});

Deno.test("on another address than loopback any Host will do", async () => {
  await using watched = await WatchedProxy.start({});
  await using api = Api.of(watched, "0.0.0.0:0");
  const named = await api.plain("GET", "/version", { host: "toxiproxy:8474" });
  assertEquals(named.status, 200);
  // A page's own name may lead here, so that its origin is as foreign as any.
  for (const origin of ["http://elsewhere", "http://toxiproxy:8474"]) {
    const browser = await api.plain("GET", "/version", {
      host: "toxiproxy:8474",
      origin,
    });
    assertEquals(browser.status, 403, origin);
  }
});

Deno.test("an API that others can reach says so at warn", async () => {
  const hosts = [["0.0.0.0", "WARN"], ["127.0.0.1", "INFO"]];
  for (const [host, level] of hosts) {
    await using cli = new Cli("--api", `${host}:0`);
    const line = await cli.says(/^(.* api_listening .*)\n/m);
    assertStringIncludes(line, ` ${level} `);
    assertEquals(
      line.endsWith("; whoever reaches it can control it"),
      level === "WARN",
      line,
    );
  }
});

Deno.test("peers that speak no HTTP, or leave, cost nobody else anything", async () => {
  await using stage = await Stage.open();
  const { api } = stage;
  for (
    const request of [
      "",
      "GET",
      "hello\r\n\r\n",
      "GET / HTTP/1.1\r\n\r\n",
      "GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
      "GET //evil HTTP/1.1\r\nHost: localhost\r\n\r\n",
      "POST /proxies HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{",
      "POST /proxies HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nx",
      "GET /version HTTP/1.0\r\n\r\n",
      "\u0000".repeat(1000),
    ]
  ) {
    using conn = await Deno.connect({ port: api.port });
    await send(conn, request);
    await conn.closeWrite();
    await readToEnd(conn);
  }
  assertEquals((await api.get("/version")).status, 200);
});

Deno.test("it serves as a function, without an address of its own", async () => {
  await using watched = await WatchedProxy.start({});
  const handler = controlApi(watched.proxy);
  const answer = await handler(new Request("http://localhost/version"));
  assertEquals((await answer.json()).version, "2.12.0");
  const page = await handler(new Request("http://page.example/version"));
  assertEquals([page.status, (await page.json()).status], [403, 403]);
});

Deno.test("an address that is none, or is taken, is told", async () => {
  await using watched = await WatchedProxy.start({});
  const { proxy } = watched;
  for (const address of ["x", "a:b", "localhost:99999", -1, 1.5, ""]) {
    assertThrows(
      () => serveApi(proxy, address),
      TypeError,
      "address: expected",
    );
  }
  using taken = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const error = assertThrows(
    () => serveApi(proxy, taken.addr.port),
    ListenError,
  );
  assertEquals(
    error.message,
    `control API: cannot listen on 127.0.0.1:${taken.addr.port}: ` +
      "the port is already in use",
  );
});

Deno.test("calls that race change each proxy one after the other", async () => {
  await using stage = await Stage.open();
  const { api, upstream } = stage;
  const create = () =>
    api.post("/proxies", { name: "p", upstream: upstream.address });
  const statuses = (await Promise.all([create(), create(), create()]))
    .map(({ status }) => status).toSorted();
  assertEquals(statuses, [201, 409, 409]);
  const toggles = Array.from(
    { length: 30 },
    (_, i) => api.patch("/proxies/p", { enabled: i % 2 === 0 }),
  );
  const moves = Array.from(
    { length: 10 },
    (_, i) => api.patch("/proxies/p", { listen: i % 2 ? ":0" : "127.0.0.1:0" }),
  );
  const toxics = Array.from(
    { length: 10 },
    () => api.post("/proxies/p/toxics", { type: "latency" }),
  );
  const all = await Promise.all([...toggles, ...moves, ...toxics]);
  assertEquals(
    all.slice(0, 40).map(({ status }) => status),
    Array(40).fill(200),
  );
  assertEquals(
    all.slice(40).map(({ status }) => status).toSorted(),
    [200, ...Array(9).fill(409)],
  );
  const { body } = await api.patch("/proxies/p", { enabled: true });
  await assertEchoes(portOf(body));
  const removals = await Promise.all([
    api.delete("/proxies/p"),
    api.delete("/proxies/p"),
    api.patch("/proxies/p", { enabled: false }),
  ]);
  assertEquals(removals.map(({ status }) => status), [204, 404, 404]);
});

// ---- The library -------------------------------------------------------------

Deno.test("the same operations are methods", async () => {
  await using upstream = echo();
  await using watched = await WatchedProxy.start({});
  const { proxy } = watched;
  assertEquals(proxy.routes, []);
  const route: Route = await proxy.addRoute({
    name: "r",
    localPort: 0,
    upstream: upstream.address,
  });
  assertEquals(proxy.route("r"), route);
  await assertEchoes(route.localPort);
  await assertRejects(
    () => proxy.addRoute(route),
    Deno.errors.AlreadyExists,
    "there is a route r already",
  );
  const changed = await proxy.updateRoute("r", { latencyMs: 5 });
  assertEquals(changed, { ...route, latencyMs: 5 });
  const [left, added] = await proxy.populate([
    route,
    { name: "s", localPort: 0, upstream: upstream.address, enabled: false },
  ]);
  assertEquals(left, changed);
  assertEquals([added.enabled, added.localPort], [false, 0]);
  await proxy.reset();
  assert(proxy.route("s").enabled);
  await proxy.removeRoute("r");
  assertThrows(() => proxy.route("r"), Deno.errors.NotFound);
  await assertRejects(() => proxy.removeRoute("r"), Deno.errors.NotFound);
  for (const bad of [{ host: "a b" }, { localPort: -1 }, { upstream: "x" }]) {
    await assertRejects(
      () => proxy.addRoute({ ...route, name: "bad", ...bad }),
      ConfigError,
    );
    await assertRejects(() => proxy.updateRoute("s", bad), ConfigError);
  }
  await assertRejects(
    () => proxy.updateRoute("s", { toxics: [] } as { latencyMs?: number }),
    Error,
    "route s: toxics: unknown key",
  );
  await proxy.drain();
  await assertRejects(
    () => proxy.addRoute(route),
    Deno.errors.BadResource,
    "the proxy is stopped",
  );
});

for (const resettable of [false, true]) {
  const kind = resettable ? "Node's" : "Deno's";
  Deno.test(`an address is free as soon as a call has returned, on ${kind} sockets`, async () => {
    await using upstream = echo();
    await using watched = await WatchedProxy.start({}, { resettable });
    const { proxy } = watched;
    const localPort = steadyPort();
    const route = await proxy.addRoute({
      name: "r",
      localPort,
      upstream: upstream.address,
    });
    for (let round = 0; round < 5; round++) {
      await assertEchoes(localPort);
      await proxy.updateRoute("r", { enabled: false });
      await proxy.updateRoute("r", { enabled: true });
      await proxy.updateRoute("r", { host: "0.0.0.0" });
      await assertEchoes(localPort);
      await proxy.updateRoute("r", { host: "localhost" });
      await proxy.removeRoute("r");
      await unlessStarting(() => proxy.addRoute({ ...route, localPort }));
    }
    await assertEchoes(localPort);
    await proxy.stop();
    await using again = await unlessStarting(() =>
      WatchedProxy.start({ routes: [route] })
    );
    assertEquals(again.proxy.routes[0].localPort, localPort);
  });
}

/** Tries again while a process that another test starts has the port open. */
async function unlessStarting<T>(listen: () => Promise<T>): Promise<T> {
  for (let attempt = 1;; attempt++) {
    try {
      return await listen();
    } catch (error) {
      if (!(error instanceof ListenError) || attempt === 100) throw error;
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
  }
}

Deno.test("stop gives the addresses back, on Deno's sockets", async () => {
  const routes = [{
    name: "r",
    localPort: steadyPort(),
    upstream: "127.0.0.1:1",
  }];
  let regained = 0;
  for (let round = 0; round < 20; round++) {
    const { proxy } = await unlessStarting(() =>
      WatchedProxy.start({ routes })
    );
    await new Promise((resolve) => setTimeout(resolve, 1)); // it accepts
    await proxy.stop();
    try {
      await using _ = await WatchedProxy.start({ routes });
      regained++;
    } catch (error) {
      assert(error instanceof ListenError); // a process is being started
    }
  }
  assertGreater(regained, 0);
});

Deno.test("a route that is being changed when the proxy stops does not listen", async () => {
  for (const resettable of [false, true]) {
    for (let ticks = 0; ticks < 12; ticks++) {
      await using watched = await WatchedProxy.start({
        routes: [{ name: "r", localPort: 0, upstream: "127.0.0.1:1" }],
      }, { resettable });
      const localPort = steadyPort();
      const changing = watched.proxy.updateRoute("r", { localPort })
        .then(() => {}, () => {});
      for (let i = 0; i < ticks; i++) await null;
      await watched.proxy.stop();
      await changing;
      await untilRefused(localPort);
    }
  }
});

Deno.test("a listener for events may stop the proxy at once", async () => {
  let stops = false;
  const proxy = await ChaosProxy.start({
    routes: [{ name: "r", localPort: 0, upstream: "127.0.0.1:1" }],
  }, {
    onEvent({ event }) {
      if (stops && event === "listening") proxy.stop();
    },
  });
  stops = true;
  await proxy.updateRoute("r", { localPort: steadyPort() });
  await proxy.stop();
  assertEquals(proxy.connections, 0);
});

Deno.test("a route that is still being added when the proxy stops is not", async () => {
  await using watched = await WatchedProxy.start({}, { resettable: true });
  const { proxy } = watched;
  const localPort = steadyPort();
  const adding = assertRejects(
    () => proxy.addRoute({ localPort, upstream: "127.0.0.1:1" }),
    Deno.errors.BadResource,
  );
  await Promise.resolve(); // it listens by now
  await proxy.stop();
  await adding;
  assertEquals(proxy.routes, []);
  await untilRefused(localPort);
});

// ---- The program -------------------------------------------------------------

/** The program with the API on a free port, and a client of it. */
async function startProgram(
  ...args: string[]
): Promise<{ cli: Cli; api: Api }> {
  const cli = new Cli("--log-format", "json", "--api", "0", ...args);
  try {
    const [{ address }] = await cli.log.first("api_listening", 1);
    return { cli, api: Api.at(address) };
  } catch (cause) {
    throw new Error(`did not start: ${cli.stderr}`, { cause });
  }
}

Deno.test("--api without a config starts empty, on loopback", async () => {
  await using upstream = echo();
  const { cli, api } = await startProgram("--seed", "7");
  await using _cli = cli;
  await using _api = api;
  assertMatch(cli.log.of("api_listening")[0].address, /^127\.0\.0\.1:\d+$/);
  assertEquals(cli.log.of("started")[0], {
    ...cli.log.of("started")[0],
    routes: 0,
    seed: 7,
  });
  assertEquals((await api.get("/proxies")).body, {});
  const { body } = await api.post("/proxies", {
    name: "p",
    upstream: upstream.address,
    toxics: [{ type: "reset_peer", stream: "upstream" }],
  });
  using conn = await Deno.connect({ port: portOf(body) });
  await send(conn, "x");
  await assertRejects(() => readAll(conn), Deno.errors.ConnectionReset);
});

Deno.test("Toxiproxy's own file is a config, in JSON and YAML, with toxics", async () => {
  await using upstream = echo();
  const list = [
    {
      name: "a",
      listen: "localhost:0",
      upstream: upstream.address,
      enabled: true,
    },
    {
      name: "b",
      listen: "localhost:0",
      upstream: "x:1",
      enabled: false,
      toxics: [{ type: "bandwidth" }],
    },
    {
      Name: "c",
      listen: null,
      upstream: upstream.address,
      toxics: [{ type: "latency", stream: "Upstream", attributes: null }],
      dropRate: 0,
    },
  ];
  for (const suffix of [".json", ".yaml"]) {
    await using file = await TempFile.with(JSON.stringify(list), suffix);
    const { cli, api } = await startProgram(file.path);
    await using _cli = cli;
    await using _api = api;
    const { body } = await api.get("/proxies");
    assertEquals(Object.keys(body), ["a", "b", "c"]);
    assertEquals([body.b.enabled, body.b.listen], [false, "localhost:0"]);
    assertEquals(body.c.toxics[0].name, "latency_upstream");
    assertEquals(body.b.toxics[0].attributes, { rate: 0 });
    await assertEchoes(portOf(body.a));
    await assertEchoes(portOf(body.c));
  }
  await using file = await TempFile.with(JSON.stringify(list), ".json");
  await using cli = new Cli("--log-format", "json", file.path);
  await cli.log.first("started", 1); // also without the API
});

Deno.test("each of Toxiproxy's forms is a config", async () => {
  const proxy = (name?: string) => ({
    ...(name && { name }),
    listen: "127.0.0.1:0",
    upstream: ":80",
    enabled: true,
    Logger: {},
    toxics: [],
  });
  const names = (value: unknown, path = "proxies.json") => {
    const { routes } = parseConfig(JSON.stringify(value), path);
    for (const { upstream } of routes) assertEquals(upstream, "localhost:80");
    return routes.map(({ name }) => name);
  };
  for (const path of ["proxies.json", "proxies.yaml"]) {
    const byName = { a: proxy("a"), b: proxy(), c: proxy("d") };
    assertEquals(names([proxy("a"), proxy("b")], path), ["a", "b"]);
    assertEquals(names(byName, path), ["a", "b", "d"]);
    assertEquals(names({ proxies: [proxy("a")] }, path), ["a"]);
    assertEquals(names({ proxies: byName }, path), ["a", "b", "d"]);
  }
  const named = ["routes", "proxies", "seed", "api", "upstream", "listen"];
  const odd = Object.fromEntries(named.map((name) => [name, proxy(name)]));
  assertEquals(names(odd), named);
  assertEquals(names({ proxies: odd }), named);
  assertEquals(names({ proxies: proxy("proxies") }), ["proxies"]);
  const seeded = JSON.stringify({ seed: 7, proxies: [proxy("a")] });
  assertEquals(parseConfig(seeded).seed, 7);
  assertEquals(parseConfig('{"proxies": {}}', "a.json", { api: 0 }).routes, []);

  // What the API shows starts the same proxies.
  await using stage = await Stage.open();
  await stage.create({ toxics: [{ type: "noop" }], latencyMs: 3 });
  const { body } = await stage.api.get("/proxies");
  assertEquals(
    parseConfig(JSON.stringify(body)).routes,
    stage.watched.proxy.routes,
  );
});

Deno.test("a config's form is told apart, and its errors keep their paths", () => {
  const mapping = "expected a mapping with name and upstream, found";
  const own = "expected a list of routes, at least one";
  const proxies =
    "expected a list of proxies, or an object of them by name, at least one";
  const known = "known are seed, drainTimeoutMs, api";
  const good = { listen: "127.0.0.1:0", upstream: "a:1" };
  const route = { localPort: 1, upstream: "a:1" };
  const found: [config: unknown, problems: string[]][] = [
    [{ proxies: 5 }, [`proxies: ${proxies}, found 5`]],
    [{ proxies: [] }, [`proxies: ${proxies}, found a list`]],
    [{ proxies: [5] }, [`proxies[0]: ${mapping} 5`]],
    [{ proxies: { a: 5 } }, [`proxies.a: ${mapping} 5`]],
    [{ a: good, b: {} }, [
      "b.upstream: missing; expected host:port or [ipv6]:port, the port from 1 to 65535",
    ]],
    [
      { "a b": { ...good, toxics: [{ type: "noop", stream: 5 }] } },
      [
        '"a b".toxics[0].stream: expected upstream or downstream, found 5',
        '"a b".name: expected 1 to 255 characters without white space, not . or .., found "a b"; write a-b',
      ].toReversed(),
    ],
    [{ proxies: { a: good, b: { ...good, name: "a" } } }, [
      "proxies.b.name: a is already taken by proxies.a",
    ]],
    [{ a: { ...good, Listen: ":1" } }, [
      "a.Listen: the same key as listen; write one",
    ]],
    [{ proxies: [good], seeds: 1 }, [
      "seeds: unknown key; did you mean seed?",
      "proxies[0].name: missing; expected 1 to 255 characters without white space, not . or ..",
    ]],
    ...[good, { db: route }].map((routes): [unknown, string[]] => [
      { routes },
      [
        `routes: ${own}, found a mapping; ` +
        'write a list, of which each item begins with "- "',
      ],
    ]),
    [{ routes: [route], proxies: [good] }, [
      `proxies: unknown key; ${known}, routes`,
    ]],
    [{ db: route }, [
      `db: unknown key; ${known}, routes`,
      `routes: missing; ${own}`,
    ]],
    [{ db: good, seed: 5 }, [
      `db: unknown key; ${known}, routes`,
      `routes: missing; ${own}`,
    ]],
    [[route], ["expected a mapping with routes, found a list"]],
  ];
  for (const [config, problems] of found) {
    const text = JSON.stringify(config);
    const error = assertThrows(
      () => parseConfig(text, "config.json"),
      ConfigError,
    );
    assertEquals(error.problems, problems, text);
  }
});

Deno.test("what is wrong with Toxiproxy's own file is told, with paths", async () => {
  const good = { name: "a", listen: "localhost:5", upstream: "a:1" };
  const list = [
    good,
    { ...good, name: "b" },
    { ...good, name: "c", enabled: false },
    { ...good, listen: "localhost:6" },
    { name: "d", listen: "x", upstream: "a:b" },
    5,
  ];
  await using file = await TempFile.with(JSON.stringify(list), ".json");
  await using cli = new Cli("--check", file.path);
  assertEquals((await cli.status).code, 2);
  assertEquals(
    cli.stderr,
    `chaos-proxy: ${file.path}: 5 problems
  [4].upstream: expected host:port or [ipv6]:port, the port from 1 to 65535, found "a:b"
  [4].listen: expected host:port, [ipv6]:port or :port, the port from 0 to 65535, found "x"
  [5]: expected a mapping with name and upstream, found 5
  [1].listen: 127.0.0.1:5 is already taken by [0]
  [3].name: a is already taken by [0]
`,
  );
});

Deno.test("what is ignored in Toxiproxy's own file is told by --check and in the log", async () => {
  const list = [
    { name: "plain", listen: "localhost:0", upstream: "a.example:1" },
    {
      name: "odd",
      listen: "localhost:0",
      upstream: "a.example",
      Logger: {},
      toxics: [{ type: "noop", toxicity: 2, attributes: { noop: 1 } }],
    },
  ];
  const ignored = [
    "[1].Logger",
    "[1].upstream: a.example has no port; its connections fail",
    "[1].toxics[0].toxicity: 2 counts as 1",
    "[1].toxics[0].attributes.noop",
  ];
  await using file = await TempFile.with(JSON.stringify(list), ".json");
  await using check = new Cli("--check", file.path);
  assertEquals((await check.status).code, 0);
  assertStringIncludes(
    check.stdout,
    ignored.map((each) => `\nwarning: ${each}`).join("") + "\n",
  );
  await using cli = new Cli("--log-format", "json", file.path);
  await cli.log.first("started", 1);
  assertEquals(
    cli.log.of("config_warning").map((
      { route, warnings },
    ) => [route, warnings]),
    [["odd", ignored]],
  );
  await using text = new Cli(file.path);
  await text.says(/WARN +odd .* config_warning \[1\]\.Logger, \[1\]\.upstream/);
});

Deno.test("the config, the start and populate agree on what is taken", async () => {
  await using stage = await Stage.open();
  const port = steadyPort();
  const proxies = (...hosts: [host: string, enabled: boolean][]) =>
    hosts.map(([host, enabled], i) => ({
      name: "abc"[i],
      listen: `${host}:${port}`,
      upstream: "127.0.0.1:9",
      enabled,
    }));
  const good = [
    proxies(["127.0.0.1", false], ["localhost", false]),
    proxies(["127.0.0.1", false], ["", true], ["[::]", false]),
    proxies(["0.0.0.0", true], ["[::1]", true]),
  ];
  if (Deno.build.os === "linux") { // has 127.0.0.2 as it is
    good.push(proxies(["127.0.0.1", true], ["127.0.0.2", true]));
  }
  for (const list of good) {
    const config = parseConfig(JSON.stringify(list), "proxies.json");
    const proxy = await ChaosProxy.start({ ...config, seed: 1 });
    assertEquals(proxy.routes.length, list.length);
    await proxy.stop();
    assertEquals((await stage.api.post("/populate", list)).status, 201);
    for (const { name } of list) await stage.api.delete(`/proxies/${name}`);
  }

  const taken = `127.0.0.1:${port} is already taken by [0]`;
  const bad: [list: unknown[], problem: string][] = [
    [proxies(["127.0.0.1", true], ["LOCALHOST", true]), taken],
    [
      proxies(["0.0.0.0", true], ["127.1", true]),
      `${taken}, on 0.0.0.0:${port}`,
    ],
    [
      proxies(["[0::0]", true], ["127.0.0.1", true]),
      `${taken}, on [::]:${port}`,
    ],
    [
      proxies(["127.0.0.1", true], ["", true]),
      `0.0.0.0:${port} is already taken by [0], on 127.0.0.1:${port}`,
    ],
  ];
  for (const [list, problem] of bad) {
    const error = `[1].listen: ${problem}`;
    const { problems } = assertThrows(
      () => parseConfig(JSON.stringify(list), "proxies.json"),
      ConfigError,
    );
    assertEquals(problems, [error]);
    assertEquals((await stage.api.post("/populate", list)).body, {
      error: `bad request body: ${error}`,
      status: 400,
    });
  }

  // In routes it is the port that is unique, whatever the host.
  const routes = ["127.0.0.1", "127.0.0.2"].map((host, i) => ({
    name: "ab"[i],
    host,
    localPort: port,
    upstream: "127.0.0.1:9",
  }));
  const problems = [
    `routes[1].localPort: ${port} is already taken by routes[0]`,
  ];
  const { proxy } = stage.watched;
  const attempts: (() => unknown)[] = [
    () => parseConfig(JSON.stringify({ routes }), "config.json"),
    () => ChaosProxy.start({ routes }),
    () => proxy.populate(routes),
  ];
  for (const attempt of attempts) {
    const error = await assertRejects(async () => await attempt(), ConfigError);
    assertEquals(error.problems, problems);
  }
  const covered = {
    api: `127.0.0.1:${port}`,
    routes: [{ ...routes[0], host: "::" }],
  };
  const error = await assertRejects(
    () => ChaosProxy.start(covered),
    ConfigError,
  );
  assertEquals(error.problems, [
    `api: ${port} is already taken by routes[0]`,
  ]);
});

Deno.test("api in the config serves it, and --api takes its place", async () => {
  const config = { api: "127.0.0.1:0", seed: 3 };
  await using file = await TempFile.with(JSON.stringify(config), ".json");
  await using cli = new Cli("--log-format", "json", file.path);
  const [{ address }] = await cli.log.first("api_listening", 1);
  await using api = Api.at(address);
  assertEquals((await api.get("/seed")).body, { seed: 3 });

  const taken = { ...config, api: Number(address.split(":")[1]) };
  await using other = await TempFile.with(JSON.stringify(taken), ".json");
  await using clash = new Cli(other.path);
  assertEquals((await clash.status).code, 1);
  assertEquals(
    clash.stderr,
    `chaos-proxy: control API: cannot listen on ${address}: ` +
      "the port is already in use\n",
  );
  const { cli: second, api: secondApi } = await startProgram(other.path);
  await using _second = second;
  await using _secondApi = secondApi;
  assertEquals((await secondApi.get("/seed")).body, { seed: 3 });
});

Deno.test("an api that is none is refused, in the config and as an argument", async () => {
  const expected = "expected a port or host:port, the port from 0 to 65535";
  await using file = await TempFile.with("api: nowhere\n");
  await using config = new Cli(file.path);
  await using argument = new Cli("--api", "1:2:3");
  await using list = await TempFile.with("api: [8474]\n");
  await using inList = new Cli(list.path);
  assertEquals((await inList.status).code, 2);
  assertEquals(
    inList.stderr,
    `chaos-proxy: ${list.path}: api: ${expected}, found a list\n`,
  );
  await using empty = new Cli("--api");
  await using check = new Cli("--api", "0", "--check");
  for (const cli of [config, argument, empty, check]) {
    assertEquals((await cli.status).code, 2);
  }
  assertEquals(
    config.stderr,
    `chaos-proxy: ${file.path}: api: ${expected}, found "nowhere"\n`,
  );
  assertEquals(
    argument.stderr,
    `chaos-proxy: --api: ${expected}, found "1:2:3"; see chaos-proxy --help\n`,
  );
  assertMatch(empty.stderr, /^chaos-proxy: --api/);
  assertMatch(check.stderr, /expected a config file/);
});

Deno.test("an api on a route's port is refused, unless that is disabled", async () => {
  const config = (enabled: boolean) => `
api: 8474
routes:
  - { localPort: 1, upstream: "a:1" }
  - { localPort: 8474, upstream: "a:1", enabled: ${enabled} }
`;
  const elsewhere = [
    { name: "a", listen: "127.0.0.2:8474", upstream: "a:1" },
    { name: "b", listen: "127.0.0.3:8474", upstream: "a:1" },
  ];
  parseConfig(JSON.stringify(elsewhere), "a.json", { api: 8474 });
  for (const listen of ["localhost:8474", ":8474"]) {
    const list = JSON.stringify([{ name: "a", listen, upstream: "a:1" }]);
    assertThrows(
      () => parseConfig(list, "a.json", { api: 8474 }),
      ConfigError,
      "api: 8474 is already taken by [0]",
    );
  }
  await using file = await TempFile.with(config(true));
  await using other = await TempFile.with(config(false));
  await using clash = new Cli("--check", file.path);
  await using fine = new Cli("--check", other.path);
  assertEquals((await clash.status).code, 2);
  assertEquals(
    clash.stderr,
    `chaos-proxy: ${file.path}: api: 8474 is already taken by routes[1]\n`,
  );
  assertEquals((await fine.status).code, 0);
});

Deno.test("--check tells of the API, and of what is disabled", async () => {
  const config = `
api: 8474
seed: 1
routes:
  - { name: r, localPort: 1, upstream: "a:1", enabled: false, dropRate: 1 }
`;
  await using file = await TempFile.with(config);
  await using cli = new Cli("--check", file.path);
  assertEquals((await cli.status).code, 0);
  assertStringIncludes(
    cli.stdout,
    "1 route, seed 1, drain within 30000 ms, api 127.0.0.1:8474\n",
  );
  assertMatch(cli.stdout, /\nr +127\.0\.0\.1:1 +a:1 +disabled, drop 100%\n/);
});

Deno.test("calls are logged at debug, and changes at info", async () => {
  await using upstream = echo();
  const { cli, api } = await startProgram("--log-level", "debug");
  await using _cli = cli;
  await using _api = api;
  const path = "/proxies/p/toxics";
  await api.post("/proxies", { name: "p", upstream: upstream.address });
  await api.post(path, { type: "latency", attributes: { latency: 5 } });
  await api.patch(`${path}/latency_downstream`, { toxicity: 0.5 });
  await api.delete(`${path}/latency_downstream`);
  await api.patch("/proxies/p", { enabled: false });
  await api.call("PUT", "/seed", { seed: 9 });
  await api.delete("/proxies/p");
  const { headers } = await api.raw("GET", "/none?x=1");
  await cli.log.first("api", 8);
  const told = cli.log.all.filter(({ event }) =>
    /^(route|toxic|reseeded|listening)/.test(event)
  ).map(({ event, ...fields }) => {
    const { toxic, effect, enabled, seed } = fields as Record<string, unknown>;
    return [event, toxic ?? enabled ?? seed, effect];
  });
  assertEquals(told, [
    ["route_added", true, undefined],
    ["listening", undefined, undefined],
    [
      "toxic_added",
      "latency_downstream",
      "downstream: +5 ms on every connection",
    ],
    [
      "toxic_changed",
      "latency_downstream",
      "downstream: +5 ms on 50% of connections",
    ],
    ["toxic_removed", "latency_downstream", undefined],
    ["route_changed", false, undefined],
    ["reseeded", 9, undefined],
    ["route_removed", undefined, undefined],
  ]);
  const last = cli.log.of("api").at(-1)!;
  assertEquals(last, {
    ...last,
    method: "GET",
    path: "/none?x=1",
    status: 404,
    error: "404 page not found",
    request: headers.get("x-toxiproxy-request-id")!,
  });
});

Deno.test("the log's text tells of changes in words", async () => {
  await using upstream = echo();
  await using cli = new Cli("--api", "0", "--log-level", "debug");
  const address = await cli.says(/api_listening (127\.0\.0\.1:\d+)/);
  await using api = Api.at(address);
  await api.post("/proxies", {
    name: "a-rather-long-name",
    upstream: upstream.address,
    enabled: false,
  });
  await api.post("/proxies/a-rather-long-name/toxics", { type: "timeout" });
  await cli.says(
    /INFO +a-rather-long-name .* route_added -> \S+ \(disabled\)/,
  );
  await cli.says(
    /INFO +a-rather-long-name .* toxic_added timeout_downstream \(downstream: nothing gets through on every connection\)/,
  );
  await api.post("/proxies/a-rather-long-name", { Logger: {}, id: 1 });
  await cli.says(/WARN .* api POST \/\S+: 200, .*, ignored Logger, id/);
  await cli.says(/DEBUG .* api POST \/proxies: 201, [\d.]+ ms, [\da-f-]{36}/);
});

Deno.test(
  "a drain can be watched and helped by the API, but nothing is added",
  {
    ignore: Deno.build.os === "windows",
  },
  async () => {
    await using upstream = echo();
    const { cli, api } = await startProgram();
    await using _cli = cli;
    await using _api = api;
    const { body } = await api.post("/proxies", {
      name: "p",
      upstream: upstream.address,
    });
    const port = portOf(body);
    using held = await connected(port);
    using idle = await connected(port);
    await api.post("/proxies/p/toxics", {
      type: "latency",
      attributes: { latency: HOUR_MS },
    });
    await send(held, "held");
    await held.closeWrite();
    cli.kill();
    await cli.log.first("draining", 1);
    await untilRefused(port);
    const down = { error: "the proxy is shutting down", status: 503 };
    for (
      const call of [
        api.post("/proxies", { name: "q", upstream: upstream.address }),
        api.post("/populate", [{ name: "q", upstream: upstream.address }]),
        api.patch("/proxies/p", { enabled: false }),
        api.delete("/proxies/p"),
        api.post("/reset"),
      ]
    ) assertEquals(await call, { status: 503, body: down });
    const { body: live } = await api.get("/connections");
    assertEquals(live.length, 2);
    await api.delete("/proxies/p/toxics/latency_downstream");
    assertEquals(text(await readAll(held)), "held");
    await api.delete(`/connections/${live[1].id}`);
    assertEquals(await readToEnd(idle), 0);
    assertEquals((await cli.status).code, 0);
    assertEquals(cli.log.of("drained").map(({ cut }) => cut), [0]);
  },
);

Deno.test("a signal during calls ends it, whatever is under way", {
  ignore: Deno.build.os === "windows",
}, async () => {
  await using upstream = echo();
  const { cli, api } = await startProgram();
  await using _cli = cli;
  await using _api = api;
  using idle = await Deno.connect({ port: api.port });
  await send(
    idle,
    "POST /proxies HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n{",
  );
  let signalled = false;
  const calls = (async () => {
    for (let i = 0;; i++) {
      const name = `p${i}`;
      try {
        await api.post("/proxies", { name, upstream: upstream.address });
        await api.post(`/proxies/${name}/toxics`, { type: "latency" });
      } catch (error) {
        if (signalled) return;
        throw error;
      }
    }
  })();
  await cli.log.first("toxic_added", 3);
  signalled = true;
  cli.kill();
  assertEquals((await cli.status).code, 0);
  await calls;
  assertEquals(cli.stderr, "");
});

Deno.test("a proxy that forwards to itself is refused, also by way of others", async () => {
  await using stage = await Stage.open();
  const { api } = stage;
  const [a, b] = [steadyPort(), steadyPort()];
  const create = (name: string, listen: number, upstream: number) =>
    api.post("/proxies", {
      name,
      listen: `127.0.0.1:${listen}`,
      upstream: `localhost:${upstream}`,
    });
  const itself = await create("a", a, a);
  assertEquals(itself.status, 400);
  assertMatch(itself.body.error, /is where the route itself listens/);
  assertEquals((await create("a", a, b)).status, 201);
  const circle = await create("b", b, a);
  assertEquals(circle.status, 400);
  assertMatch(circle.body.error, /circle, (?:a -> b -> a|b -> a -> b)/);
  assertEquals((await create("b", b, 1)).status, 201);
  const changed = await api.patch("/proxies/b", { upstream: `[::]:${a}` });
  assertEquals(changed.status, 400);
  assertEquals(stage.watched.proxy.route("b").upstream, "localhost:1");
  assertEquals(stage.watched.proxy.routes.length, 2);
});
