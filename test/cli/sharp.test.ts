// sharp, which is there but cannot be loaded: a command that would write a picture ends as its drawing begins.
import { existsSync } from "node:fs";
import path from "node:path";
import { Command } from "commander";
import { afterEach, expect, it, vi } from "vitest";
import { generateCommand } from "../../lib/cli/generate.js";
import { InstallationError } from "../../lib/errors.js";
import { sharp } from "../../lib/generation/sharp.js";
import { temporaryFolder } from "./support.js";

afterEach(() => vi.restoreAllMocks());

it("is said before the picture is drawn, and no file is left", async () => {
  const broken = new InstallationError("sharp", "sharp cannot be loaded: broken.", "Install it again.");
  const load = vi.spyOn(sharp, "load").mockRejectedValue(broken);
  vi.spyOn(sharp, "check").mockResolvedValue();
  const file = path.join(temporaryFolder(), "picture.png");
  const command = new Command("generate");
  generateCommand(command, new AbortController().signal);
  const flags = ["a", "--steps", "40", "--threads", "1", "--json", "--out", file];
  await expect(command.parseAsync(flags, { from: "user" })).rejects.toBe(broken);
  // Writing the picture would ask for it again.
  expect(load).toHaveBeenCalledTimes(1);
  expect(existsSync(file)).toBe(false);
});
