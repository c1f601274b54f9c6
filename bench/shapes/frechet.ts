/**
 * Fréchet distance between two sets of pictures, on features of a small classifier (training/, `features`): the distance
 * between Gaussians of the same means and covariances, |μ₁ − μ₂|² + tr(C₁ + C₂ − 2·(C₁·C₂)^½).
 */

import "../telemetry.js";
import path from "node:path";
import * as ort from "onnxruntime-node";
import type { Pixels } from "./world.js";

type Matrix = Float64Array[];

const size = 64;

export class Features {
  readonly #session: ort.InferenceSession;

  private constructor(session: ort.InferenceSession) {
    this.#session = session;
  }

  static async open(): Promise<Features> {
    return new Features(await ort.InferenceSession.create(path.join(import.meta.dirname, "features.onnx")));
  }

  /** One row of features for each square picture; larger ones are averaged down to 64 px. */
  async of(pictures: readonly Pixels[]): Promise<number[][]> {
    const input = new Float32Array(pictures.length * 3 * size * size);
    for (const [row, { width, data }] of pictures.entries()) {
      const box = width / size;
      if (!Number.isInteger(box)) throw new RangeError(`Expected a multiple of ${size} px but received ${width}.`);
      for (let y = 0; y < width; y++)
        for (let x = 0; x < width; x++)
          for (let c = 0; c < 3; c++)
            input[((row * 3 + c) * size + Math.floor(y / box)) * size + Math.floor(x / box)]! +=
              (data[(y * width + x) * 3 + c]! / 127.5 - 1) / box ** 2;
    }
    const { features } = await this.#session.run({
      pictures: new ort.Tensor("float32", input, [pictures.length, 3, size, size]),
    });
    const values = features!.data as Float32Array;
    const width = features!.dims[1]!;
    return pictures.map((_, row) => [...values.subarray(row * width, (row + 1) * width)]);
  }
}

/** @param a, b rows of features, as many columns in both */
export function frechetDistance(a: readonly (readonly number[])[], b: readonly (readonly number[])[]): number {
  const [first, second] = [gaussian(a), gaussian(b)];
  const root = squareRoot(first.covariance);
  const product = multiply(multiply(root, second.covariance), root);
  // Rounding leaves tiny negative eigenvalues where a set has fewer rows than columns.
  const cross = eigen(product).values.reduce((sum, value) => sum + Math.sqrt(Math.max(0, value)), 0);
  const means = first.mean.reduce((sum, value, i) => sum + (value - second.mean[i]!) ** 2, 0);
  return Math.max(0, means + trace(first.covariance) + trace(second.covariance) - 2 * cross);
}

function gaussian(rows: readonly (readonly number[])[]): { mean: number[]; covariance: Matrix } {
  const n = rows[0]!.length;
  const mean = Array.from({ length: n }, (_, k) => rows.reduce((sum, row) => sum + row[k]!, 0) / rows.length);
  const covariance = Array.from({ length: n }, () => new Float64Array(n));
  for (const row of rows)
    for (let i = 0; i < n; i++)
      for (let k = 0; k <= i; k++)
        covariance[i]![k]! += ((row[i]! - mean[i]!) * (row[k]! - mean[k]!)) / (rows.length - 1);
  for (let i = 0; i < n; i++) for (let k = 0; k < i; k++) covariance[k]![i] = covariance[i]![k]!;
  return { mean, covariance };
}

const trace = (m: Matrix) => m.reduce((sum, row, i) => sum + row[i]!, 0);

function multiply(a: Matrix, b: Matrix): Matrix {
  return a.map((row) => {
    const out = new Float64Array(b[0]!.length);
    row.forEach((value, k) => {
      for (let i = 0; i < out.length; i++) out[i]! += value * b[k]![i]!;
    });
    return out;
  });
}

/** Of a symmetric matrix without negative eigenvalues. */
function squareRoot(m: Matrix): Matrix {
  const { values, vectors } = eigen(m);
  const scaled = vectors.map((row) => row.map((value, k) => value * Math.sqrt(Math.max(0, values[k]!))));
  return multiply(scaled, transposed(vectors));
}

const transposed = (m: Matrix): Matrix =>
  m[0] ? Array.from(m[0], (_, k) => Float64Array.from(m, (row) => row[k]!)) : [];

/** Eigenvalues and, in columns, eigenvectors of a symmetric matrix (Jacobi's rotations). */
export function eigen(symmetric: Matrix): { values: number[]; vectors: Matrix } {
  const n = symmetric.length;
  const a = symmetric.map((row) => Float64Array.from(row));
  const v = a.map((_, i) => Float64Array.from({ length: n }, (_, k) => (i === k ? 1 : 0)));
  const scale = Math.max(...a.flatMap((row) => [...row].map(Math.abs)), Number.MIN_VALUE);
  for (let sweep = 0; sweep < 60; sweep++) {
    let off = 0;
    for (let p = 0; p < n; p++) {
      for (let q = p + 1; q < n; q++) {
        const apq = a[p]![q]!;
        off = Math.max(off, Math.abs(apq));
        if (Math.abs(apq) <= 1e-15 * scale) continue;
        const theta = (a[q]![q]! - a[p]![p]!) / (2 * apq);
        const t = Math.sign(theta || 1) / (Math.abs(theta) + Math.sqrt(theta * theta + 1));
        const c = 1 / Math.sqrt(t * t + 1);
        const s = t * c;
        for (let k = 0; k < n; k++) {
          const [kp, kq] = [a[k]![p]!, a[k]![q]!];
          a[k]![p] = c * kp - s * kq;
          a[k]![q] = s * kp + c * kq;
        }
        for (let k = 0; k < n; k++) {
          const [pk, qk] = [a[p]![k]!, a[q]![k]!];
          a[p]![k] = c * pk - s * qk;
          a[q]![k] = s * pk + c * qk;
          const [vp, vq] = [v[k]![p]!, v[k]![q]!];
          v[k]![p] = c * vp - s * vq;
          v[k]![q] = s * vp + c * vq;
        }
      }
    }
    if (off <= 1e-13 * scale) break;
  }
  return { values: a.map((row, i) => row[i]!), vectors: v };
}
