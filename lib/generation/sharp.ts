/**
 * sharp, which reads and writes pictures. Its binaries are those that installations lack most: they are looked for before work
 * that needs them, and loaded when a picture is read or written, since loading them takes longer than all other packages.
 */

import { createRequire } from "node:module";
import type { default as SharpModule } from "sharp";
import { Dependency } from "../common/dependency.js";
import { thisPlatform } from "../common/platform.js";

type SharpFunction = typeof SharpModule;

export const sharp = new Dependency<SharpFunction>(
  "sharp",
  // webpack would stop at sharp's binaries, before what is said about bundling could be read.
  async () => (await import(/* webpackIgnore: true */ "sharp")).default,
  ({ versions }) => `${versions.sharp}, libvips ${versions.vips}`,
  remedy,
  isThere,
);

/** Whether its binaries for this platform are where npm installs them. Where they are elsewhere, loading it tells. */
function isThere(): boolean {
  try {
    const { os, cpu, libc } = thisPlatform();
    const platform = `${os}${libc === "musl" ? "musl" : ""}-${cpu}`;
    const { resolve } = createRequire(createRequire(import.meta.url).resolve("sharp"));
    resolve(`@img/sharp-${platform}/package`);
    // On Windows libvips is in the package above.
    if (os !== "win32") resolve(`@img/sharp-libvips-${platform}/package`);
    return true;
  } catch {
    return false;
  }
}

function remedy(): string {
  const { os, cpu, libc } = thisPlatform();
  const flags = [`--os=${os}`, ...(libc ? [`--libc=${libc}`] : []), `--cpu=${cpu}`].join(" ");
  return `Run \`npm install --include=optional sharp\`; where another machine installs for this one, \`npm install ${flags} sharp\`.`;
}
