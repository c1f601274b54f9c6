/**
 * One run from its submission to its end: reports in order, an abort or an error of the caller's that stops it, results
 * as tensors, errors by name.
 */

import { onAbort } from "../../common/abort.js";
import type { Tensor } from "../../common/tensor.js";
import { RuntimeError } from "../../errors.js";
import type { Launch, Program } from "../../program/program.js";
import type { LaunchReport, RunOptions } from "../runtime.js";
import type { NativeError, NativeLaunchReport, NativeRegisters, NativeRun, NativeSubmission } from "./addon.js";
import type { SharedDevice } from "./device.js";
import { explainRun } from "./failures.js";
import { type ProfiledEngine, type RegisterLayout, tensorOf } from "./layout.js";

/** A program, or a submission to a workspace, that waits or runs. */
export interface Run {
  readonly options: RunOptions;
  native: NativeRun | null;
  /** Why it was stopped, where that was this side's doing. */
  stopped: { readonly reason: unknown } | null;
}

/** A program with everything that it takes to submit it. */
export interface PreparedRun {
  readonly registers: NativeRegisters;
  readonly layout: RegisterLayout;
  readonly submission: NativeSubmission;
  readonly program: Program;
  readonly engineOf: (launch: Launch) => ProfiledEngine;
  /** The operand in one of the submission's other registers. */
  readonly nameOf?: (block: number) => string;
  /** Called when it has ended. */
  readonly done?: (failed: boolean) => void;
  /** Called with the reason why it could not be captured. */
  readonly notCaptured?: (reason: string) => void;
}

/** @param before ends with the run before: they end in that order, but their reports may arrive in another */
export async function submit(
  run: Run,
  prepared: PreparedRun,
  device: SharedDevice,
  before: Promise<unknown>,
): Promise<Record<string, Tensor>> {
  const { signal, onBegin, onLaunch } = run.options;
  const { registers, layout, submission, program, engineOf } = prepared;
  const launches = program.instructions.filter((instruction) => instruction.op === "launch");
  if (device.lost) throw device.lost;
  const read = (names: readonly string[], values: readonly Uint8Array[]) =>
    Object.fromEntries(names.map((name, index) => [name, tensorOf(layout.registers[name]!, values[index]!)]));
  // Each run has a channel of its own, so reports of several may arrive in any order: they wait for the run before.
  let early: NativeLaunchReport[] | null = [];
  const receive = (reports: readonly NativeLaunchReport[]) => {
    if (early) {
      early.push(...reports);
      return;
    }
    for (const { launch: index, milliseconds, values } of reports) {
      if (run.stopped || signal?.aborted) return;
      const launch = launches[index]!;
      const report: LaunchReport = { launch, index, milliseconds, values: read(launch.reported ?? [], values) };
      try {
        onLaunch?.(report);
      } catch (reason) {
        run.stopped = { reason };
        native.cancel();
      }
    }
  };
  const native = registers.submit(submission, receive);
  run.native = native;
  const follow = before.then(() => {
    const waiting = early ?? [];
    early = null;
    onBegin?.();
    receive(waiting);
  });
  const stopFollowing = onAbort(signal, native.cancel);
  let failed = true;
  try {
    const outcome = await native.promise.finally(() => follow);
    if (outcome.notCaptured) prepared.notCaptured?.(outcome.notCaptured);
    // The caller's own reasons come first, whatever became of the last launch.
    if (run.stopped) throw run.stopped.reason;
    signal?.throwIfAborted();
    failed = false;
    return read(program.results, outcome.results);
  } catch (error) {
    if (run.stopped) throw run.stopped.reason;
    if (signal?.aborted) throw signal.reason;
    if (!isNative(error)) throw error;
    device.note(error);
    if (error.code === "NO_VALUE") throw withoutValue(prepared.nameOf?.(error.operand ?? 0) ?? "", error);
    throw explainRun(error, launches, (launch) => engineOf(launch).engine);
  } finally {
    stopFollowing();
    prepared.done?.(failed);
  }
}

export function withoutValue(name: string, cause?: unknown): RuntimeError {
  return new RuntimeError(`This program reads "${name}", which has no value, since an earlier submission failed.`, {
    cause,
  });
}

function isNative(error: unknown): error is NativeError {
  return error instanceof Error && typeof (error as NativeError).code === "string" && "log" in error;
}
