import {
  assert,
  assertEquals,
  assertGreater,
  assertGreaterOrEqual,
  assertLess,
  assertLessOrEqual,
  assertThrows,
} from "@std/assert";
import {
  beginToxic,
  ConfigError,
  decide,
  parseConfig,
  type TimedChunk,
  type ToxicOptions,
  type ToxicType,
} from "../main.ts";
import { Cli, TempFile, testBytes } from "./helpers.ts";

interface Cut {
  at: number;
  how: "close" | "reset";
}

/** What comes of a connection that opens at 0 and is given these. */
function through(
  options: ToxicOptions,
  given: TimedChunk[],
  seed = 1,
): { passed: TimedChunk[]; cuts: Cut[] } {
  const passed: TimedChunk[] = [];
  const cuts: Cut[] = [];
  const effect = beginToxic(options, seed, {
    pass: (timed) => passed.push({ ...timed }),
    cut: (at, how) => cuts.push({ at, how }),
  });
  effect.open?.(0);
  for (const each of given) effect.take(each);
  return { passed, cuts };
}

function chunk(at: number, length: number, seed = 1): TimedChunk {
  return { at, what: testBytes(length, seed) };
}

function sizeOf({ what }: TimedChunk): number {
  return typeof what === "string" ? 0 : what.length;
}

function bytesOf(timed: TimedChunk[]): number[] {
  return timed.flatMap(({ what }) =>
    typeof what === "string" ? [] : Array.from(what)
  );
}

/** Where two of the same length differ. */
function differences(a: number[], b: number[]): number[] {
  assertEquals(a.length, b.length);
  return a.flatMap((byte, i) => byte === b[i] ? [] : [i]);
}

/** The same bytes, cut up otherwise. */
function split({ at, what }: TimedChunk, size: number): TimedChunk[] {
  if (typeof what === "string") return [{ at, what }];
  const count = Math.ceil(what.length / size);
  return Array.from({ length: count }, (_, i) => ({
    at,
    what: what.slice(i * size, (i + 1) * size),
  }));
}

/** That a share of so many lies within four standard deviations. */
function assertShare(hits: number, draws: number, share: number): void {
  const deviation = Math.sqrt(draws * share * (1 - share));
  assertLessOrEqual(Math.abs(hits - draws * share), 4 * deviation);
}

Deno.test("latency moves each chunk by so much, and the end", () => {
  const given: TimedChunk[] = [chunk(5, 10), chunk(7, 1), {
    at: 9,
    what: "end",
  }];
  const { passed } = through(
    { type: "latency", attributes: { latency: 100 } },
    given,
  );
  assertEquals(passed.map(({ at }) => at), [105, 107, 109]);
  assertEquals(passed.map(({ what }) => what), given.map(({ what }) => what));
});

Deno.test("jitter is uniform around the latency, and repeats with the seed", () => {
  const given = Array.from({ length: 5000 }, (_, i) => chunk(i, 1));
  const delays = (seed: number) =>
    through(
      { type: "latency", attributes: { latency: 100, jitter: 20 } },
      given,
      seed,
    ).passed.map(({ at }, i) => at - i);
  const found = delays(1);
  for (const delay of found) {
    assertGreaterOrEqual(delay, 80);
    assertLessOrEqual(delay, 120);
  }
  const mean = found.reduce((sum, each) => sum + each) / found.length;
  assertLess(Math.abs(mean - 100), 4 * 20 / Math.sqrt(3 * found.length));
  for (let low = 80; low < 120; low += 4) {
    const inside = found.filter((each) => each >= low && each < low + 4).length;
    assertShare(inside, found.length, 0.1);
  }
  assertEquals(delays(1), found);
  assert(delays(2).some((each, i) => each !== found[i]));
});

Deno.test("jitter makes no delay negative", () => {
  const given = Array.from({ length: 1000 }, () => chunk(50, 1));
  const { passed } = through(
    { type: "latency", attributes: { latency: 0, jitter: 20 } },
    given,
  );
  assert(passed.every(({ at }) => at >= 50));
});

for (const rate of [10, 100, 1000, 10_000]) {
  Deno.test(`bandwidth of ${rate} KB/s is even`, () => {
    const total = rate * 5000; // bytes in 5 s
    const whole = chunk(0, total);
    for (const given of [[whole], split(whole, 65_536)]) {
      const { passed } = through(
        { type: "bandwidth", attributes: { rate } },
        given,
      );
      assertEquals(passed.reduce((sum, each) => sum + sizeOf(each), 0), total);
      assertLess(Math.abs(passed.at(-1)!.at - 5000), 1e-3);
      // In no window, wherever it begins, more than 1.5 times its share.
      let [first, carried] = [0, 0];
      for (const each of passed) {
        carried += sizeOf(each);
        while (passed[first].at <= each.at - 250) {
          carried -= sizeOf(passed[first++]);
        }
        assertLess(carried, 1.5 * rate * 250);
        assertLessOrEqual(sizeOf(each), rate * 10); // dribbles, in 10 ms
      }
    }
  });
}

Deno.test("bandwidth does not save up what was not used", () => {
  const { passed } = through(
    { type: "bandwidth", attributes: { rate: 100 } },
    [chunk(0, 1000), chunk(1000, 1000), { at: 1001, what: "end" }],
  );
  assertEquals(passed.filter(({ at }) => at > 10.001)[0].at > 1000, true);
  assertLess(Math.abs(passed.at(-1)!.at - 1010), 1e-6);
});

Deno.test("bandwidth of 0 holds all data, and the end behind it alone", () => {
  const hold: ToxicOptions = { type: "bandwidth", attributes: { rate: 0 } };
  const end: TimedChunk = { at: 9, what: "end" };
  const data = chunk(5, 100_000);
  assertEquals(through(hold, [data, chunk(7, 1), end]).passed, [
    { ...data, at: Infinity },
    { ...chunk(7, 1), at: Infinity },
    { ...end, at: Infinity },
  ]);
  assertEquals(through(hold, [end]).passed, [end]);
});

Deno.test("slow_close delays the end alone", () => {
  const { passed } = through(
    { type: "slow_close", attributes: { delay: 300 } },
    [chunk(1, 5), { at: 2, what: "end" }],
  );
  assertEquals(passed.map(({ at }) => at), [1, 302]);
});

Deno.test("timeout lets nothing through, and closes in time", () => {
  const given: TimedChunk[] = [chunk(1, 5), { at: 2, what: "end" }];
  assertEquals(
    through({ type: "timeout", attributes: { timeout: 300 } }, given),
    {
      passed: [{ at: Infinity, what: "end" }],
      cuts: [{ at: 300, how: "close" }],
    },
  );
  assertEquals(through({ type: "timeout" }, given), {
    passed: [{ at: 2, what: "end" }],
    cuts: [],
  });
});

Deno.test("reset_peer resets after the first data or the end, once", () => {
  const reset: ToxicOptions = {
    type: "reset_peer",
    attributes: { timeout: 50 },
  };
  const cuts: Cut[] = [{ at: 60, how: "reset" }];
  assertEquals(through(reset, []), { passed: [], cuts: [] });
  assertEquals(through(reset, [chunk(10, 1), chunk(20, 1)]).cuts, cuts);
  assertEquals(through(reset, [{ at: 10, what: "end" }]).cuts, cuts);
});

Deno.test("slicer cuts where the seed says, however the bytes come in", () => {
  const options: ToxicOptions = {
    type: "slicer",
    attributes: { average_size: 100, size_variation: 40, delay: 500 },
  };
  const whole = chunk(0, 100_000);
  const sizes = (given: TimedChunk[]) => {
    const { passed } = through(options, given);
    assertEquals(bytesOf(passed), bytesOf([whole]));
    return passed.map(sizeOf);
  };
  const atOnce = sizes([whole]);
  for (const size of atOnce.slice(0, -1)) {
    assertGreaterOrEqual(size, 60);
    assertLessOrEqual(size, 140);
  }
  assertLess(Math.abs(100_000 / atOnce.length - 100), 5);
  const ends = (pieces: number[]) => {
    let end = 0;
    return pieces.map((each) => end += each);
  };
  const others = new Set(ends(sizes(split(whole, 777))));
  assert(ends(atOnce).every((end) => others.has(end)));
});

Deno.test("slicer spaces its pieces", () => {
  const { passed } = through(
    { type: "slicer", attributes: { average_size: 10, delay: 500 } },
    [chunk(1, 35), { at: 1, what: "end" }],
  );
  assertEquals(passed.map(({ at }) => at), [1, 1.5, 2, 2.5, 3]);
  assertEquals(passed.map(sizeOf), [10, 10, 10, 5, 0]);
});

Deno.test("limit_data closes behind the last byte it lets through", () => {
  const limit = (bytes: number, given: TimedChunk[]) =>
    through({ type: "limit_data", attributes: { bytes } }, given).passed;
  const data = testBytes(10);
  assertEquals(limit(7, [{ at: 1, what: data }, chunk(2, 10)]), [
    { at: 1, what: data.subarray(0, 7) },
    { at: 1, what: "close" },
  ]);
  assertEquals(limit(10, [{ at: 1, what: data }]).at(-1)?.what, "close");
  assertEquals(limit(11, [{ at: 1, what: data }]).length, 1);
  assertEquals(limit(0, [chunk(1, 3)]), [{ at: 1, what: "close" }]);
});

Deno.test("packet_loss loses the share that is asked for", () => {
  const given = Array.from({ length: 20_000 }, (_, i) => chunk(i, 1));
  const kept = (seed: number) =>
    through(
      { type: "packet_loss", attributes: { loss_rate: 0.2 } },
      given,
      seed,
    ).passed.map(({ at }) => at);
  assertShare(20_000 - kept(1).length, 20_000, 0.2);
  assertEquals(kept(1), kept(1));
  assert(kept(2).join() !== kept(1).join());
});

Deno.test("correlation makes losses come in runs", () => {
  const [loss, correlation, count] = [0.1, 0.5, 50_000];
  const given = Array.from({ length: count }, (_, i) => chunk(i, 1));
  const { passed } = through({
    type: "packet_loss",
    attributes: { loss_rate: loss, correlation },
  }, given);
  const kept = new Set(passed.map(({ at }) => at));
  let [afterLoss, lostAgain] = [0, 0];
  for (let i = 1; i < count; i++) {
    if (kept.has(i - 1)) continue;
    afterLoss++;
    if (!kept.has(i)) lostAgain++;
  }
  assertShare(lostAgain, afterLoss, loss + correlation * (1 - loss));
});

Deno.test("corrupt flips one bit in the share of bytes that is asked for", () => {
  const whole = chunk(0, 200_000);
  const before = bytesOf([whole]);
  const after = (given: TimedChunk[], rate: number, seed = 1) =>
    bytesOf(
      through({ type: "corrupt", attributes: { rate } }, given, seed).passed,
    );
  const copy = () => split(whole, 200_000);
  const changed = after(copy(), 0.01);
  const flipped = differences(changed, before);
  assertShare(flipped.length, before.length, 0.01);
  for (const i of flipped) {
    assertEquals((changed[i] ^ before[i]).toString(2).replaceAll("0", ""), "1");
  }
  assertEquals(after(split(whole, 999), 0.01), changed);
  assertGreater(differences(after(copy(), 0.01, 2), changed).length, 0);
  assertEquals(after(copy(), 0), before);
  assertEquals(differences(after(copy(), 1), before).length, before.length);
});

Deno.test("limit_time closes by the clock, and lets all through until then", () => {
  const given: TimedChunk[] = [chunk(1, 5), { at: 2, what: "end" }];
  assertEquals(
    through({ type: "limit_time", attributes: { time: 200 } }, given),
    { passed: given, cuts: [{ at: 200, how: "close" }] },
  );
});

function problemsOf(toxics: unknown): readonly string[] {
  const routes = [{ localPort: 1, upstream: "a:1", toxics }];
  return assertThrows(
    () => parseConfig(JSON.stringify({ routes }), "config.json"),
    ConfigError,
  ).problems;
}

Deno.test("a toxic's config is checked, with paths", () => {
  const at = "routes[0].toxics";
  const wrong: [toxic: unknown, problem: string][] = [
    [
      {},
      "type: missing; expected latency or bandwidth or slow_close or " +
      "timeout or reset_peer or slicer or limit_data or packet_loss or " +
      "corrupt or limit_time or noop",
    ],
    [
      { type: "latency", attributes: { latensy: 5 } },
      "attributes.latensy: unknown key; did you mean latency?",
    ],
    [
      { type: "latency", attributes: { latency: "5" } },
      'attributes.latency: expected an integer from 0 to 2147483647, found "5"; remove the quotes',
    ],
    [
      { type: "slicer" },
      "attributes.average_size: missing; expected an integer from 1 to 9007199254740991",
    ],
    [
      { type: "bandwidth" },
      "attributes.rate: missing; expected an integer from 0 to 9007199254740991, in KB/s; 0 holds all data",
    ],
    [
      { type: "latency", attributes: 5 },
      "attributes: expected a mapping, found 5",
    ],
    [
      { type: "latency", stream: "up" },
      'stream: expected upstream or downstream, found "up"',
    ],
    [
      { type: "latency", toxicity: 2 },
      "toxicity: expected a number from 0 to 1, found 2",
    ],
  ];
  assertEquals(
    problemsOf(wrong.map(([toxic], i) => ({ name: `${i}`, ...Object(toxic) }))),
    wrong.map(([, problem], i) => `${at}[${i}].${problem}`),
  );
  assertEquals(problemsOf([{ type: "timeout" }, { type: "timeout" }]), [
    `${at}[1].name: timeout_downstream is already taken by ${at}[0]`,
  ]);
  assertEquals(problemsOf(5), [
    `${at}: expected a list of toxics, 500 at most, found 5`,
  ]);
});

Deno.test("toxicity decides by connection, beside the other decisions", () => {
  const toxics = [
    { type: "latency", toxicity: 0 },
    { type: "latency", name: "some", toxicity: 0.3 },
    { type: "latency", stream: "upstream" },
  ];
  const [route] = parseConfig(
    JSON.stringify({
      routes: [{ localPort: 1, upstream: "a:1", dropRate: 0.2, toxics }],
    }),
    "config.json",
  ).routes;
  const decisions = Array.from(
    { length: 10_000 },
    (_, i) => decide(7, route, i),
  );
  const forwarded = decisions.filter((decision) => decision.kind === "forward");
  assertShare(forwarded.length, decisions.length, 0.8);
  const acting = forwarded.map(({ toxics }) => toxics.map(({ name }) => name));
  const some = acting.filter((names) => names.includes("some")).length;
  assertShare(some, forwarded.length, 0.3);
  assert(acting.every((names) => names.includes("latency_upstream")));
  assert(acting.every((names) => !names.includes("latency_downstream")));
});

/** All of them, each so that it lets all through unless that is against its nature. */
const ALL: Record<ToxicType, Record<string, number>> = {
  latency: { latency: 10, jitter: 5 },
  bandwidth: { rate: 100 },
  slow_close: { delay: 10 },
  timeout: { timeout: 10 },
  reset_peer: { timeout: 10 },
  slicer: { average_size: 10, size_variation: 5, delay: 10 },
  limit_data: { bytes: 1_000_000 },
  packet_loss: { loss_rate: 0.2, correlation: 0.5 },
  corrupt: { rate: 0.01 },
  limit_time: { time: 10 },
  noop: {},
};
const TYPES = Object.keys(ALL) as ToxicType[];

for (const last of ["end", "close"] as const) {
  Deno.test(`what comes last, ${last}, leaves last`, () => {
    for (const type of TYPES) {
      const given: TimedChunk[] = [chunk(1, 100), chunk(2, 30), {
        at: 3,
        what: last,
      }];
      const { passed } = through({ type, attributes: ALL[type] }, given);
      if (type === "reset_peer" || type === "timeout") continue; // cut anyhow
      assertEquals(passed.at(-1)?.what, last, type);
      const ends = passed.filter(({ what }) => typeof what === "string");
      assertEquals(ends.length, 1, type);
      if (type === "latency") continue; // jitter: the link keeps the order
      const times = passed.map(({ at }) => at);
      assertEquals(times, times.toSorted((a, b) => a - b), type);
      assertGreaterOrEqual(times[0], 1, type);
    }
  });
}

Deno.test("slow_close and jitter leave a toxic's close alone", () => {
  const given: TimedChunk[] = [{ at: 5, what: "close" }];
  const slow: ToxicOptions = { type: "slow_close", attributes: { delay: 300 } };
  assertEquals(through(slow, given).passed, given);
  const jitter: ToxicOptions = {
    type: "latency",
    attributes: { latency: 100, jitter: 90 },
  };
  assertEquals(through(jitter, given).passed, [{ at: 105, what: "close" }]);
});

Deno.test("timeout does not hold back another toxic's close", () => {
  const given: TimedChunk[] = [{ at: 5, what: "close" }];
  assertEquals(through({ type: "timeout" }, given).passed, given);
});

Deno.test("what does no harm by default lets all through, on time", () => {
  const given: TimedChunk[] = [chunk(1, 5), chunk(2, 5), {
    at: 3,
    what: "end",
  }];
  for (const type of ["latency", "slow_close"] as const) {
    assertEquals(through({ type }, given), { passed: given, cuts: [] }, type);
  }
});

Deno.test("the seed alone decides what is random", () => {
  const random: ToxicType[] = ["latency", "slicer", "packet_loss", "corrupt"];
  const result = (type: ToxicType, seed: number, name?: string) => {
    const given = Array.from({ length: 200 }, (_, i) => chunk(i, 50, i + 1));
    const options = { type, attributes: ALL[type], ...name && { name } };
    const { passed } = through(options, given, seed);
    return JSON.stringify(passed.map(({ at, what }) => [at, what.toString()]));
  };
  for (const type of TYPES) {
    assertEquals(result(type, 1), result(type, 1), type);
    const differs = random.includes(type);
    assertEquals(result(type, 1) !== result(type, 2), differs, type);
    // Two of a type on a route each have a stream of their own.
    assertEquals(result(type, 1) !== result(type, 1, "two"), differs, type);
  }
});

Deno.test("bandwidth goes on where the chunk before stopped", () => {
  const { passed } = through(
    { type: "bandwidth", attributes: { rate: 100 } },
    [chunk(0, 1500), chunk(0, 1500), chunk(100, 500)],
  );
  assertEquals(passed.map(sizeOf), [1000, 500, 1000, 500, 500]);
  const times = passed.map(({ at }) => Number(at.toFixed(6)));
  assertEquals(times, [10, 15, 25, 30, 105]);
});

Deno.test("slicer never makes an empty piece, however large the variation", () => {
  const { passed } = through(
    { type: "slicer", attributes: { average_size: 5, size_variation: 50 } },
    [chunk(0, 20_000)],
  );
  const sizes = passed.slice(0, -1).map(sizeOf);
  assert(sizes.every((size) => size >= 1 && size <= 55));
  assert(sizes.includes(1) && sizes.some((size) => size > 50));
  assertEquals(passed.reduce((sum, each) => sum + sizeOf(each), 0), 20_000);
});

Deno.test("slicer's sizes are uniform around their average", () => {
  const { passed } = through(
    { type: "slicer", attributes: { average_size: 100, size_variation: 40 } },
    [chunk(0, 1_000_000)],
  );
  const sizes = passed.slice(0, -1).map(sizeOf);
  const mean = sizes.reduce((sum, each) => sum + each) / sizes.length;
  assertLess(Math.abs(mean - 100), 4 * 80 / Math.sqrt(12 * sizes.length));
  for (let low = 61; low < 140; low += 10) {
    const inside = sizes.filter((each) => each >= low && each < low + 10);
    if (low < 131) assertShare(inside.length, sizes.length, 10 / 80);
  }
});

Deno.test("slicer spaces pieces across chunks, and does not save up", () => {
  const { passed } = through(
    { type: "slicer", attributes: { average_size: 10, delay: 1000 } },
    [chunk(0, 20), chunk(0, 20), chunk(50, 10), { at: 50, what: "end" }],
  );
  assertEquals(passed.map(({ at }) => at), [0, 1, 2, 3, 50, 51]);
});

Deno.test("timeout and limit_time count from the opening", () => {
  const toxics: ToxicOptions[] = [
    { type: "timeout", attributes: { timeout: 30 } },
    { type: "limit_time", attributes: { time: 30 } },
  ];
  for (const options of toxics) {
    const cuts: Cut[] = [];
    const effect = beginToxic(options, 1, {
      pass: () => {},
      cut: (at, how) => cuts.push({ at, how }),
    });
    assertEquals(cuts, []);
    effect.open?.(1000);
    assertEquals(cuts, [{ at: 1030, how: "close" }]);
  }
});

Deno.test("limit_data counts over chunks, and lets a shorter stream end", () => {
  const limit: ToxicOptions = { type: "limit_data", attributes: { bytes: 25 } };
  const chunks = [1, 2, 3, 4].map((at) => chunk(at, 10, at));
  const { passed, cuts } = through(limit, [...chunks, { at: 5, what: "end" }]);
  assertEquals(passed.map(({ at }) => at), [1, 2, 3, 3]);
  assertEquals(passed.map(sizeOf), [10, 10, 5, 0]);
  assertEquals(bytesOf(passed), bytesOf(chunks).slice(0, 25));
  assertEquals([passed.at(-1)?.what, cuts], ["close", []]);
  const short: TimedChunk[] = [chunks[0], { at: 5, what: "end" }];
  assertEquals(through(limit, short).passed, short);
  const nothing: TimedChunk[] = [{ at: 5, what: "end" }];
  assertEquals(through({ type: "limit_data" }, nothing).passed, nothing);
});

Deno.test("losses are as many and as long as their model says", () => {
  for (const [loss, correlation] of [[0.1, 0], [0.1, 0.5], [0.3, 0.8]]) {
    const count = 50_000;
    const given = Array.from({ length: count }, (_, i) => chunk(i, 1));
    const { passed } = through({
      type: "packet_loss",
      attributes: { loss_rate: loss, correlation },
    }, given);
    const kept = new Set(passed.map(({ at }) => at));
    const runs: number[] = [];
    for (let i = 0, run = 0; i <= count; i++) {
      if (i < count && !kept.has(i)) run++;
      else if (run > 0) [run] = [0, runs.push(run)];
    }
    // After a loss another follows with this probability: runs are geometric.
    const again = loss + correlation * (1 - loss);
    for (let length = 1; length <= 3; length++) {
      const share = again ** (length - 1) * (1 - again);
      assertShare(
        runs.filter((run) => run === length).length,
        runs.length,
        share,
      );
    }
    const mean = runs.reduce((sum, each) => sum + each) / runs.length;
    const deviation = Math.sqrt(again / runs.length) / (1 - again);
    assertLess(Math.abs(mean - 1 / (1 - again)), 4 * deviation);
    // A run begins after each chunk that is kept with the plain rate.
    assertShare(runs.length, kept.size, loss);
  }
});

Deno.test("packet_loss knows never and always, and loses no end", () => {
  const given = Array.from({ length: 1000 }, (_, i) => chunk(i, 1));
  const kept = (loss_rate: number, correlation: number) =>
    through(
      { type: "packet_loss", attributes: { loss_rate, correlation } },
      [...given, { at: 1000, what: "end" }],
    ).passed.length - 1;
  assertEquals(kept(0, 1), 1000);
  assertEquals(kept(1, 0), 0);
  assertLess(kept(0.1, 1), 200); // the first loss is for ever
});

Deno.test("corrupt flips each of the eight bits alike", () => {
  const before = bytesOf([chunk(0, 100_000)]);
  const { passed } = through(
    { type: "corrupt", attributes: { rate: 0.5 } },
    [chunk(0, 100_000)],
  );
  const after = bytesOf(passed);
  const flipped = differences(after, before);
  for (let bit = 0; bit < 8; bit++) {
    const hits = flipped.filter((i) => (after[i] ^ before[i]) === 1 << bit);
    assertShare(hits.length, flipped.length, 1 / 8);
  }
});

Deno.test("corrupt with next to no rate flips nothing, and comes to an end", () => {
  for (const rate of [1e-12, 1e-16, 1e-17, Number.MIN_VALUE]) {
    const what = testBytes(10);
    let looks = 0;
    Object.defineProperty(what, "length", {
      get() {
        if (++looks > 1000) throw new Error(`no end with a rate of ${rate}`);
        return 10;
      },
    });
    const effect = beginToxic({ type: "corrupt", attributes: { rate } }, 1, {
      pass: () => {},
      cut: () => {},
    });
    effect.take({ at: 0, what });
    assertEquals(Array.from(what), Array.from(testBytes(10)));
  }
});

function routeWith(toxics: unknown, more = {}) {
  const routes = [{ localPort: 1, upstream: "a:1", toxics, ...more }];
  return parseConfig(JSON.stringify({ routes }), "config.json").routes[0];
}

Deno.test("a toxic's defaults are filled in", () => {
  const toxics: ToxicOptions[] = [
    { type: "latency" },
    { type: "latency", stream: "upstream" },
    { type: "packet_loss", toxicity: 0.5 },
    { type: "slicer", name: "s", attributes: { average_size: 7 } },
  ];
  const [down, up] = ["downstream", "upstream"] as const;
  const latency = { latency: 0, jitter: 0 };
  assertEquals(
    routeWith(toxics).toxics.map((
      { name, type, stream, toxicity, attributes },
    ) => [name, type, stream, toxicity, { ...attributes }]),
    [
      ["latency_downstream", "latency", down, 1, latency],
      ["latency_upstream", "latency", up, 1, latency],
      ["packet_loss_downstream", "packet_loss", down, 0.5, {
        loss_rate: 0.1,
        correlation: 0,
      }],
      ["s", "slicer", down, 1, {
        average_size: 7,
        size_variation: 0,
        delay: 0,
      }],
    ],
  );
});

Deno.test("every attribute of every type is checked", () => {
  for (const type of TYPES) {
    for (const key of Object.keys(ALL[type])) {
      for (const bad of [-1, "x", true, null, [], {}]) {
        const attributes = { ...ALL[type], [key]: bad };
        const problems = problemsOf([{ type, attributes }]);
        assertEquals(problems.length, 1, `${type}.${key}`);
        const [problem] = problems;
        assert(
          problem.startsWith(`routes[0].toxics[0].attributes.${key}: expected`),
          problem,
        );
      }
    }
    const [unknown] = problemsOf([
      { type, attributes: { ...ALL[type], constructor: 1 } },
    ]);
    assert(unknown.startsWith("routes[0].toxics[0].attributes.constructor: "));
  }
});

Deno.test("a toxic that is none is told as what it is", () => {
  const at = "routes[0].toxics";
  assertEquals(
    problemsOf([5, null, []]),
    ["5", "null", "a list"].map((found, i) =>
      `${at}[${i}]: expected a mapping with type, found ${found}`
    ),
  );
  const unknown = ["constructor", "lattency", "Latency"];
  problemsOf(unknown.map((type) => ({ type }))).forEach((problem, i) => {
    for (const known of TYPES) assert(problem.includes(known), problem);
    assert(problem.startsWith(`${at}[${i}].type: expected `), problem);
    const meant = i === 0 ? "" : "; did you mean latency?";
    assert(problem.endsWith(`found "${unknown[i]}"${meant}`), problem);
  });
  assertEquals(
    problemsOf([{ type: "latency" }, {
      type: "timeout",
      name: "latency_downstream",
    }]),
    [`${at}[1].name: latency_downstream is already taken by ${at}[0]`],
  );
});

Deno.test("toxics change no other decision, and are independent", () => {
  const faults = {
    dropRate: 0.2,
    timeoutRate: 0.1,
    latencyMs: 50,
    jitterMs: 20,
  };
  const toxics: ToxicOptions[] = [
    { type: "latency", name: "a", toxicity: 0.5 },
    { type: "latency", name: "b", toxicity: 0.5 },
    { type: "latency", name: "always" },
    { type: "latency", name: "never", toxicity: 0 },
  ];
  const numbers = Array.from({ length: 10_000 }, (_, i) => i + 1);
  const decisions = (toxics: ToxicOptions[], seed = 7) => {
    const route = routeWith(toxics, faults);
    return numbers.map((number) => decide(seed, route, number));
  };
  const found = decisions(toxics);
  assertEquals(
    found.map((decision) =>
      decision.kind === "forward" ? { ...decision, toxics: [] } : decision
    ),
    decisions([]),
  );
  assertEquals(decisions(toxics), found);
  const forwarded = found.filter((decision) => decision.kind === "forward");
  const acting = forwarded.map(({ toxics }) => toxics.map(({ name }) => name));
  const share = (...names: string[]) =>
    acting.filter((each) => names.every((name) => each.includes(name))).length;
  assertShare(share("a"), acting.length, 0.5);
  assertShare(share("b"), acting.length, 0.5);
  assertShare(share("a", "b"), acting.length, 0.25);
  assertEquals([share("always"), share("never")], [acting.length, 0]);
  const late = forwarded.filter(({ delayMs }) => delayMs > 50);
  const lateWithA = late.filter(({ toxics }) => toxics[0].name === "a");
  assertShare(lateWithA.length, late.length, 0.5);
  assert(JSON.stringify(decisions(toxics, 8)) !== JSON.stringify(found));
});

Deno.test({
  name: "--check says in words what toxics do",
  sanitizeOps: true,
  sanitizeResources: true,
  async fn() {
    const toxics: ToxicOptions[] = [
      { type: "latency", attributes: { latency: 100, jitter: 20 } },
      {
        type: "bandwidth",
        stream: "upstream",
        toxicity: 0.25,
        attributes: { rate: 64 },
      },
      { type: "bandwidth", attributes: { rate: 0 } },
      { type: "slow_close", attributes: { delay: 5 } },
      { type: "timeout" },
      { type: "reset_peer", attributes: { timeout: 7 } },
      {
        type: "slicer",
        attributes: { average_size: 10, size_variation: 2, delay: 30 },
      },
      { type: "limit_data", attributes: { bytes: 9 } },
      { type: "packet_loss", attributes: { correlation: 0.5 } },
      { type: "corrupt" },
      { type: "limit_time", toxicity: 0, attributes: { time: 8 } },
    ];
    await using file = await TempFile.with(
      JSON.stringify({ routes: [{ localPort: 1, upstream: "a:1", toxics }] }),
      ".json",
    );
    await using cli = new Cli("--check", file.path);
    assertEquals((await cli.status).code, 0, cli.stderr);
    const every = "on every connection";
    const words = [
      `downstream: +100±20 ms ${every}`,
      "upstream: 64 KB/s on 25% of connections",
      `downstream: holds all data ${every}`,
      `downstream: ends 5 ms late ${every}`,
      `downstream: nothing gets through ${every}`,
      `downstream: reset 7 ms after the first data ${every}`,
      `downstream: in pieces of 10±2 B, 30 µs apart ${every}`,
      `downstream: closed after 9 B ${every}`,
      `downstream: loses 10% of chunks, correlation 50% ${every}`,
      `downstream: flips a bit in 0.1% of bytes ${every}`,
      "downstream: closed after 8 ms on 0% of connections",
    ];
    assert(cli.stdout.includes(words.join(", ")), cli.stdout);
  },
});

/** A toxic that is begun and opened at 100, and what it does from then on. */
function begun(options: ToxicOptions) {
  const passed: TimedChunk[] = [];
  const cuts: Cut[] = [];
  const effect = beginToxic(options, 1, {
    pass: (timed) => passed.push({ ...timed }),
    cut: (at, how) => cuts.push({ at, how }),
  });
  effect.open?.(100);
  /** What comes of these from now on, as times and sizes. */
  const give = (...given: TimedChunk[]) => {
    passed.length = 0;
    for (const each of given) effect.take(each);
    return passed.map(({ at, what }) => [
      Number(at.toFixed(6)),
      typeof what === "string" ? what : what.length,
    ]);
  };
  return { effect, passed, cuts, give };
}

Deno.test("a changed latency or slow_close is that of what comes again", () => {
  const latency = begun({ type: "latency", attributes: { latency: 500 } });
  assertEquals(latency.give(chunk(110, 5)), [[610, 5]]);
  latency.effect.change({ latency: 50, jitter: 0 }, 300, -Infinity);
  assertEquals(latency.give(chunk(110, 5), chunk(300, 1)), [[160, 5], [
    350,
    1,
  ]]);
  const slow = begun({ type: "slow_close", attributes: { delay: 500 } });
  assertEquals(slow.give({ at: 110, what: "end" }), [[610, "end"]]);
  slow.effect.change({ delay: 50 }, 300, -Infinity);
  assertEquals(slow.give({ at: 110, what: "end" }), [[160, "end"]]);
});

Deno.test("a changed bandwidth goes on behind what has left last", () => {
  const { effect, give } = begun({
    type: "bandwidth",
    attributes: { rate: 100 },
  });
  assertEquals(give(chunk(100, 3000)).map(([at]) => at), [110, 120, 130]);
  effect.change({ rate: 10 }, 115, 110);
  const slower = give(chunk(100, 1000), chunk(100, 1000));
  assertEquals([slower[0], slower.at(-1)], [[120, 100], [310, 100]]);
  effect.change({ rate: 0 }, 200, 200);
  assertEquals(give(chunk(100, 1000)), [[Infinity, 1000]]);
  effect.change({ rate: 10 }, 210, -Infinity);
  assertEquals(give(chunk(100, 100)), [[220, 100]]);
});

Deno.test("a changed slicer cuts anew, behind what has left last", () => {
  const { effect, give } = begun({
    type: "slicer",
    attributes: { average_size: 1000, delay: 5000 },
  });
  assertEquals(give(chunk(100, 300)), [[100, 300]]);
  const attributes = { average_size: 20, size_variation: 0, delay: 2000 };
  effect.change(attributes, 101, 100);
  assertEquals(give(chunk(99, 15), chunk(99, 30)), [
    [102, 15],
    [104, 5],
    [106, 20],
    [108, 5],
  ]);
});

Deno.test("a changed timeout or limit_time counts from its beginning", () => {
  const kinds: [ToxicOptions, string][] = [
    [{ type: "timeout", attributes: { timeout: 500 } }, "timeout"],
    [{ type: "limit_time", attributes: { time: 500 } }, "time"],
  ];
  for (const [options, key] of kinds) {
    const { effect, cuts } = begun(options);
    effect.change({ [key]: 30 }, 400, -Infinity);
    assertEquals(cuts, [{ at: 600, how: "close" }, { at: 130, how: "close" }]);
  }
  const { effect, cuts, give } = begun({ type: "timeout" });
  assertEquals(give({ at: 105, what: "end" }), [[105, "end"]]);
  effect.change({ timeout: 30 }, 110, 105);
  effect.change({ timeout: 0 }, 120, 105);
  assertEquals(cuts.map(({ at }) => at), [130, Infinity]);
});

Deno.test("a timeout that ends closes, with or without data", () => {
  for (const given of [[], [chunk(105, 1)]]) {
    const { effect, give, passed } = begun({ type: "timeout" });
    assertEquals(give(...given), []);
    effect.end?.(110);
    assertEquals(passed, [{ at: 110, what: "close" }]);
  }
});

Deno.test("a changed reset_peer counts from the first that came", () => {
  const { effect, cuts, give } = begun({
    type: "reset_peer",
    attributes: { timeout: 500 },
  });
  effect.change({ timeout: 400 }, 102, -Infinity);
  assertEquals(cuts, []);
  assertEquals(give(chunk(105, 1), chunk(106, 2)), [
    [Infinity, 1],
    [Infinity, 2],
  ]);
  effect.change({ timeout: 30 }, 110, -Infinity);
  assertEquals(give(chunk(105, 1), chunk(106, 2)).length, 2);
  assertEquals(cuts, [{ at: 505, how: "reset" }, { at: 135, how: "reset" }]);
});

Deno.test("a changed limit_data goes on counting, and closes once", () => {
  const { effect, passed, give } = begun({
    type: "limit_data",
    attributes: { bytes: 25 },
  });
  effect.change({ bytes: 0 }, 101, -Infinity);
  assertEquals(passed, []); // as when it begins so
  effect.change({ bytes: 20 }, 102, -Infinity);
  assertEquals(give(chunk(105, 15)), [[105, 15]]);
  effect.change({ bytes: 18 }, 106, 105);
  assertEquals(give(chunk(107, 15)), [[107, 3], [107, "close"]]);
  const full = begun({ type: "limit_data", attributes: { bytes: 25 } });
  full.give(chunk(105, 15));
  full.passed.length = 0;
  full.effect.change({ bytes: 15 }, 110, 105);
  full.effect.change({ bytes: 5 }, 111, 110);
  assertEquals(full.passed, [{ at: 110, what: "close" }]);
  assertEquals(full.give(chunk(112, 3)), []);
});

Deno.test("changed rates are those of what comes next", () => {
  const loss = begun({ type: "packet_loss", attributes: { loss_rate: 0 } });
  assertEquals(loss.give(chunk(1, 1)).length, 1);
  loss.effect.change({ loss_rate: 1, correlation: 0 }, 2, 1);
  assertEquals(loss.give(chunk(3, 1)).length, 0);
  const corrupt = begun({ type: "corrupt", attributes: { rate: 0 } });
  const flips = () => {
    corrupt.give(chunk(1, 100));
    return differences(bytesOf(corrupt.passed), bytesOf([chunk(1, 100)]))
      .length;
  };
  assertEquals(flips(), 0);
  corrupt.effect.change({ rate: 1 }, 2, 1);
  assertEquals(flips(), 100);
  corrupt.effect.change({ rate: 0 }, 3, 1);
  assertEquals(flips(), 0);
});
