/** What a configuration may say, and what people are told when it may not. */

import {
  assert,
  assertEquals,
  assertGreater,
  assertMatch,
  assertRejects,
  assertStringIncludes,
  assertThrows,
} from "@std/assert";
import {
  ChaosProxy,
  type Config,
  ConfigError,
  type ConfigOptions,
  parseConfig,
} from "../main.ts";
import { casesIn, defined, only } from "./helpers.ts";

const JSON_PATH = "config.json";
const BOTH_PATHS = ["config.yaml", JSON_PATH];
const GOOD = { localPort: 8080, upstream: "localhost:5432" };

function failure(text: string, path = "config.yaml"): ConfigError {
  return assertThrows(() => parseConfig(text, path), ConfigError, "", text);
}

function problems(text: string, path?: string): string[] {
  return [...failure(text, path).problems];
}

/** That a text has one problem, and which. */
function assertProblem(text: string, problem: string, path?: string): void {
  assertEquals(problems(text, path), [problem], text);
}

/** That texts of a line each have the problems that are indented below them. */
function assertProblems(cases: string, path?: string): void {
  for (const [text, expected] of casesIn(cases)) {
    assertEquals(problems(text, path), expected, text);
  }
}

/** How a text's only problem ends, which is with what to do. */
function assertHint(text: string, end: string, path?: string): void {
  const problem = only(problems(text, path));
  assert(problem.endsWith(end), `${problem}, not ${end}`);
}

/** A config of one route, with a field as it is written in YAML. */
function withField(field: string, yaml: string): string {
  const fields = { localPort: "8080", upstream: "localhost:5432" };
  const lines = Object.entries({ ...fields, [field]: yaml })
    .map(([key, value]) => `${key}: ${value}`);
  return `routes:\n  - ${lines.join("\n    ")}\n`;
}

/** The same, with a field beside the routes. */
function withTopField(field: string, yaml: string): string {
  return `${field}: ${yaml}\n${withField("name", "a")}`;
}

function withRoutes(...routes: Record<string, unknown>[]): string {
  const all = routes.map((route) => ({ upstream: "localhost:5432", ...route }));
  return JSON.stringify({ routes: all });
}

/** A field's path, and a config with it, as it is written in YAML. */
function placed(field: string, yaml: string): [path: string, text: string] {
  return ["seed", "drainTimeoutMs"].includes(field)
    ? [field, withTopField(field, yaml)]
    : [`routes[0].${field}`, withField(field, yaml)];
}

function assertTaken(field: string, value: unknown): void {
  const [, text] = placed(field, JSON.stringify(value));
  const config = parseConfig(text);
  const found = { ...config, ...config.routes[0] };
  assertEquals({ ...found, [field]: value }, found);
}

/** That a field does not take what YAML has, and what is expected and found. */
function assertRefused(
  field: string,
  yaml: string,
  expected: string,
  found: string,
): void {
  const [path, text] = placed(field, yaml);
  assertProblem(text, `${path}: expected ${expected}, found ${found}`);
}

function lines(text: string): string[] {
  return text.trim().split("\n").map((line) => line.trim());
}

/** What is parted by white space. */
function words(text: string): string[] {
  return text.trim().split(/\s+/);
}

// ---- Good ones ---------------------------------------------------------------

const DEFAULTS = {
  name: "8080",
  localPort: 8080,
  host: "127.0.0.1",
  enabled: true,
  upstream: "localhost:5432",
  dropRate: 0,
  timeoutRate: 0,
  timeoutMs: 0,
  latencyMs: 0,
  jitterMs: 0,
  connectTimeoutMs: 10_000,
  halfCloseTimeoutMs: 60_000,
  profile: "",
  toxics: [],
};

Deno.test("what is left out takes its default", () => {
  const expected = { drainTimeoutMs: 30_000, routes: [DEFAULTS] };
  assertEquals(parseConfig(withField("localPort", "8080")), expected);
  assertEquals(parseConfig(withRoutes(GOOD), JSON_PATH), expected);
});

Deno.test("what is written is kept", () => {
  const text = `{
    "seed": 42, "drainTimeoutMs": 0, "api": "0.0.0.0:8474",
    "routes": [{
      "name": "db", "localPort": 65534, "host": "::1", "enabled": false,
      "upstream": "[::1]:65535", "dropRate": 1, "timeoutRate": 0.25,
      "timeoutMs": 2147483647, "latencyMs": 150, "jitterMs": 50,
      "connectTimeoutMs": 1, "halfCloseTimeoutMs": 1, "profile": "",
      "toxics": [{
        "name": "slow", "type": "latency", "stream": "upstream",
        "toxicity": 0.5, "attributes": {"latency": 100, "jitter": 20}
      }]
    }]
  }`;
  for (const path of [...BOTH_PATHS, undefined]) {
    assertEquals(parseConfig(text, path), JSON.parse(text));
  }
});

Deno.test("JSON is told by the file's name, in any case", () => {
  const yaml = withField("localPort", "8080");
  assertEquals(parseConfig(yaml, "a.json.yml").routes.length, 1);
  const problem = only(problems(yaml, "a.JSON"));
  assertMatch(problem, /^line 1, column 1: invalid JSON: /);
});

Deno.test("the example is a good config, and shows every field", async () => {
  const path = new URL("../config.example.yaml", import.meta.url);
  const text = await Deno.readTextFile(path);
  assertGreater(parseConfig(text).routes.length, 1);
  for (const field of ["seed", "drainTimeoutMs", ...Object.keys(DEFAULTS)]) {
    assertStringIncludes(text, `${field}:`);
  }
});

Deno.test("programs are told as files are", async () => {
  const start = (config: unknown) =>
    assertRejects(
      () => ChaosProxy.start(config as ConfigOptions),
      ConfigError,
    );
  const { message } = await start({ routes: [{ ...GOOD, dropRate: NaN }] });
  const problem = "expected a number from 0 to 1, found NaN";
  assertEquals(message, `config: routes[0].dropRate: ${problem}`);
  const route = (strange: object) => ({ routes: [{ ...GOOD, ...strange }] });
  const strange = [
    ...[undefined, null, Symbol("x"), new Map(), new Date()],
    { routes: new Array(1) },
    route({ localPort: 1n }),
    route({ upstream: () => "localhost:5432" }),
    route({ host: Symbol("x") }),
    { routes: [Object.create(GOOD)] },
  ];
  for (const config of strange) await start(config);
});

// ---- Wrong values ------------------------------------------------------------

const MAX_MS = 2147483647;
const SHARE = [0, 1, 0.0001] as const;
const MS = [0, MAX_MS, 1] as const;
type Range = readonly [min: number, max: number, step: number];
/** The least and the most that a field takes, and what is just beyond. */
const RANGES: Record<string, Range> = {
  localPort: [0, 65535, 1],
  dropRate: SHARE,
  timeoutRate: SHARE,
  timeoutMs: MS,
  latencyMs: MS,
  jitterMs: MS,
  connectTimeoutMs: [1, MAX_MS, 1],
  halfCloseTimeoutMs: MS,
  seed: [0, Number.MAX_SAFE_INTEGER, 1],
  drainTimeoutMs: MS,
};

function expectedOf([min, max, step]: Range): string {
  return `${step === 1 ? "an integer" : "a number"} from ${min} to ${max}`;
}

const NEVER_A_NUMBER: Record<string, string> = {
  "9007199254740993": "9007199254740992",
  "'1'": '"1"; write 1',
  '" 1 "': '" 1 "; write 1',
  "'-1'": '"-1"',
  "''": '""',
  "' '": '" "',
  "abc": '"abc"',
  "h": '"h"',
  "~": "null",
  "": "null",
  "[1]": "a list",
  "{ a: 1 }": "a mapping",
  "2024-01-01": "a date",
};
for (const each of words("-1 -0.5 1.5 true null")) {
  NEVER_A_NUMBER[each] = each;
}
for (const each of words(".nan .inf -.inf")) NEVER_A_NUMBER[each] = `"${each}"`;

Deno.test("a number field takes no other kind of value", () => {
  for (const [field, range] of Object.entries(RANGES)) {
    for (const [yaml, found] of Object.entries(NEVER_A_NUMBER)) {
      assertRefused(field, yaml, expectedOf(range), found);
    }
  }
});

Deno.test("a number field takes its bounds, and nothing beyond", () => {
  for (const [field, range] of Object.entries(RANGES)) {
    const [min, max, step] = range;
    for (const value of [min, max]) assertTaken(field, value);
    if (step < 1) assertTaken(field, 0.5);
    for (const value of [min - step, max + step]) {
      assertRefused(field, `${value}`, expectedOf(range), `${value}`);
    }
  }
});

const UPSTREAM = "host:port or [ipv6]:port, the port from 1 to 65535";

Deno.test("an upstream is a host and a port", () => {
  const good = words(`
    localhost:1 localhost:65535 db.example.com:5432 my_service:80 a-b.c-d:80
    xn--bcher-kva.example:80 127.0.0.1:5432 [::1]:5432 [2001:DB8::1]:5432
    [::ffff:127.0.0.1]:80
  `);
  for (const upstream of good) assertTaken("upstream", upstream);
  const bad = words(`
    localhost localhost: :5432 localhost:0 localhost:65536 localhost:123456
    localhost:-1 localhost:+1 localhost:1.5 localhost:1e3 localhost:0x50
    localhost:http localhost:80/ localhost:80/path localhost:80?x
    localhost:80,localhost:81 http://localhost:80 tcp://localhost:80
    a..b:80 user@localhost:80 http://user@ *:80 ::1 ::1:80 [::1] [::1]80 [::1:80
    [::g]:80 []:80 [localhost]:80 256.0.0.1:80 1.2.3.4.5:80
    bücher.example:80 local%68ost:80 localhost:８０
  `).concat(
    ["", " ", "localhost: 80", "localhost :80", " localhost:80"],
    ["localhost:80 ", "localhost:80\n", "local\nhost:80"],
  );
  for (const upstream of bad) {
    const found = only(problems(withRoutes({ localPort: 1, upstream })));
    const start = `routes[0].upstream: expected ${UPSTREAM}, found ${
      JSON.stringify(upstream)
    }`;
    assert(found.startsWith(start), found);
  }
  const others = { "5432": "5432", "null": "null", "[]": "a list" };
  for (const [yaml, found] of Object.entries(others)) {
    assertRefused("upstream", yaml, UPSTREAM, found);
  }
  assertRefused("upstream", "{ host: a, port: 1 }", UPSTREAM, "a mapping");
});

Deno.test("a host is a name or an IP address, without a port", () => {
  const good = words("localhost 0.0.0.0 127.0.0.1 :: ::1 a-b.c");
  for (const host of good) assertTaken("host", host);
  const bad = words("* localhost:80 127.0.0.1:80 [::1]:80 ::g 256.0.0.1");
  const expected = "a host name or an IP address";
  const refused = [...bad, "", 5, null].map((each) => JSON.stringify(each));
  for (const host of refused) {
    assertRefused("host", host, expected, host);
  }
  assertRefused("host", '["127.0.0.1"]', expected, "a list");
});

Deno.test("a name is short, and one word", () => {
  const good = words("a db-1 größe 😀 __proto__ ... .a ..a %2e");
  for (const name of [...good, "x".repeat(255)]) assertTaken("name", name);
  const expected = "1 to 255 characters without white space, not . or ..";
  const bad = ["", " ", ".", "..", "\u0000", "\u001b[31m", 5, null];
  for (const name of bad.map((each) => JSON.stringify(each))) {
    assertRefused("name", name, expected, name);
  }
  const long = "x".repeat(56);
  assertRefused("name", "x".repeat(256), expected, `"${long}…"`);
});

const LIST = "expected a list of routes, 1000 at most";
const NONE = "expected at least one route";

Deno.test("routes are a list of mappings", () => {
  const mapping = "expected a mapping, found";
  assertProblems(`
routes: []
  routes: ${NONE}
{}
  routes: ${NONE}
routs: { db: { localPort: 1, upstream: "a:1" } }
  routs: unknown key; did you mean routes?
  routes: ${NONE}
routes:
  routes: ${LIST}, found null
routes: db
  routes: ${LIST}, found "db"
routes: { a: { localPort: 1 } }
  routes: ${LIST}, found a mapping; write a list, of which each item begins with "- "
routes: [1, null, [], x]
  routes[0]: ${mapping} 1
  routes[1]: ${mapping} null
  routes[2]: ${mapping} a list
  routes[3]: ${mapping} "x"
routes: [{}]
  routes[0].localPort: missing; expected an integer from 0 to 65535
  routes[0].upstream: missing; expected ${UPSTREAM}
`);
});

Deno.test("all problems are reported at once, each with its path", () => {
  const text = `
seeds: 1
drainTimeoutMs: soon
routes:
  - { name: a, localPort: abc, upstream: "localhost:5432" }
  - { name: a, localPort: 15432, upstream: "localhost:5432", dropRat: 0.1 }
  - { name: b, localPort: 15432, upstream: localhost, dropRate: 2 }
`;
  const { name, message } = failure(text, "some/where.yaml");
  assertEquals(name, "ConfigError");
  assertEquals(
    message,
    `some/where.yaml: 8 problems
  seeds: unknown key; did you mean seed?
  drainTimeoutMs: expected an integer from 0 to ${MAX_MS}, found "soon"
  routes[0].localPort: expected an integer from 0 to 65535, found "abc"
  routes[1].dropRat: unknown key; did you mean dropRate?
  routes[2].upstream: expected ${UPSTREAM}, found "localhost"
  routes[2].dropRate: expected a number from 0 to 1, found 2
  routes[1].name: a is already taken by routes[0]
  routes[2].localPort: 15432 is already taken by routes[1]`,
  );
});

Deno.test("of very many problems the message shows the first", () => {
  const error = failure(`routes: [${"1,".repeat(1000)}]`);
  const lines = error.message.split("\n");
  assertEquals(error.problems.length, 1000);
  assertEquals(lines.length, 52);
  assertEquals(lines[0], "config.yaml: 1000 problems");
  assertEquals(lines.at(-1), "  … and 950 more");
});

const TOP_KEYS = "known are seed, drainTimeoutMs, api, routes";

Deno.test("an unknown key is reported with what was probably meant", () => {
  const known = `known are ${Object.keys(DEFAULTS).join(", ")}`;
  const meant = words(`
    dropRat:dropRate droprate:dropRate drop_rate:dropRate latency:latencyMs
    jitter:jitterMs localport:localPort upstrem:upstream Name:name hest:host
    connectTimeout:connectTimeoutMs bandwidth: x:
  `);
  for (const each of meant) {
    const [key = "", name] = each.split(":");
    const hint = name ? `did you mean ${name}?` : known;
    const problem = `routes[0].${key}: unknown key; ${hint}`;
    assertProblem(withField(key, "1"), problem);
  }
  const problem = `proxies: unknown key; ${TOP_KEYS}`;
  assertProblem(withTopField("proxies", "[]"), problem);
});

Deno.test("a key is shown so that it cannot mislead", () => {
  for (const key of ["a\nb", "", "a b", "\u001b[31m", "a.b"]) {
    const json = JSON.stringify(key);
    const problem = only(problems(withField(json, "1")));
    assertStringIncludes(problem, `routes[0].${json}: unknown key`);
  }
  const [long] = problems(`? ${"x".repeat(100_000)}\n: 1\n`);
  assert(defined(long).length < 200, long);
});

Deno.test("keys of every object's prototype are keys like others", () => {
  const keys = ["__proto__", "constructor", "toString", "hasOwnProperty"];
  for (const key of keys) {
    for (const path of BOTH_PATHS) {
      const inner = `{"localPort": 1, "upstream": "a:1"}`;
      const top = `{"${key}": {"routes": [${inner}]}, "routes": [${inner}]}`;
      assertProblem(top, `${key}: unknown key; ${TOP_KEYS}`, path);
      const nested = `{"routes": [{"${key}": ${inner}}]}`;
      assertEquals(problems(nested, path).map((each) => each.split(";")[0]), [
        `routes[0].${key}: unknown key`,
        "routes[0].localPort: missing",
        "routes[0].upstream: missing",
      ]);
    }
  }
});

Deno.test("a port is taken once, and a name, also by default", () => {
  const parse = (routes: string) =>
    withRoutes(
      ...words(routes).map((each) => {
        const [port, name] = each.split("/");
        return { localPort: Number(port), ...(name && { name }) };
      }),
    );
  const taken = `
    1/a 2/b 1/c 1/d -> [2].localPort: 1, [3].localPort: 1
    1 1 -> [1].localPort: 1
    1/a 2/a -> [1].name: a
    1/2 2 -> [1].name: 2
    2 1/2 -> [1].name: 2
    0 0 -> [1].name: 0
  `;
  for (const each of lines(taken)) {
    const [routes = "", expected = ""] = each.split(" -> ");
    assertEquals(
      problems(parse(routes)),
      expected.split(", ")
        .map((each) => `routes${each} is already taken by routes[0]`),
    );
  }
  const { routes } = parseConfig(parse("0/a 0/b 0/c"));
  assertEquals(routes.map(({ localPort }) => localPort), [0, 0, 0]);
});

// ---- Files -------------------------------------------------------------------

Deno.test("a file without routes is told apart", () => {
  const assertNone = (text: string, found: string, path?: string) => {
    const expected = [`expected a mapping, found ${found}`, `routes: ${NONE}`];
    assertEquals(problems(text, path), expected, text);
  };
  for (const path of BOTH_PATHS) {
    for (const text of ["", " \n\t\r\n ", "\ufeff", "\ufeff \n"]) {
      assertProblem(text, "the file is empty; expected routes", path);
    }
    for (const text of ["5", '"a"', "true", "null"]) {
      assertNone(text, text, path);
    }
    assertNone('[{"localPort": 1, "upstream": "a:1"}]', "a list", path);
    assertProblem("[]", NONE, path);
    assertProblem('["a"]', '[0]: expected a mapping, found "a"', path);
  }
  for (const text of ["# nothing\n# here\n", "---\n", "~"]) {
    assertNone(text, "null");
  }
  assertNone("2024-01-01", "a date");
});

Deno.test("a byte order mark and any line ends are fine", () => {
  const yaml = withField("latencyMs", "5");
  const json = JSON.stringify({ routes: [{ ...GOOD, latencyMs: 5 }] }, null, 2);
  for (const [text, path] of [[yaml, "c.yaml"], [json, "c.json"]] as const) {
    const expected = parseConfig(text, path);
    for (const lineEnd of ["\n", "\r\n", "\r"]) {
      for (const mark of ["", "\ufeff"]) {
        const variant = mark + text.replaceAll("\n", lineEnd);
        assertEquals(parseConfig(variant, path), expected);
      }
    }
  }
});

Deno.test("a tab separates, but does not indent YAML", () => {
  const fine = {
    "routes:\n  -\tlocalPort:\t1\n    upstream: a:1": "c.yaml",
    "{ routes: [\n\t{ localPort: 1, upstream: a:1 }]}\n\t# why\n\t": "c.yaml",
    "routes: [\n\t{ localPort: 1, upstream: a:1 }\n]": "c.yaml",
    '{\t"routes":\t[\n\t\t{"localPort":1,"upstream":"a:1"}\n]}': "c.json",
  };
  for (const [text, path] of Object.entries(fine)) parseConfig(text, path);
  const indented = {
    "routes:\n\t- localPort: 1\n\t\tupstream: a:1\n": 2,
    "routes:\n  - localPort: 1\n\tupstream: a:1\n": 3,
    "routes:\r\n  - localPort: 1\r\n  \tupstream: a:1\r\n": 3,
    "seed: 1\n\tdrainTimeoutMs: 5\n": 2,
    "routes: [\n  1\n]\n\tseed: 1\n": 4,
  };
  const problem = "invalid YAML: a tab in the indentation; write spaces";
  for (const [text, line] of Object.entries(indented)) {
    assertProblem(text, `line ${line}, column 1: ${problem}`);
  }
});

Deno.test("a text has at most 1 MiB", () => {
  const config = withRoutes(GOOD);
  const full = config.padEnd(1024 * 1024);
  for (const path of BOTH_PATHS) {
    assertEquals(parseConfig(full, path), parseConfig(config, path));
    // Bytes are counted, of which an accented letter has two.
    for (const text of [full + " ", config + "é".repeat(600_000)]) {
      const tooLarge = failure(text, path).problems;
      assertEquals(tooLarge, ["expected at most 1 MiB of text, found more"]);
    }
  }
});

Deno.test("one YAML document may have its marks, several are an error", () => {
  const one = withField("latencyMs", "5");
  assertEquals(parseConfig(`%YAML 1.2\n---\n${one}...\n`), parseConfig(one));
  for (const text of [`${one}---\n${one}`, `${one}...\n---\n${one}`]) {
    assertStringIncludes(only(problems(text)), "invalid YAML: ");
  }
});

Deno.test("what is given takes precedence over the file, if it is set", () => {
  const text = `seed: 7\n${withField("latencyMs", "5")}`;
  assertEquals(parseConfig(text, "a.yaml", { seed: undefined }).seed, 7);
  assertEquals(parseConfig(text, "a.yaml", { seed: 8 }).seed, 8);
});

// ---- YAML --------------------------------------------------------------------

type Place = [line: number, column: number];

/** The line and column of the only problem, a syntax error. */
function place(text: string, path = "config.yaml"): Place {
  const problem = only(problems(text, path));
  const kind = path.endsWith(".json") ? "JSON" : "YAML";
  const match = new RegExp(`^line (\\d+), column (\\d+): invalid ${kind}: \\S`)
    .exec(problem);
  assert(match, problem);
  return [Number(match[1]), Number(match[2])];
}

/** Where each of some texts has its error. */
function placesOf(texts: object, path?: string): Record<string, Place> {
  const all = Object.keys(texts).map((text) => [text, place(text, path)]);
  return Object.fromEntries(all);
}

Deno.test("an error in YAML names its line and column", () => {
  const places: Record<string, Place> = {
    "seed: 1\nroutes: [\n": [3, 1],
    "seed: 1\nroutes: }\n": [2, 9],
    "seed: 1\nseed: 2\n": [2, 1],
    "routes:\n  - localPort: 1\n    localPort: 2\n": [3, 5],
    "seed: 'x\n": [2, 1],
    'seed: "\\q"\n': [1, 9],
    "seed: 1\n\nroutes: *nowhere\n": [3, 17],
    "seed: @x\n": [1, 7],
    "seed: `x\n": [1, 7],
    "a: b: c\n": [1, 5],
    "seed: 1\r\nroutes: }\r\n": [2, 9],
    "\ufeffroutes: }\n": [1, 9],
    "routes: [a b: {]}\n": [1, 16],
  };
  assertEquals(placesOf(places), places);
  const lines = {
    "seed: 1\nroutes:\n  - { localPort: 1, localPort: 2 }\n": 3,
    "seed: 1\nroutes: \u0007\n": 2,
    "seed: 1\nroutes: \ud800\n": 2,
  };
  for (const [text, line] of Object.entries(lines)) {
    assertEquals(place(text)[0], line);
  }
});

Deno.test("YAML's own tricks neither hang nor get through", () => {
  const levels = ["&a0 [x, x, x, x, x, x, x, x, x]"];
  const maps = ["&a0 { a: 1, b: 2 }"];
  const merges = ["&a0 { a: 1 }"];
  for (let i = 1; i < 30; i++) {
    const last = `*a${i - 1}`;
    levels.push(`&a${i} [${Array(9).fill(last).join(", ")}]`);
    maps.push(`&a${i} { a: ${last}, b: ${last} }`);
    merges.push(`&a${i} { <<: [${last}, ${last}, ${last}] }`);
  }
  for (const laughs of [levels, maps, merges]) {
    const yaml = laughs.map((value, i) => `x${i}: ${value}\n`).join("");
    for (const routes of ["[*a29]", "*a29", "[{ name: *a29 }]"]) {
      assertGreater(problems(`${yaml}routes: ${routes}\n`).length, 30);
    }
    problems(`${yaml}? *a29\n: 1\n`);
  }
  const wrong = `
    &a { routes: *a }
    &a { routes: [*a] }
    routes: &a [*a]
    routes: &a [[*a]]
    routes: [&a { localPort: *a, upstream: *a, name: *a }]
    &a [*a]
    &a { *a : 1 }
    !!binary aGVsbG8=
    !!omap [routes: 1]
    !!set {a}
  `;
  for (const text of lines(wrong)) problems(text);
  const unknownTags = `
    !!js/function 'function () {}'
    !!js/regexp /x/
    !!python/object:os.system x
    !<tag:example.com,2000:x> y
  `;
  for (const text of lines(unknownTags)) place(text);
});

Deno.test("anchors and merge keys save writing", () => {
  const { routes } = parseConfig(`
routes:
  - &slow { localPort: 1, upstream: "a:1", latencyMs: 100 }
  - { <<: *slow, localPort: 2, jitterMs: 10 }
`);
  assertEquals(
    routes.map(({ name, latencyMs, jitterMs }) => [name, latencyMs, jitterMs]),
    [["1", 100, 0], ["2", 100, 10]],
  );
  assertProblems(`
routes: [&a { localPort: 1, upstream: 'a:1', name: x }, *a]
  routes[1].localPort: 1 is already taken by routes[0]
  routes[1].name: x is already taken by routes[0]
`);
  place("routes: [{ <<: 5, localPort: 1 }]");
});

Deno.test("nesting has an end", () => {
  const deep = 20_000;
  for (const [start, end] of [["[", "]"], ['{"a":', "}"]] as const) {
    const open = start.repeat(deep);
    const closed = `${open}1${end.repeat(deep)}`;
    for (const text of [open, closed, `{"routes":${closed}}`]) {
      for (const path of BOTH_PATHS) {
        assertGreater(problems(text, path).length, 0);
      }
    }
  }
  for (const start of ["- ", "? ", "{a: "]) problems(start.repeat(deep) + "a");
  const levels = Array.from({ length: 1000 }, (_, i) => `${" ".repeat(i)}a:`);
  problems(levels.join("\n"));
});

// ---- JSON --------------------------------------------------------------------

Deno.test("an error in JSON names its line and column", () => {
  const places: Record<string, Place> = {
    "{": [1, 2],
    "[1, 2": [1, 6],
    "{}}": [1, 3],
    "{} []": [1, 4],
    '{"seed": 1,}': [1, 12],
    '{"routes": [1,]}': [1, 15],
    '{\n  "seed": 1\n  "routes": []\n}': [3, 3],
    '{"seed" 1}': [1, 9],
    "{seed: 1}": [1, 2],
    "{'seed': 1}": [1, 2],
    '// comment\n{"seed": 1}': [1, 1],
    '{\n  "seed": 1 // comment\n}': [2, 13],
    '{\r\n  "seed": 1,\r\n  x\r\n}': [3, 3],
    '{\r  "seed": 1,\r  x\r}': [3, 3],
    '\ufeff{"seed": x}': [1, 10],
    '{"seed": 1, "seed": 2}': [1, 13],
    '{"seed": 1,\n "s\\u0065ed": 2}': [2, 2],
    '{"routes": [{"name": "a", "name": "a"}]}': [1, 27],
  };
  const bad = words(`
    10:NaN 10:Infinity 11:-Infinity 10:undefined 10:True 13:nul 10:'1' 11:01
    10:+1 12:1. 10:.5 12:1e 11:0x1 11:1_000 10:/*x*/1
  `);
  for (const each of bad) {
    const [column, value] = each.split(":");
    places[`{"seed": ${value}}`] = [1, Number(column)];
  }
  const strings = { '"abc': 8, '"a\nb"': 5, '"a\tb"': 5, '"a\u0000b"': 5 };
  const escapes = { '"\\q"': 5, '"\\u12g4"': 8, '"\\u{1}"': 6, '"\\': 5 };
  for (const [text, column] of Object.entries({ ...strings, ...escapes })) {
    places[`[\n  ${text}]`] = [2, column];
  }
  assertEquals(placesOf(places, JSON_PATH), places);
});

Deno.test("a key in JSON may hold all that a string may", () => {
  const strings = ["\\u2028", "\u2028", "\u007f", "\\ud800", "\ud800"]
    .concat("\ud83d\ude00", '\\"', "\\\\", "\\/\\b\\f\\n\\r\\t", "\\u00E9")
    .concat('{\\": ');
  for (const string of strings) {
    const key = `"${string}"`;
    const repeated = `${JSON.stringify(JSON.parse(key))} is repeated`;
    const text = `{${key}: ${key}, "a": [${key}], ${key}: 1}`;
    assertHint(text, repeated, JSON_PATH);
  }
  const routes = JSON.stringify([GOOD]);
  const apart = `{"api": {"seed": 1}, "seed": 2, "routes": ${routes}}`;
  assertHint(apart, "found a mapping", JSON_PATH);
});

// ---- Mutations ---------------------------------------------------------------

/** Random numbers of a seed: integers from 0 to below the limit. */
function randomIntegers(seed: number): (limit: number) => number {
  let state = seed;
  return (limit) => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) % limit;
  };
}

const CHARACTERS = [
  ..."{}[]\",:;\\/|>!&*?#%@`~'-+._= \n\t\r0123456789eExaubnrt",
  ..."\u0000\u0007\u001f\u007f\u0085\u00a0\u2028\u200bé\ud800\udc00😀",
];

const TOKENS = [
  ...["null", "true", "NaN", ".nan", ".inf", "-1", "1e999", "0x1F", "0o7"],
  ...["1:30", "2024-01-01", "[]", "{}", '""', '"a"', "'1'", '"\\u0000"'],
  ...["&a ", "*a", "<<: *a", "!!binary ", "!!str ", "!x ", "? ", ": ", "- "],
  ...["---\n", "...\n", "%YAML 1.2\n", "| ", ">-\n", "# ", "\r\n", "\n\n"],
  ...["__proto__", "constructor", "routes", "name: a\n", '"name": "a",'],
  ...['"localPort": 0,', "localPort: 0\n    ", "upstream: a\n", "//", "/**/"],
  ...["0", "1", "65535", "65536", "localhost:1", "[::1]:1", ",", "  "],
];

const VALID_YAML = `# A comment
seed: 42
drainTimeoutMs: 1000
routes:
  - name: first
    localPort: 15432
    host: 127.0.0.1
    upstream: localhost:5432
    dropRate: 0.05
    timeoutRate: 2e-2
    timeoutMs: 5000
  - &second
    localPort: 8080
    upstream: "[::1]:80"
    latencyMs: 150
    jitterMs: 50
  - { <<: *second, name: 'third', localPort: 0, connectTimeoutMs: 100 }
`;

const VALID_JSON = JSON.stringify(parseConfig(VALID_YAML), null, 1)
  .replace("first", "f\\u0069rst").replace("0.02", "2e-2");

/** The text, changed in a few places. */
function mutate(text: string, random: (limit: number) => number): string {
  const pick = <T>(of: readonly T[]) => defined(of[random(of.length)]);
  const values = [...text.matchAll(/[\w.:"'[\]-]+/g)];
  for (let times = 1 + random(3); times > 0; times--) {
    const from = random(text.length + 1);
    const [head, rest] = [text.slice(0, from), text.slice(from)];
    const length = random(12);
    const [part, tail] = [rest.slice(0, length), rest.slice(length)];
    const replaceValue = (by: string) => {
      const { index, 0: value } = pick(values);
      return text.slice(0, index) + by + text.slice(index + value.length);
    };
    text = pick([
      () => head + tail,
      () => head + pick(CHARACTERS) + rest,
      () => head + part + rest,
      () => head + pick(CHARACTERS) + rest.slice(1),
      () => head + pick(TOKENS) + rest,
      () => replaceValue(pick(values)[0]),
      () => replaceValue(pick(TOKENS)),
    ])();
  }
  return text;
}

function assertValid({ routes, ...config }: Config): void {
  assertGreater(routes.length, 0);
  for (const route of routes) {
    const all: Record<string, unknown> = { seed: 0, ...config, ...route };
    const keys = [...Object.keys(DEFAULTS), "seed", "drainTimeoutMs"];
    assertEquals(Object.keys(all).sort(), keys.sort());
    const port = Number(route.upstream.split(":").at(-1));
    assert(port >= 1 && port <= 65535, route.upstream);
    for (const [field, [min, max, step]] of Object.entries(RANGES)) {
      const value = all[field];
      assert(typeof value === "number", field);
      const isWhole = step < 1 || Number.isInteger(value);
      assert(isWhole && value >= min && value <= max, `${field}: ${value}`);
    }
    assertMatch(route.name, /^[^\s\p{C}]{1,255}$/u);
    assertMatch(route.host, /^[\w.:[\]-]+$/);
    assertMatch(route.upstream, /^(?:[\w.-]+|\[[\da-fA-F:.]+\]):\d{1,5}$/);
  }
  const names = routes.map((route) => route.name);
  assertEquals(new Set(names).size, names.length);
  const ports = routes.map((route) => route.localPort).filter(Boolean);
  assertEquals(new Set(ports).size, ports.length);
}

/** The problems of a text, none of which is a config that is valid. */
function problemsIfAny(text: string, path: string): readonly string[] {
  let config: Config;
  try {
    config = parseConfig(text, path);
  } catch (error) {
    if (!(error instanceof ConfigError)) throw error;
    assertGreater(error.problems.length, 0);
    assert(error.problems.every((each) => each !== ""));
    assert(error.message.startsWith(`${path}: `));
    return error.problems;
  }
  assertValid(config);
  return [];
}

/** Whether an object in a JSON text, which must be valid, repeats a key. */
function repeatsKey(text: string): boolean {
  const strings = text.matchAll(/"(?:[^"\\]|\\.)*"(\s*:)?/gs);
  const written = strings.filter(([, colon]) => colon !== undefined);
  let keys = -1; // without that of the whole
  JSON.parse(text, function (_key, value) {
    if (!Array.isArray(this)) keys++;
    return value;
  });
  return [...written].length > keys;
}

function isJson(text: string): boolean {
  try {
    return JSON.parse(text) !== undefined;
  } catch {
    return false;
  }
}

/** That the error, if any, is one of JSON exactly if it is none or repeats a key. */
function assertJsonError(text: string, error: string): void {
  const isValid = isJson(text);
  const isRepeating = isValid && repeatsKey(text);
  const syntax = /^line (\d+), column (\d+): invalid JSON: /.exec(error);
  assertEquals(syntax === null, isValid && !isRepeating, error);
  assertEquals(error.endsWith(" is repeated"), isRepeating, error);
  if (syntax === null) return;
  const line = text.split(/\r\n|\r|\n/)[Number(syntax[1]) - 1];
  assert(line !== undefined && Number(syntax[2]) <= line.length + 1, error);
}

for (
  const [kind, text, path, times, minGood, minBad] of [
    ["YAML", VALID_YAML, "config.yaml", 5000, 100, 500],
    ["JSON", VALID_JSON, "config.json", 10_000, 50, 500],
    ["JSON as YAML", VALID_JSON, "config.yaml", 2000, 20, 200],
  ] as const
) {
  Deno.test(`any mutation of ${kind} is a config or a ConfigError`, () => {
    const random = randomIntegers(1);
    assertEquals(problemsIfAny(text, path), []);
    const count = { good: 0, bad: 0, repeating: 0 };
    for (let i = 0; i < times; i++) {
      const mutated = mutate(text, random);
      try {
        const [first] = problemsIfAny(mutated, path);
        const isText = mutated.trim() !== "";
        if (path === JSON_PATH && isText) assertJsonError(mutated, first ?? "");
        if (/repeated|duplicated/.test(first ?? "")) count.repeating++;
        count[first === undefined ? "good" : "bad"]++;
      } catch (cause) {
        throw new Error(`mutation ${i}: ${JSON.stringify(mutated)}`, { cause });
      }
    }
    assertGreater(count.good, minGood);
    assertGreater(count.bad, minBad);
    assertGreater(count.repeating, 5);
  });
}

// ---- Routes together ---------------------------------------------------------

Deno.test("a route that forwards to itself is refused", () => {
  const route = (addresses: string) => {
    const [host, upstream] = addresses.split(" -> ");
    return withRoutes({ localPort: 8080, host, upstream });
  };
  const circles = `
    127.0.0.1 -> 127.0.0.1:8080
    127.0.0.1 -> localhost:8080
    localhost -> 127.0.0.1:8080
    127.0.0.1 -> 0.0.0.0:8080
    0.0.0.0 -> 127.0.0.77:8080
    0.0.0.0 -> localhost:8080
    :: -> [::1]:8080
    db.example -> db.example:8080
  `;
  for (const each of lines(circles)) {
    assertProblem(
      route(each),
      "routes[0].upstream: connections would go in a circle, 8080 -> 8080; " +
        "write the address of the server behind it",
    );
  }
  const others = `
    127.0.0.1 -> 127.0.0.1:8081
    127.0.0.1 -> 127.0.0.2:8080
    127.0.0.1 -> db.example:8080
    0.0.0.0 -> 192.0.2.1:8080
  `;
  for (const each of lines(others)) parseConfig(route(each));
});

Deno.test("a circle of routes is refused, and a chain is taken", () => {
  const chain = Array.from({ length: 4 }, (_, i) => ({
    name: `r${i}`,
    localPort: 8000 + i,
    upstream: `localhost:${8001 + i}`,
  }));
  assertEquals(parseConfig(withRoutes(...chain)).routes.length, 4);
  const last = { ...chain.pop(), upstream: "127.0.0.1:8001" };
  assertProblem(
    withRoutes(...chain, last),
    "routes[1].upstream: connections would go in a circle, " +
      "r1 -> r2 -> r3 -> r1; write the address of the server behind it",
  );
});

Deno.test("a config has 1000 routes and 10000 toxics at most, however few its bytes", () => {
  const list = (count: number, item: (index: number) => string) =>
    `[${Array.from({ length: count }, (_, i) => item(i)).join(", ")}]`;
  const numbered = (count: number, toxics = "") => {
    const route = (i: number) =>
      `{ localPort: ${i + 1}, upstream: 'a:1'${toxics} }`;
    return `routes: ${list(count, route)}\n`;
  };
  const yaml = numbered(1000, ", dropRate: 0, <<: *d").replace("*d", "&d {}");
  assertEquals(parseConfig(yaml).routes.length, 1000);
  for (const count of [1001, 120_000]) {
    const aliases = list(count - 1, () => "*r");
    const problem = `routes: ${LIST}, found a list of ${count}`;
    assertProblem(`routes: [&r {}, ${aliases.slice(1)}`, problem);
  }
  const anchor = "x: unknown key; known are seed, drainTimeoutMs, api, routes";
  const tooMany = "routes: expected at most 10000 toxics in all";
  for (const [count, expected] of [[20, []], [21, [tooMany]]] as const) {
    const toxics = list(count, (i) => `{ name: a${i}, type: noop }`);
    const text = `x: &t ${toxics}\n${numbered(500, ", toxics: *t")}`;
    assertEquals(problems(text), [anchor, ...expected]);
  }
  const keys = list(20_000, (i) => `k${i}: 1`);
  const merged = list(20_000, () => "{ <<: *m }");
  const aliases = list(2000, () => "*m");
  const many = [[20_000, `routes: ${merged}`], [2000, `y: { <<: ${aliases} }`]];
  for (const [count, rest] of many) {
    assertProblem(
      `x: &m { ${keys.slice(1, -1)} }\n${rest}`,
      `invalid YAML: ${count} merge keys (<<) are too many; ` +
        "write out what they stand for",
    );
  }
});

// ---- Hints -------------------------------------------------------------------

Deno.test("a message says how to mend what is clear", () => {
  const hints = `
    dropRate: 5% ... found "5%"; write 0.05
    timeoutRate: '12.5 %' ... found "12.5 %"; write 0.125
    latencyMs: 100ms ... found "100ms"; write 100
    timeoutMs: 2s ... found "2s"; write 2000
    timeoutMs: 1h ... found "1h"; write it in plain decimal digits
    dropRate: 200% ... found "200%"
    upstream: http://db:80/ ... found "http://db:80/"; write db:80
    upstream: db:80/0 ... found "db:80/0"; write db:80
    upstream: http://db ... found "http://db"; write db:port
    upstream: ' a:1' ... found " a:1"; write a:1
    upstream: [::1] ... found a list; put an IPv6 address in quotes
    upstream: [::1]:5432 ... ; put an IPv6 address in quotes
    host: [::1] ... found a list; put an IPv6 address in quotes
    host: [a] ... found a list
    name: my db ... found "my db"; write my-db
    toxics: { a: 1 } ... write a list, of which each item begins with "- "
    toxics: [{ type: bandwith }] ... found "bandwith"; did you mean bandwidth?
    toxics: [{ type: noop, stream: up_stream }] ... ; did you mean upstream?
  `;
  for (const hint of lines(hints)) {
    const [, field = "", yaml = "", end = ""] =
      /^(\w+): (.*) \.\.\. (.*)$/.exec(hint) ?? [];
    assertHint(withField(field, yaml), end);
  }
  assertMatch(only(problems(withField("upstream", "[::1]:5432"))), /^line 3, /);
});

Deno.test("a password in an address is not shown", () => {
  const shown = {
    "postgres://me:secret@db:5432/x": "postgres://me:***@db:5432/x",
    "postgres://me:s/e@cret@db:5432/x": "postgres://me:***@db:5432/x",
    "postgresql+psycopg2://me:secret@db:5432":
      "postgresql+psycopg2://me:***@db:5432",
    "redis://:secret@db:5432": "redis://:***@db:5432",
    "me:secret@db:5432": "me:***@db:5432",
  };
  for (const [upstream, found] of Object.entries(shown)) {
    const config = withRoutes({ localPort: 1, upstream });
    assertHint(config, `found "${found}"; write db:5432`);
  }
});

Deno.test("an integer in YAML is written in plain decimal digits", () => {
  for (const text of words("1:30 0x1F90 1_000 0b11 0o17 1e3")) {
    const attributes = `{ timeout: ${text} }`;
    const hint = `, found "${text}"; write it in plain decimal digits`;
    const yamls = [
      withField("timeoutMs", text),
      withField("<<", `{ timeoutMs: ${text} }`),
      withField("<<", `[{ latencyMs: 1 }, { timeoutMs: ${text} }]`),
      withField("toxics", `[{ type: timeout, attributes: ${attributes} }]`),
      withTopField("seed", text),
    ];
    for (const yaml of yamls) assertHint(yaml, hint);
  }
  assertHint(withTopField("api", "1_000"), ', found "1_000"');
  assertHint(withField("timeoutMs", "0755"), ', found "0755"; write 755');
  const taken = (field: "dropRate" | "timeoutMs" | "name", text: string) =>
    only(parseConfig(withField(field, text)).routes)[field];
  for (const text of words("1 1.0 1. +1")) {
    assertEquals([taken("dropRate", text), taken("timeoutMs", text)], [1, 1]);
  }
  assertEquals(taken("name", "0755"), "0755");
});

Deno.test("a key on the wrong level is told where it belongs", () => {
  const route = '"localPort": 1, "upstream": "a:1"';
  const belongs = "unknown key on this level; it belongs";
  assertProblems(`
{"routes": [{${route}}], "dropRate": 1}
  dropRate: ${belongs} in a route
{"routes": [{${route}, "seed": 1}]}
  routes[0].seed: ${belongs} at the top level
{"routes": [{${route}, "listen": ":1"}]}
  routes[0].listen: ${belongs} in a proxy of Toxiproxy's; a route has host and localPort
{"routes": [{${route}, "toxicity": 1}]}
  routes[0].toxicity: ${belongs} in a toxic
{"routes": [{${route}, "toxics": [{"type": "latency", "latency": 1}]}]}
  routes[0].toxics[0].latency: ${belongs} in the attributes of latency
{"routes": [{${route}, "toxics": [{"type": "noop", "attributes": {"toxicity": 1}}]}]}
  routes[0].toxics[0].attributes.toxicity: ${belongs} in a toxic
`);
});

Deno.test("JSON that is nearly right is told how to be mended", () => {
  const hints = {
    '{"routes": [1,]}': "remove the comma before it",
    '{"seed": 1, }': "remove the comma before it",
    '{\n// why\n"seed": 1}': "JSON has no comments",
    '{"seed": 1 /* why */}': "JSON has no comments",
    '# why\n{"seed": 1}': "JSON has no comments",
    "routes:\n  - localPort: 1": "name a YAML file .yaml, not .json",
    "- name: a": "name a YAML file .yaml, not .json",
  };
  for (const [text, hint] of Object.entries(hints)) {
    assertHint(text, `; ${hint}`, JSON_PATH);
  }
});
