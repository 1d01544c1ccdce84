/** What a configuration may say, and what people are told when it may not. */

import {
  assert,
  assertEquals,
  assertGreater,
  assertInstanceOf,
  assertLess,
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

const GOOD = { localPort: 8080, upstream: "localhost:5432" };

function failure(text: string, path = "config.yaml"): ConfigError {
  return assertThrows(() => parseConfig(text, path), ConfigError);
}

function problems(text: string, path?: string): string[] {
  return [...failure(text, path).problems];
}

/** A config of one route, with a field as it is written in YAML. */
function withField(field: string, yaml: string): string {
  const fields = { localPort: "8080", upstream: "localhost:5432" };
  const lines = Object.entries({ ...fields, [field]: yaml })
    .map(([key, value]) => `${key}: ${value}`);
  return `routes:\n  - ${lines.join("\n    ")}\n`;
}

function withRoutes(...routes: Record<string, unknown>[]): string {
  const all = routes.map((route) => ({ upstream: "localhost:5432", ...route }));
  return JSON.stringify({ routes: all });
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
  toxics: [],
};

Deno.test("what is left out takes its default", () => {
  const expected = { drainTimeoutMs: 30_000, routes: [DEFAULTS] };
  assertEquals(parseConfig(withField("localPort", "8080")), expected);
  assertEquals(parseConfig(withRoutes(GOOD), "config.json"), expected);
});

Deno.test("what is written is kept", () => {
  const written: Config = {
    seed: 42,
    drainTimeoutMs: 0,
    api: "0.0.0.0:8474",
    routes: [{
      name: "db",
      localPort: 65534,
      host: "::1",
      enabled: false,
      upstream: "[::1]:65535",
      dropRate: 1,
      timeoutRate: 0.25,
      timeoutMs: 2147483647,
      latencyMs: 150,
      jitterMs: 50,
      connectTimeoutMs: 1,
      halfCloseTimeoutMs: 1,
      toxics: [{
        name: "slow",
        type: "latency",
        stream: "upstream",
        toxicity: 0.5,
        attributes: { latency: 100, jitter: 20 },
      }],
    }],
  };
  const json = JSON.stringify(written);
  assertEquals(parseConfig(json, "config.json"), written);
  assertEquals(parseConfig(json, "config.yaml"), written);
  assertEquals(parseConfig(json), written);
});

Deno.test("JSON is told by the file's name, in any case", () => {
  const yaml = withField("localPort", "8080");
  assertEquals(parseConfig(yaml, "a.json.yml").routes.length, 1);
  assertMatch(problems(yaml, "a.JSON")[0], /^line 1, column 1: invalid JSON: /);
});

Deno.test("the example is a good config, and shows every field", async () => {
  const text = await Deno.readTextFile(
    new URL("../config.example.yaml", import.meta.url),
  );
  const { routes } = parseConfig(text);
  assertGreater(routes.length, 1);
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
  assertEquals(
    message,
    "config: routes[0].dropRate: expected a number from 0 to 1, found NaN",
  );
  const strange = [
    undefined,
    null,
    Symbol("x"),
    new Map(),
    new Date(),
    { routes: new Array(1) },
    { routes: [{ ...GOOD, localPort: 1n }] },
    { routes: [{ ...GOOD, upstream: () => "localhost:5432" }] },
    { routes: [{ ...GOOD, host: Symbol("x") }] },
    { routes: [Object.create(GOOD)] },
  ];
  for (const config of strange) await start(config);
});

// ---- Wrong values ------------------------------------------------------------

const MS = "an integer from 0 to 2147483647";
const EXPECTED: Record<string, string> = {
  localPort: "an integer from 0 to 65535",
  dropRate: "a number from 0 to 1",
  timeoutRate: "a number from 0 to 1",
  timeoutMs: MS,
  latencyMs: MS,
  jitterMs: MS,
  connectTimeoutMs: "an integer from 1 to 2147483647",
  halfCloseTimeoutMs: "an integer from 0 to 2147483647",
};
const NEVER_A_NUMBER = {
  ".nan": ".nan",
  ".inf": ".inf",
  "-.inf": "-.inf",
  "-1": "-1",
  "-0.5": "-0.5",
  "1.5": "1.5",
  "1e300": "1e300",
  "9007199254740993": "9007199254740992",
  "'1'": '"1"; remove the quotes',
  '" 1 "': '" 1 "; remove the quotes',
  "'-1'": '"-1"',
  "''": '""',
  "' '": '" "',
  "abc": '"abc"',
  "5h": '"5h"',
  "true": "true",
  "null": "null",
  "~": "null",
  "": "null",
  "[1]": "a list",
  "{ a: 1 }": "a mapping",
  "2024-01-01": "a date",
};

Deno.test("a number field takes no other kind of value", () => {
  for (const [field, expected] of Object.entries(EXPECTED)) {
    for (const [yaml, found] of Object.entries(NEVER_A_NUMBER)) {
      assertEquals(problems(withField(field, yaml)), [
        `routes[0].${field}: expected ${expected}, found ${found}`,
      ]);
    }
  }
});

Deno.test("a number field takes its bounds, and nothing beyond", () => {
  const bounds: Record<string, [below: number, good: number[], above: number]> =
    {
      localPort: [-1, [0, 65535], 65536],
      dropRate: [-0.0001, [0, 0.5, 1], 1.0001],
      timeoutRate: [-0.0001, [0, 0.5, 1], 1.0001],
      timeoutMs: [-1, [0, 2147483647], 2147483648],
      latencyMs: [-1, [0, 2147483647], 2147483648],
      jitterMs: [-1, [0, 2147483647], 2147483648],
      connectTimeoutMs: [0, [1, 2147483647], 2147483648],
      halfCloseTimeoutMs: [-1, [0, 2147483647], 2147483648],
    };
  for (const [field, [below, good, above]] of Object.entries(bounds)) {
    for (const value of good) {
      const [route] = parseConfig(withField(field, `${value}`)).routes;
      assertEquals(Object.entries(route).find(([key]) => key === field), [
        field,
        value,
      ]);
    }
    for (const value of [below, above]) {
      assertEquals(problems(withField(field, `${value}`)), [
        `routes[0].${field}: expected ${EXPECTED[field]}, found ${value}`,
      ]);
    }
  }
});

Deno.test("a seed is an integer, as large as one can be", () => {
  const rest = withField("localPort", "8080");
  const expected =
    "seed: expected an integer from 0 to 9007199254740991, found";
  for (const seed of [0, 42, Number.MAX_SAFE_INTEGER]) {
    assertEquals(parseConfig(`seed: ${seed}\n${rest}`).seed, seed);
  }
  assertEquals(parseConfig(rest).seed, undefined);
  const bad = {
    "-1": "-1",
    "1.5": "1.5",
    "9007199254740992": "9007199254740992",
    ".nan": ".nan",
    "'42'": '"42"; remove the quotes',
    "random": '"random"',
    "null": "null",
  };
  for (const [yaml, found] of Object.entries(bad)) {
    assertEquals(problems(`seed: ${yaml}\n${rest}`), [`${expected} ${found}`]);
  }
  assertEquals(problems(`drainTimeoutMs: -1\n${rest}`), [
    `drainTimeoutMs: expected ${MS}, found -1`,
  ]);
});

Deno.test("an upstream is a host and a port", () => {
  const good = [
    "localhost:1",
    "localhost:65535",
    "db.example.com:5432",
    "my_service:80",
    "xn--bcher-kva.example:80",
    "a-b.c-d:80",
    "127.0.0.1:5432",
    "[::1]:5432",
    "[2001:DB8::1]:5432",
    "[::ffff:127.0.0.1]:80",
  ];
  for (const upstream of good) {
    const { routes } = parseConfig(withRoutes({ localPort: 2, upstream }));
    assertEquals(routes[0].upstream, upstream);
  }
  const bad = [
    "",
    " ",
    "localhost",
    "localhost:",
    ":5432",
    "localhost:0",
    "localhost:65536",
    "localhost:123456",
    "localhost:-1",
    "localhost:+1",
    "localhost:1.5",
    "localhost:1e3",
    "localhost:0x50",
    "localhost:http",
    "localhost: 80",
    "localhost :80",
    " localhost:80",
    "localhost:80 ",
    "localhost:80\n",
    "local\nhost:80",
    "http://localhost:80",
    "tcp://localhost:80",
    "localhost:80/",
    "localhost:80/path",
    "localhost:80?x",
    "user@localhost:80",
    "http://user@",
    "localhost:80,localhost:81",
    "*:80",
    "::1",
    "::1:80",
    "[::1]",
    "[::1]80",
    "[::1:80",
    "[::g]:80",
    "[]:80",
    "[localhost]:80",
    "256.0.0.1:80",
    "1.2.3.4.5:80",
    "bücher.example:80",
    "local%68ost:80",
    "localhost:８０",
  ];
  const expected = "host:port or [ipv6]:port, the port from 1 to 65535";
  for (const upstream of bad) {
    const [problem, ...others] = problems(
      withRoutes({ localPort: 1, upstream }),
    );
    const found = JSON.stringify(upstream);
    const start = `routes[0].upstream: expected ${expected}, found ${found}`;
    assert(problem.startsWith(start), problem);
    assertEquals(others, []);
  }
  const others = {
    "5432": "5432",
    "null": "null",
    "[]": "a list",
    "{ host: a, port: 1 }": "a mapping",
  };
  for (const [yaml, found] of Object.entries(others)) {
    assertEquals(problems(withField("upstream", yaml)), [
      `routes[0].upstream: expected ${expected}, found ${found}`,
    ]);
  }
});

Deno.test("a host is a name or an IP address, without a port", () => {
  for (
    const host of ["localhost", "0.0.0.0", "127.0.0.1", "::", "::1", "a-b.c"]
  ) {
    const { routes } = parseConfig(withRoutes({ localPort: 1, host }));
    assertEquals(routes[0].host, host);
  }
  const bad = [
    "",
    "*",
    "localhost:80",
    "127.0.0.1:80",
    "[::1]:80",
    "::g",
    "256.0.0.1",
    5,
    null,
    ["127.0.0.1"],
  ];
  for (const host of bad) {
    const found = Array.isArray(host) ? "a list" : JSON.stringify(host);
    assertEquals(problems(withRoutes({ localPort: 1, host })), [
      `routes[0].host: expected a host name or an IP address, found ${found}`,
    ]);
  }
});

Deno.test("a name is short, and one word", () => {
  for (
    const name of [
      ...["a", "db-1", "x".repeat(255), "größe", "😀", "__proto__"],
      ...["...", ".a", "..a", "%2e"],
    ]
  ) {
    const { routes } = parseConfig(withRoutes({ localPort: 1, name }));
    assertEquals(routes[0].name, name);
  }
  const tooLong = "x".repeat(256);
  const bad: [name: unknown, found: string][] = [
    ["", '""'],
    [" ", '" "'],
    [".", '"."'],
    ["..", '".."'],
    ["\u0000", '"\\u0000"'],
    ["\u001b[31m", '"\\u001b[31m"'],
    [tooLong, `"${tooLong.slice(0, 56)}…"`],
    [5, "5"],
    [null, "null"],
  ];
  for (const [name, found] of bad) {
    assertEquals(problems(withRoutes({ localPort: 1, name })), [
      `routes[0].name: expected 1 to 255 characters without white space, not . or .., found ${found}`,
    ]);
  }
});

Deno.test("routes are a list of mappings", () => {
  const list = "routes: expected a list of routes, at least one, found";
  assertEquals(problems("routes: []"), [`${list} a list`]);
  assertEquals(problems("routes:"), [`${list} null`]);
  assertEquals(problems("routes: db"), [`${list} "db"`]);
  assertEquals(problems("{}"), [
    "routes: missing; expected a list of routes, at least one",
  ]);
  const mapping = "expected a mapping with localPort and upstream, found";
  assertEquals(problems("routes: [1, null, [], x]"), [
    `routes[0]: ${mapping} 1`,
    `routes[1]: ${mapping} null`,
    `routes[2]: ${mapping} a list`,
    `routes[3]: ${mapping} "x"`,
  ]);
  assertEquals(problems("routes: [{}]"), [
    "routes[0].localPort: missing; expected an integer from 0 to 65535",
    "routes[0].upstream: missing; expected host:port or [ipv6]:port, the port from 1 to 65535",
  ]);
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
  assertEquals(
    failure(text, "some/where.yaml").message,
    `some/where.yaml: 8 problems
  seeds: unknown key; did you mean seed?
  drainTimeoutMs: expected ${MS}, found "soon"
  routes[0].localPort: expected an integer from 0 to 65535, found "abc"
  routes[1].dropRat: unknown key; did you mean dropRate?
  routes[2].upstream: expected host:port or [ipv6]:port, the port from 1 to 65535, found "localhost"
  routes[2].dropRate: expected a number from 0 to 1, found 2
  routes[1].name: a is already taken by routes[0]
  routes[2].localPort: 15432 is already taken by routes[1]`,
  );
});

Deno.test("a single problem stands on one line", () => {
  const { message, name } = failure("routes: 5", "x.yaml");
  assertEquals(name, "ConfigError");
  assertEquals(
    message,
    "x.yaml: routes: expected a list of routes, at least one, found 5",
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

Deno.test("an unknown key is reported with what was probably meant", () => {
  const meant = {
    dropRat: "dropRate",
    droprate: "dropRate",
    drop_rate: "dropRate",
    latency: "latencyMs",
    jitter: "jitterMs",
    localport: "localPort",
    upstrem: "upstream",
    Name: "name",
    connectTimeout: "connectTimeoutMs",
  };
  for (const [key, known] of Object.entries(meant)) {
    assertEquals(problems(withField(key, "1")), [
      `routes[0].${key}: unknown key; did you mean ${known}?`,
    ]);
  }
  const fields = Object.keys(DEFAULTS).join(", ");
  for (const key of ["bandwidth", "x"]) {
    assertEquals(problems(withField(key, "1")), [
      `routes[0].${key}: unknown key; known are ${fields}`,
    ]);
  }
  assertEquals(problems(`proxies: []\n${withField("name", "a")}`), [
    "proxies: unknown key; known are seed, drainTimeoutMs, api, routes",
  ]);
});

Deno.test("a key is shown so that it cannot mislead", () => {
  const shown = {
    '"a\\nb"': '"a\\nb"',
    '""': '""',
    '"a b"': '"a b"',
    '"\\e[31m"': '"\\u001b[31m"',
    '"a.b"': '"a.b"',
  };
  for (const [yaml, expected] of Object.entries(shown)) {
    assertStringIncludes(
      problems(withField(yaml, "1"))[0],
      `routes[0].${expected}: unknown key`,
    );
  }
  const long = problems(`? ${"x".repeat(100_000)}\n: 1\n`)[0];
  assertLess(long.length, 200);
});

Deno.test("keys of every object's prototype are keys like others", () => {
  const keys = ["__proto__", "constructor", "toString", "hasOwnProperty"];
  for (const key of keys) {
    for (const path of ["config.yaml", "config.json"]) {
      const inner = `{"localPort": 1, "upstream": "a:1"}`;
      const top = `{"${key}": {"routes": [${inner}]}, "routes": [${inner}]}`;
      assertEquals(problems(top, path), [
        `${key}: unknown key; known are seed, drainTimeoutMs, api, routes`,
      ]);
      const nested = `{"routes": [{"${key}": ${inner}}]}`;
      assertEquals(problems(nested, path).map((each) => each.split(";")[0]), [
        `routes[0].${key}: unknown key`,
        "routes[0].localPort: missing",
        "routes[0].upstream: missing",
      ]);
    }
  }
});

Deno.test("a port is taken once", () => {
  const names = ["a", "b", "c", "d"];
  const ports = [1, 2, 1, 1];
  const routes = ports.map((localPort, i) => ({ localPort, name: names[i] }));
  assertEquals(problems(withRoutes(...routes)), [
    "routes[2].localPort: 1 is already taken by routes[0]",
    "routes[3].localPort: 1 is already taken by routes[0]",
  ]);
  const unnamed = problems(withRoutes({ localPort: 1 }, { localPort: 1 }));
  assertEquals(
    unnamed[0],
    "routes[1].localPort: 1 is already taken by routes[0]",
  );
});

Deno.test("a name is taken once, also by default", () => {
  assertEquals(
    problems(
      withRoutes({ name: "a", localPort: 1 }, { name: "a", localPort: 2 }),
    ),
    ["routes[1].name: a is already taken by routes[0]"],
  );
  assertEquals(
    problems(withRoutes({ name: "2", localPort: 1 }, { localPort: 2 })),
    ["routes[1].name: 2 (a name defaults to the port) is already taken by routes[0]"],
  );
  assertEquals(
    problems(withRoutes({ localPort: 2 }, { name: "2", localPort: 1 })),
    ["routes[1].name: 2 is already taken by routes[0]"],
  );
});

Deno.test("any number of routes may take a free port", () => {
  const routes = ["a", "b", "c"].map((name) => ({ name, localPort: 0 }));
  const config = parseConfig(withRoutes(...routes));
  assertEquals(config.routes.map((route) => route.localPort), [0, 0, 0]);
  const [problem] = problems(withRoutes({ localPort: 0 }, { localPort: 0 }));
  assertStringIncludes(problem, "routes[1].name: ");
});

// ---- Files -------------------------------------------------------------------

Deno.test("a file without routes is told apart", () => {
  const mapping = "expected a mapping with routes, found";
  const empty = "the file is empty; expected routes";
  const found: Record<string, string> = {
    "": empty,
    " \n\t\r\n ": empty,
    "\ufeff": empty,
    "\ufeff \n": empty,
    "# nothing\n# here\n": `${mapping} null`,
    "---\n": `${mapping} null`,
    "~": `${mapping} null`,
    "5": `${mapping} 5`,
    "hello": `${mapping} "hello"`,
    "- localPort: 1\n  upstream: a:1\n": `${mapping} a list`,
    "[]":
      "proxies: expected a list of proxies, or an object of them by name, at least one, found a list",
    "2024-01-01": `${mapping} a date`,
  };
  for (const [text, problem] of Object.entries(found)) {
    assertEquals(problems(text), [problem]);
  }
  const foundInJson: Record<string, string> = {
    "": empty,
    " \n": empty,
    "null": `${mapping} null`,
    "5": `${mapping} 5`,
    '"a"': `${mapping} "a"`,
    '[{"localPort": 1}]': `${mapping} a list`,
    "true": `${mapping} true`,
  };
  for (const [text, problem] of Object.entries(foundInJson)) {
    assertEquals(problems(text, "config.json"), [problem]);
  }
});

Deno.test("a byte order mark and any line ends are fine", () => {
  const yaml = withField("latencyMs", "5");
  const json = JSON.stringify({ routes: [{ ...GOOD, latencyMs: 5 }] }, null, 2);
  for (const [text, path] of [[yaml, "c.yaml"], [json, "c.json"]]) {
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
  assertEquals(
    parseConfig("routes:\n  -\tlocalPort:\t1\n    upstream: a:1").routes.length,
    1,
  );
  const indented = {
    "routes:\n\t- localPort: 1\n\t\tupstream: a:1\n": 2,
    "routes:\n  - localPort: 1\n\tupstream: a:1\n": 3,
    "routes:\r\n  - localPort: 1\r\n  \tupstream: a:1\r\n": 3,
    "seed: 1\n\tdrainTimeoutMs: 5\n": 2,
    "routes: [\n  1\n]\n\tseed: 1\n": 4,
  };
  for (const [text, line] of Object.entries(indented)) {
    assertEquals(problems(text), [
      `line ${line}, column 1: invalid YAML: ` +
      "a tab in the indentation; write spaces",
    ]);
  }
  const fine =
    "\t# why\nroutes: [\n\t{ localPort: 1, upstream: a:1 }\n\t]\n\t\n";
  assertEquals(parseConfig(fine).routes.length, 1);
  assertEquals(
    parseConfig(
      '{\t"routes":\t[\n\t\t{"localPort":1,"upstream":"a:1"}\n]}',
      "c.json",
    )
      .routes.length,
    1,
  );
});

Deno.test("a text has at most 1 MiB", () => {
  const config = withRoutes(GOOD);
  const full = config.padEnd(1024 * 1024);
  for (const path of ["c.json", "c.yaml"]) {
    assertEquals(parseConfig(full, path), parseConfig(config, path));
    assertEquals(problems(full + " ", path), [
      "expected at most 1 MiB of text, found more",
    ]);
  }
});

Deno.test("one YAML document may have its marks, several are an error", () => {
  const one = withField("latencyMs", "5");
  assertEquals(parseConfig(`%YAML 1.2\n---\n${one}...\n`), parseConfig(one));
  for (const text of [`${one}---\n${one}`, `${one}...\n---\n${one}`]) {
    const found = problems(text);
    assertEquals(found.length, 1);
    assertStringIncludes(found[0], "invalid YAML: ");
  }
});

// ---- YAML --------------------------------------------------------------------

/** The line and column of the only problem, a syntax error. */
function place(text: string, path: string): [line: number, column: number] {
  const found = problems(text, path);
  assertEquals(found.length, 1);
  const kind = path.endsWith(".json") ? "JSON" : "YAML";
  const match = new RegExp(`^line (\\d+), column (\\d+): invalid ${kind}: \\S`)
    .exec(found[0]);
  assert(match, found[0]);
  return [Number(match[1]), Number(match[2])];
}

Deno.test("an error in YAML names its line and column", () => {
  const places: Record<string, [number, number]> = {
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
  const found = Object.keys(places).map((text) => [
    text,
    place(text, "config.yaml"),
  ]);
  assertEquals(Object.fromEntries(found), places);
  const lines = {
    "seed: 1\nroutes:\n  - { localPort: 1, localPort: 2 }\n": 3,
    "seed: 1\nroutes: \u0007\n": 2,
    "seed: 1\nroutes: \ud800\n": 2,
  };
  for (const [text, line] of Object.entries(lines)) {
    assertEquals(place(text, "config.yaml")[0], line);
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
  const start = performance.now();
  for (const laughs of [levels, maps, merges]) {
    const lines = laughs.map((value, i) => `x${i}: ${value}\n`).join("");
    for (const routes of ["[*a29]", "*a29", "[{ name: *a29 }]"]) {
      assertGreater(problems(`${lines}routes: ${routes}\n`).length, 30);
    }
    problems(`${lines}? *a29\n: 1\n`);
  }
  assertLess(performance.now() - start, 10_000);

  const recursive = [
    "&a { routes: *a }",
    "&a { routes: [*a] }",
    "routes: &a [*a]",
    "routes: &a [[*a]]",
    "routes: [&a { localPort: *a, upstream: *a, name: *a }]",
    "&a [*a]",
    "&a { *a : 1 }",
  ];
  for (const text of recursive) problems(text);

  const tagged = [
    "!!js/function 'function () {}'",
    "!!js/regexp /x/",
    "!!python/object:os.system x",
    "!<tag:example.com,2000:x> y",
  ];
  for (const text of tagged) place(text, "config.yaml");
  for (const text of ["!!binary aGVsbG8=", "!!omap [routes: 1]", "!!set {a}"]) {
    problems(text);
  }
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
  assertEquals(
    problems("routes: [&a { localPort: 1, upstream: 'a:1', name: x }, *a]"),
    [
      "routes[1].localPort: 1 is already taken by routes[0]",
      "routes[1].name: x is already taken by routes[0]",
    ],
  );
  place("routes: [{ <<: 5, localPort: 1 }]", "config.yaml");
});

Deno.test("nesting has an end", () => {
  const deep = 20_000;
  const nested = [
    "[".repeat(deep),
    "[".repeat(deep) + "]".repeat(deep),
    '{"a":'.repeat(deep),
    '{"a":'.repeat(deep) + "1" + "}".repeat(deep),
    '{"routes":' + "[".repeat(deep) + "]".repeat(deep) + "}",
  ];
  const onlyYaml = [
    "- ".repeat(deep) + "a",
    "? ".repeat(deep) + "a",
    "{a: ".repeat(deep),
    Array.from({ length: 1000 }, (_, i) => `${" ".repeat(i)}a:`).join("\n"),
  ];
  for (const text of nested) {
    place(text, "config.json");
    assertEquals(problems(text).length, 1);
  }
  for (const text of onlyYaml) problems(text);
});

// ---- JSON --------------------------------------------------------------------

Deno.test("an error in JSON names its line and column", () => {
  const places: Record<string, [number, number]> = {
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
    "{\"seed\": '1'}": [1, 10],
    '// comment\n{"seed": 1}': [1, 1],
    '{\n  "seed": 1 // comment\n}': [2, 13],
    '{"seed": /* x */ 1}': [1, 10],
    '{"seed": NaN}': [1, 10],
    '{"seed": Infinity}': [1, 10],
    '{"seed": -Infinity}': [1, 10],
    '{"seed": undefined}': [1, 10],
    '{"seed": 01}': [1, 10],
    '{"seed": +1}': [1, 10],
    '{"seed": 1.}': [1, 10],
    '{"seed": .5}': [1, 10],
    '{"seed": 1e}': [1, 10],
    '{"seed": 0x1}': [1, 10],
    '{"seed": 1_000}': [1, 10],
    '{"seed": True}': [1, 10],
    '{"seed": nul}': [1, 10],
    '{\r\n  "seed": 1,\r\n  x\r\n}': [3, 3],
    '{\r  "seed": 1,\r  x\r}': [3, 3],
    '\ufeff{"seed": x}': [1, 10],
    '{"seed": 1, "seed": 2}': [1, 13],
    '{"seed": 1,\n "s\\u0065ed": 2}': [2, 2],
    '{"routes": [{"name": "a", "name": "a"}]}': [1, 27],
  };
  const found = Object.keys(places).map((text) => [
    text,
    place(text, "config.json"),
  ]);
  assertEquals(Object.fromEntries(found), places);
});

Deno.test("a malformed string in JSON is placed within its line", () => {
  const strings = [
    '"abc',
    '"a\nb"',
    '"a\tb"',
    '"a\u0000b"',
    '"\\q"',
    '"\\u12g4"',
    '"\\u{1}"',
    '"\\',
    '"a\\"',
  ];
  for (const string of strings) {
    assertThrows(() => JSON.parse(string), SyntaxError);
    for (const [before, after] of [["[\n  ", "]"], ["{\n  ", ": 1}"]]) {
      const [line, column] = place(before + string + after, "config.json");
      assertEquals(line, 2);
      assert(column >= 3 && column <= 8, `column ${column} of ${string}`);
    }
  }
});

Deno.test("strings in JSON may hold all that JSON lets them", () => {
  const strings = [
    "\\u2028",
    "\u2028",
    "\u007f",
    "\\ud800",
    "\ud800",
    "\ud83d\ude00",
    '\\"',
    "\\\\",
    "\\/\\b\\f\\n\\r\\t",
    "\\u00E9",
  ];
  for (const string of strings) {
    const text = `{"seed": "${string}", "routes": []}`;
    assertEquals(problems(text, "config.json"), [
      `seed: expected an integer from 0 to 9007199254740991, found ${
        JSON.stringify(JSON.parse(`"${string}"`))
      }`,
      "routes: expected a list of routes, at least one, found a list",
    ]);
  }
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

const VALID_JSON = JSON.stringify(parseConfig(VALID_YAML), null, 1);

/** The text, changed in a few places. */
function mutate(text: string, random: (limit: number) => number): string {
  const pick = <T>(of: readonly T[]): T => of[random(of.length)];
  const slice = () => {
    const from = random(text.length + 1);
    return [from, Math.min(text.length, from + random(12))];
  };
  const values = [...text.matchAll(/[\w.:"'[\]-]+/g)];
  for (let times = 1 + random(3); times > 0; times--) {
    const [from, to] = slice();
    const [head, part, tail] = [
      text.slice(0, from),
      text.slice(from, to),
      text.slice(to),
    ];
    switch (random(7)) {
      case 0:
        text = head + tail;
        break;
      case 1:
        text = head + pick(CHARACTERS) + part + tail;
        break;
      case 2:
        text = head + part + part + tail;
        break;
      case 3:
        text = head + pick(CHARACTERS) + text.slice(from + 1);
        break;
      case 4:
        text = head + pick(TOKENS) + part + tail;
        break;
      case 5: {
        const { index, 0: value } = pick(values);
        text = text.slice(0, index) + pick(values)[0] +
          text.slice(index + value.length);
        break;
      }
      case 6: {
        const { index, 0: value } = pick(values);
        text = text.slice(0, index) + pick(TOKENS) +
          text.slice(index + value.length);
        break;
      }
    }
  }
  return text;
}

function assertValid(config: Config): void {
  const within = (value: number, min: number, max: number, whole = true) =>
    assert(
      typeof value === "number" && value >= min && value <= max &&
        (!whole || Number.isInteger(value)),
      `${value} is not from ${min} to ${max}`,
    );
  const { seed, drainTimeoutMs, routes, ...none } = config;
  assertEquals(none, {});
  if (seed !== undefined) within(seed, 0, Number.MAX_SAFE_INTEGER);
  within(drainTimeoutMs, 0, 2147483647);
  assertGreater(routes.length, 0);
  for (const route of routes) {
    assertEquals(Object.keys(route).sort(), Object.keys(DEFAULTS).sort());
    within(route.localPort, 0, 65535);
    within(route.dropRate, 0, 1, false);
    within(route.timeoutRate, 0, 1, false);
    within(route.timeoutMs, 0, 2147483647);
    within(route.latencyMs, 0, 2147483647);
    within(route.jitterMs, 0, 2147483647);
    within(route.connectTimeoutMs, 1, 2147483647);
    within(route.halfCloseTimeoutMs, 0, 2147483647);
    assertMatch(route.name, /^[^\s\p{C}]{1,255}$/u);
    assertMatch(route.host, /^[\w.:[\]-]+$/);
    assertMatch(route.upstream, /^(?:[\w.-]+|\[[\da-fA-F:.]+\]):\d{1,5}$/);
    within(Number(route.upstream.split(":").at(-1)), 1, 65535);
  }
  const names = routes.map((route) => route.name);
  assertEquals(new Set(names).size, names.length);
  const ports = routes.map((route) => route.localPort).filter(Boolean);
  assertEquals(new Set(ports).size, ports.length);
}

/** How many mutations of a text are good and bad; all are one or the other. */
function tryMutations(
  text: string,
  path: string,
  times: number,
): { good: number; bad: number } {
  const random = randomIntegers(1);
  const count = { good: 0, bad: 0 };
  assertValid(parseConfig(text, path));
  for (let i = 0; i < times; i++) {
    const mutated = mutate(text, random);
    try {
      let config: Config;
      try {
        config = parseConfig(mutated, path);
      } catch (error) {
        assertInstanceOf(error, ConfigError);
        assertGreater(error.problems.length, 0);
        assert(error.problems.every((each) => each !== ""));
        assert(error.message.startsWith(`${path}: `));
        count.bad++;
        continue;
      }
      assertValid(config);
      count.good++;
    } catch (cause) {
      throw new Error(`mutation ${i}: ${JSON.stringify(mutated)}`, { cause });
    }
  }
  return count;
}

Deno.test("any mutation of YAML is a config or a ConfigError", () => {
  const { good, bad } = tryMutations(VALID_YAML, "config.yaml", 5000);
  assertGreater(good, 100);
  assertGreater(bad, 500);
});

Deno.test("any mutation of JSON is a config or a ConfigError", () => {
  const { good, bad } = tryMutations(VALID_JSON, "config.json", 5000);
  assertGreater(good, 50);
  assertGreater(bad, 500);
});

Deno.test("JSON as YAML is a config or a ConfigError, too", () => {
  const { good, bad } = tryMutations(VALID_JSON, "config.yaml", 2000);
  assertGreater(good, 20);
  assertGreater(bad, 200);
});

/** Whether an object in a JSON text, which must be valid, repeats a key. */
function repeatsKey(text: string): boolean {
  const written = [...text.matchAll(/"(?:[^"\\]|\\.)*"([ \t\r\n]*:)?/gs)]
    .filter(([, colon]) => colon !== undefined).length;
  const countKeys = (value: unknown): number =>
    typeof value !== "object" || value === null ? 0 : Object.values(value)
      .reduce<number>(
        (sum, each) => sum + countKeys(each),
        Array.isArray(value) ? 0 : Object.keys(value).length,
      );
  return written > countKeys(JSON.parse(text));
}

Deno.test("a text is JSON exactly when JSON.parse says so", () => {
  const random = randomIntegers(2);
  const count = { valid: 0, invalid: 0, repeating: 0 };
  const texts = [VALID_JSON, '{"a":[1,-0.5e+3,"\\u00e9\\n",true,null,{}]}'];
  for (let i = 0; i < 10_000; i++) {
    const text = mutate(texts[i % 2], random);
    if (text.trim() === "") continue;
    let valid = true;
    try {
      JSON.parse(text);
    } catch {
      valid = false;
    }
    const repeating = valid && repeatsKey(text);
    let found: readonly string[] = [];
    try {
      parseConfig(text, "config.json");
    } catch (error) {
      assertInstanceOf(error, ConfigError);
      found = error.problems;
    }
    const syntax = /^line (\d+), column (\d+): invalid JSON: (.*)/s
      .exec(found[0] ?? "");
    const shown = `${JSON.stringify(text)}: ${found[0]}`;
    assertEquals(syntax !== null, !valid || repeating, shown);
    if (syntax !== null) {
      const line = text.split(/\r\n|\r|\n/)[Number(syntax[1]) - 1];
      assert(Number(syntax[2]) <= line.length + 1, shown);
      if (valid) assertMatch(syntax[3], / is repeated$/, shown);
    }
    count[repeating ? "repeating" : valid ? "valid" : "invalid"]++;
  }
  assertGreater(count.valid, 1000);
  assertGreater(count.invalid, 1000);
  assertGreater(count.repeating, 20);
});

Deno.test("a route that forwards to itself is refused", () => {
  const itself = (host: string, upstream: string) =>
    problems(withRoutes({ localPort: 8080, host, upstream }), "c.json");
  for (
    const [host, upstream] of [
      ["127.0.0.1", "127.0.0.1:8080"],
      ["127.0.0.1", "localhost:8080"],
      ["localhost", "127.0.0.1:8080"],
      ["127.0.0.1", "0.0.0.0:8080"],
      ["0.0.0.0", "127.0.0.77:8080"],
      ["0.0.0.0", "localhost:8080"],
      ["::", "[::1]:8080"],
      ["db.example", "db.example:8080"],
    ]
  ) {
    assertEquals(itself(host, upstream), [
      `routes[0].upstream: ${upstream} is where the route itself listens; ` +
      "write the address of the server behind it",
    ]);
  }
  for (
    const [host, upstream] of [
      ["127.0.0.1", "127.0.0.1:8081"],
      ["127.0.0.1", "127.0.0.2:8080"],
      ["127.0.0.1", "db.example:8080"],
      ["0.0.0.0", "192.0.2.1:8080"],
    ]
  ) {
    const text = withRoutes({ localPort: 8080, host, upstream });
    assertEquals(parseConfig(text, "c.json").routes.length, 1);
  }
});

Deno.test("a circle of routes is refused, and a chain is taken", () => {
  const chain = Array.from({ length: 4 }, (_, i) => ({
    name: `r${i}`,
    localPort: 8000 + i,
    upstream: `localhost:${8001 + i}`,
  }));
  assertEquals(parseConfig(withRoutes(...chain), "c.json").routes.length, 4);
  chain[3].upstream = "127.0.0.1:8001";
  assertEquals(problems(withRoutes(...chain), "c.json"), [
    "routes[1].upstream: connections would go in a circle, " +
    "r1 -> r2 -> r3 -> r1; write the address of the server behind it",
  ]);
});

Deno.test("a config has 1000 routes and 10000 toxics at most, however few its bytes", () => {
  const route = "{ localPort: 0, upstream: 'a:1' }";
  const list = (item: string, count: number) =>
    `[${Array.from({ length: count }, () => item).join(", ")}]`;
  const routes = (count: number) => `routes: ${list(route, count)}`;
  const numbered = (count: number, toxics = "") =>
    "routes:\n" + Array.from(
      { length: count },
      (_, i) => `  - { localPort: ${i + 1}, upstream: 'a:1'${toxics} }\n`,
    ).join("");
  assertEquals(parseConfig(numbered(1000)).routes.length, 1000);
  assertEquals(problems(routes(1001)), [
    "expected at most 1000 routes, found 1001",
  ]);
  const [aliased] = problems(
    `x: &r ${route}\nroutes: ${list("*r", 120_000)}`,
  ).slice(-1);
  assertEquals(aliased, "expected at most 1000 routes, found 120000");

  const toxic = "{ name: a, type: noop }";
  const [toxics] = problems(
    `x: &t ${list(toxic, 15_000)}\n${numbered(900, ", toxics: *t")}`,
  ).slice(-1);
  assertEquals(toxics, "expected at most 10000 toxics in all, found 13500000");

  const keys = Array.from({ length: 20_000 }, (_, i) => `k${i}: 1`).join(", ");
  const merged = "  - { <<: *m }\n".repeat(20_000);
  assertEquals(problems(`x: &m { ${keys} }\nroutes:\n${merged}`), [
    "expected fewer merge keys (<<) in a file of this size, found 20000; " +
    "write out what they stand for",
  ]);
  assertEquals(problems(`x: &m { ${keys} }\ny: { <<: ${list("*m", 2000)} }`), [
    "expected fewer merge keys (<<) in a file of this size, found 2000; " +
    "write out what they stand for",
  ]);
});

Deno.test("a message says how to mend what is clear", () => {
  const hints: [field: string, yaml: string, end: string][] = [
    ["dropRate", "5%", 'found "5%"; write 0.05'],
    ["timeoutRate", "'12.5 %'", 'found "12.5 %"; write 0.125'],
    ["latencyMs", "100ms", 'found "100ms"; write 100'],
    ["timeoutMs", "2s", 'found "2s"; write 2000'],
    ["timeoutMs", "1m", 'found "1m"; write 60000'],
    ["timeoutMs", "1h", 'found "1h"'],
    ["dropRate", "200%", 'found "200%"'],
    ["upstream", "http://db:80/", 'found "http://db:80/"; write db:80'],
    ["upstream", "db:80/0", 'found "db:80/0"; write db:80'],
    ["upstream", "http://db", 'found "http://db"; write db:port'],
    ["upstream", "' a:1'", 'found " a:1"; write a:1'],
    [
      "upstream",
      "[::1]",
      'a list; put an IPv6 address in quotes, "[::1]:5432"',
    ],
    ["host", "[::1]", 'found a list; put an IPv6 address in quotes, "::1"'],
    ["host", "[a]", "found a list"],
    ["name", "my db", 'found "my db"; write my-db'],
    ["listen", "localhost:1", "unknown key; write host and localPort"],
    ["toxics", "{ a: 1 }", 'write a list, of which each item begins with "- "'],
    ["toxics", "[{ type: bandwith }]", '"bandwith"; did you mean bandwidth?'],
    ["toxics", "[{ type: noop, stream: up_stream }]", "mean upstream?"],
  ];
  for (const [field, yaml, end] of hints) {
    const [problem] = problems(withField(field, yaml));
    assert(problem.endsWith(end), problem);
  }
  assertMatch(
    problems(withField("upstream", "[::1]:5432"))[0],
    /^line 3, .*; put an IPv6 address in quotes$/,
  );
  assertEquals(problems("routes: { a: { localPort: 1 } }"), [
    "routes: expected a list of routes, at least one, found a mapping; " +
    'write a list, of which each item begins with "- "',
  ]);
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
    const [problem] = problems(withRoutes({ localPort: 1, upstream }));
    assert(problem.endsWith(`found "${found}"; write db:5432`), problem);
  }
});

Deno.test("an integer in YAML is written in plain decimal digits", () => {
  const odd = ["1:30", "0755", "0x1F90", "1_000", "0b11", "8080.0", "1e3"];
  for (const text of odd) {
    const end = `, found ${text}; write it in plain decimal digits`;
    for (
      const yaml of [
        withField("timeoutMs", text),
        withField("<<", `{ timeoutMs: ${text} }`),
        withField("<<", `[{ latencyMs: 1 }, { timeoutMs: ${text} }]`),
        withField(
          "toxics",
          `[{ type: timeout, attributes: { timeout: ${text} } }]`,
        ),
        `seed: ${text}\n${withField("name", "a")}`,
        `api: ${text}\n${withField("name", "a")}`,
      ]
    ) {
      const [problem] = problems(yaml);
      assert(problem.endsWith(end), problem);
    }
  }
  for (const text of ["0x1", "1:0", "01", "0_1"]) {
    const [problem] = problems(withField("dropRate", text));
    assert(problem.includes(`, found ${text}`), problem);
  }
  assertEquals(problems(withField("timeoutMs", "0o17"))[0].slice(-6), '"0o17"');
  for (const text of ["1", "1.0", "1.", "1e0", "+1"]) {
    const { routes } = parseConfig(withField("dropRate", text));
    assertEquals(routes[0].dropRate, 1);
  }
  const { routes } = parseConfig(withField("timeoutMs", "+100"));
  assertEquals(routes[0].timeoutMs, 100);
});

Deno.test("a key on the wrong level is told where it belongs", () => {
  const route = withField("name", "a");
  const wrong: [yaml: string, problem: string][] = [
    [
      `${route}dropRate: 1\n`,
      "dropRate: unknown key on this level; it belongs in a route",
    ],
    [
      withField("seed", "1"),
      "routes[0].seed: unknown key on this level; it belongs at the top level",
    ],
    [
      withField("toxicity", "1"),
      "routes[0].toxicity: unknown key on this level; it belongs in a toxic",
    ],
    [
      withField("toxics", "[{ type: latency, latency: 1 }]"),
      "routes[0].toxics[0].latency: unknown key on this level; it belongs in a toxic's attributes",
    ],
    [
      withField("toxics", "[{ type: noop, attributes: { toxicity: 1 } }]"),
      "routes[0].toxics[0].attributes.toxicity: unknown key on this level; it belongs in a toxic",
    ],
  ];
  for (const [yaml, problem] of wrong) assertEquals(problems(yaml), [problem]);
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
    const [problem] = problems(text, "config.json");
    assert(problem.endsWith(`; ${hint}`), problem);
  }
});
