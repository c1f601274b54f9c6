/**
 * `npm run fetch:tensorrt-rtx`: TensorRT-RTX for the tests, from the Python package that NVIDIA publishes, into .cache/
 * (neither committed nor packed: its licence does not clearly allow that). Prints the folder with the libraries, for
 * FLOWTURBO_TENSORRT_RTX_DIR.
 */

import { join } from "node:path";
import { fetchedByPip } from "./fetched.mjs";

const version = "1.7.1.116";
console.log(join(fetchedByPip(`tensorrt-rtx-${version}`, `tensorrt-rtx-cu13-libs==${version}`), "tensorrt_rtx_libs"));
