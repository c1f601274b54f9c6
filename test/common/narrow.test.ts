// Float32 rounded to 16 bits: every float16 and bfloat16 is itself, and what lies between two goes to the nearer one, or to the even one.
import { describe, expect, it } from "vitest";
import { narrow } from "../../lib/common/narrow.js";
import { widen } from "../../lib/common/widen.js";

const codes = Uint16Array.from({ length: 2 ** 16 }, (_, code) => code);

function values(dtype: "F16" | "BF16"): Float32Array {
  const all = new Float32Array(codes.length);
  widen(new Uint8Array(codes.buffer), dtype, all);
  return all;
}
const narrowed = (all: Float32Array, dtype: "F16" | "BF16") => new Uint16Array(narrow(all, dtype).buffer);

describe.each(["F16", "BF16"] as const)("%s", (dtype) => {
  const all = values(dtype);
  /** Codes of finite numbers of which the next larger one is finite, too. */
  const finite = [...codes].filter((code) => Number.isFinite(all[code]!) && Number.isFinite(all[code + 1] ?? Infinity));

  it("keeps its own numbers, infinities and NaN", () => {
    const back = narrowed(all, dtype);
    const again = new Float32Array(back.length);
    widen(new Uint8Array(back.buffer), dtype, again);
    expect(again.every((value, code) => Object.is(value, all[code]) || Number.isNaN(all[code]))).toBe(true);
    expect(codes.filter((code) => Number.isNaN(all[code]!)).every((code) => Number.isNaN(again[code]!))).toBe(true);
  });

  it("rounds to the nearest, ties to even, of both signs and of the smallest numbers", () => {
    const middle = finite.map((code) => (all[code]! + all[code + 1]!) / 2);
    // Halfway is a float32, but for the smallest numbers of bfloat16, which are as small as float32's.
    const exact = finite.flatMap((code, i) =>
      Math.fround(middle[i]!) === middle[i] ? [[code, middle[i]!] as const] : [],
    );
    expect(exact.length).toBeGreaterThan(60_000);
    const even = narrowed(
      Float32Array.from(exact, ([, value]) => value),
      dtype,
    );
    expect(exact.filter(([code], i) => even[i] !== (code % 2 === 0 ? code : code + 1))).toEqual([]);
    const bits = new Uint32Array(Float32Array.from(exact, ([, value]) => value).buffer);
    for (const [step, next] of [
      [-1, 0],
      [1, 1],
    ] as const) {
      const moved = new Float32Array(bits.map((each) => each + step).buffer);
      const near = narrowed(moved, dtype);
      expect(exact.filter(([code], i) => near[i] !== code + next)).toEqual([]);
    }
  });

  it("goes to infinity from halfway beyond its largest number on", () => {
    const most = Math.max(...finite.map((code) => Math.abs(all[code + 1]!)));
    const step = dtype === "F16" ? 32 : 2 ** 120;
    const given = Float32Array.of(most + step / 2, most + step / 2 - step * 2 ** -12, -most - step);
    const back = narrowed(given, dtype);
    const read = new Float32Array(3);
    widen(new Uint8Array(back.buffer), dtype, read);
    expect([...read]).toEqual([Infinity, most, -Infinity]);
  });
});
