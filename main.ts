/**
 * A TCP chaos proxy: it forwards connections by the local port on which they
 * arrive, and injects faults on the way, so that you can see how your software
 * behaves when the network fails.
 *
 * On the command line:
 *
 * ```sh
 * deno run --allow-net --allow-read main.ts config.yaml
 * ```
 *
 * In a test:
 *
 * ```ts ignore
 * import { ChaosProxy } from "./main.ts";
 *
 * await using proxy = await ChaosProxy.start({
 *   seed: 42,
 *   routes: [{ localPort: 0, upstream: "localhost:5432", dropRate: 0.1 }],
 * });
 * const port = proxy.routes[0].localPort;
 * ```
 *
 * @module
 */

import { parse as parseYaml } from "@std/yaml";
import { parseArgs } from "@std/cli/parse-args";
import { BaseHandler, Logger, type LogRecord } from "@std/log";
import net from "node:net";
import { setImmediate } from "node:timers";
import deno from "./deno.json" with { type: "json" };

// ---- Config: what may be written, and what it then means -------------------

/** A route as one writes it: what is left out takes its default. */
export interface RouteOptions {
  /** The port to listen on, 0 to 65535; 0 takes a free one. */
  localPort: number;
  /** Where to forward to: `host:port` or `[ipv6]:port`. */
  upstream: string;
  /**
   * What the route is called, in logs and as part of each random decision:
   * 1 to 64 characters without white space, unique. Default: the local port.
   */
  name?: string;
  /** The address to listen on. Default: 127.0.0.1. */
  host?: string;
  /**
   * The probability, 0 to 1, that a connection is closed as soon as it is
   * accepted; the upstream is not dialled. Default: 0.
   */
  dropRate?: number;
  /**
   * The probability, 0 to 1, that a connection which is not dropped is never
   * answered: what it sends is read and discarded, and the upstream is not
   * dialled. Default: 0.
   */
  timeoutRate?: number;
  /**
   * How long a connection that is never answered stays open, in milliseconds,
   * 0 to 2147483647; with 0, the default, until the client ends it.
   */
  timeoutMs?: number;
  /**
   * The delay before the upstream is dialled, in milliseconds, 0 to
   * 2147483647. Default: 0.
   */
  latencyMs?: number;
  /**
   * How far the delay may lie from `latencyMs`, either way, uniformly, in
   * milliseconds, 0 to 2147483647; the delay is never below 0. Default: 0.
   */
  jitterMs?: number;
  /**
   * How long dialling the upstream may take, in milliseconds, 1 to 2147483647.
   * Default: 10000.
   */
  connectTimeoutMs?: number;
  /** Faults on the bytes, in the order in which they act. Default: none. */
  toxics?: ToxicOptions[];
}

/** A route with every default filled in. */
export interface Route extends Required<Omit<RouteOptions, "toxics">> {
  /** Faults on the bytes, in the order in which they act. */
  toxics: Toxic[];
}

/** A configuration as one writes it: what is left out takes its default. */
export interface ConfigOptions {
  /**
   * What all random decisions derive from, an integer from 0 to 2^53 - 1.
   * Default: a random one, which is reported.
   */
  seed?: number;
  /**
   * How long connections in flight may take to end at shutdown, in
   * milliseconds, 0 to 2147483647; with 0, for ever. Default: 30000.
   */
  drainTimeoutMs?: number;
  /** The routes, at least one. */
  routes: RouteOptions[];
}

/** A configuration with every default but the seed's filled in. */
export interface Config {
  /** What all random decisions derive from; absent, a random seed is taken. */
  seed?: number;
  /** How long connections in flight may take to end, in ms; 0: for ever. */
  drainTimeoutMs: number;
  /** The routes, with unique names and ports. */
  routes: Route[];
}

/** What is wrong with a configuration: all of it, not just the first. */
export class ConfigError extends Error {
  /** `ConfigError` */
  override name = "ConfigError";
  /** A sentence each, with the path to the value, such as `routes[0].name`. */
  readonly problems: readonly string[];

  /** Sums up the problems found in what `source`, usually a file, holds. */
  constructor(source: string, problems: readonly string[]) {
    const [first, ...rest] = problems;
    const shown = problems.slice(0, MAX_PROBLEMS_SHOWN);
    if (shown.length < problems.length) {
      shown.push(`… and ${problems.length - shown.length} more`);
    }
    super(
      rest.length === 0
        ? `${source}: ${first}`
        : [`${source}: ${problems.length} problems`, ...shown].join("\n  "),
    );
    this.problems = problems;
  }
}

const MAX_CONFIG_BYTES = 1024 * 1024;
const MAX_PROBLEMS_SHOWN = 50;
const MAX_MS = 2 ** 31 - 1; // what a timer can take

/** A type guard, and how to tell people what it wants. */
interface Guard<T> {
  readonly expected: string;
  is(value: unknown): value is T;
}

function integer(min: number, max: number): Guard<number> {
  return {
    expected: `an integer from ${min} to ${max}`,
    is: (value): value is number =>
      Number.isSafeInteger(value) && Number(value) >= min &&
      Number(value) <= max,
  };
}

const milliseconds = integer(0, MAX_MS);
const rate: Guard<number> = {
  expected: "a number from 0 to 1",
  is: (value): value is number =>
    typeof value === "number" && value >= 0 && value <= 1,
};
const routeName: Guard<string> = {
  expected: "1 to 64 characters without white space",
  is: (value): value is string =>
    typeof value === "string" && /^[^\s\p{C}]{1,64}$/u.test(value),
};
const listenHost: Guard<string> = {
  expected: "a host name or an IP address",
  is: (value): value is string =>
    typeof value === "string" && !value.startsWith("[") &&
    (isHost(value) || isHost(`[${value}]`)),
};
const upstreamAddress: Guard<string> = {
  expected: "host:port or [ipv6]:port, the port from 1 to 65535",
  is: (value): value is string =>
    typeof value === "string" && splitAddress(value) !== undefined,
};
const toxicList: Guard<unknown[]> = {
  expected: "a list of toxics",
  is: (value): value is unknown[] => Array.isArray(value),
};
const routeList: Guard<unknown[]> = {
  expected: "a list of routes, at least one",
  is: (value): value is unknown[] => Array.isArray(value) && value.length > 0,
};

/** Whether a host is fit for a URL: a name, an IPv4 or a bracketed IPv6 one. */
function isHost(host: string): boolean {
  return /^(?:\w+(?:[.-]+\w+)*\.?|\[[\da-f:.]+\])$/i.test(host) &&
    !host.includes("..") && URL.canParse(`http://${host}`);
}

/** Where to listen, or to connect to. */
interface Address {
  readonly hostname: string;
  readonly port: number;
}

/** Splits `host:port`; the brackets of an IPv6 address are taken off. */
function splitAddress(address: string): Address | undefined {
  const [, host, digits] = /^(.+):(\d{1,5})$/.exec(address) ?? [];
  const port = Number(digits);
  if (host === undefined || !isHost(host)) return undefined;
  if (port < 1 || port > 65535) return undefined;
  return { hostname: host.replace(/^\[(.*)\]$/, "$1"), port };
}

/** Joins what `splitAddress` splits. */
function addressOf({ hostname, port }: Address): string {
  return hostname.includes(":")
    ? `[${hostname}]:${port}`
    : `${hostname}:${port}`;
}

/** How to check a field, and what it is when left out. */
interface Field<T> {
  readonly guard: Guard<T>;
  readonly default?: T;
  readonly optional?: true;
}

type Fields<T> = { readonly [K in keyof T]-?: Field<NonNullable<T[K]>> };

const ROUTE_FIELDS: Fields<Omit<Route, "toxics"> & { toxics: unknown[] }> = {
  name: { guard: routeName, optional: true },
  localPort: { guard: integer(0, 65535) },
  host: { guard: listenHost, default: "127.0.0.1" },
  upstream: { guard: upstreamAddress },
  dropRate: { guard: rate, default: 0 },
  timeoutRate: { guard: rate, default: 0 },
  timeoutMs: { guard: milliseconds, default: 0 },
  latencyMs: { guard: milliseconds, default: 0 },
  jitterMs: { guard: milliseconds, default: 0 },
  connectTimeoutMs: { guard: integer(1, MAX_MS), default: 10_000 },
  toxics: { guard: toxicList, default: [] },
};

const CONFIG_FIELDS: Fields<Omit<Config, "routes"> & { routes: unknown[] }> = {
  seed: { guard: integer(0, Number.MAX_SAFE_INTEGER), optional: true },
  drainTimeoutMs: { guard: milliseconds, default: 30_000 },
  routes: { guard: routeList },
};

/**
 * Reads a configuration: JSON if the path ends in `.json`, YAML otherwise.
 *
 * @param text What the file holds, at most 1 MiB; a byte order mark is skipped.
 * @param path Where it comes from, for messages and to tell JSON from YAML.
 * @throws {ConfigError} If it cannot be read as JSON or YAML, or is no valid
 * configuration; the error holds every problem, each with where it is and what
 * was expected.
 */
export function parseConfig(text: string, path = "config.yaml"): Config {
  if (text.length > MAX_CONFIG_BYTES) {
    throw new ConfigError(path, ["expected at most 1 MiB of text, found more"]);
  }
  const body = text.replace(/^\uFEFF/, "");
  if (body.trim() === "") {
    throw new ConfigError(path, ["the file is empty; expected routes"]);
  }
  return checkConfig(
    /\.json$/i.test(path) ? readJson(body, path) : readYaml(body, path),
    path,
  );
}

function readYaml(text: string, path: string): unknown {
  try {
    return parseYaml(text);
  } catch (error) {
    const message = error instanceof RangeError // the parser's stack overflowed
      ? "nested too deeply"
      : (error as Error).message;
    const [, reason, line, column] =
      /^(.*?) at line (\d+), column (-?\d+)/s.exec(message) ??
        ["", message.split("\n", 1)[0]];
    const place = line === undefined
      ? ""
      : `line ${line}, column ${Math.max(1, Number(column))}: `;
    throw new ConfigError(path, [`${place}invalid YAML: ${reason}`]);
  }
}

function readJson(text: string, path: string): unknown {
  const found = findJsonProblem(text);
  if (found === undefined) return JSON.parse(text);
  const before = text.slice(0, found.offset).split(/\r\n|\r|\n/);
  const column = before[before.length - 1].length + 1;
  throw new ConfigError(path, [
    `line ${before.length}, column ${column}: invalid JSON: ${found.problem}`,
  ]);
}

interface JsonProblem {
  offset: number;
  problem: string;
}

const JSON_SPACE = /[ \t\r\n]*/y;
const JSON_STRING =
  /"[ !#-[\]-\uffff]*(?:\\(?:["\\/bfnrt]|u[\da-fA-F]{4})[ !#-[\]-\uffff]*)*"/y;
const JSON_OTHER_SCALAR =
  /(?:-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?|true|false|null)(?![\w.])/y;
const MAX_JSON_DEPTH = 100;

/**
 * Where a text stops being JSON, or an object repeats a key. `JSON.parse` lets
 * the latter pass, and tells the place of some errors only.
 */
function findJsonProblem(text: string): JsonProblem | undefined {
  let offset = 0;

  function take(token: RegExp): string | undefined {
    JSON_SPACE.lastIndex = offset;
    JSON_SPACE.test(text);
    offset = JSON_SPACE.lastIndex;
    token.lastIndex = offset;
    const taken = token.exec(text)?.[0];
    offset += taken?.length ?? 0;
    return taken;
  }

  function missing(expected: string): JsonProblem {
    const next = text.codePointAt(offset);
    const found = next === undefined
      ? "the end"
      : JSON.stringify(String.fromCodePoint(next));
    return { offset, problem: `expected ${expected}, found ${found}` };
  }

  function value(depth: number): JsonProblem | undefined {
    if (take(/\{/y)) {
      const keys = new Set<string>();
      return items("}", depth, () => member(keys, depth));
    }
    if (take(/\[/y)) return items("]", depth, () => value(depth + 1));
    if (take(JSON_STRING) ?? take(JSON_OTHER_SCALAR)) return undefined;
    return missing(
      text[offset] === '"'
        ? "a string with its closing quote, and escapes that JSON has"
        : "a value",
    );
  }

  function items(
    end: "}" | "]",
    depth: number,
    item: () => JsonProblem | undefined,
  ): JsonProblem | undefined {
    if (depth === MAX_JSON_DEPTH) {
      return { offset, problem: `nested deeper than ${depth} levels` };
    }
    const ending = end === "}" ? /\}/y : /\]/y;
    if (take(ending)) return undefined;
    do {
      const problem = item();
      if (problem) return problem;
    } while (take(/,/y));
    return take(ending) ? undefined : missing(`"," or "${end}"`);
  }

  function member(keys: Set<string>, depth: number): JsonProblem | undefined {
    const key = take(JSON_STRING);
    if (key === undefined) return missing("a key in double quotes");
    const name: string = JSON.parse(key);
    if (keys.has(name)) {
      return { offset: offset - key.length, problem: `${key} is repeated` };
    }
    keys.add(name);
    return take(/:/y) ? value(depth + 1) : missing('":"');
  }

  const problem = value(0);
  if (problem) return problem;
  take(/$/y);
  return offset === text.length ? undefined : missing("the end");
}

/**
 * Checks a configuration that has been read, or was written in a program.
 *
 * @throws {ConfigError} If it is not valid.
 */
function checkConfig(value: unknown, source: string): Config {
  const problems: string[] = [];
  const config = checkFields(value, "", CONFIG_FIELDS, problems);
  const routes = Array.from(config.routes ?? [], (each, index) => {
    const path = `routes[${index}]`;
    const route = checkFields(each, path, ROUTE_FIELDS, problems);
    if (route.localPort !== undefined) route.name ??= String(route.localPort);
    const toxics = checkToxics(route.toxics ?? [], `${path}.toxics`, problems);
    return { ...route, toxics };
  });
  checkUnique(routes, problems);
  if (problems.length > 0) throw new ConfigError(source, problems);
  return { ...config, routes } as Config; // nothing is missing: no problem
}

/** Checks an object's fields; what is good is returned, defaults filled in. */
function checkFields<T>(
  value: unknown,
  path: string,
  fields: Fields<T>,
  problems: string[],
): Partial<T> {
  const known = Object.keys(fields) as (keyof T & string)[];
  if (!isRecord(value)) {
    problems.push(
      `${path && `${path}: `}expected a mapping with ${
        known.filter((key) => isRequired(fields[key])).join(" and ")
      }, found ${describe(value)}`,
    );
    return {};
  }
  const at = (key: string) => {
    const step = /^[\w-]{1,64}$/.test(key) ? key : describe(key);
    return path ? `${path}.${step}` : step;
  };
  for (const key of Object.keys(value)) {
    if (Object.hasOwn(fields, key)) continue;
    const meant = nearest(key, known);
    problems.push(
      `${at(key)}: unknown key; ` +
        (meant ? `did you mean ${meant}?` : `known are ${known.join(", ")}`),
    );
  }
  const good: Partial<T> = {};
  for (const key of known) {
    const { guard, default: fallback } = fields[key];
    const found = Object.hasOwn(value, key) ? value[key] : undefined;
    if (found === undefined) {
      if (isRequired(fields[key])) {
        problems.push(`${at(key)}: missing; expected ${guard.expected}`);
      } else if (fallback !== undefined) good[key] = fallback;
    } else if (guard.is(found)) {
      good[key] = found;
    } else {
      const unquoted = typeof found === "string" &&
        /^\s*[\d.]+\s*$/.test(found) &&
        guard.is(Number(found));
      problems.push(
        `${at(key)}: expected ${guard.expected}, found ${describe(found)}` +
          (unquoted ? "; remove the quotes" : ""),
      );
    }
  }
  return good;
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value) &&
    !(value instanceof Date);
}

function isRequired(field: Field<unknown>): boolean {
  return field.default === undefined && !field.optional;
}

/** Ports are unique, and so are names, also those that default to the port. */
function checkUnique(
  routes: readonly Partial<Route>[],
  problems: string[],
): void {
  const ports = new Map<number, number>();
  const names = new Map<string, number>();
  routes.forEach(({ localPort, name }, index) => {
    const taken = (key: "localPort" | "name", value: unknown, by: number) =>
      problems.push(
        `routes[${index}].${key}: ${value} is already taken by routes[${by}]`,
      );
    const samePort = localPort ? ports.get(localPort) : undefined; // 0: any
    if (samePort !== undefined) taken("localPort", localPort, samePort);
    else if (localPort) ports.set(localPort, index);
    const sameName = name === undefined ? undefined : names.get(name);
    const saidAlready = samePort !== undefined && name === `${localPort}`;
    if (sameName !== undefined && !saidAlready) {
      const hint = name === `${localPort}`
        ? " (a name defaults to the port)"
        : "";
      taken("name", name + hint, sameName);
    }
    if (name !== undefined && !names.has(name)) names.set(name, index);
  });
}

/** What was found, in few words however large it is, or circular. */
function describe(value: unknown): string {
  if (Array.isArray(value)) return "a list";
  if (value instanceof Date) return "a date";
  if (typeof value === "function") return "a function";
  if (typeof value === "object" && value !== null) return "a mapping";
  const text = typeof value === "string"
    ? JSON.stringify(value)
    : String(value);
  return text.length <= 60 ? text : `${text.slice(0, 57)}…${text.at(-1)}`;
}

/** The one of some names that was probably meant, if any is near enough. */
function nearest(
  name: string,
  candidates: readonly string[],
): string | undefined {
  if (name.length > 64) return undefined;
  const ranked = candidates
    .map((each) => ({ each, distance: editDistance(name, each) }))
    .sort((a, b) => a.distance - b.distance);
  const best = ranked[0];
  const near = Math.max(1, Math.floor(name.length / 3));
  return best && best.distance <= near ? best.each : undefined;
}

/** The fewest insertions, deletions and replacements between two words. */
function editDistance(from: string, to: string): number {
  const [a, b] = [from.toLowerCase(), to.toLowerCase()];
  let row = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const above = row;
    row = [i];
    for (let j = 1; j <= b.length; j++) {
      const replaced = above[j - 1] + (a[i - 1] === b[j - 1] ? 0 : 1);
      row[j] = Math.min(replaced, above[j] + 1, row[j - 1] + 1);
    }
  }
  return row[b.length];
}

// ---- Randomness: decisions that follow from the seed ------------------------

/**
 * A stream of uniform numbers in [0, 1) that depends on its key alone.
 *
 * The key is hashed to 128 bits, four times FNV-1a with the finalizer of
 * MurmurHash3, which then seed sfc32 (Doty-Humphrey, PractRand).
 */
function randomStream(...key: (string | number)[]): () => number {
  const text = JSON.stringify(key);
  let [a, b, c, counter] = [1, 2, 3, 4].map((lane) => hash(text, lane));
  const next = () => {
    const result = (a + b + counter) | 0;
    counter = (counter + 1) | 0;
    a = b ^ (b >>> 9);
    b = (c + (c << 3)) | 0;
    c = ((c << 21) | (c >>> 11)) + result | 0;
    return (result >>> 0) / 2 ** 32;
  };
  for (let round = 0; round < 12; round++) next();
  return next;
}

function hash(text: string, lane: number): number {
  let h = 0x811c9dc5 ^ Math.imul(lane, 0x9e3779b1);
  for (let i = 0; i < text.length; i++) {
    h = Math.imul(h ^ text.charCodeAt(i), 0x01000193);
  }
  h = Math.imul(h ^ (h >>> 16), 0x85ebca6b);
  h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
  return h ^ (h >>> 16);
}

// ---- Toxics: faults on the bytes -----------------------------------------------

/** The direction a toxic acts on: client to server, or server to client. */
export type Stream = "upstream" | "downstream";

/** The types of toxic there are. */
export type ToxicType =
  | "latency"
  | "bandwidth"
  | "slow_close"
  | "timeout"
  | "reset_peer"
  | "slicer"
  | "limit_data"
  | "packet_loss"
  | "corrupt"
  | "limit_time";

/**
 * A fault on the bytes of a direction, as in Toxiproxy: its type decides what
 * its attributes are, and what they do.
 */
export interface ToxicOptions {
  /** What it does; see {@linkcode ToxicType}. */
  type: ToxicType;
  /** What it is called, unique on its route. Default: `<type>_<stream>`. */
  name?: string;
  /** The direction it acts on. Default: downstream. */
  stream?: Stream;
  /**
   * The probability, 0 to 1, that it acts on a connection. Default: 1. Where
   * it does not, it has no effect whatever.
   */
  toxicity?: number;
  /** How it acts; what is left out takes its default. */
  attributes?: Record<string, number>;
}

/** A toxic with every default filled in. */
export type Toxic = Required<ToxicOptions>;

/** What passes through a toxic: bytes, or the end, leaving at a time. */
export interface Timed {
  /** When it leaves, on the clock of `performance.now()`. */
  at: number;
  /** The bytes; without them the stream ends here, or the connection is over. */
  what: Uint8Array<ArrayBuffer> | "end" | "close";
}

/** Where a toxic's doings go. */
export interface Outlet {
  /** Passes something on, in order. */
  pass(timed: Timed): void;
  /** Ends the connection at a time, whatever is still on its way. */
  cut(at: number, how: "close" | "reset"): void;
}

/** A toxic at work on one direction of one connection. */
export interface Effect {
  /** The connection has opened. */
  open?(at: number): void;
  /** Something has come. */
  take(timed: Timed): void;
}

/** What there is to know of a type of toxic. */
interface ToxicKind<A> {
  readonly attributes: Fields<A>;
  /** What it does, for people. */
  inWords(attributes: A): string;
  /** Begins to act; `random` is this toxic's own on this direction. */
  begin(attributes: A, out: Outlet, random: () => number): Effect;
}

function kind<A>(definition: ToxicKind<A>): ToxicKind<A> {
  return definition;
}

const share = (fallback: number) => ({ guard: rate, default: fallback });
const whole = { guard: integer(0, Number.MAX_SAFE_INTEGER), default: 0 };
const ms = { guard: milliseconds, default: 0 };

const TOXICS = {
  latency: kind<{ latency: number; jitter: number }>({
    attributes: { latency: ms, jitter: ms },
    inWords: ({ latency, jitter }) =>
      `+${latency}${jitter > 0 ? `±${jitter}` : ""} ms`,
    begin: ({ latency, jitter }, out, random) => ({
      take({ at, what }) {
        const delay = typeof what === "string" || jitter === 0
          ? latency
          : latency + (2 * random() - 1) * jitter;
        out.pass({ at: at + Math.max(0, delay), what });
      },
    }),
  }),

  bandwidth: kind<{ rate: number }>({
    attributes: { rate: whole },
    inWords: ({ rate }) => rate > 0 ? `${rate} KB/s` : "no limit",
    begin({ rate }, out) {
      const piece = Math.max(1, Math.floor(rate * BANDWIDTH_PIECE_MS));
      let free = 0; // when all that was passed on has left
      return {
        take({ at, what }) {
          free = Math.max(free, at);
          if (typeof what === "string" || rate === 0) {
            return out.pass({ at: free, what });
          }
          for (const part of inPieces(what, () => piece)) {
            free += part.length / rate; // KB/s are bytes a millisecond
            out.pass({ at: free, what: part });
          }
        },
      };
    },
  }),

  slow_close: kind<{ delay: number }>({
    attributes: { delay: ms },
    inWords: ({ delay }) => `ends ${delay} ms late`,
    begin: ({ delay }, out) => ({
      take({ at, what }) {
        out.pass({ at: what === "end" ? at + delay : at, what });
      },
    }),
  }),

  timeout: kind<{ timeout: number }>({
    attributes: { timeout: ms },
    inWords: ({ timeout }) =>
      timeout > 0
        ? `nothing gets through, closed after ${timeout} ms`
        : "nothing gets through",
    begin: ({ timeout }, out) => ({
      open(at) {
        if (timeout > 0) out.cut(at + timeout, "close");
      },
      take(timed) {
        // With no end to it, a side that leaves must not leave the other open.
        const { what } = timed;
        if (what === "close" || timeout === 0 && what === "end") {
          out.pass(timed);
        }
      },
    }),
  }),

  reset_peer: kind<{ timeout: number }>({
    attributes: { timeout: ms },
    inWords: ({ timeout }) => `reset ${timeout} ms after the first data`,
    begin({ timeout }, out) {
      let struck = false;
      return {
        take({ at }) {
          if (!struck) out.cut(at + timeout, "reset");
          struck = true;
        },
      };
    },
  }),

  slicer: kind<
    { average_size: number; size_variation: number; delay: number }
  >({
    attributes: {
      average_size: { guard: integer(1, Number.MAX_SAFE_INTEGER) },
      size_variation: whole,
      delay: whole,
    },
    inWords: ({ average_size, size_variation, delay }) =>
      `in pieces of ${average_size}` +
      `${size_variation > 0 ? `±${size_variation}` : ""} B` +
      `${delay > 0 ? `, ${delay} µs apart` : ""}`,
    begin({ average_size, size_variation, delay }, out, random) {
      let free = 0;
      // The cuts lie where the seed says, however the data comes in.
      let left = 0;
      const nextSize = (taken: number) => {
        if (left === 0) {
          const variation = Math.round((2 * random() - 1) * size_variation);
          left = Math.max(1, average_size + variation);
        }
        const size = Math.min(left, taken);
        left -= size;
        return size;
      };
      return {
        take({ at, what }) {
          if (typeof what === "string") {
            return out.pass({ at: Math.max(at, free), what });
          }
          for (const part of inPieces(what, nextSize)) {
            const leaves = Math.max(at, free);
            out.pass({ at: leaves, what: part });
            free = leaves + delay / 1000;
          }
        },
      };
    },
  }),

  limit_data: kind<{ bytes: number }>({
    attributes: { bytes: whole },
    inWords: ({ bytes }) => `closed after ${bytes} B`,
    begin({ bytes }, out) {
      let left = bytes;
      return {
        take({ at, what }) {
          if (left < 0) return;
          if (typeof what === "string") return out.pass({ at, what });
          const part = what.subarray(0, left);
          if (part.length > 0) out.pass({ at, what: part });
          left -= part.length;
          if (left > 0) return;
          left = -1;
          out.pass({ at, what: "close" });
        },
      };
    },
  }),

  packet_loss: kind<{ loss_rate: number; correlation: number }>({
    attributes: { loss_rate: share(0.1), correlation: share(0) },
    inWords: ({ loss_rate, correlation }) =>
      `loses ${percent(loss_rate)} of chunks` +
      (correlation > 0 ? `, correlation ${percent(correlation)}` : ""),
    begin({ loss_rate, correlation }, out, random) {
      let lost = false;
      return {
        take(timed) {
          if (typeof timed.what !== "string") {
            const raised = lost ? correlation * (1 - loss_rate) : 0;
            lost = random() < loss_rate + raised;
            if (lost) return;
          }
          out.pass(timed);
        },
      };
    },
  }),

  corrupt: kind<{ rate: number }>({
    attributes: { rate: share(0.001) },
    inWords: ({ rate }) => `flips a bit in ${percent(rate)} of bytes`,
    begin({ rate }, out, random) {
      // How many bytes are spared is geometric: one draw a flip, not a byte.
      const spared = () =>
        rate === 0 ? Infinity : rate === 1 ? 0 : Math.floor(
          Math.log1p(-random()) / Math.log1p(-rate),
        );
      let next = spared();
      return {
        take(timed) {
          const { what } = timed;
          if (typeof what !== "string") {
            for (; next < what.length; next += 1 + spared()) {
              what[next] ^= 1 << Math.floor(random() * 8);
            }
            next -= what.length;
          }
          out.pass(timed);
        },
      };
    },
  }),

  limit_time: kind<{ time: number }>({
    attributes: { time: ms },
    inWords: ({ time }) => `closed after ${time} ms`,
    begin: ({ time }, out) => ({
      open: (at) => out.cut(at + time, "close"),
      take: (timed) => out.pass(timed),
    }),
  }),
} satisfies Record<ToxicType, unknown>;

/** Begins a toxic of any kind: its attributes have been checked to be its own. */
function begin(toxic: Toxic, out: Outlet, random: () => number): Effect {
  return kindOf(toxic.type).begin(toxic.attributes, out, random);
}

function kindOf(type: ToxicType): ToxicKind<Record<string, number>> {
  return TOXICS[type] as ToxicKind<Record<string, number>>;
}

function percent(share: number): string {
  return `${Number((share * 100).toPrecision(6))}%`;
}

/**
 * Begins a toxic by itself, without a connection or a clock, as a function from
 * what it is given to what it passes on: to test with, or to see what a seed
 * brings.
 *
 * @param options The toxic, as in a configuration.
 * @param seed What its randomness derives from.
 * @param out Where its doings go.
 * @throws {ConfigError} If the toxic is not valid.
 */
export function beginToxic(
  options: ToxicOptions,
  seed: number,
  out: Outlet,
): Effect {
  const problems: string[] = [];
  const [toxic] = checkToxics([options], "toxics", problems);
  if (problems.length > 0) throw new ConfigError("toxic", problems);
  return begin(toxic, out, randomStream(seed, toxic.name));
}

/** A toxic in words: `downstream: +100±20 ms on every connection`. */
function describeToxic(toxic: Toxic): string {
  const { type, stream, toxicity, attributes } = toxic;
  const share = toxicity === 1
    ? "every connection"
    : `${percent(toxicity)} of connections`;
  return `${stream}: ${kindOf(type).inWords(attributes)} on ${share}`;
}

/** Checks a route's toxics. */
function checkToxics(
  values: readonly unknown[],
  path: string,
  problems: string[],
): Toxic[] {
  const owners = new Map<string, number>();
  return Array.from(values, (value, index) => {
    const at = `${path}[${index}]`;
    const toxic = checkFields(value, at, TOXIC_FIELDS, problems);
    const { type, stream } = toxic;
    if (type !== undefined && toxic.attributes !== undefined) {
      const { attributes } = kindOf(type);
      toxic.attributes = checkFields(
        toxic.attributes,
        `${at}.attributes`,
        attributes,
        problems,
      ) as Record<string, number>;
    }
    if (type !== undefined) toxic.name ??= `${type}_${stream}`;
    const { name } = toxic;
    if (name !== undefined && owners.has(name)) {
      problems.push(
        `${at}.name: ${name} is already taken by ${path}[${owners.get(name)}]`,
      );
    } else if (name !== undefined) owners.set(name, index);
    return toxic as Toxic; // whatever is missing is a problem
  });
}

function oneOf<T extends string>(...choices: T[]): Guard<T> {
  return {
    expected: choices.join(" or "),
    is: (value): value is T => choices.some((each) => each === value),
  };
}

const TOXIC_FIELDS: Fields<Toxic> = {
  name: { guard: routeName, optional: true },
  type: { guard: oneOf(...Object.keys(TOXICS) as ToxicType[]) },
  stream: {
    guard: oneOf<Stream>("upstream", "downstream"),
    default: "downstream",
  },
  toxicity: { guard: rate, default: 1 },
  attributes: {
    guard: { expected: "a mapping", is: isRecord } as Guard<
      Record<string, number>
    >,
    default: {},
  },
};

/** A limited flow leaves in pieces of that much time, and so dribbles. */
const BANDWIDTH_PIECE_MS = 10;

/** Cuts bytes up; `size` says how much of what is left comes next. */
function* inPieces(
  bytes: Uint8Array<ArrayBuffer>,
  size: (left: number) => number,
): Generator<Uint8Array<ArrayBuffer>> {
  for (let start = 0; start < bytes.length;) {
    const end = start + size(bytes.length - start);
    yield bytes.subarray(start, end);
    start = end;
  }
}

// ---- Link: one direction of one connection ----------------------------------

/** A toxic that acts on a connection, with its own randomness there. */
interface Acting {
  readonly toxic: Toxic;
  readonly random: () => number;
}

const MAX_HELD_BYTES = 64 * 1024 * 1024;
const HELD_OVERHEAD_BYTES = 1024; // what a held piece costs besides its bytes

/**
 * Carries what one side sends to the other, counts it, and holds back what its
 * toxics have given a later time.
 *
 * `write` waits until there is room, so that a slow reader slows the sender.
 */
class Link {
  /** How many bytes have been taken in. */
  bytes = 0;
  /** What is to be delivered. */
  readonly readable: ReadableStream<Uint8Array>;
  /** The toxic that ends the connection behind what is delivered. */
  closedBy: string | undefined;
  readonly #writer: WritableStreamDefaultWriter<Uint8Array<ArrayBuffer>>;
  readonly #effects: readonly Effect[];
  readonly #stopped = new AbortController();
  readonly #queue = new Queue<Timed>();
  #heldBytes = 0;
  #lastAt = 0;
  #running = false;
  #room: PromiseWithResolvers<void> | undefined;
  #flushed: PromiseWithResolvers<void> | undefined;
  #controller!: TransformStreamDefaultController<Uint8Array>;

  /**
   * @param acting The toxics, in the order in which they act.
   * @param cut Ends the connection at a time, by order of a toxic.
   */
  constructor(
    acting: readonly Acting[] = [],
    cut: (toxic: string, at: number, how: "close" | "reset") => void = () => {},
  ) {
    const { readable, writable } = new TransformStream<
      Uint8Array<ArrayBuffer>,
      Uint8Array
    >({
      start: (controller) => {
        this.#controller = controller;
      },
      transform: (chunk) => this.#take(chunk),
      flush: () => this.#flush(),
    });
    this.readable = readable;
    this.#writer = writable.getWriter();
    this.#effects = this.#chain(acting, cut);
  }

  /** Whether any toxic acts here. */
  get acts(): boolean {
    return this.#effects.length > 0;
  }

  /** The connection has opened: toxics that act by the clock begin to. */
  open(): void {
    const at = performance.now();
    for (const effect of this.#effects) effect.open?.(at);
  }

  write(chunk: Uint8Array<ArrayBuffer>): Promise<void> {
    return this.#writer.write(chunk);
  }

  /** Ends the stream once all that was written has been delivered. */
  end(): void {
    this.#writer.close().catch(expectedOfDelivery);
  }

  /** Ends the stream at once; what has not been delivered is lost. */
  abort(): void {
    this.#stop();
    this.#writer.abort().catch(expectedOfDelivery);
  }

  /** Each toxic passes on to the next one, the last to the queue. */
  #chain(
    acting: readonly Acting[],
    cut: (toxic: string, at: number, how: "close" | "reset") => void,
  ): Effect[] {
    let pass = (timed: Timed) => this.#hold(timed);
    const effects: Effect[] = [];
    for (const { toxic, random } of acting.toReversed()) {
      const outlet: Outlet = {
        pass: (timed) => {
          if (timed.what === "close") this.closedBy ??= toxic.name;
          next(timed);
        },
        cut: (at, how) => cut(toxic.name, at, how),
      };
      const next = pass;
      const effect = begin(toxic, outlet, random);
      effects.unshift(effect);
      pass = (timed) => effect.take(timed);
    }
    return effects;
  }

  #take(chunk: Uint8Array<ArrayBuffer>): Promise<void> | void {
    this.bytes += chunk.length;
    if (this.#effects.length === 0) return this.#controller.enqueue(chunk);
    this.#effects[0].take({ at: performance.now(), what: chunk });
    if (this.#heldBytes <= MAX_HELD_BYTES || this.#stopped.signal.aborted) {
      return;
    }
    this.#room = Promise.withResolvers();
    return this.#room.promise;
  }

  #flush(): Promise<void> | void {
    if (this.#effects.length === 0 || this.#stopped.signal.aborted) return;
    this.#flushed = Promise.withResolvers();
    this.#effects[0].take({ at: performance.now(), what: "end" });
    return this.#flushed.promise;
  }

  /** Puts something on the queue, not before what is there already. */
  #hold(timed: Timed): void {
    if (this.#stopped.signal.aborted) return;
    this.#lastAt = Math.max(this.#lastAt, timed.at);
    this.#queue.push({ at: this.#lastAt, what: timed.what });
    this.#heldBytes += cost(timed);
    if (!this.#running) this.#run();
  }

  /** Lets go of what is held, each when it is due. */
  async #run(): Promise<void> {
    this.#running = true;
    const { signal } = this.#stopped;
    for (;;) {
      const first = this.#queue.peek();
      if (first === undefined || signal.aborted) break;
      if (first.at > performance.now()) await sleepUntil(first.at, signal);
      else this.#release(this.#queue.shift()!);
    }
    this.#running = false;
  }

  #release(timed: Timed): void {
    this.#heldBytes -= cost(timed);
    if (this.#heldBytes <= MAX_HELD_BYTES) this.#room?.resolve();
    if (timed.what === "end") {
      this.#flushed?.resolve();
    } else if (timed.what === "close") {
      this.#stop();
      this.#controller.terminate();
    } else {
      try {
        this.#controller.enqueue(timed.what);
      } catch {
        this.#stop(); // its reader has gone, which is dealt with there
      }
    }
  }

  /** Holds nothing any more; whoever waits for room or for the end goes on. */
  #stop(): void {
    this.#stopped.abort();
    this.#room?.resolve();
    this.#flushed?.resolve();
  }
}

function cost({ what }: Timed): number {
  return HELD_OVERHEAD_BYTES + (typeof what === "string" ? 0 : what.length);
}

/** First in, first out, without moving what is left at each turn. */
class Queue<T> {
  #items: T[] = [];
  #first = 0;

  push(item: T): void {
    this.#items.push(item);
  }

  peek(): T | undefined {
    return this.#items[this.#first];
  }

  shift(): T | undefined {
    const item = this.#items[this.#first++];
    if (this.#first > 64 && 2 * this.#first > this.#items.length) {
      this.#items = this.#items.slice(this.#first);
      this.#first = 0;
    }
    return item;
  }
}

/** Whoever reads the link meets the same failure, and deals with it. */
function expectedOfDelivery(): void {}

/**
 * Waits until `performance.now()` reaches a time, or the signal is aborted.
 *
 * Never too short, and some hundredths of a millisecond too long: a timer alone
 * is up to 1.5 ms late, so the last stretch is spent polling, between which all
 * else goes on.
 */
async function sleepUntil(time: number, signal: AbortSignal): Promise<void> {
  while (!signal.aborted) {
    const left = time - performance.now();
    if (left <= 0) return;
    if (left < TIMER_LATENESS_MS + 1) {
      await new Promise<void>((resolve) => setImmediate(resolve));
    } else {
      await sleep(Math.min(left - TIMER_LATENESS_MS, MAX_MS), signal);
    }
  }
}

const TIMER_LATENESS_MS = 1.5;

/** Waits about that long, or until the signal is aborted. */
function sleep(ms: number, signal: AbortSignal): Promise<void> {
  if (signal.aborted) return Promise.resolve();
  return new Promise((resolve) => {
    const done = () => {
      clearTimeout(timer);
      signal.removeEventListener("abort", done);
      resolve();
    };
    const timer = setTimeout(done, ms);
    signal.addEventListener("abort", done);
  });
}

// ---- Connection: accept, decide, delay, connect, two links, outcome ---------

/** What the seed has in store for a connection. */
export type Fate =
  /** Closed at once. */
  | { kind: "drop" }
  /** Never answered. */
  | { kind: "timeout" }
  /** Forwarded, after a delay in milliseconds, with these toxics acting. */
  | { kind: "forward"; delayMs: number; toxics: Toxic[] };

/**
 * Decides a connection's fate, from these three alone: never from the clock,
 * nor from other connections.
 *
 * @param seed The configuration's seed.
 * @param route The route, of which the name and the faults count.
 * @param connection The connection's number on that route, from 1.
 */
export function decide(seed: number, route: Route, connection: number): Fate {
  const random = randomStream(seed, route.name, connection);
  const [drop, timeout, jitter] = [random(), random(), random()];
  if (drop < route.dropRate) return { kind: "drop" };
  if (timeout < route.timeoutRate) return { kind: "timeout" };
  const delay = route.latencyMs + (2 * jitter - 1) * route.jitterMs;
  const toxics = route.toxics.filter(({ toxicity }) => random() < toxicity);
  return {
    kind: "forward",
    delayMs: Math.max(0, toMicroseconds(delay)),
    toxics,
  };
}

/** Milliseconds without the digits that no clock here resolves. */
function toMicroseconds(ms: number): number {
  return Math.round(ms * 1000) / 1000;
}

/** One end of a connection through the proxy. */
export type Side = "client" | "upstream";

/**
 * Why a connection ended: which side was the first to end its stream (both
 * have ended theirs) or broke off; the upstream could not be reached; an
 * injected fault; or the proxy was stopped.
 */
export type Ending =
  | Side
  | `${Side}_reset`
  | "upstream_failed"
  | "fault"
  | "drain";

/** What happens to a connection, in this order. */
export type ConnectionEvent =
  & {
    /** The route's name. */
    route: string;
    /** The connection's number on that route, from 1. */
    connection: number;
    /** The client's address. */
    client: string;
  }
  & (
    /** Accepted, to be forwarded to the upstream as it stands in the config. */
    | { event: "accepted"; upstream: string }
    /** Fault: closed at once. */
    | { event: "dropped" }
    /** Fault: never answered, and closed after that long; 0: never. */
    | { event: "timed_out"; timeoutMs: number }
    /** Fault: waits that long before the upstream is dialled. */
    | { event: "delayed"; delayMs: number }
    /** The upstream was reached; these toxics act from now on. */
    | {
      event: "connected";
      upstream: string;
      address: string;
      dialMs: number;
      toxics: string[];
    }
    /** The upstream could not be reached. */
    | { event: "upstream_failed"; upstream: string; cause: string }
    /** Ended: each accepted connection is, once. */
    | {
      event: "closed";
      why: Ending;
      /** What broke it, in the system's words, where something did. */
      cause?: string;
      /** The toxic that ended it, if one did. */
      toxic?: string;
      /** Bytes that came from the client. */
      bytesUp: number;
      /** Bytes that came from the upstream. */
      bytesDown: number;
      /** From accepted to closed. */
      durationMs: number;
    }
  );

type ConnectionId = Pick<
  ConnectionEvent,
  "route" | "connection" | "client"
>;

/** What happens, without to which connection. */
type Happening<E = ConnectionEvent> = E extends ConnectionEvent
  ? Omit<E, keyof ConnectionId>
  : never;

const FIRST_READ_BYTES = 4 * 1024;
const MAX_READ_BYTES = 256 * 1024;
const MAX_LINGER_MS = 2000;

/** What a connection needs of a socket. */
interface Socket {
  readonly remoteAddr: Address;
  /** The next bytes, which are the caller's from then on; null at the end. */
  read(): Promise<Uint8Array<ArrayBuffer> | null>;
  /** Resolves when all of them are on their way. */
  write(bytes: Uint8Array): Promise<void>;
  closeWrite(): Promise<void>;
  close(): void;
  /** Closes it with a RST, where the kind of socket can send one. */
  reset?(): void;
}

/** A socket of Deno's: the faster kind. */
class DenoSocket implements Socket {
  readonly #conn: Deno.TcpConn;
  #buffer = new Uint8Array(FIRST_READ_BYTES);

  constructor(conn: Deno.TcpConn) {
    this.#conn = conn;
    try {
      conn.setNoDelay();
    } catch {
      // Some systems refuse it once the peer has left; reading will tell.
    }
  }

  get remoteAddr(): Address {
    return this.#conn.remoteAddr;
  }

  async read(): Promise<Uint8Array<ArrayBuffer> | null> {
    const size = await this.#conn.read(this.#buffer);
    if (size === null) return null;
    const bytes = this.#buffer.slice(0, size);
    if (size === this.#buffer.length && size < MAX_READ_BYTES) {
      this.#buffer = new Uint8Array(2 * size);
    }
    return bytes;
  }

  async write(bytes: Uint8Array): Promise<void> {
    let written = await this.#conn.write(bytes);
    while (written < bytes.length) {
      written += await this.#conn.write(bytes.subarray(written));
    }
  }

  closeWrite(): Promise<void> {
    return this.#conn.closeWrite();
  }

  close(): void {
    this.#conn.close();
  }
}

/** A socket of Node's, for Deno's own cannot send a RST. */
class NodeSocket implements Socket {
  readonly remoteAddr: Address;
  readonly #socket: net.Socket;
  #ended = false;
  #failure: Error | undefined;
  #wake = () => {};

  constructor(socket: net.Socket) {
    this.#socket = socket;
    this.remoteAddr = {
      hostname: socket.remoteAddress ?? "",
      port: socket.remotePort ?? 0,
    };
    socket.setNoDelay();
    socket.on("readable", () => this.#wake());
    socket.on("end", () => {
      this.#ended = true;
      this.#wake();
    });
    socket.on("error", (error) => {
      this.#failure ??= error;
      this.#wake();
    });
    socket.on("close", () => {
      this.#failure ??= new Deno.errors.BadResource("closed");
      this.#wake();
    });
  }

  static async connect(
    { hostname, port }: Address,
    signal: AbortSignal,
  ): Promise<NodeSocket> {
    const socket = net.connect({ host: hostname, port, allowHalfOpen: true });
    const abort = () => socket.destroy(new Error("aborted"));
    signal.addEventListener("abort", abort);
    try {
      await new Promise<void>((resolve, reject) => {
        socket.once("connect", resolve);
        socket.once("error", reject);
      });
    } finally {
      signal.removeEventListener("abort", abort);
    }
    return new NodeSocket(socket);
  }

  async read(): Promise<Uint8Array<ArrayBuffer> | null> {
    for (;;) {
      const bytes: Uint8Array<ArrayBuffer> | null = this.#socket.read();
      if (bytes !== null) return bytes;
      if (this.#ended) return null;
      if (this.#failure) throw this.#failure;
      await new Promise<void>((resolve) => this.#wake = resolve);
    }
  }

  write(bytes: Uint8Array): Promise<void> {
    return new Promise((resolve, reject) => {
      this.#socket.write(bytes, (error) => error ? reject(error) : resolve());
    });
  }

  closeWrite(): Promise<void> {
    return new Promise((resolve, reject) => {
      // One that is closed, or is so meanwhile, would never call back.
      const closed = () => reject(new Deno.errors.BadResource("closed"));
      if (this.#socket.destroyed) return closed();
      this.#socket.once("close", closed);
      this.#socket.end((error?: Error | null) =>
        error ? reject(error) : resolve()
      );
    });
  }

  close(): void {
    this.#socket.destroy();
  }

  reset(): void {
    this.#socket.resetAndDestroy();
  }
}

/** What the proxy needs of a listener. */
interface Listener {
  readonly addr: Address;
  accept(): Promise<Socket>;
  close(): void;
}

/** Accepts sockets of Node's. */
class NodeListener implements Listener {
  readonly #server: net.Server;
  readonly #waiting: PromiseWithResolvers<Socket>[] = [];
  readonly #accepted: net.Socket[] = [];

  private constructor(server: net.Server) {
    this.#server = server;
    server.on("connection", (socket) => {
      const waiting = this.#waiting.shift();
      if (waiting) waiting.resolve(new NodeSocket(socket));
      else this.#accepted.push(socket);
    });
    server.on("error", (error) => this.#waiting.shift()?.reject(error));
  }

  static async listen({ hostname, port }: Address): Promise<NodeListener> {
    const server = net.createServer({ allowHalfOpen: true });
    await new Promise<void>((resolve, reject) => {
      server.once("error", reject);
      server.listen(port, hostname, resolve);
    });
    server.removeAllListeners("error");
    return new NodeListener(server);
  }

  get addr(): Address {
    const { address, port } = this.#server.address() as net.AddressInfo;
    return { hostname: address, port };
  }

  accept(): Promise<Socket> {
    const socket = this.#accepted.shift();
    if (socket) return Promise.resolve(new NodeSocket(socket));
    const waiting = Promise.withResolvers<Socket>();
    this.#waiting.push(waiting);
    return waiting.promise;
  }

  close(): void {
    this.#server.close();
    for (const socket of this.#accepted) socket.destroy();
    for (const waiting of this.#waiting) {
      waiting.reject(new Deno.errors.BadResource("Listener has been closed"));
    }
  }
}

/** Listens; where a RST may be asked for, by way of Node's sockets. */
async function listen(route: Route): Promise<Listener> {
  const address = { hostname: route.host, port: route.localPort };
  try {
    if (mayReset(route)) return await NodeListener.listen(address);
    const listener = Deno.listen(address);
    return {
      addr: listener.addr,
      accept: async () => new DenoSocket(await listener.accept()),
      close: () => listener.close(),
    };
  } catch (error) {
    throw new ListenError(`route ${route.name}`, address, error);
  }
}

/** Dials; a connection that may have to be reset by way of Node's sockets. */
async function dial(
  address: Address,
  resettable: boolean,
  signal: AbortSignal,
): Promise<Socket> {
  if (resettable) return await NodeSocket.connect(address, signal);
  return new DenoSocket(await Deno.connect({ ...address, signal }));
}

/** Whether a RST may be asked for on a route. */
function mayReset(route: Route): boolean {
  return route.toxics.some(({ type, toxicity }) =>
    type === "reset_peer" && toxicity > 0
  );
}

/** Why a connection is over before both sides have ended their streams. */
interface Break {
  readonly why: Ending;
  readonly cause?: string;
  readonly toxic?: string;
}

/** A connection, from being accepted to its end. */
class Connection {
  readonly #start = performance.now();
  readonly #aborted = new AbortController();
  readonly #sockets: Partial<Record<Side, Socket>>;
  readonly #links: Partial<Record<Side, Link>> = {};
  #ended = 0;
  #leaving = false;
  #firstToEnd: Side | undefined;
  #broken: Break | undefined;

  constructor(
    client: Socket,
    readonly route: Route,
    readonly fate: Fate,
    readonly randomOf: (toxic: Toxic) => () => number,
    readonly emit: (event: Happening) => void,
  ) {
    this.#sockets = { client };
  }

  /** Lives the connection's life, through to its end; never fails. */
  async run(): Promise<void> {
    this.emit({ event: "accepted", upstream: this.route.upstream });
    switch (this.fate.kind) {
      case "drop":
        this.emit({ event: "dropped" });
        this.end("fault");
        break;
      case "timeout":
        await this.#hold();
        break;
      case "forward":
        await this.#delay(this.fate.delayMs);
        await this.#dial(this.fate.toxics);
        await this.#forward(this.fate.toxics);
    }
    this.#release();
    // Toxics that act by the clock have nothing left to end.
    if (Object.values(this.#links).some((link) => link.acts)) {
      this.#aborted.abort();
    }
    this.emit({
      event: "closed",
      ...(this.#broken ?? { why: this.#firstToEnd ?? "client" }),
      bytesUp: this.#links.client?.bytes ?? 0,
      bytesDown: this.#links.upstream?.bytes ?? 0,
      durationMs: toMicroseconds(performance.now() - this.#start),
    });
  }

  /** Ends it at once, whatever it is about; an earlier reason stands. */
  end(why: Ending): void {
    this.#broken ??= { why };
    this.#release();
  }

  /** Lets go of all that is open, so that whatever is under way ends. */
  #release(): void {
    for (const side of SIDES) {
      this.#letGo(side);
      if (this.#broken) this.#links[side]?.abort();
    }
    if (this.#broken) this.#aborted.abort();
  }

  /**
   * Reads what the client sends, and answers nothing. A client that has ended
   * its stream may still wait for an answer, so that it is held all the same
   * where there is a time to it.
   */
  async #hold(): Promise<void> {
    const { timeoutMs } = this.route;
    this.emit({ event: "timed_out", timeoutMs });
    const read = this.#carry("client", new Link(), new WritableStream());
    if (timeoutMs === 0) return await read;
    await sleepUntil(this.#start + timeoutMs, this.#aborted.signal);
    this.end("fault");
    await read;
  }

  async #delay(delayMs: number): Promise<void> {
    if (delayMs === 0) return;
    this.emit({ event: "delayed", delayMs });
    await sleepUntil(this.#start + delayMs, this.#aborted.signal);
  }

  async #dial(toxics: Toxic[]): Promise<void> {
    if (this.#broken) return;
    const { upstream, connectTimeoutMs } = this.route;
    const start = performance.now();
    let late = false;
    const timer = setTimeout(() => {
      late = true;
      this.#aborted.abort();
    }, connectTimeoutMs);
    try {
      const socket = await dial(
        splitAddress(upstream)!,
        mayReset(this.route),
        this.#aborted.signal,
      );
      if (this.#broken) return socket.close(); // ended in the last moment
      this.#sockets.upstream = socket;
      this.emit({
        event: "connected",
        upstream,
        address: addressOf(socket.remoteAddr),
        dialMs: toMicroseconds(performance.now() - start),
        toxics: toxics.map(({ name }) => name),
      });
    } catch (error) {
      if (this.#broken) return; // ended meanwhile, which aborts the dialling
      const cause = late
        ? `no answer within ${connectTimeoutMs} ms`
        : causeOf(error);
      this.emit({ event: "upstream_failed", upstream, cause });
      this.#broken = { why: "upstream_failed", cause };
    } finally {
      clearTimeout(timer);
    }
  }

  async #forward(toxics: Toxic[]): Promise<void> {
    if (!this.#sockets.client || !this.#sockets.upstream) return;
    const up = this.#linkOf("upstream", toxics);
    const down = this.#linkOf("downstream", toxics);
    const ended = Promise.all([
      this.#carry("client", up, this.#sinkTo("upstream")),
      this.#carry("upstream", down, this.#sinkTo("client")),
    ]);
    up.open();
    down.open();
    await ended;
  }

  #linkOf(stream: Stream, toxics: Toxic[]): Link {
    const acting = toxics
      .filter((toxic) => toxic.stream === stream)
      .map((toxic) => ({ toxic, random: this.randomOf(toxic) }));
    return new Link(acting, (toxic, at, how) => this.#cutAt(toxic, at, how));
  }

  /** Ends it at a time, by order of a toxic. */
  async #cutAt(
    toxic: string,
    at: number,
    how: "close" | "reset",
  ): Promise<void> {
    await sleepUntil(at, this.#aborted.signal);
    if (this.#aborted.signal.aborted) return;
    this.#broken ??= { why: "fault", toxic };
    if (how === "reset") {
      for (const side of SIDES) {
        this.#sockets[side]?.reset?.();
        delete this.#sockets[side];
      }
    }
    this.#release();
  }

  /**
   * Delivers what one side sends until it ends its stream. When that side has
   * broken off, or a toxic ends the connection, all that came before is still
   * delivered, and then the connection is over. When it is the receiver that
   * has broken off, the receiver's own stream ends the connection, as soon as
   * what came of it has been delivered.
   */
  async #carry(
    from: Side,
    link: Link,
    to: WritableStream<Uint8Array>,
  ): Promise<void> {
    this.#links[from] = link;
    const delivery = link.readable.pipeTo(to);
    this.#read(from, link);
    try {
      await delivery;
    } catch {
      return; // the sink has said why, or the connection was ended
    }
    if (link.closedBy) this.#broken ??= { why: "fault", toxic: link.closedBy };
    if (link.closedBy || this.#broken?.why === `${from}_reset`) {
      await this.#leave(from === "client" ? "upstream" : "client");
    }
  }

  /**
   * Ends the connection when a side has got all that it will get. Closing a
   * socket with unread bytes makes the system discard those on their way out,
   * so what the side still sends is read for a while, and comes to nothing.
   */
  async #leave(side: Side): Promise<void> {
    const socket = this.#sockets[side];
    if (!socket) return this.#release();
    if (this.#leaving) return;
    this.#leaving = true;
    this.#letGo(side === "client" ? "upstream" : "client");
    this.#links[side]?.abort();
    const timer = setTimeout(() => this.#release(), MAX_LINGER_MS);
    try {
      while (await socket.read() !== null);
    } catch {
      // The side has broken off itself, or the time is over.
    }
    clearTimeout(timer);
    this.#release();
  }

  #letGo(side: Side): void {
    this.#sockets[side]?.close();
    delete this.#sockets[side];
  }

  /** Reads from a side into its link until its end, or the link's. */
  async #read(from: Side, link: Link): Promise<void> {
    const socket = this.#sockets[from]!;
    try {
      for (;;) {
        const bytes = await socket.read();
        if (bytes === null) break;
        await link.write(bytes);
      }
      this.#firstToEnd ??= from;
    } catch (error) {
      // If it was the link that failed, its reason stands, or is in the link.
      if (!link.closedBy) {
        this.#broken ??= { why: `${from}_reset`, cause: causeOf(error) };
      }
    }
    link.end();
  }

  #sinkTo(side: Side): WritableStream<Uint8Array> {
    const socket = this.#sockets[side]!;
    const orBreak = async (work: () => Promise<void>) => {
      try {
        await work();
      } catch (error) {
        this.#broken ??= { why: `${side}_reset`, cause: causeOf(error) };
        throw error;
      }
    };
    return new WritableStream({
      write: (chunk) => orBreak(() => socket.write(chunk)),
      close: async () => {
        // After the second end both sockets are closed, which ends them too.
        if (++this.#ended < 2) await orBreak(() => socket.closeWrite());
      },
    });
  }
}

const SIDES = ["client", "upstream"] as const;

/** Whether an error says that the peer has left. */
function isDisconnect(error: unknown): boolean {
  return error instanceof Deno.errors.NotConnected ||
    error instanceof Deno.errors.ConnectionReset ||
    error instanceof Deno.errors.ConnectionAborted;
}

/** An error in the system's words, without its number. */
function causeOf(error: unknown): string {
  const { message } = error as Error;
  return message.replace(/ \(os error \d+\)/g, "");
}

// ---- Proxy: listeners and the connections alive -----------------------------

/** What happens to the proxy, and to its connections. */
export type ProxyEvent =
  | ConnectionEvent
  /** A route's listener is open, at the address really taken. */
  | {
    event: "listening";
    route: string;
    address: string;
    upstream: string;
    faults: string;
  }
  /** All listeners are open; the seed repeats this run's decisions. */
  | { event: "started"; routes: number; seed: number }
  /** A connection could not be accepted; the next one will be tried. */
  | { event: "accept_failed"; route: string; cause: string }
  /** No more connections are accepted; so many are still in flight. */
  | { event: "draining"; connections: number }
  /** No connection is left; so many did not end in time, and were cut. */
  | { event: "drained"; cut: number; durationMs: number };

/** An address could not be listened on. */
export class ListenError extends Error {
  /** `ListenError` */
  override name = "ListenError";

  /** Says for what the address was meant, such as `route db`, and why not. */
  constructor(what: string, address: Address, cause: unknown) {
    const why = cause instanceof Deno.errors.AddrInUse
      ? "the port is already in use"
      : cause instanceof Deno.errors.PermissionDenied
      ? "permission denied; ports below 1024 are for privileged users"
      : causeOf(cause);
    super(`${what}: cannot listen on ${addressOf(address)}: ${why}`, { cause });
  }
}

/** How to start a {@linkcode ChaosProxy}. */
export interface StartOptions {
  /** Told of all that happens, as it happens; must not throw. */
  onEvent?: (event: ProxyEvent) => void;
}

const ACCEPT_PAUSE_MS = 100;

/**
 * A running proxy.
 *
 * ```ts ignore
 * await using proxy = await ChaosProxy.start({
 *   routes: [{ localPort: 0, upstream: "localhost:6379", latencyMs: 200 }],
 * });
 * const client = await Deno.connect({ port: proxy.routes[0].localPort });
 * ```
 */
export class ChaosProxy implements AsyncDisposable {
  /** What this run's decisions derive from: the configured seed, or a random one. */
  readonly seed: number;
  /** The routes, `localPort` being the port really taken. */
  readonly routes: readonly Route[];
  readonly #drainTimeoutMs: number;
  readonly #emit: (event: ProxyEvent) => void;
  readonly #listeners: readonly Listener[];
  readonly #live = new Map<Connection, Promise<void>>();
  readonly #stopped = new AbortController();
  #cutSoFar = 0;

  private constructor(
    config: Config,
    listeners: readonly Listener[],
    { onEvent }: StartOptions,
  ) {
    this.seed = config.seed ?? crypto.getRandomValues(new Uint32Array(1))[0];
    this.#drainTimeoutMs = config.drainTimeoutMs;
    this.#emit = onEvent ?? (() => {});
    this.#listeners = listeners;
    this.routes = config.routes.map((route, i) => ({
      ...route,
      localPort: listeners[i].addr.port,
    }));
  }

  /**
   * Listens on all routes, and forwards from then on.
   *
   * @param config As in a configuration file; what is left out takes its default.
   * @param options Who is told of what happens.
   * @throws {ConfigError} If the configuration is not valid.
   * @throws {ListenError} If a route cannot be listened on; then none is.
   */
  static async start(
    config: ConfigOptions,
    options: StartOptions = {},
  ): Promise<ChaosProxy> {
    const checked = checkConfig(config, "config");
    const listeners = await listenAll(checked.routes);
    const proxy = new ChaosProxy(checked, listeners, options);
    proxy.#run();
    return proxy;
  }

  /** How many connections are in flight. */
  get connections(): number {
    return this.#live.size;
  }

  /**
   * Stops accepting at once, and waits for the connections in flight to end.
   *
   * @param timeoutMs How long to wait, in milliseconds, 0 to 2147483647, before
   * what is left is cut; 0: for ever. Default: the configured `drainTimeoutMs`.
   * @returns How many connections were cut meanwhile.
   * @throws {RangeError} If `timeoutMs` is out of range.
   */
  async drain(timeoutMs: number = this.#drainTimeoutMs): Promise<number> {
    if (!milliseconds.is(timeoutMs)) {
      throw new RangeError(
        `timeoutMs: expected ${milliseconds.expected}, found ${timeoutMs}`,
      );
    }
    const start = performance.now();
    const cutBefore = this.#cutSoFar;
    this.#stopAccepting();
    this.#emit({ event: "draining", connections: this.#live.size });
    const ended = new AbortController();
    const allEnded = this.#allEnded().then(() => ended.abort());
    if (timeoutMs > 0) await sleep(timeoutMs, ended.signal);
    else await allEnded;
    await this.#cut();
    const cut = this.#cutSoFar - cutBefore;
    this.#emit({
      event: "drained",
      cut,
      durationMs: toMicroseconds(performance.now() - start),
    });
    return cut;
  }

  /** Stops at once: closes the listeners, and cuts the connections in flight. */
  async stop(): Promise<void> {
    this.#stopAccepting();
    await this.#cut();
  }

  /** Stops at once, as {@linkcode ChaosProxy.stop} does. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.stop();
  }

  #run(): void {
    this.routes.forEach((route, i) => {
      this.#emit({
        event: "listening",
        route: route.name,
        address: addressOf(this.#listeners[i].addr),
        upstream: route.upstream,
        faults: describeFaults(route),
      });
      this.#accept(this.#listeners[i], route);
    });
    this.#emit({
      event: "started",
      routes: this.routes.length,
      seed: this.seed,
    });
  }

  async #accept(listener: Listener, route: Route): Promise<void> {
    for (let number = 1;;) {
      let client: Socket;
      try {
        client = await listener.accept();
      } catch (error) {
        if (this.#stopped.signal.aborted) return;
        const cause = causeOf(error);
        this.#emit({ event: "accept_failed", route: route.name, cause });
        // Descriptors that have run out will be given back in a moment. A
        // client that has already left must not make the next one wait.
        if (!isDisconnect(error)) {
          await sleep(ACCEPT_PAUSE_MS, this.#stopped.signal);
        }
        continue;
      }
      if (this.#stopped.signal.aborted) return client.close();
      this.#admit(client, route, number++);
    }
  }

  #admit(client: Socket, route: Route, number: number): void {
    const id = {
      route: route.name,
      connection: number,
      client: addressOf(client.remoteAddr),
    };
    const connection = new Connection(
      client,
      route,
      decide(this.seed, route, number),
      (toxic) => randomStream(this.seed, route.name, number, toxic.name),
      ({ event, ...fields }) =>
        this.#emit({ event, ...id, ...fields } as ConnectionEvent),
    );
    // It is alive before it tells anyone, who may stop the proxy on hearing it.
    const life = Promise.resolve().then(() => connection.run()).then(() => {
      this.#live.delete(connection);
    });
    this.#live.set(connection, life);
  }

  #stopAccepting(): void {
    if (this.#stopped.signal.aborted) return;
    this.#stopped.abort();
    for (const listener of this.#listeners) listener.close();
  }

  async #allEnded(): Promise<void> {
    await Promise.all(this.#live.values());
  }

  async #cut(): Promise<void> {
    this.#cutSoFar += this.#live.size;
    for (const connection of this.#live.keys()) connection.end("drain");
    await this.#allEnded();
  }
}

/** Listens on all routes or, if one fails, on none. */
async function listenAll(routes: readonly Route[]): Promise<Listener[]> {
  const listeners: Listener[] = [];
  try {
    for (const route of routes) listeners.push(await listen(route));
    return listeners;
  } catch (error) {
    for (const listener of listeners) listener.close();
    throw error;
  }
}

/** A route's faults in words. */
function describeFaults(route: Route): string {
  const { dropRate, timeoutRate, timeoutMs, latencyMs, jitterMs } = route;
  const faults: string[] = [];
  if (dropRate > 0) faults.push(`drop ${percent(dropRate)}`);
  if (timeoutRate > 0) {
    const length = timeoutMs > 0
      ? `for ${timeoutMs} ms`
      : "until the client leaves";
    faults.push(`time out ${percent(timeoutRate)} ${length}`);
  }
  if (latencyMs > 0 || jitterMs > 0) {
    const spread = jitterMs > 0 ? `±${jitterMs}` : "";
    faults.push(`latency ${latencyMs}${spread} ms`);
  }
  faults.push(...route.toxics.map(describeToxic));
  return faults.join(", ") || "no faults";
}

// ---- Logging: an event, a line ----------------------------------------------

const LOG_LEVELS = ["debug", "info", "warn", "error"] as const;
type LogLevel = typeof LOG_LEVELS[number];
const LOG_FORMATS = ["text", "json"] as const;
type LogFormat = typeof LOG_FORMATS[number];

const LEVEL_OF: Record<ProxyEvent["event"], LogLevel> = {
  listening: "info",
  started: "info",
  accepted: "info",
  dropped: "info",
  timed_out: "info",
  delayed: "info",
  connected: "info",
  upstream_failed: "warn",
  closed: "info",
  accept_failed: "warn",
  draining: "info",
  drained: "info",
};

/** Writes lines to standard output. */
class LineHandler extends BaseHandler {
  #failed = false;

  override log(line: string): void {
    try {
      console.log(line);
    } catch (error) {
      // A full disk under the log must not end what it is about.
      if (!this.#failed) {
        console.error(`chaos-proxy: no log: ${causeOf(error)}`);
      }
      this.#failed = true;
    }
  }
}

/** Makes what writes events of a level and above, a line each. */
function eventLogger(
  level: LogLevel,
  format: LogFormat,
  routes: readonly Route[],
): (event: ProxyEvent) => void {
  const width = Math.max(...routes.map((route) => route.name.length));
  const handler = new LineHandler("DEBUG", {
    formatter: format === "json"
      ? jsonLine
      : (record) => textLine(record, width),
  });
  const logger = new Logger("chaos-proxy", upper(level), {
    handlers: [handler],
  });
  return (event) => logger[levelOf(event)](event.event, event);
}

function levelOf(event: ProxyEvent): LogLevel {
  return event.event === "drained" && event.cut > 0
    ? "warn"
    : LEVEL_OF[event.event];
}

function upper(level: LogLevel): Uppercase<LogLevel> {
  return level.toUpperCase() as Uppercase<LogLevel>;
}

function jsonLine({ datetime, levelName, args }: LogRecord): string {
  const time = datetime.toISOString();
  return JSON.stringify({
    time,
    level: levelName.toLowerCase(),
    ...(args[0] as ProxyEvent),
  });
}

function textLine(record: LogRecord, width: number): string {
  const event = record.args[0] as ProxyEvent;
  const route = "route" in event ? event.route : "";
  const [number, client] = "connection" in event
    ? [`#${event.connection}`, event.client]
    : ["", ""];
  return [
    record.datetime.toISOString(),
    record.levelName.padEnd(5),
    route.padEnd(width),
    number.padEnd(6),
    client.padEnd(21),
    inWords(event),
  ].join(" ");
}

function inWords(event: ProxyEvent): string {
  switch (event.event) {
    case "listening":
      return `listening ${event.address} -> ${event.upstream} (${event.faults})`;
    case "started":
      return `started ${count(event.routes, "route")}, seed ${event.seed}`;
    case "accepted":
      return `accepted -> ${event.upstream}`;
    case "dropped":
      return "dropped";
    case "timed_out":
      return event.timeoutMs > 0
        ? `timed_out for ${event.timeoutMs} ms`
        : "timed_out until the client leaves";
    case "delayed":
      return `delayed ${event.delayMs} ms`;
    case "connected":
      return `connected ${event.upstream} at ${event.address} in ${event.dialMs} ms` +
        (event.toxics.length > 0 ? ` with ${event.toxics.join(", ")}` : "");
    case "upstream_failed":
      return `upstream_failed ${event.upstream}: ${event.cause}`;
    case "closed": {
      const by = event.toxic ?? event.cause;
      return `closed by ${event.why}${by ? ` (${by})` : ""}, ` +
        `${event.bytesUp} B up, ${event.bytesDown} B down, ${event.durationMs} ms`;
    }
    case "accept_failed":
      return `accept_failed ${event.cause}`;
    case "draining":
      return `draining ${count(event.connections, "connection")} in flight`;
    case "drained":
      return event.cut > 0
        ? `drained ${
          count(event.cut, "connection")
        } cut after ${event.durationMs} ms`
        : `drained in ${event.durationMs} ms`;
  }
}

function count(number: number, what: string): string {
  return `${number} ${what}${number === 1 ? "" : "s"}`;
}

// ---- CLI: arguments, load, run, signals, exit codes --------------------------

const DEMO = { hostname: "127.0.0.1", port: 18000 };

const HELP =
  `chaos-proxy ${deno.version}: forwards TCP connections by local port, injecting faults

Usage: chaos-proxy [options] <config>

  <config>             a YAML file, or JSON if its name ends in .json

Options:
  --check              check the config, print its routes and faults, and exit
  --seed <number>      take this seed instead of the config's
  --log-level <level>  debug, info (the default), warn or error
  --log-format <form>  text (the default) or json, a line an event either way
  --demo               serve the upstream of the example config over HTTP on
                       ${addressOf(DEMO)}; without <config>, run the example
  -h, --help           print this help and exit
  -V, --version        print the version and exit

Example:
  chaos-proxy --seed 42 config.yaml

Signals: SIGINT and SIGTERM stop accepting and wait for the connections in
flight, up to the config's drainTimeoutMs; a later second one ends at once.

Exit codes: 0 stopped, all connections ended; 1 failed while running, or
connections had to be cut; 2 a wrong argument or config.
`;

/** The command line is wrong. */
class UsageError extends Error {
  override name = "UsageError";
}

interface CommandLine {
  action: "help" | "version" | "check" | "run";
  config: string;
  demo: boolean;
  seed: number | undefined;
  logLevel: LogLevel;
  logFormat: LogFormat;
}

const FLAGS = ["check", "demo", "help", "version"] as const;
const SETTINGS = ["log-format", "log-level", "seed"] as const;

/** @throws {UsageError} If an argument is unknown, missing or wrong. */
function readCommandLine(args: string[]): CommandLine {
  const operands: string[] = [];
  const given = args.slice(
    0,
    args.includes("--") ? args.indexOf("--") : undefined,
  );
  for (const flag of FLAGS) {
    if (given.some((arg) => arg.startsWith(`--${flag}=`))) {
      throw new UsageError(`--${flag} takes no value`);
    }
  }
  const flags = parseArgs(args, {
    boolean: FLAGS,
    string: SETTINGS,
    alias: { help: "h", version: "V" },
    unknown: (arg) => {
      if (arg !== "-" && arg.startsWith("-")) throw unknownOption(arg);
      operands.push(arg); // as it was written: `_` has `1e3` as a number
      return false;
    },
  });
  operands.push(...flags._.map(String)); // those after `--`
  const action = flags.help
    ? "help"
    : flags.version
    ? "version"
    : flags.check
    ? "check"
    : "run";
  const needsConfig = action === "check" || action === "run";
  if (needsConfig && operands.length === 0 && !flags.demo) {
    throw new UsageError("expected a config file, found no argument");
  }
  if (needsConfig && operands.length > 1) {
    throw new UsageError(
      `expected one config file, found ${operands.length}: ${
        operands.join(", ")
      }`,
    );
  }
  return {
    action,
    config: operands[0] ?? EXAMPLE,
    demo: flags.demo,
    seed: readSeed(flags.seed),
    logLevel: readChoice("log-level", flags["log-level"], LOG_LEVELS) ?? "info",
    logFormat: readChoice("log-format", flags["log-format"], LOG_FORMATS) ??
      "text",
  };
}

function unknownOption(arg: string): UsageError {
  const name = arg.replace(/=.*/s, "");
  const known = [...FLAGS, ...SETTINGS].map((each) => `--${each}`);
  if (known.includes(name)) {
    return new UsageError(`${name} needs a value`);
  }
  const meant = nearest(name, known);
  return new UsageError(
    `unknown option ${name}` + (meant ? `; did you mean ${meant}?` : ""),
  );
}

function readSeed(text: string | undefined): number | undefined {
  if (text === undefined) return undefined;
  const { guard } = CONFIG_FIELDS.seed;
  const seed = /^\d+$/.test(text) ? Number(text) : undefined;
  if (guard.is(seed)) return seed;
  throw new UsageError(
    `--seed: expected ${guard.expected}, found ${describe(text)}`,
  );
}

function readChoice<T extends string>(
  option: string,
  text: string | undefined,
  choices: readonly T[],
): T | undefined {
  const choice = choices.find((each) => each === text);
  if (text === undefined || choice !== undefined) return choice;
  throw new UsageError(
    `--${option}: expected ${choices.join(" or ")}, found ${describe(text)}`,
  );
}

/** Beside this file; a compiled binary has it inside. */
const EXAMPLE = `${import.meta.dirname ?? "."}/config.example.yaml`;

/** @throws {ConfigError} If the file cannot be read, or holds no good config. */
async function loadConfig(path: string): Promise<Config> {
  let bytes: Uint8Array;
  try {
    bytes = await readAtMost(path, MAX_CONFIG_BYTES + 1);
  } catch (error) {
    throw new ConfigError(path, [whyUnreadable(error)]);
  }
  if (bytes.length > MAX_CONFIG_BYTES) {
    throw new ConfigError(path, ["expected at most 1 MiB of text, found more"]);
  }
  let text: string;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    throw new ConfigError(path, ["expected text in UTF-8, found other bytes"]);
  }
  return parseConfig(text, path);
}

/** Reads no more than that, of whatever the path names: it may have no end. */
async function readAtMost(path: string, limit: number): Promise<Uint8Array> {
  if ((await Deno.stat(path)).isDirectory) throw new Deno.errors.IsADirectory();
  using file = await Deno.open(path);
  const bytes = new Uint8Array(limit);
  let length = 0;
  while (length < limit) {
    const size = await file.read(bytes.subarray(length));
    if (size === null) break;
    length += size;
  }
  return bytes.subarray(0, length);
}

function whyUnreadable(error: unknown): string {
  if (error instanceof Deno.errors.NotFound) return "there is no such file";
  if (error instanceof Deno.errors.IsADirectory) {
    return "expected a YAML or JSON file, found a directory";
  }
  if (error instanceof Deno.errors.PermissionDenied) {
    return "there is no permission to read the file";
  }
  return causeOf(error);
}

/** A table of the routes and what is injected on them. */
function summarize(config: Config, path: string): string {
  const rows = [
    ["ROUTE", "LISTEN", "UPSTREAM", "FAULTS"],
    ...config.routes.map((route) => [
      route.name,
      addressOf({ hostname: route.host, port: route.localPort }),
      route.upstream,
      describeFaults(route),
    ]),
  ];
  const widths = rows[0].map((_, column) =>
    Math.max(...rows.map((row) => row[column].length))
  );
  const table = rows.map((row) =>
    row.map((cell, column) => cell.padEnd(widths[column])).join("  ").trimEnd()
  );
  const seed = config.seed === undefined
    ? "a random seed"
    : `seed ${config.seed}`;
  const drain = config.drainTimeoutMs > 0
    ? `drain within ${config.drainTimeoutMs} ms`
    : "drain without a limit";
  const routes = count(config.routes.length, "route");
  return [`${path}: ${routes}, ${seed}, ${drain}`, ...table].join("\n");
}

/**
 * Serves what the example config forwards to, until the signal is aborted.
 *
 * @throws {ListenError} If its port cannot be listened on.
 */
function serveDemo(signal: AbortSignal): void {
  try {
    Deno.serve({ ...DEMO, signal, onListen: () => {} }, async (request) => {
      if (request.body === null) {
        return new Response("Hello from behind the proxy!\n");
      }
      try {
        return new Response(await request.arrayBuffer());
      } catch {
        return new Response(null, { status: 400 }); // its client has left
      }
    });
  } catch (error) {
    throw new ListenError("demo upstream", DEMO, error);
  }
}

/** Runs until a signal ends it; resolves to the exit code. */
async function run(config: Config, line: CommandLine): Promise<number> {
  const stop = signal();
  const onEvent = eventLogger(line.logLevel, line.logFormat, config.routes);
  const isDemo = ({ upstream }: Route) => upstream === addressOf(DEMO);
  const demo = new AbortController();
  if (line.demo && config.routes.some(isDemo)) serveDemo(demo.signal);
  try {
    await using proxy = await ChaosProxy.start(config, { onEvent });
    await stop;
    signal(performance.now() + SAME_SIGNAL_MS).then(() => {
      console.error("chaos-proxy: ended at once by a second signal");
      Deno.exit(1);
    });
    return await proxy.drain() > 0 ? 1 : 0;
  } finally {
    demo.abort();
  }
}

const SAME_SIGNAL_MS = 500;
const SIGNALS: readonly Deno.Signal[] = Deno.build.os === "windows"
  ? ["SIGINT", "SIGBREAK"]
  : ["SIGINT", "SIGTERM"];

/**
 * Waits for a signal to stop, from now on or from a time on: a terminal and the
 * task runner may both pass on the same Ctrl-C.
 */
function signal(from = 0): Promise<void> {
  return new Promise((resolve) => {
    const listener = () => {
      if (performance.now() >= from) resolve();
    };
    for (const each of SIGNALS) Deno.addSignalListener(each, listener);
  });
}

/** What the command line asks for; resolves to the exit code. */
async function main(args: string[]): Promise<number> {
  try {
    const line = readCommandLine(args);
    switch (line.action) {
      case "help":
        console.log(HELP.trimEnd());
        return 0;
      case "version":
        console.log(`chaos-proxy ${deno.version}`);
        return 0;
    }
    const config = await loadConfig(line.config);
    config.seed = line.seed ?? config.seed;
    if (line.action === "run") return await run(config, line);
    console.log(summarize(config, line.config));
    return 0;
  } catch (error) {
    if (error instanceof UsageError) {
      console.error(`chaos-proxy: ${error.message}; see chaos-proxy --help`);
      return 2;
    }
    if (error instanceof ConfigError) {
      console.error(`chaos-proxy: ${error.message}`);
      return 2;
    }
    if (error instanceof ListenError) {
      console.error(`chaos-proxy: ${error.message}`);
      return 1;
    }
    throw error;
  }
}

if (import.meta.main) Deno.exit(await main(Deno.args));
