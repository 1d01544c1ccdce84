/**
 * `deno task bench`: how fast the proxy is, beside a direct connection and
 * whatever other TCP proxies are installed. All measurements are interleaved,
 * so that a busy moment of the machine does not fall on one contender alone.
 */

import { parseArgs } from "@std/cli/parse-args";
import deno from "../deno.json" with { type: "json" };
import {
  connect,
  delay,
  exchange,
  freePort,
  inLanes,
  main,
  misused,
  printed,
  ready,
  residentKiB,
  run,
  start,
  startChaosProxy,
  startEcho,
  startSource,
  stop,
  table,
  tempDir,
  wholeNumber,
} from "./peers.ts";

type Service =
  | ("bulk" | "http" | "echo" | "delayedEcho")
  | ("lateBulk" | "lateEcho" | "idleHttp" | `limited${Rate}`)
  | ("planBulk" | "planHttp" | "plansHttp");
type Rate = typeof rates[number];
type Ports = Record<Service, number>;

interface Route {
  name: Service;
  port: number;
  upstream: number;
}

interface Contender {
  name: string;
  version: string;
  /** Starts a process for all routes, or one for each. */
  start(routes: Route[]): Promise<Deno.ChildProcess[]>;
}

interface Row {
  name: string;
  /** The load tools it needs, if any. */
  tools?: string[];
  /** Which contenders are measured; default: all. */
  measures?(contender: string): boolean;
  /** What a round finds of a contender; nothing where it cannot be told. */
  measure(contender: Contender, ports: Ports): Promise<number | number[]>;
  figures: Figure[];
}

interface Figure {
  label: string;
  digits: number;
  /** Default: the median. */
  of?(samples: number[]): number;
  /** Only what is added to a direct connection's median. */
  added?: true;
  /** Followed by a line with the ratios to the reference. */
  ratio?: true;
}

const delayMs = 200;
const toxicMs = 100;
const rates = [10, 100, 1000, 10_000] as const;
const rateMs = 5000;
const besideRate = 1000;
const windowMs = 250;
const httpConnections = 50;
const toxicConnections = 50;
const idleConnections = 1000;
const closing = ["-H", "Connection: close"];
const message = new Uint8Array(64).fill(120);
const install = "apt install wrk iperf3 nginx-light haproxy socat";

// Debian keeps servers where only root's PATH leads.
if (Deno.build.os !== "windows") {
  Deno.env.set("PATH", `${Deno.env.get("PATH")}:/usr/local/sbin:/usr/sbin`);
}

const upstreams: Ports = (() => {
  const [bulk, http] = [freePort(), freePort()];
  const echo = startEcho();
  const source = startSource();
  return {
    ...{ bulk, http, echo, delayedEcho: echo },
    ...{ lateBulk: bulk, lateEcho: echo, idleHttp: http },
    ...{ planBulk: bulk, planHttp: http, plansHttp: http },
    ...{ limited10: source, limited100: source },
    ...{ limited1000: source, limited10000: source },
  };
})();

/** Three plans that never act on the load. */
const threeUnusedPlans = [
  { schedule: { afterMs: 1e9 } },
  { after: { match: "never that" }, stream: "upstream" }, // bulk comes down
  { connections: "1000000000-" },
].map(planned);
/** One plan of each kind, which never act on it either. */
const allUnusedPlans = [
  ...threeUnusedPlans,
  planned({ schedule: { afterMs: 1e9, from: "connection" } }, 3),
  planned({ after: { bytes: 1e15 } }, 4),
];

function planned(plan: object, i: number): Record<string, unknown> {
  const attributes = { latency: toxicMs };
  return { name: `plan${i}`, type: "latency", attributes, ...plan };
}

/** What acts downstream on the routes that have toxics, in Toxiproxy's words. */
const toxics: Partial<Record<Service, Record<string, unknown>[]>> = {
  lateBulk: [{ type: "latency", attributes: { latency: toxicMs } }],
  lateEcho: [{ type: "latency", attributes: { latency: toxicMs } }],
  planBulk: threeUnusedPlans,
  planHttp: threeUnusedPlans,
  plansHttp: allUnusedPlans,
  idleHttp: Array.from({ length: 10 }, (_, i) => ({
    ...{ name: `idle${i}`, type: "latency", toxicity: 0 },
    attributes: { latency: toxicMs },
  })),
  ...Object.fromEntries(rates.map((rate) => [
    `limited${rate}`,
    [{ type: "bandwidth", attributes: { rate } }],
  ])),
};
const haveToxics = ["chaos-proxy", "with --api", "page open", "toxiproxy"];
const isOwn = (name: string) =>
  [chaosProxy, withApi, withPage].some((each) => each.name === name);
const hasToxics = (contender: string) => haveToxics.includes(contender);

const notes = new Set<string>();

// The contenders

const chaosProxy = chaosProxyAs("chaos-proxy");
/** On sockets that can be reset, as the control API may have to ask for it. */
const withApi = chaosProxyAs("with --api", "--api", "0");
/** The same, while a browser shows its page. */
const withPage: Contender = {
  name: "page open",
  version: deno.version,
  async start(routes) {
    const port = freePort();
    const [proxy] = await chaosProxyAs("", "--api", `${port}`).start(routes);
    await ready(proxy!, port);
    const browser = start("chromium", [
      ...["--headless=new", "--no-sandbox", "--remote-debugging-port=0"],
      ...[`--user-data-dir=${await tempDir()}`, `http://127.0.0.1:${port}/`],
    ], { stdout: "null", stderr: "null" });
    return [proxy!, browser];
  },
};

function chaosProxyAs(name: string, ...args: string[]): Contender {
  return {
    name,
    version: deno.version,
    async start(routes) {
      const config = routes.map(({ name, port, upstream }) => ({
        name,
        localPort: port,
        upstream: `127.0.0.1:${upstream}`,
        latencyMs: name === "delayedEcho" ? delayMs : 0,
        toxics: toxics[name] ?? [],
      }));
      return [await startChaosProxy(config, args)];
    },
  };
}

async function findOthers(): Promise<Contender[]> {
  const found = await Promise.all([
    find("haproxy", "haproxy", "-v", startHaproxy),
    findNginx(),
    find("socat", "socat", "-V", startSocat),
    find("toxiproxy", "toxiproxy-server", "-version", startToxiproxy),
  ]);
  return found.filter((each) => each !== undefined);
}

/** A contender whose command tells its version, if it is installed. */
async function find(
  name: string,
  command: string,
  flag: string,
  start: Contender["start"],
): Promise<Contender | undefined> {
  const version = await versionOf(command, flag);
  return version ? { name, version, start } : undefined;
}

async function startHaproxy(routes: Route[]): Promise<Deno.ChildProcess[]> {
  const config = `${await tempDir()}/haproxy.cfg`;
  const listens = routes.map(({ name, port, upstream }) => `
listen ${name}
  bind 127.0.0.1:${port}
  server upstream 127.0.0.1:${upstream}
`);
  await Deno.writeTextFile(
    config,
    `global
  nbthread 1
  maxconn 4000
defaults
  mode tcp
  timeout connect 5s
  timeout client 1h
  timeout server 1h
${listens.join("")}`,
  );
  return [start("haproxy", ["-db", "-q", "-f", config])];
}

async function findNginx(): Promise<Contender | undefined> {
  const built = await outputOf("nginx", "-V");
  if (!built?.includes("--with-stream")) return undefined;
  let load = "";
  if (built.includes("--with-stream=dynamic")) {
    const folder = /--modules-path=(\S+)/.exec(built)?.[1];
    const module = `${folder}/ngx_stream_module.so`;
    if (!await exists(module)) return undefined;
    load = `load_module ${module};`;
  }
  return await find("nginx", "nginx", "-v", async (routes) => {
    const servers = routes.map(({ port, upstream }) => `
  server {
    listen 127.0.0.1:${port} backlog=4096;
    proxy_pass 127.0.0.1:${upstream};
    proxy_timeout 1h;
  }`);
    return [await startNginx(load, `stream {${servers.join("")}\n}`)];
  });
}

async function startSocat(routes: Route[]): Promise<Deno.ChildProcess[]> {
  // Its buffer of 8 KiB is the others' many times over; it logs each reset.
  const options = ["-b65536", "-lf", `${await tempDir()}/log`];
  return routes.map(({ port, upstream }) =>
    start("socat", [
      ...options,
      `TCP-LISTEN:${port},bind=127.0.0.1,fork,reuseaddr,backlog=4096,nodelay`,
      `TCP:127.0.0.1:${upstream},nodelay`,
    ])
  );
}

async function startToxiproxy(routes: Route[]): Promise<Deno.ChildProcess[]> {
  const config = `${await tempDir()}/toxiproxy.json`;
  const proxies = routes.map(({ name, port, upstream }) => ({
    name,
    listen: `127.0.0.1:${port}`,
    upstream: `127.0.0.1:${upstream}`,
    enabled: true,
  }));
  await Deno.writeTextFile(config, JSON.stringify(proxies));
  const control = freePort();
  const args = ["-port", `${control}`, "-config", config];
  const child = start("toxiproxy-server", args);
  await ready(child, control);
  for (const { name, port } of routes) {
    await ready(child, port);
    for (const toxic of /^plan/.test(name) ? [] : toxics[name] ?? []) {
      await addToxic(`http://127.0.0.1:${control}/proxies/${name}`, toxic);
    }
  }
  return [child];
}

async function addToxic(proxy: string, toxic: unknown): Promise<void> {
  const body = JSON.stringify(toxic);
  const answer = await fetch(`${proxy}/toxics`, { method: "POST", body });
  const text = await answer.text();
  if (!answer.ok) throw new Error(`toxiproxy refuses ${body}: ${text}`);
}

/** What a command prints when asked about itself, if it is installed. */
async function outputOf(
  command: string,
  flag: string,
): Promise<string | undefined> {
  try {
    const { stdout, stderr } = await new Deno.Command(command, { args: [flag] })
      .output();
    const decoder = new TextDecoder();
    return decoder.decode(stdout) + decoder.decode(stderr);
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return undefined;
    throw error;
  }
}

async function versionOf(
  command: string,
  flag: string,
): Promise<string | undefined> {
  const text = await outputOf(command, flag);
  return text && (/\d+\.\d+[\w.]*/.exec(text)?.[0] ?? "of unknown version");
}

async function exists(path: string): Promise<boolean> {
  try {
    await Deno.stat(path);
    return true;
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return false;
    throw error;
  }
}

/** Starts nginx as one process, which needs no rights and leaves no files. */
async function startNginx(
  load: string,
  block: string,
): Promise<Deno.ChildProcess> {
  const dir = await tempDir();
  await Deno.writeTextFile(
    `${dir}/nginx.conf`,
    `${load}
daemon off;
master_process off;
pid pid;
error_log error.log;
events { worker_connections 4000; }
${block}
`,
  );
  return start("nginx", ["-p", dir, "-e", "error.log", "-c", "nginx.conf"]);
}

// The load

async function startHttpUpstream(): Promise<void> {
  const temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
    .map((name) => `${name}_temp_path tmp;`).join(" ");
  const child = await startNginx(
    "",
    `http {
  ${temporary}
  access_log off;
  keepalive_requests 1000000000;
  server {
    listen 127.0.0.1:${upstreams.http} backlog=4096;
    location / { return 200 "ok"; }
  }
}`,
  );
  await ready(child, upstreams.http);
}

function startBulkUpstream(): void {
  const args = ["-s", "-B", "127.0.0.1", "-p", `${upstreams.bulk}`];
  // It complains of each connection that only tries whether it is there.
  start("iperf3", args, { stdout: "null", stderr: "null" });
}

async function gigabytesPerSecond(
  port: number,
  seconds: number,
  more: string[] = [],
): Promise<number> {
  const args = [
    ...["-c", "127.0.0.1", "-p", `${port}`, "-t", `${seconds}`, "-J"],
    ...more,
  ];
  for (let attempt = 1;; attempt++) {
    try {
      const { end, error } = JSON.parse(await run("iperf3", args));
      if (error) throw new Error(`iperf3 failed: ${error}`);
      return end.sum_received.bits_per_second / 8e9;
    } catch (error) {
      // Its server serves one client at a time and is slow to part with it.
      if (attempt === 40) throw error;
      await delay(250);
    }
  }
}

/** From the upstream to the client, once it flows. */
async function megabytesPerSecondDown(
  port: number,
  seconds: number,
): Promise<number> {
  return 1000 * await gigabytesPerSecond(port, seconds, ["-R", "-O", "1"]);
}

async function requestsPerSecond(
  what: string,
  port: number,
  seconds: number,
  header: string[] = [],
): Promise<number> {
  const report = await run("wrk", [
    ...["-t1", `-c${httpConnections}`, `-d${seconds}s`, ...header],
    `http://127.0.0.1:${port}/`,
  ]);
  for (const trouble of report.matchAll(/Socket errors.*|Non-2xx.*/g)) {
    notes.add(`${what}: wrk counted: ${trouble[0]}`);
  }
  return Number(/Requests\/sec:\s+([\d.]+)/.exec(report)![1]);
}

async function roundTripMicroseconds(
  port: number,
  seconds: number,
): Promise<number> {
  using conn = await connect(port);
  const times: number[] = [];
  const end = performance.now() + seconds * 1000;
  for (let now = performance.now(); now < end;) {
    await exchange(conn, message);
    const before = now;
    now = performance.now();
    times.push((now - before) * 1000);
  }
  return median(times);
}

/**
 * Measures something while so many streams run from the bulk upstream to its
 * client at full speed.
 */
async function besideBulk<T>(
  { bulk }: Ports,
  streams: number,
  seconds: number,
  measure: () => Promise<T>,
): Promise<T> {
  for (let attempt = 1;; attempt++) {
    const child = start("iperf3", [
      ...["-c", "127.0.0.1", "-p", `${bulk}`, "-R", "-P", `${streams}`],
      ...["-t", `${seconds + 3}`],
    ], { stdout: "null", stderr: "null" });
    const ended = child.status.then(() => true);
    // Its server serves one client at a time and is slow to part with it.
    const refused = await Promise.race([ended, delay(1000).then(() => false)]);
    if (refused && attempt < 40) continue;
    const measured = await measure();
    const early = await Promise.race([ended, delay(0).then(() => false)]);
    if (early) throw new Error("the bulk streams have ended early");
    await stop(child);
    return measured;
  }
}

/** In milliseconds. */
async function roundTripBesideBulk(
  ports: Ports,
  port: number,
  streams: number,
  seconds: number,
): Promise<number> {
  const measure = () => roundTripMicroseconds(port, seconds);
  return await besideBulk(ports, streams, seconds, measure) / 1000;
}

/** Many connections at once, each waiting for its answers one by one. */
async function answerMilliseconds(
  port: number,
  seconds: number,
): Promise<number[]> {
  const times: number[] = [];
  await inLanes(toxicConnections, toxicConnections, async (index) => {
    using conn = await connect(port);
    await exchange(conn, message);
    await delay(index * toxicMs / toxicConnections); // not all in one moment
    const end = performance.now() + seconds * 1000;
    for (let now = performance.now(); now < end;) {
      await exchange(conn, message);
      const before = now;
      now = performance.now();
      times.push(now - before);
    }
  });
  return times;
}

/** What the slowest of some limited streams carries, as a part of its rate. */
async function slowestShare(port: number, count: number): Promise<number> {
  const carried = await inLanes(count, count, async () => {
    const each = await carriedByMillisecond(port);
    return each.reduce((a, b) => a + b);
  });
  return least(carried) / (besideRate * rateMs);
}

/** What each window of a limited stream carries, as a part of its share. */
async function windowShares(port: number, rate: number): Promise<number[]> {
  const carried = await carriedByMillisecond(port);
  const shares: number[] = [];
  let sum = 0;
  for (const [at, bytes] of carried.entries()) {
    sum += bytes - (carried[at - windowMs] ?? 0);
    if (at >= windowMs - 1) shares.push(sum / (rate * windowMs));
  }
  return shares;
}

async function carriedByMillisecond(port: number): Promise<number[]> {
  using conn = await connect(port);
  const buffer = new Uint8Array(256 * 1024);
  const carried = new Array<number>(rateMs).fill(0);
  let start: number | undefined;
  for (;;) {
    const length = await conn.read(buffer);
    if (length === null) throw new Error("the limited stream has ended");
    const now = performance.now();
    start ??= now;
    const at = Math.floor(now - start);
    if (at >= rateMs) return carried;
    carried[at] = (carried[at] ?? 0) + length;
  }
}

/** The median of four ratios, each to the plain port just before and after. */
async function timesPlain(
  plainPort: number,
  otherPort: number,
  measure: (port: number, seconds: number) => Promise<number>,
): Promise<number> {
  const ratios: number[] = [];
  let before = await measure(plainPort, 1);
  for (let turn = 0; turn < 4; turn++) {
    const other = await measure(otherPort, 1);
    const after = await measure(plainPort, 1);
    ratios.push(2 * other / (before + after));
    before = after;
  }
  return median(ratios);
}

/** From the start of a connection to the first byte of the answer. */
async function firstByteMilliseconds(port: number): Promise<number> {
  const before = performance.now();
  using conn = await connect(port);
  await exchange(conn, message.subarray(0, 1));
  return performance.now() - before;
}

/** The first answer of a process that has just said that it has started. */
async function firstAnswerMilliseconds(args: string[]): Promise<number> {
  const localPort = freePort();
  const upstream = `127.0.0.1:${upstreams.echo}`;
  const route = { localPort, upstream, toxics: toxics.lateEcho };
  const output = { stdout: "piped" } as const;
  const child = await startChaosProxy([route], args, output);
  await printed(child, "started");
  await delay(200);
  const first = await firstByteMilliseconds(localPort);
  await stop(child);
  return first;
}

/** In a process of its own, whose memory no earlier load has stretched. */
async function idleConnectionKiB(contender: Contender): Promise<number[]> {
  const port = freePort();
  const processes = await contender.start([
    { name: "echo", port, upstream: upstreams.echo },
  ]);
  const [child] = processes;
  if (!child) return [];
  await ready(child, port);
  const established = async () => {
    const conn = await connect(port);
    await exchange(conn, message);
    return conn;
  };

  await inLanes(200, 10, async () => (await established()).close());
  await delay(1000);
  const before = await residentKiB(child.pid);

  const idle = await inLanes(idleConnections, 10, established);
  await delay(1000);
  const after = await residentKiB(child.pid);

  for (const conn of idle) conn.close();
  await Promise.all(processes.map(stop));
  if (before === undefined || after === undefined) return [];
  return [(after - before) / idleConnections];
}

// The rows

function rowsFor(seconds: number): Row[] {
  return [
    {
      name: "bulk",
      tools: ["iperf3"],
      measure: (_, { bulk }) => gigabytesPerSecond(bulk, seconds),
      figures: [
        { label: "one stream, GB/s ↑", digits: 2, ratio: true },
      ],
    },
    {
      name: "http",
      tools: ["wrk", "nginx"],
      measure: ({ name }, { http }) =>
        requestsPerSecond(`http, ${name}`, http, seconds),
      figures: [{
        label: `requests/s, ${httpConnections} kept connections ↑`,
        digits: 0,
        ratio: true,
      }],
    },
    {
      name: "connections",
      tools: ["wrk", "nginx"],
      measure: ({ name }, { http }) =>
        requestsPerSecond(`connections, ${name}`, http, seconds, closing),
      figures: [
        { label: "connections/s ↑", digits: 0, ratio: true },
      ],
    },
    {
      name: "memory",
      // socat's is that of a thousand processes.
      measures: (contender) => !["direct", "socat"].includes(contender),
      measure: idleConnectionKiB,
      figures: [{
        label: `KiB an idle connection, of ${idleConnections} ↓`,
        digits: 1,
        ratio: true,
      }],
    },
    {
      name: "pingpong",
      measure: (_, { echo }) => roundTripMicroseconds(echo, seconds),
      figures: [
        { label: "round trip, µs ↓", digits: 0 },
        {
          label: "round trip, added µs ↓",
          digits: 0,
          added: true,
          ratio: true,
        },
      ],
    },
    ...[5, 20].map((streams): Row => ({
      name: `beside${streams}`,
      tools: ["iperf3"],
      measure: (_, ports) =>
        roundTripBesideBulk(ports, ports.echo, streams, seconds),
      figures: [{
        label: `round trip beside ${streams} bulk streams, ms ↓`,
        digits: 2,
        ratio: true,
      }],
    })),
    {
      name: "latebeside",
      tools: ["iperf3"],
      measures: hasToxics,
      measure: (_, ports) =>
        roundTripBesideBulk(ports, ports.lateEcho, 5, seconds),
      figures: [{
        label: `toxic latency ${toxicMs} beside 5 bulk streams, ms, median`,
        digits: 2,
      }],
    },
    ...[1, 16].map((count): Row => ({
      name: `limitedbeside${count}`,
      tools: ["iperf3"],
      measures: hasToxics,
      measure: (_, ports) => {
        const limited = ports[`limited${besideRate}`];
        const measure = () => slowestShare(limited, count);
        return besideBulk(ports, 3, rateMs / 1000, measure);
      },
      figures: [{
        label: `toxic bandwidth ${besideRate} beside 3 bulk streams: ` +
          (count > 1 ? `slowest of ${count}, %` : "%"),
        digits: 2,
        of: (samples) => 100 * median(samples),
      }],
    })),
    {
      name: "latency",
      measures: (contender) =>
        ["direct", "chaos-proxy", "with --api"].includes(contender),
      measure: (_, { delayedEcho }) =>
        inLanes(50, 5, () => firstByteMilliseconds(delayedEcho)),
      figures: [
        {
          label: `latencyMs: ${delayMs}, added ms, median`,
          digits: 2,
          added: true,
        },
        {
          label: `latencyMs: ${delayMs}, added ms, 99th percentile`,
          digits: 2,
          of: (samples) => quantile(samples, 0.99),
          added: true,
        },
      ],
    },
    {
      name: "toxiclatency",
      measures: hasToxics,
      measure: (_, { lateEcho }) => answerMilliseconds(lateEcho, seconds),
      figures: [
        { label: `toxic latency ${toxicMs}: ms, least`, digits: 2, of: least },
        { label: "  median", digits: 2 },
        {
          label: "  99th percentile",
          digits: 2,
          of: (samples) => quantile(samples, 0.99),
        },
      ],
    },
    {
      name: "first",
      measures: (contender) => isOwn(contender) && contender !== withPage.name,
      measure({ name }) {
        const args = name === chaosProxy.name ? [] : ["--api", "0"];
        return inLanes(5, 1, () => firstAnswerMilliseconds(args));
      },
      figures: [
        {
          label:
            `toxic latency ${toxicMs}: a process's first answer, ms, median`,
          digits: 2,
        },
        { label: "  most", digits: 2, of: most },
      ],
    },
    {
      name: "toxicbulk",
      tools: ["iperf3"],
      measures: (contender) => ["direct", ...haveToxics].includes(contender),
      measure: (_, { lateBulk }) => megabytesPerSecondDown(lateBulk, seconds),
      figures: [{
        label: `toxic latency ${toxicMs}: one stream, MB/s ↑`,
        digits: 0,
      }],
    },
    {
      name: "plainbulk",
      tools: ["iperf3"],
      measures: (contender) => ["direct", ...haveToxics].includes(contender),
      measure: (_, { bulk }) => megabytesPerSecondDown(bulk, seconds),
      figures: [{
        label: "  the same without the toxic",
        digits: 0,
      }],
    },
    ...rates.map((rate): Row => ({
      name: `bandwidth${rate}`,
      measures: hasToxics,
      measure: (_, ports) => windowShares(ports[`limited${rate}`], rate),
      figures: [
        {
          label: `toxic bandwidth ${rate}: % of KB/s`,
          digits: 2,
          of: (samples) => 100 * mean(samples),
        },
        {
          label: `  most in ${windowMs} ms, times its share ↓`,
          digits: 3,
          of: most,
        },
      ],
    })),
    {
      name: "idletoxics",
      tools: ["wrk", "nginx"],
      measures: hasToxics,
      measure: ({ name }, { http, idleHttp }) =>
        timesPlain(
          http,
          idleHttp,
          (port, seconds) =>
            requestsPerSecond(`idletoxics, ${name}`, port, seconds),
        ),
      figures: [{
        label: "ten toxics of toxicity 0: requests/s to none",
        digits: 3,
      }],
    },
    {
      name: "unusedplanbulk",
      tools: ["iperf3"],
      measures: isOwn,
      measure: (_, { bulk, planBulk }) =>
        timesPlain(
          bulk,
          planBulk,
          megabytesPerSecondDown,
        ),
      figures: [{ label: "unused plan: bulk to none", digits: 3 }],
    },
    ...([["plan", "three"], ["plans", "all"]] as const).map((
      [plans, which],
    ): Row => ({
      name: `unused${plans}connections`,
      tools: ["wrk", "nginx"],
      measures: isOwn,
      measure: ({ name }, ports) =>
        timesPlain(ports.http, ports[`${plans}Http`], (port, seconds) => {
          const log = `unused${plans}, ${name}`;
          return requestsPerSecond(log, port, seconds, closing);
        }),
      figures: [{
        label: `unused plans, ${which}: connections/s to none`,
        digits: 3,
      }],
    })),
  ];
}

function least(samples: number[]): number {
  return samples.reduce((a, b) => Math.min(a, b));
}

function most(samples: number[]): number {
  return samples.reduce((a, b) => Math.max(a, b));
}

function mean(samples: number[]): number {
  return samples.reduce((a, b) => a + b) / samples.length;
}

function median(samples: number[]): number {
  return quantile(samples, 0.5);
}

function quantile(samples: number[], share: number): number {
  const sorted = samples.toSorted((a, b) => a - b);
  const at = (sorted.length - 1) * share;
  const low = sorted[Math.floor(at)] ?? NaN;
  const high = sorted[Math.ceil(at)] ?? NaN;
  return low + (high - low) * (at % 1);
}

// The table

/** Samples by contender, for one row. */
type Samples = Map<string, number[]>;

function linesOf(
  { label, digits, of = median, added, ratio }: Figure,
  samples: Samples,
  names: string[],
  reference: string,
): string[][] {
  const direct = added ? median(samples.get("direct") ?? []) : 0;
  const values = names.map((name) => {
    const all = samples.get(name) ?? [];
    if (all.length === 0 || (added && name === "direct")) return NaN;
    return of(all) - direct;
  });
  const lines = [[label, ...values.map((value) => cell(value, digits))]];
  if (ratio) {
    const one = values[names.indexOf(reference)] ?? NaN;
    const ratios = values.map((value) => cell(value / one, 2));
    lines.push([`  to ${reference}`, ...ratios]);
  }
  return lines;
}

function cell(value: number, digits: number): string {
  if (!Number.isFinite(value)) return "n/a";
  return value.toLocaleString("en-US", {
    minimumFractionDigits: digits,
    maximumFractionDigits: digits,
  });
}

// The run

const usage = `Usage: deno task bench [options]

  --rounds N     how often everything is measured (default 5)
  --seconds N    how long each measurement lasts (default 2)
  --rows A,B     only these of: ${rowsFor(1).map(({ name }) => name).join(", ")}
  --page         also measure while Chromium shows the page of the control API
  --help`;

async function measureAll(): Promise<number> {
  const args = parseArgs(Deno.args, {
    boolean: ["help", "page"],
    string: ["rounds", "seconds", "rows"],
    unknown: (arg) => misused(`unknown argument ${arg}`, usage),
  });
  if (args.help) {
    console.log(usage);
    return 0;
  }
  const rounds = wholeNumber("rounds", args.rounds ?? "5", usage);
  const seconds = wholeNumber("seconds", args.seconds ?? "2", usage);
  const rows = await runnable(choose(rowsFor(seconds), args.rows));

  const others = await findOthers();
  printMachine([chaosProxy, ...others]);
  const needs = (tool: string) =>
    rows.some(({ tools }) => tools?.includes(tool));
  if (needs("iperf3")) startBulkUpstream();
  if (needs("nginx")) await startHttpUpstream();

  const direct: Contender = {
    name: "direct",
    version: "",
    start: () => Promise.resolve([]),
  };
  const pages = args.page ? [withPage] : [];
  const contenders = [direct, chaosProxy, withApi, ...pages, ...others];
  const portsOf = new Map([[direct, upstreams]]);
  for (const contender of contenders.slice(1)) {
    portsOf.set(contender, await launch(contender));
  }

  const results = new Map<Row, Samples>(rows.map((row) => [row, new Map()]));
  for (let round = 0; round < rounds; round++) {
    console.error(`round ${round + 1} of ${rounds}`);
    const first = round % contenders.length;
    const order = [...contenders.slice(first), ...contenders.slice(0, first)];
    for (const [row, samples] of results) {
      for (const contender of order) {
        const { name } = contender;
        if (row.measures && !row.measures(name)) continue;
        const found = await row.measure(contender, portsOf.get(contender)!);
        samples.set(name, (samples.get(name) ?? []).concat(found));
      }
    }
  }
  printResults(results, contenders.map(({ name }) => name));
  return 0;
}

function choose(rows: Row[], names: string | undefined): Row[] {
  if (names === undefined) return rows;
  return names.split(",").map((name) =>
    rows.find((row) => row.name === name) ??
      misused(`--rows has an unknown row "${name}"`, usage)
  );
}

/** The rows whose load tools are installed; the others are named. */
async function runnable(rows: Row[]): Promise<Row[]> {
  const kept: Row[] = [];
  for (const row of rows) {
    const missing: string[] = [];
    for (const tool of row.tools ?? []) {
      if (!await versionOf(tool, "-v")) missing.push(tool);
    }
    if (missing.length === 0) kept.push(row);
    else {
      console.log(
        `The row ${row.name} is skipped, for it needs ${
          missing.join(" and ")
        } (Debian: ${install}).`,
      );
    }
  }
  return kept;
}

/** Starts a contender for all services, and returns its ports. */
async function launch(contender: Contender): Promise<Ports> {
  const services = Object.keys(upstreams) as Service[];
  const routes = services.map((name) => ({
    name,
    port: freePort(),
    upstream: upstreams[name],
  }));
  const processes = await contender.start(routes);
  for (const [i, { port }] of routes.entries()) {
    // One for all routes, with what it needs, or one for each.
    const process = processes[processes.length < routes.length ? 0 : i];
    if (process) await ready(process, port);
  }
  return Object.fromEntries(
    routes.map(({ name, port }) => [name, port]),
  ) as Ports;
}

function printMachine(contenders: Contender[]): void {
  const gibibytes = Math.round(Deno.systemMemoryInfo().total / 2 ** 30);
  console.log(
    `${Deno.build.os} ${Deno.osRelease()} ${Deno.build.arch}, ` +
      `${navigator.hardwareConcurrency} CPUs, ${gibibytes} GiB, ` +
      `Deno ${Deno.version.deno}`,
  );
  for (const { name, version } of contenders) console.log(`${name} ${version}`);
}

function printResults(results: Map<Row, Samples>, names: string[]): void {
  const reference = names.includes("haproxy") ? "haproxy" : "direct";
  const lines = [...results].flatMap(([{ figures }, samples]) =>
    figures.flatMap((figure) => linesOf(figure, samples, names, reference))
  );
  console.log(`\n${table([["medians", ...names], ...lines])}`);
  console.log("\n↑ more is better, ↓ less is better");
  for (const note of notes) console.log(note);
}

await main(measureAll);
