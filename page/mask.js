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

  /** @param onChange called when the painted part has changed */
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
      if (!mask.hasPointerCapture(event.pointerId)) return;
      // A quick stroke has more points than there are events.
      const points = event.getCoalescedEvents?.() ?? [];
      for (const point of points.length > 0 ? points : [event]) this.#stroke(point);
    });
    for (const name of ["pointerup", "pointercancel"]) mask.addEventListener(name, () => this.#onChange());
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
      canvas.width = width;
      canvas.height = height;
      this.#mask.drawImage(before, 0, 0, width, height);
      this.#source.canvas.width = width;
      this.#source.canvas.height = height;
    }
    const scale = Math.max(width / this.#picture.width, height / this.#picture.height);
    const [w, h] = [scale * this.#picture.width, scale * this.#picture.height];
    this.#source.fillStyle = "#fff";
    this.#source.fillRect(0, 0, width, height);
    this.#source.imageSmoothingQuality = "high";
    this.#source.drawImage(this.#picture, (width - w) / 2, (height - h) / 2, w, h);
    this.#onChange();
  }

  clear() {
    const { width, height } = this.size;
    this.#mask.clearRect(0, 0, width, height);
    this.#onChange();
  }

  /** Paints or erases, by the tool, a rectangle in pixels; all of it by default. */
  rectangle(x = 0, y = 0, width = this.size.width, height = this.size.height) {
    this.#prepare();
    this.#mask.fillRect(x, y, width, height);
    this.#onChange();
  }

  /** Paints all of it, whatever the tool. */
  paintAll() {
    const { tool } = this;
    this.tool = "paint";
    this.rectangle();
    this.tool = tool;
  }

  /** Takes a mask as it was sent. */
  loadMask(bitmap) {
    const { width, height } = this.size;
    this.tool = "paint";
    this.rectangle();
    this.#mask.globalCompositeOperation = "destination-out";
    this.#mask.drawImage(bitmap, 0, 0, width, height);
    this.#onChange();
  }

  /** The part of the pixels that is painted, from 0 to 1. */
  painted() {
    const { data } = this.#pixels();
    let count = 0;
    for (let index = 3; index < data.length; index += 4) if (data[index] > 127) count += 1;
    return (4 * count) / data.length;
  }

  /** The picture as a data: URL. */
  pictureUrl() {
    return this.#source.canvas.toDataURL("image/png");
  }

  /** The mask as a data: URL, transparent where it is painted; null if nothing is painted. */
  maskUrl() {
    if (this.painted() === 0) return null;
    const pixels = this.#pixels();
    const { data } = pixels;
    for (let index = 0; index < data.length; index += 4) {
      const isPainted = data[index + 3] > 127;
      data.fill(0, index, index + 3);
      data[index + 3] = isPainted ? 0 : 255;
    }
    const canvas = document.createElement("canvas");
    canvas.width = pixels.width;
    canvas.height = pixels.height;
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    return canvas.toDataURL("image/png");
  }

  #pixels() {
    const { width, height } = this.size;
    return this.#mask.getImageData(0, 0, width, height);
  }

  #prepare() {
    // Erasing needs an opaque colour as well. How strong it looks is for the style sheet.
    this.#mask.globalCompositeOperation = this.tool === "erase" ? "destination-out" : "source-over";
    this.#mask.fillStyle = this.#mask.strokeStyle = "#e5007d";
    this.#mask.lineCap = this.#mask.lineJoin = "round";
    this.#mask.lineWidth = (this.brush / 100) * Math.min(this.size.width, this.size.height);
  }

  #stroke({ clientX, clientY }) {
    const { width, height } = this.size;
    const box = this.#mask.canvas.getBoundingClientRect();
    const point = [((clientX - box.left) / box.width) * width, ((clientY - box.top) / box.height) * height];
    this.#prepare();
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
