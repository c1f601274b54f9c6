// What the benchmark against peers keeps between runs.
import { mkdtempSync, writeFileSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { expect, it } from "vitest";
import { State } from "../../bench/peers/state.js";

const file = () => path.join(mkdtempSync(path.join(os.tmpdir(), "flowturbo-state-")), "a/state.json");

it("a run goes on with the results of one that was interrupted", () => {
  const at = file();
  const first = new State(at, { commit: "a" }, false);
  expect(first.has("x")).toBe(false);
  first.set("x", { ratio: 2 });
  first.set("nothing to measure", null);
  const second = new State(at, { commit: "a" }, false);
  expect(second.get("x")).toEqual({ ratio: 2 });
  expect(second.has("nothing to measure")).toBe(true);
  expect(second.size).toBe(2);
});

it("results of another commit, of a fresh start or of a torn file are not taken", () => {
  const at = file();
  new State(at, { commit: "a" }, false).set("x", 1);
  expect(new State(at, { commit: "b" }, false).size).toBe(0);
  expect(new State(at, { commit: "a" }, true).size).toBe(0);
  writeFileSync(at, "{");
  expect(new State(at, { commit: "a" }, false).size).toBe(0);
});
