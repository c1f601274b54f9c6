// Workers and gateways on a real Redis, in one process: what they promise each other. Models draw nothing; what they are asked counts.
import { randomUUID } from "node:crypto";
import { mkdtemp, readdir, stat, writeFile } from "node:fs/promises";
import os from "node:os";
import path from "node:path";
import { Queue } from "bullmq";
import { Redis } from "ioredis";
import { beforeAll, describe, expect, it } from "vitest";
import { DeadlineError } from "../../lib/errors.js";
import { hashOf, type JobData, jobFormat } from "../../lib/fleet/job.js";
import { aboutResult } from "../../lib/fleet/packed.js";
import type { StepEvent } from "../../lib/model.js";
import { noRedis } from "../support/redis.js";
import { countingModel, Fleets, until } from "./support.js";

const fleets = new Fleets();
const prefixOf = () => `t${randomUUID().slice(0, 8)}`;
const bytesOf = (picture: { data: Uint8Array }) => Buffer.from(picture.data).toString("hex");

describe.skipIf(noRedis)(`fleet${noRedis ? ` (skipped: ${noRedis})` : ""}`, () => {
  beforeAll(() => fleets.start());

  it("draws what the model draws alone, with its events", async () => {
    const [prefix, model] = [prefixOf(), countingModel({ stepMs: 2 })];
    await fleets.worker(prefix, model);
    const fleet = await fleets.fleet(prefix);
    const events: string[] = [];
    const steps: StepEvent[] = [];
    const options = { prompt: "a fox", seed: 2 ** 40, preview: "fast", previewCount: 2 } as const;
    const result = await fleet.generate({
      ...options,
      onAccept: ({ blocks, seeds, aloneMs }) => events.push(`accept ${blocks} ${seeds} ${aloneMs}`),
      onStart: ({ queuedMs }) => events.push(`start ${queuedMs > 0}`),
      onStep: (step) => steps.push(step),
    });
    const alone = await model.generate(options);
    expect(result.images.map(bytesOf)).toEqual(alone.images.map(bytesOf));
    expect(result.seeds).toEqual([2 ** 40]);
    expect(events).toEqual([`accept H1P9 ${2 ** 40} 20`, "start true"]);
    expect(steps.map(({ step }) => step)).toEqual([0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    expect(steps.filter(({ previews }) => previews.length > 0)).toHaveLength(2);
    expect(await steps.find(({ previews }) => previews.length > 0)!.previews[0]!.encode("png")).toBeInstanceOf(Buffer);
    expect(result.timings.total).toBeGreaterThan(result.timings.queue);
    expect(fleet.name).toBe("stub");
    expect(fleet.nativeSize).toEqual({ width: 64, height: 64 });
    expect(model.asked[0]).toMatchObject({ allowPaths: false });
    expect(fleet.stats().requests).toMatchObject({ accepted: 1, completed: 1, failed: 0 });
    expect(fleet.stats()).toMatchObject({ running: { requests: 0 }, queue: { waiting: 0 } });
  });

  it("draws the same request once, and finds its result later", async () => {
    const [prefix, model] = [prefixOf(), countingModel({ stepMs: 5 })];
    await fleets.worker(prefix, model);
    const [one, other] = [await fleets.fleet(prefix), await fleets.fleet(prefix)];
    const options = { prompt: "twice", seed: 1 };
    const both = await Promise.all([
      one.generate(options),
      other.generate(options),
      one.generate({ ...options, priority: 5 }),
    ]);
    expect(model.asked).toHaveLength(1);
    expect(new Set(both.flatMap(({ images }) => images.map(bytesOf)))).toHaveProperty("size", 1);
    const accepted: unknown[] = [];
    const later = await other.generate({ ...options, ticket: "me", onAccept: (event) => accepted.push(event) });
    expect(model.asked).toHaveLength(1);
    expect(later.images.map(bytesOf)).toEqual(both[0].images.map(bytesOf));
    expect(accepted).toMatchObject([{ place: 0, predictedMs: 0, blocks: "H1P9", seeds: [1] }]);
    await one.generate({ ...options, steps: 11 });
    await one.generate({ prompt: "twice" });
    await one.generate({ prompt: "twice" });
    expect(model.asked).toHaveLength(4);
  });

  it("stops the work when all who waited have left, and not before", async () => {
    const [prefix, model] = [prefixOf(), countingModel({ stepMs: 30 })];
    await fleets.worker(prefix, model);
    const [one, other] = [await fleets.fleet(prefix), await fleets.fleet(prefix)];
    const options = { prompt: "shared", seed: 3 };
    const leaving = new AbortController();
    const left = one.generate({ ...options, signal: leaving.signal });
    const stays = other.generate(options);
    await until(() => model.asked.length === 1);
    leaving.abort(new Error("enough"));
    await expect(left).rejects.toThrow("enough");
    expect((await stays).images).toHaveLength(1);
    expect(model.aborted).toEqual([]);

    const alone = new AbortController();
    let seen = 0;
    const drawn = one.generate({ prompt: "alone", seed: 4, signal: alone.signal, steps: 100, onStep: () => seen++ });
    await until(() => seen > 0);
    alone.abort(new Error("now"));
    await expect(drawn).rejects.toThrow("now");
    const at = performance.now();
    await until(() => model.aborted.length === 1);
    // A step takes 30 ms; a run that went on would take three seconds.
    expect(performance.now() - at).toBeLessThan(1000);
    expect(one.stats().requests.aborted).toBe(2);
  });

  it("has each caller wait as long as it said, and tells one that joins what the others know", async () => {
    const [prefix, model] = [prefixOf(), countingModel({ stepMs: 300 })];
    await fleets.worker(prefix, model);
    const [one, other] = [await fleets.fleet(prefix), await fleets.fleet(prefix)];
    const options = { prompt: "shared", seed: 5 };
    const short = one.generate({ ...options, timeoutMs: 2000 });
    short.catch(() => {});
    await until(() => model.asked.length === 1);
    const events: string[] = [];
    const joined = other.generate({
      ...options,
      onAccept: () => events.push("accept"),
      onStart: () => events.push("start"),
      onStep: ({ step }) => events.push(String(step)),
    });
    await expect(short).rejects.toMatchObject({ code: "ERR_FLOWTURBO_TIMEOUT", timeoutMs: 2000 });
    expect((await joined).images).toHaveLength(1);
    expect(events.slice(0, 2)).toEqual(["accept", "start"]);
    expect(events.at(-1)).toBe("9");
    expect(model.asked).toHaveLength(1);
    expect(other.stats().running.requests).toBe(0);
  });

  it("says of a limit what counts from the call, and learns from a refusal", async () => {
    const [prefix, model] = [prefixOf(), countingModel({ stepMs: 1 })];
    const { generate } = model;
    model.generate = (options) => {
      const { deadlineMs } = options;
      if (deadlineMs === undefined || deadlineMs >= 1150) return generate.call(model, options);
      model.asked.push(options);
      const found = { deadlineMs, bestMs: 1150, blocks: "E4", retryAfterMs: null };
      return Promise.reject(new DeadlineError("Not as the caller knows it.", found));
    };
    await fleets.worker(prefix, model);
    const fleet = await fleets.fleet(prefix);
    const ask = (deadlineMs: number) => fleet.generate({ prompt: "x", deadlineMs });
    await expect(ask(500)).rejects.toMatchObject({
      code: "ERR_FLOWTURBO_DEADLINE_IMPOSSIBLE",
      ...{ deadlineMs: 500, bestMs: 1150, message: expect.stringContaining("in 500 ms") },
    });
    expect(model.asked).toHaveLength(1);
    // The next one is refused before a worker hears of it.
    await until(async () => {
      await expect(ask(500)).rejects.toMatchObject({ code: "ERR_FLOWTURBO_DEADLINE_IMPOSSIBLE" });
      return fleet.stats().requests.refused.impossible > 0;
    });
    const { length } = model.asked;
    await until(async () => (await fleet.fleet.status()).workers[0]!.models[0]!.jobs === 0);
    // A worker that was slow to wake up says so, and what is left of that goes into the time.
    await until(async () => (await ask(600).catch((error: DeadlineError) => error.bestMs)) === 1150);
    expect(model.asked).toHaveLength(length);
    expect((await ask(3000)).images).toHaveLength(1);
    expect((await fleet.fleet.status()).workers[0]!.models[0]!.failed).toBe(0);
  });

  it("counts a job at every moment, while it waits and from when a worker takes it", async () => {
    const [prefix, model] = [prefixOf(), countingModel({ stepMs: 15 })];
    await fleets.worker(prefix, model, { take: 8 });
    const fleet = await fleets.fleet(prefix);
    const client = new Redis(fleets.redis.url);
    const countedNow = async () => {
      const read = await client.multi().hgetall(`${prefix}:ledger:stub`).hgetall(`${prefix}:beats`).exec();
      const [ledger, beats] = read!.map(([, entries]) => entries as Record<string, string>);
      const taken = Object.values(beats!).map((text) => JSON.parse(text).models.stub.pictures as number);
      return Object.keys(ledger!).length + taken.reduce((sum, each) => sum + each, 0);
    };
    for (let round = 0; round < 4; round++) {
      await until(async () => (await countedNow()) === 0);
      const seeds = Array.from({ length: 8 }, (_, index) => 8 * round + index);
      let ended = 0;
      const calls = seeds.map((seed) => fleet.generate({ prompt: "x", seed }).finally(() => ended++));
      const counts: number[] = [];
      while (ended === 0) counts.push(await countedNow());
      // They come one after another, and the last reading may be of when some were over.
      const all = counts.indexOf(8);
      expect(all).toBeGreaterThanOrEqual(0);
      expect(Math.min(...counts.slice(all, -3))).toBe(8);
      await Promise.all(calls);
    }
    client.disconnect();
  });

  it("says of a result whether the first launch of a size was in its way", async () => {
    const [prefix, model] = [prefixOf(), countingModel({ stepMs: 10 })];
    await fleets.worker(prefix, model, { take: 4 });
    const fleet = await fleets.fleet(prefix);
    const client = new Redis(fleets.redis.url);
    const known = new Set<string>();
    /** Of the results that are new. */
    const disturbed = async () => {
      const keys = (await client.keys(`${prefix}:result:*`)).filter((key) => !known.has(key));
      for (const key of keys) known.add(key);
      const results = await Promise.all(keys.map((key) => client.getBuffer(key)));
      return results.map((bytes) => aboutResult(bytes!).isDisturbed);
    };
    const ask = (seed: number, width = 64) => fleet.generate({ prompt: "x", seed, width, height: 64 });
    await ask(1);
    expect(await disturbed()).toEqual([true]);
    await Promise.all([ask(2), ask(3)]);
    expect(await disturbed()).toEqual([false, false]);
    // One of another size, and one beside it.
    await Promise.all([ask(4), ask(5, 32)]);
    expect(await disturbed()).toEqual([true, true]);
    await Promise.all([ask(6), ask(7, 32)]);
    expect(await disturbed()).toEqual([false, false]);
    client.disconnect();
  });

  it("takes away what waits when its caller leaves", async () => {
    const [prefix, model] = [prefixOf(), countingModel({ stepMs: 20 })];
    await fleets.worker(prefix, model, { take: 1 });
    const fleet = await fleets.fleet(prefix);
    const first = fleet.generate({ prompt: "first", seed: 1 });
    await until(() => model.asked.length === 1);
    const leaving = new AbortController();
    const waits = fleet.generate({ prompt: "waits", seed: 2, signal: leaving.signal });
    const client = new Redis(fleets.redis.url);
    await until(async () => (await client.hlen(`${prefix}:ledger:stub`)) === 1);
    leaving.abort(new Error("gone"));
    await expect(waits).rejects.toThrow("gone");
    await first;
    await fleet.generate({ prompt: "last", seed: 3 });
    expect(model.asked.map(({ prompt }) => prompt)).toEqual(["first", "last"]);
    expect(await client.hlen(`${prefix}:ledger:stub`)).toBe(0);
    client.disconnect();
  });

  it("forgets a caller whose process is gone: the last of those that are left takes the job with it", async () => {
    const [prefix, model] = [prefixOf(), countingModel({ stepMs: 30 })];
    await fleets.worker(prefix, model);
    const fleet = await fleets.fleet(prefix);
    const client = new Redis(fleets.redis.url);
    for (const [silentMs, ends] of [
      [30_000, true],
      [1000, false],
    ] as const) {
      const leaving = new AbortController();
      const left = fleet.generate({ prompt: "shared", seed: silentMs, steps: 100, signal: leaving.signal });
      const [before, begun] = [model.aborted.length, model.asked.length];
      await until(() => model.asked.length === begun + 1);
      const [key] = await client.keys(`${prefix}:followers:*`);
      await client.zadd(key!, Date.now() - silentMs, "gone:job");
      leaving.abort(new Error("enough"));
      await expect(left).rejects.toThrow("enough");
      if (ends) await until(() => model.aborted.length === before + 1);
      else await new Promise((resolve) => setTimeout(resolve, 500));
      expect(model.aborted.length).toBe(before + (ends ? 1 : 0));
      // Nothing is left of a job that was cancelled.
      if (ends) await until(async () => (await client.keys(`${prefix}:[fcs]*:*-*-*`)).length === 0);
    }
    client.disconnect();
  });

  it("draws what Redis has lost in part", { timeout: 30_000 }, async () => {
    const prefix = prefixOf();
    const draining = await fleets.worker(prefix, countingModel({ stepMs: 100 }), { take: 1 });
    const fleet = await fleets.fleet(prefix);
    const first = fleet.generate({ prompt: "x", seed: 1 });
    await until(() => draining.jobs === 1);
    const client = new Redis(fleets.redis.url);
    const queue = `${prefix}:queue:stub`;
    // One is in no list, and of the other there is only its name.
    const whole = fleet.generate({ prompt: "x", seed: 2 });
    await until(async () => (await client.zcard(`${queue}:prioritized`)) === 1);
    await client.del(`${queue}:prioritized`);
    const name = fleet.generate({ prompt: "x", seed: 3 });
    await until(async () => (await client.zcard(`${queue}:prioritized`)) === 1);
    const [id] = await client.zrange(`${queue}:prioritized`, 0, 0);
    await client.del(`${queue}:prioritized`, `${queue}:${id}`);
    const results = await Promise.all([first, whole, name]);
    expect(results.map(({ seeds }) => seeds)).toEqual([[1], [2], [3]]);
    client.disconnect();
  });

  it("takes from the ledger what is not in the queue", { timeout: 30_000 }, async () => {
    const prefix = prefixOf();
    await fleets.worker(prefix, countingModel());
    const fleet = await fleets.fleet(prefix, { maxQueue: 1 });
    const client = new Redis(fleets.redis.url);
    const facts = { kind: "k", size: "64x64", pictures: 1, level: 0, arrival: Date.now() - 10_000, due: null };
    // A gateway that was killed before it had added its jobs: of one that seems to begin and one that seems to wait.
    for (let job = 0; job < 2; job++) await client.hset(`${prefix}:ledger:stub`, randomUUID(), JSON.stringify(facts));
    await expect(fleet.generate({ prompt: "x", seed: 1 })).rejects.toMatchObject({
      code: "ERR_FLOWTURBO_QUEUE_FULL",
    });
    await until(async () => (await client.hlen(`${prefix}:ledger:stub`)) === 0, 20_000);
    await new Promise((resolve) => setTimeout(resolve, 100));
    await fleet.generate({ prompt: "x", seed: 1 });
    client.disconnect();
  });

  it("draws by priority, then by time limit", async () => {
    const [prefix, model] = [prefixOf(), countingModel({ stepMs: 10 })];
    await fleets.worker(prefix, model, { take: 1 });
    const fleet = await fleets.fleet(prefix);
    const first = fleet.generate({ prompt: "first", seed: 1 });
    await until(() => model.asked.length === 1);
    const ask = (prompt: string, more: object) => fleet.generate({ prompt, seed: 1, ...more });
    const later = [
      ask("usual", {}),
      ask("low", { priority: -1 }),
      ask("limit", { deadlineMs: 20_000 }),
      ask("sooner", { deadlineMs: 5_000 }),
      ask("high", { priority: 2 }),
    ];
    await Promise.all([first, ...later]);
    expect(model.asked.map(({ prompt }) => prompt)).toEqual(["first", "high", "sooner", "limit", "usual", "low"]);
    expect(model.asked[2]!.deadlineMs).toBeLessThan(5000);
  });

  it("refuses at once where there is no worker, and no Redis", async () => {
    const fleet = await fleets.fleet(prefixOf());
    const at = performance.now();
    await expect(fleet.generate({ prompt: "x" })).rejects.toMatchObject({ code: "ERR_FLOWTURBO_FLEET_EMPTY" });
    expect(performance.now() - at).toBeLessThan(1000);
    expect(fleet.health()).toMatchObject({ live: true, ready: false });
    await expect(fleets.fleet(prefixOf(), { model: undefined })).rejects.toMatchObject({
      code: "ERR_FLOWTURBO_FLEET_EMPTY",
    });
  });

  it("tells what a worker refuses as the model would", async () => {
    const [prefix, model] = [prefixOf(), countingModel()];
    await fleets.worker(prefix, model);
    const fleet = await fleets.fleet(prefix);
    await expect(fleet.generate({ prompt: "x", steps: 0 })).rejects.toMatchObject({ option: "steps" });
    expect(model.asked).toHaveLength(0);
    await expect(fleet.generate({ prompt: "x", blocks: "Z9" })).rejects.toThrow();
    const { failed } = (await fleet.fleet.status()).workers[0]!.models[0]!;
    expect(failed).toBeLessThanOrEqual(1);
  });

  it("hands back what has not begun when a worker drains", async () => {
    const [prefix, slow, other] = [prefixOf(), countingModel({ stepMs: 20 }), countingModel()];
    // Like a model whose launches are full: the second call waits in it.
    const { generate } = slow;
    let turn: Promise<unknown> = Promise.resolve();
    slow.generate = (options) => {
      const before = turn;
      const call = (async () => {
        await Promise.race([
          before,
          new Promise((_, reject) => options.signal?.addEventListener("abort", () => reject(options.signal!.reason))),
        ]);
        return generate.call(slow, options);
      })();
      turn = call.catch(() => {});
      return call;
    };
    const draining = await fleets.worker(prefix, slow);
    const fleet = await fleets.fleet(prefix);
    const first = fleet.generate({ prompt: "first", seed: 1 });
    await until(() => slow.asked.length === 1);
    const second = fleet.generate({ prompt: "second", seed: 2 });
    await until(() => draining.jobs === 2);
    await fleets.worker(prefix, other);
    await draining.close();
    await Promise.all([first, second]);
    expect(slow.asked.map(({ prompt }) => prompt)).toEqual(["first"]);
    expect(other.asked.map(({ prompt }) => prompt)).toEqual(["second"]);
    expect((await fleet.fleet.status()).workers).toHaveLength(1);
  });

  it("begins elsewhere what a worker has not done within its drain time", async () => {
    const [prefix, slow, other] = [prefixOf(), countingModel({ stepMs: 200 }), countingModel()];
    const draining = await fleets.worker(prefix, slow);
    const fleet = await fleets.fleet(prefix);
    const steps: number[] = [];
    const drawn = fleet.generate({ prompt: "x", seed: 1, onStep: ({ step }) => steps.push(step) });
    await until(() => steps.length > 0);
    await fleets.worker(prefix, other);
    await draining.close({ drainMs: 50 });
    expect((await drawn).images).toHaveLength(1);
    expect(other.asked).toHaveLength(1);
    // Each step is told once.
    expect(steps).toEqual([0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
  });

  it("survives a Redis that is away, and says so meanwhile", { timeout: 60_000 }, async () => {
    const [prefix, model] = [prefixOf(), countingModel({ stepMs: 100 })];
    await fleets.worker(prefix, model, { take: 1 });
    const fleet = await fleets.fleet(prefix);
    const asked = [1, 2, 3].map((seed) => fleet.generate({ prompt: "x", seed }));
    await until(() => model.asked.length === 1);
    const back = fleets.redis.pause(3000);
    await until(() => !fleet.health().ready);
    await expect(fleet.generate({ prompt: "x" })).rejects.toMatchObject({ code: "ERR_FLOWTURBO_REDIS" });
    await back;
    const results = await Promise.all(asked);
    expect(results.map(({ seeds }) => seeds)).toEqual([[1], [2], [3]]);
    await until(() => fleet.health().ready);
    // What was drawn while it was away need not be drawn again.
    expect(model.asked.length).toBeLessThanOrEqual(4);
    await fleet.generate({ prompt: "after", seed: 9 });
  });

  describe("jobs that no gateway wrote", () => {
    const data = (request: object, more: object = {}): JobData =>
      ({
        ...{ format: jobFormat, op: "draw", request, hash: hashOf("stub", "draw", request as never), promised: false },
        facts: { kind: "k", size: "64x64", pictures: 1, level: 0, arrival: Date.now(), due: null },
        ...{ repeatable: true, traceparent: null, ...more },
      }) as JobData;
    const ask = async (prefix: string, job: unknown) => {
      const connection = new Redis(fleets.redis.url, { maxRetriesPerRequest: null });
      const queue = new Queue("stub", { connection, prefix: `${prefix}:queue` });
      const id = randomUUID();
      await queue.add("draw", job, { jobId: id, removeOnComplete: true, removeOnFail: true });
      await until(async () => (await queue.getJobState(id)) === "unknown", 20_000);
      const failure = await connection.get(`${prefix}:failure:${id}`);
      await queue.close();
      connection.disconnect();
      return failure === null ? null : JSON.parse(failure);
    };

    it("are refused without reading a file", async () => {
      const [prefix, model] = [prefixOf(), countingModel()];
      await fleets.worker(prefix, model);
      const folder = await mkdtemp(path.join(os.tmpdir(), "flowturbo-hostile-"));
      const file = path.join(folder, "secret.png");
      await writeFile(file, "secret");
      const { atimeMs } = await stat(file);
      for (const request of [
        { prompt: "x", image: file },
        { prompt: "x", image: { path: file } },
        { prompt: "x", image: { file } },
        { prompt: "x", mask: file, image: file },
        { prompt: "x", allowPaths: true, image: file },
        { prompt: "x", controls: [{ folder: "c", image: file }] },
        { prompt: "x", steps: "__proto__" },
        { prompt: ["x"], constructor: 1 },
        {},
      ])
        expect(await ask(prefix, data(request)), JSON.stringify(request)).toMatchObject({
          code: "ERR_FLOWTURBO_OPTION",
        });
      for (const job of [
        null,
        [],
        {},
        { format: "1" },
        data({ prompt: "x" }, { op: "delete" }),
        data({ prompt: "x" }, { hash: "../../etc/passwd" }),
        data({ prompt: "x" }, { facts: {} }),
        data({ prompt: "x" }, { more: 1 }),
      ])
        expect(await ask(prefix, job), JSON.stringify(job)).toMatchObject({ code: "ERR_FLOWTURBO_OPTION" });
      expect((await stat(file)).atimeMs).toBe(atimeMs);
      expect(model.asked).toHaveLength(0);
      // What is well formed is drawn with paths forbidden, whatever it says.
      expect(await ask(prefix, data({ prompt: "x", seed: 1 }))).toBeNull();
      expect(model.asked).toMatchObject([{ allowPaths: false }]);
    });

    it("of a newer format are refused by name, or left to who reads them", async () => {
      const [prefix, model] = [prefixOf(), countingModel()];
      const said: string[] = [];
      await fleets.worker(prefix, model, { logger: { warn: (text) => said.push(text) } });
      const newer = { ...data({ prompt: "x" }), format: jobFormat + 1, what: "ever" };
      expect(await ask(prefix, newer)).toMatchObject({
        code: "ERR_FLOWTURBO_FLEET_FORMAT",
        fields: { format: jobFormat + 1, known: jobFormat },
      });
      expect(said.join()).toMatch(/format 2.*Update the workers/);

      const client = new Redis(fleets.redis.url);
      const beat = { format: jobFormat + 1, state: "ready", revision: 1, models: {} };
      const living = setInterval(
        () => void client.hset(`${prefix}:beats`, "newer", JSON.stringify({ ...beat, at: Date.now() })),
        300,
      );
      await new Promise((resolve) => setTimeout(resolve, 1000));
      const queue = new Queue("stub", {
        connection: client.duplicate({ maxRetriesPerRequest: null }),
        prefix: `${prefix}:queue`,
      });
      await queue.add("draw", newer, { jobId: "left", removeOnFail: true });
      await new Promise((resolve) => setTimeout(resolve, 1500));
      expect(["waiting", "active"]).toContain(await queue.getJobState("left"));
      expect(await client.get(`${prefix}:failure:left`)).toBeNull();
      clearInterval(living);
      await queue.remove("left");
      await queue.close();
      client.disconnect();
      expect(model.asked).toHaveLength(0);
    });

    it("that ended two workers are given up", { timeout: 40_000 }, async () => {
      const [prefix, model] = [prefixOf(), countingModel()];
      const client = new Redis(fleets.redis.url, { maxRetriesPerRequest: null });
      const queue = new Queue("stub", { connection: client, prefix: `${prefix}:queue` });
      await client.rpush(`${prefix}:starts:bad`, "worker-a", "worker-b");
      await client.rpush(`${prefix}:starts:once`, "worker-a");
      await fleets.worker(prefix, model);
      for (const id of ["bad", "once"])
        await queue.add("draw", data({ prompt: id, seed: 1 }), {
          jobId: id,
          removeOnComplete: true,
          removeOnFail: true,
        });
      await until(
        async () => (await queue.getJobState("bad")) === "unknown" && (await queue.getJobState("once")) === "unknown",
      );
      expect(JSON.parse((await client.get(`${prefix}:failure:bad`))!)).toMatchObject({
        code: "ERR_FLOWTURBO_POISONOUS_JOB",
        fields: { jobId: "bad", workers: ["worker-a", "worker-b"] },
      });
      expect(model.asked.map(({ prompt }) => prompt)).toEqual(["once"]);
      await queue.close();
      client.disconnect();
    });
  });

  it("keeps results in a folder that their owner alone reads", { timeout: 60_000 }, async () => {
    const results = await mkdtemp(path.join(os.tmpdir(), "flowturbo-results-"));
    const [prefix, model] = [prefixOf(), countingModel()];
    await fleets.worker(prefix, model, { results });
    const fleet = await fleets.fleet(prefix, { results });
    await fleet.generate({ prompt: "x", seed: 1 });
    await fleet.generate({ prompt: "x", seed: 1 });
    expect(model.asked).toHaveLength(1);
    const names = await readdir(results);
    expect(names).toEqual([expect.stringMatching(/^[0-9a-f]{64}$/)]);
    expect((await stat(path.join(results, names[0]!))).mode & 0o777).toBe(0o600);
    const client = new Redis(fleets.redis.url);
    expect((await client.keys(`${prefix}:result:*`)).length).toBe(0);
    client.disconnect();
    const file = path.join(results, names[0]!);
    // Who looks elsewhere is told so, and has it drawn no more than once.
    const elsewhere = await fleets.fleet(prefix);
    await expect(elsewhere.generate({ prompt: "y", seed: 1 })).rejects.toThrow(/same results/);
    expect(model.asked).toHaveLength(2);
    // Where nothing can be made, and Node's own way does not end.
    await expect(fleets.fleet(prefix, { results: "/proc/none/in" })).rejects.toMatchObject({
      code: "ERR_FLOWTURBO_OUTPUT",
    });
    await expect(fleets.fleet(prefix, { results: path.join(file, "in") })).rejects.toMatchObject({
      code: "ERR_FLOWTURBO_OUTPUT",
    });
  });

  it("leaves jobs to workers that have drawn their size", async () => {
    const [prefix, cold, warm] = [prefixOf(), countingModel({ stepMs: 1 }), countingModel({ stepMs: 1 })];
    await fleets.worker(prefix, warm);
    const fleet = await fleets.fleet(prefix);
    await fleet.generate({ prompt: "x", seed: 0, width: 128 });
    await fleets.worker(prefix, cold);
    await new Promise((resolve) => setTimeout(resolve, 1200));
    for (let seed = 1; seed <= 6; seed++) await fleet.generate({ prompt: "x", seed, width: 128 });
    expect([warm.asked.length, cold.asked.length]).toEqual([7, 0]);
  });
});
