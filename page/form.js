/** The form: its fields as a request and back, sizes to choose from, and the picture to start from. Fields are named as in a request. */

import { $, announce, blobOf, element, reveal, sizeOf } from "./dom.js";
import { MaskEditor, readPicture } from "./mask.js";

const form = $("form");
export const fields = form.elements;

/** Fields that are sent as they are, where they are not empty. */
const sent = "prompt negative_prompt model n seed guidance_scale num_inference_steps blocks quality strength";
const names = sent.split(" ");

let models = [];
let onPictureError;

const editor = new MaskEditor({
  source: $("source"),
  mask: $("mask"),
  onChange(painted) {
    const percent = painted > 0 && painted < 0.01 ? "Less than 1" : Math.round(100 * painted);
    $("painted").textContent =
      painted === 0
        ? "Nothing is painted: the whole picture is drawn anew. Paint on it to draw only a part anew."
        : `${percent} % is painted, and drawn anew; the rest is kept.`;
  },
});

/**
 * @param onDraw called when it is sent
 * @param onError called with an Error about a file, and the field
 */
export function startForm({ onDraw, onError }) {
  onPictureError = onError;
  form.addEventListener("invalid", ({ target }) => reveal(target), true);
  form.onsubmit = (event) => {
    event.preventDefault();
    onDraw();
  };
  form.onkeydown = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  };
  form.oninput = update;
  fields.model.onchange = () => useModel();
  for (const name of ["size", "width", "height"]) fields[name].onchange = resize;
  $("random").onclick = () => {
    fields.seed.value = "";
    announce("The seed is random.");
  };
  $("paint-all").onclick = () => editor.fill();
  $("clear-mask").onclick = () => editor.clear();
  $("rectangle").onclick = () => {
    const numbers = ["left", "top", "across", "down"].map((name) => fields[name]);
    if (numbers.every((field) => field.reportValidity()))
      editor.rectangle(...numbers.map((field) => field.valueAsNumber));
  };
  $("remove").onclick = () => {
    removePicture();
    fields.image.focus();
  };
  startPictures();
  update();
}

/** Fits what is shown to the fields. */
function update() {
  const isOwn = fields.num_inference_steps.value !== "" || fields.blocks.value !== "";
  $("quality-hint").hidden = !isOwn;
  $("by-quality").classList.toggle("replaced", isOwn);
  $("strength-now").textContent = fields.strength.valueAsNumber.toFixed(2);
  editor.brush = fields.brush.valueAsNumber;
  $("brush-now").textContent = `${editor.brush} % of the shorter side`;
  editor.tool = fields.tool.value;
  $("rectangle").textContent = editor.tool === "erase" ? "Erase the rectangle" : "Paint the rectangle";
}

// --- models and sizes

const model = () => models.find(({ id }) => id === fields.model.value) ?? models[0];

/** Takes the models that the server has. */
export function useModels(list) {
  models = list;
  const chosen = fields.model.value;
  fields.model.replaceChildren(...models.map(({ id }) => element("option", { value: id }, id)));
  if (models.some(({ id }) => id === chosen)) fields.model.value = chosen;
  $("model-field").hidden = models.length < 2;
  useModel();
}

function useModel() {
  const { max_images, max_steps } = model().limits;
  fields.n.max = Math.min(10, max_images);
  fields.num_inference_steps.max = max_steps;
  const number = { type: "number", min: -100, max: 100, step: "any", placeholder: "off" };
  const scaleOf = (name) => element("label", {}, `LoRA ${name} `, element("input", { ...number, title: name }));
  $("loras").replaceChildren(...model().loras.map(scaleOf));
  fillSizes();
}

/** A field for the scale of each LoRA of the model; its title is the name. */
const scales = () => [...$("loras").querySelectorAll("input")];

/** Sizes to choose from: the model's own, others of its area, smaller and larger ones, and the shape of the picture. */
function fillSizes() {
  const { width, height } = sizeOf(model().native_size);
  const { max_pixels } = model().limits;
  const nearest = (pixels) => Math.max(16, 16 * Math.round(pixels / 16));
  const wide = Math.sqrt(3 / 2);
  const sizes = [
    ["native", width, height],
    ["landscape", nearest(width * wide), nearest(height / wide)],
    ["portrait", nearest(width / wide), nearest(height * wide)],
    ...[0.5, 1.5, 2, 3, 4].map((factor) => [`× ${factor}`, nearest(factor * width), nearest(factor * height)]),
  ];
  if (editor.picture) {
    const side = Math.sqrt(width * height);
    const ratio = Math.sqrt(editor.picture.width / editor.picture.height);
    sizes.push(["the picture’s shape", nearest(side * ratio), nearest(side / ratio)]);
  }
  const before = fields.size.value;
  const options = new Map();
  for (const [name, w, h] of sizes) {
    const value = `${w}x${h}`;
    if (w * h <= max_pixels && !options.has(value))
      options.set(value, element("option", { value }, `${w} × ${h}, ${name}`));
  }
  fields.size.replaceChildren(...options.values(), element("option", { value: "own" }, "Own size…"));
  if (options.has(before) || before === "own") fields.size.value = before;
  resize();
}

function chooseSize({ width, height }) {
  fields.size.value = `${width}x${height}`;
  if (fields.size.value === "") {
    fields.size.value = "own";
    fields.width.value = width;
    fields.height.value = height;
  }
  resize();
}

/** The size that is chosen, in pixels. */
function chosenSize() {
  if (fields.size.value !== "own") return sizeOf(fields.size.value);
  return { width: fields.width.valueAsNumber, height: fields.height.valueAsNumber };
}

function resize() {
  const isOwn = fields.size.value === "own";
  $("own-size").hidden = $("own-size").disabled = !isOwn;
  const native = sizeOf(model().native_size);
  for (const name of ["width", "height"]) if (isOwn) fields[name].value ||= native[name];
  const { width, height } = chosenSize();
  // Others are refused when they are sent.
  if (width >= 8 && height >= 8 && width * height <= 1e8) editor.resize(width, height);
}

// --- requests

/** The request that the form says. */
export function formRequest() {
  const { width, height } = chosenSize();
  const request = { size: `${width}x${height}`, output_format: "png", preview: "fast", partial_images: 100 };
  for (const name of names) {
    const { value, type, valueAsNumber } = fields[name];
    if (value !== "") request[name] = type === "number" || type === "range" ? valueAsNumber : value;
    // A larger seed is exact as text only.
    if (name === "seed" && Number.isSafeInteger(Number(value)) && value !== "") request.seed = Number(value);
  }
  const loras = scales().flatMap(({ title: name, value }) => (value === "" ? [] : [{ name, scale: Number(value) }]));
  if (loras.length > 0) request.loras = loras;
  if (models.length < 2) delete request.model;
  if ("blocks" in request || "num_inference_steps" in request) delete request.quality;
  if (!editor.picture) delete request.strength;
  else Object.assign(request, editor.urls());
  return request;
}

/** Fills the form with a request. */
export async function fillForm(request) {
  form.reset();
  for (const name of names) if (name in request) fields[name].value = request[name];
  useModel();
  for (const field of scales()) field.value = request.loras?.find(({ name }) => name === field.title)?.scale ?? "";
  if (request.image) {
    await takePicture(blobOf(request.image), sizeOf(request.size));
    if (request.mask) editor.loadMask(await readPicture(blobOf(request.mask)));
  } else {
    removePicture();
    chooseSize(sizeOf(request.size));
  }
  update();
}

// --- the picture to start from

/** Takes a file as the picture to start from. @param size the size to draw, where it is known. Resolves with whether it could. */
export async function takePicture(blob, size = null) {
  try {
    editor.load(await readPicture(blob));
  } catch (error) {
    onPictureError(error, "image");
    return false;
  }
  if (models.length > 0) fillSizes();
  if (size) chooseSize(size);
  $("editor").hidden = $("editor").disabled = false;
  $("edit").open = true;
  announce("The picture is taken to start from.");
  return true;
}

function removePicture() {
  editor.load(null);
  fields.image.value = "";
  $("editor").hidden = $("editor").disabled = true;
  fillSizes();
}

/** Takes files that are chosen, dropped on the page, or pasted. */
function startPictures() {
  const take = async (event, { files }) => {
    if (files.length === 0) return;
    // Otherwise the browser would leave the page for the file.
    event.preventDefault();
    await takePicture([...files].find(({ type }) => type.startsWith("image/")) ?? files[0]);
  };
  fields.image.onchange = (event) => take(event, event.target);
  document.ondragover = (event) => {
    if (event.dataTransfer.types.includes("Files")) event.preventDefault();
  };
  document.ondrop = (event) => take(event, event.dataTransfer);
  document.onpaste = (event) => take(event, event.clipboardData);
}
