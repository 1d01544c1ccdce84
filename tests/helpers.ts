/** What the tests share: peers, a proxy that is watched, the CLI as a process. */

import { assert, assertEquals, assertGreaterOrEqual } from "@std/assert";
import { once } from "node:events";
import { type AddressInfo, connect, createServer, type Socket } from "node:net";
import {
  type ApiEvent,
  type ApiServer,
  ChaosProxy,
  type ConfigOptions,
  parseConfig,
  type ProxyEvent,
  type Route,
  type RouteOptions,
  serveApi,
  type StartOptions,
  type Stream,
  type ToxicOptions,
  type ToxicType,
} from "../main.ts";

/** All that the program logs. */
export type LogEvent =
  | ProxyEvent
  | ApiEvent
  | { event: "log_dropped"; lines: number }
  | { event: "report"; summary: string; warnings: string[]; file: string }
  | { event: "reload_failed"; cause: string }
  | { event: "sighup_ignored" };

type Named<N> = Extract<LogEvent, { event: N }>;

/** Events in the order in which they came, and those still to come. */
export class EventLog {
  readonly all: LogEvent[] = [];
  hasEnded = false;
  #changed = Promise.withResolvers<void>();

  readonly add = (event: LogEvent): void => {
    this.all.push(event);
    this.#wake();
  };

  /** No more will come: whoever waits for one is told so. */
  end(): void {
    this.hasEnded = true;
    this.#wake();
  }

  of<N extends LogEvent["event"]>(name: N): Named<N>[] {
    return this.all.filter((each): each is Named<N> => each.event === name);
  }

  /** The only event of a name. */
  only<N extends LogEvent["event"]>(name: N): Named<N> {
    return only(this.of(name));
  }

  /** The first so many events of a name, as soon as they are there. */
  async first<N extends LogEvent["event"]>(
    name: N,
    count: number,
  ): Promise<[Named<N>, ...Named<N>[]]> {
    for (;;) {
      const [one, ...more] = this.of(name).slice(0, count);
      if (one && more.length === count - 1) return [one, ...more];
      if (this.hasEnded) throw new Error(`there are not ${count} ${name}`);
      await this.#changed.promise;
    }
  }

  #wake(): void {
    this.#changed.resolve();
    this.#changed = Promise.withResolvers();
  }
}

/** A proxy in this process, and what happened to it. */
export class WatchedProxy implements AsyncDisposable {
  private constructor(readonly proxy: ChaosProxy, readonly log: EventLog) {}

  static async start(config: ConfigOptions, options: StartOptions = {}) {
    const log = new EventLog();
    const all = { onEvent: log.add, ...options };
    return new WatchedProxy(await ChaosProxy.start(config, all), log);
  }

  /** A proxy with one route to an upstream, on a free port. */
  static to(
    upstream: { address: string },
    route: Partial<RouteOptions> = {},
    config: Partial<ConfigOptions> = {},
    options: StartOptions = {},
  ): Promise<WatchedProxy> {
    return WatchedProxy.start({
      seed: 1,
      ...config,
      routes: [{ localPort: 0, upstream: upstream.address, ...route }],
    }, options);
  }

  /** The port on which a route listens. */
  port(route = 0): number {
    return defined(this.proxy.routes[route]).localPort;
  }

  connect(route = 0): Promise<Deno.TcpConn> {
    return Deno.connect({ port: this.port(route) });
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.proxy.stop();
  }
}

/** An upstream that leaves it to the test what happens on its connections. */
export class Silent implements AsyncDisposable {
  readonly address: string;
  readonly #listener: Deno.TcpListener;
  readonly #accepted: Deno.TcpConn[] = [];

  constructor(hostname = "127.0.0.1") {
    this.#listener = Deno.listen({ hostname, port: 0 });
    const host = hostname.includes(":") ? `[${hostname}]` : hostname;
    this.address = `${host}:${this.#listener.addr.port}`;
  }

  /** How many connections have come. */
  get accepted(): number {
    return this.#accepted.length;
  }

  async accept(): Promise<Deno.TcpConn> {
    const conn = await this.#listener.accept();
    this.#accepted.push(conn);
    return conn;
  }

  [Symbol.asyncDispose](): Promise<void> {
    this.#listener.close();
    for (const conn of this.#accepted) conn[Symbol.dispose]();
    return Promise.resolve();
  }
}

type Handler = (conn: Deno.TcpConn) => Promise<unknown>;

/** A server that hands each connection to a handler, and then closes it. */
export class Upstream extends Silent {
  readonly #serving: Promise<void>;

  constructor(handler: Handler, hostname?: string) {
    super(hostname);
    this.#serving = this.#serve(handler);
  }

  async #serve(handler: Handler): Promise<void> {
    const handled: Promise<void>[] = [];
    for (;;) {
      try {
        const conn = await this.accept();
        const ended = handler(conn).catch(unlessDisconnected);
        handled.push(ended.then(() => conn[Symbol.dispose]()));
      } catch (error) {
        if (error instanceof Deno.errors.NotConnected) continue; // left already
        if (isDisconnect(error)) break; // the listener was closed
        throw error;
      }
    }
    await Promise.all(handled);
  }

  override async [Symbol.asyncDispose](): Promise<void> {
    await super[Symbol.asyncDispose]();
    await this.#serving;
  }
}

/** Sends back what it gets, and ends when its client does. */
export function echo(hostname?: string): Upstream {
  return new Upstream(async (conn) => {
    const buffer = new Uint8Array(64 * 1024);
    for (;;) {
      const size = await conn.read(buffer);
      if (size === null) break;
      await writeAll(conn, buffer.subarray(0, size));
    }
    await conn.closeWrite();
  }, hostname);
}

/**
 * A port that is free, also when it is given back and taken again: no system
 * gives one of these to whoever connects, or wants any.
 */
export function steadyPort(): number {
  for (;;) {
    const port = 20_000 + Math.floor(Math.random() * 12_000);
    try {
      Deno.listen({ hostname: "0.0.0.0", port }).close();
      return port;
    } catch (error) {
      if (!(error instanceof Deno.errors.AddrInUse)) throw error;
    }
  }
}

/** An address of this machine's on which nothing listens. */
export function nowhere(): { address: string } {
  return { address: `127.0.0.1:${steadyPort()}` };
}

/** Returns what must be there; throws when it is missing. */
export function defined<T>(value: T, what = "it is missing"): NonNullable<T> {
  assert(value !== undefined && value !== null, what);
  return value;
}

/** The item of a list that has just one; throws when it has not. */
export function only<T>(list: readonly T[]): T {
  const [item, ...more] = list;
  assert(item !== undefined && !more.length, `not one: ${Deno.inspect(list)}`);
  return item;
}

/** What the first group of an expression captures; throws without a match. */
export function captured(expression: RegExp, text: string): string {
  return defined(expression.exec(text)?.[1], `${expression} not in ${text}`);
}

export async function writeAll(conn: Deno.Conn, bytes: Uint8Array) {
  for (let sent = 0; sent < bytes.length;) {
    sent += await conn.write(bytes.subarray(sent));
  }
}

export function send(conn: Deno.Conn, text: string): Promise<void> {
  return writeAll(conn, new TextEncoder().encode(text));
}

/** What comes, part by part, up to the end of the stream. */
async function* parts(conn: Deno.Conn) {
  const buffer = new Uint8Array(256 * 1024);
  for (;;) {
    const size = await soon(conn.read(buffer), "byte or end");
    if (size === null) return;
    yield buffer.subarray(0, size);
  }
}

/** Reads to the end of the stream. */
export async function readAll(conn: Deno.Conn): Promise<Uint8Array> {
  const chunks = await Array.fromAsync(parts(conn), (part) => part.slice());
  return new Uint8Array(await new Blob(chunks).arrayBuffer());
}

/** Reads so many bytes, or up to the end of the stream. */
export async function readExactly(conn: Deno.Conn, length: number) {
  const bytes = new Uint8Array(length);
  let got = 0;
  while (got < length) {
    const size = await soon(conn.read(bytes.subarray(got)), "byte or end");
    if (size === null) break;
    got += size;
  }
  return bytes.subarray(0, got);
}

export function text(bytes: Uint8Array): string {
  return new TextDecoder().decode(bytes);
}

/** Bytes that repeat nowhere soon, so that none can be lost or moved unseen. */
export function testBytes(length: number, seed = 1): Uint8Array<ArrayBuffer> {
  const words = new Uint32Array(Math.ceil(length / 4));
  let state = seed | 1;
  for (let i = 0; i < words.length; i++) {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    words[i] = state;
  }
  return new Uint8Array(words.buffer, 0, length);
}

const DISCONNECTS = ["ConnectionReset", "ConnectionAborted", "BrokenPipe"]
  .concat("NotConnected", "BadResource", "Interrupted");

/** Whether an error is one that a peer's leaving, or our closing, brings. */
function isDisconnect(error: unknown): boolean {
  return error instanceof Error && DISCONNECTS.includes(error.name);
}

/** Lets the errors pass that a peer's leaving, or our closing, brings. */
export function unlessDisconnected(error: unknown): void {
  if (!isDisconnect(error)) throw error;
}

/**
 * Reads to the end, be it a reset, and returns how many bytes there were:
 * repetitions of the block, if there is one.
 */
export async function readToEnd(conn: Deno.Conn, block?: Uint8Array) {
  let got = 0;
  try {
    for await (const part of parts(conn)) {
      for (let i = 0; block && i < part.length; i++) {
        if (part[i] === block[(got + i) % block.length]) continue;
        throw new Error(`the byte at ${got + i} is another one`);
      }
      got += part.length;
    }
  } catch (error) {
    unlessDisconnected(error);
  }
  return got;
}

/** The folder of the project. */
export const ROOT = new URL("..", import.meta.url);

const FOLDER = `${import.meta.dirname}/..`;
const USES_NPM = import.meta.resolve("@std/yaml").startsWith("file:");

/** How Deno finds, from any folder, what this process imports. */
export const RUN_FLAGS = [
  ...["--no-prompt", "--config", `${FOLDER}/deno.json`],
  ...(USES_NPM
    ? [`--import-map=${FOLDER}/npm/imports.json`]
      .concat(`--lock=${FOLDER}/npm/deno.lock`, "--frozen")
    : []),
];

/** The permissions that the program needs. */
export const PERMISSIONS = ["--allow-net", "--allow-read"];

/** The arguments with which Deno runs the program, from any folder. */
export function runArgs(args: string[], permissions = PERMISSIONS): string[] {
  return ["run", ...RUN_FLAGS, ...permissions, `${FOLDER}/main.ts`, ...args];
}

/** Signals a process, which may have ended meanwhile. */
export function signalTo(child: Deno.ChildProcess, signal: Deno.Signal): void {
  try {
    child.kill(signal);
  } catch (error) {
    // TypeError: child process has already terminated.
    if (!(error instanceof TypeError)) throw error;
  }
}

/** `chaos-proxy` as a user starts it, with just the permissions it needs. */
export class Cli implements AsyncDisposable {
  /** All that has come on standard output. */
  stdout = "";
  /** All that came on standard error, once it has ended. */
  stderr = "";
  /** The events that a `--log-format json` run has logged. */
  readonly log = new EventLog();
  readonly status: Promise<Deno.CommandStatus>;
  readonly #child: Deno.ChildProcess;

  constructor(...args: string[]) {
    const [command, ...before] = this.command;
    this.#child = new Deno.Command(defined(command), {
      args: [...before, ...runArgs(args, this.permissions)],
      cwd: ROOT,
      // Certificates, if named here, may be loaded when there is a shortage.
      env: { NO_COLOR: "1", NODE_EXTRA_CA_CERTS: "" },
      stdin: "null",
      stdout: "piped",
      stderr: "piped",
    }).spawn();
    this.status = this.#watch();
  }

  /** How Deno is run. */
  get command(): string[] {
    return [Deno.execPath()];
  }

  get permissions(): string[] {
    return PERMISSIONS;
  }

  /** Until when its output is not read, unless it ends before. */
  get unread(): Promise<void> {
    return Promise.resolve();
  }

  /** Runs with a configuration, logging JSON, until it has started. */
  static async start(config: ConfigOptions, ...args: string[]): Promise<Cli> {
    await using file = await TempFile.with(JSON.stringify(config), ".json");
    const cli = new this("--log-format", "json", ...args, file.path);
    try {
      await cli.log.first("started", 1);
      return cli;
    } catch (cause) {
      throw new Error(`did not start: ${cli.stderr}`, { cause });
    }
  }

  /** Runs so with one route to an upstream, on a free port. */
  static to(
    { address: upstream }: { address: string },
    config: Partial<ConfigOptions> = {},
  ): Promise<Cli> {
    return this.start({ ...config, routes: [{ localPort: 0, upstream }] });
  }

  /** What an expression captures in standard output, or all that it matches. */
  async says(expression: RegExp): Promise<string> {
    await until(
      () => this.log.hasEnded || expression.test(this.stdout),
      `${expression} in ${this.stdout}`,
    );
    const found = defined(
      expression.exec(this.stdout),
      `${expression} not in ${this.stdout}${this.stderr}`,
    );
    return found[1] ?? found[0];
  }

  get pid(): number {
    return this.#child.pid;
  }

  /** The port on which a route listens. */
  port(route = 0): number {
    const { address } = defined(this.log.of("listening")[route]);
    return Number(address.slice(address.lastIndexOf(":") + 1));
  }

  kill(signal: Deno.Signal = "SIGTERM"): void {
    signalTo(this.#child, signal);
  }

  async #watch(): Promise<Deno.CommandStatus> {
    const { stdout, stderr, status } = this.#child;
    await Promise.race([this.unread, status]);
    const read = [this.#readLog(stdout), new Response(stderr).text()] as const;
    [, this.stderr] = await Promise.all(read);
    this.log.end();
    return status;
  }

  async #readLog(stream: Deno.SubprocessReadableStream): Promise<void> {
    let rest = "";
    for await (const part of stream.pipeThrough(new TextDecoderStream())) {
      this.stdout += part;
      const lines = (rest + part).split("\n");
      rest = defined(lines.pop());
      for (const line of lines) {
        if (line.startsWith("{")) this.log.add(JSON.parse(line));
      }
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    signalTo(this.#child, "SIGKILL");
    await this.status;
  }
}

/** Waits until something is so; fails, instead of waiting for ever. */
export async function until(
  isSo: () => boolean | Promise<boolean>,
  what: string,
): Promise<void> {
  const end = performance.now() + 60_000;
  while (!await isSo()) {
    if (performance.now() > end) throw new Error(`not within 60 s: ${what}`);
    await pause();
  }
}

/** Fails, instead of waiting for ever. */
export async function soon<T>(
  promise: Promise<T>,
  what: string,
  withinMs = 60_000,
): Promise<T> {
  const late = Promise.withResolvers<never>();
  const timer = setTimeout(
    () => late.reject(new Error(`no ${what} within ${withinMs / 1000} s`)),
    withinMs,
  );
  try {
    return await Promise.race([promise, late.promise]);
  } finally {
    clearTimeout(timer);
  }
}

/** A client of a control API, which is its own to close where it serves it. */
export class Api implements AsyncDisposable {
  readonly #client = Deno.createHttpClient({ poolMaxIdlePerHost: 0 });

  private constructor(readonly port: number, readonly server?: ApiServer) {}

  /** Serves the API of a proxy. */
  static of({ proxy, log }: WatchedProxy, address: number | string = 0): Api {
    const server = serveApi(proxy, address, { onEvent: log.add });
    return new Api(Number(server.address.split(":").at(-1)), server);
  }

  /** Speaks to one that is served elsewhere. */
  static at(address: string): Api {
    return new Api(Number(address.split(":").at(-1)));
  }

  /** Calls; a body that is no text is sent as JSON. */
  async raw(method: string, path: string, body?: unknown) {
    const answer = await fetch(`http://127.0.0.1:${this.port}${path}`, {
      method,
      body: typeof body === "string" || body instanceof Uint8Array
        ? body as BodyInit
        : JSON.stringify(body),
      client: this.#client,
    });
    const { status, headers } = answer;
    return { status, headers, text: await answer.text() };
  }

  /** Calls, and reads the answer as JSON. */
  async call(
    method: string,
    path: string,
    body?: unknown,
    // deno-lint-ignore no-explicit-any
  ): Promise<{ status: number; body: any }> {
    const { status, text } = await this.raw(method, path, body);
    return { status, body: text === "" ? undefined : JSON.parse(text) };
  }

  get = (path: string) => this.call("GET", path);
  post = (path: string, body?: unknown) => this.call("POST", path, body);
  patch = (path: string, body: unknown) => this.call("PATCH", path, body);
  delete = (path: string) => this.call("DELETE", path);

  async [Symbol.asyncDispose](): Promise<void> {
    this.#client.close();
    await this.server?.close();
  }
}

/**
 * Connects until it is refused: a listener's closing takes a turn of the event
 * loop, up to which connections are reset.
 */
export async function untilRefused(port: number): Promise<void> {
  await until(async () => {
    try {
      using client = await Deno.connect({ port });
      await readToEnd(client);
    } catch (error) {
      if (error instanceof Deno.errors.ConnectionRefused) return true;
      unlessDisconnected(error);
    }
    return false;
  }, `port ${port} refuses`);
}

/** Files that are there while they are used. */
export const TempFile = {
  async with(content: BlobPart, suffix = ".yaml") {
    const path = await Deno.makeTempFile({ suffix });
    await Deno.writeFile(path, new Blob([content]).stream());
    return { path, [Symbol.asyncDispose]: () => Deno.remove(path) };
  },
};

export const MIB = 2 ** 20;
export const IS_LINUX = Deno.build.os === "linux";
export const IS_WINDOWS = Deno.build.os === "windows";
/** Longer than any test lasts. */
export const LONG_MS = 1_000_000_000;
/** The kinds of sockets, and whether it takes `resettable` to have them. */
export const SOCKETS = [
  { sockets: "Deno's sockets", resettable: false },
  { sockets: "Node's sockets", resettable: true },
];

/** A toxic in one line: `latency upstream latency=100 toxicity=0.5`. */
export function toxic(line: string): ToxicOptions {
  const [type, ...words] = line.split(" ");
  const attributes: Record<string, number | string> = {};
  const options: ToxicOptions = { type: type as ToxicType, attributes };
  for (const word of words) {
    const [key, value] = word.split("=");
    if (key === "upstream") options.stream = key;
    else if (key === "name") options.name = value;
    else if (key === "toxicity") options.toxicity = Number(value);
    else if (key && value) {
      attributes[key] = /^[a-z]/.test(value) ? value : Number(value);
    }
  }
  return options;
}

/** Waits until so many connections have ended; the last of them like this. */
export async function assertClosed(
  { log }: { log: EventLog },
  expected: Partial<Named<"closed">>,
  count = 1,
): Promise<Named<"closed">> {
  const closed = defined((await log.first("closed", count)).at(-1));
  const all = { cause: undefined, toxic: undefined, ...closed };
  assertEquals(all, { ...all, ...expected });
  return closed;
}

/** A toxic has ended the connection. */
export function assertEndedBy(watched: { log: EventLog }, toxic: string) {
  return assertClosed(watched, { why: "fault", toxic });
}

/** As `assertEquals`, which takes long over many bytes. */
export function assertBytes(actual: Uint8Array, expected: Uint8Array): void {
  assertEquals(actual.length, expected.length);
  let same = 0;
  while (same < actual.length && actual[same] === expected[same]) same++;
  assertEquals(same, actual.length, `the byte at ${same} is another one`);
}

/** Reads exactly these words. */
export async function assertReads(conn: Deno.Conn, words: string) {
  assertEquals(text(await readExactly(conn, words.length)), words);
}

/** Sends words, and gets them back. */
export async function assertEchoes(conn: Deno.Conn, words = "hello") {
  await send(conn, words);
  await assertReads(conn, words);
}

/** Sends all, and ends the stream. */
export async function writeAndEnd(
  conn: Deno.TcpConn,
  bytes: Uint8Array,
  write = writeAll,
) {
  await write(conn, bytes);
  await conn.closeWrite();
}

/** Sends all, ends the stream, and reads to the end of the other one. */
export async function exchange(...sent: Parameters<typeof writeAndEnd>) {
  const [got] = await Promise.all([readAll(sent[0]), writeAndEnd(...sent)]);
  return got;
}

/** Many times the same at once. */
export function times<T>(count: number, run: (index: number) => Promise<T>) {
  return Promise.all(Array.from({ length: count }, (_, i) => run(i)));
}

/** Lets time pass, or just a turn of the event loop, for a failure to show. */
export function pause(ms = 1): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}

/** At least so much time has passed, as far as the clock can tell. */
export function assertSince(start: number, ms: number): void {
  assertGreaterOrEqual(performance.now() - start, ms - 1);
}

interface Flow {
  /** How many bytes have left this program. */
  sent: number;
  /** Set it to send no more. */
  isEnough?: boolean;
  done?: Promise<void>;
}

/** Sends repetitions of a block, and then ends the stream, if there is one. */
export function flood(
  conn: Pick<Deno.TcpConn, "write" | "closeWrite">,
  block = testBytes(MIB),
  total = Infinity,
): Flow {
  const flow: Flow = { sent: 0 };
  const run = async () => {
    while (flow.sent < total && !flow.isEnough) {
      flow.sent += await conn.write(block.subarray(flow.sent % block.length));
    }
    await conn.closeWrite();
  };
  flow.done = run().catch(unlessDisconnected);
  return flow;
}

/** Waits until nothing has left for a while, long before all memory is full. */
export async function untilStalled(flow: Flow): Promise<void> {
  let last = -1;
  for (let same = 0; same < 8; same++) {
    await pause(25);
    if (flow.sent !== last) same = 0;
    last = flow.sent;
    assert(last < 128 * MIB, `${last} bytes were taken`);
  }
}

type How = [route?: Partial<RouteOptions>, options?: StartOptions];

/** A connection through a proxy to a server; all three are closed together. */
export async function connectTo<
  S extends AsyncDisposable & { address: string },
  C extends Deno.TcpConn | NodeEnd = Deno.TcpConn,
>(
  server: S,
  [route, options]: How = [],
  connect = (watched: WatchedProxy) => watched.connect() as Promise<C>,
) {
  const open = new AsyncDisposableStack();
  open.use(server);
  const watched = open.use(await WatchedProxy.to(server, route, {}, options));
  const client = open.use(await connect(watched));
  const close = () => open.disposeAsync();
  return { server, watched, client, [Symbol.asyncDispose]: close };
}

/** A connection through a proxy to an echo. */
export function openEcho(...how: How) {
  return connectTo(echo(), how);
}

/** Adds the upstream's end of the connection. */
async function withUpstream<A, E>(
  opening: Promise<E & { server: { accept(): Promise<A> } }>,
) {
  const ends = await opening;
  return { ...ends, upstream: await ends.server.accept() };
}

/** A connection through a proxy, with both of its ends. */
export function openEnds(...how: How) {
  return withUpstream(connectTo(new Silent(), how));
}

/** As `openEnds`, with a client that can reset the connection. */
export function openNodeClient(...how: How) {
  return withUpstream(connectTo(new Silent(), how, NodeEnd.connect));
}

/** As `openEnds`, with an upstream that can reset the connection. */
export async function openNodeUpstream() {
  return withUpstream(connectTo(await NodeUpstream.listen()));
}

/** An end of a connection that can reset it, as Deno's own sockets cannot. */
export class NodeEnd implements AsyncDisposable {
  /** The other side has ended its stream. */
  readonly ended: Promise<void>;
  readonly closed: Promise<void>;
  error: NodeJS.ErrnoException | undefined;

  constructor(readonly socket: Socket, { reading = true } = {}) {
    this.ended = new Promise((resolve) => socket.once("end", resolve));
    this.closed = new Promise((resolve) =>
      socket.once("close", () => resolve())
    );
    socket.on("error", (error) => this.error = error); // `close` follows
    if (reading) socket.resume();
  }

  static async connect(watched: WatchedProxy, options?: { reading: boolean }) {
    const [port, host] = [watched.port(), "127.0.0.1"];
    const socket = connect({ port, host, allowHalfOpen: true });
    await once(socket, "connect");
    return new NodeEnd(socket, options);
  }

  /** Resolves once all of it is on its way, if it ever is. */
  write(bytes: string | Uint8Array): Promise<number> {
    return new Promise((resolve) =>
      this.socket.write(bytes, (error) => error || resolve(bytes.length))
    );
  }

  closeWrite(): Promise<void> {
    return new Promise((resolve) => this.socket.end(resolve));
  }

  reset(): Promise<void> {
    this.socket.resetAndDestroy();
    return this.closed;
  }

  [Symbol.asyncDispose](): Promise<void> {
    this.socket.destroy();
    return this.closed;
  }
}

/** An upstream that can reset its first connection. */
export const NodeUpstream = {
  async listen(options?: { reading: boolean }) {
    const first = Promise.withResolvers<NodeEnd>();
    const server = createServer({ allowHalfOpen: true });
    server.once("connection", (socket) => {
      first.resolve(new NodeEnd(socket, options));
    });
    await once(server.listen(0, "127.0.0.1"), "listening");
    return {
      address: `127.0.0.1:${(server.address() as AddressInfo).port}`,
      accept: () => first.promise,
      async [Symbol.asyncDispose]() {
        first.promise.then((end) => end[Symbol.asyncDispose]());
        await new Promise((resolve) => server.close(resolve));
      },
    };
  },
};

/** An upstream that neither accepts nor refuses: its backlog is full. */
export async function unanswering() {
  const full = Deno.listen({ hostname: "127.0.0.1", port: 0, tcpBacklog: 1 });
  const { port } = full.addr;
  const left = new AbortController();
  const dial = () => Deno.connect({ port, signal: left.signal });
  const fillers = Array.from({ length: 16 }, dial);
  await Promise.any(fillers);
  return {
    address: `127.0.0.1:${port}`,
    async [Symbol.asyncDispose]() {
      left.abort();
      const leaving = fillers.map((each) =>
        each.then((conn) => conn.close(), () => {}) // it was aborted
      );
      await Promise.all(leaving);
      full.close();
    },
  };
}

/** The memory of a process on Linux: now (`RSS`), or at most so far (`HWM`). */
export async function memory({ pid }: Cli, kind: "RSS" | "HWM") {
  const status = await Deno.readTextFile(`/proc/${pid}/status`);
  const line = new RegExp(`^Vm${kind}:\\s+(\\d+) kB$`, "m");
  return Number(captured(line, status)) * 1024;
}

/** The program as a script for a shell starts it, in place of "$@". */
export function startedBy(
  script: string,
  { before = [], unread }: { before?: string[]; unread?: Promise<void> } = {},
) {
  return class extends Cli {
    override get command(): string[] {
      return [...before, "sh", "-c", script, "sh", ...super.command];
    }

    override get unread(): Promise<void> {
      return unread ?? super.unread;
    }
  };
}

/**
 * What is given, a line a case, and what comes of it: behind an arrow, or in the
 * indented lines below. Cases of which the same comes stand together.
 */
export function casesIn(text: string): [given: string, expected: string[]][] {
  const below = text.trim().replace(/^(\S.*) => /gm, "$1\n  ");
  return below.split(/(?<=\n .*)\n(?=\S)/).flatMap((block) => {
    const lines = block.split("\n");
    const given = lines.filter((line) => !line.startsWith(" "));
    const expected = lines.slice(given.length).map((line) => line.trim());
    return given.map((each): [string, string[]] => [each, expected]);
  });
}

/** What `--check` says of a config that is good. */
export async function checkConfig(config: string): Promise<string> {
  await using file = await TempFile.with(config);
  await using cli = new Cli("--check", file.path);
  assertEquals((await cli.status).code, 0, cli.stderr);
  return cli.stdout;
}

export const HOUR_MS = 3_600_000;
export const STREAMS = ["upstream", "downstream"] as const;

/** What can be changed of a toxic: `toxicity=0.5 latency=100`. */
export function changes(words: string) {
  const { toxicity, attributes } = toxic(`any ${words}`);
  return { toxicity, attributes };
}

/** Signals a program, once or until it has ended; it exits with this code. */
export async function assertExits(
  cli: Cli,
  code = 0,
  { again = false } = {},
): Promise<void> {
  const kill = () => cli.kill(IS_WINDOWS ? "SIGKILL" : "SIGTERM");
  kill();
  const signals = again ? setInterval(kill, 50) : 0;
  const status = await soon(cli.status, "end");
  clearInterval(signals);
  if (!IS_WINDOWS) assertEquals(status.code, code, cli.stderr);
}

/** A route as it is once its config is checked. */
export function routeWith(options: object): Route {
  const route = { localPort: 1, name: "db", upstream: "a:1", ...options };
  const config = JSON.stringify({ routes: [route] });
  return only(parseConfig(config, "config.json").routes);
}

export function sum(numbers: number[]): number {
  return numbers.reduce((total, each) => total + each, 0);
}

export function mean(numbers: number[]): number {
  return sum(numbers) / numbers.length;
}

/** That a share of so many lies within so many standard deviations. */
export function assertShare(
  hits: number,
  draws: number,
  share: number,
  most = 4,
): void {
  const deviation = Math.sqrt(draws * share * (1 - share));
  const off = Math.abs(hits - draws * share);
  assert(off <= most * deviation, `${hits} of ${draws} for ${share}`);
}

/** A route with these toxics. */
export function having(...lines: string[]): Partial<RouteOptions> {
  return { name: "r", toxics: lines.map(toxic) };
}

/** What the only route of a proxy has read of a stream, and not yet sent. */
export function heldBy({ proxy }: WatchedProxy, stream: Stream): number {
  const { received, sent } = only(proxy.stats());
  return received[stream] - sent[stream];
}

/**
 * Tests, on both kinds of sockets, of a connection through the toxics with
 * which a test's name begins.
 */
export function testsOf<E extends AsyncDisposable>(
  open: (...how: How) => Promise<E>,
) {
  return {
    /** The name is as `latency latency=5, timeout upstream | what happens`. */
    test(name: string, run: (ends: E) => Promise<unknown>): void {
      const [toxics = ""] = name.split(" | ");
      const route = having(...toxics.split(", "));
      for (const { sockets, resettable } of SOCKETS) {
        Deno.test(`${name}, on ${sockets}`, async () => {
          await using ends = await open(route, { resettable });
          await run(ends);
        });
      }
    },
  };
}
