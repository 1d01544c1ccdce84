/**
 * What the benchmark and the soak test share: child processes, an echo
 * upstream, connections to it, and samples of a process's memory.
 */

const loopback = "127.0.0.1";
const root = `${import.meta.dirname}/..`;

const children = new Set<Deno.ChildProcess>();
const tempDirs: string[] = [];
let ending = false;

/**
 * Runs `work`, whose result is the exit code. When it ends, fails or is
 * interrupted, everything started is stopped and no temporary file is left.
 */
export async function main(work: () => Promise<number>): Promise<never> {
  const interrupted = Promise.withResolvers<number>();
  globalThis.addEventListener("unhandledrejection", (event) => {
    event.preventDefault();
    console.error(event.reason);
    interrupted.resolve(1);
  });
  const signals: Deno.Signal[] = Deno.build.os === "windows"
    ? ["SIGINT"]
    : ["SIGINT", "SIGTERM"];
  for (const signal of signals) {
    Deno.addSignalListener(signal, () => interrupted.resolve(130));
  }
  let code = 1;
  try {
    code = await Promise.race([work(), interrupted.promise]);
  } catch (error) {
    console.error(error);
  }
  ending = true;
  await Promise.all([...children].map(stop));
  for (const dir of tempDirs) await Deno.remove(dir, { recursive: true });
  Deno.exit(code);
}

/** Ends the process for a mistake on the command line. */
export function misused(problem: string, usage: string): never {
  console.error(`${problem}\n\n${usage}`);
  Deno.exit(2);
}

/** The value of an option that takes a positive whole number. */
export function wholeNumber(name: string, text: string, usage: string): number {
  if (/^[1-9]\d{0,8}$/.test(text)) return Number(text);
  misused(`--${name} takes a positive whole number, not "${text}"`, usage);
}

/** A temporary directory that lasts until the end. */
export async function tempDir(): Promise<string> {
  const dir = await Deno.makeTempDir({ prefix: "chaos-proxy-" });
  tempDirs.push(dir);
  return dir;
}

/** Starts a child process, by default one of which only errors are shown. */
export function start(
  command: string,
  args: string[],
  output: Pick<Deno.CommandOptions, "stdout" | "stderr"> = { stdout: "null" },
): Deno.ChildProcess {
  if (ending) throw new Error("interrupted");
  const child = new Deno.Command(command, { args, stdin: "null", ...output })
    .spawn();
  children.add(child);
  child.status.then(() => children.delete(child));
  return child;
}

/** Stops a child process, by force when it takes too long. */
export async function stop(child: Deno.ChildProcess): Promise<void> {
  const kill = (signal: Deno.Signal) => {
    try {
      child.kill(signal);
    } catch {
      // It has ended by itself.
    }
  };
  kill("SIGTERM");
  const force = setTimeout(kill, 5000, "SIGKILL");
  await child.status;
  clearTimeout(force);
}

/** What a command prints. */
export async function run(command: string, args: string[]): Promise<string> {
  const child = start(command, args, { stdout: "piped", stderr: "piped" });
  const { success, stdout, stderr } = await child.output();
  const out = new TextDecoder().decode(stdout);
  if (success) return out;
  const err = new TextDecoder().decode(stderr);
  throw new Error(`${command} failed: ${err}${out}`);
}

/** Starts this repository's proxy, which logs warnings, if nothing else is said. */
export async function startChaosProxy(
  routes: Record<string, unknown>[],
  args: string[] = [],
  output?: Pick<Deno.CommandOptions, "stdout" | "stderr">,
): Promise<Deno.ChildProcess> {
  const config = `${await tempDir()}/config.json`;
  await Deno.writeTextFile(
    config,
    JSON.stringify({ seed: 1, drainTimeoutMs: 1000, routes }),
  );
  return start(Deno.execPath(), [
    ...["run", "--allow-net", "--allow-read"],
    ...["--import-map", `${root}/npm/imports.json`],
    ...["--lock", `${root}/npm/deno.lock`, "--frozen"],
    ...[`${root}/main.ts`, ...output ? [] : ["--log-level", "warn"]],
    ...[...args, config],
  ], output);
}

/** Waits until a child process accepts connections on a port. */
export async function ready(
  child: Deno.ChildProcess,
  port: number,
): Promise<void> {
  const deadline = performance.now() + 30_000;
  while (children.has(child) && performance.now() < deadline) {
    try {
      (await connect(port)).close();
      return;
    } catch (error) {
      if (!(error instanceof Deno.errors.ConnectionRefused)) throw error;
      await delay(50);
    }
  }
  throw new Error(`nothing listens on port ${port}`);
}

/** Waits until a child process with piped output has printed something. */
export async function printed(
  child: Deno.ChildProcess,
  what: string,
): Promise<void> {
  let text = "";
  const output = child.stdout.pipeThrough(new TextDecoderStream()).getReader();
  while (!text.includes(what)) {
    const { value, done } = await output.read();
    if (done) throw new Error(`ended without ${what}: ${text}`);
    text += value;
  }
  (async () => {
    while (!(await output.read()).done);
  })(); // so that it never has to wait for a reader
}

const givenPorts = new Set<number>();

/** A port that is free at the moment, and was not given before. */
export function freePort(): number {
  for (;;) {
    using listener = listen();
    const { port } = listener.addr;
    if (!givenPorts.has(port)) {
      givenPorts.add(port);
      return port;
    }
  }
}

/**
 * Starts an upstream that sends back what it gets, and returns its port. It
 * ends each connection after `endAfter` bytes, or else when the client does.
 */
export function startEcho(endAfter = Infinity): number {
  return startUpstream((conn) => echo(conn, endAfter));
}

/** Starts an upstream that sends for as long as one reads. */
export function startSource(): number {
  const bytes = new Uint8Array(64 * 1024);
  return startUpstream(async (conn) => {
    for (;;) await writeAll(conn, bytes);
  });
}

function startUpstream(work: (conn: Deno.TcpConn) => Promise<void>): number {
  const listener = listen();
  serve(listener, work);
  return listener.addr.port;
}

async function serve(
  listener: Deno.TcpListener,
  work: (conn: Deno.TcpConn) => Promise<void>,
): Promise<never> {
  for (;;) {
    try {
      const conn = await listener.accept();
      // Whatever ends a connection early is the client's to notice.
      work(conn).catch(() => {}).finally(() => conn.close());
    } catch (error) {
      // So fails to accept a connection that was reset while it waited.
      if (!(error instanceof Deno.errors.NotConnected)) throw error;
    }
  }
}

async function echo(conn: Deno.TcpConn, endAfter: number): Promise<void> {
  conn.setNoDelay();
  const buffer = new Uint8Array(16 * 1024);
  for (let echoed = 0; echoed < endAfter;) {
    const length = await conn.read(buffer);
    if (length === null) return;
    await writeAll(conn, buffer.subarray(0, length));
    echoed += length;
  }
}

function listen(): Deno.TcpListener {
  return Deno.listen({ hostname: loopback, port: 0 });
}

export async function connect(port: number): Promise<Deno.TcpConn> {
  const conn = await Deno.connect({ hostname: loopback, port });
  conn.setNoDelay();
  return conn;
}

/** Sends bytes to an echo and checks that the same come back. */
export async function exchange(
  conn: Deno.TcpConn,
  sent: Uint8Array,
): Promise<void> {
  await Promise.all([writeAll(conn, sent), expectBytes(conn, sent)]);
}

async function expectBytes(
  conn: Deno.TcpConn,
  expected: Uint8Array,
): Promise<void> {
  const buffer = new Uint8Array(Math.min(expected.length, 16 * 1024));
  for (let at = 0; at < expected.length;) {
    const length = await conn.read(buffer);
    if (length === null) {
      throw new Error(`ended after ${at} of ${expected.length} bytes`);
    }
    for (let i = 0; i < length; i++, at++) {
      if (buffer[i] !== expected[at]) throw new Error(`byte ${at} is wrong`);
    }
  }
}

async function writeAll(conn: Deno.TcpConn, bytes: Uint8Array): Promise<void> {
  for (let at = 0; at < bytes.length;) {
    at += await conn.write(bytes.subarray(at));
  }
}

/** Does a job `count` times, in `width` lanes that each do one at a time. */
export async function inLanes<T>(
  count: number,
  width: number,
  job: (index: number) => Promise<T>,
): Promise<T[]> {
  const results: T[] = [];
  let next = 0;
  const lane = async () => {
    while (next < count) {
      const index = next++;
      results[index] = await job(index);
    }
  };
  await Promise.all(Array.from({ length: width }, lane));
  return results;
}

export function delay(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}

/** A process's resident memory in KiB, where the platform tells. */
export async function residentKiB(pid: number): Promise<number | undefined> {
  if (Deno.build.os === "windows") return undefined;
  if (Deno.build.os !== "linux") {
    return Number(await run("ps", ["-o", "rss=", "-p", `${pid}`]));
  }
  const status = await Deno.readTextFile(`/proc/${pid}/status`);
  return Number(/VmRSS:\s+(\d+)/.exec(status)![1]);
}

/** Lines up a table's columns: the first to the left, the others to the right. */
export function table(rows: string[][]): string {
  const widths: number[] = [];
  for (const row of rows) {
    row.forEach(({ length }, i) => {
      widths[i] = Math.max(widths[i] ?? 0, length);
    });
  }
  const line = (row: string[]) =>
    row.map((cell, i) =>
      i === 0 ? cell.padEnd(widths[i] ?? 0) : cell.padStart(widths[i] ?? 0)
    ).join("  ").trimEnd();
  return rows.map(line).join("\n");
}
