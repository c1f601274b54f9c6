// Texts of the flags of adapters: read from the right, since paths may hold what divides them.
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import path from "node:path";
import { afterAll, describe, expect, it } from "vitest";
import { readLoadAdapters, readRequestAdapters } from "../../lib/cli/adapters.js";
import { OptionError } from "../../lib/errors.js";

const folder = mkdtempSync(path.join(tmpdir(), "flags-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));
const odd = path.join(folder, "a:b=c.png");
writeFileSync(odd, "");
const epoch = path.join(folder, "epoch:10");
mkdirSync(epoch);

describe("--lora", () => {
  it.each([
    ["style.safetensors", { file: "style.safetensors" }],
    ["style.safetensors:0.8", { file: "style.safetensors", scale: 0.8 }],
    ["./a:b/style.safetensors:-1", { file: "./a:b/style.safetensors", scale: -1 }],
    ["C:\\loras\\style.safetensors", { file: "C:\\loras\\style.safetensors" }],
    ["C:\\loras\\style.safetensors:.5", { file: "C:\\loras\\style.safetensors", scale: 0.5 }],
    ["style.safetensors:1e-1", { file: "style.safetensors", scale: 0.1 }],
    [epoch, { file: epoch }],
    [`${epoch}:0.5`, { file: epoch, scale: 0.5 }],
  ])("%s", (text, expected) => expect(readLoadAdapters({ lora: [text] }).loras).toEqual([expected]));

  it.each(["abc", "NaN", "0,7", ""])("with something else than a number behind a file is refused: %s", (scale) =>
    expect(() => readLoadAdapters({ lora: [`${odd}:${scale}`] })).toThrow(
      /a number behind it, such as style\.safetensors:0\.8, for --lora but received/,
    ),
  );
});

describe("--dynamic-lora and --control-net", () => {
  it("have a name before the sign =", () => {
    expect(readLoadAdapters({ dynamicLora: ["ink=./ink v2.safetensors:0.7", "b.safetensors"] }).loras).toEqual([
      { name: "ink", file: "./ink v2.safetensors", scale: 0.7, dynamic: true },
      { file: "b.safetensors", dynamic: true },
    ]);
    expect(readLoadAdapters({ controlNet: ["canny=./x", "./y=z", "/a/b"] }).controlNets).toEqual([
      { name: "canny", folder: "./x" },
      { folder: "./y=z" },
      { folder: "/a/b" },
    ]);
  });
});

describe("a LoRA without a name, or with a scale that none has", () => {
  it.each([
    [() => readLoadAdapters({ lora: [""] }), '--lora but received ""'],
    [() => readLoadAdapters({ lora: ["a.safetensors:500"] }), '--lora but received "a.safetensors:500"'],
    [() => readLoadAdapters({ dynamicLora: ["a=b:-101"] }), '--dynamic-lora but received "a=b:-101"'],
    [() => readRequestAdapters({ useLora: [""] }), '--use-lora but received ""'],
    [() => readRequestAdapters({ useLora: ["ink:1", "ink:500"] }), '--use-lora but received "ink:500"'],
  ])("is refused with its flag: %#", (read, message) => {
    expect(read).toThrow(expect.objectContaining({ option: "loras", message: expect.stringContaining(message) }));
  });
});

describe("--control", () => {
  it.each([
    ["canny:edges.png", { folder: "canny", image: "edges.png" }],
    ["canny:edges.png:0.8@0-0.7", { folder: "canny", image: "edges.png", scale: 0.8, start: 0, stop: 0.7 }],
    ["./c:edges.png@.1-1", { folder: "./c", image: "edges.png", start: 0.1, stop: 1 }],
    ["C:\\nets\\canny:D:\\edges.png:1", { folder: "C:\\nets\\canny", image: "D:\\edges.png", scale: 1 }],
    [`./c:${odd}:2`, { folder: "./c", image: odd, scale: 2 }],
  ])("%s", (text, expected) => expect(readRequestAdapters({ control: [text] }).controls).toEqual([expected]));

  it("with --canny makes the control pictures", () => {
    expect(readRequestAdapters({ control: ["a:b.png"], canny: true }).controls).toEqual([
      { folder: "a", image: "b.png", preprocess: "canny" },
    ]);
    expect(() => readRequestAdapters({ canny: true })).toThrow(OptionError);
  });

  it("has the mask in the same place", () => {
    const control = ["paint:a.png", "paint:b.png@0-0.5", "canny:c.png"];
    expect(readRequestAdapters({ control, controlMask: ["m.png", "n.png"] }).controls).toEqual([
      { folder: "paint", image: "a.png", mask: "m.png" },
      { folder: "paint", image: "b.png", start: 0, stop: 0.5, mask: "n.png" },
      { folder: "canny", image: "c.png" },
    ]);
    for (const flags of [{ controlMask: ["m.png"] }, { control: ["a:b.png"], controlMask: ["m.png", "n.png"] }])
      expect(() => readRequestAdapters(flags)).toThrow(/The flag --control-mask is of the --control in the same place/);
  });

  it.each(["0,8", "nan", "0.8@0.5", "1e"])("of a picture that is there, with %s for a scale, is refused", (scale) =>
    expect(() => readRequestAdapters({ control: [`./c:${odd}:${scale}`] })).toThrow(
      `Expected a scale, or a scale and an interval, such as 0.8@0-0.7 behind the picture for --control but received "${scale}"`,
    ),
  );

  it.each(["canny", ":x.png", "canny:", "C:\\canny"])("without both is refused: %s", (text) =>
    expect(() => readRequestAdapters({ control: [text] })).toThrow(/folder:image.*for --control but received/),
  );
});

describe("--skip-layers", () => {
  it.each([
    ["7", { layers: [7] }],
    ["7,8, 9:2.8@0.01-0.2", { layers: [7, 8, 9], scale: 2.8, start: 0.01, stop: 0.2 }],
    ["0:1", { layers: [0], scale: 1 }],
  ])("%s", (text, expected) => expect(readRequestAdapters({ skipLayers: text }).skipLayers).toEqual(expected));
  it.each(["", "x", "7,,8", "-1", "7:x"])("without numbers is refused: %s", (text) =>
    expect(() => readRequestAdapters({ skipLayers: text })).toThrow(/7,8,9:2\.8@0\.01-0\.2 for --skip-layers/),
  );
});
