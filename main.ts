/**
 * A TCP chaos proxy: it forwards connections by the local port on which they
 * arrive, and injects faults on the way. `deno run --allow-net --allow-read
 * main.ts config.yaml` runs it; in a test:
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
import dns from "node:dns/promises";
import { once } from "node:events";
import net from "node:net";
import { unescape } from "node:querystring";
import { setImmediate } from "node:timers/promises";
import { isDeepStrictEqual } from "node:util";
import example from "./config.example.yaml" with { type: "text" };
import deno from "./deno.json" with { type: "json" };

// ---- Validation: guards, fields, addresses, and hints in messages -----------

/** A configuration is not valid. It lists all problems, not just the first. */
export class ConfigError extends Error {
  /** `ConfigError` */
  override name = "ConfigError";
  /** A sentence each, with the path to the value, such as `routes[0].name`. */
  readonly problems: readonly string[];

  /** Sums up the problems of `source`, which is usually a file. */
  constructor(source: string, problems: readonly string[]) {
    const all = [`${problems.length} problems`, ...firstOf(problems)];
    const shown = problems.length === 1 ? problems : all;
    super(`${source}: ${shown.join("\n  ")}`);
    this.problems = problems;
  }
}

/** The first of some sentences, and how many more there are. */
function firstOf(sentences: readonly string[]): string[] {
  const more = sentences.length - MAX_PROBLEMS_SHOWN;
  const first = sentences.slice(0, MAX_PROBLEMS_SHOWN);
  return more > 0 ? [...first, `… and ${more} more`] : first;
}

const MAX_PROBLEMS = 1000;
const MAX_PROBLEMS_SHOWN = 50;
const MAX_MS = 2 ** 31 - 1; // what a timer can take

/** The path of a value that is checked, and the problems found so far. */
class Place {
  constructor(
    readonly path: string,
    readonly problems: string[],
    readonly ignored?: string[], // in Toxiproxy's form only
  ) {}

  at(key: string | number): Place {
    const path = typeof key === "number"
      ? `${this.path}[${key}]`
      : (this.path && `${this.path}.`) +
        (/^[\w-]{1,64}$/.test(key) ? key : describe(key));
    return new Place(path, this.problems, this.ignored);
  }

  refuse(problem: string): void {
    this.problems.push(this.path ? `${this.path}: ${problem}` : problem);
  }

  ignore(how = ""): void {
    this.ignored?.push(how ? `${this.path}: ${how}` : this.path);
  }
}

/** @throws {ConfigError} If the check finds problems. */
function validate<T>(
  source: string,
  check: (place: Place) => T,
  ignored?: string[],
): T {
  const place = new Place("", [], ignored);
  const checked = check(place);
  if (place.problems.length === 0) return checked;
  throw new ConfigError(source, place.problems);
}

/** @throws {RangeError} If an argument is not valid. */
function checkArgument(name: string, value: unknown, guard: Guard<unknown>) {
  if (guard.is(value)) return;
  throw new RangeError(`${name}: ${mismatch(guard, value)}`);
}

/** A type guard, and what it expects, in words. */
interface Guard<T> {
  readonly expected: string;
  is(value: unknown): value is T;
}

function guard<T>(
  expected: string,
  isType: (value: unknown) => value is T,
  isGood: (value: T) => boolean = () => true,
): Guard<T> {
  const is = (value: unknown): value is T => isType(value) && isGood(value);
  return { expected, is };
}

const isText = (value: unknown) => typeof value === "string";
const isNumber = (value: unknown) => typeof value === "number";

const integer = (min: number, max: number) =>
  guard(
    `an integer from ${min} to ${max}`,
    isNumber,
    (value) => Number.isSafeInteger(value) && value >= min && value <= max,
  );
const milliseconds = integer(0, MAX_MS);
const isShare = (value: number) => value >= 0 && value <= 1;
const rate = guard("a number from 0 to 1", isNumber, isShare);
const routeName = guard(
  "1 to 255 characters without white space, not . or ..",
  isText,
  (name) => /^(?!\.{1,2}$)[^\s\p{C}]{1,255}$/u.test(name),
);
const mapping = guard("a mapping", isRecord);
const yesOrNo = guard("true or false", (value) => typeof value === "boolean");

/** How to check a field, and its default. */
interface Field<T> {
  readonly guard: Guard<T>;
  readonly default?: T;
  readonly optional?: true;
  /** Normalizes what Toxiproxy's clients write, before the check. */
  normalize?(value: unknown, place: Place): unknown;
}

type Fields<T> = { readonly [K in keyof T]-?: Field<NonNullable<T[K]>> };

/** An object while its fields are checked and set, one by one. */
type Draft<T> = { -readonly [K in keyof T]?: T[K] };

/**
 * Returns the valid fields, with defaults unless it is a change. In Toxiproxy's
 * form other keys may stand, in any case; what is missing or null is 0 there.
 */
function checkFields<T>(
  value: unknown,
  place: Place,
  fields: Fields<T>,
  isChange = false,
): Draft<T> {
  const known = Object.keys(fields) as (keyof T & string)[];
  if (!isRecord(value)) {
    place.refuse(`expected a mapping, found ${describe(value)}`);
    return {};
  }
  const fold = (key: string) => place.ignored ? key.toLowerCase() : key;
  const names = new Map(known.map((name) => [fold(name), name]));
  const nameOf = (key: string) => names.get(fold(key));
  const written = Map.groupBy(Object.keys(value), nameOf);
  for (const key of written.get(undefined) ?? []) {
    if (place.problems.length >= MAX_PROBLEMS) break;
    if (place.ignored) place.at(key).ignore();
    else place.at(key).refuse(`unknown key${hintForKey(key, known)}`);
  }
  const good: Draft<T> = {};
  for (const name of known) {
    const { guard, optional, normalize, default: fallback } = fields[name];
    const [key, ...others] = written.get(name) ?? [];
    for (const other of others) {
      place.at(other).refuse(`the same key as ${key}; write one`);
    }
    let found = key === undefined ? undefined : value[key];
    if (place.ignored && found === null) found = undefined;
    if (place.ignored && found !== undefined && normalize) {
      found = normalize(found, place.at(name));
    }
    if (found === undefined && !isChange) {
      found = fallback ?? (place.ignored && guard.is(0) ? 0 : undefined);
    }
    if (guard.is(found)) good[name] = found;
    else if (found !== undefined) place.at(name).refuse(mismatch(guard, found));
    else if (!isChange && !optional) {
      place.at(name).refuse(`missing; expected ${guard.expected}`);
    }
  }
  return good;
}

/** Where keys belong, the outermost level first; each section adds its own. */
const LEVELS: (readonly [place: string, fields: object])[] = [];

function hintForKey(key: string, known: readonly string[]): string {
  const meant = nearest(key, known);
  if (meant !== undefined) return `; did you mean ${meant}?`;
  const level = LEVELS.find(([, fields]) => Object.hasOwn(fields, key));
  return level
    ? ` on this level; it belongs ${level[0]}`
    : `; known are ${known.join(", ")}`;
}

/** The message about a value that a guard refuses. */
function mismatch(guard: Guard<unknown>, found: unknown): string {
  const hint = hintFor(guard, found);
  return `expected ${guard.expected}, found ${describe(found)}${hint}`;
}

const EXPONENTS: Record<string, string> = { "%": "e-2", s: "e3" };
const QUOTE_IPV6 = "; put an IPv6 address in quotes";

/** How to mend a value, where it is clear what was meant. */
function hintFor(guard: Guard<unknown>, found: unknown): string {
  if (Array.isArray(found) && /:/.test(describe(found[0]))) return QUOTE_IPV6;
  if (isRecord(found) && guard.is([found])) {
    return '; write a list, of which each item begins with "- "';
  }
  if (typeof found !== "string" || found.length > 1000) return "";
  const [, amount, unit = ""] = /^ *([\d.]+) *(%|ms|s)? *$/.exec(found) ?? [];
  const scaled = Number(`${amount}${EXPONENTS[unit] ?? ""}`);
  const joined = found.trim().replace(/\s+/g, "-");
  const [, server] = /^(?:[\w+.-]+:\/\/)?(?:.*@)?([^/?#]+)/s.exec(found) ?? [];
  const written = [scaled, joined, server].find((each) => guard.is(each));
  if (written !== undefined) return `; write ${written}`;
  const isOdd = /integer/.test(guard.expected) && /^\d+[a-z_:]/i.test(found);
  if (isOdd) return "; write it in plain decimal digits";
  const isUrl = server !== undefined && server !== found;
  if (isUrl && guard.is(`${server}:1`)) return `; write ${server}:port`;
  const meant = nearest(found, guard.expected.split(" or "));
  return guard.is(meant) ? `; did you mean ${meant}?` : "";
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null &&
    !(Symbol.iterator in value) && !(value instanceof Date);
}

/** As in `postgres://user:password@host`, also without the scheme. */
const PASSWORD = /^("(?:[\w+.-]+:\/\/)?[^:@]*:(?!\/\/)).*@/s;

/** A value in few words, also if it is large or circular. */
function describe(value: unknown): string {
  if (Array.isArray(value)) {
    return value.length > 100 ? `a list of ${value.length}` : "a list";
  }
  if (value instanceof Date) return "a date";
  if (typeof value === "object" && value !== null) return "a mapping";
  const text = typeof value === "string"
    ? JSON.stringify(value).replace(PASSWORD, "$1***@")
    : String(value);
  return text.length <= 60 ? text : `${text.slice(0, 57)}…${text.at(-1)}`;
}

/** The candidate that was probably meant, if one is near enough. */
function nearest(name: string, candidates: readonly string[]) {
  if (name.length > 64) return undefined;
  const near = Math.max(1, Math.floor(name.length / 3));
  const far = Map.groupBy(candidates, (each) => editDistance(name, each));
  const least = Math.min(...far.keys());
  return least <= near ? far.get(least)?.[0] : undefined;
}

/** The fewest insertions, deletions and replacements between two words. */
function editDistance(from: string, to: string): number {
  const letters = [...to.toLowerCase()];
  let row = [0, ...letters.keys().map((j) => j + 1)];
  for (const letter of from.toLowerCase()) {
    let left = Infinity;
    row = row.map((up, j) => {
      const cost = letter === letters[j - 1] ? 0 : 1;
      left = Math.min((row[j - 1] ?? Infinity) + cost, up + 1, left + 1);
      return left;
    });
  }
  return row.at(-1) ?? 0;
}

/** Toxiproxy, which is written in Go, takes an empty text as left out. */
const unlessEmpty = (text: unknown) => text === "" ? undefined : text;
const lowerCase = (text: unknown) => isText(text) ? text.toLowerCase() : text;

const LOOPBACK = "127.0.0.1";
const ALL_ADDRESSES = "0.0.0.0";

const inUrl = (host: string) => host.includes(":") ? `[${host}]` : host;

/** Whether it is a host name or an IP address, an IPv6 one without brackets. */
function isHost(host: string): boolean {
  return host.length <= 255 && !host.includes("..") &&
    /^(?:\w+(?:[.-]+\w+)*\.?|[\da-f]*:[\da-f:.]+)$/i.test(host) &&
    URL.canParse(`http://${inUrl(host)}`);
}

type Address = Pick<Deno.NetAddr, "hostname" | "port">;

/** Splits `host:port`; a default `host` also allows `:port` and the port 0. */
function splitAddress(address: string, host?: string): Address | undefined {
  const [, ipv6, other, digits] =
    /^(?:\[(.*:.*)\]|([^:]*)):(\d{1,5})$/.exec(address) ?? [];
  const [hostname = "", port] = [ipv6 ?? (other || host), Number(digits)];
  const lowest = host === undefined ? 1 : 0; // to listen on, 0 is a free port
  const isGood = isHost(hostname) && port >= lowest && port <= 65535;
  return isGood ? { hostname, port } : undefined;
}

/** A host to compare or to listen on; `localhost` is taken as 127.0.0.1. */
function canonicalHost(host: string): string {
  const { hostname } = new URL(`http://${inUrl(host)}`);
  if (/^localhost\.?$/.test(hostname)) return LOOPBACK;
  return hostname.replace(/^\[(.*)\]$/, "$1");
}

/** Whether two canonical hosts overlap: `0.0.0.0` covers IPv4, and `::` all. */
function overlaps(a: string, b: string): boolean {
  const covers = (one: string, other: string) =>
    one === "::" || (one === ALL_ADDRESSES && !other.includes(":"));
  return a === b || covers(a, b) || covers(b, a);
}

/** Whether it is a loopback address, also one of IPv4 written as IPv6. */
function isLoopback(address: string): boolean {
  return /^(?:(?:::ffff:)?127(?:\.\d+){3}|::1)$/i.test(address);
}

/** Whether a connection to one host reaches a listener on the other. */
function reaches(upstreamHost: string, listenHost: string): boolean {
  const [to, at] = [canonicalHost(upstreamHost), canonicalHost(listenHost)];
  const isOwn = (host: string) => overlaps(host, LOOPBACK) || isLoopback(host);
  return overlaps(to, at) && (to === at || (isOwn(to) && isOwn(at)));
}

/** Joins what `splitAddress` splits. */
function addressOf({ hostname, port }: Address): string {
  return `${inUrl(hostname)}:${port}`;
}

// ---- Randomness: numbers that follow from the seed --------------------------

/** Uniform numbers in [0, 1) that depend on the key alone, by sfc32. */
function randomStream(...key: (string | number)[]): () => number {
  const text = JSON.stringify(key);
  let [a, b, c] = [hash(text, 1), hash(text, 2), hash(text, 3)];
  let counter = hash(text, 4);
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

/** FNV-1a with the finalizer of MurmurHash3. */
function hash(text: string, lane: number): number {
  let h = 0x811c9dc5 ^ Math.imul(lane, 0x9e3779b1);
  for (let i = 0; i < text.length; i++) {
    h = Math.imul(h ^ text.charCodeAt(i), 0x01000193);
  }
  h = Math.imul(h ^ (h >>> 16), 0x85ebca6b);
  h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
  return h ^ (h >>> 16);
}

// ---- Toxics: faults on the bytes --------------------------------------------

/** The direction a toxic acts on: client to server, or server to client. */
export type Stream = "upstream" | "downstream";

/** The types of toxic. */
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
  | "limit_time"
  | "noop";

/** A fault on the bytes of one direction, written as in Toxiproxy. */
export interface ToxicOptions {
  /** What it does. */
  type: ToxicType;
  /** What it is called, unique on its route. Default: `<type>_<stream>`. */
  name?: string;
  /** The direction it acts on. Default: downstream. */
  stream?: Stream;
  /** The probability, 0 to 1, that it acts on a connection. Default: 1. */
  toxicity?: number;
  /** The attributes of its type; what is left out takes its default. */
  attributes?: Readonly<Record<string, number>>;
}

/** A toxic with every default filled in, those of its attributes too. */
export type Toxic = Readonly<Required<ToxicOptions>>;

/** Bytes, or a mark behind them, and the time when they are due. */
export interface TimedChunk {
  /** When it leaves, by `performance.now()`; `Infinity`: it is held. */
  at: number;
  /** Bytes, which the receiver then owns; or the end of stream; or a close. */
  what: Uint8Array<ArrayBuffer> | "end" | "close";
}

/** What a toxic can do with the connection. */
export interface ToxicOutput {
  /** Forwards a chunk; chunks leave in the order in which they came here. */
  pass(timed: TimedChunk): void;
  /** Ends the connection at a time; `Infinity`: never. The last call counts. */
  cut(at: number, how: "close" | "reset"): void;
}

/** A toxic at work on one direction of one connection. */
export interface ActiveToxic {
  /** Called when the connection is established, or the toxic is added to it. */
  open(at: number): void;
  /** Processes bytes or a mark. */
  take(timed: TimedChunk): void;
  /** Sets all attributes. What it holds is then processed again. */
  change(attributes: Toxic["attributes"], at: number, lastLeft: number): void;
  /** Called when the toxic is removed, before what it holds is released. */
  end(at: number): void;
}

/** A toxic's output: no chunk is due before the one forwarded before it. */
interface Queue extends ToxicOutput {
  /** When the toxic began to act. */
  opened: number;
  /** When the last chunk is due; after a change, when the last to leave was. */
  last: number;
  /** The bytes forwarded; those held are counted again after a change. */
  passed: number;
}

/** A type of toxic: how it is checked, described and started. */
interface ToxicDefinition<K extends string = string> {
  readonly attributes: Fields<Record<K, number>>;
  /** What it does, in words. */
  inWords(attributes: Readonly<Record<K, number>>): string;
  /** Starts it, again after each change. Returns what processes each chunk. */
  begin(
    attributes: Readonly<Record<K, number>>,
    out: Queue,
    random: () => number,
  ): ActiveToxic["take"];
  /** Called when it is removed, before what it holds is released. */
  end?(at: number, out: Queue): void;
}

/** Infers the names of the attributes from their fields. */
function define<K extends string>(toxic: ToxicDefinition<K>): ToxicDefinition {
  return toxic;
}

const share = (fallback: number) => ({ guard: rate, default: fallback });
const whole = { guard: integer(0, Number.MAX_SAFE_INTEGER), default: 0 };
const ms = { guard: milliseconds, default: 0 };
const kbPerS = { ...whole.guard, expected: "an integer from 0, in KB/s" };
const percent = (share: number) => `${Number((share * 100).toPrecision(6))}%`;
const plusMinus = (by: number) => by > 0 ? `±${by}` : "";

/** All types: a new one takes an entry here and its name in `ToxicType`. */
const TOXICS: Readonly<Record<ToxicType, ToxicDefinition>> = {
  latency: define({
    attributes: { latency: ms, jitter: ms },
    inWords: ({ latency, jitter }) => `+${latency}${plusMinus(jitter)} ms`,
    begin: ({ latency, jitter }, out, random) => ({ at, what }) => {
      const spread = typeof what === "string" ? 0 : jitter;
      const delay = latency + (2 * random() - 1) * spread;
      out.pass({ at: at + Math.max(0, delay), what });
    },
  }),

  bandwidth: define({
    attributes: { rate: { guard: kbPerS } },
    inWords: ({ rate }) => rate > 0 ? `${rate} KB/s` : "holds all data",
    begin: ({ rate }, out) => ({ at, what }) => {
      if (typeof what === "string") return out.pass({ at, what });
      const size = 10 * rate || what.length; // 10 ms each, to flow evenly
      for (let start = 0; start < what.length; start += size) {
        const piece = what.subarray(start, start + size);
        const due = Math.max(at, out.last) + piece.length / rate; // B/ms
        out.pass({ at: due, what: piece });
      }
    },
  }),

  slow_close: define({
    attributes: { delay: ms },
    inWords: ({ delay }) => `ends ${delay} ms late`,
    begin: ({ delay }, out) => ({ at, what }) =>
      out.pass({ at: what === "end" ? at + delay : at, what }),
  }),

  timeout: define({
    attributes: { timeout: ms },
    inWords: ({ timeout }) =>
      "nothing gets through" +
      (timeout > 0 ? `, closed after ${timeout} ms` : ""),
    begin({ timeout }, out) {
      out.cut(out.opened + (timeout || Infinity), "close");
      return ({ at, what }) => {
        if (typeof what !== "string") return;
        // With timeout 0 the end passes, or the other side would stay open.
        const passes = what === "close" || timeout === 0;
        out.pass({ at: passes ? at : Infinity, what });
      };
    },
    // As in Toxiproxy: it closes, because data may have been lost.
    end: (at, out) => out.pass({ at, what: "close" }),
  }),

  reset_peer: define({
    attributes: { timeout: ms },
    inWords: ({ timeout }) => `reset ${timeout} ms after the first data`,
    begin: ({ timeout }, out) => ({ at, what }) => {
      const isFirst = out.last < Infinity; // all is held at Infinity
      if (isFirst) out.cut(at + timeout, "reset");
      out.pass({ at: Infinity, what });
    },
  }),

  slicer: define({
    attributes: {
      average_size: { guard: integer(1, Number.MAX_SAFE_INTEGER) },
      size_variation: whole,
      delay: whole,
    },
    inWords: ({ average_size, size_variation, delay }) =>
      `in pieces of ${average_size}${plusMinus(size_variation)} B` +
      (delay > 0 ? `, ${delay} µs apart` : ""),
    begin({ average_size, size_variation, delay }, out, random) {
      let left = 0; // bytes up to the next cut, also across chunks
      return ({ at, what }) => {
        const due = () => Math.max(at, out.last + delay / 1000);
        if (typeof what === "string") return out.pass({ at: due(), what });
        for (let start = 0; start < what.length;) {
          if (left === 0) {
            const size = average_size + (2 * random() - 1) * size_variation;
            left = Math.max(1, Math.round(size));
          }
          const piece = what.subarray(start, start + left);
          out.pass({ at: due(), what: piece });
          start += piece.length;
          left -= piece.length;
        }
      };
    },
  }),

  limit_data: define({
    attributes: { bytes: whole },
    inWords: ({ bytes }) => `closed after ${bytes} B`,
    begin({ bytes }, out) {
      const isReached = () => out.passed > 0 && out.passed >= bytes;
      if (isReached()) out.pass({ at: out.last, what: "close" });
      return ({ at, what }) => {
        if (isReached()) return; // it has closed
        if (typeof what === "string") return out.pass({ at, what });
        const part = what.subarray(0, bytes - out.passed);
        if (part.length > 0) out.pass({ at, what: part });
        if (out.passed >= bytes) out.pass({ at, what: "close" });
      };
    },
  }),

  packet_loss: define({
    attributes: { loss_rate: share(0.1), correlation: share(0) },
    inWords: ({ loss_rate, correlation }) =>
      `loses ${percent(loss_rate)} of chunks` +
      (correlation > 0 ? `, correlation ${percent(correlation)}` : ""),
    begin({ loss_rate, correlation }, out, random) {
      let lost = false;
      return (timed) => {
        if (typeof timed.what === "string") return out.pass(timed);
        const raised = lost ? correlation * (1 - loss_rate) : 0;
        lost = random() < loss_rate + raised;
        if (!lost) out.pass(timed);
      };
    },
  }),

  corrupt: define({
    attributes: { rate: share(0.001) },
    inWords: ({ rate }) => `flips a bit in ${percent(rate)} of bytes`,
    begin({ rate }, out, random) {
      // The number of bytes between flips is geometric: one draw a flip, not a
      // byte. A rate of 0 makes it Infinity, and a rate of 1 makes it 0.
      const spared = () =>
        Math.floor(Math.log1p(-random()) / Math.log1p(-rate));
      let next = spared();
      return ({ at, what }) => {
        if (typeof what === "string") return out.pass({ at, what });
        for (; next < what.length; next += 1 + spared()) {
          what[next] = (what[next] ?? 0) ^ (1 << Math.floor(random() * 8));
        }
        next -= what.length;
        out.pass({ at, what });
      };
    },
  }),

  limit_time: define({
    attributes: { time: ms },
    inWords: ({ time }) => `closed after ${time} ms`,
    begin({ time }, out) {
      out.cut(out.opened + time, "close");
      return out.pass;
    },
  }),

  noop: define({
    attributes: {},
    inWords: () => "nothing",
    begin: (_, out) => out.pass,
  }),
};

/** Starts a toxic of any type; its attributes have been checked. */
function begin(
  { type, attributes }: Toxic,
  out: ToxicOutput,
  random: () => number,
): ActiveToxic {
  const definition = TOXICS[type];
  const queue: Queue = {
    opened: 0,
    last: -Infinity,
    passed: 0,
    pass({ at, what }) {
      queue.last = Math.max(queue.last, at);
      if (typeof what !== "string") queue.passed += what.length;
      out.pass({ at: queue.last, what });
    },
    cut: (at, how) => out.cut(at, how),
  };
  let take = queue.pass;
  return {
    open(at) {
      queue.opened = at;
      take = definition.begin(attributes, queue, random);
    },
    take: (timed) => take(timed),
    change(attributes, at, lastLeft) {
      // What was due at Infinity is due from now on, as if it had just arrived.
      queue.last = queue.last === Infinity ? at : lastLeft;
      take = definition.begin(attributes, queue, random);
    },
    end: (at) => definition.end?.(at, queue),
  };
}

/** Starts a toxic without a connection. Throws {@linkcode ConfigError}. */
export function beginToxic(
  options: ToxicOptions,
  seed: number,
  out: ToxicOutput,
): ActiveToxic {
  const toxic = validate("toxic", (place) => checkToxic(options, place));
  return begin(toxic, out, randomStream(seed, toxic.name));
}

/** A toxic in words: `downstream: +100±20 ms on every connection`. */
function describeToxic({ type, stream, toxicity, attributes }: Toxic): string {
  const share = toxicity === 1
    ? "every connection"
    : `${percent(toxicity)} of connections`;
  return `${stream}: ${TOXICS[type].inWords(attributes)} on ${share}`;
}

function checkToxics(values: readonly unknown[], place: Place): Toxic[] {
  const owners = new Map<string, string>();
  return Array.from(values, (value, index) => {
    const at = place.at(index);
    const toxic = checkToxic(value, at);
    const { name } = toxic;
    const owner = owners.get(name);
    if (owner) at.at("name").refuse(`${name} is already taken by ${owner}`);
    else if (name !== undefined) owners.set(name, at.path);
    return toxic;
  });
}

function checkToxic(value: unknown, place: Place): Toxic {
  const toxic = checkFields(value, place, TOXIC_FIELDS);
  const { type, stream, attributes } = toxic;
  // What is missing has been reported.
  if (type === undefined || attributes === undefined) return toxic as Toxic;
  const at = place.at("attributes");
  const good = checkFields(attributes, at, TOXICS[type].attributes);
  return { name: `${type}_${stream}`, ...toxic, attributes: good } as Toxic;
}

function oneOf<T extends string>(...choices: T[]): Guard<T> {
  const all = new Set<unknown>(choices);
  return guard(choices.join(" or "), (value): value is T => all.has(value));
}

const TOXIC_FIELDS: Fields<Toxic> = {
  name: { guard: routeName, optional: true, normalize: unlessEmpty },
  type: { guard: oneOf(...Object.keys(TOXICS) as ToxicType[]) },
  stream: {
    guard: oneOf<Stream>("upstream", "downstream"),
    default: "downstream",
    normalize: lowerCase,
  },
  toxicity: {
    guard: rate,
    default: 1,
    normalize(toxicity, place) {
      if (typeof toxicity !== "number" || !(toxicity > 1)) return toxicity;
      place.ignore(`${toxicity} counts as 1`);
      return 1;
    },
  },
  attributes: { guard: mapping as Guard<Record<string, number>>, default: {} },
};

LEVELS.push(["in a toxic", TOXIC_FIELDS]);
for (const { attributes } of Object.values(TOXICS)) {
  LEVELS.push(["in a toxic's attributes", attributes]);
}

// ---- Config: routes, and the files they come from ---------------------------

/**
 * A route as it is written. Rates are probabilities, 0 to 1. Times are in ms, 0
 * to 2147483647. For a dropped or timed-out connection no upstream is dialled.
 */
export interface RouteOptions {
  /** The port to listen on, 0 to 65535; 0 takes a free one. */
  localPort: number;
  /** Where to forward to: `host:port` or `[ipv6]:port`. */
  upstream: string;
  /** Unique, 1 to 255 characters without white space. Default: the port. */
  name?: string;
  /** The address to listen on. Default: 127.0.0.1. */
  host?: string;
  /** Whether it listens. Default: true. */
  enabled?: boolean;
  /** The share of connections that are closed at once. Default: 0. */
  dropRate?: number;
  /** The share of the others that are read but never answered. Default: 0. */
  timeoutRate?: number;
  /** How long these stay open; 0, the default: until the client disconnects. */
  timeoutMs?: number;
  /** The delay before the upstream is dialled. Default: 0. */
  latencyMs?: number;
  /** How much longer or shorter the delay may be, uniformly. Default: 0. */
  jitterMs?: number;
  /** How long dialling the upstream may take, at least 1. Default: 10000. */
  connectTimeoutMs?: number;
  /** The longest silence once half-closed; 0: for ever. Default: 60000. */
  halfCloseTimeoutMs?: number;
  /** Faults on the bytes, in the order in which they act. Default: none. */
  toxics?: readonly ToxicOptions[];
}

/** A route with every default filled in. */
export type Route = Readonly<
  Required<Omit<RouteOptions, "toxics">> & { toxics: readonly Toxic[] }
>;

/** A configuration as it is written: what is left out takes its default. */
export interface ConfigOptions {
  /** All decisions derive from it; 0 to 2^53 - 1. Default: a random one. */
  seed?: number;
  /** The longest drain in ms, 0 to 2147483647; 0: for ever. Default: 30000. */
  drainTimeoutMs?: number;
  /** Where the control API listens, a port or `host:port`. Default: nowhere. */
  api?: number | string;
  /** The routes; a configuration file needs at least one, or an `api`. */
  routes?: readonly RouteOptions[];
}

/** A configuration with every default but the seed's; `api` is `host:port`. */
export type Config =
  & Pick<ConfigOptions, "seed">
  & Required<Pick<ConfigOptions, "drainTimeoutMs">>
  & { api?: string; routes: readonly Route[] };

const MAX_CONFIG_BYTES = 1024 * 1024;
const MAX_TOXICS_IN_ALL = 10_000;
/** Each calls the next one: 2,000 have overflowed the stack. */
const MAX_TOXICS = 500;

const listenHost = guard("a host name or an IP address", isText, isHost);
const address = (expected: string, host?: string) =>
  guard(expected, isText, (text) => splitAddress(text, host) !== undefined);
const upstreamAddress = address(
  "host:port or [ipv6]:port, the port from 1 to 65535",
);
/** Toxiproxy takes an upstream without a port; its connections then fail. */
const lacksPort = (upstream: string) => upstreamAddress.is(`${upstream}:1`);
const proxyUpstream = guard(
  upstreamAddress.expected,
  isText,
  (address) => upstreamAddress.is(address) || lacksPort(address),
);
const listenAddress = address(
  "host:port, [ipv6]:port or :port, the port from 0 to 65535",
  ALL_ADDRESSES,
);
const apiAddress = guard(
  "a port or host:port, the port from 0 to 65535",
  (value): value is number | string => splitApi(value) !== undefined,
);
/** Its items have checks of their own, so that each problem has its path. */
const listOf = (what: string, most: number) =>
  guard(
    `a list of ${what}, ${most} at most`,
    Array.isArray,
    ({ length }) => length <= most,
  );
const routeList = listOf("routes", 1000);

function splitApi(address: unknown): Address | undefined {
  if (typeof address !== "string" && typeof address !== "number") return;
  return splitAddress(String(address).replace(/^\d+$/, ":$&"), LOOPBACK);
}

const ROUTE_FIELDS: Fields<RouteOptions> = {
  name: { guard: routeName, optional: true },
  localPort: { guard: integer(0, 65535) },
  host: { guard: listenHost, default: LOOPBACK },
  enabled: { guard: yesOrNo, default: true },
  upstream: { guard: upstreamAddress },
  dropRate: { guard: rate, default: 0 },
  timeoutRate: { guard: rate, default: 0 },
  timeoutMs: { guard: milliseconds, default: 0 },
  latencyMs: { guard: milliseconds, default: 0 },
  jitterMs: { guard: milliseconds, default: 0 },
  connectTimeoutMs: { guard: integer(1, MAX_MS), default: 10_000 },
  halfCloseTimeoutMs: { guard: milliseconds, default: 60_000 },
  toxics: { guard: listOf("toxics", MAX_TOXICS), default: [] },
};

const { localPort: _port, host: _host, ...SHARED_FIELDS } = ROUTE_FIELDS;
/** The fields in Toxiproxy's form: `listen` is `host` and `localPort`. */
const PROXY_FIELDS = {
  ...SHARED_FIELDS,
  upstream: {
    guard: proxyUpstream,
    normalize(upstream: unknown, place: Place) {
      if (!isText(upstream)) return upstream;
      if (lacksPort(upstream)) {
        place.ignore(`${upstream} has no port; its connections fail`);
      }
      return upstream.replace(/^:(?=\d+$)/, "localhost:");
    },
  },
  listen: {
    guard: listenAddress,
    default: `${LOOPBACK}:0`,
    normalize: unlessEmpty,
  },
};

const CONFIG_FIELDS: Fields<ConfigOptions> = {
  seed: { guard: integer(0, Number.MAX_SAFE_INTEGER), optional: true },
  drainTimeoutMs: { guard: milliseconds, default: 30_000 },
  api: { guard: apiAddress, optional: true },
  routes: { guard: routeList, default: [] },
};

LEVELS.unshift(
  ["at the top level", CONFIG_FIELDS],
  ["in a route", ROUTE_FIELDS],
  ["in a proxy of Toxiproxy's; a route has host and localPort", PROXY_FIELDS],
);

/**
 * Reads a configuration of at most 1 MiB, or Toxiproxy's proxies, as a list or
 * by name: JSON if `path` ends in `.json`, else YAML. What is `given` takes
 * precedence. Throws {@linkcode ConfigError}.
 */
export function parseConfig(
  text: string,
  path = "config.yaml",
  given: Omit<ConfigOptions, "routes"> = {},
): Config {
  if (new TextEncoder().encode(text).length > MAX_CONFIG_BYTES) {
    throw new ConfigError(path, ["expected at most 1 MiB of text, found more"]);
  }
  if (text.trim() === "") { // which takes a byte order mark for white space
    throw new ConfigError(path, ["the file is empty; expected routes"]);
  }
  const read = /\.json$/i.test(path) ? readJson : readYaml;
  return checkConfig(read(text.replace(/^\uFEFF/, ""), path), path, given);
}

const LINE_END = /\r\n|\r|\n/;

function readYaml(text: string, path: string): unknown {
  const lines = text.split(LINE_END);
  try {
    let depth = 0; // of brackets, within which indentation means nothing
    const tab = lines.findIndex((line) => {
      const isTab = depth <= 0 && /^ *\t\s*[^\s#]/.test(line);
      depth += line.split(/[[{]/).length - line.split(/[\]}]/).length;
      return isTab;
    });
    if (tab >= 0) {
      const place = `at line ${tab + 1}, column 1`;
      throw new SyntaxError(`a tab in the indentation; write spaces ${place}`);
    }
    // Each alias may copy all keys of the text, 5 million of them in a second.
    const copies = text.includes("<<") ? text.split("*").length - 1 : 0;
    if (copies * text.split(/[:,?]/).length > 20_000_000) {
      const hint = "write out what they stand for";
      throw new SyntaxError(`${copies} merge keys (<<) are too many; ${hint}`);
    }
    const value = parseYaml(text);
    const asText = { schema: "failsafe", allowDuplicateKeys: true } as const;
    keepOddNumbers(value, parseYaml(text, asText));
    return value;
  } catch (error) {
    const message = error instanceof RangeError // the parser's stack overflowed
      ? "nested too deeply"
      : (error as Error).message;
    const [, reason, line, column] =
      /^(.*?)(?: at line (\d+), column (-?\d+)|\n|$)/.exec(message) ?? [];
    const at = line && `line ${line}, column ${Math.max(1, Number(column))}: `;
    const isIpv6 = /:\s*\[[\da-f:.]+\]:\d/i.test(lines[Number(line) - 1] ?? "");
    const hint = isIpv6 ? QUOTE_IPV6 : "";
    throw new ConfigError(path, [`${at ?? ""}invalid YAML: ${reason}${hint}`]);
  }
}

const PLAIN_NUMBER = /^[-+]?(?:0|[1-9]\d*)?(?:\.\d*)?(?:e-\d+)?$/i;

function isTree(value: unknown): value is Record<string, unknown> {
  return Array.isArray(value) || isRecord(value);
}

/** Puts back the text of numbers such as `0755` and `1:30`, from `texts`. */
function keepOddNumbers(tree: unknown, texts: unknown, seen = new Set()) {
  if (!isTree(tree) || !isTree(texts) || seen.has(tree)) return;
  seen.add(tree);
  const sources = [texts, ...[texts["<<"]].flat()].filter(isTree);
  for (const [key, each] of Object.entries(tree)) {
    const text = sources.find((each) => Object.hasOwn(each, key))?.[key];
    if (typeof each !== "number") keepOddNumbers(each, text, seen);
    else if (isText(text) && !PLAIN_NUMBER.test(text)) tree[key] = text;
  }
}

/** How V8 ends a message, except that of an unexpected token. */
const JSON_POSITION = /(?: in JSON)? at position (\d+)(?: \(.*\))?$/;

/** Reads JSON; refuses a repeated key, which `JSON.parse` lets pass. */
function readJson(text: string, path: string): unknown {
  const message = errorInJson(text) ?? repeatedKeyIn(text);
  if (message === undefined) return JSON.parse(text);
  const [end, position] = JSON_POSITION.exec(message) ?? [];
  const offset = Number(position ?? findUnexpectedToken(text));
  const [before, after] = [text.slice(0, offset), text.slice(offset)];
  const found = after === "" ? "end" : JSON.stringify(after.at(0));
  const reason = end ? message.replace(end, "") : `unexpected ${found}`;
  const lines = before.split(LINE_END);
  const column = (lines.at(-1) ?? "").length + 1;
  const at = `line ${lines.length}, column ${column}`;
  const hint = hintForJson(before, after);
  throw new ConfigError(path, [`${at}: invalid JSON: ${reason}${hint}`]);
}

function hintForJson(before: string, after: string): string {
  if (/^(?:\/[/*]|#)/.test(after)) return "; JSON has no comments";
  if (/^[\]}]/.test(after) && /,\s*$/.test(before)) {
    return "; remove the comma before it";
  }
  const isYaml = /^\s*[\w-]/.test(before + after);
  return isYaml ? "; name a YAML file .yaml, not .json" : "";
}

function errorInJson(text: string): string | undefined {
  try {
    JSON.parse(text);
  } catch (error) {
    return (error as Error).message;
  }
}

/** The token's offset, by bisection: V8 refuses each longer prefix for it. */
function findUnexpectedToken(text: string): number {
  let [start, end] = [0, text.length];
  while (start < end) {
    const middle = Math.ceil((start + end) / 2);
    const error = errorInJson(text.slice(0, middle));
    if (error?.endsWith("is not valid JSON")) end = middle - 1;
    else start = middle;
  }
  return start;
}

/** A brace, or a string; a key includes its colon. */
const JSON_TOKEN = /[{}]|"[^"\\]*(?:\\.[^"\\]*)*"(?:\s*:)?/g;

/** The message about a repeated key in valid JSON, in V8's form. */
function repeatedKeyIn(text: string): string | undefined {
  const open: Set<string>[] = []; // the keys of each object
  for (const { 0: token, index } of text.matchAll(JSON_TOKEN)) {
    if (token === "{") open.push(new Set());
    if (token === "}") open.pop();
    if (!token.endsWith(":")) continue;
    const key = JSON.parse(token.replace(/\s*:$/, ""));
    const keys = open.at(-1);
    if (keys?.has(key)) {
      return `${describe(key)} is repeated at position ${index}`;
    }
    keys?.add(key);
  }
}

/** Checks a config; one from a file, with `given`, needs routes or an `api`. */
function checkConfig(
  value: unknown,
  source: string,
  given?: Omit<ConfigOptions, "routes">,
): Config {
  return validate(source, (place) => {
    const key = keyOfRoutes(value);
    const whole = key === "" ? { [key]: value } : value;
    const { [key]: list = [], ...rest } = isRecord(whole) ? whole : {};
    for (const [name, each] of Object.entries(given ?? {})) {
      if (each !== undefined) rest[name] = each;
    }
    const all = isRecord(whole) ? rest : whole;
    const config = checkFields(all, place, CONFIG_FIELDS);
    const ignored = key === "routes" ? undefined : [];
    const at = new Place(key, place.problems, ignored);
    const api = splitApi(config.api);
    const routes = checkRoutes(list, at, api);
    if (given && !api && isTree(list) && Object.keys(list).length === 0) {
      at.refuse("expected at least one route");
    }
    return { ...config, routes, ...(api && { api: addressOf(api) }) } as Config;
  });
}

/** The key of the routes, by the config's form; "" if it is just proxies. */
function keyOfRoutes(value: unknown): "routes" | "proxies" | "" {
  if (!isTree(value)) return "routes";
  // A proxy that is named like a key of the config says so in its `name`.
  const [key] = ["routes", "proxies", ...Object.keys(CONFIG_FIELDS)].filter(
    (key) => key in value && (value[key] as Draft<Route> | null)?.name !== key,
  );
  if (key === "proxies") return key;
  const items = [...new Set(Object.values(value))].filter(isRecord);
  if (key || items.some((each) => "localPort" in each)) return "routes";
  const isProxy = (each: object) =>
    Object.keys(each).some((key) => /^(?:listen|upstream)$/i.test(key));
  return Array.isArray(value) || items.some(isProxy) ? "" : "routes";
}

/** Checks routes; names and addresses must be unique, also beside the API's. */
function checkRoutes(list: unknown, place: Place, api?: Address): Route[] {
  const isByName = place.ignored && isRecord(list);
  const names = isByName ? Object.keys(list) : [];
  const values = isByName ? Object.values(list) : list;
  if (!routeList.is(values)) {
    place.refuse(mismatch(routeList, list));
    return [];
  }
  const places = new Map<Partial<Route>, Place>();
  let toxics = 0; // YAML's aliases can make many from little text
  for (const [index, value] of values.entries()) {
    const own = place.at(names[index] ?? index);
    const route = checkRoute(value, own, names[index]);
    places.set(route, own);
    toxics += route.toxics?.length ?? 0;
    if (toxics > MAX_TOXICS_IN_ALL) {
      place.refuse(`expected at most ${MAX_TOXICS_IN_ALL} toxics in all`);
      break;
    }
    if (place.problems.length >= MAX_PROBLEMS) break;
  }
  checkUnique(places, api);
  const routes = [...places.keys()];
  const circle = findCircle(routes);
  if (circle) places.get(circle.route)?.at("upstream").refuse(circle.problem);
  return routes as Route[]; // what is missing has been reported
}

/** Checks a route, in Toxiproxy's form if the place has `ignored`. */
function checkRoute(value: unknown, place: Place, name?: string): Draft<Route> {
  if (fromToxiproxy.has(value as object)) return value as Route; // is checked
  const before = place.ignored?.length;
  const named = { guard: routeName, default: name };
  const fields: Draft<RouteOptions & { listen: string }> = place.ignored
    ? checkFields(value, place, { ...PROXY_FIELDS, name: named })
    : checkFields(value, place, ROUTE_FIELDS);
  const { listen, toxics: written = [], ...rest } = fields;
  if (rest.localPort !== undefined) rest.name ??= String(rest.localPort);
  const toxics = checkToxics(written, place.at("toxics"));
  const route = { ...rest, ...(listen && hostAndPort(listen)), toxics };
  if (place.ignored) fromToxiproxy.set(route, place.ignored.slice(before));
  return route;
}

/** Checked routes and changes in Toxiproxy's form, and what each ignored. */
const fromToxiproxy = new WeakMap<object, readonly string[]>();

/** What was ignored in a valid route, and what is probably a mistake. */
function warningsOf(route: Route): string[] {
  const { name, timeoutMs, timeoutRate, latencyMs, jitterMs } = route;
  return [
    ...fromToxiproxy.get(route) ?? [],
    timeoutMs > 0 && timeoutRate === 0 &&
    `${name}: timeoutMs does nothing without timeoutRate`,
    jitterMs > 0 && latencyMs === 0 &&
    `${name}: jitterMs without latencyMs delays half of the connections`,
  ].filter((each) => each !== false);
}

/** The `host` and `localPort` of Toxiproxy's `listen`. */
function hostAndPort(listen: string): Pick<Route, "host" | "localPort"> {
  const { hostname, port } = splitAddress(listen, ALL_ADDRESSES)!;
  return { host: hostname, localPort: port };
}

/** Refuses a name or a port that is taken; in Toxiproxy's form, an address. */
function checkUnique(places: Map<Partial<Route>, Place>, api?: Address) {
  const earlier: (Address & { name?: string; by: string })[] = [];
  for (const [route, place] of places) {
    const { name, host = LOOPBACK, localPort = 0, enabled } = route;
    const isProxy = fromToxiproxy.has(route);
    const hostname = isProxy ? canonicalHost(host) : "::";
    const port = isProxy && !enabled ? 0 : localPort;
    const isApi = enabled && port > 0 && port === api?.port &&
      overlaps(canonicalHost(host), canonicalHost(api.hostname));
    const rival = isApi
      ? { by: "api" }
      : earlier.find((each) =>
        port > 0 && each.port === port && overlaps(each.hostname, hostname)
      );
    const namesake = earlier.find((each) => name && each.name === name);
    earlier.push({ name, hostname, port, by: place.path });
    const key = isProxy ? "listen" : "localPort";
    const taken = isProxy ? addressOf({ hostname, port }) : port;
    if (rival) place.at(key).refuse(`${taken} is already taken by ${rival.by}`);
    if (!namesake || (rival && name === `${localPort}`)) continue;
    place.at("name").refuse(`${name} is already taken by ${namesake.by}`);
  }
}

/** Finds a circle of routes: each connection in it would open another one. */
function findCircle<R extends Partial<Route>>(routes: readonly R[]) {
  const byPort = Map.groupBy(routes, ({ localPort }) => localPort);
  const next = new Map(routes.map((route) => {
    const to = splitAddress(route.upstream ?? "");
    const there = to &&
      byPort.get(to.port)?.find(({ host = LOOPBACK }) =>
        reaches(to.hostname, host)
      );
    return [route, there];
  }));
  for (const route of routes) {
    const path = new Set([route]);
    let at = next.get(route);
    for (; at && !path.has(at); at = next.get(at)) path.add(at);
    if (at !== route) continue; // no circle, or one without this route
    const names = [...path, route].map(({ name }) => name).join(" -> ");
    const hint = "write the address of the server behind it";
    const problem = `connections would go in a circle, ${names}; ${hint}`;
    return { route, problem };
  }
}

// ---- Link: one direction of one connection ----------------------------------

/** Bytes in memory that nothing else shares. */
type Bytes = Uint8Array<ArrayBuffer>;

/** A chunk that a toxic holds, when it arrived there, and the one behind it. */
interface Held extends TimedChunk {
  readonly since: number;
  next?: Held;
}

/** A toxic at work on a link. */
interface Stage {
  toxic: Toxic;
  readonly active: ActiveToxic;
  /** What it holds, as a list: `shift` of a long array moves all the rest. */
  first?: Held;
  last?: Held;
  /** When it ends the connection. */
  cut?: { readonly at: number; readonly how: "close" | "reset" };
  lastLeft: number; // when the chunk that left last was due
}

const MAX_HELD_BYTES = 64 * 1024 * 1024;
const HELD_OVERHEAD_BYTES = 1024; // what a held piece costs besides its bytes

/**
 * Forwards what one side sends to the other, through the toxics that act on it.
 * Each toxic holds what is not due yet, and then forwards it to the next one.
 * `write` waits until there is room, so that a slow reader slows the sender.
 */
class Link {
  /** The toxic that closes the connection once all before is delivered. */
  closedBy: string | undefined;
  readonly #stages: Stage[] = [];
  #stopped = false;
  #ended = false;
  #heldBytes = 0;
  #since = 0; // when the chunk that a toxic processes now arrived there
  #nap: AbortController | undefined;
  #due = Infinity; // when `#run` looks again
  /** Resolves when it holds at most `#most` bytes, or has stopped. */
  #room: PromiseWithResolvers<void> | undefined;
  #most = MAX_HELD_BYTES;
  #controller!: TransformStreamDefaultController<Bytes>;
  readonly #stream = new TransformStream<Bytes, Bytes>({
    start: (controller) => {
      this.#controller = controller;
    },
    transform: (chunk, controller) => {
      if (this.#stopped) return;
      if (this.#stages.length === 0) return controller.enqueue(chunk);
      this.#forward({ at: performance.now(), what: chunk });
      return this.#untilHeld(MAX_HELD_BYTES);
    },
    flush: async () => {
      this.#forward({ at: performance.now(), what: "end" });
      await this.#untilHeld(0);
      this.#ended = true;
    },
  });
  readonly #writer = this.#stream.writable.getWriter();
  readonly readable = this.#stream.readable;

  /** `cut` is called when a toxic ends the connection. */
  constructor(
    readonly cut: (toxic: string, how: "close" | "reset") => void,
    readonly randomOf: (toxic: Toxic) => () => number,
  ) {}

  /** Makes these toxics act from now on, in this order, and no others. */
  act(toxics: readonly Toxic[]): void {
    if (this.#stopped) return;
    const names = new Set(toxics.map(({ name }) => name));
    const gone = this.#stages.filter(({ toxic }) => !names.has(toxic.name));
    for (const stage of gone) this.#remove(stage);
    toxics.forEach((toxic, index) => {
      const stage = this.#stages.find((each) => each.toxic.name === toxic.name);
      if (stage === undefined) this.#insert(index, toxic);
      else if (stage.toxic !== toxic) this.#change(stage, toxic);
    });
  }

  get isBuffering(): boolean {
    return this.#heldBytes > 0 && !this.#stopped;
  }

  write(chunk: Bytes): Promise<void> {
    return this.#writer.write(chunk);
  }

  /** Ends the stream once all that was written has been delivered. */
  end(): void {
    this.#writer.close().catch(expectedOfDelivery);
  }

  /** Ends the stream at once; what has not been delivered is lost. */
  abort(): void {
    this.stop();
    this.#writer.abort().catch(expectedOfDelivery);
  }

  /** Discards what it holds and what comes; no toxic can end the connection. */
  stop(): void {
    this.#stopped = true;
    this.#nap?.abort("stopped");
    this.#room?.resolve();
  }

  #insert(index: number, toxic: Toxic): void {
    const stage: Stage = {
      toxic,
      active: begin(toxic, {
        pass: (timed) => this.#hold(stage, timed),
        cut: (at, how) => {
          stage.cut = { at, how };
          this.#run();
        },
      }, this.randomOf(toxic)),
      lastLeft: -Infinity,
    };
    this.#stages.splice(index, 0, stage);
    stage.active.open(performance.now());
  }

  #change(stage: Stage, toxic: Toxic): void {
    const at = performance.now();
    const all: Held[] = [];
    while (stage.first) all.push(this.#shift(stage, stage.first));
    stage.toxic = toxic;
    stage.active.change(toxic.attributes, at, stage.lastLeft);
    for (const { since, what } of all) {
      this.#since = since;
      stage.active.take({ at: since, what });
    }
    this.#release(stage, at, at);
    this.#run();
  }

  #remove(stage: Stage): void {
    const at = performance.now();
    stage.active.end(at);
    this.#release(stage, Infinity, at);
    this.#stages.splice(this.#stages.indexOf(stage), 1);
    this.#run();
  }

  #untilHeld(most: number): Promise<void> | void {
    if (this.#heldBytes <= most || this.#stopped) return;
    this.#most = most;
    this.#room = Promise.withResolvers();
    return this.#room.promise;
  }

  #hold(stage: Stage, { at, what }: TimedChunk): void {
    if (what === "close") this.closedBy ??= stage.toxic.name;
    const held: Held = { at, what, since: this.#since };
    if (stage.last) stage.last.next = held;
    else stage.first = held;
    stage.last = held;
    this.#heldBytes += HELD_OVERHEAD_BYTES + what.length;
  }

  #shift(stage: Stage, first: Held): Held {
    stage.first = first.next;
    if (stage.last === first) stage.last = undefined;
    first.next = undefined; // or it would keep those behind it in memory
    this.#heldBytes -= HELD_OVERHEAD_BYTES + first.what.length;
    return first;
  }

  /** Releases what is due by then at a toxic; `at` replaces the due times. */
  #release(stage: Stage, due: number, at?: number): void {
    while (stage.first && stage.first.at <= due) {
      const held = this.#shift(stage, stage.first);
      stage.lastLeft = held.at;
      this.#forward({ at: at ?? held.at, what: held.what }, stage);
    }
  }

  /** Forwards a chunk to the first toxic, or to the one behind `from`. */
  #forward(timed: TimedChunk, from?: Stage): void {
    if (this.#stopped) return;
    const next = this.#stages[from ? this.#stages.indexOf(from) + 1 : 0];
    if (next === undefined) return this.#deliver(timed.what);
    this.#since = timed.at;
    next.active.take(timed);
    this.#release(next, performance.now());
    if (next.first && next.first.at < this.#due) this.#run();
  }

  #deliver(what: TimedChunk["what"]): void {
    if (what === "close") {
      this.stop();
      // After `terminate`, `pipeTo` never settles if an earlier write fails.
      if (this.#ended) this.cut(this.closedBy!, "close");
      else this.end();
    } else if (what !== "end") {
      try {
        this.#controller.enqueue(what);
      } catch {
        this.stop(); // its reader has ended, which `#carry` handles
      }
    }
  }

  /** Releases what is held, and cuts the connection, each when it is due. */
  async #run(): Promise<void> {
    this.#nap?.abort("run again"); // a reason, or it would create an error
    const { signal } = this.#nap = new AbortController();
    this.#due = -Infinity;
    await null; // a toxic's `cut` must return before the connection ends
    while (!this.#stopped && !signal.aborted) {
      const now = performance.now();
      let due = Infinity;
      for (const stage of this.#stages) {
        this.#release(stage, now);
        const { first, cut, toxic } = stage;
        if (cut && cut.at <= now) {
          this.stop();
          return this.cut(toxic.name, cut.how);
        }
        due = Math.min(due, first?.at ?? Infinity, cut?.at ?? Infinity);
      }
      if (this.#heldBytes <= this.#most) this.#room?.resolve();
      this.#due = due;
      if (due === Infinity) return;
      await sleepUntil(due, signal);
    }
  }
}

/** Ignores an error that follows from an end which is reported elsewhere. */
function expectedOfDelivery(): void {}

const TIMER_LATENESS_MS = 1.5; // at most; polling is 0.01 ms late

/** Waits until `performance.now()` reaches a time, or the signal is aborted. */
async function sleepUntil(time: number, signal: AbortSignal): Promise<void> {
  while (!signal.aborted) {
    const left = time - performance.now();
    if (left <= 0) return;
    if (left < TIMER_LATENESS_MS + 1) await setImmediate();
    else await sleep(Math.min(left - TIMER_LATENESS_MS, MAX_MS), signal);
  }
}

/** Waits about that long, or until the signal is aborted. */
function sleep(ms: number, signal?: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const end = () => {
      clearTimeout(timer);
      signal?.removeEventListener("abort", end);
      resolve();
    };
    const timer = setTimeout(end, signal?.aborted ? 0 : ms);
    signal?.addEventListener("abort", end);
  });
}

// ---- Sockets: two kinds, listeners, dialling, fairness ----------------------

const FIRST_READ_BYTES = 4 * 1024;
const MAX_READ_BYTES = 256 * 1024;
const MAX_SPARE = 16;

/** After so much work a poll starts; after as much again, all wait for it. */
const MAX_WORK_BYTES = 1024 * 1024; // about 0.5 ms
const CALL_BYTES = 2 * 1024; // what a call costs besides its bytes
const BULK_BYTES = 16 * 1024;
const MAX_POLL_MS = 100; // then the connection is taken as broken
const POLL_TURNS = 64;
const REOPEN_MS = 1000;

const REARM_MS = 500;
const BACKLOG = 511; // Node's own default
const LISTEN_ATTEMPTS = 20;
const LISTEN_PAUSE_MS = 10;

/** Checks members on an interval: a timer for each took 10 % of the CPU. */
function watched<T>(everyMs: number, look: (members: Set<T>) => void) {
  const members = new Set<T>();
  let timer: ReturnType<typeof setInterval> | undefined;
  return {
    add(member: T): void {
      members.add(member);
      timer ??= setInterval(() => {
        look(members);
        this.rest();
      }, everyMs);
    },
    delete: (member: T) => members.delete(member),
    /** Ends the interval now, if the set is empty. */
    rest(): void {
      if (members.size > 0) return;
      clearInterval(timer);
      timer = undefined;
    },
  };
}

/**
 * Makes the event loop poll the system while connections are busy. As long as
 * reads and writes complete at once, Deno (2.9.6) polls every 61 ticks only: a
 * round trip beside five bulk streams took 946 ms. A byte through a loopback
 * connection needs a poll, so after some work all connections wait for one.
 * Without that connection they wait for turns of `setImmediate` (15 ms).
 */
class PollGate {
  #listeners = 0;
  #pair: readonly Deno.TcpConn[] = [];
  #openedAt = 0;
  #work = 0; // what was done since the last poll, in bytes
  #poll: Promise<void> | undefined;

  /** Call it for each listener: the first one opens the connection. */
  async retain(): Promise<void> {
    if (++this.#listeners === 1) await this.#openPair();
  }

  release(): void {
    if (--this.#listeners === 0) this.#closePair();
  }

  /** What to wait for, if anything, after reading or before writing bytes. */
  pass(bytes: number): Promise<void> | undefined {
    this.#work += bytes + CALL_BYTES;
    if (this.#work < MAX_WORK_BYTES) return undefined;
    if (!this.#poll) {
      // The caller goes on: mostly the poll ends before anyone has to wait.
      this.#poll = this.#startPoll();
      return undefined;
    }
    if (bytes < BULK_BYTES) return this.#poll;
    // Bulk checks again, so that small requests do not queue behind it.
    return this.#poll.then(() => this.pass(bytes));
  }

  async #startPoll(): Promise<void> {
    this.#work = 0;
    const [from, to] = this.#pair;
    const timer = setTimeout(() => this.#closePair(), MAX_POLL_MS);
    // After a read that fills its buffer the next does not poll: room for 2.
    const [size] = await Promise.all([
      to?.read(new Uint8Array(2)),
      from?.write(new Uint8Array(1)),
    ]).catch(() => []); // it was closed, or is broken
    clearTimeout(timer);
    if (size !== 1) {
      this.#closePair();
      for (let turn = 0; turn < POLL_TURNS; turn++) await setImmediate();
      const isDue = performance.now() > this.#openedAt + REOPEN_MS;
      if (isDue && this.#listeners > 0) this.#openPair();
    }
    this.#work = 0;
    this.#poll = undefined;
  }

  async #openPair(): Promise<void> {
    this.#openedAt = performance.now();
    if (!await mayUseLoopback()) return;
    try {
      using opened = new DisposableStack();
      using listener = Deno.listen({ hostname: LOOPBACK, port: 0 });
      const { hostname, port } = listener.addr;
      const from = opened.use(await Deno.connect({ hostname, port }));
      const to = opened.use(await listener.accept());
      const isOwn = to.remoteAddr.port === from.localAddr.port;
      if (!isOwn || this.#listeners === 0 || this.#pair.length > 0) return;
      this.#pair = [from, to];
      opened.move(); // or they would be closed here
    } catch {
      // No file descriptor is free, or there is no loopback: it tries again.
    }
  }

  #closePair(): void {
    for (const conn of this.#pair) conn.close();
    this.#pair = [];
  }
}

const pollGate = new PollGate();

/** Whether loopback is permitted; Deno would ask for the permission. */
async function mayUseLoopback(): Promise<boolean> {
  const query = { name: "net", host: LOOPBACK } as const;
  return (await Deno.permissions.query(query)).state === "granted";
}

/** What a connection needs of a socket. */
interface Socket {
  /** The peer's address, `host:port`. */
  readonly peer: string;
  /** The next bytes, which the caller then owns; null at the end of stream. */
  read(): Promise<Bytes | null>;
  /** Owns the bytes from then on; resolves when the system has all of them. */
  write(bytes: Bytes): Promise<void>;
  closeWrite(): Promise<void> | void;
  /** Closes it; `reset` sends a RST, where the kind of socket can. */
  close(how?: "close" | "reset"): void;
}

/** Used buffers of the largest size: a new one takes twice the time. */
const spareBuffers: Bytes[] = [];

/** A socket of Deno's: the faster kind. */
function denoSocket(conn: Deno.TcpConn): Socket {
  let buffer = new Uint8Array(FIRST_READ_BYTES);
  try {
    conn.setNoDelay();
    conn.setKeepAlive();
  } catch {
    // Some systems refuse it once the peer has closed, which `read` reports.
  }
  return {
    peer: addressOf(conn.remoteAddr),
    async read() {
      const size = await conn.read(buffer);
      if (size === null) return null;
      const bytes = buffer;
      if (size < bytes.length) return bytes.slice(0, size);
      const spare = size === MAX_READ_BYTES ? spareBuffers.pop() : undefined;
      buffer = spare ?? new Uint8Array(Math.min(2 * size, MAX_READ_BYTES));
      return bytes;
    },
    async write(bytes) {
      let written = await conn.write(bytes);
      while (written < bytes.length) {
        written += await conn.write(bytes.subarray(written));
      }
      const isSpare = bytes.length === MAX_READ_BYTES; // so all of its buffer
      if (isSpare && spareBuffers.length < MAX_SPARE) spareBuffers.push(bytes);
    },
    closeWrite: () => conn.closeWrite(),
    close: () => conn[Symbol.dispose](), // also more than once
  };
}

/** For all uses of a closed socket: to make an error each time is slow. */
const CLOSED = new Deno.errors.BadResource("closed");

/** A socket of Node's, for Deno's own cannot send a RST. */
function nodeSocket(socket: net.Socket): Socket {
  const { remoteAddress: hostname = "", remotePort: port = 0 } = socket;
  let next: PromiseWithResolvers<Bytes | null> | undefined;
  socket.setNoDelay();
  socket.setKeepAlive(true);
  // A failed write would destroy the socket, and lose what it has received.
  // With this only the writer gets the error, and reading continues.
  const destroy = socket.destroy.bind(socket);
  const state: { errored: unknown } = Reflect.get(socket, "_readableState");
  socket.destroy = (error?: NodeJS.ErrnoException) => {
    if (error?.syscall !== "write") return destroy(error);
    state.errored = null;
    return socket;
  };
  socket.pause(); // or bytes would come before `read` asks for them
  socket.on("data", (bytes: Bytes) => {
    socket.pause();
    next?.resolve(bytes);
    next = undefined;
  });
  socket.on("end", () => next?.resolve(null));
  socket.on("error", () => {}); // `close` follows
  socket.on("close", () => next?.reject(socket.errored ?? CLOSED));
  return {
    peer: addressOf({ hostname, port }),
    async read() {
      if (socket.readableEnded) return null;
      if (socket.closed) {
        const rest: Bytes | null = socket.read();
        if (rest) return rest;
        throw socket.errored ?? CLOSED;
      }
      next ??= Promise.withResolvers(); // an earlier call may still wait
      socket.resume();
      return await next.promise;
    },
    write: (bytes) =>
      new Promise((resolve, reject) => {
        socket.write(bytes, (error) => {
          // Deno's node:net (2.9.6) fails a write that has to wait if the peer
          // has ended its stream without a byte. The RST tells the peer that
          // data is missing.
          if (error && socket.readableEnded) {
            socket.resetAndDestroy();
            error.message += " after an end of stream without a byte";
          }
          if (error) return reject(error);
          // Frees the memory now: V8 would first mark its whole heap for it.
          const { length, buffer } = bytes;
          if (length === buffer.byteLength) buffer.transfer(0);
          resolve();
        });
      }),
    closeWrite: () => void socket.end(),
    close(how) {
      if (how === "reset") socket.resetAndDestroy();
      else socket.destroy();
    },
  };
}

/** An address could not be listened on. */
export class ListenError extends Error {
  /** `ListenError` */
  override name = "ListenError";

  /** `what`, such as `route db`, cannot listen on `address`, a `host:port`. */
  constructor(what: string, readonly address: string, cause: unknown) {
    const why = hasCode(cause, "EADDRINUSE")
      ? "the port is already in use"
      : hasCode(cause, "EACCES")
      ? "permission denied; ports below 1024 are for privileged users"
      : causeOf(cause);
    super(`${what}: cannot listen on ${address}: ${why}`, { cause });
  }
}

interface Listener {
  readonly addr: Address;
  /** The next connection; only one call may wait at a time. */
  accept(): Promise<Socket>;
  /** Resolves when the address is free again. */
  close(): void | Promise<void>;
}

function listenOnDeno(address: Address): Listener {
  const listener = Deno.listen(address);
  let accepting: Promise<Socket> | undefined;
  return {
    addr: listener.addr,
    accept: () => accepting = listener.accept().then(denoSocket),
    async close() {
      pollGate.release();
      listener.close();
      await accepting?.catch(() => {}); // it is open until that ends
    },
  };
}

async function listenOnNode({ hostname, port }: Address): Promise<Listener> {
  const accepted: Socket[] = [];
  let waiting: PromiseWithResolvers<void> | undefined;
  const server = net.createServer({ allowHalfOpen: true });
  server.on("connection", (conn) => {
    accepted.push(nodeSocket(conn));
    waiting?.resolve();
  });
  server.listen(port, hostname);
  await once(server, "listening");
  server.on("error", (error) => waiting?.reject(error));
  const at = server.address() as net.AddressInfo;
  const addr = { hostname: at.address, port: at.port };
  // When Deno's `net.Server` (2.9.6) finds no file descriptor for a connection,
  // it reports nothing and accepts none after that, until it listens again.
  const rearm = setInterval(() => {
    try {
      Deno.listen(addr).close(); // fails: with EADDRINUSE if none is missing
    } catch (error) {
      if (hasCode(error, "EMFILE", "ENFILE")) waiting?.reject(error);
    }
    Reflect.get(server, "_handle")?.listen(BACKLOG); // changes nothing else
  }, REARM_MS);
  return {
    addr,
    async accept() {
      while (accepted.length === 0) {
        waiting = Promise.withResolvers();
        await waiting.promise;
      }
      return accepted.shift()!;
    },
    close() {
      pollGate.release();
      clearInterval(rearm);
      server.close();
      for (const socket of accepted) socket.close();
      waiting?.reject(CLOSED);
    },
  };
}

/** Lookups under way, by name: each takes a thread, of which there are few. */
const lookups = new Map<string, Promise<string[]>>();

async function lookUp(host: string, signal: AbortSignal): Promise<string[]> {
  signal.throwIfAborted();
  if (net.isIP(host)) return [host];
  if (host === "localhost") return [LOOPBACK, "::1"];
  const lookup = lookups.get(host) ??
    dns.lookup(host, { all: true })
      .then((found) => found.map(({ address }) => address))
      .finally(() => lookups.delete(host));
  lookups.set(host, lookup);
  const { promise: aborted, reject } = Promise.withResolvers<never>();
  const abort = () => reject(signal.reason);
  signal.addEventListener("abort", abort);
  return await Promise.race([lookup, aborted])
    .finally(() => signal.removeEventListener("abort", abort));
}

/** Listens on a route's address, with Node's sockets if `resettable`. */
async function listen(
  route: Route,
  resettable: boolean,
  signal: AbortSignal,
  attempts = LISTEN_ATTEMPTS,
): Promise<Listener> {
  const asked = { hostname: route.host, port: route.localPort };
  try {
    const [hostname = route.host] = await lookUp(route.host, signal);
    const listenOn = resettable ? listenOnNode : listenOnDeno;
    const listener = await listenOn({ ...asked, hostname });
    await pollGate.retain();
    return listener;
  } catch (error) {
    signal.throwIfAborted();
    if (!hasCode(error, "EADDRINUSE") || attempts === 1) {
      throw new ListenError(`route ${route.name}`, addressOf(asked), error);
    }
    // A process that was just started may still have a copy of a closed socket.
    await sleep(LISTEN_PAUSE_MS, signal);
    return await listen(route, resettable, signal, attempts - 1);
  }
}

/** Dials the addresses of an upstream, one after the other. */
async function dial(
  upstream: string,
  resettable: boolean,
  signal: AbortSignal,
): Promise<Socket> {
  const to = splitAddress(upstream);
  if (!to) throw new Error("the upstream has no port; expected host:port");
  let failure: unknown;
  for (const hostname of await lookUp(to.hostname, signal)) {
    let socket: net.Socket | undefined;
    try {
      if (!resettable) {
        return denoSocket(await Deno.connect({ ...to, hostname, signal }));
      }
      socket = net.connect({ ...to, host: hostname, allowHalfOpen: true });
      await once(socket, "connect", { signal });
      return nodeSocket(socket);
    } catch (error) {
      socket?.destroy();
      signal.throwIfAborted();
      failure ??= error;
    }
  }
  throw failure;
}

function hasCode(error: unknown, ...codes: string[]): boolean {
  return codes.includes((error as NodeJS.ErrnoException).code ?? "");
}

/** An error in the system's words, without its number. */
function causeOf(error: unknown): string {
  const { message } = error as Error;
  return message.replace(/ \(os error \d+\)/g, "").replace(/^Error: /, "");
}

// ---- Connection: accept, decide, delay, dial, two links, one outcome --------

/** What the seed decides: to close at once, never to answer, or to forward. */
export type Decision =
  | { kind: "drop" | "timeout" }
  | { kind: "forward"; delayMs: number; toxics: Toxic[] };

/** Decides by the seed, the route and the connection's number on it, from 1. */
export function decide(seed: number, route: Route, number: number): Decision {
  const random = randomStream(seed, route.name, number);
  const [drop, timeout, jitter] = [random(), random(), random()];
  if (drop < route.dropRate) return { kind: "drop" };
  if (timeout < route.timeoutRate) return { kind: "timeout" };
  const delay = route.latencyMs + (2 * jitter - 1) * route.jitterMs;
  const delayMs = Math.max(0, toMicroseconds(delay));
  return { kind: "forward", delayMs, toxics: actingOn(seed, route, number) };
}

/** Draws by name which toxics act, whatever the other toxics or their order. */
function actingOn(seed: number, route: Route, number: number): Toxic[] {
  return route.toxics.filter(({ name, toxicity }) => {
    if (toxicity === 0 || toxicity === 1) return toxicity === 1;
    return randomStream(seed, route.name, number, name, "acts")() < toxicity;
  });
}

/** Rounds milliseconds to whole microseconds. */
function toMicroseconds(ms: number): number {
  return Math.round(ms * 1000) / 1000;
}

/** One end of a connection through the proxy. */
export type Side = "client" | "upstream";

const OTHER = { client: "upstream", upstream: "client" } as const;
const STREAM_OF = { client: "upstream", upstream: "downstream" } as const;

/** Why a connection ended. A side alone ended its stream first. */
export type Outcome =
  | Side
  | `${Side}_reset`
  | "upstream_failed"
  | "fault" // injected
  | "cut" // alone, or with its route
  | "drain"; // the proxy stopped

/** What happens to a connection, in this order. */
export type ConnectionEvent =
  & {
    route: string;
    /** Its number on that route, from 1. */
    connection: number;
    client: string;
  }
  & (
    | { event: "accepted"; upstream: string }
    | { event: "dropped" }
    /** Fault: never answered; closed after `timeoutMs`; 0: by the client. */
    | { event: "timed_out"; timeoutMs: number }
    /** Fault: waits that long before the upstream is dialled. */
    | { event: "delayed"; delayMs: number }
    /** The upstream was reached; these toxics act at first. */
    | {
      event: "connected";
      upstream: string;
      address: string;
      dialMs: number;
      toxics: string[];
    }
    | { event: "upstream_failed"; upstream: string; cause: string }
    /** The connection ended; each `accepted` has one `closed`. */
    | {
      event: "closed";
      why: Outcome;
      /** What failed, mostly in the system's words. */
      cause?: string;
      /** The toxic that ended it. */
      toxic?: string;
      /** Bytes that came from the client, and from the upstream. */
      bytesUp: number;
      bytesDown: number;
      durationMs: number;
    }
  );

/** What may be injected: a fault of a route, or a toxic by its type. */
export type FaultKind = "dropRate" | "timeoutRate" | "latencyMs" | ToxicType;

/** The statistics of a route's connections. */
export interface RouteStats {
  /** The route as it stands. */
  route: Route;
  /** How many connections are in flight. */
  open: number;
  /** How many have ended, by outcome. */
  ended: Partial<Record<Outcome, number>>;
  /** How often a fault was injected, or a toxic began to act, by its kind. */
  faults: Partial<Record<FaultKind, number>>;
  /** Upstreams reached: in all, and within each {@linkcode DIAL_BOUNDS_MS}. */
  dials: { count: number; totalMs: number; within: number[] };
  /** Bytes that were read, from the client (upstream) or from the upstream. */
  received: Record<Stream, number>;
  /** Bytes that were written, to the upstream (upstream) or to the client. */
  sent: Record<Stream, number>;
}

/** The bounds, in milliseconds, by which dialling times are counted. */
export const DIAL_BOUNDS_MS: readonly number[] = [
  ...[1, 2.5, 5, 10, 25, 50, 100, 250, 500],
  ...[1000, 2500, 5000, 10_000],
];

type Counts = Omit<RouteStats, "route" | "open">;

const newCounts = (): Counts => ({
  ended: {},
  faults: {},
  dials: { count: 0, totalMs: 0, within: DIAL_BOUNDS_MS.map(() => 0) },
  received: { upstream: 0, downstream: 0 },
  sent: { upstream: 0, downstream: 0 },
});

function tally<K extends PropertyKey>(counts: { [key in K]?: number }, key: K) {
  counts[key] = (counts[key] ?? 0) + 1;
}

/** The outcome of a connection, as in its `closed` event. */
type Reason = { why: Outcome; cause?: string; toxic?: string };

const MAX_LINGER_MS = 2000;
const CHECK_MS = 20;

/** A connection, from being accepted to its end. */
class Connection {
  /** Those that dial or are half-closed, which may take too long. */
  static readonly watch = watched<Connection>(CHECK_MS, (all) => {
    for (const each of all) each.#checkTimeouts();
  });

  readonly id: Pick<ConnectionEvent, "route" | "connection" | "client">;
  /** Resolves when it has ended. It starts after the constructor returns. */
  readonly ended: Promise<void>;
  /** How many bytes have been read, by the side that sent them. */
  readonly received: Record<Side, number> = { client: 0, upstream: 0 };
  readonly #start = performance.now();
  #sockets: Partial<Record<Side, Socket>>;
  #links: Partial<Record<Side, Link>> = {};
  #toxics: Toxic[];
  readonly #aborted = new AbortController();
  /** Why it ended before both sides had ended their streams. */
  #failure: Reason | undefined;
  #firstToEnd: Side | undefined;
  /** When the dialling takes too long. */
  #dialDeadline = Infinity;
  #delivered = 0;
  #isClosed = false;
  /** Whether bytes moved since the last look, and when they last did. */
  #hasMoved = true;
  #movedAt = 0;

  constructor(
    client: Socket,
    readonly route: Route,
    readonly number: number,
    private readonly seed: number,
    readonly resettable: boolean,
    private readonly counts: Counts,
    private readonly onEvent: (event: ConnectionEvent) => void,
  ) {
    this.id = { route: route.name, connection: number, client: client.peer };
    this.#sockets = { client };
    const decision = decide(seed, route, number);
    this.#toxics = decision.kind === "forward" ? decision.toxics : [];
    this.ended = Promise.resolve().then(() => this.#run(client, decision));
  }

  get ageMs(): number {
    return toMicroseconds(performance.now() - this.#start);
  }

  get acting(): Toxic[] {
    return this.#sockets.upstream && !this.#failure ? this.#toxics : [];
  }

  setToxics(toxics: readonly Toxic[]): void {
    this.#toxics = actingOn(this.seed, { ...this.route, toxics }, this.number);
    this.#act();
  }

  /** Runs the connection until it has ended; never fails. */
  async #run(client: Socket, decision: Decision): Promise<void> {
    const { kind } = decision;
    const { upstream } = this.route;
    this.onEvent({ event: "accepted", ...this.id, upstream });
    if (kind === "forward") await this.#forward(client, decision.delayMs);
    else if (kind === "timeout") await this.#hold(client);
    else {
      tally(this.counts.faults, "dropRate");
      this.onEvent({ event: "dropped", ...this.id });
      this.end({ why: "fault" });
    }
    this.end();
    const reason = this.#failure ?? { why: this.#firstToEnd ?? "client" };
    tally(this.counts.ended, reason.why);
    this.onEvent({
      event: "closed",
      ...this.id,
      ...reason,
      bytesUp: this.received.client,
      bytesDown: this.received.upstream,
      durationMs: this.ageMs,
    });
    // V8's Map and Set keep what was removed, and all this, until a full GC.
    this.#sockets = {};
    this.#links = {};
  }

  /** Closes all that is open, which ends it; the first reason stands. */
  end(reason?: Reason, how?: "close" | "reset"): void {
    this.#failure ??= reason;
    this.#isClosed = true;
    Connection.watch.delete(this);
    if (this.#failure) this.#aborted.abort(CLOSED);
    for (const socket of Object.values(this.#sockets)) socket.close(how);
    for (const link of Object.values(this.#links)) {
      if (this.#failure) link.abort();
      else link.stop();
    }
  }

  /** Answers nothing until the timeout, also if the client ends its stream. */
  async #hold(client: Socket): Promise<void> {
    const { timeoutMs } = this.route;
    tally(this.counts.faults, "timeoutRate");
    this.onEvent({ event: "timed_out", ...this.id, timeoutMs });
    const read = this.#read("client", client);
    if (timeoutMs > 0) {
      await sleepUntil(this.#start + timeoutMs, this.#aborted.signal);
      this.end({ why: "fault" });
    }
    await read;
  }

  async #forward(client: Socket, delayMs: number): Promise<void> {
    const up = this.#newLink("client");
    if (delayMs > 0) {
      tally(this.counts.faults, "latencyMs");
      this.onEvent({ event: "delayed", ...this.id, delayMs });
      this.#read("client", client, up).then(() => {
        // One that has sent something may be waiting for the answer.
        if (!this.#sockets.upstream && this.received.client === 0) {
          this.end({ why: "client" });
        }
      });
      await sleepUntil(this.#start + delayMs, this.#aborted.signal);
    }
    await this.#dial();
    const { upstream } = this.#sockets;
    if (!upstream || this.#failure) return;
    const down = this.#newLink("upstream");
    if (delayMs === 0) this.#read("client", client, up);
    this.#read("upstream", upstream, down);
    this.#act();
    await Promise.all([
      this.#carry("client", up, upstream),
      this.#carry("upstream", down, client),
    ]);
  }

  async #dial(): Promise<void> {
    const { upstream, connectTimeoutMs } = this.route;
    const start = performance.now();
    this.#dialDeadline = start + connectTimeoutMs;
    Connection.watch.add(this);
    try {
      const { signal } = this.#aborted;
      const socket = await dial(upstream, this.resettable, signal);
      this.#sockets.upstream = socket;
      if (this.#failure) return; // ended meanwhile
      const dialMs = toMicroseconds(performance.now() - start);
      const { dials } = this.counts;
      dials.count++;
      dials.totalMs += dialMs;
      DIAL_BOUNDS_MS.forEach((bound, i) => {
        if (dialMs <= bound) tally(dials.within, i);
      });
      this.onEvent({
        event: "connected",
        ...this.id,
        upstream,
        address: socket.peer,
        dialMs,
        toxics: this.acting.map(({ name }) => name),
      });
    } catch (error) {
      if (this.#failure) return; // ended meanwhile, which aborts the dialling
      const cause = causeOf(error);
      this.#failure = { why: "upstream_failed", cause };
      this.onEvent({ event: "upstream_failed", ...this.id, upstream, cause });
    } finally {
      this.#dialDeadline = Infinity;
      if (!this.#firstToEnd) Connection.watch.delete(this);
    }
  }

  #newLink(from: Side): Link {
    return this.#links[from] = new Link(
      (toxic, how) => this.end({ why: "fault", toxic }, how),
      ({ name, type }) => { // once for each toxic that begins to act
        tally(this.counts.faults, type);
        return randomStream(this.seed, this.route.name, this.number, name);
      },
    );
  }

  #act(): void {
    const acting = Map.groupBy(this.acting, ({ stream }) => stream);
    this.#links.client?.act(acting.get("upstream") ?? []);
    this.#links.upstream?.act(acting.get("downstream") ?? []);
  }

  /** Delivers what a side sends; closes both if a reset or a toxic ended it. */
  async #carry(from: Side, link: Link, socket: Socket): Promise<void> {
    const to = OTHER[from];
    const fail = (error: unknown) => {
      this.#failure ??= { why: `${to}_reset`, cause: causeOf(error) };
      throw error;
    };
    const sink = new WritableStream<Bytes>({
      write: async (chunk) => {
        const { length } = chunk;
        const turn = pollGate.pass(length);
        if (turn) await turn;
        await socket.write(chunk).catch(fail);
        this.counts.sent[STREAM_OF[from]] += length;
        this.#hasMoved = true;
      },
      close: async () => {
        // After the second end both sockets are closed, which ends them too.
        if (++this.#delivered < 2) await socket.closeWrite()?.catch(fail);
      },
    });
    try {
      await link.readable.pipeTo(sink);
    } catch {
      return; // it was ended, or `fail` leaves that to the other stream
    }
    const { closedBy: toxic } = link;
    if (toxic) this.#failure ??= { why: "fault", toxic };
    if (!toxic && this.#failure?.why !== `${from}_reset`) return;
    this.#sockets[from]?.close();
    this.#links[to]?.abort();
    // Closing a socket with unread bytes would discard what it still sends.
    const timer = setTimeout(() => this.end(), MAX_LINGER_MS);
    await this.#read(to, socket);
    clearTimeout(timer);
  }

  /** Reads what a side sends into its link, or to discard it. */
  async #read(from: Side, socket: Socket, link?: Link): Promise<void> {
    try {
      for (let size = 0;;) {
        const turn = pollGate.pass(size);
        if (turn) await turn;
        const bytes = await socket.read();
        if (bytes === null) break;
        size = bytes.length;
        this.#hasMoved = true;
        this.received[from] += size;
        this.counts.received[STREAM_OF[from]] += size;
        if (!link) continue;
        const written = link.write(bytes);
        // Without an upstream it is read ahead, to notice its end.
        if (this.#sockets.upstream || this.received[from] > MAX_READ_BYTES) {
          await written;
        } else written.catch(expectedOfDelivery);
      }
      this.#firstToEnd ??= from;
      const mayTimeOut = !this.#isClosed && this.route.halfCloseTimeoutMs > 0;
      if (mayTimeOut) Connection.watch.add(this);
    } catch (error) {
      // If the link has failed, the reason is set, or is in its `closedBy`.
      if (!link?.closedBy) {
        this.#failure ??= { why: `${from}_reset`, cause: causeOf(error) };
      }
      this.#aborted.abort(CLOSED);
    }
    link?.end();
  }

  /** Ends a dialling that takes too long, and a half-closed connection. */
  #checkTimeouts(): void {
    const { connectTimeoutMs, halfCloseTimeoutMs } = this.route;
    const now = performance.now();
    if (now >= this.#dialDeadline) {
      this.#aborted.abort(new Error(`no answer within ${connectTimeoutMs} ms`));
    }
    if (this.#hasMoved) this.#movedAt = now;
    this.#hasMoved = false;
    if (now < this.#movedAt + halfCloseTimeoutMs) return;
    const isWaiting = !this.#sockets.upstream ||
      Object.values(this.#links).some((link) => link.isBuffering);
    const why = this.#firstToEnd ?? "client";
    const cause = `no byte from the ${OTHER[why]} for ${halfCloseTimeoutMs} ms`;
    if (isWaiting) this.#movedAt = now;
    else this.end({ why, cause });
  }
}

// ---- Proxy: listeners and open connections ----------------------------------

const ACCEPT_PAUSE_MS = 100;
const CLIENT_LEFT = ["ENOTCONN", "ECONNRESET", "ECONNABORTED"];
const WARM_UPS = 3;
const MAX_WARM_UP_MS = 1000;

/** What happens to a route and its toxics. */
export type RouteEvent =
  & { route: string }
  & (
    /** It listens, at the address really taken. */
    | { event: "listening"; address: string; upstream: string; faults: string }
    /** What was ignored, and what is probably a mistake. */
    | { event: "config_warning"; warnings: string[] }
    | { event: "accept_failed"; cause: string }
    | {
      event: "route_added" | "route_changed";
      upstream: string;
      enabled: boolean;
      faults: string;
    }
    | { event: "route_removed" }
    | { event: "toxic_added" | "toxic_changed"; toxic: string; effect: string }
    | { event: "toxic_removed"; toxic: string }
  );

/** What happens to the proxy, its routes and connections. */
export type ProxyEvent =
  | ConnectionEvent
  | RouteEvent
  /** All routes listen; the seed repeats this run's decisions. */
  | { event: "started"; routes: number; seed: number }
  | { event: "reseeded"; seed: number }
  /** Waits for the connections in flight, for so long; 0: for ever. */
  | { event: "draining"; connections: number; timeoutMs: number }
  /** No connection is left; so many had to be cut. */
  | { event: "drained"; cut: number; durationMs: number };

/** How to start a {@linkcode ChaosProxy}. */
export interface StartOptions {
  /** Called with each event, as it happens; must not throw. */
  onEvent?: (event: ProxyEvent) => void;
  /** Whether all routes can be reset (slower), not just with `reset_peer`. */
  resettable?: boolean;
}

/** A connection in flight, with the bytes so far and the toxics that act. */
export type LiveConnection = {
  /** Identifies it among all connections of this proxy. */
  id: number;
  route: string;
  /** Its number on that route, from 1. */
  number: number;
  client: string;
  upstream: string;
  bytesUp: number;
  bytesDown: number;
  ageMs: number;
  toxics: string[];
};

interface ProxyContext {
  seed: number;
  lastId: number;
  readonly drainTimeoutMs: number;
  readonly resettable: boolean;
  /** Aborted when the proxy stops, with the error for later changes. */
  readonly stopping: AbortController;
  readonly emit: (event: ProxyEvent) => void;
}

/** Serves a route, and changes it as {@linkcode ChaosProxy} decides. */
class LiveRoute {
  lastNumber = 0;
  /** Those that have not ended, by id. */
  readonly connections = new Map<number, Connection>();
  readonly #resettable: boolean;
  #listener: Listener | undefined;
  /** The host that it has listened on last, as an address. */
  #host: string | undefined;
  #counts = newCounts();

  constructor(public route: Route, private readonly context: ProxyContext) {
    this.#resettable = context.resettable || route.toxics.some(needsReset);
  }

  /** Whether it listens there, or will once it is enabled. */
  isAt({ host, localPort }: Route): boolean {
    return localPort === this.route.localPort &&
      canonicalHost(host) === canonicalHost(this.route.host);
  }

  /** The route with its host as an address, to find circles. */
  get resolved(): Route {
    return { ...this.route, host: this.#host ?? this.route.host };
  }

  /** Listens there, and no longer where it did; nothing is accepted yet. */
  async open(next: Route): Promise<void> {
    const { signal } = this.context.stopping;
    const listener = await listen(next, this.#resettable, signal);
    await this.close();
    if (signal.aborted) await listener.close();
    signal.throwIfAborted();
    this.#listener = listener;
    this.#host = listener.addr.hostname;
    const host = canonicalHost(next.host);
    const { port: localPort } = listener.addr;
    // The toxics may have changed meanwhile.
    this.route = { ...next, host, localPort, toxics: this.route.toxics };
  }

  /** Accepts connections, until its listener changes. */
  async run(): Promise<void> {
    const listener = this.#listener;
    if (!listener) return;
    const { emit, stopping } = this.context;
    const { name: route, upstream } = this.route;
    const address = addressOf(listener.addr);
    const faults = describeFaults(this.route);
    emit({ event: "listening", route, address, upstream, faults });
    while (listener === this.#listener) {
      try {
        const client = await listener.accept();
        if (listener === this.#listener) this.#admit(client);
        else client.close();
      } catch (error) {
        if (listener !== this.#listener) return;
        emit({ event: "accept_failed", route, cause: causeOf(error) });
        // Waits for file descriptors, but not when a client has left again.
        if (!hasCode(error, ...CLIENT_LEFT)) {
          await sleep(ACCEPT_PAUSE_MS, stopping.signal);
        }
      }
    }
  }

  /** Updates settings; with `toxics` it restarts as another route. */
  async update(changes: Partial<Route>): Promise<Route> {
    if (changes.toxics?.some(needsReset)) this.assertResettable();
    const { host } = { ...this.route, ...changes };
    const wanted = { ...this.route, ...changes, host: canonicalHost(host) };
    const moves = !this.isAt(wanted);
    const restarts = moves || wanted.upstream !== this.route.upstream;
    const opens = wanted.enabled && (moves || !this.#listener);
    if (opens && wanted.localPort === this.#listener?.addr.port) {
      await this.update({ enabled: false }); // frees its own port
    }
    if (!wanted.enabled) await this.close();
    if (moves) this.#host = undefined;
    if (opens) await this.open(wanted);
    else this.route = { ...wanted, toxics: this.route.toxics };
    const cut = restarts || !wanted.enabled ? this.cut() : undefined;
    const { received, sent } = newCounts();
    if (restarts) this.#counts = { ...this.#counts, received, sent };
    if (changes.toxics) {
      this.lastNumber = 0;
      this.setToxics(changes.toxics);
    }
    if (opens) this.run();
    await cut;
    this.tell("route_changed");
    return this.route;
  }

  setToxics(toxics: readonly Toxic[]): void {
    if (toxics.some(needsReset)) this.assertResettable();
    const { name: route, toxics: before } = this.route;
    this.route = { ...this.route, toxics };
    for (const each of this.connections.values()) each.setToxics(toxics);
    const { emit } = this.context;
    for (const { name } of before) {
      if (toxics.some((toxic) => toxic.name === name)) continue;
      emit({ event: "toxic_removed", route, toxic: name });
    }
    for (const toxic of toxics) {
      const { name } = toxic;
      if (before.includes(toxic)) continue;
      const isChange = before.some((each) => each.name === name);
      const event = isChange ? "toxic_changed" : "toxic_added";
      emit({ event, route, toxic: name, effect: describeToxic(toxic) });
    }
  }

  assertResettable(): void {
    if (this.#resettable) return;
    throw new Deno.errors.NotSupported(
      `route ${this.route.name}: its connections cannot be reset; ` +
        "start the proxy with resettable: true",
    );
  }

  tell(event: "route_added" | "route_changed"): void {
    const { name: route, upstream, enabled } = this.route;
    const faults = describeFaults(this.route);
    this.context.emit({ event, route, upstream, enabled, faults });
  }

  /** Stops listening; resolves when the address is free. */
  async close(): Promise<void> {
    const listener = this.#listener;
    this.#listener = undefined;
    await listener?.close();
  }

  async cut(): Promise<void> {
    const all = [...this.connections.values()];
    for (const connection of all) connection.end({ why: "cut" });
    await Promise.all(all.map(({ ended }) => ended));
  }

  stats(): RouteStats {
    const counts = structuredClone(this.#counts);
    return { route: this.route, open: this.connections.size, ...counts };
  }

  #admit(client: Socket): void {
    const connection = new Connection(
      client,
      this.route,
      ++this.lastNumber,
      this.context.seed,
      this.#resettable,
      this.#counts,
      this.context.emit,
    );
    const id = ++this.context.lastId;
    this.connections.set(id, connection);
    connection.ended.then(() => this.connections.delete(id));
  }
}

const needsReset = ({ type, toxicity }: Toxic) =>
  type === "reset_peer" && toxicity > 0;

/**
 * A running proxy. Toxics change at once, and routes one after the other. If a
 * method throws, it has changed nothing, unless it says otherwise. It throws
 * {@linkcode ConfigError} or `RangeError` if a value is not valid,
 * {@linkcode ListenError}, and of `Deno.errors` `NotFound`, `AlreadyExists`,
 * `NotSupported` (it cannot be reset) or `BadResource` (the proxy has stopped).
 */
export class ChaosProxy implements AsyncDisposable {
  static #warm: Promise<void> | undefined;
  readonly #routes = new Map<string, LiveRoute>();
  #turn: Promise<unknown> = Promise.resolve();

  private constructor(private readonly context: ProxyContext) {}

  /** Listens on all routes or none; {@linkcode serveApi} serves the `api`. */
  static async start(
    config: ConfigOptions,
    { onEvent: emit = () => {}, resettable = false }: StartOptions = {},
  ): Promise<ChaosProxy> {
    const checked = checkConfig(config, "config");
    const { seed = randomSeed(), drainTimeoutMs, routes } = checked;
    await (this.#warm ??= this.#warmUp(resettable));
    const stopping = new AbortController();
    const settings = { seed, drainTimeoutMs, resettable };
    const proxy = new ChaosProxy({ ...settings, lastId: 0, stopping, emit });
    await proxy.#open(routes);
    for (const each of routes) {
      const warnings = firstOf(warningsOf(each));
      if (warnings.length > 0) {
        emit({ event: "config_warning", route: each.name, warnings });
      }
      proxy.#find(each.name).run();
    }
    emit({ event: "started", routes: routes.length, seed });
    return proxy;
  }

  /**
   * Forwards some connections to compile their code; else the first is 10 to 25
   * ms late. With a second proxy for that, V8 makes all 1.4 times as slow.
   */
  static async #warmUp(resettable: boolean): Promise<void> {
    if (!await mayUseLoopback()) return;
    try {
      using open = new DisposableStack();
      const upstream = open.use(Deno.listen({ hostname: LOOPBACK, port: 0 }));
      const route = checkRoute({
        localPort: 0,
        upstream: addressOf(upstream.addr),
        toxics: [{ type: "latency", attributes: { latency: 1 } }],
      }, new Place("", [])) as Route;
      const { signal } = new AbortController();
      const listener = await listen(route, resettable, signal);
      open.defer(() => listener.close());
      const timer = setTimeout(() => open.dispose(), MAX_WARM_UP_MS);
      open.defer(() => clearTimeout(timer));
      const bytes = new Uint8Array(64);
      for (let number = 1; number <= WARM_UPS; number++) {
        const client = open.use(await Deno.connect(listener.addr));
        const socket = await listener.accept();
        const context = [route, number, 0, resettable, newCounts()] as const;
        const { ended } = new Connection(socket, ...context, () => {});
        const server = open.use(await upstream.accept());
        for (const conn of [client, server]) {
          await conn.write(bytes);
          await conn.closeWrite();
        }
        await client.read(bytes);
        await ended;
      }
    } catch {
      // No file descriptor is free, or there is no loopback: it goes without.
    } finally {
      Connection.watch.rest();
    }
  }

  /** What decisions derive from: the configured seed, or a random one. */
  get seed(): number {
    return this.context.seed;
  }

  /** The routes as they stand, with the ports really taken. */
  get routes(): readonly Route[] {
    return [...this.#routes.values().map(({ route }) => route)];
  }

  /** How many connections are in flight. */
  get connections(): number {
    return this.#live.size;
  }

  /** A route as it stands. */
  route(name: string): Route {
    return this.#find(name).route;
  }

  /** A toxic as it stands. */
  toxic(route: string, name: string): Toxic {
    const { toxics } = this.route(route);
    const toxic = toxics.find((each) => each.name === name);
    if (toxic) return toxic;
    throw new Deno.errors.NotFound(`route ${route} has no toxic ${name}`);
  }

  /** Adds a route, with its toxics, and listens on it. */
  async addRoute(options: RouteOptions): Promise<Route> {
    const route = validate("route", (place) => checkRoute(options, place));
    return await this.#inTurn(() => this.#add(route as Route));
  }

  /**
   * Changes a route. Another address or upstream, or `enabled: false`, cuts its
   * connections. If only the host changes and this throws, it stays disabled.
   */
  async updateRoute(
    name: string,
    changes: Partial<Omit<RouteOptions, "name" | "toxics">>,
  ): Promise<Route> {
    const { name: _, toxics: __, ...fields } = ROUTE_FIELDS;
    const checked = fromToxiproxy.has(changes) ? changes : validate(
      `route ${name}`,
      (place) => checkFields(changes, place, fields, true),
    );
    return await this.#inTurn(() => this.#change(this.#find(name), checked));
  }

  /** Removes a route, and cuts its connections. */
  async removeRoute(name: string): Promise<void> {
    await this.#inTurn(async () => {
      const route = this.#find(name);
      this.#routes.delete(name);
      await Promise.all([route.close(), route.cut()]);
      this.context.emit({ event: "route_removed", route: name });
    });
  }

  /**
   * Adds these routes, or replaces those of their names that listen or forward
   * elsewhere, and leaves the others alone. If one fails, those before it stay.
   */
  async populate(options: readonly RouteOptions[]): Promise<Route[]> {
    const check = (place: Place) => checkRoutes(options, place.at("routes"));
    const routes = validate("routes", check);
    return await this.#inTurn(() =>
      Array.fromAsync(routes, (route) => {
        const live = this.#routes.get(route.name);
        if (!live) return this.#add(route);
        // For port 0, the port that it has already will do.
        const localPort = route.localPort || live.route.localPort;
        const here = { ...route, localPort };
        if (!live.isAt(here)) return this.#change(live, route);
        const isSame = live.route.upstream === route.upstream;
        return isSame ? live.route : this.#change(live, here);
      })
    );
  }

  /** Removes all toxics, and enables every route that can be listened on. */
  async reset(): Promise<void> {
    await this.#inTurn(async () => {
      const all = await Promise.allSettled(
        this.#routes.values().map((live) => {
          live.setToxics([]);
          if (!live.route.enabled) return live.update({ enabled: true });
        }),
      );
      const failed = all.find((each) => each.status === "rejected");
      if (failed) throw failed.reason;
    });
  }

  /** Adds a toxic behind those that a route has, also on open connections. */
  addToxic(route: string, options: ToxicOptions): Toxic {
    const live = this.#find(route);
    const toxic = validate("toxic", (place) => checkToxic(options, place));
    const { toxics } = live.route;
    if (toxics.some(({ name }) => name === toxic.name)) {
      throw new Deno.errors.AlreadyExists(
        `route ${route} has a toxic ${toxic.name} already`,
      );
    }
    if (toxics.length >= MAX_TOXICS) {
      throw new ConfigError("toxic", [
        `route ${route} has ${MAX_TOXICS} toxics, the most that it may have`,
      ]);
    }
    live.setToxics([...toxics, toxic]);
    return toxic;
  }

  /** Changes what is given of a toxic, and schedules again what it holds. */
  updateToxic(
    route: string,
    name: string,
    changes: Pick<ToxicOptions, "toxicity" | "attributes">,
  ): Toxic {
    const live = this.#find(route);
    const toxic = this.toxic(route, name);
    const { toxicity, attributes } = TOXIC_FIELDS;
    const changed = validate("toxic", (place) => {
      const given = checkFields(changes, place, { toxicity, attributes }, true);
      given.attributes = { ...toxic.attributes, ...given.attributes };
      return checkToxic({ ...toxic, ...given }, place);
    });
    const { toxics } = live.route;
    live.setToxics(toxics.with(toxics.indexOf(toxic), changed));
    return changed;
  }

  /** Removes a toxic and releases what it holds; a `timeout` closes instead. */
  removeToxic(route: string, name: string): void {
    const live = this.#find(route);
    const toxic = this.toxic(route, name);
    live.setToxics(live.route.toxics.filter((each) => each !== toxic));
  }

  /** The connections in flight. */
  liveConnections(): LiveConnection[] {
    return Array.from(this.#live, ([id, connection]) => ({
      id,
      route: connection.route.name,
      number: connection.number,
      client: connection.id.client,
      upstream: connection.route.upstream,
      bytesUp: connection.received.client,
      bytesDown: connection.received.upstream,
      ageMs: connection.ageMs,
      toxics: connection.acting.map(({ name }) => name),
    }));
  }

  /** Cuts a connection; `reset` sends a RST to both sides. */
  cutConnection(id: number, how: "close" | "reset" = "close"): void {
    const connection = this.#live.get(id);
    const error = `there is no connection ${id}`;
    if (!connection) throw new Deno.errors.NotFound(error);
    if (how === "reset") this.#find(connection.route.name).assertResettable();
    connection.end({ why: "cut" }, how);
  }

  /** Sets the seed, 0 to 2^53 - 1 or a random one; numbers start at 1 again. */
  reseed(seed: number = randomSeed()): void {
    checkArgument("seed", seed, CONFIG_FIELDS.seed.guard);
    this.context.seed = seed;
    for (const route of this.#routes.values()) route.lastNumber = 0;
    this.context.emit({ event: "reseeded", seed });
  }

  /** The statistics of the connections, by route. */
  stats(): RouteStats[] {
    return [...this.#routes.values().map((route) => route.stats())];
  }

  /**
   * Accepts nothing more, and cuts the connections that are left after
   * `timeoutMs`, by default the config's. Returns how many were cut.
   */
  async drain(timeoutMs = this.context.drainTimeoutMs): Promise<number> {
    checkArgument("timeoutMs", timeoutMs, milliseconds);
    const start = performance.now();
    const ended = this.#end();
    const { emit } = this.context;
    emit({ event: "draining", connections: this.connections, timeoutMs });
    const timer = timeoutMs > 0 ? setTimeout(() => this.#cut(), timeoutMs) : 0;
    await ended;
    clearTimeout(timer);
    const cut = this.stats()
      .reduce((sum, { ended }) => sum + (ended.drain ?? 0), 0);
    const durationMs = toMicroseconds(performance.now() - start);
    emit({ event: "drained", cut, durationMs });
    return cut;
  }

  /** Stops at once: closes the listeners, cuts the connections in flight. */
  async stop(): Promise<void> {
    const ended = this.#end();
    this.#cut();
    await ended;
  }

  /** Stops at once, as {@linkcode ChaosProxy.stop} does. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.stop();
  }

  get #live() {
    const routes = this.#routes.values();
    return new Map(routes.flatMap(({ connections }) => connections));
  }

  #find(name: string): LiveRoute {
    const route = this.#routes.get(name);
    if (route) return route;
    throw new Deno.errors.NotFound(`there is no route ${name}`);
  }

  /** Listening takes time: changes of routes wait for each other. */
  #inTurn<T>(change: () => Promise<T>): Promise<T> {
    const changed = this.#turn.then(() => {
      this.context.stopping.signal.throwIfAborted();
      return change();
    });
    this.#turn = changed.catch(() => {}); // the caller gets the error
    return changed;
  }

  async #add(route: Route): Promise<Route> {
    const { name } = route;
    if (this.#routes.has(name)) {
      throw new Deno.errors.AlreadyExists(`there is a route ${name} already`);
    }
    await this.#open([route]);
    const live = this.#find(name);
    live.tell("route_added");
    live.run();
    return live.route;
  }

  /** Listens on new routes, on all or on none; nothing is accepted yet. */
  async #open(routes: readonly Route[]): Promise<void> {
    await using failed = new AsyncDisposableStack();
    const opened = routes.map((route) => new LiveRoute(route, this.context));
    for (const live of opened) {
      failed.defer(() => live.close());
      if (live.route.enabled) await live.open(live.route);
    }
    this.context.stopping.signal.throwIfAborted();
    const all = [...this.#routes.values(), ...opened];
    assertNoCircle(all.map(({ resolved }) => resolved));
    failed.move(); // all listen
    for (const live of opened) this.#routes.set(live.route.name, live);
  }

  async #change(live: LiveRoute, changes: Partial<Route>): Promise<Route> {
    const others = [...this.#routes.values()].filter((each) => each !== live)
      .map(({ resolved }) => resolved);
    assertNoCircle([...others, { ...live.resolved, ...changes }]);
    return await live.update(changes);
  }

  /** Accepts nothing more; resolves when all that was under way has ended. */
  async #end(): Promise<void> {
    const error = new Deno.errors.BadResource("the proxy is shutting down");
    this.context.stopping.abort(error);
    const closed = this.#routes.values().map((route) => route.close());
    const ended = this.#live.values().map(({ ended }) => ended);
    await Promise.all([this.#turn, ...closed, ...ended]);
    Connection.watch.rest();
  }

  #cut(): void {
    for (const each of this.#live.values()) each.end({ why: "drain" });
  }
}

const randomSeed = () => Math.floor(Math.random() * 2 ** 32);

function assertNoCircle(routes: readonly Route[]): void {
  const circle = findCircle(routes);
  if (!circle) return;
  const { route: { name }, problem } = circle;
  throw new ConfigError(`route ${name}`, [`upstream: ${problem}`]);
}

function describeFaults(route: Route): string {
  const { dropRate, timeoutRate, timeoutMs, latencyMs, jitterMs } = route;
  const length = timeoutMs > 0
    ? `for ${timeoutMs} ms`
    : "until the client leaves";
  const faults = [
    !route.enabled && "disabled",
    dropRate > 0 && `drop ${percent(dropRate)}`,
    timeoutRate > 0 && `time out ${percent(timeoutRate)} ${length}`,
    (latencyMs > 0 || jitterMs > 0) &&
    `latency ${latencyMs}${plusMinus(jitterMs)} ms`,
    ...route.toxics.map(describeToxic),
  ];
  return faults.filter(Boolean).join(", ") || "no faults";
}

// ---- Control API: Toxiproxy's protocol, over the proxy ----------------------

/** An event of the control API. */
export type ApiEvent =
  /** It listens, at the address really taken. */
  | { event: "api_listening"; address: string }
  /** It has answered a call. */
  | {
    event: "api";
    /** The answer's `X-Toxiproxy-Request-Id`. */
    request: string;
    method: string;
    path: string;
    status: number;
    /** Why it was refused, if it was. */
    error?: string;
    /** What was ignored in its body, or taken otherwise, by path. */
    ignored?: string[];
    durationMs: number;
  }
  /** It could not accept a call; it will listen again. */
  | { event: "api_failed"; cause: string };

/** Options of the control API. */
export interface ApiOptions {
  /** Called with each event; must not throw. */
  onEvent?: (event: ApiEvent) => void;
}

/** An answer other than success. */
class Refusal extends Error {
  constructor(readonly status: number, message: string, readonly headers = {}) {
    super(message);
  }
}

interface Call {
  readonly proxy: ChaosProxy;
  readonly url: URL;
  /** What the path names: a proxy or the id of a connection, and a toxic. */
  readonly name: string;
  readonly toxic: string;
  /** Checks the body. All of it has been read, so nothing is awaited here. */
  check<T>(check: (body: unknown, place: Place) => T): T;
}

/** By method and path. Each returns a response, JSON, or nothing, for 204. */
const CALLS: Record<string, (call: Call) => unknown> = {
  "GET /proxies": ({ proxy }) =>
    Object.fromEntries(proxy.routes.map((each) => [each.name, asProxy(each)])),
  async "POST /proxies"({ proxy, check }) {
    const route = await proxy.addRoute(check(checkRoute) as Route);
    return Response.json(asProxy(route), { status: 201 });
  },
  async "POST /populate"({ proxy, check }) {
    const proxies = (await proxy.populate(check(checkRoutes))).map(asProxy);
    return Response.json({ proxies }, { status: 201 });
  },
  "GET /proxies/*": ({ proxy, name }) => asProxy(proxy.route(name)),
  "POST /proxies/*": updateProxy,
  "PATCH /proxies/*": updateProxy,
  "DELETE /proxies/*": ({ proxy, name }) => proxy.removeRoute(name),
  "GET /proxies/*/toxics": ({ proxy, name }) => proxy.route(name).toxics,
  "POST /proxies/*/toxics"({ proxy, name, check }) {
    proxy.route(name); // a proxy that is not found comes before a wrong body
    return proxy.addToxic(name, check(checkToxic));
  },
  "GET /proxies/*/toxics/*": ({ proxy, name, toxic }) =>
    proxy.toxic(name, toxic),
  "POST /proxies/*/toxics/*": updateToxic,
  "PATCH /proxies/*/toxics/*": updateToxic,
  "DELETE /proxies/*/toxics/*": ({ proxy, name, toxic }) =>
    proxy.removeToxic(name, toxic),
  "POST /reset": ({ proxy }) => proxy.reset(),
  "GET /version": () => ({
    version: "2.12.0", // of Toxiproxy, whose protocol this is
    name: "chaos-proxy",
    chaosProxyVersion: deno.version,
  }),
  "GET /metrics": ({ proxy }) =>
    new Response(metrics(proxy.stats()), {
      headers: { "content-type": "text/plain; version=0.0.4; charset=utf-8" },
    }),
  "GET /connections": ({ proxy }) =>
    proxy.liveConnections()
      .map(({ route: proxy, ...rest }) => ({ proxy, ...rest })),
  "DELETE /connections/*"({ proxy, url, name }) {
    const reset = url.searchParams.get("reset") ?? "0";
    if (reset !== "0" && reset !== "1") {
      throw new Refusal(400, `expected reset=0 or 1, found ${describe(reset)}`);
    }
    proxy.cutConnection(Number(name), reset === "1" ? "reset" : "close");
  },
  "GET /seed": ({ proxy }) => ({ seed: proxy.seed }),
  "PUT /seed"({ proxy, check }) {
    const { seed } = check(changesOf({ seed: CONFIG_FIELDS.seed }));
    if (seed === undefined) {
      throw new Refusal(400, "missing required field: seed");
    }
    proxy.reseed(seed);
    return { seed };
  },
};

async function updateProxy({ proxy, name, check }: Call): Promise<unknown> {
  const { toxics } = proxy.route(name);
  const fields = { ...PROXY_FIELDS, name: stays(name), toxics: stays(toxics) };
  const { listen, ...rest } = check(changesOf(fields));
  const changes = { ...rest, ...(listen && hostAndPort(listen)) };
  fromToxiproxy.set(changes, []);
  return asProxy(await proxy.updateRoute(name, changes));
}

function updateToxic({ proxy, name, toxic, check }: Call): Toxic {
  const now = proxy.toxic(name, toxic);
  const known = TOXICS[now.type].attributes;
  const fields = {
    toxicity: TOXIC_FIELDS.toxicity,
    attributes: {
      ...TOXIC_FIELDS.attributes,
      normalize: (given: unknown, place: Place) =>
        checkFields(given, place, known, true),
    },
    name: stays(now.name),
    type: stays(now.type),
    stream: stays(now.stream),
  };
  return proxy.updateToxic(name, toxic, check(changesOf(fields)));
}

/** A field that no update changes. Clients send back all that they read. */
const stays = (now: unknown): Field<string> => ({
  guard: routeName,
  normalize(given, place) {
    const isSame = isDeepStrictEqual(lowerCase(given), lowerCase(now));
    if (isSame || given === "") return;
    place.ignore(isText(now) ? `stays ${now}` : "");
  },
});

/** A route in Toxiproxy's form. */
function asProxy({ host, localPort, toxics, ...rest }: Route) {
  const { name, upstream, enabled, ...beyond } = rest;
  const listen = addressOf({ hostname: host, port: localPort });
  return { name, listen, upstream, enabled, toxics, ...beyond };
}

/** The check of a change: each field may be left out. */
function changesOf<T>(fields: Fields<T>) {
  return (body: unknown, place: Place) =>
    checkFields(body, place, fields, true);
}

/**
 * The control API as a function, in Toxiproxy 2's protocol. It refuses requests
 * that a web page may have sent: with `loopback`, the default, also those to a
 * host name other than `localhost`, which may resolve to this machine.
 */
export function controlApi(
  proxy: ChaosProxy,
  { onEvent = () => {}, loopback = true }: ApiOptions & { loopback?: boolean } =
    {},
): (request: Request) => Promise<Response> {
  return async (request) => {
    const start = performance.now();
    const id = crypto.randomUUID();
    const ignored: string[] = [];
    let answer: Response;
    let error: string | undefined;
    try {
      answer = await answerOf(request, proxy, loopback, ignored);
    } catch (cause) {
      const { status, message, headers } = refusalFor(cause);
      error = message;
      answer = Response.json({ error, status }, { status, headers });
    }
    answer.headers.set("x-toxiproxy-request-id", id);
    if (ignored.length > 0) {
      const listed = firstOf(ignored).join(", ").replaceAll("…", "...")
        .replace(/[^ -~]/g, "?").slice(0, 2000); // what every client takes
      answer.headers.set("x-chaos-proxy-ignored", listed);
    }
    onEvent({
      event: "api",
      request: id,
      method: request.method,
      path: request.url.replace(/^\w+:\/\/[^/]*/, ""),
      status: answer.status,
      ...(error && { error }),
      ...(ignored.length > 0 && { ignored: firstOf(ignored) }),
      durationMs: toMicroseconds(performance.now() - start),
    });
    return answer;
  };
}

async function answerOf(
  request: Request,
  proxy: ChaosProxy,
  loopback: boolean,
  ignored: string[],
): Promise<Response> {
  const url = URL.parse(request.url);
  if (url === null) {
    throw new Refusal(400, "expected a Host that is a host name or an address");
  }
  refuseForeign(request.headers, url, loopback);
  const { pathname } = url;
  const path = pathname.replace(/(\/[^/]+)\/[^/]+/g, "$1/*");
  const answerTo = CALLS[`${request.method} ${path}`];
  if (answerTo === undefined) {
    const allow = Object.keys(CALLS).filter((each) => each.endsWith(` ${path}`))
      .map((each) => each.split(" ", 1)).join(", ");
    // In Go's words, and as text: Toxiproxy's clients recognize it by that.
    const body = "404 page not found\n";
    if (allow === "") return new Response(body, { status: 404 });
    const problem = `${request.method} is not for ${pathname}, which takes `;
    throw new Refusal(405, problem + allow, { allow });
  }
  // What is not encoded, such as `100%`, stays as it is.
  const [, , name = "", , toxic = ""] = pathname.split("/").map(unescape);
  const body = await readBody(request);
  const check: Call["check"] = (check) =>
    validate("body", (place) => check(readJson(body, "body"), place), ignored);
  const answer = await answerTo({ proxy, url, name, toxic, check });
  if (answer === undefined) return new Response(null, { status: 204 });
  return answer instanceof Response ? answer : Response.json(answer);
}

/** @throws {Refusal} If a web page may have sent a request. */
function refuseForeign(headers: Headers, url: URL, loopback: boolean): void {
  if (headers.get("user-agent")?.startsWith("Mozilla/")) {
    throw new Refusal(403, "requests from browsers are refused");
  }
  const origin = headers.get("origin");
  // A page's owner can make a name resolve to this machine, but not an address.
  const isSafe = /^(?:localhost\.?|\d+(?:\.\d+){3}|\[.*\])$/.test(url.hostname);
  if (origin !== null && (origin !== url.origin || !isSafe)) {
    throw new Refusal(403, `requests from the origin ${origin} are refused`);
  }
  if (loopback && !isSafe) {
    const expected = "expected localhost or an IP address as Host";
    throw new Refusal(403, `${expected}, found ${describe(url.hostname)}`);
  }
}

async function readBody({ body }: Request): Promise<string> {
  const chunks: Bytes[] = [];
  let size = 0;
  for await (const chunk of body ?? []) {
    size += chunk.length;
    if (size > MAX_CONFIG_BYTES) {
      throw new Refusal(413, "expected a body of at most 1 MiB, found more");
    }
    chunks.push(chunk);
  }
  return await new Blob(chunks).text();
}

/** The statuses of errors, by the name of the error; of others it is 500. */
const STATUSES: Record<string, number> = {
  ConfigError: 400,
  NotFound: 404,
  AlreadyExists: 409,
  NotSupported: 501,
  BadResource: 503,
};

/** Problems in our words, and in Toxiproxy's, which its clients depend on. */
const WORDS: [ours: RegExp, theirs: string][] = [
  [/^(name|upstream): (missing;|.*found ""$).*/, "missing required field: $1"],
  [/^stream: expected (.*), found ".*/, "stream was invalid, can be either $1"],
  [/^type: (?:missing|expected).*?(; did .*)?$/, "invalid toxic type$1"],
  [/^there is no route .*/s, "proxy not found"],
  [/^there is a route .*/, "proxy already exists"],
  [/^route \S+ has no toxic .*/s, "toxic not found"],
  [/^route \S+ has a toxic .*/, "toxic already exists"],
  [/^there is no connection .*/, "connection not found"],
  [
    /^route \S+: cannot listen on (\S+): the port is already in use$/,
    "listen tcp $1: bind: address already in use",
  ],
];

function refusalFor(error: unknown): Refusal {
  if (error instanceof Refusal) return error;
  const isBad = error instanceof ConfigError;
  const problems = isBad ? error.problems : [causeOf(error)];
  const status = STATUSES[(error as Error).name] ?? 500;
  for (const [ours, theirs] of WORDS) {
    for (const each of problems) {
      const [, index, problem = ""] = /^(?:\[(\d+)\]\.)?(.*)/s.exec(each) ?? [];
      if (!ours.test(problem)) continue;
      const at = index === undefined ? "" : ` at proxy ${Number(index) + 1}`;
      return new Refusal(status, problem.replace(ours, theirs) + at);
    }
  }
  const all = firstOf(problems).join("; ");
  return new Refusal(status, isBad ? `bad request body: ${all}` : all);
}

/** A control API that is served. */
export interface ApiServer extends AsyncDisposable {
  /** Where it listens, `host:port`, the port really taken. */
  readonly address: string;
  /** Stops listening; cuts off calls under way. */
  close(): Promise<void>;
}

/**
 * Serves {@linkcode controlApi} until it is closed, also during the drain.
 * Throws `TypeError` if the address is not valid, or {@linkcode ListenError}.
 */
export function serveApi(
  proxy: ChaosProxy,
  address: number | string = 8474,
  { onEvent = () => {} }: ApiOptions = {},
): ApiServer {
  const asked = splitApi(address);
  if (asked === undefined) {
    throw new TypeError(`address: ${mismatch(apiAddress, address)}`);
  }
  const stop = new AbortController();
  const { signal } = stop;
  const serve = (at: Address) =>
    serveHttp("control API", at, (request) => answer(request), signal);
  const server = serve(asked);
  const { addr } = server;
  const loopback = isLoopback(addr.hostname); // as it was resolved
  const answer = controlApi(proxy, { onEvent, loopback });
  onEvent({ event: "api_listening", address: addressOf(addr) });
  // A server that finds no file descriptor ends for good; another one starts.
  const served = (async () => {
    for (let next = () => server; !signal.aborted; next = () => serve(addr)) {
      try {
        return await next().finished;
      } catch (error) {
        onEvent({ event: "api_failed", cause: causeOf(error) });
      }
      await sleep(ACCEPT_PAUSE_MS, signal);
    }
  })();
  const close = () => {
    stop.abort();
    return served;
  };
  return { address: addressOf(addr), close, [Symbol.asyncDispose]: close };
}

/** @throws {ListenError} If the address cannot be listened on. */
function serveHttp(
  what: string,
  address: Address,
  handler: Deno.ServeHandler,
  signal?: AbortSignal,
): Deno.HttpServer<Deno.NetAddr> {
  const hostname = canonicalHost(address.hostname);
  try {
    return Deno.serve({ ...address, hostname, signal, onListen() {} }, handler);
  } catch (error) {
    throw new ListenError(what, addressOf(address), error);
  }
}

/** The metrics, in the text format of Prometheus. */
function metrics(stats: RouteStats[]): string {
  const counts = (of: "ended" | "faults", label: string) =>
    stats.flatMap(({ route: { name: proxy }, [of]: counted }) =>
      Object.entries(counted).map(([key, value]) =>
        sample({ proxy, [label]: key }, value)
      )
    );
  const bytes = (of: "received" | "sent") =>
    stats.flatMap(({ route, [of]: counted }) => {
      const { name: proxy, listen: listener, upstream } = asProxy(route);
      return Object.entries(counted).map(([direction, value]) =>
        sample({ direction, listener, proxy, upstream }, value)
      );
    });
  const families: Record<string, [help: string, samples: string[]]> = {
    "counter toxiproxy_proxy_received_bytes_total": [
      "Bytes read: upstream, from clients; downstream, from the upstream.",
      bytes("received"),
    ],
    "counter toxiproxy_proxy_sent_bytes_total": [
      "Bytes written: upstream, to the upstream; downstream, to clients.",
      bytes("sent"),
    ],
    "counter chaos_proxy_connections_total": [
      "Connections that have ended, by why.",
      counts("ended", "outcome"),
    ],
    "gauge chaos_proxy_connections_open": [
      "Connections in flight.",
      stats.map(({ route, open }) => sample({ proxy: route.name }, open)),
    ],
    "histogram chaos_proxy_dial_seconds": [
      "How long it took to reach the upstream.",
      stats.flatMap(({ route: { name: proxy }, dials }) => [
        ...DIAL_BOUNDS_MS.map((bound, i) => {
          const le = `${bound / 1000}`;
          return sample({ proxy, le }, dials.within[i] ?? 0, "_bucket");
        }),
        sample({ proxy, le: "+Inf" }, dials.count, "_bucket"),
        sample({ proxy }, dials.totalMs / 1000, "_sum"),
        sample({ proxy }, dials.count, "_count"),
      ]),
    ],
    "counter chaos_proxy_faults_total": [
      "How often a fault was injected into a connection, by its kind.",
      counts("faults", "kind"),
    ],
    "gauge chaos_proxy_build_info": [
      "What is running.",
      [sample({ version: deno.version, deno: Deno.version.deno }, 1)],
    ],
  };
  return Object.entries(families).map(([family, [help, samples]]) => {
    const [type, name] = family.split(" ");
    const lines = samples.map((each) => `${name}${each}\n`).join("");
    return `# HELP ${name} ${help}\n# TYPE ${name} ${type}\n${lines}`;
  }).join("");
}

/** A sample of a metric, without the metric's name before it. */
function sample(labels: Record<string, string>, value: number, suffix = "") {
  // Of what these labels can hold, Prometheus escapes the same as JSON.
  const listed = Object.entries(labels)
    .map(([name, text]) => `${name}=${JSON.stringify(text)}`);
  return `${suffix}{${listed}} ${value}`;
}

// ---- Logging: an event, a line ----------------------------------------------

type LogLevel = "debug" | "info" | "warn" | "error";

type LogEvent =
  | ProxyEvent
  | ApiEvent
  /** So many lines were lost here: the log could not be written fast enough. */
  | { event: "log_dropped"; lines: number }
  /** A SIGHUP came, which ends other programs; nothing was done. */
  | { event: "sighup_ignored" };

type EventName = LogEvent["event"];
type EventOf<E extends EventName> = LogEvent & { event: E };

/** What a line of text says after the name of an event. */
const TEXTS: { [E in EventName]: (event: EventOf<E>) => string } = {
  listening: ({ address, upstream, faults }) =>
    ` ${address} -> ${upstream} (${faults})`,
  started: ({ routes, seed }) => ` ${count(routes, "route")}, seed ${seed}`,
  accepted: ({ upstream }) => ` -> ${upstream}`,
  dropped: () => "",
  timed_out: ({ timeoutMs }) =>
    timeoutMs > 0 ? ` for ${timeoutMs} ms` : " until the client leaves",
  delayed: ({ delayMs }) => ` ${delayMs} ms`,
  connected: ({ upstream, address, dialMs, toxics }) =>
    ` ${upstream} at ${address} in ${dialMs} ms` +
    (toxics.length > 0 ? ` with ${toxics.join(", ")}` : ""),
  upstream_failed: ({ upstream, cause }) => ` ${upstream}: ${cause}`,
  closed({ why, cause, toxic, bytesUp, bytesDown, durationMs }) {
    const by = toxic ?? cause;
    return ` by ${why}${by ? ` (${by})` : ""}, ` +
      `${bytesUp} B up, ${bytesDown} B down, ${durationMs} ms`;
  },
  config_warning: ({ warnings }) => ` ${warnings.join(", ")}`,
  accept_failed: ({ cause }) => ` ${cause}`,
  route_added: ({ upstream, faults }) => ` -> ${upstream} (${faults})`,
  route_changed: ({ upstream, faults }) => ` -> ${upstream} (${faults})`,
  route_removed: () => "",
  toxic_added: ({ toxic, effect }) => ` ${toxic} (${effect})`,
  toxic_changed: ({ toxic, effect }) => ` ${toxic} (${effect})`,
  toxic_removed: ({ toxic }) => ` ${toxic}`,
  reseeded: ({ seed }) => ` with ${seed}`,
  api_listening: ({ address }) =>
    ` ${address}` +
    (isOpen(address) ? "; whoever reaches it can control it" : ""),
  api: ({ method, path, status, error, durationMs, request, ignored }) =>
    ` ${method} ${path}: ${status}${error ? ` ${error}` : ""}, ` +
    `${durationMs} ms, ${request}` +
    (ignored ? `, ignored ${ignored.join(", ")}` : ""),
  api_failed: ({ cause }) => ` ${cause}`,
  draining: ({ connections, timeoutMs }) =>
    ` ${count(connections, "connection")} in flight` +
    (timeoutMs > 0 ? ` for up to ${timeoutMs} ms` : "") +
    "; a second signal ends it at once",
  drained: ({ cut, durationMs }) =>
    cut > 0
      ? ` ${count(cut, "connection")} cut after ${durationMs} ms`
      : ` in ${durationMs} ms`,
  log_dropped: ({ lines }) => ` ${count(lines, "line")}`,
  sighup_ignored: () => "; nothing was done",
};

/** The events that are always warnings. */
const WARNINGS = new Set<EventName>([
  ...["upstream_failed", "accept_failed", "api_failed"] as const,
  ...["config_warning", "log_dropped", "sighup_ignored"] as const,
]);

function levelOf(event: LogEvent): LogLevel {
  const isWarning = WARNINGS.has(event.event) ||
    "ignored" in event ||
    ("cut" in event && event.cut > 0) ||
    (event.event === "api_listening" && isOpen(event.address));
  if (isWarning) return "warn";
  return event.event === "api" ? "debug" : "info";
}

/** Whether others than this machine may reach an address. */
function isOpen(address: string): boolean {
  return !isLoopback(splitAddress(address)?.hostname ?? "");
}

function count(number: number, what: string): string {
  return `${number} ${what}${number === 1 ? "" : "s"}`;
}

const MAX_QUEUED_LINES = 5000;
const LINES_A_WRITE = 64;
const WRITE_RETRY_MS = 100;
const MAX_STALL_MS = 2000;

/** Writes a problem to standard error; waits at most 2 s if nobody reads it. */
async function complain(problem: string): Promise<void> {
  const write = async () => {
    let bytes = new TextEncoder().encode(`chaos-proxy: ${problem}\n`);
    while (bytes.length > 0) {
      bytes = bytes.subarray(await Deno.stderr.write(bytes));
    }
  };
  const written = write().catch(() => {}); // there is nowhere else to say it
  await Promise.race([written, sleep(MAX_STALL_MS)]);
}

/**
 * Writes the events of a level and above to standard output, from a bounded
 * queue, so that nothing waits for a pipe that nobody reads, or fails on a full
 * disk. When the queue is full, lines are dropped until half of it is written.
 */
class EventLog extends BaseHandler implements AsyncDisposable {
  readonly add: (event: LogEvent) => void;
  readonly #lines: string[] = [];
  #dropped = 0;
  #writing: Promise<void> | undefined;
  #complaint: Promise<void> | undefined;

  /** In text, names of routes are aligned to a width, which grows as needed. */
  constructor(level: LogLevel, isJson: boolean, width: number) {
    const formatter = ({ datetime, levelName, args }: LogRecord): string => {
      const event = args[0] as LogEvent;
      const time = datetime.toISOString();
      const level = levelName.toLowerCase();
      if (isJson) return JSON.stringify({ time, level, ...event });
      const route = ("route" in event ? event.route : "").padEnd(width);
      width = route.length;
      const [number, client] = "connection" in event
        ? [`#${event.connection}`, event.client]
        : ["", ""];
      const source = `${route} ${number.padEnd(6)} ${client.padEnd(21)}`;
      const textOf = TEXTS[event.event] as (event: LogEvent) => string;
      const text = event.event + textOf(event);
      return `${time} ${levelName.padEnd(5)} ${source} ${text}`;
    };
    super("DEBUG", { formatter });
    const upper = level.toUpperCase() as Uppercase<LogLevel>;
    const logger = new Logger("chaos-proxy", upper, { handlers: [this] });
    this.add = (event) => logger[levelOf(event)](event.event, event);
  }

  override log(line: string): void {
    const isFull = this.#lines.length === MAX_QUEUED_LINES;
    if (isFull || this.#dropped > 0) this.#dropped++;
    else this.#lines.push(`${line}\n`);
    this.#writing ??= this.#write();
  }

  /** Resolves when all is written, or no line could be written for 2 s. */
  async [Symbol.asyncDispose](): Promise<void> {
    for (let left = Infinity; this.#writing && this.#lines.length < left;) {
      left = this.#lines.length;
      await Promise.race([this.#writing, sleep(MAX_STALL_MS)]);
    }
  }

  async #write(): Promise<void> {
    while (this.#lines.length > 0) {
      const text = this.#lines.splice(0, LINES_A_WRITE).join("");
      if (this.#dropped > 0 && this.#lines.length <= MAX_QUEUED_LINES / 2) {
        const lines = this.#dropped;
        this.#dropped = 0;
        this.add({ event: "log_dropped", lines });
      }
      let bytes = new TextEncoder().encode(text);
      while (bytes.length > 0) {
        try {
          bytes = bytes.subarray(await Deno.stdout.write(bytes));
        } catch (error) {
          const problem = `cannot write the log: ${causeOf(error)}`;
          await (this.#complaint ??= complain(problem));
          await sleep(WRITE_RETRY_MS);
        }
      }
    }
    this.#writing = undefined;
  }
}

// ---- CLI: arguments, load, run, signals, exit codes -------------------------

const DEMO = { hostname: LOOPBACK, port: 18000 };

const HELP =
  `chaos-proxy ${deno.version}: forwards TCP connections by local port, injecting faults

Usage: chaos-proxy [options] <config>
  <config>             YAML, or JSON if its name ends in .json; none with --api

Options:
  --api [host:]port    serve the control API there, in Toxiproxy's protocol
  -host, -port, -config, -seed, -version: as in toxiproxy-server
  --check              check the config, print its routes and faults, and exit
  --seed <number>      use this seed instead of the config's
  --drain-timeout <ms> wait this long for open connections; 0 waits for ever
  --log-level <level>  debug, info (the default), warn or error
  --log-format <form>  text (the default) or json; each event is one line
  --demo               serve HTTP on ${addressOf(DEMO)}, the upstream of the
                       example config; without <config>, run the example
  -h, --help           print this help and exit
  -V, --version        print the version and exit

Example:
  chaos-proxy --seed 42 config.yaml

SIGINT and SIGTERM wait for open connections, up to the drain timeout. A later
second signal ends the process at once. Exit codes: 0 a clean end; 1 a failure,
or connections were cut; 2 a wrong argument or config.`;

const LOG_LEVEL = oneOf<LogLevel>("debug", "info", "warn", "error");
/** Options of toxiproxy-server's that change nothing: metrics are always on. */
const METRICS = ["proxy-metrics", "runtime-metrics"] as const;
const FLAGS = ["check", "demo", "help", "version", ...METRICS] as const;
const SETTINGS = [
  ...["api", "drain-timeout", "log-format", "log-level"] as const,
  ...["config", "host", "port", "seed"] as const, // also toxiproxy-server's
] as const;
const OPTIONS = [...FLAGS, ...SETTINGS].map((name) => `--${name}`);
const WRONG_FLAG = RegExp(`^--(?:${FLAGS.join("|")})=(?!(?:true|false)$)`);

type CommandLine = ReturnType<typeof readCommandLine>;

/** @throws {ConfigError} If an argument is unknown, missing or wrong. */
function readCommandLine(written: string[]) {
  const end = [...written, "--"].indexOf("--");
  const operands = written.slice(end + 1);
  const args = written.slice(0, end)
    .map((arg) => arg.replace(/^-(?=[a-z][a-z-])/, "--")); // one dash will do
  const wrong = args.find((arg) => WRONG_FLAG.test(arg));
  if (wrong) {
    throw new ConfigError(wrong, ["expected true or false, or no value"]);
  }
  const flags = parseArgs(args, {
    boolean: FLAGS,
    string: SETTINGS,
    alias: { help: "h", version: "V" },
    unknown: (arg) => {
      if (/^-./.test(arg)) {
        const name = arg.replace(/=.*/s, "");
        const hint = /^-\d/.test(name)
          ? "; no option takes a negative number"
          : hintForKey(name, OPTIONS);
        throw new ConfigError(name, [`unknown option${hint}`]);
      }
      operands.push(arg); // as it was written: `_` has `1e3` as a number
      return false;
    },
  });

  function read<T>(name: typeof SETTINGS[number], guard: Guard<T>) {
    const text = flags[name];
    if (text === undefined) return undefined;
    const value = guard.is(text) || !/^\d+$/.test(text) ? text : Number(text);
    if (guard.is(value)) return value;
    throw new ConfigError(`--${name}`, [mismatch(guard, text)]);
  }

  const { check, config, demo, help, version } = flags;
  if (config !== undefined) operands.push(config);
  const host = read("host", listenHost);
  const port = read("port", integer(0, 65535));
  let api = read("api", apiAddress);
  if (api !== undefined && (host ?? port) !== undefined) {
    throw new ConfigError("--api", ["write either this, or --host and --port"]);
  }
  if ((host ?? port ?? config) !== undefined) {
    api ??= addressOf({ hostname: host ?? "localhost", port: port ?? 8474 });
  }
  const needsFile = !demo && (check || api === undefined);
  const isWrong = operands.length > 1 || (operands.length < 1 && needsFile);
  if (isWrong && !help && !version) {
    const found = operands.join(" and ") ||
      "none; to run without one, write --api 8474";
    throw new ConfigError("<config>", [`expected one file, found ${found}`]);
  }
  return {
    ...{ check, demo, help, version },
    file: operands.at(0),
    /** Whether all routes come from the API. */
    isDriven: operands.length === 0 && !demo,
    /** Takes precedence over the config. */
    given: {
      seed: read("seed", CONFIG_FIELDS.seed.guard),
      drainTimeoutMs: read("drain-timeout", milliseconds),
      api,
    },
    logLevel: read("log-level", LOG_LEVEL) ?? "info",
    isJson: read("log-format", oneOf("text", "json")) === "json",
  };
}

/** @throws {ConfigError} If the file cannot be read or is no text. */
async function readText(path: string): Promise<string> {
  try {
    const { readable } = await Deno.open(path);
    const decoder = new TextDecoderStream("utf-8", { fatal: true });
    let text = "";
    for await (const part of readable.pipeThrough(decoder)) {
      text += part;
      if (text.length > MAX_CONFIG_BYTES) break; // it may have no end
    }
    return text;
  } catch (error) {
    const problem = error instanceof TypeError
      ? "expected text in UTF-8, found other bytes"
      : causeOf(error);
    throw new ConfigError(path, [problem]);
  }
}

/** A table of the routes and their faults. */
function summarize(config: Config, path: string): string {
  const { routes, seed, drainTimeoutMs, api } = config;
  const limit = drainTimeoutMs > 0
    ? `within ${drainTimeoutMs} ms`
    : "without a limit";
  const summary = `${path}: ${count(routes.length, "route")}, ` +
    `${seed === undefined ? "a random seed" : `seed ${seed}`}, drain ${limit}` +
    (api === undefined ? "" : `, api ${api}`);
  const table = [
    ["ROUTE", ...routes.map(({ name }) => name)],
    ["LISTEN", ...routes.map((route) => asProxy(route).listen)],
    ["UPSTREAM", ...routes.map(({ upstream }) => upstream)],
    ["FAULTS", ...routes.map(describeFaults)],
  ].reduce((lines, column) => {
    const width = Math.max(...lines.map(({ length }) => length));
    return lines.map((line, row) => `${line.padEnd(width)}  ${column[row]}`);
  });
  const warnings = firstOf(routes.flatMap(warningsOf))
    .map((each) => `warning: ${each}`);
  return [summary, ...table, ...warnings].join("\n");
}

/** Runs until a signal ends it; resolves to the exit code. */
async function run(config: Config, line: CommandLine): Promise<number> {
  const stop = signal();
  const { api, routes } = config;
  const width = Math.max(0, ...routes.map(({ name }) => name.length));
  await using log = new EventLog(line.logLevel, line.isJson, width);
  const onEvent = log.add;
  const isDemo = ({ upstream }: Route) => upstream === addressOf(DEMO);
  if (line.demo && routes.some(isDemo)) {
    const hello = "Hello from behind the proxy!\n";
    serveHttp("demo upstream", DEMO, ({ body }) => new Response(body ?? hello));
  }
  const resettable = api !== undefined; // as the API may add a `reset_peer`
  await using proxy = await ChaosProxy.start(config, { onEvent, resettable });
  await using _api = api ? serveApi(proxy, api, { onEvent }) : null;
  const onHangUp = () => onEvent({ event: "sighup_ignored" });
  if (!IS_WINDOWS) Deno.addSignalListener("SIGHUP", onHangUp);
  await stop;
  // A terminal and the task runner may both pass on the same Ctrl-C.
  sleep(SAME_SIGNAL_MS).then(signal).then(async () => {
    await complain("ended at once by a second signal");
    Deno.exit(1);
  });
  const cut = await proxy.drain();
  // 0 as from Toxiproxy, which test suites stop while connections are open.
  return cut > 0 && !line.isDriven ? 1 : 0;
}

const SAME_SIGNAL_MS = 500;
const IS_WINDOWS = Deno.build.os === "windows";
const SIGNALS = ["SIGINT", IS_WINDOWS ? "SIGBREAK" : "SIGTERM"] as const;

function signal(): Promise<void> {
  return new Promise((resolve) => {
    for (const each of SIGNALS) Deno.addSignalListener(each, resolve);
  });
}

/** What the command line asks for; resolves to the exit code. */
async function main(args: string[]): Promise<number> {
  try {
    const line = readCommandLine(args);
    if (line.help || line.version) {
      console.log(line.help ? HELP : `chaos-proxy ${deno.version}`);
      return 0;
    }
    const path = line.file ?? "config.example.yaml";
    const builtIn = line.isDriven ? "drainTimeoutMs: 1000" : example;
    const text = line.file === undefined ? builtIn : await readText(path);
    const config = parseConfig(text, path, line.given);
    if (!line.check) return await run(config, line);
    console.log(summarize(config, path));
    return 0;
  } catch (error) {
    const isConfig = error instanceof ConfigError;
    if (!isConfig && !(error instanceof ListenError)) throw error;
    await complain(error.message);
    return isConfig ? 2 : 1;
  }
}

if (import.meta.main) Deno.exit(await main(Deno.args));
