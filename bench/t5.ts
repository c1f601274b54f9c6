/**
 * Memory, time and error of T5's weights in bfloat16 and in int8 (`t5Weights`), with T5-XXL's widths and 4 of its 24 layers, weights as T5
 * begins with them, 256 tokens. Each runs in a process of its own, whose anonymous memory (what cannot be given back to the files) counts.
 *
 *   npm run bench:t5
 */

import "./telemetry.js";
import { spawnSync } from "node:child_process";
import { existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { open, realpath, stat } from "node:fs/promises";
import path from "node:path";
import { openWeights, type Part, quantisedT5, type T5Config } from "../lib/checkpoint/index.js";
import { gigabytes } from "../lib/common/memory.js";
import { emitT5, relativeBuckets } from "../lib/networks/t5.js";
import { cpuEmitOptions } from "../lib/onnx/index.js";
import { sessionOptions } from "../lib/runtimes/onnxruntime/sessions.js";
import { machineLine, report, root, table } from "./support.js";

const layers = 4;
const tokens = 256;
const config: T5Config = {
  ...{ vocabSize: 32128, dModel: 4096, dKv: 64, dFf: 10240, numLayers: layers, numHeads: 64 },
  ...{ relativeAttentionNumBuckets: 32, relativeAttentionMaxDistance: 128, layerNormEpsilon: 1e-6 },
  ...{ activation: "gelu_new", gated: true },
};
const folder = path.join(root, "bench/.work/t5-xxl-4");
const cache = path.join(folder, "cache");

/** transformers' `_init_weights`. */
async function writeModel(): Promise<void> {
  const file = path.join(folder, "model.safetensors");
  if (existsSync(file)) return;
  mkdirSync(folder, { recursive: true });
  const { dModel, dFf, numHeads, dKv, vocabSize } = config;
  const inner = numHeads * dKv;
  const tensors: [string, number[], number][] = [["shared.weight", [vocabSize, dModel], 1]];
  for (let layer = 0; layer < layers; layer++) {
    const block = `encoder.block.${layer}.layer`;
    const attention = `${block}.0.SelfAttention`;
    const dense = `${block}.1.DenseReluDense`;
    if (layer === 0) tensors.push([`${attention}.relative_attention_bias.weight`, [32, numHeads], dModel ** -0.5]);
    tensors.push([`${attention}.q.weight`, [inner, dModel], (dModel * dKv) ** -0.5]);
    for (const part of ["k", "v"]) tensors.push([`${attention}.${part}.weight`, [inner, dModel], dModel ** -0.5]);
    tensors.push([`${attention}.o.weight`, [dModel, inner], inner ** -0.5]);
    for (const part of ["wi_0", "wi_1"]) tensors.push([`${dense}.${part}.weight`, [dFf, dModel], dModel ** -0.5]);
    tensors.push([`${dense}.wo.weight`, [dModel, dFf], dFf ** -0.5]);
    for (const part of [0, 1]) tensors.push([`${block}.${part}.layer_norm.weight`, [dModel], 0]);
  }
  tensors.push(["encoder.final_layer_norm.weight", [dModel], 0]);
  const header: Record<string, unknown> = {};
  let end = 0;
  for (const [name, shape] of tensors) {
    const length = 2 * shape.reduce((a, b) => a * b, 1);
    header[name] = { dtype: "BF16", shape, data_offsets: [end, end + length] };
    end += length;
  }
  const json = Buffer.from(JSON.stringify(header));
  const start = Buffer.alloc(8);
  start.writeBigUInt64LE(BigInt(json.length));
  const handle = await open(file, "w");
  await handle.write(Buffer.concat([start, json]));
  // A prime number of draws, taken from another place in each tensor: rows of a matrix differ.
  const normals = new Float32Array(1_048_573);
  let state = 1;
  const uniform = () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return (state + 0.5) / 2 ** 32;
  };
  for (let i = 0; i < normals.length; i++)
    normals[i] = Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform());
  let place = 0;
  for (const [, shape, deviation] of tensors) {
    const count = shape.reduce((a, b) => a * b, 1);
    const words = new Uint16Array(new Float32Array(normals.map((value) => (deviation ? value * deviation : 1))).buffer);
    const block = Buffer.from(Uint16Array.from({ length: normals.length }, (_, i) => words[2 * i + 1]!).buffer);
    for (let left = 2 * count; left > 0; ) {
      const at = 2 * (place % normals.length);
      const piece = block.subarray(at, Math.min(block.length, at + left));
      await handle.write(piece);
      place += piece.length / 2;
      left -= piece.length;
    }
  }
  await handle.close();
}

const status = (key: string) =>
  1024 * Number(new RegExp(`${key}:\\s+(\\d+)`).exec(readFileSync("/proc/self/status", "utf8"))?.[1]);

async function encode(kind: string): Promise<object> {
  const stored: Part<T5Config> = { config, weights: await openWeights(await realpath(folder), "model") };
  let anonymous = 0;
  const poll = setInterval(() => {
    anonymous = Math.max(anonymous, status("RssAnon"));
  }, 20);
  let began = performance.now();
  const part = kind === "int8" || kind === "quantise" ? (await quantisedT5(stored, cache))! : stored;
  const quantiseSeconds = (performance.now() - began) / 1000;
  if (kind === "quantise") return { quantiseSeconds, anonymous, peak: status("VmHWM") };
  const ort = await import("onnxruntime-node");
  const graph = emitT5("t5", part, cpuEmitOptions);
  began = performance.now();
  const options = sessionOptions({ root: "/", widening: "lazy" }, { threads: 2 });
  const session = await ort.InferenceSession.create(graph.bytes, options);
  const loadSeconds = (performance.now() - began) / 1000;
  const ids = BigInt64Array.from({ length: tokens }, (_, i) => BigInt((i * 7919) % config.vocabSize));
  const feeds = {
    ids: new ort.Tensor("int64", ids, [1, tokens]),
    relative_buckets: new ort.Tensor("int64", relativeBuckets(config, tokens), [tokens, tokens]),
  };
  let seconds = Number.POSITIVE_INFINITY;
  let hidden = new Float32Array();
  for (let round = 0; round < 3; round++) {
    began = performance.now();
    hidden = (await session.run(feeds)).hidden!.data as Float32Array<ArrayBuffer>;
    seconds = Math.min(seconds, (performance.now() - began) / 1000);
    // A run blocks the loop, so the poll sees what is there between runs; the peak of all memory is the kernel's own count.
    anonymous = Math.max(anonymous, status("RssAnon"));
  }
  clearInterval(poll);
  writeFileSync(path.join(folder, `${kind}.f32`), new Uint8Array(hidden.buffer));
  const [{ file } = { file: "" }] = part.weights.files;
  return { bytes: (await stat(file)).size, loadSeconds, seconds, anonymous, peak: status("VmHWM") };
}

const [, , kind] = process.argv;
if (kind) {
  console.log(JSON.stringify(await encode(kind)));
  process.exit();
}
await writeModel();
rmSync(cache, { recursive: true, force: true });
const results: Record<string, Record<string, number>> = {};
// Twice, since the file that has just been written may still be on its way to the disk.
for (const each of ["quantise", "stored", "int8", "stored", "int8"]) {
  const {
    stdout,
    stderr,
    status: code,
  } = spawnSync("npx", ["tsx", "bench/t5.ts", each], { cwd: root, encoding: "utf8" });
  if (code !== 0) throw new Error(stderr);
  const result = JSON.parse(stdout) as Record<string, number>;
  const before = results[each];
  if (!before || result.seconds! < before.seconds!) results[each] = result;
  console.log(each, stdout.trim());
}
const read = (name: string) => new Float32Array(new Uint8Array(readFileSync(path.join(folder, `${name}.f32`))).buffer);
const [expected, actual] = [read("stored"), read("int8")];
const square = (values: Float32Array) => values.reduce((sum, value) => sum + value * value, 0);
const error = Math.sqrt(square(actual.map((value, i) => value - expected[i]!)) / square(expected));
console.log("error", error);
const row = (name: string) => {
  const { bytes, peak, seconds } = results[name]!;
  return [name, `${gigabytes(bytes!)} GB`, `${gigabytes(peak!)} GB`, `${seconds!.toFixed(2)} s`];
};
const page = [
  "# T5's weights in int8",
  "",
  `T5-XXL's widths with ${layers} of its 24 layers, weights as T5 begins with them, ${tokens} tokens on 2 threads, 16-bit weights lazy. Peak: the resident size of the process, mapped weights included. \`npm run bench:t5\`.`,
  "",
  table([["t5Weights", "file", "peak", "encoding"], row("stored"), row("int8")]),
  "",
  `Quantising took ${results.quantise!.quantiseSeconds!.toFixed(1)} s, with ${gigabytes(results.quantise!.peak!)} GB resident at most. The embedding differs by ${(100 * error).toFixed(2)} % (root mean square).`,
  "",
  machineLine(),
];
await report("t5", { layers, tokens, error, ...results }, page.join("\n"));
