/**
 * Quantiles of the beta distribution, for the spacing of noise levels of the same name. No library that is well kept has
 * them without much else.
 */

/** ln Γ(x) for x > 0, by Lanczos' approximation (g = 7, 9 terms): relative error below 1e-14. */
function logGamma(x: number): number {
  const terms = [
    0.99999999999980993, 676.5203681218851, -1259.1392167224028, 771.32342877765313, -176.61502916214059,
    12.507343278686905, -0.13857109526572012, 9.9843695780195716e-6, 1.5056327351493116e-7,
  ]; // biome-ignore format: coefficients
  if (x < 0.5) return Math.log(Math.PI / Math.sin(Math.PI * x)) - logGamma(1 - x);
  const t = x + 6.5;
  const sum = terms.slice(1).reduce((total, term, index) => total + term / (x + index), terms[0]!);
  return 0.5 * Math.log(2 * Math.PI) + (x - 0.5) * Math.log(t) - t + Math.log(sum);
}

/** The regularised incomplete beta function I_x(a, b), by its continued fraction (Lentz' method). */
function incompleteBeta(x: number, a: number, b: number): number {
  if (x <= 0) return 0;
  if (x >= 1) return 1;
  // The fraction converges fast on this side of the mean.
  if (x > (a + 1) / (a + b + 2)) return 1 - incompleteBeta(1 - x, b, a);
  const front = Math.exp(logGamma(a + b) - logGamma(a) - logGamma(b) + a * Math.log(x) + b * Math.log(1 - x)) / a;
  const tiny = 1e-300;
  let [c, d] = [1, 1 / Math.max(1 - ((a + b) * x) / (a + 1), tiny)];
  let fraction = d;
  for (let m = 1; m < 500; m++) {
    const even = (m * (b - m) * x) / ((a + 2 * m - 1) * (a + 2 * m));
    const odd = (-(a + m) * (a + b + m) * x) / ((a + 2 * m) * (a + 2 * m + 1));
    const before = fraction;
    for (const each of [even, odd]) {
      d = 1 / (1 + each * d || tiny);
      c = 1 + each / c || tiny;
      fraction *= c * d;
    }
    if (Math.abs(fraction - before) <= 1e-15 * Math.abs(fraction)) break;
  }
  return front * fraction;
}

/** x with I_x(a, b) = p, for p from 0 to 1: `scipy.stats.beta.ppf`. To 1e-15. */
export function betaQuantile(p: number, a: number, b: number): number {
  let [low, high] = [0, 1];
  for (let i = 0; i < 60; i++) {
    const middle = (low + high) / 2;
    if (incompleteBeta(middle, a, b) < p) low = middle;
    else high = middle;
  }
  return p <= 0 ? 0 : p >= 1 ? 1 : (low + high) / 2;
}
