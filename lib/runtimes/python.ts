/**
 * Where packages of the `python3` on PATH are. NVIDIA's libraries are published as Python packages, which is the shortest
 * way to install them; this asks where they went, and imports none of them.
 */

import { execFile } from "node:child_process";
import { promisify } from "node:util";

/** Without the working folder in the search path: a folder of that name there must not be loaded as native code. */
const script = `
import sys, json, importlib.util
sys.path = [entry for entry in sys.path if entry not in ("", ".")]
def folders(name):
    spec = importlib.util.find_spec(name)
    return list(spec.submodule_search_locations or []) if spec else []
print(json.dumps({name: folders(name) for name in sys.argv[1:]}))
`;

/**
 * The folders of packages by their import names, of one name several where parts of it were installed separately; empty
 * for a package that is not installed.
 * @throws Error with the reason why python3 cannot say
 */
export async function pythonFolders<Name extends string>(
  ...modules: readonly Name[]
): Promise<Readonly<Record<Name, readonly string[]>>> {
  try {
    const { stdout } = await promisify(execFile)("python3", ["-c", script, ...modules], { timeout: 20_000 });
    return JSON.parse(stdout);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") throw new Error("python3 is not on PATH");
    throw new Error(`python3 failed: ${(error as Error).message.split("\n")[0]}`);
  }
}
