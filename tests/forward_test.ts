import { assertEquals } from "@std/assert";
import { echo, readAll, testBytes, WatchedProxy, writeAll } from "./helpers.ts";

Deno.test("a client that ends its stream still gets the whole answer", async () => {
  await using upstream = echo();
  await using watched = await WatchedProxy.to(upstream);
  using client = await watched.connect();
  const sent = testBytes(5_000_003);
  const [, got] = await Promise.all([
    writeAll(client, sent).then(() => client.closeWrite()),
    readAll(client),
  ]);
  assertEquals(got.length, sent.length);
  assertEquals(got, sent);
  const closed = await watched.log.first("closed", 1);
  assertEquals(closed[0].why, "client");
});
