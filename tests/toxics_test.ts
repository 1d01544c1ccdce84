import {
  assert,
  assertEquals,
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
import { checkConfig, defined, only, testBytes, toxic } from "./helpers.ts";

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
  assertEquals(result, { passed: [], cuts: [] });
  active.open(0);
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

/** So many chunks of a byte, one a millisecond. */
function drops(count: number, everyMs = 1): TimedChunk[] {
  return Array.from({ length: count }, (_, i) => chunk(i * everyMs, 1));
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

function sum(numbers: number[]): number {
  return numbers.reduce((total, each) => total + each, 0);
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

/** That a share of so many lies within four standard deviations. */
function assertShare(hits: number, draws: number, share: number): void {
  const deviation = Math.sqrt(draws * share * (1 - share));
  assertLessOrEqual(Math.abs(hits - draws * share), 4 * deviation);
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
  const off = sum(numbers) / length - (low + high) / 2;
  assertLess(Math.abs(off), 4 * (high - low) / Math.sqrt(12 * length));
  for (let at = from; at + width <= high; at += width) {
    const inside = numbers.filter((each) => each >= at && each < at + width);
    assertShare(inside.length, length, width / (high - low));
  }
}

/**
 * The toxic, and then what it gets | what comes of it, any number of times.
 * `@115<110 rate=10` is a change at 115, when what left last was due at 110;
 * `removed 110` is its removal.
 */
const CASES: Record<string, string[]> = {
  "latency moves each chunk by so much, and the end": [
    "latency latency=100 | 5:10 7:1 9:end | 105:10 107:1 109:end",
  ],
  "latency and slow_close let all through, on time, by default": [
    "latency | 1:5 2:5 3:end | 1:5 2:5 3:end",
    "slow_close | 1:5 2:5 3:end | 1:5 2:5 3:end",
  ],
  "jitter and slow_close leave a toxic's close alone": [
    "latency latency=100 jitter=90 | 5:close | 105:close",
    "slow_close delay=300 | 5:close | 5:close",
  ],
  "bandwidth goes on where the chunk before stopped": [
    "bandwidth rate=100 | 0:1500 0:1500 100:500 | " +
    "10:1000 15:500 25:1000 30:500 105:500",
  ],
  "bandwidth does not save up what was not used": [
    "bandwidth rate=100 | 0:1000 1000:1000 1001:end | " +
    "10:1000 1010:1000 1010:end",
  ],
  "bandwidth of 0 holds all data, and the end behind it alone": [
    "bandwidth rate=0 | 5:100000 7:1 9:end | " +
    "Infinity:100000 Infinity:1 Infinity:end",
    "bandwidth rate=0 | 9:end | 9:end",
  ],
  "slow_close delays the end alone": [
    "slow_close delay=300 | 1:5 2:end | 1:5 302:end",
  ],
  "timeout lets nothing through, and closes in time": [
    "timeout timeout=300 | 1:5 2:end | Infinity:end 300!close",
    "timeout | 1:5 2:end | 2:end Infinity!close",
  ],
  "timeout does not hold back another toxic's close": [
    "timeout timeout=300 | 5:close | 5:close 300!close",
    "timeout | 5:close | 5:close Infinity!close",
  ],
  "reset_peer resets after the first data or the end, once": [
    "reset_peer timeout=50 |  | ",
    "reset_peer timeout=50 | 10:1 20:1 | Infinity:1 Infinity:1 60!reset",
    "reset_peer timeout=50 | 10:end | Infinity:end 60!reset",
  ],
  "slicer spaces its pieces": [
    "slicer average_size=10 delay=500 | 1:35 1:end | " +
    "1:10 1.5:10 2:10 2.5:5 3:end",
  ],
  "slicer spaces pieces across chunks, and does not save up": [
    "slicer average_size=10 delay=1000 | 0:20 0:20 50:10 50:end | " +
    "0:10 1:10 2:10 3:10 50:10 51:end",
  ],
  "limit_data closes behind the last byte it lets through": [
    "limit_data bytes=7 | 1:10 2:10 | 1:7 1:close",
    "limit_data bytes=10 | 1:10 | 1:10 1:close",
    "limit_data bytes=11 | 1:10 | 1:10",
    "limit_data bytes=0 | 1:3 | 1:close",
  ],
  "limit_data counts over chunks, and lets a shorter stream end": [
    "limit_data bytes=25 | 1:10 2:10 3:10 4:10 5:end | 1:10 2:10 3:5 3:close",
    "limit_data bytes=25 | 1:10 5:end | 1:10 5:end",
    "limit_data | 5:end | 5:end",
  ],
  "limit_time closes by the clock, and lets all through until then": [
    "limit_time time=200 | 1:5 2:end | 1:5 2:end 200!close",
  ],
  "a changed latency or slow_close is that of what comes again": [
    "latency latency=500 | 10:5 | 510:5 | " +
    "@200 latency=50 jitter=0 | | 10:5 200:1 | 60:5 250:1",
    "slow_close delay=500 | 10:end | 510:end | @200 delay=50 | | 10:end | 60:end",
  ],
  "a changed bandwidth goes on behind what has left last": [
    "bandwidth rate=100 | 0:3000 | 10:1000 20:1000 30:1000 | " +
    "@15<10 rate=10 | | 0:200 0:100 | 20:100 30:100 40:100 | " +
    "@100<100 rate=0 | | 0:1000 | Infinity:1000 | " +
    "@110 rate=10 | | 0:100 | 120:100",
  ],
  "a changed slicer cuts again, behind what has left last": [
    "slicer average_size=1000 delay=5000 | 2:300 | 2:300 | " +
    "@3<2 average_size=20 size_variation=0 delay=2000 | | " +
    "1:15 1:30 | 4:15 6:5 8:20 10:5",
  ],
  "a changed timeout or limit_time counts from its beginning": [
    "timeout timeout=500 | | 500!close | @300 timeout=30 | 30!close",
    "limit_time time=500 | | 500!close | @300 time=30 | 30!close",
    "timeout | 5:end | 5:end Infinity!close | @10<5 timeout=30 | 30!close | " +
    "@20<5 timeout=0 | Infinity!close",
  ],
  "a timeout that ends closes, with or without data": [
    "timeout | | Infinity!close | removed 10 | 10:close",
    "timeout | 5:1 | Infinity!close | removed 10 | 10:close",
  ],
  "a changed reset_peer counts from the first that came": [
    "reset_peer timeout=500 | | | @2 timeout=400 | | " +
    "5:1 6:2 | Infinity:1 Infinity:2 405!reset | @10 timeout=30 | | " +
    "5:1 6:2 | Infinity:1 Infinity:2 35!reset",
  ],
  "a changed limit_data goes on counting, and lets no more through": [
    "limit_data bytes=25 | | | @1 bytes=0 | | @2 bytes=20 | | " +
    "5:15 | 5:15 | @6<5 bytes=18 | | 7:15 | 7:3 7:close",
    "limit_data bytes=25 | 5:15 | 5:15 | @10<5 bytes=15 | 5:close | " +
    "@11<5 bytes=5 | 5:close | 12:3 13:end | ",
  ],
  "packet_loss knows never and always, and loses no end": [
    "packet_loss loss_rate=0 correlation=1 | 1:1 2:1 3:end | 1:1 2:1 3:end",
    "packet_loss loss_rate=1 | 1:1 2:1 3:end | 3:end",
  ],
  "a changed packet_loss is that of what comes next": [
    "packet_loss loss_rate=0 | 1:1 | 1:1 | @2<1 loss_rate=1 correlation=0 | | " +
    "3:1 | ",
  ],
};

for (const [name, cases] of Object.entries(CASES)) {
  Deno.test(name, () => {
    for (const each of cases) {
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

Deno.test("jitter is uniform around the latency", () => {
  const given = drops(5000, 100); // so far apart that none has to wait
  const passed = through(toxic("latency latency=100 jitter=20"), given);
  assertUniform(passed.map(({ at }, i) => at - 100 * i), [80, 120], 4);
});

Deno.test("jitter makes no delay negative", () => {
  const passed = through(toxic("latency jitter=20"), drops(1000, 100));
  assert(passed.every(({ at }, i) => at >= 100 * i));
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
        assertLessOrEqual(sizeOf(each), rate * 10); // dribbles, in 10 ms
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

Deno.test("slicer never makes an empty piece, however large the variation", () => {
  const slicer = toxic("slicer average_size=5 size_variation=50");
  const passed = through(slicer, [chunk(0, 20_000)]);
  const sizes = passed.map(sizeOf);
  assertEquals(sum(sizes), 20_000);
  sizes.pop();
  assert(sizes.every((size) => size >= 1 && size <= 55));
  assert(sizes.includes(1) && sizes.some((size) => size > 50));
});

Deno.test("slicer's sizes are uniform around their average", () => {
  const slicer = toxic("slicer average_size=100 size_variation=40");
  const passed = through(slicer, [chunk(0, 1_000_000)]);
  assertUniform(passed.slice(0, -1).map(sizeOf), [60, 140], 10, 61);
});

Deno.test("losses are as many and as long as their model says", () => {
  const count = 50_000;
  const models = [[0.2, 0], [0.1, 0.5], [0.3, 0.8]] as const;
  for (const [loss, correlation] of models) {
    const line = `packet_loss loss_rate=${loss} correlation=${correlation}`;
    const passed = through(toxic(line), drops(count));
    const times = [-1, ...passed.map(({ at }) => at), count];
    const runs = times.slice(1).map((at, i) => at - defined(times[i]) - 1)
      .filter((length) => length > 0);
    // A run begins after each chunk that is kept with the plain rate.
    assertShare(runs.length, passed.length, loss);
    // After a loss another follows with this probability: runs are geometric.
    const again = loss + correlation * (1 - loss);
    for (let length = 1; length <= 5; length++) {
      const hits = runs.filter((run) => run === length).length;
      assertShare(hits, runs.length, again ** (length - 1) * (1 - again));
    }
  }
});

Deno.test("packet_loss loses all after the first loss with a correlation of 1", () => {
  const line = "packet_loss loss_rate=0.1 correlation=1";
  assertLess(through(toxic(line), drops(1000)).length, 200);
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
      if (type === "reset_peer" || type === "timeout") continue; // cut anyhow
      const given = timed(`1:100 2:30 3:${last}`);
      const passed = through({ type, attributes: ALL[type] }, given);
      const ends = passed.filter(({ what }) => typeof what === "string");
      assertEquals(ends.map(({ what }) => what), [last], type);
      assertEquals(passed.at(-1), ends[0], type);
      const times = passed.map(({ at }) => at);
      assertEquals(times, times.toSorted((a, b) => a - b), type);
      assertGreaterOrEqual(times[0], 1, type);
    }
  });
}

Deno.test("the seed alone decides what is random", () => {
  const random: ToxicType[] = ["latency", "slicer", "packet_loss", "corrupt"];
  const result = (type: ToxicType, seed: number, name?: string) => {
    const given = Array.from({ length: 200 }, (_, i) => chunk(i, 50, i + 1));
    const options = { type, attributes: ALL[type], ...name && { name } };
    const passed = through(options, given, seed);
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

function routeWith(toxics: unknown, more = {}) {
  const routes = [{ localPort: 1, upstream: "a:1", toxics, ...more }];
  return only(parseConfig(JSON.stringify({ routes }), "config.json").routes);
}

function problemsOf(toxics: unknown): string[] {
  const { problems } = assertThrows(() => routeWith(toxics), ConfigError);
  return problems.map((each) => each.replace(/^routes\[0\]\.toxics/, ""));
}

Deno.test("a toxic's config is checked, with paths", () => {
  const lines = {
    "latency latensy=5":
      "attributes.latensy: unknown key; did you mean latency?",
    slicer: "attributes.average_size: missing; " +
      "expected an integer from 1 to 9007199254740991",
    bandwidth: "attributes.rate: missing; expected an integer from 0, in KB/s",
    "latency toxicity=2": "toxicity: expected a number from 0 to 1, found 2",
  };
  const latency = (more: object) => ({ type: "latency", ...more });
  const up = 'stream: expected upstream or downstream, found "up"';
  const wrong: [toxic: object, problem: string][] = [
    [{}, `type: missing; expected ${TYPES.join(" or ")}`],
    [latency({ attributes: 5 }), "attributes: expected a mapping, found 5"],
    [latency({ stream: "up" }), up],
  ];
  for (const [line, problem] of Object.entries(lines)) {
    wrong.push([toxic(line), problem]);
  }
  assertEquals(
    problemsOf(wrong.map(([toxic], i) => ({ name: `${i}`, ...toxic }))),
    wrong.map(([, problem], i) => `[${i}].${problem}`),
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
  const { toxics } = routeWith([
    { type: "latency" },
    { type: "packet_loss", stream: "upstream", toxicity: 0.5 },
    { type: "slicer", name: "s", attributes: { average_size: 7 } },
  ]);
  const latency = { latency: 0, jitter: 0 };
  const loss = { loss_rate: 0.1, correlation: 0 };
  const slicer = { average_size: 7, size_variation: 0, delay: 0 };
  // Word for word, as the API shows them.
  const expected = [
    ["latency_downstream", "latency", "downstream", 1, latency],
    ["packet_loss_upstream", "packet_loss", "upstream", 0.5, loss],
    ["s", "slicer", "downstream", 1, slicer],
  ].map(([name, type, stream, toxicity, attributes]) => ({
    ...{ name, type, stream, toxicity, attributes },
  }));
  assertEquals(JSON.stringify(toxics), JSON.stringify(expected));
});

Deno.test("every attribute of every type is checked", () => {
  for (const type of TYPES) {
    const problemWith = (attribute: object) => {
      const attributes = { ...ALL[type], ...attribute };
      return only(problemsOf([{ type, attributes }]));
    };
    for (const key of Object.keys(ALL[type])) {
      for (const bad of [-1, "x", true, null, [], {}]) {
        const problem = problemWith({ [key]: bad });
        const expected = `[0].attributes.${key}: expected`;
        assert(problem.startsWith(expected), problem);
      }
    }
    const unknown = problemWith({ constructor: 1 });
    assert(unknown.startsWith("[0].attributes.constructor: "), unknown);
  }
});

Deno.test("a toxic that is none is told as what it is", () => {
  assertEquals(
    problemsOf([5, null, []]),
    ["5", "null", "a list"].map((found, i) =>
      `[${i}]: expected a mapping, found ${found}`
    ),
  );
  const unknown = { constructor: "", lattency: "latency", Latency: "latency" };
  assertEquals(
    problemsOf(Object.keys(unknown).map((type) => ({ type }))),
    Object.entries(unknown).map(([found, meant], i) =>
      `[${i}].type: expected ${TYPES.join(" or ")}, found "${found}"` +
      (meant && `; did you mean ${meant}?`)
    ),
  );
});

Deno.test("toxics change no other decision, and are independent", () => {
  const more = { dropRate: 0.2, timeoutRate: 0.1, latencyMs: 50, jitterMs: 20 };
  const toxics = [
    toxic("latency name=a toxicity=0.3"),
    toxic("latency name=b toxicity=0.5"),
    toxic("latency name=always"),
    toxic("latency name=never toxicity=0"),
  ];
  const numbers = Array.from({ length: 10_000 }, (_, i) => i + 1);
  const decisions = (toxics: ToxicOptions[], seed = 7) => {
    const route = routeWith(toxics, more);
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
  assertShare(forwarded.length, numbers.length, 0.8 * 0.9);
  const acting = forwarded.map(({ toxics }) => toxics.map(({ name }) => name));
  const share = (...names: string[]) =>
    acting.filter((each) => names.every((name) => each.includes(name))).length;
  assertShare(share("a"), acting.length, 0.3);
  assertShare(share("b"), acting.length, 0.5);
  assertShare(share("a", "b"), acting.length, 0.3 * 0.5);
  assertEquals([share("always"), share("never")], [acting.length, 0]);
  const late = forwarded.filter(({ delayMs }) => delayMs > 50);
  const lateWithA = late.filter(({ toxics }) => toxics[0]?.name === "a");
  assertShare(lateWithA.length, late.length, 0.3);
  assert(JSON.stringify(decisions(toxics, 8)) !== JSON.stringify(found));
});

Deno.test("--check says in words what toxics do", async () => {
  const words = {
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
    "packet_loss correlation=0.5": "loses 10% of chunks, correlation 50%",
    "corrupt": "flips a bit in 0.1% of bytes",
    "limit_time time=8 toxicity=0":
      "downstream: closed after 8 ms on 0% of connections",
  };
  const toxics = Object.keys(words).map(toxic);
  const routes = [{ localPort: 1, upstream: "a:1", toxics }];
  const said = await checkConfig(JSON.stringify({ routes }));
  const told = Object.values(words).map((each) =>
    each.includes(": ") ? each : `downstream: ${each} on every connection`
  );
  assert(said.includes(told.join(", ")), said);
});

Deno.test("a changed corrupt is that of what comes next", () => {
  const { active } = begin(toxic("corrupt rate=0"));
  const flips = () => {
    const given = chunk(1, 100);
    active.take(given); // changes it in its place
    return differences(bytesOf([given]), bytesOf([chunk(1, 100)])).length;
  };
  assertEquals(flips(), 0);
  active.change({ rate: 1 }, 2, 1);
  assertEquals(flips(), 100);
  active.change({ rate: 0 }, 3, 1);
  assertEquals(flips(), 0);
});
