/**
 * Loads onnxruntime-node's library by its link in a folder of `loadFolder`, before anything else has loaded it. For the
 * process that runs graphs; imports nothing, so that it can run first.
 */

import { constants } from "node:os";
import path from "node:path";

/** RTLD_NODELETE of Linux, which Node has no name for: Node closes again what turns out to be no addon. */
const keepOpen = 0x1000;

/**
 * After this `import("onnxruntime-node")` uses the library that was opened, since the loader knows it by its name.
 * @param folder that has libonnxruntime.so.1, or a link to it
 * @throws Error with the loader's message
 */
export function openThrough(folder: string): void {
  const { RTLD_NOW, RTLD_GLOBAL } = constants.dlopen;
  try {
    process.dlopen({ exports: {} }, path.join(folder, "libonnxruntime.so.1"), RTLD_NOW | RTLD_GLOBAL | keepOpen);
  } catch (error) {
    // It is open, and no addon of Node, as is to be expected.
    if (!(error as Error).message.includes("did not self-register")) throw error;
  }
}
