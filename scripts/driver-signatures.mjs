/**
 * Whether every function of the driver has the signature that native/core/cuda_driver.h says: the header is NVIDIA's
 * cuda.h, from the Python package nvidia-cuda-runtime (in .cache/, neither committed nor packed), and the check is a C++
 * file of static_asserts that is only compiled. A wrong parameter would corrupt memory in the one place where no
 * test on a simulated driver can notice it. Prints the number of functions; ends with 1 where one differs, with 3 where
 * there is no compiler or no header.
 *
 *   --core FOLDER   other sources than native/core, for the test of this check
 */

import { spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { parseArgs } from "node:util";
import { fetchedByPip } from "./fetched.mjs";
import { fail, lacking, root } from "./headers.mjs";

const version = "13.5.37";
const { values } = parseArgs({ options: { core: { type: "string", default: join(root, "native/core") } } });
const core = resolve(values.core);

// 1. Our table: members by the header, each with the symbol that the source looks up for it.
const members = [...readFileSync(join(core, "cuda_driver.h"), "utf8").matchAll(/^ {2}CudaResult \(\*(cu\w+)\)\(/gm)].map(
  ([, member]) => member,
);
const symbols = new Map(
  [...readFileSync(join(core, "cuda_driver.cpp"), "utf8").matchAll(/find\(table->(cu\w+), "(\w+)"\)/g)].map(
    ([, member, symbol]) => [member, symbol],
  ),
);
if (members.length === 0) fail(`${core} has no table of the driver's functions.`);
for (const member of members) if (!symbols.has(member)) fail(`${member} is in the table and is never looked up.`);
for (const member of symbols.keys()) if (!members.includes(member)) fail(`${member} is looked up and not in the table.`);

// 2. The check. NVIDIA's header renames functions by macros, so that our types are named before it is included.
const include = join(fetchedByPip(`cuda-runtime-${version}`, `nvidia-cuda-runtime==${version}`), "nvidia/cu13/include");
const source = `
#include "cuda_driver.h"
#include <type_traits>
${members.map((member) => `using Our_${member} = decltype(flowturbo::CudaDriver::${member});`).join("\n")}
// The functions under the names of their symbols, older versions among them.
#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>

// The same type; or an integer in place of an enumeration of its size.
template <typename Our, typename Their> constexpr bool same() {
  if constexpr (std::is_same_v<Our, Their>) return true;
  else if constexpr (std::is_pointer_v<Our> && std::is_pointer_v<Their>)
    return same<std::remove_pointer_t<Our>, std::remove_pointer_t<Their>>();
  else if constexpr (std::is_const_v<Our> != std::is_const_v<Their>) return false;
  else if constexpr (std::is_enum_v<Their> && std::is_integral_v<Our>) return sizeof(Our) == sizeof(Their);
  else return false;
}
template <typename Our, typename Their, typename = void> struct Agrees : std::false_type {};
template <typename Our, typename... Ours, typename Their, typename... Theirs>
struct Agrees<Our(Ours...), Their(Theirs...), std::enable_if_t<sizeof...(Ours) == sizeof...(Theirs)>>
    : std::bool_constant<same<Our, Their>() && (same<Ours, Theirs>() && ...)> {};

${members
  .map(
    (member) =>
      `static_assert(Agrees<std::remove_pointer_t<Our_${member}>, decltype(::${symbols.get(member)})>::value, "${member} differs from ${symbols.get(member)} in cuda.h");`,
  )
  .join("\n")}
`;
const work = mkdtempSync(join(tmpdir(), "flowturbo-signatures-"));
try {
  const file = join(work, "signatures.cpp");
  writeFileSync(file, source);
  const compiler = process.env.CXX ?? "c++";
  const { error, status, stderr } = spawnSync(
    compiler,
    ["-std=c++17", "-fsyntax-only", "-I", core, "-isystem", include, file],
    { encoding: "utf8" },
  );
  if (error) fail(`${compiler} is not on PATH.`, lacking);
  if (status !== 0) {
    const differences = stderr.split("\n").filter((line) => line.includes("static assertion failed"));
    const shown = differences.length > 0 ? differences.map((line) => line.replace(/^.*failed: /, "")) : [stderr];
    fail(`The table of the driver's functions is not as cuda.h ${version} declares them:\n${shown.join("\n")}`);
  }
  console.log(`${members.length} functions of the driver agree with cuda.h (CUDA runtime ${version}).`);
} finally {
  rmSync(work, { recursive: true, force: true });
}
