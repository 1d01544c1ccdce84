// deno-lint-ignore-file no-import-prefix -- in deno.json each task would load it
/** A real browser, for the tests of the control API's page and its pictures. */

import { type Browser, chromium } from "npm:playwright-core@1.56.1";

export type { Browser, Locator, Page } from "npm:playwright-core@1.56.1";

const NAMES = ["chromium", "chromium-browser", "google-chrome"];
const FOLDERS = (Deno.env.get("PATH") ?? "").split(":");

/** The path of an installed Chromium; undefined if there is none. */
export const CHROMIUM = NAMES
  .flatMap((name) => FOLDERS.map((folder) => `${folder}/${name}`))
  .find(isFile);

/** Opens it; `rebound` is a host name that leads to this machine. */
export function openBrowser(rebound = "rebound.test"): Promise<Browser> {
  const args = [
    "--no-sandbox",
    "--disable-dev-shm-usage", // in containers it is small
    `--host-resolver-rules=MAP ${rebound} 127.0.0.1`,
  ];
  return chromium.launch({ executablePath: CHROMIUM, args, timeout: 120_000 });
}

function isFile(path: string): boolean {
  try {
    return Deno.statSync(path).isFile;
  } catch {
    return false;
  }
}
