// Originals and masks: sizes as Pillow makes them, and every kind of picture.
import { readFileSync } from "node:fs";
import sharp from "sharp";
import { describe, expect, it } from "vitest";
import { maskAt, originalAt, readMask, readOriginal } from "../../lib/generation/edit.js";
import { Image } from "../../lib/generation/image.js";
import { coveringBox, type Raster, resampled } from "../../lib/generation/resample.js";
import { fixture } from "../support/fixtures.js";

interface Resized {
  source: [number, number, number];
  size: [number, number];
  box: [number, number, number, number] | null;
  values: number[];
}
const references: Resized[] = JSON.parse(readFileSync(fixture("pillow.json"), "utf8"));

function raster(width: number, height: number, channels: number): Raster {
  const data = Uint8Array.from({ length: width * height * channels }, (_, k) => (k * k * 31 + k * 17) % 256);
  return { width, height, channels, data };
}

describe("resizing", () => {
  it.each(references.map((reference) => [`${reference.source} to ${reference.size}`, reference] as const))(
    "%s, as Pillow",
    async (_, { source, size, box, values }) => {
      const [left, top, right, bottom] = box ?? [0, 0, source[0], source[1]];
      const part = { left, top, width: right - left, height: bottom - top };
      expect([...(await resampled(raster(...source), ...size, part))]).toEqual(values);
    },
  );

  it("crops the middle", () => {
    expect(coveringBox(raster(20, 11, 3), 8, 8)).toEqual({ left: 4.5, top: 0, width: 11, height: 11 });
    expect(coveringBox(raster(9, 14, 1), 16, 8)).toEqual({ left: 0, top: 4.75, width: 9, height: 4.5 });
  });

  it("leaves a picture of the right size alone", async () => {
    const source = raster(16, 24, 3);
    expect((await originalAt(source, 16, 24)).rgb).toEqual(source.data);
  });

  it("leaves the event loop free", async () => {
    let turns = 0;
    const timer = setInterval(() => turns++, 1);
    await originalAt({ width: 1600, height: 1200, channels: 3, data: new Uint8Array(1600 * 1200 * 3) }, 512, 512);
    clearInterval(timer);
    expect(turns).toBeGreaterThan(2);
  });
});

describe("masks", () => {
  const grey = (width: number, height: number, value: (x: number, y: number) => number): Raster => ({
    ...{ width, height, channels: 1 },
    data: Uint8Array.from({ length: width * height }, (_, i) => value(i % width, Math.floor(i / width))),
  });
  const leftHalf = (width: number, height: number) => grey(width, height, (x) => (x < width / 2 ? 255 : 0));
  const painted = (pixels: Uint8Array, width: number) =>
    [...pixels.subarray(0, width)].map((value) => (value ? "#" : ".")).join("");

  it("of the picture's shape are cropped with it", async () => {
    const picture = raster(64, 16, 3);
    // The middle 16 of 64 columns are left; white are those up to column 28.
    const mask = grey(64, 16, (x) => (x < 28 ? 255 : 0));
    expect(painted((await maskAt(mask, picture, 16, 16, 4)).pixels, 16)).toBe("####............");
    const half = grey(32, 8, (x) => (x < 14 ? 255 : 0));
    expect(painted((await maskAt(half, picture, 16, 16, 4)).pixels, 16)).toBe("####............");
  });

  it("of another shape are stretched, as diffusers does", async () => {
    const { pixels } = await maskAt(leftHalf(32, 32), raster(64, 16, 3), 32, 16, 4);
    expect(painted(pixels, 32)).toBe("#".repeat(16) + ".".repeat(16));
  });

  it("are cut at one half, and colours are greys as Pillow's", async () => {
    const mask = async (...rgb: number[]) => {
      const data = Uint8Array.from({ length: 192 }, (_, i) => rgb[i % 3]!);
      return !(await maskAt({ width: 8, height: 8, channels: 3, data }, raster(8, 8, 3), 8, 8, 4)).empty;
    };
    expect([await mask(127, 127, 127), await mask(128, 128, 128)]).toEqual([false, true]);
    // 76, 150 and 29.
    expect([await mask(255, 0, 0), await mask(0, 255, 0), await mask(0, 0, 255)]).toEqual([false, true, false]);
  });

  it("with specks between the latents only paint nothing", async () => {
    const speck = grey(16, 16, (x, y) => (x === 5 && y === 6 ? 255 : 0));
    const { empty, pixels } = await maskAt(speck, raster(16, 16, 3), 16, 16, 4);
    expect(empty).toBe(true);
    expect(pixels.includes(1)).toBe(false);
  });
});

describe("kinds of pictures", () => {
  const [width, height] = [48, 32];
  const smooth = Uint8Array.from({ length: width * height * 3 }, (_, i) => {
    const [x, y] = [Math.floor(i / 3) % width, Math.floor(i / 3 / width)];
    return [5 * x, 7 * y, 100 + 2 * x][i % 3]!;
  });
  const colours = sharp(smooth, { raw: { width, height, channels: 3 } });
  const kinds: [string, () => Promise<Buffer>, number][] = [
    ["PNG", () => colours.clone().png().toBuffer(), 0],
    ["16-bit PNG", () => colours.clone().toColourspace("rgb16").png().toBuffer(), 0],
    ["palette", () => colours.clone().png({ palette: true }).toBuffer(), 8],
    ["TIFF", () => colours.clone().tiff({ compression: "lzw" }).toBuffer(), 1],
    ["JPEG", () => colours.clone().jpeg({ quality: 95 }).toBuffer(), 4],
    ["CMYK JPEG", () => colours.clone().toColourspace("cmyk").jpeg({ quality: 95 }).toBuffer(), 40],
    ["WebP", () => colours.clone().webp({ quality: 95 }).toBuffer(), 6],
    ["AVIF", () => colours.clone().avif({ quality: 90 }).toBuffer(), 6],
    ["still GIF", () => colours.clone().gif().toBuffer(), 12],
  ];
  it.each(kinds)("%s", async (_, encoded, tolerance) => {
    const read = await readOriginal(await encoded());
    expect([read.width, read.height, read.channels]).toEqual([width, height, 3]);
    const error = read.data.reduce((sum, value, i) => sum + Math.abs(value - smooth[i]!), 0) / smooth.length;
    expect(error).toBeLessThanOrEqual(tolerance);
  });

  it.each(["b-w", "grey16"] as const)("greys, %s", async (space) => {
    const greys = Uint8Array.from({ length: width * height }, (_, i) => i % 256);
    const file = await sharp(greys, { raw: { width, height, channels: 1 } })
      .toColourspace(space)
      .png()
      .toBuffer();
    const read = await readOriginal(file);
    expect([(await sharp(file).metadata()).channels, read.channels]).toEqual([1, 3]);
    for (let i = 0; i < 3 * width * height; i++) expect(read.data[i]).toBe(greys[Math.floor(i / 3)]);
  });

  it("16 bits by their higher byte, whatever they are", async () => {
    const every = Uint16Array.from({ length: 65536 }, (_, i) => i);
    const raw = { width: 256, height: 256, channels: 1 as const };
    const grey = await sharp(every, { raw }).toColourspace("grey16").png().toBuffer();
    const three = Uint16Array.from({ length: 3 * 65536 }, (_, i) => (i * 21845 + 7 * (i % 3)) % 65536);
    const rgb = await sharp(three, { raw: { ...raw, channels: 3 } })
      .toColourspace("rgb16")
      .png()
      .toBuffer();
    for (const file of [grey, rgb]) expect((await sharp(file).metadata()).depth).toBe("ushort");
    const [ofGrey, ofRgb] = [(await readOriginal(grey)).data, (await readOriginal(rgb)).data];
    expect(ofGrey.every((value, i) => value === Math.floor(i / 3) >> 8)).toBe(true);
    expect(ofRgb.every((value, i) => value === three[i]! >> 8)).toBe(true);
  });

  it.each(["tiff", "jpeg"] as const)(
    "CMYK without a profile through libvips' own, as LittleCMS does it: %s",
    async (kind) => {
      const { cmyk } = JSON.parse(readFileSync(fixture("pictures.json"), "utf8"));
      const read = await readOriginal(Buffer.from(cmyk[kind], "base64"));
      // 12 x 16 colours, each a pixel of the TIFF and a block of the JPEG.
      const side = read.width / 12;
      const worst = Math.max(
        ...cmyk.rgb.map((value: number, i: number) => {
          const [x, y] = [Math.floor(i / 3) % 12, Math.floor(i / 36)].map((at) => Math.floor((at + 0.5) * side));
          return Math.abs(read.data[3 * (y! * read.width + x!) + (i % 3)]! - value);
        }),
      );
      expect(cmyk.rgb).toHaveLength(3 * 12 * 16);
      expect(worst).toBeLessThanOrEqual(1);
    },
  );

  it("CMYK with a profile through it", async () => {
    // sRGB colours through libvips' own and back.
    const embedded = await colours.clone().withIccProfile("cmyk").toColourspace("cmyk").tiff().toBuffer();
    const { icc, space } = await sharp(embedded).metadata();
    expect([space, icc!.length > 1000]).toEqual(["cmyk", true]);
    const read = await readOriginal(embedded);
    const error = read.data.reduce((sum, value, i) => sum + Math.abs(value - smooth[i]!), 0) / smooth.length;
    expect(error).toBeLessThan(20);
  });

  it("transparent parts are on white, in 8 and 16 bits", async () => {
    for (const space of ["srgb", "rgb16", "grey16"] as const) {
      const clear = await colours.clone().ensureAlpha(0).toColourspace(space).png().toBuffer();
      const { data, channels } = await readOriginal(clear);
      expect(channels).toBe(3);
      expect(data.every((value) => value === 255)).toBe(true);
    }
  });

  it("every orientation", async () => {
    const upright = (await readOriginal(await colours.clone().png().toBuffer())).data;
    // What each orientation asks for, undone by hand: stored pixels for a picture that is upright when shown.
    const stored: Record<number, (x: number, y: number) => [number, number]> = {
      1: (x, y) => [x, y],
      2: (x, y) => [width - 1 - x, y],
      3: (x, y) => [width - 1 - x, height - 1 - y],
      4: (x, y) => [x, height - 1 - y],
      5: (x, y) => [y, x],
      6: (x, y) => [y, width - 1 - x],
      7: (x, y) => [height - 1 - y, width - 1 - x],
      8: (x, y) => [height - 1 - y, x],
    };
    for (const [orientation, to] of Object.entries(stored)) {
      const [w, h] = Number(orientation) < 5 ? [width, height] : [height, width];
      const data = new Uint8Array(smooth.length);
      for (let y = 0; y < height; y++)
        for (let x = 0; x < width; x++) {
          const [a, b] = to(x, y);
          data.set(smooth.subarray(3 * (y * width + x), 3 * (y * width + x) + 3), 3 * (b * w + a));
        }
      const file = await sharp(data, { raw: { width: w, height: h, channels: 3 } })
        .withMetadata({ orientation: Number(orientation) })
        .png()
        .toBuffer();
      const read = await readOriginal(file);
      expect([orientation, read.width, read.height]).toEqual([orientation, width, height]);
      expect(Buffer.from(read.data).equals(upright)).toBe(true);
    }
  });

  it("masks by alpha where it is transparent, else by colour", async () => {
    const opaque = await readMask(await colours.clone().ensureAlpha(1).png().toBuffer());
    expect([opaque.channels, Buffer.from(opaque.data).equals(smooth)]).toEqual([3, true]);
    const half = await readMask(await colours.clone().ensureAlpha(0.8).png().toBuffer());
    expect([half.channels, new Set(half.data).size]).toEqual([1, 1]);
  });

  it("bytes and raw values alike", async () => {
    const png = await colours.clone().png().toBuffer();
    for (const source of [new Uint8Array(png), { width, height, data: smooth }])
      expect(Buffer.from((await readOriginal(source)).data).equals(smooth)).toBe(true);
  });
});

describe("encoding", () => {
  const noise = Uint8Array.from({ length: 3 * 64 * 64 }, (_, k) => (k * k * 31 + k * 17) % 256);
  const image = new Image(64, 64, noise, { prompt: "x" });

  it.each(["jpeg", "webp"] as const)("%s takes a quality: 95 without one, smaller files with less", async (format) => {
    const sizes = await Promise.all(
      [1, 50, 95, 100].map(async (quality) => (await image.encode(format, { quality })).length),
    );
    expect(sizes).toEqual([...sizes].sort((a, b) => a - b));
    expect(new Set(sizes).size).toBe(4);
    const usual = await image.encode(format);
    expect(usual.equals(await image.encode(format, { quality: 95 }))).toBe(true);
    expect(usual.equals(await image.encode(format, {}))).toBe(true);
    const least = await sharp(await image.encode(format, { quality: 1 })).metadata();
    expect([least.format, least.width, least.exif !== undefined]).toEqual([format, 64, true]);
  });

  it("has the quantisation tables of libjpeg's own quality", async () => {
    // The first entry of the standard luminance table, 16, scaled as libjpeg scales it: (16 * scale + 50) / 100.
    for (const [quality, first] of [
      [50, 16],
      [75, 8],
      [25, 32],
    ] as const) {
      const file = await image.encode("jpeg", { quality });
      const table = file.indexOf(Buffer.from([0xff, 0xdb]));
      expect(file[table + 5]).toBe(first);
    }
  });

  it("refuses a quality out of range, and one for png", async () => {
    for (const quality of [0, 101, 50.5, Number.NaN, "90"])
      await expect(image.encode("jpeg", { quality: quality as number })).rejects.toMatchObject({
        code: "ERR_FLOWTURBO_OPTION",
        option: "quality",
        message: expect.stringContaining("from 1 to 100"),
      });
    await expect(image.encode("png", { quality: 90 })).rejects.toMatchObject({
      option: "quality",
      message: expect.stringMatching(/png .*leave out quality/),
    });
  });
});
