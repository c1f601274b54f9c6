/**
 * Gaussian noise as torch's CPU generator draws it (`torch.randn(shape, generator=torch.Generator().manual_seed(s))`),
 * so that a seed gives the picture that diffusers gives. A 32-bit Mersenne Twister feeds a Box–Muller transform over
 * blocks of 16 values (aten/src/ATen/native/cpu/DistributionTemplates.h, `normal_fill`); fewer than 16 values come one by
 * one from 53-bit uniforms. Equal to torch's up to the rounding of its vectorised logarithm and cosine (1e-6).
 */

import type { Seed } from "../common/seed.js";
import { isDue, rest } from "../common/turns.js";

const stateSize = 624;
const shiftSize = 397;

/** MT19937 (Matsumoto and Nishimura 1998). */
class MersenneTwister {
  readonly #state = new Uint32Array(stateSize);
  #index = stateSize;

  /** @param seed its low 32 bits count, as in torch */
  constructor(seed: Seed) {
    const state = this.#state;
    state[0] = Number(BigInt.asUintN(32, BigInt(seed)));
    for (let i = 1; i < stateSize; i++) {
      const previous = state[i - 1]! ^ (state[i - 1]! >>> 30);
      state[i] = Math.imul(1812433253, previous) + i;
    }
  }

  /** Uniform over the 32-bit integers. */
  next(): number {
    if (this.#index === stateSize) this.#twist();
    let y = this.#state[this.#index++]!;
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }

  #twist(): void {
    const state = this.#state;
    for (let i = 0; i < stateSize; i++) {
      const y = (state[i]! & 0x80000000) | (state[(i + 1) % stateSize]! & 0x7fffffff);
      state[i] = state[(i + shiftSize) % stateSize]! ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    }
    this.#index = 0;
  }
}

/**
 * Standard normal values of one picture's generator.
 * @param seed a whole number from 0 to 2^64 − 1
 */
export class NoiseGenerator {
  readonly #twister: MersenneTwister;
  #spare: number | null = null;

  constructor(seed: Seed) {
    this.#twister = new MersenneTwister(seed);
  }

  /** The next `count` values. A generator that draws twice continues where it stopped. */
  draw(count: number): Float32Array {
    const values = new Float32Array(count);
    for (const _ of this.#fill(values));
    return values;
  }

  /** As `draw`, into `values`, in slices that leave the event loop free. */
  async fill(values: Float32Array): Promise<void> {
    for (const _ of this.#fill(values)) if (isDue()) await rest();
  }

  /** Yields each time that some more values are drawn. */
  *#fill(values: Float32Array): Generator<void, void> {
    const count = values.length;
    if (count < 16) {
      for (let i = 0; i < count; i++) values[i] = this.#single();
      return;
    }
    for (let start = 0; start < count; start += 16) {
      // torch draws the last 16 again rather than leave a remainder.
      const isWhole = start + 16 <= count;
      const end = isWhole ? start + 16 : count;
      for (let i = start; i < end; i++) values[i] = this.#uniform24();
      if (!isWhole) for (let i = count - 16; i < count; i++) values[i] = this.#uniform24();
      boxMuller(values, isWhole ? start : count - 16);
      if (start % 4096 === 0) yield;
    }
  }

  #uniform24(): number {
    return (this.#twister.next() & 0xffffff) / 2 ** 24;
  }

  #uniform53(): number {
    const high = this.#twister.next();
    const low = this.#twister.next();
    return ((high & 0x1fffff) * 2 ** 32 + low) / 2 ** 53;
  }

  /** torch's normal_distribution<double>: values come in pairs, the second is kept. */
  #single(): number {
    if (this.#spare !== null) {
      const value = this.#spare;
      this.#spare = null;
      return value;
    }
    const angle = 2 * Math.PI * this.#uniform53();
    const radius = Math.sqrt(-2 * Math.log1p(-this.#uniform53()));
    this.#spare = radius * Math.sin(angle);
    return radius * Math.cos(angle);
  }
}

/** 16 uniform values → 16 normal ones, in place; value j pairs with value j + 8. */
function boxMuller(values: Float32Array, start: number): void {
  for (let j = start; j < start + 8; j++) {
    const radius = Math.sqrt(-2 * Math.log(1 - values[j]!));
    const angle = 2 * Math.PI * values[j + 8]!;
    values[j] = radius * Math.cos(angle);
    values[j + 8] = radius * Math.sin(angle);
  }
}
