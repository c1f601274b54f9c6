/**
 * Variables for a machine whose NVIDIA driver Vulkan's loader does not find by itself: containers are often given the driver's
 * libraries without its manifest, or without the libraries of X11 that one of the two that speak Vulkan needs.
 */

import { existsSync } from "node:fs";
import { mkdir, readdir, writeFile } from "node:fs/promises";
import path from "node:path";

const systemFolders = ["/usr/lib/x86_64-linux-gnu", "/lib/x86_64-linux-gnu", "/usr/lib64", "/lib64", "/usr/lib"];
/** Where a container's runtime may put the driver, out of the loader's sight. */
const driverFolder = "/usr/local/nvidia/lib64";
const manifestFolders = ["/etc", "/usr/share", "/usr/local/etc", "/usr/local/share"].map(
  (folder) => `${folder}/vulkan/icd.d`,
);

/**
 * @param libraryPath LD_LIBRARY_PATH as it is
 * @param scratch folder for a manifest, made if need be
 * @param loader folder with a Vulkan loader, for a machine that has none
 * @returns LD_LIBRARY_PATH, and what Vulkan's loader reads, where those have to be set
 */
export async function vulkanVariables(
  libraryPath: string | undefined,
  scratch: string,
  loader: string | null,
  root = "/",
): Promise<Record<string, string>> {
  const within = (name: string) => path.join(root, name);
  const named = (libraryPath ?? "").split(":").filter(Boolean);
  const has = (library: string, folders: readonly string[]) =>
    folders.some((folder) => existsSync(path.join(folder, library)));
  const system = systemFolders.map(within);

  // 1. Folders of libraries. The loader's own come after those that are named, so that nothing of the system is replaced.
  const added: string[] = [];
  const driver = within(driverFolder);
  if (has("libcuda.so.1", [driver]) && !has("libcuda.so.1", [...named, ...system])) added.push(driver);
  if (loader && !has("libvulkan.so.1", [...named, ...system])) added.push(loader);
  const variables: Record<string, string> = added.length > 0 ? { LD_LIBRARY_PATH: [...named, ...added].join(":") } : {};

  // 2. The driver's manifest.
  if (process.env.VK_DRIVER_FILES || process.env.VK_ICD_FILENAMES) return variables;
  const folders = [...named, ...added, ...system, driver];
  const lists = await Promise.all(manifestFolders.map((folder) => readdir(within(folder)).catch((): string[] => [])));
  const manifests = lists.flat().filter((name) => name.endsWith(".json"));
  const hasX11 = has("libX11.so.6", folders) && has("libXext.so.6", folders);
  if (hasX11 && manifests.some((name) => name.includes("nvidia"))) return variables;
  const library = ["libGLX_nvidia.so.0", "libEGL_nvidia.so.0"].find(
    (name) => has(name, folders) && (hasX11 || !name.includes("GLX")),
  );
  if (!library) return variables;
  await mkdir(scratch, { recursive: true });
  const file = path.join(scratch, "nvidia_icd.json");
  const ICD = { library_path: library, api_version: "1.3.0" };
  await writeFile(file, JSON.stringify({ file_format_version: "1.0.0", ICD }));
  // Other drivers stay, unless it is the same one by its other library.
  const isOnly = manifests.length === 0 || manifests.some((name) => name.includes("nvidia"));
  return {
    ...variables,
    ...(isOnly ? { VK_DRIVER_FILES: file, VK_ICD_FILENAMES: file } : { VK_ADD_DRIVER_FILES: file }),
  };
}
