/** Float32 in the element types that weights are stored in, rounded to the nearest, ties to even, as torch rounds. */

import type { ComputedDType } from "./tensor.js";

/** The little-endian bytes of the values. What a type cannot hold becomes an infinity. */
export function narrow(values: Float32Array, dtype: ComputedDType): Uint8Array {
  if (dtype === "F32") return new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
  // Signed, so that they are whole numbers for the processor, too.
  const bits = new Int32Array(values.buffer, values.byteOffset, values.length);
  const halves = new Uint16Array(values.length);
  if (dtype === "BF16")
    for (let i = 0; i < bits.length; i++) {
      const value = bits[i]!;
      // NaN would be rounded to an infinity.
      halves[i] = (value & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : ((value + 0x7fff + ((value >>> 16) & 1)) | 0) >>> 16;
    }
  else for (let i = 0; i < bits.length; i++) halves[i] = half(bits[i]!);
  return new Uint8Array(halves.buffer);
}

/** The bits of a float32 as those of a float16. */
function half(bits: number): number {
  const sign = (bits >>> 16) & 0x8000;
  const magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  // From 65520 on, halfway to what would be the next number.
  if (magnitude >= 0x477ff000) return sign | 0x7c00;
  // Numbers from 2^-14 on: the exponent's bias is 112 less. A carry of the fraction goes into the exponent.
  if (magnitude >= 0x38800000) return sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >>> 13) & 1)) >>> 13);
  // Smaller ones are multiples of 2^-24.
  if (magnitude < 0x33000000) return sign;
  const exponent = magnitude >>> 23;
  const fraction = (magnitude & 0x7fffff) | 0x800000;
  const shift = 126 - exponent;
  const kept = fraction >>> shift;
  const lost = fraction & ((1 << shift) - 1);
  const middle = 1 << (shift - 1);
  return sign | (kept + (lost > middle || (lost === middle && kept & 1) ? 1 : 0));
}
