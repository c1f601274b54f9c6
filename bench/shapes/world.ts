/**
 * The procedural world that the shapes model draws: scenes, their captions, exact renders. Coordinates are parts of the
 * picture's side, y grows downwards, so that one scene renders at any size. The same as
 * training/flowturbo_training/world.py in TypeScript; scenes differ, since the generators of random numbers do.
 */

export type Rgb = readonly [number, number, number];

export const colours: Readonly<Record<string, Rgb>> = {
  red: [220, 40, 40],
  orange: [245, 140, 20],
  yellow: [245, 225, 50],
  green: [40, 160, 60],
  blue: [40, 80, 220],
  purple: [140, 50, 170],
  white: [250, 250, 250],
  black: [20, 20, 20],
};
export const colourNames = Object.keys(colours);
/** Index of the ground of a caption that names no background. */
export const greyIndex = colourNames.length;
/** Every colour by index, grey last. */
export const palette: readonly Rgb[] = [...Object.values(colours), [160, 160, 160]];

export const shapes = ["circle", "square", "triangle"] as const;
export const relations = ["above", "below", "left of", "right of"] as const;
export const sizes = ["small", "", "large"] as const;

export const radiusAlone = { small: [0.15, 0.19], "": [0.22, 0.28], large: [0.31, 0.37] } as const;
export const radiusInPair = { small: [0.12, 0.14], "": [0.155, 0.185], large: [0.2, 0.22] } as const;
/** No object comes nearer to the picture's edge, so that the frame always shows the ground. */
const margin = 0.02;

export const circleRadius = 0.95;
export const squareHalfSide = 0.85;
/** Apex and right foot; the left foot mirrors it. */
export const triangle = { apex: -0.95, footX: 0.95, footY: 0.8 };

/** One object: indices of shape and colour, a size, centre and radius in parts of the side. */
export interface Thing {
  readonly shape: number;
  readonly colour: number;
  readonly size: (typeof sizes)[number];
  readonly x: number;
  readonly y: number;
  readonly radius: number;
}

/** One or two things on a ground; `relation` is that of the first to the second, null for one thing. */
export interface Scene {
  readonly things: readonly Thing[];
  readonly ground: number;
  readonly relation: number | null;
}

/** Numbers in [0, 1) from a seed (mulberry32). */
export function randomNumbers(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let z = state;
    z = Math.imul(z ^ (z >>> 15), z | 1);
    z ^= z + Math.imul(z ^ (z >>> 7), z | 61);
    return ((z ^ (z >>> 14)) >>> 0) / 2 ** 32;
  };
}

const withArticle = (words: string) => (words.startsWith("orange") ? `an ${words}` : `a ${words}`);

export function caption(scene: Scene): string {
  const phrase = ({ size, colour, shape }: Thing) =>
    withArticle([size, colourNames[colour], shapes[shape]].filter(Boolean).join(" "));
  const [first, second] = scene.things;
  let text = phrase(first!);
  if (second) text += ` ${relations[scene.relation!]} ${phrase(second)}`;
  if (scene.ground !== greyIndex) text += ` on ${withArticle(`${colourNames[scene.ground]} background`)}`;
  return text;
}

/** A random scene. @param pairs share of scenes with two things @param backgrounds share of captions that name one */
export function drawScene(random: () => number, pairs = 0.4, backgrounds = 0.4): Scene {
  const below = (n: number) => Math.floor(random() * n);
  const between = ([low, high]: readonly [number, number]) => low + random() * (high - low);
  const deck = colourNames.map((_, index) => index);
  const draw = () => deck.splice(below(deck.length), 1)[0]!;
  const thing = () => ({ shape: below(shapes.length), colour: draw(), size: sizes[below(sizes.length)]! });
  const pair = random() < pairs;
  const [a, b] = [thing(), thing()];
  const ground = random() < backgrounds ? draw() : greyIndex;
  if (!pair) {
    const radius = between(radiusAlone[a.size]);
    const place = () => between([radius + margin, 1 - margin - radius]);
    return { things: [{ ...a, x: place(), y: place(), radius }], ground, relation: null };
  }
  const relation = below(relations.length);
  const radii = [between(radiusInPair[a.size]), between(radiusInPair[b.size])] as const;
  // Along the relation's axis one thing follows the other with a gap; across it they stay near a common line.
  const gap = between([0.03, 0.1]);
  const length = 2 * radii[0] + 2 * radii[1] + gap;
  const start = between([margin, Math.max(margin, 1 - margin - length)]);
  const firstLeads = relations[relation] === "above" || relations[relation] === "left of";
  const lead = firstLeads ? 0 : 1;
  const along = [0, 0];
  along[lead] = start + radii[lead];
  along[1 - lead] = start + 2 * radii[lead] + gap + radii[(1 - lead) as 0 | 1];
  const line = between([0.35, 0.65]);
  const across = radii.map((r) => Math.min(Math.max(line + between([-0.08, 0.08]), r + margin), 1 - margin - r));
  const vertical = relation < 2;
  const things = [a, b].map((thing, k) => ({
    ...thing,
    x: vertical ? across[k]! : along[k]!,
    y: vertical ? along[k]! : across[k]!,
    radius: radii[k]!,
  }));
  return { things, ground, relation };
}

/** `count` scenes from one seed. */
export function drawScenes(seed: number, count: number, pairs?: number, backgrounds?: number): Scene[] {
  const random = randomNumbers(seed);
  return Array.from({ length: count }, () => drawScene(random, pairs, backgrounds));
}

const slant = Math.hypot(triangle.footX, triangle.footY - triangle.apex);

/** Distance to the outline of a shape of radius 1 at the origin, negative inside. */
function signedDistance(shape: number, x: number, y: number): number {
  if (shape === 0) return Math.sqrt(x * x + y * y) - circleRadius;
  if (shape === 1) return Math.max(Math.abs(x), Math.abs(y)) - squareHalfSide;
  const { apex, footX, footY } = triangle;
  // Beyond a corner this is the distance to the edges' lines, which no anti-aliased pixel can tell.
  return Math.max((Math.abs(x) * (footY - apex) - (y - apex) * footX) / slant, y - footY);
}

/** Where a shape is, in parts of the picture's side. */
export interface Circle {
  readonly x: number;
  readonly y: number;
  readonly radius: number;
}

/** How much of pixel (column, row) a shape covers, 0 to 1. @param size pixels of the picture's side */
export function coverage(shape: number, { x, y, radius }: Circle, column: number, row: number, size: number): number {
  const distance = signedDistance(shape, ((column + 0.5) / size - x) / radius, ((row + 0.5) / size - y) / radius);
  return Math.min(1, Math.max(0, 0.5 - distance * radius * size));
}

export interface Pixels {
  readonly width: number;
  readonly height: number;
  /** RGB, row by row. */
  readonly data: Uint8Array;
}

/** A scene as an exact picture of size × size. */
export function render(scene: Scene, size: number): Pixels {
  const data = new Uint8Array(size * size * 3);
  const ground = palette[scene.ground]!;
  for (let row = 0, at = 0; row < size; row++) {
    for (let column = 0; column < size; column++, at += 3) {
      let [r, g, b] = ground;
      for (const thing of scene.things) {
        const part = coverage(thing.shape, thing, column, row, size);
        if (part === 0) continue;
        const over = palette[thing.colour]!;
        r += part * (over[0] - r);
        g += part * (over[1] - g);
        b += part * (over[2] - b);
      }
      data[at] = Math.round(r);
      data[at + 1] = Math.round(g);
      data[at + 2] = Math.round(b);
    }
  }
  return { width: size, height: size, data };
}
