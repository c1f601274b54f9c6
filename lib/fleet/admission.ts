import { FleetEmptyError } from "../errors.js";
export interface Price {
  readonly ms: number;
  readonly leastMs: number;
  readonly blocks: string;
}
export interface WorkerView {
  readonly id: string;
  readonly takes: boolean;
  readonly backlogMs: number;
  readonly at: number;
  readonly room: number;
  readonly prices: ReadonlyMap<string, Price>;
  readonly warm: ReadonlySet<string>;
}
export interface Waiting {
  readonly id: string;
  readonly kind: string;
  readonly size: string;
  readonly pictures: number;
  readonly level: number;
  readonly arrival: number;
  readonly due: number | null;
}
export interface Verdict {
  readonly predictedMs: number | null;
  readonly place: number;
  readonly blocks: string | null;
  readonly price: Price | null;
}
export class FleetAdmission {
  #workers: readonly WorkerView[] = [];
  constructor(_: { maxQueue: () => number }) {}
  see(state: { workers: readonly WorkerView[]; waiting: readonly Waiting[] }, _now: number): void {
    this.#workers = state.workers;
  }
  admit(
    request: Omit<Waiting, "due"> & { deadlineMs: number | null; ticket?: string | undefined },
    _now: number,
  ): Verdict {
    const takers = this.#workers.filter(({ takes }) => takes);
    if (takers.length === 0) throw new FleetEmptyError("No worker of the fleet takes jobs for this model now.");
    const price = takers.map(({ prices }) => prices.get(request.kind)).find((each) => each !== undefined) ?? null;
    return { predictedMs: price?.ms ?? null, place: 0, blocks: price?.blocks ?? null, price };
  }
  ended(_id: string, _how: { late: boolean }): void {}
  backlogSeconds(_now: number): number {
    return 0;
  }
}
