/**
 * Stands for `@std/log` 0.224.14 where only the npm registry can be reached: a
 * logger, the handler to derive from, and the record between them, as far as
 * they are used here. It rests on no package.
 *
 * @module
 */

const LEVELS = { DEBUG: 10, INFO: 20, WARN: 30, ERROR: 40 } as const;

/** The name of a level, from everything to the worst only. */
export type LevelName = keyof typeof LEVELS;

/** One thing that was logged. */
export interface LogRecord {
  readonly msg: string;
  /** What was passed after the message. */
  readonly args: unknown[];
  readonly levelName: string;
  /** When it was logged. */
  readonly datetime: Date;
}

/** Writes the records of its level and above; `log` says where to. */
export abstract class BaseHandler {
  readonly #level: number;
  readonly #formatter: (record: LogRecord) => string;

  constructor(
    levelName: LevelName,
    { formatter }: { formatter: (record: LogRecord) => string },
  ) {
    this.#level = LEVELS[levelName];
    this.#formatter = formatter;
  }

  handle(record: LogRecord): void {
    if (LEVELS[record.levelName as LevelName] < this.#level) return;
    this.log(this.#formatter(record));
  }

  abstract log(msg: string): void;
}

/** Hands what is logged at its level and above to its handlers. */
export class Logger {
  readonly #level: number;
  readonly #handlers: BaseHandler[];

  constructor(
    _loggerName: string,
    levelName: LevelName,
    { handlers = [] }: { handlers?: BaseHandler[] } = {},
  ) {
    this.#level = LEVELS[levelName];
    this.#handlers = handlers;
  }

  debug(msg: string, ...args: unknown[]): string {
    return this.#log("DEBUG", msg, args);
  }

  info(msg: string, ...args: unknown[]): string {
    return this.#log("INFO", msg, args);
  }

  warn(msg: string, ...args: unknown[]): string {
    return this.#log("WARN", msg, args);
  }

  error(msg: string, ...args: unknown[]): string {
    return this.#log("ERROR", msg, args);
  }

  #log(levelName: LevelName, msg: string, args: unknown[]): string {
    if (LEVELS[levelName] < this.#level) return msg;
    const record = { msg, args, levelName, datetime: new Date() };
    for (const handler of this.#handlers) handler.handle(record);
    return msg;
  }
}
