// bench:webgpu on SwiftShader, and where there is no adapter.
import { spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import path from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { root } from "../support/fixtures.js";
import { noSwiftShader, swiftShaderEnv } from "../support/swiftshader.js";

let folder: string;
beforeAll(() => {
  folder = mkdtempSync(path.join(tmpdir(), "flowturbo-bench-webgpu-"));
});
afterAll(() => rmSync(folder, { recursive: true }));

function bench(args: readonly string[], env: Readonly<Record<string, string>>) {
  const tsx = [path.join(root, "node_modules/tsx/dist/cli.mjs"), "--tsconfig", path.join(root, "bench/tsconfig.json")];
  return spawnSync(process.execPath, [...tsx, path.join(root, "bench/webgpu.ts"), ...args], {
    cwd: root,
    encoding: "utf8",
    env: { ...process.env, FLOWTURBO_BENCH_RESULTS: folder, ...env },
  });
}

describe("bench:webgpu", () => {
  it.skipIf(noSwiftShader)("measures each graph, and says that software is no GPU", { timeout: 300_000 }, () => {
    const { status, stderr } = bench(
      ["--graphs", "scale_noise,preview.guidance,refine", "--rounds", "1"],
      swiftShaderEnv,
    );
    expect({ status, stderr: status === 0 ? "" : stderr }).toEqual({ status: 0, stderr: "" });
    const { rows, software } = JSON.parse(readFileSync(path.join(folder, "webgpu.json"), "utf8"));
    expect(software).toBe(true);
    expect(new Set(rows.map(({ graph }: { graph: string }) => graph))).toEqual(
      new Set(["scale_noise", "preview.guidance", "refine"]),
    );
    for (const row of rows) {
      expect(row.onDevice).toBeGreaterThan(0);
      expect(row.misplaced).toEqual([]);
      expect(row.error).toBeLessThan(1e-4);
    }
    expect(readFileSync(path.join(folder, "webgpu.md"), "utf8")).toContain("software, not a GPU");
  });

  it.runIf(process.platform === "linux")("ends with 3 where there is no adapter", () => {
    const none = { VK_DRIVER_FILES: "/nowhere.json", VK_ICD_FILENAMES: "/nowhere.json" };
    const { status, stderr } = bench([], none);
    expect(stderr).toMatch(/^Nothing was measured\. WebGPU finds no GPU here\./);
    expect(status).toBe(3);
  });
});
