/**
 * Stands for `@std/assert` 1.0.19 where only the npm registry can be reached,
 * over `node:assert/strict`. What differs: the words of the messages; and deep
 * equality here tells `-0` from `0` and an object without a prototype from one
 * with it, and of errors it compares name, message and cause, not the stack.
 *
 * @module
 */

import { deepStrictEqual } from "node:assert/strict";
import { inspect } from "node:util";

/** What every failed assertion throws. */
export class AssertionError extends Error {
  constructor(message: string, options?: ErrorOptions) {
    super(message, options);
    this.name = "AssertionError";
  }
}

export function assert(expr: unknown, msg = ""): asserts expr {
  if (!expr) throw new AssertionError(msg);
}

/** Deeply equal. */
export function assertEquals<T>(actual: T, expected: T, msg?: string): void {
  check(() => deepStrictEqual(actual, expected), msg);
}

export function assertGreater<T>(actual: T, expected: T, msg?: string): void {
  if (!(actual > expected)) failToCompare(actual, ">", expected, msg);
}

export function assertGreaterOrEqual<T>(
  actual: T,
  expected: T,
  msg?: string,
): void {
  if (!(actual >= expected)) failToCompare(actual, ">=", expected, msg);
}

export function assertLess<T>(actual: T, expected: T, msg?: string): void {
  if (!(actual < expected)) failToCompare(actual, "<", expected, msg);
}

export function assertLessOrEqual<T>(
  actual: T,
  expected: T,
  msg?: string,
): void {
  if (!(actual <= expected)) failToCompare(actual, "<=", expected, msg);
}

export function assertMatch(
  actual: string,
  expected: RegExp,
  msg?: string,
): void {
  if (!expected.test(actual)) failToCompare(actual, "matching", expected, msg);
}

export function assertStringIncludes(
  actual: string,
  expected: string,
  msg?: string,
): void {
  if (!actual.includes(expected)) {
    failToCompare(actual, "including", expected, msg);
  }
}

// deno-lint-ignore no-explicit-any
type Class<T = any> = abstract new (...args: any[]) => T;

export function assertInstanceOf<T extends Class>(
  actual: unknown,
  expectedType: T,
  msg?: string,
): asserts actual is InstanceType<T> {
  if (actual instanceof expectedType) return;
  throw new AssertionError(
    `Expected an instance of ${expectedType.name}, not ${show(actual, msg)}`,
  );
}

/** The function throws; what it threw is returned. */
export function assertThrows(fn: () => unknown, msg?: string): unknown;
export function assertThrows<E extends Error = Error>(
  fn: () => unknown,
  ErrorClass: Class<E>,
  msgIncludes?: string,
  msg?: string,
): E;
export function assertThrows(
  fn: () => unknown,
  expected?: Class<Error> | string,
  msgIncludes?: string,
  msg = typeof expected === "string" ? expected : undefined,
): unknown {
  try {
    fn();
  } catch (error) {
    return checkError(error, expected, msgIncludes, msg);
  }
  throw new AssertionError(`Expected the function to throw${suffix(msg)}`);
}

/** The promise is rejected, not the call; what it was rejected with is returned. */
export function assertRejects(
  fn: () => PromiseLike<unknown>,
  msg?: string,
): Promise<unknown>;
export function assertRejects<E extends Error = Error>(
  fn: () => PromiseLike<unknown>,
  ErrorClass: Class<E>,
  msgIncludes?: string,
  msg?: string,
): Promise<E>;
export async function assertRejects(
  fn: () => PromiseLike<unknown>,
  expected?: Class<Error> | string,
  msgIncludes?: string,
  msg = typeof expected === "string" ? expected : undefined,
): Promise<unknown> {
  let promise: PromiseLike<unknown> | undefined;
  try {
    promise = fn();
  } catch (cause) {
    throw new AssertionError(
      `Expected a rejected promise, not a throw${suffix(msg)}`,
      { cause },
    );
  }
  if (typeof promise?.then !== "function") {
    throw new AssertionError(
      `Expected a rejected promise, not ${show(promise, msg)}`,
    );
  }
  try {
    await promise;
  } catch (error) {
    return checkError(error, expected, msgIncludes, msg);
  }
  throw new AssertionError(`Expected the promise to reject${suffix(msg)}`);
}

function checkError(
  error: unknown,
  expected: Class<Error> | string | undefined,
  msgIncludes = "",
  msg: string | undefined,
): unknown {
  if (typeof expected === "function") {
    assertInstanceOf(error, expected, msg);
    assertStringIncludes(error.message, msgIncludes, msg);
  }
  return error;
}

/** Runs an assertion of Node's, which would throw an error of its own. */
function check(assertion: () => void, msg?: string): void {
  try {
    assertion();
  } catch (error) {
    throw new AssertionError(
      (msg ? `${msg}\n` : "") + (error as Error).message,
    );
  }
}

function failToCompare(
  actual: unknown,
  relation: string,
  expected: unknown,
  msg?: string,
): never {
  throw new AssertionError(
    `Expected ${inspect(actual)} ${relation} ${show(expected, msg)}`,
  );
}

function show(value: unknown, msg?: string): string {
  return inspect(value) + suffix(msg);
}

function suffix(msg?: string): string {
  return msg ? `: ${msg}` : "";
}
