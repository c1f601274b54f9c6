// Models with 8-bit weights: against diffusers' and transformers' results from the same values, and against the same values in float32.
import { cp, mkdtemp, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import path from "node:path";
import { FlowTurbo } from "flowturbo";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { openCheckpoint } from "../../lib/checkpoint/index.js";
import { GraphLibrary } from "../../lib/networks/library.js";
import { relativeBuckets } from "../../lib/networks/t5.js";
import type { EmitOptions } from "../../lib/onnx/index.js";
import { sessionOptions } from "../../lib/runtimes/onnxruntime/sessions.js";
import { tensorRtEmitOptions } from "../../lib/runtimes/tensorrt/row.js";
import { fixture, readAll, relativeError } from "../support/fixtures.js";
import {
  asFloat8,
  f32,
  int8,
  modelWith,
  type RawTensors,
  readRaw,
  scaledT5,
  valuesOf,
  writeRaw,
} from "../support/quantised.js";
import { withValues } from "../support/with-values.js";

process.env.ORT_DISABLE_TELEMETRY = "1";
const ort = await import("onnxruntime-node");

const prompt = "a red circle above a small blue square";
const t5File = "text_encoder_3/model.safetensors";
/** The bar for the same values in another implementation is 5e-5 of the largest; rounding alone is ten times less. */
const tolerance = 1e-5;

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(path.join(tmpdir(), "flowturbo-8bit-"));
});
afterAll(() => rm(folder, { recursive: true, force: true }));

async function draw(model: string, weights: "lazy" | "folded", noise?: Awaited<ReturnType<typeof readAll>>[string]) {
  await using loaded = await FlowTurbo.load(model, { runtime: "onnxruntime", weights, measureCosts: false });
  const options = { sampler: "euler", steps: noise ? 6 : 2, width: 64, height: 64, maxSequenceLength: 32 } as const;
  const drawn = noise ? { noise } : { seed: 1 };
  return withValues(loaded, { prompt, negativePrompt: "blurry, low quality", ...options, ...drawn });
}

/** What T5 makes of the prompt's ids, as a runtime's way of writing graphs computes it. */
async function encode(model: string, options: Partial<EmitOptions> = {}) {
  const checkpoint = await openCheckpoint(model);
  const graphs = new GraphLibrary(checkpoint);
  const { compute: _, ...rest } = { ...graphs.optionsOf("t5"), ...options };
  const graph = graphs.emittedAs(() => ({ ...rest, compute: "float32" })).get("t5");
  const session = await ort.InferenceSession.create(
    graph.bytes,
    sessionOptions({ root: "/", widening: "lazy" }, { threads: 1 }),
  );
  const ids = JSON.parse(await readFile(fixture("medium/token_ids.json"), "utf8")).tokenizer_3[prompt] as number[];
  const buckets = relativeBuckets(checkpoint.textEncoder3!.config, ids.length);
  const { hidden } = await session.run({
    ids: new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]),
    relative_buckets: new ort.Tensor("int64", buckets, [ids.length, ids.length]),
  });
  await session.release();
  return { dtype: "float32", shape: hidden!.dims, data: hidden!.data as Float32Array } as const;
}

describe("T5 in scaled float8", () => {
  let model: string;
  beforeAll(async () => {
    model = await modelWith(path.join(folder, "scaled"), "medium", t5File, scaledT5);
  });

  it.each(["lazy", "folded"] as const)("draws what diffusers draws from the same values: %s", async (weights) => {
    const reference = await readAll(fixture("medium/single_t5fp8.safetensors"));
    const { latents, pixels } = await draw(model, weights, reference.noise!);
    expect(relativeError(latents, reference.latents!)).toBeLessThan(tolerance);
    expect(relativeError(pixels, reference.image!)).toBeLessThan(tolerance);
  });

  it("encodes as transformers does, in each way that graphs are written", async () => {
    const { t5_embeds: expected } = await readAll(fixture("medium/single_t5fp8.safetensors"));
    const options = [{}, { linear: "matmul" }, { eightBit: "dequantize" }] as const;
    for (const each of options) expect(relativeError(await encode(model, each), expected!)).toBeLessThan(tolerance);
  });
});

it("T5 in int8, as transformers and bitsandbytes save it, encodes what its values give", async () => {
  const model = path.join(folder, "int8");
  await cp(fixture("medium/model"), model, { recursive: true });
  for (const file of ["config.json", "model.safetensors"])
    await cp(fixture("medium/t5_int8", file), path.join(model, "text_encoder_3", file));
  const { hidden } = await readAll(fixture("medium/t5_int8/hidden.safetensors"));
  for (const options of [{}, { linear: "matmul" }, { eightBit: "dequantize" }] as const)
    expect(relativeError(await encode(model, options), hidden!)).toBeLessThan(tolerance);
  // And the whole model runs with it.
  expect((await draw(model, "lazy")).images).toHaveLength(1);
});

/** Every tensor in 8 bits, biases, norms and embeddings too, and the same values in float32. */
async function everywhere(
  name: string,
  quantise: (tensors: RawTensors) => Promise<RawTensors>,
): Promise<[string, string]> {
  const models = [path.join(folder, `${name}-8`), path.join(folder, `${name}-32`)] as const;
  for (const model of models) await cp(fixture("large/model"), model, { recursive: true });
  const parts = ["text_encoder/model", "text_encoder_2/model", "text_encoder_3/model"];
  for (const part of [...parts, "transformer/diffusion_pytorch_model", "vae/diffusion_pytorch_model"]) {
    const small = await quantise(await readRaw(fixture("large/model", `${part}.safetensors`)));
    const wide: RawTensors = {};
    for (const [key, tensor] of Object.entries(small)) {
      if (/\.(SCB|weight_scale)$/.test(key)) continue;
      const values = tensor.dtype === "I64" ? null : valuesOf(tensor);
      const module = key.replace(/\.weight$/, "");
      const scb = small[`${module}.SCB`];
      const scale = small[`${module}.weight_scale`];
      const factors = scb ? valuesOf(scb).map((each) => each / 127) : scale && valuesOf(scale);
      const columns = tensor.shape.slice(1).reduce((a, b) => a * b, 1);
      wide[key] = values
        ? f32(
            tensor.shape,
            factors ? values.map((v, i) => v * factors[factors.length === 1 ? 0 : Math.floor(i / columns)]!) : values,
          )
        : tensor;
    }
    await writeRaw(path.join(models[0], `${part}.safetensors`), small);
    await writeRaw(path.join(models[1], `${part}.safetensors`), wide);
  }
  return [...models];
}

const each = async (
  tensors: RawTensors,
  change: (key: string, values: Float32Array, shape: readonly number[]) => Promise<RawTensors>,
) =>
  Object.assign(
    {},
    ...(await Promise.all(
      Object.entries(tensors).map(([key, tensor]) =>
        tensor.dtype === "F32" ? change(key, valuesOf(tensor), tensor.shape) : { [key]: tensor },
      ),
    )),
  ) as RawTensors;

it.each(["F8_E4M3", "F8_E5M2"] as const)("plain %s in all tensors of all networks", async (dtype) => {
  const [small, wide] = await everywhere(dtype, (tensors) =>
    each(tensors, async (key, values, shape) => ({ [key]: await asFloat8(shape, values, dtype) })),
  );
  const expected = await draw(wide, "lazy");
  for (const weights of ["lazy", "folded"] as const)
    expect(relativeError((await draw(small, weights)).pixels, expected.pixels)).toBeLessThan(tolerance);
});

it("int8 with a scale for each row, in linear layers, convolutions, norms and embeddings", async () => {
  const [small, wide] = await everywhere("int8", (tensors) =>
    each(tensors, async (key, values, shape) => {
      if (!key.endsWith(".weight")) return { [key]: f32(shape, values) };
      const rows = shape[0]!;
      const columns = values.length / rows;
      const most = Array.from({ length: rows }, (_, row) =>
        values.subarray(row * columns, (row + 1) * columns).reduce((a, b) => Math.max(a, Math.abs(b)), 0),
      );
      const codes = values.map((value, i) => Math.round((127 * value) / (most[Math.floor(i / columns)]! || 1)));
      return { [key]: int8(shape, codes), [key.replace(/weight$/, "SCB")]: f32([rows], most) };
    }),
  );
  const expected = await draw(wide, "lazy");
  for (const weights of ["lazy", "folded"] as const)
    expect(relativeError((await draw(small, weights)).pixels, expected.pixels)).toBeLessThan(tolerance);
});

describe("TensorRT", () => {
  const network = {
    name: "t5",
    dtype: "F16",
    overflowsInFloat16: true,
    isConvolutional: false,
    isOfSteps: false,
    bytesOf16Bit: 0,
  } as const;
  it("has no E5M2, and E4M3 from compute capability 8.9", () => {
    const emit = (targets: number[], stored: "F8_E4M3" | "F8_E5M2" | "I8") =>
      tensorRtEmitOptions(targets)({ ...network, eightBit: [stored] });
    expect(emit([89], "F8_E4M3").eightBit).toBe("dequantize");
    expect(emit([80], "I8").eightBit).toBe("dequantize");
    expect(() => emit([86], "F8_E4M3")).toThrow(/compute capability 8\.6.*8\.9/);
    expect(() => emit([89], "F8_E5M2")).toThrow(/F8_E5M2/);
  });
});
