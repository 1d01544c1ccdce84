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
import help from "./help.txt" with { type: "text" };
import page from "./page.html" with { type: "text" };

// ---- Validation: guards, fields, addresses, and hints in messages -----------

/** A configuration is not valid. It lists all problems, not just the first. */
export class ConfigError extends Error {
  /** Each of a source's problems begins with a path: `routes[0].name: …`. */
  constructor(source: string, readonly problems: readonly string[]) {
    const all = [`${problems.length} problems`, ...firstOf(problems)];
    const shown = problems.length === 1 ? problems : all;
    super(`${source}: ${shown.join("\n  ")}`);
    this.name = "ConfigError";
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
    const name = /^[\w-]{1,64}$/.test(`${key}`) ? key : describe(key);
    const step = isNumber(key) ? `[${key}]` : `.${name}`;
    const path = `${this.path}${step}`.replace(/^\./, "");
    return new Place(path, this.problems, this.ignored);
  }

  refuse(problem: string): void {
    this.problems.push(this.path ? `${this.path}: ${problem}` : problem);
  }

  ignore(how = ""): void {
    this.ignored?.push(how ? `${this.path}: ${how}` : this.path);
  }
}

function validate<T>(source: string, check: (place: Place) => T): T {
  const place = new Place("", []);
  const checked = check(place);
  if (place.problems.length === 0) return checked;
  throw new ConfigError(source, place.problems);
}

function checkArgument(name: string, value: unknown, guard: Guard<unknown>) {
  if (guard.is(value)) return;
  throw new RangeError(`${name}: ${mismatch(guard, value)}`);
}

/** A type guard, and what it expects, in words and as a JSON Schema. */
type Guard<T> = ReturnType<typeof guard<T>>;

function guard<T>(
  expected: string,
  isType: (value: unknown) => value is T,
  isGood: (value: T) => boolean = () => true,
  schema: object = {},
) {
  const is = (value: unknown): value is T => isType(value) && isGood(value);
  return { expected, schema, is };
}

function oneOf<T extends string | number | boolean>(...choices: T[]): Guard<T> {
  const expected = choices.join(" or ").replace(/(?<= or )$/, '""');
  const isOne = (value: unknown): value is T => choices.includes(value as T);
  return guard(expected, isOne, undefined, { enum: choices });
}

const isText = (value: unknown) => typeof value === "string";
const isNumber = (value: unknown) => typeof value === "number";
const isRecord = (value: unknown): value is Record<string, unknown> =>
  typeof value === "object" && value !== null &&
  !(Symbol.iterator in value) && !(value instanceof Date);

const inRange =
  (article: string, type: string, isKind = Number.isFinite) =>
  (minimum: number, maximum = Number.MAX_SAFE_INTEGER, unit = "") =>
    guard(
      `${article} ${type} from ${minimum} to ${maximum}${unit}`,
      isNumber,
      (value) => isKind(value) && value >= minimum && value <= maximum,
      { type, minimum, maximum },
    );
const integer = inRange("an", "integer", Number.isSafeInteger);
const number = inRange("a", "number");
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
  readonly fields?: Fields<Record<string, unknown>>;
  readonly items?: Field<unknown>;
  /** Converts a good value, or refuses one that contradicts itself. */
  as?(value: T, place: Place): T | undefined;
  /** Normalizes what Toxiproxy's clients write, before the check. */
  normalize?(value: unknown, place: Place): unknown;
}

type Fields<T> = { readonly [K in keyof T]-?: Field<NonNullable<T[K]>> };

/** Returns valid fields. Toxiproxy's form takes other keys, and null for 0. */
function checkFields<T>(
  value: unknown,
  place: Place,
  fields: Fields<T>,
  isChange = false,
): Partial<T> {
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
  const good: Partial<T> = {};
  for (const name of known) {
    const { guard, optional, normalize, default: fallback } = fields[name];
    const [[key, given] = [], ...others] = written.get(name) ?? [];
    const repeated = `the same key as ${key}; write one`;
    for (const [other] of others) place.at(other).refuse(repeated);
    const at = place.at(name);
    let found = place.ignored ? given ?? undefined : given;
    const isGiven = place.ignored && found !== undefined;
    if (isGiven && normalize) found = normalize(found, at);
    const zero = place.ignored && !optional && guard.is(0) ? 0 : undefined;
    if (found === undefined && !isChange) found = fallback ?? zero;
    const isMissing = found === undefined && !isChange && !optional;
    if (isMissing) at.refuse(`missing; expected ${guard.expected}`);
    if (found !== undefined) good[name] = checkValue(found, at, fields[name]);
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
    whole = [...value].map((each, i) => checkValue(each, place.at(i), items));
  }
  if (place.problems.length > length) return whole as T; // it was refused
  return as?.(whole as T, place) ?? whole as T;
}

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
  const [level] = LEVELS.find(([, fields]) => Object.hasOwn(fields, key)) ?? [];
  const isElsewhere = level && !meant?.startsWith(key);
  if (isElsewhere) return ` on this level; it belongs ${level}`;
  if (meant !== undefined) return `; did you mean ${meant}?`;
  return `; known are ${known.join(", ") || "none"}`;
}

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
  const written = [scaled, joined, server, turned].find(guard.is);
  if (written !== undefined) return `; write ${written}`;
  const isOdd = /integer/.test(guard.expected) && /^\d+[a-z_:]/i.test(found);
  if (isOdd) return "; write it in plain decimal digits";
  const isUrl = server !== undefined && server !== found;
  if (isUrl && guard.is(`${server}:1`)) return `; write ${server}:port`;
  const meant = nearest(found, guard.expected.split(" or "));
  return guard.is(meant) ? `; did you mean ${meant}?` : "";
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
    new Set([...word.toLowerCase()].map((one, i, all) => one + all[i + 1]));
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
function splitAddress(address: string, host = ""): Address | undefined {
  const whole = address.replace(/^:/, `${host}:`);
  const [, ipv6, other = "", digits] = ADDRESS.exec(whole) ?? [];
  const [hostname, port] = [ipv6 ?? other, Number(digits)];
  const isGood = isHost(hostname) && port >= (host ? 0 : 1) && port <= 65535;
  return isGood ? { hostname, port } : undefined;
}

/** A host to compare or to listen on; `localhost` is taken as 127.0.0.1. */
const canonicalHost = (host: string) =>
  new URL(`http://${inUrl(host)}`).hostname
    .replace(/^localhost\.?$/, LOOPBACK).replace(/[[\]]/g, "");

/** Whether two canonical hosts overlap: `0.0.0.0` covers IPv4, and `::` all. */
const overlaps = (a: string, b: string) =>
  a === b || [a, b].includes("::") ||
  ([a, b].includes(ALL_ADDRESSES) && !`${a}${b}`.includes(":"));

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
  return (h ^ (h >>> 16)) >>> 0;
}

// ---- Toxics: faults on the bytes --------------------------------------------

/** The direction a toxic acts on: client to server, or server to client. */
export type Stream = "upstream" | "downstream";

/** The types of toxic. */
export type ToxicType =
  | ("latency" | "bandwidth" | "slicer" | "stall" | "slow_close" | "noop")
  | ("timeout" | "reset_peer" | "limit_data" | "limit_time" | "random_close")
  | ("packet_loss" | "corrupt" | "duplicate" | "inject" | "reorder");

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
  attributes?: Readonly<Record<string, number | string | boolean>>;
  /** On which of the route's connections it acts. Default: all. */
  connections?: Connections;
  /** At which times it acts. Default: always. */
  schedule?: Schedule;
  /** What must have passed it on the connection before it acts. */
  after?: Trigger;
}

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
  & Required<Omit<ToxicOptions, "connections" | "schedule" | "after">>
  & Pick<ToxicOptions, "connections" | "schedule" | "after">
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
  inWords(attributes: Readonly<A>): string;
  /** Starts or restarts it. Returns what processes chunks; default: pass. */
  begin(attributes: Readonly<A>, out: Queue): ActiveToxic["take"] | undefined;
  end?(at: number, out: Queue): void;
  /** The line that it stands for: B/ms, bytes that may wait, if shared. */
  line?(of: Readonly<A>): [rate: number, buffer: number, shared: unknown];
}

/** Infers the attributes from their fields. */
const define = <A>(toxic: ToxicDefinition<A>) =>
  toxic as unknown as ToxicDefinition;

const share = (fallback: number) => ({ guard: rate, default: fallback });
const kbPerS = { ...integer(0), expected: "an integer from 0, in KB/s" };
const bytes = (minimum: number, maximum?: number) =>
  integer(minimum, maximum, ", in bytes");
const ms = { guard: integer(0, MAX_MS, ", in ms"), default: 0 };
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
const waves = oneOf("sine", "square", "triangle", "sawtooth");

const PACKET_BYTES = 1460; // in a full TCP segment on Ethernet
type Packet = { at: number; what: Uint8Array<ArrayBuffer> };

/** Decides by position, not by read. `act` returns whether it keeps a piece. */
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
      let [position, draw, begins] = [0, 1, true];
      return ({ at, what }) => {
        if (isText(what) || all.rate === 0) return out.pass({ at, what });
        for (let start = 0; start < what.length;) {
          const isNext = out.kept.length > 0; // behind one that is kept
          if (begins) draw = isNext ? 1 : hash(`${position}`, salt) / 2 ** 32;
          const end = start + PACKET_BYTES - position % PACKET_BYTES;
          const packet = { at, what: what.subarray(start, end) };
          start += packet.what.length;
          position += packet.what.length;
          const acts = draw < all.rate && (begins || isNext);
          if (acts) out.hit();
          const keeps = acts ? act(packet, out, all, draw) : out.pass(packet);
          // The last packet of a long read may continue in the next read.
          begins = position % PACKET_BYTES === 0 || what.length < PACKET_BYTES;
          if (begins && !keeps) out.release();
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
      wave: optional(waves, "amplitude and period"),
      amplitude: optional(integer(1, MAX_MS, ", in ms"), "wave"),
      period: optional(integer(1, MAX_MS, ", in ms"), "wave"),
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
        const off = isText(what) ? 0 : jitter * spread;
        out.pass({ at: at + Math.max(0, latency + off + swing), what });
      };
    },
  }),
  bandwidth: define({
    attributes: {
      rate: { guard: kbPerS },
      shared: { guard: flag, optional: true, as: Number },
      buffer: optional(bytes(1)),
    },
    inWords: ({ rate, shared }) =>
      rate > 0 ? `${shared ? "shares " : ""}${rate} KB/s` : "holds all data",
    line: ({ rate, shared, buffer = 64 * 1024 }) => [rate, buffer, shared],
    begin: ({ rate, shared }, out) => ({ at, what }) => {
      if (shared && rate > 0) return out.pass({ at: Infinity, what });
      if (isText(what)) return out.pass({ at, what });
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
      `nothing gets through${timeout ? `, closed after ${timeout} ms` : ""}`,
    begin({ timeout }, out) {
      out.next.cut(out.opened + (timeout || Infinity), "close");
      return ({ at, what }) => {
        if (!isText(what)) return;
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
      if (out.last < Infinity) out.next.cut(at + timeout, "reset"); // the first
      out.pass({ at: Infinity, what });
    },
  }),
  slicer: define({
    attributes: {
      average_size: { guard: bytes(1) },
      size_variation: { guard: bytes(0), default: 0 },
      delay: { guard: integer(0, undefined, ", in µs"), default: 0 },
    },
    inWords: ({ average_size, size_variation, delay }) =>
      `in pieces of ${average_size}${plusMinus(size_variation)} B` +
      (delay > 0 ? `, ${delay} µs apart` : ""),
    begin({ average_size, size_variation, delay }, out) {
      const nextSize = () =>
        Math.round(average_size + size_variation * SPREADS.uniform(out.random));
      let left = 0; // bytes up to the next cut, also across chunks
      return ({ at, what }) => {
        const due = () => Math.max(at, out.last + delay / 1000);
        if (isText(what)) return out.pass({ at: due(), what });
        for (let start = 0; start < what.length;) {
          left ||= Math.max(1, nextSize());
          const piece = what.subarray(start, start + left);
          out.pass({ at: due(), what: piece });
          start += piece.length;
          left -= piece.length;
        }
      };
    },
  }),
  limit_data: define({
    attributes: { bytes: { guard: bytes(0), default: 0 } },
    inWords: ({ bytes }) => `closed after ${bytes} B`,
    begin({ bytes }, out) {
      const isReached = () => out.passed > 0 && out.passed >= bytes;
      if (isReached()) out.pass({ at: out.last, what: "close" });
      return ({ at, what }) => {
        if (isReached()) return; // it has closed
        if (isText(what)) return out.pass({ at, what });
        out.pass({ at, what: what.subarray(0, bytes - out.passed) });
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
      const [afterLoss, afterPass] = burst && loss_rate < 1
        ? [1 - 1 / burst, loss_rate / (1 - loss_rate) / burst]
        : [loss_rate + correlation * (1 - loss_rate), loss_rate];
      let chance = loss_rate;
      return (timed) => {
        if (sizeOf(timed) === 0) return out.pass(timed);
        const isLost = out.random() < chance;
        chance = isLost ? afterLoss : afterPass;
        return isLost ? out.hit() : out.pass(timed);
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
        if (isText(what)) return out.pass({ at, what });
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
      out.next.cut(out.opened + time, "close");
    },
  }),
  stall: onPackets(
    "stalls",
    { duration: { ...ms, default: 200 } },
    ({ at, what }, out, { duration }) => out.pass({ at: at + duration, what }),
  ),
  random_close: onPackets(
    "ends at",
    { reset: { guard: flag, default: 0, as: Number } },
    ({ at, what }, out, { reset }) => {
      if (reset) out.next.cut(at, "reset");
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
    { bytes: { guard: bytes(1, 65_536), default: 16 } },
    (packet, out, { bytes }, draw) => {
      const random = randomStream(draw);
      const length = 1 + Math.floor(random() * bytes);
      const noise = Uint8Array.from({ length }, () => random() * 256);
      out.pass({ at: packet.at, what: noise });
      out.pass(packet);
    },
  ),
  reorder: onPackets("reorders", {}, (packet, out) => out.kept.push(packet)),
  noop: define({ attributes: {}, inWords: () => "nothing", begin: () => {} }),
};

/** A toxic at work, and its output: no chunk is due before the last one. */
class Queue implements ActiveToxic {
  /** Chunks that leave after later ones. */
  readonly kept: TimedChunk[] = [];
  /** When the last chunk is due; after a change, when the last to leave was. */
  last = -Infinity;
  /** The bytes forwarded; those held are counted again after a change. */
  passed = 0;
  #process!: ActiveToxic["take"];

  constructor(
    private toxic: Toxic,
    readonly next: ToxicOutput,
    readonly random: () => number,
    /** When the proxy started or was reseeded, by `performance.now()`. */
    readonly clock: { readonly epoch: number },
    private onHit: (() => void) | undefined,
    /** When the toxic began to act. */
    public opened: number,
    /** Finds the trigger in the next chunk; undefined once it was found. */
    public sizeUntil = toxic.after && findTrigger(toxic.after),
  ) {
    if (!sizeUntil) this.#start();
  }

  pass(timed: TimedChunk): void {
    if (isText(timed.what)) this.release();
    this.last = Math.max(this.last, timed.at);
    this.passed += sizeOf(timed);
    if (timed.what.length === 0) return; // the trigger ended its chunk
    this.next.pass({ at: this.last, what: timed.what });
  }

  take(timed: TimedChunk): void {
    if (!this.sizeUntil) return this.#process(timed);
    const { at, what } = timed;
    const size = isText(what) ? Infinity : this.sizeUntil(what);
    if (isText(what) || size > what.length) return this.pass(timed);
    this.pass({ at, what: what.subarray(0, size) });
    this.sizeUntil = undefined;
    [this.opened, this.passed] = [at, 0];
    this.#start();
    this.#process({ at, what: what.subarray(size) });
  }

  release(): void {
    for (const each of this.kept.splice(0)) this.pass(each);
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
    this.toxic = { ...this.toxic, attributes };
    if (!this.sizeUntil) this.#start();
  }

  #start(): void {
    const { type, attributes } = this.toxic;
    const { begin, byChance } = TOXICS[type];
    if (!byChance) this.hit();
    this.#process = begin(attributes, this) ?? ((timed) => this.pass(timed));
  }

  end(at: number): void {
    this.release();
    if (!this.sizeUntil) TOXICS[this.toxic.type].end?.(at, this);
  }
}

/** Returns a function: a chunk's size up to the trigger's end, or Infinity. */
function findTrigger({ bytes = 0, match = "" }: Trigger) {
  const isAscii = isText(match) && /^[ -~]*$/.test(match);
  const sought = isAscii ? match : bytesOf(match).toString("latin1");
  let [left, before] = [bytes, ""];
  return ({ buffer, byteOffset, length }: Uint8Array<ArrayBuffer>): number => {
    left -= length;
    if (bytes > 0) return left > 0 ? Infinity : length + left;
    const chunk = Buffer.from(buffer, byteOffset, length);
    const text = before + chunk.toString("latin1"); // faster than bytes
    const found = text.indexOf(sought);
    const size = found + sought.length - before.length;
    before = text.slice(Math.max(0, text.length - sought.length + 1));
    return found < 0 ? Infinity : size;
  };
}

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

/** Whether a connection's number is one of these; by default, all are. */
function isAmong(number: number, connections: Connections = "1-"): boolean {
  if (connections === "1-") return true; // the default: saves the parsing
  if (parsedRanges.size > 100_000) parsedRanges.clear();
  const all = typeof connections === "object" ? connections : [connections];
  return all.some((range) => {
    const parse = () => RANGE.exec(`${range}`); // takes 2 µs
    const [, first, last = first, step] =
      parsedRanges.getOrInsertComputed(range, parse) ?? [];
    if (step) return number % Number(step) === 0;
    return number >= Number(first) && number <= Number(last || Infinity);
  });
}
const RANGE = /^(?:([1-9]\d*)(?:-([1-9]\d*|))?|\*\/([1-9]\d*))$/;
const parsedRanges = new Map<number | string, RegExpExecArray | null>();

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
  const toxics = [...values].map((each, i) => checkToxic(each, place.at(i)));
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
  if (!type || !attributes) return toxic as Toxic; // this has been reported
  const at = place.at("attributes");
  const fields: Fields<Record<string, unknown>> = TOXICS[type].attributes;
  const good = checkFields({ ...before, ...attributes }, at, fields);
  TOXICS[type].check?.(good as Attributes, at);
  for (const [name, { needs }] of Object.entries(fields)) {
    const isMet = needs?.split(" and ").every((need) => {
      const [other = "", value] = need.split(": ");
      const found = good[other] ?? attributes[other]; // also if refused
      return value ? `${found}` === value : found;
    });
    if (!needs || isMet || good[name] === undefined) continue;
    // A change drops attributes that no longer apply.
    if (attributes[name] === undefined && name in before) delete good[name];
    else at.at(name).refuse(`needs ${needs}; write that, or leave this out`);
  }
  return { name: `${type}_${stream}`, ...toxic, attributes: good } as Toxic;
}

const range = guard(
  'a number from 1, "1-3", "5-" or "*/3"',
  (value) => isText(value) || isNumber(value),
  (each) => isAmong(parseInt(`${each}`.replace("*/", "")), each), // not empty
  { anyOf: [{ type: "integer", minimum: 1 }, like(RANGE)] },
);
const LIST = { type: "array", minItems: 1 };
const ranges = guard(
  `${range.expected}, or a list of these`,
  (value): value is Connections => Array.isArray(value) || range.is(value),
  (value) => [value].flat().length > 0,
  { anyOf: [range.schema, { ...LIST, items: range.schema }] },
);
const CONNECTIONS = { ...optional(ranges), items: { guard: range } };

const TIMES = {
  afterMs: { guard: milliseconds, default: 0 },
  forMs: { guard: integer(1, MAX_MS) },
  everyMs: optional(integer(1, MAX_MS)),
};

function checkTimes({ forMs, everyMs }: Schedule, place: Place): undefined {
  if (everyMs === undefined || (forMs && forMs <= everyMs)) return;
  const found = forMs ? `found ${forMs}` : "but it is missing";
  place.at("forMs").refuse(`expected 1 to ${everyMs}, as everyMs, ${found}`);
}

const bytesOf = (pattern: Pattern) =>
  isText(pattern) ? Buffer.from(pattern) : Buffer.from(pattern.hex, "hex");
const hex = matching("1 to 256 hex digit pairs", /^(?:[\da-fA-F]{2}){1,256}$/);
const HEX = { hex: { guard: hex } };
const pattern = guard(
  "text of 1 to 256 bytes, or a mapping with hex",
  (value): value is Pattern => isText(value) || isRecord(value),
  (value) => !isText(value) || integer(1, 256).is(bytesOf(value).length),
  { anyOf: [{ type: "string", minLength: 1, maxLength: 256 }, schemaOf(HEX)] },
);

const streams = oneOf<Stream>("upstream", "downstream");
const TOXIC_FIELDS: Fields<Toxic> = {
  name: { guard: routeName, optional: true, normalize: unlessEmpty },
  type: { guard: oneOf(...Object.keys(TOXICS) as ToxicType[]) },
  stream: { guard: streams, default: "downstream", normalize: lowerCase },
  toxicity: {
    ...share(1),
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
      bytes: optional(integer(1)),
      match: { ...optional(pattern), fields: HEX },
    },
    as({ bytes, match }, place) {
      if (!bytes === !match) place.refuse("expected either bytes or match");
    },
  },
};

const { name: _name, type: _type, stream: _stream, ...CHANGES } = TOXIC_FIELDS;

const TOXIC_SCHEMA = {
  ...schemaOf(TOXIC_FIELDS),
  allOf: Object.entries(TOXICS).map(([type, { attributes: fields }]) => {
    const attributes = schemaOf(fields);
    const required = attributes.required.length > 0 ? ["attributes"] : [];
    const then = { properties: { attributes }, required };
    const properties = { type: { const: type } };
    return { if: { properties, required: ["type"] }, then };
  }),
};
LEVELS.push(["in a toxic", TOXIC_FIELDS]);
for (const [type, { attributes }] of Object.entries(TOXICS)) {
  LEVELS.push([`in the attributes of a toxic such as ${type}`, attributes]);
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
  & { drainTimeoutMs: number; api?: string; routes: readonly Route[] };

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

/** A profile's toxics, or a route's own of the same names, and its others. */
function withProfile(profile: string, own: readonly Toxic[] = []): Toxic[] {
  const [down, up, roundTrip = 0, jitter = 0] = PROFILES[profile] ?? [];
  const latency = { latency: roundTrip / 2, jitter: jitter / 2 };
  const toxics = Object.entries({ downstream: down, upstream: up })
    .flatMap(([stream, rate = Infinity]) => [
      rate < Infinity &&
      { type: "bandwidth", stream, attributes: { rate, shared: 1 } },
      roundTrip > 0 && { type: "latency", stream, attributes: latency },
    ]).filter((each) => each);
  // They are new objects: a shared line belongs to one of them.
  const all = [...checkToxics(toxics, new Place("", [])), ...own];
  return [...new Map(all.map((toxic) => [toxic.name, toxic])).values()];
}

/** A route's toxics without those for which its profile stands. */
function ownToxics({ profile, toxics }: Route): Toxic[] {
  const all = withProfile(profile);
  return toxics.filter((toxic) =>
    !all.some((each) => isDeepStrictEqual(each, toxic))
  );
}

function checkCount({ toxics }: Pick<Route, "toxics">, place: Place): void {
  if (toxics.length <= MAX_TOXICS) return;
  const most = `${MAX_TOXICS} at most with those of the profile`;
  place.at("toxics").refuse(`expected ${most}, found ${toxics.length}`);
}

const MAX_CONFIG_BYTES = 1024 * 1024;
const MAX_ALL_TOXICS = 10_000;
const MAX_TOXICS = 500; // each calls the next: 2,000 overflowed the stack

const host = "a host name or an IP address";
const listenHost = guard(host, isText, isHost, like(HOST));
function address(forms: string, host?: string) {
  const expected = `${forms}, the port from ${host ? 0 : 1} to 65535`;
  const isGood = (text: string) => splitAddress(text, host) !== undefined;
  return guard(expected, isText, isGood, like(ADDRESS));
}
const upstreamAddress = address("host:port or [ipv6]:port");
const splitApi = (address?: number | string) =>
  splitAddress(`${address}`.replace(/^\d+$/, ":$&"), LOOPBACK);
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
  const [start, next] = [a.afterMs ?? 0, b.afterMs ?? 0];
  if (next < start) return overlap(b, a);
  if (!a.everyMs || !b.everyMs) {
    const { isOn, until } = stateAt(a, next);
    return isOn || until < next + b.forMs;
  }
  let [common, rest] = [a.everyMs, b.everyMs]; // greatest divisor
  while (rest > 0) [common, rest] = [rest, common % rest];
  const offset = (next - start) % common; // the least from an `a` to a `b`
  return offset < a.forMs || common - offset < b.forMs;
}

const { localPort: _port, host: _host, ...SHARED_FIELDS } = ROUTE_FIELDS;
/** The fields in Toxiproxy's form: `listen` is `host` and `localPort`. */
const PROXY_FIELDS = {
  ...SHARED_FIELDS,
  upstream: {
    guard: { ...upstreamAddress, is: isText },
    as(text: string, place: Place) {
      const upstream = text.replace(/^:(?=\d+$)/, "localhost:");
      const isBare = upstreamAddress.is(`${upstream}:1`); // Toxiproxy takes it
      if (isBare) place.ignore(`${upstream} has no port; its connections fail`);
      else checkValue(upstream, place, { guard: upstreamAddress });
      return upstream;
    },
  },
  listen: {
    guard: address("host:port, [ipv6]:port or :port", ALL_ADDRESSES),
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
  const problem = Buffer.byteLength(text) > MAX_CONFIG_BYTES
    ? "expected at most 1 MiB of text, found more"
    : text.trim() === "" && "the file is empty; expected routes";
  if (problem) throw new ConfigError(path, [problem]);
  const read = /\.json$/i.test(path) ? readJson : readYaml;
  return checkConfig(read(text.replace(/^\uFEFF/, ""), path), path, given);
}

const LINE_END = /\r\n|\r|\n/;
const TAB = "a tab in the indentation; write spaces";
const MERGES = "merge keys (<<) are too many; write out what they stand for";

function readYaml(text: string, path: string): unknown {
  const lines = text.split(LINE_END);
  try {
    let depth = 0; // of brackets, within which indentation means nothing
    for (const [i, line] of lines.entries()) {
      const isTab = depth <= 0 && /^ *\t\s*[^\s#]/.test(line);
      if (isTab) throw new SyntaxError(`${TAB} at line ${i + 1}, column 1`);
      depth += line.split(/[[{]/).length - line.split(/[\]}]/).length;
    }
    // Each alias may copy all keys of the text, 5 million of them in a second.
    const copies = text.includes("<<") ? text.split("*").length - 1 : 0;
    const isTooMany = copies * text.split(/[:,?]/).length > 20_000_000;
    if (isTooMany) throw new SyntaxError(`${copies} ${MERGES}`);
    const asText = { schema: "failsafe", allowDuplicateKeys: true } as const;
    return keepOddNumbers(parseYaml(text), parseYaml(text, asText));
  } catch (error) {
    const isDeep = error instanceof RangeError; // the stack overflowed
    const message = isDeep ? "nested too deeply" : (error as Error).message;
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
  if (!isTree(tree) || !isTree(texts) || seen.has(tree)) return tree;
  seen.add(tree);
  const sources = [texts, ...[texts["<<"]].flat()].filter(isTree);
  for (const [key, each] of Object.entries(tree)) {
    const text = sources.find((each) => Object.hasOwn(each, key))?.[key];
    if (typeof each !== "number") keepOddNumbers(each, text, seen);
    else if (isText(text) && !PLAIN_NUMBER.test(text)) tree[key] = text;
  }
  return tree;
}

/** Reads JSON; refuses a repeated key, which `JSON.parse` lets pass. */
function readJson(text: string, path: string): unknown {
  const message = errorInJson(text) ?? repeatedKeyIn(text);
  if (message === undefined) return JSON.parse(text);
  const [end, position = 0] =
    /(?: in JSON)? at position (\d+)(?: \(.*\))?$/.exec(message) ?? [];
  let offset = Number(position);
  // V8 names no position of a token, but refuses each longer prefix for it.
  for (let step = end ? 0 : MAX_CONFIG_BYTES; step >= 1; step /= 2) {
    const error = errorInJson(text.slice(0, offset + step));
    if (!error?.endsWith("is not valid JSON")) offset += step;
  }
  const [before, after] = [text.slice(0, offset), text.slice(offset)];
  const found = after === "" ? "end" : JSON.stringify(after[0]);
  const reason = end ? message.replace(end, "") : `unexpected ${found}`;
  const lines = before.split(LINE_END);
  const at = `line ${lines.length}, column ${lines.at(-1)!.length + 1}`;
  const isAfterComma = /^[\]}]/.test(after) && /,\s*$/.test(before);
  let hint = "";
  if (/^(?:\/[/*]|#)/.test(after)) hint = "; JSON has no comments";
  else if (isAfterComma) hint = "; remove the comma before it";
  else if (/^\s*[\w-]/.test(text)) hint = "; name a YAML file .yaml, not .json";
  throw new ConfigError(path, [`${at}: invalid JSON: ${reason}${hint}`]);
}

function errorInJson(text: string): string | undefined {
  try {
    JSON.parse(text);
  } catch (error) {
    return (error as Error).message;
  }
}

/** The message about a repeated key in valid JSON, in V8's form. */
function repeatedKeyIn(text: string): string | undefined {
  const open: Set<string>[] = []; // the keys of each object
  const tokens = text.matchAll(/[{}]|"[^"\\]*(?:\\.[^"\\]*)*"(?:\s*:)?/g);
  for (const { 0: token, index } of tokens) {
    if (token === "{") open.push(new Set());
    if (token === "}") open.pop();
    if (!token.endsWith(":")) continue;
    const [keys, key] = [open.at(-1), JSON.parse(token.slice(0, -1))];
    const repeated = `${describe(key)} is repeated at position ${index}`;
    if (keys?.has(key)) return repeated;
    keys?.add(key);
  }
}

/** Checks a config; one from a file, with `given`, needs routes or an `api`. */
function checkConfig(value: unknown, source: string, given?: ConfigOptions) {
  return validate(source, (place) => {
    const key = keyOfRoutes(Object(value));
    const all = key === "" ? { [key]: value } : value;
    const { [key]: list = [], ...rest } = isRecord(all) ? all : {};
    for (const [name, each] of Object.entries({ ...rest, ...given })) {
      if (IGNORED_KEYS.test(name)) delete rest[name];
      else if (each !== undefined) rest[name] = each;
    }
    const good = checkFields(isRecord(all) ? rest : all, place, CONFIG_FIELDS);
    const ignored = key === "routes" ? undefined : [];
    const at = new Place(key, place.problems, ignored);
    const api = splitApi(good.api);
    const routes = checkRoutes(list, at, api, given && !api ? 1 : 0);
    return { ...good, routes, ...(api && { api: addressOf(api) }) } as Config;
  });
}

/** The key of the routes, by the config's form; "" if it is just proxies. */
function keyOfRoutes(value: Record<string, unknown>) {
  // A proxy that is named like a key of the config says so in its `name`.
  const isKey = (key: string) =>
    key in value && (value[key] as Route | null)?.name !== key;
  if (isKey("proxies") && !isKey("routes")) return "proxies";
  if (Object.keys(CONFIG_FIELDS).some(isKey)) return "routes";
  const items = [...new Set(Object.values(value))].filter(isRecord);
  const keys = items.flatMap(Object.keys);
  const isProxies = Array.isArray(value) ||
    keys.some((key) => /^(?:listen|upstream)$/i.test(key));
  return isProxies && !keys.includes("localPort") ? "" : "routes";
}

/** Checks routes; names and addresses must be unique, also beside the API's. */
function checkRoutes(list: unknown, place: Place, api?: Address, least = 0) {
  const names = place.ignored && isRecord(list) ? Object.keys(list) : [];
  const values = place.ignored && isRecord(list) ? Object.values(list) : list;
  const isList = routeList.is(values);
  if (!isList) place.refuse(mismatch(routeList, list));
  else if (values.length < least) place.refuse("expected at least one route");
  const places = new Map<Partial<Route>, Place>();
  let toxics = 0; // YAML's aliases can make many from little text
  for (const [index, value] of isList ? values.entries() : []) {
    const own = place.at(names[index] ?? index);
    const route = checkRoute(value, own, names[index]);
    places.set(route, own);
    toxics += route.toxics.length;
    if (toxics > MAX_ALL_TOXICS || place.problems.length >= MAX_PROBLEMS) break;
  }
  const problem = `expected at most ${MAX_ALL_TOXICS} toxics in all`;
  if (toxics > MAX_ALL_TOXICS) place.refuse(problem);
  checkUnique(places, api);
  const routes = [...places.keys()];
  const circle = findCircle(routes);
  if (circle) places.get(circle.route)?.at("upstream").refuse(circle.problem);
  return routes as Route[]; // what is missing has been reported
}

/** Checks a route, in Toxiproxy's form if the place has `ignored`. */
function checkRoute(value: unknown, place: Place, name?: string) {
  if (fromToxiproxy.has(value as object)) return value as Route; // is checked
  const before = place.ignored?.length;
  const named = { guard: routeName, default: name };
  const fields: Partial<RouteOptions & { listen: string }> = place.ignored
    ? checkFields(value, place, { ...PROXY_FIELDS, name: named })
    : checkFields(value, place, ROUTE_FIELDS);
  const { listen, toxics: written = [], ...rest } = fields;
  if (rest.localPort !== undefined) rest.name ??= String(rest.localPort);
  const own = checkToxics(written, place.at("toxics"));
  const toxics = withProfile(rest.profile ?? "", own);
  const route = { ...rest, ...(listen && hostAndPort(listen)), toxics };
  checkCount(route, place);
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
    const there = to && byPort.get(to.port)
      ?.find(({ host = LOOPBACK }) => reaches(to.hostname, host));
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

function removeDefaults(tree: unknown, of: Partial<Field<unknown>>): void {
  if (!isTree(tree)) return;
  for (const [key, each] of Object.entries(tree)) {
    const field: Partial<Field<unknown>> = of.items ?? of.fields?.[key] ?? {};
    removeDefaults(each, field);
    if (isDeepStrictEqual(each, field.default)) delete tree[key];
  }
}

function toYaml(config: Config): string {
  const all = JSON.parse(JSON.stringify(config)); // shares nothing
  for (const route of all.routes) {
    const own = ownToxics(route);
    // Once one of its toxics was removed, a profile does not stand for the rest.
    const whole = withProfile(route.profile, own);
    if (isDeepStrictEqual(whole, route.toxics)) route.toxics = own;
    else route.profile = "";
    for (const toxic of route.toxics) {
      const { name, type, stream, attributes }: Toxic = toxic;
      if (name === `${type}_${stream}`) delete toxic.name;
      removeDefaults(attributes, { fields: TOXICS[type].attributes });
      removeDefaults(toxic, { fields: TOXIC_FIELDS });
    }
    if (route.name === `${route.localPort}`) delete route.name;
    removeDefaults(route, { fields: ROUTE_FIELDS });
  }
  removeDefaults(all, { fields: CONFIG_FIELDS });
  return stringify(all);
}

// ---- Link: one direction of one connection ----------------------------------

/** One end of a connection through the proxy. */
export type Side = "client" | "upstream";

const OTHER = { client: "upstream", upstream: "client" } as const;
const STREAM_OF = { client: "upstream", upstream: "downstream" } as const;

/** Bytes in memory that nothing else shares. */
type Bytes = Uint8Array<ArrayBuffer>;

/** A chunk that a toxic holds, when it arrived there, and the one behind it. */
type Held = TimedChunk & { readonly since: number; next?: Held };

/** A toxic at work on a link. */
class Stage {
  active!: Queue;
  /** What it holds, as a list: `shift` of a long array moves all the rest. */
  first?: Held;
  last?: Held;
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

function tally<K extends PropertyKey>(counts: { [key in K]?: number }, key: K) {
  return counts[key] = (counts[key] ?? 0) + 1;
}

/** What a link asks of its connection. */
interface LinkOwner {
  begin(toxic: Toxic, nth: number, out: ToxicOutput): Queue;
  end(reason: { why: "fault"; toxic?: string }, how?: "close" | "reset"): void;
}

/**
 * Forwards what one side sends to the other, through the toxics that act on it.
 * Each toxic holds what is not due yet, and then forwards it to the next one.
 * A write waits until there is room, so that a slow reader slows the sender.
 */
class Link {
  /** The toxic that closes the connection once all before is delivered. */
  closedBy: string | undefined;
  readonly #stages: Stage[] = [];
  #begun: Record<string, number> | undefined; // how often each toxic began
  #stopped = false;
  #ended = false;
  heldBytes = 0;
  movedAt = 0; // when the last held chunk left
  #since = 0; // when the chunk that a toxic processes now arrived there
  #nap: AbortController | undefined;
  #due = Infinity; // when `#run` looks again
  /** Resolves when there is room and it holds at most `#most`, or has stopped. */
  #room: PromiseWithResolvers<void> | undefined;
  #most = MAX_HELD_BYTES;
  #controller!: TransformStreamDefaultController<Bytes>;
  readonly stream = new TransformStream<Bytes, Bytes>({
    start: (controller) => this.#controller = controller,
    transform: (chunk) => {
      if (this.#stopped) return;
      if (this.#stages.length === 0) return this.#controller.enqueue(chunk);
      this.#forward({ at: performance.now(), what: chunk });
      if (this.heldBytes > 0) return this.#untilHeld(MAX_HELD_BYTES);
    },
    flush: async () => {
      this.#forward({ at: performance.now(), what: "end" });
      await this.#untilHeld(0);
      this.#ended = true;
    },
  });
  readonly writer = this.stream.writable.getWriter();

  constructor(readonly owner: LinkOwner, readonly from: Side) {}

  /** Makes those toxics of its stream act, in this order, and no others. */
  act(all: readonly Toxic[]): void {
    if (this.#stopped) return;
    const toxics = all.filter(({ stream }) => stream === STREAM_OF[this.from]);
    let last = -1;
    for (const stage of [...this.#stages]) {
      const { name, type, after } = stage.toxic;
      const index = toxics.findIndex((toxic) =>
        toxic.name === name && toxic.type === type &&
        isDeepStrictEqual(toxic.after, after)
      );
      if (index > last) last = index;
      else this.#remove(stage); // it is gone, or has another place now
    }
    toxics.forEach((toxic, index) => {
      const stage = this.#stages.find((each) => each.toxic.name === toxic.name);
      if (stage === undefined) this.#insert(index, toxic);
      else if (stage.toxic !== toxic) this.#change(stage, toxic);
    });
  }

  /** Ends the stream at once; what has not been delivered is lost. */
  abort(): void {
    this.stop();
    if (!this.#ended) this.writer.abort().catch(() => {}); // it has failed
  }

  /** Discards what it holds and what comes; no toxic can end the connection. */
  stop(): void {
    this.#stopped = true;
    this.heldBytes = 0;
    for (const stage of this.#stages) this.#takeTurn(stage); // gives it back
    this.#nap?.abort("stopped");
    this.#room?.resolve();
  }

  #insert(index: number, toxic: Toxic): void {
    const stage = new Stage(toxic);
    const nth = tally(this.#begun ??= Object.create(null), toxic.name);
    stage.active = this.owner.begin(toxic, nth, {
      pass: (timed) => {
        const waits = stage.active?.sizeUntil; // for its trigger
        if (!waits) return this.#hold(stage, timed);
        this.#forward(timed, stage);
        this.#since = timed.at; // which that has changed
      },
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
    if (this.heldBytes === 0 || this.#hasRoom() || this.#stopped) return;
    this.#room = Promise.withResolvers();
    return this.#room.promise;
  }

  /** Whether the buffer of each `bandwidth` has room for more data. */
  #hasRoom(): boolean {
    let [bytes, delay] = [0, 50]; // ms of lead, so that no line runs empty
    return this.heldBytes <= this.#most && this.#stages.every((stage) => {
      const [rate, buffer] = lineOf(stage.toxic);
      bytes += stage.bytes;
      const isFull = bytes > buffer + rate * delay;
      delay += stage.delay;
      return !isFull;
    });
  }

  #hold(stage: Stage, timed: TimedChunk): void {
    if (this.#stopped) return;
    if (timed.what === "close") this.closedBy ??= stage.toxic.name;
    const held: Held = { ...timed, since: this.#since };
    stage.delay = held.at < Infinity ? held.at - held.since : 0;
    if (stage.last) stage.last.next = held;
    else stage.first = held;
    stage.last = held;
    stage.bytes += sizeOf(held);
    this.heldBytes += HELD_OVERHEAD_BYTES + sizeOf(held);
  }

  #shift(stage: Stage, first: Held): Held {
    stage.first = first.next;
    if (stage.last === first) stage.last = undefined;
    first.next = undefined; // or it would keep those behind it in memory
    this.movedAt = performance.now();
    stage.bytes -= sizeOf(first);
    this.heldBytes -= HELD_OVERHEAD_BYTES + sizeOf(first);
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
    const line = lines.getOrInsert(toxic, { turns: 0, freeAt: 0 });
    const most = Math.ceil(rate * Math.min(10, 50 / ++line.turns));
    let left = Math.min(stage.bytes, most);
    const ms = left / rate;
    const at = line.freeAt = Math.max(first.since, lastLeft, line.freeAt) + ms;
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
        this.heldBytes += HELD_OVERHEAD_BYTES;
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
    if (!next.first) return;
    this.#release(next, performance.now());
    if (next.first && next.first.at < this.#due) this.#run();
  }

  #deliver(what: TimedChunk["what"]): void {
    if (what === "close") {
      this.stop();
      // After `terminate`, `pipeTo` never settles if an earlier write fails.
      if (this.#ended) this.owner.end({ why: "fault", toxic: this.closedBy });
      else this.writer.close().catch(() => {}); // its owner handles it
    } else if (what !== "end") {
      try {
        this.#controller.enqueue(what);
      } catch {
        this.stop(); // its reader has ended, which its owner handles
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
          return this.owner.end({ why: "fault", toxic: toxic.name }, cut.how);
        }
        due = Math.min(due, first?.at ?? Infinity, cut?.at ?? Infinity);
      }
      if (this.#hasRoom()) this.#room?.resolve();
      this.#due = due;
      if (due === Infinity) return;
      await sleepUntil(due, signal);
    }
  }
}

/** All alarms share a timer: one each took a tenth more CPU a connection. */
class Alarm implements Disposable {
  static readonly #all = new Set<Alarm>();
  static #next = Infinity; // when it looks which are due
  static #timer: ReturnType<typeof setTimeout> | undefined;
  static #poll: Promise<void> | undefined;
  static #resting: ReturnType<typeof setTimeout> | undefined;

  /** Calls `wake` at a time by `performance.now()`, unless disposed of. */
  constructor(readonly time: number, readonly wake: () => void) {
    if (time < Infinity) Alarm.#all.add(this);
    if (time < Alarm.#next) Alarm.#wait(time);
  }

  [Symbol.dispose](): void {
    Alarm.#all.delete(this);
    // Not at once, or each connection would set the timer again.
    const isLast = Alarm.#all.size === 0 && Alarm.#next < Infinity;
    if (isLast) Alarm.#resting ??= setTimeout(() => Alarm.clearIfUnused(), 20);
  }

  static clearIfUnused(): void {
    clearTimeout(this.#resting);
    this.#resting = undefined;
    if (this.#all.size === 0) this.#wait(Infinity);
  }

  static #wait(time: number): void {
    this.#next = time;
    clearTimeout(this.#timer);
    const left = time - performance.now();
    // A timer is up to 1.5 ms late, and polling 0.01 ms.
    const ms = Math.min(left - 1.5, MAX_MS);
    if (left < 2.5) this.#poll ??= setImmediate().then(() => this.#look());
    else if (left < Infinity) this.#timer = setTimeout(() => this.#look(), ms);
  }

  static #look(): void {
    this.#poll = undefined;
    const now = performance.now();
    if (now < this.#next) return this.#wait(this.#next);
    let next = Infinity;
    for (const alarm of this.#all) {
      if (alarm.time > now) next = Math.min(next, alarm.time);
      else queueMicrotask(() => this.#all.delete(alarm) && alarm.wake());
    }
    this.#wait(next); // before they wake, as that may add others, or throw
  }
}

/** Resolves at a time, or on abort. If it is past, other connections run first. */
async function sleepUntil(time: number, signal?: AbortSignal): Promise<void> {
  if (signal?.aborted) return;
  if (time <= performance.now()) return await setImmediate();
  const { promise, resolve } = Promise.withResolvers<void>();
  using _alarm = new Alarm(time, resolve);
  using _listener = signal && addAbortListener(signal, () => resolve());
  await promise;
}

const sleep = (ms: number, signal?: AbortSignal) =>
  sleepUntil(performance.now() + ms, signal);

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
  static #pair: readonly Deno.TcpConn[] = [];
  static #openedAt = -Infinity;
  static #work = 0; // what was done since the last poll, in bytes
  static #poll: Promise<void> | undefined;

  /** What to wait for, if anything, after reading or before writing bytes. */
  static pass(bytes: number): Promise<void> | undefined {
    this.#work += bytes + 2 * 1024; // what a call costs besides its bytes
    if (this.#work < 1024 * 1024) return undefined; // about 0.5 ms
    // Bulk checks again, so that small requests do not queue behind it.
    const isBulk = bytes >= 16 * 1024;
    if (this.#poll && isBulk) return this.#poll.then(() => this.pass(bytes));
    if (this.#poll) return this.#poll;
    // The caller goes on: mostly the poll ends before anyone has to wait.
    this.#poll = this.#startPoll();
  }

  static async #startPoll(): Promise<void> {
    this.#work = 0;
    const mayOpen = performance.now() > this.#openedAt + 1000;
    // Not at each poll: it takes file descriptors, and may not return.
    if (mayOpen && this.#pair.length === 0) this.#open();
    const [from, to] = this.#pair;
    const timer = setTimeout(() => this.close(), 100); // is broken then
    // After a read that fills its buffer the next does not poll: room for 2.
    const [size] = await Promise.all([
      to?.read(new Uint8Array(2)),
      from?.write(new Uint8Array(1)),
    ]).catch(() => []); // it was closed, or is broken
    clearTimeout(timer);
    if (size !== 1) {
      if (to) this.close();
      for (let turn = 0; turn < 64; turn++) await setImmediate();
    }
    this.#work = 0;
    this.#poll = undefined;
  }

  static async #open(): Promise<void> {
    this.#openedAt = performance.now();
    if (!mayUseLoopback()) return;
    const closed = this.#pair;
    try {
      using opened = new DisposableStack();
      using listener = Deno.listen({ hostname: LOOPBACK, port: 0 });
      const from = opened.use(await Deno.connect(listener.addr as Address));
      const to = opened.use(await listener.accept());
      const isOwn = to.remoteAddr.port === from.localAddr.port;
      if (!isOwn || this.#pair !== closed) return;
      this.#pair = [from, to];
      opened.move(); // or they would be closed here
    } catch {
      // No file descriptor is free, or there is no loopback: it tries again.
    }
  }

  static close(): void {
    for (const conn of this.#pair) conn.close();
    this.#pair = [];
  }
}

/** Whether loopback is permitted; Deno would ask for the permission. */
const mayUseLoopback = () =>
  Deno.permissions.querySync({ name: "net", host: LOOPBACK }).state ===
    "granted";

interface Socket {
  readonly peer: string; // its address, `host:port`
  /** The next bytes, which the caller then owns; null at the end of stream. */
  read(): Promise<Bytes | null>;
  /** Owns the bytes from then on; resolves when the system has all of them. */
  write(bytes: Bytes): Promise<void>;
  closeWrite(): Promise<void> | void;
  close(how?: "close" | "reset"): void; // `reset` by a RST, where it can
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
      const { length } = bytes;
      let sent = await conn.write(bytes);
      while (sent < length) sent += await conn.write(bytes.subarray(sent));
      const isSpare = length === MAX_READ_BYTES; // so all of its buffer
      if (isSpare && spareBuffers.length < 16) spareBuffers.push(bytes);
    },
    closeWrite: () => conn.closeWrite(),
    close: () => conn[Symbol.dispose](), // also more than once
  };
}

const CLOSED = new Deno.errors.BadResource("closed"); // slow to create

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
      const rest: Bytes | null = socket.closed ? socket.read() : null;
      if (rest) return withoutBuffer(rest);
      if (socket.closed) throw socket.errored ?? CLOSED;
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
  /** `what`, such as `route db`, cannot listen on `address`, a `host:port`. */
  constructor(what: string, readonly address: string, cause: unknown) {
    const why = hasCode(cause, "EADDRINUSE")
      ? "the port is already in use"
      : hasCode(cause, "EACCES")
      ? "permission denied; ports below 1024 are for privileged users"
      : causeOf(cause);
    super(`${what}: cannot listen on ${address}: ${why}`, { cause });
    this.name = "ListenError";
  }
}

function listenOnDeno(address: Address) {
  const listener = Deno.listen(address);
  let accepting: Promise<Socket> | undefined;
  return {
    addr: listener.addr as Address,
    accept: () => accepting = listener.accept().then(denoSocket),
    async close() {
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
      clearInterval(rearm);
      server.close();
      for (const socket of accepted) socket.close();
      server.emit("error", CLOSED);
    },
  };
}

/** Lookups under way, by name: each takes a thread, of which there are few. */
const lookups = new Map<string, Promise<{ address: string }[]>>();

async function lookUp(host: string, signal: AbortSignal): Promise<string[]> {
  signal.throwIfAborted();
  if (net.isIP(host)) return [host];
  if (host === "localhost") return [LOOPBACK, "::1"];
  const lookup = lookups.getOrInsertComputed(
    host,
    () => dns.lookup(host, { all: true }).finally(() => lookups.delete(host)),
  );
  const { promise: aborted, reject } = Promise.withResolvers<never>();
  using _ = addAbortListener(signal, () => reject(signal.reason));
  const found = await Promise.race([lookup, aborted]);
  return found.map(({ address }) => address);
}

async function listen(route: Route, resettable: boolean, signal: AbortSignal) {
  const { name, host, localPort: port } = route;
  for (let attempt = 1;; attempt++) {
    try {
      const [hostname = host] = await lookUp(host, signal);
      const listenOn = resettable ? listenOnNode : listenOnDeno;
      return await listenOn({ hostname, port });
    } catch (error) {
      signal.throwIfAborted();
      const asked = addressOf({ hostname: host, port });
      const isFinal = attempt === 20 || !hasCode(error, "EADDRINUSE");
      if (isFinal) throw new ListenError(`route ${name}`, asked, error);
      // A process that was just started may have a copy of a closed socket.
      await sleep(10, signal);
    }
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
const causeOf = (error: unknown) =>
  (error as Error).message.replace(/^Error: | \(os error \d+\)/g, "");

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

const sum = (numbers: number[]) => numbers.reduce((sum, each) => sum + each, 0);
const toMicroseconds = (ms: number) => Math.round(ms * 1000) / 1000;
const msSince = (start: number) => toMicroseconds(performance.now() - start);

type Scheduled = { name: string; schedule?: Schedule };

/** A schedule, when it began, and its next edge after that, in ms. */
type Plan = { schedule: Schedule; start: number; time: number };

/** Follows the schedules of toxics or outages, and counts what is on. */
class Timetable {
  readonly #on = new Map<string, number | undefined>(); // its start, by name
  #plans = new Map<string, Plan>(); // by name
  #alarm: Alarm | undefined;

  constructor(
    private readonly counts: Pick<RouteStats, "on">,
    private readonly turn: (name: string, edge: "on" | "off") => void,
  ) {}

  readonly isOn = ({ name }: Scheduled) => this.#on.has(name);

  /** Leaves out the toxics that are off. */
  readonly select = (toxics: readonly Toxic[]) =>
    toxics.filter((each) => this.isOn(each) || !this.#plans.has(each.name));

  /** Follows these, and no others. With another start one begins again. */
  follow(all: readonly Scheduled[], epoch = 0, opened = epoch): void {
    const before = this.#plans;
    const plans = new Map(all.map(({ name, schedule = {} }) => {
      const start = schedule.from === "connection" ? opened : epoch;
      const plan = { schedule, start, time: performance.now() - start };
      const last = before.get(name) ?? plan;
      const isSame = isDeepStrictEqual({ ...plan, time: last.time }, last);
      return [name, isSame ? last : plan]; // keeps a late edge
    }));
    if (isDeepStrictEqual(plans, before)) return;
    this.#plans = plans;
    for (const [name, start] of this.#on) {
      const isOld = plans.get(name)?.start !== start;
      if (isOld && plans === this.#plans) this.#set(name, false);
    }
    if (plans === this.#plans) this.#look();
  }

  /** Takes the edges that are due, unless one of them changes the plans. */
  #look(): void {
    const plans = this.#plans;
    let due = Infinity;
    for (const [name, plan] of plans) {
      if (plan.start + plan.time <= performance.now()) {
        // The state at its time, not now: a late edge could be skipped.
        const { isOn, until } = stateAt(plan.schedule, plan.time);
        plan.time = until;
        this.#set(name, isOn);
        if (plans !== this.#plans) return;
      }
      due = Math.min(due, plan.start + plan.time);
    }
    this.#alarm?.[Symbol.dispose]();
    this.#alarm = new Alarm(due, () => this.#look());
  }

  #set(name: string, isOn: boolean): void {
    if (isOn === this.#on.has(name)) return;
    if (isOn) this.#on.set(name, this.#plans.get(name)?.start);
    else this.#on.delete(name);
    this.counts.on[name] = (this.counts.on[name] ?? 0) + (isOn ? 1 : -1);
    this.turn(name, isOn ? "on" : "off");
  }
}

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
    | { event: "connected"; upstream: string; address: string }
      & { dialMs: number; toxics: string[] }
    | { event: "upstream_failed"; upstream: string; cause: string }
    /** The connection ended; each `accepted` has one `closed`. */
    | Reason
      & { event: "closed" }
      & Record<"bytesUp" | "bytesDown" | "durationMs", number>
  );

/** The statistics of a route's connections. */
export type RouteStats = {
  route: Route;
  connections: number;
  open: number;
  ended: Partial<Record<Outcome, number>>;
  /** How often a fault was injected, or a toxic of this type began to act. */
  faults: Partial<Record<keyof Route | ToxicType, number>>;
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

class Connection {
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
  #timetable: Timetable | undefined; // of its own schedules, if it has any
  readonly #aborted = new AbortController();
  #failure: Reason | undefined; // why it ended before both streams did
  #firstToEnd: Side | undefined;
  #delivered = 0;
  #movedAt = 0; // when bytes last did
  #silence: Alarm | undefined; // closes it when half-closed and silent

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
    if (number <= 1000) counts.first[number - 1] = this.record;
    counts.connections++;
    this.ended = Promise.resolve().then(() => this.#run(client, decided));
  }

  get state() {
    const { number, id: { route, client }, route: { upstream } } = this;
    const ageMs = msSince(this.#start);
    const toxics = this.acting.map(({ name }) => name);
    return { route, number, client, upstream, ...this.#bytes, ageMs, toxics };
  }

  get acting(): Toxic[] {
    if (!this.#sockets.upstream || this.#failure) return [];
    return this.#timetable?.select(this.#acting) ?? this.#acting;
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
    const { upstream, timeoutMs } = this.route;
    this.context.emit({ event: "accepted", ...this.id, upstream });
    if (decision.kind === "forward") {
      await this.#forward(client, decision.delayMs);
    } else if (decision.kind === "drop") {
      tally(this.counts.faults, "dropRate");
      this.context.emit({ event: "dropped", ...this.id });
      this.end({ why: "fault" });
    } else {
      tally(this.counts.faults, "timeoutRate");
      this.context.emit({ event: "timed_out", ...this.id, timeoutMs });
      const read = this.#read("client", client); // and answers nothing
      if (timeoutMs > 0) {
        await sleepUntil(this.#start + timeoutMs, this.#aborted.signal);
        this.end({ why: "fault" });
      }
      await read;
    }
    this.end();
    const reason = this.#failure ?? { why: this.#firstToEnd ?? "client" };
    tally(this.counts.ended, reason.why);
    this.record.outcome = reason;
    const measured = { ...this.#bytes, durationMs: msSince(this.#start) };
    this.context.emit({ event: "closed", ...this.id, ...reason, ...measured });
  }

  /** Closes all that is open, which ends it; the first reason stands. */
  end(reason?: Reason, how?: "close" | "reset"): void {
    this.#failure ??= reason;
    this.#silence?.[Symbol.dispose]();
    if (this.#failure) this.#aborted.abort(CLOSED);
    for (const socket of Object.values(this.#sockets)) socket.close(how);
    for (const link of Object.values(this.#links)) link.abort();
    // V8's Map and Set keep what was removed, and all this, until a full GC.
    this.#sockets = {};
    this.#links = {};
    this.#timetable?.follow([]);
  }

  async #forward(client: Socket, delayMs: number): Promise<void> {
    const up = this.#links.client = new Link(this, "client");
    const down = this.#links.upstream = new Link(this, "upstream");
    if (delayMs > 0) {
      tally(this.counts.faults, "latencyMs");
      this.context.emit({ event: "delayed", ...this.id, delayMs });
      this.#read("client", client, up).then(() => {
        // One that has sent something may be waiting for the answer.
        const isGone = !this.#sockets.upstream && this.#bytes.bytesUp === 0;
        if (isGone) this.end({ why: "client" });
      });
      await sleepUntil(this.#start + delayMs, this.#aborted.signal);
    }
    await this.#dial();
    const { upstream } = this.#sockets;
    if (!upstream || this.#failure) return;
    if (delayMs === 0) this.#read("client", client, up);
    this.#read("upstream", upstream, down);
    await Promise.all([this.#carry(up, upstream), this.#carry(down, client)]);
  }

  async #dial(): Promise<void> {
    const { route: { upstream, connectTimeoutMs }, context: { emit } } = this;
    const start = performance.now();
    const problem = `no answer within ${connectTimeoutMs} ms`;
    const fail = () => this.#aborted.abort(new Error(problem));
    try {
      using _ = new Alarm(start + connectTimeoutMs, fail);
      const { signal } = this.#aborted;
      const socket = await dial(upstream, this.resettable, signal);
      this.#sockets.upstream = socket;
      if (this.#failure) return; // ended meanwhile
      this.#movedAt = performance.now();
      this.#followSchedules();
      const dialMs = msSince(start);
      const { dials } = this.counts;
      dials.count++;
      dials.totalMs += dialMs;
      DIAL_BOUNDS_MS.forEach((bound, i) => {
        if (dialMs <= bound) tally(dials.within, i);
      });
      const toxics = this.acting.map(({ name }) => name);
      const reached = { upstream, address: socket.peer, dialMs, toxics };
      emit({ event: "connected", ...this.id, ...reached });
    } catch (error) {
      if (this.#failure) return; // ended meanwhile, which aborts the dialling
      const cause = causeOf(error);
      this.#failure = { why: "upstream_failed", cause };
      emit({ event: "upstream_failed", ...this.id, upstream, cause });
    }
  }

  /** Follows its own schedules, not those that its route follows for all. */
  #followSchedules(): void {
    if (!this.#sockets.upstream) return; // not connected yet, or ended
    const own = this.#acting.filter((toxic) =>
      toxic.schedule?.from === "connection" ||
      (toxic.schedule && this.toxics.includes(toxic))
    );
    this.#timetable ??= own[0] && new Timetable(this.counts, (toxic, edge) => {
      this.context.emit({ event: `toxic_${edge}`, ...this.id, toxic });
      this.#act();
    });
    this.#timetable?.follow(own, this.context.epoch, this.#start);
    this.#act();
  }

  /** Starts a toxic on a link, for the nth time there, from 1. */
  begin(toxic: Toxic, nth: number, out: ToxicOutput): Queue {
    const { name, type } = toxic;
    const { route, number, context, counts, record } = this;
    const key = [this.#seed, route.name, number, name];
    if (nth > 1) key.push(nth);
    let stream: (() => number) | undefined; // a toxic may never draw
    const random = () => (stream ??= randomStream(...key))();
    return new Queue(toxic, out, random, context, () => {
      tally(counts.faults, type);
      tally(counts.toxics, name);
      if (!record.toxics.includes(name)) record.toxics.push(name);
    }, performance.now());
  }

  #act(): void {
    const { acting } = this;
    for (const link of Object.values(this.#links)) link.act(acting);
  }

  /** Delivers what a side sends; closes both if a reset or a toxic ended it. */
  async #carry(link: Link, socket: Socket): Promise<void> {
    const { from } = link;
    const to = OTHER[from];
    const fail = (error: unknown) => {
      this.#failure ??= { why: `${to}_reset`, cause: causeOf(error) };
      throw error;
    };
    const sink = new WritableStream<Bytes>({
      write: async (chunk) => {
        const { length } = chunk;
        const turn = PollGate.pass(length);
        if (turn) await turn;
        await socket.write(chunk).catch(fail);
        this.counts.sent[STREAM_OF[from]] += length;
        this.#movedAt = performance.now();
      },
      close: async () => {
        // After the second end both sockets are closed, which ends them too.
        if (++this.#delivered < 2) await socket.closeWrite()?.catch(fail);
      },
    });
    const isBroken = await link.stream.readable.pipeTo(sink).catch(() => true);
    if (isBroken) return; // it was ended, or the other stream ends it
    const { closedBy: toxic } = link;
    if (toxic) this.#failure ??= { why: "fault", toxic };
    else if (this.#failure?.why !== `${from}_reset`) return;
    this.#sockets[from]?.close();
    this.#links[to]?.abort();
    // Closing a socket with unread bytes would discard what it still sends.
    using _ = new Alarm(performance.now() + 2000, () => this.end());
    await this.#read(to, socket);
  }

  /** Reads what a side sends into its link, or to discard it. */
  async #read(from: Side, socket: Socket, link?: Link): Promise<void> {
    try {
      for (let size = 0;;) {
        const turn = PollGate.pass(size);
        if (turn) await turn;
        const bytes = await socket.read();
        if (bytes === null) break;
        size = bytes.length;
        this.#movedAt = performance.now();
        this.#bytes[from === "client" ? "bytesUp" : "bytesDown"] += size;
        this.counts.received[STREAM_OF[from]] += size;
        if (!link) continue;
        const written = link.writer.write(bytes);
        // Without an upstream it is read ahead, to notice its end.
        const isFull = this.#bytes.bytesUp > MAX_READ_BYTES;
        if (this.#sockets.upstream || isFull) await written;
        else written.catch(() => {}); // `#carry` handles it
      }
      if (!this.#firstToEnd && this.#sockets.client) this.#limitSilence(from);
      this.#firstToEnd ??= from;
    } catch (error) {
      // If the link has failed, the reason is set, or is in its `closedBy`.
      if (!link?.closedBy) {
        this.#failure ??= { why: `${from}_reset`, cause: causeOf(error) };
      }
      this.#aborted.abort(CLOSED);
    }
    link?.writer.close().catch(() => {}); // `#carry` handles it
  }

  /** Closes it, once half-closed, after `halfCloseTimeoutMs` without a byte. */
  #limitSilence(from: Side, since = performance.now()): void {
    const { halfCloseTimeoutMs: ms } = this.route;
    this.#silence = new Alarm(since + (ms || Infinity), () => {
      const links = Object.values(this.#links);
      const isBusy = !this.#sockets.upstream ||
        links.some(({ heldBytes }) => heldBytes > 0);
      const moved = [this.#movedAt, ...links.map(({ movedAt }) => movedAt)];
      const next = isBusy ? performance.now() + 20 : Math.max(...moved);
      if (next > since) return this.#limitSilence(from, next);
      const cause = `no byte from the ${OTHER[from]} for ${ms} ms`;
      this.end({ why: from, cause });
    });
  }
}

// ---- Proxy: listeners and open connections ----------------------------------

const ACCEPT_PAUSE_MS = 100;
const MAX_EVENTS = 1000;

/** What happens to the proxy, its routes and connections. */
export type ProxyEvent =
  | ConnectionEvent
  /** What happens to a route and its toxics, or to those of a `connection`. */
  | { route: string; connection?: number; client?: string }
    & (
      | { event: "listening" }
        & Record<"address" | "upstream" | "faults", string>
      | { event: "config_warning"; warnings: string[] }
      | { event: "accept_failed"; cause: string }
      | { event: "route_added" | "route_changed"; enabled: boolean }
        & Record<"upstream" | "faults", string>
      | { event: "route_removed" }
      | { event: "toxic_added" | "toxic_changed" }
        & Record<"toxic" | "effect", string>
      | { event: "toxic_removed"; toxic: string }
      | { event: "toxic_on" | "toxic_off"; toxic: string }
      | { event: "outage_on" | "outage_off"; outage: string }
    )
  /** All routes listen; the seed repeats this run's decisions. */
  | { event: "started"; routes: number; seed: number }
  | { event: "reseeded"; seed: number }
  | { event: "reloaded" } & Record<"added" | "changed" | "removed", string[]>
  /** Waits for the connections in flight, for so long; 0: for ever. */
  | { event: "draining"; connections: number; timeoutMs: number }
  | { event: "drained"; cut: number; durationMs: number };

/** What the connections met. A warning names a fault without effect. */
export type Report =
  & { version: string; seed: number; durationMs: number }
  & { warnings: string[]; routes: RouteStats[] };

/** How to start a {@linkcode ChaosProxy}. */
export interface StartOptions {
  /** Called with each event, as it happens; must not throw. */
  onEvent?: (event: ProxyEvent) => void;
  /** Whether all routes can be reset (slower), not just where toxics do. */
  resettable?: boolean;
}

/** A connection in flight. `id` is its own among all of this proxy. */
export type LiveConnection =
  & Record<"route" | "client" | "upstream", string>
  & Record<"id" | "number" | "bytesUp" | "bytesDown" | "ageMs", number>
  & { toxics: string[] };

/** What has toxics: a route, by its name, or an open connection, by its id. */
export type ToxicTarget = string | { connection: number };

interface ProxyContext {
  seed: number;
  epoch: number;
  lastId: number;
  config: Config; // the last that was given
  readonly history: EventHistory;
  readonly resettable: boolean;
  readonly stopping: AbortController; // aborts with the error for changes
  readonly emit: (event: ProxyEvent) => void;
}

/** Serves a route, and changes it as {@linkcode ChaosProxy} decides. */
class LiveRoute {
  lastNumber = 0;
  readonly connections = new Map<number, Connection>(); // in flight, by id
  readonly #resettable: boolean;
  #listener: Awaited<ReturnType<typeof listen>> | undefined;
  #serving: AbortController | undefined; // aborts when it closes
  #counts = newCounts();
  readonly #hung = new WeakSet<Connection>(); // by an outage, until it is over
  readonly #timetable = new Timetable(this.#counts, (name, edge) => {
    const { route: { name: route }, context: { emit } } = this;
    if (name.includes(" ")) { // an outage's: no toxic's name has a space
      emit({ event: `outage_${edge}`, route, outage: name });
      if (edge === "on") tally(this.#counts.faults, "outages");
      this.settle(edge);
    } else {
      emit({ event: `toxic_${edge}`, route, toxic: name });
      this.#act();
    }
  });

  constructor(public route: Route, private readonly context: ProxyContext) {
    this.#resettable = context.resettable || needsReset(route);
  }

  get #outage(): Outage | undefined {
    return nameOutages(this.route).find(this.#timetable.isOn)?.schedule;
  }

  /** The route with its host as an address, to find circles. */
  get resolved(): Route {
    const { host } = this.route;
    return { ...this.route, host: this.#listener?.addr.hostname ?? host };
  }

  /** Listens there, and no longer where it did; nothing is accepted yet. */
  async open(next = this.route, signal = this.context.stopping.signal) {
    if (this.#outage?.mode === "refuse") return;
    const listener = await listen(next, this.#resettable, signal);
    if (signal.aborted) await listener.close();
    signal.throwIfAborted();
    if (this.#listener) await this.close();
    this.#listener = listener;
    const localPort = listener.addr.port;
    this.route = { ...this.route, host: canonicalHost(next.host), localPort };
  }

  /** Listens or closes as its settings and outages say, after an edge of one. */
  settle(edge?: "on" | "off"): Promise<void> | void {
    const outage = this.#outage;
    const reason = { why: "fault", cause: "outage" } as const;
    for (const each of this.connections.values()) {
      const isHung = this.#hung.has(each);
      if (isHung && edge === "off") each.end({ why: "fault" });
      if (!isHung && outage?.reset) each.end(reason, "reset");
    }
    const listens = this.route.enabled && outage?.mode !== "refuse";
    if (!listens || this.context.stopping.signal.aborted) return this.close();
    if (!this.#serving) this.#serve();
  }

  /** Accepts until it is closed. After an outage it listens again first. */
  async #serve(): Promise<void> {
    const { signal } = this.#serving = new AbortController();
    const { route: { name: route, upstream }, context: { emit } } = this;
    let told: string | undefined; // why it cannot listen
    const fail = async (error: unknown) => {
      const cause = causeOf(error);
      const isNews = cause !== told && !signal.aborted;
      if (isNews) emit({ event: "accept_failed", route, cause });
      told = this.#listener ? undefined : cause;
      // Waits for a port or file descriptors, but not when a client has left.
      const hasLeft = hasCode(error, "ENOTCONN", "ECONNRESET", "ECONNABORTED");
      if (!hasLeft) await sleep(ACCEPT_PAUSE_MS, signal);
    };
    while (!this.#listener && !signal.aborted) {
      await this.open(this.route, signal).catch(fail);
    }
    const listener = this.#listener;
    if (!listener || signal.aborted) return;
    const address = addressOf(listener.addr);
    const faults = describeFaults(this.route);
    emit({ event: "listening", route, address, upstream, faults });
    const admit = (client: Socket) =>
      signal.aborted ? client.close() : this.#admit(client);
    while (!signal.aborted) await listener.accept().then(admit).catch(fail);
  }

  followSchedules(): void {
    const { toxics } = this.route;
    const own = toxics.filter((each) => each.schedule?.from === "start");
    const all = [...own, ...nameOutages(this.route)];
    this.#timetable.follow(all, this.context.epoch);
    this.#act();
  }

  #act(): void {
    const toxics = this.#timetable.select(this.route.toxics);
    for (const each of this.connections.values()) each.setToxics(toxics);
  }

  /** Asks `change` again once it listens: toxics may change meanwhile. */
  async update(change: (now: Route) => Route, all: readonly Route[]) {
    const { route: before } = this;
    const wanted = change(before);
    assertFree(wanted, all);
    this.assertResettable(needsReset(wanted));
    const moves = !isSameAddress(wanted, before);
    const restarts = moves || wanted.upstream !== before.upstream;
    if (wanted.enabled && (moves || !before.enabled)) {
      const isOwnPort = wanted.localPort === before.localPort;
      if (isOwnPort || !this.#listener) await this.close(); // makes way
      await this.open(wanted).catch((error) => {
        this.settle(); // listens again where it did
        throw error;
      });
    }
    const cut = restarts || !wanted.enabled ? this.cut() : undefined;
    if (restarts) {
      const { received, sent } = newCounts();
      this.#counts = { ...this.#counts, received, sent };
      this.lastNumber = 0;
    }
    const { toxics, ...next } = change(this.route);
    const host = canonicalHost(next.host);
    const localPort = this.#listener?.addr.port ?? next.localPort;
    this.route = { ...this.route, ...next, host, localPort };
    this.setToxics(toxics);
    await Promise.all([cut, this.settle()]);
    this.tell("route_changed");
    return this.route;
  }

  setToxics(toxics: readonly Toxic[], connection?: Connection): void {
    this.assertResettable(needsReset({ ...this.route, toxics }));
    const { toxics: before } = connection ?? this.route;
    const of = connection?.id ?? { route: this.route.name };
    if (!connection) this.route = { ...this.route, toxics };
    const { emit } = this.context;
    const gone = new Set(before.map(({ name }) => name));
    for (const toxic of toxics) {
      const event = gone.delete(toxic.name) ? "toxic_changed" : "toxic_added";
      if (before.includes(toxic)) continue;
      const effect = describeToxic(toxic, connection && "this connection");
      emit({ event, ...of, toxic: toxic.name, effect });
    }
    for (const toxic of gone) emit({ event: "toxic_removed", ...of, toxic });
    const ofRoute = this.#timetable.select(this.route.toxics);
    if (connection) connection.setToxics(ofRoute, toxics);
    else this.followSchedules();
    const all = [...this.route.toxics, ...toxics, ...nameOutages(this.route)];
    const names = all.map(({ name }) => name); // no other is counted as off
    for (const [name, on] of Object.entries(this.#counts.on)) {
      if (on === 0 && !names.includes(name)) delete this.#counts.on[name];
    }
  }

  assertResettable(isNeeded: boolean): void {
    if (this.#resettable || !isNeeded) return;
    const problem = `route ${this.route.name}: its connections cannot be reset`;
    const hint = "start it with --api or --watch; in code, resettable: true";
    throw new Deno.errors.NotSupported(`${problem}; ${hint}`);
  }

  tell(event: "route_added" | "route_changed"): void {
    const { name: route, upstream, enabled } = this.route;
    const faults = describeFaults(this.route);
    this.context.emit({ event, route, upstream, enabled, faults });
  }

  /** Stops listening; resolves when the address is free. */
  async close(): Promise<void> {
    this.#serving?.abort();
    const listener = this.#listener;
    this.#serving = this.#listener = undefined;
    await listener?.close();
  }

  async cut(): Promise<void> {
    for (const each of this.connections.values()) each.end({ why: "cut" });
    await Promise.all(this.connections.values().map(({ ended }) => ended));
  }

  stats(): RouteStats {
    const { route, connections: { size: open } } = this;
    const { first: all, ...counts } = this.#counts;
    const first = all.slice(0, this.lastNumber);
    return { route, open, ...structuredClone(counts), first };
  }

  async end(): Promise<void> {
    this.#timetable.follow([]);
    await Promise.all([this.close(), this.cut()]);
  }

  /** Not inlined: the accept loop would keep the last connection in memory. */
  #admit(client: Socket): void {
    const toxics = this.#timetable.select(this.route.toxics);
    const { mode } = this.#outage ?? {};
    if (mode === "reset") client.close("reset");
    const dropRate = mode === "hang" ? 0 : 1;
    const all = { connections: "1-", dropRate, timeoutRate: 1, timeoutMs: 0 };
    const route = { ...this.route, toxics, ...(mode && all) };
    const settings = [this.#resettable, this.#counts, this.context] as const;
    const number = ++this.lastNumber;
    const connection = new Connection(client, route, number, ...settings);
    const id = ++this.context.lastId;
    this.connections.set(id, connection);
    if (mode === "hang") this.#hung.add(connection);
    connection.ended.then(() => this.connections.delete(id));
  }
}

const nameOutages = ({ outages }: Route) =>
  outages.map((schedule, i) => (
    { name: `outage ${i + 1} (${schedule.mode})`, schedule }
  ));

const isSameAddress = (a: Route, b: Route) =>
  a.localPort === b.localPort &&
  canonicalHost(a.host) === canonicalHost(b.host);
const needsReset = ({ toxics, outages }: Route) =>
  outages.some(({ mode, reset }) => reset || mode === "reset") ||
  toxics.some(({ type, toxicity, attributes: { rate, reset } }) =>
    toxicity > 0 && (type === "reset_peer" || (reset === 1 && rate !== 0))
  );

/** Merges by name: `next` where it differs from `before`, else `now`. */
function merge<T extends { name: string }>(...lists: (readonly T[])[]): T[] {
  const maps = lists.map((list) => new Map(list.map((one) => [one.name, one])));
  const names = new Set(maps.flatMap((map) => [...map.keys()]));
  return [...names].flatMap((name) => {
    const [next, now, before] = maps.map((map) => map.get(name));
    return (isDeepStrictEqual(next, before) ? now : next) ?? [];
  });
}

function mergeRoute(next: Route, now = next, before = now): Route {
  const { toxics, ...settings } = next;
  const changes = Object.entries(settings).filter(([key, value]) =>
    !isDeepStrictEqual(value, before[key as keyof Route])
  );
  const changed = changeRoute(now, Object.fromEntries(changes));
  return { ...changed, toxics: merge(toxics, changed.toxics, before.toxics) };
}

/** Another profile's toxics replace the last one's, if no toxics are given. */
function changeRoute(now: Route, changes: Partial<Route>): Route {
  const next = { ...now, ...changes };
  if (next.profile === now.profile) return next;
  return { ...next, toxics: withProfile(next.profile, ownToxics(now)) };
}

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
  #turn: Promise<unknown> = Promise.resolve(); // of the last change of a route

  private constructor(private readonly context: ProxyContext) {}

  /** Listens on all routes or none; {@linkcode serveApi} serves the `api`. */
  static async start(
    config: ConfigOptions,
    { onEvent = () => {}, resettable = false }: StartOptions = {},
  ): Promise<ChaosProxy> {
    const history = new EventHistory();
    const emit = (event: ProxyEvent) => onEvent(history.add(event));
    const checked = checkConfig(config, "config");
    const { seed = randomSeed(), routes } = checked;
    await (this.#warm ??= this.#warmUp(resettable));
    Alarm.clearIfUnused();
    const state = { seed, epoch: 0, lastId: 0, config: checked, resettable };
    const stopping = new AbortController();
    const proxy = new ChaosProxy({ ...state, history, emit, stopping });
    await proxy.#open(routes);
    for (const route of routes) {
      proxy.#warn(route);
      proxy.#target(route.name).live.settle();
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
      const toxics = [{ type: "latency", attributes: { latency: 1 } }];
      const to = { localPort: 0, upstream: addressOf(upstream.addr), toxics };
      const route = checkRoute(to, new Place("", [])) as Route;
      const { signal } = new AbortController();
      const listener = await listen(route, resettable, signal);
      open.defer(() => listener.close());
      open.use(new Alarm(performance.now() + 1000, () => open.dispose()));
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

  /** A config that starts a proxy as this one is now. */
  toConfig(): Config {
    return { ...this.context.config, seed: this.seed, routes: this.routes };
  }

  /** How many connections are in flight. */
  get connections(): number {
    return this.#live.size;
  }

  /** Whether it accepts, and the time since the start, and the last seed. */
  health():
    & { status: "ok" | "draining"; version: string }
    & Record<"uptimeMs" | "elapsedMs", number> {
    const { stopping, epoch } = this.context;
    const status = stopping.signal.aborted ? "draining" : "ok";
    const times = { uptimeMs: msSince(this.#start), elapsedMs: msSince(epoch) };
    return { status, version: deno.version, ...times };
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
    return await this.#inTurn(() => this.#add(route as Route));
  }

  /**
   * Changes a route. Another address or upstream, or `enabled: false`, cuts its
   * connections, and the former counts them from 1 again.
   */
  async updateRoute(
    name: string,
    changes: Partial<Omit<RouteOptions, "name" | "toxics">>,
  ): Promise<Route> {
    const { name: _, toxics: __, ...fields } = ROUTE_FIELDS;
    const check = (place: Place) => checkFields(changes, place, fields, true);
    const isChecked = fromToxiproxy.has(changes);
    const checked = isChecked ? changes : validate(`route ${name}`, check);
    const change = (now: Route) => changeRoute(now, checked as Partial<Route>);
    return await this.#inTurn(() => this.#change(name, change));
  }

  /** Removes a route, and cuts its connections. */
  async removeRoute(name: string): Promise<void> {
    await this.#inTurn(() => this.#remove(name));
  }

  /**
   * Adds these routes, or replaces those of their names that listen or forward
   * elsewhere, and leaves the others alone. If one fails, those before it stay.
   */
  async populate(options: readonly RouteOptions[]): Promise<Route[]> {
    const check = (place: Place) => checkRoutes(options, place.at("routes"));
    const routes = validate("routes", check);
    const put = (route: Route) => {
      const { route: now } = this.#routes.get(route.name) ?? {};
      if (!now) return this.#add(route);
      // For port 0, the port that it has already will do.
      const here = { ...route, localPort: route.localPort || now.localPort };
      const isSame = isSameAddress(here, now) && here.upstream === now.upstream;
      return isSame ? now : this.#change(route.name, () => here);
    };
    return await this.#inTurn(() => Array.fromAsync(routes, put));
  }

  /**
   * Changes only what differs from the last config. If a route cannot listen,
   * the others change all the same. It then throws {@linkcode ListenError}, and
   * the next reload tries that route again.
   */
  async reload(config: ConfigOptions): Promise<void> {
    const checked = checkConfig(config, "config");
    await this.#inTurn(() => this.#reload(checked));
  }

  /** Removes all toxics, and enables every route that can be listened on. */
  async reset(): Promise<void> {
    await this.#inTurn(async () => {
      const enabled = Array.from(this.#routes.values(), (live) => {
        live.route = { ...live.route, profile: "" };
        live.setToxics([]);
        for (const one of live.connections.values()) live.setToxics([], one);
        if (live.route.enabled) return;
        return live.update((now) => ({ ...now, enabled: true }), this.routes);
      });
      await Promise.allSettled(enabled);
      await Promise.all(enabled); // throws if one of them failed
    });
  }

  /** Adds a toxic behind those that are there, also on open connections. */
  addToxic(target: ToxicTarget, options: ToxicOptions): Toxic {
    const { live, connection, toxics, what } = this.#target(target);
    const toxic = validate("toxic", (place) => checkToxic(options, place));
    const all = connection ? [...live.route.toxics, ...toxics] : toxics;
    const isTaken = all.some(({ name }) => name === toxic.name);
    const problem = `${what} has a toxic ${toxic.name} already`;
    if (isTaken) throw new Deno.errors.AlreadyExists(problem);
    validate(what, (place) => checkCount({ toxics: [...all, toxic] }, place));
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
    live.assertResettable(how === "reset");
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
    const timer = timeoutMs > 0 ? setTimeout(() => this.stop(), timeoutMs) : 0;
    await ended;
    clearTimeout(timer);
    const cut = sum(this.stats().map(({ ended }) => ended.drain ?? 0));
    emit({ event: "drained", cut, durationMs: msSince(start) });
    return cut;
  }

  /** Stops at once: closes the listeners, cuts the connections in flight. */
  async stop(): Promise<void> {
    const ended = this.#end();
    for (const each of this.#live.values()) each.end({ why: "drain" });
    await ended;
  }

  /** Stops at once, as {@linkcode ChaosProxy.stop} does. */
  readonly [Symbol.asyncDispose]: () => Promise<void> = this.stop;

  get #live() {
    const routes = this.#routes.values();
    return new Map(routes.flatMap(({ connections }) => connections));
  }

  /** Listening takes time: changes of routes wait for each other. */
  #inTurn<T>(change: () => Promise<T>): Promise<T> {
    const { signal } = this.context.stopping;
    const changed = this.#turn.then(() => signal.throwIfAborted()).then(change);
    this.#turn = changed.catch(() => {}); // the caller gets the error
    return changed;
  }

  #warn(route: Route): void {
    const warnings = firstOf(warningsOf(route));
    const about = { route: route.name, warnings };
    if (warnings[0]) this.context.emit({ event: "config_warning", ...about });
  }

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
    const isTaken = this.#routes.has(route.name);
    const problem = `there is a route ${route.name} already`;
    if (isTaken) throw new Deno.errors.AlreadyExists(problem);
    const [live] = await this.#open([route]) as [LiveRoute];
    live.tell("route_added");
    live.settle();
    live.followSchedules();
    return live.route;
  }

  /** Listens on new routes, on all or on none; nothing is accepted yet. */
  async #open(routes: readonly Route[]): Promise<LiveRoute[]> {
    await using failed = new AsyncDisposableStack();
    const opened = routes.map((route) => new LiveRoute(route, this.context));
    for (const live of opened) {
      failed.defer(() => live.close());
      assertFree(live.route, this.routes);
      if (live.route.enabled) await live.open();
    }
    const all = [...this.#routes.values(), ...opened];
    assertNoCircle(all.map(({ resolved }) => resolved));
    failed.move(); // all listen
    for (const live of opened) this.#routes.set(live.route.name, live);
    return opened;
  }

  async #change(name: string, change: (now: Route) => Route): Promise<Route> {
    const { live } = this.#target(name);
    const others = this.#routes.values().filter((each) => each !== live);
    const changed = change(live.resolved);
    assertNoCircle([changed, ...others.map(({ resolved }) => resolved)]);
    validate(`route ${name}`, (place) => checkCount(changed, place));
    return await live.update(change, this.routes);
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
    const problem = "api: cannot change; restart the proxy";
    if (config.api !== last.api) throw new ConfigError("config", [problem]);
    const before = new Map(last.routes.map((route) => [route.name, route]));
    const all = merge(config.routes, now, last.routes).map((route) => {
      const { name } = route;
      const live = this.#routes.get(name);
      const change = (as?: Route) => mergeRoute(route, as, before.get(name));
      const wanted = change(live?.route);
      live?.assertResettable(needsReset(wanted));
      return { name, route, live, change, wanted };
    });
    assertNoCircle(all.map(({ wanted }) => wanted));
    const removed = [...this.#routes.keys()]
      .filter((name) => !all.some((each) => each.name === name));
    for (const name of removed) await this.#remove(name);
    const [added, changed]: [string[], string[]] = [[], []];
    const failed = new Map<string, Error>();
    // New routes come last: they can take the ports that others free.
    all.sort((a, b) => Number(!a.live) - Number(!b.live));
    for (const { name, route, live, change } of all) {
      if (now.includes(route)) continue; // it stays as it is
      this.#warn(route);
      const put = live?.update(change, this.routes) ?? this.#add(route);
      const done = live ? changed : added;
      await put.then(() => done.push(name), (error) => failed.set(name, error));
    }
    // What has failed is compared with the file before once more.
    const routes = config.routes.flatMap((route) =>
      failed.has(route.name) ? before.get(route.name) ?? [] : route
    );
    const { seed = last.seed } = config;
    this.context.config = { ...config, seed, routes };
    if (seed !== last.seed) this.reseed(seed);
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
    await Promise.all([this.#turn, ...closed, ...ended]);
    for (const route of this.#routes.values()) route.end();
    Alarm.clearIfUnused();
    PollGate.close();
  }
}

const count = (number: number, what: string) =>
  `${number} ${what}${number === 1 ? "" : "s"}`;
const randomSeed = () => Math.floor(Math.random() * 2 ** 32);

function assertNoCircle(routes: readonly Route[]): void {
  const { route, problem } = findCircle(routes) ?? {};
  if (!route) return;
  throw new ConfigError(`route ${route.name}`, [`upstream: ${problem}`]);
}

/** Refuses another route's address, also while an outage has closed it. */
function assertFree(route: Route, all: readonly Route[]): void {
  const { name, enabled, host: hostname, localPort: port } = route;
  const rival = all.find((each) =>
    each.name !== name && each.enabled && each.localPort === port &&
    overlaps(canonicalHost(each.host), canonicalHost(hostname))
  );
  if (!rival || !enabled || port === 0) return;
  const cause = new Error(`the port is already in use by route ${rival.name}`);
  throw new ListenError(`route ${name}`, addressOf({ hostname, port }), cause);
}

function describeFaults({ enabled, outages, toxics, ...route }: Route): string {
  const { dropRate, timeoutRate, timeoutMs, latencyMs, jitterMs } = route;
  const times = { dropRate, timeoutRate, timeoutMs, latencyMs, jitterMs };
  const connections = route.connections !== "1-" && route.connections;
  return [
    enabled ? "" : ", disabled",
    listed({ ...times, connections, profile: route.profile }),
    ...outages.map((outage) => `, outage${listed(outage)}`),
    ...toxics.map((toxic) => `, ${describeToxic(toxic)}`),
  ].join("").slice(2) || "no faults";
}

function missedFaults({ route, connections, on, ...acted }: RouteStats) {
  const { name, toxics, dropRate, timeoutRate, latencyMs } = route;
  if (connections === 0) return [`${name}: no connection`];
  const none = `acted on none of ${count(connections, "connection")}`;
  return [
    ...Object.entries({ dropRate, timeoutRate, latencyMs })
      .filter(([kind, set]) => set > 0 && !Object.hasOwn(acted.faults, kind))
      .map((fault) => `${fault.join(" ")}: ${none}`),
    ...toxics.filter((toxic) => !Object.hasOwn(acted.toxics, toxic.name))
      .map((toxic) => `toxic ${toxic.name}: ${none}`),
    ...nameOutages(route).filter((outage) => !Object.hasOwn(on, outage.name))
      .map((outage) => `${outage.name}: never began`),
  ].map((missed) => `${name}: ${missed}`);
}

/** The last 1,000 events, by their ids, modulo 1,000. */
class EventHistory {
  readonly events: { time: Date; event: object }[] = [];
  readonly firstId = Date.now() * 1000; // not one of a run before
  lastId = this.firstId;
  readers = 0;

  add<E extends object>(event: E): E {
    this.events[++this.lastId % MAX_EVENTS] = { time: new Date(), event };
    return event;
  }
}

// ---- Control API: Toxiproxy's protocol, over the proxy ----------------------

/** An event of the control API. */
export type ApiEvent =
  | { event: "api_listening"; address: string; warning?: string }
  /** `request` is the answer's `X-Toxiproxy-Request-Id`. */
  | { event: "api"; request: string; method: string; path: string }
    /** `ignored` is what was ignored in its body, or taken otherwise, by path. */
    & { status: number; error?: string; ignored?: string[]; durationMs: number }
  | { event: "api_failed"; cause: string };

/** Options of the control API. */
export interface ApiOptions {
  /** Called with each event; must not throw. */
  onEvent?: (event: ApiEvent) => void;
  /** Whether a browser gets the page, which may then call. Default: true. */
  page?: boolean;
}

type LogLevel = "debug" | "info" | "warn" | "error";
type LogEvent =
  | ProxyEvent
  | ApiEvent
  | { event: "log_dropped"; lines: number }
  | { event: "report"; summary: string; warnings: string[]; file: string }
  | { event: "reload_failed"; cause: string }
  | { event: "sighup_ignored" };

function levelOf(event: LogEvent): LogLevel {
  const isWarning = /_(?:failed|warning|dropped|ignored)$/.test(event.event) ||
    "ignored" in event || "warning" in event ||
    ("warnings" in event && event.warnings.length > 0) ||
    ("cut" in event && event.cut > 0);
  return isWarning ? "warn" : event.event === "api" ? "debug" : "info";
}

const toJson = (time: Date, event: LogEvent) =>
  JSON.stringify({ time, level: levelOf(event), ...event });

const MAX_READERS = 16;

class Refusal extends Error {
  constructor(readonly status: number, message: string, readonly headers = {}) {
    super(message);
  }
}

interface Call {
  readonly proxy: ChaosProxy;
  readonly searchParams: URLSearchParams;
  readonly headers: Headers;
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
  "GET /metrics": ({ proxy }) => metrics(proxy.stats()),
  "GET /connections": ({ proxy }) =>
    proxy.liveConnections()
      .map(({ route: proxy, ...rest }) => ({ proxy, ...rest })),
  "DELETE /connections/*"({ proxy, searchParams, name }) {
    const reset = searchParams.get("reset") ?? "0";
    const problem = `expected reset=0 or 1, found ${describe(reset)}`;
    if (!/^[01]$/.test(reset)) throw new Refusal(400, problem);
    proxy.cutConnection(Number(name), reset === "1" ? "reset" : "close");
  },
  "GET /health"({ proxy }) {
    const now = proxy.health();
    return Response.json(now, { status: now.status === "ok" ? 200 : 503 });
  },
  "GET /report": ({ proxy }) => proxy.report(),
  "GET /schema": () => CONFIG_SCHEMA,
  "GET /config": ({ proxy }) =>
    answerAs("text/yaml; charset=utf-8", toYaml(proxy.toConfig())),
  "GET /events": streamEvents,
  "GET /seed": ({ proxy }) => ({ seed: proxy.seed }),
  "PUT /seed"({ proxy, check }) {
    const { seed } = check(changesOf({ seed: CONFIG_FIELDS.seed }));
    const problem = "missing required field: seed";
    if (seed === undefined) throw new Refusal(400, problem);
    proxy.reseed(seed);
    return { seed };
  },
};

/** Server-sent events: those after an id, and the statistics each second. */
function streamEvents({ proxy, searchParams, headers }: Call) {
  const { history } = proxy["context"];
  const problem = `${MAX_READERS} others read the events already`;
  if (history.readers >= MAX_READERS) throw new Refusal(503, problem);
  history.readers++;
  const most = Number(searchParams.get("max")) >>> 0 || Infinity;
  const given = headers.get("last-event-id") ?? searchParams.get("after");
  const { firstId, lastId: present } = history;
  const after = Number(given ?? present);
  const isThere = after >= firstId && after <= present;
  // A reader is a position: a slow one costs nothing, and misses some.
  let position = isThere ? after : Math.max(firstId, present - MAX_EVENTS);
  let [left, due] = [0, 0];
  const hasNews = () => left > 0 && position < history.lastId;
  const closed = new AbortController();
  const stream = new ReadableStream<Bytes>({
    async pull(controller) {
      do {
        await sleep(25, closed.signal); // batches up to 40,000 events a second
        if (closed.signal.aborted) return;
      } while (performance.now() < due && !hasNews());
      let text = "";
      if (performance.now() >= due) {
        [left, due] = [most, performance.now() + 1000];
        const routes = proxy.stats()
          .map(({ route: { name }, first: _, ...rest }) => ({ name, ...rest }));
        const { elapsedMs } = proxy.health();
        const stats = { time: new Date(), seed: proxy.seed, elapsedMs, routes };
        text = `event: stats\ndata: ${JSON.stringify(stats)}\n\n`;
      }
      const lastId = left > 0 ? history.lastId : position; // or a second later
      const next = Math.max(position, lastId - Math.min(left, MAX_EVENTS));
      const missed = JSON.stringify({ missed: next - position });
      if (next > position) text += `event: missed\ndata: ${missed}\n\n`;
      for (let id = next + 1; id <= lastId; id++) {
        const { time, event } = history.events[id % MAX_EVENTS]!;
        text += `id: ${id}\ndata: ${toJson(time, event as LogEvent)}\n\n`;
      }
      left -= lastId - next;
      position = lastId;
      controller.enqueue(new TextEncoder().encode(text));
    },
    cancel() {
      history.readers--;
      closed.abort();
    },
  }, { highWaterMark: 0 });
  return answerAs("text/event-stream", stream);
}

/** The page, if a browser asks for it. Only its own scripts and styles act. */
function servePage({ method, url, headers }: Request): Response | undefined {
  if (`${method} ${new URL(url).pathname}` !== "GET /") return;
  if (!headers.get("accept")?.includes("text/html")) return;
  const nonce = crypto.randomUUID();
  const policy = `default-src 'none'; script-src 'nonce-${nonce}'; ` +
    `style-src 'nonce-${nonce}'; connect-src 'self'; img-src data:; ` +
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
  const more = { "content-security-policy": policy };
  const text = page.replaceAll("{nonce}", nonce);
  return answerAs("text/html; charset=utf-8", text, more);
}

const answerAs = (type: string, body: BodyInit, headers = {}) =>
  new Response(body, { headers: { ...headers, "content-type": type } });

async function updateProxy({ proxy, name, check }: Call): Promise<unknown> {
  const { toxics } = proxy.route(name);
  const fields = { ...PROXY_FIELDS, name: stays(name), toxics: stays(toxics) };
  const { listen, ...rest } = check(changesOf(fields));
  const changes = { ...rest, ...(listen && hostAndPort(listen)) };
  fromToxiproxy.set(changes, []);
  return asProxy(await proxy.updateRoute(name, changes));
}

function updateToxic({ proxy, target, toxic, check }: Call): Toxic {
  const { name, type, stream } = proxy.toxic(target, toxic);
  const normalize = changesOf(TOXICS[type].attributes);
  const attributes = { ...TOXIC_FIELDS.attributes, normalize };
  const same = { name: stays(name), type: stays(type), stream: stays(stream) };
  const changes = check(changesOf({ ...CHANGES, attributes, ...same }));
  return proxy.updateToxic(target, toxic, changes);
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

function asProxy({ name, host: hostname, localPort: port, ...rest }: Route) {
  return { name, listen: addressOf({ hostname, port }), ...rest };
}

const changesOf = <T>(fields: Fields<T>) => (body: unknown, place: Place) =>
  checkFields(body, place, fields, true);

/**
 * The control API as a function, in Toxiproxy 2's protocol. It refuses requests
 * that a web page other than its own may have sent: with `loopback`, the
 * default, also those to a host name other than `localhost`.
 */
export function controlApi(
  proxy: ChaosProxy,
  options: ApiOptions & { loopback?: boolean } = {},
): (request: Request) => Promise<Response> {
  const { onEvent = () => {}, loopback = true, page = true } = options;
  return async (request) => {
    const start = performance.now();
    const id = crypto.randomUUID();
    const ignored: string[] = [];
    const found = await Promise.try(() => {
      refuseForeign(request, loopback, page);
      return (page && servePage(request)) || respond(request, proxy, ignored);
    }).catch(refusalFor);
    const { status } = found;
    const isBad = found instanceof Refusal;
    const error = isBad && { error: found.message };
    const answer = isBad ? Response.json({ ...error, status }, found) : found;
    answer.headers.set("x-toxiproxy-request-id", id);
    answer.headers.set("x-content-type-options", "nosniff");
    answer.headers.set("cache-control", "no-store");
    const more = ignored.length > 0 && { ignored: firstOf(ignored) };
    const listed = firstOf(ignored).join(", ").replaceAll("…", "...")
      .replace(/[^ -~]/g, "?").slice(0, 2000); // what every client takes
    if (more) answer.headers.set("x-chaos-proxy-ignored", listed);
    const { method, url } = request;
    const path = url.replace(/^\w+:\/\/[^/]*/, "");
    const about = { request: id, method, path, status, ...error, ...more };
    onEvent({ event: "api", ...about, durationMs: msSince(start) });
    return answer;
  };
}

async function respond(request: Request, proxy: ChaosProxy, ignored: string[]) {
  const { method, headers } = request;
  const { pathname, searchParams } = new URL(request.url);
  const path = pathname.replace(/(\/[^/]+)\/[^/]+/g, "$1/*")
    .replace("/connections/*/toxics", "/proxies/*/toxics"); // the same calls
  const answerTo = CALLS[`${method.replace("HEAD", "GET")} ${path}`];
  if (answerTo === undefined) {
    const allow = Object.keys(CALLS).filter((each) => each.endsWith(` ${path}`))
      .map((each) => each.split(" ", 1)).join(", ");
    // In Go's words, and as text: Toxiproxy's clients recognize it by that.
    const body = "404 page not found\n";
    if (allow === "") return new Response(body, { status: 404 });
    const problem = `${method} is not for ${pathname}, which takes `;
    throw new Refusal(405, problem + allow, { allow });
  }
  // What is not encoded, such as `100%`, stays as it is.
  const [, kind, name = "", , toxic = ""] = pathname.split("/").map(unescape);
  const target = kind === "connections" ? { connection: Number(name) } : name;
  const body = await readText(request.body ?? new Blob().stream(), false);
  const limit = "expected a body of at most 1 MiB, found more";
  if (Buffer.byteLength(body) > MAX_CONFIG_BYTES) throw new Refusal(413, limit);
  const check: Call["check"] = (check) =>
    validate("body", ({ problems }) => {
      const place = new Place("", problems, ignored);
      return check(readJson(body, "body"), place);
    });
  const call = { proxy, searchParams, headers, name, target, toxic, check };
  const answer = await answerTo(call);
  if (answer === undefined) return new Response(null, { status: 204 });
  return answer instanceof Response ? answer : Response.json(answer);
}

/** @throws {Refusal} If a web page may have sent a request, but for our own. */
function refuseForeign(request: Request, loopback: boolean, page: boolean) {
  const { method, headers } = request;
  const url = URL.parse(request.url);
  const noHost = "expected a Host that is a host name or an address";
  if (url === null) throw new Refusal(400, noHost);
  const isRead = /^(?:GET|HEAD)$/.test(method);
  if (isRead && url.pathname === "/") return; // it holds no data
  const origin = headers.get("origin");
  // A page's owner can make a name resolve to this machine, but not an address.
  const isSafe = /^(?:localhost\.?|\d+(?:\.\d+){3}|\[.*\])$/.test(url.hostname);
  const isOwn = origin === url.origin && isSafe;
  const isBrowser = headers.get("user-agent")?.startsWith("Mozilla/");
  // Browsers name the site over plain HTTP to loopback only.
  const isLocal = /^(?:localhost|127\.|\[::1\])/.test(url.hostname);
  const site = headers.get("sec-fetch-site") ?? (isLocal ? "" : "none");
  const isSame = /^(?:same-origin|none)$/.test(site);
  const isPage = page && isSafe && isSame && (isRead || isOwn);
  const foreign = `requests from the origin ${origin} are refused`;
  if (origin !== null && !isOwn) throw new Refusal(403, foreign);
  const browser = "browsers are refused, but for our own page";
  if (isBrowser && !isPage) throw new Refusal(403, browser);
  const host = describe(url.hostname);
  const expected = `expected localhost or an IP address as Host, found ${host}`;
  if (loopback && !isSafe) throw new Refusal(403, expected);
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

const STATUSES: Record<string, number> = { // by the error's name
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
  [/^.* on (\S+): the port is/, "listen tcp $1: bind: address"],
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
  { onEvent = () => {}, page }: ApiOptions = {},
): ApiServer {
  checkArgument("address", address, apiAddress);
  const tell = (event: ApiEvent) => {
    if (levelOf(event) !== "debug") proxy["context"].history.add(event);
    onEvent(event);
  };
  const stop = new AbortController();
  const { signal } = stop;
  const serve = (at: Address) =>
    serveHttp("control API", { ...at, signal }, (request) => answer(request));
  const server = serve(splitApi(address) as Address);
  const { addr } = server;
  const loopback = isLoopback(addr.hostname); // as it was resolved
  const answer = controlApi(proxy, { onEvent: tell, loopback, page });
  const more = !loopback && { warning: "whoever reaches it can control it" };
  tell({ event: "api_listening", address: addressOf(addr), ...more });
  const fail = (error: unknown) =>
    tell({ event: "api_failed", cause: causeOf(error) });
  // A server that finds no file descriptor ends for good; another one starts.
  const served = (async () => {
    for (let next = () => server; !signal.aborted; next = () => serve(addr)) {
      await Promise.try(() => next().finished).catch(fail);
      await sleep(ACCEPT_PAUSE_MS, signal);
    }
    Alarm.clearIfUnused();
  })();
  const close = () => {
    stop.abort();
    return served;
  };
  return { address: addressOf(addr), close, [Symbol.asyncDispose]: close };
}

function serveHttp(
  what: string,
  at: Address & Deno.ServeTcpOptions,
  handler: Deno.ServeHandler,
) {
  const hostname = canonicalHost(at.hostname);
  try {
    return Deno.serve({ ...at, hostname, onListen() {} }, handler);
  } catch (error) {
    throw new ListenError(what, addressOf(at), error);
  }
}

function metrics(stats: RouteStats[]): Response {
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
  const dials = stats.flatMap(({ route: { name: proxy }, dials }) => [
    ...[...dials.within, dials.count]
      .map((value, i) => sample({ proxy, le: bounds[i] }, value, "_bucket")),
    sample({ proxy }, dials.totalMs / 1000, "_sum"),
    sample({ proxy }, dials.count, "_count"),
  ]);
  const open = stats.map((of) => sample({ proxy: of.route.name }, of.open));
  const build = { version: deno.version, deno: Deno.version.deno };
  const families: Record<string, string[]> = {
    "counter toxiproxy_proxy_received_bytes_total Bytes read, by direction.":
      counts("received"),
    "counter toxiproxy_proxy_sent_bytes_total Bytes written, by direction.":
      counts("sent"),
    "counter chaos_proxy_connections_total Connections that have ended, by why.":
      counts("ended", "outcome"),
    "gauge chaos_proxy_connections_open Connections in flight.": open,
    "histogram chaos_proxy_dial_seconds Time to reach the upstream.": dials,
    "counter chaos_proxy_faults_total How often a fault was injected, by kind.":
      counts("faults", "kind"),
    "gauge chaos_proxy_scheduled_on Whether it is on, or on how many connections.":
      counts("on", "name"),
    "gauge chaos_proxy_build_info What is running.": [sample(build, 1)],
  };
  const lines = Object.entries(families).flatMap(([head, samples]) => {
    const [, type, name, help] = /^(\w+) (\w+) (.*)/.exec(head) ?? [];
    const all = samples.map((each) => `${name}${each}\n`);
    return [`# HELP ${name} ${help}\n# TYPE ${name} ${type}\n`, ...all];
  });
  return answerAs("text/plain; version=0.0.4; charset=utf-8", lines.join(""));
}

function sample(labels: object, value: number, suffix = "") {
  // Of what these labels can hold, Prometheus escapes the same as JSON.
  const listed = Object.entries(labels)
    .map(([name, text]) => `${name}=${JSON.stringify(text)}`);
  return `${suffix}{${listed}} ${value}`;
}

// ---- Logging: an event, a line ----------------------------------------------

/** As `key=value`, in quotes where it would not be seen as one word. */
const asPair = ([key, value]: [string, unknown]) =>
  /^[^\s"=]+$/.test(`${value}`)
    ? `${key}=${value}`
    : `${key}=${JSON.stringify(value).replace(/\\n */g, "; ")}`;

const MAX_QUEUED_LINES = 5000;
const MAX_STALL_MS = 2000;

const write = (to: typeof Deno.stdout | typeof Deno.stderr, text: string) =>
  new Blob([text]).stream().pipeTo(to.writable, { preventClose: true });

/** Writes a problem to standard error; gives up after 2 s, or if it fails. */
async function complain(problem: string): Promise<void> {
  const written = write(Deno.stderr, `chaos-proxy: ${problem}\n`);
  await Promise.race([written, sleep(MAX_STALL_MS)]).catch(() => {});
}

/**
 * Writes the events of a level and above to standard output, from a bounded
 * queue, so that nothing waits for a pipe that nobody reads, or fails on a full
 * disk. When the queue is full, lines are dropped until half of it is written.
 */
class EventLog extends BaseHandler implements AsyncDisposable {
  readonly add: (event: LogEvent) => void;
  /** Logs an event. Once a proxy runs, it also goes to the proxy's history. */
  tell = (event: LogEvent): void => this.add(event);
  readonly #lines: string[] = [];
  #dropped = 0;
  #writing: Promise<void> | undefined;
  #complaint: Promise<void> | undefined;

  constructor(level: LogLevel, isJson: boolean, width: number) {
    const formatter = ({ datetime, levelName, args }: LogRecord): string => {
      const event = args[0] as LogEvent;
      if (isJson) return toJson(datetime, event);
      const time = datetime.toISOString();
      const { event: name, route = "", connection, client = "", ...fields } =
        event as Partial<Connection["id"]> & LogEvent;
      width = Math.max(width, route.length); // to align the events
      const number = connection ? `#${connection}` : "";
      const source = [route.padEnd(width), number.padEnd(6), client.padEnd(21)];
      const text = event.event === "listening"
        ? `${event.address} -> ${event.upstream} (${event.faults})`
        : Object.entries(fields).map(asPair).join(" ");
      const isDraining = event.event === "draining";
      const hint = isDraining ? "; a second signal ends it at once" : "";
      const parts = [time, levelName.padEnd(5), ...source, name, text + hint];
      return parts.join(" ").trimEnd();
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
      const text = this.#lines.splice(0, 64).join("");
      if (this.#dropped > 0 && this.#lines.length <= MAX_QUEUED_LINES / 2) {
        const lines = this.#dropped;
        this.#dropped = 0;
        this.tell({ event: "log_dropped", lines });
      }
      for (let bytes = new TextEncoder().encode(text); bytes.length > 0;) {
        try {
          bytes = bytes.subarray(await Deno.stdout.write(bytes));
        } catch (error) {
          const problem = `cannot write the log: ${causeOf(error)}`;
          await (this.#complaint ??= complain(problem));
          await sleep(100); // and then tries again
        }
      }
    }
    this.#writing = undefined;
  }
}

// ---- CLI: arguments, load, run, signals, exit codes -------------------------

type Line = ReturnType<typeof readCommandLine>;
const DEMO = { hostname: LOOPBACK, port: 18000 };
const MODES = ["check", "print-config", "preview"] as const;
const FLAGS = [ // the metrics are toxiproxy-server's, and always on
  ...["check", "print-config", "demo", "no-page", "watch", "help", "schema"],
  ...["version", "proxy-metrics", "runtime-metrics"],
] as const;
const SETTINGS = [ // from config to seed, also toxiproxy-server's
  ...["api", "drain-timeout", "log-format", "log-level", "report"],
  ...["config", "host", "port", "seed", "preview"],
] as const;
const OPTIONS = [...FLAGS, ...SETTINGS].map((name) => `--${name}`);
const WRONG_FLAG = RegExp(`^--(?:${FLAGS.join("|")})=(?!(?:true|false)$)`);

function readCommandLine(written: string[]) {
  const refuse = (what: string, problem: string): never => {
    throw new ConfigError(what, [problem]);
  };
  const end = [...written, "--"].indexOf("--");
  const operands: string[] = [];
  const args = written.slice(0, end)
    .map((arg) => arg.replace(/^-(?=[a-z][a-z-])/, "--")); // one dash will do
  const at = args.indexOf("--report");
  if (args[at] && args[at + 1] === "-") args.splice(at, 2, "--report=-");
  const wrong = args.find((arg) => WRONG_FLAG.test(arg));
  if (wrong) refuse(wrong, "expected true or false, or no value");
  const flags = parseArgs(args, {
    boolean: FLAGS,
    string: SETTINGS,
    alias: { help: "h", version: "V" },
    unknown: (arg) => {
      const name = arg.replace(/=.*/s, "");
      const negative = "; no option takes a negative number";
      const hint = /^-\d/.test(name) ? negative : hintForKey(name, OPTIONS);
      if (/^-./.test(arg)) refuse(name, `unknown option${hint}`);
      operands.push(arg); // as it was written: `_` has `1e3` as a number
      return false;
    },
  });
  const read = <T>(name: typeof SETTINGS[number], guard: Guard<T>) => {
    const text = flags[name];
    if (text === undefined) return undefined;
    const value = guard.is(text) || !/^\d+$/.test(text) ? text : Number(text);
    return guard.is(value) ? value : refuse(`--${name}`, mismatch(guard, text));
  };
  const { config, demo, watch } = flags;
  const isInfo = flags.help || flags.schema || flags.version;
  operands.push(...written.slice(end + 1));
  const isQuick = operands.some((each) => /^[^=/\\]+=/.test(each));
  if (config !== undefined) operands.push(config); // always a file
  const [mode, other] = MODES.filter((name) => flags[name]);
  if (other) refuse(`--${other}`, `write this or --${mode}`);
  const host = read("host", listenHost);
  const port = read("port", integer(0, 65535));
  let api = read("api", apiAddress);
  const isTwice = api !== undefined && (host ?? port) !== undefined;
  if (isTwice) refuse("--api", "write either this, or --host and --port");
  const there = { hostname: host ?? "localhost", port: port ?? 8474 };
  if ((host ?? port ?? config) !== undefined) api ??= addressOf(there);
  const needsFile = !demo && (mode || api === undefined);
  const isMissing = operands[0] === "" || (operands.length < 1 && needsFile);
  const isWrong = operands.length > 1 || isMissing;
  const none = mode ? "none" : "none; to run without one, write --api 8474";
  const problem = `expected one file, found ${operands.join(" and ") || none}`;
  if (isWrong && !isQuick && !isInfo) refuse("<config>", problem);
  const configFile = isQuick ? "-" : operands[0] || "-";
  const toWatch = "write the name of a config file, and no routes";
  if (watch && configFile === "-" && !isInfo) refuse("--watch", toWatch);
  const seed = read("seed", CONFIG_FIELDS.seed.guard);
  const drainTimeoutMs = read("drain-timeout", milliseconds);
  const logLevel = oneOf<LogLevel>("debug", "info", "warn", "error");
  const fileName = matching("the name of a file; - is standard output", /./s);
  return {
    ...{ ...flags, mode, operands, isQuick, configFile },
    isDriven: operands.length === 0 && !demo, // by the API alone
    given: { seed, drainTimeoutMs, api }, // takes precedence over the config
    total: read("preview", integer(1, 100_000)) ?? 0,
    report: read("report", fileName),
    logLevel: read("log-level", logLevel) ?? "info",
    isJson: read("log-format", oneOf("text", "json")) === "json",
  };
}

/** `[host:]port=upstream`, or `key=value` with a comma before it in a toxic. */
const SETTING = /^(?:(?:\[?([^=]*?)\]?:)?(0|[1-9]\d*)|(,?)([^=]+))=(.+)$/s;

/** Reads routes, such as `1=a:2 latencyMs=5 toxic=bandwidth,rate=64 3=b:4`. */
function readRoutes(operands: readonly string[], source: string) {
  const routes: Record<string, unknown>[] = [];
  const split = (each: string) =>
    each.startsWith("toxic=") ? each.split(/(?=,)/) : [each];
  for (const setting of operands.flatMap(split)) {
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
      const isText = /^(?:name|match|hex)$/.test(last) && !/^["{]/.test(text);
      at[last] = isText || errorInJson(text) ? text : readJson(text, source);
    }
  }
  return { routes };
}

async function readFile(name: string, path = name): Promise<string> {
  try {
    const file = name === "-" ? Deno.stdin : await Deno.open(name);
    return await readText(file.readable, true);
  } catch (error) {
    const other = "expected text in UTF-8, found other bytes";
    const problem = error instanceof TypeError ? other : causeOf(error);
    throw new ConfigError(path, [problem]);
  }
}

/** What the seed decides for the first connections, 1,000 at a time. */
function* preview({ routes, seed = randomSeed() }: Config, line: Line) {
  for (const route of routes) {
    let text = line.isJson
      ? `{"seed":${seed},"route":${JSON.stringify(route.name)},"connections":[`
      : `${route.name}: seed ${seed}\nNUMBER  DECISION  DELAYMS     TOXICS\n`;
    for (let number = 1; number <= line.total; number++) {
      const { kind: decision, ...more } = decide(seed, route, number);
      const { delayMs, toxics: acting } = { delayMs: 0, toxics: [], ...more };
      const toxics = acting.map(({ name }) => name);
      const record = { number, decision, delayMs, toxics };
      const isLast = number === line.total;
      text += line.isJson
        ? JSON.stringify(record) + (isLast ? "]}\n" : ",")
        : inColumns(Object.values(record), [6, 8, 10]) + "\n";
      if (number % 1000 > 0 && !isLast) continue;
      yield text;
      text = "";
    }
  }
}

const inColumns = (cells: readonly unknown[], widths: readonly number[]) =>
  cells.map((cell, i) => `${cell}`.padEnd(widths[i] ?? 0)).join("  ").trimEnd();

function summarize(config: Config, path: string): string {
  const { routes, seed = "a random seed", drainTimeoutMs: ms, api } = config;
  const rows = routes.map((
    each,
  ) => [each.name, asProxy(each).listen, each.upstream, describeFaults(each)]);
  if (rows[0]) rows.unshift(["ROUTE", "LISTEN", "UPSTREAM", "FAULTS"]);
  const widths = [0, 1, 2]
    .map((i) => Math.max(...rows.map((row) => row[i]?.length ?? 0)));
  const warnings = firstOf(routes.flatMap(warningsOf));
  return `${path}: ${count(routes.length, "route")}, ` +
    (isText(seed) ? seed : `seed ${seed}`) +
    `, drain ${ms > 0 ? `within ${ms} ms` : "without a limit"}` +
    (api === undefined ? "\n" : `, api ${api}\n`) +
    rows.map((row) => `${inColumns(row, widths)}\n`).join("") +
    warnings.map((each) => `warning: ${each}\n`).join("");
}

async function print(texts: Iterable<string>): Promise<number> {
  try {
    for (const text of texts) await write(Deno.stdout, text);
    return 0;
  } catch (error) {
    if (hasCode(error, "EPIPE")) return 0; // the reader has seen enough
    await complain(`cannot write the output: ${causeOf(error)}`);
    return 1;
  }
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

async function run(config: Config, line: Line, state: string) {
  const stop = signal();
  const { api, routes } = config;
  const width = Math.max(0, ...routes.map(({ name }) => name.length));
  await using log = new EventLog(line.logLevel, line.isJson, width);
  let onHangUp = () => log.tell({ event: "sighup_ignored" });
  if (!IS_WINDOWS) Deno.addSignalListener("SIGHUP", () => onHangUp());
  const { configFile: path, report: file } = line; // "-": none to reload
  if (file && file !== "-") await writeReport(file);
  if (line.demo && routes.some((each) => each.upstream === addressOf(DEMO))) {
    const hello = "Hello from behind the proxy!\n";
    serveHttp("demo upstream", DEMO, ({ body }) => new Response(body ?? hello));
  }
  const resettable = api !== undefined || line.watch; // for a later `reset_peer`
  const options = { onEvent: log.add, resettable, page: !line["no-page"] };
  await using proxy = await ChaosProxy.start(config, options);
  log.tell = proxy["context"].emit as typeof log.tell; // and adds it to its history
  await using server = api ? serveApi(proxy, api, options) : null;
  const end = async () => {
    if (!file) return;
    const report = proxy.report();
    if (file !== "-") await writeReport(file, report);
    await log[Symbol.asyncDispose](); // a full queue would drop the report
    const { routes, warnings } = report;
    const connections = sum(routes.map((each) => each.connections));
    const faults = sum(routes.flatMap((each) => Object.values(each.faults)));
    const summary = `${count(connections, "connection")}, ` +
      `${count(faults, "fault")} injected`;
    log.tell({ event: "report", summary, warnings, file });
    if (file === "-") log.log(JSON.stringify(report));
    await log[Symbol.asyncDispose]();
  };
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
      log.tell({ event: "reload_failed", cause: causeOf(error) });
    }
  };
  if (path !== "-") onHangUp = () => void look(true);
  const timer = line.watch ? setInterval(look, 500, false) : 0;
  await stop;
  clearInterval(timer);
  // A terminal and the task runner may both pass on the same Ctrl-C.
  sleep(500).then(signal).then(async () => {
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

const IS_WINDOWS = Deno.build.os === "windows";
const SIGNALS = ["SIGINT", IS_WINDOWS ? "SIGBREAK" : "SIGTERM"] as const;
const signal = () =>
  new Promise<void>((resolve) => {
    for (const each of SIGNALS) Deno.addSignalListener(each, resolve);
  });

async function main(args: string[]): Promise<number> {
  try {
    const line = readCommandLine(args);
    const schema = line.schema && JSON.stringify(CONFIG_SCHEMA, null, 2);
    const name = `chaos-proxy ${deno.version}`;
    if (line.help) return await print([help.replace("{name}", name)]);
    if (schema || line.version) return await print([schema || name, "\n"]);
    const { operands: [file], isQuick, given, mode } = line;
    const fileName = file?.replace(/^-$/, "standard input");
    const path = isQuick ? "command line" : fileName ?? "config.example.yaml";
    const builtIn = line.isDriven ? "drainTimeoutMs: 1000" : example;
    const state = line.watch ? await stateOf(path) : "";
    const config = isQuick
      ? checkConfig(readRoutes(line.operands, path), path, given)
      : parseConfig(file ? await readFile(file, path) : builtIn, path, given);
    if (mode === "check") return await print([summarize(config, path)]);
    if (mode === "preview") return await print(preview(config, line));
    if (mode === undefined) return await run(config, line, state);
    return await print([toYaml(checkConfig(structuredClone(config), path))]);
  } catch (error) {
    const isConfig = error instanceof ConfigError;
    if (!isConfig && !(error instanceof ListenError)) throw error;
    await complain(error.message);
    return isConfig ? 2 : 1;
  }
}

if (import.meta.main) Deno.exit(await main(Deno.args));
