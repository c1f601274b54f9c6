// The page at "/" in Chromium, on the real server with the embedded model. It is mounted under a prefix, as behind a proxy.
import { readdirSync, readFileSync, statSync } from "node:fs";
import { createRequire } from "node:module";
import type { AddressInfo } from "node:net";
import path from "node:path";
import Fastify, { type FastifyInstance } from "fastify";
import { FlowTurbo } from "flowturbo";
import { imageServer } from "flowturbo/server";
import type { Browser, BrowserContext, BrowserContextOptions, Page, Request } from "playwright-core";
import sharp from "sharp";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it, onTestFinished, vi } from "vitest";
import { launchChromium, noChromium } from "../support/chromium.js";

const folder = path.join(import.meta.dirname, "../../page");
const files = readdirSync(folder);
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const apiKey = "key-for-tests-0123";
const phone = { viewport: { width: 360, height: 740 }, hasTouch: true, isMobile: true } satisfies BrowserContextOptions;

it("is less than 60 kB in all", () => {
  const bytes = files.map((name) => statSync(path.join(folder, name)).size).reduce((a, b) => a + b, 0);
  expect(bytes).toBeLessThan(60_000);
  expect(bytes).toBeGreaterThan(10_000);
});

it("has no script or style but its own files, by relative addresses", () => {
  const html = readFileSync(path.join(folder, "index.html"), "utf8");
  expect(html).not.toMatch(/\son\w+=|\sstyle=|<style|<script(?![^>]*\ssrc=)/);
  for (const [, address] of html.matchAll(/\s(?:src|href)="([^"]*)"/g)) {
    if (address!.startsWith("data:")) continue;
    expect(files).toContain(address);
  }
});

describe.skipIf(noChromium)(`in Chromium${noChromium ? `: ${noChromium}` : ""}`, () => {
  let model: FlowTurbo;
  let browser: Browser;
  let open: FastifyInstance;
  let locked: FastifyInstance;
  let context: BrowserContext | null = null;
  let page: Page;
  /** What the browser says of errors, and of what the policy forbids. */
  let said: string[] = [];
  /** Messages that a test causes on purpose. */
  let expected: RegExp[] = [];

  /** An app with the server at /pictures/. */
  async function serve(options: Partial<Parameters<typeof imageServer>[1]> = {}): Promise<FastifyInstance> {
    const app = Fastify({ forceCloseConnections: true });
    await app.register(imageServer, { prefix: "/pictures", models: { shapes: model }, drainMs: 0, ...options });
    await app.listen({ port: 0, host: "127.0.0.1" });
    return app;
  }
  const address = (app: FastifyInstance) => `http://127.0.0.1:${(app.server.address() as AddressInfo).port}/pictures/`;

  beforeAll(async () => {
    model = await FlowTurbo.load(undefined, { measureCosts: false });
    browser = await launchChromium();
    open = await serve();
    locked = await serve({ apiKeys: [apiKey] });
  });
  afterAll(async () => {
    await browser?.close();
    await Promise.all([open?.close(), locked?.close()]);
    await model?.dispose();
  });

  /** Opens the page. @param isReady whether to wait until it can draw */
  async function visit(app = open, options: BrowserContextOptions = {}, isReady = true): Promise<void> {
    await context?.close();
    context = await browser.newContext({ viewport: { width: 1200, height: 900 }, ...options });
    context.setDefaultTimeout(20_000);
    page = await context.newPage();
    page.on("console", (message) => message.type() === "error" && said.push(message.text()));
    page.on("pageerror", (error) => said.push(error.message));
    await page.goto(address(app));
    if (isReady) await whenIdle();
  }
  beforeEach(() => {
    said = [];
    expected = [];
  });
  afterEach(async () => {
    await context?.close();
    context = null;
    // What the policy forbids is reported as an error, too.
    expect(said.filter((text) => !expected.some((pattern) => pattern.test(text)))).toEqual([]);
  });

  const drawButton = () => page.getByRole("button", { name: "Draw", exact: true });
  const whenIdle = () => page.locator("#draw:not([aria-disabled])").waitFor();
  /** The form's fields, by the names of a request. */
  const field = (name: string) => page.locator(`#form [name=${name}]`);
  async function fill(values: Record<string, string>): Promise<void> {
    for (const [name, value] of Object.entries(values)) {
      if (["guidance_scale", "num_inference_steps", "blocks"].includes(name)) await openDetails("More");
      if (name === "size") await field(name).selectOption(value);
      else await field(name).fill(value);
    }
  }
  async function openDetails(name: string): Promise<void> {
    const details = page
      .locator("details")
      .filter({ has: page.locator("summary", { hasText: new RegExp(`^${name}$`) }) });
    if ((await details.last().getAttribute("open")) === null) await details.last().locator("> summary").click();
  }
  /** Draws what the form says. Resolves with the request when the pictures are there. */
  async function draw(act = () => drawButton().click()): Promise<Request> {
    const before = await page.locator("#history li").count();
    const [request] = await Promise.all([page.waitForRequest((sent) => sent.method() === "POST"), act()]);
    await whenIdle();
    expect(await page.locator("#alert").textContent()).toBe("");
    expect(await page.locator("#history li").count()).toBeGreaterThan(before);
    return request;
  }
  /** The bytes of a picture that is shown. */
  async function bytesOf(selector: string): Promise<Buffer> {
    const data = await page.evaluate(`(async () => {
      const image = document.querySelector(${JSON.stringify(selector)});
      const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
      await image.decode();
      canvas.getContext("2d").drawImage(image, 0, 0);
      return Array.from(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data);
    })()`);
    return Buffer.from(data as number[]);
  }
  const shown = "#cards figure img";

  it("is served with all its files, under a policy that allows nothing else", async () => {
    for (const name of files) {
      const response = await fetch(new URL(name === "index.html" ? "" : name, address(locked)));
      expect([name, response.status]).toEqual([name, 200]);
      expect(response.headers.get("content-security-policy")).toContain("default-src 'none'; script-src 'self'");
    }
    // Relative addresses need the slash.
    expect((await fetch(address(locked).slice(0, -1))).url).toBe(address(locked));
  });

  it("draws a prompt, and shows the picture step by step", async () => {
    await visit();
    await page.evaluate(`
      globalThis.seen = [];
      globalThis.texts = new Set();
      new MutationObserver((changes) => {
        for (const { target } of changes) if (target.dataset.step) seen.push([Number(target.dataset.step), target.src]);
      }).observe(document.querySelector("#cards"), { subtree: true, attributeFilter: ["data-step"] });
      new MutationObserver(() => texts.add(document.querySelector("#status").textContent))
        .observe(document.querySelector("#status"), { childList: true });
    `);
    await fill({
      prompt: "a large red square",
      size: "128x128",
      num_inference_steps: "20",
      guidance_scale: "2",
      seed: "7",
    });
    const request = await draw();
    expect(request.postDataJSON()).toMatchObject({
      ...{ prompt: "a large red square", size: "128x128", num_inference_steps: 20, guidance_scale: 2, seed: 7, n: 1 },
      ...{ preview: "fast", partial_images: 100 },
    });
    expect(request.postDataJSON()).not.toHaveProperty("quality");
    const seen = (await page.evaluate("seen")) as [number, string][];
    expect(new Set(seen.map(([, src]) => src)).size).toBeGreaterThanOrEqual(2);
    const steps = seen.map(([step]) => step);
    expect(steps).toEqual([...steps].sort((a, b) => a - b));
    expect([...((await page.evaluate("[...texts]")) as string[])]).toContainEqual(
      expect.stringMatching(/^Step \d+ of 20/),
    );
    // The one that stays is the model's own, and its facts are there.
    const alone = await model.generate({
      ...{ prompt: "a large red square", width: 128, height: 128, steps: 20, guidanceScale: 2, seed: 7 },
    });
    const { data, info } = await sharp(await bytesOf(shown), { raw: { width: 128, height: 128, channels: 4 } })
      .removeAlpha()
      .raw()
      .toBuffer({ resolveWithObject: true });
    expect(info.channels).toBe(3);
    expect(Buffer.compare(data, alone.images[0]!.data)).toBe(0);
    expect(await page.locator("#cards figcaption").textContent()).toBe("128 × 128, seed 7");
    const summary = page.locator("#facts summary");
    expect(await summary.textContent()).toContain(`Schedule ${alone.blocks}: 20 evaluations`);
    await summary.click();
    expect(await page.locator("#facts dt").allTextContents()).toContainEqual(expect.stringMatching(/^20 steps, /));
    expect(await page.locator("#live").textContent()).toMatch(/^1 picture drawn in /);
  });

  it("names schedules by speed and quality", async () => {
    await visit();
    await fill({ prompt: "a circle" });
    for (const [name, quality] of [
      ["Fast", "low"],
      ["Balanced", "medium"],
      ["Best", "high"],
    ] as const) {
      await page.getByRole("radio", { name }).check();
      expect((await draw()).postDataJSON()).toMatchObject({ quality });
    }
    expect(await page.locator("#quality-hint").isVisible()).toBe(false);
    await fill({ blocks: "H1P2" });
    expect(await page.locator("#quality-hint").isVisible()).toBe(true);
    const body = (await draw()).postDataJSON();
    expect(body).toMatchObject({ blocks: "H1P2" });
    expect(body).not.toHaveProperty("quality");
    expect(await page.locator("#facts summary").textContent()).toContain("Schedule H1P2");
  });

  it("takes a size of one's own", async () => {
    await visit();
    await fill({ prompt: "a circle", size: "own", width: "48", height: "80" });
    expect((await draw()).postDataJSON()).toMatchObject({ size: "48x80" });
    expect(await page.locator("#cards figcaption").textContent()).toContain("48 × 80");
  });

  it("draws with the LoRAs that the model has, each at its scale", async () => {
    const file = path.join(import.meta.dirname, "../../models/adapters/outlined.safetensors");
    await using adapted = await FlowTurbo.load(undefined, { loras: [{ file, dynamic: true }], measureCosts: false });
    const app = await serve({ models: { plain: model, adapted } });
    try {
      await visit(app);
      const scale = page.getByRole("spinbutton", { name: "LoRA outlined" });
      expect(await scale.count()).toBe(0);
      await page.getByLabel("Model").selectOption("adapted");
      await fill({ prompt: "a red circle", seed: "7", guidance_scale: "2", blocks: "E2" });
      expect((await draw()).postDataJSON()).not.toHaveProperty("loras");
      const without = await bytesOf(shown);
      await scale.fill("0.8");
      expect((await draw()).postDataJSON()).toMatchObject({
        ...{ model: "adapted", loras: [{ name: "outlined", scale: 0.8 }] },
      });
      expect((await bytesOf(shown)).equals(without)).toBe(false);
      // The history brings the scale back.
      await scale.fill("");
      await page.getByRole("button", { name: "Use its settings" }).click();
      await vi.waitFor(async () => expect(await scale.inputValue()).toBe("0.8"));
      await page.getByLabel("Model").selectOption("plain");
      expect(await scale.count()).toBe(0);
    } finally {
      await app.close();
    }
  });

  it("cancels", async () => {
    await visit();
    await fill({ prompt: "a circle", size: "256x256", num_inference_steps: "50" });
    const [response] = await Promise.all([
      page.waitForResponse((answer) => answer.request().method() === "POST"),
      drawButton().click(),
    ]);
    const { id } = (await response.json()) as { id: string };
    await page.locator("#cards img[data-step]").waitFor();
    await page.getByRole("button", { name: "Cancel" }).click();
    await whenIdle();
    const job = (await (await fetch(new URL(`v1/jobs/${id}`, address(open)))).json()) as Record<string, unknown>;
    expect(job.status).toBe("cancelled");
    expect(await page.locator("#history li").count()).toBe(0);
    await page.getByText("The drawing is cancelled.").waitFor({ state: "attached" });
    expect(await page.getByRole("button", { name: "Cancel" }).isVisible()).toBe(false);
    // And draws again.
    await fill({ size: "64x64", num_inference_steps: "4" });
    await draw();
  });

  it("keeps a history, over a reload too, and draws again with a seed", async () => {
    await visit();
    await fill({ prompt: "a large blue circle", seed: "11", guidance_scale: "2" });
    await draw();
    const first = await bytesOf(shown);
    await fill({ prompt: "a green square", seed: "" });
    await draw();
    const second = await bytesOf(shown);
    expect(Buffer.compare(first, second)).not.toBe(0);
    await page.reload();
    await whenIdle();
    const items = page.locator("#history li button");
    await items.nth(1).waitFor();
    expect(await items.count()).toBe(2);
    expect(await items.nth(1).textContent()).toBe("seed 11");
    await items.nth(1).click();
    expect(await items.nth(1).getAttribute("aria-current")).toBe("true");
    expect(Buffer.compare(await bytesOf(shown), first)).toBe(0);
    const again = page.getByRole("button", { name: "Again with this seed" });
    const request = await draw(() => again.click());
    expect(request.postDataJSON()).toMatchObject({ prompt: "a large blue circle", seed: 11, n: 1 });
    expect(await field("prompt").inputValue()).toBe("a large blue circle");
    expect(await items.count()).toBe(3);
    expect(Buffer.compare(await bytesOf(shown), first)).toBe(0);
    const [download] = await Promise.all([
      page.waitForEvent("download"),
      page.getByText("Save", { exact: true }).click(),
    ]);
    expect(download.suggestedFilename()).toBe("a-large-blue-circle-11.png");
    expect(await sharp(await download.path()).metadata()).toMatchObject({ format: "png", width: 64, height: 64 });
    await page.getByRole("button", { name: "Clear", exact: true }).click();
    expect(await items.count()).toBe(0);
    await page.reload();
    await whenIdle();
    expect(await items.count()).toBe(0);
  });

  it("bounds its history", async () => {
    await visit();
    await fill({ prompt: "a circle", size: "32x32", n: "10", num_inference_steps: "1" });
    for (let round = 0; round < 6; round++) await draw();
    const items = page.locator("#history li");
    expect(await items.count()).toBe(60);
    const newest = await items.first().textContent();
    await fill({ n: "1" });
    await Promise.all([page.waitForRequest((sent) => sent.method() === "POST"), drawButton().click()]);
    await whenIdle();
    expect(await items.count()).toBe(60);
    expect(await items.nth(1).textContent()).toBe(newest);
    const kept = await page.evaluate(`new Promise((resolve) => {
      indexedDB.open("flowturbo " + location.pathname).onsuccess = ({ target }) => {
        target.result.transaction("pictures").objectStore("pictures").count().onsuccess = (event) => resolve(event.target.result);
      };
    })`);
    expect(kept).toBe(60);
    await page.reload();
    await whenIdle();
    await items.nth(59).waitFor();
    expect(await items.count()).toBe(60);
  });

  /** Lets go of a picture file over the page. */
  async function drop(bytes: Buffer, name: string, type: string): Promise<void> {
    await page.evaluate(`(() => {
      const transfer = new DataTransfer();
      const bytes = Uint8Array.from(atob("${bytes.toString("base64")}"), (letter) => letter.charCodeAt(0));
      transfer.items.add(new File([bytes], "${name}", { type: "${type}" }));
      const init = { dataTransfer: transfer, bubbles: true, cancelable: true };
      document.body.dispatchEvent(new DragEvent("dragover", init));
      document.body.dispatchEvent(new DragEvent("drop", init));
    })()`);
  }
  const original = () => model.generate({ prompt: "a large red square", guidanceScale: 2, seed: 3 });
  const pixelsOf = (url: string) =>
    sharp(Buffer.from(url.split(",")[1]!, "base64"))
      .ensureAlpha()
      .raw()
      .toBuffer();

  it("edits a picture that is dropped, where a mask is painted", async () => {
    await visit();
    const { images } = await original();
    // Twice as large: the page brings it to the size asked for.
    const large = await sharp(images[0]!.data, { raw: { width: 64, height: 64, channels: 3 } })
      .resize(128, 128, { kernel: "nearest" })
      .png()
      .toBuffer();
    await drop(large, "square.png", "image/png");
    const mask = page.locator("#mask");
    await mask.scrollIntoViewIfNeeded();
    const painted = page.locator("#painted");
    expect(await painted.textContent()).toContain("Nothing is painted");
    await field("brush").fill("30");
    const box = (await mask.boundingBox())!;
    const at = (x: number, y: number) => [box.x + (x / 64) * box.width, box.y + (y / 64) * box.height] as const;
    await page.mouse.move(...at(16, 10));
    await page.mouse.down();
    await page.mouse.move(...at(16, 54), { steps: 4 });
    await page.mouse.up();
    expect(await painted.textContent()).toMatch(/^\d+ % is painted/);
    await fill({ prompt: "a green background", seed: "5", guidance_scale: "2" });
    await field("strength").fill("1");
    const body = (await draw()).postDataJSON() as { image: string; mask: string; strength: number; size: string };
    expect(body).toMatchObject({ size: "64x64", strength: 1 });
    const [sent, sentMask] = [await pixelsOf(body.image), await pixelsOf(body.mask)];
    expect(sentMask.length).toBe(4 * 64 * 64);
    const alpha = (x: number, y: number) => sentMask[4 * (64 * y + x) + 3]!;
    // Transparent under the stroke, opaque elsewhere.
    for (const y of [10, 30, 54]) expect(alpha(16, y)).toBe(0);
    for (const [x, y] of [
      [40, 10],
      [60, 60],
      [2, 30],
    ] as const)
      expect(alpha(x, y)).toBe(255);
    const made = await bytesOf(shown);
    let [kept, changed] = [0, 0];
    for (let index = 0; index < made.length; index += 4) {
      const isSame = made.compare(sent, index, index + 3, index, index + 3) === 0;
      if (sentMask[index + 3] === 255) {
        expect(isSame).toBe(true);
        kept += 1;
      } else if (sentMask[index + 3] === 0 && !isSame) changed += 1;
    }
    expect(kept).toBeGreaterThan(2000);
    expect(changed).toBeGreaterThan(300);
    // Erased, it is another request; and "again" has the mask of the first one.
    await page.getByRole("radio", { name: "Erase" }).check();
    await page.mouse.move(...at(16, 10));
    await page.mouse.down();
    await page.mouse.up();
    const second = (await draw()).postDataJSON() as { mask: string };
    expect((await pixelsOf(second.mask))[4 * (64 * 10 + 16) + 3]).toBe(255);
    await page.locator("#history li button").nth(1).click();
    await draw(() => page.getByRole("button", { name: "Again with this seed" }).click());
    expect(Buffer.compare(await bytesOf(shown), made)).toBe(0);
    // Without a mask all of it is drawn anew; without a picture it is no edit.
    await page.locator("#clear-mask").click();
    const third = (await draw()).postDataJSON();
    expect(third).toHaveProperty("image");
    expect(third).not.toHaveProperty("mask");
    await page.getByRole("button", { name: "Remove the picture" }).click();
    expect((await draw()).postDataJSON()).not.toHaveProperty("image");
  });

  it("takes pictures that are pasted, chosen or drawn before, and says what is none", async () => {
    await visit();
    const { images } = await original();
    const png = await images[0]!.toPNG();
    await page.evaluate(`(() => {
      const transfer = new DataTransfer();
      const bytes = Uint8Array.from(atob("${png.toString("base64")}"), (letter) => letter.charCodeAt(0));
      transfer.items.add(new File([bytes], "square.png", { type: "image/png" }));
      document.body.dispatchEvent(new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true, cancelable: true }));
    })()`);
    await page.locator("#source").waitFor();
    await page.getByRole("button", { name: "Remove the picture" }).click();
    expect(await page.locator("#source").isVisible()).toBe(false);
    await field("image").setInputFiles({
      name: "wide.png",
      mimeType: "image/png",
      buffer: await sharp(png).resize(300, 150, { fit: "fill" }).toBuffer(),
    });
    await page.locator("#source").waitFor();
    // Sizes have its shape, too.
    const shape = page.locator("[name=size] option", { hasText: "the picture’s shape" });
    expect(await shape.getAttribute("value")).toBe("96x48");
    await fill({ prompt: "a blue square", size: "96x48" });
    expect(
      await sharp(
        Buffer.from(((await draw()).postDataJSON() as { image: string }).image.split(",")[1]!, "base64"),
      ).metadata(),
    ).toMatchObject({ width: 96, height: 48 });
    const before = await bytesOf(shown);
    await page.locator("#cards").getByRole("button", { name: "Edit" }).click();
    await page.getByRole("button", { name: "Paint everything" }).click();
    const body = (await draw()).postDataJSON() as { image: string; mask: string };
    expect(Buffer.compare(await pixelsOf(body.image), before)).toBe(0);
    expect((await pixelsOf(body.mask)).every((value, index) => index % 4 !== 3 || value === 0)).toBe(true);
    await drop(Buffer.from("no picture"), "text.png", "image/png");
    await page.getByText("This file is not a picture that the browser can read.").waitFor();
    expect(await field("image").getAttribute("aria-invalid")).toBe("true");
  });

  it("asks for the key after a 401, and keeps it for the tab alone", async () => {
    expected = [/401/];
    await visit(locked, {}, false);
    const dialog = page.getByRole("dialog");
    await dialog.getByText("Expected a valid key").waitFor();
    expect(await page.locator("#draw").getAttribute("aria-disabled")).toBe("true");
    await page.getByRole("textbox", { name: "Key" }).fill("a wrong key");
    await page.keyboard.press("Enter");
    await page.getByText("The server does not know this key.").waitFor();
    await page.getByRole("textbox", { name: "Key" }).fill(apiKey);
    await page.getByRole("button", { name: "Use the key" }).click();
    await whenIdle();
    expect(await dialog.isVisible()).toBe(false);
    await fill({ prompt: "a circle" });
    await draw();
    expect(await page.evaluate("Object.values(sessionStorage).join()")).toContain(apiKey);
    expect(await page.evaluate("Object.values(localStorage).join() + document.cookie")).toBe("");
    await page.reload();
    await whenIdle();
    // Another tab is asked again; who has no key can try later.
    const other = await context!.newPage();
    await other.goto(address(locked));
    await other.getByRole("dialog").waitFor();
    await other.getByRole("button", { name: "Not now" }).click();
    await other.getByText("The server cannot be used.").waitFor();
    await other.getByRole("button", { name: "Try again" }).click();
    await other.getByRole("dialog").waitFor();
  });

  it("shows errors at the field that is wrong", async () => {
    expected = [/400/];
    await visit();
    await fill({ prompt: "a circle", blocks: "Q9" });
    await drawButton().click();
    const alert = page.getByRole("alert");
    await alert.getByText('but received "Q9"').waitFor();
    expect(await page.evaluate("document.activeElement.name")).toBe("blocks");
    expect(await field("blocks").getAttribute("aria-invalid")).toBe("true");
    // What is wrong stays wrong: nothing is offered.
    expect(await alert.getByRole("button").count()).toBe(0);
    await fill({ blocks: "", size: "own", width: "56", height: "1000" });
    await openDetails("More");
    await drawButton().click();
    await page.locator("[name=width][aria-invalid]").waitFor();
    await fill({ size: "64x64" });
    await draw();
    expect(await page.locator("[aria-invalid]").count()).toBe(0);
  });

  /** Answers requests for `/v1/jobs` with an error, so many times. */
  async function refuse(times: number, status: number, headers: Record<string, string>): Promise<() => number> {
    let count = 0;
    expected = [new RegExp(String(status))];
    await page.route("**/v1/jobs", (route) => {
      count += 1;
      if (count > times) return route.continue();
      const error = { message: "64 requests wait already.", type: "rate_limit_error", param: null, code: "queue_full" };
      return route.fulfill({
        status,
        headers: { "content-type": "application/json", ...headers },
        body: JSON.stringify({ error }),
      });
    });
    return () => count;
  }

  it("tries once more when there is room, and then leaves it to the person", async () => {
    await visit();
    await fill({ prompt: "a circle" });
    const count = await refuse(3, 429, { "retry-after": "2", "retry-after-ms": "1200" });
    const start = Date.now();
    await drawButton().click();
    await page.locator("#status", { hasText: "64 requests wait already. There will be room in about 1.2 s" }).waitFor();
    await page.getByRole("alert").getByText("64 requests wait already. There will be room in about 1.2 s.").waitFor();
    expect(Date.now() - start).toBeGreaterThanOrEqual(1200);
    expect(count()).toBe(2);
    // The third is refused, waits, and is drawn.
    await page.getByRole("button", { name: "Try again" }).click();
    await page.locator("#cards figcaption").waitFor();
    expect(count()).toBe(4);
    await page.unroute("**/v1/jobs");
  });

  it("stops waiting for room", async () => {
    await visit();
    await fill({ prompt: "a circle" });
    const count = await refuse(9, 429, { "retry-after": "50", "retry-after-ms": "50000" });
    await drawButton().click();
    await page.locator("#status", { hasText: "There will be room in about 50 s" }).waitFor();
    await page.getByRole("button", { name: "Cancel" }).click();
    await whenIdle();
    expect(count()).toBe(1);
  });

  it("waits for a model that loads", async () => {
    expected = [/503/];
    let loaded!: (model: FlowTurbo) => void;
    const loading = await serve({
      models: {
        shapes: new Promise<FlowTurbo>((resolve) => {
          loaded = resolve;
        }),
      },
    });
    onTestFinished(() => loading.close());
    await visit(loading, {}, false);
    await page.getByText("The model is loading…").waitFor();
    expect(await page.locator("#draw").getAttribute("aria-disabled")).toBe("true");
    loaded(model);
    await whenIdle();
    await fill({ prompt: "a circle" });
    await draw();
  });

  it("reads on after the last event when the connection is lost", async () => {
    expected = [/ERR_/];
    await visit();
    await fill({ prompt: "a circle", num_inference_steps: "12" });
    const ids: (string | undefined)[] = [];
    await page.route("**/events", async (route) => {
      ids.push(route.request().headers()["last-event-id"]);
      if (ids.length === 1) return route.abort("connectionreset");
      if (ids.length > 2) return route.continue();
      // The second one breaks off within the third event.
      const response = await route.fetch();
      const events = (await response.text()).split("\n\n");
      return route.fulfill({ response, body: `${events.slice(0, 2).join("\n\n")}\n\n${events[2]!.slice(0, -5)}` });
    });
    await draw();
    expect(ids).toEqual([undefined, undefined, "2"]);
    expect(await page.locator("#facts summary").textContent()).toContain("12 evaluations");
  });

  it("follows a drawing again after a reload", async () => {
    await visit();
    await fill({ prompt: "a circle", size: "256x256", num_inference_steps: "15", seed: "21" });
    await drawButton().click();
    await page.locator("#cards img[data-step]").waitFor();
    const asked: string[] = [];
    page.on("request", (sent) => asked.push(`${sent.method()} ${sent.url().split("/").at(-1)}`));
    await page.reload();
    await page.locator("#cards figcaption", { hasText: "seed 21" }).waitFor();
    expect(asked).toContain("GET events");
    expect(asked).not.toContain("POST jobs");
    expect(await page.evaluate("sessionStorage.length")).toBe(0);
  });

  it("shows several pictures, each with its seed", async () => {
    await visit();
    await fill({ prompt: "a circle", n: "3", seed: "30" });
    await draw();
    expect(await page.locator("#cards figcaption").allTextContents()).toEqual(
      [30, 31, 32].map((seed) => `64 × 64, seed ${seed}`),
    );
    expect(await page.locator("#history [aria-current]").count()).toBe(3);
  });

  it("can be used with the keyboard alone", async () => {
    await visit();
    /** Presses Tab until an element has the focus; each on the way shows it. */
    const tabTo = async (test: string) => {
      for (let press = 0; press < 60; press++) {
        await page.keyboard.press("Tab");
        const outline = await page.evaluate(`(() => {
          const focused = document.activeElement;
          const shown = focused.type === "radio" ? focused.nextElementSibling : focused;
          const { outlineStyle, outlineWidth } = getComputedStyle(shown);
          return focused === document.body ? null : outlineStyle + " " + outlineWidth;
        })()`);
        if (outline !== null) expect(outline).toBe("solid 3px");
        if (await page.evaluate(`document.activeElement.matches(${JSON.stringify(test)})`)) return;
      }
      throw new Error(`The focus never came to ${test}.`);
    };
    await tabTo("[name=prompt]");
    await page.keyboard.type("a small yellow circle");
    await tabTo("[name=quality]");
    await page.keyboard.press("ArrowLeft");
    await tabTo("[name=seed]");
    await page.keyboard.type("8");
    await tabTo("#draw");
    const request = await draw(() => page.keyboard.press("Enter"));
    expect(request.postDataJSON()).toMatchObject({ prompt: "a small yellow circle", quality: "low", seed: 8 });
    expect(await page.evaluate("document.activeElement.id")).toBe("draw");
    await tabTo("#cards .buttons button:last-child");
    await page.keyboard.press("Enter");
    await page.locator("#source").waitFor();
    // The mask without a pointer: a rectangle by numbers.
    await tabTo("#editor summary");
    await page.keyboard.press("Enter");
    for (const [name, value] of Object.entries({ left: "8", top: "16", across: "24", down: "32" })) {
      await tabTo(`[name=${name}]`);
      await page.keyboard.press("Control+A");
      await page.keyboard.type(value);
    }
    await tabTo("#rectangle");
    await page.keyboard.press("Space");
    expect(await page.locator("#painted").textContent()).toMatch(/^19 % is painted/);
    const body = (await draw(() => page.keyboard.press("Control+Enter"))).postDataJSON() as { mask: string };
    const mask = await pixelsOf(body.mask);
    for (let y = 0; y < 64; y++)
      for (let x = 0; x < 64; x++)
        expect(mask[4 * (64 * y + x) + 3]).toBe(x >= 8 && x < 32 && y >= 16 && y < 48 ? 0 : 255);
    // Cancelled with the keyboard, the focus is not lost.
    await page.locator("[name=size]").selectOption("256x256");
    await page.locator("#draw").focus();
    await page.keyboard.press("Enter");
    await tabTo("#cancel");
    await page.keyboard.press("Enter");
    await whenIdle();
    expect(await page.evaluate("document.activeElement.id")).toBe("draw");
  });

  it("fits a phone, and a finger paints", async () => {
    // Without motion, so that nothing scrolls while the finger paints.
    await visit(open, { ...phone, reducedMotion: "reduce" });
    const overflow = () => page.evaluate("document.documentElement.scrollWidth - innerWidth");
    await fill({
      prompt: "a large red square with a name_that_is_much_too_long_for_the_line_that_it_is_on_and_never_breaks",
      n: "2",
    });
    await openDetails("More");
    expect(await overflow()).toBe(0);
    await draw();
    await page.locator("#facts summary").click();
    expect(await overflow()).toBe(0);
    const [form, result] = await Promise.all(["#form", "#result"].map((id) => page.locator(id).boundingBox()));
    expect(result!.y).toBeGreaterThanOrEqual(form!.y + form!.height);
    await page.locator("#cards").getByRole("button", { name: "Edit" }).first().click();
    await page.locator("#mask").evaluate("(mask) => mask.scrollIntoView({ block: 'center', behavior: 'instant' })");
    expect(await overflow()).toBe(0);
    const scrolled = await page.evaluate("scrollY");
    const { x, y, width, height } = (await page.locator("#mask").boundingBox())!;
    const touch = await context!.newCDPSession(page);
    const points = [0.2, 0.4, 0.6, 0.8].map((part) => ({ x: x + width / 2, y: y + part * height }));
    for (const [index, point] of points.entries())
      await touch.send("Input.dispatchTouchEvent", {
        type: index === 0 ? "touchStart" : "touchMove",
        touchPoints: [point],
      });
    // Before the text below has another number of lines.
    expect(await page.evaluate("scrollY")).toBe(scrolled);
    await touch.send("Input.dispatchTouchEvent", { type: "touchEnd", touchPoints: [] });
    await page.locator("#painted", { hasText: "% is painted" }).waitFor();
    const painted = Number.parseInt((await page.locator("#painted").textContent())!, 10);
    expect(painted).toBeGreaterThan(8);
    expect(painted).toBeLessThan(20);
  });

  describe.each<[string, BrowserContextOptions]>([
    ["light", { colorScheme: "light" }],
    ["dark", { colorScheme: "dark" }],
    ["on a phone", { ...phone, colorScheme: "dark" }],
  ])("%s", (_, options) => {
    /** Fails where axe finds something. */
    async function expectAccessible(state: string): Promise<void> {
      await page.evaluate(axe);
      const { violations, passes } = (await page.evaluate("axe.run()")) as Record<
        "violations" | "passes",
        { id: string; nodes: { html: string; failureSummary: string }[] }[]
      >;
      const found = violations.flatMap(({ id, nodes }) =>
        nodes.map((node) => `${id}: ${node.html} ${node.failureSummary}`),
      );
      expect([state, ...found]).toEqual([state]);
      expect(passes.map(({ id }) => id)).toContain("color-contrast");
    }

    it("is accessible in every state", async () => {
      expected = [/400|401/];
      await visit(open, options);
      await expectAccessible("empty");
      await fill({ prompt: "a large red square", size: "256x256", num_inference_steps: "50", n: "2" });
      await drawButton().click();
      await page.locator("#cards img[data-step]").first().waitFor();
      await expectAccessible("drawing");
      await page.getByRole("button", { name: "Cancel" }).click();
      await whenIdle();
      await fill({ size: "64x64", num_inference_steps: "", blocks: "H1P2R2" });
      await draw();
      await page.locator("#facts summary").click();
      await page.locator("#cards").getByRole("button", { name: "Edit" }).first().click();
      await page.getByRole("button", { name: "Paint everything" }).click();
      await openDetails("Rectangle by numbers");
      await field("size").selectOption("own");
      await expectAccessible("drawn, with everything open");
      await fill({ blocks: "Q9" });
      await drawButton().click();
      await page.locator(".alert").waitFor();
      await expectAccessible("an error");
      await visit(locked, options, false);
      await page.getByRole("dialog").waitFor();
      await expectAccessible("the key");
    });
  });
});
