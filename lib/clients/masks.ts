/**
 * Masks as other image services have them. With OpenAI the transparent parts are painted, with most others the white
 * ones; this library paints white, or opaque where there is transparency. A mask with transparent parts is read here in OpenAI's
 * way, any other by its colours: so either kind does what its maker meant.
 */

import { OptionError } from "../errors.js";
import { sharp } from "../generation/sharp.js";

/** A mask for `GenerateOptions.mask`: white is painted. @throws OptionError for what is no picture */
export async function whiteMask(option: "mask" | "controls", mask: Uint8Array): Promise<Uint8Array> {
  return reading(option, mask, async (open, isTransparent) =>
    isTransparent ? open().extractChannel("alpha").negate().png().toBuffer() : mask,
  );
}

/** A mask for the HTTP interface: a PNG whose transparent parts are painted. @throws OptionError for what is no picture */
export async function transparentMask(mask: Uint8Array): Promise<Uint8Array> {
  return reading("mask", mask, async (open, isTransparent) => {
    if (isTransparent) return open().png().toBuffer();
    const grey = open().removeAlpha().greyscale();
    const alpha = await grey.clone().negate().raw().toBuffer({ resolveWithObject: true });
    const { width, height, channels } = alpha.info;
    return grey.joinChannel(alpha.data, { raw: { width, height, channels } }).png().toBuffer();
  });
}

type Open = () => import("sharp").Sharp;

async function reading<T>(
  option: "mask" | "controls",
  mask: Uint8Array,
  work: (open: Open, isTransparent: boolean) => Promise<T>,
): Promise<T> {
  const read = await sharp.load();
  const open = () => read(mask, { limitInputPixels: 100e6, failOn: "warning" });
  try {
    const { hasAlpha } = await open().metadata();
    return await work(open, hasAlpha && !(await open().stats()).isOpaque);
  } catch (cause) {
    const [detail] = (cause as Error).message.split("\n");
    const expected = `Expected a picture for ${option === "mask" ? "mask" : "the mask of a control"} but the given one cannot be read`;
    throw new OptionError(option, `${expected}: ${detail}.`, { cause, publicMessage: `${expected}.` });
  }
}
