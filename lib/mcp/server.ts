/** A server of the Model Context Protocol, whose tools draw. It knows nothing of how it is reached, nor where the model is. */

import type { McpServer } from "@modelcontextprotocol/sdk/server/mcp.js";
import type { RequestHandlerExtra } from "@modelcontextprotocol/sdk/shared/protocol.js";
import type { CallToolResult, ServerNotification, ServerRequest } from "@modelcontextprotocol/sdk/types.js";
import type { Drawer, Drawn, DrawRequest, NamedControl } from "../clients/drawer.js";
import { RemoteError } from "../clients/remote.js";
import { onAbort } from "../common/abort.js";
import { packageVersion } from "../common/package.js";
import { messageOf } from "../common/text.js";
import { FlowTurboError, OptionError } from "../errors.js";
import type { AdapterNames, ImageFormat } from "../model.js";
import { checkSeeds } from "../options.js";
import type { OutputFolder } from "./outputs.js";
import { readPicture } from "./pictures.js";
import { mcpSdk } from "./sdk.js";
import { type ToolInput, type ToolOutput, toolOutput, toolSchemas } from "./tools.js";

export interface McpOptions {
  readonly drawer: Drawer;
  /** Name of the model, for descriptions. */
  readonly model: string;
  /** What it was loaded with; null where that is not known. */
  readonly adapters: AdapterNames | null;
  /** Where clients may have pictures written; null for nowhere. */
  readonly outputs: OutputFolder | null;
  /** Of pictures whose format nobody asked for. */
  readonly format: ImageFormat;
  /** Ends the work of all calls. */
  readonly signal: AbortSignal;
}

type Extra = RequestHandlerExtra<ServerRequest, ServerNotification>;

/** @throws InstallationError if the protocol's package is missing */
export async function createMcpServer(options: McpOptions): Promise<McpServer> {
  const { McpServer } = await mcpSdk.load();
  const server = new McpServer({ name: "flowturbo", title: "FlowTurbo", version: packageVersion() });
  const { outputs, model, adapters } = options;
  const schemas = toolSchemas(model, outputs !== null, adapters);
  for (const [name, { title, description, input }] of Object.entries(schemas)) {
    const annotations = { title, readOnlyHint: outputs === null, destructiveHint: false, openWorldHint: false };
    const config = { title, description, inputSchema: input, outputSchema: toolOutput, annotations };
    server.registerTool(name, config, (given: unknown, extra: Extra) => answer(given as ToolInput, extra, options));
  }
  return server;
}

async function answer(input: ToolInput, extra: Extra, options: McpOptions): Promise<CallToolResult> {
  const controller = new AbortController();
  const follow = (signal: AbortSignal) => onAbort(signal, () => controller.abort(signal.reason));
  const stops = [extra.signal, options.signal].map(follow);
  try {
    return await drawn(input, extra, options, controller.signal);
  } catch (error) {
    // Nobody waits for an answer.
    if (controller.signal.aborted) throw error;
    return { content: [{ type: "text", text: errorText(error) }], isError: true };
  } finally {
    for (const stop of stops) stop();
  }
}

async function drawn(
  input: ToolInput,
  extra: Extra,
  { drawer, outputs, format: preferred }: McpOptions,
  signal: AbortSignal,
): Promise<CallToolResult> {
  // 1. What can be wrong without a model.
  const place = input.save_to === undefined ? null : outputs!.place(input.save_to, input.output_format ?? preferred);
  const format = place?.format ?? input.output_format ?? preferred;
  const request = await requestOf(input, format);

  // 2. Draw.
  const token = extra._meta?.progressToken;
  const onStep = async (done: number, total: number) => {
    const message = `Step ${done} of ${total}`;
    const params = { progressToken: token!, progress: done, total, message };
    // Who does not listen any more still gets the picture, or cancels.
    await extra.sendNotification({ method: "notifications/progress", params }).catch(() => undefined);
  };
  const found = await drawer.draw(request, { signal, ...(token !== undefined && { onStep }) });

  // 3. Write and answer.
  const files = place ? await outputs!.write(place.pattern, bytesOf(found), found.seeds) : [];
  const summary = summaryOf(found, files);
  return {
    content: [
      ...found.pictures.map((picture) => ({
        ...{ type: "image" as const, mimeType: `image/${format}` },
        data: typeof picture === "string" ? picture : Buffer.from(picture).toString("base64"),
      })),
      { type: "text", text: JSON.stringify(summary) },
    ],
    structuredContent: summary,
  };
}

async function requestOf(input: ToolInput, format: ImageFormat): Promise<DrawRequest> {
  const [width, height] = input.size?.split("x").map(Number) ?? [];
  const { prompt, seed, seeds, quality, steps, sampler, blocks, strength, image, mask, count = 1 } = input;
  if (input.padding_mask_crop !== undefined && mask === undefined)
    throw new OptionError(
      "padding_mask_crop",
      "The field padding_mask_crop says what is drawn around a mask; give mask, or leave it out.",
    );
  checkSeeds({ seed, seeds }, count);
  return {
    ...{ prompt, seed, seeds, quality, steps, sampler, blocks, strength, width, height, format, count },
    ...{ negativePrompt: input.negative_prompt, guidanceScale: input.guidance_scale, deadlineMs: input.deadline_ms },
    ...{ prompt2: input.prompt_2, prompt3: input.prompt_3, clipSkip: input.clip_skip },
    ...{ negativePrompt2: input.negative_prompt_2, negativePrompt3: input.negative_prompt_3 },
    ...{ promptWeighting: input.prompt_weighting, maxSequenceLength: input.max_sequence_length },
    ...{ paddingMaskCrop: input.padding_mask_crop, skipLayers: input.skip_layers, loras: input.loras },
    ...(input.controls && { controls: await Promise.all(input.controls.map(readControl)) }),
    ...(image !== undefined && { image: await readPicture("image", image) }),
    ...(mask !== undefined && { mask: await readPicture("mask", mask) }),
  };
}

async function readControl(
  { image, mask, pixel_range: pixelRange, ...control }: NonNullable<ToolInput["controls"]>[number],
  index: number,
): Promise<NamedControl> {
  return {
    ...{ ...control, pixelRange, image: await readPicture(`controls[${index}].image`, image) },
    ...(mask !== undefined && { mask: await readPicture(`controls[${index}].mask`, mask) }),
  };
}

function bytesOf({ pictures }: Drawn): Uint8Array[] {
  return pictures.map((picture) => (typeof picture === "string" ? Buffer.from(picture, "base64") : picture));
}

function summaryOf(drawn: Drawn, files: string[]): ToolOutput & Record<string, unknown> {
  const { seeds, width, height, model, blocks, timings, warnings } = drawn;
  const { total, queue, encode, decode } = timings;
  const inSteps = timings.steps.reduce((sum, step) => sum + step, 0);
  const milliseconds = Object.entries({ total, queue, encode, steps: inSteps, decode });
  return {
    ...{ seeds: [...seeds], width, height, model, blocks, steps: timings.steps.length },
    milliseconds: Object.fromEntries(
      milliseconds.map(([name, spent]) => [name, Math.round(spent)]),
    ) as ToolOutput["milliseconds"],
    ...{ warnings: [...warnings], files },
  };
}

/** The message, which has the remedy, and when to try again where that helps. */
function errorText(error: unknown): string {
  const wait =
    error instanceof RemoteError
      ? Number(error.headers["retry-after-ms"] ?? Number.NaN)
      : error instanceof FlowTurboError
        ? ((error as { retryAfterMs?: number | null }).retryAfterMs ?? Number.NaN)
        : Number.NaN;
  return Number.isNaN(wait) ? messageOf(error) : `${messageOf(error)} Try again in ${Math.ceil(wait)} ms.`;
}
