/**
 * Headers of checkpoints in one file, changed at random: each is refused with an error that names the file, or the model has the very
 * weights of the file that was changed. FUZZ_CASES sets how many there are, FUZZ_SEED makes others.
 */

import { truncateSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { clipShapes, type Shapes, t5Shapes, transformerShapes, vaeShapes } from "../../bench/single-file-checkpoint.js";
import { openCheckpoint } from "../../lib/checkpoint/index.js";
import { CheckpointError } from "../../lib/errors.js";
import { GraphLibrary } from "../../lib/networks/library.js";
import type { OnnxGraph } from "../../lib/onnx/index.js";
import { fixture, temporaryFolder } from "./folders.js";
import { type Entry, readHeader } from "./safetensors-file.js";

const cases = Number(process.env.FUZZ_CASES ?? 200);
const seed = Number(process.env.FUZZ_SEED ?? 0);
/** Files of Stability that lack this tensor are whole: the layer is the identity. */
const optional = "text_encoders.clip_l.transformer.text_projection.weight";

/** Numbers below `below` from a seed (mulberry32). */
function random(seed: number): (below: number) => number {
  let state = seed;
  return (below) => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) % below;
  };
}

type Pick = (below: number) => number;
type Header = Record<string, Entry>;

/** Each changes one entry; the order of the others stays. */
const changes: Record<
  string,
  (entry: Entry, name: string, names: readonly string[], pick: Pick) => [string, unknown][]
> = {
  letter: (entry, name, _, pick) => {
    const at = pick(name.length);
    return [[name.slice(0, at) + String.fromCharCode(46 + pick(76)) + name.slice(at + 1), entry]];
  },
  cut: (entry, name, _, pick) => [[name.slice(0, pick(name.length)), entry]],
  number: (entry, name, _, pick) => [[name.replace(/\d+/, String(pick(12))), entry]],
  "zero before a number": (entry, name) => [[name.replace(/\.(\d)/, ".0$1"), entry]],
  prefix: (entry, name) => [[name.split(".").slice(1).join("."), entry]],
  "name of another": (entry, _, names, pick) => [[names[pick(names.length)]!, entry]],
  removed: () => [],
  "twice, once under a new name": (entry, name) => [
    [name, entry],
    [`${name}.copy`, entry],
  ],
  "a size": (entry, name, _, pick) => {
    const shape = [...entry.shape];
    shape[pick(Math.max(1, shape.length))] = [0, 1, -1, 7, 1.5, 2 ** 40, 2 ** 53][pick(7)]!;
    return [[name, { ...entry, shape }]];
  },
  "another shape of as many values": (entry, name, _, pick) => {
    const { shape } = entry;
    const [first = 1, ...rest] = shape;
    const halved = first % 2 ? [first, ...rest, 1] : [first / 2, 2, ...rest];
    const moved = [first / 2, ...rest.slice(0, -1), 2 * (rest.at(-1) ?? 1)];
    const all = [[...shape].reverse(), [1, ...shape], [...shape, 1], halved, moved, [shape.reduce((a, b) => a * b, 1)]];
    return [[name, { ...entry, shape: all[pick(all.length)] }]];
  },
  offset: (entry, name, _, pick) => {
    const offsets = [...entry.data_offsets];
    offsets[pick(2)]! += [-2, 2, 64, -(2 ** 31), 2 ** 31, 2 ** 53, 0.5][pick(7)]!;
    return [[name, { ...entry, data_offsets: offsets }]];
  },
  "both offsets": (entry, name, _, pick) => {
    const by = [-2, 2, 128, -128][pick(4)]!;
    return [[name, { ...entry, data_offsets: entry.data_offsets.map((offset) => offset + by) }]];
  },
  dtype: (entry, name, _, pick) => [[name, { ...entry, dtype: ["I16", "U8", "F32", "F64", "Q4", "", null][pick(7)] }]],
  "no object": (_, name, __, pick) => [[name, [null, 1, "x", [], {}][pick(5)]]],
};
const kinds = Object.entries(changes);

/** What is read of a file, with what the model has to say of it. */
interface Contents {
  /** All that decides what is drawn: every graph, and for each weight and scale where in the file's data it lies. */
  readonly weights: string;
  readonly warnings: readonly string[];
}

async function contentsOf(file: string, base: string | undefined, dataStart: number): Promise<Contents> {
  const checkpoint = await openCheckpoint(file, { base });
  const graphs = new GraphLibrary(checkpoint);
  const all = [...graphs.essential.map(({ graph }) => graph), graphs.get("vae_encoder")];
  return { weights: placesIn(all, dataStart), warnings: checkpoint.warnings };
}

/** The same for TAESD's decoder. */
async function previewContentsOf(file: string, model: string | undefined, dataStart: number): Promise<Contents> {
  const checkpoint = await openCheckpoint(model!, { previewVae: file });
  const graph = new GraphLibrary(checkpoint).get("preview_decoder");
  return { weights: placesIn([graph], dataStart), warnings: checkpoint.warnings };
}

function placesIn(all: readonly OnnxGraph[], dataStart: number): string {
  return JSON.stringify(
    all.map((graph) => [
      graph.fingerprint,
      [...graph.externals].map(([name, { dtype, shape, offset, length }]) => [
        name,
        dtype,
        shape,
        offset - dataStart,
        length,
      ]),
    ]),
  );
}

/** A file to be changed. */
interface Model {
  readonly base?: string;
  readonly contentsOf?: typeof contentsOf;
  readonly header: Header;
  /** What follows the header; a number for a hole of so many bytes. */
  readonly data: Buffer | number;
}

const ofFixture = (model: string, name: string) => (): Model => ({
  ...readHeader(fixture(model, "single", name)),
  base: fixture(model, "model"),
});

/** TAESD's decoder, for the model that is the base. */
const taesd = (): Model => ({
  ...readHeader(fixture("taesd", "taesd3_decoder.safetensors")),
  ...{ base: fixture("sd3", "model"), contentsOf: previewContentsOf },
});

/** A model that needs no base: what no shape says is that of the public models. */
function withoutBase(): Model {
  const parts: Record<string, Shapes> = {
    "model.diffusion_model.": transformerShapes({ layers: 2, width: 64, dual: 1, qkNorm: true, positions: 8 }),
    "text_encoders.clip_l.transformer.": clipShapes(768, 1),
    "text_encoders.clip_g.transformer.": clipShapes(1280, 1),
    "text_encoders.t5xxl.transformer.": t5Shapes(1),
    "text_encoders.clip_l.": { logit_scale: [] },
    "first_stage_model.": vaeShapes(),
  };
  const header: Header = {};
  let end = 0;
  for (const [prefix, shapes] of Object.entries(parts))
    for (const [name, shape] of Object.entries(shapes)) {
      const begin = end;
      end += 2 * shape.reduce((a, b) => a * b, 1);
      header[prefix + name] = { dtype: "BF16", shape: [...shape], data_offsets: [begin, end] };
    }
  return { header, data: end };
}

/** Writes a file with such a header. @returns where the data start */
function write(file: string, json: Buffer, data: Model["data"], length = json.length): number {
  const start = Buffer.alloc(8);
  start.writeBigUInt64LE(BigInt(length));
  const hole = typeof data === "number";
  writeFileSync(file, Buffer.concat([start, json, ...(hole ? [] : [data])]));
  if (hole) truncateSync(file, 8 + json.length + data);
  return 8 + length;
}

const jsonOf = (header: object) => Buffer.from(JSON.stringify(header));

test.each([
  ["sd3", ofFixture("sd3", "full.safetensors")],
  ["medium", ofFixture("medium", "full.safetensors")],
  ["medium with T5 in scaled float8", ofFixture("medium", "t5fp8.safetensors")],
  ["without a base", withoutBase],
  ["TAESD's decoder", taesd],
] as const)("%s", { timeout: Math.max(60_000, 200 * cases) }, async (title, modelOf) => {
  const pick = random(seed + title.length);
  const { header, data, base, contentsOf: read = contentsOf } = modelOf();
  const file = join(await temporaryFolder(), "mutated.safetensors");
  const names = Object.keys(header);
  const { [optional]: _, ...others } = header;
  const without = await read(file, base, write(file, jsonOf(others), data)).catch(() => null);
  const { weights: expected } = await read(file, base, write(file, jsonOf(header), data));
  const counts = { refused: 0, same: 0 };
  for (let index = 0; index < cases / 4; index++) {
    let what: string;
    let dataStart: number;
    let unknown: string | undefined;
    if (pick(5) === 0) {
      // The bytes of the header, or its length.
      const json = jsonOf(header);
      const at = pick(json.length);
      const value = pick(256);
      const length = pick(4) === 0 ? json.length + pick(64) - 32 : json.length;
      json[at] = value;
      what = `byte ${at} becomes ${value}, length ${length - json.length}`;
      dataStart = write(file, json, data, length);
    } else {
      const [kind, change] = kinds[pick(kinds.length)]!;
      const name = names[pick(names.length)]!;
      const replaced = change(header[name]!, name, names, pick);
      unknown = replaced.map(([each]) => each).find((each) => !(each in header));
      what = `${kind}: ${name} → ${JSON.stringify(replaced)}`;
      const changed = Object.entries(header).flatMap(([each, entry]): [string, unknown][] =>
        each === name ? replaced : [[each, entry]],
      );
      dataStart = write(file, jsonOf(Object.fromEntries(changed)), data);
    }
    const result = await read(file, base, dataStart).catch((error: unknown) => error as Error);
    if (!(result instanceof Error)) {
      counts.same++;
      const isWithout = result.weights !== expected && what.includes(optional);
      expect(result.weights === (isWithout ? without?.weights : expected), what).toBe(true);
      // It is there under a name of no part.
      if (isWithout && unknown !== undefined) expect(result.warnings.join(), what).toContain(unknown);
    } else {
      counts.refused++;
      expect(result, what).toBeInstanceOf(CheckpointError);
      // Where the shapes no longer say what the base says, the base's file is named first.
      expect((result as CheckpointError).message, what).toContain(file);
    }
  }
  expect(counts.refused).toBeGreaterThan(counts.same);
  // logit_scale and the like are not read.
  expect(counts.same).toBeGreaterThan(0);
});

test("scales with other values", async () => {
  const pick = random(seed + 3);
  const { header, data, base } = ofFixture("medium", "t5fp8.safetensors")();
  const file = join(await temporaryFolder(), "mutated.safetensors");
  const scales = Object.keys(header).filter((name) => name.endsWith(".scale_weight"));
  for (const value of [0, -0, -1, Number.NaN, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY]) {
    const name = scales[pick(scales.length)]!;
    const changed = Buffer.from(data as Buffer);
    changed.writeFloatLE(value, header[name]!.data_offsets[0]);
    const start = write(file, jsonOf(header), changed);
    const error = await contentsOf(file, base, start).catch((thrown: unknown) => thrown);
    expect(error, `${name} = ${value}`).toBeInstanceOf(CheckpointError);
    expect((error as CheckpointError).message).toContain(file);
  }
});
