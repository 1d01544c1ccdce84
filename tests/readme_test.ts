/** What the README shows is what there is. */

import { assert, assertEquals } from "@std/assert";
import { parseConfig } from "../main.ts";
import { ROOT, RUN_FLAGS, TempFile, text } from "./helpers.ts";

const README = await Deno.readTextFile(new URL("README.md", ROOT));

function blocks(language: string): string[] {
  const found = README.matchAll(/^```(\w+)\n(.*?)^```$/gms);
  return [...found].filter(([, each]) => each === language)
    .map(([, , block]) => block);
}

Deno.test("the README's test runs as it stands, and passes", async () => {
  const [example, ...others] = blocks("ts");
  assertEquals(others, []);
  const main = new URL("main.ts", ROOT).href;
  await using file = await TempFile.with(
    example.replace('"./main.ts"', JSON.stringify(main)),
    "_test.ts",
  );
  const { code, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
    args: [
      ...["test", "--config", "deno.json", ...RUN_FLAGS],
      ...["--no-prompt", "--allow-net", file.path],
    ],
    cwd: ROOT,
    env: { NO_COLOR: "1" },
  }).output();
  assertEquals(code, 0, text(stdout) + text(stderr));
  assert(text(stdout).includes("1 passed | 0 failed"));
});

Deno.test("the README's toxics are a config's", () => {
  const [toxics, ...others] = blocks("yaml");
  assertEquals(others, []);
  const route = "routes:\n  - localPort: 1\n    upstream: a:1\n";
  const { routes } = parseConfig(route + toxics.replace(/^/gm, "    "));
  assertEquals(routes[0].toxics.length, 2);
});
