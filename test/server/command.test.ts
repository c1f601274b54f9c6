// `flowturbo serve` as a process: what it refuses before it loads a model, and what it prints. How it ends is in faults.test.ts.
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { root } from "../support/fixtures.js";
import { post, quick } from "./support.js";

let folder: string;
const children: ChildProcess[] = [];
beforeAll(() => {
  folder = mkdtempSync(path.join(os.tmpdir(), "flowturbo-serve-"));
});
afterEach(async () => {
  for (const child of children.splice(0))
    if (child.exitCode === null && child.signalCode === null) {
      child.kill("SIGKILL");
      await once(child, "close");
    }
});
afterAll(() => rmSync(folder, { recursive: true }));

function serve(args: readonly string[], env: NodeJS.ProcessEnv = {}) {
  const child = spawn(process.execPath, [path.join(root, "bin/flowturbo.js"), "serve", "--port", "0", ...args], {
    stdio: ["ignore", "pipe", "pipe"],
    env: { ...process.env, FLOWTURBO_API_KEY: "", ...env },
  });
  children.push(child);
  const output = { stdout: "", stderr: "" };
  child.stdout!.on("data", (chunk) => (output.stdout += chunk));
  child.stderr!.on("data", (chunk) => (output.stderr += chunk));
  const ended = once(child, "close").then(([code]) => code as number | null);
  const address = async () => {
    await expect
      .poll(() => output.stdout + output.stderr, { timeout: 30_000, interval: 20 })
      .toMatch(/listening at http\S+/);
    return output.stdout.match(/listening at (http:\/\/[\w.:[\]]+)/)![1]!;
  };
  return { child, output, ended, address };
}

describe("refuses with code 2, and in one line,", () => {
  it.each([
    [["--host", "0.0.0.0"], "--api-key"],
    [["--host", "example.org"], "--insecure"],
    [["--port", "70000"], "65535"],
    [["--port", "x"], "--port"],
    [["--drain", "-1"], "--drain"],
    [["--max-steps", "0"], "--max-steps"],
    [["--max-size", "big"], "--max-size"],
    [["--max-queue", "x"], "--max-queue"],
    [["--warm", "64"], "--warm"],
    [["--deadline", "0"], "--deadline"],
    [["--log-level", "loud"], "--log-level"],
    [["--log-format", "xml"], "--log-format"],
    [["--api-key", "with space"], "--api-key"],
    [["--api-key-file", "/nowhere/keys"], "cannot be read"],
    [["--webhook-host", "example.org"], "FLOWTURBO_WEBHOOK_SECRET"],
    [["--model", "a=/x", "--model", "a=/y"], '"a"'],
    [["--runtime", "abacus"], "--runtime"],
  ])("%j", async (args, words) => {
    const { ended, output } = serve(args);
    expect(await ended).toBe(2);
    expect(output.stdout).toBe("");
    expect(output.stderr).toMatch(/^error: .*\n$/);
    expect(output.stderr).toContain(words);
  });

  it("a file without keys", async () => {
    const file = path.join(folder, "none.txt");
    writeFileSync(file, "\n \n");
    const { ended, output } = serve(["--api-key-file", file]);
    expect(await ended).toBe(2);
    expect(output.stderr).toContain("has none");
  });
});

it("ends with code 1 and the reason if a model cannot be loaded", async () => {
  const { ended, output } = serve(["--model", path.join(folder, "no-model")]);
  expect(await ended).toBe(1);
  expect(output.stderr).toContain("no-model");
});

it("says that the port is taken", async () => {
  const { address } = serve([]);
  const { port } = new URL(await address());
  const { ended, output } = serve(["--port", port]);
  expect(await ended).toBe(2);
  expect(output.stderr).toContain("choose another --port");
});

it("serves models under their names, for those who have a key, with a line of JSON for each answer", async () => {
  const file = path.join(folder, "keys.txt");
  writeFileSync(file, "first-key\nsecond-key\n");
  const shapes = path.join(root, "models/shapes");
  const args = [
    "--model",
    `named=${shapes}`,
    "--model",
    shapes,
    "--api-key-file",
    file,
    "--host",
    "0.0.0.0",
    "--warm",
    "64x64,128x64",
  ];
  const { address, child, ended, output } = serve([...args, "--max-images", "2", "--log-format", "json"], {
    FLOWTURBO_API_KEY: "third-key",
  });
  const url = (await address()).replace("0.0.0.0", "127.0.0.1");
  await expect.poll(async () => (await fetch(`${url}/readyz`)).status, { timeout: 60_000 }).toBe(200);
  const models = async (key: string) => fetch(`${url}/v1/models`, { headers: { authorization: `Bearer ${key}` } });
  for (const key of ["first-key", "second-key", "third-key"]) expect((await models(key)).status).toBe(200);
  expect((await models("no-key")).status).toBe(401);
  const { data } = (await (await models("first-key")).json()) as {
    data: { id: string; limits: { max_images: number } }[];
  };
  expect(data.map(({ id }) => id)).toEqual(["named", "shapes"]);
  expect(data[0]!.limits.max_images).toBe(2);
  const { body } = await post(
    `${url}/v1/images/generations`,
    { ...quick, model: "shapes" },
    { authorization: "Bearer first-key" },
  );
  expect(body.model).toBe("shapes");
  child.kill("SIGTERM");
  expect(await ended).toBe(0);
  const lines = output.stdout
    .trim()
    .split("\n")
    .map((line) => JSON.parse(line));
  expect(
    lines.some(
      ({ route, status, model }) => route === "/v1/images/generations" && status === 200 && model === "shapes",
    ),
  ).toBe(true);
  expect(output.stdout + output.stderr).not.toMatch(/first-key|third-key|red circle/);
});

it("writes text where people read it", async () => {
  const { address, child, ended, output } = serve(["--log-format", "text"]);
  const url = await address();
  await fetch(`${url}/v1/models`);
  await expect.poll(() => output.stdout).toMatch(/^\d\d:\d\d:\d\d GET \/v1\/models 200 \d+ ms/m);
  expect(output.stdout).toContain(`flowturbo is listening at ${url}`);
  child.kill("SIGINT");
  expect(await ended).toBe(0);
});
