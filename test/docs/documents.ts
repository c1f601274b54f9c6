/** The documents that a reader of the project opens, whose samples, commands and links the tests of this folder check. */

import { readdirSync, readFileSync } from "node:fs";
import path from "node:path";
import { root } from "../support/fixtures.js";

export const read = (file: string) => readFileSync(path.join(root, file), "utf8");

const guides = readdirSync(path.join(root, "docs/guides")).map((guide) => `docs/guides/${guide}`);

export const documents = [
  ...[
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "training/README.md",
    "models/shapes/README.md",
  ],
  ...guides,
];
