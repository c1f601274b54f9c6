/**
 * Entry of the short child process that lists the graphics adapters: doing so loads their drivers, and a broken one may crash
 * or hang. The parent ends this process as soon as it has the list, so that no driver has to shut down in order, too.
 */

import { findAddon, type NativeError } from "../tensorrt/addon.js";
import { tensorRtKinds } from "../tensorrt/flavours.js";
import type { FromProbe } from "./adapters.js";

process.once("disconnect", () => process.kill(process.pid, "SIGKILL"));
// Nothing else keeps this process until its parent ends it.
setInterval(() => {}, 60_000);

const found = tensorRtKinds.map((kind) => findAddon(kind));
const addon = found.find((one) => "describe" in one);
let answer: FromProbe;
if (addon) {
  answer = await addon.graphicsAdapters().promise.then(
    (adapters) => ({ adapters }),
    ({ code, message }: NativeError) => ({ code, message }),
  );
} else {
  const { cause, remedy } = found[0] as { cause: string; remedy: string };
  answer = { cause, remedy };
}
process.send?.(answer);
