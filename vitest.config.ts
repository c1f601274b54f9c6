import { defineConfig } from "vitest/config";

export default defineConfig({
  test: {
    // Native addons in worker threads can crash the run: processes instead.
    pool: "forks",
    include: ["test/**/*.test.ts"],
    globalSetup: "test/support/native-setup.ts",
    testTimeout: 60_000,
    hookTimeout: 120_000,
    // CI counts from the file.
    reporters: process.env.CI ? ["default", ["json", { outputFile: ".cache/test-results.json" }]] : ["default"],
  },
});
