// Load by callers and by arrivals, the same for HTTP and for the library: `draw` is given the number of the request.

/** The same captions and seeds for all. */
export const captions = [
  "a red circle",
  "a large blue square",
  "a small green triangle",
  "a yellow triangle above a red circle",
];
export const pictureOf = (index) => ({ prompt: captions[index % captions.length], seed: index });

/** Numbers in [0, 1) that are the same for the same seed. */
export function randomOf(seed) {
  let state = seed >>> 0;
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 32;
  };
}

/** Callers who each ask again as soon as they are answered, until so many requests were made. */
export async function closedLoop(draw, { callers, requests }) {
  const latencies = [];
  let next = 0;
  const start = performance.now();
  await Promise.all(
    Array.from({ length: callers }, async () => {
      while (next < requests) {
        const asked = performance.now();
        await draw(next++);
        latencies.push(performance.now() - asked);
      }
    }),
  );
  return { milliseconds: performance.now() - start, latencies };
}
