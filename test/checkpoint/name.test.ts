// A checkpoint's name, which pictures and services show: never a path.
import path from "node:path";
import fc from "fast-check";
import { expect, it } from "vitest";
import { checkpointName } from "../../lib/checkpoint/index.js";

const hub = "/srv/cache/huggingface/hub/models--stabilityai--stable-diffusion-3.5-medium/snapshots/b940f670f0eda2d0";

it.each([
  ["/models/stable-diffusion-3.5-medium", "stable-diffusion-3.5-medium"],
  ["/models/stable-diffusion-3.5-medium///", "stable-diffusion-3.5-medium"],
  ["/models/a/..", "models"],
  ["/", "model"],
  ["//", "model"],
  [".", path.basename(process.cwd())],
  ["", path.basename(process.cwd())],
  [hub, "stable-diffusion-3.5-medium"],
  [`${hub}/`, "stable-diffusion-3.5-medium"],
  // Not the layout of that cache.
  ["/models/snapshots/one", "one"],
  ["/models--a--b/other/one", "one"],
])("%s is called %s", (folder, name) => {
  expect(checkpointName(folder)).toBe(name);
});

it("has no separator, and is never empty", () => {
  const part = fc.constantFrom("a", "..", ".", "snapshots", "models--", "models--x", "models--x--y", "");
  fc.assert(
    fc.property(fc.array(part, { maxLength: 6 }), fc.boolean(), (parts, isAbsolute) => {
      const name = checkpointName(`${isAbsolute ? "/" : ""}${parts.join("/")}`);
      expect(name).toMatch(/^[^/]+$/);
    }),
  );
});
