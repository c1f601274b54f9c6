// Bull Board at a gateway: who sees it, what it shows, and that nothing can be changed there.
import { randomUUID } from "node:crypto";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { addBoard, loadBoard } from "../../lib/cli/board.js";
import { FleetDirectory } from "../../lib/fleet/directory.js";
import { Fleet } from "../../lib/fleet/fleet.js";
import { createServer } from "../../lib/server/index.js";
import { countingModel, Fleets, until } from "../fleet/support.js";
import { post } from "../server/support.js";
import { launchChromium, noChromium } from "../support/chromium.js";
import { noRedis } from "../support/redis.js";

const fleets = new Fleets();
const closing: (() => Promise<unknown>)[] = [];

async function gatewayOf(prefix: string, apiKeys: readonly string[]) {
  const fleet = await Fleet.connect({ redis: fleets.redis.url, prefix, allowPaths: false });
  const models = new FleetDirectory(fleet);
  const app = await createServer({ models, apiKeys, logger: false, drainMs: 0 });
  await addBoard(app, fleet, () => models.models.keys(), apiKeys);
  const url = await app.listen({ host: "127.0.0.1", port: 0 });
  closing.push(
    () => app.close(),
    () => fleet.close(),
  );
  return url;
}
const basic = (text: string) => ({ authorization: `Basic ${Buffer.from(text).toString("base64")}` });

describe.skipIf(noRedis)(`the board${noRedis ? ` (skipped: ${noRedis})` : ""}`, () => {
  beforeAll(async () => {
    await fleets.start();
    await loadBoard();
  });
  afterAll(async () => {
    for (const close of closing) await close();
  });

  it("is for those who have a key", async () => {
    const url = await gatewayOf(`b${randomUUID().slice(0, 8)}`, ["first:key", "second"]);
    const statusOf = async (headers: Record<string, string>, at = "/board") =>
      (await fetch(`${url}${at}`, { headers })).status;
    for (const at of ["/board", "/board/", "/board/api/queues", "/board/static/js/main.js", "/board/queue/x/1"])
      expect(await statusOf({}, at), at).toBe(401);
    const refused = await fetch(`${url}/board`);
    expect(refused.headers.get("www-authenticate")).toContain("Basic");
    for (const wrong of ["x:wrong", "second:", "second", ":", ""])
      expect(await statusOf(basic(wrong)), wrong).toBe(401);
    for (const right of ["x:second", ":first:key", "me:first:key"])
      expect(await statusOf(basic(right)), right).toBe(200);
    expect(await statusOf({ authorization: "Bearer second" })).toBe(200);
    // The API takes keys as before, and passwords do not count there.
    expect(await statusOf({}, "/v1/models")).toBe(401);
    expect(await statusOf(basic("x:second"), "/v1/models")).toBe(401);
  });

  it("shows jobs of the models that there are, without their pictures, and changes nothing", async () => {
    const prefix = `b${randomUUID().slice(0, 8)}`;
    const model = countingModel({ stepMs: 50 });
    await fleets.worker(prefix, model);
    const url = await gatewayOf(prefix, []);
    // biome-ignore lint/suspicious/noExplicitAny: whatever it says
    const queues = async (): Promise<any[]> =>
      ((await (await fetch(`${url}/board/api/queues?activeQueue=stub`)).json()) as { queues: unknown[] }).queues;
    expect((await queues()).map(({ name, readOnlyMode }) => [name, readOnlyMode])).toEqual([["stub", true]]);
    const noise = Buffer.alloc(3 * 64 * 64).map(() => Math.floor(256 * Math.random()));
    const sharp = (await import("sharp")).default;
    const image = await sharp(noise, { raw: { width: 64, height: 64, channels: 3 } })
      .png()
      .toBuffer();
    const drawing = post(`${url}/v1/images/edits`, { prompt: "a fox", image: image.toString("base64"), strength: 1 });
    await until(() => model.asked.length === 1);
    const [queue] = await queues();
    const text = JSON.stringify(queue.jobs);
    expect(text).toContain("a fox");
    expect(text.length).toBeLessThan(image.length);
    const page = await fetch(`${url}/board`);
    expect(page.headers.get("content-security-policy")).toContain("default-src 'self'");
    for (const [method, at] of [
      ["PUT", `/board/api/queues/stub/${queue.jobs[0].id}/promote`],
      ["PUT", "/board/api/queues/stub/pause"],
      ["PUT", "/board/api/queues/pause"],
      ["PUT", "/board/api/queues/stub/clean/active"],
    ] as const)
      expect((await fetch(`${url}${at}`, { method })).status, at).toBe(405);
    expect((await drawing).status).toBe(200);
  });

  it.skipIf(noChromium)(
    `is a page that loads nothing from elsewhere${noChromium ? `: ${noChromium}` : ""}`,
    async () => {
      const prefix = `b${randomUUID().slice(0, 8)}`;
      await fleets.worker(prefix, countingModel());
      const url = await gatewayOf(prefix, ["secret"]);
      const browser = await launchChromium();
      try {
        const context = await browser.newContext({ httpCredentials: { username: "me", password: "secret" } });
        const page = await context.newPage();
        const loaded: string[] = [];
        page.on("requestfinished", (request) => loaded.push(request.url()));
        await page.goto(`${url}/board`);
        await page.getByText("stub").first().waitFor();
        expect(loaded.filter((at) => !at.startsWith(url))).toEqual([]);
      } finally {
        await browser.close();
      }
    },
  );
});
