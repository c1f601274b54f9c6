/**
 * The picture to start from, at the size asked for, and the mask that is painted on it. What is sent are PNGs of that size: the picture,
 * and the mask, transparent where it is painted.
 */

/** Reads any picture that the browser can, turned upright. @throws an Error for a person */
export async function readPicture(blob) {
  return createImageBitmap(blob, { imageOrientation: "from-image" }).catch(() => {
    throw new Error("This file is not a picture that the browser can read.");
  });
}

export class MaskEditor {
  #source;
  #mask;
  #onChange;
  #picture = null;
  #last = null;
  /** "paint" or "erase". */
  tool = "paint";
  /** Diameter of the brush, in percent of the shorter side. */
  brush = 15;

  /** @param onChange called with the part of the picture that is painted, from 0 to 1, when that has changed */
  constructor({ source, mask, onChange }) {
    this.#source = source.getContext("2d");
    this.#mask = mask.getContext("2d", { willReadFrequently: true });
    this.#onChange = onChange;
    mask.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      mask.setPointerCapture(event.pointerId);
      this.#last = null;
      this.#stroke(event);
    });
    mask.addEventListener("pointermove", (event) => {
      if (mask.hasPointerCapture(event.pointerId)) this.#stroke(event);
    });
    for (const name of ["pointerup", "pointercancel"]) mask.addEventListener(name, () => this.#changed());
  }

  /** The picture, or null. */
  get picture() {
    return this.#picture;
  }

  get size() {
    return { width: this.#mask.canvas.width, height: this.#mask.canvas.height };
  }

  /** Takes a picture (an ImageBitmap), with nothing painted; null takes none. */
  load(picture) {
    this.#picture?.close();
    this.#picture = picture;
    this.clear();
  }

  /** Brings picture and mask to a size in pixels: the picture is scaled and cropped to cover it, the mask is stretched. */
  resize(width, height) {
    if (this.#picture === null) return;
    const { canvas } = this.#mask;
    if (canvas.width !== width || canvas.height !== height) {
      const before = new OffscreenCanvas(canvas.width, canvas.height);
      before.getContext("2d").drawImage(canvas, 0, 0);
      for (const each of [canvas, this.#source.canvas]) Object.assign(each, { width, height });
      this.#mask.drawImage(before, 0, 0, width, height);
    }
    const scale = Math.max(width / this.#picture.width, height / this.#picture.height);
    const [w, h] = [scale * this.#picture.width, scale * this.#picture.height];
    this.#source.fillStyle = "#fff";
    this.#source.fillRect(0, 0, width, height);
    this.#source.imageSmoothingQuality = "high";
    this.#source.drawImage(this.#picture, (width - w) / 2, (height - h) / 2, w, h);
    this.#changed();
  }

  clear() {
    const { width, height } = this.size;
    this.#mask.clearRect(0, 0, width, height);
    this.#changed();
  }

  /** Paints or erases a rectangle in pixels. */
  rectangle(x, y, width, height, tool = this.tool) {
    this.#prepare(tool);
    this.#mask.fillRect(x, y, width, height);
    this.#changed();
  }

  /** Paints all of it, whatever the tool. */
  fill() {
    const { width, height } = this.size;
    this.rectangle(0, 0, width, height, "paint");
  }

  /** Takes a mask as it was sent. */
  loadMask(bitmap) {
    const { width, height } = this.size;
    this.fill();
    this.#prepare("erase");
    this.#mask.drawImage(bitmap, 0, 0, width, height);
    this.#changed();
  }

  /** What is sent, as data: URLs: the picture, and where something is painted the mask. */
  urls() {
    const image = this.#source.canvas.toDataURL("image/png");
    if (this.#painted() === 0) return { image };
    const canvas = Object.assign(document.createElement("canvas"), this.size);
    const context = canvas.getContext("2d");
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.globalCompositeOperation = "destination-out";
    context.drawImage(this.#mask.canvas, 0, 0);
    return { image, mask: canvas.toDataURL("image/png") };
  }

  #changed() {
    if (this.#picture !== null) this.#onChange(this.#painted());
  }

  /** The part of the pixels that is painted, from 0 to 1. */
  #painted() {
    const { width, height } = this.size;
    const { data } = this.#mask.getImageData(0, 0, width, height);
    let count = 0;
    for (let index = 3; index < data.length; index += 4) if (data[index] > 127) count += 1;
    return (4 * count) / data.length;
  }

  #prepare(tool) {
    // Erasing needs an opaque colour as well. How strong it looks is for the style sheet.
    this.#mask.globalCompositeOperation = tool === "erase" ? "destination-out" : "source-over";
    this.#mask.fillStyle = this.#mask.strokeStyle = "#e5007d";
    this.#mask.lineCap = this.#mask.lineJoin = "round";
    this.#mask.lineWidth = (this.brush / 100) * Math.min(this.size.width, this.size.height);
  }

  #stroke({ clientX, clientY }) {
    const { width, height } = this.size;
    const box = this.#mask.canvas.getBoundingClientRect();
    const point = [((clientX - box.left) / box.width) * width, ((clientY - box.top) / box.height) * height];
    this.#prepare(this.tool);
    this.#mask.beginPath();
    this.#mask.moveTo(...(this.#last ?? point));
    this.#mask.lineTo(...point);
    this.#mask.stroke();
    // A line of no length is a dot in some browsers only.
    this.#mask.beginPath();
    this.#mask.arc(...point, this.#mask.lineWidth / 2, 0, 2 * Math.PI);
    this.#mask.fill();
    this.#last = point;
  }
}
