import { describe, expect, it } from "vitest";
import { graphKey, graphName, keysOf, loraRanks, networks } from "../../lib/networks/index.js";

describe("names of graphs", () => {
  const keys = Object.keys(networks).flatMap((network) =>
    keysOf(network, {
      ...{ guidance: [true, false], skip: [true, false], masked: [true, false] },
      ...{
        lora: [undefined, ...loraRanks],
        controls: [undefined, "0a1b", "0a1b+ff"],
        skipped: [undefined, "1", "7+8"],
      },
    }),
  );

  it("are one for each key, and give the key back", () => {
    const names = keys.map(graphName);
    expect(new Set(names).size).toBe(keys.length);
    for (const [index, name] of names.entries()) {
      const present = Object.entries(keys[index]!).filter(([, value]) => value !== false && value !== undefined);
      expect(graphKey(name)).toEqual(Object.fromEntries(present));
    }
    expect(names).toContain("predict.guidance");
    expect(names).toContain("predict");
    expect(names).toContain("clip_l.masked.skip");
    expect(names).toContain("predict.controls-0a1b+ff.guidance.lora-16.skipped-7+8");
  });

  it.each([
    ["predict.bogus", /"bogus"/],
    ["vae_decoder.guidance", /vae_decoder has no variant "guidance"/],
    ["nothing", /no network "nothing"/],
    ["toString", /no network "toString"/],
    ["predict.", /variant ""/],
    ["predict.guidance.guidance", /no name/],
    ["", /no network ""/],
    ["predict.lora-7", /rank 7/],
    ["predict.lora-16+8", /rank NaN/],
    ["refine.guidance.skipped-1", /refine has no variant "skipped"/],
    ["t5.skip", /t5 has no variant "skip"/],
  ])("refuse %j", (name, message) => {
    expect(() => graphKey(name)).toThrow(RangeError);
    expect(() => graphKey(name)).toThrow(message);
  });
});
