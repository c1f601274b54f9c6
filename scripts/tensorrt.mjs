/**
 * `npm run fetch:tensorrt`: TensorRT 11 for the tests, from Maven Central, into .cache/ (neither committed nor packed).
 * Prints the folder with the libraries, for FLOWTURBO_TENSORRT_DIR. It is a download of 556 MB and 930 MB on disk, so no
 * test fetches it: those that use it are skipped where it is not there.
 *
 *   --present   only says where it is; ends with 3 where it has not been fetched
 *
 * The archive holds the libraries and one builder resource, portable code for any GPU; the resources for single
 * GPUs, which NVIDIA's own packages have, are not in it. Plugins are not used by this package's engines and are left out.
 */

import { existsSync, mkdirSync, readdirSync, renameSync, rmSync } from "node:fs";
import { join } from "node:path";
import { fetched, quietly } from "./fetched.mjs";
import { fail, lacking, root } from "./headers.mjs";

const artifact = { group: "org.bytedeco", name: "tensorrt", version: "11.2-1.5.14", classifier: "linux-x86_64-redist" };
const plugin = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy";
const wanted = /^libnv(infer|onnxparser|infer_builder_resource.*)\.so\./;
const name = `tensorrt-${artifact.version}`;

if (process.argv.includes("--present") && !existsSync(join(root, ".cache", name)))
  fail("TensorRT 11 was not fetched; run `npm run fetch:tensorrt` (556 MB).", lacking);

console.log(
  fetched(name, "mvn", (folder) => {
    // 1. The archive, with a local repository of its own: the user's is not changed, and all of it is removed again.
    const work = join(folder, "maven");
    const { group, version, classifier } = artifact;
    quietly("mvn", [
      ...["--batch-mode", "--no-transfer-progress", "--quiet", plugin],
      `-Dartifact=${group}:${artifact.name}:${version}:jar:${classifier}`,
      `-DoutputDirectory=${work}`,
      `-Dmaven.repo.local=${join(work, "repository")}`,
    ]);
    const archive = join(work, `${artifact.name}-${version}-${classifier}.jar`);

    // 2. Its libraries, without the folders that they lie in.
    const unpacked = join(work, "unpacked");
    mkdirSync(unpacked);
    quietly("unzip", ["-q", "-j", archive, "*.so.*", "-d", unpacked]);
    for (const library of readdirSync(unpacked))
      if (wanted.test(library)) renameSync(join(unpacked, library), join(folder, library));
    rmSync(work, { recursive: true, force: true });
  }),
);
