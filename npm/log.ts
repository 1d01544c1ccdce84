/**
 * Stands for `@std/log` 0.224.14 where only the npm registry can be reached:
 * a logger, the handler to derive from, and the record between them. It rests
 * on no package. Ready-made handlers, formatters and the global loggers are
 * left out.
 *
 * @module
 */

const LEVELS = {
  NOTSET: 0,
  DEBUG: 10,
  INFO: 20,
  WARN: 30,
  ERROR: 40,
  CRITICAL: 50,
} as const;

/** The name of a level, from everything to the worst only. */
export type LevelName = keyof typeof LEVELS;
type LogLevel = typeof LEVELS[LevelName];

function numberOf(name: LevelName): LogLevel {
  if (Object.hasOwn(LEVELS, name)) return LEVELS[name];
  throw new Error(`no log level is named ${name}`);
}

function nameOf(level: LogLevel): LevelName {
  for (const [name, number] of Object.entries(LEVELS)) {
    if (number === level) return name as LevelName;
  }
  throw new Error(`no log level has the number ${level}`);
}

/** One thing that was logged. */
export class LogRecord {
  readonly msg: string;
  readonly level: number;
  readonly levelName: string;
  readonly loggerName: string;
  #args: unknown[];
  #datetime = new Date();

  constructor({ msg, args, level, loggerName }: {
    msg: string;
    args: unknown[];
    level: LogLevel;
    loggerName: string;
  }) {
    this.msg = msg;
    this.#args = [...args];
    this.level = level;
    this.levelName = nameOf(level);
    this.loggerName = loggerName;
  }

  /** What was passed after the message. */
  get args(): unknown[] {
    return [...this.#args];
  }

  /** When it was logged. */
  get datetime(): Date {
    return new Date(this.#datetime);
  }
}

/** Turns a record into a line. */
export type FormatterFunction = (logRecord: LogRecord) => string;

/** Writes the records of its level and above; `log` says where to. */
export abstract class BaseHandler {
  #level: LogLevel;
  formatter: FormatterFunction;

  constructor(
    levelName: LevelName,
    { formatter = ({ levelName, msg }) => `${levelName} ${msg}` }: {
      formatter?: FormatterFunction;
    } = {},
  ) {
    this.#level = numberOf(levelName);
    this.formatter = formatter;
  }

  get level(): LogLevel {
    return this.#level;
  }

  set level(level: LogLevel) {
    this.#level = numberOf(nameOf(level));
  }

  get levelName(): LevelName {
    return nameOf(this.#level);
  }

  set levelName(levelName: LevelName) {
    this.#level = numberOf(levelName);
  }

  handle(logRecord: LogRecord): void {
    if (logRecord.level >= this.#level) this.log(this.format(logRecord));
  }

  format(logRecord: LogRecord): string {
    return this.formatter(logRecord);
  }

  abstract log(msg: string): void;

  setup(): void {}

  destroy(): void {}

  [Symbol.dispose](): void {
    this.destroy();
  }
}

// deno-lint-ignore no-explicit-any
type AnyFunction = (...args: any[]) => any;

/** Hands what is logged at its level and above to its handlers. */
export class Logger {
  #level: LogLevel;
  readonly #loggerName: string;
  handlers: BaseHandler[];

  constructor(
    loggerName: string,
    levelName: LevelName,
    { handlers = [] }: { handlers?: BaseHandler[] } = {},
  ) {
    this.#loggerName = loggerName;
    this.#level = numberOf(levelName);
    this.handlers = handlers;
  }

  get level(): LogLevel {
    return this.#level;
  }

  set level(level: LogLevel) {
    this.#level = numberOf(nameOf(level));
  }

  get levelName(): LevelName {
    return nameOf(this.#level);
  }

  set levelName(levelName: LevelName) {
    this.#level = numberOf(levelName);
  }

  get loggerName(): string {
    return this.#loggerName;
  }

  debug<T>(msg: () => T, ...args: unknown[]): T | undefined;
  debug<T>(msg: T extends AnyFunction ? never : T, ...args: unknown[]): T;
  debug(msg: unknown, ...args: unknown[]): unknown {
    return this.#log(LEVELS.DEBUG, msg, args);
  }

  info<T>(msg: () => T, ...args: unknown[]): T | undefined;
  info<T>(msg: T extends AnyFunction ? never : T, ...args: unknown[]): T;
  info(msg: unknown, ...args: unknown[]): unknown {
    return this.#log(LEVELS.INFO, msg, args);
  }

  warn<T>(msg: () => T, ...args: unknown[]): T | undefined;
  warn<T>(msg: T extends AnyFunction ? never : T, ...args: unknown[]): T;
  warn(msg: unknown, ...args: unknown[]): unknown {
    return this.#log(LEVELS.WARN, msg, args);
  }

  error<T>(msg: () => T, ...args: unknown[]): T | undefined;
  error<T>(msg: T extends AnyFunction ? never : T, ...args: unknown[]): T;
  error(msg: unknown, ...args: unknown[]): unknown {
    return this.#log(LEVELS.ERROR, msg, args);
  }

  /** Logs a message, or what a function makes only if it is to be logged. */
  #log(level: LogLevel, msg: unknown, args: unknown[]): unknown {
    const lazy = typeof msg === "function";
    if (level < this.#level) return lazy ? undefined : msg;
    const value = lazy ? msg() : msg;
    const record = new LogRecord({
      msg: asString(value),
      args,
      level,
      loggerName: this.#loggerName,
    });
    for (const handler of this.handlers) handler.handle(record);
    return value;
  }
}

function asString(value: unknown): string {
  if (value instanceof Error) return value.stack!;
  if (typeof value === "function") return "undefined";
  if (typeof value !== "object" || value === null) return String(value);
  const fields = Object.entries(value).map(([name, field]) =>
    `"${name}":${typeof field === "string" ? `"${field}"` : asString(field)}`
  );
  return `{${fields.join()}}`;
}
