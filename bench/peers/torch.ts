/** diffusers (pipeline.py), eager and through torch.compile, in float32 and bfloat16. */

import type { Contender, Place } from "./contender.js";
import { onceOf, PythonSession, pythonWith } from "./python.js";

const script = "pipeline.py";

export function diffusers(precision: "float32" | "bfloat16", compiled: boolean): Contender {
  const args = ({ model, threads }: Place) => [
    ...[model, "--threads", String(threads), "--dtype", precision],
    ...(compiled ? ["--compile"] : []),
  ];
  return {
    name: ["diffusers", ...(compiled ? ["torch.compile"] : []), precision].join(", "),
    ...{ precision, slow: compiled },
    open: async (place) => PythonSession.start(await pythonWith("torch"), script, args(place)),
    process: async (place) => onceOf(await pythonWith("torch"), script, args(place)),
  };
}
