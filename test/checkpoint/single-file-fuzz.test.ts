/**
 * Headers of checkpoints in one file, changed at random: each is refused with an error that names the file, or the model has the very
 * weights of the file that was changed. FUZZ_CASES sets how many there are.
 */

import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { openCheckpoint } from "../../lib/checkpoint/index.js";
import { CheckpointError } from "../../lib/errors.js";
import { GraphLibrary } from "../../lib/networks/library.js";
import { fixture, temporaryFolder } from "./folders.js";
import { type Entry, readHeader } from "./safetensors-file.js";

const cases = Number(process.env.FUZZ_CASES ?? 200);

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

/** All that decides what is drawn: every graph, and for each weight where in the file's data it lies. */
async function weightsOf(file: string, base: string, dataStart: number): Promise<string> {
  const graphs = new GraphLibrary(await openCheckpoint(file, { base }));
  const all = [...graphs.essential.map(({ graph }) => graph), graphs.get("vae_encoder")];
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

test.each([
  ["sd3", 1],
  ["medium", 2],
] as const)("%s", { timeout: Math.max(60_000, 200 * cases) }, async (model, seed) => {
  const pick = random(seed);
  const { header, data } = readHeader(fixture(model, "single/full.safetensors"));
  const base = fixture(model, "model");
  const file = join(await temporaryFolder(), "mutated.safetensors");
  const names = Object.keys(header);
  const write = (json: Buffer, length = json.length) => {
    const start = Buffer.alloc(8);
    start.writeBigUInt64LE(BigInt(length));
    writeFileSync(file, Buffer.concat([start, json, data]));
    return 8 + length;
  };
  const jsonOf = (changed: Header | Record<string, unknown>) => Buffer.from(JSON.stringify(changed));
  const start = write(jsonOf(header));
  const expected = await weightsOf(file, base, start);
  const counts = { refused: 0, same: 0 };
  for (let index = 0; index < cases / 2; index++) {
    let what: string;
    let dataStart: number;
    if (pick(5) === 0) {
      // The bytes of the header, or its length.
      const json = jsonOf(header);
      const at = pick(json.length);
      const value = pick(256);
      const length = pick(4) === 0 ? json.length + pick(64) - 32 : json.length;
      json[at] = value;
      what = `byte ${at} becomes ${value}, length ${length - json.length}`;
      dataStart = write(json, length);
    } else {
      const [kind, change] = kinds[pick(kinds.length)]!;
      const name = names[pick(names.length)]!;
      const replaced = change(header[name]!, name, names, pick);
      what = `${kind}: ${name} → ${JSON.stringify(replaced)}`;
      const changed = Object.entries(header).flatMap(([each, entry]): [string, unknown][] =>
        each === name ? replaced : [[each, entry]],
      );
      dataStart = write(jsonOf(Object.fromEntries(changed)));
    }
    const result = await weightsOf(file, base, dataStart).catch((error: unknown) => error);
    if (typeof result === "string") {
      counts.same++;
      expect(result === expected, what).toBe(true);
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
