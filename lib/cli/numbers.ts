/** Numbers of flags that are no options of the library. */

import { OptionError } from "../errors.js";

/** @throws OptionError for what is no number from 0 to `most` */
export function number(option: string, text: string, most: number): number {
  const value = /^\d+(\.\d+)?$/.test(text) ? Number(text) : Number.NaN;
  if (!(value <= most))
    throw new OptionError(option, `Expected a number from 0 to ${most} for ${flag(option)} but received "${text}".`);
  return value;
}

/** @throws OptionError for what is no whole number from 0 to `most` */
export function whole(option: string, text: string, most: number): number {
  const value = number(option, text, most);
  if (!Number.isInteger(value))
    throw new OptionError(option, `Expected a whole number for ${flag(option)} but received "${text}".`);
  return value;
}

/** `maxQueue` → `--max-queue` */
function flag(option: string): string {
  return `--${option.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`)}`;
}
