// ControlNets against diffusers (test/fixtures/README.md), through the public API of the built package.
import { cpSync, mkdtempSync, readFileSync, rmSync, utimesSync, writeFileSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import {
  CheckpointError,
  type Control,
  canny,
  compileEngines,
  type FloatTensor,
  FlowTurbo,
  type GenerateOptions,
  OptionError,
} from "flowturbo";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { openControlNet } from "../../lib/checkpoint/index.js";
import { optionsOf } from "../../lib/generation/parameters.js";
import { fixture, fixtureNames, readAll, relativeError } from "../support/fixtures.js";
import { withValues } from "../support/with-values.js";

const prompts = ["a red circle above a small blue square", "the photo of a café, 3 dogs & a cat's bowl!"];
const common = {
  negativePrompt: "blurry, low quality",
  height: 64,
  width: 64,
  maxSequenceLength: 32,
  sampler: "euler",
} as const;
/** The two implementations differ by rounding alone. */
const tolerance = 1e-5;

const models = new Map<string, FlowTurbo>();
beforeAll(async () => {
  for (const name of fixtureNames)
    models.set(
      name,
      await FlowTurbo.load(fixture(name, "model"), {
        controlNets: [{ folder: fixture(name, "controlnet"), name: "lines" }],
      }),
    );
});
afterAll(async () => {
  for (const model of models.values()) await model.dispose();
});

type Run = readonly [
  file: string,
  model: (typeof fixtureNames)[number],
  options: (at: (file: string) => string) => Partial<GenerateOptions>,
];

const runs: readonly Run[] = [
  ...fixtureNames.map(
    (name): Run => [
      "controlnet",
      name,
      (at) => ({ steps: 6, controls: [{ folder: "lines", image: at("control.png"), scale: 0.8, stop: 0.7 }] }),
    ],
  ),
  // Two networks, each in steps of its own; the second one's table of positions has another size.
  [
    "control_two",
    "sd3",
    (at) => ({
      steps: 6,
      controls: [
        { folder: "lines", image: at("control.png"), scale: 0.8, stop: 0.7 },
        { folder: at("controlnet_own"), image: at("init.png"), scale: 0.5, start: 0.3 },
      ],
    }),
  ],
  [
    "control_inpaint",
    "sd3",
    (at) => ({
      steps: 6,
      controls: [{ folder: at("controlnet_mask"), image: at("init.png"), mask: at("mask_40.png"), scale: 0.9 }],
    }),
  ],
  // Of ten steps an edit leaves six; intervals are parts of ten.
  [
    "control_edit",
    "medium",
    (at) => ({
      ...{ steps: 10, image: at("init.png"), strength: 0.6 },
      controls: [{ folder: "lines", image: at("control.png"), scale: 0.8, start: 0.5, stop: 0.9 }],
    }),
  ],
  [
    "control_stages",
    "medium",
    (at) => ({
      ...{ sampler: undefined, width: undefined, height: undefined },
      stages: [
        { width: 64, height: 64, blocks: "HPR" },
        { width: 128, height: 128, blocks: "HP", sigma: 0.6 },
      ],
      controls: [{ folder: "lines", image: at("control.png"), scale: 0.8, stop: 0.8 }],
    }),
  ],
  [
    "control_skip",
    "medium",
    (at) => ({
      ...{ steps: 6, skipLayers: { layers: [1], scale: 2.8, start: 0.01, stop: 0.9 } },
      controls: [{ folder: "lines", image: at("control.png"), scale: 0.8, stop: 0.7 }],
    }),
  ],
  [
    "control_range",
    "large",
    (at) => ({
      steps: 4,
      controls: [{ folder: "lines", image: at("control.png"), scale: 0.8, pixelRange: "stability_canny" }],
    }),
  ],
];

describe("as diffusers draws with ControlNets", () => {
  it.each(runs)("%s of %s", async (file, name, options) => {
    const { noise, noise_2, ...reference } = await readAll(fixture(name, `${file}.safetensors`));
    const result = await withValues(models.get(name)!, {
      ...{ prompt: prompts[0], ...common, noise: noise_2 ? [noise!, noise_2] : noise },
      ...options((each) => fixture(name, each)),
    });
    expect(relativeError(result.latents, reference.latents!)).toBeLessThan(
      file === "control_stages" ? 5e-5 : tolerance,
    );
    expect(relativeError(result.pixels, reference.image!)).toBeLessThan(file === "control_stages" ? 5e-5 : tolerance);
  });
});

describe("requests at the same time", () => {
  it("share launches with pictures of their own, resized without keeping their shape", async () => {
    await using model = await FlowTurbo.load(fixture("medium", "model"), {
      ...{
        pinBatch: 2,
        measureCosts: false,
        controlNets: [{ folder: fixture("medium", "controlnet"), name: "lines" }],
      },
    });
    const { noise, ...reference } = await readAll(fixture("medium", "control_batch.safetensors"));
    const rowOf = (tensor: FloatTensor, row: number): FloatTensor => {
      const size = tensor.data.length / 2;
      const shape = [1, ...tensor.shape.slice(1)];
      return { dtype: "float32", shape, data: tensor.data.slice(row * size, (row + 1) * size) };
    };
    const draw = (row: number) =>
      withValues(model, {
        ...{ ...common, prompt: prompts[row]!, width: 32, height: 48, steps: 4, noise: rowOf(noise!, row) },
        controls: [{ folder: "lines", image: fixture("medium", ["control.png", "init.png"][row]!), scale: 0.8 }],
      });
    const results = await Promise.all([draw(0), draw(1)]);
    for (const [row, { latents, pixels }] of results.entries()) {
      expect(relativeError(latents, rowOf(reference.latents!, row))).toBeLessThan(tolerance);
      expect(relativeError(pixels, rowOf(reference.image!, row))).toBeLessThan(tolerance);
    }
    // Most of the four steps, which need not begin together.
    expect(model.stats().rowsPerLaunch["2"]).toBeGreaterThanOrEqual(3);
  });
});

it("a LoRA is of the transformer, not of the ControlNet beside it: merged and dynamic draw the same", async () => {
  const draw = async (dynamic: boolean) => {
    await using model = await FlowTurbo.load(fixture("sd3", "model"), {
      loras: [{ file: fixture("sd3", "adapters/lora_a.safetensors"), name: "a", scale: 0.7, dynamic }],
      controlNets: [{ folder: fixture("sd3", "controlnet"), name: "lines" }],
      ...{ measureCosts: false, cache },
    });
    // Not awaited: the model is disposed of at once, and waits for what was asked before.
    return withValues(model, {
      ...{ ...common, prompt: "x", seed: 5, steps: 3, ...(dynamic && { loras: [{ name: "a" }] }) },
      controls: [{ folder: "lines", image: fixture("sd3", "control.png"), stop: 0.7 }],
    });
  };
  const cache = mkdtempSync(path.join(os.tmpdir(), "flowturbo-cache-"));
  try {
    // Merged weights are rounded to float16 again, as the model's are stored.
    expect(relativeError((await draw(true)).latents, (await draw(false)).latents)).toBeLessThan(1e-3);
  } finally {
    rmSync(cache, { recursive: true, force: true });
  }
});

describe("a control", () => {
  const at = (file: string) => fixture("sd3", file);
  const base = { ...common, prompt: "x", seed: 5, steps: 3, include: ["latents"] as const };
  const draw = async (options: Partial<GenerateOptions>) =>
    models.get("sd3")!.generate({ ...base, ...options } as GenerateOptions);
  const lines = (more: Partial<Control> = {}): Control => ({ folder: "lines", image: at("control.png"), ...more });

  it("of scale 0 is none", async () => {
    const { latents, images } = await draw({ controls: [lines({ scale: 0 })] });
    expect(latents).toEqual((await draw({})).latents);
    expect(images[0]!.parameters.controls).toBeUndefined();
    const one = await draw({ controls: [lines()] });
    expect((await draw({ controls: [lines(), lines({ scale: 0, image: at("init.png") })] })).latents).toEqual(
      one.latents,
    );
    expect(one.latents).not.toEqual(latents);
  });

  it("may be there twice: the residuals are added", async () => {
    const twice = await draw({ controls: [lines({ scale: 0.3 }), lines({ scale: 0.4 })] });
    const once = await draw({ controls: [lines({ scale: 0.7 })] });
    expect(relativeError(twice.latents!, once.latents!)).toBeLessThan(1e-5);
  });

  it("is named by its folder where paths are allowed, and read again when its files change", async () => {
    const named = await draw({ controls: [lines()] });
    const folder = mkdtempSync(path.join(os.tmpdir(), "flowturbo-control-"));
    try {
      cpSync(at("controlnet"), folder, { recursive: true });
      const asked = { controls: [lines({ folder })] };
      expect((await draw(asked)).latents).toEqual(named.latents);
      const other = "diffusion_pytorch_model.safetensors";
      cpSync(path.join(at("controlnet_own"), other), path.join(folder, other));
      cpSync(path.join(at("controlnet_own"), "config.json"), path.join(folder, "config.json"));
      utimesSync(path.join(folder, other), 1, 1);
      const [changed, own] = await Promise.all([
        draw(asked),
        draw({ controls: [lines({ folder: at("controlnet_own") })] }),
      ]);
      expect(changed.latents).toEqual(own.latents);
      expect(changed.latents).not.toEqual(named.latents);
      // The configuration alone.
      const file = path.join(folder, "config.json");
      const config = JSON.parse(readFileSync(file, "utf8"));
      writeFileSync(file, JSON.stringify({ ...config, force_zeros_for_pooled_projection: false }));
      expect((await draw(asked)).latents).not.toEqual(changed.latents);
    } finally {
      rmSync(folder, { recursive: true, force: true });
    }
  });

  it("of more folders than are kept is opened again", async () => {
    const folder = mkdtempSync(path.join(os.tmpdir(), "flowturbo-control-"));
    try {
      const first = await draw({ steps: 1, controls: [lines()] });
      for (const name of ["a", "b", "c", "d", "e", "f", "a"]) {
        const copy = path.join(folder, name);
        cpSync(at("controlnet"), copy, { recursive: true });
        expect((await draw({ steps: 1, controls: [lines({ folder: copy })] })).latents).toEqual(first.latents);
      }
      // More at once, in one request and in several.
      const all = ["a", "b", "c", "d", "e", "f"].map((name) =>
        lines({ folder: path.join(folder, name), scale: 1 / 6 }),
      );
      const together = await draw({ steps: 1, controls: all });
      expect(relativeError(together.latents!, first.latents!)).toBeLessThan(tolerance);
      const pairs = [0, 1, 2, 3, 4, 5].map((i) =>
        [all[i]!, all[(i + 1) % 6]!].map((each) => ({ ...each, scale: 0.5 })),
      );
      for (const { latents } of await Promise.all(pairs.map((controls) => draw({ steps: 1, controls }))))
        expect(relativeError(latents!, first.latents!)).toBeLessThan(tolerance);
    } finally {
      rmSync(folder, { recursive: true, force: true });
    }
  });

  it("is made of a picture by its edges, at the size that is drawn", async () => {
    const edges = await canny(at("init.png"), { low: 100, high: 200 });
    const [made, given] = [
      await draw({ controls: [lines({ image: at("init.png"), preprocess: "canny" })] }),
      await draw({ controls: [lines({ image: edges })] }),
    ];
    // init.png has the size of the picture.
    expect([edges.width, edges.height]).toEqual([64, 64]);
    expect(made.latents).toEqual(given.latents);
    expect(made.images[0]!.parameters.controls).toEqual([{ folder: "lines", scale: 1, preprocess: "canny" }]);
  });

  it("says in a picture's file all but its pictures", async () => {
    const mask = { width: 64, height: 64, data: new Uint8Array(3 * 64 * 64).fill(255) };
    const { images } = await draw({
      controls: [lines({ scale: 0.5, stop: 0.7 }), lines({ folder: at("controlnet_mask"), mask, start: 0.3 })],
    });
    const { parameters } = images[0]!;
    expect(parameters.controls).toEqual([
      { folder: "lines", scale: 0.5, start: 0, stop: 0.7 },
      { folder: "controlnet_mask", scale: 1, start: 0.3, stop: 1, inpaints: true },
    ]);
    const { options, unknown, needs } = optionsOf(parameters);
    expect([unknown, needs]).toEqual([[], ["controls"]]);
    expect(options).not.toHaveProperty("controls");
  });

  it("goes with previews, which change nothing, and without guidance", async () => {
    const controls = [lines({ stop: 0.7 })];
    const plain = await draw({ controls });
    const seen: number[] = [];
    const previewed = await draw({
      ...{ controls, preview: "decoded" },
      onStep: ({ step, previews }) => void seen.push(step, previews.length),
    });
    expect(previewed.latents).toEqual(plain.latents);
    expect(seen).toEqual([0, 1, 1, 1, 2, 1]);
    const alone = await draw({ controls, guidanceScale: 1 });
    expect(alone.latents).not.toEqual((await draw({ guidanceScale: 1 })).latents);
  });

  it("is cut out with the part of a picture that an edit draws", async () => {
    const white = { width: 64, height: 64, data: new Uint8Array(3 * 64 * 64).fill(255) };
    const edit = { image: at("init.png"), mask: white, strength: 0.9, controls: [lines()] };
    // All of it.
    const [whole, cropped] = [await draw(edit), await draw({ ...edit, paddingMaskCrop: 0 })];
    expect(cropped.latents).toEqual(whole.latents);
  });

  it("that may be Stability's Canny is warned of, until its range is said", async () => {
    const folder = mkdtempSync(path.join(os.tmpdir(), "sd3.5-large-controlnet-Canny-"));
    try {
      cpSync(fixture("large", "controlnet"), folder, { recursive: true });
      const warnings = async (pixelRange?: "signed") =>
        (
          await models.get("large")!.generate({
            ...{ ...base, steps: 1 },
            controls: [{ folder, image: fixture("large", "control.png"), pixelRange }],
          })
        ).warnings.filter((text) => text.includes("stability_canny"));
      expect(await warnings()).toHaveLength(1);
      expect(await warnings("signed")).toEqual([]);
    } finally {
      rmSync(folder, { recursive: true, force: true });
    }
  });

  const white = { width: 8, height: 8, data: new Uint8Array(3 * 64).fill(255) };
  const wrong: [Partial<GenerateOptions>, RegExp][] = [
    [{ controls: [] }, /for controls but received/],
    [{ controls: [lines({ scale: Number.NaN })] }, /for controls\[0\]\.scale but received NaN/],
    [{ controls: [lines({ scale: Number.POSITIVE_INFINITY })] }, /for controls\[0\]\.scale but received Infinity/],
    [{ controls: [lines({ stop: 1.1 })] }, /for controls\[0\]\.stop but received 1\.1/],
    [{ controls: [{ folder: "lines" } as Control] }, /for controls\[0\]\.image but received undefined/],
    [{ controls: [null as never] }, /for controls but received/],
    [{ controls: [lines({ preprocess: "depth" as "canny" })] }, /Expected "canny" for controls\[0\]\.preprocess but/],
    [
      { controls: [lines({ start: 0.5, stop: 0.5 })] },
      /Expected controls\[0\]\.start \(0\.5\) below controls\[0\]\.stop/,
    ],
    [{ controls: [lines(), lines({ start: 0.5, stop: 0.6 })] }, /controls\[1\]\.stop 0\.6 no step .* of 3, from 0/],
    [{ controls: [lines({ mask: white })] }, /"lines" takes no mask .* leave out controls\[0\]\.mask/],
    [{ controls: [lines({ folder: at("controlnet_mask") })] }, /is one for inpainting; give controls\[0\]\.mask/],
    [{ controls: [lines({ image: at("absent.png") })] }, /for controls\[0\]\.image but ".*absent\.png" cannot be read/],
    [{ controls: [lines({ image: at("controlnet/config.json") })] }, /whole picture .* for controls\[0\]\.image/],
    [{ controls: [lines({ image: "https://example.org/a.png" })] }, /for controls\[0\]\.image but received a URL/],
    [{ controls: [lines()], allowPaths: false }, /controls\[0\]\.image but received a path, which is not allowed/],
    [
      { controls: [lines({ folder: at("controlnet"), image: white })], allowPaths: false },
      /There is no ControlNet ".*"\. This model has "lines"/,
    ],
    [
      { controls: [lines({ folder: at("controlnet_own") })], width: 192 },
      /"controlnet_own" guides pictures of at most 160 pixels a side, .* received 192 x 64/,
    ],
  ];
  it.each(wrong.map(([options, message], index) => ({ index, options, message })))(
    "that is wrong is refused ($index)",
    async ({ options, message }) => {
      const error = await draw(options).catch((reason) => reason);
      expect(error).toBeInstanceOf(OptionError);
      expect(error).toMatchObject({ option: "controls", message: expect.stringMatching(message) });
    },
  );

  it("of a folder that is no ControlNet, or of another model, is refused", async () => {
    const refused = async (folder: string) => draw({ controls: [lines({ folder })] }).catch((reason) => reason);
    for (const [folder, message] of [
      [at("absent"), /of a ControlNet does not exist/],
      [at("model/transformer"), /of the class "SD3Transformer2DModel", which is no ControlNet/],
      [at("control.png"), /is a file/],
    ] as const) {
      const error = await refused(folder);
      expect(error).toBeInstanceOf(CheckpointError);
      expect(error.message).toMatch(message);
    }
    const folder = mkdtempSync(path.join(os.tmpdir(), "flowturbo-control-"));
    try {
      cpSync(at("controlnet"), folder, { recursive: true });
      const file = path.join(folder, "config.json");
      const config = JSON.parse(readFileSync(file, "utf8"));
      writeFileSync(file, JSON.stringify({ ...config, num_attention_heads: 8, caption_projection_dim: 128 }));
      expect((await refused(folder)).message).toMatch(
        /does not fit the model: its num_attention_heads x attention_head_dim is 128/,
      );
      writeFileSync(file, JSON.stringify({ ...config, num_layers: 2 }));
      expect((await refused(folder)).message).toMatch(
        /has no tensor "transformer_blocks\.1\..*Is the download complete/,
      );
      writeFileSync(file, JSON.stringify(config));
      const { file: weights, offset } = (await openControlNet(folder)).weights.find("pos_embed_input.proj.bias")!;
      const bytes = readFileSync(weights);
      bytes.writeUInt16LE(0x7e00, offset);
      writeFileSync(weights, bytes);
      const notFinite = /the tensor "pos_embed_input\.proj\.bias" holds NaN or an infinity at index 0/;
      expect((await refused(folder)).message).toMatch(notFinite);
      await expect(FlowTurbo.load(at("model"), { controlNets: [{ folder }] })).rejects.toThrow(notFinite);
      const compiled = compileEngines(at("model"), { runtime: "tensorrt", controls: [folder] });
      await expect(compiled).rejects.toThrow(notFinite);
    } finally {
      rmSync(folder, { recursive: true, force: true });
    }
  });

  it("is refused at load where it does not fit, or has the name of another", async () => {
    const load = (...controlNets: { folder: string; name?: string }[]) =>
      FlowTurbo.load(at("model"), { controlNets }).catch((reason) => reason);
    const twice = await load({ folder: at("controlnet") }, { folder: at("controlnet_own"), name: "controlnet" });
    expect(twice).toBeInstanceOf(OptionError);
    expect(twice.message).toMatch(/Two ControlNets are called "controlnet"/);
    expect(await load({ folder: at("model") })).toBeInstanceOf(CheckpointError);
    expect(models.get("sd3")!.adapters).toEqual({ loras: [], controlNets: ["lines"] });
  });

  it("is in every candidate of a time limit, which needs a step for it", async () => {
    const result = await draw({
      ...{ steps: undefined, sampler: undefined, deadlineMs: 100_000, ladder: ["E1", "E4"] },
      controls: [lines({ start: 0.5, stop: 0.9 })],
    });
    expect(result.blocks).toBe("E4");
  });
});
