/**
 * A child process that is started before it is known what it is for: starting Node and loading ONNX Runtime take longest,
 * and need none of the options. Whoever starts a child takes the spare one where it would have been started alike.
 */

import { pathToFileURL } from "node:url";
import { packageFile } from "../../common/package.js";
import { type HostLaunch, HostProcess, hostLaunch } from "./process.js";

let spare: { readonly child: HostProcess; readonly launch: HostLaunch } | null = null;

/** The built host.ts of the package. @throws InstallationError if it is not there */
export function packagedHost(): URL {
  return pathToFileURL(packageFile("dist/onnxruntime-host.js"));
}

/** Starts one for the CPU if there is none. It keeps no process alive. What prevents that is told to whoever needs a child. */
export function startSpare(): void {
  if (spare) return;
  try {
    const launch = hostLaunch(packagedHost(), undefined, {});
    const child = new HostProcess(launch);
    child.keepsAlive = false;
    const started = { child, launch };
    spare = started;
    void child.ended.then(() => {
      if (spare === started) spare = null;
    });
  } catch {}
}

/** The spare child, if there is one that was started in that way. */
export function takeSpare(launch: HostLaunch): HostProcess | null {
  if (!spare || !isAlike(spare.launch, launch)) return null;
  const { child } = spare;
  spare = null;
  return child;
}

/** Ends it, where nobody has taken it. */
export function endSpare(): void {
  void spare?.child.kill();
  spare = null;
}

function isAlike(a: HostLaunch, b: HostLaunch): boolean {
  const text = ({ file, libraries, env }: HostLaunch) => JSON.stringify([file, libraries, Object.entries(env).sort()]);
  return text(a) === text(b);
}
