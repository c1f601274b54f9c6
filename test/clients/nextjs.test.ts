// examples/nextjs/route.js as Next.js calls it: with Request objects of the platform.
import path from "node:path";
import { pathToFileURL } from "node:url";
import { afterAll, beforeAll, describe, expect, it, vi } from "vitest";
import { FlowTurbo } from "../../lib/index.js";
import { root } from "../support/fixtures.js";
import { pixelsIn, pixelsOf } from "./pictures.js";

interface Route {
  readonly runtime: string;
  GET(request: Request): Promise<Response>;
}

const shared = globalThis as { flowturboModel?: Promise<FlowTurbo> | undefined };
let route: Route;
let model: FlowTurbo;
beforeAll(async () => {
  route = await import(pathToFileURL(path.join(root, "examples/nextjs/route.js")).href);
  model = await FlowTurbo.load(undefined, { measureCosts: false });
});
afterAll(async () => {
  await model.dispose();
  await (await shared.flowturboModel)?.dispose();
});

const get = (query: string, signal?: AbortSignal) =>
  route.GET(new Request(`http://localhost/api/image?${query}`, signal ? { signal } : {}));

describe("examples/nextjs/route.js", () => {
  it("draws a PNG with one model for all requests", async () => {
    const [first, second] = await Promise.all(
      [7, 8].map((seed) => get(`prompt=a+red+circle&seed=${seed}&steps=3&guidanceScale=2`)),
    );
    const expected = await model.generate({ prompt: "a red circle", seed: 7, count: 2, steps: 3, guidanceScale: 2 });
    for (const [index, response] of [first!, second!].entries()) {
      expect(response.status).toBe(200);
      expect(response.headers.get("content-type")).toBe("image/png");
      expect(response.headers.get("x-seed")).toBe(String(7 + index));
      const picture = new Uint8Array(await response.arrayBuffer());
      expect(await pixelsOf(picture)).toEqual(pixelsIn(expected.images[index]!));
    }
    expect(route.runtime).toBe("nodejs");
  });

  it.each([
    ["prompt=x&width=60", /width/],
    ["prompt=x&steps=many", /steps/],
    ["steps=3", /prompt/],
    ["prompt=x&steps=51", /at most 50/],
    ["prompt=x&count=99", /no parameter "count"/],
    ["prompt=x&image=/etc/passwd", /no parameter "image"/],
  ])("refuses %s", async (query, message) => {
    const response = await get(query);
    expect(response.status).toBe(400);
    expect(((await response.json()) as { message: string }).message).toMatch(message);
  });

  it("ends the work of a client that has gone", async () => {
    const drawing = await shared.flowturboModel!;
    const controller = new AbortController();
    const answer = get("prompt=x&width=256&height=256&steps=50", controller.signal);
    await expect.poll(() => drawing.stats().running.requests).toBe(1);
    controller.abort();
    expect((await answer).status).toBe(499);
    await expect.poll(() => drawing.stats().running.requests).toBe(0);
    expect(drawing.stats().requests.aborted).toBe(1);
  });

  it("answers 503 while nothing can be drawn, and loads the model again", async () => {
    const logged = vi.spyOn(console, "error").mockImplementation(() => {});
    await (await shared.flowturboModel!).dispose();
    expect((await get("prompt=x&steps=1")).status).toBe(503);
    shared.flowturboModel = Promise.reject(new Error("not there"));
    expect((await get("prompt=x&steps=1")).status).toBe(500);
    expect((await get("prompt=x&steps=1")).status).toBe(200);
    expect(logged).toHaveBeenCalledTimes(2);
    logged.mockRestore();
  });
});
