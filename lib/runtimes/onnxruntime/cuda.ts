/** ONNX Runtime's CUDA provider in the table of runtimes: an NVIDIA GPU, without engines that have to be built. */

import { RuntimeUnavailableError } from "../../errors.js";
import type { RuntimeRow } from "../runtime.js";
import { smOf, smText } from "../tensorrt/addon.js";
import { cudaDiagnosis, findCuda, findCudaProvider, kernelsText } from "./cuda-provider.js";
import { cudaEmitOptions, gpuWidening } from "./emission.js";
import { loadFolder } from "./load-folder.js";
import { capabilities, OnnxRuntime } from "./onnxruntime.js";
import { openOnGpu, unsupported } from "./open-gpu.js";

const name = "cuda";

export const cuda: RuntimeRow = {
  name,
  runsOn: "an NVIDIA GPU, by ONNX Runtime with CUDA",
  capabilities,
  unsupported,
  async listDevices({ cudaProviderFolder }) {
    const report = await findCudaProvider({ folder: cudaProviderFolder, gpuFirst: true });
    if (report.problems.length > 0) throw new RuntimeUnavailableError(name, cudaDiagnosis(report));
    return (report.cuda?.devices ?? []).map((gpu, number) => {
      const problem = `${kernelsText}; this one has SM ${smText(smOf(gpu))}.`;
      return { name: gpu.name, problem: report.usable.includes(number) ? null : problem };
    });
  },
  async open({ cudaProviderFolder, cache, device: asked, watchdogMs, listener, logger }, { files }) {
    const report = await findCudaProvider({ folder: cudaProviderFolder, gpuFirst: true });
    const { folder, runtimeFolder, libraryFolders, device: first } = report;
    const deviceId = asked ?? first;
    const gpu = report.cuda?.devices[deviceId ?? 0];
    if (report.problems.length > 0 || folder === null || runtimeFolder === null || deviceId === null || !gpu)
      throw new RuntimeUnavailableError(name, cudaDiagnosis(report));
    const libraries = await loadFolder({ folder, runtimeFolder }, cache);
    const paths = [...libraryFolders, process.env.LD_LIBRARY_PATH].filter(Boolean);
    const env = {
      LD_LIBRARY_PATH: paths.join(":"),
      // float32 means float32: TF32, which ONNX Runtime lets cuBLAS and cuDNN use, has 10 bits of mantissa.
      NVIDIA_TF32_OVERRIDE: process.env.NVIDIA_TF32_OVERRIDE || "0",
    };
    const weights = gpuWidening(["F16", "BF16"]);
    const settings = { name, provider: "cuda", deviceId, threads: 1 } as const;
    const runtime = new OnnxRuntime({ ...settings, libraries, env, weights, files, watchdogMs, listener, logger });
    const { version, features } = await openOnGpu(runtime, `CUDA cannot use ${gpu.name} here`);
    logger?.info?.(`ONNX Runtime's CUDA provider (${folder}) computes on ${gpu.name}.`);
    return {
      runtime,
      settings: { version, gpu: gpu.name, attention: features.attention },
      device: { name: gpu.name, memoryBytes: gpu.memoryBytes, widening: weights, holdsScores: !features.attention },
      emitOptions: cudaEmitOptions({ ...features, bfloat16: smOf(gpu) >= 80 }),
    };
  },
  find: findCuda,
};
