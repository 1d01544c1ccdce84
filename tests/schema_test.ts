// deno-lint-ignore-file no-import-prefix -- in deno.json each task would load it
/** The schema that editors use, and the keys that are left to them and YAML. */

import { assert, assertEquals, assertGreater } from "@std/assert";
import { parse as parseYaml } from "@std/yaml";
import { Ajv2020 } from "npm:ajv@8.20.0/dist/2020.js";
import { ConfigError, parseConfig } from "../main.ts";
import { only, ROOT, runArgs, text, toxic } from "./helpers.ts";

const read = (path: string) => Deno.readTextFileSync(new URL(path, ROOT));
const SCHEMA = read("config.schema.json");
const EXAMPLE = read("config.example.yaml");

function fail(...problem: unknown[]): never {
  throw new Error(problem.join(" "));
}
const logger = { log: fail, warn: fail, error: fail }; // is told of warnings
const ajv = new Ajv2020({ strict: true, logger });
const schemaAccepts = ajv.compile(JSON.parse(SCHEMA));

/** The problems that the validation finds. */
function problems(config: unknown): readonly string[] {
  try {
    parseConfig(JSON.stringify(config), "config.json");
    return [];
  } catch (error) {
    assert(error instanceof ConfigError, String(error));
    return error.problems;
  }
}

/** What depends on more than one value, which the schema lets pass. */
const BEYOND = [
  / is already taken by /,
  /: needs .*; write that, or leave this out$/,
  /\.burst: expected at least .* with this loss_rate/,
  /\.forMs: expected 1 to \d+, as everyMs/,
  /\.after: expected either bytes or match$/,
  /\.outages\[\d+\]: it overlaps with /,
];

/** That schema and validation judge a config alike. Returns if it is good. */
function isGood(config: unknown): boolean {
  const found = problems(config);
  const good = found.every((each) => BEYOND.some((form) => form.test(each)));
  if (schemaAccepts(config) === good) return good;
  fail(JSON.stringify(config), ajv.errorsText(schemaAccepts.errors), ...found);
}

Deno.test("--schema prints what config.schema.json holds", async () => {
  const args = runArgs(["--schema"]);
  const { code, stdout } = await new Deno.Command(Deno.execPath(), { args })
    .output();
  assertEquals(code, 0);
  assert(text(stdout) === SCHEMA, "to mend it: deno task schema");
});

/** The configs that a page has in YAML: whole, in Kubernetes, or toxics. */
function configsIn(page: string): unknown[] {
  return Array.from(page.matchAll(/^```yaml\n(.*?)^```$/gms), ([, block]) => {
    const shown = parseYaml(block!) as Record<string, Record<string, string>>;
    const { data, toxics, routes } = shown;
    if (toxics) return configOf({ toxics });
    return routes ? shown : parseYaml(data?.["chaos.yaml"] ?? "");
  }).filter((config) => config);
}

Deno.test("the schema accepts the example, which names it, and what is shown", () => {
  const line = "# yaml-language-server: $schema=./config.schema.json\n";
  assert(EXAMPLE.startsWith(line));
  const docs = Array.from(Deno.readDirSync(new URL("docs", ROOT)));
  const pages = ["README.md", ...docs.map(({ name }) => `docs/${name}`)];
  const shown = pages.flatMap((page) => configsIn(read(page)));
  assertGreater(shown.length, 7);
  for (const config of [parseYaml(EXAMPLE), ...shown]) assert(isGood(config));
});

const configOf = (...routes: object[]) => ({
  routes: routes.map((each) => ({ localPort: 0, upstream: "a:1", ...each })),
});
const toxicOf = (more: object) =>
  configOf({ toxics: [{ type: "noop", ...more }] });
const LONG = "a".repeat(255);
const list = (length: unknown, item: object): object[] =>
  Array(Number(length)).fill(item);

/** The config that a value makes, unless it is that of a route's field. */
const CONFIGS: Record<string, (value: unknown) => unknown> = {
  api: (api) => ({ api }),
  match: (match) => toxicOf({ after: { match } }),
  hex: (hex) => toxicOf({ after: { match: { hex } } }),
  routes: (length) => configOf(...list(length, {})),
  toxics: (length) => configOf({ toxics: list(length, { type: "noop" }) }),
  outages: (length) => configOf({ outages: list(length, { forMs: 1 }) }),
};

const GOOD: Record<string, unknown[]> = {
  name: ["a", "é-1", "...", LONG],
  host: ["localhost", "0.0.0.0", "::", "A_b-c.d.", "::ffff:1.2.3.4", LONG],
  upstream: ["a:1", "a.b:65535", "a:00080", "[::1]:1"],
  connections: [1, "1", "1-1", "1-3", "5-", "*/3", ["1", 2, "3-"]],
  api: [0, 65535, "0", ":1", "a:1", "[::1]:1"],
  match: ["a", "é", "\n", `${LONG}a`],
  hex: ["0dFF", "00".repeat(256)],
  ...{ routes: [1, 1000], toxics: [0, 500], outages: [0, 100] },
};
const BAD: Record<string, unknown[]> = {
  name: [".", "..", "a b", "a\t", "\u0000", "", `${LONG}a`],
  host: ["", "a:80", "http://a", "a..b", "-a", "[::1]", `${LONG}a`],
  upstream: ["", "a", "a:", ":1", "a:123456", "http://a:1", "b@a:1", "::1:5"],
  connections: [0, 1.5, "", "0", "0-3", "-3", "1-0", "*/0", "01", [], [[1]]],
  api: [-1, 65536, 1.5, "", "a", "a:", "a:123456", true, [1]],
  match: ["", `${LONG}aa`, 1, ["a"], {}, { hex: "00", x: 1 }],
  hex: ["", "0", "0g", " 00", "00".repeat(257)],
  ...{ routes: [0, 1001], toxics: [501], outages: [101] },
};
/** What no pattern tells, and so only the validation refuses. */
const UNSEEN: Record<string, unknown[]> = {
  host: ["1.2.3.4.5", "1::2::3"],
  upstream: ["a:0", "a:65536", "[1::2::3]:1"],
  connections: ["3-1", ["3-1"]],
  api: ["65536", "a b:1"],
  match: ["é".repeat(129)],
};

Deno.test("the schema accepts what is within the bounds, and nothing beyond", () => {
  const judge = (cases: typeof GOOD, isSo: (config: unknown) => boolean) => {
    for (const [field, values] of Object.entries(cases)) {
      const ofRoute = (value: unknown) => configOf({ [field]: value });
      const configs = values.map(CONFIGS[field] ?? ofRoute);
      assertEquals(configs.map(isSo), values.map(() => true), field);
    }
  };
  judge(GOOD, isGood);
  judge(BAD, (config) => !isGood(config));
  judge(UNSEEN, (all) => schemaAccepts(all) && problems(all).length > 0);
});

const TOXICS = [
  "latency latency=1 jitter=1 distribution=pareto shape=2 correlation=0.5 " +
  "wave=sine amplitude=1 period=1 phase=0.5",
  "packet_loss loss_rate=0.5 correlation=0 burst=2",
  ...["bandwidth rate=1 shared=1 buffer=1", "slow_close delay=1"],
  ...["slicer average_size=1 size_variation=1 delay=1", "timeout timeout=1"],
  ...["reset_peer timeout=1", "limit_data bytes=1", "limit_time time=1"],
  ...["corrupt rate=0", "stall rate=0 duration=1", "duplicate rate=0"],
  ...["random_close rate=0 reset=1", "inject rate=0 bytes=1"],
  ...["reorder rate=0", "noop upstream toxicity=0.5 name=b"],
].map(toxic);
const TOP = { $schema: 1, "x-a": [{}], seed: 1, drainTimeoutMs: 1, api: "d:3" };
const FLAKY = (parseYaml(EXAMPLE) as { routes: object[] }).routes[1];
const TIMES = { afterMs: 1, forMs: 2, everyMs: 3 };
const OUTAGES = [{ ...TIMES, mode: "hang", reset: true }];

/** All that there is, in configs which are good. */
const ALL: object[] = [
  ...TOXICS.map((each) => toxicOf(each)),
  toxicOf({ after: { match: { hex: "00" } }, connections: "1-3" }),
  toxicOf({ after: { bytes: 1 }, schedule: { ...TIMES, from: "start" } }),
  { ...TOP, ...configOf({ ...FLAKY, connections: [1], outages: OUTAGES }) },
];

/** Values of each kind, the bounds of all numbers, and what is beyond. */
const VALUES = [
  ...[null, true, false, [], {}, "", "x", "1", "reset", -1, 0, 0.5, 1, 1.1],
  ...[1.2, 1.5, 2, 10, 10.1, 65535, 65536, 65537, 1e6, 1e6 + 1, 2 ** 31 - 1],
  ...[2 ** 31, 2 ** 53 - 1, 2 ** 53, -1e-9, 1 + 1e-9],
];

/** The mappings in a tree. */
function mappingsIn(tree: unknown): Record<string, unknown>[] {
  if (typeof tree !== "object" || tree === null) return [];
  const inner = Object.values(tree).flatMap(mappingsIn);
  return Array.isArray(tree) ? inner : [Object(tree), ...inner];
}

Deno.test("schema and validation judge alike, whatever is changed", () => {
  const all = ALL.flatMap(mappingsIn).flatMap(Object.keys);
  const keys = new Set([...all, "constructor", "x-b"]);
  for (const { properties } of mappingsIn(JSON.parse(SCHEMA))) {
    for (const key of Object.keys(properties ?? {})) assert(keys.has(key), key);
  }
  let [good, bad] = [0, 0];
  for (const config of ALL) {
    assertEquals(problems(config), []);
    for (const node of mappingsIn(config)) {
      const before = { ...node };
      for (const key of keys) {
        const values = Object.hasOwn(before, key) ? VALUES : [1];
        for (const value of [undefined, ...values]) {
          node[key] = value;
          if (value === undefined) delete node[key];
          isGood(config) ? good++ : bad++;
        }
        delete node[key];
        Object.assign(node, before);
      }
    }
  }
  assert(good > 1000 && bad > 2000);
});

Deno.test("keys that begin with x-, and $schema, are ignored at the top level", () => {
  const { routes } = parseConfig(`
x-slow: &slow { latencyMs: 100 }
x-route: &route { localPort: 1, upstream: "a:1" }
routes: [*route, { <<: *slow, localPort: 2, upstream: "a:1" }]
`);
  assertEquals(routes.map((each) => each.latencyMs), [0, 100]);
  const ignored = { $schema: 1, "x-": null, "x-a": { localPort: "b" } };
  for (const config of [configOf({}), { proxies: [{ upstream: "a:1" }] }]) {
    assertEquals(problems({ ...ignored, ...config }), problems(config));
  }
  for (const config of [configOf(ignored), toxicOf(ignored)]) {
    assertEquals(problems(config).length, 3);
  }
  // A proxy of Toxiproxy's may have such a name.
  const byName = parseConfig('{ "x-a": { "upstream": "a:1" } }', "a.json");
  assertEquals(only(byName.routes).name, "x-a");
});
