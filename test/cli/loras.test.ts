// LoRAs on the command line: merged with --lora, said by a picture's file, and listed with the cache.
import { copyFileSync, readFileSync } from "node:fs";
import path from "node:path";
import { expect, it } from "vitest";
import { fixture } from "../support/fixtures.js";
import { run, temporaryFolder } from "./support.js";

it("--lora merges a LoRA, --from says that it was there, and the cache lists and clears it", async () => {
  const folder = temporaryFolder();
  // A path may hold a colon.
  copyFileSync(fixture("sd3", "adapters/lora_a.safetensors"), path.join(folder, "a:style.safetensors"));
  const usual = ["--model", fixture("sd3", "model"), "--runtime", "onnxruntime", "--cache", path.join(folder, "cache")];
  const drawing = ["--width", "32", "--height", "32", "--steps", "1", "--seed", "3", "--json"];
  const draw = async (...args: string[]) => {
    const { code, stdout, stderr } = await run(["generate", ...args, ...usual, ...drawing], folder);
    expect(code, stderr).toBe(0);
    return JSON.parse(stdout).warnings as string[];
  };
  const lora = ["--lora", "a:style.safetensors:0.5"];
  expect(await draw("x", ...lora, "--out", "one.png")).toEqual([]);
  const warning = expect.stringMatching(/one.png was drawn with LoRAs in the weights \(a:style:0.5\).*with --lora/);
  expect(await draw("--from", "one.png", "--out", "two.png")).toEqual([warning]);
  expect(await draw("--from", "one.png", ...lora, "--out", "three.png")).toEqual([]);
  const other = expect.stringMatching(
    /one.png was .*\(a:style:0.5\).*and is drawn again with a:style:1: if these are not the same/,
  );
  expect(await draw("--from", "one.png", "--lora", "a:style.safetensors", "--out", "four.png")).toEqual([other]);

  // Dynamic ones are named by the picture's file.
  const dynamic = ["--dynamic-lora", "s=a:style.safetensors"];
  expect(await draw("x", ...dynamic, "--use-lora", "s:0.5", "--out", "five.png")).toEqual([]);
  expect(await draw("--from", "five.png", ...dynamic, "--out", "six.png")).toEqual([]);
  expect(readFileSync(path.join(folder, "six.png"))).toEqual(readFileSync(path.join(folder, "five.png")));
  expect(await draw("x", ...dynamic, "--out", "seven.png")).toEqual([
    'The LoRA "s" of --dynamic-lora is not in the picture: name it with --use-lora s.',
  ]);
  const nameless = await run(["generate", "--from", "five.png", ...usual, "--out", "eight.png"], folder);
  expect([nameless.code, nameless.stderr]).toEqual([
    2,
    expect.stringMatching(/^error: There is no dynamic LoRA "s": .*\(--dynamic-lora name=file\)\.\n$/),
  ]);

  const cache = async (command: string) =>
    JSON.parse((await run(["cache", command, "--cache", path.join(folder, "cache"), "--json"], folder)).stdout);
  expect((await cache("list")).weights).toHaveLength(2);
  expect((await cache("clear")).weights).toMatchObject({ files: 2 });
  expect((await cache("list")).weights).toEqual([]);

  const refused = await run(["generate", "x", "--lora", "none.safetensors", ...usual], folder);
  expect(refused.code).not.toBe(0);
  expect(refused.stderr).toMatch(/none\.safetensors does not exist/);
});
