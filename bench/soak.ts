/**
 * `deno task soak`: many connections at once, then very many one after
 * another, through a proxy whose memory and open descriptors are watched.
 */

import { parseArgs } from "@std/cli/parse-args";
import {
  connect,
  delay,
  exchange,
  freePort,
  inLanes,
  main,
  misused,
  ready,
  residentKiB,
  run,
  startChaosProxy,
  startEcho,
  wholeNumber,
} from "./peers.ts";

/** What the proxy holds; a figure is missing where the platform hides it. */
interface Sample {
  residentMiB?: number;
  descriptors?: number;
}

const atOnce = 1000;
const lanes = 20;
const messageBytes = 64;
// What garbage piles up in a short run, but not 100,000 times 2 KiB.
const allowedGrowthMiB = 128;

const usage = `Usage: deno task soak [options]

  --connections N   how many connections one after another (default 100000)
  --help`;

let waitsForPort = 0;

/** All are open before the first byte, and none is closed before the last. */
async function exchangeAtOnce(port: number): Promise<void> {
  const opened = await Promise.all(
    Array.from({ length: atOnce }, () => connect(port)),
  );
  await Promise.all(opened.map((conn) => {
    const bytes = crypto.getRandomValues(new Uint8Array(64 * 1024));
    return exchange(conn, bytes);
  }));
  for (const conn of opened) conn.close();
}

/**
 * Whoever ends a TCP connection first keeps its addresses for a minute or so,
 * and a client that always does runs out of ports, of which some systems have
 * just 16,000. So the upstream ends nine connections in ten.
 */
async function exchangeInTurn(
  count: number,
  endedByClient: number,
  endedByUpstream: number,
): Promise<void> {
  await inLanes(count, lanes, async (index) => {
    const byClient = index % 10 === 0;
    const port = byClient ? endedByClient : endedByUpstream;
    using conn = await connectWhenPossible(port);
    const bytes = crypto.getRandomValues(new Uint8Array(messageBytes));
    await exchange(conn, bytes);
    if (!byClient && await conn.read(new Uint8Array(1)) !== null) {
      throw new Error("more bytes came back than were sent");
    }
  });
}

async function connectWhenPossible(port: number): Promise<Deno.TcpConn> {
  for (let attempt = 1;; attempt++) {
    try {
      return await connect(port);
    } catch (error) {
      const outOfPorts = error instanceof Deno.errors.AddrNotAvailable;
      if (!outOfPorts || attempt === 120) throw error;
      waitsForPort++;
      await delay(1000);
    }
  }
}

/** Waits a bounded time for the proxy to notice that its clients have gone. */
async function takeSample(pid: number, start: Sample): Promise<Sample> {
  const deadline = performance.now() + 5000;
  let descriptors = await openDescriptors(pid);
  while (exceeds(descriptors, start.descriptors)) {
    if (performance.now() > deadline) break;
    await delay(100);
    descriptors = await openDescriptors(pid);
  }
  const resident = await residentKiB(pid);
  return { descriptors, residentMiB: resident && resident / 1024 };
}

async function openDescriptors(pid: number): Promise<number | undefined> {
  if (Deno.build.os === "windows") return undefined;
  if (Deno.build.os === "linux") {
    return [...Deno.readDirSync(`/proc/${pid}/fd`)].length;
  }
  const listed = await run("lsof", ["-p", `${pid}`, "-F", "f"]);
  return listed.match(/^f\d+$/gm)?.length;
}

/** Whether a figure is known to exceed a limit. */
function exceeds(figure = -Infinity, limit = Infinity): boolean {
  return figure > limit;
}

function print(what: string, ...figures: string[]): void {
  const cells = figures.map((figure) => figure.padStart(13));
  console.log(what.padEnd(24) + cells.join(""));
}

function problemsOf(start: Sample, early: Sample, late: Sample): string[] {
  const problems: string[] = [];
  if (exceeds(late.descriptors, start.descriptors)) {
    problems.push(
      `Descriptors leak: ${start.descriptors} were open at the start, ` +
        `${late.descriptors} are at the end.`,
    );
  }
  const growthMiB = late.residentMiB! - early.residentMiB!;
  if (growthMiB > allowedGrowthMiB) {
    problems.push(
      `Memory leaks: it grew by ${growthMiB.toFixed(1)} MiB after the first ` +
        `fifth; ${allowedGrowthMiB} MiB are allowed.`,
    );
  }
  return problems;
}

async function soak(): Promise<number> {
  const args = parseArgs(Deno.args, {
    boolean: ["help"],
    string: ["connections"],
    unknown: (arg) => misused(`unknown argument ${arg}`, usage),
  });
  if (args.help) {
    console.log(usage);
    return 0;
  }
  const total = wholeNumber("connections", args.connections ?? "100000", usage);

  const [endedByClient, endedByUpstream] = [freePort(), freePort()];
  const proxy = await startChaosProxy([
    { localPort: endedByClient, upstream: `127.0.0.1:${startEcho()}` },
    {
      localPort: endedByUpstream,
      upstream: `127.0.0.1:${startEcho(messageBytes)}`,
    },
  ]);
  await ready(proxy, endedByClient);
  await ready(proxy, endedByUpstream);

  // What a process opens once, when it first needs it, is no leak.
  await exchangeInTurn(100, endedByClient, endedByUpstream);
  await delay(1000);
  let start: Sample = {};
  print("after", "memory, MiB", "descriptors", "seconds");
  const watch = async (what: string, work?: Promise<void>) => {
    const since = performance.now();
    await work;
    const seconds = (performance.now() - since) / 1000;
    const sample = await takeSample(proxy.pid, start);
    print(
      what,
      sample.residentMiB?.toFixed(1) ?? "n/a",
      `${sample.descriptors ?? "n/a"}`,
      seconds.toFixed(1),
    );
    return sample;
  };
  start = await watch("the start");
  await watch(`${atOnce} at once`, exchangeAtOnce(endedByClient));
  let [early, late] = [start, start];
  for (let i = 1, done = 0; i <= 10; i++) {
    const goal = Math.round(total * i / 10);
    const work = exchangeInTurn(goal - done, endedByClient, endedByUpstream);
    done = goal;
    late = await watch(`${done} in turn`, work);
    if (i === 2) early = late;
  }

  if (waitsForPort > 0) {
    console.log(`Clients waited ${waitsForPort} times for a free port.`);
  }
  const problems = problemsOf(start, early, late);
  for (const problem of problems) console.error(problem);
  if (problems.length > 0) return 1;
  console.log("All bytes came back, and nothing leaks.");
  return 0;
}

await main(soak);
