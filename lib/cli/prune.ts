/** `flowturbo prune`: removes ONNX Runtime's binaries for other platforms from this installation. */

import type { Command } from "commander";
import { thisPlatform } from "../common/platform.js";
import { findPrunable, onnxRuntimeFolder, type Prunable, prune } from "../runtimes/onnxruntime/prune.js";
import { addJsonFlag } from "./flags.js";
import { megabytes, print } from "./print.js";

export function pruneCommand(command: Command): void {
  command
    .description("Remove ONNX Runtime's binaries for other platforms than this one from the installation.")
    .option("--dry-run", "say what would be removed, and remove nothing");
  addJsonFlag(command).action(async ({ dryRun = false, json }: { dryRun?: boolean; json?: boolean }) => {
    const found = await findPrunable(await onnxRuntimeFolder(), thisPlatform());
    if (!dryRun) await prune(found);
    const { folder, paths, bytes, linkedBytes } = found;
    print(json, { folder, paths, bytes, linkedBytes, removed: !dryRun }, render(found, dryRun));
  });
}

function render({ folder, paths, bytes, linkedBytes }: Prunable, dryRun: boolean): string {
  if (paths.length === 0) return `${folder}: nothing to remove`;
  return [
    `${folder}: ${dryRun ? "would remove" : "removed"} ${megabytes(bytes)}`,
    ...paths.map((name) => `  ${name}`),
    ...(linkedBytes > 0
      ? [
          `${megabytes(linkedBytes)} are hard links; their files stay in the package manager's store, and take space there.`,
        ]
      : []),
  ].join("\n");
}
