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
  type Timed,
  type ToxicOptions,
} from "../main.ts";
import { testBytes } from "./helpers.ts";

interface Cut {
  at: number;
  how: "close" | "reset";
}

/** What comes of a connection that opens at 0 and is given these. */
function through(
  options: ToxicOptions,
  given: Timed[],
  seed = 1,
): { passed: Timed[]; cuts: Cut[] } {
  const passed: Timed[] = [];
  const cuts: Cut[] = [];
  const effect = beginToxic(options, seed, {
    pass: (timed) => passed.push({ ...timed }),
    cut: (at, how) => cuts.push({ at, how }),
  });
  effect.open?.(0);
  for (const each of given) effect.take(each);
  return { passed, cuts };
}

function chunk(at: number, length: number, seed = 1): Timed {
  return { at, what: testBytes(length, seed) };
}

function sizeOf({ what }: Timed): number {
  return typeof what === "string" ? 0 : what.length;
}

function bytesOf(timed: Timed[]): number[] {
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
function split({ at, what }: Timed, size: number): Timed[] {
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
  const given: Timed[] = [chunk(5, 10), chunk(7, 1), { at: 9, what: "end" }];
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
      for (let from = 0; from < 5000; from += 250) {
        const carried = passed
          .filter(({ at }) => at > from && at <= from + 250)
          .reduce((sum, each) => sum + sizeOf(each), 0);
        assertLess(carried, 1.5 * rate * 250);
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

Deno.test("slow_close delays the end alone", () => {
  const { passed } = through(
    { type: "slow_close", attributes: { delay: 300 } },
    [chunk(1, 5), { at: 2, what: "end" }],
  );
  assertEquals(passed.map(({ at }) => at), [1, 302]);
});

Deno.test("timeout lets nothing through, and closes in time", () => {
  const given: Timed[] = [chunk(1, 5), { at: 2, what: "end" }];
  assertEquals(
    through({ type: "timeout", attributes: { timeout: 300 } }, given),
    { passed: [], cuts: [{ at: 300, how: "close" }] },
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
  const sizes = (given: Timed[]) => {
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
  const limit = (bytes: number, given: Timed[]) =>
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
  const after = (given: Timed[], rate: number, seed = 1) =>
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
  const given: Timed[] = [chunk(1, 5), { at: 2, what: "end" }];
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
      "corrupt or limit_time",
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
  assertEquals(problemsOf(5), [`${at}: expected a list of toxics, found 5`]);
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
  const fates = Array.from({ length: 10_000 }, (_, i) => decide(7, route, i));
  const forwarded = fates.filter((fate) => fate.kind === "forward");
  assertShare(forwarded.length, fates.length, 0.8);
  const acting = forwarded.map(({ toxics }) => toxics.map(({ name }) => name));
  const some = acting.filter((names) => names.includes("some")).length;
  assertShare(some, forwarded.length, 0.3);
  assert(acting.every((names) => names.includes("latency_upstream")));
  assert(acting.every((names) => !names.includes("latency_downstream")));
});
