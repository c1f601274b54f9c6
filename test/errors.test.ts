// One table of errors: the classes, the public exports and the README agree.
import { readFileSync } from "node:fs";
import path from "node:path";
import * as api from "flowturbo";
import { expect, it } from "vitest";
import * as errors from "../lib/errors.js";

const { errorTable, FlowTurboError } = errors;
const readme = readFileSync(path.join(import.meta.dirname, "../README.md"), "utf8");
const classes = Object.entries(errors).filter(
  ([, value]) => typeof value === "function" && (value === FlowTurboError || value.prototype instanceof FlowTurboError),
);

it("every class is exported by the package", () => {
  expect(classes.length).toBeGreaterThan(15);
  for (const [name] of classes) expect(api, name).toHaveProperty(name);
});

it("every class but the base has a code, and every code one class", () => {
  const named = classes.map(([name]) => name).filter((name) => name !== "FlowTurboError");
  const types = Object.values(errorTable).map(({ type }) => type.name);
  expect([...new Set(types)].sort()).toEqual(named.sort());
  // A limit that others prevent, and one that cannot be met, are told apart by the code; so is a GPU that comes back, and a hub that does.
  expect(types.filter((name, index) => types.indexOf(name) !== index)).toEqual([
    "HubError",
    "DeviceLostError",
    "DeadlineError",
  ]);
});

it("an error has the code that the table has for its class", () => {
  const made: errors.FlowTurboError[] = [
    new errors.OptionError("o", "m"),
    new errors.InstallationError("p", "r", "m"),
    new errors.CheckpointError("p", "m"),
    new errors.HubError("o/n", "gated", "m"),
    new errors.HubError("o/n", "unreachable", "m"),
    new errors.RuntimeError("m"),
    new errors.RuntimeDiedError("m", 1, null),
    new errors.RuntimeUnavailableError("r", "m"),
    new errors.CompileError("g", "m"),
    new errors.MemoryError("m", 2, 1),
    new errors.CacheError("p", "m"),
    new errors.NotFiniteError("w", "m"),
    new errors.LaunchError("g", "m"),
    new errors.DeviceLostError("m"),
    new errors.DeviceLostError("m", { permanent: false }),
    new errors.OutputError("p", "m"),
    new errors.DeadlineError("m", { deadlineMs: 1, bestMs: 2, blocks: "H1", retryAfterMs: 1 }),
    new errors.DeadlineError("m", { deadlineMs: 1, bestMs: 2, blocks: "H1", retryAfterMs: null }),
    new errors.QueueFullError("m", 1, 2),
    new errors.DisposedError("This"),
    new errors.DrainingError("This"),
    new errors.TimeoutError(1),
    new errors.RedisError("m"),
    new errors.FleetEmptyError("m"),
    new errors.FleetFormatError(2, 1),
    new errors.PoisonousJobError("j", ["a", "b"]),
  ];
  expect(made.map(({ code }) => code).sort()).toEqual(Object.keys(errorTable).sort());
  for (const error of made) {
    expect(error.constructor).toBe(errorTable[error.code].type);
    expect(error.name).toBe(error.constructor.name);
  }
});

it("statuses are those of HTTP's errors, and what can be tried again is no fault of the caller's", () => {
  for (const [code, { status, retryable }] of Object.entries(errorTable)) {
    expect(status, code).toBeGreaterThanOrEqual(400);
    expect(status, code).toBeLessThan(600);
    if (retryable) expect(status === 429 || status >= 500, code).toBe(true);
  }
});

it("the README names every code, and no other", () => {
  const mentioned = new Set(readme.match(/ERR_FLOWTURBO_[A-Z_]+/g));
  expect([...mentioned].sort()).toEqual(Object.keys(errorTable).sort());
});
