#!/usr/bin/env node
/**
 * The command line. What it needs is imported by its commands (main.ts), and a process for the runtime of one that draws is
 * started before that, so that it starts while they are read.
 */

import { startSpare } from "../runtimes/onnxruntime/spare.js";

const [command, ...flags] = process.argv.slice(2);
const runtimeIn = (flag: string, at: number) =>
  flag === "--runtime" ? [flags[at + 1]] : flag.startsWith("--runtime=") ? [flag.slice("--runtime=".length)] : [];
const runtime = flags.flatMap(runtimeIn).at(-1) ?? "auto";
const isHelp = flags.includes("--help") || flags.includes("-h");
if (command === "generate" && !isHelp && ["auto", "onnxruntime"].includes(runtime)) startSpare();

const { main } = await import("./main.js");
process.exitCode = await main();
