/**
 * The parts of the AI SDK's specification (version 3, `ImageModelV3` and `ProviderV3` of @ai-sdk/provider) that a provider of
 * images implements, as types of this package's own: who draws through another package needs no further one, and with
 * strict package managers could not find it. A test holds them against the original.
 */

/** A value that JSON can hold. */
export type JsonValue = null | string | number | boolean | JsonValue[] | { [key: string]: JsonValue | undefined };

/** A picture that a call brings. */
export type ImageFile =
  | {
      type: "file";
      /** Such as `image/png`. */
      mediaType: string;
      /** Bytes, or base64. */
      data: string | Uint8Array;
      providerOptions?: Record<string, { [key: string]: JsonValue | undefined }>;
    }
  | { type: "url"; url: string; providerOptions?: Record<string, { [key: string]: JsonValue | undefined }> };

/** What `generateImage` asks of a model. */
export interface ImageCallOptions {
  prompt: string | undefined;
  n: number;
  size: `${number}x${number}` | undefined;
  aspectRatio: `${number}:${number}` | undefined;
  seed: number | undefined;
  /** Pictures to edit. */
  files: ImageFile[] | undefined;
  mask: ImageFile | undefined;
  /** By provider. */
  providerOptions: Record<string, { [key: string]: JsonValue | undefined }>;
  abortSignal?: AbortSignal | undefined;
  headers?: Record<string, string | undefined> | undefined;
}

/** What a caller of `generateImage` should know. */
export type ImageWarning =
  | { type: "unsupported" | "compatibility"; feature: string; details?: string }
  | { type: "other"; message: string };

/** What a model gives `generateImage`. */
export interface ImageCallResult {
  images: string[] | Uint8Array[];
  warnings: ImageWarning[];
  providerMetadata: { flowturbo: { images: JsonValue[] } };
  response: { timestamp: Date; modelId: string; headers: Record<string, string> | undefined };
  usage: { inputTokens: number | undefined; outputTokens: number | undefined; totalTokens: number | undefined };
}
