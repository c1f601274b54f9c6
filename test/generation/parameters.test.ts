// Texts in the files of pictures: written so that readers take them, read back as options, and those of other tools known.

import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import fc from "fast-check";
import { embeddedModel, type GenerateOptions, Image } from "flowturbo";
import sharp from "sharp";
import { afterAll, describe, expect, it } from "vitest";
import { openCheckpoint } from "../../lib/checkpoint/index.js";
import { undecodable } from "../../lib/generation/file-kinds.js";
import { fitted, textsOf } from "../../lib/generation/metadata.js";
import { inspect, optionsOf, overridden } from "../../lib/generation/parameters.js";
import { settleRequest } from "../../lib/generation/request.js";
import { parametersOf } from "../../lib/generation/result.js";
import { PromptEncoder } from "../../lib/generation/text.js";
import { GraphLibrary } from "../../lib/networks/library.js";
import type { CalibratedSchedule } from "../../lib/schedule/index.js";
import { fixture } from "../support/fixtures.js";

const folder = mkdtempSync(path.join(os.tmpdir(), "flowturbo-parameters-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));
const written = (name: string, bytes: Uint8Array) => {
  const file = path.join(folder, name);
  writeFileSync(file, bytes);
  return file;
};

/** ImageDescription as TIFF 6.0 has it, found without the reader under test. */
function description(exif: Buffer): string {
  const tiff = exif.subarray(exif.indexOf("Exif\0\0") + 6);
  expect(tiff.toString("latin1", 0, 4)).toBe("II*\0");
  const start = tiff.readUInt32LE(4);
  for (let i = 0; i < tiff.readUInt16LE(start); i++) {
    const at = start + 2 + 12 * i;
    if (tiff.readUInt16LE(at) !== 0x010e) continue;
    const [length, value] = [tiff.readUInt32LE(at + 4), tiff.readUInt32LE(at + 8)];
    expect(tiff[value + length - 1]).toBe(0);
    return tiff.toString("latin1", value, value + length - 1);
  }
  return expect.fail("no ImageDescription");
}

describe("texts that are too long for EXIF", () => {
  const long = (character: string, length: number) => character.repeat(length);
  const own = { seed: 3, guidanceScale: 4.5, software: "flowturbo 0.1.0" };
  const cases: Record<string, [Record<string, unknown>, string[]]> = {
    "none: as long as there is room for": [{ prompt: long("a", 64_600), ...own }, []],
    "the negative prompt alone": [
      { prompt: long("a", 40_000), negativePrompt: long("b", 40_000), ...own },
      ["negativePrompt"],
    ],
    "the negative prompt, then the prompt": [
      { prompt: long("赤", 40_000), negativePrompt: long("b", 70_000), ...own },
      ["negativePrompt", "prompt"],
    ],
    "the longest prompt": [{ prompt: "x", prompt3: long("🦊", 30_000), ...own }, ["prompt3"]],
    "a long list, which is left out": [
      { prompt: "x", stages: Array.from({ length: 1024 }, () => ({ width: 64, height: 64, blocks: "H1", sigma: 1 / 3 })), ...own }, // biome-ignore format: one line
      ["stages"],
    ],
  };
  it.each(Object.entries(cases))("%s", async (_, [parameters, truncated]) => {
    for (const format of ["jpeg", "webp"] as const) {
      const file = await new Image(64, 64, new Uint8Array(3 * 64 * 64), parameters).encode(format);
      const { exif, width } = await sharp(file, { failOn: "warning" }).metadata();
      expect(width).toBe(64);
      const text = description(exif!);
      const said = JSON.parse(text);
      if (truncated.length === 0) expect(said).toEqual(parameters);
      else {
        expect(said.truncated).toEqual(truncated);
        // What was shortened is a beginning, with no half of a character.
        for (const name of truncated.filter((each) => each !== "stages")) {
          expect((parameters[name] as string).startsWith(said[name])).toBe(true);
          expect(said[name].isWellFormed?.() ?? true).toBe(true);
        }
        for (const name of Object.keys(parameters).filter((each) => !truncated.includes(each)))
          expect(said[name], name).toEqual(parameters[name]);
        if ("stages" in parameters) expect(said.stages).toBeUndefined();
        else expect(text.length).toBeGreaterThan(64_780);
      }
      expect(text.length).toBeLessThanOrEqual(64_800);
      if (format !== "jpeg") continue;
      // One APP1 segment, whose length counts itself.
      const at = file.indexOf("Exif\0\0", 0, "latin1");
      expect([file[at - 4], file[at - 3]]).toEqual([0xff, 0xe1]);
      expect(file.readUInt16BE(at - 2)).toBe(exif!.length + 2);
    }
  });

  it("fit whatever they are, and are whole where they can be", () => {
    const value = fc.oneof(fc.string({ unit: "binary", maxLength: 200 }), fc.array(fc.double({ noNaN: true })));
    const names = fc.constantFrom("prompt", "prompt2", "negativePrompt", "negativePrompt3", "sigmas", "blocks");
    fc.assert(
      fc.property(fc.dictionary(names, value), fc.integer({ min: 500, max: 900 }), (parameters, most) => {
        const text = fitted(parameters, most);
        expect(text.length).toBeLessThanOrEqual(most);
        expect(text).toMatch(/^[\x20-\x7e]*$/);
        const { truncated, ...said } = JSON.parse(text);
        const whole = JSON.parse(JSON.stringify(parameters));
        if (!truncated) {
          expect(said).toEqual(whole);
          return;
        }
        expect(fitted(parameters, 1e6).length).toBeGreaterThan(most);
        for (const [name, each] of Object.entries(whole)) {
          if (!truncated.includes(name)) expect(said[name]).toEqual(each);
          // A prompt is shortened only where no negative prompt is left.
          if (truncated.includes(name) && typeof each === "string" && !name.startsWith("negative"))
            for (const negative of Object.keys(said).filter((each) => each.startsWith("negative")))
              if (typeof said[negative] === "string") expect(said[negative]).toBe("");
        }
      }),
      { numRuns: 300 },
    );
  });

  it("are whole in PNG", async () => {
    const parameters = { prompt: long("赤🦊", 200_000), ...own };
    const file = await new Image(8, 8, new Uint8Array(192), parameters).toPNG();
    expect(JSON.parse((await sharp(file).metadata()).comments![0]!.text)).toEqual(parameters);
    expect((await inspect(written("long.png", file), "picture")).parameters).toEqual(parameters);
  });
});

describe("a picture that is inspected", () => {
  it.each(["png", "jpg", "webp"])("has the parameters that flowturbo wrote, %s", async (extension) => {
    const parameters = {
      prompt: '赤い円 café 🦊 "x"\n\\u0041',
      guidanceScale: [1, 4.5],
      seed: 3,
      software: "flowturbo 9",
    };
    const file = path.join(folder, `own.${extension}`);
    await new Image(8, 6, new Uint8Array(144), parameters).toFile(file);
    const found = await inspect(file, "picture");
    expect(found).toMatchObject({ width: 8, height: 6, writer: "flowturbo", parameters });
    expect(found.format).toBe(extension === "jpg" ? "jpeg" : extension);
  });

  const { texts: files } = JSON.parse(readFileSync(fixture("pictures.json"), "utf8"));
  const a1111 = "AUTOMATIC1111's web UI, or a tool that writes as it does";
  const prompt = (what: string) =>
    `a ${what} in a café\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, Model: sd15`;
  const graph = '{"3": {"class_type": "KSampler", "inputs": {"seed": 5, "steps": 20, "cfg": 8}}}';
  it.each([
    ["a1111 latin", a1111, { parameters: prompt("cat") }],
    ["a1111 unicode", a1111, { parameters: prompt("猫") }],
    ["a1111 compressed", a1111, { parameters: prompt("cat") }],
    ["a1111 compressed unicode", a1111, { parameters: prompt("猫") }],
    ["a1111 jpeg", a1111, { UserComment: prompt("猫") }],
    ["a1111 little jpeg", a1111, { UserComment: prompt("猫") }],
    ["a1111 webp", a1111, { UserComment: prompt("cat") }],
    ["comfyui", "ComfyUI", { prompt: graph, workflow: '{"nodes": []}' }],
    ["comfyui webp", "ComfyUI", { Model: `prompt:${graph}`, Make: 'workflow:{"nodes": []}' }],
    ["camera", null, { ImageDescription: "a cat, by hand", Make: "Maker", Software: "Editor 1.0" }],
    ["nothing", null, {}],
  ] as const)("of another writer is known as such: %s", async (name, writer, texts) => {
    const file = written("foreign", Buffer.from(files[name], "base64"));
    expect(await inspect(file, "picture")).toMatchObject({ width: 8, height: 6, writer, parameters: null, texts });
  });

  it("is refused where it is none, by what it is", async () => {
    await expect(inspect(path.join(folder, "absent.png"), "from")).rejects.toMatchObject({ option: "from" });
    await expect(inspect(written("x.png", Buffer.from("%PDF-1.7 ...")), "from")).rejects.toThrow(
      /it is a PDF document\./,
    );
  });

  it("may be damaged anywhere", async () => {
    const png = await new Image(8, 8, new Uint8Array(192), { prompt: "x".repeat(100), guidanceScale: 1 }).toPNG();
    const jpeg = await new Image(8, 8, new Uint8Array(192), { prompt: "x".repeat(100), guidanceScale: 1 }).encode(
      "jpeg",
    );
    const exif = (await sharp(jpeg).metadata()).exif!;
    fc.assert(
      fc.property(fc.nat(), fc.nat({ max: 255 }), fc.nat(), (at, value, length) => {
        for (const bytes of [png, exif]) {
          const damaged = Buffer.from(bytes.subarray(0, 1 + (length % bytes.length)));
          damaged[at % damaged.length] = value;
          textsOf(damaged, bytes === exif ? damaged : undefined);
        }
      }),
      { numRuns: 2000 },
    );
  });
});

it("files that libvips does not decode are known by their first bytes", () => {
  const box = (brand: string, others = "") => `\0\0\0\x18ftyp${brand}\0\0\0\0${others}`;
  const kinds: [string, RegExp | null][] = [
    [box("heic", "mif1heic"), /HEIC/],
    [box("mif1", "mif1heic"), /HEIC/],
    [box("mif1", "mif1avif"), /AVIF/],
    [box("avif"), /AVIF/],
    [box("crx "), /raw/],
    [box("isom"), /video/],
    [box("qt  "), /video/],
    ["\x1aE\xdf\xa3", /video/],
    ["RIFF\0\0\0\0AVI LIST", /video/],
    ["RIFF\0\0\0\0WEBPVP8 ", null],
    ["II*\0\x10\0\0\0CR\x02\0", /raw/],
    ["II*\0\x10\0\0\0\0\0", null],
    ["FUJIFILMCCD-RAW 0201", /raw/],
    ["\xff\x0a\xfa", /JPEG XL/],
    ["\0\0\0\x0cJXL \r\n\x87\n", /JPEG XL/],
    ["\0\0\0\x0cjP  \r\n\x87\n", /JPEG 2000/],
    ["%PDF-1.7", /PDF/],
    ["8BPS\0\x01", /Photoshop/],
    ["BM\x36\0", /BMP/],
    ["<!DOCTYPE html>", /HTML/],
    ["\xff\xd8\xff\xe0", null],
    ["", null],
  ];
  for (const [head, name] of kinds)
    expect(undecodable(Buffer.from(head, "latin1"))?.name ?? "", head).toMatch(name ?? /^$/);
});

const guided = (steps: number, first = true) => [first, ...new Array<boolean>(steps - 1).fill(true)];
const calibrated: CalibratedSchedule[] = [guided(3), guided(5, false), guided(10)].map((guided) => ({
  ...{ width: 64, height: 64, guidanceScale: 4.5, guided, psnr: { held: 20 + guided.length, uncalibrated: 1 } },
  sigmas: [...guided.map((_, i) => 1 - i / guided.length), 0],
  weights: guided.map(() => [-1 / guided.length, 0, 0] as const),
}));

it("the options of a request come back from what its pictures say", async () => {
  const checkpoint = await openCheckpoint(embeddedModel);
  const model = {
    ...{ checkpoint, ladder: null, calibrated },
    text: new PromptEncoder(new GraphLibrary(checkpoint)),
    ...{ captured: false, pinBatch: null, allowPaths: true },
  };
  const image = { width: 2, height: 2, data: new Uint8Array(12) };
  const stage = fc.record(
    { width: fc.constantFrom(32, 64), height: fc.constant(64), blocks: fc.constantFrom("H1", "E2"), sigma: fc.constantFrom(0.5, undefined) }, // biome-ignore format: one line
    { requiredKeys: ["width", "height", "blocks"] },
  );
  const sometimes = <T>(value: fc.Arbitrary<T>) => fc.option(value, { nil: undefined, freq: 1 });
  const guidance = sometimes(
    fc.oneof(fc.constantFrom(0, 1, 4.5), fc.array(fc.constantFrom(1, 3, 4.5), { minLength: 1, maxLength: 4 })),
  );
  const options = fc.record({
    prompt: fc.oneof(fc.string({ unit: "binary" }), fc.array(fc.string(), { minLength: 1, maxLength: 3 })),
    negativePrompt: sometimes(fc.string()),
    count: sometimes(fc.integer({ min: 1, max: 3 })),
    seed: sometimes(fc.integer({ min: 0, max: Number.MAX_SAFE_INTEGER - 4096 })),
    schedule: fc.oneof(
      fc.record({ steps: sometimes(fc.integer({ min: 1, max: 12 })), sampler: sometimes(fc.constantFrom("euler" as const, "heun" as const)), grid: sometimes(fc.constantFrom("shifted" as const, "diffusers" as const, "calibrated" as const)) }), // biome-ignore format: one line
      fc.record({ quality: fc.constantFrom("fast" as const, "best" as const) }),
      fc.record({ blocks: fc.constantFrom("H1P2", "E3", "HPP") }),
      fc.record({ sigmas: fc.constantFrom([1, 0.5], [0.9, 0.4, 0]) }),
      fc.record({ deadlineMs: fc.constant(1000) }),
      fc.record({ stages: fc.array(stage, { minLength: 1, maxLength: 3 }) }),
    ),
    size: sometimes(fc.record({ width: fc.constantFrom(64, 96), height: fc.constantFrom(64, 96) })),
    shift: sometimes(fc.constantFrom(1, 3.5)),
    guidanceScale: guidance,
    guidanceStart: sometimes(fc.constantFrom(0, 0.34)),
    guidanceStop: sometimes(fc.constantFrom(0.67, 1)),
    guidanceMode: sometimes(fc.constantFrom("cfg" as const, "cfg_zero" as const)),
    maxSequenceLength: sometimes(fc.integer({ min: 1, max: 77 })),
    prompt2: sometimes(fc.string()),
    negativePrompt2: sometimes(fc.string()),
    promptWeighting: fc.boolean(),
    edit: fc.option(fc.record({ strength: sometimes(fc.constantFrom(0.5, 1)), mask: fc.boolean(), keepOriginal: fc.boolean() })), // biome-ignore format: one line
  });
  let settled = 0;
  const settle = (given: GenerateOptions) => {
    try {
      return settleRequest(given, model);
    } catch {
      // Many do not go together.
      return null;
    }
  };
  fc.assert(
    fc.property(options, ({ schedule, size, edit, ...rest }) => {
      const request = settle({
        ...{ ...rest, ...schedule, ...size },
        ...(edit && { image, strength: edit.strength, keepOriginal: edit.keepOriginal }),
        ...(edit?.mask && { mask: image }),
      });
      if (!request) return;
      for (const { stages } of request.candidates)
        for (let row = 0; row < request.pictures; row++) {
          const parameters = parametersOf(request, stages, row);
          const read = optionsOf(
            JSON.parse(JSON.stringify({ ...parameters, model: "x", software: "y", runtime: "z" })),
          );
          expect(read.unknown).toEqual([]);
          expect(read.needs).toEqual(edit ? (edit.mask ? ["image", "mask"] : ["image"]) : []);
          const again = settleRequest({ ...read.options, ...Object.fromEntries(read.needs.map((name) => [name, image])) } as GenerateOptions, model); // biome-ignore format: one line
          const [{ stages: drawn }] = again.candidates;
          expect(JSON.parse(JSON.stringify(parametersOf(again, drawn, 0)))).toEqual(
            JSON.parse(JSON.stringify(parameters)),
          );
          expect(drawn.map(({ schedule }) => schedule.key)).toEqual(stages.map(({ schedule }) => schedule.key));
          settled++;
        }
    }),
    { numRuns: 1500 },
  );
  expect(settled).toBeGreaterThan(500);
});

it("a file names no pictures, and what it says wrongly is no option", () => {
  const { options, unknown, needs } = optionsOf({
    ...{ prompt: "x", guidanceScale: 1, image: "/etc/passwd", mask: "/etc/passwd", steps: 0, toString: 1, seed: null },
    ...{ signal: {}, onStep: "x", noise: [1], somethingNew: 3, inpainted: true },
  });
  expect(options).toEqual({ prompt: "x", guidanceScale: 1 });
  expect(unknown).toEqual(["image", "mask", "steps", "toString", "signal", "onStep", "noise", "somethingNew"]);
  expect(needs).toEqual(["image", "mask", "noise"]);
});

it("of adapters a file has the names, but no control pictures", () => {
  const loras = [{ name: "ink", scale: 0.7 }];
  const skipLayers = { layers: [1], scale: 2.8, start: 0, stop: 0.5 };
  const controls = [{ folder: "canny", scale: 0.8, start: 0, stop: 1 }];
  const read = optionsOf({ ...{ prompt: "x", guidanceScale: 2 }, loras, skipLayers, controls });
  expect(read).toEqual({
    options: { prompt: "x", guidanceScale: 2, loras, skipLayers },
    ...{ unknown: [], needs: ["controls"] },
  });
  // Those of a file that someone wrote by hand are not taken either: they could name files.
  const forged = [{ folder: "/etc", image: "/etc/passwd" }];
  expect(optionsOf({ prompt: "x", controls: forged }).options).toEqual({ prompt: "x" });
  expect(optionsOf({ prompt: "x", loras: [{ name: "ink", file: "/etc/passwd" }] }).unknown).toEqual(["loras"]);
});

it("what is given replaces what the file says of the same in other words", () => {
  const cases: [Partial<GenerateOptions>, Record<string, unknown>, Record<string, unknown>][] = [
    [{ prompt: "x", blocks: "H1P2" }, { steps: 4 }, { prompt: "x", steps: 4 }],
    [{ steps: 4, grid: "calibrated" }, { steps: 3 }, { steps: 3 }],
    [{ steps: 4, grid: "calibrated" }, { prompt: ["y"] }, { prompt: ["y"], steps: 4, grid: "calibrated" }],
    [{ steps: 4, grid: "calibrated" }, { guidanceScale: 2 }, { steps: 4, guidanceScale: 2 }],
    [
      { steps: 4, grid: "calibrated" },
      { grid: "calibrated", steps: 2 },
      { grid: "calibrated", steps: 2 },
    ],
    [{ steps: 2, guidanceScale: [1, 4.5] }, { steps: 3 }, { steps: 3, guidanceScale: 4.5 }],
    [{ steps: 2, guidanceScale: [1, 4.5] }, { guidanceScale: 2 }, { steps: 2, guidanceScale: 2 }],
    [{ stages: [] }, { width: 64 }, { width: 64 }],
    [{ width: 64, height: 64, sampler: "euler", steps: 4, grid: "shifted" }, { stages: [] }, { stages: [] }],
    [{ sampler: "euler", steps: 4, grid: "diffusers" }, { sampler: "heun" }, { sampler: "heun", steps: 4 }],
    [
      { shift: 2, seed: 1 },
      { mu: 1, noise: 3 },
      { mu: 1, noise: 3 },
    ],
  ];
  const skipLayers = { layers: [1] };
  cases.push(
    [{ guidanceScale: 2, skipLayers }, { guidanceScale: 1 }, { guidanceScale: 1 }],
    [{ guidanceScale: 2, skipLayers }, { guidanceScale: [1, 0] }, { guidanceScale: [1, 0] }],
    [{ guidanceScale: 2, skipLayers }, { guidanceScale: 3 }, { guidanceScale: 3, skipLayers }],
    [{ loras: [{ name: "a" }] }, { loras: [{ name: "b" }] }, { loras: [{ name: "b" }] }],
  );
  for (const [file, given, expected] of cases) expect(overridden(file, given)).toEqual(expected);
});
