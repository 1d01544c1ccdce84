/** What the README and docs/ show is what there is. */

import { assert, assertEquals } from "@std/assert";
import { parse as parseYaml } from "@std/yaml";
import { ChaosProxy, controlApi, decide, parseConfig } from "../main.ts";
import { ROOT, RUN_FLAGS, TempFile, text } from "./helpers.ts";

const PAGES = [
  "README.md",
  "CONTRIBUTING.md",
  ...Array.from(
    Deno.readDirSync(new URL("docs", ROOT)),
    ({ name }) => `docs/${name}`,
  ),
];
const TEXTS = new Map(
  PAGES.map((page) => [page, Deno.readTextFileSync(new URL(page, ROOT))]),
);
const README = TEXTS.get("README.md")!;

function blocks(language: string, page = README): string[] {
  const found = page.matchAll(/^```(\w+)\n(.*?)^```$/gms);
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

/** The anchors of a page's headings, as GitHub makes them. */
function anchors(page: string): string[] {
  const headings = page.matchAll(/^#+ (.*)$/gm);
  return [...headings].map(([, heading]) =>
    heading.toLowerCase().replace(/[^\w -]/g, "").replaceAll(" ", "-")
  );
}

Deno.test("every link leads somewhere", async () => {
  for (const [page, content] of TEXTS) {
    for (const [, link] of content.matchAll(/\]\(([^)]+)\)/g)) {
      if (/^https?:/.test(link)) continue;
      const [path, anchor] = link.split("#");
      const url = new URL(path, new URL(page, ROOT));
      const target = path === "" ? content : await Deno.readTextFile(url);
      if (anchor !== undefined) {
        assert(anchors(target).includes(anchor), `${page}: ${link}`);
      }
    }
  }
});

Deno.test("every config shown is one", () => {
  let configs = 0;
  for (const [page, content] of TEXTS) {
    for (const block of blocks("yaml", content)) {
      const value = parseYaml(block) as Record<string, unknown>;
      const route = "routes:\n  - localPort: 1\n    upstream: a:1\n";
      const { data } = value as { data?: Record<string, string> };
      const config = value.toxics
        ? route + block.replace(/^/gm, "    ")
        : value.routes
        ? block
        : data?.["chaos.yaml"];
      if (config === undefined) continue;
      assert(parseConfig(config, page).routes.length > 0);
      configs++;
    }
  }
  assertEquals(configs, 5);
});

Deno.test("the README's first config does what it shows", () => {
  const { seed, routes: [route] } = parseConfig(blocks("yaml")[0]);
  assertEquals(
    [1, 2, 3, 4, 5].map((number) => decide(seed!, route, number).kind),
    ["forward", "drop", "forward", "timeout", "forward"],
  );
});

Deno.test("the README's calls of the API succeed", async () => {
  await using proxy = await ChaosProxy.start({}, { resettable: true });
  const call = controlApi(proxy);
  const [calls] = blocks("console").filter((each) => each.includes("8474"));
  const lines = calls.trim().split("\n");
  for (const line of lines) {
    const [, method, path, body] =
      /curl (?:-X (\w+) )?localhost:8474(\S+)(?: -d '(.*)')?/.exec(line)!;
    const answer = await call(
      new Request(`http://localhost:8474${path}`, {
        method: method ?? "POST",
        body: body?.replace("localhost:28000", "localhost:0"),
      }),
    );
    const found = await answer.text();
    assert(answer.ok, `${line}: ${found}`);
  }
  assertEquals(lines.length, 3);
});

Deno.test("the experiment's calls of the API succeed", async () => {
  await using proxy = await ChaosProxy.start({
    routes: [{ name: "redis", localPort: 0, upstream: "localhost:6379" }],
  });
  const call = controlApi(proxy);
  const [{ method, rollbacks }] = blocks(
    "yaml",
    TEXTS.get("docs/containers.md")!,
  )
    .map((block) => parseYaml(block) as Record<string, never>)
    .filter((each) => each.rollbacks);
  const [slow, restore] = [...method, ...rollbacks].map((
    { provider }: { provider: Record<string, Record<string, never>> },
  ) => provider.arguments);
  // The requests that the extension makes of these arguments.
  const toxics = `http://localhost:8474/proxies/${slow.for_proxy}/toxics`;
  const added = await call(
    new Request(toxics, {
      method: "POST",
      body: JSON.stringify({
        name: slow.toxic_name,
        type: "latency",
        stream: "downstream",
        toxicity: 1.0,
        attributes: { latency: slow.latency, jitter: 0 },
      }),
    }),
  );
  assertEquals(added.status, 200, await added.text());
  assertEquals(proxy.route("redis").toxics[0].attributes.latency, 1000);
  const url = `${toxics}/${restore.toxic_name}`;
  const removed = await call(new Request(url, { method: "DELETE" }));
  assertEquals(removed.status, 204, await removed.text());
});
