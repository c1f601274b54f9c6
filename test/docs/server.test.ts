// docs/guides/server.md against the server: its tables of flags, fields, events, errors, metrics and options have all that there is, and
// no more.
import { readdirSync } from "node:fs";
import path from "node:path";
import { Command } from "commander";
import { FlowTurbo } from "flowturbo";
import { createServer } from "flowturbo/server";
import { describe, expect, it } from "vitest";
import { z } from "zod";
import { serveCommand } from "../../lib/cli/serve.js";
import { errorTable } from "../../lib/errors.js";
import { bodySchemas, refusedFields } from "../../lib/server/fields.js";
import { limitsOf, serverSchema } from "../../lib/server/options.js";
import { root } from "../support/fixtures.js";
import { read } from "./documents.js";

const guide = read("docs/guides/server.md");
/** What is below a heading, up to the next one of any level. */
const section = (heading: string) =>
  guide.match(new RegExp(`^#+ ${heading}\n([\\s\\S]*?)(?=^#+ |(?![\\s\\S]))`, "m"))![1]!;
/** Cells of the tables of a section, without their heads. */
const rows = (heading: string) =>
  [...section(heading).matchAll(/^\| (.*) \|$/gm)]
    .map(([, row]) => row!.split(" | "))
    .filter(([first]) => first!.startsWith("`") || /^\d/.test(first!));
/** What is code in a cell. */
const codes = (cell: string) => [...cell.matchAll(/`([^`]+)`/g)].map(([, code]) => code!);
const firsts = (heading: string) => rows(heading).flatMap(([first]) => codes(first!));

const serve = new Command("serve").exitOverride();
serveCommand(serve, new AbortController().signal, () => {});
const limits = limitsOf(serverSchema.parse({ models: { one: {} } }));
const schemas = bodySchemas(limits);

it("has every flag, as --help has it, and its default", () => {
  expect(firsts("Flags").sort()).toEqual(serve.options.map(({ flags }) => flags).sort());
  for (const { flags, defaultValue } of serve.options) {
    if (typeof defaultValue !== "string") continue;
    const [, shown] = rows("Flags").find(([first]) => codes(first!).includes(flags))!;
    expect(shown, flags).toContain(defaultValue);
  }
  const help = serve.createHelp().formatHelp(serve, Object.assign(serve.createHelp(), { helpWidth: 1000 }));
  expect(help).toMatch(/--max-size <WxH> +largest picture, by its pixels \(default: 1536x1536\)\n/);
  expect(help).not.toMatch(/\[object|\(default: .*\(default: /);
});

describe("the tables of fields", () => {
  const tables = [...rows("Pictures"), ...rows("Edits")];

  it("have every field and no other", () => {
    const known = Object.values(schemas).flatMap((schema) => Object.keys(schema.shape));
    const shown = tables.flatMap(([first]) => codes(first!));
    expect([...shown, "webhook"].sort()).toEqual([...new Set(known)].sort());
    expect(section("Webhooks")).toContain("`webhook`");
    for (const name of Object.keys(refusedFields)) expect(section("Pictures")).toContain(`\`${name}\``);
  });

  it("have every value of those that are words", () => {
    const { properties } = z.toJSONSchema(schemas.edit, { io: "input" }) as {
      properties: Record<string, { enum?: string[] }>;
    };
    for (const [name, { enum: words = [] }] of Object.entries(properties)) {
      const row = tables.find(([first]) => codes(first!).includes(name))!.join(" ");
      for (const word of words) expect(row, name).toContain(`"${word}"`);
    }
  });
});

it("has every event", () => {
  const shown = [...firsts("Streams"), ...firsts("Jobs")];
  const sources = ["jobs", "plugin", "run"].map((name) => read(`lib/server/${name}.ts`)).join("\n");
  const named = [...sources.matchAll(/#add\("(job\.\w+)"/g)].map(([, name]) => name!);
  const ends = ["completed", "failed", "cancelled"].map((status) => `job.${status}`);
  const kinds = ["image_generation", "image_edit"].flatMap((kind) => [`${kind}.partial_image`, `${kind}.completed`]);
  expect(shown.sort()).toEqual([...named, ...ends, ...kinds, "error"].sort());
});

it("has every code of errors with its status", () => {
  const table = rows("Errors").map(([status, shown, again]) => ({
    ...{ status: Number(status), codes: codes(shown!), isRetryable: again === "yes" },
  }));
  const known = new Set(table.flatMap((row) => row.codes));
  const sources = readdirSync(path.join(root, "lib/server")).map((file) => read(`lib/server/${file}`));
  const named = [
    ...sources.join("\n").matchAll(/\bcode: "([a-z_]+)"|(?:, |\n\s+)"((?:un|missing_)[a-z]+_[a-z_]+)",?\s*\)/g),
  ];
  expect(named.length).toBeGreaterThan(20);
  for (const [, code, other] of named) expect(known).toContain(code ?? other);
  for (const [name, { status, retryable }] of Object.entries(errorTable)) {
    // Requests have no `timeoutMs`, and options are fields.
    if (name === "ERR_FLOWTURBO_TIMEOUT" || name === "ERR_FLOWTURBO_OPTION") continue;
    const code = name.replace("ERR_FLOWTURBO_", "").toLowerCase();
    const row = table.find((each) => each.codes.includes(code));
    // The others that are the server's fault are summed up.
    if (!row) expect([status, retryable], name).toEqual([500, false]);
    else expect([row.status, row.isRetryable], name).toEqual([status, retryable]);
  }
});

it("has every metric with its type and labels", async () => {
  const model = await FlowTurbo.load(undefined, { measureCosts: false });
  // As if it had been loaded with several devices.
  const stats = model.stats.bind(model);
  const device = { number: 0, name: "GPU", lost: false, launches: 1, rows: 1, milliseconds: 1 };
  model.stats = () => ({ ...stats(), devices: [device] });
  const app = await createServer({ models: { shapes: model }, warm: [], page: false, logger: false });
  try {
    const payload = { prompt: "a red circle", num_inference_steps: 2 };
    await app.inject({ method: "POST", url: "/v1/images/generations", payload });
    const job = await app.inject({ method: "POST", url: "/v1/jobs", payload });
    await expect.poll(async () => (await app.inject(job.headers.location!)).json().status).toBe("completed");
    const { body } = await app.inject("/metrics");
    const found = [...body.matchAll(/^# TYPE (flowturbo_\w+) (\w+)$/gm)].map(([, name, type]) => {
      const samples = [...body.matchAll(new RegExp(`^${name}(?:_bucket|_sum|_count)?(?:\\{(.*)\\})? `, "gm"))];
      const labels = samples.flatMap(([, text = ""]) => [...text.matchAll(/(\w+)="/g)].map(([, label]) => label!));
      return { name, type, labels: [...new Set(labels)].filter((label) => label !== "le").sort() };
    });
    const shown = rows("Probes, metrics, logs")
      .filter(([first]) => first!.startsWith("`flowturbo_"))
      .map(([name, type, labels]) => ({ name: codes(name!)[0]!, type: type!, labels: codes(labels!).sort() }));
    const byName = (a: { name?: string | undefined }, b: { name?: string | undefined }) => (a.name! < b.name! ? -1 : 1);
    expect(shown.sort(byName)).toEqual(found.sort(byName));
    for (const [, reason] of body.matchAll(/flowturbo_requests_refused_total\{.*reason="(\w+)"/g))
      expect(section("Probes, metrics, logs")).toContain(`\`${reason}\``);
  } finally {
    await app.close();
    await model.dispose();
  }
});

it("has every option of the plugin, and those of createServer", () => {
  const own = read("lib/server/index.ts")
    .match(/interface CreateServerOptions[^{]*\{([\s\S]*?)\n\}/)![1]!
    .matchAll(/^ {2}(\w+)\?:/gm);
  const names = [...Object.keys(serverSchema.shape), ...[...own].map(([, name]) => name!)];
  expect(firsts("In an app of your own").filter((name) => /^\w+$/.test(name)).sort()).toEqual(names.sort()); // biome-ignore format: one line
});

it("names the packages that have to be installed, everywhere", () => {
  const { peerDependencies, peerDependenciesMeta } = JSON.parse(read("package.json")) as Record<
    string,
    Record<string, unknown>
  >;
  const [, names] = guide.match(/^npm install (.*)$/m)!;
  for (const name of names!.split(" ")) {
    expect(peerDependencies).toHaveProperty([name]);
    expect(peerDependenciesMeta![name]).toEqual({ optional: true });
  }
  for (const file of ["examples/Dockerfile", "examples/fastify.js", "examples/flowturbo.service", "README.md"])
    expect(read(file), file).toContain(names);
});

describe("what runs it elsewhere", () => {
  const unit = read("examples/flowturbo.service").replaceAll("\\\n", " ");
  const setting = (name: string) => unit.match(new RegExp(`^${name}=(.*)$`, "m"))?.[1];
  const compose = read("examples/compose.yaml");
  /** Flags as `serve` reads them; one that it does not have throws. */
  const flagsOf = (words: readonly string[]) => {
    const command = new Command("serve").exitOverride().configureOutput({ writeErr: () => {} });
    serveCommand(command, new AbortController().signal, () => {});
    command.action(() => {});
    command.parse([...words], { from: "user" });
    return command.opts<{ drain: string; apiKeyFile: string; model: string[] }>();
  };

  it("systemd gives it more time than it takes, and what V8 needs", () => {
    const words = setting("ExecStart")!.trim().split(/\s+/);
    expect(words.slice(0, 3)).toEqual(["/usr/bin/node", "node_modules/flowturbo/bin/flowturbo.js", "serve"]);
    const { drain, apiKeyFile } = flagsOf(words.slice(3));
    expect(Number(setting("TimeoutStopSec"))).toBeGreaterThan(Number(drain) + 5);
    expect(apiKeyFile).toBe(`\${CREDENTIALS_DIRECTORY}/${setting("LoadCredential")!.split(":")[0]}`);
    expect([setting("MemoryDenyWriteExecute"), setting("NoNewPrivileges")]).toEqual(["no", "yes"]);
    expect(setting("RestartPreventExitStatus")).toBe("2");
  });

  it("Compose gives it more time than it takes, and a secret that there is", () => {
    const commands = [...compose.matchAll(/^ {4}command:\n((?: {6}- .*\n)+)/gm)].map(([, list]) =>
      list!.split("\n").flatMap((line) => line.match(/^ {6}- (.*)$/)?.[1] ?? []),
    );
    expect(commands).toHaveLength(2);
    const [, grace] = compose.match(/^ {2}stop_grace_period: (\d+)s$/m)!;
    for (const words of commands) {
      const { drain, apiKeyFile, model } = flagsOf(words);
      expect(Number(grace)).toBeGreaterThan(Number(drain) + 5);
      const [, secret] = apiKeyFile.match(/^\/run\/secrets\/(.*)$/)!;
      expect(compose).toMatch(new RegExp(`^secrets:\n {2}${secret}:$`, "m"));
      expect(model[0]).toMatch(/^\/models\//);
    }
    // Names of registries' hosts are none of ours.
    expect(compose).not.toContain("image:");
  });

  it("Kubernetes gives it more time than it takes, and asks for probes that there are", () => {
    const text = section("Kubernetes");
    const [, args] = text.match(/args: (\[.*\])/)!;
    const [, grace] = text.match(/terminationGracePeriodSeconds: (\d+)/)!;
    const [, pause] = text.match(/"sleep", "(\d+)"/)!;
    expect(Number(grace)).toBeGreaterThan(Number(flagsOf(JSON.parse(args!)).drain) + Number(pause));
    const probed = [...text.matchAll(/(\w+)Probe:\n {8}httpGet: \{ path: (\/\w+)/g)].map(([, kind, at]) => [kind, at]);
    expect(probed).toEqual([
      ["startup", "/livez"],
      ["readiness", "/readyz"],
      ["liveness", "/livez"],
    ]);
  });
});
