/**
 * How the pictures of a request are shared out over devices of different speeds, for forecasts: a picture at a time to the device that is
 * done with all of its own first. Pure.
 */

/** Milliseconds of so many pictures of a request on a device that they have to themselves; infinite if that is not known. */
export type DeviceTimes = (device: number, pictures: number) => number;

/** So many pictures are shared out one by one; of more, several at a time. */
const sharedOut = 64;

export interface Shares {
  /** How many pictures each device gets; those that get none are left out. */
  readonly counts: ReadonlyMap<number, number>;
  /** When the last of them is done. */
  readonly end: number;
}

/**
 * @param devices at least one
 * @param ready milliseconds until each device is free, 0 where it is not said; those of the request are added
 */
export function shareOut(
  times: DeviceTimes,
  pictures: number,
  devices: readonly number[],
  ready: Map<number, number>,
): Shares {
  const counts = new Map<number, number>();
  const endOn = (device: number, count: number) => (ready.get(device) ?? 0) + times(device, count);
  if (devices.length === 1) counts.set(devices[0]!, pictures);
  else {
    const step = Math.ceil(pictures / sharedOut);
    for (let left = pictures; left > 0; ) {
      const more = Math.min(step, left);
      let best = { device: devices[0]!, end: Number.POSITIVE_INFINITY };
      for (const device of devices) {
        const end = endOn(device, (counts.get(device) ?? 0) + more);
        if (end < best.end) best = { device, end };
      }
      counts.set(best.device, (counts.get(best.device) ?? 0) + more);
      left -= more;
    }
  }
  let end = 0;
  for (const [device, count] of counts) {
    const at = endOn(device, count);
    end = Math.max(end, at);
    ready.set(device, at);
  }
  return { counts, end };
}

/**
 * Milliseconds of all devices together that a request takes, if each of them does its part of it and none waits.
 * @param devices at least one
 */
export function togetherMs(times: DeviceTimes, pictures: number, devices: readonly number[]): number {
  const known = devices.map((device) => times(device, pictures)).filter((each) => each < Number.POSITIVE_INFINITY);
  if (known.length === 1) return known[0]!;
  return 1 / known.reduce((sum, each) => sum + 1 / each, 0);
}
