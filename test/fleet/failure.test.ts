// Errors arrive as they were thrown.
import { describe, expect, it } from "vitest";
import * as errors from "../../lib/errors.js";
import { failureFromJson, failureToJson } from "../../lib/fleet/failure.js";

const each = [
  new errors.OptionError("image", "The picture at /secret cannot be read.", { publicMessage: "It cannot be read." }),
  new errors.InstallationError("sharp", "It is missing.", "Install it."),
  new errors.CheckpointError("/model", "The file /model is damaged."),
  new errors.HubError("a/b", "gated", "It is gated."),
  new errors.RuntimeError("It failed."),
  new errors.RuntimeDiedError("It ended.", null, "SIGKILL", true),
  new errors.RuntimeUnavailableError("tensorrt", "There is none."),
  new errors.CompileError("predict", "It cannot be built.", ["line"]),
  new errors.MemoryError("It is too large.", Number.NaN, 5),
  new errors.NotFiniteError("block 3", "It overflows."),
  new errors.LaunchError(null, "It failed.", ["a", "b"]),
  new errors.DeviceLostError("It is lost."),
  new errors.DeviceLostError("It is lost.", { permanent: false }),
  new errors.DeadlineError("Too late.", { deadlineMs: 5, bestMs: 9, blocks: "E1", retryAfterMs: 3 }),
  new errors.DeadlineError("Never.", { deadlineMs: 5, bestMs: 9, blocks: "E1", retryAfterMs: null }),
  new errors.TimeoutError(5),
  new errors.QueueFullError("Full.", 3, 70),
  new errors.DisposedError("It"),
  new errors.DrainingError("It"),
  new errors.PoisonousJobError("j", ["a", "b"]),
  new errors.FleetFormatError(2, 1),
  new errors.FleetEmptyError("None."),
  new errors.RedisError("Away."),
];

describe("an error across Redis", () => {
  it.each(each.map((error) => [`${error.name} ${error.code}`, error] as const))("%s", (_name, error) => {
    const back = failureFromJson(JSON.parse(JSON.stringify(failureToJson(error))));
    expect(back).toBeInstanceOf(error.constructor);
    expect(back).toBeInstanceOf(errors.FlowTurboError);
    expect(back).toMatchObject({ name: error.name, code: error.code, message: error.message });
    expect(back.publicMessage).toBe(error.publicMessage);
    // NaN has no JSON.
    expect(JSON.parse(JSON.stringify(back))).toEqual(JSON.parse(JSON.stringify(error)));
  });

  it("of another package says nothing to clients", () => {
    const back = failureFromJson(JSON.parse(JSON.stringify(failureToJson(new TypeError("secret")))));
    expect(back).toBeInstanceOf(errors.RuntimeError);
    expect(back.message).toContain("secret");
    expect(back.publicMessage).not.toContain("secret");
  });

  it.each([
    null,
    1,
    "x",
    {},
    { code: "toString", message: 1 },
    { code: "ERR_FLOWTURBO_OPTION", fields: { __proto__: { a: 1 }, code: "x" } },
  ])("that was written by nobody is an error all the same: %j", (json) => {
    const back = failureFromJson(json);
    expect(back).toBeInstanceOf(errors.FlowTurboError);
    expect(typeof back.code).toBe("string");
  });
});
