// What the files of pictures say about themselves: as much as the option `metadata` asks for, and never a path.
import { mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { FlowTurbo, type GenerateOptions, Image, type ImageFormat, requestFromJson, requestToJson } from "flowturbo";
import sharp from "sharp";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { root } from "../support/fixtures.js";

const { version } = JSON.parse(readFileSync(path.join(root, "package.json"), "utf8"));
const formats: readonly ImageFormat[] = ["png", "jpeg", "webp"];

let folder: string;
let model: FlowTurbo;
let picture: string;
beforeAll(async () => {
  folder = mkdtempSync(path.join(os.tmpdir(), "flowturbo-metadata-"));
  // A snapshot in a Hugging Face cache, by a path that tells who keeps it.
  const snapshots = path.join(folder, "secret-user/models--someone--shapes-of-colour/snapshots");
  mkdirSync(snapshots, { recursive: true });
  symlinkSync(path.join(root, "models/shapes"), path.join(snapshots, "0123456789abcdef"), "dir");
  model = await FlowTurbo.load(path.join(snapshots, "0123456789abcdef"), { measureCosts: false });
  picture = path.join(folder, "secret-original.png");
  await new Image(32, 32, new Uint8Array(3 * 32 * 32).fill(90)).toFile(picture);
});
afterAll(async () => {
  await model.dispose();
  rmSync(folder, { recursive: true, force: true });
});

const small = { prompt: "a red “círculo” 🔴", width: 32, height: 32, seed: 3 };
const kinds: Record<string, () => GenerateOptions> = {
  "a picture": () => ({ ...small, blocks: "H1", negativePrompt: "blue" }),
  "one without guidance, of given noise": () => ({
    ...{ prompt: "x", width: 32, height: 32, blocks: "H1", guidanceScale: 1 },
    noise: { dtype: "float32", shape: [1, 3, 8, 8], data: new Float32Array(192) },
  }),
  "one of stages": () => ({
    ...{ prompt: "x", seed: 1 },
    stages: [
      { width: 32, height: 32, blocks: "H1" },
      { width: 48, height: 40, blocks: "E1", sigma: 0.5 },
      { width: 64, height: 64, blocks: "E1", sigma: 0.5, upscale: "latents" },
    ],
  }),
  "an edit of a file": () => ({ ...small, steps: 2, image: picture, mask: picture, keepOriginal: false }),
};

/** What a file says, as sharp reads it, and the file as characters. */
async function textsOf(image: { encode(format: ImageFormat): Promise<Buffer> }, format: ImageFormat) {
  const bytes = await image.encode(format);
  const { comments, exif } = await sharp(bytes).metadata();
  const text =
    format === "png"
      ? comments?.find(({ keyword }) => keyword === "parameters")?.text
      : exif?.toString("latin1").match(/\{.*\}/)?.[0];
  return { said: text && JSON.parse(text), comments, exif, raw: bytes.toString("latin1") };
}

describe.each(Object.entries(kinds))("%s", (_, options) => {
  it("names model, software and runtime by default", async () => {
    const { images } = await model.generate(options());
    expect(images[0]!.parameters).toMatchObject({
      model: "shapes-of-colour",
      software: `flowturbo ${version}`,
      runtime: "onnxruntime",
    });
    for (const format of formats) {
      const { said, raw } = await textsOf(images[0]!, format);
      expect(said, format).toEqual(images[0]!.parameters);
      for (const secret of [folder, "secret", os.tmpdir(), "0123456789abcdef", root]) expect(raw).not.toContain(secret);
    }
  });

  it('says with "parameters" what it takes to draw it again, and no more', async () => {
    const full = (await model.generate(options())).images[0]!.parameters;
    const { images } = await model.generate({ ...options(), metadata: "parameters" });
    const { model: _, software, runtime, ...rest } = full;
    expect([typeof software, typeof runtime]).toEqual(["string", "string"]);
    expect(images[0]!.parameters).toEqual(rest);
    for (const format of formats) {
      const { said, raw } = await textsOf(images[0]!, format);
      expect(said, format).toEqual(rest);
      expect(raw, format).not.toMatch(/flowturbo \d|software|shapes-of|onnxruntime/i);
    }
  });

  it("has with false no text at all", async () => {
    const { images } = await model.generate({ ...options(), metadata: false });
    expect(images[0]!.parameters).toEqual({});
    for (const format of formats) {
      const { comments, exif, raw } = await textsOf(images[0]!, format);
      expect([comments ?? [], exif], format).toEqual([[], undefined]);
      expect(raw, format).not.toMatch(/iTXt|tEXt|zTXt|Exif|EXIF|flowturbo|prompt/);
    }
  });
});

it("the parameters of a picture draw it again", async () => {
  const options = { ...small, steps: 3, negativePrompt: "blue", metadata: "parameters" } as const;
  const [first] = (await model.generate(options)).images;
  const { inpainted, ...parameters } = first!.parameters as unknown as GenerateOptions & { inpainted?: boolean };
  const [again] = (await model.generate(parameters)).images;
  expect(again!.data).toEqual(first!.data);
});

it("an edit says how it was made, and not of what", async () => {
  const { images } = await model.generate({ ...kinds["an edit of a file"]!(), strength: 0.5 });
  expect(images[0]!.parameters).toMatchObject({ strength: 0.5, inpainted: true, keepOriginal: false });
});

it("goes with a request as JSON, and is checked there and here", async () => {
  for (const metadata of ["full", "parameters", false] as const) {
    const json = JSON.parse(JSON.stringify(await requestToJson({ prompt: "x", metadata })));
    expect(requestFromJson(json).metadata).toBe(metadata);
  }
  expect(requestFromJson({ prompt: "x" }).metadata).toBe("full");
  for (const metadata of [true, "none", "", null])
    await expect(model.generate({ prompt: "x", metadata: metadata as never })).rejects.toThrow(
      /Expected "full", "parameters" or false for metadata/,
    );
});
