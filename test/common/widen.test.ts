// Values that are not finite, found in the bytes of every type.
import { expect, it } from "vitest";
import type { StoredDType } from "../../lib/common/tensor.js";
import { indexOfNotFinite, widen } from "../../lib/common/widen.js";

/** Bytes of all codes of a type, or of float32 those whose upper half is each code. */
function allCodes(dtype: StoredDType): Uint8Array {
  if (dtype === "F32") return new Uint8Array(Uint32Array.from({ length: 2 ** 16 }, (_, i) => i * 2 ** 16 + 1).buffer);
  if (dtype === "F16" || dtype === "BF16")
    return new Uint8Array(Uint16Array.from({ length: 2 ** 16 }, (_, i) => i).buffer);
  return Uint8Array.from({ length: 256 }, (_, i) => i);
}

it.each(["F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I8"] as const)(
  "the bits of %s tell what is not finite",
  (dtype) => {
    const bytes = allCodes(dtype);
    const values = new Float32Array(bytes.length / { F32: 4, F16: 2, BF16: 2, F8_E4M3: 1, F8_E5M2: 1, I8: 1 }[dtype]);
    widen(bytes, dtype, values);
    const size = bytes.length / values.length;
    // One after the other, from what follows the one before.
    const found: number[] = [];
    for (let from = 0; from < values.length; ) {
      const index = indexOfNotFinite(bytes.subarray(from * size), dtype);
      if (index < 0) break;
      found.push(from + index);
      from += index + 1;
    }
    expect(found).toEqual([...values.keys()].filter((index) => !Number.isFinite(values[index])));
  },
);
