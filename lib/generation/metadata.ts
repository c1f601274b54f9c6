/**
 * Texts in the files of pictures: how parameters are written, and what any file says. Encoding is sharp's; done by hand are
 * the text chunk of PNG, which sharp cannot write and reads without its character set, and the reading of EXIF, which
 * sharp hands on as it is.
 */

import { inflateSync } from "node:zlib";

/** Bytes of EXIF that readers take: one APP1 segment of JPEG; libexif drops longer fields of WebP too. Less what goes with the text. */
const mostExif = 65_000;

/** Of the name of a program: it is in the parameters as well. */
const longestSoftware = 200;

/** Fields of EXIF for parameters. */
export function exifOf(parameters: Readonly<Record<string, unknown>>): Record<string, string> {
  const { software } = parameters;
  const named = typeof software === "string" && { Software: inAscii(software).slice(0, longestSoftware) };
  return { ImageDescription: fitted(parameters, mostExif - longestSoftware), ...named };
}

/**
 * Parameters as JSON in ASCII of at most `most` characters. Where they are longer, lists are left out until those that remain
 * take half of the room, the longest first; then texts are shortened, each by no more than is needed: negative
 * prompts first, then the longest. The field `truncated` names all that were.
 */
export function fitted(parameters: Readonly<Record<string, unknown>>, most: number): string {
  const whole = inAscii(JSON.stringify(parameters));
  if (whole.length <= most) return whole;
  const fields = { ...parameters };
  const truncated: string[] = [];
  const written = () => inAscii(JSON.stringify({ ...fields, truncated }));
  const fits = () => written().length <= most;
  const lengths = new Map(
    Object.entries(fields).map(([name, value]) => [name, inAscii(JSON.stringify(value) ?? "").length]),
  );
  const byLength = [...lengths.keys()].sort((a, b) => lengths.get(b)! - lengths.get(a)!);
  const isText = (name: string) => typeof fields[name] === "string";
  const isNegative = (name: string) => name.startsWith("negative");
  const [texts, lists] = [byLength.filter(isText), byLength.filter((name) => !isText(name))];
  let listed = lists.reduce((sum, name) => sum + lengths.get(name)!, 0);
  for (const name of lists) {
    if (listed <= most / 2) break;
    listed -= lengths.get(name)!;
    delete fields[name];
    truncated.push(name);
  }
  for (const name of [...texts.filter(isNegative), ...texts.filter((each) => !isNegative(each))]) {
    if (fits()) break;
    truncated.push(name);
    // Whole characters: half of a surrogate pair is none.
    const characters = [...(fields[name] as string)];
    const keep = (length: number) => {
      fields[name] = characters.slice(0, length).join("");
    };
    let [least, greatest] = [0, characters.length];
    while (least < greatest) {
      const length = Math.ceil((least + greatest) / 2);
      keep(length);
      if (fits()) least = length;
      else greatest = length - 1;
    }
    keep(least);
  }
  return written();
}

/** Every other character escaped: EXIF texts are ASCII, and libvips would replace what is not by what looks alike. */
function inAscii(json: string): string {
  return json.replace(/[^\x20-\x7e]/g, (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

const pngSignature = Buffer.from("\x89PNG\r\n\x1a\n", "latin1");

/** Inserts an iTXt chunk behind the header chunk of a PNG (RFC 2083 with the 1.2 extensions; UTF-8, uncompressed). */
export function withText(png: Buffer, keyword: string, text: string): Buffer {
  const headerEnd = pngSignature.length + 12 + 13;
  const body = Buffer.concat([
    Buffer.from("iTXt", "latin1"),
    Buffer.from(`${keyword}\0`, "latin1"),
    // No compression, no language, no translated keyword.
    Buffer.from([0, 0, 0, 0]),
    Buffer.from(text, "utf8"),
  ]);
  const chunk = Buffer.alloc(body.length + 8);
  chunk.writeUInt32BE(body.length - 4, 0);
  body.copy(chunk, 4);
  chunk.writeUInt32BE(crc32(body), body.length + 4);
  return Buffer.concat([png.subarray(0, headerEnd), chunk, png.subarray(headerEnd)]);
}

const crcTable = Uint32Array.from({ length: 256 }, (_, n) => {
  let c = n;
  for (let k = 0; k < 8; k++) c = c & 1 ? 0xedb88320 ^ (c >>> 1) : c >>> 1;
  return c;
});

/** As PNG wants it; node:zlib has one only from Node 20.15. */
function crc32(bytes: Uint8Array): number {
  let crc = 0xffffffff;
  for (const byte of bytes) crc = crcTable[(crc ^ byte) & 0xff]! ^ (crc >>> 8);
  return (crc ^ 0xffffffff) >>> 0;
}

/**
 * The texts of a file: the text chunks of a PNG by their keywords, and fields of EXIF by their names.
 * @param exif as sharp's metadata have it
 */
export function textsOf(file: Buffer, exif: Buffer | undefined): Map<string, string> {
  const texts = file.subarray(0, 8).equals(pngSignature) ? pngTexts(file) : new Map<string, string>();
  for (const [name, text] of exif ? exifTexts(exif) : []) if (!texts.has(name)) texts.set(name, text);
  return texts;
}

/** A text that is longer after inflating is not read. */
const longestText = 64 * 2 ** 20;

/** tEXt, zTXt and iTXt. What is damaged is left out. */
function pngTexts(png: Buffer): Map<string, string> {
  const texts = new Map<string, string>();
  for (let at = pngSignature.length; at + 12 <= png.length; ) {
    const length = png.readUInt32BE(at);
    const type = png.toString("latin1", at + 4, at + 8);
    const data = png.subarray(at + 8, at + 8 + length);
    at += 12 + length;
    const text = data.length === length && /^(tEXt|zTXt|iTXt)$/.test(type) ? pngText(type, data) : null;
    if (text) texts.set(...text);
    if (type === "IEND") break;
  }
  return texts;
}

function pngText(type: string, data: Buffer): [string, string] | null {
  const end = data.indexOf(0);
  if (end < 1) return null;
  const keyword = data.toString("latin1", 0, end);
  const inflated = (bytes: Buffer) => inflateSync(bytes, { maxOutputLength: longestText });
  try {
    if (type === "tEXt") return [keyword, data.toString("latin1", end + 1)];
    if (type === "zTXt") return [keyword, inflated(data.subarray(end + 2)).toString("latin1")];
    // Flag and method of the compression, language, translated keyword.
    const text = data.indexOf(0, data.indexOf(0, end + 3) + 1) + 1;
    if (text <= end + 3) return null;
    return [keyword, (data[end + 1] ? inflated(data.subarray(text)) : data.subarray(text)).toString("utf8")];
  } catch {
    return null;
  }
}

/** The fields of EXIF that hold texts which tools for pictures write. */
const exifNames: Readonly<Record<number, string>> = {
  270: "ImageDescription",
  271: "Make",
  272: "Model",
  305: "Software",
  37510: "UserComment",
};
const exifFolder = 0x8769;

/** Texts of the first directory, and of the one for EXIF that it names (TIFF 6.0, EXIF 2.3). */
function exifTexts(exif: Buffer): Map<string, string> {
  const tiff = exif.subarray(0, 4).equals(Buffer.from("Exif")) ? exif.subarray(6) : exif;
  const isLittle = tiff.toString("latin1", 0, 2) === "II";
  const u16 = (at: number) => (isLittle ? tiff.readUInt16LE(at) : tiff.readUInt16BE(at));
  const u32 = (at: number) => (isLittle ? tiff.readUInt32LE(at) : tiff.readUInt32BE(at));
  const texts = new Map<string, string>();
  const readFolder = (start: number, isFirst: boolean): void => {
    for (let i = 0; i < u16(start); i++) {
      const at = start + 2 + 12 * i;
      const [tag, length] = [u16(at), u32(at + 4)];
      if (tag === exifFolder && isFirst) readFolder(u32(at + 8), false);
      const name = exifNames[tag];
      // ASCII, bytes or undefined: one byte each.
      if (!name || ![1, 2, 7].includes(u16(at + 2))) continue;
      const value = length <= 4 ? at + 8 : u32(at + 8);
      const bytes = tiff.subarray(value, value + length);
      texts.set(name, name === "UserComment" ? comment(bytes) : ended(bytes.toString("utf8")));
    }
  };
  try {
    readFolder(u32(4), true);
  } catch (error) {
    // Of a directory that goes on past the end the entries before it are what there is.
    if (!(error instanceof RangeError)) throw error;
  }
  return texts;
}

/** Up to the zero that ends a text. */
const ended = (text: string) => text.replace(/\0[\s\S]*$/, "");

/** A UserComment: 8 bytes name its character set. */
function comment(bytes: Buffer): string {
  const text = bytes.subarray(8);
  if (bytes.toString("latin1", 0, 7) !== "UNICODE") return ended(text.toString("utf8"));
  // UTF-16 of either order: EXIF does not say which, and writers differ. In the wrong one a letter is no ASCII.
  const even = text.subarray(0, text.length & ~1);
  const [little, big] = [even.toString("utf16le"), Buffer.from(even).swap16().toString("utf16le")].map(ended);
  const ascii = (read: string) => read.replace(/[^\n -~]/g, "").length;
  return ascii(little!) > ascii(big!) ? little! : big!;
}
