/** What a decision of `FleetAdmission` takes of the processor, at a depth of the queue that the simulation does not reach. */

import { FleetAdmission, type JobView, type WorkerView } from "../../lib/fleet/admission.js";
import { processorMicros, randomOf } from "./fleet.js";

export interface Decisions {
  readonly workers: number;
  readonly waiting: number;
  /** Different prices. */
  readonly speeds: number;
  /** Part of the waiting jobs that have been promised a time. */
  readonly promised: number;
  /** Microseconds, medians: the first decision after a copy; one without a limit; one with a limit that goes before most; one that is refused. */
  readonly micros: { readonly copy: number; readonly last: number; readonly early: number; readonly refused: number };
}

export function decisions(
  workers: number,
  waiting: number,
  speeds: number,
  promised: number,
  rounds: number,
): Decisions {
  const random = randomOf(1);
  const kinds = [..."abcdefgh"];
  const prices = Array.from(
    { length: speeds },
    (_, speed) =>
      new Map(
        kinds.map((kind, index) => {
          const ms = (300 + 100 * index) * (1 + 0.3 * speed);
          return [kind, { ms, leastMs: ms / 2, blocks: "E8" }] as const;
        }),
      ),
  );
  const views = Array.from(
    { length: workers },
    (_, index): WorkerView => ({
      ...{ id: `w${index}`, takes: true, backlogMs: 1000 * random(), at: 0, room: 0, prices: prices[index % speeds]! },
    }),
  );
  const jobs = Array.from({ length: waiting }, (_, index): JobView => {
    // Promises that can be kept.
    const due = random() < promised ? 5000 + (random() * 2000 * waiting) / workers : null;
    const kind = kinds[Math.floor(random() * kinds.length)]!;
    return { ...{ id: `j${index}`, kind, pictures: 1, level: 0, arrival: -5000 * random(), due } };
  });
  const admission = new FleetAdmission({ maxQueue: () => Number.POSITIVE_INFINITY, random });
  let calls = 0;
  const admit = (deadlineMs: number | null) => {
    const start = processorMicros();
    try {
      admission.admit({ id: `n${calls++}`, kind: "a", pictures: 1, level: 0, arrival: 0, deadlineMs }, 0);
    } catch {
      // Refusing takes time as well.
    }
    return processorMicros() - start;
  };
  const see = () => admission.see({ at: 5000 * calls, workers: views, jobs });
  const of = { copy: [] as number[], last: [] as number[], early: [] as number[], refused: [] as number[] };
  for (let round = 0; round < rounds; round++) {
    see();
    of.copy.push(admit(null));
    for (let index = 0; index < 5; index++) {
      of.last.push(admit(null));
      of.early.push(admit(3500));
      of.refused.push(admit(180));
    }
  }
  const median = (values: number[]) => values.sort((a, b) => a - b)[values.length >> 1]!;
  const micros = { copy: median(of.copy), last: median(of.last), early: median(of.early), refused: median(of.refused) };
  return { workers, waiting, speeds, promised, micros };
}
