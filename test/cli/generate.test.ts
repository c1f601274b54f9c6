import { execFileSync } from "node:child_process";
import { createHash } from "node:crypto";
import { cpSync, existsSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import path from "node:path";
import { stripVTControlCharacters } from "node:util";
import sharp from "sharp";
import { describe, expect, it, vi } from "vitest";
import { writeSafetensors } from "../../lib/checkpoint/index.js";
import { float32 } from "../../lib/common/tensor.js";
import { fixture, readAll, relativeError } from "../support/fixtures.js";
import { cli, run, start, temporaryFolder } from "./support.js";

/** What a PNG file says about itself. */
function writtenParameters(file: string): unknown {
  const bytes = readFileSync(file);
  const start = bytes.indexOf("iTXt");
  const text = bytes.subarray(start + 4, start + 4 + bytes.readUInt32BE(start - 4)).toString();
  return JSON.parse(text.slice(text.indexOf("{")));
}

describe("flowturbo generate", () => {
  it("draws a picture into the working folder and prints its name only", async () => {
    const folder = temporaryFolder();
    const { code, stdout, stderr } = await run(["generate", "a large red square", "--seed", "3"], folder);
    expect(stderr).toBe("");
    expect(code).toBe(0);
    expect(stdout).toBe("flowturbo-3.png\n");
    const picture = await sharp(path.join(folder, "flowturbo-3.png")).metadata();
    expect([picture.width, picture.height, picture.channels]).toEqual([64, 64, 3]);
    const text = readFileSync(path.join(folder, "flowturbo-3.png")).toString("latin1");
    expect(text).toContain('"prompt":"a large red square"');
    expect(text).toContain('"seed":3');
  });

  it("tells how a folder was read that has something twice or not at all, and draws without T5", async () => {
    const folder = temporaryFolder();
    cpSync(fixture("large", "model"), path.join(folder, "model"), { recursive: true });
    rmSync(path.join(folder, "model/text_encoder_3"), { recursive: true });
    const flags = [
      "generate",
      "a",
      "--model",
      "model",
      "--steps",
      "1",
      "--width",
      "64",
      "--height",
      "64",
      "--out",
      "a.png",
    ];
    const told = await run(flags, folder);
    expect(told).toMatchObject({ code: 0, stdout: "a.png\n" });
    expect(told.stderr).toMatch(/^warning: The folder .*text_encoder_3 is missing.*without T5.*\n$/);
    const { stdout, stderr } = await run([...flags, "--json"], folder);
    expect([stderr, JSON.parse(stdout).warnings]).toEqual(["", [told.stderr.slice("warning: ".length).trim()]]);
    const without = await run([...flags, "--no-t5"], folder);
    expect(without).toMatchObject({ code: 0, stderr: "", stdout: "a.png\n" });
  });

  it("says in its files as much as --metadata asks for", async () => {
    const folder = temporaryFolder();
    const drawn = async (...flags: string[]) => {
      const { code, stderr } = await run(
        ["generate", "a red square", "--steps", "1", "--out", "a.png", ...flags],
        folder,
      );
      return { code, stderr, text: code === 0 && readFileSync(path.join(folder, "a.png")).toString("latin1") };
    };
    expect((await drawn()).text).toMatch(/"prompt":.*"model":"shapes"/);
    expect((await drawn("--metadata", "parameters")).text).toMatch(/"prompt":(?!.*"model")/);
    expect((await drawn("--metadata", "false")).text).not.toMatch(/iTXt|prompt/);
    const wrong = await drawn("--metadata", "some");
    expect(wrong).toMatchObject({
      code: 2,
      stderr: expect.stringMatching(/--metadata: Expected "full", "parameters" or false/),
    });
  });

  const script = ["/usr/bin/script", "/bin/script"].find(existsSync);
  it.skipIf(!script)("shows a bar on a terminal, and none on one that has no width", () => {
    const folder = temporaryFolder();
    const drawn = (columns: number) => {
      // script(1) runs a command on a new terminal, whose width is 0 until somebody sets it. As many steps as last longer
      // than the fifth of a second between two messages about them.
      const command = `${columns ? `stty cols ${columns}; ` : ""}exec ${process.execPath} ${cli} generate "a red circle" --steps 200 --seed 1`;
      return execFileSync(script!, ["-qec", command, "/dev/null"], { cwd: folder, encoding: "utf8", stdio: "pipe" });
    };
    const bare = drawn(0);
    expect(bare.trim()).toBe("flowturbo-1.png");
    const shown = drawn(80);
    expect(shown).toMatch(/[█░]{24} \d+\/200/);
    expect(stripVTControlCharacters(shown).trim()).toMatch(/flowturbo-1\.png$/);
  });

  it("reports in JSON and writes latents and decoded values", async () => {
    const folder = temporaryFolder();
    const reference = await readAll(fixture("large/turbo_h1p2r2.safetensors"));
    const { code, stdout } = await run(
      [
        "generate",
        "a red circle above a small blue square",
        "the photo of a café, 3 dogs & a cat's bowl!",
        ...["--model", fixture("large/model"), "--negative", "blurry, low quality", "--width", "64", "--height", "64"],
        ...["--blocks", "HPPRR", "--guidance", "4.5", "--max-sequence-length", "32", "--threads", "1"],
        ...["--noise", fixture("large/turbo_h1p2r2.safetensors"), "--save-latents", "deep/out.safetensors"],
        ...["--out", "deep/er/{index}.webp", "--json"],
      ],
      folder,
    );
    expect(code).toBe(0);
    const report = JSON.parse(stdout);
    expect(report.files).toEqual(["deep/er/0.webp", "deep/er/1.webp"]);
    expect(report.size).toEqual({ width: 64, height: 64 });
    expect(report.blocks).toBe("H1P2R2");
    expect(report.evaluations).toEqual({ predictor: 4, refiner: 4, rows: 8 });
    expect(report.sigmas).toHaveLength(6);
    expect(report.milliseconds.steps).toHaveLength(5);
    for (const value of [report.milliseconds.load, report.milliseconds.encode, report.milliseconds.decode])
      expect(value).toBeGreaterThan(0);
    const saved = await readAll(path.join(folder, "deep/out.safetensors"));
    expect(relativeError(saved.latents!, reference.latents!)).toBeLessThan(1e-5);
    expect(relativeError(saved.image!, reference.image!)).toBeLessThan(1e-5);
    // The file is the decoded image, clamped and rounded.
    const { data } = await sharp(path.join(folder, "deep/er/1.webp")).raw().toBuffer({ resolveWithObject: true });
    expect(data.length).toBe(64 * 64 * 3);
  });

  it("draws as a distilled model where the flag says so, and shows what loading warned of", async () => {
    const folder = temporaryFolder();
    cpSync(fixture("large/model"), path.join(folder, "model"), { recursive: true });
    const config = path.join(folder, "model/scheduler/scheduler_config.json");
    const values = JSON.parse(readFileSync(config, "utf8"));
    writeFileSync(config, JSON.stringify({ ...values, stochastic_sampling: true }));
    const args = ["generate", "a red circle", "--model", "model", "--width", "32", "--height", "32", "--json"];
    const drawn = async (flag: string) =>
      JSON.parse((await run([...args, flag], folder)).stdout) as Record<string, unknown>;
    expect(await drawn("--distilled")).toMatchObject({
      blocks: "E4",
      warnings: [expect.stringMatching(/FlowMatchEulerDiscreteScheduler, draws new noise at each step/)],
    });
    expect(await drawn("--no-distilled")).toMatchObject({ evaluations: { rows: 20 } });
  });

  it("names the pictures of a batch apart and seeds them one by one", async () => {
    const folder = temporaryFolder();
    const args = ["generate", "a blue square", "--seed", "10", "--steps", "2"];
    const batch = await run([...args, "--count", "3", "--out", "x.png", "--json"], folder);
    const report = JSON.parse(batch.stdout);
    expect(report.files).toEqual(["x-0.png", "x-1.png", "x-2.png"]);
    expect(report.seeds).toEqual([10, 11, 12]);
    await run(["generate", "a blue square", "--seed", "12", "--steps", "2", "--out", "alone-{seed}.png"], folder);
    const pixels = async (name: string) => [...(await sharp(path.join(folder, name)).raw().toBuffer())];
    const [together, alone] = [await pixels("x-2.png"), await pixels("alone-12.png")];
    expect(together.every((value, i) => Math.abs(value - alone[i]!) <= 1)).toBe(true);
  });

  it("shows seeds that no number holds as they are, and draws what their low 32 bits draw", async () => {
    const folder = temporaryFolder();
    const args = ["generate", "a blue square", "--count", "2", "--steps", "2", "--json", "--out", "{seed}.png"];
    const { stdout } = await run([...args, "--seeds", "6687881544318117707,9"], folder);
    const low = String(6687881544318117707n & 0xffffffffn);
    await run([...args, "--seeds", `${low},9`], folder);
    const report = JSON.parse(stdout);
    expect(report.seeds).toEqual(["6687881544318117707", 9]);
    expect(report.files).toEqual(["6687881544318117707.png", "9.png"]);
    const png = (name: string) => readFileSync(path.join(folder, `${name}.png`));
    expect(png("6687881544318117707").toString("latin1")).toContain('"seed":"6687881544318117707"');
    const pixels = (name: string) => sharp(png(name)).raw().toBuffer();
    expect((await pixels("6687881544318117707")).equals(await pixels(low))).toBe(true);
  });

  it("writes each picture into a file of its own, also where seeds are alike, however they are written", async () => {
    const folder = temporaryFolder();
    const args = ["generate", "a blue square", "a red circle", "--steps", "1", "--json"];
    const { stdout } = await run([...args, "--seeds", "7,007"], folder);
    const files = ["flowturbo-7-0.png", "flowturbo-7-1.png"];
    expect(JSON.parse(stdout)).toMatchObject({ files, seeds: [7, 7] });
    expect(readdirSync(folder).sort()).toEqual(files);
    const [first, second] = files.map((file) => readFileSync(path.join(folder, file)));
    expect(first!.equals(second!)).toBe(false);
  });

  it("writes latents alone where that is what is asked for", async () => {
    const folder = temporaryFolder();
    const args = ["generate", "a blue square", "--seed", "3", "--steps", "2", "--json", "--save-latents"];
    const { stdout } = await run([...args, "alone.safetensors", "--output-type", "latent"], folder);
    expect(JSON.parse(stdout)).toMatchObject({ files: ["alone.safetensors"], seeds: [3] });
    expect(readdirSync(folder)).toEqual(["alone.safetensors"]);
    await run([...args, "both.safetensors"], folder);
    const alone = await readAll(path.join(folder, "alone.safetensors"));
    expect(Object.keys(alone)).toEqual(["latents"]);
    expect(alone.latents).toEqual((await readAll(path.join(folder, "both.safetensors"))).latents);
  });

  it("writes the same bytes for the same seed", async () => {
    const folder = temporaryFolder();
    for (const name of ["a.png", "b.png"])
      await run(["generate", "a blue square", "--seed", "5", "--steps", "2", "--out", name], folder);
    expect(readFileSync(path.join(folder, "a.png")).equals(readFileSync(path.join(folder, "b.png")))).toBe(true);
  });

  it("runs through stages, watched by a preview", async () => {
    const folder = temporaryFolder();
    const reference = await readAll(fixture("medium/stages.safetensors"));
    const { code, stdout } = await run(
      [
        ...["generate", "a red circle above a small blue square", "--model", fixture("medium/model")],
        ...[
          "--negative",
          "blurry, low quality",
          "--max-sequence-length",
          "32",
          "--noise",
          fixture("medium/stages.safetensors"),
        ],
        ...["--stage", "64x64:HPPR", "--stage", "128x128:H1P1@0.6", "--preview", "now.png", "--out", "x.png"],
        ...["--save-latents", "x.safetensors", "--json"],
      ],
      folder,
    );
    expect(code).toBe(0);
    const report = JSON.parse(stdout);
    expect(report.stages.map((stage: { blocks: string }) => stage.blocks)).toEqual(["H1P2R1", "H1P1"]);
    expect(report.milliseconds.upscale).toBeGreaterThan(0);
    const saved = await readAll(path.join(folder, "x.safetensors"));
    expect(relativeError(saved.latents!, reference.latents!)).toBeLessThan(1e-5);
    expect(relativeError(saved.image!, reference.image!)).toBeLessThan(1e-5);
    expect((await sharp(path.join(folder, "now.png")).metadata()).width).toBe(256);
    expect(readdirSync(folder).sort()).toEqual(["now.png", "x.png", "x.safetensors"]);
  });

  it.each([
    ["64x64:H1@0.5:latents", [1, 1 / 3]],
    ["64x64:H1:latents", [1, 0.6 / 1.4]],
    ["64x64:H1@0.5:pixels", [1, 0]],
  ])("upscales between stages as %s says", async (stage, levels) => {
    const stages = ["--stage", "32x32:E1", "--stage", stage];
    const { code, stdout } = await run(["generate", "a red circle", ...stages, "--json"], temporaryFolder());
    expect(code).toBe(0);
    const [{ sigmas }] = JSON.parse(stdout).stages;
    expect(sigmas[0]).toBe(levels[0]);
    expect(sigmas[1]).toBeCloseTo(levels[1]!, 12);
  });

  // The same that diffusers draws: each flag reaches the schedule, and what the picture says of itself.
  it.each([
    ["sigmas_explicit", ["--sigmas", "1,0.9,0.7,0.4,0.15"], [5, 10], { sigmas: [1, 0.9, 0.7, 0.4, 0.15] }],
    ["sigmas_explicit_shift1", ["--sigmas", "1,0.9,0.7,0.4,0.15", "--shift", "1"], [5, 10], { shift: 1 }],
    ["grid_karras", ["--steps", "6", "--grid", "karras"], [6, 12], { steps: 6, grid: "karras" }],
    ["grid_dynamic_linear", ["--steps", "6", "--mu", "1.5"], [6, 12], { steps: 6, mu: 1.5 }],
    ["cfg_zero", ["--steps", "6", "--guidance-mode", "cfg_zero"], [5, 10], { steps: 6, guidanceMode: "cfg_zero" }],
    [
      ...["guidance_interval", ["--steps", "10", "--guidance-start", "0.1", "--guidance-stop", "0.6"]],
      ...[[10, 15], { guidanceStart: 0.1, guidanceStop: 0.6 }],
    ],
  ] as [string, string[], [number, number], object][])(
    "draws %s as its flags say",
    async (name, flags, [predictor, rows], parameters) => {
      const folder = temporaryFolder();
      const file = fixture(`sd3/${name}.safetensors`);
      const reference = await readAll(file);
      const prompts = ["a red circle above a small blue square", "the photo of a café, 3 dogs & a cat's bowl!"];
      let model = fixture("sd3/model");
      if (flags.includes("--mu")) {
        cpSync(model, path.join(folder, "model"), { recursive: true });
        model = path.join(folder, "model");
        const config = path.join(model, "scheduler/scheduler_config.json");
        const shifting = { use_dynamic_shifting: true, time_shift_type: "linear" };
        writeFileSync(config, JSON.stringify({ ...JSON.parse(readFileSync(config, "utf8")), ...shifting }));
      }
      const { code, stdout, stderr } = await run(
        [
          ...["generate", ...prompts.slice(0, reference.noise!.shape[0]), "--model", model, "--noise", file],
          ...["--negative", "blurry, low quality", "--max-sequence-length", "32", "--height", "48", "--width", "32"],
          ...["--sampler", "euler", ...flags, "--out", "{index}.png", "--save-latents", "x.safetensors", "--json"],
        ],
        folder,
      );
      expect([code, stderr]).toEqual([0, ""]);
      const { sigmas, evaluations } = JSON.parse(stdout);
      expect(evaluations).toEqual({ predictor, refiner: 0, rows });
      const levels = [...reference.sigmas!.data].slice(name === "cfg_zero" ? 1 : 0);
      expect(sigmas).toEqual(levels.map((sigma) => expect.closeTo(sigma, 6)));
      expect(writtenParameters(path.join(folder, "0.png"))).toMatchObject({ sampler: "euler", ...parameters });
      const saved = await readAll(path.join(folder, "x.safetensors"));
      expect(relativeError(saved.latents!, reference.latents!)).toBeLessThan(1e-5);
    },
  );

  it.each([
    ["fast", 6],
    ["balanced", 10],
  ])("draws as many steps as --quality %s stands for", async (quality, steps) => {
    const folder = temporaryFolder();
    const flags = ["--quality", quality, "--grid", "eased", "--width", "16", "--height", "16", "--out", "x.png"];
    const { code, stdout } = await run(["generate", "a red circle", ...flags, "--json"], folder);
    expect(code).toBe(0);
    expect(JSON.parse(stdout).evaluations).toEqual({ predictor: steps, refiner: 0, rows: 2 * steps });
    expect(writtenParameters(path.join(folder, "x.png"))).toMatchObject({ steps, grid: "eased" });
  });

  it("starts from a picture and paints into a part of it", async () => {
    const folder = temporaryFolder();
    const reference = await readAll(fixture("sd3/inpaint.safetensors"));
    const { code } = await run(
      [
        ...["generate", "a red circle above a small blue square", "--model", fixture("sd3/model")],
        ...[
          "--negative",
          "blurry, low quality",
          "--max-sequence-length",
          "32",
          "--noise",
          fixture("sd3/inpaint.safetensors"),
        ],
        ...[
          "--image",
          fixture("sd3/init.png"),
          "--mask",
          fixture("sd3/mask.png"),
          "--strength",
          "0.6",
          "--sampler",
          "euler",
        ],
        ...["--steps", "10", "--width", "64", "--height", "64", "--out", "x.png", "--save-latents", "x.safetensors"],
      ],
      folder,
    );
    expect(code).toBe(0);
    const saved = await readAll(path.join(folder, "x.safetensors"));
    expect(relativeError(saved.latents!, reference.latents!)).toBeLessThan(1e-5);
    expect(relativeError(saved.image!, reference.image!)).toBeLessThan(1e-5);
    const [kept, original] = await Promise.all(
      [path.join(folder, "x.png"), fixture("sd3/init.png")].map((file) => sharp(file).removeAlpha().raw().toBuffer()),
    );
    expect([...kept!.subarray(0, 30)]).toEqual([...original!.subarray(0, 30)]);
  });

  it("rewrites a preview as a whole, and finishes the picture where it cannot", async () => {
    const folder = temporaryFolder();
    const file = path.join(folder, "p/now.png");
    const { finished } = start(
      ["generate", "a red square", "--steps", "60", "--seed", "1", "--preview", "p/now.png", "--out", "x.png"],
      folder,
    );
    const seen = new Set<string>();
    while (seen.size < 3) {
      await new Promise((resolve) => setTimeout(resolve, 2));
      if (!existsSync(file)) continue;
      const bytes = readFileSync(file);
      // Never a part of a file: it ends as PNG files end.
      expect(bytes.subarray(-8, -4).toString("latin1")).toBe("IEND");
      seen.add(createHash("sha1").update(bytes).digest("hex"));
    }
    rmSync(path.join(folder, "p"), { recursive: true, force: true, maxRetries: 20, retryDelay: 5 });
    const { code, stdout, stderr } = await finished;
    expect([code, stdout]).toEqual([0, "x.png\n"]);
    expect(stderr).toMatch(/^warning: Previews could not be written to p\/now\.png/);
  });

  it("says that a mask is black everywhere", async () => {
    const folder = temporaryFolder();
    const create = { width: 64, height: 64, channels: 3 as const, background: "#000" };
    await sharp({ create }).png().toFile(path.join(folder, "black.png"));
    const image = fixture("sd3/init.png");
    const { code, stderr } = await run(
      ["generate", "x", "--image", image, "--mask", "black.png", "--out", "x.png", "--seed", "1"],
      folder,
    );
    expect(code).toBe(0);
    expect(stderr).toMatch(/^warning: The mask is black everywhere/);
    const pixels = (file: string) => sharp(file).removeAlpha().raw().toBuffer();
    expect((await pixels(path.join(folder, "x.png"))).equals(await pixels(image))).toBe(true);
  });

  it("warns about a prompt that was cut, on stderr", async () => {
    const folder = temporaryFolder();
    const { code, stdout, stderr } = await run(
      ["generate", "a large red square ".repeat(20), "--steps", "1", "--seed", "1"],
      folder,
    );
    expect(code).toBe(0);
    expect(stdout).toBe("flowturbo-1.png\n");
    expect(stderr).toMatch(/warning: .*longer than the 16 tokens/);
  });
});

describe("usage errors", () => {
  it.each([
    ["no prompt", ["generate"], /Expected a prompt, or a picture of flowturbo with --from/],
    ["an unknown flag", ["generate", "x", "--frobnicate"], /unknown option/],
    ["an unknown command", ["paint", "x"], /unknown command|too many arguments/],
    ["a word for a number", ["generate", "x", "--width", "wide"], /--width: Expected a whole number of pixels.*"wide"/],
    ["a size off the grid", ["generate", "x", "--width", "100"], /--width: Expected a multiple of 8.*100/],
    ["a size of another order", ["generate", "x", "--width", "100000"], /--width: Expected at most 256.*100000/],
    ["a size beyond the table", ["generate", "x", "--height", "4096"], /--height: Expected at most 256.*4096/],
    [
      "a sampler unknown",
      ["generate", "x", "--sampler", "ddim"],
      /--sampler: Expected "flowturbo", "euler", "dpmpp_2m", "unipc" or "heun".*"ddim"/,
    ],
    ["blocks starting with R", ["generate", "x", "--blocks", "R3P2"], /start with R/],
    ["blocks of another alphabet", ["generate", "x", "--blocks", "H1Z2"], /Expected blocks such as/],
    [
      "blocks with a sampler",
      ["generate", "x", "--blocks", "H2", "--sampler", "euler"],
      /Blocks belong to the sampler flowturbo/,
    ],
    ["blocks with other steps", ["generate", "x", "--blocks", "H2", "--steps", "5"], /2 steps/],
    ["sigmas that rise", ["generate", "x", "--sigmas", "1,0.5,0.9"], /^error: --sigmas: Expected falling sigmas/],
    ["sigmas that are words", ["generate", "x", "--sigmas", "1,half"], /^error: --sigmas: Expected a list of falling/],
    ["a grid unknown", ["generate", "x", "--grid", "linear"], /^error: --grid: Expected "eased",.*"linear"/],
    ["no shift", ["generate", "x", "--shift", "0"], /^error: --shift: Expected a number from 0.01 to 100/],
    ["mu without its scheduler", ["generate", "x", "--mu", "1"], /^error: --mu: .*does not shift by size/],
    ["a word for mu", ["generate", "x", "--mu", "much"], /^error: --mu: Expected a number from -10 to 10.*"much"/],
    ["a start beyond the end", ["generate", "x", "--guidance-start", "1.5"], /^error: --guidance-start: Expected a n/],
    [
      "an interval that is empty",
      ["generate", "x", "--guidance-start", "0.6", "--guidance-stop", "0.5"],
      /^error: --guidance-start: Expected guidanceStart \(0\.6\) below guidanceStop \(0\.5\)/,
    ],
    ["a stop before the start", ["generate", "x", "--guidance-stop", "-1"], /^error: --guidance-stop: Expected a n/],
    ["guidance unknown", ["generate", "x", "--guidance-mode", "apg"], /^error: --guidance-mode: Expected "cfg" or/],
    ["a quality unknown", ["generate", "x", "--quality", "good"], /^error: --quality: Expected "fast", "balanced" or/],
    ["a quality beside steps", ["generate", "x", "--quality", "fast", "--steps", "3"], /^error: --quality: Both/],
    ["no steps", ["generate", "x", "--steps", "0"], /--steps: Expected a whole number from 1/],
    ["a negative seed", ["generate", "x", "--seed", "-1"], /--seed: Expected a whole number/],
    [
      "a seed of too many bits",
      ["generate", "x", "--seed", "18446744073709551616"],
      /^error: --seed: Expected a whole number from 0 to 18446744073709551615, .*received "18446744073709551616"\.$/m,
    ],
    ["seeds and a seed", ["generate", "x", "--seeds", "1", "--seed", "1"], /^error: --seeds: Both seeds and seed say/],
    [
      "a file for latents",
      ["generate", "x", "--output-type", "latent", "--save-latents", "l.safetensors", "--out", "x.png"],
      /^error: With --output-type latent there are no pictures to write/,
    ],
    ["too many seeds", ["generate", "x", "--seeds", "1,2"], /^error: --seeds: Expected as many .* 1 .*received 2\./],
    ["a negative seed in a list", ["generate", "x", "--seeds", "1,-2"], /^error: --seeds: Expected a list of seeds/],
    ["a fractional count", ["generate", "x", "--count", "1.5"], /--count/],
    ["an unknown runtime", ["generate", "x", "--runtime", "magic"], /--runtime/],
    ["a stage that is none", ["generate", "x", "--stage", "64x64"], /WIDTHxHEIGHT:BLOCKS/],
    [
      "a stage that is upscaled in a way that there is not",
      ["generate", "x", "--stage", "64x64:H1", "--stage", "128x128:H1@0.5:bogus"],
      /Expected "pixels" or "latents" for stages\[1\]\.upscale but received "bogus"/,
    ],
    ["a stage with a word for sigma", ["generate", "x", "--stage", "64x64:H1@much"], /BLOCKS@SIGMA.*H1@much/],
    [
      "a stage with too great a sigma",
      ["generate", "x", "--stage", "64x64:H1", "--stage", "128x128:H1@1.5"],
      /^error: Expected a number between 0 and 1 for stages\[1\]\.sigma/,
    ],
    [
      "a stage of other blocks",
      ["generate", "x", "--stage", "64x64:Z3"],
      /^error: stages\[0\]\.blocks: Expected blocks/,
    ],
    ["a stage with a width", ["generate", "x", "--stage", "64x64:H1", "--width", "64"], /--width: .*leave out width/],
    ["a stage with blocks", ["generate", "x", "--stage", "64x64:H1", "--blocks", "H1"], /--blocks: .*leave out blocks/],
    ["stages that fall", ["generate", "x", "--stage", "64x64:H1", "--stage", "32x32:H1"], /rising sizes/],
    [
      "latents without a place",
      ["generate", "x", "--output-type", "latent"],
      /--output-type: .*say with --save-latents/,
    ],
    [
      "a padding without a mask",
      ["generate", "x", "--image", "i.png", "--padding-mask-crop", "8"],
      /^error: --padding-mask-crop: .*give image and mask/,
    ],
    ["a mask without an image", ["generate", "x", "--mask", "m.png"], /--mask: .*needs an image/],
    [
      "a strength of zero",
      ["generate", "x", "--image", "i.png", "--strength", "0"],
      /--strength: Expected a number above 0/,
    ],
    ["an image that is not there", ["generate", "x", "--image", "none.png"], /--image: .*none\.png/],
    ["an unknown extension", ["generate", "x", "--out", "x.bmp"], /Expected a file name ending in .png/],
    ["an unknown placeholder", ["generate", "x", "--out", "{prompt}.png"], /Expected \{seed\} or \{index\}/],
    ["a longer T5 part than the tokenizer takes", ["generate", "x", "--max-sequence-length", "99"], /at most 16/],
  ])("%s", async (_, args, message) => {
    const folder = temporaryFolder();
    const { code, stdout, stderr } = await run(args, folder);
    expect(stderr).toMatch(message);
    expect(stdout).toBe("");
    expect(code).toBe(2);
    expect(readdirSync(folder)).toEqual([]);
  });
});

describe("other errors", () => {
  it("a missing folder exits with 1 and leaves nothing behind", async () => {
    const folder = temporaryFolder();
    const { code, stderr } = await run(["generate", "x", "--model", "nowhere", "--out", "a/b/c.png"], folder);
    expect(code).toBe(1);
    expect(stderr).toMatch(/nowhere does not exist/);
    expect(readdirSync(folder)).toEqual([]);
  });

  it("an output folder that cannot be written is refused before the work", async () => {
    const folder = temporaryFolder();
    writeFileSync(path.join(folder, "file"), "");
    for (const [flag, file] of [
      ["--out", "file/x.png"],
      ["--out", "/proc/nowhere/x.png"],
      ["--save-latents", "file/x.safetensors"],
    ] as const) {
      const { code, stderr } = await run(["generate", "x", "--model", "nowhere", flag, file], folder);
      expect(code).toBe(1);
      // The model's folder does not exist either, but that is not what it says.
      expect(stderr).toMatch(/Cannot write to the folder .*\/(file|nowhere): \w+: [\w ]+\. Nothing was drawn/);
    }
    expect(readdirSync(folder)).toEqual(["file"]);
  });

  it("noise of the wrong shape or content", async () => {
    const folder = temporaryFolder();
    const file = (name: string) => path.join(folder, name);
    await writeSafetensors(file("small.safetensors"), { noise: float32([1, 16, 4, 4], new Float32Array(256)) });
    await writeSafetensors(file("flat.safetensors"), { noise: float32([768], new Float32Array(768)) });
    await writeSafetensors(file("other.safetensors"), { latents: float32([1], new Float32Array(1)) });
    writeFileSync(file("text.safetensors"), "this is no safetensors file at all");
    const small = await run(["generate", "x", "--noise", "small.safetensors"], folder);
    expect(small.stderr).toMatch(/Expected shape \[1, \d+, 16, 16\] for noise.*\[1, 16, 4, 4\]/);
    expect(small.code).toBe(2);
    const other = await run(["generate", "x", "--noise", "other.safetensors"], folder);
    expect(other.stderr).toMatch(/Expected a tensor named "noise".*latents/);
    expect(other.code).toBe(2);
    const flat = await run(["generate", "x", "--noise", "flat.safetensors"], folder);
    expect(flat.stderr).toMatch(/Expected shape \[B, C, h, w\] for "noise" in flat\.safetensors.*\[768\]/);
    expect(flat.code).toBe(2);
    const text = await run(["generate", "x", "--noise", "text.safetensors"], folder);
    expect(text.stderr).toMatch(/text\.safetensors/);
    expect(text.code).toBe(1);
    expect(readdirSync(folder).sort()).toEqual(["flat", "other", "small", "text"].map((name) => `${name}.safetensors`));
  });
});

describe("ending", () => {
  it.each([
    ["SIGINT", 130],
    ["SIGTERM", 143],
  ] as const)("%s stops within a step and exits with %i", async (signal, expected) => {
    const [folder, other] = [temporaryFolder(), temporaryFolder()];
    const preview = path.join(other, "now.png");
    const { child, finished } = start(
      ["generate", "a blue square", "--steps", "1000", "--width", "256", "--height", "256", "--preview", preview],
      folder,
    );
    // The first preview comes with the first step.
    await vi.waitFor(() => expect(existsSync(preview)).toBe(true), { interval: 20, timeout: 50_000 });
    child.kill(signal);
    const sent = performance.now();
    const { code, stdout } = await finished;
    expect(code).toBe(expected);
    expect(stdout).toBe("");
    expect(performance.now() - sent).toBeLessThan(15_000);
    expect(existsSync(path.join(folder, "flowturbo-0.png"))).toBe(false);
    expect(readdirSync(folder)).toEqual([]);
  });
});

describe("flowturbo doctor", () => {
  it("finds ONNX Runtime and says why TensorRT is missing", async () => {
    const folder = temporaryFolder();
    const { code, stdout } = await run(["doctor", "--json"], folder);
    expect(code).toBe(0);
    const report = JSON.parse(stdout);
    const byName = Object.fromEntries(report.runtimes.map((runtime: { name: string }) => [runtime.name, runtime]));
    expect(byName.onnxruntime.available).toBe(true);
    expect(byName.onnxruntime.version).toMatch(/^\d+\.\d+/);
    for (const name of ["tensorrt", "tensorrt-rtx"]) {
      expect(byName[name].available).toBe(false);
      expect(byName[name].reason).toBeTruthy();
    }
    const plain = await run(["doctor"], folder);
    expect(plain.stdout).toMatch(/✔ onnxruntime/);
    expect(plain.stdout).toMatch(/✘ tensorrt/);
  });

  it("a reader that has seen enough is no failure", async () => {
    const { child, finished } = start(["generate", "--help"], temporaryFolder());
    child.stdout!.destroy();
    expect(await finished).toMatchObject({ code: 0, stderr: "" });
  });

  it("help and version", async () => {
    const folder = temporaryFolder();
    expect((await run(["--version"], folder)).stdout).toMatch(/^\d+\.\d+\.\d+\n$/);
    const help = await run(["generate", "--help"], folder);
    expect(help.code).toBe(0);
    for (const flag of [
      "--model",
      "--runtime",
      "--variant",
      "--negative",
      "--width",
      "--height",
      "--sampler",
      "--steps",
      "--blocks",
      "--guidance",
      "--seed",
      "--count",
      "--max-sequence-length",
      "--threads",
      "--weights",
      "--out",
      "--json",
      "--noise",
      "--save-latents",
      "--stage",
      "--image",
      "--mask",
      "--strength",
      "--no-keep-original",
      "--preview",
    ])
      expect(help.stdout).toContain(flag);
  });
});
