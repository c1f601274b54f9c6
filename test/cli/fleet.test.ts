// `flowturbo worker`, `flowturbo serve --redis` and `flowturbo fleet status` as processes, on a real Redis and with the embedded model.
import path from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { Redis } from "ioredis";
import { afterAll, afterEach, beforeAll, describe, expect, it, vi } from "vitest";
import type { FleetStatus } from "../../lib/fleet/status.js";
import { sumOf } from "../server/process.js";
import { post, quick } from "../server/support.js";
import { root } from "../support/fixtures.js";
import { GuardedProcess } from "../support/processes.js";
import { noRedis, TestRedis } from "../support/redis.js";
import { run, temporaryFolder } from "./support.js";

const processes: GuardedProcess[] = [];
afterEach(async () => {
  vi.unstubAllEnvs();
  for (const each of processes.splice(0)) await each.stop("SIGKILL");
});

function start(args: readonly string[], env: NodeJS.ProcessEnv = {}): GuardedProcess {
  const child = new GuardedProcess(process.execPath, [path.join(root, "bin/flowturbo.js"), ...args], {
    env: { ...process.env, FLOWTURBO_REDIS: "", FLOWTURBO_API_KEY: "", ...env },
  });
  processes.push(child);
  return child;
}
/** A field of the first line of a log that has a message. */
const fieldOf = async (child: GuardedProcess, msg: string, field: string): Promise<string> =>
  JSON.parse(await child.line(new RegExp(`"msg":"${msg}`)))[field];
const listening = async (child: GuardedProcess) =>
  (await fieldOf(child, "Server listening at", "msg")).replace("Server listening at ", "");

describe("refuses with code 2, and in one line,", () => {
  const nowhere = "redis://127.0.0.1:1";
  it.each([
    [["worker"], "--redis <url>"],
    [["worker"], "FLOWTURBO_REDIS"],
    [["fleet", "status"], "FLOWTURBO_REDIS"],
    [["serve", "--redis"], "FLOWTURBO_REDIS"],
    [["worker", "--redis", "http://secret@example.org"], "rediss://"],
    [["worker", "--redis", nowhere, "--lock", "1"], "--lock"],
    [["worker", "--redis", nowhere, "--take", "x"], "--take"],
    [["worker", "--redis", nowhere, "--prefix", "a b"], "--prefix"],
    [["worker", "--redis", nowhere, "--warm", "big"], "--warm"],
    [["worker", "--redis", nowhere, "--drain", "-1"], "--drain"],
    [["worker", "--redis", nowhere, "--metrics-port", "70000"], "--metrics-port"],
    [["worker", "--redis", nowhere, "--runtime", "abacus"], "--runtime"],
    [["worker", "--redis", nowhere, "--log-level", "loud"], "--log-level"],
    [["worker", "--redis", nowhere, "--model", "a=/x", "--model", "a=/y"], '"a"'],
    [["serve", "--redis", nowhere, "--model", "./x"], "--model"],
    [["serve", "--redis", nowhere, "--threads", "2"], "--threads"],
    [["serve", "--redis", nowhere, "--no-t5"], "--no-t5"],
    [["serve", "--redis", nowhere, "--warm", "64x64"], "--warm"],
    [["serve", "--redis", nowhere, "--keep-results", "1"], "--keep-results"],
    [["serve", "--redis", nowhere, "--host", "0.0.0.0"], "--api-key"],
    [["serve", "--prefix", "mine"], "--prefix"],
    [["serve", "--board"], "--redis"],
  ])("%j: %s", async (args, words) => {
    vi.stubEnv("FLOWTURBO_REDIS", "");
    const { code, stdout, stderr } = await run(args, temporaryFolder());
    expect([code, stdout]).toEqual([2, ""]);
    expect(stderr).toMatch(/^error: .*\n$/);
    expect(stderr).toContain(words);
    expect(stderr).not.toContain("secret");
  });
});

describe.skipIf(noRedis)(`on a Redis${noRedis ? ` (skipped: ${noRedis})` : ""}`, () => {
  let redis: TestRedis;
  let locked: TestRedis;
  beforeAll(async () => {
    redis = await TestRedis.start();
    locked = await TestRedis.start();
    const admin = new Redis(locked.url);
    await admin.config("SET", "requirepass", "open-sesame");
    admin.disconnect();
  });
  afterAll(async () => {
    await redis.stop();
    await locked.stop();
  });

  it("draws over HTTP with a worker, which joins and leaves; both end with code 0", { timeout: 120_000 }, async () => {
    const FLOWTURBO_REDIS = locked.url.replace("redis://", "redis://:open-sesame@");
    const common = ["--prefix", "cli", "--log-format", "json"];
    const gateway = start(["serve", "--redis", "--port", "0", "--board", ...common], { FLOWTURBO_REDIS });
    const url = await listening(gateway);
    const statusOf = async (address: string) => (await fetch(address)).status;
    expect([await statusOf(`${url}/livez`), await statusOf(`${url}/readyz`)]).toEqual([200, 503]);
    const early = await post(`${url}/v1/images/generations`, quick);
    expect([early.status, early.body.error.code]).toEqual([503, "fleet_empty"]);

    const shapes = path.join(root, "models/shapes");
    const worker = start(
      ["worker", "--metrics-port", "0", "--warm", "64x64", "--model", `drawer=${shapes}`, ...common],
      {
        FLOWTURBO_REDIS,
      },
    );
    const metrics = await fieldOf(worker, "metrics", "address");
    const [live, ready] = [await statusOf(`${metrics}/livez`), await statusOf(`${metrics}/readyz`)];
    expect([live, [200, 503].includes(ready)]).toEqual([200, true]);
    expect(await fieldOf(worker, "joined the fleet", "redis")).toBe(locked.url);
    expect(await statusOf(`${metrics}/readyz`)).toBe(200);
    await expect.poll(() => statusOf(`${url}/readyz`)).toBe(200);

    const drawn = await post(`${url}/v1/images/generations`, { ...quick, model: "drawer" });
    expect([drawn.status, drawn.body.model, drawn.body.seeds]).toEqual([200, "drawer", [7]]);
    const [text, fleetText] = await Promise.all(
      [metrics, url].map(async (at) => (await fetch(`${at}/metrics`)).text()),
    );
    expect(sumOf(text!, "flowturbo_requests_total")).toBe(2);
    expect(text).toContain('flowturbo_launch_seconds_bucket{model="drawer"');
    expect(text).not.toContain("flowturbo_http");
    expect(sumOf(fleetText!, "flowturbo_fleet_workers")).toBe(1);
    expect((await fetch(`${metrics}/nothing`)).status).toBe(404);
    expect((await fetch(metrics, { method: "POST" })).status).toBe(404);
    expect((await fetch(`${metrics}/metrics`, { method: "POST" })).status).toBe(405);

    const board = await fetch(`${url}/board`);
    expect([board.status, await board.text()]).toEqual([200, expect.stringContaining("flowturbo")]);
    // biome-ignore lint/suspicious/noExplicitAny: whatever it says
    const { queues } = (await (await fetch(`${url}/board/api/queues`)).json()) as any;
    expect(queues.map(({ name }: { name: string }) => name)).toEqual(["drawer"]);

    vi.stubEnv("FLOWTURBO_REDIS", FLOWTURBO_REDIS);
    const status = await run(["fleet", "status", "--prefix", "cli"], temporaryFolder());
    expect([status.code, status.stderr]).toEqual([0, ""]);
    expect(status.stdout).toContain(`fleet at ${locked.url}: 1 worker\n`);
    expect(status.stdout).toMatch(/ {2}drawer: 1 worker, no jobs\n/);
    expect(status.stdout).toMatch(/drawer on onnxruntime.*; 1 drawn .*warm: .*64x64/);
    const json = await run(["fleet", "status", "--prefix", "cli", "--json"], temporaryFolder());
    const report = JSON.parse(json.stdout) as FleetStatus;
    expect(report.workers[0]!.models[0]).toMatchObject({ id: "drawer", drawn: 1, failed: 0 });
    expect(report.models).toMatchObject([{ id: "drawer", workers: 1, waiting: 0 }]);

    // What has begun is drawn; the gateway answers it.
    const last = post(`${url}/v1/images/generations`, { ...quick, seed: 8, num_inference_steps: 30 });
    await expect
      .poll(async () => sumOf(await (await fetch(`${metrics}/metrics`)).text(), "flowturbo_requests_running"))
      .toBe(1);
    worker.kill("SIGTERM");
    expect(await worker.ended).toEqual({ code: 0, signal: null });
    expect((await last).status).toBe(200);
    expect(worker.lines.filter((line) => line.includes('"left the fleet"'))).toHaveLength(1);
    const without = await run(["fleet", "status", "--prefix", "cli"], temporaryFolder());
    expect(without.stdout).toContain("  drawer: 0 workers, no jobs\nNo worker is in it");
    gateway.kill("SIGTERM");
    expect(await gateway.ended).toEqual({ code: 0, signal: null });
    for (const { lines, errors } of [worker, gateway]) expect(`${lines.join("\n")}${errors}`).not.toContain("sesame");
  });

  it("ends at once with a signal while a model loads, and with code 1 if it cannot be loaded", {
    timeout: 60_000,
  }, async () => {
    const early = start(["worker", "--redis", redis.url, "--log-format", "json", "--metrics-port", "0"]);
    await early.line(/"msg":"metrics"/);
    early.kill("SIGTERM");
    expect(await early.ended).toEqual({ code: 0, signal: null });
    const wrong = start(["worker", "--redis", redis.url, "--model", path.join(temporaryFolder(), "no-model")]);
    expect(await wrong.ended).toEqual({ code: 1, signal: null });
    expect(wrong.errors).toContain("no-model");
  });

  it("says that the port of metrics is taken", { timeout: 60_000 }, async () => {
    const { code, stderr } = await run(
      ["worker", "--redis", redis.url, "--metrics-port", String(redis.port)],
      temporaryFolder(),
    );
    expect([code, stderr]).toEqual([2, expect.stringContaining("choose another --metrics-port")]);
  });

  it("says that a fleet is empty, and how to start a worker", async () => {
    const { code, stdout } = await run(
      ["fleet", "status", "--redis", redis.url, "--prefix", "nobody"],
      temporaryFolder(),
    );
    expect(code).toBe(0);
    expect(stdout).toContain("0 workers");
    expect(stdout).toContain("flowturbo worker --redis");
    const json = await run(
      ["fleet", "status", "--redis", redis.url, "--prefix", "nobody", "--json"],
      temporaryFolder(),
    );
    expect(JSON.parse(json.stdout)).toEqual({ at: expect.any(Number), workers: [], models: [] });
  });

  it("says within some seconds that Redis does not answer, or refuses, and ends with code 1", {
    timeout: 60_000,
  }, async () => {
    const start = performance.now();
    const url = "redis://user:sesame@127.0.0.1:1";
    const away = await run(["fleet", "status", "--redis", url], temporaryFolder());
    expect(performance.now() - start).toBeLessThan(20_000);
    expect([away.code, away.stdout]).toEqual([1, ""]);
    expect(away.stderr).toContain("error: Redis at redis://127.0.0.1:1 cannot be used");
    const wrong = locked.url.replace("redis://", "redis://:sesame@");
    for (const args of [["fleet", "status"], ["worker"], ["serve", "--port", "0"]]) {
      const refused = await run([...args, "--redis", wrong], temporaryFolder());
      expect(refused.code, args.join(" ")).toBe(1);
      expect(refused.stderr).toContain("password");
      expect(refused.stderr + refused.stdout).not.toContain("sesame");
    }
    expect(away.stderr).not.toContain("sesame");
  });

  it("answers probes while Redis is away, and draws when it is back", { timeout: 120_000 }, async () => {
    const flags = ["--redis", redis.url, "--prefix", "away", "--log-format", "json"];
    const worker = start(["worker", "--metrics-port", "0", ...flags]);
    const gateway = start(["serve", "--port", "0", ...flags]);
    const [metrics, url] = [await fieldOf(worker, "metrics", "address"), await listening(gateway)];
    await worker.line(/joined/);
    await redis.kill();
    for (const at of [metrics, url]) {
      await expect.poll(async () => (await fetch(`${at}/readyz`)).status).toBe(503);
      expect((await fetch(`${at}/livez`)).status).toBe(200);
    }
    await sleep(500);
    await redis.start();
    await expect.poll(async () => (await fetch(`${url}/readyz`)).status, { timeout: 20_000 }).toBe(200);
    expect((await post(`${url}/v1/images/generations`, quick)).status).toBe(200);
  });
});
