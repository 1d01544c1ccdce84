import { assert, assertEquals, assertLess, assertThrows } from "@std/assert";
import {
  beginToxic,
  ConfigError,
  type TimedChunk,
  type Toxic,
  type ToxicOptions,
  type ToxicType,
} from "../main.ts";
import {
  assertShare,
  casesIn,
  checkConfig,
  defined,
  mean,
  only,
  routeWith,
  sum,
  testBytes,
  toxic,
} from "./helpers.ts";

interface Result {
  passed: TimedChunk[];
  cuts: { at: number; how: "close" | "reset" }[];
}

/** A toxic on a connection that opens at 0, and what comes of it. */
function begin(options: ToxicOptions, seed = 1) {
  const result: Result = { passed: [], cuts: [] };
  const active = beginToxic(options, seed, {
    pass: (timed) => result.passed.push({ ...timed }),
    cut: (at, how) => result.cuts.push({ at, how }),
  });
  return { active, ...result };
}

/** What a toxic passes on of what it is given. */
function through(options: ToxicOptions, given: TimedChunk[], seed = 1) {
  const { active, passed } = begin(options, seed);
  for (const each of given) active.take(each);
  return passed;
}

function chunk(at: number, length: number, seed = 1): TimedChunk {
  return { at, what: testBytes(length, seed) };
}

/** So many chunks of a size, one a millisecond. */
function row(count: number, size = 1): TimedChunk[] {
  return Array.from({ length: count }, (_, at) => chunk(at, size, at + 1));
}

/** `5:10 7:1 9:end` is ten bytes at 5, one at 7, and the end at 9. */
function timed(line: string): TimedChunk[] {
  return line.split(" ").filter((each) => each !== "").map((each, i) => {
    const [at, what] = each.split(":");
    return what === "end" || what === "close"
      ? { at: Number(at), what }
      : chunk(Number(at), Number(what), 2 * i + 1);
  });
}

/** The reverse, and the cuts, all of which are taken: `5:10 9:close 600!reset`. */
function inWords({ passed, cuts }: Result): string {
  return [
    ...passed.splice(0).map((each) =>
      `${Number(each.at.toFixed(6))}:${sizeOf(each) || each.what}`
    ),
    ...cuts.splice(0).map(({ at, how }) => `${at}!${how}`),
  ].join(" ");
}

function sizeOf({ what }: TimedChunk): number {
  return typeof what === "string" ? 0 : what.length;
}

function bytesOf(timed: TimedChunk[]): number[] {
  return timed.flatMap(({ what }) =>
    typeof what === "string" ? [] : Array.from(what)
  );
}

/** The bits by which two of the same length differ, at each byte that does. */
function differences(a: number[], b: number[]): number[] {
  assertEquals(a.length, b.length);
  return a.map((byte, i) => byte ^ defined(b[i])).filter((bits) => bits !== 0);
}

/** So many bytes at 0, in chunks of a size. */
function split(length: number, size: number): TimedChunk[] {
  const bytes = testBytes(length);
  return Array.from({ length: Math.ceil(length / size) }, (_, i) => ({
    at: 0,
    what: bytes.slice(i * size, (i + 1) * size),
  }));
}

/** That numbers are uniform; looks at parts of a width, from one on. */
function assertUniform(
  numbers: number[],
  [low, high]: [number, number],
  width: number,
  from = low,
): void {
  assert(numbers.every((each) => each >= low && each <= high));
  const { length } = numbers;
  const off = mean(numbers) - (low + high) / 2;
  assertLess(Math.abs(off), 4 * (high - low) / Math.sqrt(12 * length));
  for (let at = from; at + width <= high; at += width) {
    const inside = numbers.filter((each) => each >= at && each < at + width);
    assertShare(inside.length, length, width / (high - low));
  }
}

/**
 * Toxics, and then what each gets | what comes of it, any number of times.
 * `@115<110 rate=10` is a change at 115, when what left last was due at 110;
 * `removed 110` is its removal. A line that begins with | goes on.
 */
const CASES = `
latency moves each chunk by so much, and the end
  latency latency=100 | 5:10 7:1 9:end | 105:10 107:1 109:end
latency and slow_close let all through, on time, by default
  latency | 1:5 2:5 3:end | 1:5 2:5 3:end
  slow_close | 1:5 2:5 3:end | 1:5 2:5 3:end
jitter and slow_close leave a toxic's close alone
  latency latency=100 jitter=90 | 5:close | 105:close
  slow_close delay=300 | 5:close | 5:close
a wave swings around the latency, by the time, also for the end
  latency latency=100 wave=sine amplitude=40 period=1000
  | 0:1 250:1 500:1 750:1 1000:1 1250:end
  | 100:1 390:1 600:1 810:1 1100:1 1390:end
  latency latency=100 wave=square amplitude=40 period=1000
  | 0:1 499:1 500:1 999:1 1000:end | 140:1 639:1 639:1 1059:1 1140:end
  latency latency=100 wave=triangle amplitude=40 period=1000
  | 0:1 125:1 250:1 375:1 625:1 750:1 1000:1
  | 100:1 245:1 390:1 495:1 705:1 810:1 1100:1
  latency latency=100 wave=sawtooth amplitude=40 period=1000
  | 0:1 250:1 500:1 750:1 1000:1 | 60:1 330:1 600:1 870:1 1060:1
  latency latency=100 wave=sine amplitude=40 period=1000 phase=0.25
  | 0:1 250:1 750:1 | 140:1 350:1 850:1
a wave makes no delay negative
  latency latency=10 wave=sine amplitude=40 period=1000 | 750:1 | 750:1
bandwidth goes on where the chunk before stopped
  bandwidth rate=100
  | 0:1500 0:1500 100:500 | 10:1000 15:500 25:1000 30:500 105:500
bandwidth does not save up what was not used
  bandwidth rate=100
  | 0:1000 1000:1000 1001:end | 10:1000 1010:1000 1010:end
bandwidth of 0 holds all data, and the end behind it alone
  bandwidth rate=0
  | 5:100000 7:1 9:end | Infinity:100000 Infinity:1 Infinity:end
  bandwidth rate=0 | 9:end | 9:end
a shared bandwidth without a proxy holds all data
  bandwidth rate=100 shared=1 | 5:10 6:end | Infinity:10 Infinity:end
stall holds a packet and what follows, and is what it is changed to
  stall rate=1 duration=100
  | 0:10 5:10 50:end | 100:10 105:10 105:end
  | @60 duration=20 | | 0:10 5:10 50:end | 20:10 25:10 50:end
  | @70<60 rate=0 | | 80:1 | 80:1
random_close delivers what came before, and nothing after
  random_close rate=0
  | 1:5 | 1:5 | @2<1 rate=1 | | 3:7 4:end | 3:close Infinity:7 Infinity:end
  random_close rate=0 reset=1
  | 1:5 | 1:5 | @2<1 rate=1 | | 3:7 4:end | Infinity:7 Infinity:end 3!reset
slow_close delays the end alone
  slow_close delay=300 | 1:5 2:end | 1:5 302:end
timeout lets nothing through, and closes in time
  timeout timeout=300 | 1:5 2:end | Infinity:end 300!close
  timeout | 1:5 2:end | 2:end Infinity!close
timeout does not hold back another toxic's close
  timeout timeout=300 | 5:close | 5:close 300!close
  timeout | 5:close | 5:close Infinity!close
reset_peer resets after the first data or the end, once
  reset_peer timeout=50 | |
  reset_peer timeout=50 | 10:1 20:1 | Infinity:1 Infinity:1 60!reset
  reset_peer timeout=50 | 10:end | Infinity:end 60!reset
slicer spaces its pieces
  slicer average_size=10 delay=500
  | 1:35 1:end | 1:10 1.5:10 2:10 2.5:5 3:end
slicer spaces pieces across chunks, and does not save up
  slicer average_size=10 delay=1000
  | 0:20 0:20 50:10 50:end | 0:10 1:10 2:10 3:10 50:10 51:end
limit_data closes behind the last byte it lets through
  limit_data bytes=7 | 1:10 2:10 | 1:7 1:close
  limit_data bytes=10 | 1:10 | 1:10 1:close
  limit_data bytes=11 | 1:10 | 1:10
  limit_data bytes=0 | 1:3 | 1:close
limit_data counts over chunks, and lets a shorter stream end
  limit_data bytes=25
  | 1:10 2:10 3:10 4:10 5:end | 1:10 2:10 3:5 3:close
  limit_data bytes=25 | 1:10 5:end | 1:10 5:end
  limit_data | 5:end | 5:end
limit_time closes by the clock, and lets all through until then
  limit_time time=200 | 1:5 2:end | 1:5 2:end 200!close
a changed latency or slow_close is that of what comes again
  latency latency=500
  | 10:5 | 510:5 | @200 latency=50 jitter=0 | | 10:5 200:1 | 60:5 250:1
  slow_close delay=500
  | 10:end | 510:end | @200 delay=50 | | 10:end | 60:end
a changed bandwidth goes on behind what has left last
  bandwidth rate=100
  | 0:3000 | 10:1000 20:1000 30:1000
  | @15<10 rate=10 | | 0:200 0:100 | 20:100 30:100 40:100
  | @100<100 rate=0 | | 0:1000 | Infinity:1000
  | @110 rate=10 | | 0:100 | 120:100
a changed slicer cuts again, behind what has left last
  slicer average_size=1000 delay=5000
  | 2:300 | 2:300 | @3<2 average_size=20 size_variation=0 delay=2000 |
  | 1:15 1:30 | 4:15 6:5 8:20 10:5
a changed timeout or limit_time counts from its beginning
  timeout timeout=500 | | 500!close | @300 timeout=30 | 30!close
  limit_time time=500 | | 500!close | @300 time=30 | 30!close
  timeout | 5:end | 5:end Infinity!close
  | @10<5 timeout=30 | 30!close | @20<5 timeout=0 | Infinity!close
a timeout that ends closes, with or without data
  timeout | | Infinity!close | removed 10 | 10:close
  timeout | 5:1 | Infinity!close | removed 10 | 10:close
a changed reset_peer counts from the first that came
  reset_peer timeout=500 | |
  | @2 timeout=400 | | 5:1 6:2 | Infinity:1 Infinity:2 405!reset
  | @10 timeout=30 | | 5:1 6:2 | Infinity:1 Infinity:2 35!reset
a changed limit_data goes on counting, and lets no more through
  limit_data bytes=25 | | | @1 bytes=0 | | @2 bytes=20 | | 5:15 | 5:15
  | @6<5 bytes=18 | | 7:15 | 7:3 7:close
  limit_data bytes=25 | 5:15 | 5:15
  | @10<5 bytes=15 | 5:close | @11<5 bytes=5 | 5:close | 12:3 13:end |
packet_loss knows never and always, and loses no end
  packet_loss loss_rate=0 correlation=1 | 1:1 2:1 3:end | 1:1 2:1 3:end
  packet_loss loss_rate=1 | 1:1 2:1 3:end | 3:end
a changed packet_loss is that of what comes next
  packet_loss loss_rate=0
  | 1:1 | 1:1 | @2<1 loss_rate=1 correlation=0 | | 3:1 |
`;

for (const [name, lines] of casesIn(CASES)) {
  Deno.test(name, () => {
    for (const each of lines.join("\n").replace(/\n\|/g, " |").split("\n")) {
      const [line, ...steps] = each.split("|").map((part) => part.trim());
      const { active, ...result } = begin(toxic(defined(line)));
      for (let i = 0; i < steps.length; i += 2) {
        const step = defined(steps[i]);
        const [, removed] = /^removed (.+)/.exec(step) ?? [];
        const [, at, last, to] = /^@(\d+)<?(\d*) (.+)/.exec(step) ?? [];
        const given = removed ?? at ? [] : timed(step);
        if (removed) active.end(Number(removed));
        if (to) {
          const { attributes = {} } = toxic(`${line} ${to}`);
          active.change(attributes, Number(at), Number(last || -Infinity));
        }
        for (const each of given) active.take(each);
        const bytes = bytesOf(result.passed);
        assertEquals(bytes, bytesOf(given).slice(0, bytes.length), each);
        assertEquals(inWords(result), steps[i + 1], `${step} of ${each}`);
      }
    }
  });
}

/** The delays of so many chunks, so far apart that none has to wait. */
function delaysOf(line: string, count = 100_000, seed = 1): number[] {
  const what = testBytes(1);
  const all = Array.from({ length: count }, (_, i) => ({ at: i * 1e4, what }));
  return through(toxic(line), all, seed).map(({ at }, i) => at - i * 1e4);
}

Deno.test("jitter is uniform around the latency, and makes no delay negative", () => {
  assertUniform(delaysOf("latency latency=100 jitter=20", 5000), [80, 120], 4);
  assert(delaysOf("latency jitter=20", 1000).every((delay) => delay >= 0));
});

/** What the formulas say of latency=100 jitter=20, `pareto` of shape 3. */
const DISTRIBUTIONS = {
  uniform: { mean: 100, deviation: 11.547, least: 80, most: 120 },
  normal: { mean: 100, deviation: 20, least: 0, most: 2100 },
  pareto: { mean: 109.999, deviation: 17.0892, least: 100, most: 2100 },
};
/** The delays below which these shares lie. */
const SHARES = [0.01, 0.1, 0.5, 0.9, 0.99];
const QUANTILES = {
  uniform: [80.4, 84, 100, 116, 119.6],
  normal: [53.473, 74.369, 100, 125.631, 146.527],
  pareto: [100.067, 100.715, 105.198, 123.089, 172.832],
};

for (const distribution of ["uniform", "normal", "pareto"] as const) {
  const line = `latency latency=100 jitter=20 distribution=${distribution}`;
  const expected = DISTRIBUTIONS[distribution];
  const quantiles = QUANTILES[distribution];

  Deno.test(`delays are ${distribution} within 2 % of the formula`, () => {
    // With the tail of `pareto` another seed's deviation is up to 6 % off.
    const delays = delaysOf(line, 100_000, 13).sort((a, b) => a - b);
    const assertNear = (found: number, expected = NaN) =>
      assertLess(Math.abs(found / expected - 1), 0.02, `${found}, ${expected}`);
    assertNear(mean(delays), expected.mean);
    const squares = delays.map((each) => (each - expected.mean) ** 2);
    assertNear(Math.sqrt(mean(squares)), expected.deviation);
    for (const [i, share] of SHARES.entries()) {
      assertNear(defined(delays[share * delays.length]), quantiles[i]);
    }
    const [least, most] = [defined(delays[0]), defined(delays.at(-1))];
    assert(least >= expected.least, `${least}`);
    assert(most <= expected.most, `${most}`);
  });

  Deno.test(`${distribution} delays have the correlation that is asked for`, () => {
    for (const correlation of [0, 0.5, 0.9]) {
      const delays = delaysOf(`${line} correlation=${correlation}`);
      const repeats = delays.filter((each, i) =>
        i > 0 && Math.abs(each - defined(delays[i - 1])) < 1e-6
      );
      assertShare(repeats.length, delays.length, correlation + 1e-5, 5);
      // A share of them is as many draws as are new ones.
      const below = delays.filter((each) => each < defined(quantiles[2]));
      const most = 5 * Math.sqrt((1 + correlation) / (1 - correlation));
      assertShare(below.length, delays.length, 0.5, most);
    }
  });
}

Deno.test("a uniform jitter draws what it has always drawn", () => {
  const line = "latency latency=100 jitter=20";
  const found = delaysOf(line, 5, 42).map((each) => Number(each.toFixed(3)));
  assertEquals(found, [84.889, 107.457, 81.569, 115.225, 106.129]);
  const uniform = delaysOf(`${line} distribution=uniform`, 99);
  assertEquals(uniform, delaysOf(line, 99));
});

for (const rate of [10, 100, 1000, 10_000]) {
  Deno.test(`bandwidth of ${rate} KB/s is even`, () => {
    const total = rate * 5000; // bytes in 5 s
    for (const given of [split(total, total), split(total, 65_536)]) {
      const passed = through(toxic(`bandwidth rate=${rate}`), given);
      assertEquals(sum(passed.map(sizeOf)), total);
      assertLess(Math.abs(defined(passed.at(-1)).at - 5000), 1e-3);
      // In no window, wherever it begins, more than 1.5 times its share.
      for (const each of passed) {
        const window = passed.filter(({ at }) =>
          at > each.at - 250 && at <= each.at
        );
        assertLess(sum(window.map(sizeOf)), 1.5 * rate * 250);
        assert(sizeOf(each) <= rate * 10); // dribbles, in 10 ms
      }
    }
  });
}

Deno.test("slicer cuts where the seed says, however the bytes come in", () => {
  const slicer = toxic("slicer average_size=100 size_variation=40 delay=500");
  const whole = chunk(0, 100_000);
  const ends = (given: TimedChunk[]) => {
    const passed = through(slicer, given);
    assertEquals(bytesOf(passed), bytesOf([whole]));
    let end = 0;
    return passed.map((each) => end += sizeOf(each));
  };
  const others = new Set(ends(split(100_000, 777)));
  assert(ends([whole]).every((end) => others.has(end)));
});

Deno.test("slicer's sizes are uniform around their average, and none is 0", () => {
  const sizesOf = (line: string, length: number) => {
    const sizes = through(toxic(line), [chunk(0, length)]).map(sizeOf);
    assertEquals(sum(sizes), length);
    return sizes.slice(0, -1);
  };
  const even = sizesOf("slicer average_size=100 size_variation=40", 1_000_000);
  assertUniform(even, [60, 140], 10, 61);
  const odd = sizesOf("slicer average_size=5 size_variation=50", 20_000);
  assert(odd.every((size) => size >= 1 && size <= 55));
  assert(odd.includes(1) && odd.some((size) => size > 50));
});

/** The lengths of the runs of one kind. */
function runsOf(are: boolean[], kind: boolean): number[] {
  const text = are.map((is) => is === kind ? "x" : " ").join("");
  return (text.match(/x+/g) ?? []).map(({ length }) => length);
}

/** How often losses begin behind a chunk that is kept, and end behind a loss. */
const LOSSES: Record<string, [begin: number, end: number]> = {
  "loss_rate=0.2 correlation=0": [0.2, 0.8],
  "loss_rate=0.1 correlation=0.5": [0.1, 0.45],
  "loss_rate=0.3 correlation=0.8": [0.3, 0.14],
  "loss_rate=0.2 burst=5": [0.05, 1 / 5],
  "loss_rate=0.05 burst=10": [0.005 / 0.95, 1 / 10],
  "loss_rate=0.6 burst=1.5": [1, 1 / 1.5],
};

for (const [model, [begin, end]] of Object.entries(LOSSES)) {
  Deno.test(`losses are as many and as long as ${model} says`, () => {
    const given = row(100_000, 3);
    const lost = given.map(() => true);
    for (const { at, what } of through(toxic(`packet_loss ${model}`), given)) {
      assert(what === given[at]?.what, "a chunk is lost or kept as a whole");
      lost[at] = false;
    }
    const again = 1 - begin - end; // neighbours are correlated by that
    const most = 5 * Math.sqrt((1 + again) / (1 - again));
    const losses = lost.filter((is) => is).length;
    assertShare(losses, given.length, begin / (begin + end), most);
    for (const [kind, stop] of [[true, end], [false, begin]] as const) {
      const runs = runsOf(lost, kind);
      const deviation = Math.sqrt((1 - stop) / runs.length) / stop;
      assert(Math.abs(mean(runs) - 1 / stop) <= 5 * deviation, `${kind}`);
      for (let length = 1; length <= 5; length++) {
        const hits = runs.filter((run) => run === length).length;
        const share = (1 - stop) ** (length - 1) * stop;
        assertShare(hits, runs.length, share, 5);
      }
    }
  });
}

Deno.test("losses begin as they go on, and may have no end", () => {
  const passed = (line: string, seed?: number, count = 1) =>
    through(toxic(`packet_loss ${line}`), row(count), seed);
  const first = Array.from(
    { length: 2000 },
    (_, seed) => passed("loss_rate=0.3 burst=20", seed).length,
  );
  assertShare(2000 - sum(first), 2000, 0.3, 5);
  assertEquals(passed("loss_rate=1 burst=2", 1, 1000), []);
  assertLess(passed("loss_rate=0.1 correlation=1", 1, 1000).length, 200);
  // At the least burst that a rate allows, each chunk kept is behind a lost one.
  const half = passed("loss_rate=0.5 burst=1", 1, 1000);
  assertEquals(new Set(half.map(({ at }) => at % 2)).size, 1);
});

Deno.test("corrupt flips one of eight bits in the share of bytes that is asked for", () => {
  const before = bytesOf([chunk(0, 200_000)]);
  const after = (rate: number, size = 200_000) =>
    bytesOf(through(toxic(`corrupt rate=${rate}`), split(200_000, size)));
  for (const rate of [0, 0.01, 0.5, 1]) {
    const changed = after(rate);
    const flipped = differences(changed, before);
    assertShare(flipped.length, before.length, rate);
    const bits = flipped.map(Math.log2);
    for (let bit = 0; bit < 8; bit++) {
      const hits = bits.filter((each) => each === bit);
      assertShare(hits.length, flipped.length, 1 / 8);
    }
    assert(bits.every(Number.isInteger));
    assertEquals(after(rate, 999), changed);
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
    begin(toxic(`corrupt rate=${rate}`)).active.take({ at: 0, what });
    assertEquals(Array.from(what), Array.from(testBytes(10)));
  }
});

Deno.test("a changed corrupt is that of what comes next", () => {
  const { active, passed } = begin(toxic("corrupt rate=0"));
  const before = bytesOf([chunk(1, 100)]);
  for (const rate of [0, 1, 0]) {
    active.change({ rate }, 1, 1);
    active.take(chunk(1, 100));
    const flipped = differences(bytesOf(passed.splice(0)), before);
    assertEquals(flipped.length, 100 * rate);
  }
});

/** All of them, each so that it lets all through unless that is against its nature. */
const ALL: Record<ToxicType, Toxic["attributes"]> = {
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
  stall: { rate: 0.1, duration: 10 },
  random_close: { rate: 0.02, reset: 0 },
  duplicate: { rate: 0.1 },
  inject: { rate: 0.1, bytes: 8 },
  reorder: { rate: 0.1 },
  noop: {},
};
const TYPES = Object.keys(ALL) as ToxicType[];
const PACKET_TOXICS = [ // which act on packets by chance
  ...["stall", "random_close", "duplicate", "inject", "reorder"] as const,
];

for (const last of ["end", "close"] as const) {
  Deno.test(`what comes last, ${last}, leaves last`, () => {
    for (const type of TYPES) {
      if (type === "reset_peer" || type === "timeout") continue; // cut anyhow
      const given = timed(`1:100 2:30 3:${last}`);
      const passed = through({ type, attributes: ALL[type] }, given);
      const ends = passed.filter(({ what }) => typeof what === "string");
      assertEquals(ends.map(({ what }) => what), [last], type);
      assertEquals(passed.at(-1), ends[0], type);
      const times = [1, ...passed.map(({ at }) => at)]; // none before the first
      assertEquals(times, times.toSorted((a, b) => a - b), type);
    }
  });
}

Deno.test("the seed alone decides what is random", () => {
  const random: ToxicType[] = [
    ...["latency", "slicer", "packet_loss", "corrupt"] as const,
    ...PACKET_TOXICS,
  ];
  const result = (type: ToxicType, seed: number, name?: string) => {
    const options = { type, attributes: ALL[type], ...name && { name } };
    const passed = through(options, row(200, 50), seed);
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

function problemsOf(toxics: unknown): string[] {
  const { problems } = assertThrows(() => routeWith({ toxics }), ConfigError);
  return problems.map((each) => each.replace(/^routes\[0\]\.toxics/, ""));
}

/** Toxics, and what is wrong with each. */
const PROBLEMS = `
latency latensy=5
  attributes.latensy: unknown key; did you mean latency?
latency distribution=normal
  attributes.distribution: needs jitter; write that, or leave this out
latency correlation=0.5
  attributes.correlation: needs jitter; write that, or leave this out
latency jitter=5 distribution=paretto
  attributes.distribution: expected uniform or normal or pareto,
  found "paretto"; did you mean pareto?
latency jitter=5 distribution=normal shape=3
  attributes.shape: needs distribution: pareto; write that, or leave this out
latency jitter=5 distribution=pareto shape=1
  attributes.shape: expected a number from 1.2 to 10, found 1
latency jitter=5 correlation=1.5
  attributes.correlation: expected a number from 0 to 1, found 1.5
latency wave=sin amplitude=5 period=5
  attributes.wave: expected sine or square or triangle or sawtooth,
  found "sin"; did you mean sine?
latency wave=sine amplitude=5
  attributes.wave: needs amplitude and period; write that, or leave this out
latency amplitude=5
  attributes.amplitude: needs wave; write that, or leave this out
latency period=5
  attributes.period: needs wave; write that, or leave this out
latency phase=0
  attributes.phase: needs wave; write that, or leave this out
latency wave=sine amplitude=5 period=5 phase=2
  attributes.phase: expected a number from 0 to 1, found 2
latency wave=sine amplitude=5 period=0.5
  attributes.period: expected an integer from 1 to 2147483647, in ms, found 0.5
packet_loss burst=0.5
  attributes.burst: expected a number from 1 to 1000000, found 0.5
packet_loss burst=3 correlation=0.5
  attributes.burst: needs correlation: 0; write that, or leave this out
packet_loss loss_rate=0.9 burst=2
  attributes.burst: expected at least 9.00000 with this loss_rate, found 2
random_close reset=2
  attributes.reset: expected true or false or 1 or 0, found 2
inject bytes=0
  attributes.bytes: expected an integer from 1 to 65536, in bytes, found 0
slicer
  attributes.average_size: missing; expected an integer
  from 1 to 9007199254740991, in bytes
bandwidth
  attributes.rate: missing; expected an integer from 0, in KB/s
latency toxicity=2
  toxicity: expected a number from 0 to 1, found 2
`;

Deno.test("a toxic's config is checked, with paths", () => {
  const types = `expected ${TYPES.join(" or ")}`;
  const mapping = "expected a mapping, found";
  const streams = "expected upstream or downstream, found";
  const hint = "; did you mean latency?";
  const wrong: [toxic: unknown, problem: string][] = [
    [5, `: ${mapping} 5`],
    [null, `: ${mapping} null`],
    [[], `: ${mapping} a list`],
    [{}, `.type: missing; ${types}`],
    [{ type: "constructor" }, `.type: ${types}, found "constructor"`],
    [{ type: "lattency" }, `.type: ${types}, found "lattency"${hint}`],
    [{ type: "Latency" }, `.type: ${types}, found "Latency"${hint}`],
    [{ type: "noop", attributes: 5 }, `.attributes: ${mapping} 5`],
    [{ type: "noop", stream: "up" }, `.stream: ${streams} "up"`],
    ...casesIn(PROBLEMS).map(([line, problem], i): [object, string] => [
      { ...toxic(line), name: `${i}` },
      `.${problem.join(" ")}`,
    ]),
  ];
  assertEquals(
    problemsOf(wrong.map(([toxic]) => toxic)),
    wrong.map(([, problem], i) => `[${i}]${problem}`),
  );
  for (const second of ["timeout", "latency name=timeout_downstream"]) {
    assertEquals(problemsOf([toxic("timeout"), toxic(second)]), [
      "[1].name: timeout_downstream is already taken by routes[0].toxics[0]",
    ]);
  }
  const none = ": expected a list of toxics, 500 at most, found 5";
  assertEquals(problemsOf(5), [none]);
});

Deno.test("a toxic's defaults are filled in", () => {
  const { toxics } = routeWith({
    toxics: [
      { type: "latency" },
      { type: "packet_loss", stream: "upstream", toxicity: 0.5 },
      { type: "slicer", name: "s", attributes: { average_size: 7 } },
    ],
  });
  // Word for word, as the API shows them.
  assertEquals(toxics.map((each) => JSON.stringify(each)), [
    '{"name":"latency_downstream","type":"latency","stream":"downstream",' +
    '"toxicity":1,"attributes":{"latency":0,"jitter":0}}',
    '{"name":"packet_loss_upstream","type":"packet_loss","stream":"upstream",' +
    '"toxicity":0.5,"attributes":{"loss_rate":0.1,"correlation":0}}',
    '{"name":"s","type":"slicer","stream":"downstream",' +
    '"toxicity":1,"attributes":{"average_size":7,"size_variation":0,"delay":0}}',
  ]);
});

Deno.test("a shared bandwidth is written as true or 1, and shown as a number", () => {
  const shown = (more: object) => {
    const toxic = { type: "bandwidth", attributes: { rate: 1, ...more } };
    return only(routeWith({ toxics: [toxic] }).toxics).attributes;
  };
  assertEquals(shown({}), { rate: 1 });
  assertEquals(shown({ shared: true }), { rate: 1, shared: 1 });
  assertEquals(shown({ shared: false }), { rate: 1, shared: 0 });
  const all = { rate: 1, shared: 1, buffer: 5 };
  assertEquals(shown(all), all);
});

Deno.test("every attribute of every type is checked", () => {
  for (const type of TYPES) {
    const problemWith = (attribute: object) => {
      const attributes = { ...ALL[type], ...attribute };
      return only(problemsOf([{ type, attributes }]));
    };
    for (const key of Object.keys(ALL[type])) {
      for (const bad of [-1, "x", null, [], {}]) {
        const problem = problemWith({ [key]: bad });
        const expected = `[0].attributes.${key}: expected`;
        assert(problem.startsWith(expected), problem);
      }
    }
    const unknown = problemWith({ constructor: 1 });
    assert(unknown.startsWith("[0].attributes.constructor: "), unknown);
  }
});

/** Toxics, and what `--check` says of each. */
const WORDS = {
  "latency latency=100 jitter=20": "+100±20 ms",
  "bandwidth upstream rate=64 toxicity=0.25":
    "upstream: 64 KB/s on 25% of connections",
  "bandwidth rate=0": "holds all data",
  "slow_close delay=5": "ends 5 ms late",
  "timeout": "nothing gets through",
  "reset_peer timeout=7": "reset 7 ms after the first data",
  "slicer average_size=10 size_variation=2 delay=30":
    "in pieces of 10±2 B, 30 µs apart",
  "limit_data bytes=9": "closed after 9 B",
  "packet_loss correlation=0.5": "loses 10% of chunks, correlation 0.5",
  "corrupt": "flips a bit in 0.1% of bytes",
  "latency latency=9 jitter=5 distribution=pareto shape=2 correlation=0.5":
    "+9±5 ms, distribution pareto, shape 2, correlation 0.5",
  "latency wave=sine amplitude=30 period=1000":
    "+0 ms, wave sine, amplitude 30, period 1000",
  "packet_loss burst=5": "loses 10% of chunks, burst 5",
  "stall": "stalls 10% of packets, duration 200",
  "random_close reset=1": "ends at 10% of packets, reset 1",
  "duplicate rate=0.01": "repeats 1% of packets",
  "inject": "injects before 10% of packets, bytes 16",
  "reorder": "reorders 10% of packets",
  "limit_time time=8 toxicity=0":
    "downstream: closed after 8 ms on 0% of connections",
};

Deno.test("--check says in words what toxics do", async () => {
  const lines = Object.keys(WORDS);
  const toxics = lines.map((line, name) => toxic(`${line} name=${name}`));
  const routes = [{ localPort: 1, upstream: "a:1", toxics }];
  const said = await checkConfig(JSON.stringify({ routes }));
  const told = Object.values(WORDS).map((each) =>
    each.includes(": ") ? each : `downstream: ${each} on every connection`
  );
  assert(said.includes(told.join(", ")), said);
});

const SEGMENT = 1460;

/** What was passed, the neighbours of a time in one, as text. */
function joined(passed: TimedChunk[]): string[] {
  const parts: { at: number; text: string }[] = [];
  for (const { at, what } of passed) {
    const text = typeof what === "string" ? `<${what}>` : binary(what);
    const last = parts.at(-1);
    if (last?.at === at) last.text += text;
    else parts.push({ at, text });
  }
  return parts.map(({ at, text }) => `${at}: ${text}`);
}

function binary(bytes: Uint8Array): string {
  return Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");
}

for (const type of PACKET_TOXICS) {
  const withRate = (rate: number) => {
    return { type, attributes: { ...ALL[type], rate } };
  };

  Deno.test(`${type} hits the share of packets that is asked for`, () => {
    for (const size of [10, SEGMENT]) {
      const what = testBytes(size);
      let [hits, draws] = [0, 0];
      for (let seed = 1; seed <= 500; seed++) {
        const { active, passed } = begin(withRate(0.1), seed);
        for (let at = 0; at < 50e4; at += 1e4) {
          passed.length = 0;
          active.take({ at, what: what.slice() });
          const [first, second] = passed;
          if (type === "reorder" && second) continue; // one behind a hit one
          const isHit = first?.at !== at || first.what === "close" || second;
          draws++;
          if (isHit) hits++;
          if (isHit && type === "random_close") break;
        }
      }
      assertShare(hits, draws, 0.1, 5);
    }
  });

  Deno.test(`${type} hits the same, however a long stream was read`, () => {
    const results = new Set<string>();
    for (let seed = 1; seed <= 20; seed++) {
      const inReadsOf = (size: number) =>
        joined(through(withRate(0.1), split(100_000, size), seed));
      const expected = inReadsOf(100_000);
      results.add(expected.join());
      for (const size of [2000, 3125, 6250]) { // all longer than a segment
        assertEquals(inReadsOf(size), expected, `${size}`);
      }
    }
    assert(results.size >= 5); // the first may be at the same place
  });

  Deno.test(`${type} with a rate of 0 passes bytes as they are`, () => {
    const given = timed("0:5000 1:10 2:end");
    const passed = through(withRate(0), given).map(({ what }) => what);
    assertEquals(passed, given.map(({ what }) => what));
    assert(passed.every((what, i) => what === given[i]?.what));
  });
}

const letter = (letter: string) => new TextEncoder().encode(letter);

/** Letters, each a chunk, and `.` for the end; in the same form what passed. */
function lettersThrough(line: string, letters: string): string[] {
  const given = Array.from(letters, (each, at): TimedChunk => ({
    at,
    what: each === "." ? "end" : letter(each),
  }));
  return through(toxic(line), given)
    .map(({ what }) => typeof what === "string" ? "." : binary(what));
}

Deno.test("duplicate sends a packet twice, each with bytes of its own", () => {
  assertEquals(lettersThrough("duplicate rate=1", "abc.").join(""), "aabbcc.");
  const [first, second] = through(toxic("duplicate rate=1"), [chunk(0, 9)]);
  assertEquals(first, second);
  assert(first?.what !== second?.what);
  // Of a packet that came in two reads, the copy follows the whole.
  const passed = joined(through(toxic("duplicate rate=1"), split(4380, 2000)));
  const packets = split(4380, SEGMENT).map(({ what }) =>
    binary(what as Uint8Array)
  );
  assertEquals(passed, [`0: ${packets.map((each) => each + each).join("")}`]);
});

Deno.test("inject puts 1 to `bytes` random bytes before packets, and changes no other", () => {
  const found = lettersThrough("inject rate=1 bytes=8", "x".repeat(20_000));
  const noise = found.filter((_, i) => i % 2 === 0);
  assert(found.every((each, i) => i % 2 === 0 || each === "x"));
  for (let length = 1; length <= 8; length++) {
    const hits = noise.filter((each) => each.length === length).length;
    assertShare(hits, noise.length, 1 / 8, 5);
  }
  const bytes = Array.from(noise.join(""), (each) => each.charCodeAt(0));
  for (let bit = 1; bit < 256; bit *= 2) {
    const hits = bytes.filter((each) => each & bit).length;
    assertShare(hits, bytes.length, 0.5, 5);
  }
  assertEquals(new Set(bytes).size, 256);
});

Deno.test("reorder sends a packet behind the next one, and loses none", () => {
  assertEquals(lettersThrough("reorder rate=1", "abcde.").join(""), "badce.");
  assertEquals(lettersThrough("reorder rate=1", "abcd").join(""), "badc");
  const letters = "abcdefghijklmnopqrstuvwxyz";
  const some = lettersThrough("reorder rate=0.3", `${letters}.`);
  assertEquals(some.toSorted().join(""), `.${letters}`);
  for (const [i, letter] of some.entries()) {
    const moved = Math.abs(letters.indexOf(letter) - i);
    assert(letter === "." || moved <= 1, some.join(""));
  }
  // What it keeps leaves when it is changed or removed, or at another's close.
  const { active, passed } = begin(toxic("reorder rate=1"));
  const text = () => joined(passed.splice(0)).join();
  active.take({ at: 1, what: letter("a") });
  assertEquals(text(), "");
  active.change({ rate: 1 }, 2, 0);
  assertEquals(text(), "1: a");
  active.take({ at: 3, what: letter("b") });
  active.take({ at: 4, what: "close" });
  assertEquals(text(), "3: b,4: <close>");
  active.take({ at: 5, what: letter("c") });
  active.end(6);
  assertEquals(text(), "5: c");
});
