/**
 * Stands for `@std/yaml` 1.2.0 where only the npm registry can be reached.
 * That release is a port of js-yaml 3.13, so this is js-yaml 3 under its names
 * and with its kind of error. What still differs: the words of an error, not
 * its place; an alias of `0`, `false`, `""` or `null` works only here;
 * `1:30.5` is a number in base 60 here, a string there; and of the text that is
 * written, `=a` is in quotes only here, and `a#b` only there.
 *
 * @module
 */

import yaml from "js-yaml";

/** What may be asked of {@linkcode parse}. */
export interface ParseOptions {
  /** The last of several equal keys wins, instead of being an error. */
  allowDuplicateKeys?: boolean;
  /** Which types there are; with `failsafe`, all scalars are text. */
  schema?: "failsafe" | "default";
}

/**
 * Reads one YAML document; nothing at all reads as `null`.
 *
 * @throws {SyntaxError} If the text is not YAML, repeats a key or holds more
 * than one document.
 */
export function parse(content: string, options: ParseOptions = {}): unknown {
  try {
    const schema = options.schema === "failsafe"
      ? yaml.FAILSAFE_SCHEMA
      : yaml.DEFAULT_SAFE_SCHEMA;
    const json = options.allowDuplicateKeys;
    return yaml.safeLoad(content, { json, schema }) ?? null;
  } catch (error) {
    if (!(error instanceof yaml.YAMLException)) throw error;
    throw new SyntaxError((error as Error).message);
  }
}

/**
 * Writes a value as one YAML document: mappings, lists, text, numbers, booleans
 * and null.
 *
 * @throws {TypeError} If it holds anything else, such as `undefined`.
 */
export function stringify(data: unknown): string {
  try {
    return yaml.safeDump(data);
  } catch (error) {
    if (!(error instanceof yaml.YAMLException)) throw error;
    throw new TypeError((error as Error).message);
  }
}
