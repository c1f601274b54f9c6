// npm runs `pre<name>` and `post<name>` around the script <name>, so a name that merely begins like that runs by accident.
import { readFileSync } from "node:fs";
import path from "node:path";
import { expect, it } from "vitest";
import { root } from "../support/fixtures.js";

const { scripts } = JSON.parse(readFileSync(path.join(root, "package.json"), "utf8"));
const names = Object.keys(scripts);

it("no script runs before or after another by its name alone", () => {
  const besides = names.filter((name) => names.includes(name.replace(/^(pre|post)/, "")) && /^(pre|post)/.test(name));
  expect(besides).toEqual([]);
});

it("of npm's own events only those of packing and of a clone's installation have a script", () => {
  const events =
    /^(pre|post)?(dependencies|install|uninstall|pack|prepare|publish|publishOnly|restart|shrinkwrap|start|stop|version)$/;
  // A script for installation would run on every user's machine.
  expect(names.filter((name) => events.test(name)).sort()).toEqual(["prepack", "prepare", "prepublishOnly"]);
});
