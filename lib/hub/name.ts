/**
 * Names of models on the Hugging Face hub: `owner/name`, with `@revision` (a branch, a tag, a commit, or a pull request as
 * `refs/pr/1`), or with the path of one .safetensors file in it. A name becomes part of paths in the cache, so it is held to
 * the hub's own rules, which leave no way out of a folder.
 */

export interface HubName {
  /** `owner/name` */
  readonly repository: string;
  /** Default: `main`. */
  readonly revision: string;
  /** A single-file checkpoint in the repository; null for the folder that the repository is. */
  readonly file: string | null;
}

/** How a name is written, for messages. */
export const nameForm = "owner/name, owner/name@revision or owner/name/file.safetensors";

const word = /^\w(?:[\w.-]{0,94}\w)?$/;
/** Ends of repositories of git, and of files that are not where their path says: neither is a model's name. */
const otherEnds = /\.(git|safetensors|gguf|ckpt|pth?|bin|onnx)$/i;
const revisionWord = /^[\w+#=-][\w.+#=-]*$/;

/** @returns null for a text that is no such name */
export function parseHubName(text: string): HubName | null {
  const [, name = "", revision = "main"] = text.match(/^([^@]+)(?:@(.+))?$/s) ?? [];
  const [owner = "", model = "", ...file] = name.split("/");
  const words = [owner, model];
  if (!words.every((each) => word.test(each) && !/--|\.\./.test(each)) || otherEnds.test(model)) return null;
  if (revision.includes("..") || !revision.split("/").every((each) => revisionWord.test(each))) return null;
  const path = file.join("/");
  if (file.length > 0 && !(path.endsWith(".safetensors") && isSafePath(path))) return null;
  return { repository: words.join("/"), revision, file: path === "" ? null : path };
}

/** The name as it is written. */
export function nameText({ repository, revision, file }: HubName): string {
  return `${repository}${file === null ? "" : `/${file}`}${revision === "main" ? "" : `@${revision}`}`;
}

/** Whether a path within a repository stays in whatever folder it is put in, on every system. */
export function isSafePath(path: string): boolean {
  // A backslash separates folders on Windows, and so does a drive's colon.
  // biome-ignore lint/suspicious/noControlCharactersInRegex: they are what is refused
  return path.split("/").every((each) => each !== "" && each !== "." && each !== ".." && !/[\\:\x00-\x1f]/.test(each));
}
