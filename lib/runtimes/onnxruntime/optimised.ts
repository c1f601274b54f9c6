/**
 * Graphs as ONNX Runtime has optimised them, kept on disk: of the time until a small model's first picture that takes a tenth. A file
 * holds the graph for one version of the library, one kind of processor and one set of session options, and refers to the
 * checkpoint's own files for weights that are not widened. Those of convolutions in float32 it holds as the kernels read them, so that the
 * digest of a graph has the versions of those files.
 */

import { createHash, randomBytes } from "node:crypto";
import { existsSync } from "node:fs";
import { open, rename, rm, utimes, writeFile } from "node:fs/promises";
import path from "node:path";
import type * as ort from "onnxruntime-node";
import { processorKind } from "../../common/cpu.js";
import { makeFolders } from "../../common/files.js";
import { limitOptimised } from "./optimised-folder.js";
import type { SentGraph } from "./protocol.js";

/** Bytes that all files of a folder may take. The least recently used go first. */
const mostBytes = 64e6;

export class OptimisedGraphs {
  readonly #library: typeof ort;
  readonly #folder: string;
  /** Read once: the system writes it out for each processor. */
  readonly #processor = processorKind();

  constructor(library: typeof ort, folder: string) {
    this.#library = library;
    this.#folder = folder;
  }

  /** A session of a graph, from its file or from the graph itself, which then gets one. @throws as `InferenceSession.create` */
  async session(
    { digest, bytes }: SentGraph,
    options: ort.InferenceSession.SessionOptions,
  ): Promise<ort.InferenceSession> {
    const { InferenceSession, env } = this.#library;
    const subject = [digest, options, env.versions, this.#processor];
    const key = createHash("sha256").update(JSON.stringify(subject)).digest("hex");
    const file = path.join(this.#folder, `${key.slice(0, 32)}.onnx`);
    if (existsSync(file))
      try {
        const session = await InferenceSession.create(file, { ...options, graphOptimizationLevel: "disabled" });
        await utimes(file, new Date(), new Date()).catch(() => {});
        return session;
      } catch {
        // It is damaged, or not what this library writes.
        await rm(file, { force: true }).catch(() => {});
      }
    const temporary = `${file}.${randomBytes(6).toString("hex")}.tmp`;
    try {
      await makeFolders(this.#folder);
      // Where it cannot be written, ONNX Runtime would say so only after it has compiled the graph.
      await writeFile(temporary, "", { flag: "wx" });
      const session = await InferenceSession.create(bytes, { ...options, optimizedModelFilePath: temporary });
      await keep(temporary, file).catch(() => {});
      return session;
    } catch {
      // Where the folder cannot be written, or the graph is wrong: that is said now.
      return InferenceSession.create(bytes, options);
    } finally {
      await rm(temporary, { force: true }).catch(() => {});
    }
  }
}

/** What is found later by its name alone has to be on the disk before it has that. */
async function keep(temporary: string, file: string): Promise<void> {
  const handle = await open(temporary, "r+");
  await handle.sync().finally(() => handle.close());
  await rename(temporary, file);
  await limitOptimised(path.dirname(file), mostBytes);
}
