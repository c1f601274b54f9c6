/**
 * When the accepted requests will end: a coarse run of what the gate and the scheduler will do, many launches at a time.
 * The first request by priority takes along those whose next launch it can share. So several end together, and their
 * places are free together: the mean time between two endings says little about the next one.
 *
 * Several devices are one to it, which makes a launch of each group of rows at a time, shared out over all of them. So requests that
 * share no launch run one after another, as they would on one device: they end sooner than it says.
 */

/** Launches of one kind that a request makes one after another. */
export interface Phase {
  /** Requests whose next launches have equal keys share them. */
  readonly key: string;
  /** Rows of the request in each launch. */
  readonly rows: number;
  /** Launches. */
  readonly times: number;
  /** Whether such a launch may be held back for others to share it. */
  readonly deferrable: boolean;
  /**
   * The first batch that is launched for so many rows, and milliseconds of all batches that they need. `work`: what part of the
   * time of all devices they take, in milliseconds; default: those milliseconds.
   */
  split(rows: number): { readonly batch: number; readonly milliseconds: number; readonly work?: number };
}

/** A request as the forecast sees it. */
export interface ForecastRequest {
  readonly pictures: number;
  /** Whether it has been let in. */
  readonly isInside: boolean;
  /** What it still has to do. */
  readonly phases: readonly Phase[];
  /** Whether its work counts in `done`. */
  readonly counts: boolean;
}

/** The state when a request has ended, and those that then fit have been let in. */
export interface Ending {
  /** Milliseconds from now. */
  readonly at: number;
  /** Requests that wait. */
  readonly waiting: number;
  /** Requests and pictures inside. */
  readonly inside: { readonly requests: number; readonly pictures: number };
  /** Milliseconds of work done by then, as if each request had the device to itself. */
  readonly done: number;
  /** Milliseconds of the longest launch until then, and at the present: work is done in such parts. */
  readonly launch: number;
}

interface State extends ForecastRequest {
  /** Place in the order of priority. */
  readonly order: number;
  phase: number;
  /** Launches of the phase that are left. */
  left: number;
  /** Since when its next launch could have been made. */
  since: number;
}

/**
 * @param requests by priority
 * @param capacity pictures that may be inside
 * @param maxWaitMs how long a deferrable launch may be held back
 * @returns the endings in order, one for each request
 */
export function* forecast(
  requests: readonly ForecastRequest[],
  capacity: number,
  maxWaitMs: number,
): Generator<Ending> {
  const states = requests.map(
    (request, order): State => ({ ...request, order, phase: 0, left: request.phases[0]?.times ?? 0, since: 0 }),
  );
  const inside = states.filter(({ isInside }) => isInside);
  const waiting = states.filter(({ isInside }) => !isInside);
  let pictures = inside.reduce((sum, request) => sum + request.pictures, 0);
  let entered = 0;
  let at = 0;
  let done = 0;
  let launch = 0;
  const letIn = () => {
    for (; entered < waiting.length; entered++) {
      const next = waiting[entered]!;
      if (inside.length > 0 && pictures + next.pictures > capacity) break;
      pictures += next.pictures;
      inside.push(next);
    }
    inside.sort((a, b) => a.order - b.order);
  };
  letIn();
  // A request whose launches are all done ends with the submission that they were in.
  const active = inside.find(phaseOf);
  if (active) launch = phaseOf(active)!.split(rowsOf(sharing(active, inside))).milliseconds;
  while (inside.length > 0) {
    const over = inside.filter((state) => !phaseOf(state));
    for (const state of over) {
      inside.splice(inside.indexOf(state), 1);
      pictures -= state.pictures;
      letIn();
      yield { at, waiting: waiting.length - entered, inside: { requests: inside.length, pictures }, done, launch };
    }
    if (over.length > 0) continue;

    const firsts = inside.filter(
      (state, index) => inside.findIndex((other) => keyOf(other) === keyOf(state)) === index,
    );
    const first = firsts.find((state) => !isHeld(state, inside, at, maxWaitMs)) ?? firsts[0]!;
    const members = sharing(first, inside);
    const { split, deferrable } = phaseOf(first)!;
    const { milliseconds } = split(rowsOf(members));
    const least = Math.min(...members.map(({ left }) => left));
    // One at a time where the next launch may be another's.
    const times = deferrable || first !== firsts[0] ? Math.min(1, least) : least;
    at += times * milliseconds;
    launch = Math.max(launch, milliseconds);
    for (const state of members) {
      const { rows, split } = phaseOf(state)!;
      const own = split(rows);
      if (state.counts) done += times * (own.work ?? own.milliseconds);
      state.left -= times;
      state.since = at;
      // Rounding may leave a little.
      if (state.left < 1e-9) state.left = state.phases[++state.phase]?.times ?? 0;
    }
  }
}

function phaseOf({ phases, phase }: State): Phase | undefined {
  return phases[phase];
}

function keyOf(state: State): string | undefined {
  return phaseOf(state)?.key;
}

function rowsOf(states: readonly State[]): number {
  return states.reduce((sum, state) => sum + (phaseOf(state)?.rows ?? 0), 0);
}

/** As many as the scheduler would take into a request's launch: all of its own rows in any case, of others while they fit. */
function sharing(first: State, inside: readonly State[]): State[] {
  const group = inside.filter((state) => keyOf(state) === keyOf(first));
  const { batch } = phaseOf(first)!.split(rowsOf(group));
  let rows = 0;
  return group.filter((state) => {
    const own = phaseOf(state)!.rows;
    if (state !== first && rows + own > batch) return false;
    rows += own;
    return true;
  });
}

/** Whether a request's launch is held back for another that will soon make the same one. */
function isHeld(first: State, inside: readonly State[], at: number, maxWaitMs: number): boolean {
  const { deferrable, key } = phaseOf(first)!;
  const left = maxWaitMs - (at - first.since);
  if (!deferrable || left <= 0) return false;
  return inside.some((state) => keyOf(state) !== key && timeUntil(state, key) <= left);
}

/** Milliseconds until a request makes a launch of this key, if it runs alone. */
function timeUntil({ phases, phase, left }: State, key: string): number {
  let milliseconds = 0;
  for (let index = phase; index < phases.length; index++) {
    const { key: own, rows, times, split } = phases[index]!;
    if (own === key) return milliseconds;
    milliseconds += (index === phase ? left : times) * split(rows).milliseconds;
  }
  return Number.POSITIVE_INFINITY;
}
