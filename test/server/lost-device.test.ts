// `flowturbo serve` on a GPU that is lost, by the simulated driver: the picture that was drawn on it fails, and the server ends, since only
// another process gets the device again; but for one of several. Networks are closed forms there.
import path from "node:path";
import { afterAll, expect, it } from "vitest";
import { openCheckpoint } from "../../lib/checkpoint/index.js";
import { embeddedModel } from "../../lib/flowturbo.js";
import { describeAddons, temporaryFolder } from "../native/support.js";
import { checkpointForms, writeForms } from "../support/closed-forms.js";
import { simulatedFolder } from "../support/simulated.js";
import { killAll, startProcess } from "./process.js";
import { post, quick } from "./support.js";

/** @param fault as FLOWTURBO_SIMULATED_FAULT has it */
async function serverOf(fault: string, flags: readonly string[] = [], env: NodeJS.ProcessEnv = {}) {
  const forms = temporaryFolder();
  writeForms(forms, checkpointForms((await openCheckpoint(embeddedModel)).vae.config.factor));
  const tensorrt = path.join(simulatedFolder, "tensorrt");
  return startProcess(["--runtime", "tensorrt", "--tensorrt-dir", tensorrt, "--cache", temporaryFolder(), ...flags], {
    env: {
      ...{ LD_LIBRARY_PATH: simulatedFolder, FLOWTURBO_SIMULATED_FORMS: forms, FLOWTURBO_SIMULATED_FAULT: fault },
      ...env,
    },
  });
}

const imageOf = ({ body }: Awaited<ReturnType<typeof post>>) =>
  `data:image/png;base64,${(body as { data: { b64_json: string }[] }).data[0]!.b64_json}`;

describeAddons("a GPU that is lost for good", () => {
  afterAll(killAll);

  it("fails what was drawn on it, and ends the server with code 1 and the reason", { timeout: 120_000 }, async () => {
    const server = await serverOf("lost vae_encoder");
    // What does not use the graph that loses it is drawn.
    const drawn = await post(`${server.url}/v1/images/generations`, quick);
    expect([drawn.status, drawn.body]).toEqual([200, expect.objectContaining({ created: expect.any(Number) })]);
    expect((await fetch(`${server.url}/livez`)).status).toBe(200);

    const lost = await post(`${server.url}/v1/images/edits`, { ...quick, image: imageOf(drawn) });
    expect(lost.status).toBe(503);
    expect(lost.body).toEqual({ error: expect.objectContaining({ code: expect.stringMatching(/device_lost/) }) });
    expect(await server.ended).toEqual({ code: 1, signal: null });
    expect(server.stderr()).toMatch(/lost/);
  });

  it("is one of two: its request starts again on the other, and the server goes on", { timeout: 120_000 }, async () => {
    const env = { FLOWTURBO_SIMULATED_DEVICES: "0,0" };
    const server = await serverOf("lost vae_encoder 1", ["--devices", "all"], env);
    const drawn = await post(`${server.url}/v1/images/generations`, quick);
    expect(drawn.status).toBe(200);
    expect(await server.metric("flowturbo_device_lost")).toBe(0);

    const edited = await post(`${server.url}/v1/images/edits`, { ...quick, image: imageOf(drawn) });
    expect(edited.status, JSON.stringify(edited.body)).toBe(200);
    expect(await server.metric("flowturbo_device_lost")).toBe(1);
    const before = await server.metric("flowturbo_device_launches_total");
    const again = await post(`${server.url}/v1/images/generations`, { ...quick, seed: 8 });
    expect(again.status).toBe(200);
    expect(await server.metric("flowturbo_device_launches_total")).toBeGreaterThan(before);
    expect(await server.metric("flowturbo_device_busy_seconds_total")).toBeGreaterThan(0);
    for (const probe of ["livez", "readyz"]) expect((await fetch(`${server.url}/${probe}`)).status, probe).toBe(200);
    server.child.kill("SIGTERM");
    expect(await server.ended).toEqual({ code: 0, signal: null });
  });

  it("is the last of two: the server ends", { timeout: 120_000 }, async () => {
    const env = { FLOWTURBO_SIMULATED_DEVICES: "0,0" };
    const server = await serverOf("lost vae_encoder", ["--devices", "all"], env);
    const drawn = await post(`${server.url}/v1/images/generations`, quick);
    // It is lost on the one, starts again on the other, and is lost there too.
    const lost = await post(`${server.url}/v1/images/edits`, { ...quick, image: imageOf(drawn) });
    expect(lost.status).toBe(503);
    expect(await server.ended).toEqual({ code: 1, signal: null });
  });
});
