// Settings of threads: they are those that ONNX Runtime reads, and results do not depend on them.
import { spawnSync } from "node:child_process";
import { expect, it } from "vitest";
import { sessionOptions } from "../../lib/runtimes/onnxruntime/sessions.js";
import { root } from "../support/fixtures.js";

const env = { ...process.env, ORT_DISABLE_TELEMETRY: process.env.ORT_DISABLE_TELEMETRY || "1" };

/** What ONNX Runtime writes about session options that it reads, from a process of its own. */
function readingOf(options: object): string {
  const code = `
    const ort = require("onnxruntime-node");
    const options = { ...${JSON.stringify(options)}, logSeverityLevel: 0 };
    // No graph: the options are read before it.
    ort.InferenceSession.create(new Uint8Array([8, 10]), options).catch(() => {});`;
  return spawnSync(process.execPath, ["-e", code], { cwd: root, encoding: "utf8", env }).stderr;
}

it("threads that wait spin for 20 µs, by a setting that ONNX Runtime knows", () => {
  const options = sessionOptions({ root: "/", widening: "folded" }, { threads: 3 });
  const session = options.extra!.session as { intra_op: { spin_duration_us: string } };
  expect(options.intraOpNumThreads).toBe(3);
  expect(session.intra_op.spin_duration_us).toBe("20");
  expect(readingOf(options)).not.toMatch(/Invalid value/);
  session.intra_op.spin_duration_us = "soon";
  expect(readingOf(options)).toMatch(/Invalid value for session\.intra_op\.spin_duration_us: "soon"/);
});
