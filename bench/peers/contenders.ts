/** Who is measured, in the order of the tables: one line each. */

import type { Contender, Subject } from "./contender.js";
import { int8, schedule } from "./flowturbo.js";
import { graphs } from "./graphs.js";
import { genai, openvino } from "./openvino.js";
import { stableDiffusionCpp } from "./stable-diffusion-cpp.js";
import { diffusers } from "./torch.js";

const folders: readonly Contender[] = [
  graphs,
  diffusers("float32", false),
  diffusers("float32", true),
  diffusers("bfloat16", false),
  diffusers("bfloat16", true),
  ...openvino,
  ...genai,
];
const files: readonly Contender[] = [stableDiffusionCpp("f16"), stableDiffusionCpp("q8_0")];

/** In turn with `baseline`, each. */
export const contendersOf = ({ oneFile, schedules }: Subject): readonly Contender[] => [
  ...int8,
  ...schedules.map(schedule),
  ...(oneFile ? files : folders),
];
