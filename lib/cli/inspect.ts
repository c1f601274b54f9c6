/** `flowturbo inspect`: what the file of a picture says of how it was drawn. */

import type { Command } from "commander";
import { type Inspection, inspect } from "../generation/parameters.js";
import { addJsonFlag, type CommonFlags } from "./flags.js";
import { print } from "./print.js";

export function inspectCommand(command: Command): void {
  command
    .description("Print the parameters that a picture's file holds.")
    .argument("<picture>", "a PNG, JPEG or WebP file");
  addJsonFlag(command);
  command
    .addHelpText(
      "after",
      `
Examples:
  $ flowturbo inspect flowturbo-7.png
  $ flowturbo inspect flowturbo-7.png --json`,
    )
    .action(async (file: string, flags: CommonFlags) => {
      const found = await inspect(file, "picture");
      print(flags.json, { file, ...found }, report(file, found));
    });
}

function report(file: string, { format, width, height, writer, parameters, texts }: Inspection): string {
  const picture = `${file}: ${format}, ${width} x ${height}`;
  if (parameters) {
    const by = typeof parameters.software === "string" ? parameters.software : "flowturbo";
    return [`${picture}, drawn by ${by}`, ...rows(parameters)].join("\n");
  }
  if (Object.keys(texts).length === 0) return `${picture}. The file holds no parameters.`;
  const by = writer
    ? `It was written by ${writer}, not by flowturbo`
    : "The file holds no parameters of flowturbo, but other texts";
  return [`${picture}. ${by}:`, ...rows(texts)].join("\n");
}

/** A line for each field, or several where its text has several. */
function rows(fields: Readonly<Record<string, unknown>>): string[] {
  const names = Object.keys(fields);
  const indent = 2 + Math.max(...names.map((name) => printable(name).length)) + 2;
  return names.map((name) => {
    const value = fields[name];
    const text = typeof value === "string" ? value : JSON.stringify(value);
    const lines = text.split(/\r?\n/).map(printable);
    return `  ${printable(name)}`.padEnd(indent) + lines.join(`\n${" ".repeat(indent)}`);
  });
}

/** A file may hold anything, and a terminal obeys some of it. */
function printable(text: string): string {
  return text.replace(/\p{C}/gu, (letter) =>
    // Joiners are part of pictographs and of words.
    /[\u200c\u200d]/.test(letter)
      ? letter
      : [...Array(letter.length).keys()]
          .map((i) => `\\u${letter.charCodeAt(i).toString(16).padStart(4, "0")}`)
          .join(""),
  );
}
