/** What a request will launch, known before its texts are read: a runtime can compile that while the rest is prepared. */

import type { Request } from "./request.js";
import type { Templates } from "./templates.js";
import type { PromptEncoder } from "./text.js";

/**
 * Names of the graphs that a request surely launches, in the order of their first launches. Those that depend on pictures
 * (an edit's) or on a time limit are left out, and those that read weighted texts a second time.
 */
export function graphsAhead(
  request: Request,
  { text, templates }: { readonly text: PromptEncoder; readonly templates: Templates },
): readonly string[] {
  const { texts, edit, candidates, sequenceLength } = request;
  const [{ stages }] = candidates;
  const prompts = texts ? [...texts.prompts, ...texts.negativePrompts] : [];
  const steps = edit || candidates.length > 1 ? [] : templates.sampling(request, stages, null).program.instructions;
  const launched = steps.flatMap((instruction) => (instruction.op === "launch" ? [instruction.graph] : []));
  return [...new Set([...text.graphsOf(prompts, sequenceLength), ...launched])];
}
