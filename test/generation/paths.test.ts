// Pictures named by paths, and services that refuse them: no file is looked at, so that no answer tells what is there.
import { mkdtempSync, rmSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { FlowTurbo, type GenerateOptions, Image, OptionError, requestFromJson, requestToJson } from "flowturbo";
import { afterAll, beforeAll, describe, expect, it } from "vitest";

const folder = mkdtempSync(path.join(os.tmpdir(), "flowturbo-paths-"));
const file = path.join(folder, "picture.png");
const absent = path.join(folder, "absent.png");
const small = { prompt: "x", width: 32, height: 32, blocks: "H1", seed: 1 };
let open: FlowTurbo;
let closed: FlowTurbo;
beforeAll(async () => {
  await new Image(32, 32, new Uint8Array(3 * 32 * 32).fill(90)).toFile(file);
  [open, closed] = await Promise.all([
    FlowTurbo.load(undefined, { measureCosts: false }),
    FlowTurbo.load(undefined, { measureCosts: false, allowPaths: false }),
  ]);
});
afterAll(async () => {
  await Promise.all([open.dispose(), closed.dispose()]);
  rmSync(folder, { recursive: true, force: true });
});

const refusal = (call: Promise<unknown>) =>
  call.then(
    () => expect.fail("was not refused"),
    (error) => {
      expect(error).toBeInstanceOf(OptionError);
      return error as OptionError;
    },
  );

describe("paths", () => {
  it("are read by default", async () => {
    const { images } = await open.generate({ ...small, image: file, mask: file });
    expect(images).toHaveLength(1);
  });

  it("are no URLs, which are refused with a word on how to get bytes", async () => {
    for (const name of ["image", "mask"] as const)
      for (const [url, remedy] of [
        ["https://example.com/a.png", /Nothing is downloaded.*fetch/],
        ["HTTP://example.com/a.png", /Nothing is downloaded.*fetch/],
        ["data:image/png;base64,AAAA", /bytes.*base64/],
        [`file://${file}`, /fileURLToPath/],
      ] as const) {
        const options = { ...small, image: file, [name]: url };
        for (const error of [await refusal(open.generate(options)), await refusal(requestToJson(options))]) {
          expect(error.option).toBe(name);
          expect(error.message).toMatch(/received a URL/);
          expect(error.message).toMatch(remedy);
        }
      }
    // A file of such a name, by its folder.
    const colon = path.join(folder, "data:x.png");
    await new Image(8, 8, new Uint8Array(192)).toFile(colon);
    expect((await open.generate({ ...small, image: colon })).images).toHaveLength(1);
  });

  it("are refused where load() or the call says so, whatever the other says, and whether or not there is a file", async () => {
    const calls: [FlowTurbo, Partial<GenerateOptions>][] = [
      [closed, {}],
      [closed, { allowPaths: true }],
      [closed, { allowPaths: undefined }],
      [closed, { allowPaths: false }],
      [open, { allowPaths: false }],
    ];
    for (const [model, allowed] of calls)
      for (const name of ["image", "mask"] as const) {
        const other = name === "mask" ? { image: new Image(32, 32, new Uint8Array(3 * 32 * 32)) } : {};
        const answers = [];
        for (const value of [file, absent, "/etc/passwd", folder, ""]) {
          const error = await refusal(model.generate({ ...small, ...other, [name]: value, ...allowed }));
          expect(error).toMatchObject({ option: name, code: "ERR_FLOWTURBO_OPTION" });
          expect(error.message).toMatch(/allowPaths.*Give the picture's bytes/);
          expect(error.message).not.toContain(folder);
          answers.push(error.message);
        }
        expect(new Set(answers).size).toBe(1);
      }
  });

  it("are refused before any file is looked at: a pipe that nobody writes is not waited for", async () => {
    // Reading it would never end.
    const { execFileSync } = await import("node:child_process");
    const pipe = path.join(folder, "pipe");
    execFileSync("mkfifo", [pipe]);
    await refusal(closed.generate({ ...small, image: pipe }));
    await refusal(requestToJson({ ...small, image: pipe, allowPaths: false }));
  });

  it("leave pictures in memory allowed", async () => {
    const picture = new Image(32, 32, new Uint8Array(3 * 32 * 32).fill(90));
    for (const image of [picture, await picture.toPNG()])
      expect((await closed.generate({ ...small, image })).images).toHaveLength(1);
  });

  it("are refused by requestToJson() too, and the JSON form can neither name a file nor allow it", async () => {
    for (const value of [file, absent]) await refusal(requestToJson({ ...small, image: value, allowPaths: false }));
    const json = await requestToJson({ ...small, image: file });
    expect(JSON.stringify(json)).not.toMatch(/allowPaths|picture\.png/);
    for (const body of [
      { ...small, allowPaths: true },
      { ...small, image: file },
      { ...small, image: { file } },
    ])
      expect(() => requestFromJson(body)).toThrow(OptionError);
    expect((await closed.generate(requestFromJson(json))).images).toHaveLength(1);
  });
});
