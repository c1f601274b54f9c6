/** The libraries of TensorRT in the table of runtimes: a row each. */

import { OptionError } from "../../errors.js";
import type { EmitOptions, EmittedNetwork } from "../../onnx/index.js";
import type { RuntimeRow } from "../runtime.js";
import { smOf, smText, versionText } from "./addon.js";
import { EngineCompiler } from "./compile.js";
import { flavours, type TensorRtKind } from "./flavours.js";
import { hardwareOf } from "./gpus.js";
import { examineTensorRt, requireTensorRt } from "./libraries.js";
import { openTensorRt } from "./open.js";
import { capabilities } from "./runtime.js";

const computeTypes = { F32: "float32", F16: "float16", BF16: "bfloat16" } as const;

/**
 * How graphs are emitted for TensorRT: each network in the element type of its own weights. One that overflows in float16
 * computes in bfloat16 then, or in float32 where a target (SM 7.5) has none. Networks without weights are float32.
 * @param targets SM numbers
 * @throws OptionError where a target has no bfloat16 and other weights are stored in it, or does not have their float8 type
 */
export function tensorRtEmitOptions(targets: readonly number[] = []): (network: EmittedNetwork) => EmitOptions {
  return ({ name, dtype, eightBit, overflowsInFloat16 }) => {
    checkFloat8(name, eightBit, targets);
    let compute: EmitOptions["compute"] = dtype ? computeTypes[dtype] : "float32";
    const old = targets.find((sm) => sm < 80);
    if (overflowsInFloat16 && compute !== "float32") compute = old ? "float32" : "bfloat16";
    if (compute === "bfloat16" && old)
      throw new OptionError(
        "targets",
        `The weights of ${name} are bfloat16, which compute capability ${old / 10} does not have (8.0 and later do). Use a float16 checkpoint for it.`,
      );
    return {
      compute,
      linear: "matmul",
      groupNorm: "operator",
      attention: "matmul",
      rmsNorm: "operator",
      tables: "stored",
      eightBit: "dequantize",
      sine: "operator",
      patches: "conv",
    };
  };
}

/** @throws OptionError for float8 weights that TensorRT has no kernel for on the targets */
function checkFloat8(name: string, eightBit: EmittedNetwork["eightBit"], targets: readonly number[]): void {
  const remedy = "Use weights in F16 or BF16, or another runtime: cuda, webgpu and onnxruntime take them everywhere.";
  if (eightBit.includes("F8_E5M2"))
    throw new OptionError("runtime", `The weights of ${name} are F8_E5M2, which TensorRT does not have. ${remedy}`);
  const old = eightBit.includes("F8_E4M3") ? targets.find((sm) => sm < 89) : undefined;
  if (old !== undefined)
    throw new OptionError(
      "targets",
      `The weights of ${name} are F8_E4M3, which TensorRT does not have for compute capability ${old / 10} (it has from 8.9). ${remedy}`,
    );
}

export const tensorRtRow = (kind: TensorRtKind): RuntimeRow => ({
  name: kind,
  runsOn: `an NVIDIA GPU with ${flavours[kind].title}`,
  capabilities,
  async open(options, { files }) {
    const { runtime, device, version } = await openTensorRt(kind, options, files);
    const settings = { version, gpu: device.name };
    return { runtime, settings, device, emitOptions: tensorRtEmitOptions([smOf(device)]) };
  },
  async listDevices({ tensorrtFolder: folder }) {
    const { cuda } = await requireTensorRt(kind, "running", { folder, gpuFirst: true });
    const { supports, supported, title } = flavours[kind];
    return (cuda?.devices ?? []).map((gpu) => {
      const problem = `${title} runs on ${supported}; this one has SM ${smText(smOf(gpu))}.`;
      return { name: gpu.name, problem: supports(smOf(gpu)) ? null : problem };
    });
  },
  async find({ tensorrtFolder: folder }) {
    const { library, places, problems, cuda } = await examineTensorRt(kind, { folder });
    // For named targets the library suffices, otherwise a GPU is needed as well.
    const builds = library !== null && (flavours[kind].takesTargets || problems.length === 0);
    return {
      name: kind,
      available: problems.length === 0,
      version: library && versionText(library.version),
      reason: problems.map(({ cause }) => cause).join(" ") || null,
      remedy: problems.map(({ remedy }) => remedy).join(" ") || null,
      builds,
      libraries: { library: library?.file ?? null, places, problems },
      hardware: cuda && hardwareOf(cuda),
    };
  },
  builder: {
    takesTargets: flavours[kind].takesTargets,
    async open(settings) {
      const compiler = await EngineCompiler.open({ ...settings, kind });
      return { compiler, emitOptions: tensorRtEmitOptions(compiler.targets) };
    },
  },
});
