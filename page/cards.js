/** Elements that show pictures, and how they were made. */

/** An element with properties and children; texts are never taken for markup. */
export function element(name, { data = {}, ...properties } = {}, ...children) {
  const made = document.createElement(name);
  Object.assign(made, properties);
  Object.assign(made.dataset, data);
  made.append(...children.filter((child) => child !== null));
  return made;
}

export const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

/** Milliseconds for people. */
export function duration(milliseconds) {
  if (milliseconds < 1000) return `${Math.max(0, Math.round(milliseconds))} ms`;
  const seconds = milliseconds / 1000;
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
}

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

/** The phases of a schedule such as "H1P7R2": runs of one kind of block; those of several stages follow each other. */
export function phasesOf(blocks) {
  const phases = [];
  for (const stage of blocks.split(/\s+/)) {
    let last = null;
    for (const [, letter, count] of stage.matchAll(/([A-Z])(\d*)/g)) {
      if (last?.letter !== letter) {
        last = { letter, name: blockNames[letter] ?? letter, count: 0 };
        phases.push(last);
      }
      last.count += count === "" ? 1 : Number(count);
    }
  }
  return phases;
}

const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);

/** Where the time went: rows of a name and milliseconds, in order. */
function timesOf({ blocks, timings }) {
  let step = 0;
  const phases = phasesOf(blocks).map(({ name, count }, index) => {
    const times = timings.steps.slice(step, step + count);
    step += count;
    return { kind: index % 2 ? "other" : "steps", name: `${plural(count, "step")}, ${name}`, milliseconds: sum(times) };
  });
  const { queue, encode, upscale, edit, decode } = timings;
  return [
    { kind: "queue", name: "Waiting", milliseconds: queue },
    { kind: "encode", name: "Reading the prompt", milliseconds: encode },
    { kind: "edit", name: "Reading the picture", milliseconds: edit },
    ...phases,
    { kind: "upscale", name: "Enlarging", milliseconds: upscale },
    { kind: "decode", name: "Decoding", milliseconds: decode },
  ].filter(({ milliseconds }) => milliseconds > 0);
}

function evaluationsOf(evaluations) {
  if (typeof evaluations === "number") return plural(evaluations, "evaluation");
  const { predictor, refiner } = evaluations;
  return `${plural(predictor, "evaluation")}${refiner > 0 ? `, and ${refiner} of the refiner` : ""}`;
}

/** What there is to know about a drawing: a table of its schedule and times. */
export function factsOf(entry) {
  const rows = timesOf(entry);
  const bar = element("div", { className: "times", ariaHidden: "true" });
  for (const { kind, name, milliseconds } of rows) {
    const part = element("span", { className: `part ${kind}`, title: `${name}: ${duration(milliseconds)}` });
    part.style.flexGrow = String(milliseconds);
    bar.append(part);
  }
  const list = element("dl");
  const add = (term, text, kind = null) => {
    const key = kind && element("span", { className: `key ${kind}`, ariaHidden: "true" });
    list.append(element("div", {}, element("dt", {}, key, term), element("dd", {}, text)));
  };
  for (const { kind, name, milliseconds } of rows) add(name, duration(milliseconds), kind);
  add("In all", duration(entry.timings.total));
  const warnings = (entry.warnings ?? []).map((text) => element("p", { className: "warning" }, text));
  const summary = `Schedule ${entry.blocks}: ${evaluationsOf(entry.evaluations)}, ${duration(entry.timings.total)}`;
  return [...warnings, element("details", {}, element("summary", {}, summary), bar, list)];
}

/** A place for a picture that is being drawn. */
export function slot(index, count, { width, height }) {
  const image = element("img", {
    alt: count > 1 ? `Picture ${index + 1} of ${count}, being drawn` : "The picture, being drawn",
    width,
    height,
  });
  // Nothing is shown, but its place is kept, until there is something.
  image.hidden = true;
  const frame = element("div", { className: "frame empty" }, image);
  frame.style.aspectRatio = `${width} / ${height}`;
  return { figure: element("figure", {}, frame), image, frame };
}

/** A picture that is done, with what can be done with it. */
export function card(entry, url, actions) {
  const { width, height } = entry.size;
  const image = element("img", { src: url, alt: entry.request.prompt || "A picture without a prompt", width, height });
  // Few pixels are shown as they are; smoothed they look out of focus.
  if (Math.max(width, height) <= 128) image.classList.add("coarse");
  const frame = element("div", { className: "frame" }, image);
  frame.style.aspectRatio = `${width} / ${height}`;
  const name = `${entry.request.prompt || "picture"}`.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60);
  const save = element("a", { className: "button", href: url, download: `${name}-${entry.seed}.png` }, "Save");
  const buttons = Object.entries(actions).map(([text, act]) =>
    element("button", { type: "button", onclick: () => act(entry) }, text),
  );
  const caption = element("figcaption", {}, `${width} × ${height}, seed ${entry.seed}`);
  return element("figure", {}, frame, caption, element("div", { className: "buttons" }, save, ...buttons));
}
