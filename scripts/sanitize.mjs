/**
 * `npm run test:sanitize`: the native tests once more, against addons compiled with AddressSanitizer and UBSan. The
 * sanitizers' runtime has to come first in a process that was not compiled with it, hence LD_PRELOAD. Leaks are not
 * looked for: Node leaves most of its memory to the end of the process, and so does TensorRT. Without arguments the tests
 * that say most in a minute; `npm run test:sanitize -- -t .` runs all, which takes ten.
 */

import { execFileSync, spawnSync } from "node:child_process";
import path from "node:path";
import { fail, root } from "./headers.mjs";

const run = (args, env = {}) =>
  spawnSync(process.execPath, args, { cwd: root, stdio: "inherit", env: { ...process.env, ...env } }).status;

if (run([path.join(root, "scripts/build-native.mjs"), "--sanitize", "address,undefined"]) !== 0)
  fail("The addons could not be built with sanitizers.");
const library = (name) =>
  execFileSync(process.env.CXX ?? "c++", [`-print-file-name=${name}`], { encoding: "utf8" }).trim();
const chosen = process.argv.slice(2);
if (chosen.length === 0) chosen.push("-t", "^(an addon|finding the libraries|one engine|a cache folder|flowturbo compile process.exit)");
const status = run(
  [path.join(root, "node_modules/vitest/vitest.mjs"), "run", "test/native", "--reporter=default", ...chosen],
  {
    FLOWTURBO_ADDON_DIR: path.join(root, ".cache/native-sanitize"),
    LD_PRELOAD: ["libasan.so", "libubsan.so", "libstdc++.so.6"].map(library).join(" "),
    ASAN_OPTIONS: "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1",
    UBSAN_OPTIONS: "halt_on_error=1:print_stacktrace=1",
  },
);
process.exit(status ?? 1);
