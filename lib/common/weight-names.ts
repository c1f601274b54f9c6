/**
 * How files of weights are called in a part's folder, and which counts where several are there: the rule of diffusers and
 * transformers, for folders on disk and for listings of repositories.
 */

/** One file with all weights. @param variant of precision, such as "fp16"; null for the files without one */
export function weightFile(basename: string, variant: string | null): string {
  return variant === null ? `${basename}.safetensors` : `${basename}.${variant}.safetensors`;
}

/** Indexes of shards: the present spelling of transformers and diffusers first, then the two older ones. */
function indexNames(basename: string, variant: string | null): string[] {
  if (variant === null) return [`${basename}.safetensors.index.json`];
  return [
    `${basename}.safetensors.index.${variant}.json`,
    `${basename}.safetensors.${variant}.index.json`,
    `${basename}.${variant}.safetensors.index.json`,
  ];
}

/** Files that say where the weights are, the one that counts most first. */
export function weightSources(basename: string, variant: string | null): string[] {
  const single = weightFile(basename, variant);
  // diffusers looks for the oldest spelling of an index, which it wrote for a short time, behind the single file.
  const [index, older, oldest] = indexNames(basename, variant);
  const names =
    libraryOf(basename) === "transformers" ? [single, index, older, oldest] : [index, older, single, oldest];
  return names.filter((name) => name !== undefined);
}

/** The text encoders are models of transformers, the others of diffusers, and each calls its files in its own way. */
export function libraryOf(basename: string): "transformers" | "diffusers" {
  return basename === "model" ? "transformers" : "diffusers";
}

/** The variants among the names of a folder's files. */
export function variantsIn(names: Iterable<string>, basename: string): string[] {
  // The names of a variant "*", with what may stand there.
  const spellings = [weightFile(basename, "*"), ...indexNames(basename, "*")].map(
    (name) => new RegExp(`^${name.replaceAll(".", "\\.").replace("*", "([\\w-]+)")}$`),
  );
  const found = [...names].flatMap((name) => spellings.flatMap((spelling) => spelling.exec(name)?.[1] ?? []));
  // A shard of a variant, "fp16-00001-of-00002", is no variant of its own.
  return [...new Set(found)].filter((variant) => !/-\d+-of-\d+$/.test(variant)).sort();
}

/** The file of TAESD's encoder beside its decoder's: taesd3_encoder.safetensors beside taesd3_decoder.safetensors. Null for other names. */
export function encoderBeside(decoder: string): string | null {
  const [, beginning, end] = /^(.*)decoder([^/\\]*\.safetensors)$/s.exec(decoder) ?? [];
  return beginning === undefined ? null : `${beginning}encoder${end}`;
}
