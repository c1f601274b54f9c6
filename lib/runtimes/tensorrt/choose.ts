/**
 * Which of the two libraries to use where the caller leaves it open: TensorRT 11 where it is installed and there is a
 * GPU for it, since it covers every GPU and times its kernels on the very one; then TensorRT-RTX.
 */

import { RuntimeUnavailableError } from "../../errors.js";
import { type TensorRtKind, tensorRtKinds } from "./addon.js";
import { diagnosis, examineTensorRt, type FindOptions, type TensorRtReport } from "./libraries.js";

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

/** Why each of the two libraries cannot run programs here, in order of preference. Quick where there is no GPU. */
export async function whyNotTensorRt(options: FindOptions): Promise<PassedOver[]> {
  return Promise.all(
    tensorRtKinds.map(async (kind) => ({
      name: kind,
      reason: whyNot(await examineTensorRt(kind, { ...options, gpuFirst: true })),
    })),
  );
}

/** Until the executor exists (see ARCHITECTURE.md), a machine that lacks nothing still cannot run engines. */
function whyNot(report: TensorRtReport): string {
  if (report.problems.length > 0) return diagnosis(report, "running");
  return `${report.library!.file} can build engines (flowturbo compile), but this version of flowturbo does not run them yet.`;
}

/** @throws RuntimeUnavailableError always, with the diagnosis */
export async function refuseTensorRt(kind: TensorRtKind, options: FindOptions): Promise<never> {
  throw new RuntimeUnavailableError(kind, whyNot(await examineTensorRt(kind, options)));
}
