/**
 * Charts as SVG, drawn by hand: points with error bars, joined or not, one colour and mark a series, a legend, axes with
 * round ticks; and bars with error bars, in groups. At the foot of each: machine, versions, commit. Enough for the
 * benchmarks, without a library.
 */

import { machineLine } from "./support.js";

export interface Point {
  readonly x: number;
  readonly y: number;
  /** Ends of an error bar. */
  readonly low?: number;
  readonly high?: number;
  readonly label?: string;
}

export interface Series {
  readonly name: string;
  readonly points: readonly Point[];
  /** Joins the points in order. */
  readonly line?: boolean;
}

export interface Axis {
  readonly label: string;
  /** Default: linear from the data. */
  readonly scale?: "linear" | "log";
  readonly from?: number;
  readonly to?: number;
}

export interface Chart {
  readonly title: string;
  readonly x: Axis;
  readonly y: Axis;
  readonly series: readonly Series[];
}

const width = 900;
const height = 500;
const frame = { left: 70, right: 280, top: 50, bottom: 76 };
/** Okabe and Ito's colours, which colour-blind readers tell apart. */
const inks = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d31"];

const escaped = (text: string) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const short = (value: number) => Number(value.toFixed(2)).toString();

interface Scale {
  readonly at: (value: number) => number;
  readonly ticks: readonly number[];
}

function scaleOf(axis: Axis, values: readonly number[], start: number, end: number): Scale {
  let low = axis.from ?? Math.min(...values);
  let high = axis.to ?? Math.max(...values);
  if (axis.scale === "log") {
    const at = (value: number) =>
      start + ((Math.log(value) - Math.log(low)) / (Math.log(high) - Math.log(low))) * (end - start);
    const ticks: number[] = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
      for (const digit of [1, 2, 5])
        if (digit * 10 ** power >= low && digit * 10 ** power <= high) ticks.push(digit * 10 ** power);
    return { at, ticks };
  }
  if (high === low) [low, high] = [low - 1, high + 1];
  const rough = (high - low) / 6;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((digit) => digit * power).find((candidate) => candidate >= rough)!;
  if (axis.from === undefined) low = Math.floor(low / step) * step;
  if (axis.to === undefined) high = Math.ceil(high / step) * step;
  const ticks: number[] = [];
  for (let tick = Math.ceil(low / step - 1e-9) * step; tick <= high + step * 1e-6; tick += step) ticks.push(tick);
  return { at: (value) => start + ((value - low) / (high - low)) * (end - start), ticks };
}

function mark(kind: number, x: number, y: number, ink: string): string {
  if (kind % 3 === 0) return `<circle cx="${x}" cy="${y}" r="4.5" fill="${ink}"/>`;
  if (kind % 3 === 1) return `<rect x="${x - 4}" y="${y - 4}" width="8" height="8" fill="${ink}"/>`;
  return `<path d="M${x} ${y - 5.5} l5.2 9.2 h-10.4 z" fill="${ink}"/>`;
}

const foot = (bottom: number) =>
  `<text x="10" y="${bottom - 10}" font-size="10" fill="#666666">${escaped(machineLine())}</text>`;

/** The chart as an SVG document. */
export function svg(chart: Chart): string {
  const points = chart.series.flatMap((series) => series.points);
  const right = width - frame.right;
  const bottom = height - frame.bottom;
  const ys = points.flatMap(({ y, low, high }) => [y, low ?? y, high ?? y]);
  const x = scaleOf(chart.x, points.map((point) => point.x), frame.left, right); // biome-ignore format: one line
  const y = scaleOf(chart.y, ys, bottom, frame.top);
  const parts: string[] = [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}" font-family="sans-serif" font-size="12">`,
    `<rect width="${width}" height="${height}" fill="#ffffff"/>`,
    `<text x="${frame.left}" y="26" font-size="15" font-weight="bold">${escaped(chart.title)}</text>`,
  ];
  for (const tick of x.ticks) {
    const at = short(x.at(tick));
    parts.push(`<line x1="${at}" x2="${at}" y1="${frame.top}" y2="${bottom}" stroke="#e6e6e6"/>`);
    parts.push(`<text x="${at}" y="${bottom + 18}" text-anchor="middle">${short(tick)}</text>`);
  }
  for (const tick of y.ticks) {
    const at = short(y.at(tick));
    parts.push(`<line x1="${frame.left}" x2="${right}" y1="${at}" y2="${at}" stroke="#e6e6e6"/>`);
    parts.push(
      `<text x="${frame.left - 8}" y="${Number(at) + 4}" text-anchor="end">${Number(tick.toPrecision(6))}</text>`,
    );
  }
  parts.push(`<path d="M${frame.left} ${frame.top} V${bottom} H${right}" fill="none" stroke="#444444"/>`);
  parts.push(
    `<text x="${(frame.left + right) / 2}" y="${bottom + 42}" text-anchor="middle">${escaped(chart.x.label)}</text>`,
  );
  parts.push(foot(height));
  const middle = (frame.top + bottom) / 2;
  parts.push(
    `<text x="20" y="${middle}" text-anchor="middle" transform="rotate(-90 20 ${middle})">${escaped(chart.y.label)}</text>`,
  );
  chart.series.forEach((series, index) => {
    const ink = inks[index % inks.length]!;
    if (series.line && series.points.length > 1) {
      const path = series.points.map((point) => `${short(x.at(point.x))} ${short(y.at(point.y))}`).join(" L");
      parts.push(`<path d="M${path}" fill="none" stroke="${ink}" stroke-width="1.5"/>`);
    }
    for (const point of series.points) {
      const [px, py] = [Number(short(x.at(point.x))), Number(short(y.at(point.y)))];
      if (point.low !== undefined && point.high !== undefined)
        parts.push(
          `<line x1="${px}" x2="${px}" y1="${short(y.at(point.low))}" y2="${short(y.at(point.high))}" stroke="${ink}"/>`,
        );
      parts.push(mark(index, px, py, ink));
      if (point.label)
        parts.push(`<text x="${px + 7}" y="${py - 6}" font-size="10" fill="${ink}">${escaped(point.label)}</text>`);
    }
    const row = frame.top + 10 + index * 20;
    parts.push(mark(index, right + 20, row, ink));
    parts.push(`<text x="${right + 32}" y="${row + 4}">${escaped(series.name)}</text>`);
  });
  return `${parts.join("\n")}\n</svg>\n`;
}

export interface Bar {
  readonly name: string;
  readonly value: number;
  readonly low: number;
  readonly high: number;
}

/**
 * Horizontal bars in groups as an SVG document, with their ranges and values; where 1 means "equal", a line stands there.
 */
export function bars(chart: {
  readonly title: string;
  readonly groups: readonly { readonly name: string; readonly bars: readonly Bar[] }[];
}): string {
  const [left, right, row] = [300, width - 90, 22];
  const all = chart.groups.flatMap((group) => group.bars);
  const rows = all.length + chart.groups.length * 1.5;
  const bottom = frame.top + Math.ceil(rows * row);
  const whole = bottom + 60;
  const x = scaleOf({ label: "", from: 0 }, all.map((bar) => bar.high), left, right); // biome-ignore format: one line
  const parts: string[] = [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${whole}" font-family="sans-serif" font-size="12">`,
    `<rect width="${width}" height="${whole}" fill="#ffffff"/>`,
    `<text x="10" y="26" font-size="15" font-weight="bold">${escaped(chart.title)}</text>`,
  ];
  for (const tick of x.ticks) {
    const at = short(x.at(tick));
    parts.push(`<line x1="${at}" x2="${at}" y1="${frame.top}" y2="${bottom}" stroke="#e6e6e6"/>`);
    parts.push(`<text x="${at}" y="${bottom + 16}" text-anchor="middle">${Number(tick.toPrecision(6))}</text>`);
  }
  let y = frame.top;
  for (const group of chart.groups) {
    y += row;
    parts.push(`<text x="10" y="${y}" font-weight="bold">${escaped(group.name)}</text>`);
    for (const [index, bar] of group.bars.entries()) {
      y += row;
      const [to, low, high] = [bar.value, bar.low, bar.high].map((value) => Number(short(x.at(value))));
      parts.push(`<text x="${left - 8}" y="${y}" text-anchor="end">${escaped(bar.name)}</text>`);
      parts.push(
        `<rect x="${left}" y="${y - 12}" width="${short(to! - left)}" height="15" fill="${inks[index % inks.length]}"/>`,
      );
      parts.push(
        `<line x1="${low}" x2="${high}" y1="${y - 4.5}" y2="${y - 4.5}" stroke="#000000" stroke-width="1.5"/>`,
      );
      parts.push(`<text x="${high! + 6}" y="${y}">${short(bar.value)}</text>`);
    }
    y += row / 2;
  }
  const one = short(x.at(1));
  parts.push(
    `<line x1="${one}" x2="${one}" y1="${frame.top}" y2="${bottom}" stroke="#444444" stroke-dasharray="4 3"/>`,
  );
  parts.push(foot(whole));
  return `${parts.join("\n")}\n</svg>\n`;
}
