/**
 * What binaries are chosen by: operating system, processor, and on Linux the C library, since what was linked with glibc
 * does not load with musl. Looked at only where something could not be loaded, and by `flowturbo doctor`.
 */

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

/** Paths of the shared libraries of this process; none where that cannot be told (Bun, Deno). */
function loadedLibraries(): readonly string[] {
  const report = process.report as (NodeJS.ProcessReport & { excludeNetwork?: boolean }) | undefined;
  if (typeof report?.getReport !== "function") return [];
  // A report has the names of all connections' hosts otherwise, each by a request to a server.
  const before = report.excludeNetwork;
  report.excludeNetwork = true;
  try {
    const { sharedObjects } = report.getReport() as unknown as { sharedObjects?: string[] };
    return sharedObjects ?? [];
  } catch {
    return [];
  } finally {
    report.excludeNetwork = before ?? false;
  }
}
