/**
 * 8-bit tensors: their values, the scales that belong to them, and what is refused: scales that are missing or damaged, weights without
 * information, and quantisations that are not read, each by its name.
 */

import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { openCheckpoint, openWeights } from "../../lib/checkpoint/index.js";
import { checkQuantisation, type Lookup, resolveTensor } from "../../lib/checkpoint/quantised.js";
import { widen } from "../../lib/common/widen.js";
import { CheckpointError } from "../../lib/errors.js";
import { f32, int8, modelWith, type RawTensors, scaledT5, writeRaw } from "../support/quantised.js";
import { copyModel, editJson, fixture, temporaryFolder } from "./folders.js";

const t5 = "text_encoder_3/model.safetensors";
const e4m3 = (shape: readonly number[], byte?: number) => {
  const bytes = Uint8Array.from({ length: shape.reduce((a, b) => a * b, 1) }, (_, i) => byte ?? 40 + (i % 7));
  return { dtype: "F8_E4M3", shape, bytes };
};

async function weightsOf(tensors: RawTensors) {
  const folder = await temporaryFolder();
  await writeRaw(join(folder, "model.safetensors"), tensors);
  return openWeights(folder, "model");
}

async function refusal(work: () => unknown): Promise<string> {
  const error = await (async () => work())().then(
    () => undefined,
    (reason: unknown) => reason,
  );
  expect(error).toBeInstanceOf(CheckpointError);
  return (error as CheckpointError).message;
}

test("every code of float8 is the value that torch has for it; int8 is two's complement", async () => {
  const expected = JSON.parse(await readFile(fixture("float8.json"), "utf8"));
  const codes = Uint8Array.from({ length: 256 }, (_, code) => code);
  for (const dtype of ["F8_E4M3", "F8_E5M2"] as const) {
    const values = new Float32Array(256);
    widen(codes, dtype, values);
    expect([...values]).toEqual(expected[dtype].map(Number));
  }
  const values = new Float32Array(256);
  widen(codes, "I8", values);
  expect([...values]).toEqual([...new Int8Array(codes.buffer)]);
});

describe("scales", () => {
  test.each([
    ["x.scale_weight", [], [], 1],
    ["x.weight_scale", [1], [], 1],
    ["x.weight_scale", [3], [3], 1],
    ["x.weight_scale", [3, 1], [3], 1],
  ])("%s %j", async (name, shape, expected, factor) => {
    const count = shape.length > 0 ? shape[0]! : 1;
    const weights = await weightsOf({
      "x.weight": e4m3([3, 4]),
      [name]: f32(shape, new Array(count).fill(2)),
      "x.scale_input": f32([], [9]),
    });
    const tensor = weights.find("x.weight")!;
    expect(tensor).toMatchObject({ dtype: "F8_E4M3", shape: [3, 4], length: 12 });
    expect(tensor.scale).toMatchObject({ factor, tensor: { name, dtype: "F32", shape: expected } });
    await checkQuantisation(weights, undefined);
  });

  test("bitsandbytes' SCB is the largest magnitude of each row", async () => {
    const weights = await weightsOf({ "x.weight": int8([2, 2], [127, 1, 0, 0]), "x.SCB": f32([2], [3, 0]) });
    expect(weights.find("x.weight")!.scale).toMatchObject({ factor: 1 / 127, tensor: { name: "x.SCB", shape: [2] } });
    await checkQuantisation(weights, { quant_method: "bitsandbytes", load_in_8bit: true });
  });

  test("plain float8 has none, in weights, biases and norms", async () => {
    const weights = await weightsOf({ "x.weight": e4m3([3, 4]), "x.bias": e4m3([3]) });
    expect([weights.find("x.weight")!.scale, weights.find("x.bias")!.scale]).toEqual([undefined, undefined]);
    await checkQuantisation(weights, undefined);
  });

  test("are found by the caller's names", () => {
    const entry = (name: string, dtype: string, shape: number[]) => ({ name, dtype, shape, offset: 8, length: 0 });
    const lookup: Lookup = (name) =>
      ({
        "a.weight": { file: "/f", entry: entry("other.a.weight", "F8_E5M2", [2, 2]) },
        "a.scale_weight": { file: "/g", entry: entry("other.a.scale_weight", "F32", []) },
      })[name];
    expect(resolveTensor(lookup, "a.weight")).toMatchObject({
      ...{ name: "a.weight", file: "/f", dtype: "F8_E5M2" },
      scale: { tensor: { name: "a.scale_weight", file: "/g" } },
    });
    expect(resolveTensor(lookup, "b.weight")).toBeUndefined();
  });
});

describe("refused", () => {
  const find = (tensors: RawTensors) => async () => (await weightsOf(tensors)).find("x.weight");
  const check = (tensors: RawTensors) => async () => checkQuantisation(await weightsOf(tensors), undefined);

  test("int8 without its scale", async () => {
    expect(await refusal(find({ "x.weight": int8([1, 2], [1, 2]) }))).toMatch(/"x\.weight" \(I8\) has no scale/);
  });

  test("float8 without its scale, though the file is marked as scaled", async () => {
    expect(await refusal(find({ "x.weight": e4m3([2, 2]), scaled_fp8: e4m3([0]) }))).toMatch(
      /no scale, though "scaled_fp8" says/,
    );
  });

  test("a scale of another shape, for blocks or for columns", async () => {
    const scale = f32([2], [1, 1]);
    expect(await refusal(find({ "x.weight": e4m3([3, 2]), "x.weight_scale": scale }))).toMatch(
      /has a scale "x\.weight_scale" of F32 \[2\]; expected F32 with one value, or one for each of its 3 rows/,
    );
  });

  test.each([
    ["zero throughout", [0, 0], /scale "x\.SCB" .* is zero throughout/],
    ["not a number", [1, Number.NaN], /scale "x\.SCB" .* has the value NaN/],
    ["infinite", [1, Number.POSITIVE_INFINITY], /has the value Infinity/],
    ["negative", [1, -1], /has the value -1/],
  ])("a scale that is %s", async (_, values, message) => {
    const tensors = { "x.weight": int8([2, 2], [127, 1, -127, 0]), "x.SCB": f32([2], values) };
    expect(await refusal(check(tensors))).toMatch(message);
  });

  test("a matrix of one value, but not of zeros", async () => {
    const one = { "x.weight": e4m3([300, 300], 0x30), "x.scale_weight": f32([], [1]) };
    expect(await refusal(check(one))).toMatch(
      /all values of the quantised tensor "x\.weight" \(F8_E4M3\) are the same/,
    );
    await check({ "x.weight": e4m3([300, 300], 0) })();
    const last = e4m3([300, 300], 0x30);
    last.bytes[89_999] = 0x31;
    await check({ "x.weight": last })();
    await check({ "x.bias": e4m3([300], 0x30) })();
  });

  test("layouts of bitsandbytes that are in another order than rows", async () => {
    const weight = { "x.weight": int8([1, 2], [127, 2]), "x.SCB": f32([1], [1]) };
    const format = (value: number) => ({ dtype: "U8", shape: [], bytes: Uint8Array.of(value) });
    await check({ ...weight, "x.weight_format": format(0) })();
    expect(await refusal(check({ ...weight, "x.weight_format": format(2) }))).toMatch(/"x\.weight_format" is 2/);
  });

  test("a scale other than 1 beside weights that are not in 8 bits", async () => {
    const weight = { dtype: "F16", shape: [2, 2], bytes: Uint8Array.of(1, 60, 2, 60, 3, 60, 4, 60) };
    for (const suffix of ["scale_weight", "weight_scale"]) {
      await check({ "x.weight": weight, [`x.${suffix}`]: f32([], [1]) })();
      expect(await refusal(check({ "x.weight": weight, [`x.${suffix}`]: f32([2], [1, 0.5]) }))).toMatch(
        new RegExp(`"x\\.weight" is F16, but beside it is the scale "x\\.${suffix}"`),
      );
    }
  });

  test("formats of ComfyUI that are more than scaled values", async () => {
    const described = (text: string) => {
      const bytes = new TextEncoder().encode(text);
      const weight = { ...e4m3([2, 2], 0x30), bytes: Uint8Array.of(1, 2, 3, 4) };
      return {
        "x.weight": weight,
        "x.weight_scale": f32([], [1]),
        "x.comfy_quant": { dtype: "U8", shape: [bytes.length], bytes },
      };
    };
    await check(described('{"format": "float8_e4m3fn", "full_precision_matrix_mult": true}'))();
    expect(await refusal(check(described('{"format": "mxfp8"}')))).toMatch(
      /quantised by ComfyUI as \{"format": "mxfp8"\} \("x\.comfy_quant"\), which cannot be read/,
    );
    expect(await refusal(check(described('{"format": "int8_tensorwise", "convrot": true}')))).toMatch(/convrot/);
    expect(await refusal(check(described("{")))).toMatch(/"x\.comfy_quant" is not JSON/);
  });

  const u8 = { dtype: "U8", shape: [4], bytes: new Uint8Array(4) };
  test.each([
    [/bitsandbytes in 4 bits.*dequantize\(\)/, ["x.weight.absmax", "x.weight.quant_state.bitsandbytes__nf4"], {}],
    [/bitsandbytes in 4 bits/, [], { quant_method: "bitsandbytes", load_in_4bit: true }],
    [/quanto.*weight\.dequantize\(\)/, ["x.weight._data", "x.weight._scale"], {}],
    [/torchao/, [], { quant_method: "torchao" }],
    [/SVDQuant/, ["x.qweight", "x.wscales", "x.proj_down"], {}],
    [/GPTQ or AWQ/, ["x.qweight", "x.qzeros"], {}],
    [/GPTQ or AWQ/, [], { quant_method: "awq" }],
    [/GGUF/, [], { quant_method: "gguf" }],
    [/scale for each block/, ["x.weight_scale_2"], {}],
    [/compressed-tensors/, [], { quant_method: "compressed-tensors" }],
    [/HQQ/, ["x.W_q"], {}],
    [/"newest"/, [], { quant_method: "newest" }],
  ])("by its name: %s", async (message, names, config) => {
    const weights = await weightsOf({ "x.bias": u8, ...Object.fromEntries(names.map((name) => [name, u8])) });
    const text = await refusal(() => checkQuantisation(weights, config));
    expect(text).toMatch(message);
    expect(text).not.toMatch(/Convert the file/);
  });

  test("config.json is asked as a checkpoint is opened", async () => {
    const folder = await copyModel("medium");
    await editJson(join(folder, "text_encoder_3/config.json"), (config) => {
      config.quantization_config = { quant_method: "bitsandbytes", load_in_4bit: true };
    });
    expect(await refusal(() => openCheckpoint(folder))).toMatch(
      /text_encoder_3 are quantised by bitsandbytes in 4 bits/,
    );
  });

  test("a damaged scale, as a checkpoint is opened", async () => {
    const folder = await modelWith(join(await temporaryFolder(), "model"), "medium", t5, async (tensors) => {
      const scaled = await scaledT5(tensors);
      const name = Object.keys(scaled).find((each) => each.endsWith(".scale_weight"))!;
      return { ...scaled, [name]: f32([], [0]) };
    });
    expect(await refusal(() => openCheckpoint(folder))).toMatch(/is zero throughout/);
  });
});
