// What a picture's file says, printed; and a picture drawn again from it.
import { readFileSync, writeFileSync } from "node:fs";
import path from "node:path";
import { Command } from "commander";
import sharp from "sharp";
import { describe, expect, it, vi } from "vitest";
import { generateCommand } from "../../lib/cli/generate.js";
import { inspectCommand } from "../../lib/cli/inspect.js";
import { Image } from "../../lib/generation/image.js";
import { fixture, root } from "../support/fixtures.js";
import { run, temporaryFolder } from "./support.js";

const prompt = "a large red circle — “赤” 🔴";
/** What a command prints that runs in this process: these need no model. */
async function printed(...args: string[]): Promise<string> {
  const program = new Command().exitOverride();
  inspectCommand(program.command("inspect"));
  generateCommand(program.command("generate"), new AbortController().signal);
  const write = vi.spyOn(process.stdout, "write").mockReturnValue(true);
  try {
    await program.parseAsync(args, { from: "user" });
    return write.mock.calls.map(([text]) => text).join("");
  } finally {
    write.mockRestore();
  }
}
const pixels = async (file: string) => (await sharp(file).raw().toBuffer()).toString("base64");

describe("flowturbo inspect", () => {
  it("prints parameters as a table, or as one JSON object", async () => {
    const folder = temporaryFolder();
    const parameters = {
      prompt: "a red\ncircle \u001b[31m",
      seed: 3,
      guidanceScale: [1, 2],
      software: "flowturbo 0.0.1",
    };
    for (const name of ["a.png", "a.jpg", "a.webp"]) {
      await new Image(8, 6, new Uint8Array(144), parameters).toFile(path.join(folder, name));
      const format = name === "a.jpg" ? "jpeg" : name.slice(2);
      const file = path.join(folder, name);
      expect((await printed("inspect", file)).split("\n")).toEqual([
        `${file}: ${format}, 8 x 6, drawn by flowturbo 0.0.1`,
        "  prompt         a red",
        "                 circle \\u001b[31m",
        "  seed           3",
        "  guidanceScale  [1,2]",
        "  software       flowturbo 0.0.1",
        "",
      ]);
    }
    const json = JSON.parse((await run(["inspect", "a.jpg", "--json"], folder)).stdout);
    expect(json).toMatchObject({ file: "a.jpg", format: "jpeg", width: 8, height: 6, writer: "flowturbo", parameters });
  });

  it("says that there are none, whose they are, and that a file is no picture", async () => {
    const folder = temporaryFolder();
    const { texts } = JSON.parse(readFileSync(fixture("pictures.json"), "utf8"));
    const file = path.join(folder, "x.png");
    const said = async (name: string) => {
      writeFileSync(file, Buffer.from(texts[name], "base64"));
      return (await printed("inspect", file)).replace(folder + path.sep, "");
    };
    expect(await said("nothing")).toBe("x.png: png, 8 x 6. The file holds no parameters.\n");
    expect(await said("comfyui")).toMatch(
      /^x\.png: png, 8 x 6\. It was written by ComfyUI, not by flowturbo:\n {2}prompt {4}\{"3".*\n {2}workflow {2}\{/,
    );
    expect(await said("camera")).toMatch(/holds no parameters of flowturbo, but other texts:\n.*a cat, by hand/);
    writeFileSync(file, "%PDF-1.7");
    const { code, stderr } = await run(["inspect", "x.png"], folder);
    expect([code, stderr]).toEqual([2, expect.stringMatching(/"x\.png" cannot be read: it is a PDF document/)]);
    for (const [contents, reason] of [
      ["", "Input Buffer is empty."],
      ["\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "Input buffer has corrupt header."],
    ] as const) {
      writeFileSync(file, contents, "latin1");
      await expect(printed("inspect", file)).rejects.toThrow(
        expect.objectContaining({
          code: "ERR_FLOWTURBO_OPTION",
          message: `The picture "${file}" cannot be read: ${reason}`,
        }),
      );
    }
    await expect(printed("inspect", "https://example.com/a.png")).rejects.toThrow(/URL.*Nothing is downloaded/);
    await expect(printed("inspect", path.join(folder, "absent.png"))).rejects.toThrow(/absent\.png.*ENOENT/);
  });
});

describe("flowturbo generate --from", () => {
  const generate = async (folder: string, ...args: string[]) => {
    const { code, stdout, stderr } = await run(["generate", ...args, "--json"], folder);
    return { code, stderr, report: code === 0 ? JSON.parse(stdout) : null };
  };

  it("draws the same pixels again, from PNG and JPEG", async () => {
    const folder = temporaryFolder();
    const first = ["--negative", "blue", "--seed", "5", "--steps", "2", "--sampler", "heun", "--shift", "2"];
    expect((await generate(folder, prompt, ...first, "--out", "a.jpg")).code).toBe(0);
    const again = await generate(folder, "--from", "a.jpg", "--out", "b.jpg");
    expect(again).toMatchObject({ code: 0, report: { seeds: [5] } });
    expect(await pixels(path.join(folder, "b.jpg"))).toBe(await pixels(path.join(folder, "a.jpg")));
    // Of the calibrated schedule, which is the default.
    await generate(folder, prompt, "--seed", "6", "--out", "c.png");
    await generate(folder, "--from", "c.png", "--out", "d.png");
    expect(readFileSync(path.join(folder, "d.png")).equals(readFileSync(path.join(folder, "c.png")))).toBe(true);
  });

  it("leaves T5 out where the picture was drawn without it", async () => {
    const folder = temporaryFolder();
    const model = ["--model", path.join(root, "models/shapes")];
    const first = await generate(folder, prompt, "--seed", "6", "--steps", "2", "--no-t5", ...model, "--out", "a.png");
    expect(first.code, first.stderr).toBe(0);
    expect((await generate(folder, "--from", "a.png", ...model, "--out", "b.png")).code).toBe(0);
    expect(await pixels(path.join(folder, "b.png"))).toBe(await pixels(path.join(folder, "a.png")));
    await generate(folder, prompt, "--seed", "6", "--steps", "2", ...model, "--out", "with.png");
    expect(await pixels(path.join(folder, "with.png"))).not.toBe(await pixels(path.join(folder, "a.png")));
  });

  it("takes what is given instead, and warns of another model and of what was cut", async () => {
    const folder = temporaryFolder();
    await generate(folder, prompt, "--seed", "5", "--stage", "32x32:H1", "--stage", "64x64:E1@0.5", "--out", "a.png");
    const again = await generate(
      folder,
      "a blue square",
      "--from",
      "a.png",
      "--steps",
      "3",
      "--count",
      "2",
      "--out",
      "b.png",
    );
    expect(again.report).toMatchObject({ seeds: [5, 6], size: { width: 64, height: 64 } });
    expect(again.report.sigmas).toHaveLength(4);
    expect(again.report.warnings).toEqual([]);
    const text = JSON.parse(await printed("inspect", path.join(folder, "b-1.png"), "--json")).parameters;
    expect(text).toMatchObject({ prompt: "a blue square", steps: 3, seed: 6 });
    const other = { prompt: "a red circle", grid: "calibrated", steps: 3, guidanceScale: 3.9, model: "sd3-medium", newer: 1, truncated: ["prompt"] }; // biome-ignore format: one line
    await new Image(8, 8, new Uint8Array(192), other).toFile(path.join(folder, "other.png"));
    const { report } = await generate(folder, "--from", "other.png", "--seed", "1", "--out", "c.png");
    expect(report.warnings.slice(0, 3)).toEqual([
      expect.stringMatching(/no room.*prompt was shortened or left out/),
      expect.stringMatching(/parameter newer in other\.png/),
      expect.stringMatching(/drawn by the model "sd3-medium" and is drawn again by "shapes"/),
    ]);
    const given = await generate(folder, "x", "--from", "other.png", "--seed", "1", "--model", path.join(root, "models/shapes"), "--out", "c.png"); // biome-ignore format: one line
    expect(given.report.warnings.join()).not.toMatch(/no room/);
  });

  it("draws it again with its skip-layer guidance, and without guidance without that", async () => {
    const folder = temporaryFolder();
    const flags = ["--seed", "5", "--steps", "3", "--guidance", "2", "--skip-layers", "3,1:1.5@0-0.9"];
    const { report } = await generate(folder, prompt, ...flags, "--out", "a.png");
    expect(report.evaluations.rows).toBe(8);
    const { parameters } = JSON.parse(await printed("inspect", path.join(folder, "a.png"), "--json"));
    expect(parameters.skipLayers).toEqual({ layers: [1, 3], scale: 1.5, start: 0, stop: 0.9 });
    expect(await printed("inspect", path.join(folder, "a.png"))).toContain("skipLayers  ");
    await generate(folder, "--from", "a.png", "--out", "b.png");
    expect(await pixels(path.join(folder, "b.png"))).toBe(await pixels(path.join(folder, "a.png")));
    const unguided = await generate(folder, "--from", "a.png", "--guidance", "1", "--out", "c.png");
    expect([unguided.code, unguided.report.evaluations.rows]).toEqual([0, 3]);
  });

  it("asks for what no file holds, and refuses a file without parameters", async () => {
    const folder = temporaryFolder();
    await generate(folder, prompt, "--seed", "5", "--steps", "2", "--out", "original.png");
    const edit = ["--image", "original.png", "--mask", "original.png", "--strength", "0.5"];
    expect((await generate(folder, prompt, "--seed", "6", "--steps", "2", ...edit, "--out", "a.png")).code).toBe(0);
    const inputs = ["--image", "original.png", "--mask", "original.png"];
    expect((await generate(folder, "--from", "a.png", ...inputs, "--out", "b.png")).code).toBe(0);
    expect(await pixels(path.join(folder, "b.png"))).toBe(await pixels(path.join(folder, "a.png")));
    await new Image(8, 8, new Uint8Array(192), { prompt: "x", seed: null, guidanceScale: 1 }).toFile(path.join(folder, "noise.png")); // biome-ignore format: one line
    const controlled = { prompt: "x", seed: 1, guidanceScale: 1, controls: [{ folder: "canny", scale: 1, start: 0, stop: 1 }] }; // biome-ignore format: one line
    await new Image(8, 8, new Uint8Array(192), controlled).toFile(path.join(folder, "controlled.png"));
    writeFileSync(path.join(folder, "page.png"), "<!doctype html>");
    const { texts } = JSON.parse(readFileSync(fixture("pictures.json"), "utf8"));
    for (const name of ["comfyui", "nothing"])
      writeFileSync(path.join(folder, `${name}.png`), Buffer.from(texts[name], "base64"));
    const at = (name: string) => path.join(folder, name);
    for (const [args, message] of [
      [["--from", at("a.png")], /"[^"]*a\.png" was drawn from an original, which no picture's file holds.*--image/],
      [["--from", at("a.png"), "--image", "original.png"], /drawn from a mask.*--mask/],
      [["--from", at("noise.png")], /noise that was given.*--noise, or another start with --seed/],
      [["--from", at("controlled.png")], /was drawn from control pictures, which no picture's file holds.*--control/],
      [["--from", at("comfyui.png")], /--from was written by ComfyUI/],
      [["--from", at("nothing.png")], /--from holds no parameters of flowturbo/],
      [["--from", at("page.png")], /it is an HTML page/],
      [["--from", at("absent.png")], /absent\.png.*cannot be read/],
      [[], /Expected a prompt, or a picture of flowturbo with --from/],
      [["x", "--image", "https://example.com/a.png"], /URL.*Nothing is downloaded/],
    ] as const)
      await expect(printed("generate", ...args, "--out", at("c.png"))).rejects.toThrow(
        expect.objectContaining({ code: "ERR_FLOWTURBO_OPTION", message: expect.stringMatching(message) }),
      );
    const { code, stderr } = await generate(folder, "--from", "a.png");
    expect([code, stderr]).toEqual([2, expect.stringMatching(/^error: --image: The picture "a\.png"/)]);
  });
});
