// The documentation site: typedoc.json treats warnings as errors, such as a link that leads nowhere.
import { spawnSync } from "node:child_process";
import { existsSync, mkdtempSync, rmSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { expect, it } from "vitest";
import { root } from "../support/fixtures.js";

it("is made without a warning, with every guide", () => {
  const out = mkdtempSync(path.join(os.tmpdir(), "flowturbo-site-"));
  try {
    const typedoc = path.join(root, "node_modules/typedoc/bin/typedoc");
    const { status, stdout, stderr } = spawnSync(process.execPath, [typedoc, "--out", out], {
      cwd: root,
      encoding: "utf8",
    });
    expect(status, stdout + stderr).toBe(0);
    for (const page of ["Using_your_checkpoint", "Training_a_refiner", "Choosing_a_schedule", "Stages"])
      expect(existsSync(path.join(out, `documents/${page}.html`)), page).toBe(true);
    for (const page of [
      "Building_engines_ahead_of_time",
      "Serving_from_Node",
      "A_server",
      "Bundlers_and_small_installations",
      "A_fleet",
    ])
      expect(existsSync(path.join(out, `documents/${page}.html`)), page).toBe(true);
    // The entry points of the package.
    for (const page of [
      "classes/index.FlowTurbo",
      "variables/schema.requestJsonSchema",
      "functions/server.createServer",
      "functions/fleet.connectFleet",
    ])
      expect(existsSync(path.join(out, `${page}.html`)), page).toBe(true);
  } finally {
    rmSync(out, { recursive: true, force: true });
  }
}, 180_000);
