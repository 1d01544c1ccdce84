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
import { echo, isDisconnect, readAll, send, WatchedProxy } from "./helpers.ts";

const COUNT = 10_000;
const SEEDS = [0, 1, 2, 42, 2 ** 32, Number.MAX_SAFE_INTEGER];

function routeWith(options: Partial<RouteOptions>): Route {
  const route = { localPort: 1, name: "db", upstream: "a:1", ...options };
  return parseConfig(JSON.stringify({ routes: [route] })).routes[0];
}

function decisions(seed: number, options: Partial<RouteOptions>): Decision[] {
  const route = routeWith(options);
  return Array.from({ length: COUNT }, (_, i) => decide(seed, route, i + 1));
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

function count(all: Decision[], kind: Decision["kind"]): number {
  return all.filter((decision) => decision.kind === kind).length;
}

function mean(values: number[]): number {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}

function correlation(a: number[], b: number[]): number {
  const [meanA, meanB] = [mean(a), mean(b)];
  const covariance = mean(a.map((x, i) => (x - meanA) * (b[i] - meanB)));
  const variance = (of: number[], around: number) =>
    mean(of.map((x) => (x - around) ** 2));
  return covariance / Math.sqrt(variance(a, meanA) * variance(b, meanB));
}

const RATES = [0.001, 0.01, 0.05, 0.3, 0.5, 0.9, 0.999];

Deno.test("the share of dropped connections is dropRate", () => {
  for (const seed of SEEDS) {
    for (const dropRate of RATES) {
      const found = decisions(seed, { dropRate, timeoutRate: 0.5 });
      assertShare(count(found, "drop"), COUNT, dropRate);
    }
  }
});

Deno.test("of those not dropped, the share never answered is timeoutRate", () => {
  for (const seed of SEEDS) {
    for (const timeoutRate of RATES) {
      const found = decisions(seed, { dropRate: 0.25, timeoutRate });
      const notDropped = COUNT - count(found, "drop");
      assertShare(count(found, "timeout"), notDropped, timeoutRate);
    }
  }
});

Deno.test("a rate of 0 is never, a rate of 1 always", () => {
  for (const seed of SEEDS) {
    const none = decisions(seed, {});
    assertEquals(count(none, "forward"), COUNT);
    const dropped = decisions(seed, { dropRate: 1, timeoutRate: 1 });
    assertEquals(count(dropped, "drop"), COUNT);
    const held = decisions(seed, { timeoutRate: 1 });
    assertEquals(count(held, "timeout"), COUNT);
  }
});

Deno.test("jitter is uniform around the latency", () => {
  const [latencyMs, jitterMs, bins] = [200, 50, 20];
  for (const seed of SEEDS) {
    const found = delays(seed, { latencyMs, jitterMs });
    const average = mean(found);
    const variance = mean(found.map((delay) => (delay - average) ** 2));
    const deviation = jitterMs / Math.sqrt(3);
    assertLess(
      Math.abs(average - latencyMs),
      4 * deviation / Math.sqrt(COUNT),
    );
    assertLess(Math.abs(variance / deviation ** 2 - 1), 0.05);
    assertGreaterOrEqual(Math.min(...found), latencyMs - jitterMs);
    assertLessOrEqual(Math.max(...found), latencyMs + jitterMs);

    const binned = new Array<number>(bins).fill(0);
    for (const delay of found) {
      const place = (delay - latencyMs + jitterMs) / (2 * jitterMs);
      binned[Math.min(bins - 1, Math.floor(place * bins))]++;
    }
    const expected = COUNT / bins;
    const chiSquare = binned.reduce(
      (sum, each) => sum + (each - expected) ** 2 / expected,
      0,
    );
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
  const options = {
    dropRate: 0.2,
    timeoutRate: 0.2,
    latencyMs: 9,
    jitterMs: 5,
  };
  const route = routeWith(options);
  const first = decisions(42, options);
  assertEquals(decisions(42, options), first);
  for (let i = COUNT; i > 0; i -= 7) {
    decide(7, route, i);
    assertEquals(decide(42, route, i), first[i - 1]);
  }
});

Deno.test("only the name and the faults of a route count", () => {
  const options = {
    dropRate: 0.3,
    timeoutRate: 0.3,
    latencyMs: 9,
    jitterMs: 5,
  };
  assertEquals(
    decisions(42, {
      ...options,
      localPort: 2,
      host: "::1",
      upstream: "b:2",
      timeoutMs: 1,
      connectTimeoutMs: 1,
    }),
    decisions(42, options),
  );
});

Deno.test("a fault that is switched on or off leaves the others as they are", () => {
  const jitter = { latencyMs: 9, jitterMs: 5 };
  const plain = decisions(42, jitter);
  const some = decisions(42, { ...jitter, dropRate: 0.2, timeoutRate: 0.2 });
  const more = decisions(42, { ...jitter, dropRate: 0.3, timeoutRate: 0.2 });
  for (let i = 0; i < COUNT; i++) {
    if (some[i].kind === "forward") assertEquals(some[i], plain[i]);
    if (some[i].kind === "drop") assertEquals(more[i].kind, "drop");
    else if (more[i].kind !== "drop") assertEquals(more[i], some[i]);
  }
});

const OTHERS: [seed: number, name: string][] = [
  [43, "db"],
  [41, "db"],
  [0, "db"],
  [42 + 2 ** 32, "db"],
  [2 ** 53 - 1, "db"],
  [4, "2db"],
  [42, "da"],
  [42, "Db"],
  [42, "db1"],
  [42, "bd"],
  [42, "42"],
];

Deno.test("another seed, or another name, decides independently", () => {
  const drops = (seed: number, name: string) =>
    decisions(seed, { name, dropRate: 0.5 }).map(({ kind }) => kind);
  const jitters = (seed: number, name: string) =>
    delays(seed, { name, latencyMs: 200, jitterMs: 100 });
  const [dropped, delayed] = [drops(42, "db"), jitters(42, "db")];
  for (const [seed, name] of OTHERS) {
    const other = drops(seed, name);
    const agreed = other.filter((kind, i) => kind === dropped[i]).length;
    assertShare(agreed, COUNT, 0.5);
    const related = correlation(delayed, jitters(seed, name));
    assertLess(Math.abs(related), 4 / Math.sqrt(COUNT));
  }
});

Deno.test("neighbouring connections have nothing to do with each other", () => {
  for (const seed of SEEDS) {
    const delayed = delays(seed, { latencyMs: 200, jitterMs: 100 });
    const dropped = decisions(seed, { dropRate: 0.5 })
      .map(({ kind }) => Number(kind === "drop"));
    const held = decisions(seed, { timeoutRate: 0.5 })
      .map(({ kind }) => Number(kind === "timeout"));
    for (const lag of [1, 2, 10, 64, 100, 256]) {
      for (const draws of [delayed, dropped, held]) {
        const related = correlation(draws.slice(lag), draws.slice(0, -lag));
        assertLess(Math.abs(related), 4 / Math.sqrt(COUNT - lag));
      }
    }
    for (
      const [a, b] of [[delayed, dropped], [delayed, held], [dropped, held]]
    ) {
      assertLess(Math.abs(correlation(a, b)), 4 / Math.sqrt(COUNT));
    }
  }
});

Deno.test("seeds in a row are as good as any", () => {
  const route = routeWith({ dropRate: 0.05, latencyMs: 200, jitterMs: 100 });
  const first = Array.from({ length: COUNT }, (_, i) => decide(i, route, 1));
  assertShare(count(first, "drop"), COUNT, 0.05);
  const delayed = first.flatMap((decision) =>
    decision.kind === "forward" ? [decision.delayMs] : []
  );
  const late = delayed.filter((delay) => delay > 200).length;
  assertShare(late, delayed.length, 0.5);
  const related = correlation(delayed.slice(1), delayed.slice(0, -1));
  assertLess(Math.abs(related), 4 / Math.sqrt(delayed.length));
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
  const route = routeWith({
    name: "golden",
    dropRate: 0.2,
    timeoutRate: 0.2,
    latencyMs: 150,
    jitterMs: 50,
  });
  const first = GOLDEN.map((_, i) => {
    const decision = decide(42, route, i + 1);
    return decision.kind === "forward" ? decision.delayMs : decision.kind;
  });
  assertEquals(first, GOLDEN);
});

const FAULTS: Partial<RouteOptions> = {
  name: "db",
  dropRate: 0.2,
  timeoutRate: 0.2,
  timeoutMs: 1,
  latencyMs: 2,
  jitterMs: 2,
};

/** The decisions by connection number, as the proxy logged them. */
async function fatesSeen(
  seed: number,
  connections: number,
  atOnce: number,
): Promise<Decision[]> {
  await using upstream = echo();
  await using watched = await WatchedProxy.to(upstream, FAULTS, { seed });
  for (let done = 0; done < connections; done += atOnce) {
    await Promise.all(
      Array.from({ length: atOnce }, () => converse(watched)),
    );
  }
  const closed = await watched.log.first("closed", connections);
  assertEquals(watched.log.of("accepted").length, connections);
  const seen: Decision[] = closed.map(() => ({
    kind: "forward",
    delayMs: 0,
    toxics: [],
  }));
  for (const { connection } of watched.log.of("dropped")) {
    seen[connection - 1] = { kind: "drop" };
  }
  for (const { connection } of watched.log.of("timed_out")) {
    seen[connection - 1] = { kind: "timeout" };
  }
  for (const { connection, delayMs } of watched.log.of("delayed")) {
    seen[connection - 1] = { kind: "forward", delayMs, toxics: [] };
  }
  const forwarded = seen.filter(({ kind }) => kind === "forward").length;
  assertEquals(watched.log.of("connected").length, forwarded);
  assertEquals(upstream.accepted, forwarded);
  return seen;
}

/** Connects, says something, and waits for the end. */
async function converse(watched: WatchedProxy): Promise<void> {
  using client = await watched.connect();
  try {
    await send(client, "hello");
    await client.closeWrite();
    await readAll(client);
  } catch (error) {
    if (!isDisconnect(error)) throw error;
  }
}

Deno.test("connection by connection, one at a time as 100 at once", async () => {
  const [oneByOne, together, other] = await Promise.all([
    fatesSeen(42, 300, 1),
    fatesSeen(42, 300, 100),
    fatesSeen(43, 300, 100),
  ]);
  const route = routeWith(FAULTS);
  const decided = oneByOne.map((_, i) => decide(42, route, i + 1));
  assertEquals(oneByOne, decided);
  assertEquals(together, decided);
  assertEquals(other, other.map((_, i) => decide(43, route, i + 1)));
  const kinds = new Set(decided.map(({ kind }) => kind));
  assertEquals(kinds, new Set(["drop", "timeout", "forward"]));
  const agreed = decided.filter((decision, i) =>
    decision.kind === other[i].kind
  );
  assertLess(agreed.length, 200);
});
