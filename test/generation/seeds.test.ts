// Seeds of 64 bits and lists of seeds: each picture is the one that its seed draws alone, and says its seed exactly.
import { FlowTurbo, type GenerateOptions, OptionError, requestFromJson, resultFromJson, resultToJson } from "flowturbo";
import { afterAll, beforeAll, expect, it } from "vitest";

let model: FlowTurbo;
beforeAll(async () => {
  model = await FlowTurbo.load(undefined, { measureCosts: false });
});
afterAll(() => model.dispose());

const small = { prompt: "a red circle", width: 32, height: 32, steps: 1, pinBatch: 1, include: ["latents"] } as const;
const draw = (options: Partial<GenerateOptions>) => model.generate({ ...small, ...options });
const latentsOf = async (options: Partial<GenerateOptions>) => (await draw(options)).latents!.data;
const large = 6687881544318117707n;

it("a seed draws what its low 32 bits draw, as a BigInt, text or number", async () => {
  const low = await latentsOf({ seed: Number(large & 0xffffffffn) });
  for (const seed of [large, String(large), large & 0xffffffffn]) expect(await latentsOf({ seed })).toEqual(low);
  expect(await latentsOf({ seed: large + 1n })).not.toEqual(low);
});

it("picture k has the seed + k, exactly, and 0 follows the largest", async () => {
  for (const [seed, seeds] of [
    [2 ** 53 - 2, [2 ** 53 - 2, 2 ** 53 - 1, 2n ** 53n]],
    [2n ** 64n - 2n, [2n ** 64n - 2n, 2n ** 64n - 1n, 0]],
    ["7", [7, 8, 9]],
  ] as const) {
    const accepted: unknown[] = [];
    const result = await draw({ seed, count: 3, onAccept: (event) => accepted.push(event.seeds) });
    expect([result.seeds, ...accepted]).toEqual([seeds, seeds]);
    const shown = result.images.map(({ parameters }) => parameters.seed);
    expect(shown).toEqual(seeds.map((each) => (typeof each === "bigint" ? String(each) : each)));
    expect(resultFromJson(JSON.parse(JSON.stringify(resultToJson(result)))).seeds).toEqual(seeds);
    // A picture is drawn again with what it says of itself.
    const again = await latentsOf({ seed: shown[2] as string | number });
    expect(result.latents!.data.slice(-again.length)).toEqual(again);
  }
});

it("a list has a seed for each picture, prompt by prompt", async () => {
  const seeds = [12, large, 7, 7];
  const prompt = ["a red circle", "a blue square"];
  const { latents, ...result } = await draw({ prompt, count: 2, seeds });
  expect(result.seeds).toEqual(seeds);
  const each = latents!.data.length / 4;
  for (const [index, seed] of seeds.entries()) {
    const alone = await latentsOf({ prompt: prompt[Math.floor(index / 2)]!, seed });
    expect(latents!.data.slice(index * each, (index + 1) * each)).toEqual(alone);
  }
});

it("wrong seeds are refused with what to do", async () => {
  const noise = { dtype: "float32", shape: [1, 3, 8, 8], data: new Float32Array(192) } as const;
  for (const [options, option, message] of [
    [{ seed: 2 ** 60 }, "seed", /above 9007199254740991 as a BigInt or as text of digits for seed but received 115/],
    [{ seed: 2n ** 64n }, "seed", /from 0 to 18446744073709551615.* received 18446744073709551616n\.$/],
    [{ seed: "18446744073709551616" }, "seed", /received "18446744073709551616"\.$/],
    [{ seed: -1n }, "seed", /received -1n\.$/],
    [{ seed: "" }, "seed", /received ""\.$/],
    [{ seed: "1e3" }, "seed", /received "1e3"\.$/],
    [{ seeds: [1, 2] }, "seeds", /Expected as many seeds as pictures, 1 .* received 2\. Give 1, or change count/],
    [{ seeds: [1], count: 2 }, "seeds", /as pictures, 2 .* received 1/],
    [{ seeds: [1], seed: 1 }, "seeds", /Both seeds and seed/],
    [{ seeds: [1], noise }, "seeds", /Both seeds and noise/],
    [{ seeds: [2 ** 60] }, "seeds", /a list of seeds, each a whole number.* received \[ 1152921504606847000 \]/],
  ] as const) {
    const error = await draw(options).catch((error) => error);
    expect(error).toBeInstanceOf(OptionError);
    expect(error).toMatchObject({ option, message: expect.stringMatching(message) });
  }
  expect(() => requestFromJson({ prompt: "x", seed: 2 ** 60 })).toThrow(
    /at seed: .*9007199254740991 as text of digits/,
  );
});
