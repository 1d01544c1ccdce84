// deno-lint-ignore-file no-import-prefix -- in deno.json each task would load it
import { assertEquals, assertGreater, assertRejects } from "@std/assert";
import { Redis } from "npm:ioredis@6.0.0";
import type { RouteOptions } from "../main.ts";
import {
  signalTo,
  steadyPort,
  sum,
  testBytes,
  times,
  WatchedProxy,
} from "./helpers.ts";

const HAS_REDIS = await new Deno.Command("redis-server", {
  args: ["--version"],
}).output().then(({ success }) => success, () => false);
if (!HAS_REDIS) {
  console.warn("redis-server is not installed: the tests with it are skipped");
}

/** A test with a client that speaks to a server through the proxy. */
function test(
  name: string,
  run: (stage: { redis: Redis; watched: WatchedProxy }) => Promise<void>,
  route: Partial<RouteOptions> = {},
): void {
  Deno.test({
    name: `Redis: ${name}`,
    ignore: !HAS_REDIS,
    sanitizeOps: false, // ioredis leaves timers of its own behind
    sanitizeResources: false,
    async fn() {
      await using server = await startServer();
      await using watched = await WatchedProxy.to(server, route);
      await using client = clientOf(watched);
      await run({ redis: client.redis, watched });
    },
  });
}

test("pipelined binary values come back as they were", async ({ redis, watched }) => {
  const sizes = [0, 1, 1023, 4096, 65_537, 300_001, 2 ** 20];
  const values = sizes.map((size, i) => Buffer.from(testBytes(size, i + 1)));

  const writing = redis.pipeline();
  values.forEach((value, i) => writing.set(`key ${i}`, value));
  assertEquals(await writing.exec(), values.map(() => [null, "OK"]));
  const reading = redis.pipeline();
  values.forEach((_, i) => reading.getBuffer(`key ${i}`));
  assertEquals(await reading.exec(), values.map((value) => [null, value]));
  await redis.quit();
  const [closed] = await watched.log.first("closed", 1);
  assertGreater(closed.bytesUp, sum(sizes));
  assertGreater(closed.bytesDown, sum(sizes));
});

test("many small commands at once keep their order", async ({ redis }) => {
  const counts = await times(2000, () => redis.incr("count"));
  assertEquals(counts, Array.from({ length: 2000 }, (_, i) => i + 1));
});

test("dropRate fails a client after retries", async ({ redis, watched }) => {
  const error = await assertRejects(() => redis.ping(), Error);
  assertEquals(error.name, "MaxRetriesPerRequestError");
  const dropped = await watched.log.first("dropped", 3);
  assertEquals(dropped.map((each) => each.connection), [1, 2, 3]);
  assertEquals(watched.log.of("connected"), []);
}, { dropRate: 1 });

/** A Redis client that connects through the proxy with its first command. */
function clientOf(watched: WatchedProxy) {
  const redis = new Redis({
    host: "127.0.0.1",
    port: watched.port(),
    lazyConnect: true,
    maxRetriesPerRequest: 2,
    retryStrategy: () => 1,
  });
  redis.on("error", () => {}); // commands fail with it
  const ended = new Promise<void>((resolve) => redis.once("end", resolve));
  return {
    redis,
    async [Symbol.asyncDispose]() {
      const hasSocket = redis.status !== "reconnecting";
      redis.disconnect();
      if (hasSocket) await ended;
    },
  };
}

/** A real server that keeps nothing, on a free port. */
async function startServer() {
  for (let attempt = 0; attempt < 5; attempt++) {
    const port = steadyPort();
    const process = new Deno.Command("redis-server", {
      args: ["--bind", "127.0.0.1", "--port", `${port}`, "--save", ""],
      stdin: "null",
      stdout: "piped",
      stderr: "null",
    }).spawn();
    let output = "";
    const said = process.stdout.pipeThrough(new TextDecoderStream());
    for await (const part of said) {
      output += part;
      if (!output.includes("eady to accept connections")) continue;
      return {
        address: `127.0.0.1:${port}`,
        async [Symbol.asyncDispose]() {
          signalTo(process, "SIGKILL");
          await process.status;
        },
      };
    }
    await process.status; // the port was taken meanwhile
  }
  throw new Error("redis-server did not start");
}
