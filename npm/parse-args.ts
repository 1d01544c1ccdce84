/**
 * Stands for `@std/cli/parse-args` of `@std/cli` 1.0.32 where only the npm
 * registry can be reached, over minimist, on which that release is modelled.
 * What still differs: `--x=` is an empty value here, an unknown option there,
 * and `-` may be a value here. Only the options named below are there.
 *
 * @module
 */

import minimist from "minimist";

/** How the arguments are to be read. */
export interface ParseOptions<B extends string, S extends string> {
  /** Options without a value; `false` unless given. */
  boolean?: readonly B[];
  /** Options with a value, which is never taken for a number. */
  string?: readonly S[];
  /** Another name for an option, by the option's. */
  alias?: Record<string, string>;
  /**
   * Called for each undeclared option and each operand before `--`; `false`
   * keeps it out of the result.
   */
  unknown?: (arg: string) => unknown;
}

/** The options by name, and the operands under `_`. */
export type Args<B extends string, S extends string> =
  & { [name in B]: boolean }
  & { [name in S]?: string }
  & { _: (string | number)[] };

/** Reads command line arguments; after `--` all are operands. */
export function parseArgs<B extends string = never, S extends string = never>(
  args: string[],
  { boolean, string, alias, unknown }: ParseOptions<B, S>,
): Args<B, S> {
  const end = args.indexOf("--");
  // Without asking `unknown`, minimist takes `--no-x` for `x` being false, also
  // where `no-x` is declared, and what every object has, such as
  // `--constructor`, for declared.
  const kept = args.flatMap((arg, index) => {
    if (end >= 0 && index > end) return arg;
    const [, no = "", name = ""] = /^--?(no-)?([^=]*)/.exec(arg) ?? [];
    if (boolean?.some((each) => no && arg === `--${each}`)) {
      return `${arg}=true`;
    }
    const asks = no || Object.hasOwn(Object.prototype, name);
    return !asks || unknown?.(arg) !== false ? arg : [];
  });
  const parsed = minimist(kept, {
    boolean: boolean?.slice(),
    string: string?.slice(),
    alias,
    unknown: unknown && ((arg: string) => unknown(arg) !== false),
  });
  // Of an option given twice, minimist keeps both values.
  for (const name of string ?? []) {
    if (Array.isArray(parsed[name])) parsed[name] = parsed[name].at(-1);
  }
  return parsed;
}
