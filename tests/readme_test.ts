/** What the README and docs/ show is what there is. */

import { assert, assertEquals } from "@std/assert";
import { parse as parseYaml } from "@std/yaml";
import { decide, parseConfig } from "../main.ts";
import { picture } from "../bench/delays.ts";
import {
  Api,
  defined,
  only,
  ROOT,
  RUN_FLAGS,
  TempFile,
  text,
  WatchedProxy,
} from "./helpers.ts";

const DOCS = Array.from(
  Deno.readDirSync(new URL("docs", ROOT)),
  ({ name }) => `docs/${name}`,
).filter((name) => name.endsWith(".md"));
const TEXTS = new Map(
  ["README.md", "CONTRIBUTING.md", ...DOCS]
    .map((page) => [page, Deno.readTextFileSync(new URL(page, ROOT))]),
);
const README = defined(TEXTS.get("README.md"));

/** What the first group of an expression captures, each time. */
function allCaptured(expression: RegExp, text: string): string[] {
  return Array.from(text.matchAll(expression), ([, group]) => defined(group));
}

function blocks(language: string, page = README): string[] {
  return allCaptured(RegExp(`^\`{3}${language}\n(.*?)^\`{3}$`, "gms"), page);
}

Deno.test("the README's test runs as it stands, and passes", async () => {
  const example = only(blocks("ts"));
  const test = example.replace('"./main.ts"', `"${new URL("main.ts", ROOT)}"`);
  await using file = await TempFile.with(test, "_test.ts");
  const { code, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
    args: ["test", ...RUN_FLAGS, "--allow-net", file.path],
    env: { NO_COLOR: "1" },
  }).output();
  assertEquals(code, 0, text(stdout) + text(stderr));
  assert(text(stdout).includes("1 passed | 0 failed"));
});

/** The anchors of a page's headings, as GitHub makes them. */
function anchors(page: string): string[] {
  return allCaptured(/^#+ (.*)$/gm, page).map((heading) =>
    heading.toLowerCase().replace(/[^\w -]/g, "").replaceAll(" ", "-")
  );
}

Deno.test("every link leads somewhere", async () => {
  for (const [page, content] of TEXTS) {
    for (const link of allCaptured(/\]\(([^)]+)\)/g, content)) {
      if (/^https?:/.test(link)) continue;
      const url = new URL(link, new URL(page, ROOT));
      const found = anchors(await Deno.readTextFile(url));
      const isThere = !link.includes("#") || found.includes(url.hash.slice(1));
      assert(isThere, `${page}: ${link}`);
    }
  }
});

Deno.test("the picture of delays is what its task draws", async () => {
  const file = new URL("docs/delays.svg", ROOT);
  assertEquals(await Deno.readTextFile(file), picture());
});

type Shown = Partial<Record<"toxics" | "routes", unknown[]>> & {
  data?: Record<string, string>;
};

Deno.test("every config shown is one", () => {
  let configs = 0;
  for (const [page, content] of TEXTS) {
    for (const block of blocks("yaml", content)) {
      const { toxics, routes, data } = parseYaml(block) as Shown;
      const route = "routes:\n  - localPort: 1\n    upstream: a:1\n";
      const ofToxics = toxics && route + block.replace(/^/gm, "    ");
      const config = ofToxics ?? (routes ? block : data?.["chaos.yaml"]);
      if (config === undefined) continue;
      assert(parseConfig(config, page).routes.length > 0);
      configs++;
    }
  }
  assertEquals(configs, 13);
});

Deno.test("the README's first config does what it shows", () => {
  const { seed, routes } = parseConfig(defined(blocks("yaml")[0]));
  const kinds = [1, 2, 3, 4, 5].map((number) =>
    decide(defined(seed), only(routes), number).kind
  );
  assertEquals(kinds, ["forward", "drop", "forward", "timeout", "forward"]);
});

Deno.test("the README's calls of the API succeed", async () => {
  await using watched = await WatchedProxy.start({}, { resettable: true });
  await using api = Api.of(watched);
  const calls = blocks("console").filter((each) => each.includes("8474"));
  const lines = only(calls).split("\n").filter((each) => each.includes("8474"));
  const curl = /curl (?:-X (\w+) )?localhost:8474(\S+)(?: -d '(.*)')?/;
  for (const line of lines) {
    const [, method = "POST", path = "", body] = defined(curl.exec(line));
    const free = body?.replace("localhost:28000", "localhost:0");
    const { status, text } = await api.raw(method, path, free);
    assert(status < 300, `${line}: ${text}`);
  }
  assertEquals(lines.length, 3);
});

type Key = "for_proxy" | "toxic_name" | "latency";
type Action = { provider: { arguments: Record<Key, unknown> } };
type Experiment = Record<"method" | "rollbacks", Action[]>;

Deno.test("the experiment's calls of the API succeed", async () => {
  const redis = { name: "redis", localPort: 0, upstream: "localhost:6379" };
  await using watched = await WatchedProxy.start({ routes: [redis] });
  await using api = Api.of(watched);
  const page = defined(TEXTS.get("docs/containers.md"));
  const experiments = blocks("yaml", page)
    .filter((each) => each.includes("rollbacks:"));
  const { method, rollbacks } = parseYaml(only(experiments)) as Experiment;
  const slow = only(method).provider.arguments;
  const restore = only(rollbacks).provider.arguments;
  // The requests that the extension makes of these arguments.
  const toxics = `/proxies/${slow.for_proxy}/toxics`;
  const added = await api.post(toxics, {
    name: slow.toxic_name,
    type: "latency",
    stream: "downstream",
    toxicity: 1.0,
    attributes: { latency: slow.latency, jitter: 0 },
  });
  assertEquals(added.status, 200);
  assertEquals(added.body.attributes, { latency: 1000, jitter: 0 });
  const removed = await api.delete(`${toxics}/${restore.toxic_name}`);
  assertEquals(removed.status, 204);
});
