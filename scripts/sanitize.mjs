/**
 * `npm run test:sanitize`: the tests of the native code again, compiled with sanitizers.
 *
 * 1. The executor without Node (native/test/executor_test.cpp), against both header sets, and on the stand-in for TensorRT
 *    (driver_test.cpp): with AddressSanitizer, leaks included, and UBSan; then with ThreadSanitizer.
 * 2. The native tests through Node, with AddressSanitizer and UBSan. A process that was not compiled with them has to
 *    load their runtime first, hence LD_PRELOAD. Leaks are not checked: Node frees most of its memory only at the end of
 *    the process, and so does TensorRT.
 *
 * Without arguments the tests that cover most in little time (five minutes on two cores, builds included);
 * `npm run test:sanitize -- -t .` runs all, which takes a quarter of an hour.
 */

import { execFileSync, spawnSync } from "node:child_process";
import { existsSync, readdirSync, readFileSync } from "node:fs";
import path from "node:path";
import { fail, libraries, root } from "./headers.mjs";

const run = (command, args, env = {}, limits = {}) =>
  spawnSync(command, args, { cwd: root, stdio: "inherit", env: { ...process.env, ...env }, ...limits }).status;
// They take seconds: one that hangs has failed.
const executorLimits = { timeout: 20 * 60_000, killSignal: "SIGABRT" };
const folderOf = (sanitize) => path.join(root, ".cache", `native-sanitize-${sanitize.replaceAll(",", "-")}`);
const build = (sanitize, ...rest) => {
  if (run(process.execPath, [path.join(root, "scripts/build-native.mjs"), "--sanitize", sanitize, ...rest]) !== 0)
    fail(`The native code could not be built with ${sanitize} sanitizers.`);
};
const executor = (sanitize, env) => {
  for (const kind of libraries) {
    console.log(`The executor for ${kind}, -fsanitize=${sanitize}:`);
    if (run(path.join(folderOf(sanitize), "simulated", kind, "executor_test"), [], env, executorLimits) !== 0)
      fail(`The executor's test for ${kind} failed with ${sanitize} sanitizers.`);
  }
  const simulated = path.join(folderOf(sanitize), "simulated");
  if (!existsSync(path.join(simulated, "stand-in/formula.ptx"))) {
    if (process.env.FLOWTURBO_REQUIRE_NATIVE) fail("The stand-in's kernel could not be compiled.");
    console.log("The executor on the stand-in is skipped: its kernel could not be compiled.");
    return;
  }
  console.log(`The executor on the stand-in, -fsanitize=${sanitize}:`);
  const standIn = { LD_LIBRARY_PATH: simulated, ...env };
  if (run(path.join(simulated, "stand-in/executor_driver"), [], standIn, executorLimits) !== 0)
    fail(`The executor's test on the stand-in failed with ${sanitize} sanitizers.`);
};

const ubsan = { UBSAN_OPTIONS: "halt_on_error=1:print_stacktrace=1" };
build("thread", "--target", "executor_tests");
executor("thread", { TSAN_OPTIONS: "halt_on_error=1:second_deadlock_stack=1" });
build("address,undefined");
executor("address,undefined", { ASAN_OPTIONS: "detect_leaks=1:abort_on_error=1", ...ubsan });

const library = (name) =>
  execFileSync(process.env.CXX ?? "c++", [`-print-file-name=${name}`], { encoding: "utf8" }).trim();
const chosen = process.argv.slice(2);
if (chosen.length === 0) {
  const names = [
    ...[["an addon"], ["finding the libraries"], ["one engine"], ["a cache folder"], ["flowturbo compile", "process.exit"]],
    ["the simulated builder"],
    ...[["programs of a schedule"], ["on the simulated device"], ["the executor"], ["a process with a program"]],
    ["without a GPU"],
  ];
  // A name that no test has any more would silently select nothing.
  const folder = path.join(root, "test/native");
  const tests = readdirSync(folder).map((file) => readFileSync(path.join(folder, file), "utf8"));
  for (const part of names.flat())
    if (!tests.some((text) => text.includes(`"${part}`))) fail(`No test in test/native is called "${part}".`);
  // Every call of the driver fails once in the executor's own test, above.
  const without = "an error of every single call";
  if (!tests.some((text) => text.includes(without))) fail(`No test in test/native says "${without}".`);
  chosen.push("-t", `^(?!.*${without})(${names.map((parts) => parts.join(" ")).join("|")})`);
}
const status = run(
  process.execPath,
  [path.join(root, "node_modules/vitest/vitest.mjs"), "run", "test/native", "--reporter=default", ...chosen],
  {
    FLOWTURBO_ADDON_DIR: folderOf("address,undefined"),
    LD_PRELOAD: ["libasan.so", "libubsan.so", "libstdc++.so.6"].map(library).join(" "),
    ASAN_OPTIONS: "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1",
    ...ubsan,
  },
);
process.exit(status ?? 1);
