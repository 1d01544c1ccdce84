/** What is decided follows from the seed, and from the seed alone. */

import {
  assert,
  assertEquals,
  assertGreater,
  assertGreaterOrEqual,
  assertLess,
  assertLessOrEqual,
} from "@std/assert";
import {
  decide,
  type Decision,
  parseConfig,
  type Route,
  type RouteOptions,
} from "../main.ts";
import {
  echo,
  exchange,
  only,
  testBytes,
  times,
  toxic,
  unlessDisconnected,
  WatchedProxy,
} from "./helpers.ts";

const COUNT = 10_000;
const SEEDS = [0, 1, 2, 42, 2 ** 32, Number.MAX_SAFE_INTEGER];
const JITTER = { latencyMs: 9, jitterMs: 5 };
const WIDE_JITTER = { latencyMs: 200, jitterMs: 100 };
const RATES = { dropRate: 0.2, timeoutRate: 0.2 };

function routeWith(options: Partial<RouteOptions>): Route {
  const route = { localPort: 1, name: "db", upstream: "a:1", ...options };
  return only(parseConfig(JSON.stringify({ routes: [route] })).routes);
}

function decisions(
  seed: number,
  options: Partial<RouteOptions>,
  length = COUNT,
): Decision[] {
  const route = routeWith(options);
  return Array.from({ length }, (_, i) => decide(seed, route, i + 1));
}

function delays(seed: number, options: Partial<RouteOptions>): number[] {
  return decisions(seed, options).map((decision) => {
    assert(decision.kind === "forward");
    return decision.delayMs;
  });
}

/** So many of so many lie within four standard deviations of the share. */
function assertShare(found: number, of: number, share: number): void {
  const deviation = Math.sqrt(share * (1 - share) / of);
  const off = Math.abs(found / of - share) / deviation;
  assertLessOrEqual(off, 4, `${found} of ${of} for ${share}`);
}

function count(all: Decision[], kind: string): number {
  return all.filter((decision) => decision.kind === kind).length;
}

function mean(values: number[]): number {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}

function covariance(a: number[], b: number[]): number {
  const [meanA, meanB] = [mean(a), mean(b)];
  return mean(a.map((x, i) => (x - meanA) * ((b[i] ?? NaN) - meanB)));
}

function variance(values: number[]): number {
  return covariance(values, values);
}

/** That two series have no more to do with each other than chance brings. */
function assertUnrelated(a: number[], b: number[]): void {
  const correlation = covariance(a, b) / Math.sqrt(variance(a) * variance(b));
  assertLess(Math.abs(correlation), 4 / Math.sqrt(a.length));
}

Deno.test("the share of connections dropped is dropRate, of the others never answered timeoutRate", () => {
  for (const seed of SEEDS) {
    for (const rate of [0.001, 0.01, 0.05, 0.3, 0.5, 0.9, 0.999]) {
      const drops = decisions(seed, { dropRate: rate, timeoutRate: 0.5 });
      assertShare(count(drops, "drop"), COUNT, rate);
      const holds = decisions(seed, { dropRate: 0.25, timeoutRate: rate });
      const notDropped = COUNT - count(holds, "drop");
      assertShare(count(holds, "timeout"), notDropped, rate);
    }
  }
});

Deno.test("a rate of 0 is never, a rate of 1 always", () => {
  const timeout = { timeoutRate: 1 };
  const always = { forward: {}, timeout, drop: { ...timeout, dropRate: 1 } };
  for (const seed of SEEDS) {
    for (const [kind, options] of Object.entries(always)) {
      assertEquals(count(decisions(seed, options), kind), COUNT);
    }
  }
});

Deno.test("jitter is uniform around the latency", () => {
  const [latencyMs, jitterMs, bins] = [200, 50, 20];
  for (const seed of SEEDS) {
    const found = delays(seed, { latencyMs, jitterMs });
    const off = Math.abs(mean(found) - latencyMs);
    const deviation = jitterMs / Math.sqrt(3);
    assertLess(off, 4 * deviation / Math.sqrt(COUNT));
    assertLess(Math.abs(variance(found) / deviation ** 2 - 1), 0.05);
    assertGreaterOrEqual(Math.min(...found), latencyMs - jitterMs);
    assertLessOrEqual(Math.max(...found), latencyMs + jitterMs);

    const binned = Map.groupBy(found, (delay) => {
      const place = (delay - latencyMs + jitterMs) / (2 * jitterMs);
      return Math.min(bins - 1, Math.floor(place * bins));
    });
    const sizes = Array.from(binned.values(), ({ length }) => length);
    assertEquals(sizes.length, bins);
    const chiSquare = bins * variance(sizes) / (COUNT / bins);
    assertLess(chiSquare, 50); // 19 degrees of freedom: once in 7,000 seeds
    assertGreater(chiSquare, 4); // nor more even than chance would have it
  }
});

Deno.test("a delay is never below 0, and without jitter always the same", () => {
  const short = delays(42, { latencyMs: 10, jitterMs: 50 });
  assertEquals(Math.min(...short), 0);
  assertShare(short.filter((delay) => delay === 0).length, COUNT, 0.4);
  assertEquals(new Set(delays(42, { latencyMs: 10 })), new Set([10]));
  assertEquals(new Set(delays(42, {})), new Set([0]));
});

Deno.test("the same seed decides the same, whatever was decided before", () => {
  const options = { ...RATES, ...JITTER };
  const route = routeWith(options);
  const first = decisions(42, options);
  assertEquals(decisions(42, options), first);
  for (let i = COUNT; i > 0; i -= 7) {
    decide(7, route, i);
    assertEquals(decide(42, route, i), first[i - 1]);
  }
});

Deno.test("only the name and the faults of a route count", () => {
  const options = { ...RATES, ...JITTER };
  const address = { localPort: 2, host: "::1", upstream: "b:2" };
  const other = { ...address, timeoutMs: 1, connectTimeoutMs: 1 };
  const found = decisions(42, { ...options, ...other });
  assertEquals(found, decisions(42, options));
});

Deno.test("a fault that is switched on or off leaves the others as they are", () => {
  const plain = decisions(42, JITTER);
  const some = decisions(42, { ...JITTER, ...RATES });
  const more = decisions(42, { ...JITTER, ...RATES, dropRate: 0.3 });
  for (const [i, { kind }] of some.entries()) {
    if (kind === "forward") assertEquals(some[i], plain[i]);
    if (kind === "drop") assertEquals(more[i]?.kind, "drop");
    else if (more[i]?.kind !== "drop") assertEquals(more[i], some[i]);
  }
});

Deno.test("another seed, or another name, decides independently", () => {
  const drops = (seed: number, name: string) =>
    decisions(seed, { name, dropRate: 0.5 }).map(({ kind }) => kind);
  const jitters = (seed: number, name: string) =>
    delays(seed, { name, ...WIDE_JITTER });
  const [dropped, delayed] = [drops(42, "db"), jitters(42, "db")];
  const assertIndependent = (seed: number, name: string) => {
    const other = drops(seed, name);
    const agreed = other.filter((kind, i) => kind === dropped[i]).length;
    assertShare(agreed, COUNT, 0.5);
    assertUnrelated(delayed, jitters(seed, name));
  };
  for (const seed of [43, 41, 0, 42 + 2 ** 32, 2 ** 53 - 1]) {
    assertIndependent(seed, "db");
  }
  for (const name of ["da", "Db", "db1", "bd", "42"]) {
    assertIndependent(42, name);
  }
  assertIndependent(4, "2db");
});

Deno.test("neighbouring connections have nothing to do with each other", () => {
  for (const seed of SEEDS) {
    const are = (kind: string, options: Partial<RouteOptions>) =>
      decisions(seed, options).map((each) => Number(each.kind === kind));
    const delayed = delays(seed, WIDE_JITTER);
    const dropped = are("drop", { dropRate: 0.5 });
    const held = are("timeout", { timeoutRate: 0.5 });
    for (const lag of [1, 2, 10, 64, 100, 256]) {
      for (const draws of [delayed, dropped, held]) {
        assertUnrelated(draws.slice(lag), draws.slice(0, -lag));
      }
    }
    assertUnrelated(delayed, dropped);
    assertUnrelated(delayed, held);
    assertUnrelated(dropped, held);
  }
});

Deno.test("seeds in a row are as good as any", () => {
  const route = routeWith({ dropRate: 0.05, ...WIDE_JITTER });
  const first = Array.from({ length: COUNT }, (_, i) => decide(i, route, 1));
  assertShare(count(first, "drop"), COUNT, 0.05);
  const delayed = first.flatMap((decision) =>
    decision.kind === "forward" ? [decision.delayMs] : []
  );
  const late = delayed.filter((delay) => delay > 200).length;
  assertShare(late, delayed.length, 0.5);
  assertUnrelated(delayed.slice(1), delayed.slice(0, -1));
});

/** Whoever changes these changes what every seed in use means. */
// deno-fmt-ignore
const GOLDEN = [
  "timeout", "drop", 177.351, 116.597, 144.407,
  159.354, "drop", "drop", "timeout", 108.433,
  121.471, "timeout", "timeout", "drop", 183.676,
  186.935, 152.301, "timeout", 125.594, 101.967,
];

Deno.test("seed 42 decides what it has always decided", () => {
  const route = { name: "golden", ...RATES, latencyMs: 150, jitterMs: 50 };
  const first = decisions(42, route, GOLDEN.length).map((decision) =>
    decision.kind === "forward" ? decision.delayMs : decision.kind
  );
  assertEquals(first, GOLDEN);
});

const BRIEF = { timeoutMs: 1, latencyMs: 2, jitterMs: 2 };
const FAULTS = { name: "db", ...RATES, ...BRIEF };
const CONNECTIONS = 300;

/** The decisions by connection number, as the proxy logged them. */
async function decisionsSeen(seed: number, atOnce: number) {
  await using upstream = echo();
  await using watched = await WatchedProxy.to(upstream, FAULTS, { seed });
  for (let done = 0; done < CONNECTIONS; done += atOnce) {
    await times(atOnce, async () => {
      using client = await watched.connect();
      await exchange(client, testBytes(5)).catch(unlessDisconnected);
    });
  }
  const { log } = watched;
  await log.first("closed", CONNECTIONS);
  assertEquals(log.of("accepted").length, CONNECTIONS);
  const seen = new Array<Decision>(CONNECTIONS)
    .fill({ kind: "forward", delayMs: 0, toxics: [] });
  for (const { connection, delayMs } of log.of("delayed")) {
    seen[connection - 1] = { kind: "forward", delayMs, toxics: [] };
  }
  for (const { connection } of log.of("dropped")) {
    seen[connection - 1] = { kind: "drop" };
  }
  for (const { connection } of log.of("timed_out")) {
    seen[connection - 1] = { kind: "timeout" };
  }
  assertEquals(log.of("connected").length, count(seen, "forward"));
  assertEquals(upstream.accepted, count(seen, "forward"));
  return seen;
}

Deno.test("connection by connection, one at a time as 100 at once", async () => {
  const [oneByOne, together, other] = await Promise.all([
    decisionsSeen(42, 1),
    decisionsSeen(42, 100),
    decisionsSeen(43, 100),
  ]);
  const decided = decisions(42, FAULTS, CONNECTIONS);
  assertEquals(oneByOne, decided);
  assertEquals(together, decided);
  assertEquals(other, decisions(43, FAULTS, CONNECTIONS));
  for (const kind of ["drop", "timeout", "forward"] as const) {
    assertGreater(count(decided, kind), 0);
  }
  const agreed = decided.filter(({ kind }, i) => kind === other[i]?.kind);
  assertLess(agreed.length, 200);
});

Deno.test("a toxic's name and the seed decide on which connections it acts, not its place", () => {
  const acting = (seed: number, which: string, ...names: string[]) => {
    const toxics = names.map((name) => toxic(`noop toxicity=0.5 name=${name}`));
    return decisions(seed, { toxics }, 1000).map((each) =>
      each.kind === "forward" && each.toxics.some(({ name }) => name === which)
    );
  };
  const found = acting(42, "a", "a");
  assertShare(found.filter(Boolean).length, 1000, 0.5);
  assertEquals(acting(42, "a", "b", "c", "a", "d"), found);
  for (const other of [acting(43, "a", "a"), acting(42, "b", "a", "b")]) {
    const agreed = other.filter((acts, i) => acts === found[i]).length;
    assertShare(agreed, 1000, 0.5);
  }
});

/** What each connection gets back of the same message, by its number. */
async function answersSeen(seed: number, atOnce: number, name = "inject") {
  const toxics = [
    `inject upstream rate=0.5 bytes=9 name=${name}`,
    "duplicate upstream rate=0.3",
    "packet_loss upstream loss_rate=0.3 burst=2",
    "corrupt upstream rate=0.05",
  ].map(toxic);
  await using upstream = echo();
  const route = { name: "db", toxics };
  await using watched = await WatchedProxy.to(upstream, route, { seed });
  const answers = new Map<string, string>();
  for (let done = 0; done < 100; done += atOnce) {
    await times(atOnce, async () => {
      using client = await watched.connect();
      const answer = await exchange(client, testBytes(50));
      answers.set(`127.0.0.1:${client.localAddr.port}`, answer.join());
    });
  }
  const accepted = watched.log.of("accepted");
  assertEquals(new Set(accepted.map(({ client }) => client)).size, 100);
  return accepted.toSorted((a, b) => a.connection - b.connection)
    .map(({ client }) => answers.get(client));
}

Deno.test("connection N meets the same toxics at 1, 10 and 100 at once", async () => {
  const [first, ...same] = await Promise.all(
    [1, 10, 100].map((atOnce) => answersSeen(42, atOnce)),
  );
  for (const each of same) assertEquals(each, first);
  assertGreater(new Set(first).size, 50);
  const others = await Promise.all([
    answersSeen(43, 100),
    answersSeen(42, 100, "renamed"),
  ]);
  for (const other of others) {
    assertLess(other.filter((each, i) => each === first?.[i]).length, 50);
  }
});
