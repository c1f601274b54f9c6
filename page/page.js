/** The page: what is being drawn, what was drawn, errors, and the key. */

import { Api, ApiError } from "./api.js";
import { card, factsOf } from "./cards.js";
import { $, announce, blobOf, bringIntoView, duration, element, narrow, plural, reveal, sizeOf } from "./dom.js";
import { fields, fillForm, formRequest, startForm, takePicture, useModels } from "./form.js";
import { History, mostPictures } from "./history.js";
import { Cancelled, Job } from "./job.js";
import { Progress } from "./progress.js";

/** Where the job under way is kept, so that it is followed again after a reload. */
const jobStore = "flowturbo.job";

const api = new Api(askKey);
const history = new History();
/** The job under way, or null. */
let job = null;
/** Whether the server has told its models. */
let isReady = false;

// --- errors

function clearError() {
  $("alert").replaceChildren();
  for (const field of document.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
}

/** Shows an error until the next drawing. @param again called where the person wants to try again */
function showError(error, again = null) {
  const { message, param, status, retryAfterMs } = error;
  // What is no answer of the server is a fault of this page.
  if (!(error instanceof ApiError)) console.error(error);
  const wait = retryAfterMs > 0 ? ` There will be room in about ${duration(retryAfterMs)}.` : "";
  const box = element("div", { className: "alert" }, element("p", {}, message + wait));
  // What was wrong stays wrong.
  if (again && (status === 0 || status === 401 || status === 429 || status >= 500))
    box.append(element("button", { type: "button", onclick: again }, "Try again"));
  $("alert").replaceChildren(box);
  const field = param === "size" && fields.size.value === "own" ? fields.width : fields[param];
  if (!(field instanceof HTMLElement)) return;
  field.ariaInvalid = "true";
  reveal(field);
  field.focus();
}

// --- the key

/** Asks for the key. Resolves with it, or with null. */
function askKey(message) {
  const dialog = $("key-dialog");
  $("key-message").textContent = message;
  dialog.showModal();
  return new Promise((resolve) => {
    let key = null;
    $("key-form").onsubmit = (event) => {
      event.preventDefault();
      key = $("key").value.trim() || null;
      dialog.close();
    };
    $("key-cancel").onclick = () => dialog.close();
    dialog.onclose = () => {
      $("key").value = "";
      resolve(key);
    };
  });
}

// --- drawing

/** Draws a request, or follows the job `id` that draws it. */
async function draw(request, id = null) {
  if (job !== null || !isReady) return;
  clearError();
  const progress = new Progress(request);
  markShown([]);
  job = new Job(api, {
    onChange: (event) => progress.on(event),
    onId: (name) => keepJob({ id: name, request }),
  });
  $("cancel").hidden = $("cancel").disabled = false;
  $("draw").ariaDisabled = "true";
  if (narrow.matches) bringIntoView($("result"));
  try {
    finish(request, await (id === null ? job.draw(request) : job.follow(id)));
  } catch (error) {
    show(history.entries.slice(0, 1));
    if (error instanceof Cancelled) announce("The drawing is cancelled.");
    // One from before a reload may be gone with the server.
    else if (id === null || error.status !== 404) showError(error, () => draw(request));
  } finally {
    progress.end();
    job = null;
    keepJob(null);
    $("draw").ariaDisabled = null;
    if (document.activeElement === $("cancel")) $("draw").focus();
    $("cancel").hidden = true;
  }
}

/** Keeps what is under way for a reload, as far as there is room. */
function keepJob(value) {
  sessionStorage.removeItem(jobStore);
  try {
    if (value !== null) sessionStorage.setItem(jobStore, JSON.stringify(value));
  } catch {}
}

function finish(request, { data, seeds, size, blocks, evaluations, timings, warnings }) {
  const facts = { request, size: sizeOf(size), blocks, evaluations, timings, warnings };
  const added = data.map(({ b64_json }, index) =>
    history.add({ ...facts, blob: blobOf(b64_json), seed: seeds[index] }),
  );
  showHistory();
  show(added);
  announce(`${plural(added.length, "picture")} drawn in ${duration(timings.total)}.`);
}

$("cancel").onclick = async () => {
  $("draw").focus();
  $("cancel").disabled = true;
  try {
    await job?.cancel();
  } catch (error) {
    $("cancel").disabled = false;
    if (job !== null) showError(error);
  }
};

// --- what was drawn

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
    fields.prompt.focus({ preventScroll: true });
    announce("The form has the settings of this picture.");
  },
  async Edit(entry) {
    if (!(await takePicture(entry.blob, entry.size))) return;
    bringIntoView($("edit"));
    $("edit").querySelector("summary").focus({ preventScroll: true });
  },
};

/** Shows pictures of the history large. */
function show(entries) {
  $("cards").replaceChildren(...entries.map((entry) => card(entry, history.url(entry), actions)));
  $("cards").classList.toggle("several", entries.length > 1);
  $("facts").replaceChildren(...entries.slice(0, 1).flatMap(factsOf));
  $("empty").hidden = entries.length > 0;
  markShown(entries);
}

function markShown(entries) {
  for (const [index, { firstChild }] of [...$("history").children].entries())
    firstChild.ariaCurrent = entries.includes(history.entries[index]) ? "true" : null;
}

function showHistory() {
  const items = history.entries.map((entry) => {
    const image = element("img", { src: history.url(entry), alt: entry.request.prompt });
    const onclick = () => {
      if (job !== null) return announce("A picture is being drawn.");
      show([entry]);
      if (narrow.matches) bringIntoView($("result"));
    };
    const button = element("button", { type: "button", onclick }, image, element("span", {}, `seed ${entry.seed}`));
    return element("li", {}, button);
  });
  $("history").replaceChildren(...items);
  $("clear-history").hidden = items.length === 0;
  $("history-hint").textContent = `Your last ${mostPictures} pictures are kept in this browser.`;
}

$("clear-history").onclick = () => {
  if (job !== null) return announce("A picture is being drawn.");
  history.clear();
  showHistory();
  show([]);
  fields.prompt.focus();
  announce("The history is empty.");
};

// --- the server

/** The models of the server, as soon as it has loaded them; null if it cannot be used. */
async function modelsOf() {
  for (;;) {
    try {
      const { data } = await api.json("v1/models");
      const loaded = data.filter((model) => model.native_size !== null);
      if (loaded.length > 0) return loaded;
      throw new ApiError("The model is loading.", { status: 503, retryAfterMs: 0 });
    } catch (error) {
      const isLoading = error.status === 503 && error.retryAfterMs !== null;
      if (!isLoading && error.status !== 0) {
        $("server").textContent = "The server cannot be used.";
        showError(error, start);
        return null;
      }
      $("server").textContent = isLoading ? "The model is loading…" : "The server does not answer…";
      await api.ready();
    }
  }
}

async function start() {
  const models = await modelsOf();
  if (models === null) return;
  clearError();
  useModels(models);
  $("server").textContent = models.map(({ id }) => id).join(", ");
  isReady = true;
  $("draw").ariaDisabled = null;
  const kept = JSON.parse(sessionStorage.getItem(jobStore));
  if (kept !== null) await draw(kept.request, kept.id);
}

startForm({
  onDraw: () => draw(formRequest()),
  onError: ({ message }, param) => showError(new ApiError(message, { param, status: 400 })),
});
showHistory();
await Promise.all([
  history.open().then(() => {
    showHistory();
    if (job === null) show(history.entries.slice(0, 1));
  }),
  start(),
]);
