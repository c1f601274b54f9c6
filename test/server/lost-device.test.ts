// `flowturbo serve` on a GPU that is lost, by the simulated driver: the picture that was drawn on it fails, and the server ends, since only
// another process gets the device again. Networks are closed forms there.
import path from "node:path";
import { afterAll, expect, it } from "vitest";
import { openCheckpoint } from "../../lib/checkpoint/index.js";
import { embeddedModel } from "../../lib/flowturbo.js";
import { describeAddons, temporaryFolder } from "../native/support.js";
import { checkpointForms, writeForms } from "../support/closed-forms.js";
import { simulatedFolder } from "../support/simulated.js";
import { killAll, startProcess } from "./process.js";
import { post, quick } from "./support.js";

describeAddons("a GPU that is lost for good", () => {
  afterAll(killAll);

  it("fails what was drawn on it, and ends the server with code 1 and the reason", { timeout: 120_000 }, async () => {
    const forms = temporaryFolder();
    writeForms(forms, checkpointForms((await openCheckpoint(embeddedModel)).vae.config.factor));
    const server = await startProcess(
      ["--runtime", "tensorrt", "--tensorrt-dir", path.join(simulatedFolder, "tensorrt"), "--cache", temporaryFolder()],
      {
        env: {
          ...{ LD_LIBRARY_PATH: simulatedFolder, FLOWTURBO_SIMULATED_FORMS: forms },
          FLOWTURBO_SIMULATED_FAULT: "lost vae_encoder",
        },
      },
    );
    // What does not use the graph that loses it is drawn.
    const drawn = await post(`${server.url}/v1/images/generations`, quick);
    expect([drawn.status, drawn.body]).toEqual([200, expect.objectContaining({ created: expect.any(Number) })]);
    expect((await fetch(`${server.url}/livez`)).status).toBe(200);

    const image = `data:image/png;base64,${(drawn.body as { data: { b64_json: string }[] }).data[0]!.b64_json}`;
    const lost = await post(`${server.url}/v1/images/edits`, { ...quick, image });
    expect(lost.status).toBe(503);
    expect(lost.body).toEqual({ error: expect.objectContaining({ code: expect.stringMatching(/device_lost/) }) });
    expect(await server.ended).toEqual({ code: 1, signal: null });
    expect(server.stderr()).toMatch(/lost/);
  });
});
