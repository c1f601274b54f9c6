/** stable-diffusion.cpp (sdcpp_pipeline.py): checkpoints in one file, of the published sizes alone. */

import type { Contender, Place } from "./contender.js";
import { PythonSession, pythonWith } from "./python.js";

/** Why it has no other subject. */
export const onlyPublishedSizes =
  "stable-diffusion.cpp is measured on one subject alone: its SD3 has at least 24 layers, is 64 values a layer wide, and knows no encoders but CLIP-L, CLIP-G and T5 XXL (mmdit.hpp, conditioner.hpp), so that it reads none of the smaller models here.";

export const stableDiffusionCpp = (type: "f16" | "q8_0"): Contender => ({
  name: `stable-diffusion.cpp, ${type}`,
  precision: type === "f16" ? "float16" : "int8",
  ownNoise: true,
  async open({ model, threads }: Place) {
    const args = [model, "--threads", String(threads), "--type", type];
    return PythonSession.start(await pythonWith("stable-diffusion.cpp"), "sdcpp_pipeline.py", args);
  },
});
