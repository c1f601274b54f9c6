/**
 * The baseline: what a user of onnxruntime-node writes over the graphs that bench/peers/export.py makes. One session a
 * module with default options, the Euler loop and guidance in JavaScript, one thread of control.
 *
 *   node bench/peers/onnxruntime.mjs <graphs> '{"prompt": "a red circle", "steps": 28, "guidance": 4.5, "size": 64, "tokens": 16, "out": "x.png"}'
 */

import { readFileSync } from "node:fs";
import path from "node:path";
import { pathToFileURL } from "node:url";
import { Tokenizer } from "@huggingface/tokenizers";
import sharp from "sharp";

// Read when the library is loaded; bench/telemetry.ts says why. This file is run by node alone, which has no loader for that one.
process.env.ORT_DISABLE_TELEMETRY ||= "1";
const library = await import("onnxruntime-node");
// A loader of TypeScript imports it without a default export.
const ort = library.default ?? library;

const json = (file) => JSON.parse(readFileSync(file, "utf8"));

/** @param options of the sessions */
export async function open(folder, options = {}) {
  const config = json(path.join(folder, "config.json"));
  const names = ["text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae_decoder"];
  const sessions = {};
  for (const name of names) sessions[name] = await ort.InferenceSession.create(path.join(folder, `${name}.onnx`), options);
  const tokenizers = ["tokenizer", "tokenizer_2", "tokenizer_3"].map(
    (name) => new Tokenizer(json(path.join(folder, `${name}.json`)), {}),
  );

  const ids = (index, texts, length) => {
    const data = new BigInt64Array(texts.length * length).fill(BigInt(config.pads[index]));
    texts.forEach((text, row) => {
      const encoded = tokenizers[index].encode(text).ids.slice(0, length);
      encoded.forEach((id, column) => {
        data[row * length + column] = BigInt(id);
      });
    });
    return new ort.Tensor("int64", data, [texts.length, length]);
  };

  async function encode(texts, tokens) {
    const [first, second] = config.tokens;
    const l = await sessions.text_encoder.run({ input_ids: ids(0, texts, first) });
    const g = await sessions.text_encoder_2.run({ input_ids: ids(1, texts, second) });
    const t5 = await sessions.text_encoder_3.run({ input_ids: ids(2, texts, tokens) });
    const rows = texts.length;
    const joint = config.joint;
    const context = new Float32Array(rows * (first + tokens) * joint);
    const widths = [l.hidden.dims[2], g.hidden.dims[2]];
    for (let row = 0; row < rows; row++) {
      for (let token = 0; token < first; token++) {
        const at = (row * (first + tokens) + token) * joint;
        const [a, b] = widths;
        context.set(l.hidden.data.subarray((row * first + token) * a, (row * first + token + 1) * a), at);
        context.set(g.hidden.data.subarray((row * first + token) * b, (row * first + token + 1) * b), at + a);
      }
      context.set(
        t5.hidden.data.subarray(row * tokens * joint, (row + 1) * tokens * joint),
        (row * (first + tokens) + first) * joint,
      );
    }
    const [a, b] = [l.pooled.dims[1], g.pooled.dims[1]];
    const pooled = new Float32Array(rows * (a + b));
    for (let row = 0; row < rows; row++) {
      pooled.set(l.pooled.data.subarray(row * a, (row + 1) * a), row * (a + b));
      pooled.set(g.pooled.data.subarray(row * b, (row + 1) * b), row * (a + b) + a);
    }
    return {
      encoder_hidden_states: new ort.Tensor("float32", context, [rows, first + tokens, joint]),
      pooled_projections: new ort.Tensor("float32", pooled, [rows, a + b]),
    };
  }

  async function generate({ prompt, steps, guidance, size, tokens, noise, out }) {
    const start = performance.now();
    const text = await encode(["", prompt], tokens);
    const side = size / config.factor;
    const shape = [1, config.channels, side, side];
    const count = config.channels * side * side;
    let x = noise ?? Float32Array.from({ length: count }, normal);
    // diffusers' FlowMatchEulerDiscreteScheduler: sigmas 1 … 1/1000 by `steps`, shifted, then 0.
    const sigmas = Array.from({ length: steps }, (_, i) => {
      const shifted = (sigma) => (config.shift * sigma) / (1 + (config.shift - 1) * sigma);
      const [high, low] = [shifted(1), shifted(1 / 1000)];
      return shifted(steps === 1 ? high : high + ((low - high) * i) / (steps - 1));
    });
    sigmas.push(0);
    const begun = performance.now();
    for (let step = 0; step < steps; step++) {
      const pair = new Float32Array(2 * count);
      pair.set(x);
      pair.set(x, count);
      const { out: velocity } = await sessions.transformer.run({
        hidden_states: new ort.Tensor("float32", pair, [2, ...shape.slice(1)]),
        timestep: new ort.Tensor("float32", new Float32Array(2).fill(1000 * sigmas[step]), [2]),
        ...text,
      });
      const v = velocity.data;
      const h = sigmas[step + 1] - sigmas[step];
      const next = new Float32Array(count);
      for (let i = 0; i < count; i++) next[i] = x[i] + h * (v[i] + guidance * (v[count + i] - v[i]));
      x = next;
    }
    const denoised = performance.now();
    const { image } = await sessions.vae_decoder.run({
      latents: new ort.Tensor(
        "float32",
        x.map((value) => value / config.scaling + config.offset),
        shape,
      ),
    });
    const decoded = performance.now();
    if (out) {
      const pixels = new Uint8Array(3 * size * size);
      for (let c = 0; c < 3; c++)
        for (let i = 0; i < size * size; i++)
          pixels[3 * i + c] = Math.round(Math.min(1, Math.max(0, image.data[c * size * size + i] / 2 + 0.5)) * 255);
      await sharp(pixels, { raw: { width: size, height: size, channels: 3 } })
        .png()
        .toFile(out);
    }
    const end = performance.now();
    return {
      milliseconds: end - start,
      denoise: denoised - begun,
      decode: decoded - denoised,
      latents: x,
      image: image.data,
    };
  }

  return { generate, release: () => Promise.all(Object.values(sessions).map((session) => session.release())) };
}

function normal() {
  return Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
}

if (import.meta.url === pathToFileURL(process.argv[1]).href) {
  const driver = await open(process.argv[2]);
  const { latents, image, ...times } = await driver.generate(JSON.parse(process.argv[3]));
  console.log(JSON.stringify(times));
}
