// Where NVIDIA's Vulkan driver lies in containers, as folders of empty files, and what is set so that the loader finds it.
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { afterAll, afterEach, describe, expect, it, vi } from "vitest";
import { vulkanVariables } from "../../verify/vulkan-driver.js";

const folders: string[] = [];
afterAll(() => {
  for (const folder of folders) rmSync(folder, { recursive: true });
});
afterEach(() => vi.unstubAllEnvs());

const system = "usr/lib/x86_64-linux-gnu";
const x11 = [`${system}/libX11.so.6`, `${system}/libXext.so.6`];

async function variables(files: readonly string[], libraryPath?: string) {
  const root = mkdtempSync(path.join(os.tmpdir(), "flowturbo-vulkan-"));
  folders.push(root);
  vi.stubEnv("VK_DRIVER_FILES", undefined);
  vi.stubEnv("VK_ICD_FILENAMES", undefined);
  for (const file of files) {
    mkdirSync(path.dirname(path.join(root, file)), { recursive: true });
    writeFileSync(path.join(root, file), "");
  }
  const scratch = path.join(root, "scratch");
  const found = await vulkanVariables(libraryPath, scratch, "/pack/libraries", root);
  const manifest = found.VK_DRIVER_FILES ?? found.VK_ADD_DRIVER_FILES;
  const library = manifest && JSON.parse(readFileSync(manifest, "utf8")).ICD.library_path;
  return { found, library, root, manifest };
}

describe("Vulkan's variables", () => {
  it("are none where the driver is complete", async () => {
    const files = [`${system}/libvulkan.so.1`, `${system}/libGLX_nvidia.so.0`, ...x11];
    const { found } = await variables([...files, "usr/share/vulkan/icd.d/nvidia_icd.json"]);
    expect(found).toEqual({});
  });

  it("name the pack's loader where there is none, after what was named before", async () => {
    expect((await variables([], "/a:/b")).found).toEqual({ LD_LIBRARY_PATH: "/a:/b:/pack/libraries" });
    expect((await variables([`${system}/libvulkan.so.1`], "/a")).found).toEqual({});
  });

  it("name the folder of a driver that is out of sight, and a manifest", async () => {
    const there = "usr/local/nvidia/lib64";
    const { found, library, root, manifest } = await variables([
      ...[`${there}/libcuda.so.1`, `${there}/libGLX_nvidia.so.0`, `${there}/libEGL_nvidia.so.0`],
      ...[`${system}/libvulkan.so.1`, ...x11],
    ]);
    expect(found).toEqual({
      ...{ LD_LIBRARY_PATH: path.join(root, there), VK_DRIVER_FILES: manifest, VK_ICD_FILENAMES: manifest },
    });
    expect(library).toBe("libGLX_nvidia.so.0");
  });

  it("name the library that needs no X11 where there is none, also against the driver's own manifest", async () => {
    const files = ["libvulkan.so.1", "libGLX_nvidia.so.0", "libEGL_nvidia.so.0"].map((name) => `${system}/${name}`);
    const { library, found } = await variables([...files, "etc/vulkan/icd.d/nvidia_icd.json"]);
    expect(library).toBe("libEGL_nvidia.so.0");
    expect(Object.keys(found)).toEqual(["VK_DRIVER_FILES", "VK_ICD_FILENAMES"]);
  });

  it("leave drivers of others", async () => {
    const files = [`${system}/libvulkan.so.1`, `${system}/libGLX_nvidia.so.0`, ...x11];
    const { found } = await variables([...files, "usr/share/vulkan/icd.d/lvp_icd.x86_64.json"]);
    expect(Object.keys(found)).toEqual(["VK_ADD_DRIVER_FILES"]);
  });

  it("leave what the user has named", async () => {
    const files = [`${system}/libvulkan.so.1`, `${system}/libGLX_nvidia.so.0`, ...x11];
    const root = mkdtempSync(path.join(os.tmpdir(), "flowturbo-vulkan-"));
    folders.push(root);
    for (const file of files) {
      mkdirSync(path.dirname(path.join(root, file)), { recursive: true });
      writeFileSync(path.join(root, file), "");
    }
    vi.stubEnv("VK_DRIVER_FILES", "/mine.json");
    expect(await vulkanVariables(undefined, path.join(root, "scratch"), null, root)).toEqual({});
  });
});
