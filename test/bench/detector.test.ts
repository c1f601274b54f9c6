import { describe, expect, test } from "vitest";
import { judge, score } from "../../bench/shapes/detector.js";
import {
  caption,
  drawScenes,
  greyIndex,
  type Pixels,
  render,
  type Scene,
  type Thing,
} from "../../bench/shapes/world.js";

const circle: Thing = { shape: 0, colour: 0, size: "", x: 0.5, y: 0.25, radius: 0.17 };
const square: Thing = { shape: 1, colour: 4, size: "", x: 0.5, y: 0.75, radius: 0.17 };
const pair: Scene = { things: [circle, square], ground: greyIndex, relation: 0 };

/** Mean of a box of 3 × 3 pixels. */
function blurred({ width, height, data }: Pixels): Pixels {
  const result = new Uint8Array(data.length);
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++)
      for (let c = 0; c < 3; c++) {
        let [sum, count] = [0, 0];
        for (let v = Math.max(0, y - 1); v <= Math.min(height - 1, y + 1); v++)
          for (let u = Math.max(0, x - 1); u <= Math.min(width - 1, x + 1); u++, count++)
            sum += data[(v * width + u) * 3 + c]!;
        result[(y * width + x) * 3 + c] = sum / count;
      }
  return { width, height, data: result };
}

describe("the world of shapes", () => {
  test("captions follow the grammar", () => {
    expect(caption(pair)).toBe("a red circle above a blue square");
    const orange: Scene = { things: [{ ...circle, colour: 1, size: "large" }], ground: 1, relation: null };
    expect(caption(orange)).toBe("a large orange circle on an orange background");
    for (const scene of drawScenes(1, 500))
      expect(caption(scene)).toMatch(
        /^an? (small |large )?\w+ (circle|square|triangle)( (above|below|left of|right of) an? (small |large )?\w+ (circle|square|triangle))?( on an? \w+ background)?$/,
      );
  });

  test("things stay inside the picture, apart, and where the relation says", () => {
    for (const { things, ground, relation } of drawScenes(2, 2000)) {
      for (const { x, y, radius, colour } of things) {
        expect(Math.min(x, y) - radius).toBeGreaterThanOrEqual(0);
        expect(Math.max(x, y) + radius).toBeLessThanOrEqual(1);
        expect(colour).not.toBe(ground);
      }
      if (relation === null) continue;
      const [a, b] = things as [Thing, Thing];
      const apart = [b.y - a.y, a.y - b.y, b.x - a.x, a.x - b.x][relation]!;
      expect(apart).toBeGreaterThanOrEqual(a.radius + b.radius);
      expect(a.colour).not.toBe(b.colour);
    }
  });

  test("renders cover the shapes' areas", () => {
    const areas = [Math.PI * 0.95 ** 2, 1.7 ** 2, (1.9 * 1.75) / 2];
    for (const [shape, area] of areas.entries()) {
      const thing = { shape, colour: 7, size: "large", x: 0.5, y: 0.5, radius: 0.35 } as const;
      const { data } = render({ things: [thing], ground: 6, relation: null }, 200);
      let covered = 0;
      for (let i = 0; i < data.length; i += 3) covered += (250 - data[i]!) / 230;
      expect(covered / 200 ** 2).toBeCloseTo(area * 0.35 ** 2, 2.5);
    }
  });
});

describe("the detector", () => {
  test.each([
    [64, 1000],
    [128, 400],
  ])("is right about exact renders of %i px", { timeout: 180_000 }, (size, count) => {
    const scenes = drawScenes(3, count);
    const result = score(scenes.map((scene) => judge(render(scene, size), scene)));
    for (const field of ["ground", "colours", "shapes", "sizes", "relation"] as const)
      expect(result[field], field).toBeGreaterThanOrEqual(0.995);
  });

  test("forgives a blur", () => {
    const scenes = drawScenes(4, 300);
    const result = score(scenes.map((scene) => judge(blurred(render(scene, 64)), scene)));
    for (const field of ["ground", "colours", "shapes", "relation"] as const)
      expect(result[field], field).toBeGreaterThanOrEqual(0.97);
  });

  test("refuses the pictures of other captions", () => {
    const scenes = drawScenes(5, 300);
    const result = score(scenes.map((scene, i) => judge(render(scenes[(i + 1) % 300]!, 64), scene)));
    expect(result.colours).toBeLessThan(0.1);
    expect(result.shapes).toBeLessThan(0.1);
    expect(result.relation).toBeLessThan(0.1);
  });

  test("refuses each kind of error by itself", () => {
    const right = { ground: true, colours: true, shapes: true, sizes: true, relation: true };
    const against = (scene: Scene) => judge(render(scene, 64), pair);
    expect(against(pair)).toEqual(right);
    expect(against({ ...pair, ground: 5 })).toEqual({ ...right, ground: false });
    expect(against({ ...pair, things: [{ ...circle, shape: 2 }, square] })).toEqual({ ...right, shapes: false });
    expect(against({ ...pair, things: [{ ...circle, radius: 0.21 }, square] })).toEqual({ ...right, sizes: false });
    const moved = {
      ...pair,
      things: [
        { ...circle, y: 0.75 },
        { ...square, y: 0.25 },
      ],
    };
    expect(against(moved)).toEqual({ ...right, relation: false });
    const third: Thing = { shape: 0, colour: 3, size: "small", x: 0.15, y: 0.5, radius: 0.1 };
    expect(against({ ...pair, things: [circle, square, third] })).toEqual({ ...right, colours: false });
    expect(against({ ...pair, things: [circle] })).toMatchObject({ colours: false, shapes: false, relation: false });
  });

  test("finds nothing in an empty picture or in noise", () => {
    const empty = { width: 64, height: 64, data: new Uint8Array(64 * 64 * 3).fill(160) };
    expect(judge(empty, pair)).toEqual({ ground: true, colours: false, shapes: false, sizes: false, relation: false });
    const noise = { ...empty, data: empty.data.map((_, i) => (Math.imul(i + 1, 2654435761) >>> 24) & 255) };
    expect(judge(noise, pair)).toMatchObject({ colours: false, shapes: false, relation: false });
  });
});
