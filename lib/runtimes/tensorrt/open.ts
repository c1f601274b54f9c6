/**
 * The runtime for one checkpoint on a GPU of this machine: the library that was found, the compiler with its cache, and the
 * executor, put together. Where any of it is missing, that is said before anything is opened.
 */

import { open } from "node:fs/promises";
import type { FileVersion } from "../../common/files.js";
import type { Logger } from "../../common/logger.js";
import { type CompileProgress, profileKey } from "../builder.js";
import type { RuntimeSettings } from "../runtime.js";
import { versionText } from "./addon.js";
import { EngineCompiler } from "./compile.js";
import { fileIdentity } from "./digests.js";
import type { EngineSource } from "./engines.js";
import type { TensorRtKind } from "./flavours.js";
import { requireTensorRt } from "./libraries.js";
import { TensorRtRuntime } from "./runtime.js";

/**
 * @param files those of the weights, as they were when the checkpoint was opened
 * @throws RuntimeUnavailableError with everything that was looked for, CacheError if the cache cannot be used,
 *   DeviceLostError if the GPU answers errors
 */
export async function openTensorRt(
  kind: TensorRtKind,
  { tensorrtFolder: folder, cache, capture, device: ordinal, listener, logger }: Partial<RuntimeSettings>,
  files: readonly FileVersion[],
) {
  const installation = await requireTensorRt(kind, "running", { folder, gpuFirst: true });
  const engines = cachedEngines(await EngineCompiler.open({ kind, cache, gpu: ordinal }, installation), files, logger);
  const {
    addon,
    library: { library, parser, version },
  } = installation;
  const runtime = new TensorRtRuntime({ kind, addon, library, parser, ordinal, engines, capture, listener, logger });
  try {
    const { device } = await runtime.start();
    return { runtime, device, version: versionText(version) };
  } catch (error) {
    await runtime.dispose();
    throw error;
  }
}

/** Engines from the cache; what it lacks is built. */
function cachedEngines(compiler: EngineCompiler, files: readonly FileVersion[], logger?: Logger): EngineSource {
  return {
    async engineFor(graph, profiles, kept, signal) {
      const distinct = new Map([...kept, ...profiles].map((profile) => [profileKey(profile), profile]));
      let hasTold = false;
      const onProgress = ({ phase }: CompileProgress) => {
        if (phase !== "building" || hasTold) return;
        hasTold = true;
        logger?.info?.(
          `The cache holds no engine of ${graph.name} for these shapes; it is being built. \`flowturbo compile\` does so ahead of time.`,
        );
      };
      const request = { graph, profiles: [...distinct.values()] };
      const { plan, cached, seconds } = await compiler.find(request, { files, signal, onProgress });
      if (!cached) logger?.info?.(`The engine of ${graph.name} was built in ${seconds.toFixed(1)} s.`);
      await using handle = await open(plan);
      return { plan, identity: await fileIdentity(handle) };
    },
  };
}
