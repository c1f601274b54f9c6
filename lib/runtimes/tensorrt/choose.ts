/**
 * Which of the two libraries to use where the caller leaves it open: TensorRT 11 where it is installed and there is a
 * GPU for it, since it covers every GPU and times its kernels on the very one; then TensorRT-RTX.
 */

import { RuntimeUnavailableError } from "../../errors.js";
import { type TensorRtKind, tensorRtKinds } from "./addon.js";
import { diagnosis, examineTensorRt, type FindOptions } from "./libraries.js";

/**
 * The library to build engines with. Targets can be named for TensorRT-RTX only, so they decide.
 * @throws RuntimeUnavailableError with both diagnoses
 */
export async function chooseForBuilding(
  wanted: "auto" | TensorRtKind,
  options: FindOptions & { readonly targets?: readonly number[] | undefined },
): Promise<TensorRtKind> {
  if (wanted !== "auto") return wanted;
  if (options.targets && options.targets.length > 0) return "tensorrt-rtx";
  const full = await examineTensorRt("tensorrt", options);
  if (full.problems.length === 0) return "tensorrt";
  const rtx = await examineTensorRt("tensorrt-rtx", options);
  if (rtx.library) return "tensorrt-rtx";
  throw new RuntimeUnavailableError("auto", [full, rtx].map((report) => diagnosis(report, "building")).join(" "));
}

export interface PassedOver {
  readonly name: TensorRtKind;
  readonly reason: string;
}

/**
 * The library to run programs with, and why others that would be preferred cannot. Quick where there is no GPU.
 */
export async function chooseForRunning(
  options: FindOptions,
): Promise<{ readonly kind: TensorRtKind | null; readonly passedOver: PassedOver[] }> {
  const passedOver: PassedOver[] = [];
  for (const kind of tensorRtKinds) {
    const report = await examineTensorRt(kind, { ...options, gpuFirst: true });
    if (report.problems.length === 0) return { kind, passedOver };
    passedOver.push({ name: kind, reason: diagnosis(report, "running") });
  }
  return { kind: null, passedOver };
}
