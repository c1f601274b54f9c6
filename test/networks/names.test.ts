import { describe, expect, it } from "vitest";
import { graphKey, graphName, keysOf, networks } from "../../lib/networks/index.js";

describe("names of graphs", () => {
  const keys = Object.keys(networks).flatMap((network) =>
    keysOf(network, { guidance: [true, false], skip: [true, false], masked: [true, false] }),
  );

  it("are one for each key, and give the key back", () => {
    const names = keys.map(graphName);
    expect(new Set(names).size).toBe(keys.length);
    for (const [index, name] of names.entries()) {
      const present = Object.entries(keys[index]!).filter(([, value]) => value !== false);
      expect(graphKey(name)).toEqual(Object.fromEntries(present));
    }
    expect(names).toContain("predict.guidance");
    expect(names).toContain("predict");
    expect(names).toContain("clip_l.masked.skip");
  });

  it.each([
    ["predict.bogus", /"bogus"/],
    ["vae_decoder.guidance", /vae_decoder has no variant "guidance"/],
    ["nothing", /no network "nothing"/],
    ["toString", /no network "toString"/],
    ["predict.", /variant ""/],
    ["predict.guidance.guidance", /no name/],
    ["", /no network ""/],
    ["t5.skip", /t5 has no variant "skip"/],
  ])("refuse %j", (name, message) => {
    expect(() => graphKey(name)).toThrow(RangeError);
    expect(() => graphKey(name)).toThrow(message);
  });
});
