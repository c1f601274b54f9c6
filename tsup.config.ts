import { copyFile, mkdir } from "node:fs/promises";
import path from "node:path";
import { pathToFileURL } from "node:url";
import { defineConfig, type Options } from "tsup";
import { tsImport } from "tsx/esm/api";

// schema.ts runs now, and its values are what is published: who imports them loads no zod and none of the tables.
const values: NonNullable<Options["esbuildPlugins"]>[number] = {
  name: "values of lib/schema.ts",
  setup(build) {
    build.onLoad({ filter: /[\\/]lib[\\/]schema\.ts$/ }, async ({ path }) => {
      const exported: Record<string, unknown> = await tsImport(pathToFileURL(path).href, import.meta.url);
      const lines = Object.entries(exported).map(([name, value]) => `export const ${name} = ${JSON.stringify(value)};`);
      return { contents: lines.join("\n"), loader: "js" };
    });
  },
};

// zod is in dist/: as a package its hundred files take a tenth of the time of a command that draws. Its licence is there, too.
const licence: typeof values = {
  name: "licence of zod",
  setup(build) {
    build.onEnd(async () => {
      const folder = build.initialOptions.outdir!;
      await mkdir(folder, { recursive: true });
      await copyFile("node_modules/zod/LICENSE", path.join(folder, "zod.LICENSE"));
    });
  },
};

// The entry points, flat in dist/: the library, its JSON Schemas, the server, the provider for the AI SDK, the fleet, the command line, the
// process that runs the graphs and the one that lists graphics adapters.
// They find each other by relative URL, so none may move into a subfolder.
export default defineConfig({
  entry: {
    index: "lib/index.ts",
    schema: "lib/schema.ts",
    server: "lib/server/index.ts",
    ai: "lib/ai.ts",
    fleet: "lib/fleet/index.ts",
    cli: "lib/cli/index.ts",
    "onnxruntime-host": "lib/runtimes/onnxruntime/host.ts",
    "adapters-probe": "lib/runtimes/onnxruntime/adapters-probe.ts",
  },
  format: "esm",
  target: "node20",
  dts: {
    entry: {
      ...{ index: "lib/index.ts", schema: "lib/schema.ts", server: "lib/server/index.ts", ai: "lib/ai.ts" },
      fleet: "lib/fleet/index.ts",
    },
  },
  esbuildPlugins: [values, licence],
  clean: true,
  splitting: true,
  noExternal: ["zod"],
  sourcemap: false,
  silent: true,
});
