/** Files that are given as pictures and that sharp's libvips does not decode, known by their first bytes: what they are, and what to do. */

interface FileKind {
  readonly is: (head: string) => boolean;
  /** Completes "it is …". */
  readonly name: string;
  readonly remedy: string;
}

/** Bytes that tell. */
export const headLength = 64;

const convert = "Convert it to JPEG, PNG or WebP.";
/** The brand of a file in boxes of the ISO base media format. */
const brand = (head: string) => (head.slice(4, 8) === "ftyp" ? head.slice(8, 12) : null);
const branded = (brands: RegExp) => (head: string) => brands.test(brand(head) ?? "");
const begins =
  (...beginnings: readonly string[]) =>
  (head: string) =>
    beginnings.some((beginning) => head.startsWith(beginning));
/** Of a file in HEIF that names no coding as its first brand, the others do. */
const lists = (brands: RegExp) => (head: string) =>
  branded(/^mi[af]1|^mif2|^msf1/)(head) && brands.test(head.slice(16));

const kinds: readonly FileKind[] = [
  {
    is: (head) => branded(/^avi[fs]/)(head) || lists(/avi[fs]/)(head),
    name: "an AVIF picture that the installed libvips cannot decode",
    remedy: convert,
  },
  {
    is: (head) => branded(/^(hei[cxms]|hev[cxms]|mi[af]1|mif2|msf1)/)(head),
    name: "a HEIC picture (HEVC in HEIF, as phones take them)",
    remedy:
      "Convert it to JPEG, PNG or WebP (on a phone: export it as JPEG, or set the camera to its most compatible format); a file that is only renamed stays HEIC.",
  },
  { is: branded(/^crx /), name: "a raw picture of a camera (CR3)", remedy: "Develop it to JPEG, PNG or WebP." },
  {
    is: (head) =>
      begins("FUJIFILMCCD-RAW", "IIU\0", "IIRO", "IIRS", "MMOR")(head) ||
      (begins("II*\0")(head) && head.slice(8, 10) === "CR"),
    name: "a raw picture of a camera",
    remedy: "Develop it to JPEG, PNG or WebP.",
  },
  {
    is: (head) =>
      brand(head) !== null || begins("\x1aE\xdf\xa3")(head) || (begins("RIFF")(head) && head.slice(8, 12) === "AVI "),
    name: "a video",
    remedy: "Give one frame of it as JPEG, PNG or WebP.",
  },
  { is: begins("\xff\x0a", "\0\0\0\x0cJXL "), name: "a JPEG XL picture", remedy: convert },
  { is: begins("\xff\x4f\xff\x51", "\0\0\0\x0cjP  "), name: "a JPEG 2000 picture", remedy: convert },
  { is: begins("%PDF-"), name: "a PDF document", remedy: "Give one page of it as JPEG, PNG or WebP." },
  { is: begins("8BPS"), name: "a Photoshop document", remedy: convert },
  { is: begins("BM"), name: "a BMP picture", remedy: convert },
  { is: begins("\0\0\x01\0"), name: "an ICO picture", remedy: convert },
  { is: (head) => /^\s*(<!doctype html|<html)/i.test(head), name: "an HTML page", remedy: "Give the picture itself." },
];

/** Of a file that could not be decoded: what it is and what to do; null if that is not known. @param head its first bytes */
export function undecodable(head: Uint8Array): { readonly name: string; readonly remedy: string } | null {
  const text = Buffer.from(head.subarray(0, headLength)).toString("latin1");
  return kinds.find(({ is }) => is(text)) ?? null;
}
