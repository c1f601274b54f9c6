/**
 * What binaries are chosen by: operating system, processor, and on Linux the C library, since what was linked with glibc
 * does not load with musl.
 */

import { readFileSync } from "node:fs";

export interface Platform {
  /** As `process.platform`. */
  readonly os: string;
  /** As `process.arch`. */
  readonly cpu: string;
  /** On Linux. */
  readonly libc: "glibc" | "musl" | null;
}

export function thisPlatform(): Platform {
  const { platform: os, arch: cpu } = process;
  return { os, cpu, libc: os === "linux" ? libcOf(loadedLibraries()) : null };
}

/** `linux-x64`, `linux-x64 (musl)` */
export function platformText({ os, cpu, libc }: Platform): string {
  return `${os}-${cpu}${libc === "musl" ? " (musl)" : ""}`;
}

/** @param libraries that a process has loaded */
export function libcOf(libraries: readonly string[]): "glibc" | "musl" {
  return libraries.some((library) => /libc\.musl-|ld-musl-/.test(library)) ? "musl" : "glibc";
}

/** Paths of the files that this process has mapped, its shared libraries among them; none where that cannot be told. */
function loadedLibraries(): readonly string[] {
  try {
    return readFileSync("/proc/self/maps", "utf8").split("\n");
  } catch {
    return [];
  }
}
