/** What is decided follows from the seed, and from the seed alone. */

import { assert, assertEquals, assertGreater, assertLess } from "@std/assert";
import { decide, type Decision, type RouteOptions } from "../main.ts";
import {
  assertShare,
  echo,
  exchange,
  mean,
  routeWith,
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

function count(all: Decision[], kind: string): number {
  return all.filter((decision) => decision.kind === kind).length;
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
    for (const rate of [0, 0.001, 0.01, 0.05, 0.3, 0.5, 0.9, 0.999, 1]) {
      const drops = decisions(seed, { dropRate: rate, timeoutRate: 0.5 });
      assertShare(count(drops, "drop"), COUNT, rate);
      const holds = decisions(seed, { dropRate: 0.25, timeoutRate: rate });
      const notDropped = COUNT - count(holds, "drop");
      assertShare(count(holds, "timeout"), notDropped, rate);
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
    assert(Math.min(...found) >= latencyMs - jitterMs);
    assert(Math.max(...found) <= latencyMs + jitterMs);

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

Deno.test("the seed, the name and the faults of a route decide, and nothing else", () => {
  const options = { ...RATES, ...JITTER };
  const route = routeWith(options);
  const first = decisions(42, options);
  const address = { localPort: 2, host: "::1", upstream: "b:2" };
  const other = { ...address, timeoutMs: 1, connectTimeoutMs: 1 };
  // More than these would take long to compare where they differ.
  const some = decisions(42, { ...options, ...other }, 1000);
  assertEquals(some, first.slice(0, 1000));
  for (let i = COUNT; i > 0; i -= 7) { // in whatever order
    decide(7, route, i);
    assertEquals(decide(42, route, i), first[i - 1]);
  }
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

/** On which of the connections that are forwarded all of these toxics act. */
function whereActing(all: Decision[], ...names: string[]): boolean[] {
  return all.filter((each) => each.kind === "forward").map(({ toxics }) =>
    names.every((name) => toxics.some((each) => each.name === name))
  );
}

Deno.test("toxics change no other decision, and are independent", () => {
  const route = { ...RATES, ...WIDE_JITTER };
  const toxics = [
    toxic("noop name=a toxicity=0.3"),
    toxic("noop name=b toxicity=0.5"),
    toxic("noop name=always"),
    toxic("noop name=never toxicity=0"),
  ];
  const found = decisions(7, { ...route, toxics });
  const plain = found.map((each) =>
    each.kind === "forward" ? { ...each, toxics: [] } : each
  );
  assertEquals(plain, decisions(7, route));
  const hits = (...names: string[]) =>
    whereActing(found, ...names).filter(Boolean).length;
  const forwarded = count(found, "forward");
  assertShare(hits("a"), forwarded, 0.3);
  assertShare(hits("b"), forwarded, 0.5);
  assertShare(hits("a", "b"), forwarded, 0.3 * 0.5);
  assertEquals([hits("always"), hits("never")], [forwarded, 0]);
  const late = found.filter((each) =>
    each.kind === "forward" && each.delayMs > WIDE_JITTER.latencyMs
  );
  const lateWithA = whereActing(late, "a").filter(Boolean);
  assertShare(lateWithA.length, late.length, 0.3);
});

Deno.test("a toxic's name and the seed decide on which connections it acts, not its place", () => {
  const acting = (seed: number, which: string, ...names: string[]) => {
    const toxics = names.map((name) => toxic(`noop toxicity=0.5 name=${name}`));
    return whereActing(decisions(seed, { toxics }), which);
  };
  const found = acting(42, "a", "a");
  assertEquals(acting(42, "a", "b", "c", "a", "d"), found);
  for (const other of [acting(43, "a", "a"), acting(42, "b", "a", "b")]) {
    const agreed = other.filter((acts, i) => acts === found[i]).length;
    assertShare(agreed, COUNT, 0.5);
  }
});

const BRIEF = { timeoutMs: 1, latencyMs: 2, jitterMs: 2 };
const FAULTS = { name: "db", ...RATES, ...BRIEF };
const CONNECTIONS = 300;

/** By connection number, what the proxy logged, and what came back of 50 bytes. */
async function connectionsSeen(seed: number, atOnce: number, name = "inject") {
  const toxics = [
    `inject upstream rate=0.5 bytes=9 name=${name}`,
    "duplicate upstream rate=0.3",
    "packet_loss upstream loss_rate=0.3 burst=2",
    "corrupt upstream rate=0.05",
  ].map(toxic);
  await using upstream = echo();
  const route = { ...FAULTS, toxics };
  await using watched = await WatchedProxy.to(upstream, route, { seed });
  const got: Record<string, string[]> = {}; // by client; a port may come again
  for (let done = 0; done < CONNECTIONS; done += atOnce) {
    await times(atOnce, async () => {
      using client = await watched.connect();
      const answer = await exchange(client, testBytes(50))
        .catch(unlessDisconnected) ?? [];
      (got[`127.0.0.1:${client.localAddr.port}`] ??= []).push(answer.join());
    });
  }
  const { log } = watched;
  await log.first("closed", CONNECTIONS);
  assertEquals(log.of("accepted").length, CONNECTIONS);
  const decided = Array.from({ length: CONNECTIONS }, (_, i): Decision => {
    const isIts = ({ connection }: { connection: number }) =>
      connection === i + 1;
    if (log.of("dropped").some(isIts)) return { kind: "drop" };
    if (log.of("timed_out").some(isIts)) return { kind: "timeout" };
    const delayMs = log.of("delayed").find(isIts)?.delayMs ?? 0;
    return { kind: "forward", delayMs, toxics: [] };
  });
  assertEquals(log.of("connected").length, count(decided, "forward"));
  assertEquals(upstream.accepted, count(decided, "forward"));
  const accepted = log.of("accepted")
    .sort((a, b) => a.connection - b.connection);
  return {
    decided,
    answers: accepted.map(({ client }) => got[client]?.shift()),
  };
}

Deno.test("connection N meets the same at 1, 10 and 100 at once", async () => {
  const [first, ten, hundred, renamed, other] = await Promise.all([
    connectionsSeen(42, 1),
    connectionsSeen(42, 10),
    connectionsSeen(42, 100),
    connectionsSeen(42, 100, "renamed"),
    connectionsSeen(43, 100),
  ]);
  const { decided, answers } = first;
  assertEquals(decided, decisions(42, FAULTS, CONNECTIONS));
  assertEquals(renamed.decided, decided);
  assertEquals(other.decided, decisions(43, FAULTS, CONNECTIONS));
  for (const kind of ["drop", "timeout", "forward"] as const) {
    assertGreater(count(decided, kind), 0);
  }
  const sameKind = decided.filter(({ kind }, i) =>
    kind === other.decided[i]?.kind
  );
  assertLess(sameKind.length, 200);

  assertEquals([ten, hundred], [first, first]);
  const forwarded = count(decided, "forward");
  assertGreater(new Set(answers).size, forwarded / 2);
  for (const { answers: others } of [renamed, other]) {
    const same = others.filter((each, i) => each && each === answers[i]);
    assertLess(same.length, forwarded / 4);
  }
});
