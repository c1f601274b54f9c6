/** What is shown of a drawing under way: a text, a bar, and each picture as it is now. */

import { $, announce, duration, element, sizeOf } from "./dom.js";

/** Milliseconds between two steps that are told to who does not see them; each one would drown everything else. */
const tellEvery = 5000;

export class Progress {
  #slots;
  #now = "Asking the server";
  /** When it is predicted to be done, or 0. */
  #due = 0;
  #told = 0;
  #timer;

  constructor({ n, size }) {
    this.#slots = Array.from({ length: n }, (_, index) => slot(index, n, sizeOf(size)));
    $("cards").replaceChildren(...this.#slots.map(({ frame }) => element("figure", {}, frame)));
    $("cards").classList.toggle("several", n > 1);
    $("facts").replaceChildren();
    $("empty").hidden = true;
    $("progress").hidden = false;
    $("bar").value = 0;
    // The time that is left counts down.
    this.#timer = setInterval(() => this.#show(), 500);
    this.#show();
  }

  end() {
    clearInterval(this.#timer);
    $("progress").hidden = true;
  }

  /** Shows what happened to a Job. */
  on(event) {
    const { type, message, place, step, steps } = event;
    if (type === "waiting")
      this.#say(
        `${message} There will be room in about ${duration(event.left)}; then it is tried once again`,
        tellEvery,
      );
    else if (type === "loading") this.#say(`${message} The drawing begins when the server is ready`);
    else if (type === "lost") this.#say("The connection is lost; trying again", tellEvery);
    else if (type === "job.queued") {
      this.#due = event.predicted_ms && Date.now() + event.predicted_ms;
      if (place > 0) this.#say(`Place ${place} in the queue`, tellEvery);
      else this.#now = "Begins";
    } else if (type === "job.started") this.#say("Reading the prompt");
    else if (type === "job.progress") {
      Object.assign($("bar"), { max: steps, value: step });
      this.#say(step < steps ? `Step ${step} of ${steps}` : "Decoding", tellEvery);
    } else if (type === "job.partial_image") this.#picture(event);
    this.#show();
  }

  #picture({ b64_json, image_index, output_format = "png", step }) {
    const { image } = this.#slots[image_index];
    image.src = `data:image/${output_format};base64,${b64_json}`;
    image.dataset.step = step;
    image.hidden = false;
  }

  #text() {
    const left = this.#due - Date.now();
    return left > 500 ? `${this.#now}, about ${duration(1000 * Math.ceil(left / 1000))} left` : this.#now;
  }

  /** Shows a text, and tells it if nothing was told for some milliseconds. */
  #say(text, interval = 0) {
    this.#now = text;
    if (Date.now() - this.#told < interval) return;
    this.#told = Date.now();
    announce(this.#text());
  }

  #show() {
    $("status").textContent = `${this.#text()}…`;
  }
}

/** A place for a picture: it is kept, empty, until there is something to show. */
function slot(index, count, { width, height }) {
  const alt = count > 1 ? `Picture ${index + 1} of ${count}, being drawn` : "The picture, being drawn";
  const image = element("img", { alt, hidden: true });
  const frame = element("div", { className: "frame" }, image);
  frame.style.aspectRatio = `${width} / ${height}`;
  return { image, frame };
}
