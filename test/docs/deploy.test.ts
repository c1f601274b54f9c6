// deploy/ and docs/guides/fleet.md against the command line, the metrics that there are, the Dockerfiles and each other. There is neither
// Docker nor a cluster here: what can be run of it is Redis, and kustomize where there is kubectl.
import { spawnSync } from "node:child_process";
import { existsSync, readdirSync } from "node:fs";
import path from "node:path";
import { Command } from "commander";
import { Redis } from "ioredis";
import { describe, expect, it } from "vitest";
import { parse, parseAllDocuments } from "yaml";
import { readFlags, readLoadFlags } from "../../lib/cli/flags.js";
import { fleetCommand } from "../../lib/cli/fleet.js";
import { serveCommand } from "../../lib/cli/serve.js";
import { workerCommand } from "../../lib/cli/worker.js";
import { FleetDirectory } from "../../lib/fleet/directory.js";
import { connectFleet, startWorker } from "../../lib/fleet/index.js";
import { workerSchema } from "../../lib/fleet/options.js";
import { checkOptions, loadSchema } from "../../lib/options.js";
import { Metrics } from "../../lib/server/metrics.js";
import { stubModel } from "../server/stub.js";
import { root } from "../support/fixtures.js";
import { noRedis, TestRedis } from "../support/redis.js";
import { read } from "./documents.js";

// biome-ignore lint/suspicious/noExplicitAny: manifests have no type here.
type Manifest = any;

const folder = "deploy";
const files = readdirSync(path.join(root, folder), { recursive: true, withFileTypes: true })
  .filter((entry) => entry.isFile())
  .map((entry) => path.relative(root, path.join(entry.parentPath, entry.name)))
  .filter((file) => !/^deploy\/(\.env$|image\/|models\/|secrets\/)/.test(file));
const guide = read("docs/guides/fleet.md");
const readme = read("deploy/README.md");
const program = ["node", "node_modules/flowturbo/bin/flowturbo.js"];

/** What runs in an image by itself. */
const entrypointOf = (dockerfile: string): string[] => JSON.parse(read(dockerfile).match(/^ENTRYPOINT (.*)$/m)![1]!);
const exposedBy = (dockerfile: string) => Number(read(dockerfile).match(/^EXPOSE (\d+)$/m)![1]);
const dockerfiles: Record<string, string> = {
  pictures: "examples/Dockerfile",
  "pictures-gpu": "examples/Dockerfile.nvidia",
};

/** A command as the command line reads it. @throws for one that it would refuse */
function parsed(words: readonly string[]) {
  expect(words.slice(0, 2)).toEqual(program);
  const { signal } = new AbortController();
  const line = new Command("flowturbo").exitOverride();
  serveCommand(line.command("serve"), signal, () => {});
  workerCommand(line.command("worker"), signal, () => {});
  fleetCommand(line.command("fleet"), signal);
  let found: { name: string; flags: Record<string, string> } | null = null;
  const visit = (command: Command) => {
    command.exitOverride().configureOutput({ writeErr: () => {} });
    if (command.commands.length > 0) for (const child of command.commands) visit(child);
    else
      command.action(() => {
        found = { name: command.name(), flags: command.opts() };
      });
  };
  for (const command of line.commands) visit(command);
  line.parse([...words.slice(2)], { from: "user" });
  const { name, flags } = found!;
  if (name === "worker") {
    checkOptions(workerSchema.partial(), readFlags(workerSchema, flags), "worker");
    checkOptions(loadSchema, readLoadFlags(flags), "worker");
  }
  return { name, flags };
}

/** Seconds of `75s`. */
const seconds = (text: string) => Number(text.match(/^(\d+)s$/)![1]);

it("every file is what its name says", () => {
  expect(files.length).toBeGreaterThan(20);
  for (const file of files) {
    if (/\.ya?ml$/.test(file))
      for (const document of parseAllDocuments(read(file))) expect(document.errors, file).toEqual([]);
    else if (file.endsWith(".json")) expect(() => JSON.parse(read(file)), file).not.toThrow();
    else expect(file).toMatch(/\.(conf|md)$/);
    // Names of registries' hosts are none of ours.
    for (const [, image] of read(file).matchAll(/^\s*(?:- )?image: (\S+)$/gm))
      expect(image, file).toMatch(/^[a-z-]+(\/[a-z-]+)?(:v?\d[\w.-]*)?$/);
  }
});

const rule = "user flowturbo on >password ~flowturbo:* &flowturbo:* +@all -@dangerous +info";

describe("compose.yaml", () => {
  const compose: Manifest = parse(read("deploy/compose.yaml"), { merge: true });
  const services: Record<string, Manifest> = compose.services;
  const ours = Object.entries(services).filter(([, { build }]) => build);
  const commandOf = ({ image, entrypoint, command }: Manifest) =>
    parsed([...(entrypoint ?? entrypointOf(dockerfiles[image]!)), ...command]);

  it.each(ours)("%s is a command that there is, with more patience than it takes", (_, service) => {
    const { flags } = commandOf(service);
    expect(seconds(service.stop_grace_period)).toBeGreaterThan(Number(flags.drain) + 5);
    expect(service.environment.FLOWTURBO_REDIS).toMatch(
      /^redis:\/\/flowturbo:\$\{REDIS_PASSWORD:\?[^}]+\}@redis:6379$/,
    );
    expect(service.depends_on.redis.condition).toBe("service_healthy");
    const { context, dockerfile } = service.build;
    expect(path.join("deploy", context, dockerfile)).toBe(dockerfiles[service.image]);
    expect([service.read_only, service.cap_drop, service.init]).toEqual([true, ["ALL"], true]);
    if (flags.model) for (const model of flags.model) expect(model).toMatch(/^\/models\//);
  });

  it("has a gateway that is reached at the image's port, and two workers that are asked at theirs", () => {
    const gateway = commandOf(services.gateway);
    expect([gateway.name, gateway.flags.redis]).toEqual(["serve", true]);
    expect(services.gateway.ports).toEqual([`127.0.0.1:7860:${exposedBy(dockerfiles.pictures!)}`]);
    expect(gateway.flags.port).toBe(String(exposedBy(dockerfiles.pictures!)));
    expect(services.worker.deploy.replicas).toBe(2);
    for (const name of ["worker", "worker-gpu"]) {
      const { name: command, flags } = commandOf(services[name]);
      expect([command, flags.metricsHost]).toEqual(["worker", "0.0.0.0"]);
      expect(services[name].healthcheck.test.join(" ")).toContain(`http://127.0.0.1:${flags.metricsPort}/readyz`);
    }
    const scraped = parse(read("deploy/prometheus.yml")).scrape_configs.flatMap((job: Manifest) =>
      job.dns_sd_configs.map(({ names, port }: Manifest) => [job.job_name, names, port]),
    );
    expect(scraped).toEqual([
      ["gateway", ["gateway"], exposedBy(dockerfiles.pictures!)],
      ["worker", ["worker", "worker-gpu"], Number(commandOf(services.worker).flags.metricsPort)],
    ]);
  });

  it("has a Redis that loses and tells nothing", () => {
    const { image, command, environment, volumes } = services.redis;
    expect(image).toMatch(/^redis:7\./);
    const script: string = command[2].replaceAll("$$", "$");
    expect(script).toContain(rule.replace("password", "${" + "REDIS_PASSWORD:?}"));
    expect(script.split("\n")[0]).not.toContain("PASSWORD");
    expect(environment.REDIS_PASSWORD).toMatch(/^\$\{REDIS_PASSWORD:\?/);
    expect(volumes).toContain("./redis.conf:/etc/redis/redis.conf:ro");
    const settings = read("deploy/redis.conf").split("\n");
    for (const setting of ["appendonly yes", "maxmemory-policy noeviction", "user default off"])
      expect(settings).toContain(setting);
  });

  it("names files, secrets and volumes that there are, or that README.md makes", () => {
    for (const { secrets = [], volumes = [] } of Object.values(services)) {
      for (const secret of secrets) expect(compose.secrets).toHaveProperty([secret]);
      for (const [source] of volumes.map((volume: string) => volume.split(":")))
        if (!source.startsWith(".")) expect(compose.volumes).toHaveProperty([source]);
        else if (source !== "./models") expect(existsSync(path.join(root, "deploy", source)), source).toBe(true);
    }
    for (const { file } of Object.values<Manifest>(compose.secrets)) {
      expect(readme).toContain(path.basename(file));
      expect(read(".gitignore")).toContain("/deploy/secrets/");
    }
    expect(commandOf(services.gateway).flags.apiKeyFile).toBe("/run/secrets/keys");
    for (const profile of ["gpu", "observe"]) expect(readme).toContain(`--profile ${profile} up`);
  });
});

describe("kubernetes/", () => {
  const at = (file: string) => `deploy/kubernetes/${file}`;
  const documentsOf = (file: string): Manifest[] => parseAllDocuments(read(at(file))).map((each) => each.toJS());
  const kustomizations = files.filter((file) => file.endsWith("/kustomization.yaml"));
  const all = files
    .filter((file) => file.startsWith("deploy/kubernetes/") && !kustomizations.includes(file) && file.endsWith(".yaml"))
    .flatMap((file) => documentsOf(path.relative("deploy/kubernetes", file)));
  const find = (kind: string, name: string): Manifest =>
    all.find((each) => each.kind === kind && each.metadata.name === name);
  const [gateway, worker] = [find("Deployment", "gateway"), find("Deployment", "worker")];
  const gpu = documentsOf("components/gpu/worker.yaml")[0];
  const containerOf = (deployment: Manifest) => deployment.spec.template.spec.containers[0];
  const commandOf = ({ image, command, args }: Manifest) =>
    parsed([...(command ?? entrypointOf(dockerfiles[image]!)), ...args]);

  it("is all of it in a kustomization, but for the secret", () => {
    const named = kustomizations.flatMap((file) => {
      const { resources = [], components = [], patches = [], configMapGenerator = [] } = parse(read(file));
      const names = [...resources, ...components, ...patches.flatMap((patch: Manifest) => patch.path ?? [])];
      const generated = configMapGenerator.flatMap((each: Manifest) => each.files);
      return [...names, ...generated].map((name: string) => path.join(path.dirname(file), name));
    });
    for (const name of named) expect(existsSync(path.join(root, name)), name).toBe(true);
    const isNamed = (file: string) => named.includes(file) || named.includes(path.dirname(file));
    const others = files.filter((file) => file.startsWith("deploy/kubernetes/") && !isNamed(file));
    expect(others.sort()).toEqual(
      [
        "components/scale-to-zero/kustomization.yaml",
        "overlays/cpu/kustomization.yaml",
        "overlays/gpu/kustomization.yaml",
        "secrets.example.yaml",
      ].map(at),
    );
    expect(read(at("components/redis/redis.conf"))).toBe(read("deploy/redis.conf"));
  });

  const kubectl = spawnSync("kubectl", ["kustomize", "--help"]).status === 0;
  it.skipIf(!kubectl)("is built by kustomize, with a GPU or none", () => {
    const built = (overlay: string) => {
      const { status, stdout, stderr } = spawnSync("kubectl", ["kustomize", path.join(root, at(overlay))], {
        encoding: "utf8",
      });
      expect(status, stderr).toBe(0);
      return parseAllDocuments(stdout).map((each): Manifest => each.toJS());
    };
    for (const overlay of ["overlays/cpu", "overlays/gpu"]) {
      const manifests = built(overlay);
      for (const { kind, metadata } of manifests)
        if (kind !== "Namespace") expect(metadata.namespace, metadata.name).toBe("flowturbo");
      const { spec } = manifests.find(({ kind, metadata }) => kind === "Deployment" && metadata.name === "worker");
      expect(spec.replicas).toBeUndefined();
      const { image, resources, command, args } = spec.template.spec.containers[0];
      const isGpu = overlay.endsWith("gpu");
      expect(image).toBe(isGpu ? "pictures-gpu:1" : "pictures:1");
      expect(resources.limits["nvidia.com/gpu"]).toBe(isGpu ? 1 : undefined);
      expect(parsed([...command, ...args]).name).toBe("worker");
    }
  });

  it("runs commands that there are, and gives them more time than they take", () => {
    const pauseOf = (container: Manifest) => Number(container.lifecycle?.preStop.exec.command[1] ?? 0);
    for (const deployment of [gateway, worker]) {
      const container = containerOf(deployment);
      const { name, flags } = commandOf(container);
      expect(name).toBe(deployment === gateway ? "serve" : "worker");
      expect(deployment.spec.template.spec.terminationGracePeriodSeconds).toBeGreaterThan(
        Number(flags.drain) + pauseOf(container) + 5,
      );
      const [{ containerPort, name: port }] = container.ports;
      expect(String(containerPort)).toBe(flags.metricsPort ?? flags.port);
      expect(flags.metricsHost ?? flags.host).toBe("0.0.0.0");
      for (const [probe, route] of [
        ["startupProbe", "/livez"],
        ["readinessProbe", "/readyz"],
        ["livenessProbe", "/livez"],
      ] as const)
        expect(container[probe].httpGet).toEqual({ path: route, port });
      const policy = find("NetworkPolicy", deployment.metadata.name);
      expect(policy.spec.ingress[0].ports).toEqual([{ port: containerPort }]);
      expect(policy.spec.podSelector.matchLabels).toEqual(deployment.spec.template.metadata.labels);
      expect(deployment.spec.selector.matchLabels).toEqual(deployment.spec.template.metadata.labels);
      const monitor = find("PodMonitor", deployment.metadata.name);
      expect(monitor.spec.podMetricsEndpoints[0].port).toBe(port);
      expect(monitor.spec.selector.matchLabels).toEqual(deployment.spec.template.metadata.labels);
      const budget = find("PodDisruptionBudget", deployment.metadata.name);
      expect(budget.spec.selector.matchLabels).toEqual(deployment.spec.template.metadata.labels);
    }
    // It is a patch: what it does not say is that of the base.
    const { flags } = commandOf({ ...containerOf(worker), ...containerOf(gpu) });
    const { flags: base } = commandOf(containerOf(worker));
    expect([flags.drain, flags.metricsPort, flags.metricsHost]).toEqual([
      ...[base.drain, base.metricsPort, base.metricsHost],
    ]);
    expect(commandOf(containerOf(gateway)).flags.redis).toBe(true);
  });

  it("lets nobody but gateways and workers reach Redis, by the user that the guide has", () => {
    const redis = find("StatefulSet", "redis").spec.template;
    const [container] = redis.spec.containers;
    expect(container.image).toBe(parse(read("deploy/compose.yaml"), { merge: true }).services.redis.image);
    expect(container.command[2]).toContain(rule.replace("password", "${" + "REDIS_PASSWORD:?}"));
    expect(container.command[2].split("\n")[0]).not.toContain("PASSWORD");
    const { ingress, podSelector } = find("NetworkPolicy", "redis").spec;
    expect(podSelector.matchLabels).toEqual(redis.metadata.labels);
    expect(ingress).toHaveLength(1);
    const [{ matchLabels, matchExpressions }] = ingress[0].from.map((each: Manifest) => each.podSelector);
    expect(matchExpressions[0].values).toEqual(["gateway", "worker"]);
    for (const deployment of [gateway, worker]) expect(deployment.metadata.labels).toMatchObject(matchLabels);
  });

  it("takes secrets that README.md makes, and of which the example is refused", () => {
    const example = documentsOf("secrets.example.yaml")[0];
    expect(new Set(Object.values(example.stringData))).toEqual(new Set([""]));
    const keys = Object.keys(example.stringData);
    for (const key of keys) expect(readme).toContain(`--from-literal=${key}=`);
    const used = all.flatMap((each) => [
      ...JSON.stringify(each).matchAll(/\{"name":"flowturbo","key":"([\w-]+)"\}/g),
      ...JSON.stringify(each).matchAll(/\{"key":"([\w-]+)","path":"[\w-]+"\}/g),
    ]);
    expect([...new Set(used.map(([, key]) => key))].sort()).toEqual(keys.sort());
    const { volumeMounts } = containerOf(gateway);
    const { mountPath } = volumeMounts.find((each: Manifest) => each.name === "keys");
    expect(commandOf(containerOf(gateway)).flags.apiKeyFile).toBe(`${mountPath}/keys`);
  });

  it("scales the workers that there are", () => {
    const { spec } = find("ScaledObject", "worker");
    expect(spec.scaleTargetRef.name).toBe(worker.metadata.name);
    expect(spec.minReplicaCount).toBe(1);
    const [backlog, busy] = spec.triggers;
    // Seconds for all workers together, the same of each gateway.
    expect([backlog.metricType, backlog.metadata.query]).toEqual([
      "Value",
      expect.stringMatching(/^max\(flowturbo_fleet_backlog_seconds\{/),
    ]);
    expect([busy.metricType, busy.metadata.threshold]).toEqual(["AverageValue", "0.7"]);
    expect(busy.metadata.query).toContain(`container="${containerOf(worker).name}"`);
    for (const { metadata } of spec.triggers) expect(metadata.ignoreNullValues).toBe("false");
    const { path: patched } = parse(read(at("components/scale-to-zero/kustomization.yaml"))).patches.flatMap(
      ({ patch }: Manifest) => parse(patch),
    )[1];
    expect(patched).toBe("/spec/template/spec/containers/0/readinessProbe/httpGet/path");
  });
});

describe("metrics", () => {
  const fleet = new FleetDirectory({} as never).metrics;
  /** Labels of each metric, as the guides have them: that of the server is compared with what the server says. */
  const tables = [read("docs/guides/server.md"), guide].flatMap((text) => [
    ...text.matchAll(/^\| `(flowturbo_\w+)` \| (\w+) \| ([^|]*) \|/gm),
  ]);
  const labelsOf = new Map(tables.map(([, name, , cell]) => [name!, cell!.match(/\w+/g) ?? []]));
  // Of Prometheus, and of those who scrape for it.
  const others = ["job", "instance", "namespace", "container", "le"];

  it("of the fleet are in the guide, and no others", () => {
    const shown = [...guide.matchAll(/^\| `(flowturbo_fleet_\w+)` \| (\w+) \| `model` \|/gm)];
    expect(shown.map(([, name, type]) => `${name} ${type}`).sort()).toEqual(
      fleet.map(({ name, type }) => `${name} ${type}`).sort(),
    );
  });

  it("that are asked for are there, with their labels", async () => {
    const metrics = await Metrics.create(() => new Map());
    const types = new Map(
      [...(await metrics.text()).matchAll(/^# TYPE (\w+) (\w+)$/gm)].map(([, name, type]) => [name!, type!]),
    );
    for (const { name, type } of fleet) types.set(name, type);
    const dashboard = JSON.parse(read("deploy/grafana/flowturbo-fleet.json"));
    const queries: string[] = [
      ...dashboard.panels.flatMap((panel: Manifest) => (panel.targets ?? []).map(({ expr }: Manifest) => expr)),
      ...dashboard.templating.list.map(({ definition = "" }: Manifest) => definition),
      ...parse(read("deploy/kubernetes/components/autoscaling/scaled-object.yaml")).spec.triggers.map(
        ({ metadata }: Manifest) => metadata.query,
      ),
      ...[...guide.matchAll(/`([^`\n]*flowturbo_\w+[^`\n]*)`|^((?:max|sum)\(.*)$/gm)].map(([, a, b]) => a ?? b!),
    ];
    expect(queries.length).toBeGreaterThan(30);
    for (const query of queries) {
      for (const [, name, , selectors = ""] of query.matchAll(/\b((?:flowturbo|process|nodejs)_\w+)(\{([^}]*)\})?/g)) {
        const known = types.has(name!) ? name! : name!.replace(/_(bucket|sum|count)$/, "");
        expect(types.has(known), `${name} in ${query}`).toBe(true);
        if (known !== name) expect(types.get(known), query).toBe("histogram");
        if (!known.startsWith("flowturbo_")) continue;
        const grouped = [...query.matchAll(/\bby \(([^)]*)\)/g)].flatMap(([, list]) => list!.split(/, */));
        const selected = [...selectors.matchAll(/(\w+)(?:=|!)/g)].map(([, label]) => label!);
        // Two metrics of one expression are grouped alike.
        for (const label of [...selected, ...grouped])
          expect([...(labelsOf.get(known) ?? []), ...others], `${known}'s ${label} in ${query}`).toContain(label);
      }
    }
    const expressions = dashboard.panels.flatMap(({ targets = [] }: Manifest) => targets);
    expect(new Set(dashboard.panels.map(({ id }: Manifest) => id)).size).toBe(dashboard.panels.length);
    for (const { datasource } of expressions) expect(datasource.uid).toBe("$" + "{datasource}");
  });
});

describe("the guide", () => {
  const { signal } = new AbortController();
  const described = (describe: (command: Command) => void) => {
    const command = new Command("command").exitOverride();
    describe(command);
    return command.options.map(({ flags }) => flags);
  };

  it("has every flag of a worker that is not about loading a model, and their defaults", () => {
    const worker = described((command) => workerCommand(command, signal, () => {}));
    const serve = described((command) => serveCommand(command, signal, () => {}));
    const rows = [...guide.matchAll(/^\| `(--[^`]+)` \| ([^|]*) \|/gm)];
    const shown = rows.map(([, flags]) => flags!);
    for (const flags of shown) expect(worker).toContain(flags);
    const loading = serve.filter((flags) => read("docs/guides/server.md").includes(`\`${flags}\``));
    expect(worker.filter((flags) => !loading.includes(flags) && !shown.includes(flags))).toEqual([]);
    const shape = workerSchema.shape;
    for (const [flag, option] of [
      ["--lock <ms>", shape.lockMs],
      ["--keep-results <ms>", shape.keepResultsMs],
      ["--prefix <text>", shape.prefix],
    ] as const)
      expect(rows.find(([, flags]) => flags === flag)![2]).toBe(String(option.parse(undefined)));
  });

  it("quotes what was measured", () => {
    const [, perSecond] = guide.match(/drew ([\d.]+) pictures a second for 16 callers over HTTP/)!;
    expect(read("bench/results/serve.md")).toMatch(new RegExp(`^\\| 16 \\| HTTP \\| \\d+ \\| ${perSecond} `, "m"));
    const [, processor] = guide.match(/took ([\d.]+) ms of processor time/)!;
    expect(read("bench/results/serve.md")).toMatch(new RegExp(`^\\| 1 \\| HTTP \\|.*\\| ${processor}\\.\\d+ \\(`, "m"));
  });

  it("gives Redis a user that can do what is needed, and no more", () => {
    expect(guide).toContain(`user default off\n${rule}\n`);
  });

  it.skipIf(noRedis)("and with that user a fleet draws", async () => {
    await using redis = await TestRedis.start();
    const admin = new Redis(redis.url);
    try {
      const [, name, ...rules] = rule.split(" ");
      await admin.call("ACL", "SETUSER", name!, ...rules);
      const url = redis.url.replace("//", "//flowturbo:password@");
      const model = stubModel({ side: 8 });
      await using worker = await startWorker({ redis: url, models: { stub: model } });
      await using fleet = await connectFleet({ redis: url });
      const { seeds } = await fleet.generate({ prompt: "a red circle", steps: 2, seed: 7 });
      expect(seeds).toEqual([7]);
      const aborted = new AbortController();
      const call = fleet.generate({ prompt: "a red circle", onAccept: () => aborted.abort(), signal: aborted.signal });
      await expect(call).rejects.toThrow(/aborted/);
      expect((await fleet.fleet.status()).workers).toHaveLength(1);
      await worker.drain();
      expect(await admin.call("ACL", "LOG")).toEqual([]);
      const locked = new Redis(url, { lazyConnect: true, retryStrategy: () => null });
      await locked.connect();
      for (const [command, ...words] of [["FLUSHALL"], ["CONFIG", "GET", "*"], ["GET", "other:key"], ["KEYS", "*"]])
        await expect(locked.call(command!, ...words)).rejects.toThrow(/NOPERM/);
      locked.disconnect();
    } finally {
      admin.disconnect();
    }
  });
});

describe("README.md", () => {
  it("links to what there is, and shows commands that there are", () => {
    for (const [, link, anchor] of readme.matchAll(/\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)/g)) {
      expect(existsSync(path.join(root, "deploy", link!)), link).toBe(true);
      if (anchor) expect(read(path.join("deploy", link!))).toMatch(new RegExp(`^#+ ${anchor.replaceAll("-", "[ -]")}$`, "im")); // biome-ignore format: one line
    }
    const commands = [...readme.matchAll(/\b(node node_modules\/flowturbo\/.*)$/gm)];
    expect(commands).toHaveLength(2);
    for (const [, command] of commands) expect(parsed(command!.split(" ")).name).toBe("status");
  });

  it("installs the packages that the guides name", () => {
    const [, words] = readme.match(/npm install .* (flowturbo .*)$/m)!;
    expect(words!.split(" ").slice(1).join(" ")).toBe(guide.match(/^npm install (.*)$/m)![1]);
    expect(guide).toContain(read("docs/guides/server.md").match(/^npm install (.*)$/m)![1]!);
  });
});
