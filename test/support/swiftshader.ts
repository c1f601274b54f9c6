/**
 * SwiftShader, a Vulkan device in software that ONNX Runtime's WebGPU provider accepts: Debian's package chromium has it, and
 * libvulkan1 is the loader. Tests on it say why they are skipped where it is absent.
 */

import { existsSync } from "node:fs";

const manifest = "/usr/lib/chromium/vk_swiftshader_icd.json";
const loaders = ["/usr/lib/x86_64-linux-gnu/libvulkan.so.1", "/usr/lib/aarch64-linux-gnu/libvulkan.so.1"];

/** Variables with which a process has SwiftShader as its only Vulkan device. */
export const swiftShaderEnv = { VK_DRIVER_FILES: manifest, VK_ICD_FILENAMES: manifest };

/** Why it cannot be used here; null if it can. */
export const noSwiftShader = !existsSync(manifest)
  ? `${manifest} is not there (apt-get install chromium)`
  : !loaders.some((file) => existsSync(file))
    ? "libvulkan.so.1 is not there (apt-get install libvulkan1)"
    : null;

// In CI it is always there, so that nothing is skipped silently.
if (noSwiftShader && process.env.FLOWTURBO_REQUIRE_NATIVE === "1") throw new Error(`SwiftShader: ${noSwiftShader}.`);
