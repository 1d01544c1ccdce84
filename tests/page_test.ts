import {
  assertEquals,
  assertGreaterOrEqual,
  assertLess,
  assertLessOrEqual,
  assertMatch,
  assertRejects,
} from "@std/assert";
import { parseConfig, type RouteOptions } from "../main.ts";
import {
  type Browser,
  CHROMIUM,
  type Locator,
  openBrowser,
  type Page,
} from "./browser.ts";
import {
  Api,
  assertEchoes,
  Cli,
  defined,
  echo,
  steadyPort,
  times,
  until,
  WatchedProxy,
} from "./helpers.ts";

if (!CHROMIUM) {
  console.warn("no Chromium is installed: the tests of the page are left out");
}

let browser: Promise<Browser> | undefined;
Deno.test.afterAll(async () => (await browser)?.close());

interface Stage {
  page: Page;
  api: Api;
  watched: WatchedProxy;
  address: string;
}

/** A test with the page of a proxy; what it writes to its console fails it. */
function test(
  name: string,
  run: (stage: Stage) => Promise<void>,
  routes: Partial<RouteOptions>[] = [{ name: "db" }],
): void {
  Deno.test({
    name: `page: ${name}`,
    ignore: !CHROMIUM,
    sanitizeOps: false, // the browser stays open for the next test
    sanitizeResources: false,
    async fn() {
      await using upstream = echo();
      await using watched = await WatchedProxy.start({
        seed: 7,
        routes: routes.map((route) => (
          { localPort: 0, upstream: upstream.address, ...route }
        )),
      }, { resettable: true });
      await using api = Api.of(watched);
      const address = `http://127.0.0.1:${api.port}`;
      const context = await (await (browser ??= openBrowser())).newContext();
      context.setDefaultTimeout(60_000);
      const page = await context.newPage();
      const complaints: string[] = [];
      page.on("console", (message) => {
        if (message.type() === "error") complaints.push(message.text());
      });
      page.on("pageerror", (error) => complaints.push(error.message));
      await page.goto(`${address}/`);
      await run({ page, api, watched, address });
      await context.close();
      const isRefused = (text: string) => / status of 400 /.test(text);
      assertEquals(complaints.filter((text) => !isRefused(text)), []);
    },
  });
}

/** What a script in a page gets from a call: a status, or `refused`. */
function callFrom(page: Page, url: string, init: RequestInit = {}) {
  return page.evaluate(
    ([url, init]) =>
      fetch(url, init).then(({ status }) => `${status}`, () => "refused"),
    [url, init] as const,
  );
}

test("no page of another site can read or change anything", async ({ page, api, watched, address }) => {
  await using foreign = Deno.serve({ port: 0, onListen() {} }, () => {
    const type = { "content-type": "text/html" };
    return new Response(`<iframe src="${address}"></iframe>`, {
      headers: type,
    });
  });
  const other = await page.context().newPage();
  // Of another origin, and as if the name of a site led to this machine.
  for (const site of [foreign.addr.port, api.port]) {
    await other.goto(`http://rebound.test:${site}/`);
    const isRebound = site === api.port;
    const at = isRebound ? "" : address;
    const refused = isRebound ? "403" : "refused";
    for (const path of ["/proxies", "/config", "/events", "/connections"]) {
      assertEquals(await callFrom(other, at + path), refused);
    }
    const change = { method: "POST", body: '{"enabled": false}' };
    assertEquals(await callFrom(other, `${at}/proxies/db`, change), refused);
    // A form's request needs no permission; nobody reads the answer.
    const form = { ...change, mode: "no-cors" } as const;
    await callFrom(other, `${at}/proxies/db`, form);
    const reset = { method: "POST", mode: "no-cors" } as const;
    await callFrom(other, `${at}/reset`, reset);
  }
  assertEquals(watched.proxy.route("db").enabled, true);
  assertEquals(watched.log.of("route_changed"), []);
  const statuses = watched.log.of("api").map(({ status }) => status);
  assertEquals(new Set(statuses.slice(1)), new Set([200, 403]));
  await other.goto(`http://127.0.0.1:${foreign.addr.port}/`);
  const frame = defined(other.frames()[1]); // an error of the browser's
  assertMatch(frame.url(), /^chrome-error:/);
});

/** How long an echo takes, in ms. */
async function roundTrip(conn: Deno.Conn): Promise<number> {
  const start = performance.now();
  await assertEchoes(conn);
  return performance.now() - start;
}

/** Opens a route, and returns its region. */
async function openRoute(page: Page, name: string): Promise<Locator> {
  await page.getByRole("heading", { name }).click();
  return page.getByRole("region", { name, exact: true });
}

test("clicks add, change, switch off and remove a toxic on an open connection", async ({ page, watched, address }) => {
  const { proxy } = watched;
  using conn = await watched.connect();
  await assertEchoes(conn);
  const route = await openRoute(page, "db");
  await route.getByLabel("Add toxic to db").click();
  const added = route.getByRole("form", { name: "New toxic of db" });
  await added.getByLabel("latency", { exact: false }).first().fill("300");
  await added.getByRole("button", { name: "Add" }).click();
  const toxic = route.getByRole("form", {
    name: "toxic latency_downstream of db",
  });
  await toxic.waitFor();
  assertEquals(
    proxy.toxic("db", "latency_downstream").attributes["latency"],
    300,
  );
  assertGreaterOrEqual(await roundTrip(conn), 299);

  await toxic.getByLabel("latency", { exact: false }).first().fill("100");
  await toxic.getByLabel("latency", { exact: false }).first().press("Enter");
  const latency = () => proxy.toxics("db")[0]?.attributes["latency"];
  await until(() => latency() === 100, "the toxic is changed");
  assertGreaterOrEqual(await roundTrip(conn), 99);

  const isOn = route.getByRole("switch", {
    name: "toxic latency_downstream of db enabled",
  });
  await isOn.click();
  await until(() => proxy.toxics("db")[0]?.toxicity === 0, "it is off");
  await until(async () => await roundTrip(conn) < 99, "it does not act");
  await isOn.click();
  await until(() => proxy.toxics("db")[0]?.toxicity === 1, "it is on again");
  await route.getByRole("button", { name: /^Remove toxic/ }).click();
  await until(() => proxy.toxics("db").length === 0, "it is removed");

  await page.getByRole("button", { name: "Changes" }).click();
  const path = `'${address}/proxies/db/toxics/latency_downstream'`;
  const lines = await page.getByRole("region", { name: "Changes" })
    .locator("pre").allTextContents();
  assertEquals(lines.slice(0, 4), [
    `curl -X DELETE ${path}`,
    `curl -X PATCH ${path} -d '{"toxicity":1}'`,
    `curl -X PATCH ${path} -d '{"toxicity":0}'`,
    `curl -X PATCH ${path} -d '{"attributes":{"latency":100}}'`,
  ]);
});

test("a problem is told where it is, and mends nothing", async ({ page, watched }) => {
  const route = await openRoute(page, "db");
  const settings = route.getByRole("form", { name: "settings of db" });
  await settings.getByLabel("latencyMs").fill("5");
  await settings.getByLabel("dropRate").fill("7");
  await settings.getByLabel("dropRate").press("Enter");
  const alert = settings.getByRole("alert");
  await alert.filter({ hasText: "expected a number from 0 to 1" }).waitFor();
  assertEquals(watched.proxy.route("db").dropRate, 0);
  await settings.getByLabel("dropRate").fill("0.5");
  await settings.getByLabel("dropRate").press("Enter");
  await until(() => watched.proxy.route("db").dropRate === 0.5, "it is set");
  assertEquals(watched.proxy.route("db").latencyMs, 5); // it was not lost
  await alert.filter({ hasText: "expected" }).waitFor({ state: "hidden" });
});

test("the YAML that it shows is a config of the present state", async ({ page, watched }) => {
  const { proxy } = watched;
  const route = await openRoute(page, "db");
  const settings = route.getByRole("form", { name: "settings of db" });
  await settings.getByLabel("profile").selectOption("3g");
  await settings.getByLabel("latencyMs").fill("15");
  await settings.getByRole("button", { name: "Apply" }).click();
  await route.getByLabel("Add outage to db").click();
  const outage = route.getByRole("form", { name: "New outage of db" });
  await outage.getByLabel("afterMs").fill("3600000");
  await outage.getByLabel("forMs").fill("500");
  await outage.getByLabel("mode").selectOption("hang");
  await outage.getByRole("button", { name: "Add" }).click();
  await until(() => proxy.route("db").outages.length === 1, "an outage");
  assertEquals(proxy.route("db").latencyMs, 15);
  await route.getByText("outage 1 (hang)").first().waitFor();
  await route.getByRole("table", { name: "Time line" }).waitFor();
  await page.getByRole("button", { name: "Config", exact: true }).click();
  const panel = page.getByRole("region", { name: "Config" });
  const yaml = await panel.locator("pre", { hasText: "hang" }).textContent();
  assertEquals(parseConfig(defined(yaml)), proxy.toConfig());
  assertMatch(defined(yaml), /profile: 3g/);
});

test("charts move, and the seed can be set, replayed and reset", async ({ page, watched }) => {
  const chart = page.getByRole("region", { name: "db" }).locator("svg path");
  const shape = () => chart.first().getAttribute("d");
  await until(async () => !!await shape(), "a chart is drawn");
  const before = await shape();
  using conn = await watched.connect();
  await assertEchoes(conn);
  await until(async () => await shape() !== before, "the chart has moved");

  await page.getByRole("form", { name: "seed" }).getByLabel("seed").fill("99");
  await page.getByRole("form", { name: "seed" }).getByRole("button").click();
  await until(() => watched.proxy.seed === 99, "the seed is set");
  await page.getByRole("button", { name: "Replay" }).click();
  await watched.log.first("reseeded", 2);
  watched.proxy.addToxic("db", { type: "noop" });
  await page.getByText("noop_downstream").first().waitFor();
  await page.getByRole("button", { name: "Reset all" }).click();
  await watched.log.first("toxic_removed", 1);
});

test("a type that was chosen stays, and a pattern of bytes is shown as such", async ({ page, watched }) => {
  const { proxy } = watched;
  const after = { match: { hex: "0dff" } };
  proxy.addToxic("db", { type: "noop", after });
  const route = await openRoute(page, "db");
  await route.getByLabel("Add toxic to db").click();
  const types = route.getByLabel("Type of new toxic of db");
  for (const type of ["timeout", "timeout", "limit_data"]) {
    await types.selectOption(type);
    await page.getByRole("heading", { name: "db" }).click();
    await types.waitFor({ state: "detached" });
    await page.getByRole("heading", { name: "db" }).click();
    await route.getByLabel("Add toxic to db").click();
    assertEquals(await types.inputValue(), type);
  }
  const form = route.getByRole("form", { name: "New toxic of db" });
  await form.getByLabel(/^bytes/).first().fill("12");
  await form.getByRole("button", { name: "Add" }).click();
  await until(() => proxy.toxics("db").length === 2, "a toxic is added");
  assertEquals(proxy.toxics("db")[1]?.attributes, { bytes: 12 });
  const noop = route.getByRole("form", { name: "toxic noop_downstream of db" });
  const match = noop.locator('[name="after.match"]');
  assertEquals(await match.inputValue(), JSON.stringify(after.match));
  await route.getByRole("button", { name: /^Remove toxic noop/ }).click();
  await until(() => proxy.toxics("db").length === 1, "one is removed");
  await page.locator("#routes :focus").waitFor(); // the focus is not lost
});

test("what it missed to hear it reads again", async ({ page, watched }) => {
  const { proxy } = watched;
  await page.getByRole("region", { name: "db" }).waitFor();
  const converse = async () => {
    using conn = await watched.connect();
    await assertEchoes(conn);
  };
  await times(50, converse); // more events than the page takes in a second
  proxy.addToxic("db", { type: "noop", name: "unheard" });
  await times(50, converse);
  await page.getByRole("region", { name: "db" }).getByText("unheard").waitFor();
  await page.getByLabel("Filter by event").selectOption("missed");
  await page.getByRole("cell", { name: "missed" }).first().waitFor();
});

test("connections are listed, closed and reset", async ({ page, watched }) => {
  using first = await watched.connect();
  await assertEchoes(first);
  using second = await watched.connect();
  await assertEchoes(second);
  await page.getByRole("button", { name: "Connections" }).click();
  await page.getByRole("button", { name: "Close connection 1 of db" }).click();
  assertEquals(await first.read(new Uint8Array(1)), null);
  await page.getByRole("button", { name: "Reset connection 2 of db" }).click();
  await assertRejects(
    () => second.read(new Uint8Array(1)),
    Deno.errors.ConnectionReset,
  );
});

const TAGS = `<img/src=x/onerror="document.title='hit'">`;

test("names are text, whatever they hold", async ({ page, watched }) => {
  const route = await openRoute(page, TAGS);
  await route.getByRole("form", { name: `toxic ${TAGS} of ${TAGS}` }).waitFor();
  await route.getByRole("switch", { name: `${TAGS} enabled` }).last().click();
  await until(() => !watched.proxy.route(TAGS).enabled, "it is disabled");
  await route.getByRole("button", { name: `Remove toxic ${TAGS}` }).click();
  await until(() => watched.proxy.toxics(TAGS).length === 0, "it is removed");
  await page.getByRole("cell", { name: "route_changed" }).waitFor();
  assertEquals(await page.locator("img").count(), 0);
  assertEquals(await page.title(), "chaos-proxy");
}, [{ name: TAGS, toxics: [{ name: TAGS, type: "noop" }] }]);

const FOCUSED = `(() => {
  const { activeElement: { ariaLabel, labels, textContent } } = document;
  return (ariaLabel ?? labels?.[0]?.textContent ?? textContent).trim();
})()`;

/** Presses Tab until an element of this name has the focus. */
async function tabTo(page: Page, name: RegExp): Promise<void> {
  for (let i = 0; i < 200; i++) {
    await page.keyboard.press("Tab");
    if (name.test(await page.evaluate(FOCUSED))) return;
  }
  throw new Error(`Tab does not reach ${name}`);
}

test("all of it works by keyboard, and is 360 pixels wide", async ({ page, watched }) => {
  const { proxy } = watched;
  await page.setViewportSize({ width: 360, height: 640 });
  const wide = await page.locator("html").evaluate(
    (html: { scrollWidth: number }) => html.scrollWidth,
  );
  assertLessOrEqual(wide, 360);
  await tabTo(page, /^db/); // the route's summary
  await page.keyboard.press("Enter");
  await tabTo(page, /^Add toxic to db/);
  await page.keyboard.press("Enter");
  await tabTo(page, /^latency/);
  await page.keyboard.type("25");
  await page.keyboard.press("Enter");
  await until(() => proxy.toxics("db").length === 1, "a toxic is added");
  await tabTo(page, /^db enabled/);
  await page.keyboard.press("Space");
  await until(() => !proxy.route("db").enabled, "the route is disabled");
});

const MANY = Array.from({ length: 200 }, (_, i) => ({ name: `route${i}` }));

test(
  "with 200 routes and 5,000 connections it draws what is in view",
  async ({ page }) => {
    const list = Array.from({ length: 5000 }, (_, i) => ({
      ...{
        id: i + 1,
        proxy: `route${i % 200}`,
        number: i + 1,
        ageMs: 1000 * i,
      },
      ...{ client: `127.0.0.1:${i}`, upstream: "127.0.0.1:1", toxics: [] },
      ...{ bytesUp: i, bytesDown: i },
    }));
    await page.route(
      "**/connections",
      (route) => route.fulfill({ json: list }),
    );
    await page.getByRole("button", { name: "Connections" }).click();
    const panel = page.getByRole("region", { name: "Connections" });
    await panel.locator('table[aria-rowcount="5000"]').waitFor();
    assertLess(await panel.locator("tr").count(), 200);
    await panel.evaluate((node: { scrollTop: number }) => node.scrollTop = 1e9);
    await panel.getByText("127.0.0.1:4999", { exact: true }).waitFor();
    assertLess(await panel.locator("tr").count(), 200);
    assertLess(await page.locator("main *").count(), 10_000);

    // Each drawing changes elements in one go: at most 5 in a second.
    const [drawings, seconds] = await panel.evaluate(
      (node: { scrollTop: number }) => {
        const { document, MutationObserver } = globalThis as unknown as {
          document: { body: unknown };
          MutationObserver: new (fn: () => void) => {
            observe(node: unknown, what: object): void;
          };
        };
        let drawings = 0;
        const observer = new MutationObserver(() => drawings++);
        const what = { subtree: true, childList: true, characterData: true };
        observer.observe(document.body, { ...what, attributes: true });
        const start = performance.now();
        const timer = setInterval(() => node.scrollTop -= 100, 5);
        return new Promise<[drawings: number, seconds: number]>((resolve) =>
          setTimeout(() => {
            clearInterval(timer);
            resolve([drawings, (performance.now() - start) / 1000]);
          }, 2000)
        );
      },
    );
    assertLessOrEqual(drawings, 5 * seconds + 1);
    await page.getByLabel("Find routes").fill("route199");
    await page.getByText("1 of 200").waitFor();
  },
  MANY,
);

Deno.test({
  name: "page: it comes back after a restart of the program",
  ignore: !CHROMIUM,
  sanitizeOps: false,
  sanitizeResources: false,
  async fn() {
    await using upstream = echo();
    const port = steadyPort();
    const run = (name: string) => {
      const route = `0=${upstream.address}`;
      return new Cli("--api", `${port}`, route, `name=${name}`);
    };
    const context = await (await (browser ??= openBrowser())).newContext();
    context.setDefaultTimeout(60_000);
    const page = await context.newPage();
    {
      await using cli = run("before");
      await cli.says(/api_listening/);
      await page.goto(`http://127.0.0.1:${port}/`);
      await page.getByRole("region", { name: "before" }).waitFor();
    }
    await page.getByText("reconnecting").waitFor();
    await using cli = run("after");
    await cli.says(/api_listening/);
    await page.getByRole("region", { name: "after", exact: true }).waitFor();
    await page.getByRole("status").getByText("live").waitFor();
    await page.getByRole("cell", { name: "started" }).nth(1).waitFor();
    await context.close();
  },
});
