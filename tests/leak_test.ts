import {
  assert,
  assertEquals,
  assertLess,
  assertLessOrEqual,
  assertMatch,
} from "@std/assert";
import type { ConfigOptions } from "../main.ts";
import {
  Api,
  Cli,
  echo,
  EventLog,
  readExactly,
  ROOT,
  send,
  signalTo,
  soon,
  TempFile,
  testBytes,
  text,
  until,
  writeAll,
} from "./helpers.ts";

const MIB = 2 ** 20;
const IS_WINDOWS = Deno.build.os === "windows";
const IS_LINUX = Deno.build.os === "linux";
if (!IS_LINUX) {
  console.warn("descriptors and memory are counted on Linux only");
}

Deno.test("thousands of connections leave nothing behind", async () => {
  const atOnce = await affordable(1000);
  await using upstream = echo();
  await using cli = await Cli.start({
    routes: [{ localPort: 0, upstream: upstream.address }],
  });
  await exchangeInLanes(cli, 100, 20);
  await cli.log.first("closed", 100);
  const before = await descriptors(cli);

  const clients = await Promise.all(
    Array.from({ length: atOnce }, () => Deno.connect({ port: cli.port() })),
  );
  await Promise.all(clients.map(exchange));
  clients.forEach((client) => client.close());
  await exchangeInLanes(cli, 1500, 20);
  await cli.log.first("closed", 100 + atOnce + 1500);
  const halfWay = await memory(cli);
  await exchangeInLanes(cli, 1500, 20);
  const count = 100 + atOnce + 3000;
  await cli.log.first("closed", count);

  assertEquals(cli.log.of("accepted").length, count);
  const whys = new Set(cli.log.of("closed").map((each) => each.why));
  assertEquals([...whys], ["client"]);
  assertEquals(upstream.accepted, count);
  if (!IS_LINUX) return;
  // A descriptor is given back a moment after the event.
  for (let look = 0; look < 100 && await descriptors(cli) > before; look++) {
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  assertLessOrEqual(await descriptors(cli), before);
  assertLess(await memory(cli) - halfWay, 48 * MIB);
});

for (const api of [undefined, 0]) {
  const kind = api === undefined ? "" : ", also with the API";
  Deno.test(`running out of descriptors is survived${kind}`, {
    ignore: IS_WINDOWS,
  }, async () => {
    await using upstream = echo();
    await using cli = await startWithDescriptors(64, {
      api,
      routes: [
        { name: "echo", localPort: 0, upstream: upstream.address },
        {
          name: "hold",
          localPort: 0,
          upstream: upstream.address,
          timeoutRate: 1,
        },
      ],
    });
    using early = await Deno.connect({ port: cli.port(0) });
    await exchange(early, 1);
    const clients = await Promise.all(
      Array.from({ length: 80 }, () => Deno.connect({ port: cli.port(1) })),
    );
    const [failed] = await cli.log.first("accept_failed", 1);
    assert(failed.cause);

    await exchange(early, 2);
    if (api !== undefined) {
      const [{ address }] = await cli.log.first("api_listening", 1);
      using _call = await Deno.connect({
        port: Number(address.split(":")[1]),
      }).catch(() => null); // as it listens anew
      const [{ cause }] = await cli.log.first("api_failed", 1);
      assertMatch(cause, /^Too many open files/);
    }
    clients.forEach((client) => client.close());
    if (api === undefined) {
      assertEquals(failed.route, "hold");
      await cli.log.first("closed", 80);
      assertEquals(cli.log.of("accepted").length, 81); // none is forgotten
      using late = await Deno.connect({ port: cli.port(0) });
      await exchange(late, 3);
    } else {
      await untilServed(cli, 0);
      const [{ address }] = await cli.log.first("api_listening", 1);
      await using client = Api.at(address);
      await until(
        () => client.get("/version").then(() => true, () => false),
        "the API answers again",
      );
    }
    assertEquals(cli.stderr(), "");
  });
}

Deno.test("no shortage of descriptors, however short, leaves a listener deaf", {
  ignore: IS_WINDOWS,
}, async () => {
  await using upstream = echo();
  await using cli = await startWithDescriptors(256, {
    api: 0,
    routes: [{ localPort: 0, upstream: upstream.address }],
  });
  const [{ address }] = await cli.log.first("api_listening", 1);
  const [api, port] = [Number(address.split(":")[1]), cli.port()];
  const connect = (port: number, count: number) =>
    Promise.all(
      Array.from(
        { length: count },
        () => Deno.connect({ port }).catch(() => null),
      ),
    );
  for (const client of await connect(port, 60)) client?.close();
  await cli.log.first("closed", 60);
  const idle = await connect(api, 180);
  for (let burst = 0; burst < 10; burst++) {
    const clients = await connect(port, 100);
    await new Promise((resolve) => setTimeout(resolve, 20));
    for (const client of clients) client?.close();
  }
  for (const client of idle) client?.close();
  await untilServed(cli, 0);
});

/** Waits until a route serves again; what it does not accept, it resets. */
async function untilServed(cli: LimitedCli, route: number): Promise<void> {
  for (let attempt = 1;; attempt++) {
    try {
      using conn = await Deno.connect({ port: cli.port(route) });
      return await soon(exchange(conn, 10 + attempt), "answer", 1000);
    } catch (error) {
      if (attempt === 30) throw error;
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
  }
}

// An odd one is taken by a connection, an even one by the dialling for it.
for (const [limit, api] of [[64, undefined], [64, 0], [65, 0]] as const) {
  const kind = api === undefined ? "" : `, also with the API and ${limit}`;
  Deno.test(`a dialling that finds no descriptor fails alone${kind}`, {
    ignore: IS_WINDOWS,
  }, async () => {
    await using upstream = echo();
    await using cli = await startWithDescriptors(limit, {
      api,
      routes: [{ localPort: 0, upstream: upstream.address }],
    });
    using early = await Deno.connect({ port: cli.port() });
    await exchange(early, 1);
    const clients = await Promise.all(
      Array.from({ length: 80 }, () => Deno.connect({ port: cli.port() })),
    );
    // With the API the shortage may be seen before there is a dialling.
    const failed = await Promise.race([
      cli.log.first("upstream_failed", 1),
      ...(api === undefined ? [] : [cli.log.first("accept_failed", 1)]),
    ]);
    assert(failed[0].cause);
    await exchange(early, 2);
    clients.forEach((client) => client.close());
    if (api === undefined) {
      await cli.log.first("closed", 80);
      using late = await Deno.connect({ port: cli.port() });
      await exchange(late, 3);
    } else await untilServed(cli, 0);
    assertEquals(cli.stderr(), "");
  });
}

/** Sends what is this connection's alone, and gets it back. */
async function exchange(conn: Deno.Conn, number: number): Promise<void> {
  const sent = testBytes(3001, number);
  const [got] = await Promise.all([
    readExactly(conn, sent.length),
    writeAll(conn, sent),
  ]);
  assertEquals(got, sent);
}

/** Connects so many times, in lanes in which one follows another. */
async function exchangeInLanes(
  cli: Cli,
  count: number,
  lanes: number,
): Promise<void> {
  let left = count;
  await Promise.all(Array.from({ length: lanes }, async () => {
    while (left > 0) {
      const number = left--;
      using client = await Deno.connect({ port: cli.port() });
      await send(client, `connection ${number}`);
      const length = `connection ${number}`.length;
      assertEquals(
        text(await readExactly(client, length)),
        `connection ${number}`,
      );
    }
  }));
}

async function descriptors({ pid }: Cli): Promise<number> {
  if (!IS_LINUX) return 0;
  return (await Array.fromAsync(Deno.readDir(`/proc/${pid}/fd`))).length;
}

async function memory({ pid }: Cli): Promise<number> {
  if (!IS_LINUX) return 0;
  const status = await Deno.readTextFile(`/proc/${pid}/status`);
  return Number(/^VmRSS:\s+(\d+) kB$/m.exec(status)![1]) * 1024;
}

/** As many connections as this process, being both ends, has descriptors for. */
async function affordable(wanted: number): Promise<number> {
  if (IS_WINDOWS) return wanted;
  const { stdout } = await new Deno.Command("sh", {
    args: ["-c", "ulimit -n"],
  }).output();
  const limit = Number(text(stdout)); // NaN: unlimited
  const most = Math.max(1, Math.floor((limit - 100) / 2));
  if (!(most < wanted)) return wanted;
  console.warn(`ulimit -n is ${limit}: ${most} connections, not ${wanted}`);
  return most;
}

/** The program, held to so many descriptors. */
class LimitedCli implements AsyncDisposable {
  readonly log = new EventLog();
  readonly #child: Deno.ChildProcess;
  readonly #reading: Promise<void>;
  #stderr = "";

  constructor(limit: number, config: string) {
    const mapped = import.meta.resolve("@std/yaml").startsWith("file:");
    const map = "--import-map npm/imports.json --lock npm/deno.lock --frozen";
    this.#child = new Deno.Command("sh", {
      args: [
        "-c",
        `ulimit -n ${limit} && exec "$@"`,
        "sh",
        Deno.execPath(),
        "run",
        "--no-prompt",
        ...mapped ? map.split(" ") : [],
        "--allow-net",
        "--allow-read",
        "main.ts",
        "--log-format",
        "json",
        config,
      ],
      cwd: ROOT,
      // Certificates, if named here, may be loaded when there is a shortage.
      env: { NO_COLOR: "1", NODE_EXTRA_CA_CERTS: "" },
      stdin: "null",
      stdout: "piped",
      stderr: "piped",
    }).spawn();
    this.#reading = this.#read();
  }

  port(route = 0): number {
    return Number(this.log.of("listening")[route].address.split(":")[1]);
  }

  stderr(): string {
    return this.#stderr;
  }

  async #read(): Promise<void> {
    const errors = (async () => {
      const decoded = this.#child.stderr.pipeThrough(new TextDecoderStream());
      for await (const part of decoded) this.#stderr += part;
    })();
    let rest = "";
    const decoded = this.#child.stdout.pipeThrough(new TextDecoderStream());
    for await (const part of decoded) {
      const lines = (rest + part).split("\n");
      rest = lines.pop()!;
      for (const line of lines) this.log.add(JSON.parse(line));
    }
    await errors;
    this.log.end();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    signalTo(this.#child, "SIGKILL");
    await this.#reading;
    await this.#child.status;
  }
}

async function startWithDescriptors(
  limit: number,
  config: ConfigOptions,
): Promise<LimitedCli> {
  await using file = await TempFile.with(JSON.stringify(config), ".json");
  const cli = new LimitedCli(limit, file.path);
  try {
    await cli.log.first("started", 1);
    return cli;
  } catch (cause) {
    await cli[Symbol.asyncDispose]();
    throw new Error(`did not start: ${cli.stderr()}`, { cause });
  }
}
