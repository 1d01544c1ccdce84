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
import { casesIn, defined, only, testBytes } from "./helpers.ts";

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

/**
 * That texts have these problems, in which `...` stands for any words. In the
 * texts `\n`, `\r`, `\t` and `\ufeff` stand for what they do in a string.
 */
function assertProblems(
  cases: string,
  configOf = (text: string) => text,
  path?: string,
): void {
  for (const [given, expected] of casesIn(cases)) {
    const text = configOf(given)
      .replace(/\\(?:[nrt]|ufeff)/g, (escape) => JSON.parse(`"${escape}"`));
    const found = problems(text, path).map((problem, i) => {
      const parts = expected[i]?.split("...").map(RegExp.escape);
      const isExpected = RegExp(`^${parts?.join(".+")}$`, "s").test(problem);
      return isExpected ? expected[i] : problem;
    });
    assertEquals(found, expected, given);
  }
}

/** How a text's only problem ends, which is with what to do. */
function assertHint(text: string, end: string, path?: string): void {
  const problem = only(problems(text, path));
  assert(problem.endsWith(end), `${problem}, not ${end}`);
}

const TOP_FIELDS = ["seed", "drainTimeoutMs", "api", "proxies"];

/** A config of a route, with a field as it is written in YAML. */
function withField(field: string, yaml: string): string {
  const isTop = TOP_FIELDS.includes(field);
  const route = { localPort: "8080", upstream: "localhost:5432" };
  const all = isTop ? route : { ...route, [field]: yaml };
  const lines = Object.entries(all).map(([key, value]) => `${key}: ${value}`);
  const routes = `routes:\n  - ${lines.join("\n    ")}\n`;
  return isTop ? `${field}: ${yaml}\n${routes}` : routes;
}

/** The same from a line, such as `latencyMs: 5`. */
function withLine(line: string): string {
  const [field = "", yaml = ""] = line.split(/: (.*)/s);
  return withField(field, yaml);
}

function withRoutes(...routes: Record<string, unknown>[]): string {
  const all = routes.map((route) => ({ upstream: "localhost:5432", ...route }));
  return JSON.stringify({ routes: all });
}

function assertTaken(field: string, value: unknown): void {
  const config = parseConfig(withField(field, JSON.stringify(value)));
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
  const path = TOP_FIELDS.includes(field) ? field : `routes[0].${field}`;
  const problem = `${path}: expected ${expected}, found ${found}`;
  assertProblem(withField(field, yaml), problem);
}

/** That a field does not take values, which are shown as in JSON. */
function assertRefusedAsIs(field: string, expected: string, values: unknown[]) {
  for (const json of values.map((value) => JSON.stringify(value))) {
    assertRefused(field, json, expected, json);
  }
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
  connections: "1-",
  outages: [],
  toxics: [],
};

Deno.test("what is left out takes its default, and what is written is kept", () => {
  const expected = { drainTimeoutMs: 30_000, routes: [DEFAULTS] };
  assertEquals(parseConfig(withField("localPort", "8080")), expected);
  assertEquals(parseConfig(withRoutes(GOOD), JSON_PATH), expected);
  const text = `{
    "seed": 42, "drainTimeoutMs": 0, "api": "0.0.0.0:8474",
    "routes": [{
      "name": "db", "localPort": 65534, "host": "::1", "enabled": false,
      "upstream": "[::1]:65535", "dropRate": 1, "timeoutRate": 0.25,
      "timeoutMs": 2147483647, "latencyMs": 150, "jitterMs": 50,
      "connectTimeoutMs": 1, "halfCloseTimeoutMs": 1, "profile": "",
      "connections": ["1-3", 5, "*/4"], "outages": [{
        "afterMs": 1, "forMs": 2, "everyMs": 3, "mode": "drop", "reset": true
      }],
      "toxics": [{
        "name": "slow", "type": "latency", "stream": "upstream",
        "toxicity": 0.5, "attributes": {"latency": 100, "jitter": 20},
        "connections": 7, "after": {"match": {"hex": "0D0a"}},
        "schedule": {"afterMs": 1, "forMs": 2, "everyMs": 2, "from": "start"}
      }]
    }]
  }`;
  const written = JSON.parse(text);
  for (const path of [...BOTH_PATHS, undefined]) {
    assertEquals(parseConfig(text, path), written);
  }
  const given = { seed: 8, drainTimeoutMs: undefined }; // which is not set
  assertEquals(parseConfig(text, JSON_PATH, given), { ...written, seed: 8 });
});

Deno.test("the example is a good config, and shows every field", async () => {
  const path = new URL("../config.example.yaml", import.meta.url);
  const text = await Deno.readTextFile(path);
  assertGreater(parseConfig(text).routes.length, 1);
  for (
    const field of [
      "seed",
      "drainTimeoutMs",
      ...Object.keys(DEFAULTS),
      "schedule",
      "after",
    ]
  ) {
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

for (const [field, range] of Object.entries(RANGES)) {
  const [min, max, step] = range;
  Deno.test(`${field} takes its bounds, nothing beyond, and no other kind of value`, () => {
    for (const value of [min, max]) assertTaken(field, value);
    if (step < 1) assertTaken(field, 0.5);
    for (const value of [min - step, max + step]) {
      assertRefused(field, `${value}`, expectedOf(range), `${value}`);
    }
    for (const [yaml, found] of Object.entries(NEVER_A_NUMBER)) {
      assertRefused(field, yaml, expectedOf(range), found);
    }
  });
}

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
  for (const upstream of bad.map((each) => JSON.stringify(each))) {
    const found = only(problems(withField("upstream", upstream)));
    const expected = `routes[0].upstream: expected ${UPSTREAM}, found `;
    assert(found.startsWith(expected + upstream), found);
  }
  assertRefusedAsIs("upstream", UPSTREAM, [5432, null]);
  assertRefused("upstream", "[]", UPSTREAM, "a list");
  assertRefused("upstream", "{ host: a, port: 1 }", UPSTREAM, "a mapping");
});

Deno.test("a host is a name or an IP address, without a port", () => {
  const good = words("localhost 0.0.0.0 127.0.0.1 :: ::1 a-b.c");
  for (const host of good) assertTaken("host", host);
  const bad = words("* localhost:80 127.0.0.1:80 [::1]:80 ::g 256.0.0.1");
  const expected = "a host name or an IP address";
  assertRefusedAsIs("host", expected, [...bad, "", 5, null]);
  assertRefused("host", '["127.0.0.1"]', expected, "a list");
});

Deno.test("a name is short, and one word", () => {
  const good = words("a db-1 größe 😀 __proto__ ... .a ..a %2e");
  for (const name of [...good, "x".repeat(255)]) assertTaken("name", name);
  const expected = "1 to 255 characters without white space, not . or ..";
  const bad = ["", " ", ".", "..", "\u0000", "\u001b[31m", 5, null];
  assertRefusedAsIs("name", expected, bad);
  const long = "x".repeat(56);
  assertRefused("name", "x".repeat(256), expected, `"${long}…"`);
});

const LIST = "expected a list of routes, 1000 at most";
const NONE = "expected at least one route";

const ROUTE = '"localPort": 1, "upstream": "a:1"';
const LEVEL = "unknown key on this level; it belongs";
const TAB = "column 1: invalid YAML: a tab in the indentation; write spaces";

/** Texts with problems, by the path that they have, and their test. */
const PROBLEMS = {
  "config.yaml": {
    "routes are a list of mappings": `
routes: [] => routes: ${NONE}
{} => routes: ${NONE}
routs: { db: { localPort: 1, upstream: "a:1" } }
  routs: unknown key; did you mean routes?
  routes: ${NONE}
routes: => routes: ${LIST}, found null
routes: db => routes: ${LIST}, found "db"
routes: { a: { localPort: 1 } } => routes: ${LIST}, found a mapping; write a list, of which each item begins with "- "
routes: [1, null, [], x]
  routes[0]: expected a mapping, found 1
  routes[1]: expected a mapping, found null
  routes[2]: expected a mapping, found a list
  routes[3]: expected a mapping, found "x"
routes: [{}]
  routes[0].localPort: missing; expected an integer from 0 to 65535
  routes[0].upstream: missing; expected ${UPSTREAM}
routes: [&a { localPort: 1, upstream: 'a:1', name: x }, *a]
  routes[1].localPort: 1 is already taken by routes[0]
  routes[1].name: x is already taken by routes[0]
`,
    "a key on the wrong level is told where it belongs": `
{"routes": [{${ROUTE}}], "dropRate": 1} => dropRate: ${LEVEL} in a route
{"routes": [{${ROUTE}, "seed": 1}]} => routes[0].seed: ${LEVEL} at the top level
{"routes": [{${ROUTE}, "listen": ":1"}]}
  routes[0].listen: ${LEVEL} in a proxy of Toxiproxy's; a route has host and localPort
{"routes": [{${ROUTE}, "toxicity": 1}]} => routes[0].toxicity: ${LEVEL} in a toxic
{"routes": [{${ROUTE}, "toxics": [{"type": "latency", "latency": 1}]}]}
  routes[0].toxics[0].latency: ${LEVEL} in the attributes of a toxic such as latency
{"routes": [{${ROUTE}, "toxics": [{"type": "noop", "attributes": {"toxicity": 1}}]}]}
  routes[0].toxics[0].attributes.toxicity: ${LEVEL} in a toxic
`,
    "an error in YAML names its line and column": String.raw`
seed: 1\nroutes: [\n => line 3, column 1: invalid YAML: ...
seed: 1\nroutes: }\n => line 2, column 9: invalid YAML: ...
seed: 1\nseed: 2\n => line 2, column 1: invalid YAML: ...
routes:\n  - localPort: 1\n    localPort: 2\n => line 3, column 5: invalid YAML: ...
seed: 'x\n => line 2, column 1: invalid YAML: ...
seed: "\q"\n => line 1, column 9: invalid YAML: ...
seed: 1\n\nroutes: *nowhere\n => line 3, column 17: invalid YAML: ...
seed: @x\n => line 1, column 7: invalid YAML: ...
seed: ${"`"}x\n => line 1, column 7: invalid YAML: ...
a: b: c\n => line 1, column 5: invalid YAML: ...
seed: 1\r\nroutes: }\r\n => line 2, column 9: invalid YAML: ...
\ufeffroutes: }\n => line 1, column 9: invalid YAML: ...
routes: [a b: {]}\n => line 1, column 16: invalid YAML: ...
seed: 1\nroutes:\n  - { localPort: 1, localPort: 2 }\n => line 3, column ...: invalid YAML: ...
seed: 1\nroutes: ${"\u0007"}\n => line 2, column ...: invalid YAML: ...
seed: 1\nroutes: ${"\ud800"}\n => line 2, column ...: invalid YAML: ...
!!js/function 'function () {}' => line ..., column ...: invalid YAML: ...
!!js/regexp /x/ => line ..., column ...: invalid YAML: ...
!!python/object:os.system x => line ..., column ...: invalid YAML: ...
!<tag:example.com,2000:x> y => line ..., column ...: invalid YAML: ...
routes: [{ <<: 5, localPort: 1 }] => line ..., column ...: invalid YAML: ...
routes:\n\t- localPort: 1\n\t\tupstream: a:1\n => line 2, ${TAB}
routes:\n  - localPort: 1\n\tupstream: a:1\n => line 3, ${TAB}
routes:\r\n  - localPort: 1\r\n  \tupstream: a:1\r\n => line 3, ${TAB}
seed: 1\n\tdrainTimeoutMs: 5\n => line 2, ${TAB}
routes: [\n  1\n]\n\tseed: 1\n => line 4, ${TAB}
`,
  },
  [JSON_PATH]: {
    "an error in JSON names its line and column": String.raw`
{ => line 1, column 2: invalid JSON: ...
[1, 2 => line 1, column 6: invalid JSON: ...
{}} => line 1, column 3: invalid JSON: ...
{} [] => line 1, column 4: invalid JSON: ...
{"seed": 1,} => line 1, column 12: invalid JSON: ...; remove the comma before it
{"routes": [1,]} => line 1, column 15: invalid JSON: ...; remove the comma before it
{"seed": 1, } => ...; remove the comma before it
{\n  "seed": 1\n  "routes": []\n} => line 3, column 3: invalid JSON: ...
{"seed" 1} => line 1, column 9: invalid JSON: ...
{seed: 1} => line 1, column 2: invalid JSON: ...
{'seed': 1} => line 1, column 2: invalid JSON: ...
// comment\n{"seed": 1} => line 1, column 1: invalid JSON: ...; JSON has no comments
{\n  "seed": 1 // comment\n} => line 2, column 13: invalid JSON: ...; JSON has no comments
{"seed": 1 /* why */} => ...; JSON has no comments
# why\n{"seed": 1} => ...; JSON has no comments
{\r\n  "seed": 1,\r\n  x\r\n} => line 3, column 3: invalid JSON: ...
{\r  "seed": 1,\r  x\r} => line 3, column 3: invalid JSON: ...
\ufeff{"seed": x} => line 1, column 10: invalid JSON: ...
{"seed": 1, "seed": 2} => line 1, column 13: invalid JSON: ...
{"seed": 1,\n "s\u0065ed": 2} => line 2, column 2: invalid JSON: ...
{"routes": [{"name": "a", "name": "a"}]} => line 1, column 27: invalid JSON: ...
routes:\n  - localPort: 1 => ...; name a YAML file .yaml, not .json
- name: a => ...; name a YAML file .yaml, not .json
[\n  "abc] => line 2, column 8: invalid JSON: ...
[\n  "a\nb"] => line 2, column 5: invalid JSON: ...
[\n  "a\tb"] => line 2, column 5: invalid JSON: ...
[\n  "a${"\0"}b"] => line 2, column 5: invalid JSON: ...
[\n  "\q"] => line 2, column 5: invalid JSON: ...
[\n  "\u12g4"] => line 2, column 8: invalid JSON: ...
[\n  "\u{1}"] => line 2, column 6: invalid JSON: ...
[\n  "\] => line 2, column 5: invalid JSON: ...
`,
  },
};

for (const [path, tests] of Object.entries(PROBLEMS)) {
  for (const [name, cases] of Object.entries(tests)) {
    Deno.test(name, () => assertProblems(cases, undefined, path));
  }
}

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
  // Of very many problems the message shows the first.
  const error = failure(`routes: [${"1,".repeat(1000)}]`);
  const lines = error.message.split("\n");
  assertEquals([error.problems.length, lines.length], [1000, 52]);
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
  assertProblem(withField("proxies", "[]"), problem);
  // It is shown so that it cannot mislead.
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
  const routesOf = (written: string) =>
    withRoutes(
      ...words(written).map((each) => {
        const [port, name] = each.split("/");
        return { localPort: Number(port), ...(name && { name }) };
      }),
    );
  const taken = "is already taken by routes[0]";
  const cases = `
1/a 2/b 1/c 1/d
  routes[2].localPort: 1 ${taken}
  routes[3].localPort: 1 ${taken}
1 1 => routes[1].localPort: 1 ${taken}
1/a 2/a => routes[1].name: a ${taken}
1/2 2 => routes[1].name: 2 ${taken}
2 1/2 => routes[1].name: 2 ${taken}
0 0 => routes[1].name: 0 ${taken}
`;
  assertProblems(cases, routesOf);
  const { routes } = parseConfig(routesOf("0/a 0/b 0/c"));
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

Deno.test("marks and any line ends are fine, several documents are not", () => {
  const yaml = withField("latencyMs", "5");
  const json = JSON.stringify({ routes: [{ ...GOOD, latencyMs: 5 }] }, null, 2);
  const expected = parseConfig(json, JSON_PATH);
  for (
    const [text, path] of [[yaml, "c.json.yml"], [json, "c.JSON"]] as const
  ) {
    for (const lineEnd of ["\n", "\r\n", "\r"]) {
      for (const mark of ["", "\ufeff"]) {
        const variant = mark + text.replaceAll("\n", lineEnd);
        assertEquals(parseConfig(variant, path), expected);
      }
    }
  }
  assertEquals(parseConfig(`%YAML 1.2\n---\n${yaml}...\n`), expected);
  for (const text of [`${yaml}---\n${yaml}`, `${yaml}...\n---\n${yaml}`]) {
    assertStringIncludes(only(problems(text)), "invalid YAML: ");
  }
  const problem = only(problems(yaml, "c.JSON")); // told by the file's name
  assertMatch(problem, /^line 1, column 1: invalid JSON: /);
});

Deno.test("a tab separates", () => {
  const fine = {
    "routes:\n  -\tlocalPort:\t1\n    upstream: a:1": "c.yaml",
    "{ routes: [\n\t{ localPort: 1, upstream: a:1 }]}\n\t# why\n\t": "c.yaml",
    "routes: [\n\t{ localPort: 1, upstream: a:1 }\n]": "c.yaml",
    '{\t"routes":\t[\n\t\t{"localPort":1,"upstream":"a:1"}\n]}': "c.json",
  };
  for (const [text, path] of Object.entries(fine)) parseConfig(text, path);
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

// ---- YAML --------------------------------------------------------------------

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
  // Anchors and merge keys save writing.
  const { routes } = parseConfig(`
routes:
  - &slow { localPort: 1, upstream: "a:1", latencyMs: 100 }
  - { <<: *slow, localPort: 2, jitterMs: 10 }
`);
  assertEquals(
    routes.map(({ name, latencyMs, jitterMs }) => [name, latencyMs, jitterMs]),
    [["1", 100, 0], ["2", 100, 10]],
  );
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
  const [problem] = problems(`${"[".repeat(deep)}1${"]".repeat(deep)}`);
  assertEquals(problem, "invalid YAML: nested too deeply");
  for (const start of ["- ", "? ", "{a: "]) problems(start.repeat(deep) + "a");
  const levels = Array.from({ length: 1000 }, (_, i) => `${" ".repeat(i)}a:`);
  problems(levels.join("\n"));
});

// ---- JSON --------------------------------------------------------------------

Deno.test("what is no value in JSON is an error there", () => {
  const bad = words(`
    10:NaN 10:Infinity 11:-Infinity 10:undefined 10:True 13:nul 10:'1' 11:01
    10:+1 12:1. 10:.5 12:1e 11:0x1 11:1_000 10:/*x*/1
  `);
  for (const each of bad) {
    const [column, value] = each.split(":");
    const problem = only(problems(`{"seed": ${value}}`, JSON_PATH));
    const start = `line 1, column ${column}: invalid JSON: `;
    assert(problem.startsWith(start), `${value}: ${problem}`);
  }
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

/** What is put into a text: characters, and what means something there. */
const PIECES = [
  ..."{}[]\",:;\\/|>!&*?#%@`~'-+._= \n\t\r0123456789eExaubnrt",
  ..."\u0000\u0007\u001f\u007f\u0085\u00a0\u2028\u200bé\ud800\udc00😀",
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

/** The text, of which a few parts are left out, repeated or replaced. */
function mutate(text: string, random: (limit: number) => number): string {
  const pick = <T>(of: readonly T[]) => defined(of[random(of.length)]);
  const values = [...text.matchAll(/[\w.:"'[\]-]+|$/g)];
  for (let times = 1 + random(3); times > 0; times--) {
    const { index, 0: value } = pick(values);
    const lengths = [0, 1, random(12), value.length];
    const length = pick(lengths);
    const from = length === value.length ? index : random(text.length + 1);
    const part = text.slice(from, from + length);
    const by = [part + part, pick(PIECES), pick(PIECES), pick(values)[0], ""];
    text = text.slice(0, from) + pick(by) + text.slice(from + length);
  }
  return text;
}

/** The problems of a text; if it has none, it is a config that is valid. */
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
  // It is one by its own rules, of which the fields' tests know each.
  assertGreater(config.routes.length, 0);
  assertEquals(parseConfig(JSON.stringify(config), JSON_PATH), config);
  return [];
}

/** That the problem, if any, is one of JSON only if the text has it. */
function assertJsonProblem(text: string, problem: string): void {
  let [isJson, values] = [true, 0];
  try {
    JSON.parse(text, function (_key, value) {
      if (!Array.isArray(this)) values++;
      return value;
    });
  } catch {
    isJson = false;
  }
  const strings = isJson ? text.matchAll(/"(?:[^"\\]|\\.)*"(\s*:)?/gs) : [];
  const keys = [...strings].filter(([, colon]) => colon).length;
  const repeats = isJson && keys >= values; // of which one is the whole
  const syntax = /^line (\d+), column (\d+): invalid JSON: /.exec(problem);
  assertEquals(syntax === null, isJson && !repeats, problem);
  assertEquals(problem.endsWith(" is repeated"), repeats, problem);
  if (syntax === null) return;
  const line = text.split(/\r\n|\r|\n/)[Number(syntax[1]) - 1];
  assert(Number(syntax[2]) <= defined(line).length + 1, problem);
}

for (
  const [kind, text, path, times, minGood, minBad] of [
    ["YAML", VALID_YAML, "config.yaml", 5000, 100, 500],
    ["JSON", VALID_JSON, JSON_PATH, 10_000, 50, 500],
    ["JSON as YAML", VALID_JSON, "config.yaml", 2000, 20, 200],
  ] as const
) {
  Deno.test(`any mutation of ${kind} is a config or a ConfigError`, () => {
    const numbers = new Uint32Array(testBytes(4 * 20 * times).buffer);
    let used = 0;
    const random = (limit: number) => defined(numbers[used++]) % limit;
    assertEquals(problemsIfAny(text, path), []);
    const count = { good: 0, bad: 0, repeating: 0 };
    for (let i = 0; i < times; i++) {
      const mutated = mutate(text, random);
      try {
        const [problem = ""] = problemsIfAny(mutated, path);
        const isText = mutated.trim() !== "";
        if (path === JSON_PATH && isText) assertJsonProblem(mutated, problem);
        if (/repeated|duplicated/.test(problem)) count.repeating++;
        count[problem === "" ? "good" : "bad"]++;
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

Deno.test("routes that forward in a circle are refused, and a chain is taken", () => {
  const route = (addresses: string) => {
    const [host, upstream] = addresses.split(" -> ");
    return withRoutes({ localPort: 8080, host, upstream });
  };
  const circle = "upstream: connections would go in a circle";
  const hint = "write the address of the server behind it";
  const circles = `
127.0.0.1 -> 127.0.0.1:8080
127.0.0.1 -> localhost:8080
localhost -> 127.0.0.1:8080
127.0.0.1 -> 0.0.0.0:8080
0.0.0.0 -> 127.0.0.77:8080
0.0.0.0 -> localhost:8080
:: -> [::1]:8080
db.example -> db.example:8080
  routes[0].${circle}, 8080 -> 8080; ${hint}
`;
  assertProblems(circles, route);
  const others = `
    127.0.0.1 -> 127.0.0.1:8081
    127.0.0.1 -> 127.0.0.2:8080
    127.0.0.1 -> db.example:8080
    0.0.0.0 -> 192.0.2.1:8080
  `;
  for (const each of lines(others)) parseConfig(route(each));
  const chain = [0, 1, 2, 3].map((i) => ({
    name: `r${i}`,
    localPort: 8000 + i,
    upstream: `localhost:${8001 + i}`,
  }));
  parseConfig(withRoutes(...chain));
  const last = { ...chain.pop(), upstream: "127.0.0.1:8001" };
  const problem = `routes[1].${circle}, r1 -> r2 -> r3 -> r1; ${hint}`;
  assertProblem(withRoutes(...chain, last), problem);
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

const HINTS = `
dropRate: 5% => ...found "5%"; write 0.05
timeoutRate: '12.5 %' => ...found "12.5 %"; write 0.125
latencyMs: 100ms => ...found "100ms"; write 100
timeoutMs: 2s => ...found "2s"; write 2000
timeoutMs: 1h => ...found "1h"; write it in plain decimal digits
dropRate: 200% => ...found "200%"
upstream: http://db:80/ => ...found "http://db:80/"; write db:80
upstream: db:80/0 => ...found "db:80/0"; write db:80
upstream: http://db => ...found "http://db"; write db:port
upstream: ' a:1' => ...found " a:1"; write a:1
upstream: [::1] => ...found a list; put an IPv6 address in quotes
upstream: [::1]:5432 => ...; put an IPv6 address in quotes
host: [::1] => ...found a list; put an IPv6 address in quotes
connections: */3 => ...; put text that begins with * in quotes
host: [a] => ...found a list
name: my db => ...found "my db"; write my-db
toxics: { a: 1 } => ...write a list, of which each item begins with "- "
toxics: [{ type: bandwith }] => ...found "bandwith"; did you mean bandwidth?
toxics: [{ type: noop, stream: up_stream }] => ...; did you mean upstream?
upstream: postgres://me:secret@db:1/x => ...found "postgres://me:***@db:1/x"; write db:1
upstream: postgres://me:s/e@cret@db:1/x => ...found "postgres://me:***@db:1/x"; write db:1
upstream: postgresql+psycopg2://me:secret@db:1 => ...found "postgresql+psycopg2://me:***@db:1"; write db:1
upstream: redis://:secret@db:1 => ...found "redis://:***@db:1"; write db:1
upstream: me:secret@db:1 => ...found "me:***@db:1"; write db:1
`;

Deno.test("a message says how to mend what is clear, and shows no password", () => {
  assertProblems(HINTS, withLine);
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
      withField("seed", text),
    ];
    for (const yaml of yamls) assertHint(yaml, hint);
  }
  assertHint(withField("api", "1_000"), ', found "1_000"');
  assertHint(withField("timeoutMs", "0755"), ', found "0755"; write 755');
  const taken = (field: "dropRate" | "timeoutMs" | "name", text: string) =>
    only(parseConfig(withField(field, text)).routes)[field];
  for (const text of words("1 1.0 1. +1")) {
    assertEquals([taken("dropRate", text), taken("timeoutMs", text)], [1, 1]);
  }
  assertEquals(taken("name", "0755"), "0755");
});
