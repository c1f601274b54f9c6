/**
 * Configs: the defaults for absent keys are those of diffusers 0.42.1 and transformers 5.23.0 (read off the constructors'
 * signatures in their sources), and values that are not computed here are errors that name the key.
 */

import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import {
  readClipConfig,
  readSchedulerConfig,
  readT5Config,
  readTransformerConfig,
  readVaeConfig,
  type SchedulerConfig,
} from "../../lib/checkpoint/configs.js";
import { CheckpointError } from "../../lib/errors.js";
import { temporaryFolder } from "./folders.js";

const readers = {
  transformer: readTransformerConfig,
  clip: readClipConfig,
  t5: readT5Config,
  vae: readVaeConfig,
  scheduler: readSchedulerConfig,
};

async function read<Kind extends keyof typeof readers>(kind: Kind, config: unknown) {
  const file = join(await temporaryFolder(), "config.json");
  await writeFile(file, typeof config === "string" ? config : JSON.stringify(config));
  return (await readers[kind](file)) as Awaited<ReturnType<(typeof readers)[Kind]>>;
}

describe("defaults", () => {
  test("transformer", async () => {
    const defaults = {
      sampleSize: 128,
      patchSize: 2,
      inChannels: 16,
      outChannels: 16,
      numLayers: 18,
      attentionHeadDim: 64,
      numAttentionHeads: 18,
      jointAttentionDim: 4096,
      captionProjectionDim: 1152,
      pooledProjectionDim: 2048,
      posEmbedMaxSize: 96,
      dualAttentionLayers: [],
      qkNorm: null,
    };
    expect(await read("transformer", {})).toEqual(defaults);
    expect(await read("transformer", { dual_attention_layers: null, qk_norm: null, unknown: 1 })).toEqual(defaults);
    expect((await read("transformer", { in_channels: 32, out_channels: null })).outChannels).toBe(32);
  });

  test("clip", async () => {
    const defaults = {
      vocabSize: 49408,
      hiddenSize: 512,
      intermediateSize: 2048,
      projectionDim: 512,
      numHiddenLayers: 12,
      numAttentionHeads: 8,
      maxPositionEmbeddings: 77,
      hiddenAct: "quick_gelu",
      layerNormEps: 1e-5,
      eosTokenId: 49407,
    };
    expect(await read("clip", {})).toEqual(defaults);
    expect(await read("clip", { text_config: { hidden_size: 768 }, hidden_size: 1 })).toMatchObject({
      hiddenSize: 768,
    });
  });

  test("t5", async () => {
    expect(await read("t5", {})).toEqual({
      vocabSize: 32128,
      dModel: 512,
      dKv: 64,
      dFf: 2048,
      numLayers: 6,
      numHeads: 8,
      relativeAttentionNumBuckets: 32,
      relativeAttentionMaxDistance: 128,
      layerNormEpsilon: 1e-6,
      activation: "relu",
      gated: false,
    });
    for (const [spelled, activation, gated] of [
      ["gated-gelu", "gelu_new", true],
      ["gated-silu", "silu", true],
      ["gelu", "gelu", false],
    ])
      expect(await read("t5", { feed_forward_proj: spelled })).toMatchObject({ activation, gated });
  });

  test("vae and scheduler", async () => {
    expect(await read("vae", {})).toEqual({
      kind: "kl",
      inChannels: 3,
      outChannels: 3,
      latentChannels: 4,
      blockOutChannels: [64],
      layersPerBlock: 1,
      normNumGroups: 32,
      scalingFactor: 0.18215,
      shiftFactor: 0,
      useQuantConv: true,
      usePostQuantConv: true,
      midBlockAddAttention: true,
      sampleSize: 32,
      factor: 1,
    });
    expect(await read("scheduler", {})).toEqual({
      ...{ className: "FlowMatchEulerDiscreteScheduler", shift: 1, numTrainTimesteps: 1000, dynamic: null },
      ...{ spacing: null, terminal: null, solver: null, notes: [] },
    });
    expect(await read("scheduler", { use_karras_sigmas: true, use_dynamic_shifting: true })).toMatchObject({
      spacing: "karras",
      dynamic: { baseShift: 0.5, maxShift: 1.15, baseTokens: 256, maxTokens: 4096, type: "exponential" },
    });
    expect(await read("scheduler", { shift_terminal: null, use_beta_sigmas: null, shift: 3 })).toMatchObject({
      shift: 3,
    });
  });

  const flow = { use_flow_sigmas: true, prediction_type: "flow_prediction", flow_shift: 3 };

  test("schedulers whose steps are another's are read, and said to be", async () => {
    const newNoise = [expect.stringMatching(/draws new noise/)];
    const lcm = await read("scheduler", { _class_name: "FlowMatchLCMScheduler", shift: 3, upscale_mode: "area" });
    expect(lcm).toMatchObject({ shift: 3, notes: newNoise });
    expect(await read("scheduler", { stochastic_sampling: true })).toMatchObject({ notes: newNoise });
    for (const _class_name of ["DEISMultistepScheduler", "SASolverScheduler", "DPMSolverSinglestepScheduler"])
      expect(await read("scheduler", { _class_name, ...flow })).toMatchObject({
        ...{ shift: 3, solver: null, notes: [expect.stringMatching(/its shift is used/)] },
      });
  });

  test("the pipeline's shift by size where the class has no keys for it", async () => {
    const config = { _class_name: "UniPCMultistepScheduler", ...flow, use_dynamic_shifting: true };
    expect(await read("scheduler", config)).toMatchObject({ dynamic: { baseShift: 0.5, maxShift: 1.16 } });
  });

  test.each([
    ["UniPCMultistepScheduler", { solver_order: 3 }, "solver_order"],
    ["UniPCMultistepScheduler", { thresholding: true }, "thresholding"],
    ["UniPCMultistepScheduler", { predict_x0: false }, "predict_x0"],
    ["UniPCMultistepScheduler", { lower_order_final: false }, "lower_order_final"],
    ["UniPCMultistepScheduler", { use_beta_sigmas: true }, "use_beta_sigmas"],
    ["UniPCMultistepScheduler", { use_karras_sigmas: true, trained_betas: [0.1] }, "beta_schedule"],
    ["DPMSolverMultistepScheduler", { algorithm_type: "sde-dpmsolver++" }, "algorithm_type"],
    ["DPMSolverMultistepScheduler", { use_karras_sigmas: true }, "use_karras_sigmas"],
    ["DPMSolverMultistepScheduler", { use_lu_lambdas: true }, "use_lu_lambdas"],
  ])("steps of %s with %j are not computed", async (_class_name, config, key) => {
    const { solver } = (await read("scheduler", { _class_name, ...flow, ...config })) as SchedulerConfig;
    expect(solver!.unsupported.map((each) => each.key)).toEqual([key]);
  });
});

describe("values that are not computed", () => {
  const cases: [keyof typeof readers, object, string][] = [
    ["transformer", { _class_name: "FluxTransformer2DModel" }, "_class_name"],
    ["transformer", { qk_norm: "layer_norm" }, "qk_norm"],
    ["transformer", { dual_attention_layers: [18] }, "dual_attention_layers"],
    ["transformer", { caption_projection_dim: 1000 }, "caption_projection_dim"],
    ["transformer", { num_layers: 0 }, "num_layers"],
    ["transformer", { num_layers: "24" }, "num_layers"],
    ["transformer", { patch_size: 1.5 }, "patch_size"],
    ["clip", { hidden_act: "relu" }, "hidden_act"],
    ["clip", { hidden_size: 100 }, "hidden_size"],
    ["clip", { text_config: { hidden_act: "silu" } }, "hidden_act"],
    ["clip", { transformers_weights: "other.safetensors" }, "transformers_weights"],
    ["t5", { transformers_weights: "other.safetensors" }, "transformers_weights"],
    ["t5", { feed_forward_proj: "gated-tanh" }, "feed_forward_proj"],
    ["vae", { act_fn: "relu" }, "act_fn"],
    ["vae", { down_block_types: ["AttnDownEncoderBlock2D"] }, "down_block_types.0"],
    ["vae", { up_block_types: ["UpDecoderBlock2D", "UpDecoderBlock2D"] }, "up_block_types"],
    ["vae", { block_out_channels: [] }, "block_out_channels"],
    ["vae", { block_out_channels: [40] }, "block_out_channels"],
    ["vae", { latents_mean: [0] }, "latents_mean"],
    ["vae", { scaling_factor: 0 }, "scaling_factor"],
    ["scheduler", { _class_name: "DDIMScheduler" }, "_class_name"],
    ["scheduler", { use_dynamic_shifting: "yes" }, "use_dynamic_shifting"],
    ["scheduler", { time_shift_type: "cubic" }, "time_shift_type"],
    ["scheduler", { max_image_seq_len: 256 }, "max_image_seq_len"],
    ["scheduler", { use_karras_sigmas: true, use_beta_sigmas: true }, "use_beta_sigmas"],
    ["scheduler", { invert_sigmas: true }, "invert_sigmas"],
    ["scheduler", { shift_terminal: 1 }, "shift_terminal"],
    ["scheduler", { _class_name: "FlowMatchLCMScheduler", scale_factors: [0.5, 0.75] }, "scale_factors"],
    ["scheduler", { _class_name: "UniPCMultistepScheduler", prediction_type: "epsilon" }, "use_flow_sigmas"],
    ["scheduler", { _class_name: "DEISMultistepScheduler", use_flow_sigmas: true }, "prediction_type"],
    [
      ...([
        "scheduler",
        { _class_name: "DPMSolverMultistepScheduler", use_flow_sigmas: true, prediction_type: "epsilon" },
      ] as const),
      "prediction_type",
    ],
    ["scheduler", { shift: 0 }, "shift"],
  ];
  for (const [kind, config, key] of cases)
    test(`${kind} ${JSON.stringify(config)}`, async () => {
      const error = await read(kind, config).catch((e) => e);
      expect(error).toBeInstanceOf(CheckpointError);
      expect(error.message).toMatch(/config\.json: the key/);
      expect(error.message).toContain(`the key "${key}" (`);
    });

  test("a file that is missing, not JSON, or no object", async () => {
    await expect(readVaeConfig("/no/such/config.json")).rejects.toThrow(/config\.json is missing/);
    await expect(read("vae", "{")).rejects.toThrow(/is not JSON/);
    await expect(read("vae", "[]")).rejects.toThrow(/JSON object/);
  });
});
