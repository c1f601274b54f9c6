/** Pictures that are done: what can be done with them, and how they were made. */

import { duration, element, plural } from "./dom.js";

const blockNames = {
  E: "Euler",
  H: "Heun",
  A: "Adams-Bashforth",
  P: "pseudo corrector",
  R: "velocity refiner",
  C: "refined midpoint",
  S: "skip",
  M: "damped DPM-Solver++(2M)",
  D: "DPM-Solver++(2M)",
  U: "UniPC",
};

/** Where the time went: a kind (a class), a name and milliseconds each, in order. Steps by the phases of a schedule such as "H1P7R2". */
function timesOf({ blocks, timings }) {
  let step = 0;
  const phases = [...blocks.matchAll(/([A-Z])(\d*)/g)].map(([, letter, digits], index) => {
    const count = Number(digits || 1);
    const times = timings.steps.slice(step, step + count);
    step += count;
    const name = `${plural(count, "step")}, ${blockNames[letter] ?? letter}`;
    return [index % 2 ? "other" : "steps", name, times.reduce((a, b) => a + b, 0)];
  });
  return [
    ["queue", "Waiting", timings.queue],
    ["encode", "Reading the prompt", timings.encode],
    ["edit", "Reading the picture", timings.edit],
    ...phases,
    ["decode", "Decoding", timings.decode],
  ].filter(([, , milliseconds]) => milliseconds > 0);
}

/** The schedule and times of a drawing, and its warnings. */
export function factsOf(entry) {
  const bar = element("div", { className: "times", ariaHidden: "true" });
  const list = element("dl");
  for (const [kind, name, milliseconds] of timesOf(entry)) {
    const part = element("span", { className: `part ${kind}` });
    part.style.flexGrow = milliseconds;
    bar.append(part);
    const key = element("span", { className: `key ${kind}` });
    list.append(element("div", {}, element("dt", {}, key, name), element("dd", {}, duration(milliseconds))));
  }
  const { blocks, evaluations, timings, warnings } = entry;
  const refined = evaluations.refiner > 0 ? `, and ${evaluations.refiner} of the refiner` : "";
  const count = plural(evaluations.predictor, "evaluation") + refined;
  const summary = `Schedule ${blocks}: ${count}, ${duration(timings.total)} in all`;
  return [
    ...warnings.map((text) => element("p", { className: "warning" }, text)),
    element("details", {}, element("summary", {}, summary), bar, list),
  ];
}

/** A picture. @param actions functions by the texts of their buttons, called with the entry */
export function card(entry, url, actions) {
  const { width, height } = entry.size;
  const { prompt } = entry.request;
  const image = element("img", { src: url, alt: prompt, width, height });
  // Few pixels are shown as they are; smoothed they look out of focus.
  image.classList.toggle("coarse", Math.max(width, height) <= 128);
  const name = prompt.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60);
  const save = element("a", { className: "button", href: url, download: `${name}-${entry.seed}.png` }, "Save");
  const buttons = Object.entries(actions).map(([text, act]) =>
    element("button", { type: "button", onclick: () => act(entry) }, text),
  );
  return element(
    "figure",
    {},
    element("div", { className: "frame" }, image),
    element("figcaption", {}, `${width} × ${height}, seed ${entry.seed}`),
    element("div", { className: "buttons" }, save, ...buttons),
  );
}
