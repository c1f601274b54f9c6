/** sharp, which reads and writes pictures: loaded at its first use, since its binaries are those that installations lack most. */

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
);

function remedy(): string {
  const { os, cpu, libc } = thisPlatform();
  const flags = [`--os=${os}`, ...(libc ? [`--libc=${libc}`] : []), `--cpu=${cpu}`].join(" ");
  return `Run \`npm install --include=optional sharp\`; where another machine installs for this one, \`npm install ${flags} sharp\`.`;
}
