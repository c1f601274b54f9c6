import { availableParallelism } from "node:os";
import { defineConfig } from "vitest/config";

export default defineConfig({
  test: {
    // Native addons in worker threads can crash the run: processes instead.
    pool: "forks",
    // On two cores Vitest would take one process, which half of the time waits for processes and engines.
    maxWorkers: Math.max(2, availableParallelism() - 1),
    include: ["test/**/*.test.ts"],
    globalSetup: "test/support/native-setup.ts",
    testTimeout: 60_000,
    hookTimeout: 120_000,
    // CI counts from the file.
    reporters: process.env.CI ? ["default", ["json", { outputFile: ".cache/test-results.json" }]] : ["default"],
  },
});
