// Which folders are ControlNets of SD3, and what is said of others.
import { cpSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { mkdir, rename, symlink, utimes } from "node:fs/promises";
import os from "node:os";
import path from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import {
  checkControlNetFits,
  checkControlNetValues,
  openCheckpoint,
  openControlNet,
} from "../../lib/checkpoint/index.js";
import { CheckpointError } from "../../lib/errors.js";
import { fixture } from "../support/fixtures.js";

let folder: string;
beforeEach(() => {
  folder = mkdtempSync(path.join(os.tmpdir(), "flowturbo-controlnet-"));
});
afterEach(() => rmSync(folder, { recursive: true, force: true }));

/** A copy of sd3's, with other keys in its config.json; a key that is undefined is left out. */
function copy(config: Record<string, unknown> = {}, to = folder): string {
  cpSync(fixture("sd3", "controlnet"), to, { recursive: true });
  const file = path.join(to, "config.json");
  writeFileSync(file, JSON.stringify({ ...JSON.parse(readFileSync(file, "utf8")), ...config }));
  return to;
}

async function refusal(place: string): Promise<CheckpointError> {
  const error = await openControlNet(place).then(
    () => null,
    (reason: unknown) => reason,
  );
  expect(error).toBeInstanceOf(CheckpointError);
  return error as CheckpointError;
}

describe("openControlNet", () => {
  it("reads InstantX's kind, with text and positions of its own", async () => {
    const { config, weights, id, folder: at } = await openControlNet(fixture("medium", "controlnet"));
    expect(config).toMatchObject({ numLayers: 2, dualAttentionLayers: [0, 1], qkNorm: "rms_norm", positions: "own" });
    expect(config).toMatchObject({ takesMask: false, zeroPooled: true, shiftsControl: false });
    expect(weights.find("controlnet_blocks.1.bias")?.shape).toEqual([64]);
    expect(id).toMatch(/^[0-9a-f]{8}$/);
    expect(at).toBe(fixture("medium", "controlnet"));
  });

  it("reads Stability's kind, without text, with the transformer's tokens", async () => {
    const { config } = await openControlNet(fixture("large", "controlnet"));
    expect(config).toMatchObject({ jointAttentionDim: null, positions: "transformer", qkNorm: null });
    expect(config).toMatchObject({ takesMask: false, zeroPooled: false, shiftsControl: true });
  });

  it("reads alimama's kind, whose pooled text is zeros and whose latents are shifted whatever its config says", async () => {
    const { config } = await openControlNet(fixture("sd3", "controlnet_mask"));
    expect(config).toMatchObject({
      extraConditioningChannels: 1,
      takesMask: true,
      zeroPooled: true,
      shiftsControl: true,
    });
  });

  it("has diffusers' defaults for keys that are absent, and leaves out layers that there are not", async () => {
    const keys = [
      "extra_conditioning_channels",
      "qk_norm",
      "pos_embed_type",
      "use_pos_embed",
      "force_zeros_for_pooled_projection",
    ];
    copy({ ...Object.fromEntries(keys.map((key) => [key, undefined])), dual_attention_layers: [3, 7] });
    const { config } = await openControlNet(folder);
    expect(config).toMatchObject({ extraConditioningChannels: 0, qkNorm: null, positions: "own", zeroPooled: true });
    // As from_transformer leaves them, of a transformer with more layers.
    expect(config.dualAttentionLayers).toEqual([3, 7]);
    copy({ pos_embed_type: null, pos_embed_max_size: null });
    expect((await openControlNet(folder)).config.positions).toBe("none");
  });

  it("refuses weights with more blocks than the configuration says", async () => {
    cpSync(fixture("medium", "controlnet"), folder, { recursive: true });
    const file = path.join(folder, "config.json");
    const config = JSON.parse(readFileSync(file, "utf8"));
    expect(config.num_layers).toBe(2);
    writeFileSync(file, JSON.stringify({ ...config, num_layers: 1 }));
    expect((await refusal(folder)).message).toContain("says num_layers 1, but the weights beside it have 2 blocks");
  });

  it("takes controlnet/ of a pipeline's folder", async () => {
    copy({}, path.join(folder, "controlnet"));
    writeFileSync(path.join(folder, "model_index.json"), "{}");
    expect((await openControlNet(folder)).folder).toBe(path.join(folder, "controlnet"));
    await mkdir(path.join(folder, "controlnet_1"));
    expect((await refusal(folder)).message).toMatch(
      /holds 2 ControlNets, controlnet, controlnet_1\. Pass the folder of each/,
    );
  });

  it("reads shards and a variant", async () => {
    copy();
    const plain = path.join(folder, "diffusion_pytorch_model.safetensors");
    const first = "diffusion_pytorch_model-00001-of-00001.safetensors";
    await rename(plain, path.join(folder, first));
    const names = (await openControlNet(fixture("sd3", "controlnet"))).weights.names;
    const index = { weight_map: Object.fromEntries(names.map((name) => [name, first])) };
    writeFileSync(`${plain}.index.json`, JSON.stringify(index));
    expect((await openControlNet(folder)).weights.names).toEqual(names);
    await rename(path.join(folder, first), path.join(folder, "diffusion_pytorch_model.fp16.safetensors"));
    rmSync(`${plain}.index.json`);
    // The only variant there is, whatever the model's is called.
    for (const variant of [undefined, "fp16", "bf16"])
      expect((await openControlNet(folder, { variant })).weights.variant).toBe("fp16");
    cpSync(
      path.join(folder, "diffusion_pytorch_model.fp16.safetensors"),
      path.join(folder, "diffusion_pytorch_model.bf16.safetensors"),
    );
    expect((await refusal(folder)).message).toContain('the variant "bf16", "fp16": pass variant "bf16"');
    expect((await openControlNet(folder, { variant: "bf16" })).weights.variant).toBe("bf16");
  });

  it("has an id for each version of each folder", async () => {
    const { id } = await openControlNet(copy());
    expect((await openControlNet(path.join(folder, "."))).id).toBe(id);
    const link = `${folder}-link`;
    await symlink(folder, link);
    expect((await openControlNet(link)).id).toBe(id);
    rmSync(link);
    await utimes(path.join(folder, "diffusion_pytorch_model.safetensors"), 1, 1);
    expect((await openControlNet(folder)).id).not.toBe(id);
    const [one, other] = [
      openControlNet(fixture("sd3", "controlnet")),
      openControlNet(fixture("sd3", "controlnet_own")),
    ];
    expect((await one).id).not.toBe((await other).id);
  });

  it.each([
    ["FluxControlNetModel", /of the class "FluxControlNetModel", a ControlNet of FLUX\. Pass a folder with/],
    ["ControlNetModel", /a ControlNet of Stable Diffusion 1, 2 or XL\. /],
    ["SD3Transformer2DModel", /which is no ControlNet of Stable Diffusion 3\. /],
    ["constructor", /which is no ControlNet of Stable Diffusion 3\. /],
    [undefined, /does not say of which class it is/],
  ])("refuses the class %s", async (name, message) => {
    expect((await refusal(copy({ _class_name: name }))).message).toMatch(message);
  });

  it.each([
    [
      { extra_conditioning_channels: 2 },
      /"extra_conditioning_channels" \(2\) cannot be used: more than 1 is not supported/,
    ],
    [
      { caption_projection_dim: 63 },
      /"caption_projection_dim" \(63\).*must equal num_attention_heads x attention_head_dim = 64/,
    ],
    [{ pos_embed_max_size: null }, /"pos_embed_max_size" \(null\) cannot be used: null is supported only where/],
    [{ pos_embed_type: "learned" }, /"pos_embed_type" \("learned"\)/],
    [{ qk_norm: "layer_norm" }, /"qk_norm" \("layer_norm"\)/],
    [{ num_layers: 0 }, /"num_layers" \(0\)/],
  ])("refuses the config %j", async (config, message) => {
    expect((await refusal(copy(config))).message).toMatch(message);
  });

  it("says what to do with other things than folders", async () => {
    expect((await refusal(path.join(folder, "none"))).message).toMatch(
      /none of a ControlNet does not exist\. Pass a folder/,
    );
    expect((await refusal(folder)).message).toMatch(/has no config\.json, so that it is no ControlNet/);
    const weights = fixture("sd3", "controlnet/diffusion_pytorch_model.safetensors");
    expect((await refusal(weights)).message).toMatch(
      /is a file\. A ControlNet in one file.*convert_sd3_controlnet_to_diffusers\.py/,
    );
    expect((await refusal(fixture("sd3", "controlnet/config.json"))).message).toMatch(
      /is a file\. Pass the folder that it lies in/,
    );
    expect((await refusal(fixture("sd3", "model"))).message).toMatch(
      /is a whole pipeline without a folder controlnet\//,
    );
    await mkdir(path.join(folder, "snapshots", "1a2b"), { recursive: true });
    expect((await refusal(folder)).message).toMatch(/Pass one of its snapshots: .*1a2b/);
    const aborted = AbortSignal.abort(new Error("enough"));
    await expect(openControlNet(fixture("sd3", "controlnet"), { signal: aborted })).rejects.toThrow("enough");
  });
});

describe("checkControlNetValues", () => {
  it.each([
    ["sd3", "F16", 0x7e00],
    ["medium", "BF16", 0xff80],
  ] as const)("names the tensor of %s (%s) with a value that is not finite", async (name, dtype, bits) => {
    cpSync(fixture(name, "controlnet"), folder, { recursive: true });
    await checkControlNetValues(await openControlNet(folder));
    const stored = (await openControlNet(folder)).weights.find("controlnet_blocks.0.weight")!;
    expect(stored.dtype).toBe(dtype);
    const bytes = readFileSync(stored.file);
    bytes.writeUInt16LE(bits, stored.offset + 10);
    writeFileSync(stored.file, bytes);
    const controlNet = await openControlNet(folder);
    await expect(checkControlNetValues(controlNet)).rejects.toThrow(CheckpointError);
    await expect(checkControlNetValues(controlNet)).rejects.toThrow(
      /the tensor "controlnet_blocks\.0\.weight" holds NaN or an infinity at index 5: its training failed/,
    );
  });
});

describe("checkControlNetFits", () => {
  it("takes ControlNets of the model", async () => {
    for (const name of ["sd3", "medium", "large"] as const)
      checkControlNetFits(
        await openControlNet(fixture(name, "controlnet")),
        await openCheckpoint(fixture(name, "model")),
      );
  });

  it.each([
    [
      { num_attention_heads: 8, caption_projection_dim: 128 },
      /num_attention_heads x attention_head_dim is 128, but that of the model's transformer is 64/,
    ],
    [{ in_channels: 4 }, /in_channels is 4, but that of the model's latents is 16/],
    [{ patch_size: 4 }, /patch_size is 4/],
    [{ joint_attention_dim: 4096 }, /joint_attention_dim is 4096, but that of the model's text is 96/],
    [{ pooled_projection_dim: 2048 }, /pooled_projection_dim is 2048/],
  ])("refuses %j", async (config, message) => {
    const controlNet = await openControlNet(copy(config));
    const checkpoint = await openCheckpoint(fixture("sd3", "model"));
    expect(() => checkControlNetFits(controlNet, checkpoint)).toThrow(CheckpointError);
    expect(() => checkControlNetFits(controlNet, checkpoint)).toThrow(message);
  });
});
