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

import { parse as parseYaml, stringify } from "@std/yaml";
import { parseArgs } from "@std/cli/parse-args";
import { BaseHandler, Logger, type LogRecord } from "@std/log";
import dns from "node:dns/promises";
import { Buffer } from "node:buffer";
import { addAbortListener, once } from "node:events";
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

  /** Each of a source's problems begins with a path: `routes[0].name: …`. */
  constructor(source: string, readonly problems: readonly string[]) {
    const all = [`${problems.length} problems`, ...firstOf(problems)];
    const shown = problems.length === 1 ? problems : all;
    super(`${source}: ${shown.join("\n  ")}`);
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

function checkArgument(name: string, value: unknown, guard: Guard<unknown>) {
  if (guard.is(value)) return;
  throw new RangeError(`${name}: ${mismatch(guard, value)}`);
}

/** A type guard, and what it expects, in words and as a JSON Schema. */
interface Guard<T> {
  readonly expected: string;
  readonly schema: object;
  is(value: unknown): value is T;
}

function guard<T>(
  expected: string,
  isType: (value: unknown) => value is T,
  isGood: (value: T) => boolean = () => true,
  schema: object = {},
): Guard<T> {
  const is = (value: unknown): value is T => isType(value) && isGood(value);
  return { expected, schema, is };
}

const isText = (value: unknown) => typeof value === "string";
const isNumber = (value: unknown) => typeof value === "number";

const inRange =
  (article: string, type: string, isKind: (value: number) => boolean) =>
  (minimum: number, maximum: number) =>
    guard(
      `${article} ${type} from ${minimum} to ${maximum}`,
      isNumber,
      (value) => isKind(value) && value >= minimum && value <= maximum,
      { type, minimum, maximum },
    );
const integer = inRange("an", "integer", Number.isSafeInteger);
const number = inRange("a", "number", Number.isFinite);
const milliseconds = integer(0, MAX_MS);
const rate = number(0, 1);
const like = ({ source }: RegExp) => ({ type: "string", pattern: source });
const matching = (expected: string, pattern: RegExp) =>
  guard(expected, isText, (text) => pattern.test(text), like(pattern));
const routeName = matching(
  "1 to 255 characters without white space, not . or ..",
  /^(?!\.{1,2}$)[^\s\p{C}]{1,255}$/u,
);
const mapping = guard("a mapping", isRecord, undefined, { type: "object" });
const yesOrNo = oneOf(true, false);

/** How to check a field, and its default. */
interface Field<T> {
  /** What else must be set, or be a value: `name` or `name: value`. */
  readonly needs?: string;
  readonly guard: Guard<T>;
  readonly default?: T;
  readonly optional?: true;
  /** The fields of a mapping, or the items of a list. */
  readonly fields?: Fields<Record<string, unknown>>;
  readonly items?: Field<unknown>;
  /** Converts a good value, or refuses one that contradicts itself. */
  as?(value: T, place: Place): T | undefined;
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
  const nameOf = ([key]: [string, unknown]) => names.get(fold(key));
  const written = Map.groupBy(Object.entries(value), nameOf);
  for (const [key] of written.get(undefined) ?? []) {
    if (place.problems.length >= MAX_PROBLEMS) break;
    if (place.ignored) place.at(key).ignore();
    else place.at(key).refuse(`unknown key${hintForKey(key, known)}`);
  }
  const good: Draft<T> = {};
  for (const name of known) {
    const { guard, optional, normalize, default: fallback } = fields[name];
    const [[key, given] = [], ...others] = written.get(name) ?? [];
    for (const [other] of others) {
      place.at(other).refuse(`the same key as ${key}; write one`);
    }
    let found = place.ignored ? given ?? undefined : given;
    if (place.ignored && found !== undefined && normalize) {
      found = normalize(found, place.at(name));
    }
    if (found === undefined && !isChange) {
      const isZero = place.ignored && !optional && guard.is(0);
      found = fallback ?? (isZero ? 0 : undefined);
    }
    if (found !== undefined) {
      const checked = checkValue(found, place.at(name), fields[name]);
      if (checked !== undefined) good[name] = checked;
    } else if (!isChange && !optional) {
      place.at(name).refuse(`missing; expected ${guard.expected}`);
    }
  }
  return good;
}

/** Returns a value with what it holds; undefined if its type is wrong. */
function checkValue<T>(value: unknown, place: Place, field: Field<T>) {
  const { guard, fields, items, as } = field;
  if (!guard.is(value)) return void place.refuse(mismatch(guard, value));
  const { problems: { length } } = place;
  let whole: unknown = value;
  if (fields && isRecord(value)) whole = checkFields(value, place, fields);
  else if (items && Array.isArray(value)) {
    whole = value.map((each, i) => checkValue(each, place.at(i), items));
  }
  if (place.problems.length > length) return whole as T; // it was refused
  return as?.(whole as T, place) ?? whole as T;
}

/** The JSON Schema of a mapping with these fields. */
function schemaOf(fields: Fields<Record<string, unknown>>) {
  const properties: Record<string, object> = {};
  const required: string[] = [];
  for (const [name, { guard, needs, ...field }] of Object.entries(fields)) {
    const { expected, schema } = guard;
    const description = needs ? `${expected}; needs ${needs}` : expected;
    const inner = schema === mapping.schema && field.fields;
    const more = inner ? schemaOf(inner) : schema;
    properties[name] = { description, default: field.default, ...more };
    if (!field.optional && field.default === undefined) required.push(name);
  }
  return { type: "object", properties, required, additionalProperties: false };
}

/** Where keys belong, the outermost level first; each section adds its own. */
const LEVELS: (readonly [place: string, fields: object])[] = [];

function hintForKey(key: string, known: readonly string[]): string {
  const meant = nearest(key, known);
  const level = LEVELS.find(([, fields]) => Object.hasOwn(fields, key));
  if (level && !meant?.startsWith(key)) {
    return ` on this level; it belongs ${level[0]}`;
  }
  if (meant !== undefined) return `; did you mean ${meant}?`;
  return `; known are ${known.join(", ")}`;
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
  const isItem = isRecord(found) && guard.is([found]);
  if (isItem) return '; write a list, of which each item begins with "- "';
  if (typeof found !== "string" || found.length > 1000) return "";
  const [, amount, unit = ""] = /^ *([\d.]+) *(%|ms|s)? *$/.exec(found) ?? [];
  const scaled = Number(`${amount}${EXPONENTS[unit] ?? ""}`);
  const joined = found.trim().replace(/\s+/g, "-");
  const [, server] = /^(?:[\w+.-]+:\/\/)?(?:.*@)?([^/?#]+)/s.exec(found) ?? [];
  const turned = found.replace(/^(\d+)-(\d+)$/, "$2-$1");
  const likely = [scaled, joined, server, turned];
  const written = likely.find((each) => guard.is(each));
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
  const whole = isText(value) ? JSON.stringify(value) : String(value);
  const text = whole.replace(PASSWORD, "$1***@");
  return text.length <= 60 ? text : `${text.slice(0, 57)}…${text.at(-1)}`;
}

/** The candidate with half of the letter pairs, or all letters but one. */
function nearest(name: string, candidates: readonly string[]) {
  const pairsOf = (word: string) =>
    new Set(
      [...word.toLowerCase()].map((one, i, all) => `${one}${all[i + 1]}`),
    );
  const pairs = pairsOf(name);
  const likeness = (word: string) => {
    const others = pairsOf(word);
    return 2 * pairs.intersection(others).size / (pairs.size + others.size);
  };
  const most = Math.max(...candidates.map(likeness));
  if (most >= 0.5) return candidates.find((each) => likeness(each) === most);
  return candidates.find((each) =>
    each.length === name.length &&
    [...each].filter((letter, i) => letter !== name[i]).length === 1
  );
}

/** Toxiproxy, which is written in Go, takes an empty text as left out. */
const unlessEmpty = (text: unknown) => text === "" ? undefined : text;
const lowerCase = (text: unknown) => isText(text) ? text.toLowerCase() : text;

const LOOPBACK = "127.0.0.1";
const ALL_ADDRESSES = "0.0.0.0";

const inUrl = (host: string) => host.includes(":") ? `[${host}]` : host;

/** Whether it is a host name or an IP address, an IPv6 one without brackets. */
const isHost = (host: string) =>
  HOST.test(host) && URL.canParse(`http://${inUrl(host)}`);
const HOST = /^(?=.{1,255}$)(?!.*\.\.)(?:\w+(?:[.-]+\w+)*\.?|\w*:\w*:[\w:.]*)$/;

type Address = Pick<Deno.NetAddr, "hostname" | "port">;
const ADDRESS = /^(?:\[(.*:.*)\]|([\w.-]+)):(\d{1,5})$/;

/** Splits `host:port`; a default `host` also allows `:port` and the port 0. */
function splitAddress(address: string, host?: string): Address | undefined {
  const whole = address.replace(/^:/, `${host ?? ""}:`);
  const [, ipv6, other = "", digits] = ADDRESS.exec(whole) ?? [];
  const [hostname, port] = [ipv6 ?? other, Number(digits)];
  const lowest = host === undefined ? 1 : 0; // to listen on, 0 is a free port
  const isGood = isHost(hostname) && port >= lowest && port <= 65535;
  return isGood ? { hostname, port } : undefined;
}

/** A host to compare or to listen on; `localhost` is taken as 127.0.0.1. */
function canonicalHost(host: string): string {
  const { hostname } = new URL(`http://${inUrl(host)}`);
  return hostname.replace(/^localhost\.?$/, LOOPBACK).replace(/[[\]]/g, "");
}

/** Whether two canonical hosts overlap: `0.0.0.0` covers IPv4, and `::` all. */
function overlaps(a: string, b: string): boolean {
  return a === b || [a, b].includes("::") ||
    ([a, b].includes(ALL_ADDRESSES) && !`${a}${b}`.includes(":"));
}

/** Whether it is a loopback address, also one of IPv4 written as IPv6. */
const isLoopback = (address: string) =>
  /^(?:(?:::ffff:)?127(?:\.\d+){3}|::1)$/i.test(address);

/** Whether a connection to one host reaches a listener on the other. */
function reaches(upstreamHost: string, listenHost: string): boolean {
  const [to, at] = [canonicalHost(upstreamHost), canonicalHost(listenHost)];
  const isOwn = (host: string) => overlaps(host, LOOPBACK) || isLoopback(host);
  return overlaps(to, at) && (to === at || (isOwn(to) && isOwn(at)));
}

const addressOf = ({ hostname, port }: Address) => `${inUrl(hostname)}:${port}`;

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
  | "stall"
  | "random_close"
  | "duplicate"
  | "inject"
  | "reorder"
  | "noop";

/** A fault on the bytes of one direction, written as in Toxiproxy. */
export interface ToxicOptions extends Occasion {
  /** What it does. */
  type: ToxicType;
  /** What it is called, unique on its route. Default: `<type>_<stream>`. */
  name?: string;
  /** The direction it acts on. Default: downstream. */
  stream?: Stream;
  /** The probability, 0 to 1, that it acts on a connection. Default: 1. */
  toxicity?: number;
  /** The attributes of its type; what is left out takes its default. */
  attributes?: Readonly<Record<string, number | string | boolean>>;
}

/** When a toxic acts. What is left out does not limit it. */
export type Occasion = {
  /** On which of the route's connections. */
  connections?: Connections;
  /** At which times. */
  schedule?: Schedule;
  /** What must have passed it on the connection before it acts. */
  after?: Trigger;
};

/** A number of bytes, or a pattern of 1 to 256 bytes. */
export type Trigger = { bytes?: number; match?: Pattern };

/** Numbers: `2`, `"1-3"`, `"5-"`, `"*\/3"` for each third, or a list of these. */
export type Connections = number | string | readonly (number | string)[];

/** A text, in UTF-8, or bytes. */
export type Pattern = string | { hex: string };

/**
 * On after `afterMs` (default: 0) for `forMs` (for ever), again every `everyMs`
 * (never). Times are in ms, from the start or the last new seed of the proxy
 * (`start`, the default), or from the acceptance of the `connection`.
 */
export type Schedule = {
  afterMs?: number;
  forMs?: number;
  everyMs?: number;
  from?: "start" | "connection";
};

/** A toxic with every default filled in, those of its attributes too. */
export type Toxic = Readonly<
  Required<Omit<ToxicOptions, keyof Occasion>> & Occasion
>;

type Attributes = Toxic["attributes"];

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
  /** Processes bytes or a mark. */
  take(timed: TimedChunk): void;
  /** Sets all attributes. What it holds is then processed again. */
  change(attributes: Toxic["attributes"], at: number, lastLeft: number): void;
  /** Called when the toxic is removed, before what it holds is released. */
  end(at: number): void;
}

/** A type of toxic: how it is checked, described and started. */
interface ToxicDefinition<A = Attributes> {
  readonly attributes: Fields<A>;
  /** Whether it is counted as a fault once it hits something, not at once. */
  readonly byChance?: true;
  /** Refuses attributes that contradict each other. */
  check?(attributes: Readonly<A>, place: Place): void;
  /** What it does, in words. */
  inWords(attributes: Readonly<A>): string;
  /** Starts it, again after each change. Returns what processes each chunk. */
  begin(attributes: Readonly<A>, out: Queue): ActiveToxic["take"];
  /** Called when it is removed, before what it holds is released. */
  end?(at: number, out: Queue): void;
  /** The line that it stands for: B/ms, bytes that may wait, if shared. */
  line?(of: Readonly<A>): [rate: number, buffer: number, shared: unknown];
}

/** Infers the attributes from their fields. */
function define<A>(toxic: ToxicDefinition<A>): ToxicDefinition {
  return toxic as unknown as ToxicDefinition;
}

const share = (fallback: number) => ({ guard: rate, default: fallback });
const whole = { guard: integer(0, Number.MAX_SAFE_INTEGER), default: 0 };
const ms = { guard: milliseconds, default: 0 };
const kbPerS = { ...whole.guard, expected: "an integer from 0, in KB/s" };
const flag = oneOf<boolean | 1 | 0>(true, false, 1, 0);
const percent = (share: number) => `${Number((share * 100).toPrecision(6))}%`;
const plusMinus = (by: number) => by > 0 ? `±${by}` : "";
const sizeOf = ({ what }: TimedChunk) => isText(what) ? 0 : what.length;
const listed = (more: object) =>
  Object.entries(more).filter(([, value]) => value)
    .map(([name, value]) => `, ${name} ${inWords(value)}`).join("");
const inWords = (value: unknown) =>
  /^[\w.*/-]+$/.test(`${value}`) ? value : JSON.stringify(value);
const optional = <T>(guard: Guard<T>, needs?: string) =>
  ({ guard, optional: true, needs }) as const;

/** How far a delay lies from `latency`, in units of `jitter`. */
const SPREADS = {
  uniform: (random: () => number) => 2 * random() - 1,
  normal: (random: () => number) =>
    Math.sqrt(-2 * Math.log1p(-random())) * Math.cos(2 * Math.PI * random()),
  pareto: (random: () => number, shape: number) =>
    Math.min(100, (1 - random()) ** (-1 / shape) - 1),
};

/** From -1 to 1, by the share of the period that has passed. */
const WAVES = {
  sine: (share: number) => Math.sin(2 * Math.PI * share),
  square: (share: number) => share < 0.5 ? 1 : -1,
  triangle: (share: number) => 1 - 4 * Math.abs((share + 0.25) % 1 - 0.5),
  sawtooth: (share: number) => 2 * share - 1,
};

const PACKET_BYTES = 1460; // in a full TCP segment on Ethernet

type Packet = { at: number; what: Uint8Array<ArrayBuffer> };

/**
 * Decides by a packet's position in the stream, not by how it was read. `act`
 * processes each piece of a packet that is hit, and returns if it keeps it.
 */
function onPackets<A>(
  verb: string,
  others: Fields<A>,
  act: (packet: Packet, out: Queue, all: Readonly<A>, draw: number) => unknown,
): ToxicDefinition {
  return define<A & { rate: number }>({
    attributes: { rate: share(0.1), ...others } as Fields<A & { rate: number }>,
    byChance: true,
    inWords: ({ rate, ...more }) =>
      `${verb} ${percent(rate)} of packets${listed(more)}`,
    begin(all, out) {
      const salt = 2 ** 32 * out.random();
      let [position, left, draw] = [0, 0, 1]; // `left` of a packet
      return ({ at, what }) => {
        if (typeof what === "string" || all.rate === 0) {
          out.release();
          return out.pass({ at, what });
        }
        for (let start = 0; start < what.length;) {
          const isNext = out.kept.length > 0; // behind one that is kept
          const begins = left === 0;
          if (begins) {
            left = PACKET_BYTES - position % PACKET_BYTES;
            draw = isNext ? 1 : (hash(`${position}`, salt) >>> 0) / 2 ** 32;
          }
          const piece = what.subarray(start, start + left);
          start += piece.length;
          position += piece.length;
          left -= piece.length;
          // The last packet of a long read may continue in the next read.
          if (start === what.length && start < PACKET_BYTES) left = 0;
          const acts = draw < all.rate && (begins || isNext);
          if (acts) out.hit();
          const packet = { at, what: piece };
          const keeps = (acts ? act : out.pass)(packet, out, all, draw);
          if (left === 0 && !keeps) out.release();
        }
      };
    },
  });
}

/** All types: a new one takes an entry here and its name in `ToxicType`. */
const TOXICS: Readonly<Record<ToxicType, ToxicDefinition>> = {
  latency: define({
    attributes: {
      latency: ms,
      jitter: ms,
      distribution: optional(oneOf("uniform", "normal", "pareto"), "jitter"),
      shape: optional(number(1.2, 10), "distribution: pareto"),
      correlation: optional(rate, "jitter"),
      wave: optional(
        oneOf("sine", "square", "triangle", "sawtooth"),
        "amplitude and period",
      ),
      amplitude: optional(integer(1, MAX_MS), "wave"),
      period: optional(integer(1, MAX_MS), "wave"),
      phase: optional(rate, "wave"),
    },
    inWords: ({ latency, jitter, ...more }) =>
      `+${latency}${plusMinus(jitter)} ms${listed(more)}`,
    begin({ latency, jitter, correlation = 0, ...more }, out) {
      const { distribution = "uniform", shape = 3 } = more;
      const { wave = "sine", amplitude = 0, period = 1, phase = 0 } = more;
      const draw = () => SPREADS[distribution](out.random, shape);
      let spread = correlation && draw();
      return ({ at, what }) => {
        if (!correlation || out.random() >= correlation) spread = draw();
        const periods = (at - out.clock.epoch) / period + phase;
        const swing = amplitude * WAVES[wave](periods - Math.floor(periods));
        const off = typeof what === "string" ? 0 : jitter * spread;
        out.pass({ at: at + Math.max(0, latency + off + swing), what });
      };
    },
  }),

  bandwidth: define({
    attributes: {
      rate: { guard: kbPerS },
      shared: { guard: flag, optional: true, as: Number },
      buffer: { guard: integer(1, Number.MAX_SAFE_INTEGER), optional: true },
    },
    inWords: ({ rate, shared }) =>
      rate > 0 ? `${shared ? "shares " : ""}${rate} KB/s` : "holds all data",
    line: ({ rate, shared, buffer = 64 * 1024 }) => [rate, buffer, shared],
    begin: ({ rate, shared }, out) => ({ at, what }) => {
      if (shared && rate > 0) return out.pass({ at: Infinity, what });
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
    begin({ average_size, size_variation, delay }, out) {
      let left = 0; // bytes up to the next cut, also across chunks
      return ({ at, what }) => {
        const due = () => Math.max(at, out.last + delay / 1000);
        if (typeof what === "string") return out.pass({ at: due(), what });
        for (let start = 0; start < what.length;) {
          if (left === 0) {
            const size = average_size + (2 * out.random() - 1) * size_variation;
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
    attributes: {
      loss_rate: share(0.1),
      correlation: share(0),
      burst: optional(number(1, 1_000_000), "correlation: 0"),
    },
    byChance: true,
    check({ loss_rate, burst }, place) {
      const least = loss_rate < 1 ? loss_rate / (1 - loss_rate) : 1;
      if (burst === undefined || burst >= least) return;
      const expected = `at least ${least.toPrecision(6)} with this loss_rate`;
      place.at("burst").refuse(`expected ${expected}, found ${burst}`);
    },
    inWords: ({ loss_rate, ...more }) =>
      `loses ${percent(loss_rate)} of chunks${listed(more)}`,
    begin({ loss_rate, correlation, burst }, out) {
      const lost = loss_rate + correlation * (1 - loss_rate);
      const [again, anew] = burst && loss_rate < 1
        ? [1 - 1 / burst, loss_rate / (1 - loss_rate) / burst]
        : [lost, loss_rate];
      let chance = loss_rate;
      return (timed) => {
        if (typeof timed.what === "string") return out.pass(timed);
        const isLost = out.random() < chance;
        if (isLost) out.hit();
        chance = isLost ? again : anew;
        if (!isLost) out.pass(timed);
      };
    },
  }),

  corrupt: define({
    attributes: { rate: share(0.001) },
    byChance: true,
    inWords: ({ rate }) => `flips a bit in ${percent(rate)} of bytes`,
    begin({ rate }, out) {
      // Geometric: one draw a flip, not a byte. At a rate of 0 it is Infinity.
      const spared = () =>
        Math.floor(Math.log1p(-out.random()) / Math.log1p(-rate));
      let next = spared();
      return ({ at, what }) => {
        if (typeof what === "string") return out.pass({ at, what });
        for (; next < what.length; next += 1 + spared()) {
          out.hit();
          what[next] = (what[next] ?? 0) ^ (1 << Math.floor(out.random() * 8));
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

  stall: onPackets(
    "stalls",
    { duration: { guard: milliseconds, default: 200 } },
    ({ at, what }, out, { duration }) => out.pass({ at: at + duration, what }),
  ),

  random_close: onPackets(
    "ends at",
    { reset: { guard: flag, default: 0, as: Number } },
    ({ at, what }, out, { reset }) => {
      if (reset) out.cut(at, "reset");
      else out.pass({ at, what: "close" });
      out.pass({ at: Infinity, what }); // and so all that follows
    },
  ),

  duplicate: onPackets("repeats", {}, (packet, out) => {
    out.kept.push({ ...packet, what: packet.what.slice() });
    out.pass(packet);
  }),

  inject: onPackets(
    "injects before",
    { bytes: { guard: integer(1, 65_536), default: 16 } },
    (packet, out, { bytes }, draw) => {
      const random = randomStream(draw);
      const length = 1 + Math.floor(random() * bytes);
      const noise = Uint8Array.from({ length }, () => random() * 256);
      out.pass({ at: packet.at, what: noise });
      out.pass(packet);
    },
  ),

  reorder: onPackets("reorders", {}, (packet, out) => out.kept.push(packet)),

  noop: define({
    attributes: {},
    inWords: () => "nothing",
    begin: (_, out) => out.pass,
  }),
};

/** A toxic at work, and its output: no chunk is due before the last one. */
class Queue implements ActiveToxic, ToxicOutput {
  /** Chunks that leave after later ones. */
  readonly kept: TimedChunk[] = [];
  /** When the last chunk is due; after a change, when the last to leave was. */
  last = -Infinity;
  /** The bytes forwarded; those held are counted again after a change. */
  passed = 0;
  /** Finds the trigger in the next chunk; undefined once it was found. */
  #sizeUntil: ReturnType<typeof findTrigger> | undefined;

  constructor(
    private readonly toxic: Toxic,
    private readonly out: ToxicOutput,
    readonly random: () => number,
    /** When the proxy started or was reseeded, by `performance.now()`. */
    readonly clock: { readonly epoch: number },
    private onHit: (() => void) | undefined,
    /** When the toxic began to act. */
    public opened: number,
  ) {
    this.#sizeUntil = toxic.after && findTrigger(toxic.after);
    this.change(toxic.attributes, opened, this.last);
  }

  readonly pass = (timed: TimedChunk): void => {
    this.last = Math.max(this.last, timed.at);
    this.passed += sizeOf(timed);
    if (timed.what.length === 0) return; // the trigger ended its chunk
    this.out.pass({ at: this.last, what: timed.what });
  };
  take = this.pass;

  cut(at: number, how: "close" | "reset"): void {
    this.out.cut(at, how);
  }

  release(): void {
    this.kept.splice(0).forEach(this.pass);
  }

  /** Counts the fault, once. */
  hit(): void {
    this.onHit?.();
    this.onHit = undefined;
  }

  change(attributes: Attributes, at: number, lastLeft: number): void {
    // What was due at Infinity is due from now on, as if it had just arrived.
    this.last = this.last === Infinity ? at : lastLeft;
    this.release();
    const { begin, byChance } = TOXICS[this.toxic.type];
    const start = () => {
      if (!byChance) this.hit();
      this.take = begin(attributes, this);
    };
    const sizeUntil = this.#sizeUntil;
    if (!sizeUntil) return start();
    this.take = ({ at, what }) => {
      const size = isText(what) ? Infinity : sizeUntil(what);
      if (isText(what) || size > what.length) return this.pass({ at, what });
      this.pass({ at, what: what.subarray(0, size) });
      this.#sizeUntil = undefined;
      [this.opened, this.passed] = [at, 0];
      start();
      if (byChance && size === what.length) return; // no byte to hit
      this.take({ at, what: what.subarray(size) });
    };
  }

  end(at: number): void {
    this.release();
    if (!this.#sizeUntil) TOXICS[this.toxic.type].end?.(at, this);
  }
}

/** Returns a function: a chunk's size up to the trigger's end, or Infinity. */
function findTrigger({ bytes = 0, match = "" }: Trigger) {
  const sought = latin1(bytesOf(match));
  let [left, before] = [bytes, ""];
  return (chunk: Uint8Array<ArrayBuffer>): number => {
    left -= chunk.length;
    if (bytes > 0) return left > 0 ? Infinity : chunk.length + left;
    const text = before + latin1(chunk); // faster to search than bytes
    const found = text.indexOf(sought);
    const size = found + sought.length - before.length;
    before = text.slice(Math.max(0, text.length - sought.length + 1));
    return found < 0 ? Infinity : size;
  };
}

const latin1 = ({ buffer, byteOffset, length }: Uint8Array<ArrayBuffer>) =>
  Buffer.from(buffer, byteOffset, length).toString("latin1");

/** Starts a toxic at 0 without a connection. Throws {@linkcode ConfigError}. */
export function beginToxic(
  options: ToxicOptions,
  seed: number,
  out: ToxicOutput,
): ActiveToxic {
  const toxic = validate("toxic", (place) => checkToxic(options, place));
  const random = randomStream(seed, toxic.name);
  return new Queue(toxic, out, random, { epoch: 0 }, undefined, 0);
}

/** A toxic in words: `downstream: +100±20 ms on every connection`. */
function describeToxic(toxic: Toxic, all = "every connection"): string {
  const { type, stream, toxicity, attributes, connections, ...more } = toxic;
  const share = toxicity === 1 ? all : `${percent(toxicity)} of connections`;
  const when = listed({ connections, ...more.schedule, ...more.after });
  return `${stream}: ${TOXICS[type].inWords(attributes)} on ${share}${when}`;
}

/** The first and the last number of a range, and the step between them. */
function parseRange(range: number | string): [number, number, number] {
  const [, first, last = first, step] = RANGE.exec(`${range}`) ?? [];
  return [Number(step ?? first), Number(last || Infinity), Number(step ?? 1)];
}
const RANGE = /^(?:([1-9]\d*)(?:-([1-9]\d*|))?|\*\/([1-9]\d*))$/;

/** Whether a connection's number is one of these; by default, all are. */
function isAmong(number: number, connections: Connections = "1-"): boolean {
  return [connections].flat().some((range) => {
    const [first, last, step] = parseRange(range);
    return number >= first && number <= last && number % step === 0;
  });
}

/** Whether a schedule is on at a time after its start, and until when. */
function stateAt(schedule: Schedule, time: number) {
  const { afterMs = 0, forMs = Infinity, everyMs = Infinity } = schedule;
  const period = Math.max(0, Math.floor((time - afterMs) / everyMs));
  const start = afterMs + (period && period * everyMs);
  if (time < start) return { isOn: false, until: start };
  const isOn = time < start + forMs;
  return { isOn, until: start + (isOn ? forMs : everyMs) };
}

function checkToxics(values: readonly unknown[], place: Place): Toxic[] {
  const check = (value: unknown, i: number) => checkToxic(value, place.at(i));
  const toxics = Array.from(values, check);
  for (const [index, { name }] of toxics.entries()) {
    const first = toxics.findIndex((each) => each.name === name);
    if (name === undefined || first === index) continue;
    const problem = `${name} is already taken by ${place.at(first).path}`;
    place.at(index).at("name").refuse(problem);
  }
  return toxics;
}

/** Checks a toxic; one `before` had what a change does not give. */
function checkToxic(value: unknown, place: Place, before: Attributes = {}) {
  const toxic = checkFields(value, place, TOXIC_FIELDS);
  const { type, stream, attributes } = toxic;
  // What is missing has been reported.
  if (type === undefined || attributes === undefined) return toxic as Toxic;
  const at = place.at("attributes");
  const { attributes: fields, check } = TOXICS[type];
  const good = checkFields({ ...before, ...attributes }, at, fields);
  check?.(good as Attributes, at);
  for (const [name, { needs }] of Object.entries(fields)) {
    if (needs === undefined || good[name] === undefined) continue;
    const isMet = needs.split(" and ").every((need) => {
      const [other = "", value] = need.split(": ");
      const found = good[other];
      const isReported = other in attributes && found === undefined;
      return isReported || (value ? `${found}` === value : found);
    });
    if (isMet) continue;
    // A change drops attributes that no longer apply.
    if (attributes[name] === undefined && name in before) delete good[name];
    else at.at(name).refuse(`needs ${needs}; write that, or leave this out`);
  }
  return { name: `${type}_${stream}`, ...toxic, attributes: good } as Toxic;
}

function oneOf<T extends string | number | boolean>(...choices: T[]): Guard<T> {
  const expected = choices.join(" or ").replace(/(?<= or )$/, '""');
  const isOne = (value: unknown): value is T => choices.includes(value as T);
  return guard(expected, isOne, undefined, { enum: choices });
}

const range = guard(
  'a number from 1, "1-3", "5-" or "*/3"',
  (value) => isText(value) || isNumber(value),
  (value) => isAmong(parseRange(value)[0], value), // it is not empty
  { anyOf: [{ type: "integer", minimum: 1 }, like(RANGE)] },
);
const LIST = { type: "array", minItems: 1 };
const CONNECTIONS: Field<Connections> = {
  ...optional(guard(
    `${range.expected}, or a list of these`,
    (value): value is Connections => Array.isArray(value) || range.is(value),
    (value) => [value].flat().length > 0,
    { anyOf: [range.schema, { ...LIST, items: range.schema }] },
  )),
  items: { guard: range },
};

const TIMES = {
  afterMs: ms,
  forMs: { guard: integer(1, MAX_MS) },
  everyMs: optional(integer(1, MAX_MS)),
};

function checkTimes({ forMs, everyMs }: Schedule, place: Place): undefined {
  if (everyMs === undefined || (forMs && forMs <= everyMs)) return;
  const found = forMs ? `found ${forMs}` : "but it is missing";
  place.at("forMs").refuse(`expected 1 to ${everyMs}, as everyMs, ${found}`);
}

const bytesOf = (pattern: Pattern) =>
  isText(pattern)
    ? new TextEncoder().encode(pattern)
    : Uint8Array.fromHex(pattern.hex);
const hexDigits = matching(
  "two hex digits for each of 1 to 256 bytes",
  /^(?:[\da-fA-F]{2}){1,256}$/,
);
const HEX = { hex: { guard: hexDigits } };
const pattern = guard(
  "text of 1 to 256 bytes, or a mapping with hex",
  (value): value is Pattern => isText(value) || isRecord(value),
  (value) => !isText(value) || integer(1, 256).is(bytesOf(value).length),
  { anyOf: [{ type: "string", minLength: 1, maxLength: 256 }, schemaOf(HEX)] },
);

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
  attributes: { guard: mapping as Guard<Attributes>, default: {} },
  connections: CONNECTIONS,
  schedule: {
    ...optional(mapping as Guard<Schedule>),
    fields: {
      ...TIMES,
      forMs: optional(TIMES.forMs.guard),
      from: { guard: oneOf("start", "connection"), default: "start" },
    },
    as: checkTimes,
  },
  after: {
    ...optional(mapping as Guard<Trigger>),
    fields: {
      bytes: optional(integer(1, Number.MAX_SAFE_INTEGER)),
      match: { ...optional(pattern), fields: HEX },
    },
    as({ bytes, match }, place) {
      if (!bytes === !match) place.refuse("expected bytes or match");
    },
  },
};

const { name: _name, type: _type, stream: _stream, ...CHANGES } = TOXIC_FIELDS;

const TOXIC_SCHEMA = {
  ...schemaOf(TOXIC_FIELDS),
  allOf: Object.entries(TOXICS).map(([type, { attributes: fields }]) => {
    const attributes = schemaOf(fields);
    const required = attributes.required.length > 0 ? ["attributes"] : [];
    return {
      if: { properties: { type: { const: type } }, required: ["type"] },
      then: { properties: { attributes }, required },
    };
  }),
};
LEVELS.push(["in a toxic", TOXIC_FIELDS]);
for (const { attributes } of Object.values(TOXICS)) {
  for (const name of Object.keys(attributes)) {
    const types = Object.entries(TOXICS)
      .filter(([, toxic]) => name in toxic.attributes).map(([type]) => type);
    LEVELS.push([`in the attributes of ${types.join(", ")}`, { [name]: 0 }]);
  }
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
  /** A network by its name, such as `3g`: toxics in front. Default: none. */
  profile?: string;
  /** Which connections are dropped, timed out or delayed. Default: all. */
  connections?: Connections;
  /** Times at which the server cannot be reached. Default: none. */
  outages?: readonly Outage[];
  /** Faults on the bytes, in the order in which they act. Default: none. */
  toxics?: readonly ToxicOptions[];
}

/**
 * A time at which the server cannot be reached. `refuse` (default): nothing
 * listens. New connections are closed at once (`drop`), get no answer and are
 * closed at its end (`hang`), or are reset. `reset: true` resets open ones too.
 */
export type Outage = Omit<Schedule, "from"> & {
  forMs: number;
  mode?: "refuse" | "drop" | "hang" | "reset";
  reset?: boolean;
};

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

/** Networks: KB/s down and up, and ms for a round trip and its jitter. */
const PROFILES: Readonly<Record<string, readonly number[]>> = {
  gprs: [6, 3, 500],
  edge: [30, 25, 840],
  "3g": [200, 96, 300],
  "4g": [1125, 1125, 170],
  dsl: [188, 48, 50],
  cable: [625, 125, 28],
  "wifi-poor": [125, 125, 50, 50],
  satellite: [2266, 423, 630],
  transatlantic: [Infinity, Infinity, 78],
  offline: [0, 0],
};

/** Returns new objects: a shared line belongs to one of them. */
function toxicsOf(profile: string): Toxic[] {
  const [down, up, roundTrip = 0, jitter = 0] = PROFILES[profile] ?? [];
  const latency = { latency: roundTrip / 2, jitter: jitter / 2 };
  const toxics = Object.entries({ downstream: down, upstream: up })
    .flatMap(([stream, rate = Infinity]) => [
      rate < Infinity &&
      { type: "bandwidth", stream, attributes: { rate, shared: 1 } },
      roundTrip > 0 && { type: "latency", stream, attributes: latency },
    ]);
  return checkToxics(toxics.filter((each) => each), new Place("", []));
}

/** A profile's toxics, or a route's own of the same names, and its others. */
function withProfile(profile: string, own: readonly Toxic[]): Toxic[] {
  const all = [...toxicsOf(profile), ...own];
  return [...new Map(all.map((toxic) => [toxic.name, toxic])).values()];
}

const MAX_CONFIG_BYTES = 1024 * 1024;
const MAX_TOXICS_IN_ALL = 10_000;
const MAX_TOXICS = 500; // each calls the next: 2,000 overflowed the stack

const host = "a host name or an IP address";
const listenHost = guard(host, isText, isHost, like(HOST));
const address = (expected: string, host?: string) =>
  guard(expected, isText, (text) => !!splitAddress(text, host), like(ADDRESS));
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
  (value) => isText(value) || isNumber(value),
  (value) => splitApi(value) !== undefined,
  { anyOf: [integer(0, 65535).schema, like(/(?:^|:)\d{1,5}$/)] },
);
function listOf(what: string, most: number, items: object) {
  const expected = `a list of ${what}, ${most} at most`;
  const schema = { type: "array", maxItems: most, items };
  return guard(expected, Array.isArray, ({ length }) => length <= most, schema);
}

const splitApi = (address?: number | string) =>
  splitAddress(`${address}`.replace(/^\d+$/, ":$&"), LOOPBACK);

const OUTAGE: Fields<Outage> = {
  ...TIMES,
  mode: { guard: oneOf("refuse", "drop", "hang", "reset"), default: "refuse" },
  reset: { guard: yesOrNo, default: false },
};

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
  profile: { guard: oneOf(...Object.keys(PROFILES), ""), default: "" },
  connections: { ...CONNECTIONS, default: "1-" },
  outages: {
    guard: listOf("outages", 100, schemaOf(OUTAGE)) as Guard<Outage[]>,
    default: [],
    items: { guard: mapping, fields: OUTAGE, as: checkTimes },
    as(outages, place) {
      for (const [i, outage] of outages.entries()) {
        const other = outages.findIndex((each) => overlap(each, outage));
        const { path } = place.at(other);
        if (other < i) place.at(i).refuse(`it overlaps with ${path}`);
      }
    },
  },
  toxics: { guard: listOf("toxics", MAX_TOXICS, TOXIC_SCHEMA), default: [] },
};
const routeList = listOf("routes", 1000, schemaOf(ROUTE_FIELDS));

function overlap(a: Outage, b: Outage): boolean {
  const { afterMs = 0, forMs, everyMs } = b;
  if (a.everyMs && everyMs) {
    let [common, rest] = [a.everyMs, everyMs]; // greatest divisor
    while (rest > 0) [common, rest] = [rest, common % rest];
    const apart = (afterMs - (a.afterMs ?? 0)) % common;
    const offset = (apart + common) % common; // the least from an `a` to a `b`
    return offset < a.forMs || common - offset < forMs;
  }
  if (everyMs) return overlap(b, a);
  const { isOn, until } = stateAt(a, afterMs);
  return isOn || until < afterMs + forMs;
}

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
const IGNORED_KEYS = /^(?:\$schema$|x-)/; // an editor's, and YAML's anchors

/** The JSON Schema of a config with `routes`. */
const CONFIG_SCHEMA = {
  $schema: "https://json-schema.org/draft/2020-12/schema",
  title: "chaos-proxy",
  ...schemaOf(CONFIG_FIELDS),
  patternProperties: { [IGNORED_KEYS.source]: true },
  if: { properties: { api: false } },
  then: { required: ["routes"], properties: { routes: LIST } },
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
    const isAlias = /unidentified alias/i.test(message);
    const quoteAlias = isAlias ? "; put text that begins with * in quotes" : "";
    const hint = isIpv6 ? QUOTE_IPV6 : quoteAlias;
    throw new ConfigError(path, [`${at ?? ""}invalid YAML: ${reason}${hint}`]);
  }
}

const PLAIN_NUMBER = /^[-+]?(?:0|[1-9]\d*)?(?:\.\d*)?(?:e-\d+)?$/i;

const isTree = (value: unknown): value is Record<string, unknown> =>
  Array.isArray(value) || isRecord(value);

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
  const at = `line ${lines.length}, column ${lines.at(-1)!.length + 1}`;
  const hint = /^(?:\/[/*]|#)/.test(after)
    ? "; JSON has no comments"
    : /^[\]}]/.test(after) && /,\s*$/.test(before)
    ? "; remove the comma before it"
    : /^\s*[\w-]/.test(text)
    ? "; name a YAML file .yaml, not .json"
    : "";
  throw new ConfigError(path, [`${at}: invalid JSON: ${reason}${hint}`]);
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
  let offset = 0;
  for (let step = MAX_CONFIG_BYTES; step >= 1; step /= 2) {
    const error = errorInJson(text.slice(0, offset + step));
    if (!error?.endsWith("is not valid JSON")) offset += step;
  }
  return Math.min(offset, text.length);
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
    for (const [name, each] of Object.entries({ ...rest, ...given })) {
      if (IGNORED_KEYS.test(name)) delete rest[name];
      else if (each !== undefined) rest[name] = each;
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
  const key = ["routes", "proxies", ...Object.keys(CONFIG_FIELDS)].find(
    (key) => key in value && (value[key] as Draft<Route> | null)?.name !== key,
  );
  if (key === "proxies") return key;
  const items = [...new Set(Object.values(value))].filter(isRecord);
  const keys = items.flatMap((each) => Object.keys(each));
  if (key || keys.includes("localPort")) return "routes";
  const isProxies = keys.some((key) => /^(?:listen|upstream)$/i.test(key));
  return Array.isArray(value) || isProxies ? "" : "routes";
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
  const own = checkToxics(written, place.at("toxics"));
  const toxics = withProfile(rest.profile ?? "", own);
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
    const isRival = (each: Address) =>
      port > 0 && each.port === port && overlaps(each.hostname, hostname);
    const rival = isApi ? { by: "api" } : earlier.find(isRival);
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
    const there = byPort.get(to?.port)?.find(({ host = LOOPBACK }) =>
      to && reaches(to.hostname, host)
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
type Held = TimedChunk & { readonly since: number; next?: Held };

/** A toxic at work on a link. */
class Stage {
  active!: ActiveToxic;
  /** What it holds, as a list: `shift` of a long array moves all the rest. */
  first?: Held;
  last?: Held;
  /** When it ends the connection. */
  cut?: { readonly at: number; readonly how: "close" | "reset" };
  lastLeft = -Infinity; // when the chunk that left last was due
  bytes = 0; // that it holds
  delay = 0; // of the chunk that came last
  endTurn?: () => void; // on a line that it shares

  constructor(public toxic: Toxic) {}
}

const MAX_HELD_BYTES = 64 * 1024 * 1024;
const HELD_OVERHEAD_BYTES = 1024; // what a held piece costs besides its bytes

/** Shared lines, by the route's toxic: how many turns, and when all end. */
const lines = new WeakMap<Toxic, { turns: number; freeAt: number }>();

const lineOf = ({ type, attributes }: Toxic) =>
  TOXICS[type].line?.(attributes) ?? [0, Infinity];

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
  /** Resolves when there is room and it holds at most `#most`, or has stopped. */
  #room: PromiseWithResolvers<void> | undefined;
  #most = MAX_HELD_BYTES;
  #controller!: TransformStreamDefaultController<Bytes>;
  readonly #stream = new TransformStream<Bytes, Bytes>({
    start: (controller) => this.#controller = controller,
    transform: (chunk) => {
      if (this.#stopped) return;
      if (this.#stages.length === 0) return this.#controller.enqueue(chunk);
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
  readonly write = (chunk: Bytes) => this.#writer.write(chunk);

  /** `cut` is called when a toxic ends the connection. */
  constructor(
    readonly cut: (toxic: string, how: "close" | "reset") => void,
    readonly begin: (toxic: Toxic, out: ToxicOutput) => ActiveToxic,
  ) {}

  /** Makes these toxics act from now on, in this order, and no others. */
  act(toxics: readonly Toxic[]): void {
    if (this.#stopped) return;
    let last = -1;
    for (const stage of [...this.#stages]) {
      const index = toxics.findIndex((toxic) => canBecome(stage.toxic, toxic));
      if (index > last) last = index;
      else this.#remove(stage); // it is gone, or has another place now
    }
    toxics.forEach((toxic, index) => {
      const stage = this.#stages.find((each) => each.toxic.name === toxic.name);
      if (stage === undefined) this.#insert(index, toxic);
      else if (stage.toxic !== toxic) this.#change(stage, toxic);
    });
  }

  get isBuffering(): boolean {
    return this.#heldBytes > 0 && !this.#stopped;
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
    for (const stage of this.#stages) this.#takeTurn(stage); // gives it back
    this.#nap?.abort("stopped");
    this.#room?.resolve();
  }

  #insert(index: number, toxic: Toxic): void {
    const stage = new Stage(toxic);
    stage.active = this.begin(toxic, {
      pass: (timed) => this.#hold(stage, timed),
      cut: (at, how) => {
        stage.cut = { at, how };
        this.#run();
      },
    });
    this.#stages.splice(index, 0, stage);
  }

  #change(stage: Stage, toxic: Toxic): void {
    const at = performance.now();
    if (stage.first?.at === Infinity) stage.lastLeft = at;
    const all: Held[] = [];
    while (stage.first) all.push(this.#shift(stage, stage.first));
    const line = lines.get(stage.toxic);
    if (line) lines.set(toxic, line);
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
    this.#most = most;
    if (this.#hasRoom() || this.#stopped) return;
    this.#room = Promise.withResolvers();
    return this.#room.promise;
  }

  /** Whether the buffer of each `bandwidth` has room for more data. */
  #hasRoom(): boolean {
    let [bytes, delay] = [0, 50]; // ms of lead, so that no line runs empty
    return this.#heldBytes <= this.#most && this.#stages.every((stage) => {
      const [rate, buffer] = lineOf(stage.toxic);
      bytes += stage.bytes;
      const isFull = bytes > buffer + rate * delay;
      delay += stage.delay;
      return !isFull;
    });
  }

  #hold(stage: Stage, timed: TimedChunk): void {
    if (timed.what === "close") this.closedBy ??= stage.toxic.name;
    const held: Held = { ...timed, since: this.#since };
    stage.delay = held.at < Infinity ? held.at - held.since : 0;
    if (stage.last) stage.last.next = held;
    else stage.first = held;
    stage.last = held;
    stage.bytes += sizeOf(held);
    this.#heldBytes += HELD_OVERHEAD_BYTES + sizeOf(held);
  }

  #shift(stage: Stage, first: Held): Held {
    stage.first = first.next;
    if (stage.last === first) stage.last = undefined;
    first.next = undefined; // or it would keep those behind it in memory
    stage.bytes -= sizeOf(first);
    this.#heldBytes -= HELD_OVERHEAD_BYTES + sizeOf(first);
    return first;
  }

  /** Releases what is due by then at a toxic; `at` replaces the due times. */
  #release(stage: Stage, due: number, at?: number): void {
    while (stage.first && stage.first.at <= due) {
      const held = this.#shift(stage, stage.first);
      stage.lastLeft = held.at;
      this.#forward({ at: at ?? held.at, what: held.what }, stage);
    }
    this.#takeTurn(stage);
  }

  /** Takes a turn on a shared line: 10 ms, or a share of 50 ms if less. */
  #takeTurn(stage: Stage): void {
    const { first, toxic, lastLeft } = stage;
    if (first && first.at < Infinity && !this.#stopped) return;
    stage.endTurn?.();
    stage.endTurn = undefined;
    const [rate, , isShared] = lineOf(toxic);
    if (!first || !isShared || rate === 0 || this.#stopped) return;
    const line = lines.get(toxic) ?? { turns: 0, freeAt: 0 };
    lines.set(toxic, line);
    const most = Math.ceil(rate * Math.min(10, 50 / ++line.turns));
    let left = Math.min(stage.bytes, most);
    const ms = left / rate;
    const at = Math.max(first.since, lastLeft, line.freeAt) + ms;
    line.freeAt = at;
    stage.endTurn = () => {
      line.turns--;
      if (at > performance.now()) line.freeAt -= ms;
    };
    for (let each: Held | undefined = first; each; each = each.next) {
      if (left === 0 && sizeOf(each) > 0) return;
      if (sizeOf(each) > left) {
        const bytes = each.what as Bytes;
        each.next = { ...each, what: bytes.subarray(left) };
        each.what = bytes.subarray(0, left);
        if (stage.last === each) stage.last = each.next;
        this.#heldBytes += HELD_OVERHEAD_BYTES;
      }
      each.at = at;
      left -= sizeOf(each);
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
      if (this.#hasRoom()) this.#room?.resolve();
      this.#due = due;
      if (due === Infinity) return;
      // When it is late, the other connections run first.
      await (due > now ? sleepUntil(due, signal) : setImmediate());
    }
  }
}

/** Whether an active toxic can be updated to another one in place. */
const canBecome = (from: Toxic, to: Toxic) =>
  from.name === to.name && from.type === to.type &&
  isDeepStrictEqual(from.after, to.after);

/** Ignores an error that follows from an end which is reported elsewhere. */
function expectedOfDelivery(): void {}

/** Waits until `performance.now()` reaches a time, or the signal is aborted. */
async function sleepUntil(time: number, signal: AbortSignal): Promise<void> {
  while (!signal.aborted) {
    const left = time - performance.now();
    if (left <= 0) return;
    // A timer is up to 1.5 ms late, and polling 0.01 ms.
    if (left < 2.5) await setImmediate();
    else await sleep(Math.min(left - 1.5, MAX_MS), signal);
  }
}

/** Waits about that long, or until the signal is aborted. */
async function sleep(ms: number, signal?: AbortSignal): Promise<void> {
  const { promise, resolve } = Promise.withResolvers<void>();
  const timer = setTimeout(resolve, ms);
  using _ = signal && addAbortListener(signal, () => resolve());
  await promise;
  clearTimeout(timer);
}

// ---- Sockets: two kinds, listeners, dialling, fairness ----------------------

const MAX_READ_BYTES = 256 * 1024;

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
    this.#work += bytes + 2 * 1024; // what a call costs besides its bytes
    if (this.#work < 1024 * 1024) return undefined; // about 0.5 ms
    // Bulk checks again, so that small requests do not queue behind it.
    const isBulk = bytes >= 16 * 1024;
    if (this.#poll && isBulk) return this.#poll.then(() => this.pass(bytes));
    if (this.#poll) return this.#poll;
    // The caller goes on: mostly the poll ends before anyone has to wait.
    this.#poll = this.#startPoll();
  }

  async #startPoll(): Promise<void> {
    this.#work = 0;
    const [from, to] = this.#pair;
    const timer = setTimeout(() => this.#closePair(), 100); // is broken then
    // After a read that fills its buffer the next does not poll: room for 2.
    const [size] = await Promise.all([
      to?.read(new Uint8Array(2)),
      from?.write(new Uint8Array(1)),
    ]).catch(() => []); // it was closed, or is broken
    clearTimeout(timer);
    if (size !== 1) {
      this.#closePair();
      // Not at each poll: it takes file descriptors, and may not return.
      const isDue = performance.now() > this.#openedAt + 1000;
      if (isDue && this.#listeners > 0) this.#openPair();
      for (let turn = 0; turn < 64; turn++) await setImmediate();
    }
    this.#work = 0;
    this.#poll = undefined;
  }

  async #openPair(): Promise<void> {
    this.#openedAt = performance.now();
    if (!mayUseLoopback()) return;
    try {
      using opened = new DisposableStack();
      using listener = Deno.listen({ hostname: LOOPBACK, port: 0 });
      const from = opened.use(await Deno.connect(listener.addr as Address));
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
const mayUseLoopback = () =>
  Deno.permissions.querySync({ name: "net", host: LOOPBACK }).state ===
    "granted";

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
const firstBuffers: Bytes[] = []; // of the size that a socket starts with

/** A socket of Deno's: the faster kind. */
function denoSocket(conn: Deno.TcpConn): Socket {
  let buffer: Bytes | undefined;
  try {
    conn.setNoDelay();
    conn.setKeepAlive();
  } catch {
    // Some systems refuse it once the peer has closed, which `read` reports.
  }
  return {
    peer: addressOf(conn.remoteAddr),
    async read() {
      const bytes = buffer ??= firstBuffers.pop() ?? new Uint8Array(4 * 1024);
      const size = await conn.read(bytes);
      if (size === null) {
        const isFirst = buffer?.length === 4 * 1024;
        if (isFirst && firstBuffers.length < 256) firstBuffers.push(buffer);
        buffer = undefined;
        return null;
      }
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
      if (isSpare && spareBuffers.length < 16) spareBuffers.push(bytes);
    },
    closeWrite: () => conn.closeWrite(),
    close: () => conn[Symbol.dispose](), // also more than once
  };
}

const CLOSED = new Deno.errors.BadResource("closed"); // slow to make anew

/** A plain array: the `slice` of Node's `Buffer` does not copy. */
const withoutBuffer = ({ buffer, byteOffset, length }: Bytes) =>
  new Uint8Array(buffer, byteOffset, length);

/** A socket of Node's, for Deno's own cannot send a RST. */
function nodeSocket(socket: net.Socket): Socket {
  const { remoteAddress: hostname = "", remotePort: port = 0 } = socket;
  let next: PromiseWithResolvers<Bytes | null> | undefined;
  socket.setNoDelay();
  socket.setKeepAlive(true);
  // Or a failed write would destroy the socket, and lose what it has received.
  const destroy = socket.destroy.bind(socket);
  socket.destroy = (error?: NodeJS.ErrnoException) => {
    if (error?.syscall !== "write") return destroy(error);
    Reflect.get(socket, "_readableState").errored = null;
    return socket;
  };
  socket.pause(); // or bytes would come before `read` asks for them
  socket.on("data", (bytes: Bytes) => {
    socket.pause();
    next?.resolve(withoutBuffer(bytes));
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
        if (rest) return withoutBuffer(rest);
        throw socket.errored ?? CLOSED;
      }
      next ??= Promise.withResolvers(); // an earlier call may still wait
      socket.resume();
      return await next.promise;
    },
    write: (bytes) =>
      new Promise((resolve, reject) => {
        socket.write(bytes, (error) => {
          // Deno (2.9.6) fails a write that has to wait if the peer half-closed
          // without a byte. The RST tells the peer that data is missing.
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
    close: (how) =>
      how === "reset" ? socket.resetAndDestroy() : socket.destroy(),
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

/** Accepts one by one. Its `close` resolves when the address is free again. */
type Listener = Awaited<ReturnType<typeof listenOnDeno | typeof listenOnNode>>;

function listenOnDeno(address: Address) {
  const listener = Deno.listen(address);
  let accepting: Promise<Socket> | undefined;
  return {
    addr: listener.addr as Address,
    accept: () => accepting = listener.accept().then(denoSocket),
    async close() {
      pollGate.release();
      listener.close();
      await accepting?.catch(() => {}); // it is open until that ends
    },
  };
}

async function listenOnNode({ hostname, port }: Address) {
  const accepted: Socket[] = [];
  const server = net.createServer({ allowHalfOpen: true });
  server.on("connection", (conn) => accepted.push(nodeSocket(conn)));
  server.listen(port, hostname);
  await once(server, "listening");
  server.on("error", () => {}); // `once` in `accept` throws it
  const at = server.address() as net.AddressInfo;
  const addr = { hostname: at.address, port: at.port };
  // When Deno's `net.Server` (2.9.6) finds no file descriptor for a connection,
  // it reports nothing and accepts none after that, until it listens again.
  const rearm = setInterval(() => {
    try {
      Deno.listen(addr).close(); // fails: with EADDRINUSE if none is missing
    } catch (error) {
      if (hasCode(error, "EMFILE", "ENFILE")) server.emit("error", error);
    }
    Reflect.get(server, "_handle")?.listen(511); // the default
  }, 500);
  return {
    addr,
    async accept() {
      if (accepted.length === 0) await once(server, "connection");
      return accepted.shift()!;
    },
    close() {
      pollGate.release();
      clearInterval(rearm);
      server.close();
      for (const socket of accepted) socket.close();
      server.emit("error", CLOSED);
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
  using _ = addAbortListener(signal, () => reject(signal.reason));
  return await Promise.race([lookup, aborted]);
}

/** Listens on a route's address, with Node's sockets if `resettable`. */
async function listen(route: Route, resettable: boolean, signal: AbortSignal) {
  const { name, host, localPort: port } = route;
  for (let attempt = 1;; attempt++) {
    try {
      const [hostname = host] = await lookUp(host, signal);
      const listenOn = resettable ? listenOnNode : listenOnDeno;
      const listener = await listenOn({ hostname, port });
      await pollGate.retain();
      return listener;
    } catch (error) {
      signal.throwIfAborted();
      if (!hasCode(error, "EADDRINUSE") || attempt === 20) {
        const asked = addressOf({ hostname: host, port });
        throw new ListenError(`route ${name}`, asked, error);
      }
    }
    // A process that was just started may still have a copy of a closed socket.
    await sleep(10, signal);
  }
}

/** Dials the addresses of a checked upstream, one after the other. */
async function dial(address: string, resettable: boolean, signal: AbortSignal) {
  const [, host, port] = /^\[?(.+?)\]?:(\d+)$/.exec(address) ?? [];
  if (!host) throw new Error("the upstream has no port; expected host:port");
  let failure: unknown;
  for (const hostname of await lookUp(host, signal)) {
    let socket: net.Socket | undefined;
    try {
      const to = { hostname, port: Number(port) };
      if (!resettable) return denoSocket(await Deno.connect({ ...to, signal }));
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

const hasCode = (error: unknown, ...codes: string[]) =>
  codes.includes((error as NodeJS.ErrnoException).code ?? "");

/** An error in the system's words, without its number. */
function causeOf(error: unknown): string {
  return (error as Error).message.replace(/^Error: | \(os error \d+\)/g, "");
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
  const isHit = isAmong(number, route.connections);
  if (isHit && drop < route.dropRate) return { kind: "drop" };
  if (isHit && timeout < route.timeoutRate) return { kind: "timeout" };
  const delay = route.latencyMs + (2 * jitter - 1) * route.jitterMs;
  const delayMs = isHit ? Math.max(0, toMicroseconds(delay)) : 0;
  return { kind: "forward", delayMs, toxics: actingOn(seed, route, number) };
}

/** Draws by name which toxics act, whatever the other toxics or their order. */
function actingOn(seed: number, route: Route, number: number): Toxic[] {
  return route.toxics.filter(({ name, toxicity, connections }) => {
    if (!isAmong(number, connections)) return false;
    if (toxicity === 0 || toxicity === 1) return toxicity === 1;
    return randomStream(seed, route.name, number, name, "acts")() < toxicity;
  });
}

const toMicroseconds = (ms: number) => Math.round(ms * 1000) / 1000;

/** Follows the schedules of toxics or outages, and counts what is on. */
class Timetable {
  readonly #on = new Set<string>();
  #followed = new Map<string, { schedule: Schedule; start: number }>();
  #stop: AbortController | undefined;

  /** `turn` is called when something goes on or off. */
  constructor(
    private readonly counts: Pick<RouteStats, "on">,
    private readonly turn: (name: string, edge: "on" | "off") => void,
  ) {}

  readonly isOn = (name: string) => this.#on.has(name);

  /** Leaves out the toxics that are off. */
  readonly select = (toxics: readonly Toxic[]) =>
    toxics.filter(({ name }) => this.isOn(name) || !this.#followed.has(name));

  /** Follows these from now on, and no others. */
  async follow(
    all: readonly { name: string; schedule?: Schedule }[],
    epoch = 0,
    opened = epoch,
  ): Promise<void> {
    const next = new Map(all.map(({ name, schedule = {} }) => {
      const start = schedule.from === "connection" ? opened : epoch;
      return [name, { schedule, start }];
    }));
    if (isDeepStrictEqual(next, this.#followed)) return; // keeps late edges
    this.#followed = next;
    this.#stop?.abort("changed");
    const { signal } = this.#stop = new AbortController();
    for (const name of this.#on.difference(next)) this.#set(name, false);
    const edges = Array.from(next, ([name, { schedule, start }]) => (
      { name, schedule, start, time: performance.now() - start }
    ));
    while (!signal.aborted) {
      for (const edge of edges) {
        const isDue = edge.start + edge.time <= performance.now();
        if (!isDue || signal.aborted) continue;
        // The state at its time, not now: a late edge could be skipped.
        const { isOn, until } = stateAt(edge.schedule, edge.time);
        edge.time = until;
        this.#set(edge.name, isOn);
      }
      const due = Math.min(...edges.map(({ start, time }) => start + time));
      if (due === Infinity) return;
      await setImmediate(); // when this is late, connections run first
      await sleepUntil(due, signal);
    }
  }

  #set(name: string, isOn: boolean): void {
    if (isOn === this.isOn(name)) return;
    this.#on[isOn ? "add" : "delete"](name);
    this.counts.on[name] = (this.counts.on[name] ?? 0) + (isOn ? 1 : -1);
    this.turn(name, isOn ? "on" : "off");
  }
}

/** One end of a connection through the proxy. */
export type Side = "client" | "upstream";

const OTHER = { client: "upstream", upstream: "client" } as const;
const STREAM_OF = { client: "upstream", upstream: "downstream" } as const;
const BYTES_OF = { client: "bytesUp", upstream: "bytesDown" } as const;

/** Why a connection ended. A side alone ended its stream first. */
export type Outcome =
  | Side
  | `${Side}_reset`
  | "upstream_failed"
  | "fault" // injected
  | "cut" // alone, or with its route
  | "drain"; // the proxy stopped

/** An outcome, with what failed, mostly in the system's words, or the toxic. */
export type Reason = { why: Outcome; cause?: string; toxic?: string };

/** What happens to a connection, in this order. `connection` starts at 1. */
export type ConnectionEvent =
  & { route: string; connection: number; client: string }
  & (
    | { event: "accepted"; upstream: string }
    | { event: "dropped" }
    | { event: "timed_out"; timeoutMs: number }
    | { event: "delayed"; delayMs: number }
    | {
      event: "connected";
      upstream: string;
      address: string;
      dialMs: number;
      toxics: string[];
    }
    | { event: "upstream_failed"; upstream: string; cause: string }
    /** The connection ended; each `accepted` has one `closed`. */
    | Reason & {
      event: "closed";
      bytesUp: number;
      bytesDown: number;
      durationMs: number;
    }
  );

/** What may be injected: a fault of a route, or a toxic by its type. */
export type FaultKind =
  | ("dropRate" | "timeoutRate" | "latencyMs" | "outages")
  | ToxicType;

/** The statistics of a route's connections. */
export type RouteStats = {
  route: Route;
  connections: number;
  open: number;
  ended: Partial<Record<Outcome, number>>;
  /** How often a fault was injected, or a toxic began to act. */
  faults: Partial<Record<FaultKind, number>>;
  toxics: Record<string, number>;
  /** The scheduled toxics and outages that are on, or on how many connections. */
  on: Record<string, number>;
  /** Upstreams reached: in all, and within each {@linkcode DIAL_BOUNDS_MS}. */
  dials: { count: number; totalMs: number; within: number[] };
  /** Bytes that were read and written; those of `upstream` go to it. */
  received: Record<Stream, number>;
  sent: Record<Stream, number>;
  /** The first 1,000 since numbers began at 1, with the toxics that acted. */
  first: {
    number: number;
    decision: Decision["kind"];
    delayMs: number;
    toxics: string[];
    outcome: Reason | null;
  }[];
};

/** The bounds, in milliseconds, by which dialling times are counted. */
export const DIAL_BOUNDS_MS: readonly number[] = [1, 10, 100, 1000]
  .flatMap((ms) => [ms, 2.5 * ms, 5 * ms]).concat(10_000);

const newCounts = (): Omit<RouteStats, "route" | "open"> => ({
  connections: 0,
  ended: {},
  faults: {},
  toxics: Object.create(null),
  on: Object.create(null),
  dials: { count: 0, totalMs: 0, within: DIAL_BOUNDS_MS.map(() => 0) },
  received: { upstream: 0, downstream: 0 },
  sent: { upstream: 0, downstream: 0 },
  first: [],
});

function tally<K extends PropertyKey>(counts: { [key in K]?: number }, key: K) {
  counts[key] = (counts[key] ?? 0) + 1;
}

const MAX_RECORDS = 1000;
const MAX_LINGER_MS = 2000;
const CHECK_MS = 20;

class Connection {
  /** Those that dial or are half-closed. A timer each took 10 % of the CPU. */
  static readonly #watched = new Set<Connection>();
  static #interval: ReturnType<typeof setInterval> | undefined;

  readonly id: Pick<ConnectionEvent, "route" | "connection" | "client">;
  private readonly record: RouteStats["first"][number];
  /** Resolves when it has ended. It starts after the constructor returns. */
  readonly ended: Promise<void>;
  readonly #bytes = { bytesUp: 0, bytesDown: 0 }; // read so far
  readonly #start = performance.now();
  readonly #seed: number; // the context's may change
  #sockets: Partial<Record<Side, Socket>>;
  #links: Partial<Record<Side, Link>> = {};
  toxics: readonly Toxic[] = []; // of its own, which act after the route's
  #acting: Toxic[];
  readonly #timetable: Timetable;
  readonly #aborted = new AbortController();
  #failure: Reason | undefined; // why it ended before both streams did
  #firstToEnd: Side | undefined;
  #dialDeadline = Infinity;
  #delivered = 0;
  #hasMoved = true; // since the last look
  #movedAt = 0; // when bytes last did

  constructor(
    client: Socket,
    readonly route: Route,
    readonly number: number,
    readonly resettable: boolean,
    private readonly counts: ReturnType<typeof newCounts>,
    private readonly context: Pick<ProxyContext, "seed" | "epoch" | "emit">,
  ) {
    this.id = { route: route.name, connection: number, client: client.peer };
    this.#sockets = { client };
    this.#seed = context.seed;
    const decided = decide(this.#seed, route, number);
    this.#acting = decided.kind === "forward" ? decided.toxics : [];
    const { kind: decision, delayMs } = { delayMs: 0, ...decided };
    this.record = { number, decision, delayMs, toxics: [], outcome: null };
    if (number <= MAX_RECORDS) counts.first[number - 1] = this.record;
    counts.connections++;
    this.#timetable = new Timetable(counts, (toxic, edge) => {
      context.emit({ event: `toxic_${edge}`, ...this.id, toxic });
      this.#act();
    });
    this.ended = Promise.resolve().then(() => this.#run(client, decided));
  }

  get state() {
    const { route, connection: number, client } = this.id;
    const { upstream } = this.route;
    const ageMs = toMicroseconds(performance.now() - this.#start);
    const toxics = this.acting.map(({ name }) => name);
    return { route, number, client, upstream, ...this.#bytes, ageMs, toxics };
  }

  get acting(): Toxic[] {
    if (!this.#sockets.upstream || this.#failure) return [];
    return this.#timetable.select(this.#acting);
  }

  /** Sets the route's and its own, which replace those of the same name. */
  setToxics(ofRoute: readonly Toxic[], own = this.toxics): void {
    const names = new Set([...this.toxics, ...own].map(({ name }) => name));
    const toxics = [...ofRoute.filter(({ name }) => !names.has(name)), ...own];
    this.toxics = own;
    this.#acting = actingOn(this.#seed, { ...this.route, toxics }, this.number);
    this.#followSchedules();
    // A link tells toxics by name: its own ends before the route's begins.
    if (names.size > own.length) this.setToxics(ofRoute);
  }

  /** Runs the connection until it has ended; never fails. */
  async #run(client: Socket, decision: Decision): Promise<void> {
    const { kind } = decision;
    const { upstream } = this.route;
    this.context.emit({ event: "accepted", ...this.id, upstream });
    if (kind === "forward") await this.#forward(client, decision.delayMs);
    else if (kind === "timeout") await this.#hold(client);
    else {
      tally(this.counts.faults, "dropRate");
      this.context.emit({ event: "dropped", ...this.id });
      this.end({ why: "fault" });
    }
    this.end();
    const reason = this.#failure ?? { why: this.#firstToEnd ?? "client" };
    tally(this.counts.ended, reason.why);
    this.record.outcome = reason;
    const durationMs = toMicroseconds(performance.now() - this.#start);
    const measured = { ...this.#bytes, durationMs };
    this.context.emit({ event: "closed", ...this.id, ...reason, ...measured });
  }

  /** Closes all that is open, which ends it; the first reason stands. */
  end(reason?: Reason, how?: "close" | "reset"): void {
    this.#failure ??= reason;
    Connection.#watched.delete(this);
    if (this.#failure) this.#aborted.abort(CLOSED);
    for (const socket of Object.values(this.#sockets)) socket.close(how);
    for (const link of Object.values(this.#links)) {
      if (this.#failure) link.abort();
      else link.stop();
    }
    // V8's Map and Set keep what was removed, and all this, until a full GC.
    this.#sockets = {};
    this.#links = {};
    this.#timetable.follow([]);
  }

  /** Answers nothing until the timeout, also if the client ends its stream. */
  async #hold(client: Socket): Promise<void> {
    const { timeoutMs } = this.route;
    tally(this.counts.faults, "timeoutRate");
    this.context.emit({ event: "timed_out", ...this.id, timeoutMs });
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
      this.context.emit({ event: "delayed", ...this.id, delayMs });
      this.#read("client", client, up).then(() => {
        // One that has sent something may be waiting for the answer.
        if (!this.#sockets.upstream && this.#bytes.bytesUp === 0) {
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
    this.#watch();
    try {
      const { signal } = this.#aborted;
      const socket = await dial(upstream, this.resettable, signal);
      this.#sockets.upstream = socket;
      if (this.#failure) return; // ended meanwhile
      this.#followSchedules();
      const dialMs = toMicroseconds(performance.now() - start);
      const { dials } = this.counts;
      dials.count++;
      dials.totalMs += dialMs;
      DIAL_BOUNDS_MS.forEach((bound, i) => {
        if (dialMs <= bound) tally(dials.within, i);
      });
      const toxics = this.acting.map(({ name }) => name);
      const reached = { upstream, address: socket.peer, dialMs, toxics };
      this.context.emit({ event: "connected", ...this.id, ...reached });
    } catch (error) {
      if (this.#failure) return; // ended meanwhile, which aborts the dialling
      const cause = causeOf(error);
      this.#failure = { why: "upstream_failed", cause };
      const failed = { ...this.id, upstream, cause };
      this.context.emit({ event: "upstream_failed", ...failed });
    } finally {
      this.#dialDeadline = Infinity;
      if (!this.#firstToEnd) Connection.#watched.delete(this);
    }
  }

  /** Follows its own schedules, not those that its route follows for all. */
  #followSchedules(): void {
    if (!this.#sockets.upstream) return; // not connected yet, or ended
    const own = this.#acting.filter((toxic) =>
      toxic.schedule?.from === "connection" ||
      (toxic.schedule && this.toxics.includes(toxic))
    );
    this.#timetable.follow(own, this.context.epoch, this.#start);
    this.#act();
  }

  #newLink(from: Side): Link {
    const begun: Record<string, number> = Object.create(null); // by toxic
    return this.#links[from] = new Link(
      (toxic, how) => this.end({ why: "fault", toxic }, how),
      (toxic, out) => {
        const { name, type } = toxic;
        const { route, number, context, counts, record } = this;
        const key = [this.#seed, route.name, number, name];
        const turn = begun[name] = (begun[name] ?? 0) + 1;
        let stream: (() => number) | undefined; // a toxic may never draw
        const random = () =>
          (stream ??= randomStream(...key, ...(turn > 1 ? [turn] : [])))();
        return new Queue(toxic, out, random, context, () => {
          tally(counts.faults, type);
          tally(counts.toxics, name);
          if (!record.toxics.includes(name)) record.toxics.push(name);
        }, performance.now());
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
        this.#bytes[BYTES_OF[from]] += size;
        this.counts.received[STREAM_OF[from]] += size;
        if (!link) continue;
        const written = link.write(bytes);
        // Without an upstream it is read ahead, to notice its end.
        if (this.#sockets.upstream || this.#bytes.bytesUp > MAX_READ_BYTES) {
          await written;
        } else written.catch(expectedOfDelivery);
      }
      this.#firstToEnd ??= from;
      if (this.#sockets.client && this.route.halfCloseTimeoutMs) this.#watch();
    } catch (error) {
      // If the link has failed, the reason is set, or is in its `closedBy`.
      if (!link?.closedBy) {
        this.#failure ??= { why: `${from}_reset`, cause: causeOf(error) };
      }
      this.#aborted.abort(CLOSED);
    }
    link?.end();
  }

  #watch(): void {
    Connection.#watched.add(this);
    Connection.#interval ??= setInterval(() => {
      for (const each of Connection.#watched) each.#checkTimeouts();
      Connection.rest();
    }, CHECK_MS);
  }

  /** Ends the interval now, if none is watched. */
  static rest(): void {
    if (Connection.#watched.size > 0) return;
    clearInterval(Connection.#interval);
    Connection.#interval = undefined;
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
const MAX_WARM_UP_MS = 1000;

/** What happens to a route and its toxics, or to those of a `connection`. */
export type RouteEvent =
  & { route: string; connection?: number; client?: string }
  & (
    | { event: "listening"; address: string; upstream: string; faults: string }
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
    | { event: "toxic_on" | "toxic_off"; toxic: string }
    | { event: "outage_on" | "outage_off"; outage: string }
  );

/** What happens to the proxy, its routes and connections. */
export type ProxyEvent =
  | ConnectionEvent
  | RouteEvent
  /** All routes listen; the seed repeats this run's decisions. */
  | { event: "started"; routes: number; seed: number }
  | { event: "reseeded"; seed: number }
  | { event: "reloaded"; added: string[]; changed: string[]; removed: string[] }
  /** Waits for the connections in flight, for so long; 0: for ever. */
  | { event: "draining"; connections: number; timeoutMs: number }
  | { event: "drained"; cut: number; durationMs: number };

/** What the connections met. A warning names a fault without effect. */
export type Report = {
  version: string;
  seed: number;
  durationMs: number;
  warnings: string[];
  routes: RouteStats[];
};

/** How to start a {@linkcode ChaosProxy}. */
export interface StartOptions {
  /** Called with each event, as it happens; must not throw. */
  onEvent?: (event: ProxyEvent) => void;
  /** Whether all routes can be reset (slower), not just where toxics do. */
  resettable?: boolean;
}

/** A connection in flight, with the bytes so far and the toxics that act. */
export type LiveConnection = {
  /** Identifies it among all connections of this proxy. */
  id: number;
  route: string;
  number: number;
  client: string;
  upstream: string;
  bytesUp: number;
  bytesDown: number;
  ageMs: number;
  toxics: string[];
};

/** What has toxics: a route, by its name, or an open connection, by its id. */
export type ToxicTarget = string | { connection: number };

interface ProxyContext {
  seed: number;
  epoch: number;
  lastId: number;
  turn: Promise<unknown>; // settles when all changes of routes are done
  config: Config; // the last that was given
  readonly resettable: boolean;
  readonly stopping: AbortController; // aborts with the error for changes
  readonly emit: (event: ProxyEvent) => void;
}

/** Listening takes time: changes of routes wait for each other. */
function inTurn<T>(context: ProxyContext, change: () => Promise<T>) {
  const changed = context.turn.then(() => {
    context.stopping.signal.throwIfAborted();
    return change();
  });
  context.turn = changed.catch(() => {}); // the caller gets the error
  return changed;
}

/** Serves a route, and changes it as {@linkcode ChaosProxy} decides. */
class LiveRoute {
  lastNumber = 0;
  readonly connections = new Map<number, Connection>(); // in flight, by id
  readonly #resettable: boolean;
  #listener: Listener | undefined;
  #host: string | undefined; // on which it has listened last, as an address
  #counts = newCounts();
  #timed: { name: string; schedule: Outage }[] = []; // the name has the mode
  readonly #hung = new Set<Connection>(); // by an outage, until it is over
  readonly #toxics = new Timetable(this.#counts, (toxic, edge) => {
    const { name: route } = this.route;
    this.context.emit({ event: `toxic_${edge}`, route, toxic });
    this.#act();
  });
  readonly #outages = new Timetable(this.#counts, (outage, edge) => {
    const { name: route } = this.route;
    this.context.emit({ event: `outage_${edge}`, route, outage });
    if (edge === "on") tally(this.#counts.faults, "outages");
    else for (const each of this.#hung) each.end({ why: "fault" });
    if (this.#outage?.reset) {
      const reason = { why: "fault", cause: "outage" } as const;
      for (const each of this.connections.values()) each.end(reason, "reset");
    }
    if (outage.includes("refuse")) this.#listenUnlessRefusing();
  });

  constructor(public route: Route, private readonly context: ProxyContext) {
    this.#resettable = context.resettable || needsReset(route);
  }

  get #outage(): Outage | undefined {
    return this.#timed.find(({ name }) => this.#outages.isOn(name))?.schedule;
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
        const hasLeft = hasCode(error, ...CLIENT_LEFT);
        if (!hasLeft) await sleep(ACCEPT_PAUSE_MS, stopping.signal);
      }
    }
  }

  followSchedules(): void {
    const { toxics, outages } = this.route;
    const { epoch } = this.context;
    const ofStart = toxics.filter(({ schedule }) => schedule?.from === "start");
    this.#toxics.follow(ofStart, epoch);
    this.#timed = outages.map((schedule, i) => (
      { name: `outage ${i + 1} (${schedule.mode})`, schedule }
    ));
    this.#outages.follow(this.#timed, epoch);
    this.#act();
  }

  #act(): void {
    const toxics = this.#toxics.select(this.route.toxics);
    for (const each of this.connections.values()) each.setToxics(toxics);
  }

  #listenUnlessRefusing(): void {
    const { emit, stopping: { signal } } = this.context;
    inTurn(this.context, () => this.update({})).catch(async (error) => {
      if (signal.aborted) return;
      const { name: route } = this.route;
      emit({ event: "accept_failed", route, cause: causeOf(error) });
      await sleep(ACCEPT_PAUSE_MS, signal);
      this.#listenUnlessRefusing();
    });
  }

  /** Updates settings. With `toxics`, a restart counts connections from 1. */
  async update(changes: Partial<Route>): Promise<Route> {
    const wanted = { ...this.route, ...changes };
    if (needsReset(wanted)) this.assertResettable();
    const { profile: before } = this.route;
    wanted.host = canonicalHost(wanted.host);
    const moves = !this.isAt(wanted);
    const restarts = moves || wanted.upstream !== this.route.upstream;
    const listens = wanted.enabled && this.#outage?.mode !== "refuse";
    const opens = listens && (moves || !this.#listener);
    if (opens && wanted.localPort === this.#listener?.addr.port) {
      await this.update({ enabled: false }); // frees its own port
    }
    if (!listens) await this.close();
    if (moves) this.#host = undefined;
    if (opens) await this.open(wanted);
    else this.route = { ...wanted, toxics: this.route.toxics };
    const cut = restarts || !wanted.enabled ? this.cut() : undefined;
    const { received, sent } = newCounts();
    if (restarts) this.#counts = { ...this.#counts, received, sent };
    if (changes.toxics) {
      if (restarts) this.lastNumber = 0;
      this.setToxics(changes.toxics);
    } else if (wanted.profile !== before) {
      const gone = toxicsOf(before);
      const own = this.route.toxics.filter((toxic) =>
        !gone.some((each) => isDeepStrictEqual(each, toxic))
      );
      this.setToxics(withProfile(wanted.profile, own));
    }
    if (opens) this.run();
    if (changes.outages) this.followSchedules();
    await cut;
    if (Object.keys(changes).length > 0) this.tell("route_changed");
    return this.route;
  }

  /** Sets its toxics, or those of one of its connections alone. */
  setToxics(toxics: readonly Toxic[], connection?: Connection): void {
    if (toxics.some(resets)) this.assertResettable();
    const { toxics: before } = connection ?? this.route;
    const of = connection?.id ?? { route: this.route.name };
    if (!connection) this.route = { ...this.route, toxics };
    const { emit } = this.context;
    const gone = new Set(before.map(({ name }) => name));
    for (const toxic of toxics) {
      const { name } = toxic;
      const event = gone.delete(name) ? "toxic_changed" : "toxic_added";
      if (before.includes(toxic)) continue;
      const effect = describeToxic(toxic, connection && "this connection");
      emit({ event, ...of, toxic: name, effect });
    }
    for (const toxic of gone) emit({ event: "toxic_removed", ...of, toxic });
    if (!connection) return this.followSchedules();
    connection.setToxics(this.#toxics.select(this.route.toxics), toxics);
  }

  assertResettable(): void {
    if (this.#resettable) return;
    throw new Deno.errors.NotSupported(
      `route ${this.route.name}: its connections cannot be reset; ` +
        "start the proxy with resettable: true, --api or --watch",
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
    const { route, connections: { size: open } } = this;
    const { first, ...counts } = this.#counts;
    const records = first.slice(0, this.lastNumber);
    return { route, open, ...structuredClone(counts), first: records };
  }

  async end(): Promise<void> {
    for (const each of [this.#toxics, this.#outages]) each.follow([]);
    await Promise.all([this.close(), this.cut()]);
  }

  /** Not inlined: the accept loop would keep the last connection in memory. */
  #admit(client: Socket): void {
    const toxics = this.#toxics.select(this.route.toxics);
    let route = { ...this.route, toxics };
    const outage = this.#outage;
    if (outage) {
      if (outage.mode === "reset") client.close("reset");
      const dropRate = outage.mode === "hang" ? 0 : 1;
      const all = { connections: "1-", dropRate, timeoutRate: 1, timeoutMs: 0 };
      route = { ...route, ...all };
    }
    const connection = new Connection(
      client,
      route,
      ++this.lastNumber,
      this.#resettable,
      this.#counts,
      this.context,
    );
    const id = ++this.context.lastId;
    this.connections.set(id, connection);
    if (outage?.mode === "hang") this.#hung.add(connection);
    connection.ended.then(() => {
      this.connections.delete(id);
      this.#hung.delete(connection);
    });
  }
}

/** Merges by name: `next` where it differs from `before`, else `now`. */
function merge<T extends { name: string }>(...lists: (readonly T[])[]): T[] {
  const maps = lists.map((list) => new Map(list.map((one) => [one.name, one])));
  const names = new Set(maps.flatMap((map) => [...map.keys()]));
  return [...names].flatMap((name) => {
    const [next, now, before] = maps.map((map) => map.get(name));
    return (isDeepStrictEqual(next, before) ? now : next) ?? [];
  });
}

/** Merges the settings of a route in the same way, and its toxics. */
function mergeRoute(next: Route, now = next, before = now): Route {
  const changes = Object.entries(next).filter(([key, value]) =>
    !isDeepStrictEqual(value, before[key as keyof Route])
  );
  const toxics = merge(next.toxics, now.toxics, before.toxics);
  return { ...now, ...Object.fromEntries(changes), toxics };
}

const resets = ({ type, toxicity, attributes: { rate, reset } }: Toxic) =>
  toxicity > 0 && (type === "reset_peer" || (reset === 1 && rate !== 0));

const needsReset = ({ toxics, outages }: Route) =>
  toxics.some(resets) ||
  outages.some(({ mode, reset }) => reset || mode === "reset");

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
  readonly #start = performance.now();

  private constructor(private readonly context: ProxyContext) {}

  /** Listens on all routes or none; {@linkcode serveApi} serves the `api`. */
  static async start(
    config: ConfigOptions,
    { onEvent: emit = () => {}, resettable = false }: StartOptions = {},
  ): Promise<ChaosProxy> {
    const checked = checkConfig(config, "config");
    const { seed = randomSeed(), routes } = checked;
    await (this.#warm ??= this.#warmUp(resettable));
    const stopping = new AbortController();
    const settings = { seed, config: checked, resettable, stopping, emit };
    const state = { epoch: 0, lastId: 0, turn: Promise.resolve() };
    const proxy = new ChaosProxy({ ...settings, ...state });
    await proxy.#open(routes);
    for (const each of routes) {
      const warnings = firstOf(warningsOf(each));
      const { name: route } = each;
      if (warnings[0]) emit({ event: "config_warning", route, warnings });
      proxy.#target(route).live.run();
    }
    emit({ event: "started", routes: routes.length, seed });
    proxy.context.epoch = performance.now();
    for (const live of proxy.#routes.values()) live.followSchedules();
    return proxy;
  }

  /**
   * Forwards some connections to compile their code; else the first is 10 to 25
   * ms late. With a second proxy for that, V8 makes all 1.4 times as slow.
   */
  static async #warmUp(resettable: boolean): Promise<void> {
    if (!mayUseLoopback()) return;
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
      const context = { seed: 0, epoch: 0, emit() {} };
      const settings = [resettable, newCounts(), context] as const;
      for (let number = 1; number <= 3; number++) {
        const client = open.use(await Deno.connect(listener.addr));
        const socket = await listener.accept();
        const { ended } = new Connection(socket, route, number, ...settings);
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
      Connection.rest();
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

  /** Whether it accepts connections, and for how long it has run. */
  health(): { status: "ok" | "draining"; version: string; uptimeMs: number } {
    const status = this.context.stopping.signal.aborted ? "draining" : "ok";
    const uptimeMs = toMicroseconds(performance.now() - this.#start);
    return { status, version: deno.version, uptimeMs };
  }

  /** A route as it stands. */
  route(name: string): Route {
    return this.#target(name).live.route;
  }

  /** The toxics of a route, or those of one connection alone. */
  toxics(target: ToxicTarget): readonly Toxic[] {
    return this.#target(target).toxics;
  }

  /** A toxic as it stands. */
  toxic(target: ToxicTarget, name: string): Toxic {
    const { toxics, what } = this.#target(target);
    const toxic = toxics.find((each) => each.name === name);
    if (toxic) return toxic;
    throw new Deno.errors.NotFound(`${what} has no toxic ${name}`);
  }

  /** Adds a route, with its toxics, and listens on it. */
  async addRoute(options: RouteOptions): Promise<Route> {
    const route = validate("route", (place) => checkRoute(options, place));
    return await inTurn(this.context, () => this.#add(route as Route));
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
    return await inTurn(this.context, () => this.#change(name, checked));
  }

  /** Removes a route, and cuts its connections. */
  async removeRoute(name: string): Promise<void> {
    await inTurn(this.context, () => this.#remove(name));
  }

  /**
   * Adds these routes, or replaces those of their names that listen or forward
   * elsewhere, and leaves the others alone. If one fails, those before it stay.
   */
  async populate(options: readonly RouteOptions[]): Promise<Route[]> {
    const check = (place: Place) => checkRoutes(options, place.at("routes"));
    const routes = validate("routes", check);
    return await inTurn(this.context, () =>
      Array.fromAsync(routes, (route) => {
        const live = this.#routes.get(route.name);
        if (!live) return this.#add(route);
        // For port 0, the port that it has already will do.
        const localPort = route.localPort || live.route.localPort;
        const here = { ...route, localPort };
        const isSame = live.isAt(here) &&
          live.route.upstream === route.upstream;
        return isSame ? live.route : this.#change(route.name, here);
      }));
  }

  /**
   * Changes what differs from the last config, and nothing else. If a route
   * cannot listen, it does all others, then throws {@linkcode ListenError}. The
   * next reload tries this route again.
   */
  async reload(config: ConfigOptions): Promise<void> {
    const checked = checkConfig(config, "config");
    await inTurn(this.context, () => this.#reload(checked));
  }

  /** Removes all toxics, and enables every route that can be listened on. */
  async reset(): Promise<void> {
    await inTurn(this.context, async () => {
      const all = await Promise.allSettled(
        this.#routes.values().map((live) => {
          live.route = { ...live.route, profile: "" };
          live.setToxics([]);
          for (const one of live.connections.values()) live.setToxics([], one);
          if (!live.route.enabled) return live.update({ enabled: true });
        }),
      );
      const failed = all.find((each) => each.status === "rejected");
      if (failed) throw failed.reason;
    });
  }

  /** Adds a toxic behind those that are there, also on open connections. */
  addToxic(target: ToxicTarget, options: ToxicOptions): Toxic {
    const { live, connection, toxics, what } = this.#target(target);
    const toxic = validate("toxic", (place) => checkToxic(options, place));
    const all = connection ? [...live.route.toxics, ...toxics] : toxics;
    if (all.some(({ name }) => name === toxic.name)) {
      const problem = `${what} has a toxic ${toxic.name} already`;
      throw new Deno.errors.AlreadyExists(problem);
    }
    if (all.length >= MAX_TOXICS) {
      const most = `${MAX_TOXICS} toxics, the most that it may have`;
      throw new ConfigError("toxic", [`${what} has ${most}`]);
    }
    live.setToxics([...toxics, toxic], connection);
    return toxic;
  }

  /** Changes what is given of a toxic, and schedules again what it holds. */
  updateToxic(
    target: ToxicTarget,
    name: string,
    changes: Partial<Omit<ToxicOptions, "name" | "type" | "stream">>,
  ): Toxic {
    const { live, connection, toxics } = this.#target(target);
    const toxic = this.toxic(target, name);
    const changed = validate("toxic", (place) => {
      const given = checkFields(changes, place, CHANGES, true);
      const next = { ...toxic, attributes: {}, ...given };
      return checkToxic(next, place, toxic.attributes);
    });
    live.setToxics(toxics.with(toxics.indexOf(toxic), changed), connection);
    return changed;
  }

  /** Removes a toxic and releases what it holds; a `timeout` closes instead. */
  removeToxic(target: ToxicTarget, name: string): void {
    const { live, connection, toxics } = this.#target(target);
    const toxic = this.toxic(target, name);
    live.setToxics(toxics.filter((each) => each !== toxic), connection);
  }

  /** The connections in flight. */
  liveConnections(): LiveConnection[] {
    return Array.from(this.#live, ([id, { state }]) => ({ id, ...state }));
  }

  /** Cuts a connection; `reset` sends a RST to both sides. */
  cutConnection(id: number, how: "close" | "reset" = "close"): void {
    const { live, connection } = this.#target({ connection: id });
    if (how === "reset") live.assertResettable();
    connection?.end({ why: "cut" }, how);
  }

  /** Sets the seed, 0 to 2^53 - 1 or a random one; numbers start at 1 again. */
  reseed(seed: number = randomSeed()): void {
    checkArgument("seed", seed, CONFIG_FIELDS.seed.guard);
    Object.assign(this.context, { seed, epoch: performance.now() });
    for (const route of this.#routes.values()) route.lastNumber = 0;
    this.context.emit({ event: "reseeded", seed });
    for (const route of this.#routes.values()) route.followSchedules();
  }

  /** The statistics of the connections, by route. */
  stats(): RouteStats[] {
    return [...this.#routes.values().map((route) => route.stats())];
  }

  /** What the connections have met so far. */
  report(): Report {
    const { version, uptimeMs: durationMs } = this.health();
    const routes = structuredClone(this.stats());
    const warnings = routes.flatMap(missedFaults);
    return { version, seed: this.seed, durationMs, warnings, routes };
  }

  /**
   * Accepts nothing more, and cuts the connections that are left after
   * `timeoutMs`, by default the config's. Returns how many were cut.
   */
  async drain(timeoutMs = this.context.config.drainTimeoutMs): Promise<number> {
    checkArgument("timeoutMs", timeoutMs, milliseconds);
    const start = performance.now();
    const ended = this.#end();
    const { emit } = this.context;
    emit({ event: "draining", connections: this.connections, timeoutMs });
    const timer = timeoutMs > 0 ? setTimeout(() => this.#cut(), timeoutMs) : 0;
    await ended;
    clearTimeout(timer);
    const cut = sum(this.stats().map(({ ended }) => ended.drain ?? 0));
    const durationMs = toMicroseconds(performance.now() - start);
    emit({ event: "drained", cut, durationMs });
    return cut;
  }

  /** Stops at once: closes the listeners, cuts the connections in flight. */
  async stop(): Promise<void> {
    await Promise.all([this.#end(), this.#cut()]);
  }

  /** Stops at once, as {@linkcode ChaosProxy.stop} does. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.stop();
  }

  get #live() {
    const routes = this.#routes.values();
    return new Map(routes.flatMap(({ connections }) => connections));
  }

  /** Finds a route, or an open connection and its route; and its toxics. */
  #target(target: ToxicTarget) {
    const isName = typeof target === "string";
    const what = isName ? `route ${target}` : `connection ${target.connection}`;
    const connection = isName ? undefined : this.#live.get(target.connection);
    const name = isName ? target : connection?.route.name ?? "";
    const live = this.#routes.get(name);
    if (!live) throw new Deno.errors.NotFound(`there is no ${what}`);
    const { toxics } = connection ?? live.route;
    return { live, connection, toxics, what };
  }

  async #add(route: Route): Promise<Route> {
    const { name } = route;
    if (this.#routes.has(name)) {
      throw new Deno.errors.AlreadyExists(`there is a route ${name} already`);
    }
    await this.#open([route]);
    const { live } = this.#target(name);
    live.tell("route_added");
    live.run();
    live.followSchedules();
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

  async #change(name: string, changes: Partial<Route>): Promise<Route> {
    const { live } = this.#target(name);
    const others = this.#routes.values().filter((each) => each !== live);
    const changed = { ...live.resolved, ...changes };
    assertNoCircle([...others.map(({ resolved }) => resolved), changed]);
    return await live.update(changes);
  }

  async #remove(name: string): Promise<void> {
    const { live } = this.#target(name);
    this.#routes.delete(name);
    live.route = { ...live.route, enabled: false }; // no outage reopens it
    await live.end();
    this.context.emit({ event: "route_removed", route: name });
  }

  async #reload(config: Config): Promise<void> {
    const { context: { config: last, emit }, routes: now } = this;
    if (config.api !== last.api) {
      const problem = "api: cannot change; restart the proxy";
      throw new ConfigError("config", [problem]);
    }
    const all = merge(config.routes, now, last.routes);
    const before = new Map(last.routes.map((route) => [route.name, route]));
    const liveOf = ({ name }: Route) => this.#routes.get(name);
    const wanted = (route: Route) =>
      mergeRoute(route, liveOf(route)?.route, before.get(route.name));
    for (const route of all.map(wanted)) {
      if (needsReset(route)) liveOf(route)?.assertResettable();
    }
    assertNoCircle(all.map(wanted));
    const removed = now.map(({ name }) => name)
      .filter((name) => !all.some((each) => each.name === name));
    for (const name of removed) await this.#remove(name);
    const [added, changed]: [string[], string[]] = [[], []];
    const failed = new Map<string, Error>();
    const isNew = (route: Route) => Number(!liveOf(route));
    const steps = all.filter((route) => !now.includes(route))
      .sort((a, b) => isNew(a) - isNew(b)); // new ones can take freed ports
    for (const route of steps) {
      const live = liveOf(route);
      await (live ? live.update(wanted(route)) : this.#add(route)).then(
        ({ name }) => (live ? changed : added).push(name),
        (error) => failed.set(route.name, error),
      );
    }
    const routes = config.routes.flatMap((route) =>
      failed.has(route.name) ? liveOf(route)?.route ?? [] : route
    );
    const { seed = last.seed } = config;
    this.context.config = { ...config, seed, routes };
    if (seed !== undefined && seed !== last.seed) this.reseed(seed);
    emit({ event: "reloaded", added, changed, removed });
    const [error, ...others] = new Set(failed.values());
    for (const { message } of others) error!.message += `\n  ${message}`;
    if (error) throw error;
  }

  /** Accepts nothing more; resolves when all that was under way has ended. */
  async #end(): Promise<void> {
    const error = new Deno.errors.BadResource("the proxy is shutting down");
    this.context.stopping.abort(error);
    const closed = this.#routes.values().map((route) => route.close());
    const ended = this.#live.values().map(({ ended }) => ended);
    await Promise.all([this.context.turn, ...closed, ...ended]);
    for (const route of this.#routes.values()) route.end();
    Connection.rest();
  }

  #cut(): void {
    for (const each of this.#live.values()) each.end({ why: "drain" });
  }
}

const sum = (numbers: number[]) => numbers.reduce((sum, each) => sum + each, 0);

const randomSeed = () => Math.floor(Math.random() * 2 ** 32);

function assertNoCircle(routes: readonly Route[]): void {
  const circle = findCircle(routes);
  if (!circle) return;
  const { route: { name }, problem } = circle;
  throw new ConfigError(`route ${name}`, [`upstream: ${problem}`]);
}

function describeFaults(route: Route): string {
  const { dropRate, timeoutRate, timeoutMs, latencyMs, jitterMs } = route;
  const faults = [
    !route.enabled && "disabled",
    dropRate > 0 && `drop ${percent(dropRate)}`,
    timeoutRate > 0 && `time out ${percent(timeoutRate)}${until(timeoutMs)}`,
    (latencyMs > 0 || jitterMs > 0) &&
    `latency ${latencyMs}${plusMinus(jitterMs)} ms`,
    route.connections !== "1-" && `these on connections ${route.connections}`,
    route.profile && `profile ${route.profile}`,
    ...route.outages.map((outage) => `outage${listed(outage)}`),
    ...route.toxics.map((toxic) => describeToxic(toxic)),
  ];
  return faults.filter(Boolean).join(", ") || "no faults";
}

function missedFaults({ route, connections, faults, toxics }: RouteStats) {
  if (connections === 0) return [`${route.name}: no connection`];
  const rates = (["dropRate", "timeoutRate", "latencyMs"] as const)
    .filter((kind) => route[kind] > 0 && !faults[kind])
    .map((kind) => `${kind} ${route[kind]}`);
  const idle = route.toxics.filter(({ name }) => !Object.hasOwn(toxics, name))
    .map(({ name }) => `toxic ${name}`);
  const none = `acted on none of ${count(connections, "connection")}`;
  return [...rates, ...idle].map((each) => `${route.name}: ${each}: ${none}`);
}

const until = (timeoutMs: number) =>
  timeoutMs > 0 ? ` for ${timeoutMs} ms` : " until the client leaves";

const count = (number: number, what: string) =>
  `${number} ${what}${number === 1 ? "" : "s"}`;

// ---- Control API: Toxiproxy's protocol, over the proxy ----------------------

/** An event of the control API. */
export type ApiEvent =
  | { event: "api_listening"; address: string }
  | {
    event: "api";
    /** The answer's `X-Toxiproxy-Request-Id`. */
    request: string;
    method: string;
    path: string;
    status: number;
    error?: string;
    /** What was ignored in its body, or taken otherwise, by path. */
    ignored?: string[];
    durationMs: number;
  }
  | { event: "api_failed"; cause: string };

/** Options of the control API. */
export interface ApiOptions {
  /** Called with each event; must not throw. */
  onEvent?: (event: ApiEvent) => void;
}

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
  readonly target: ToxicTarget;
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
  "GET /proxies/*/toxics": ({ proxy, target }) => proxy.toxics(target),
  "POST /proxies/*/toxics"({ proxy, target, check }) {
    proxy.toxics(target); // what is not found comes before a wrong body
    return proxy.addToxic(target, check(checkToxic));
  },
  "GET /proxies/*/toxics/*": ({ proxy, target, toxic }) =>
    proxy.toxic(target, toxic),
  "POST /proxies/*/toxics/*": updateToxic,
  "PATCH /proxies/*/toxics/*": updateToxic,
  "DELETE /proxies/*/toxics/*": ({ proxy, target, toxic }) =>
    proxy.removeToxic(target, toxic),
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
    if (!/^[01]$/.test(reset)) {
      throw new Refusal(400, `expected reset=0 or 1, found ${describe(reset)}`);
    }
    proxy.cutConnection(Number(name), reset === "1" ? "reset" : "close");
  },
  "GET /health"({ proxy }) {
    const now = proxy.health();
    return Response.json(now, { status: now.status === "ok" ? 200 : 503 });
  },
  "GET /report": ({ proxy }) => proxy.report(),
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

function updateToxic({ proxy, target, toxic, check }: Call): Toxic {
  const now = proxy.toxic(target, toxic);
  const fields = {
    ...CHANGES,
    attributes: {
      ...TOXIC_FIELDS.attributes,
      normalize: changesOf(TOXICS[now.type].attributes),
    },
    name: stays(now.name),
    type: stays(now.type),
    stream: stays(now.stream),
  };
  return proxy.updateToxic(target, toxic, check(changesOf(fields)));
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

function asProxy({ host, localPort, toxics, ...rest }: Route) {
  const { name, upstream, enabled, ...beyond } = rest;
  const listen = addressOf({ hostname: host, port: localPort });
  return { name, listen, upstream, enabled, toxics, ...beyond };
}

const changesOf = <T>(fields: Fields<T>) => (body: unknown, place: Place) =>
  checkFields(body, place, fields, true);

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
      refuseForeign(request, loopback);
      answer = await respond(request, proxy, ignored);
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

async function respond(request: Request, proxy: ChaosProxy, ignored: string[]) {
  const url = new URL(request.url);
  const { pathname } = url;
  const path = pathname.replace(/(\/[^/]+)\/[^/]+/g, "$1/*")
    .replace("/connections/*/toxics", "/proxies/*/toxics"); // the same calls
  const method = request.method.replace("HEAD", "GET");
  const answerTo = CALLS[`${method} ${path}`];
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
  const [, kind, name = "", , toxic = ""] = pathname.split("/").map(unescape);
  const target = kind === "connections" ? { connection: Number(name) } : name;
  const body = await readText(request.body ?? new Blob().stream(), false);
  if (new TextEncoder().encode(body).length > MAX_CONFIG_BYTES) {
    throw new Refusal(413, "expected a body of at most 1 MiB, found more");
  }
  const check: Call["check"] = (check) =>
    validate("body", (place) => check(readJson(body, "body"), place), ignored);
  const answer = await answerTo({ proxy, url, name, target, toxic, check });
  if (answer === undefined) return new Response(null, { status: 204 });
  return answer instanceof Response ? answer : Response.json(answer);
}

/** @throws {Refusal} If a web page may have sent a request. */
function refuseForeign(request: Request, loopback: boolean): void {
  const url = URL.parse(request.url);
  if (url === null) {
    throw new Refusal(400, "expected a Host that is a host name or an address");
  }
  if (request.headers.get("user-agent")?.startsWith("Mozilla/")) {
    throw new Refusal(403, "requests from browsers are refused");
  }
  const origin = request.headers.get("origin");
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

/** Reads text in UTF-8; of what may have no end, little more than 1 MiB. */
async function readText(stream: ReadableStream<Bytes>, fatal: boolean) {
  const decoder = new TextDecoderStream("utf-8", { fatal });
  let text = "";
  for await (const part of stream.pipeThrough(decoder)) {
    text += part;
    if (text.length > MAX_CONFIG_BYTES) break;
  }
  return text;
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
  [/^(?:route|connection) \S+ has no toxic .*/s, "toxic not found"],
  [/^(?:route|connection) \S+ has a toxic .*/, "toxic already exists"],
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
 * Throws `RangeError` if the address is not valid, or {@linkcode ListenError}.
 */
export function serveApi(
  proxy: ChaosProxy,
  address: number | string = 8474,
  { onEvent = () => {} }: ApiOptions = {},
): ApiServer {
  checkArgument("address", address, apiAddress);
  const stop = new AbortController();
  const { signal } = stop;
  const serve = (at: Address) =>
    serveHttp("control API", at, (request) => answer(request), signal);
  const server = serve(splitApi(address) as Address);
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

function metrics(stats: RouteStats[]): string {
  type Counts = "ended" | "faults" | "on" | "received" | "sent";
  const counts = (of: Counts, by?: string) =>
    stats.flatMap(({ route, [of]: counted }) => {
      const { name: proxy, listen: listener, upstream } = asProxy(route);
      return Object.entries(counted).map(([key, value]) => {
        const ofBytes = { direction: key, listener, proxy, upstream };
        return sample(by ? { proxy, [by]: key } : ofBytes, value);
      });
    });
  const bounds = [...DIAL_BOUNDS_MS.map((ms) => `${ms / 1000}`), "+Inf"];
  const families: Record<string, [help: string, samples: string[]]> = {
    "counter toxiproxy_proxy_received_bytes_total": [
      "Bytes read: upstream, from clients; downstream, from the upstream.",
      counts("received"),
    ],
    "counter toxiproxy_proxy_sent_bytes_total": [
      "Bytes written: upstream, to the upstream; downstream, to clients.",
      counts("sent"),
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
        ...bounds.map((le, i) =>
          sample({ proxy, le }, dials.within[i] ?? dials.count, "_bucket")
        ),
        sample({ proxy }, dials.totalMs / 1000, "_sum"),
        sample({ proxy }, dials.count, "_count"),
      ]),
    ],
    "counter chaos_proxy_faults_total": [
      "How often a fault was injected into a connection, by its kind.",
      counts("faults", "kind"),
    ],
    "gauge chaos_proxy_scheduled_on": [
      "Whether a toxic or an outage is on, or on how many connections.",
      counts("on", "name"),
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
  | { event: "report"; summary: string; warnings: string[]; file: string }
  | { event: "reload_failed"; cause: string }
  /** A SIGHUP came, but there is no file to read again. */
  | { event: "sighup_ignored" };

/** What a line of text says after the name of an event. */
const TEXTS: { [E in LogEvent as E["event"]]: (event: E) => string } = {
  listening: ({ address, upstream, faults }) =>
    ` ${address} -> ${upstream} (${faults})`,
  started: ({ routes, seed }) => ` ${count(routes, "route")}, seed ${seed}`,
  accepted: ({ upstream }) => ` -> ${upstream}`,
  dropped: () => "",
  timed_out: ({ timeoutMs }) => until(timeoutMs),
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
  toxic_on: ({ toxic }) => ` ${toxic}`,
  toxic_off: ({ toxic }) => ` ${toxic}`,
  outage_on: ({ outage }) => ` ${outage}`,
  outage_off: ({ outage }) => ` ${outage}`,
  reseeded: ({ seed }) => ` with ${seed}`,
  reloaded: ({ added, changed, removed }) =>
    ` added [${added}], changed [${changed}], removed [${removed}]`,
  reload_failed: ({ cause }) => ` ${cause.replace(/\n */g, "; ")}`,
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
  report: ({ summary, file }) => ` ${summary}; written to ${file}`,
  sighup_ignored: () => "; nothing was done",
};

function levelOf(event: LogEvent): LogLevel {
  const isWarning = /_(?:failed|warning|dropped|ignored)$/.test(event.event) ||
    "ignored" in event ||
    (event.event === "report" && event.warnings.length > 0) ||
    ("cut" in event && event.cut > 0) ||
    (event.event === "api_listening" && isOpen(event.address));
  if (isWarning) return "warn";
  return event.event === "api" ? "debug" : "info";
}

/** Whether others than this machine may reach an address. */
const isOpen = (address: string) =>
  !isLoopback(splitAddress(address)?.hostname ?? "");

const MAX_QUEUED_LINES = 5000;
const LINES_A_WRITE = 64;
const WRITE_RETRY_MS = 100;
const MAX_STALL_MS = 2000;

/** Writes a problem to standard error; waits at most 2 s if nobody reads it. */
async function complain(problem: string): Promise<void> {
  const text = new Blob([`chaos-proxy: ${problem}\n`]).stream();
  const written = text.pipeTo(Deno.stderr.writable, { preventClose: true })
    .catch(() => {}); // there is nowhere else to say it
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
      const { connection, client = "" } = event as Partial<ConnectionEvent>;
      const number = connection ? `#${connection}` : "";
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

Usage: chaos-proxy [options] <config> | <route>...
  <config>             YAML, or .json; - is standard input; none with --api
  <route>              [host:]port=upstream key=value... toxic=type,key=value...

Options:
  --api [host:]port    serve Toxiproxy's API there; so do its -host and -port
  --check              check the config, print its routes and faults, and exit
  --print-config       print the config as YAML, without defaults, and exit
  --preview <n>        print what the seed decides for the first n connections
  --schema             print the JSON Schema of a config, for editors, and exit
  --seed <number>      use this seed instead of the config's
  --drain-timeout <ms> wait this long for open connections; 0 waits for ever
  --log-level <level>  debug, info (the default), warn or error
  --log-format <form>  text (the default) or json; each event is one line
  --report <file>      write a report there at the end; - is standard output
  --watch              reload the config each time that its file has changed
  --demo               serve HTTP on port ${DEMO.port}, and run the example
  -h, --help           print this help and exit
  -V, --version        print the version and exit

Example:
  chaos-proxy --seed 42 config.yaml

SIGHUP reloads the config. SIGINT and SIGTERM wait for open connections; a later
second one ends at once. Exit codes: 0 a clean end; 1 a failure, or connections
were cut; 2 a wrong argument or config.`;

const LOG_LEVEL = oneOf<LogLevel>("debug", "info", "warn", "error");
/** Options of toxiproxy-server's that change nothing: metrics are always on. */
const METRICS = ["proxy-metrics", "runtime-metrics"] as const;
const INFO = ["help", "schema", "version"] as const;
const MODES = ["check", "print-config"] as const;
const FLAGS = [...MODES, "demo", "watch", ...INFO, ...METRICS] as const;
const SETTINGS = [
  ...["api", "drain-timeout", "log-format", "log-level", "report"] as const,
  ...["config", "host", "port", "seed"] as const, // also toxiproxy-server's
  "preview",
] as const;
const OPTIONS = [...FLAGS, ...SETTINGS].map((name) => `--${name}`);
const WRONG_FLAG = RegExp(`^--(?:${FLAGS.join("|")})=(?!(?:true|false)$)`);

/** @throws {ConfigError} If an argument is unknown, missing or wrong. */
function readCommandLine(written: string[]) {
  const end = [...written, "--"].indexOf("--");
  const operands: string[] = [];
  const args = written.slice(0, end)
    .map((arg) => arg.replace(/^-(?=[a-z][a-z-])/, "--")); // one dash will do
  const at = args.indexOf("--report");
  if (args[at] && args[at + 1] === "-") args.splice(at, 2, "--report=-");
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

  const { config, demo, help, schema, version, watch } = flags;
  operands.push(...written.slice(end + 1));
  const isQuick = operands.some((each) => /^[^=/\\]+=/.test(each));
  if (config !== undefined) operands.push(config); // always a file
  const [mode, other] = [...MODES, "preview" as const]
    .filter((name) => flags[name]);
  if (other) throw new ConfigError(`--${other}`, [`write this or --${mode}`]);
  const host = read("host", listenHost);
  const port = read("port", integer(0, 65535));
  let api = read("api", apiAddress);
  if (api !== undefined && (host ?? port) !== undefined) {
    throw new ConfigError("--api", ["write either this, or --host and --port"]);
  }
  if ((host ?? port ?? config) !== undefined) {
    api ??= addressOf({ hostname: host ?? "localhost", port: port ?? 8474 });
  }
  const needsFile = !demo && (mode || api === undefined);
  const isWrong = operands.length > 1 || (operands.length < 1 && needsFile);
  const isInfo = INFO.some((name) => flags[name]);
  if (isWrong && !isQuick && !isInfo) {
    const found = operands.join(" and ") ||
      "none; to run without one, write --api 8474";
    throw new ConfigError("<config>", [`expected one file, found ${found}`]);
  }
  if (watch && (isQuick || /^-?$/.test(operands[0] ?? "")) && !isInfo) {
    throw new ConfigError("--watch", ["write the name of a config file, too"]);
  }
  return {
    ...{ demo, help, schema, version, watch, mode, operands, isQuick },
    preview: read("preview", integer(1, 100_000)),
    isDriven: operands.length === 0 && !demo, // by the API alone
    given: { // takes precedence over the config
      seed: read("seed", CONFIG_FIELDS.seed.guard),
      drainTimeoutMs: read("drain-timeout", milliseconds),
      api,
    },
    report: read(
      "report",
      guard("the name of a file; - is standard output", isText, Boolean),
    ),
    logLevel: read("log-level", LOG_LEVEL) ?? "info",
    isJson: read("log-format", oneOf("text", "json")) === "json",
  };
}

/** `[host:]port=upstream`, or `key=value` with a comma before it in a toxic. */
const SETTING = /^(?:(?:\[?([^=]*?)\]?:)?(0|[1-9]\d*)|(,?)([^=]+))=(.+)$/s;

/** Reads routes, such as `1=a:2 latencyMs=5 toxic=bandwidth,rate=64 3=b:4`. */
function readRoutes(operands: readonly string[], source: string) {
  const routes: Record<string, unknown>[] = [];
  const settings = operands.flatMap((each) =>
    each.startsWith("toxic=") ? each.split(/(?=,)/) : each
  );
  for (const setting of settings) {
    const [, host, port, comma, path, text = ""] = SETTING.exec(setting) ?? [];
    const route = routes.at(-1);
    const toxics = [route?.["toxics"] ?? []].flat() as typeof routes;
    if (port) {
      routes.push({ host, localPort: Number(port), upstream: text });
    } else if (!route || !path) {
      const expected = route ? "key=value" : "[host:]port=upstream first";
      const found = describe(setting.replace(/=.+/s, "=…"));
      throw new ConfigError(source, [`expected ${expected}, found ${found}`]);
    } else if (path === "toxic") {
      route["toxics"] = [...toxics, { type: text, attributes: {} }];
    } else {
      const keys = path.split(".");
      const isOwn = Object.hasOwn(TOXIC_FIELDS, keys[0] ?? "");
      if (comma && !isOwn) keys.unshift("attributes");
      const last = keys.pop() ?? "";
      const of = (comma && toxics.at(-1)) || route;
      const at = keys.reduce((at, key) => at[key] = { ...Object(at[key]) }, of);
      at[last] = errorInJson(text) ? text : readJson(text, source);
    }
  }
  return { routes };
}

async function readFile(name: string, path = name): Promise<string> {
  try {
    const file = name === "-" ? Deno.stdin : await Deno.open(name);
    return await readText(file.readable, true);
  } catch (error) {
    const problem = error instanceof TypeError
      ? "expected text in UTF-8, found other bytes"
      : causeOf(error);
    throw new ConfigError(path, [problem]);
  }
}

/** Removes what `check` fills in again. */
function removeDefaults(tree: object, check: () => unknown, all = check()) {
  for (const [key, value] of Object.entries(tree)) {
    const index = Array.isArray(tree) ? tree.indexOf(value) : -1;
    if (Array.isArray(tree)) tree.splice(index, 1);
    else Reflect.deleteProperty(tree, key);
    if (isDeepStrictEqual(check(), all)) continue;
    if (Array.isArray(tree)) tree.splice(index, 0, value);
    else Reflect.set(tree, key, value);
    if (isTree(value)) removeDefaults(value, check, all);
  }
}

/** A config as YAML. Throws if a proxy of Toxiproxy's is not a valid route. */
function toYaml(config: Config, path: string): string {
  const { routes, ...rest } = checkConfig(structuredClone(config), path);
  const place = new Place("", []);
  removeDefaults(rest, () => checkFields(rest, place, CONFIG_FIELDS));
  for (const route of routes) {
    removeDefaults(route, () => checkRoute(route, place));
  }
  return stringify({ ...rest, routes }).slice(0, -1);
}

/** What the seed decides for the first connections of a route. */
function preview(route: Route, seed: number, length = 0, isJson = false) {
  const connections = Array.from({ length }, (_, i) => {
    const { kind: decision, ...more } = decide(seed, route, i + 1);
    const { delayMs, toxics: acting } = { delayMs: 0, toxics: [], ...more };
    const toxics = acting.map(({ name }) => name);
    return { number: i + 1, decision, delayMs, toxics };
  });
  if (isJson) return JSON.stringify({ seed, route: route.name, connections });
  return [`${route.name}: seed ${seed}`, ...tableOf(connections)].join("\n");
}

/** A table with a line for each object, and a column for each field. */
function tableOf(rows: readonly object[]): string[] {
  const heads = Object.keys(rows[0] ?? {}).map((key) => key.toUpperCase());
  const lines = [heads, ...rows.map((row) => Object.values(row).map(String))];
  const widths = heads.map((_, i) =>
    lines.reduce((most, line) => Math.max(most, line[i]?.length ?? 0), 0)
  );
  return lines.map((line) =>
    line.map((cell, i) => cell.padEnd(widths[i] ?? 0)).join("  ").trimEnd()
  );
}

function summarize(config: Config, path: string): string {
  const { routes, seed, drainTimeoutMs, api } = config;
  const limit = drainTimeoutMs > 0
    ? `within ${drainTimeoutMs} ms`
    : "without a limit";
  const summary = `${path}: ${count(routes.length, "route")}, ` +
    `${seed === undefined ? "a random seed" : `seed ${seed}`}, drain ${limit}` +
    (api === undefined ? "" : `, api ${api}`);
  const table = tableOf(routes.map((route) => ({
    route: route.name,
    listen: asProxy(route).listen,
    upstream: route.upstream,
    faults: describeFaults(route),
  })));
  const warnings = firstOf(routes.flatMap(warningsOf))
    .map((each) => `warning: ${each}`);
  return [summary, ...table, ...warnings].filter(Boolean).join("\n");
}

/** Writes a report in one step; without one, tries whether it could. */
async function writeReport(file: string, report?: Report): Promise<void> {
  const path = `${file}.${crypto.randomUUID()}.tmp`;
  try {
    for (const name of ["read", "write"] as const) {
      const { state } = await Deno.permissions.query({ name, path });
      if (state !== "granted") throw new Error(`it takes --allow-${name}`);
    }
    const found = await Deno.stat(file).catch(() => null); // it is new
    if (found?.isFile === false) throw new Error("it is not a file");
    await Deno.writeTextFile(path, `${JSON.stringify(report, null, 2)}\n`);
    await (report ? Deno.rename(path, file) : Deno.remove(path));
  } catch (error) {
    const cause = causeOf(error).replace(/: \w+ '.*/s, ""); // the other path
    throw new ConfigError(`--report ${file}`, [`cannot be written: ${cause}`]);
  }
}

type Line = ReturnType<typeof readCommandLine>;

async function run(config: Config, line: Line, state: string) {
  const stop = signal();
  const { api, routes } = config;
  const width = Math.max(0, ...routes.map(({ name }) => name.length));
  await using log = new EventLog(line.logLevel, line.isJson, width);
  const onEvent = log.add;
  let onHangUp = () => onEvent({ event: "sighup_ignored" });
  if (!IS_WINDOWS) Deno.addSignalListener("SIGHUP", () => onHangUp());
  const { report: file } = line;
  if (file && file !== "-") await writeReport(file);
  if (line.demo && routes.some((each) => each.upstream === addressOf(DEMO))) {
    const hello = "Hello from behind the proxy!\n";
    serveHttp("demo upstream", DEMO, ({ body }) => new Response(body ?? hello));
  }
  const resettable = api !== undefined || line.watch; // for a later `reset_peer`
  await using proxy = await ChaosProxy.start(config, { onEvent, resettable });
  await using server = api ? serveApi(proxy, api, { onEvent }) : null;
  const end = async () => {
    if (!file) return;
    const report = proxy.report();
    if (file !== "-") await writeReport(file, report);
    await log[Symbol.asyncDispose](); // a full queue would drop the report
    const { routes, warnings } = report;
    const connections = sum(routes.map((each) => each.connections));
    const faults = sum(routes.flatMap((each) => Object.values(each.faults)));
    const summary = `${count(routes.length, "route")}, ` +
      `${count(connections, "connection")}, ` +
      `${count(faults, "fault")} injected, ` +
      count(warnings.length, "warning");
    onEvent({ event: "report", summary, warnings, file });
    if (file === "-") log.log(JSON.stringify(report));
    await log[Symbol.asyncDispose]();
  };
  const path = line.isQuick ? "-" : line.operands[0] ?? "-";
  let last = state;
  const look = async (isAsked: boolean) => {
    const now = await stateOf(path);
    const isStill = now === last;
    last = now;
    if (!isAsked && (!isStill || now === state)) return;
    state = now;
    try {
      await proxy.reload(parseConfig(await readFile(path), path, line.given));
    } catch (error) {
      onEvent({ event: "reload_failed", cause: causeOf(error) });
    }
  };
  if (path !== "-") onHangUp = () => void look(true);
  const timer = line.watch ? setInterval(look, LOOK_MS, false) : 0;
  await stop;
  clearInterval(timer);
  // A terminal and the task runner may both pass on the same Ctrl-C.
  sleep(SAME_SIGNAL_MS).then(signal).then(async () => {
    await complain("ended at once by a second signal");
    await end().catch(({ message }) => complain(message));
    Deno.exit(1);
  });
  const cut = await proxy.drain();
  await server?.close();
  await end();
  // 0 as from Toxiproxy, which test suites stop while connections are open.
  return cut > 0 && !line.isDriven ? 1 : 0;
}

/** Changes when the file does. `Deno.watchFs` misses changes on some mounts. */
const stateOf = (path: string) =>
  Deno.stat(path)
    .then(({ mtime, size, ino }) => `${[Number(mtime), size, ino]}`, causeOf);

const LOOK_MS = 500;
const SAME_SIGNAL_MS = 500;
const IS_WINDOWS = Deno.build.os === "windows";
const SIGNALS = ["SIGINT", IS_WINDOWS ? "SIGBREAK" : "SIGTERM"] as const;

const signal = () =>
  new Promise<void>((resolve) => {
    for (const each of SIGNALS) Deno.addSignalListener(each, resolve);
  });

async function main(args: string[]): Promise<number> {
  try {
    const line = readCommandLine(args);
    if (line.help || line.schema || line.version) {
      const schema = line.schema && JSON.stringify(CONFIG_SCHEMA, null, 2);
      console.log(line.help ? HELP : schema || `chaos-proxy ${deno.version}`);
      return 0;
    }
    const { operands: [file], isQuick, given, mode } = line;
    const name = file?.replace(/^-$/, "standard input");
    const path = isQuick ? "command line" : name ?? "config.example.yaml";
    const builtIn = line.isDriven ? "drainTimeoutMs: 1000" : example;
    const state = line.watch ? await stateOf(path) : "";
    const config = isQuick
      ? checkConfig(readRoutes(line.operands, path), path, given)
      : parseConfig(file ? await readFile(file, path) : builtIn, path, given);
    if (mode === undefined) return await run(config, line, state);
    if (mode === "check") console.log(summarize(config, path));
    if (mode === "print-config") console.log(toYaml(config, path));
    const { seed = randomSeed() } = config;
    for (const route of mode === "preview" ? config.routes : []) {
      console.log(preview(route, seed, line.preview, line.isJson));
    }
    return 0;
  } catch (error) {
    const isConfig = error instanceof ConfigError;
    if (!isConfig && !(error instanceof ListenError)) throw error;
    await complain(error.message);
    return isConfig ? 2 : 1;
  }
}

if (import.meta.main) Deno.exit(await main(Deno.args));
