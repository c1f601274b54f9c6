// However a process or a thread ends while a program runs on the (simulated) GPU, it ends as Node would.
import { mkdtempSync, rmSync } from "node:fs";
import path from "node:path";
import { build } from "esbuild";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { root } from "../support/fixtures.js";
import { describeAddons, startNode } from "./support.js";

let folder = "";
const script = () => path.join(folder, "test/native/ending.js");
beforeAll(async () => {
  folder = mkdtempSync(path.join(root, "node_modules/.flowturbo-ending-"));
  await build({
    entryPoints: [path.join(root, "test/native/ending.ts")],
    outfile: script(),
    bundle: true,
    platform: "node",
    format: "esm",
    packages: "external",
    // Two folders up, as in the sources.
    define: { "import.meta.dirname": JSON.stringify(path.join(root, "test/support")) },
    logLevel: "error",
  });
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

describeAddons("a process with a program on the GPU", () => {
  describe.each(["tensorrt", "tensorrt-rtx"])("on %s", (kind) => {
    const run = (way: string) => startNode([script(), way, kind]);

    it("ends with its own code after process.exit during a run", async () => {
      const start = performance.now();
      expect(await run("exit").finished).toMatchObject({ code: 7, signal: null, stderr: "" });
      expect(performance.now() - start).toBeLessThan(15_000);
    });

    it("ends with Node's code and message after an uncaught exception", async () => {
      const { code, signal, stderr } = await run("throw").finished;
      expect({ code, signal }).toEqual({ code: 1, signal: null });
      expect(stderr).toContain("uncaught, as the test wants");
    });

    it.each(["SIGINT", "SIGTERM", "SIGKILL"] as const)("ends by %s", async (signal) => {
      const { child, finished } = run("wait");
      child.stdout.once("data", () => child.kill(signal));
      expect(await finished).toMatchObject({ code: null, signal });
    });

    it("ends by itself when nothing is under way, though nothing was disposed of", async () => {
      expect(await run("idle").finished).toMatchObject({ code: 0, stdout: "2\n", stderr: "" });
    });

    it("leaves nothing of ten threads that load, use and end, or are terminated during a run", async () => {
      const { code, signal, stdout, stderr } = await run("workers").finished;
      expect({ code, signal, stderr }).toEqual({ code: 0, signal: null, stderr: "" });
      expect(JSON.parse(stdout)).toEqual({ left: {}, violation: "" });
    }, 120_000);
  });
});
