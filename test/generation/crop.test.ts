// `paddingMaskCrop`: which part of a picture is drawn and how it is put back, as diffusers' image processor does it (test/fixtures/crop.json).
import { readFileSync } from "node:fs";
import { FlowTurbo, type GenerateOptions, OptionError } from "flowturbo";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { cropRegion, cut, filled, pasted } from "../../lib/generation/crop.js";
import { maskAt, readEdit } from "../../lib/generation/edit.js";
import { toRgb } from "../../lib/generation/image.js";
import { resampled } from "../../lib/generation/resample.js";
import { fixture } from "../support/fixtures.js";

type Rectangle = [left: number, top: number, right: number, bottom: number, grey: number];
const known = JSON.parse(readFileSync(fixture("crop.json"), "utf8")) as {
  regions: { mask: [number, number, Rectangle[]]; size: [number, number]; pad: number; region: number[] }[];
  edits: {
    picture: [number, number];
    rectangles: Rectangle[];
    size: [number, number];
    pad: number;
    region: number[];
    /** What is drawn of the picture and of the mask, and the result where the opposite of a picture was drawn. */
    init: number[];
    painted: number[];
    overlay: number[];
  }[];
};

const maskOf = (width: number, height: number, rectangles: readonly Rectangle[]) => {
  const data = new Uint8Array(width * height);
  for (const [left, top, right, bottom, grey] of rectangles)
    for (let y = top; y < bottom; y++) data.fill(grey, y * width + left, y * width + right);
  return { width, height, channels: 1, data };
};
const rgbOf = (mask: { width: number; height: number; data: Uint8Array }) => {
  return { ...mask, data: Uint8Array.from({ length: 3 * mask.data.length }, (_, i) => mask.data[Math.floor(i / 3)]!) };
};
const pictureOf = (width: number, height: number) => {
  const value = (k: number) => k * k * 31 + k * 17 + Math.floor(k / 7);
  return {
    width,
    height,
    channels: 3,
    data: Uint8Array.from({ length: 3 * width * height }, (_, k) => value(k) % 256),
  };
};
const [width, height] = [0, 1] as const;

describe("as diffusers does it", () => {
  it("finds the part that is drawn", async () => {
    expect(known.regions.length).toBeGreaterThan(300);
    for (const { mask, size, pad, region } of known.regions) {
      const found = await cropRegion(maskOf(...mask), { width: size[width], height: size[height] }, pad);
      const { left, top } = found;
      expect([left, top, left + found.width, top + found.height], JSON.stringify({ mask, size, pad })).toEqual(region);
    }
    expect(new Set(known.regions.map(({ region }) => region.join())).size).toBeGreaterThan(200);
  });

  it.each(known.edits.map((edit) => [`${edit.picture} to ${edit.size}`, edit] as const))(
    "draws that part, and puts it back: %s",
    async (_, { picture: of, rectangles, size, pad, region: expected, init, painted, overlay }) => {
      const picture = pictureOf(...of);
      const mask = maskOf(...of, rectangles);
      const target = { width: size[width], height: size[height] };
      const request = { image: picture, mask: rgbOf(mask), strength: 1, keepOriginal: true, paddingMaskCrop: pad };
      const [edit] = await readEdit(request, [target], 8);
      const { original, crop } = edit!;
      const { left, top } = crop!.region;
      expect([left, top, left + crop!.region.width, top + crop!.region.height]).toEqual(expected);
      expect([...original.rgb]).toEqual(init);
      expect([...toRgb(original.pixels, 0)]).toEqual(init);
      // Latents are painted by the pixel at their corner.
      const corners = [0, 8].flatMap((y) => [0, 8].map((x) => painted[y * target.width + x]!));
      if (size.join() === "16,16") expect([...edit!.mask!.latents.data]).toEqual(corners);
      if (!edit!.mask!.empty) expect([...edit!.mask!.pixels]).toEqual(painted);
      const drawn = pictureOf(...size);
      const opposite = { ...drawn, data: drawn.data.map((value) => 255 - value) };
      expect([...(await pasted({ ...crop!, mask: mask.data }, opposite, true))]).toEqual(overlay);
    },
  );
});

describe("of all of a picture", () => {
  it("is the picture, where it has the shape", async () => {
    const picture = pictureOf(64, 48);
    const region = await cropRegion(maskOf(64, 48, []), { width: 32, height: 16 }, 3);
    expect(region).toEqual({ left: 0, top: 0, width: 64, height: 48 });
    expect(await cut(picture, region)).toEqual(picture);
    expect(await filled(picture, 64, 48)).toEqual(picture.data);
    const crop = { picture, mask: new Uint8Array(64 * 48), region };
    expect(await pasted(crop, { ...picture, data: picture.data.map((value) => 255 - value) }, true)).toEqual(
      picture.data,
    );
  });
});

describe("generate() with paddingMaskCrop", () => {
  let model: FlowTurbo;
  beforeAll(async () => {
    model = await FlowTurbo.load(undefined, { measureCosts: false });
  });
  afterAll(() => model.dispose());
  const { data } = pictureOf(150, 100);
  const image = { width: 150, height: 100, data };
  const mask = rgbOf(maskOf(150, 100, [[90, 40, 110, 60, 255]]));
  const options = { prompt: "a red circle", image, steps: 4, strength: 1, seed: 3, width: 64, height: 64, pinBatch: 1 };
  const draw = (more: Partial<GenerateOptions>) => model.generate({ ...options, mask, ...more });
  // 20 pixels and 6 on each side.
  const region = { left: 84, top: 34, width: 32, height: 32 };
  const isInside = (x: number, y: number) => x >= 84 && x < 116 && y >= 34 && y < 66;
  const isPainted = (x: number, y: number) => x >= 90 && x < 110 && y >= 40 && y < 60;

  /** Pixels that differ, and whether one does where it must not. */
  function changed(pixels: Uint8Array, may: (x: number, y: number) => boolean) {
    let [count, wrong] = [0, 0];
    for (let i = 0; i < pixels.length / 3; i++)
      if ([0, 1, 2].some((c) => pixels[3 * i + c] !== data[3 * i + c])) {
        count++;
        if (!may(i % 150, Math.floor(i / 150))) wrong++;
      }
    return { count, wrong };
  }

  it("draws the part alone, and puts it back into the picture", async () => {
    const part = { ...(await cut({ ...image, channels: 3 }, region)) };
    const partOfMask = await cut({ ...mask, channels: 3 }, region);
    const alone = await draw({ image: part, mask: partOfMask, keepOriginal: false, include: ["latents"] });
    const { images, ...result } = await draw({ paddingMaskCrop: 6, keepOriginal: false, include: ["latents"] });
    expect(result.latents).toEqual(alone.latents);
    expect(result).toMatchObject({ width: 150, height: 100, stages: [{ width: 64, height: 64 }] });
    expect(images[0]).toMatchObject({ width: 150, height: 100 });
    expect(changed(images[0]!.data, isInside).wrong).toBe(0);
    const drawn = alone.images[0]!;
    const whole = { left: 0, top: 0, width: 64, height: 64 };
    const expected = await resampled({ ...drawn, width: 64, height: 64, channels: 3, data: drawn.data }, 32, 32, whole);
    expect(
      (await cut({ ...images[0]!, width: 150, height: 100, channels: 3, data: images[0]!.data }, region)).data,
    ).toEqual(expected);
    // With the original kept, by default, the same where the mask is white and the original elsewhere.
    const kept = (await draw({ paddingMaskCrop: 6 })).images[0]!;
    const { count, wrong } = changed(kept.data, isPainted);
    expect(wrong).toBe(0);
    expect(count).toBeGreaterThan(300);
    for (let y = 40; y < 60; y++) {
      const at = 3 * (y * 150 + 90);
      expect(kept.data.slice(at, at + 60)).toEqual(images[0]!.data.slice(at, at + 60));
    }
  });

  it("says what it takes to draw the picture again", async () => {
    const first = (await draw({ paddingMaskCrop: 6, metadata: "parameters" })).images[0]!;
    const { inpainted, ...parameters } = first.parameters as unknown as GenerateOptions & { inpainted: boolean };
    expect([inpainted, parameters.paddingMaskCrop, parameters.width]).toEqual([true, 6, 64]);
    const again = await model.generate({ ...parameters, image, mask, pinBatch: 1 });
    expect(again.images[0]!.data).toEqual(first.data);
  });

  it("takes masks of another size, and sizes that rise", async () => {
    const half = rgbOf(maskOf(75, 50, [[45, 20, 55, 30, 255]]));
    const stages = [
      { width: 32, height: 32, blocks: "E1" },
      { width: 64, height: 64, blocks: "E1" },
    ];
    const { steps, width, height, ...rest } = options;
    const { images } = await model.generate({ ...rest, stages, mask: half, paddingMaskCrop: 6 });
    // Resizing has a rim of three pixels of the smaller mask.
    const { count, wrong } = changed(images[0]!.data, (x, y) => x >= 84 && x < 116 && y >= 34 && y < 66);
    expect([wrong, count > 300]).toEqual([0, true]);
  });

  it("returns the original where nothing is painted", async () => {
    const black = rgbOf(maskOf(150, 100, []));
    const { images, warnings, blocks } = await draw({ mask: black, paddingMaskCrop: 6 });
    expect(images[0]!.data).toEqual(data);
    expect([warnings.length, blocks]).toEqual([1, ""]);
  });

  it("finds what a mask paints that is too small for the whole picture", async () => {
    const dot = maskOf(150, 100, [[91, 41, 93, 43, 255]]);
    expect((await maskAt(dot, { ...image, channels: 3 }, 64, 64, 8)).empty).toBe(true);
    // Without the option the picture is the original, which is no reason to call the mask black.
    expect((await draw({ mask: rgbOf(dot) })).warnings).toEqual([
      expect.stringMatching(/too small for a latent \(4 x 4 pixels\).*this is the original/),
    ]);
    const { images } = await draw({ mask: rgbOf(dot), paddingMaskCrop: 3 });
    expect(changed(images[0]!.data, (x, y) => x >= 91 && x < 93 && y >= 41 && y < 43)).toMatchObject({ wrong: 0 });
    expect(changed(images[0]!.data, () => true).count).toBeGreaterThan(0);
  });

  it("is refused without a mask, for latents, and for what is no number of pixels", async () => {
    for (const [more, message] of [
      [{ mask: undefined, paddingMaskCrop: 3 }, /give image and mask/],
      [{ mask: undefined, image: undefined, strength: undefined, paddingMaskCrop: 3 }, /give image and mask/],
      [{ paddingMaskCrop: 3, outputType: "latent" }, /leave out one/],
      [{ paddingMaskCrop: -1 }, /Expected a whole number of pixels from 0 .* received -1/],
      [{ paddingMaskCrop: 1.5 }, /received 1\.5/],
    ] as const) {
      const error = await draw(more).catch((error) => error);
      expect(error).toBeInstanceOf(OptionError);
      expect(error).toMatchObject({ option: "paddingMaskCrop", message: expect.stringMatching(message) });
    }
  });
});
