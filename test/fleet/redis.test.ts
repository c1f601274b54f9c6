// What tests and benchmarks of the fleet stand on: a Redis that comes and goes, and processes that leave nothing behind.
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { mkdir, writeFile } from "node:fs/promises";
import net from "node:net";
import path from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { afterEach, describe, expect, it } from "vitest";
import { root } from "../support/fixtures.js";
import { GuardedProcess, startScript } from "../support/processes.js";
import { noRedis, type RedisOptions, TestRedis } from "../support/redis.js";

const opened: { stop(): Promise<unknown> }[] = [];
afterEach(async () => {
  for (const each of opened.splice(0)) await each.stop();
});

const isAlive = (pid: number) => {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, "utf8");
    return !/^[ZX]/.test(stat.slice(stat.lastIndexOf(")") + 2));
  } catch {
    return false;
  }
};
const until = async (is: () => boolean) => {
  for (let turn = 0; turn < 500 && !is(); turn++) await sleep(10);
  expect(is()).toBe(true);
};

describe.skipIf(noRedis !== null)(`a Redis of one's own${noRedis ? ` (${noRedis})` : ""}`, () => {
  async function start(options?: RedisOptions): Promise<TestRedis> {
    const redis = await TestRedis.start(options);
    opened.push(redis);
    return redis;
  }

  /** One command, and the first line of what it answers; null where nobody does. */
  function ask(redis: TestRedis, command: string): Promise<string | null> {
    return new Promise((resolve) => {
      const socket = net.connect(redis.port, "127.0.0.1", () => socket.write(`${command}\r\n`));
      socket.setEncoding("utf8").once("data", (text) => {
        resolve(String(text).split("\r\n").slice(0, 2).join(" "));
        socket.destroy();
      });
      socket.setTimeout(100, () => socket.destroy());
      socket.on("error", () => {});
      socket.once("close", () => resolve(null));
    });
  }

  it.each(["everysec", "always"] as const)("keeps what it was told over every restart, with %s", async (log) => {
    const redis = await start({ log });
    const { url, pid } = redis;
    expect(await ask(redis, "SET a 1")).toMatch(/^\+OK/);
    await redis.restart();
    expect(await ask(redis, "GET a")).toBe("$1 1");
    expect(await ask(redis, "SET a 2")).toMatch(/^\+OK/);
    await redis.restart("SIGKILL");
    expect(await ask(redis, "GET a")).toBe("$1 2");
    expect(redis.url).toBe(url);
    expect(redis.pid).not.toBe(pid);
    expect(await ask(redis, "CONFIG GET appendfsync")).toContain("*2");
  });

  it("is empty after a restart where it keeps no log", async () => {
    const redis = await start({ log: "none" });
    await ask(redis, "SET a 1");
    await redis.restart();
    expect(await ask(redis, "GET a")).toMatch(/^\$-1/);
  });

  it("is gone for a while, and comes back", async () => {
    const redis = await start();
    await ask(redis, "SET a 1");
    const back = redis.pause(300);
    await until(() => {
      try {
        return !redis.pid;
      } catch {
        return true;
      }
    });
    await sleep(50);
    expect(await ask(redis, "GET a")).toBeNull();
    await back;
    expect(await ask(redis, "GET a")).toBe("$1 1");
  });

  it("hangs for a while", async () => {
    const redis = await start();
    const over = redis.freeze(400);
    expect(await ask(redis, "PING")).toBeNull();
    await over;
    expect(await ask(redis, "PING")).toMatch(/^\+PONG/);
  });

  it("leaves neither process nor files behind, and several run beside each other", async () => {
    const [one, other] = await Promise.all([start(), start()]);
    expect(one.port).not.toBe(other.port);
    const pid = one.pid;
    await one.stop();
    expect([isAlive(pid), existsSync(one.folder)]).toEqual([false, false]);
    expect(await ask(other, "PING")).toMatch(/^\+PONG/);
  });
});

describe.skipIf(process.platform !== "linux")("a process that is guarded", () => {
  const node = (script: string) => {
    const started = new GuardedProcess(process.execPath, ["-e", script]);
    opened.push(started);
    return started;
  };

  /** Shells that would kill its group. */
  const guardsOf = (pid: number) =>
    readdirSync("/proc").filter((name) => {
      try {
        return /^\d+$/.test(name) && readFileSync(`/proc/${name}/cmdline`, "utf8").endsWith(`\0${pid}\0`);
      } catch {
        return false;
      }
    }).length;

  it("hands over its lines, and says how it ended", async () => {
    const started = node(
      "process.stdout.write('on'); setTimeout(() => { console.log('e\\ntwo'); process.stdout.write('rest') }, 20)",
    );
    expect(await started.line(/^t/)).toBe("two");
    expect(await started.ended).toEqual({ code: 0, signal: null });
    expect(started.lines).toEqual(["one", "two", "rest"]);
    await expect(started.line("three")).rejects.toThrow('"three" was expected, but node -e');
  });

  it("says what failed where it cannot be started", async () => {
    const started = new GuardedProcess("/nowhere", []);
    await started.ended;
    await expect(started.line("x")).rejects.toThrow("ENOENT");
  });

  it("is ended while it hangs, with what it has started", async () => {
    const started = node(
      `process.on("SIGTERM", () => {}); setInterval(() => {}, 1000); console.log("child " + require("child_process").spawn("sleep", ["100"]).pid)`,
    );
    const child = Number((await started.line("child")).split(" ")[1]);
    started.kill("SIGSTOP");
    expect(await started.stop("SIGTERM", 200)).toEqual({ code: null, signal: "SIGKILL" });
    await until(() => !isAlive(child));
  });

  it("goes when who started it is killed, even while it hangs", async () => {
    const file = path.join(root, ".cache", "guarded-sleeps.ts");
    await mkdir(path.dirname(file), { recursive: true });
    await writeFile(
      file,
      `import { GuardedProcess } from "../test/support/processes.js";
      const started = new GuardedProcess("sleep", ["100"]);
      started.kill("SIGSTOP");
      console.log("started " + started.pid);`,
    );
    const parent = await startScript(file);
    opened.push(parent);
    const pid = Number((await parent.line("started")).split(" ")[1]);
    expect(isAlive(pid)).toBe(true);
    parent.kill("SIGKILL");
    await until(() => !isAlive(pid));
    await until(() => guardsOf(pid) === 0);
  });

  it("needs no guard once it has ended", async () => {
    const started = node("setTimeout(() => {}, 50)");
    expect(guardsOf(started.pid)).toBe(1);
    await started.ended;
    await until(() => guardsOf(started.pid) === 0);
  });
});
