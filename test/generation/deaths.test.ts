// A model whose runtime dies or hangs at any moment: the next call works, and people can see what happened.
import { getEventListeners } from "node:events";
import { setTimeout as pause } from "node:timers/promises";
import { FlowTurbo, RuntimeDiedError, TimeoutError } from "flowturbo";
import { afterAll, beforeAll, describe, expect, it, vi } from "vitest";
import { hosts } from "../support/hosts.js";

const prompt = "a red circle above a blue square";
const options = { prompt, seed: 1, guidanceScale: 2, blocks: "H1P2" } as const;
const signalAll = (signal: NodeJS.Signals) => {
  for (const pid of hosts()) process.kill(pid, signal);
};

describe.skipIf(process.platform !== "linux")("the runtime of a model", () => {
  let model: FlowTurbo;
  let expected: Uint8Array;
  const events: string[] = [];
  beforeAll(async () => {
    model = await FlowTurbo.load(undefined, { threads: 1, measureCosts: false, watchdogMs: 1000 });
    model.on("lost", () => events.push("lost"));
    model.on("restart", ({ restarts }) => events.push(`restart ${restarts}`));
    expected = (await model.generate(options)).images[0]!.data;
  });
  afterAll(() => model.dispose());
  const expectPicture = async (call: Promise<Awaited<ReturnType<FlowTurbo["generate"]>>>) =>
    expect(Buffer.compare((await call).images[0]!.data, expected)).toBe(0);

  it("may be killed while idle: the next call draws, whenever that is", async () => {
    for (const wait of [0, 1, 5, 50, 300]) {
      signalAll("SIGKILL");
      if (wait > 0) await pause(wait);
      await expectPicture(model.generate(options));
    }
    // Twice in a row: again while the fresh one starts.
    signalAll("SIGKILL");
    const call = model.generate(options);
    await pause(30);
    signalAll("SIGKILL");
    await expectPicture(call);
    expect(events.length).toBeGreaterThanOrEqual(2 * 6);
    const { restarts, ready, degraded, lastError } = model.health();
    expect(restarts).toBe(events.filter((event) => event.startsWith("restart")).length);
    expect(model.stats().runtime.restarts).toBe(restarts);
    expect({ ready, degraded, code: lastError!.code }).toEqual({
      ...{ ready: true, degraded: true, code: "ERR_FLOWTURBO_RUNTIME_DIED" },
    });
  });

  it("may be killed at any moment of a call: it draws or fails by a typed error, and the next one draws", async () => {
    let drawn = 0;
    const moments = Array.from({ length: 15 }, (_, index) => 8 * index);
    // On a slow machine no call may have ended by then.
    for (const wait of [...moments, 250, 500, 1000, 2000]) {
      if (drawn > 0 && wait > moments.at(-1)!) break;
      const call = model.generate(options).then(
        () => "drawn",
        (error) => error,
      );
      await pause(wait);
      signalAll("SIGKILL");
      const outcome = await call;
      if (outcome === "drawn") drawn++;
      else expect(outcome).toBeInstanceOf(RuntimeDiedError);
      await expectPicture(model.generate(options));
    }
    expect(drawn).toBeGreaterThan(0);
  });

  it("may be killed while a model loads", async () => {
    for (const wait of [0, 40, 120]) {
      const loading = FlowTurbo.load(undefined, { threads: 1, measureCosts: false });
      await pause(wait);
      signalAll("SIGKILL");
      await using other = await loading;
      await expectPicture(other.generate(options));
    }
  });

  it("may be killed between the pieces of a call that shares launches", async () => {
    const calls = [1, 2, 3].map((seed) =>
      model.generate({ ...options, seed, blocks: "H1P12" }).then(
        () => "drawn",
        (error) => error,
      ),
    );
    await pause(60);
    signalAll("SIGKILL");
    for (const outcome of await Promise.all(calls))
      if (outcome !== "drawn") expect(outcome).toBeInstanceOf(RuntimeDiedError);
    await expectPicture(model.generate(options));
    expect(model.stats().running).toEqual({ requests: 0, pictures: 0 });
  });

  it("may hang: calls start again in a fresh one, idle or in the middle of work, and health tells", async () => {
    await model.generate(options);
    signalAll("SIGSTOP");
    const idle = model.generate(options);
    await pause(600);
    expect(model.health()).toMatchObject({ ready: true, degraded: true });
    expect(model.health().reasons.join()).toMatch(/has not answered/);
    // Nothing of the call has begun.
    expect(model.health().oldestLaunch).toBeNull();
    await expectPicture(idle);
    let hasStopped = false;
    const busy = model.generate({
      ...options,
      blocks: "H1P40",
      onStep: () => {
        if (!hasStopped) signalAll("SIGSTOP");
        hasStopped = true;
      },
    });
    await vi.waitFor(() => expect(hasStopped).toBe(true), { timeout: 20_000 });
    await pause(500);
    expect(model.health().oldestLaunch!.graph).toBe("predict.guidance");
    expect(model.health().oldestLaunch!.milliseconds).toBeGreaterThan(100);
    expect((await busy).images).toHaveLength(1);
    expect(model.health().lastError!.message).toMatch(/gave no sign of life for \d+ s, and was replaced/);
    await expectPicture(model.generate(options));
  });

  it("may hang while a call has a timeoutMs, which ends it at once", async () => {
    const before = model.stats().requests;
    signalAll("SIGSTOP");
    const error = await model.generate({ ...options, timeoutMs: 200 }).catch((reason) => reason);
    expect(error).toBeInstanceOf(TimeoutError);
    expect(error).toMatchObject({ code: "ERR_FLOWTURBO_TIMEOUT", timeoutMs: 200 });
    expect(hosts()).toHaveLength(1);
    await expectPicture(model.generate(options));
    const { timedOut, aborted, failed } = model.stats().requests;
    expect({ timedOut, aborted, failed }).toEqual({
      ...{ timedOut: before.timedOut + 1, aborted: before.aborted, failed: before.failed },
    });
  });

  it("keeps nothing of a call that was in time: no timer, and no listener on its signal", async () => {
    const set = vi.spyOn(globalThis, "setTimeout");
    const { signal } = new AbortController();
    await expectPicture(model.generate({ ...options, signal, timeoutMs: 61_234 }));
    expect(getEventListeners(signal, "abort")).toEqual([]);
    const reason = new Error("enough");
    const controller = new AbortController();
    const call = model.generate({ ...options, blocks: "H1P200", signal: controller.signal, timeoutMs: 61_234 });
    setTimeout(() => controller.abort(reason), 50);
    await expect(call).rejects.toBe(reason);
    const timers = set.mock.results.filter((_, index) => set.mock.calls[index]![1] === 61_234);
    expect(timers).toHaveLength(2);
    for (const { value } of timers) expect(value).toHaveProperty("_destroyed", true);
    set.mockRestore();
  });
});

it("a model that is disposed is not ready, even while calls end", async () => {
  const model = await FlowTurbo.load(undefined, { threads: 1, measureCosts: false });
  expect(model.health()).toMatchObject({ ready: true, degraded: false, reasons: [], oldestLaunch: null });
  const call = model.generate(options);
  const disposed = model.dispose();
  expect(model.health()).toMatchObject({ ready: false, reasons: ["The model has been disposed."] });
  await call;
  await disposed;
});
