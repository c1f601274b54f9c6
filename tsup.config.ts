import { defineConfig } from "tsup";

// Three entry points, flat in dist/: the library, the command line and the process that runs the graphs. They find
// each other by relative URL, so none may move into a subfolder.
export default defineConfig({
  entry: {
    index: "lib/index.ts",
    cli: "lib/cli/main.ts",
    "onnxruntime-host": "lib/runtimes/onnxruntime/host.ts",
  },
  format: "esm",
  target: "node20",
  dts: { entry: { index: "lib/index.ts" } },
  clean: true,
  splitting: true,
  sourcemap: false,
  silent: true,
});
