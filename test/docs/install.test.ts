// What the documents say about installing, as far as a text can be checked without Docker and other package managers.
import { readFileSync } from "node:fs";
import path from "node:path";
import { describe, expect, it } from "vitest";
import { root } from "../support/fixtures.js";

const read = (file: string) => readFileSync(path.join(root, file), "utf8");

describe("examples/Dockerfile", () => {
  const instructions = read("examples/Dockerfile")
    .replaceAll("\\\n", " ")
    .split("\n")
    .filter((line) => line !== "" && !line.startsWith("#"));
  const at = (pattern: RegExp) => instructions.findIndex((line) => pattern.test(line));

  it("installs without the download, prunes in the same stage, and runs as a user without rights", () => {
    const [install, prune, final, copy, user, command] = [
      at(/^RUN ONNXRUNTIME_NODE_INSTALL=skip npm ci --omit=dev$/),
      at(/^RUN npx --no flowturbo prune$/),
      at(/^FROM [^ ]+$/),
      at(/^COPY --from=install \/app\/node_modules /),
      at(/^USER node$/),
      at(/^CMD /),
    ];
    const order = [at(/^FROM \S+ AS install$/), install, prune, final, copy, user, command];
    expect(order).not.toContain(-1);
    expect(order).toEqual([...order].sort((a, b) => a! - b!));
    // No binaries for musl.
    for (const line of instructions.filter((each) => each.startsWith("FROM")))
      expect(line).toMatch(/^FROM node:\d+-slim/);
  });

  it("publishes a port that the service listens on, on all interfaces of the container, and asks for its health", () => {
    const port = instructions[at(/^EXPOSE /)]!.match(/^EXPOSE (\d+)$/)![1]!;
    const command: string[] = JSON.parse(instructions[at(/^CMD /)]!.slice(4));
    expect(command).toEqual(["node", "server.js", "--host", "0.0.0.0", "--port", port]);
    const check = instructions[at(/^HEALTHCHECK /)]!;
    const [program, flag, code] = JSON.parse(check.slice(check.indexOf("["))) as string[];
    expect([program, flag]).toEqual(["node", "-e"]);
    expect(code).toContain(`127.0.0.1:${port}/health`);
    expect(() => new Function(code!)).not.toThrow();
    // The flags are those of the service.
    for (const name of ["host", "port"]) expect(read("examples/service.js")).toContain(`${name}: { type: "string"`);
  });

  it("keeps this machine's modules out of the image", () => {
    expect(read("examples/Dockerfile.dockerignore").split("\n")).toContain("node_modules");
  });
});

it("the README's quick start has the variable that keeps a download from failing, and pruning", () => {
  const start = read("README.md").match(/^## Quick start\n([\s\S]*?)^## /m)![1]!;
  expect(start).toContain("`ONNXRUNTIME_NODE_INSTALL=skip npm install flowturbo`");
  expect(start).toContain("`npx flowturbo prune`");
});

it("strict package managers are told of the one install script that there is among the dependencies", () => {
  const { packages } = JSON.parse(read("package-lock.json")) as { packages: Record<string, { dev?: boolean; hasInstallScript?: boolean }> }; // biome-ignore format: one line
  const withScript = Object.entries(packages)
    .filter(([name, { dev, hasInstallScript }]) => name !== "" && !dev && hasInstallScript)
    .map(([name]) => name.replace("node_modules/", ""));
  expect(withScript).toEqual(["onnxruntime-node"]);
  const readme = read("README.md");
  const guide = read("docs/guides/bundlers.md");
  for (const text of [readme, guide]) expect(text).toContain('"allowScripts": { "onnxruntime-node": false }');
  expect(guide).toContain("allowBuilds: { onnxruntime-node: false }");
  expect(guide).toContain("ignoredBuiltDependencies: [onnxruntime-node]");
});

it("every commit is tried with esbuild, webpack and Vite", () => {
  expect(read(".ci/run")).toMatch(/^if npm run --silent test:bundlers -- esbuild webpack vite; then/m);
});
