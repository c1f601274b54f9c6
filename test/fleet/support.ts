// Models that draw nothing but tell what they were asked, and a Redis for each file of tests.
import { createHash } from "node:crypto";
import { afterAll } from "vitest";
import type { FleetModel } from "../../lib/fleet/index.js";
import { connectFleet, type FleetWorker, startWorker } from "../../lib/fleet/index.js";
import type { ConnectFleetOptions, FleetWorkerOptions } from "../../lib/fleet/options.js";
import { Image } from "../../lib/generation/image.js";
import type { GenerateOptions, ImageModel } from "../../lib/model.js";
import { stubModel } from "../server/stub.js";
import { TestRedis } from "../support/redis.js";

/** A model whose pictures are of the request, that counts its calls. */
export interface CountingModel extends ImageModel {
  /** Requests that it was given, as they came. */
  readonly asked: GenerateOptions[];
  /** Of those, the ones that ended with an abort, with its reason. */
  readonly aborted: unknown[];
}

/** @param stepMs of each of its ten steps */
export function countingModel({
  stepMs = 0,
  aloneMs = 10 * stepMs,
}: {
  stepMs?: number;
  aloneMs?: number;
} = {}): CountingModel {
  const stub = stubModel({ side: 8, stepMs });
  const asked: GenerateOptions[] = [];
  const aborted: unknown[] = [];
  return Object.assign(Object.create(stub), {
    asked,
    aborted,
    async generate(options: GenerateOptions) {
      asked.push(options);
      try {
        const result = await stub.generate({
          ...options,
          onAccept: (event, context) => options.onAccept?.({ ...event, aloneMs, leastMs: aloneMs }, context),
        });
        const { prompt, seed, width } = options;
        const digest = createHash("sha256")
          .update(JSON.stringify([prompt, String(seed), width]))
          .digest();
        const data = new Uint8Array(8 * 8 * 3).map((_, index) => digest[index % 32]!);
        return { ...result, images: result.seeds.map(() => new Image(8, 8, data)) };
      } catch (error) {
        if (options.signal?.aborted) aborted.push(options.signal.reason);
        throw error;
      }
    },
    async encode() {
      throw new Error("not here");
    },
  });
}

/** Workers and fleets of a test file, which end with it. */
export class Fleets {
  redis!: TestRedis;
  readonly #open: (() => Promise<unknown>)[] = [];

  constructor() {
    afterAll(async () => {
      await Promise.allSettled(this.#open.map((close) => close()));
      await this.redis?.stop();
    });
  }

  async start(options: Parameters<typeof TestRedis.start>[0] = {}): Promise<void> {
    this.redis = await TestRedis.start(options);
  }

  /** @param prefix keys of one test, so that tests share a Redis */
  async worker(prefix: string, model: ImageModel, options: Partial<FleetWorkerOptions> = {}): Promise<FleetWorker> {
    const worker = await startWorker({
      ...{ redis: this.redis.url, prefix, models: { stub: model }, lockMs: 1500, ...options },
    });
    this.#open.push(() => worker.close({ drainMs: 0 }));
    return worker;
  }

  async fleet(prefix: string, options: Partial<ConnectFleetOptions> = {}): Promise<FleetModel> {
    const fleet = await connectFleet({ redis: this.redis.url, prefix, model: "stub", ...options });
    this.#open.push(() => fleet.dispose());
    return fleet;
  }
}

/** Waits until something holds. */
export async function until(holds: () => boolean | Promise<boolean>, milliseconds = 10_000): Promise<void> {
  const end = performance.now() + milliseconds;
  while (!(await holds())) {
    if (performance.now() > end) throw new Error(`Not within ${milliseconds} ms: ${holds}`);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}
