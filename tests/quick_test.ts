/** Configs without a file, and what can be printed instead of a run. */

import { assertEquals, assertStringIncludes } from "@std/assert";
import { parse as parseYaml } from "@std/yaml";
import {
  type ConfigOptions,
  controlApi,
  parseConfig,
  type RouteOptions,
} from "../main.ts";
import {
  assertEchoes,
  captured,
  casesIn,
  Cli,
  defined,
  echo,
  exchange,
  IS_LINUX,
  IS_WINDOWS,
  ROOT,
  runArgs,
  testBytes,
  text,
  times,
  toxic,
  unlessDisconnected,
  WatchedProxy,
} from "./helpers.ts";

const ignore = IS_WINDOWS; // which has no `sh`

/** Runs to the end, with an input. */
async function runOn(input: BlobPart, ...args: string[]) {
  const child = new Deno.Command(Deno.execPath(), {
    args: runArgs(args),
    stdin: "piped",
    stdout: "piped",
    stderr: "piped",
  }).spawn();
  const ends = () => {}; // it may end before it has read all
  const written = new Blob([input]).stream().pipeTo(child.stdin).catch(ends);
  const { code, stdout, stderr } = await child.output();
  await written;
  return { code, stdout: text(stdout), stderr: text(stderr) };
}

/** Runs a line of a shell in which `chaos-proxy` is the program. */
async function runInShell(line: string): Promise<string> {
  const script = `exec 2>&1; ${line.replace("chaos-proxy", '"$@"')}`;
  const { stdout } = await new Deno.Command("sh", {
    args: ["-c", script, "sh", Deno.execPath(), ...runArgs([])],
  }).output();
  return text(stdout);
}

async function print(input: string, ...args: string[]): Promise<string> {
  const { code, stdout, stderr } = await runOn(input, ...args);
  assertEquals([code, stderr], [0, ""]);
  return stdout;
}

/** Quick lines, and the routes that they mean, of which the upstream is a:1. */
const LINES = `
1=a:1
  { localPort: 1 }
localhost:1=a:1 latencyMs=1 latencyMs=100 name=db [::1]:2=a:1 dropRate=0.5 enabled=false
  { localPort: 1, host: localhost, latencyMs: 100, name: db },
  { localPort: 2, host: "::1", dropRate: 0.5, enabled: false }
1=a:1 connections=2-3 toxic=latency toxic=bandwidth,rate=64 profile=3g
  { localPort: 1, connections: "2-3", profile: 3g, toxics: [{ type: latency },
    { type: bandwidth, attributes: { rate: 64 } }] }
1=a:1 toxic=stall,rate=1,name=slow,stream=upstream,toxicity=0.5,connections=*/3
  { localPort: 1, toxics: [{ type: stall, attributes: { rate: 1 }, name: slow,
    stream: upstream, toxicity: 0.5, connections: "*/3" }] }
1=a:1 toxic=noop,after.match=COMMIT,schedule.afterMs=5,schedule.forMs=500
  { localPort: 1, toxics: [{ type: noop, after: { match: COMMIT },
    schedule: { afterMs: 5, forMs: 500 } }] }
1=a:1 name=5432 toxic=noop,name=true,after.match=42 2=a:1 toxic=noop,after.match.hex=10
  { localPort: 1, name: "5432", toxics: [{ type: noop, name: "true",
    after: { match: "42" } }] },
  { localPort: 2, toxics: [{ type: noop, after: { match: { hex: "10" } } }] }
1=a:1 connections=[1,"3-"] outages=[{"forMs":5}] toxic=noop,after.match="100"
  { localPort: 1, connections: [1, "3-"], outages: [{ forMs: 5 }],
    toxics: [{ type: noop, after: { match: "100" } }] }
`;

Deno.test("a quick line means what its config in YAML means", async () => {
  await Promise.all(
    casesIn(LINES).map(async ([line, config]) => {
      const printed = await print("", "--print-config", ...line.split(" "));
      const routes = parseYaml(`[${config.join("\n")}]`) as RouteOptions[];
      for (const route of routes) route.upstream = "a:1";
      const expected = parseConfig(JSON.stringify({ routes }));
      assertEquals(parseConfig(printed), expected, line);
    }),
  );
});

const WRONG = `
a.yaml 1=a:1
  command line: expected [host:]port=upstream first, found "a.yaml"
- 1=a:1
  command line: expected [host:]port=upstream first, found "-"
latencyMs=5
latencyMs=5 -- 1=a:1
  command line: expected [host:]port=upstream first, found "latencyMs=…"
1=a:1 a.yaml
  command line: expected key=value, found "a.yaml"
1=a:1 latencyMs=
  command line: expected key=value, found "latencyMs="
1=a:1 toxic=latency,jitter
  command line: expected key=value, found ",jitter"
1=a:1 latencyMs=100ms
  command line: routes[0].latencyMs: expected an integer from 0 to 2147483647, found "100ms"; write 100
1=a:1 toxic=latency,latencyMs=5
  command line: routes[0].toxics[0].attributes.latencyMs: unknown key on this level; it belongs in a route
1=a:1 toxic=noop,zzz=5
  command line: routes[0].toxics[0].attributes.zzz: unknown key; known are none
1=a:1 upstream.x=5
  command line: routes[0].upstream: expected host:port or [ipv6]:port, the port from 1 to 65535, found a mapping
1=a:1 2=a:1 1=b:1
  command line: routes[2].localPort: 1 is already taken by routes[0]
--check --print-config 1=a:1
  --print-config: write this or --check
--preview 1 --check 1=a:1
  --preview: write this or --check
--preview 0 1=a:1
  --preview: expected an integer from 1 to 100000, found "0"
--preview 100001 1=a:1
  --preview: expected an integer from 1 to 100000, found "100001"
`;

Deno.test("a wrong quick line is a usage error", async () => {
  await Promise.all(
    casesIn(WRONG).map(async ([line, problem]) => {
      const stderr = `chaos-proxy: ${problem}\n`;
      const args = line.replace(/^(?!--)/, "--check "); // it never listens
      const outcome = await runOn("", ...args.split(" "));
      assertEquals(outcome, { code: 2, stdout: "", stderr });
    }),
  );
});

Deno.test("- reads standard input, and says so", async () => {
  const inputs: [BlobPart, problem: string][] = [
    ["", "the file is empty; expected routes"],
    [new Uint8Array([0xff]), "expected text in UTF-8, found other bytes"],
    ["routes: 5", "routes: expected a list of routes, 1000 at most, found 5"],
  ];
  await Promise.all(inputs.map(async ([input, problem]) => {
    const { code, stderr } = await runOn(input, "--check", "-");
    assertEquals(code, 2);
    assertStringIncludes(stderr, `chaos-proxy: standard input: ${problem}`);
  }));
  const routes = '{"routes": [{"localPort": 1, "upstream": "a:1"}]}';
  const check = await print(routes, "--check", "--seed=5", "-");
  assertStringIncludes(check, "standard input: 1 route, seed 5, drain");
  if (IS_WINDOWS) return;
  const endless = await runInShell("chaos-proxy --check - </dev/zero");
  assertStringIncludes(endless, "input: expected at most 1 MiB of text, found");
});

const TOXICS =
  `noop, stall, duplicate, slow_close delay=1, reset_peer timeout=5,
latency latency=5 jitter=2 distribution=pareto shape=2, slicer average_size=9,
latency upstream wave=sine amplitude=5 period=9 phase=0.5 name=tide, inject bytes=17,
bandwidth rate=0, bandwidth upstream rate=64 shared=1 buffer=9 toxicity=0.0000001,
limit_time upstream name=limit_time_downstream, limit_data bytes=5 toxicity=0,
packet_loss burst=5, corrupt rate=0.25, random_close reset=1, timeout timeout=0,
reorder rate=0`.split(/,\s/).map(toxic);
/** What YAML takes for something else, folds, or has to escape. */
const PATTERNS = ["100", "yes", "~", "=", "# a: b", " a\n\n  b\n\n", "\t\r\0"]
  .concat("0x1f", "2001-01-01", "word ".repeat(40), "é\u2028'\"", "a\n\n");
const OCCASIONS = [
  { connections: 2, schedule: {} },
  { connections: [1, "3-4"], schedule: { afterMs: 0, from: "start" } },
  { schedule: { afterMs: 5, forMs: 6, everyMs: 7, from: "connection" } },
  { connections: "1-", after: { bytes: 5 } },
  { after: { match: { hex: "0dFF" } } },
  ...PATTERNS.map((match) => ({ after: { match } })),
];
const FIELDS = {
  ...{ host: "::1", enabled: false, dropRate: 0.1, timeoutRate: 1e-7 },
  ...{ timeoutMs: 1, latencyMs: 2, jitterMs: 3, connectTimeoutMs: 4 },
  ...{ halfCloseTimeoutMs: 0, profile: "offline", connections: ["2", 5] },
  outages: [{ forMs: 5 }, { afterMs: 9, forMs: 5, everyMs: 9, mode: "drop" }],
};
const SAME = { enabled: true, host: "127.0.0.1", connections: "1-", name: "2" };
const CUT = { name: "cut", type: "limit_data", attributes: { bytes: 0 } };

const ROUTES = [
  { ...FIELDS, name: "0x10" },
  { ...SAME, localPort: 2, toxics: [], outages: [] },
  { profile: "3g", toxics: [CUT, toxic("latency latency=9")] },
  { name: "0", toxics: TOXICS },
  ...OCCASIONS.map((occasion) => ({ toxics: [{ ...CUT, ...occasion }] })),
].map((route, i) => ({ upstream: "[::1]:5", localPort: 1 + i, ...route }));
const PROXIES = [
  { Name: "web", Listen: ":80", Upstream: ":81", toxics: [CUT] },
  { name: "off", listen: "[::1]:82", upstream: "a:1", enabled: false },
];

Deno.test("--print-config prints what means the same, without defaults", async () => {
  const settings = { seed: 2 ** 53 - 1, drainTimeoutMs: 0 };
  const all = JSON.stringify({ ...settings, routes: ROUTES });
  const api = "api: 8474\ndrainTimeoutMs: 30000";
  const configs = [all, JSON.stringify(PROXIES), api];
  const outputs = await Promise.all(configs.map(async (config) => {
    const printed = await print(config, "--print-config", "-");
    assertEquals(parseConfig(printed), parseConfig(config));
    assertEquals(await print(printed, "--print-config", "-"), printed);
    return parseYaml(printed) as ConfigOptions;
  }));
  const [{ routes = [] } = {}, , third] = outputs;
  assertEquals<unknown>(third, { api: "127.0.0.1:8474" });
  assertEquals<unknown>(routes[1], { localPort: 2, upstream: "[::1]:5" });
  const toxics = routes[2]?.toxics?.map(({ name, type }) => name ?? type);
  assertEquals(toxics, ["latency", "cut"]);
  const stopped = ROUTES.map((route) => ({ ...route, enabled: false }));
  await using watched = await WatchedProxy.start({
    ...settings,
    routes: stopped as RouteOptions[],
  });
  const answerTo = controlApi(watched.proxy);
  const answer = await answerTo(new Request("http://localhost/config"));
  const config = parseConfig(JSON.stringify({ ...settings, routes: stopped }));
  assertEquals(parseConfig(await answer.text()), config);
});

Deno.test("--preview decides what a run with that seed decides", async () => {
  await using upstream = echo();
  const toxics = [
    { ...toxic("latency latency=1 toxicity=0.5"), connections: "*/2" },
    toxic("noop upstream toxicity=0.5"),
  ];
  const routes = [
    { name: "mixed", dropRate: 0.3, timeoutRate: 0.4, timeoutMs: 1 },
    { name: "slow", latencyMs: 3, jitterMs: 2, connections: "2-", toxics },
  ].map((route) => ({ localPort: 0, upstream: upstream.address, ...route }));
  const config = { seed: 1, routes };
  const args = ["--log-format", "json", "--preview", "30", "-"];
  const lines = (await print(JSON.stringify(config), ...args)).trim();
  await using watched = await WatchedProxy.start(config);
  await times(60, async (i) => {
    using client = await watched.connect(i % 2);
    await exchange(client, testBytes(5)).catch(unlessDisconnected);
  });
  await watched.log.first("closed", 60);
  const expected = watched.proxy.report().routes.map(({ route, first }) => {
    const connections = first.map(({ outcome: _, toxics, ...record }) => (
      { ...record, toxics: toxics.sort() } // by when they began to act
    ));
    return { seed: 1, route: route.name, connections };
  });
  assertEquals(lines.split("\n").map((line) => JSON.parse(line)), expected);
});

Deno.test("--preview without a seed shows the one that it takes", async () => {
  const args = ["--preview", "3", "1=a:1", "dropRate=0.5"];
  const table = await print("", ...args);
  const seed = captured(/^1: seed (\d+)\n/, table);
  assertEquals(await print("", "--seed", seed, ...args), table);
});

Deno.test("a quick line runs, with all options", async () => {
  await using upstream = echo();
  await using cli = new Cli(
    ...["--seed", "5", "--api", "127.0.0.1:0", "--report", "-"],
    ...["--log-format", "json", `0=${upstream.address}`, "latencyMs=1"],
  );
  const [{ seed }] = await cli.log.first("started", 1);
  assertEquals(seed, 5);
  await cli.log.first("api_listening", 1);
  using client = await Deno.connect({ port: cli.port() });
  await assertEchoes(client);
  await client.closeWrite();
  await cli.log.first("closed", 1);
  cli.kill(IS_WINDOWS ? "SIGKILL" : "SIGTERM");
  const { code } = await cli.status;
  if (IS_WINDOWS) return;
  assertEquals(code, 0);
  assertStringIncludes(cli.stdout, '"faults":{"latencyMs":1}');
});

Deno.test("a reader that leaves early is no failure", { ignore }, async () => {
  const printed = await runInShell(
    "{ chaos-proxy --preview 100000 --seed 1 1=a:1; echo $? >&2; } | head -1",
  );
  assertEquals(printed.trim().split("\n").sort(), ["0", "1: seed 1"]);
});

Deno.test("what cannot be written is a failure, and told", {
  ignore: !IS_LINUX,
}, async () => {
  const args = ["--help", "--schema", "--version", "--check 1=a:1"]
    .concat("--print-config 1=a:1", "--preview 2000 1=a:1");
  const problem =
    "chaos-proxy: cannot write the output: No space left on device\n";
  await Promise.all(args.map(async (line) => {
    const command = `chaos-proxy ${line} 2>&1 >/dev/full; echo $?`;
    assertEquals(await runInShell(command), `${problem}1\n`, line);
  }));
});

Deno.test("--preview in parts is as one", async () => {
  const args = ["--preview", "2001", "--seed", "1", "1=a:1", "latencyMs=1e9"];
  const [table, json] = await Promise.all([
    print("", ...args),
    print("", "--log-format", "json", ...args),
  ]);
  const lines = table.trim().split("\n").slice(2);
  const { connections } = JSON.parse(json);
  const numbers = Array.from({ length: 2001 }, (_, i) => i + 1);
  assertEquals(lines.map((line) => parseInt(line)), numbers);
  assertEquals(
    connections.map(({ number }: { number: number }) => number),
    numbers,
  );
  assertEquals(new Set(lines.map((line) => line.indexOf("forward"))).size, 1);
});

Deno.test("the outputs in the page are real", { ignore }, async () => {
  const page = await Deno.readTextFile(new URL("docs/command-line.md", ROOT));
  const blocks = page.matchAll(/^```console\n\$ ([^\n]*)\n(.*?)^```$/gms);
  const outputs = await Promise.all(blocks.map(async ([, line, output]) => {
    assertEquals(await runInShell(defined(line)), output);
  }));
  assertEquals(outputs.length, 4);
});
