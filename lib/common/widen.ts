/**
 * Stored element types in float32, as JavaScript reads them: starting noise, crops of the position table, scales. Weights are widened by
 * the runtime. Exact: each format is a subset of float32.
 */

import type { StoredDType } from "./tensor.js";

/**
 * Converts little-endian values of a .safetensors file to float32.
 * @param into as many values as `bytes` hold
 */
export function widen(bytes: Uint8Array, dtype: StoredDType, into: Float32Array): void {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  // A loop for each type: a function that was called for each value would take most of the time.
  if (dtype === "F32") for (let index = 0; index < into.length; index++) into[index] = view.getFloat32(4 * index, true);
  else if (dtype === "F16") {
    halves ??= Float32Array.from({ length: 2 ** 16 }, (_, code) => smallFloat(code, 5, 10));
    for (let index = 0; index < into.length; index++) into[index] = halves[view.getUint16(2 * index, true)]!;
  } else if (dtype === "BF16") {
    const bits = new Uint32Array(into.buffer, into.byteOffset, into.length);
    for (let index = 0; index < bits.length; index++) bits[index] = view.getUint16(2 * index, true) << 16;
  } else {
    const values = byteValues[dtype];
    for (let index = 0; index < into.length; index++) into[index] = values[bytes[index]!]!;
  }
}

/** Bits that are all set in an infinity and in NaN, and in no other value; of a type that has neither, null. */
const beyond: Readonly<Record<StoredDType, number | null>> = {
  ...{ F32: 0x7f800000, F16: 0x7c00, BF16: 0x7f80 },
  ...{ F8_E5M2: 0x7c, F8_E4M3: 0x7f, I8: null },
};

/**
 * The first of the values of a .safetensors file that is NaN or infinite. Of weights, so that it widens none of them.
 * @returns its index, or -1
 */
export function indexOfNotFinite(bytes: Uint8Array, dtype: StoredDType): number {
  const bits = beyond[dtype];
  if (bits === null) return -1;
  const { buffer, byteOffset, byteLength } = bytes.byteOffset % 4 === 0 ? bytes : Uint8Array.from(bytes);
  // A loop for each width, as above.
  if (dtype === "F32") {
    const values = new Uint32Array(buffer, byteOffset, byteLength / 4);
    for (let index = 0; index < values.length; index++) if ((values[index]! & bits) === bits) return index;
  } else if (dtype === "F16" || dtype === "BF16") {
    const values = new Uint16Array(buffer, byteOffset, byteLength / 2);
    for (let index = 0; index < values.length; index++) if ((values[index]! & bits) === bits) return index;
  } else for (let index = 0; index < byteLength; index++) if ((bytes[index]! & bits) === bits) return index;
  return -1;
}

/** The value of each float16, made when it is first needed. */
let halves: Float32Array | undefined;

/** IEEE 754's layout with so many bits of exponent and fraction: the largest exponent is for infinities and NaN. */
function smallFloat(bits: number, exponentBits: number, fractionBits: number): number {
  const sign = bits >> (exponentBits + fractionBits) ? -1 : 1;
  const largest = 2 ** exponentBits - 1;
  const bias = largest >> 1;
  const exponent = (bits >> fractionBits) & largest;
  const fraction = (bits & (2 ** fractionBits - 1)) / 2 ** fractionBits;
  if (exponent === 0) return sign * fraction * 2 ** (1 - bias);
  if (exponent === largest) return fraction ? Number.NaN : sign * Number.POSITIVE_INFINITY;
  return sign * (1 + fraction) * 2 ** (exponent - bias);
}

/** OCP's E4M3 has no infinities: the largest exponent is one more binade, of which only the last code is NaN. */
function e4m3(bits: number): number {
  if ((bits & 0x78) !== 0x78) return smallFloat(bits, 4, 3);
  if ((bits & 0x7f) === 0x7f) return Number.NaN;
  return (bits & 0x80 ? -1 : 1) * (1 + (bits & 7) / 8) * 2 ** 8;
}

/** The value of each byte. */
const table = (value: (bits: number) => number) => Float32Array.from({ length: 256 }, (_, bits) => value(bits));
const byteValues = {
  F8_E4M3: table(e4m3),
  F8_E5M2: table((bits) => smallFloat(bits, 5, 2)),
  I8: table((bits) => (bits << 24) >> 24),
};
