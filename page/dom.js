/** What all parts of the page use to find, make and announce things. */

export const $ = (id) => document.getElementById(id);

/** Whether form and pictures are below each other. */
export const narrow = matchMedia("(max-width: 700px)");
const still = matchMedia("(prefers-reduced-motion: reduce)");

/** An element with properties and children; texts are never taken for markup. */
export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

export const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

/** Milliseconds for people. */
export function duration(milliseconds) {
  if (milliseconds < 1000) return `${Math.max(0, Math.round(milliseconds))} ms`;
  const seconds = milliseconds / 1000;
  if (seconds < 60) return `${Number(seconds.toFixed(seconds < 10 ? 1 : 0))} s`;
  return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
}

/** "64x64" in pixels. */
export function sizeOf(text) {
  const [width, height] = text.split("x").map(Number);
  return { width, height };
}

/** Bytes of base64, or of a data: URL, which fetch may not read here. */
export function blobOf(text) {
  const bytes = Uint8Array.from(atob(text.slice(text.indexOf(",") + 1)), (character) => character.charCodeAt(0));
  return new Blob([bytes], { type: "image/png" });
}

/** Tells people who do not see the page. The same text twice is told twice. */
export function announce(text) {
  $("live").textContent = "";
  setTimeout(() => {
    $("live").textContent = text;
  }, 50);
}

/** Opens what hides a field. */
export function reveal(field) {
  for (let outer = field.closest("details"); outer; outer = outer.parentElement.closest("details")) outer.open = true;
}

export function bringIntoView(target) {
  target.scrollIntoView({ block: "start", behavior: still.matches ? "auto" : "smooth" });
}
