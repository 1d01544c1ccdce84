/** Outages of a route, a plan by the API, and plans that are refused. */

import {
  assert,
  assertEquals,
  assertGreater,
  assertRejects,
  assertStringIncludes,
  assertThrows,
} from "@std/assert";
import {
  ChaosProxy,
  ConfigError,
  ListenError,
  type Outage,
  parseConfig,
} from "../main.ts";
import * as h from "./helpers.ts";

const LATER = { afterMs: h.LONG_MS };

const outage = (mode: Outage["mode"], more: Partial<Outage> = {}): Outage => (
  { forMs: h.LONG_MS, mode, ...more }
);

/** An echo behind a route `r` with outages, and what a new connection meets. */
async function start(outages: Outage[], resettable = false, localPort = 0) {
  const open = new AsyncDisposableStack();
  const upstream = open.use(h.echo());
  const route = { name: "r", localPort, outages, connections: 1e9 };
  const watched = open.use(
    await h.WatchedProxy.to(upstream, route, {}, { resettable }),
  );
  const { proxy, log } = watched;
  const meets = async (port = watched.port()) => {
    try {
      using client = await Deno.connect({ port });
      await h.send(client, "x");
      return h.text(await h.readExactly(client, 1)) || "closed";
    } catch (error) {
      return error instanceof Deno.errors.ConnectionRefused
        ? "refused"
        : "reset";
    }
  };
  const untilBack = () =>
    h.until(async () => await meets() === "x", "it is back");
  const change = (...outages: Outage[]) => proxy.updateRoute("r", { outages });
  const close = () => open.disposeAsync();
  return {
    watched,
    proxy,
    log,
    meets,
    untilBack,
    change,
    [Symbol.asyncDispose]: close,
  };
}

for (const { sockets, resettable } of h.SOCKETS) {
  const begin = (...outages: Outage[]) =>
    start(outages, resettable, h.steadyPort());

  for (
    const [mode, counts] of Object.entries({
      refuse: ["refused", {}],
      drop: ["closed reset", { dropRate: 1 }],
      hang: ["closed reset", { timeoutRate: 1 }],
      reset: ["reset", { dropRate: 1 }],
    }) as [NonNullable<Outage["mode"]>, [string, object]][]
  ) {
    Deno.test(`an outage: ${mode}, on ${sockets}`, async () => {
      const begun = performance.now();
      const plan = { afterMs: 400, forMs: 400 };
      await using route = await begin(outage(mode, plan));
      const { log, proxy, watched, meets } = route;
      using open = await watched.connect();
      await h.assertEchoes(open);
      await log.first("outage_on", 1);
      h.assertSince(begun, 400);
      if (mode === "refuse") await h.untilRefused(watched.port());
      else assertStringIncludes(counts[0], await meets());
      if (mode === "hang") h.assertSince(begun, 800);
      await h.assertEchoes(open, "still open");
      await log.first("outage_off", 1);
      await route.untilBack();
      const { faults, on } = h.only(proxy.stats());
      if (mode !== "refuse") assertEquals(faults, { outages: 1, ...counts[1] });
      assertEquals(on, { [`outage 1 (${mode})`]: 0 });
    });
  }

  Deno.test(`what an outage holds ends with it, or as the client leaves, on ${sockets}`, async () => {
    await using route = await begin(outage("hang"));
    const { change, log, watched } = route;
    const left = await watched.connect();
    await log.first("timed_out", 1);
    left.close();
    await log.first("closed", 1);
    using held = await watched.connect();
    await log.first("timed_out", 2);
    await change();
    await log.first("closed", 2);
    assertEquals(await h.readToEnd(held), 0);
    assertEquals(h.only(route.proxy.stats()).on, {});
  });

  Deno.test(`outages change live, on ${sockets}`, async () => {
    await using route = await begin();
    const { change, log, meets, untilBack, watched } = route;
    using open = await watched.connect();
    await h.assertEchoes(open);
    await change(outage("drop"));
    assert(await meets() !== "x");
    await change(outage("refuse"));
    await h.untilRefused(watched.port());
    await change(outage("hang", { forMs: 700 }));
    watched.proxy.reseed(1); // begins it anew
    await h.until(async () => {
      await meets();
      return log.of("timed_out").length > 0;
    }, "it hangs");
    await change({ ...LATER, forMs: 1 });
    await untilBack();
    await change(outage("refuse"));
    await h.untilRefused(watched.port());
    await change();
    await untilBack();
    await h.assertEchoes(open);
    const kinds = log.all.flatMap((each) =>
      each.event === "outage_on" && "outage" in each ? [each.outage] : []
    );
    const modes = ["drop", "refuse", "hang", "hang", "refuse"];
    assertEquals(kinds, modes.map((mode) => `outage 1 (${mode})`));
    assertEquals(log.of("outage_off").length, 5);
  });

  Deno.test(`a route is disabled, moved and removed in an outage, on ${sockets}`, async () => {
    await using route = await begin(outage("refuse"));
    const { change, log, meets, proxy, untilBack, watched } = route;
    const [port, elsewhere] = [watched.port(), h.steadyPort()];
    await h.untilRefused(port);
    await proxy.updateRoute("r", { enabled: false });
    await change();
    assertEquals(await meets(), "refused");
    await change(outage("refuse"));
    await proxy.updateRoute("r", { enabled: true, localPort: elsewhere });
    assertEquals([await meets(port), await meets()], ["refused", "refused"]);
    await change();
    await untilBack();
    assertEquals(await meets(port), "refused");
    await change(outage("refuse"));
    await h.untilRefused(elsewhere);
    await proxy.removeRoute("r");
    const events = log.all.map(({ event }) => event).filter((each) =>
      /_/.test(each)
    );
    assertEquals(events.slice(-2), ["outage_off", "route_removed"]);
    Deno.listen({ hostname: "127.0.0.1", port: elsewhere }).close();
  });

  Deno.test(`a port that is taken when an outage ends is tried until it is free, on ${sockets}`, async () => {
    await using route = await begin(outage("refuse"));
    const { change, log, untilBack, watched } = route;
    await h.untilRefused(watched.port());
    const other = Deno.listen({ hostname: "127.0.0.1", port: watched.port() });
    await change();
    const [{ cause }] = await log.first("accept_failed", 1);
    assertStringIncludes(cause, "the port is already in use");
    await h.pause(500); // for one more try, at least
    other.close();
    await untilBack();
    assertEquals(log.of("accept_failed").length, 1);
  });

  Deno.test(`a route that waits for its port after an outage holds up no other, on ${sockets}`, async () => {
    await using route = await begin(outage("refuse"));
    const { log, proxy, watched } = route;
    const more = { upstream: "a:1", outages: [outage("refuse")] };
    await proxy.addRoute({ name: "s", localPort: h.steadyPort(), ...more });
    await h.untilRefused(watched.port());
    using _ = Deno.listen({ hostname: "127.0.0.1", port: watched.port() });
    await route.change();
    await proxy.updateRoute("s", { outages: [] });
    const isBack = () => log.all.at(-1)?.event === "listening";
    await h.until(isBack, "the other listens");
    assertEquals(log.of("accept_failed"), []);
  });

  Deno.test(`no other route takes the port of one that an outage has closed, on ${sockets}`, async () => {
    await using route = await begin(outage("refuse"));
    const { change, proxy, untilBack, watched } = route;
    const localPort = watched.port();
    await h.untilRefused(localPort);
    const upstream = "a:1";
    await proxy.addRoute({ name: "s", localPort: 0, upstream });
    for (
      const take of [
        () => proxy.addRoute({ localPort, host: "0.0.0.0", upstream }),
        () => proxy.updateRoute("s", { localPort }),
      ]
    ) await assertRejects(take, ListenError, "in use by route r");
    await change();
    await untilBack();
  });

  Deno.test(`a drain waits for what an outage holds, and ends in one that refuses, on ${sockets}`, async () => {
    await using hang = await begin(outage("hang", { forMs: 400 }));
    const held = hang.meets();
    await hang.log.first("timed_out", 1);
    await using refuse = await begin(outage("refuse"));
    await h.untilRefused(refuse.watched.port());
    for (const { proxy, meets } of [hang, refuse]) {
      assertEquals(await h.soon(proxy.drain(0), "drain"), 0);
      assertEquals(await meets(), "refused");
    }
    assert(await held !== "x");
  });
}

Deno.test("an outage with reset cuts what is open with a RST, on the route's own sockets for it", async () => {
  const reset = outage("drop", { reset: true });
  for (const isOn of [false, true]) { // before it is given the reset
    const outages = [{ ...reset, ...LATER }];
    await using ends = await h.openEnds({ name: "r", outages });
    const { client, upstream, watched: { proxy } } = ends;
    await h.send(client, "hello");
    await h.assertReads(upstream, "hello");
    const others = isOn ? [{ ...reset, reset: false }] : [];
    for (const each of [...others, reset]) {
      assertEquals(proxy.connections, 1);
      await proxy.updateRoute("r", { outages: [each] });
    }
    for (const conn of [client, upstream]) {
      const end = () => h.soon(h.readAll(conn), "reset");
      await assertRejects(end, Deno.errors.ConnectionReset);
    }
    await h.assertClosed(ends.watched, { why: "fault", cause: "outage" });
  }

  await using other = await start([]);
  using open = await other.watched.connect();
  for (const each of [reset, outage("reset")]) {
    const { NotSupported } = Deno.errors;
    const change = () => other.change(each);
    await assertRejects(
      change,
      NotSupported,
      "r: its connections cannot be reset",
    );
  }
  assertEquals(other.proxy.route("r").outages, []);
  await h.assertEchoes(open);
});

Deno.test("outages that repeat do so by the clock, none early", async () => {
  const at: number[] = [];
  const plan = { afterMs: 20, forMs: 30, everyMs: 60, mode: "drop" } as const;
  const log = new h.EventLog();
  const onEvent = (event: h.LogEvent) => {
    if (/^(started|outage_.*)$/.test(event.event)) at.push(performance.now());
    log.add(event);
  };
  await using upstream = h.echo();
  const options = { onEvent };
  await using _ = await h.WatchedProxy.to(
    upstream,
    { outages: [plan] },
    {},
    options,
  );
  await log.first("outage_off", 10);
  const [begun = NaN, ...edges] = at;
  edges.forEach((edge, i) => {
    const due = plan.afterMs + (i >> 1) * plan.everyMs + i % 2 * plan.forMs;
    assertGreater(edge - begun, due - 1, `edge ${i}`);
  });
});

Deno.test("the API takes, shows, changes and refuses all of a plan", async () => {
  await using upstream = h.echo();
  await using watched = await h.WatchedProxy.to(upstream, { name: "r" });
  await using api = h.Api.of(watched);
  const plan = {
    connections: "*/2",
    schedule: { afterMs: 5, forMs: 1, everyMs: 9, from: "connection" },
    after: { match: { hex: "0dff" } },
  };
  const toxics = [{ type: "noop", ...plan }];
  const given = { mode: "drop", ...LATER, forMs: 3, everyMs: 4 };
  const outages = [{ ...given, reset: false }];
  const name = { name: "p", upstream: upstream.address };
  const own = { connections: [1, "3-"], outages: [given], toxics };
  const [toxic, toxicPath] = ["noop_downstream", "/proxies/r/toxics"];
  assertEquals((await api.post("/proxies", { ...name, ...own })).status, 201);
  const { body: shown } = await api.get("/proxies/p");
  const { type: _, ...rest } = toxics[0]!;
  assertEquals([shown.connections, shown.outages], [own.connections, outages]);
  assertEquals(shown.toxics[0], { ...shown.toxics[0], ...rest });
  const added = await api.post(toxicPath, toxics[0]);
  assertEquals(added.body, shown.toxics[0]);
  const changes = {
    [`${toxicPath}/${toxic}`]: [
      { connections: 4 },
      { schedule: { afterMs: 0, from: "start" } },
      { after: { bytes: 2 } },
    ],
    "/proxies/r": [{ connections: "7-" }, { outages }, { outages: [] }],
  };
  for (const [path, all] of Object.entries(changes)) {
    for (const change of all) {
      const { body } = await api.patch(path, change);
      assertEquals(body, { ...body, ...change });
      assertEquals((await api.get(path)).body, body);
    }
  }
  const before = (await api.get("/proxies")).body;
  using _client = await watched.connect();
  await watched.log.first("connected", 1);
  const { id } = h.only(watched.proxy.liveConnections());
  const noop = { type: "noop", name: "n" };
  for (
    const [path, bad, problem] of [
      ["/proxies/r", { connections: 0 }, "connections: expected a number"],
      ["/proxies/r", { outages: [{}] }, "outages[0].forMs: missing"],
      [
        "/proxies/r",
        { outages: [{ forMs: 1, mode: "reset" }] },
        "cannot be reset",
      ],
      [
        `${toxicPath}/${toxic}`,
        { schedule: { everyMs: 8 } },
        "schedule.forMs: ",
      ],
      [
        `${toxicPath}/${toxic}`,
        { after: {} },
        "after: expected either bytes or match",
      ],
      [toxicPath, { ...noop, after: 1 }, "after: expected a mapping"],
      [
        `/connections/${id}/toxics`,
        { ...noop, connections: [] },
        "connections: ",
      ],
    ] as const
  ) {
    const { status, body } = await api.post(path, bad);
    assertEquals(status, problem === "cannot be reset" ? 501 : 400);
    assertStringIncludes(body.error, problem);
  }
  assertEquals((await api.get("/proxies")).body, before);
});

/** What is written in a route | what is said of it, below `routes[0].`. */
const REFUSED = `
connections: 0
connections: -1
connections: 1.5
connections: []
connections: ""
connections: 2-x
connections: "*/0"
toxics: [{ type: noop, connections: 0- }]
  expected a number from 1, "1-3", "5-" or "*/3", or a list of these, found
connections: [1, "*/3", a]
  connections[2]: expected a number from 1, "1-3", "5-" or "*/3", found "a"
connections: 3-1
  or a list of these, found "3-1"; write 1-3
outages: [{ forMs: 5 }, { afterMs: 4, forMs: 1 }]
outages: [{ afterMs: 4, forMs: 1 }, { forMs: 5 }]
outages: [{ forMs: 2, everyMs: 6 }, { afterMs: 12345, forMs: 1, everyMs: 10 }]
outages: [{ forMs: 2, everyMs: 6 }, { afterMs: 5, forMs: 2, everyMs: 9 }]
outages: [{ forMs: 2, everyMs: 6 }, { afterMs: 13, forMs: 1 }]
outages: [{ afterMs: 13, forMs: 1 }, { forMs: 2, everyMs: 6 }]
  outages[1]: it overlaps with routes[0].outages[0]
outages: [{ afterMs: 9 }]
  outages[0].forMs: missing; expected an integer from 1 to 2147483647
outages: [{ forMs: 0 }]
  outages[0].forMs: expected an integer from 1 to 2147483647, found 0
outages: [{ forMs: 9, everyMs: 8 }]
  outages[0].forMs: expected 1 to 8, as everyMs, found 9
outages: [{ forMs: 1, mode: slow }]
  outages[0].mode: expected refuse or drop or hang or reset, found "slow"
toxics: [{ type: noop, schedule: { forMs: 9, everyMs: 8 } }]
  toxics[0].schedule.forMs: expected 1 to 8, as everyMs, found 9
toxics: [{ type: noop, schedule: { everyMs: 8 } }]
  toxics[0].schedule.forMs: expected 1 to 8, as everyMs, but it is missing
toxics: [{ type: noop, schedule: { from: now } }]
  toxics[0].schedule.from: expected start or connection, found "now"
toxics: [{ type: noop, after: {} }]
toxics: [{ type: noop, after: { bytes: 1, match: x } }]
  toxics[0].after: expected either bytes or match
toxics: [{ type: noop, after: { bytes: 0 } }]
  toxics[0].after.bytes: expected an integer from 1 to 9007199254740991, found 0
toxics: [{ type: noop, after: { match: "" } }]
toxics: [{ type: noop, after: { match: ${"é".repeat(129)} } }]
  after.match: expected text of 1 to 256 bytes, or a mapping with hex, found "
toxics: [{ type: noop, after: { match: { hex: "" } } }]
toxics: [{ type: noop, after: { match: { hex: "0df" } } }]
toxics: [{ type: noop, after: { match: { hex: 0g } } }]
toxics: [{ type: noop, after: { match: { hex: "${"0".repeat(514)}" } } }]
  after.match.hex: expected 1 to 256 hex digit pairs, found "
`;

for (const [given, [expected = ""]] of h.casesIn(REFUSED)) {
  Deno.test(`refused: ${given.slice(0, 70)}`, () => {
    const config = `routes: [{ localPort: 1, upstream: "a:1", ${given} }]`;
    const { problems } = assertThrows(() => parseConfig(config), ConfigError);
    assertStringIncludes(h.only(problems), expected);
  });
}

Deno.test("a hole in a list is refused in words", async () => {
  const outages = Object.assign(Array(2), { 1: outage("drop") });
  const start = () =>
    ChaosProxy.start({ routes: [{ localPort: 0, upstream: "a:1", outages }] });
  const problem = "outages[0]: expected a mapping, found undefined";
  await assertRejects(start, ConfigError, problem);
});

Deno.test("a plan in words is one line", async () => {
  const after = { match: "\r\nSET" };
  const outages = [{ ...LATER, forMs: 1 }];
  const toxics = [{ type: "noop", connections: "1-2", after } as const];
  const route = { outages, toxics, connections: 3 };
  await using watched = await h.WatchedProxy.to(h.nowhere(), route);
  assertEquals(
    watched.log.only("listening").faults,
    "connections 3, outage, afterMs 1000000000, forMs 1, mode refuse, " +
      "downstream: nothing on every connection, connections 1-2, " +
      'match "\\r\\nSET"',
  );
});

Deno.test("outages may touch, and a pattern may have 256 bytes", () => {
  const hex = "00".repeat(256);
  for (
    const good of [
      "outages: [{ forMs: 5 }, { afterMs: 5, forMs: 5 }]",
      "outages: [{ afterMs: 14, forMs: 1, everyMs: 9 }, { forMs: 2, everyMs: 6 }]",
      "outages: [{ forMs: 2, everyMs: 6 }, { afterMs: 14, forMs: 4 }]",
      `toxics: [{ type: noop, after: { match: { hex: "${hex}" } } }]`,
    ]
  ) {
    const config = `routes: [{ localPort: 1, upstream: "a:1", ${good} }]`;
    assertEquals(parseConfig(config).routes.length, 1);
  }
});

Deno.test("a reload ends an outage, though a handler changes toxics meanwhile", async () => {
  const route = { name: "r", localPort: 0, upstream: "127.0.0.1:1" };
  const toxics = [{ type: "noop", schedule: { afterMs: 0 } }] as const;
  const edges: string[] = [];
  const onEvent = ({ event }: { event: string }) => {
    if (/_(?:on|off)$/.test(event)) edges.push(event);
    const another = { type: "noop", name: "another", schedule: LATER } as const;
    if (event === "toxic_off") proxy.addToxic("r", another);
  };
  const planned = { ...route, outages: [outage("hang")], toxics };
  const proxy = await ChaosProxy.start({ routes: [planned] }, { onEvent });
  await using _ = proxy;
  await h.until(() => edges.length === 2, "both are on");
  using client = await Deno.connect({ port: h.only(proxy.routes).localPort });
  await h.until(() => proxy.connections === 1, "it is held");
  await proxy.reload({ routes: [route] });
  await h.until(() => proxy.connections === 0, "it is held no longer");
  assertEquals(await h.readToEnd(client), 0);
  assertEquals(edges.slice(2).sort(), ["outage_off", "toxic_off"]);
  assertEquals(h.only(proxy.stats()).on, {});
});
