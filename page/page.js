/** The page: the form, what is being drawn, and what was drawn. */

import { Api, ApiError } from "./api.js";
import { card, duration, element, factsOf, plural, slot } from "./cards.js";
import { History, mostPictures } from "./history.js";
import { Cancelled, Job } from "./job.js";
import { MaskEditor, readPicture } from "./mask.js";

const $ = (id) => document.getElementById(id);
const narrow = matchMedia("(max-width: 700px)");
const still = matchMedia("(prefers-reduced-motion: reduce)");
/** Where the name of the job under way is kept, so that it is followed again after a reload. */
const jobStore = "flowturbo.job";

const api = new Api(askKey);
const history = new History();
let models = [];
/** The job under way, or null. */
let job = null;
/** Ids of the pictures that are shown large. */
let shown = [];

// ------------------------------------------------------------------ what is told

/** Tells people who do not see the page. The same text twice is told twice. */
function announce(text) {
  $("live").textContent = "";
  setTimeout(() => {
    $("live").textContent = text;
  }, 50);
}

/** Fields of the form by the names that errors have for them. */
const fieldOf = {
  prompt: "prompt",
  negative_prompt: "negative",
  model: "model",
  n: "count",
  size: "size",
  seed: "seed",
  guidance_scale: "guidance",
  num_inference_steps: "steps",
  blocks: "blocks",
  image: "file",
  strength: "strength",
};

function clearError() {
  $("alert").replaceChildren();
  for (const field of document.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
}

/** Shows an error until the next drawing. @param again what is offered besides, or null */
function showError(error, again = null) {
  // What is no answer of the server is a fault of this page.
  if (!(error instanceof ApiError)) console.error(error);
  const wait = error.retryAfterMs > 0 ? ` There will be room in about ${duration(error.retryAfterMs)}.` : "";
  const button = again && element("button", { type: "button", onclick: again }, "Try again");
  $("alert").replaceChildren(
    element("div", { className: "alert" }, element("p", {}, error.message + wait), button ?? ""),
  );
  const field = $(fieldOf[error.param] === "size" && $("size").value === "own" ? "width" : fieldOf[error.param]);
  if (!field) return;
  field.setAttribute("aria-invalid", "true");
  reveal(field);
  field.focus();
}

/** Opens what hides a field. */
function reveal(field) {
  for (let details = field.closest("details"); details; details = details.parentElement.closest("details"))
    details.open = true;
}

function bringIntoView(target) {
  target.scrollIntoView({ block: "start", behavior: still.matches ? "auto" : "smooth" });
}

// ------------------------------------------------------------------ the key

/** Asks for the key. Resolves with it, or with null. */
function askKey(message) {
  const dialog = $("key-dialog");
  $("key-message").textContent = message;
  $("key").value = "";
  dialog.showModal();
  return new Promise((resolve) => {
    let key = null;
    $("key-form").onsubmit = (event) => {
      event.preventDefault();
      key = $("key").value.trim();
      // Not the form's own method "dialog", so that no policy about forms applies.
      if (key !== "") dialog.close();
    };
    $("key-cancel").onclick = () => dialog.close();
    dialog.onclose = () => {
      $("key").value = "";
      resolve(key);
      $("change-key").hidden = key === null && !api.hasKey;
    };
  });
}

$("change-key").onclick = async () => {
  if (await api.askKey("Give another key in place of the one in use.")) await start();
};

// ------------------------------------------------------------------ the form

const model = () => models.find(({ id }) => id === $("model").value) ?? models[0];
const native = () => model().native_size.split("x").map(Number);
const nearest = (pixels) => Math.max(16, 16 * Math.round(pixels / 16));

/** The size that is chosen, in pixels. */
function chosenSize() {
  const text = $("size").value;
  const [width, height] =
    text === "own" ? [$("width").valueAsNumber, $("height").valueAsNumber] : text.split("x").map(Number);
  return { width, height };
}

/** Sizes to choose from: the model's own, others of its area, smaller and larger ones, and the picture's shape. */
function fillSizes() {
  const [width, height] = native();
  const { max_pixels } = model().limits;
  const scaled = (name, x, y) => ({ name, width: nearest(x), height: nearest(y) });
  const sizes = [
    { name: "native", width, height },
    scaled("landscape", width * Math.sqrt(3 / 2), height / Math.sqrt(3 / 2)),
    scaled("portrait", width / Math.sqrt(3 / 2), height * Math.sqrt(3 / 2)),
    scaled("half", width / 2, height / 2),
    scaled("one and a half", width * 1.5, height * 1.5),
    scaled("double", width * 2, height * 2),
    scaled("four times", width * 4, height * 4),
  ];
  const { picture } = editor;
  if (picture) {
    const ratio = Math.sqrt(picture.width / picture.height);
    sizes.push(scaled("the picture’s shape", Math.sqrt(width * height) * ratio, Math.sqrt(width * height) / ratio));
  }
  const before = $("size").value;
  const seen = new Set();
  const options = [];
  for (const size of sizes) {
    const value = `${size.width}x${size.height}`;
    if (seen.has(value) || (max_pixels && size.width * size.height > max_pixels)) continue;
    seen.add(value);
    options.push(element("option", { value }, `${size.width} × ${size.height}, ${size.name}`));
  }
  $("size").replaceChildren(...options, element("option", { value: "own" }, "Own size…"));
  if (seen.has(before) || before === "own") $("size").value = before;
  onSize();
}

function chooseSize(width, height) {
  $("size").value = `${width}x${height}`;
  if ($("size").value === "") {
    $("size").value = "own";
    $("width").value = width;
    $("height").value = height;
  }
  onSize();
}

function onSize() {
  const isOwn = $("size").value === "own";
  for (const [id, pixels] of [
    ["width", native()[0]],
    ["height", native()[1]],
  ]) {
    $(id).disabled = !isOwn;
    if (isOwn && $(id).value === "") $(id).value = pixels;
  }
  $("own-size").hidden = !isOwn;
  const { width, height } = chosenSize();
  if (width >= 8 && height >= 8 && width * height <= 1e8) editor.resize(width, height);
}

function fillModel() {
  const { limits } = model();
  $("count").max = Math.min(10, limits.max_images ?? 10);
  if (limits.max_steps) $("steps").max = limits.max_steps;
  fillSizes();
}

function onSchedule() {
  const isOwn = $("steps").value !== "" || $("blocks").value.trim() !== "";
  $("quality-hint").hidden = !isOwn;
  $("quality").classList.toggle("replaced", isOwn);
}

/** The request that the form says. */
function formRequest() {
  const { width, height } = chosenSize();
  const number = (id) => ($(id).value === "" ? {} : { value: $(id).valueAsNumber });
  const steps = number("steps").value;
  const blocks = $("blocks").value.trim();
  const quality = document.querySelector("input[name=quality]:checked").value;
  const mask = editor.picture && editor.maskUrl();
  const fields = {
    prompt: $("prompt").value,
    negative_prompt: $("negative").value || undefined,
    model: models.length > 1 ? model().id : undefined,
    n: $("count").valueAsNumber,
    size: `${width}x${height}`,
    seed: number("seed").value,
    guidance_scale: number("guidance").value,
    num_inference_steps: steps,
    blocks: blocks || undefined,
    quality: steps === undefined && blocks === "" ? quality : undefined,
    ...(editor.picture && { image: editor.pictureUrl(), strength: $("strength").valueAsNumber }),
    ...(mask && { mask }),
    output_format: "png",
    preview: "fast",
    partial_images: 100,
  };
  return Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== undefined));
}

/** Fills the form with a request. */
async function fillForm(request) {
  const text = (id, value) => {
    $(id).value = value ?? "";
  };
  text("prompt", request.prompt);
  text("negative", request.negative_prompt);
  text("seed", request.seed);
  text("guidance", request.guidance_scale);
  text("steps", request.num_inference_steps);
  text("blocks", request.blocks);
  text("count", request.n);
  if (models.some(({ id }) => id === request.model)) $("model").value = request.model;
  const quality = document.querySelector(`input[name=quality][value="${request.quality ?? "medium"}"]`);
  if (quality) quality.checked = true;
  const [width, height] = request.size.split("x").map(Number);
  fillModel();
  if (request.image) {
    await takePicture(await blobOf(request.image), { width, height });
    if (request.mask) editor.loadMask(await readPicture(await blobOf(request.mask)));
    $("strength").value = request.strength;
    onRanges();
  } else {
    removePicture();
    chooseSize(width, height);
  }
  onSchedule();
}

/** Bytes of base64, or of a data: URL, which fetch may not read here. */
function blobOf(text) {
  const bytes = Uint8Array.from(atob(text.slice(text.indexOf(",") + 1)), (character) => character.charCodeAt(0));
  return new Blob([bytes], { type: "image/png" });
}

$("form").addEventListener("invalid", ({ target }) => reveal(target), true);
$("form").onsubmit = (event) => {
  event.preventDefault();
  if (job === null && models.length > 0) void draw(formRequest());
};
$("form").onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
};
$("model").onchange = fillModel;
for (const id of ["size", "width", "height"]) $(id).onchange = onSize;
for (const id of ["steps", "blocks"]) $(id).oninput = onSchedule;
$("random").onclick = () => {
  $("seed").value = "";
  announce("The seed is random.");
};

// ------------------------------------------------------------------ the picture to start from

const editor = new MaskEditor({
  source: $("source"),
  mask: $("mask"),
  onChange() {
    if (!editor.picture) return;
    const painted = editor.painted();
    const percent = painted > 0 && painted < 0.01 ? "Less than 1" : Math.round(100 * painted);
    $("painted").textContent =
      painted === 0
        ? "Nothing is painted: the whole picture is drawn anew. Paint on it to draw only a part anew."
        : `${percent} % is painted, and drawn anew; the rest is kept.`;
  },
});

async function takePicture(blob, size = null) {
  try {
    editor.load(await readPicture(blob));
  } catch (error) {
    showError(new ApiError(error.message, { param: "image" }));
    return;
  }
  fillSizes();
  if (size) chooseSize(size.width, size.height);
  onSize();
  $("editor").hidden = false;
  $("edit").open = true;
}

function removePicture() {
  editor.load(null);
  $("file").value = "";
  $("editor").hidden = true;
  if (models.length > 0) fillSizes();
}

function onRanges() {
  $("strength-value").textContent = $("strength").valueAsNumber.toFixed(2);
  editor.brush = $("brush").valueAsNumber;
  $("brush-value").textContent = `${editor.brush} % of the shorter side`;
}

/** The first picture among files that were dropped or pasted. */
const pictureOf = (transfer) => [...(transfer?.files ?? [])].find(({ type }) => type.startsWith("image/"));

async function takeOwn(blob) {
  clearError();
  await takePicture(blob);
  if (editor.picture) announce("The picture is taken.");
}

$("file").onchange = ({ target }) => target.files[0] && takeOwn(target.files[0]);
document.ondragover = (event) => {
  if (!event.dataTransfer?.types.includes("Files")) return;
  event.preventDefault();
  document.body.classList.add("dropping");
};
document.ondragleave = (event) => {
  if (event.relatedTarget === null) document.body.classList.remove("dropping");
};
document.ondrop = (event) => {
  document.body.classList.remove("dropping");
  if (!event.dataTransfer?.types.includes("Files")) return;
  // Otherwise the browser would leave the page for the file.
  event.preventDefault();
  const file = pictureOf(event.dataTransfer);
  if (file) void takeOwn(file);
  else showError(new ApiError("What was dropped is not a picture.", { param: "image" }));
};
document.onpaste = (event) => {
  const file = pictureOf(event.clipboardData);
  if (!file) return;
  event.preventDefault();
  void takeOwn(file);
};
for (const input of document.querySelectorAll("input[name=tool]"))
  input.onchange = () => {
    editor.tool = input.value;
    $("rect-apply").textContent = input.value === "erase" ? "Erase the rectangle" : "Paint the rectangle";
  };
for (const id of ["strength", "brush"]) $(id).oninput = onRanges;
$("paint-all").onclick = () => editor.paintAll();
$("clear-mask").onclick = () => editor.clear();
$("rect-apply").onclick = () => {
  const fields = ["rect-x", "rect-y", "rect-w", "rect-h"].map($);
  if (fields.every((field) => field.reportValidity()))
    editor.rectangle(...fields.map((field) => field.valueAsNumber || 0));
};
$("remove").onclick = () => {
  removePicture();
  $("file").focus();
};

// ------------------------------------------------------------------ drawing

/** What is shown of a job: text, bar, slots. It gets the events of Job. */
class Progress {
  #request;
  #size;
  #slots = [];
  #now = "Asking the server";
  #due = null;
  #lost = false;
  #told = 0;
  #timer;

  constructor(request) {
    this.#request = request;
    const [width, height] = request.size.split("x").map(Number);
    this.#size = { width, height };
    this.#place(request.n ?? 1);
    shown = [];
    markShown();
    $("facts").replaceChildren();
    $("empty").hidden = true;
    $("progress").hidden = false;
    $("bar").value = 0;
    // The text counts down.
    this.#timer = setInterval(() => this.#show(), 500);
    this.#show();
  }

  end() {
    clearInterval(this.#timer);
    $("progress").hidden = true;
  }

  on(event) {
    this.#lost = event.type === "lost";
    switch (event.type) {
      case "waiting":
        this.#now = `${event.message} There will be room in about ${duration(event.left)}; then it is tried once again`;
        if (this.#told === 0) announce(this.#now);
        this.#told = Date.now();
        break;
      case "loading":
        this.#now = `${event.message} The drawing begins as soon as the server is ready`;
        announce(this.#now);
        break;
      case "job.queued":
      case "place":
        this.#now = event.place > 0 ? `Place ${event.place} in the queue` : "Begins";
        this.#due = typeof event.predicted_ms === "number" ? Date.now() + event.predicted_ms : null;
        if (event.place > 0) announce(`${this.#now}${this.#left()}`);
        break;
      case "job.started":
        this.#now = "Reading the prompt";
        announce(`Drawing${this.#left()}`);
        this.#told = Date.now();
        break;
      case "job.progress":
        this.#now = event.step < event.steps ? `Step ${event.step} of ${event.steps}` : "Decoding";
        $("bar").max = event.steps;
        $("bar").value = event.step;
        // Not each step: who listens would hear nothing else.
        if (Date.now() - this.#told > 5000) {
          announce(`${this.#now}${this.#left()}`);
          this.#told = Date.now();
        }
        break;
      case "job.partial_image":
        this.#picture(event);
        break;
    }
    this.#show();
  }

  #place(count) {
    this.#slots = Array.from({ length: count }, (_, index) => slot(index, count, this.#size));
    $("cards").replaceChildren(...this.#slots.map(({ figure }) => figure));
    $("cards").classList.toggle("several", count > 1);
  }

  #picture({ b64_json, image_index, output_format, step }) {
    const { image, frame } = this.#slots[image_index] ?? {};
    if (!image) return;
    image.src = `data:image/${output_format ?? "png"};base64,${b64_json}`;
    image.dataset.step = step;
    image.hidden = false;
    frame.classList.remove("empty");
  }

  #left() {
    const left = this.#due === null ? 0 : this.#due - Date.now();
    return left > 500 ? `, about ${duration(1000 * Math.ceil(left / 1000))} left` : "";
  }

  #show() {
    const text = this.#lost ? "The connection is lost; trying again" : this.#now + this.#left();
    if ($("status").textContent !== `${text}…`) $("status").textContent = `${text}…`;
  }

  get request() {
    return this.#request;
  }
}

/** Draws a request, or follows the job `id` that draws it. */
async function draw(request, id = null) {
  if (job !== null) return;
  clearError();
  const progress = new Progress(request);
  job = new Job(api, {
    onChange: (event) => progress.on(event),
    onId: (name) => keepJob({ id: name, request }),
  });
  $("cancel").hidden = false;
  $("draw").ariaDisabled = "true";
  if (narrow.matches) bringIntoView($("result"));
  try {
    finish(request, await (id === null ? job.draw(request) : job.follow(id)));
  } catch (error) {
    show(history.entries.slice(0, 1));
    if (error instanceof Cancelled) announce("The drawing is cancelled.");
    // A job from before a reload may be gone with the server.
    else if (id === null || error.status !== 404) showError(error, () => draw(request));
  } finally {
    progress.end();
    job = null;
    keepJob(null);
    $("draw").ariaDisabled = null;
    if (document.activeElement === $("cancel")) $("draw").focus();
    $("cancel").hidden = true;
    $("cancel").disabled = false;
  }
}

/** Keeps what is under way for a reload, as far as there is room. */
function keepJob(value) {
  try {
    if (value === null) sessionStorage.removeItem(jobStore);
    else sessionStorage.setItem(jobStore, JSON.stringify(value));
  } catch {
    sessionStorage.removeItem(jobStore);
  }
}

function finish(request, answer) {
  const [width, height] = answer.size.split("x").map(Number);
  const { seeds, blocks, evaluations, timings, warnings } = answer;
  const added = answer.data.map(({ b64_json }, index) =>
    history.add({
      ...{ blob: blobOf(b64_json), request, seed: seeds[index], size: { width, height } },
      ...{ blocks, evaluations, timings, warnings },
    }),
  );
  showHistory();
  show(added);
  announce(`${plural(added.length, "picture")} drawn in ${duration(timings.total)}.`);
}

$("cancel").onclick = async () => {
  // Twice does no harm, but says nothing either.
  $("cancel").disabled = true;
  $("draw").focus();
  try {
    await job?.cancel();
  } catch (error) {
    $("cancel").disabled = false;
    if (job !== null) showError(error);
  }
};

// ------------------------------------------------------------------ what was drawn

/** The request that draws one picture of the history again. */
const requestOf = ({ request, seed }) => ({ ...request, n: 1, seed });

const actions = {
  async "Again with this seed"(entry) {
    if (job !== null) return;
    await fillForm(requestOf(entry));
    await draw(requestOf(entry));
  },
  async "Use its settings"(entry) {
    await fillForm(requestOf(entry));
    bringIntoView($("form"));
    $("prompt").focus({ preventScroll: true });
    announce("The form has the settings of this picture.");
  },
  async Edit(entry) {
    await takePicture(entry.blob, entry.size);
    if (narrow.matches) bringIntoView($("edit"));
    $("edit").querySelector("summary").focus({ preventScroll: narrow.matches });
    announce("The picture is taken to start from.");
  },
};

/** Shows pictures of the history large. */
function show(entries) {
  shown = entries.map(({ id }) => id);
  $("cards").replaceChildren(...entries.map((entry) => card(entry, history.url(entry), actions)));
  $("cards").classList.toggle("several", entries.length > 1);
  $("facts").replaceChildren(...(entries.length > 0 ? factsOf(entries[0]) : []));
  $("empty").hidden = entries.length > 0;
  markShown();
}

function markShown() {
  for (const button of $("history").querySelectorAll("button"))
    button.ariaCurrent = shown.includes(Number(button.dataset.id)) ? "true" : null;
}

function showHistory() {
  const items = history.entries.map((entry) => {
    const image = element("img", {
      src: history.url(entry),
      alt: entry.request.prompt || "No prompt",
      loading: "lazy",
    });
    const onclick = () => {
      if (job !== null) return announce("A picture is being drawn.");
      show([entry]);
      if (narrow.matches) bringIntoView($("result"));
    };
    const seed = element("span", {}, `seed ${entry.seed}`);
    return element("li", {}, element("button", { type: "button", onclick, data: { id: entry.id } }, image, seed));
  });
  $("history").replaceChildren(...items);
  $("clear-history").hidden = items.length === 0;
  $("history-hint").textContent =
    items.length === 0
      ? "The pictures that you draw are kept in this browser."
      : `Kept in this browser, the last ${mostPictures} at most.`;
  markShown();
}

$("clear-history").onclick = () => {
  if (job !== null) return announce("A picture is being drawn.");
  history.clear();
  showHistory();
  show([]);
  $("prompt").focus();
  announce("The history is empty.");
};

// ------------------------------------------------------------------ the server

/** Asks for the models, and waits until the server has loaded them. */
async function start() {
  for (;;) {
    try {
      models = (await api.json("v1/models")).data;
      break;
    } catch (error) {
      if (error.status === 401) {
        $("model-line").textContent = "The server asks for a key.";
        $("change-key").hidden = false;
        return;
      }
      if (error.status !== 503 && error.status !== 0) {
        $("model-line").textContent = "The server cannot be used.";
        showError(error);
        return;
      }
      $("model-line").textContent = error.status === 503 ? "The model is loading…" : "The server does not answer…";
      await api.ready();
    }
  }
  const chosen = $("model").value;
  $("model").replaceChildren(...models.map(({ id }) => element("option", { value: id }, id)));
  if (models.some(({ id }) => id === chosen)) $("model").value = chosen;
  $("model-field").hidden = models.length < 2;
  $("model-line").textContent = models.map(({ id }) => id).join(", ");
  $("change-key").hidden = !api.hasKey;
  fillModel();
  $("draw").ariaDisabled = null;
  let kept = null;
  try {
    kept = JSON.parse(sessionStorage.getItem(jobStore));
  } catch {
    sessionStorage.removeItem(jobStore);
  }
  if (kept !== null) await draw(kept.request, kept.id);
}

$("draw").ariaDisabled = "true";
onRanges();
showHistory();
await Promise.all([
  history.open().then(() => {
    showHistory();
    if (job === null) show(history.entries.slice(0, 1));
  }),
  start(),
]);
