/**
 * The progress bar: drawn on a terminal only, on stderr, so that stdout holds the result and nothing else.
 */

import { megabytes } from "./print.js";

export interface Progress {
  /** Shows what is going on, with a bar where `total` is known. */
  show(text: string, done?: number, total?: number): void;
  /** Prints a line that stays, above what is shown. */
  keep(line: string): void;
  /** Removes what is shown. */
  clear(): void;
}

const silent: Progress = { show: () => undefined, keep: () => undefined, clear: () => undefined };

/** Work with progress that is shown if `enabled`, and gone when the work ends. */
export async function withProgress<T>(enabled: boolean, work: (progress: Progress) => Promise<T>): Promise<T> {
  const progress = await createProgress(enabled);
  try {
    return await work(progress);
  } finally {
    progress.clear();
  }
}

async function createProgress(enabled: boolean): Promise<Progress> {
  // A terminal that does not know its width (0 columns, as under script(1)) would have ora clear endless lines.
  if (!enabled || !process.stderr.isTTY || !process.stderr.columns) return silent;
  const { default: ora } = await import("ora");
  // discardStdin would put the terminal into raw mode, where Ctrl-C is no signal.
  const spinner = ora({ stream: process.stderr, discardStdin: false });
  return {
    show(text, done, total) {
      spinner.text = total === undefined ? text : `${bar(done ?? 0, total)} ${text}`;
      if (!spinner.isSpinning) spinner.start();
    },
    keep(line) {
      spinner.clear();
      process.stderr.write(`${line}\n`);
    },
    clear: () => void spinner.stop(),
  };
}

/** `████░░░░ 250/1000` */
export function bar(done: number, total: number): string {
  return `${blocks(done, total)} ${done}/${total}`;
}

function blocks(done: number, total: number): string {
  const width = 24;
  const filled = Math.round((width * done) / total);
  return `${"█".repeat(filled)}${"░".repeat(width - filled)}`;
}

/** What is downloaded, in bytes. */
interface Bytes {
  readonly done: number;
  readonly total: number;
}

interface Downloads extends Bytes {
  readonly files: readonly (Bytes & { readonly path: string })[];
}

/** The speed is that of so many milliseconds. */
const speedOverMs = 5000;

/** Shows a download: a bar for all of it with its speed, and one for each file under way. */
export function showDownload(progress: Progress, now: () => number = performance.now.bind(performance)) {
  const seen: { at: number; done: number }[] = [];
  const barOf = ({ done, total }: Bytes) => `${blocks(done, total || 1)} ${megabytes(done)} of ${megabytes(total)}`;
  return ({ done, total, files }: Downloads): void => {
    const at = now();
    seen.push({ at, done });
    while (seen.length > 2 && at - seen[0]!.at > speedOverMs) seen.shift();
    const first = seen[0]!;
    // What was there before counts for nothing, and what has to be downloaded again for less.
    const speed = at > first.at ? Math.max(0, (1000 * (done - first.done)) / (at - first.at)) : 0;
    const lines = [
      `${barOf({ done, total })}, ${megabytes(speed)}/s`,
      ...files.map((file) => `${barOf(file)} ${file.path}`),
    ];
    progress.show(lines.join("\n  "));
  };
}
