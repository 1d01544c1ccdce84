// deno-lint-ignore-file no-import-prefix -- in deno.json each task would load it
import {
  assertEquals,
  assertGreater,
  assertGreaterOrEqual,
  assertRejects,
} from "@std/assert";
import { Redis, type RedisOptions } from "npm:ioredis@6.0.0";
import { signalTo, steadyPort, testBytes, WatchedProxy } from "./helpers.ts";

const HAS_REDIS = await new Deno.Command("redis-server", {
  args: ["--version"],
}).output().then(({ success }) => success, () => false);
if (!HAS_REDIS) {
  console.warn("redis-server is not installed: the tests with it are skipped");
}

/** A test with a server that keeps nothing. */
function test(name: string, run: (server: RedisServer) => Promise<void>): void {
  Deno.test({
    name: `Redis: ${name}`,
    ignore: !HAS_REDIS,
    sanitizeOps: false, // ioredis leaves timers of its own behind
    sanitizeResources: false,
    async fn() {
      await using server = await RedisServer.start();
      await run(server);
    },
  });
}

test("pipelined binary values come back as they were", async (server) => {
  await using watched = await WatchedProxy.to(server);
  await using client = new Client(watched);
  const sizes = [0, 1, 1023, 4096, 65_537, 300_001, 2 ** 20];
  const values = sizes.map((size, i) => Buffer.from(testBytes(size, i + 1)));

  const writing = client.redis.pipeline();
  values.forEach((value, i) => writing.set(`key ${i}`, value));
  assertEquals(await writing.exec(), values.map(() => [null, "OK"]));
  const reading = client.redis.pipeline();
  values.forEach((_, i) => reading.getBuffer(`key ${i}`));
  assertEquals(await reading.exec(), values.map((value) => [null, value]));
  await client.quit();
  const [closed] = await watched.log.first("closed", 1);
  const total = sizes.reduce((sum, size) => sum + size);
  assertGreater(closed.bytesUp, total);
  assertGreater(closed.bytesDown, total);
});

test("many small commands at once keep their order", async (server) => {
  await using watched = await WatchedProxy.to(server);
  await using client = new Client(watched);
  const counts = await Promise.all(
    Array.from({ length: 2000 }, () => client.redis.incr("count")),
  );
  assertEquals(counts, Array.from({ length: 2000 }, (_, i) => i + 1));
});

test("what is published reaches the subscriber", async (server) => {
  await using watched = await WatchedProxy.to(server);
  await using subscriber = new Client(watched);
  await using publisher = new Client(watched);
  const expected = Array.from({ length: 100 }, (_, i) => `message ${i}`);
  const got: string[] = [];
  const all = new Promise<void>((resolve) => {
    subscriber.redis.on("message", (_channel, message) => {
      if (got.push(message) === expected.length) resolve();
    });
  });
  await subscriber.redis.subscribe("news");
  for (const message of expected) {
    assertEquals(await publisher.redis.publish("news", message), 1);
  }
  await all;
  assertEquals(got, expected);
});

test("latencyMs delays the first answer", async (server) => {
  const latencyMs = 200;
  await using watched = await WatchedProxy.to(server, { latencyMs });
  const start = performance.now();
  await using client = new Client(watched);
  assertEquals(await client.redis.ping(), "PONG");
  assertGreaterOrEqual(performance.now() - start, latencyMs - 1);
  assertEquals(watched.log.only("delayed").delayMs, latencyMs);
});

test("dropped connections fail the client, after its retries", async (server) => {
  await using watched = await WatchedProxy.to(server, { dropRate: 1 });
  await using client = new Client(watched, {
    maxRetriesPerRequest: 2,
    retryStrategy: () => 1,
  });
  const error = await assertRejects(() => client.redis.ping(), Error);
  assertEquals(error.name, "MaxRetriesPerRequestError");
  const dropped = await watched.log.first("dropped", 3);
  assertEquals(dropped.map((each) => each.connection), [1, 2, 3]);
  assertEquals(watched.log.of("connected"), []);
});

/** A Redis client that speaks through the proxy. */
class Client implements AsyncDisposable {
  readonly redis: Redis;
  readonly #ended: Promise<void>;

  constructor(watched: WatchedProxy, options: RedisOptions = {}) {
    const server = { host: "127.0.0.1", port: watched.port() };
    this.redis = new Redis({ ...server, ...options });
    this.redis.on("error", () => {}); // commands fail with it
    this.#ended = new Promise((resolve) => this.redis.once("end", resolve));
  }

  async quit(): Promise<void> {
    await this.redis.quit();
    await this.#ended;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    const hasSocket = this.redis.status !== "reconnecting";
    this.redis.disconnect();
    if (hasSocket) await this.#ended;
  }
}

/** A real server that keeps nothing, on a free port. */
class RedisServer implements AsyncDisposable {
  private constructor(
    readonly address: string,
    readonly process: Deno.ChildProcess,
  ) {}

  static async start(): Promise<RedisServer> {
    for (let attempt = 0; attempt < 5; attempt++) {
      const port = steadyPort();
      const process = new Deno.Command("redis-server", {
        args: [
          ...["--bind", "127.0.0.1", "--port", `${port}`, "--save", ""],
          ...["--appendonly", "no", "--loglevel", "notice"],
        ],
        stdin: "null",
        stdout: "piped",
        stderr: "null",
      }).spawn();
      if (await saysReady(process)) {
        return new RedisServer(`127.0.0.1:${port}`, process);
      }
      await process.status; // the port was taken meanwhile
    }
    throw new Error("redis-server did not start");
  }

  async [Symbol.asyncDispose](): Promise<void> {
    signalTo(this.process, "SIGKILL");
    await this.process.status;
  }
}

/** Whether a server gets ready to accept connections, or else ends. */
async function saysReady(process: Deno.ChildProcess): Promise<boolean> {
  let output = "";
  for await (
    const part of process.stdout.pipeThrough(new TextDecoderStream())
  ) {
    output += part;
    if (output.includes("eady to accept connections")) return true;
  }
  return false;
}
