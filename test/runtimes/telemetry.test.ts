// ONNX Runtime reports its use to Microsoft unless it is told not to before it is loaded. The controls show that these
// tests could see it: they run in a network namespace without any network, and are skipped where there is no such thing.
import { execFile, spawnSync } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { promisify } from "node:util";
import { afterAll, describe, expect, it } from "vitest";
import { root } from "../support/fixtures.js";

const folder = mkdtempSync(path.join(os.tmpdir(), "flowturbo-telemetry-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const works = (command: string, ...args: string[]) => spawnSync(command, args, { stdio: "ignore" }).status === 0;
const offline = ["unshare", "--user", "--map-root-user", "--net"] as const;
const lacksOffline = works(offline[0], ...offline.slice(1), "true") ? null : "no network namespaces here";
const lacksTrace = works("strace", "-f", "-o", os.devNull, "true") ? null : "strace cannot be used here";
const skipped = (...reasons: (string | null)[]) => {
  const reason = reasons.find((each) => each !== null);
  return { skip: reason !== undefined, note: reason ? ` (skipped: ${reason})` : "" };
};

/** ONNX Runtime looks up its collector's address some nine seconds after it was loaded. */
const waitMs = 15_000;

const url = (file: string) => JSON.stringify(path.join(root, file));
const draw = (ms: number) => `
  import { FlowTurbo } from ${url("dist/index.js")};
  const model = await FlowTurbo.load(undefined, { measureCosts: false });
  await model.generate({ prompt: "a red circle", blocks: "E1", width: 32, height: 32 });
  await new Promise((resolve) => setTimeout(resolve, ${ms}));
  await model.dispose();`;
const bare = (ms: number) => `
  import ort from ${url("node_modules/onnxruntime-node/dist/index.js")};
  await ort.InferenceSession.create(${url("bench/shapes/features.onnx")});
  await new Promise((resolve) => setTimeout(resolve, ${ms}));`;

interface Run {
  /** Files below the home and the cache folder, but for flowturbo's own. */
  readonly files: readonly string[];
  /** Calls that would reach a network: connections and datagrams to internet addresses. */
  readonly calls: readonly string[];
}

let runs = 0;
/** Runs a module in a process whose home and cache folder are empty. */
async function run(
  code: string,
  variable: string | undefined,
  wrap: { trace?: boolean; offline?: boolean },
): Promise<Run> {
  const [home, cache] = ["home", "cache"].map((name) => path.join(folder, `${runs}`, name)) as [string, string];
  const trace = path.join(folder, `${runs++}.trace`);
  for (const each of [home, cache]) mkdirSync(each, { recursive: true });
  const command = [
    ...(wrap.offline ? offline : []),
    ...(wrap.trace ? ["strace", "-f", "-o", trace, "-e", "trace=connect,sendto,sendmsg,sendmmsg"] : []),
    ...[process.execPath, "--input-type=module", "--eval", code],
  ];
  await promisify(execFile)(command[0]!, command.slice(1), {
    cwd: folder,
    // Nothing of the variables here: where one says that this is a build server, ONNX Runtime is silent by itself.
    env: {
      PATH: process.env.PATH,
      HOME: home,
      XDG_CACHE_HOME: cache,
      ...(variable !== undefined && { ORT_DISABLE_TELEMETRY: variable }),
    },
  });
  const files = [home, cache].flatMap((each) => readdirSync(each, { recursive: true, encoding: "utf8" }));
  return {
    files: files.filter((file) => !file.startsWith("flowturbo")),
    calls: existsSync(trace)
      ? readFileSync(trace, "utf8")
          .split("\n")
          .filter((line) => /AF_INET|htons\(|systemd\.Resolve/.test(line))
      : [],
  };
}

describe("drawing a picture", () => {
  it("leaves no file of ONNX Runtime's telemetry", async () => {
    // An empty variable is none: the user has not asked for anything.
    for (const variable of [undefined, ""])
      expect((await run(draw(0), variable, {})).files.filter((file) => /Microsoft|onnxruntime/i.test(file))).toEqual(
        [],
      );
  });

  const offlineOnly = skipped(lacksOffline);
  it.skipIf(offlineOnly.skip)(`leaves them where the user has asked for it${offlineOnly.note}`, async () => {
    for (const code of [draw(0), bare(0)])
      expect((await run(code, "0", { offline: true })).files).toContain(
        "Microsoft/DeveloperTools/.onnxruntime/deviceid",
      );
    expect((await run(bare(0), undefined, { offline: true })).files.join()).toContain("Microsoft");
  });

  const traced = skipped(lacksTrace, lacksOffline);
  it.skipIf(traced.skip)(`reaches for no network${traced.note}`, async () => {
    const wrap = { trace: true, offline: true };
    const [ours, control] = await Promise.all([run(draw(waitMs), undefined, wrap), run(bare(waitMs), undefined, wrap)]);
    expect(ours.calls).toEqual([]);
    expect(control.calls.join("\n")).toMatch(/htons\(53\)|systemd\.Resolve/);
  });
});

/** A static import, import(), require() or createRequire(…)(); also in a text that becomes code. */
const loads = /^import (?!type)[^;]*"onnxruntime-node"|(?:import|require|\))\s*\(\\?["'`]onnxruntime-node\\?["'`]\)/m;

it("a file that loads ONNX Runtime is found however it does", () => {
  for (const text of [
    'import ort from "onnxruntime-node";',
    'import "onnxruntime-node";',
    'const ort = await import("onnxruntime-node");',
    'const ort = require("onnxruntime-node");',
    "const ort = require('onnxruntime-node');",
    'const ort = createRequire(import.meta.url)("onnxruntime-node");',
    '"const ort = require(\\"onnxruntime-node\\");"',
  ])
    expect(text).toMatch(loads);
  expect('import type { Tensor } from "onnxruntime-node";').not.toMatch(loads);
});

it("every file that loads ONNX Runtime into its own process turns telemetry off before", () => {
  const files = ["bench", "verify", "test", "lib", "scripts", "examples"].flatMap((name) =>
    readdirSync(path.join(root, name), { recursive: true, encoding: "utf8" }).map((file) => path.join(name, file)),
  );
  const loading = files.filter((file) => {
    if (!/\.(ts|mjs|js)$/.test(file) || /fixtures|site/.test(file)) return false;
    return loads.test(readFileSync(path.join(root, file), "utf8"));
  });
  // The environment of the host, which calls open-through.ts, is made by process.ts.
  const others = loading.filter(
    (file) =>
      ![
        "lib/runtimes/onnxruntime/host.ts",
        "lib/runtimes/onnxruntime/open-through.ts",
        "test/runtimes/telemetry.test.ts",
      ].includes(file),
  );
  expect(others).toContain("test/runtimes/threads.test.ts");
  expect(others.length).toBeGreaterThan(4);
  for (const file of others) {
    const text = readFileSync(path.join(root, file), "utf8");
    const off = text.search(
      /^import "\.\.?\/telemetry\.js";$|^process\.env\.ORT_DISABLE_TELEMETRY|ORT_DISABLE_TELEMETRY: process\.env\.ORT_DISABLE_TELEMETRY \|\|/m,
    );
    expect(off, file).toBeGreaterThan(-1);
    expect(off, file).toBeLessThan(text.search(loads));
  }
});
