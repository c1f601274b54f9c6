/** OpenVINO: its runtime under a loop in numpy (openvino_pipeline.py), and openvino-genai (genai_pipeline.py). */

import { existsSync, rmSync } from "node:fs";
import path from "node:path";
import type { Contender, Place } from "./contender.js";
import { onceOf, PythonSession, pythonWith, runScript } from "./python.js";

const converter = "openvino_convert.py";

/** The converted modules; with `form` the transformer in that form beside them. */
async function converted({ model, work }: Place, form?: string): Promise<string> {
  const folder = path.join(work, "openvino");
  const python = await pythonWith("openvino");
  // torch and diffusers convert, and the tokenizers are among what is converted.
  await pythonWith("torch");
  const tokenizers = await pythonWith("genai").then(
    () => true,
    () => false,
  );
  const last = tokenizers ? "tokenizer_3/openvino_tokenizer.xml" : "config.json";
  if (!existsSync(path.join(folder, last))) {
    console.log("converting for OpenVINO");
    rmSync(folder, { recursive: true, force: true });
    await runScript(python, converter, [model, folder, ...(tokenizers ? [] : ["--no-tokenizers"])]);
  }
  if (form && !existsSync(path.join(folder, `transformer-${form}/openvino_model.xml`))) {
    console.log(`quantising for OpenVINO: ${form}`);
    await runScript(python, converter, [model, folder, "--form", form]);
  }
  return folder;
}

function contender(
  script: string,
  set: "openvino" | "genai",
  form: string | undefined,
  more: readonly string[],
  rest: Pick<Contender, "name" | "precision" | "skips" | "slow">,
): Contender {
  const args = async (place: Place) => [...[await converted(place, form), "--threads", String(place.threads), ...more]];
  return {
    ...rest,
    open: async (place) => PythonSession.start(await pythonWith(set), script, await args(place)),
    process: async (place) => onceOf(await pythonWith(set), script, await args(place)),
  };
}

const forms = {
  f32: { name: "OpenVINO, float32", precision: "float32" },
  default: { name: "OpenVINO, default precision", precision: "its own choice" },
  int8: { name: "OpenVINO, int8 weights (nncf.compress_weights)", precision: "int8" },
  w8a8: { name: "OpenVINO, int8 (nncf.quantize)", precision: "int8", slow: true },
} as const;

export const openvino: readonly Contender[] = Object.entries(forms).map(([form, rest]) =>
  contender(
    "openvino_pipeline.py",
    "openvino",
    form === "int8" || form === "w8a8" ? form : undefined,
    ["--form", form],
    rest,
  ),
);

export const genai: readonly Contender[] = [
  contender("genai_pipeline.py", "genai", undefined, [], { name: "openvino-genai", precision: "its own choice" }),
  contender("genai_pipeline.py", "genai", undefined, ["--caching"], {
    ...{ name: "openvino-genai, TaylorSeer", precision: "its own choice", skips: true },
  }),
];
