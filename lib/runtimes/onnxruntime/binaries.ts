/**
 * The binaries of onnxruntime-node: the platforms that it has any for, and what to say where it cannot be loaded.
 */

import { type Platform, platformText } from "../../common/platform.js";

/** Platforms that onnxruntime-node 1.30 has binaries for; those for Linux are linked with glibc. */
const platforms: readonly string[] = ["darwin-arm64", "linux-arm64", "linux-x64", "win32-arm64", "win32-x64"];

/** Why onnxruntime-node has no binaries for a platform, and what to do; null if it has them. */
export function whyUnsupported(platform: Platform): { readonly reason: string; readonly remedy: string } | null {
  const { os, cpu, libc } = platform;
  if (libc === "musl")
    return {
      reason: "onnxruntime-node has no binaries for Linux with musl, such as Alpine.",
      remedy: "Use a system with glibc, such as the image node:24-slim (Debian).",
    };
  if (platforms.includes(`${os}-${cpu}`)) return null;
  const what = os === "darwin" && cpu === "x64" ? "Intel Macs (darwin-x64)" : platformText(platform);
  return {
    reason: `onnxruntime-node has no binaries for ${what}.`,
    remedy: `It has them for ${platforms.join(", ")}.`,
  };
}

/** Why onnxruntime-node cannot be loaded, and what to do. @param message of the attempt */
export function whyBroken(message: string, platform: Platform): { readonly reason: string; readonly remedy: string } {
  const detail = message.split("\n")[0]!.replace(/[\s:.]+$/, "");
  const unsupported = whyUnsupported(platform);
  if (unsupported) return { ...unsupported, reason: `${unsupported.reason.slice(0, -1)} (${detail}).` };
  if (detail.includes("onnxruntime_binding"))
    return {
      reason: `onnxruntime-node lacks its binaries for ${platformText(platform)}: ${detail}.`,
      remedy:
        "Remove the folder node_modules/onnxruntime-node and run `npm install` on this kind of machine (`flowturbo prune` leaves the binaries of the machine it runs on).",
    };
  return {
    reason: `onnxruntime-node cannot be loaded: ${detail}.`,
    remedy:
      "Run `npm install onnxruntime-node`; where its download of GPU libraries fails, set ONNXRUNTIME_NODE_INSTALL=skip for that command (the CPU needs none of them).",
  };
}
