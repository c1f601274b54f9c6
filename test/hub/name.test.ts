/** Names of models, and what the environment says of the hub. */

import { mkdir, writeFile } from "node:fs/promises";
import { homedir } from "node:os";
import path from "node:path";
import { expect, test } from "vitest";
import { isSafePath, nameText, parseHubName } from "../../lib/hub/name.js";
import { readSettings } from "../../lib/hub/settings.js";
import { temporaryFolder } from "../checkpoint/folders.js";

const commit = "b940f670f0eda2d07fbb75229e779da1ad11eb80";

test.each([
  ["stabilityai/stable-diffusion-3.5-medium", "stabilityai/stable-diffusion-3.5-medium", "main", null],
  ["a/b@v1.0", "a/b", "v1.0", null],
  ["a/b@refs/pr/1", "a/b", "refs/pr/1", null],
  [`a/b@${commit}`, "a/b", commit, null],
  ["a/b/sd3.5_medium.safetensors", "a/b", "main", "sd3.5_medium.safetensors"],
  ["a/b/deep/x.safetensors@dev", "a/b", "dev", "deep/x.safetensors"],
])("%s is a name", (text, repository, revision, file) => {
  const name = parseHubName(text);
  expect(name).toEqual({ repository, revision, file });
  expect(nameText(name!)).toBe(text);
});

test.each([
  ...["", " ", "model", "/a/b", "./a/b", "../a", "a/..", "a//b", "a/b/", "a/b/c", "a/b/c.bin", "a/b/../c.safetensors"],
  ...[
    " a/b",
    "a/b ",
    "a b/c",
    "a/b\n",
    "a/b@",
    "a/b@ main",
    "a/b@../x",
    "a/b@/x",
    "a/b@x/",
    "a/b@x//y",
    "a/b@.x",
    "@main",
  ],
  ...[
    "a\\b/c",
    "C:\\a/b",
    "C:/a",
    "a/b.git",
    "models/sd3.safetensors",
    "models/sd3.Q8.gguf",
    "a--b/c",
    "a/b..c",
    "-a/b",
    "a/b-",
    "a/b@x\\y",
    "https://huggingface.co/a/b",
  ],
  ...[`a/${"b".repeat(97)}`, "a/b@x\0y", "~/b"],
])("%j is none", (text) => expect(parseHubName(text)).toBeNull());

test("a path that leaves its folder on any system is not safe", () => {
  for (const safe of ["a", "a/b.json", "a/..b", "ü/x y.txt"]) expect(isSafePath(safe), safe).toBe(true);
  for (const unsafe of [
    "",
    "/a",
    "a/",
    "a//b",
    ".",
    "..",
    "a/../b",
    "a/./b",
    "a\\b",
    "..\\a",
    "C:a",
    "a/C:\\b",
    "a\0b",
    "a\nb",
  ])
    expect(isSafePath(unsafe), JSON.stringify(unsafe)).toBe(false);
});

test("the cache and the token are where huggingface_hub has them", async () => {
  const of = async (env: Record<string, string>) => (await readSettings(env)).cache;
  const usual = path.join(homedir(), ".cache/huggingface");
  expect(await of({})).toBe(path.join(usual, "hub"));
  expect(await of({ XDG_CACHE_HOME: "/x" })).toBe("/x/huggingface/hub");
  expect(await of({ XDG_CACHE_HOME: "/x", HF_HOME: "/h" })).toBe("/h/hub");
  expect(await of({ HF_HOME: "~/h" })).toBe(path.join(homedir(), "h/hub"));
  expect(await of({ HF_HOME: "$PLACE/h", PLACE: "/p" })).toBe("/p/h/hub");
  expect(await of({ HF_HOME: "/h", HUGGINGFACE_HUB_CACHE: "/old" })).toBe("/old");
  expect(await of({ HF_HOME: "/h", HUGGINGFACE_HUB_CACHE: "/old", HF_HUB_CACHE: "/new" })).toBe("/new");

  const home = await temporaryFolder();
  const token = async (env: Record<string, string>) => (await readSettings({ HF_HOME: home, ...env })).token;
  expect(await token({})).toBeNull();
  await writeFile(path.join(home, "token"), "hf_file\n");
  expect(await token({})).toEqual({ value: "hf_file", from: path.join(home, "token") });
  expect(await token({ HUGGING_FACE_HUB_TOKEN: "hf_old" })).toEqual({
    value: "hf_old",
    from: "HUGGING_FACE_HUB_TOKEN",
  });
  expect(await token({ HUGGING_FACE_HUB_TOKEN: "hf_old", HF_TOKEN: " hf_new\r\n" })).toEqual({
    value: "hf_new",
    from: "HF_TOKEN",
  });
  await mkdir(path.join(home, "other"));
  await writeFile(path.join(home, "other/t"), "hf_other");
  expect((await token({ HF_TOKEN_PATH: path.join(home, "other/t") }))?.value).toBe("hf_other");
  await expect(token({ HF_TOKEN: "hf_ä" })).rejects.toMatchObject({ reason: "unauthorized" });
  await expect(token({ HF_TOKEN: "hf_a b" })).rejects.toThrow("HF_TOKEN");
});

test("the endpoint and offline mode are read as huggingface_hub reads them", async () => {
  const of = (env: Record<string, string>) => readSettings(env);
  expect((await of({})).endpoint).toBe("https://huggingface.co");
  expect((await of({ HF_ENDPOINT: "https://mirror.example/" })).endpoint).toBe("https://mirror.example");
  for (const wrong of ["mirror.example", "file:///x", "nothing at all"])
    await expect(of({ HF_ENDPOINT: wrong })).rejects.toThrow(wrong);
  for (const [env, offline] of [
    [{}, null],
    [{ HF_HUB_OFFLINE: "1" }, "HF_HUB_OFFLINE"],
    [{ HF_HUB_OFFLINE: "true" }, "HF_HUB_OFFLINE"],
    [{ HF_HUB_OFFLINE: "0" }, null],
    [{ TRANSFORMERS_OFFLINE: "yes" }, "TRANSFORMERS_OFFLINE"],
    // As there: the first that is set decides.
    [{ HF_HUB_OFFLINE: "0", TRANSFORMERS_OFFLINE: "1" }, null],
  ] as const)
    expect((await of(env)).offline).toBe(offline);
  expect((await of({ HF_HUB_DOWNLOAD_TIMEOUT: "30" })).timeoutMs).toBe(30_000);
  expect((await of({ HF_HUB_DOWNLOAD_TIMEOUT: "x" })).timeoutMs).toBe(10_000);
});
