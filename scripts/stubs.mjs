/**
 * For the simulated TensorRT: a class for each of the builder's interfaces whose functions all report a violation, from the
 * headers that the addon is compiled with. The interfaces have some 250 functions, of which the addon calls 30; what
 * native/simulated/builder.cpp implements it overrides.
 */

import { existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";

/** Classes of NvInferImpl.h, without their V. */
const tables = ["HostMemory", "Tensor", "OptimizationProfile", "NetworkDefinition", "TimingCache", "BuilderConfig", "Builder"];

/** @param include folders of the headers */
export function writeStubs(include, folder) {
  const read = (name) => readFileSync(join(include.find((each) => existsSync(join(each, name))), name), "utf8");
  const text = [
    "// Written by scripts/stubs.mjs.",
    "#pragma once",
    "#include <NvInfer.h>",
    "#include <NvOnnxParser.h>",
    "#include <cstdlib>",
    '#include "machine.h"',
    "namespace nvinfer1 {",
    ...tables.map((name) =>
      stub(`${name}Stub`, `I${name}, public apiv::V${name}`, classBody(read("NvInferImpl.h"), `V${name}`), "mImpl = this;"),
    ),
    "}  // namespace nvinfer1",
    "namespace nvonnxparser {",
    stub("ParserStub", "IParser", classBody(read("NvOnnxParser.h"), "IParser")),
    "}  // namespace nvonnxparser",
    "",
  ].join("\n");
  mkdirSync(folder, { recursive: true });
  const file = join(folder, "builder_stubs.h");
  // Unchanged, it must not be compiled again.
  if (!existsSync(file) || readFileSync(file, "utf8") !== text) writeFileSync(file, text);
}

function classBody(header, name) {
  const bare = header.replaceAll(/\/\*[\s\S]*?\*\/|\/\/.*/g, "");
  const found = bare.match(new RegExp(`class (?:\\w+ )?${name}\\b[^;{]*\\{([\\s\\S]*?)\\n\\};`));
  if (!found) throw new Error(`The headers declare no class ${name}.`);
  return found[1];
}

function stub(name, bases, body, construct = "") {
  const functions = [...body.matchAll(/virtual\s+([^;{]*?)\s*\b(\w+)\(([^;{]*?)\)\s*(const)?\s*(noexcept)?\s*=\s*0\s*;/g)].map(
    ([, result, call, parameters, constant = "", noexcept = ""]) => {
      // No default arguments, and no names: none is used.
      const taken = parameters.replaceAll(/\s*=\s*[^,]+/g, "");
      const answer = result.trim() === "void" ? "" : /&$/.test(result.trim()) ? " std::abort();" : " return {};";
      return `  ${result.trim()} ${call}(${taken}) ${constant} ${noexcept} override { machine::violate("${call}");${answer} }`;
    },
  );
  return `class ${name} : public ${bases} {\n public:\n  ${name}() { ${construct} }\n${functions.join("\n")}\n};`;
}
