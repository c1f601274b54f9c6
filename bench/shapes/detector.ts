/**
 * A rule-based judge of pictures of the procedural world: does a picture show what its caption says? Strict on purpose:
 * colours are right only if exactly those of the caption are there, a shape only if it fits best of all and covers its
 * ideal outline well. Its error on exact renders is measured by test/bench/detector.test.ts.
 */

import {
  type Circle,
  circleRadius,
  coverage,
  type Pixels,
  palette,
  relations,
  type Scene,
  shapes,
  squareHalfSide,
  triangle,
} from "./world.js";

/** What was right about one picture; `relation` is null where the caption says none. */
export interface Verdict {
  readonly ground: boolean;
  /** The colours of the things, and no others. */
  readonly colours: boolean;
  /** Every thing's. */
  readonly shapes: boolean;
  readonly sizes: boolean;
  readonly relation: boolean | null;
}

/** Overlap (intersection over union) with the ideal outline below which a blob is no shape at all. */
const leastOverlap = 0.75;
/** Part of the picture that a colour covers, after one pixel is taken off its edges, to count as a thing. */
const leastArea = 0.004;
/** Radii between small, plain and large, for pictures of one thing and of two. */
const sizeLimits = [
  [0.205, 0.295],
  [0.1475, 0.1925],
] as const;

/** Area of each shape of radius 1, and how far below its origin its centroid lies. */
const areas = [
  Math.PI * circleRadius ** 2,
  (2 * squareHalfSide) ** 2,
  triangle.footX * (triangle.footY - triangle.apex),
];
const centroids = [0, 0, (triangle.apex + 2 * triangle.footY) / 3];

/** Each pixel true where all pixels around it are (erosion by a square of 2·reach + 1), or where any is (dilation). */
function morphed(mask: Uint8Array, size: number, reach: number, any: boolean): Uint8Array {
  const pass = (from: Uint8Array, stride: number, step: number) => {
    const to = new Uint8Array(from.length);
    for (let line = 0; line < size; line++) {
      for (let at = 0; at < size; at++) {
        let value = !any;
        for (let k = Math.max(0, at - reach); k <= Math.min(size - 1, at + reach); k++)
          if (from[line * step + k * stride] === (any ? 1 : 0)) value = any;
        to[line * step + at * stride] = value ? 1 : 0;
      }
    }
    return to;
  };
  return pass(pass(mask, 1, size), size, 1);
}

/** Index into `among` of the colour nearest to each pixel. */
function nearest({ data }: Pixels, among: readonly number[]): Uint8Array {
  const result = new Uint8Array(data.length / 3);
  for (let i = 0; i < result.length; i++) {
    let best = Number.POSITIVE_INFINITY;
    among.forEach((colour, index) => {
      const [r, g, b] = palette[colour]!;
      const distance = (data[3 * i]! - r) ** 2 + (data[3 * i + 1]! - g) ** 2 + (data[3 * i + 2]! - b) ** 2;
      if (distance < best) {
        best = distance;
        result[i] = index;
      }
    });
  }
  return result;
}

/** Coverage of one colour at each pixel: where the pixel lies between it and each other colour that is present. */
function softMask(picture: Pixels, colour: number, present: readonly number[]): Float64Array {
  const { width: size, data } = picture;
  const index = present.indexOf(colour);
  const own = nearest(picture, present).map((value) => (value === index ? 1 : 0));
  // Only near the thing's own solid pixels: where the other thing meets the ground their blend may look like this colour.
  const near = morphed(morphed(own, size, 1, false), size, 2, true);
  const to = palette[colour]!;
  const lines = present
    .filter((other) => other !== colour)
    .map((other) => {
      const from = palette[other]!;
      const line = to.map((value, c) => value - from[c]!);
      return { from, line, length: line.reduce((sum, value) => sum + value * value, 0) };
    });
  const mask = new Float64Array(size * size);
  for (let i = 0; i < mask.length; i++) {
    if (!near[i]) continue;
    let part = 1;
    for (const { from, line, length } of lines) {
      let along = 0;
      for (let c = 0; c < 3; c++) along += (data[3 * i + c]! - from[c]!) * line[c]!;
      part = Math.min(part, along / length);
    }
    mask[i] = Math.max(0, part);
  }
  return mask;
}

interface Blob {
  readonly total: number;
  readonly x: number;
  readonly y: number;
}

function moments(mask: Float64Array, size: number): Blob {
  let [total, x, y] = [0, 0, 0];
  mask.forEach((value, i) => {
    total += value;
    x += value * ((i % size) + 0.5);
    y += value * (Math.floor(i / size) + 0.5);
  });
  const weight = Math.max(total, 1e-6) * size;
  return { total, x: x / weight, y: y / weight };
}

interface Fit {
  readonly shape: number;
  /** Soft intersection over union with the ideal outline. */
  readonly overlap: number;
  readonly radius: number;
}

/** Overlap of a soft mask with an ideal shape. */
function overlapWith(mask: Float64Array, size: number, total: number, shape: number, at: Circle): number {
  // Outside its square an ideal shape covers nothing: the mask's rest counts in the union alone.
  const low = (centre: number) => Math.max(0, Math.floor((centre - at.radius) * size) - 1);
  const high = (centre: number) => Math.min(size - 1, Math.ceil((centre + at.radius) * size) + 1);
  let [both, either, seen] = [0, 0, 0];
  for (let row = low(at.y); row <= high(at.y); row++) {
    for (let column = low(at.x); column <= high(at.x); column++) {
      const value = mask[row * size + column]!;
      const ideal = coverage(shape, at, column, row, size);
      both += Math.min(ideal, value);
      either += Math.max(ideal, value);
      seen += value;
    }
  }
  return both / Math.max(either + total - seen, 1e-6);
}

/** The shape that fits a soft mask best. Moments give the fit; a small search around them forgives a stray pixel. */
function fitShape(mask: Float64Array, size: number, blob: Blob): Fit {
  let best: Fit = { shape: 0, overlap: -1, radius: 0 };
  const step = 0.5 / size;
  for (let shape = 0; shape < shapes.length; shape++) {
    const base = Math.sqrt(blob.total / size ** 2 / areas[shape]!);
    const tried = (radius: number, dx: number, dy: number) => {
      const at = { x: blob.x + dx, y: blob.y - centroids[shape]! * radius + dy, radius };
      const overlap = overlapWith(mask, size, blob.total, shape, at);
      if (overlap > best.overlap) best = { shape, overlap, radius };
      return overlap;
    };
    const radii = [0.94, 1, 1.06].map((scale) => base * scale);
    const overlaps = radii.map((radius) => tried(radius, 0, 0));
    const radius = radii[overlaps.indexOf(Math.max(...overlaps))]!;
    for (const dx of [-step, 0, step]) for (const dy of [-step, 0, step]) if (dx || dy) tried(radius, dx, dy);
  }
  return best;
}

/** Judges a picture of the model against the scene whose caption it was drawn from. The picture must be square. */
export function judge(picture: Pixels, scene: Scene): Verdict {
  const size = picture.width;
  if (picture.height !== size)
    throw new RangeError(`Expected a square picture but received ${size} × ${picture.height}.`);
  const all = palette.map((_, index) => index);
  const seen = nearest(picture, all);
  const votes = new Array<number>(all.length).fill(0);
  for (let k = 0; k < size; k++)
    for (const i of [k, (size - 1) * size + k, k * size, k * size + size - 1]) votes[seen[i]!]!++;
  const ground = votes.indexOf(Math.max(...votes));

  // One pixel off every edge: blends of two colours along an outline may look like a third.
  const found = new Set<number>();
  for (const colour of all) {
    if (colour === ground) continue;
    const solid = morphed(
      seen.map((value) => (value === colour ? 1 : 0)),
      size,
      1,
      false,
    );
    if (solid.reduce((sum, value) => sum + value, 0) >= leastArea * size * size) found.add(colour);
  }
  const wanted = new Set(scene.things.map(({ colour }) => colour));
  const present = [...new Set([...wanted, ground])].sort((a, b) => a - b);

  let shapesRight = true;
  let sizesRight = true;
  const centres: Blob[] = [];
  for (const thing of scene.things) {
    if (!found.has(thing.colour)) {
      shapesRight = sizesRight = false;
      continue;
    }
    const mask = softMask(picture, thing.colour, present);
    const blob = moments(mask, size);
    const { shape, overlap, radius } = fitShape(mask, size, blob);
    if (shape !== thing.shape || overlap < leastOverlap) shapesRight = false;
    const [small, large] = sizeLimits[scene.things.length - 1]!;
    if ((radius < small ? "small" : radius > large ? "large" : "") !== thing.size) sizesRight = false;
    centres.push(blob);
  }
  return {
    ground: ground === scene.ground,
    colours: found.size === wanted.size && [...wanted].every((colour) => found.has(colour)),
    shapes: shapesRight,
    sizes: sizesRight,
    relation:
      scene.relation === null ? null : centres.length === 2 && relationOf(centres) === relations[scene.relation],
  };
}

function relationOf([first, second]: readonly Blob[]): (typeof relations)[number] {
  const [dx, dy] = [second!.x - first!.x, second!.y - first!.y];
  if (Math.abs(dy) >= Math.abs(dx)) return dy > 0 ? "above" : "below";
  return dx > 0 ? "left of" : "right of";
}

/** Shares of right pictures; relations of the pictures that have one (NaN if none has). */
export interface Score {
  readonly pictures: number;
  readonly ground: number;
  readonly colours: number;
  readonly shapes: number;
  readonly sizes: number;
  readonly relation: number;
}

export function score(verdicts: readonly Verdict[]): Score {
  const share = (of: (verdict: Verdict) => boolean | null) => {
    const known = verdicts.map(of).filter((value) => value !== null);
    return known.filter(Boolean).length / known.length;
  };
  return {
    pictures: verdicts.length,
    ground: share((v) => v.ground),
    colours: share((v) => v.colours),
    shapes: share((v) => v.shapes),
    sizes: share((v) => v.sizes),
    relation: share((v) => v.relation),
  };
}
