// The page that lists the benchmarks' pages is the one that `npm run bench -- --page` writes, and lists all of them.
import { readdirSync } from "node:fs";
import path from "node:path";
import { expect, it } from "vitest";
import { benchmarks, measurements } from "../../bench/pages.js";
import { root } from "../support/fixtures.js";
import { read } from "./documents.js";

const folder = path.join(root, "bench/results");
const { scripts } = JSON.parse(read("package.json")) as { scripts: Record<string, string> };

it("the list of measurements is as it is written", () => {
  expect(read("bench/results/README.md")).toBe(measurements(folder));
});

it("every page of bench/results is listed", () => {
  // Trials of the quality benchmark (--quick) are no measurements.
  const isPage = (file: string) => file.endsWith(".md") && file !== "README.md" && !file.includes("-quick");
  const pages = readdirSync(folder).filter(isPage);
  for (const page of pages) expect(measurements(folder)).toContain(`(${page})`);
});

it("every benchmark has a script, and every script that writes a page is a benchmark", () => {
  const named = Object.keys(scripts).flatMap((name) => name.match(/^bench:(.+)/)?.[1] ?? []);
  for (const { name } of benchmarks) expect(named).toContain(name);
  const others = named.filter((name) => !benchmarks.some((benchmark) => benchmark.name === name));
  // How the others are run, and a test that runs longer.
  expect(others.sort()).toEqual(["run", "soak"]);
});
