// Redis is away for longer than all that the fleet waits for: locks, silence of workers, and of those who wait for a job.
import { setTimeout as sleep } from "node:timers/promises";
import { Redis } from "ioredis";
import { beforeAll, describe, expect, it } from "vitest";
import { RedisError } from "../../lib/errors.js";
import { noRedis } from "../support/redis.js";
import { countingModel, Fleets, until } from "./support.js";

const fleets = new Fleets();
const awayMs = 30_000;

describe.skipIf(noRedis)(`a Redis that is away for 30 seconds${noRedis ? ` (skipped: ${noRedis})` : ""}`, () => {
  beforeAll(() => fleets.start());

  it("comes back to a fleet that has lost nothing", { timeout: 120_000 }, async () => {
    const prefix = "away";
    const models = [countingModel({ stepMs: 30 }), countingModel({ stepMs: 30 })];
    for (const model of models) await fleets.worker(prefix, model, { take: 1 });
    const [one, other] = [await fleets.fleet(prefix), await fleets.fleet(prefix)];
    const ask = (seed: number) => (seed % 2 ? one : other).generate({ prompt: "a fox", seed });
    // Some are drawn, some are at work, and some wait when it goes.
    await ask(0);
    const seeds = Array.from({ length: 12 }, (_, index) => index + 1);
    const calls = seeds.map(ask);
    const leaving = new AbortController();
    const left = one.generate({ prompt: "a fox", seed: 100, signal: leaving.signal });
    await until(() => models.every(({ asked }) => asked.length > 1));
    await until(async () => (await one.fleet.status()).models[0]!.waiting > 6);
    const back = fleets.redis.pause(awayMs);
    await sleep(500);
    for (const fleet of [one, other]) {
      expect(fleet.health()).toMatchObject({ ready: false, live: true });
      await expect(fleet.generate({ prompt: "a cat", seed: 1 })).rejects.toBeInstanceOf(RedisError);
    }
    leaving.abort(new Error("gone"));
    await expect(left).rejects.toThrow("gone");
    await back;
    const results = await Promise.all(calls);
    expect(results.map((result) => result.seeds[0])).toEqual(seeds);
    for (const [index, result] of results.entries()) {
      const alone = await countingModel().generate({ prompt: "a fox", seed: seeds[index] });
      expect(result.images[0]!.data).toEqual(alone.images[0]!.data);
    }
    expect(one.health().ready).toBe(true);
    expect((await ask(200)).seeds).toEqual([200]);
    // Nothing waits any more, and nothing says so.
    await until(async () => {
      const { models, workers } = await one.fleet.status();
      const isIdle = models.every(({ waiting, active }) => waiting + active === 0);
      return isIdle && workers.length === 2 && workers.every(({ models }) => models[0]!.jobs === 0);
    });
    const client = new Redis(fleets.redis.url);
    const isOfJob = (key: string) => /:(ledger|starts|queue:stub:[0-9a-f-]{36})/.test(key);
    await until(async () => (await client.keys(`${prefix}:*`)).every((key) => !isOfJob(key)), 20_000);
    client.disconnect();
  });
});
