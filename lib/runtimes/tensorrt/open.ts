/**
 * The runtime for one checkpoint on this machine's GPU: the library that was found, the compiler with its cache, and the
 * executor, put together. Where any of it is missing, that is said before anything is opened.
 */

import { open } from "node:fs/promises";
import type { FileVersion } from "../../common/files.js";
import type { Logger } from "../../common/logger.js";
import { RuntimeUnavailableError } from "../../errors.js";
import type { ProfileShapes } from "../builder.js";
import type { CompilableGraph } from "../runtime.js";
import { versionText } from "./addon.js";
import { EngineCompiler } from "./compile.js";
import { fileIdentity } from "./digests.js";
import type { EngineSource } from "./engines.js";
import type { TensorRtKind } from "./flavours.js";
import { diagnosis, examineTensorRt, type FindOptions } from "./libraries.js";
import { TensorRtRuntime } from "./runtime.js";

export interface OpenOptions extends FindOptions {
  readonly kind: TensorRtKind;
  /** Folder of the cache of engines; default: `defaultCacheFolder()`. */
  readonly cache?: string | undefined;
  /** Files of the weights as they were when the checkpoint was opened. */
  readonly files: readonly FileVersion[];
  readonly capture?: boolean | undefined;
  readonly logger?: Logger | undefined;
}

/**
 * @throws RuntimeUnavailableError with everything that was looked for, CacheError if the cache cannot be used,
 *   DeviceLostError if the GPU answers errors
 */
export async function openTensorRt(options: OpenOptions) {
  const { kind, folder, cache, files, capture, logger } = options;
  const report = await examineTensorRt(kind, { folder, gpuFirst: true });
  const { addon, library } = report;
  if (report.problems.length > 0 || !addon || !library)
    throw new RuntimeUnavailableError(kind, diagnosis(report, "running"));
  const compiler = await EngineCompiler.open({ kind, folder, cache });
  const runtime = new TensorRtRuntime({
    ...{ kind, addon, capture, logger },
    library: library.library,
    parser: library.parser,
    engines: new CachedEngines(compiler, files, logger),
  });
  try {
    const { device } = await runtime.start();
    return { runtime, device, version: versionText(library.version) };
  } catch (error) {
    await runtime.dispose();
    throw error;
  }
}

/** Engines from the cache; what it lacks is built. */
export class CachedEngines implements EngineSource {
  readonly #compiler: EngineCompiler;
  readonly #files: readonly FileVersion[];
  readonly #logger: Logger | undefined;

  constructor(compiler: EngineCompiler, files: readonly FileVersion[], logger?: Logger) {
    this.#compiler = compiler;
    this.#files = files;
    this.#logger = logger;
  }

  async engineFor(
    graph: CompilableGraph,
    profiles: readonly ProfileShapes[],
    kept: readonly ProfileShapes[],
    signal: AbortSignal,
  ): Promise<{ readonly plan: string; readonly identity: string }> {
    const distinct = new Map([...kept, ...profiles].map((profile) => [JSON.stringify(profile), profile]));
    let hasTold = false;
    const { plan, cached, seconds } = await this.#compiler.find(
      { graph, profiles: [...distinct.values()] },
      {
        files: this.#files,
        signal,
        onProgress: ({ phase }) => {
          if (phase !== "building" || hasTold) return;
          hasTold = true;
          this.#logger?.info?.(
            `The cache holds no engine of ${graph.name} for these shapes; it is being built. \`flowturbo compile\` does so ahead of time.`,
          );
        },
      },
    );
    if (!cached) this.#logger?.info?.(`The engine of ${graph.name} was built in ${seconds.toFixed(1)} s.`);
    await using handle = await open(plan);
    return { plan, identity: await fileIdentity(handle) };
  }
}
