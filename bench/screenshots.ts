/**
 * `deno task screenshots`: photographs the control API's page in Chromium, with
 * connections that send and receive, and writes docs/page-*.png.
 */

import { ChaosProxy, serveApi } from "../main.ts";
import { openBrowser } from "../tests/browser.ts";
import { echo } from "../tests/helpers.ts";

const SIZES = {
  wide: { width: 1280, height: 1000 },
  narrow: { width: 360, height: 740 },
};
const SCHEMES = ["light", "dark"] as const;
const TRAFFIC_MS = 30_000; // for the charts

await using upstream = echo();
await using proxy = await ChaosProxy.start({
  seed: 42,
  routes: [
    {
      name: "postgres",
      localPort: 15432,
      upstream: upstream.address,
      dropRate: 0.05,
      outages: [{
        afterMs: 12_000,
        forMs: 4000,
        everyMs: 20_000,
        mode: "drop",
      }],
      toxics: [
        { type: "latency", attributes: { latency: 40, jitter: 15 } },
        {
          type: "random_close",
          stream: "upstream",
          toxicity: 0.5,
          attributes: { rate: 0.02 },
          schedule: { afterMs: 5000, forMs: 3000, everyMs: 10_000 },
        },
      ],
    },
    { name: "redis", localPort: 16379, upstream: upstream.address },
    {
      name: "payments-api",
      localPort: 18443,
      upstream: upstream.address,
      profile: "3g",
      latencyMs: 120,
      jitterMs: 40,
    },
  ],
}, { resettable: true });
await using api = serveApi(proxy, 0);

let isEnough = false;
const pause = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

/** One client: it connects, sends some messages, leaves, and comes again. */
async function client(port: number, seed: number): Promise<void> {
  const message = new Uint8Array(200 + 400 * (seed % 5));
  const buffer = new Uint8Array(64 * 1024);
  for (let turn = 0; !isEnough; turn++) {
    try {
      using conn = await Deno.connect({ port });
      for (let i = 0; i < 10 + seed && !isEnough; i++) {
        await conn.write(message);
        if (await conn.read(buffer) === null) break;
        await pause(40 + 30 * Math.sin(turn + seed) ** 2);
      }
    } catch {
      await pause(300); // a fault
    }
  }
}

const clients = proxy.routes.flatMap(({ localPort }, route) =>
  Array.from({ length: 4 + 3 * route }, (_, i) => client(localPort, i))
);

await using browser = await openBrowser();
const pages = [];
for (const [size, viewport] of Object.entries(SIZES)) {
  for (const colorScheme of SCHEMES) {
    const context = await browser.newContext({ viewport, colorScheme });
    const page = await context.newPage();
    await page.goto(`http://${api.address}/`);
    await page.getByRole("heading", { name: "postgres" }).click();
    pages.push({ page, path: `docs/page-${size}-${colorScheme}.png` });
  }
}
await pause(TRAFFIC_MS);
for (const { page, path } of pages) await page.screenshot({ path });
isEnough = true;
await Promise.all(clients);
