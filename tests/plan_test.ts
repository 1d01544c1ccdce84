/** Faults on a plan: on which connections, when, and what triggers them. */

import {
  assert,
  assertEquals,
  assertGreater,
  assertRejects,
  assertStringIncludes,
} from "@std/assert";
import { parse } from "@std/yaml";
import {
  beginToxic,
  ChaosProxy,
  type Connections,
  decide,
  parseConfig,
  type RouteOptions,
  type TimedChunk,
  type ToxicOptions,
} from "../main.ts";
import * as h from "./helpers.ts";

/** `noop name=a | schedule: { forMs: 5 }`, a toxic and what limits it. */
function planned(line: string): ToxicOptions {
  const [what = "", plan = ""] = line.split(" | ");
  return { ...h.toxic(what), ...parse(`{${plan}}`) as object };
}

/** A route `r` with these toxics, and what is written in a line of YAML. */
const having = (lines: string[], more = ""): Partial<RouteOptions> => (
  { name: "r", toxics: lines.map(planned), ...parse(`{${more}}`) as object }
);

const checked = (options: Partial<RouteOptions>) =>
  h.only(
    parseConfig(JSON.stringify({
      routes: [{ localPort: 1, upstream: "a:1", ...options }],
    })).routes,
  );

const LATER = { afterMs: h.LONG_MS };
const bytesOf = (text: string) => new TextEncoder().encode(text);

// ---- Which connections -------------------------------------------------------

for (
  const [connections, among] of [
    [2, [2]],
    ["2", [2]],
    ["1-3", [1, 2, 3]],
    ["10-", [10, 11, 12]],
    ["*/5", [5, 10]],
    [[1, "4-5", "*/6"], [1, 4, 5, 6, 12]],
  ] as [Connections, number[]][]
) {
  Deno.test(`on connections ${connections} a fault acts, and on no others`, () => {
    const toxics = [{ ...h.toxic("noop"), connections }];
    const faults = { dropRate: 1, timeoutRate: 1, latencyMs: 5, connections };
    for (let number = 1; number <= 12; number++) {
      const of = (options: Partial<RouteOptions>) =>
        decide(1, checked(options), number);
      const isAmong = among.includes(number);
      const none = { kind: "forward", delayMs: 0, toxics: [] };
      const { latencyMs, ...rates } = faults;
      const late = of({ latencyMs, connections });
      assertEquals(late, { ...none, delayMs: isAmong ? 5 : 0 } as typeof late);
      assertEquals(of(rates).kind, isAmong ? "drop" : "forward");
      const timeouts = { ...faults, dropRate: 0 };
      assertEquals(of(timeouts).kind, isAmong ? "timeout" : "forward");
      const acting = of({ toxics });
      assert("toxics" in acting);
      assertEquals(acting.toxics.length, isAmong ? 1 : 0);
    }
  });
}

Deno.test("each of 3,000 ranges matches its own numbers only", () => {
  const route = checked({ dropRate: 1 });
  for (let first = 1; first <= 3000; first++) {
    const among = [first - 1, first, first + 1, first + 2].filter((number) =>
      decide(1, { ...route, connections: `${first}-${first + 1}` }, number)
        .kind === "drop"
    );
    assertEquals(among, [first, first + 1]);
  }
});

Deno.test("numbers come first: the rates decide for these as without them", () => {
  const rates = "dropRate: 0.3, timeoutRate: 0.3, latencyMs: 9, jitterMs: 9";
  const toxics = (plan = "") =>
    ["a", "b"].map((name) => `noop name=${name} toxicity=0.5 | ${plan}`);
  const third = 'connections: "*/3"';
  const routes = [
    having(toxics(), rates),
    having(toxics(), `${rates}, ${third}`),
    having(toxics(third), rates),
  ].map(checked);
  const met = new Set<string>();
  for (let number = 1; number <= 300; number++) {
    const [all, faults, acting] = routes.map((route) => {
      const { kind, ...more } = decide(7, route, number);
      const { delayMs, toxics } = { delayMs: 0, toxics: [], ...more };
      return { kind, delayMs, toxics: toxics.map(({ name }) => name) };
    });
    met.add(all!.kind);
    const isAmong = number % 3 === 0;
    const { toxics } = faults!;
    const none = { kind: "forward", delayMs: 0, toxics } as const;
    assertEquals(faults, isAmong ? all : none);
    assertEquals(acting, isAmong ? all : { ...all!, toxics: [] });
  }
  assertEquals(met.size, 3);
});

for (const { sockets, resettable } of h.SOCKETS) {
  Deno.test(`the first two attempts fail, the third succeeds, on ${sockets}`, async () => {
    const plan = having([], 'dropRate: 1, connections: "1-2"');
    await using ends = await h.openEcho(plan, { resettable });
    assertEquals(await h.readToEnd(ends.client), 0);
    using second = await ends.watched.connect();
    assertEquals(await h.readToEnd(second), 0);
    using third = await ends.watched.connect();
    await h.assertEchoes(third);
  });
}

Deno.test("the same seed gives connection N the same faults at 1, 10 and 100 at once, three times", async () => {
  const route = having([
    "limit_data bytes=1 toxicity=0.5 | after: { bytes: 2 }",
    "slicer upstream average_size=2 toxicity=0.5 | connections: 50-, " +
    "schedule: { from: connection }, after: { match: b }",
    `noop | connections: "*/9", schedule: { afterMs: ${h.LONG_MS} }`,
  ], 'dropRate: 0.5, latencyMs: 1, connections: [1-20, "*/7"]');
  const recordsAt = async (atOnce: number) => {
    await using upstream = h.echo();
    await using watched = await h.WatchedProxy.to(upstream, route);
    for (let done = 0; done < 100; done += atOnce) {
      await h.times(atOnce, async () => {
        using client = await watched.connect();
        await h.exchange(client, bytesOf("abcde")).catch(h.unlessDisconnected);
      });
    }
    await watched.log.first("closed", 100);
    return h.only(watched.proxy.report().routes).first;
  };
  const runs = [1, 10, 100, 1, 10, 100, 1, 10, 100].map(recordsAt);
  const [first, ...others] = await Promise.all(runs);
  assertEquals(others, others.map(() => first!));
  const met = new Set(first?.map((each) => `${each.decision} ${each.toxics}`));
  assertEquals([...met].sort(), [
    ...["drop ", "forward ", "forward limit_data_downstream"],
    "forward slicer_upstream",
    "forward slicer_upstream,limit_data_downstream",
  ]);
});

// ---- What triggers -----------------------------------------------------------

const latin1 = (bytes: Uint8Array) => String.fromCharCode(...bytes);

/** A toxic on a connection that opens at 0, and what comes of it. */
function begin(line: string) {
  const passed: TimedChunk[] = [];
  const cuts: string[] = [];
  const active = beginToxic(planned(line), 1, {
    pass: (timed) => passed.push({ ...timed }),
    cut: (at, how) => cuts.push(` ${at}!${how}`),
  });
  const take = (what: string | Uint8Array, at = 0) => {
    const bytes = typeof what === "string" ? bytesOf(what) : what.slice();
    active.take({ at, what: what === "<end>" ? "end" : bytes });
  };
  /** What is due, by the time, and the last cut: `0:text<end> 5!close`. */
  const inWords = () => {
    const due = Map.groupBy(passed.splice(0), ({ at }) => at);
    const word = ({ what }: TimedChunk) =>
      typeof what === "string" ? `<${what}>` : latin1(what);
    const words = Array.from(
      due,
      ([at, all]) => `${at}:${all.map(word).join("")}`,
    );
    return words.join(" ") + (cuts.splice(0).at(-1) ?? "");
  };
  return { active, passed, take, inWords };
}

/** Each way to cut bytes twice, up to a position, or fewer times. */
function cutsOf(bytes: Uint8Array, last = bytes.length) {
  const to = (end: number) => Array.from({ length: end + 1 }, (_, i) => i);
  return to(last).flatMap((b) =>
    to(b).map((a) =>
      [bytes.subarray(0, a), bytes.subarray(a, b), bytes.subarray(b)]
        .filter(({ length }) => length > 0)
    )
  );
}

for (
  const [after, before, rest] of [
    ["bytes: 1", "a", "bc"],
    ["bytes: 7", "abcdefg", "hij"],
    ["bytes: 7", "abcdef", ""],
    ["match: COMMIT", "COMMENT; COMMIT", "; COMMIT"],
    ["match: aab", "aaaab", "aab"],
    ["match: a", "ba", "b"],
    ["match: é☃", "é ☃ é☃", "!"],
    ["match: xxxxxxxxy", "xxxxxxxxxxxy", "xxxxxxxxy"],
    ["match: { hex: 0d0A }", "\r\r\n", "\r\n"],
    ['match: { hex: "00" }', "a\0", "\0"],
  ] as const
) {
  Deno.test(`after ${after} is found in ${JSON.stringify(before)}, however it is cut`, () => {
    for (const chunks of cutsOf(bytesOf(before + rest))) {
      const line = `latency latency=1000 | after: { ${after} }`;
      const { passed, take, inWords } = begin(line);
      let taken = 0;
      for (const chunk of chunks) {
        take(chunk);
        taken += chunk.length; // all of it leaves at once
        const left = passed.reduce((sum, { what }) => sum + what.length, 0);
        assertEquals(left, taken);
      }
      const late = rest && ` 1000:${rest}`;
      assertEquals(inWords(), `0:${latin1(bytesOf(before))}${late}`);
    }
  });
}

/** What each toxic does to `; select` and the end, behind `begin; COMMIT`. */
const ACTS = {
  "noop": "; select<end>",
  "latency latency=100": " 100:; select<end>",
  "bandwidth rate=0": " Infinity:; select<end>",
  "slow_close delay=50": "; select 50:<end>",
  "timeout timeout=30": " Infinity:<end> 30!close",
  "reset_peer timeout=30": " Infinity:; select<end> 30!reset",
  "slicer average_size=4 delay=1000": " 1:; se 2:lect 3:<end>",
  "limit_data bytes=3": "; s<close>",
  "limit_data bytes=8": "; select<close>",
  "packet_loss loss_rate=1": "<end>",
  "limit_time time=40": "; select<end> 40!close",
  "stall rate=1 duration=20": " 20:; select<end>",
  "random_close rate=1": "<close> Infinity:; select<end>",
  "duplicate rate=1": "; select; select<end>",
  "reorder rate=1": "; select<end>",
};

for (const [line, expected] of Object.entries(ACTS)) {
  Deno.test(`behind its trigger ${line} acts on exactly what follows`, () => {
    for (const after of ["match: COMMIT", "bytes: 13"]) {
      for (const chunks of cutsOf(bytesOf("begin; COMMIT; select"), 13)) {
        const { take, inWords } = begin(`${line} | after: { ${after} }`);
        for (const each of [...chunks, "<end>"]) take(each);
        assertEquals(inWords(), `0:begin; COMMIT${expected}`, `${chunks}`);
      }
    }
  });
}

for (const line of ["corrupt rate=0.3", "inject rate=0.9 bytes=9"]) {
  Deno.test(`behind its trigger ${line} hits what it would hit without one`, () => {
    const [plain, late] = [begin(line), begin(`${line} | after: { bytes: 9 }`)];
    for (const each of ["123", "456789"]) late.take(each);
    for (const { take } of [plain, late]) take(h.testBytes(200));
    const expected = plain.inWords().replace("0:", "0:123456789");
    assertEquals(late.inWords(), expected);
  });
}

for (
  const [line, expected] of Object.entries({
    "limit_data bytes=0": "<close>",
    "reset_peer timeout=30": " 37!reset",
    "limit_time time=30": " 37!close",
    "timeout timeout=30": " 37!close",
  })
) {
  Deno.test(`${line} strikes at its trigger though nothing follows`, () => {
    const { take, inWords } = begin(`${line} | after: { bytes: 3 }`);
    take("abc", 7);
    assertEquals(inWords(), `7:abc${expected}`);
  });
}

Deno.test("a change of attributes keeps what was counted for the trigger", () => {
  const { active, take, inWords } = begin(
    "latency latency=100 | after: { bytes: 5 }",
  );
  take("abc");
  active.change({ latency: 50, jitter: 0 }, 0, 0);
  take("defg");
  assertEquals(inWords(), "0:abcde 50:fg");
  active.change({ latency: 20, jitter: 0 }, 0, 0);
  for (const each of ["fg", "h"]) take(each); // what it holds comes again
  assertEquals(inWords(), "20:fgh");

  const limit = begin("limit_data bytes=9 | after: { bytes: 5 }");
  limit.take("abcdef");
  limit.active.change({ bytes: 3 }, 0, 0);
  limit.take("ghi");
  assertEquals(limit.inWords(), "0:abcdefgh<close>");

  const timeout = begin("timeout | after: { bytes: 3 }");
  timeout.take("ab");
  timeout.active.end(9); // it closes nothing, for it has not begun
  assertEquals(timeout.inWords(), "0:ab");
});

for (const { sockets, resettable } of h.SOCKETS) {
  Deno.test(`a connection breaks in the middle of COMMIT, on ${sockets}`, async () => {
    const line = "limit_data upstream bytes=0 | after: { match: COM }";
    await using ends = await h.openEnds(having([line]), { resettable });
    await h.send(ends.client, "BEGIN; CO");
    await h.assertReads(ends.upstream, "BEGIN; CO");
    await h.send(ends.client, "MMIT;");
    assertEquals(h.text(await h.readAll(ends.upstream)), "M");
    assertEquals(await h.readToEnd(ends.client), 0);
    await h.assertEndedBy(ends.watched, "limit_data_upstream");
  });
}

Deno.test("500 toxics wait for one trigger, and all find it at the same byte", async () => {
  const plan = "stream: upstream, after: { match: COMMIT }";
  const lines = Array.from(
    { length: 499 },
    (_, i) => `noop name=n${i} | ${plan}`,
  );
  lines.push(`limit_data bytes=1 | ${plan}`);
  await using ends = await h.openEnds(having(lines));
  const { client, upstream, watched: { proxy } } = ends;
  for (const part of ["BEGIN; ", "COM", "M"]) {
    await h.send(client, part);
    await h.assertReads(upstream, part);
  }
  assertEquals(h.only(proxy.stats()).toxics, {});
  await h.send(client, "IT;END");
  assertEquals(h.text(await h.readAll(upstream)), "IT;");
  assertEquals(Object.keys(h.only(proxy.stats()).toxics).length, 500);
});

Deno.test("COMMIT resets both sides; a new trigger replaces the toxic", async () => {
  const reset = "reset_peer upstream | after: { match: COMMIT }";
  const lines = [
    "bandwidth rate=0 | after: { bytes: 3 }",
    reset,
    "packet_loss loss_rate=1 name=loss | after: { bytes: 7 }",
  ];
  await using ends = await h.openEnds(having(lines));
  const { client, upstream, watched: { proxy } } = ends;
  await h.send(upstream, "abcdef");
  await h.assertReads(client, "abc");
  proxy.updateToxic("r", "bandwidth_downstream", { after: { bytes: 4 } });
  await h.assertReads(client, "def"); // was held
  await h.send(upstream, "ghijkl");
  await h.assertReads(client, "g"); // the others are lost behind it, or held
  await h.send(client, "COMM");
  await h.assertReads(upstream, "COMM");
  await h.send(client, "IT");
  for (const conn of [client, upstream]) {
    await assertRejects(() => h.readAll(conn), Deno.errors.ConnectionReset);
  }
  const { toxics } = h.only(proxy.stats());
  assertEquals(toxics, {
    bandwidth_downstream: 2,
    reset_peer_upstream: 1,
    loss: 1,
  });
});

// ---- When: toxics ------------------------------------------------------------

const OFTEN = { afterMs: 30, forMs: 20, everyMs: 50 };
const EVERY_50 = "afterMs: 30, forMs: 20, everyMs: 50";

/** A connection to an echo, the edges so far, and when each event came. */
async function openTimed(lines: string[], more = "") {
  const at = new Map<h.LogEvent, number>();
  const log = new h.EventLog();
  const onEvent = (event: h.LogEvent) => {
    at.set(event, performance.now());
    log.add(event);
    const isSlow = event.event === "listening"; // edges count from `started`
    for (const end = at.get(event)! + 20; isSlow && performance.now() < end;);
  };
  const before = performance.now();
  const ends = await h.openEcho(having(lines, more), { onEvent });
  const edges = (name: string, connection?: number) =>
    log.all.filter((each) =>
      /_(on|off)$/.test(each.event) && Object.values(each).includes(name) &&
      ("connection" in each ? each.connection : undefined) === connection
    );
  /** Each is of the other kind than the one before, and none comes early. */
  const assertEdges = (
    start: number,
    plan: typeof OFTEN,
    ...of: [string, number?]
  ) =>
    edges(...of).forEach((edge, i) => {
      assertEquals(edge.event, i % 2 ? "toxic_off" : "toxic_on");
      const due = plan.afterMs + (i >> 1) * plan.everyMs + i % 2 * plan.forMs;
      assertGreater(at.get(edge)!, start + due - 1, `edge ${i}`);
    });
  return Object.assign(ends, {
    at,
    log,
    before,
    edges,
    assertEdges,
    proxy: ends.watched.proxy,
  });
}

Deno.test("the edges of toxics are events, in order, none early, from the start of the proxy", async () => {
  const plans = {
    often: EVERY_50,
    once: "afterMs: 46, forMs: 60",
    always: "",
    later: `afterMs: ${h.LONG_MS}`,
  };
  const lines = Object.entries(plans).map(([name, plan]) =>
    `noop name=${name} | schedule: { ${plan} }`
  );
  await using timed = await openTimed(lines);
  const { edges, log, at } = timed;
  await h.until(() => edges("often").length >= 20, "edges");
  const start = at.get(log.only("started"))!;
  timed.assertEdges(start, OFTEN, "often");
  timed.assertEdges(start, { ...OFTEN, afterMs: 46, forMs: 60 }, "once");
  const counts = ["once", "always", "later"].map((name) => edges(name).length);
  assertEquals(counts, [2, 1, 0]);
});

Deno.test("edges count from each connection's opening, and end with it", async () => {
  const from = "from: connection";
  const noop = `noop name=a | schedule: { ${EVERY_50}, ${from} }`;
  const later = `noop name=b | schedule: { afterMs: ${h.LONG_MS}, ${from} }`;
  await using timed = await openTimed([noop, later]);
  const { edges, client, watched } = timed;
  await h.assertEchoes(client);
  await h.until(() => edges("a", 1).length >= 3, "edges");
  const start = performance.now();
  using second = await watched.connect();
  await h.until(() => edges("a", 2).length >= 20, "edges");
  timed.assertEdges(timed.before, OFTEN, "a", 1);
  timed.assertEdges(start, OFTEN, "a", 2);
  const { log, proxy } = timed;
  assertEquals(log.of("connected").map(({ toxics }) => toxics), [[], []]);
  await h.until(() => edges("a", 2).at(-1)?.event === "toxic_on", "on");
  for (const each of [second, client]) each.close();
  await log.first("closed", 2);
  const { on, toxics } = h.only(proxy.stats());
  assertEquals([on, Object.keys(toxics)], [{ a: 0 }, ["a"]]);
});

Deno.test("a toxic that is off does not act when the connection ends", async () => {
  const on = "noop name=a | schedule: { from: connection }";
  const off = `schedule: { afterMs: ${h.LONG_MS}, from: connection }`;
  await using timed = await openTimed([on, `noop name=b | ${off}`]);
  await h.assertEchoes(timed.client);
  timed.client.close();
  await timed.log.first("closed", 1);
  assertEquals(Object.keys(h.only(timed.proxy.stats()).toxics), ["a"]);
});

Deno.test("no edge is left out when the process is late", async () => {
  const plan = "afterMs: 5, forMs: 3, everyMs: 20";
  const lines = ["start", "connection"].map((from) =>
    `noop name=${from} | schedule: { ${plan}, from: ${from} }`
  );
  await using timed = await openTimed(lines);
  const all = () => [timed.edges("start"), timed.edges("connection", 1)];
  await h.until(() => all().every(({ length }) => length > 0), "edges");
  const starts = all().map(([first]) => timed.at.get(first!)!);
  for (let i = 0; i < 5; i++) {
    for (const end = performance.now() + 90; performance.now() < end;);
    await h.pause(5);
  }
  await h.until(() => {
    const now = performance.now();
    return all().every(({ length }, i) =>
      length / 2 > (now - starts[i]!) / 20 - 2
    );
  }, "each edge");
});

Deno.test("a late edge is not lost when other schedules change", async () => {
  const line = "noop name=a | schedule: { afterMs: 100, forMs: 9 }";
  await using timed = await openTimed([line]);
  for (const end = performance.now() + 120; performance.now() < end;);
  timed.proxy.addToxic("r", planned("noop name=b | schedule: {}"));
  await h.until(() => timed.edges("a").length === 2, "both edges");
});

Deno.test("traffic goes on though edges come faster than they are handled", async () => {
  let edges = 0;
  const onEvent = ({ event }: h.LogEvent) => {
    if (event !== "toxic_on" || ++edges > 500) return;
    for (const end = performance.now() + 3; performance.now() < end;);
  };
  const route = having(["noop | schedule: { forMs: 1, everyMs: 2 }"]);
  await using ends = await h.openEcho(route, { onEvent });
  await h.assertEchoes(ends.client);
  assertEquals(edges < 500, true);
});

Deno.test("late edges come one after the other, though a handler changes a toxic at each", async () => {
  let [edges, depth, most] = [0, 0, 0];
  const onEvent = ({ event }: { event: string }) => {
    if (!/^toxic_o/.test(event)) return;
    most = Math.max(most, ++depth);
    if (edges++ === 0) {
      for (const end = performance.now() + 50; performance.now() < end;);
    }
    proxy.updateToxic("r", "x", { toxicity: edges % 2 });
    depth--;
  };
  const lines = [
    "noop name=a | schedule: { afterMs: 20, forMs: 1, everyMs: 2 }",
  ];
  const route = {
    ...having([...lines, "noop name=x"]),
    localPort: 0,
    upstream: "a:1",
  };
  const proxy = await ChaosProxy.start({ routes: [route] }, { onEvent });
  await using _ = proxy;
  await h.until(() => edges > 60, "the edges that were late, and others");
  assertEquals(most, 1);
});

Deno.test("a toxic that a handler removes at an edge acts on no connection", async () => {
  const lines = [
    "noop name=route | schedule: { afterMs: 150 }",
    "noop name=own | schedule: { afterMs: 100, from: connection }",
    "noop name=x",
  ];
  let ons = 0;
  const onEvent = (event: h.LogEvent) => {
    if (event.event !== "toxic_on") return;
    if (event.connection === 1) proxy.removeToxic("r", "x");
    ons++;
  };
  await using ends = await h.openEcho(having(lines), { onEvent });
  const { proxy } = ends.watched;
  using other = await ends.watched.connect();
  await h.assertEchoes(other);
  for (const end = performance.now() + 200; performance.now() < end;);
  await h.until(() => ons === 3, "all are on");
  const acting = proxy.liveConnections().map(({ toxics }) => toxics);
  assertEquals(acting, [["route", "own"], ["route", "own"]]);
});

Deno.test("after a new seed schedules begin again; the metrics and the report say what is on", async () => {
  await using timed = await openTimed([
    "noop name=a | schedule: { afterMs: 60 }",
  ]);
  const { log, proxy } = timed;
  await using api = h.Api.of(timed.watched);
  const assertOn = async (on: number) => {
    const { text } = await api.raw("GET", "/metrics");
    assertStringIncludes(
      text,
      `chaos_proxy_scheduled_on{proxy="r",name="a"} ${on}\n`,
    );
    assertEquals(h.only(proxy.report().routes).on, { a: on });
  };
  await log.first("toxic_on", 1);
  await assertOn(1);
  const start = performance.now();
  proxy.reseed(1);
  assertEquals(log.all.at(-1)?.event, "toxic_off");
  await log.first("toxic_on", 2);
  assertGreater(timed.at.get(log.of("toxic_on")[1]!)!, start + 59);
  await assertOn(1);
});

for (
  const line of [
    "bandwidth rate=0",
    `latency latency=${h.LONG_MS}`,
    `stall rate=1 duration=${h.LONG_MS}`,
  ]
) {
  Deno.test(`what a scheduled ${line} holds is released when it goes off`, async () => {
    for (const from of ["start", "connection"]) {
      const plan = `${line} | schedule: { forMs: 150, from: ${from} }`;
      await using ends = await openTimed([plan, "slicer average_size=999"]);
      const bytes = h.testBytes(100_000);
      h.assertBytes(await h.exchange(ends.client, bytes), bytes);
      assertEquals(ends.log.of("toxic_off").length, 1);
    }
  });
}

Deno.test("a timeout that goes off closes the connection, and nothing goes on after that", async () => {
  const from = "forMs: 60, from: connection";
  const lines = [
    `timeout upstream | schedule: { ${from} }`,
    `noop | schedule: { ${from}, afterMs: 60 }`,
  ];
  await using ends = await h.openEnds(having(lines));
  await ends.client.closeWrite(); // or it would close later
  const { durationMs } = await h.assertEndedBy(
    ends.watched,
    "timeout_upstream",
  );
  assertGreater(durationMs, 59);
  const { on, toxics } = h.only(ends.watched.proxy.stats());
  assertEquals(
    [on, toxics],
    [{ timeout_upstream: 0 }, { timeout_upstream: 1 }] as const,
  );
});

Deno.test("the schedule of one connection's toxic is that connection's alone", async () => {
  await using timed = await openTimed([]);
  const { client, edges, log, proxy, watched } = timed;
  using other = await watched.connect();
  for (const each of [client, other]) await h.assertEchoes(each);
  const target = { connection: proxy.liveConnections()[0]!.id };
  for (const from of ["start", "connection"]) {
    const plan = `schedule: { forMs: 10, everyMs: 20, from: ${from} }`;
    proxy.addToxic(target, planned(`noop name=${from} | ${plan}`));
    await h.until(() => edges(from, 1).length > 4, "edges");
  }
  proxy.updateToxic(target, "start", { schedule: LATER });
  proxy.updateToxic(target, "connection", { schedule: {} });
  const toxics = () => proxy.liveConnections().map((each) => each.toxics);
  assertEquals([edges("start", 1).length % 2, toxics()], [0, [
    ["connection"],
    [],
  ]]);
  proxy.removeToxic(target, "connection");
  assertEquals([log.all.at(-1)?.event, toxics()], ["toxic_off", [[], []]]);
  assertEquals(h.only(proxy.stats()).on, { start: 0 });
});

Deno.test("schedules change live, for what is open too; each time on draws other numbers, the same with the same seed", async () => {
  const run = async () => {
    await using timed = await openTimed([]);
    const { client, log, proxy } = timed;
    const name = "constructor"; // as of each object
    proxy.addToxic("r", planned(`corrupt rate=1 name=${name} | schedule: {}`));
    const all: string[] = [];
    for (const schedule of [{}, LATER, {}, LATER, {}]) {
      proxy.updateToxic("r", name, { schedule });
      await h.writeAll(client, new Uint8Array(200));
      all.push(`${await h.readExactly(client, 200)}`);
    }
    proxy.removeToxic("r", name);
    await h.assertEchoes(client);
    const edges = log.all.filter(({ event }) => /^toxic_o/.test(event));
    assertEquals(edges.length, 6);
    return all;
  };
  const [first, again] = [await run(), await run()];
  assertEquals(first, again);
  const none = `${new Uint8Array(200)}`;
  assertEquals([first[1], first[3]], [none, none]);
  assertEquals(new Set(first).size, 4);
});

Deno.test("schedules go on during the drain", async () => {
  const line = "bandwidth rate=0 | schedule: { forMs: 200 }";
  await using timed = await openTimed([line]);
  const got = h.exchange(timed.client, h.testBytes(1000));
  await timed.log.first("connected", 1);
  assertEquals(await timed.proxy.drain(), 0);
  assertEquals(await got, h.testBytes(1000));
});

for (const { sockets, resettable } of h.SOCKETS) {
  Deno.test(`no byte is wrong or missing while schedules switch every 50 ms, on ${sockets}`, async () => {
    const lines = [
      ...["latency latency=9 jitter=9", "slicer average_size=9000"],
      ...["bandwidth rate=90000", "stall rate=0.01 duration=5"],
      "bandwidth rate=0",
    ];
    const all = lines.flatMap((line, i) => {
      const from = i % 2 ? "start" : "connection";
      const plan = `afterMs: ${15 * i}, forMs: 50, everyMs: 100, from: ${from}`;
      return ["", " upstream"].map((stream) =>
        `${line}${stream} name=${i}${stream.trim()} | schedule: { ${plan} }`
      );
    });
    await using ends = await h.openEcho(having(all), { resettable });
    const { client, watched } = ends;
    const block = h.testBytes(h.MIB);
    const size = Number(Deno.env.get("PLAN_MIB") ?? 64) * block.length;
    const { done } = h.flood(client, block, size); // and as much comes back
    assertEquals(await h.readToEnd(client, block), size);
    await done;
    await h.assertClosed(watched, { why: "client", toxic: undefined });
    assertGreater(watched.log.of("toxic_on").length, 9);
  });
}
