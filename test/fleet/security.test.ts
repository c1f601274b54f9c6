// Redis with a password and TLS, as the command line meets it: what is wrong is named, and no password is shown.
import { execFileSync, spawnSync } from "node:child_process";
import { mkdtempSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { root } from "../support/fixtures.js";
import { noRedis, TestRedis } from "../support/redis.js";

const password = "correct-horse-battery";
let redis: TestRedis;
let tlsPort: number;
let certificate: string;

/** `flowturbo fleet status`, in a process of its own. */
function status(url: string, env: NodeJS.ProcessEnv = {}) {
  const args = ["bin/flowturbo.js", "fleet", "status", "--json"];
  const { FLOWTURBO_REDIS: _, ...others } = process.env;
  const run = spawnSync(process.execPath, args, {
    ...{ cwd: root, encoding: "utf8", timeout: 60_000 },
    env: { ...others, FLOWTURBO_REDIS: url, ...env },
  });
  return { code: run.status, out: run.stdout, text: `${run.stdout}${run.stderr}` };
}

describe.skipIf(noRedis)(`Redis with a password and TLS${noRedis ? ` (skipped: ${noRedis})` : ""}`, () => {
  beforeAll(async () => {
    const folder = mkdtempSync(path.join(os.tmpdir(), "flowturbo-tls-"));
    certificate = path.join(folder, "certificate.pem");
    const key = path.join(folder, "key.pem");
    execFileSync(
      "openssl",
      [
        ...["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", key, "-out", certificate],
        ...["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"],
      ],
      { stdio: "ignore" },
    );
    tlsPort = 10_000 + Math.floor(Math.random() * 20_000);
    redis = await TestRedis.start({
      flags: [
        ...["--requirepass", password, "--tls-port", String(tlsPort), "--tls-auth-clients", "no"],
        ...["--tls-cert-file", certificate, "--tls-key-file", key, "--tls-ca-cert-file", certificate],
      ],
      password,
    });
  });
  afterAll(() => redis?.stop());

  it("is used with both", () => {
    const { code, out, text } = status(`rediss://:${password}@127.0.0.1:${tlsPort}`, {
      NODE_EXTRA_CA_CERTS: certificate,
    });
    expect(code, text).toBe(0);
    expect(JSON.parse(out)).toMatchObject({ workers: [], models: [] });
  });

  it.each([
    ["a wrong password", () => [`redis://:wrong-${password}@127.0.0.1:${redis.port}`, {}], /WRONGPASS|password/],
    ["no password", () => [`redis://127.0.0.1:${redis.port}`, {}], /NOAUTH|password/],
    ["a certificate that nobody vouches for", () => [`rediss://:${password}@127.0.0.1:${tlsPort}`, {}], /certificate/],
    [
      "a certificate of another name",
      () => [`rediss://:${password}@127.0.0.2:${tlsPort}`, { NODE_EXTRA_CA_CERTS: "" }],
      /cannot be used/,
    ],
  ] as const)("is refused with %s", (_name, given, reason) => {
    const [url, env] = given() as unknown as [string, NodeJS.ProcessEnv];
    const { code, text } = status(url, env);
    expect(code).toBe(1);
    expect(text).toMatch(reason);
    expect(text).not.toContain(password);
  });
});
