/**
 * Metrics for Prometheus: what the models count themselves is read when it is asked for; the server counts its own answers, and the phases and
 * steps of what was drawn.
 */

import type { ImageModel } from "../model.js";
import type { DeviceStats, Histogram } from "../serving/stats.js";
import type { Answer } from "./answer.js";
import type { DirectoryMetric } from "./directory.js";
import { promClient } from "./packages.js";

type Client = typeof import("prom-client");
type Labels = Record<string, string | number>;
interface Value {
  readonly labels: Labels;
  readonly value: number;
  readonly metricName?: string;
}

/** Upper ends in seconds, from a millisecond to ten minutes. */
const secondBounds = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600];

/** Metrics of the process and of its models. */
export class ModelMetrics {
  protected readonly registry: InstanceType<Client["Registry"]>;

  /**
   * @param models those that are loaded, by id, when it is called
   * @param further what else is read when it is asked for
   */
  static async create(
    models: () => ReadonlyMap<string, ImageModel>,
    further: readonly DirectoryMetric[] = [],
  ): Promise<ModelMetrics> {
    return new ModelMetrics(await promClient.load(), models, further);
  }

  protected constructor(
    client: Client,
    models: () => ReadonlyMap<string, ImageModel>,
    further: readonly DirectoryMetric[],
  ) {
    const registry = new client.Registry();
    this.registry = registry;
    // Event loop, memory, processor time, garbage collection.
    client.collectDefaultMetrics({ register: registry });
    const register = (name: string, type: string, help: string, values: () => Value[]) => {
      const get = () => ({ name, help, type, values: values() });
      // What the registry needs of a metric, no more.
      registry.registerMetric({ name, get, reset() {} } as never);
    };
    for (const metric of further)
      register(metric.name, metric.type, metric.help, () => metric.values().map((each) => ({ ...each })));
    const add = (name: string, type: string, help: string, valuesOf: (id: string, model: ImageModel) => Value[]) =>
      register(name, type, help, () => [...models()].flatMap(([id, model]) => valuesOf(id, model)));
    const one = (name: string, type: string, help: string, read: (model: ImageModel) => number) =>
      add(name, type, help, (id, model) => [{ labels: { model: id }, value: read(model) }]);
    one(
      "flowturbo_queue_waiting",
      "gauge",
      "Requests that wait to be admitted.",
      (model) => model.stats().queue.waiting,
    );
    one("flowturbo_queue_limit", "gauge", "Requests that may wait.", (model) => model.stats().queue.limit);
    one(
      "flowturbo_requests_running",
      "gauge",
      "Requests that have been admitted and are not over.",
      (model) => model.stats().running.requests,
    );
    one(
      "flowturbo_pictures_running",
      "gauge",
      "Pictures of those requests.",
      (model) => model.stats().running.pictures,
    );
    one("flowturbo_model_ready", "gauge", "1 where calls of the model are worked on.", (model) =>
      Number(model.health().ready),
    );
    one(
      "flowturbo_runtime_restarts_total",
      "counter",
      "How often the runtime was lost and started again.",
      (model) => model.stats().runtime.restarts,
    );
    one(
      "flowturbo_slow_launches_total",
      "counter",
      "Launches that took far longer than they cost.",
      (model) => model.stats().runtime.slowLaunches,
    );
    one(
      "flowturbo_requests_accepted_total",
      "counter",
      "Requests that were not refused.",
      (model) => model.stats().requests.accepted,
    );
    one(
      "flowturbo_launch_padding_rows_total",
      "counter",
      "Rows that were computed only to fill a batch.",
      (model) => model.stats().launches.padding,
    );
    one(
      "flowturbo_cost_drift",
      "gauge",
      "How much slower launches are now than the table of costs says, as a factor.",
      (model) => model.costs.drift,
    );
    add(
      "flowturbo_requests_refused_total",
      "counter",
      "Requests that were refused before any work, by reason.",
      (id, model) =>
        Object.entries(model.stats().requests.refused).map(([reason, value]) => ({
          labels: { model: id, reason: snake(reason) },
          value,
        })),
    );
    add("flowturbo_requests_total", "counter", "Accepted requests that have ended, by how.", (id, model) => {
      const { completed, failed, aborted, timedOut } = model.stats().requests;
      const endings = { completed, failed, aborted, timed_out: timedOut };
      return Object.entries(endings).map(([outcome, value]) => ({ labels: { model: id, outcome }, value }));
    });
    one(
      "flowturbo_requests_late_total",
      "counter",
      "Completed requests that missed their time limit.",
      (model) => model.stats().requests.late,
    );
    add("flowturbo_queue_seconds", "histogram", "Time from the call until the request was admitted.", (id, model) =>
      histogram("flowturbo_queue_seconds", { model: id }, model.stats().milliseconds.queued),
    );
    add("flowturbo_launch_seconds", "histogram", "Time of launches, by graph.", (id, model) =>
      Object.entries(model.stats().milliseconds.launches).flatMap(([graph, times]) =>
        histogram("flowturbo_launch_seconds", { model: id, graph }, times),
      ),
    );
    add("flowturbo_launch_rows", "histogram", "Rows of a launch: one for each picture or text.", (id, model) =>
      rowsHistogram("flowturbo_launch_rows", { model: id }, model.stats().rowsPerLaunch),
    );
    const device = (name: string, type: "counter" | "gauge", help: string, read: (device: DeviceStats) => number) =>
      add(`flowturbo_device_${name}`, type, `${help} Of a model that was loaded with several.`, (id, model) =>
        (model.stats().devices ?? []).map((each) => ({
          labels: { model: id, device: String(each.number), name: each.name },
          value: read(each),
        })),
      );
    device("launches_total", "counter", "Launches of a device.", ({ launches }) => launches);
    device("rows_total", "counter", "Rows of the launches of a device, without padding.", ({ rows }) => rows);
    device("busy_seconds_total", "counter", "Time of the launches of a device.", ({ milliseconds }) => milliseconds / 1000); // biome-ignore format: one line
    device("lost", "gauge", "1 for a device that is lost for good; 0 otherwise.", ({ lost }) => Number(lost));
  }

  get contentType(): string {
    return this.registry.contentType;
  }

  text(): Promise<string> {
    return this.registry.metrics();
  }
}

/** What the server counts besides. */
export class Metrics extends ModelMetrics {
  readonly #answers;
  readonly #durations;
  readonly #phases;
  readonly #steps;
  readonly #hangUps;
  readonly #dropped;
  readonly #jobs;

  /** @param openRuns how many requests are worked on or wait, when it is called */
  static override async create(
    models: () => ReadonlyMap<string, ImageModel>,
    further: readonly DirectoryMetric[] = [],
    openRuns: () => number = () => 0,
  ): Promise<Metrics> {
    return new Metrics(await promClient.load(), models, further, openRuns);
  }

  private constructor(
    client: Client,
    models: () => ReadonlyMap<string, ImageModel>,
    further: readonly DirectoryMetric[],
    openRuns: () => number,
  ) {
    super(client, models, further);
    const registers = [this.registry];
    this.#answers = new client.Counter({
      name: "flowturbo_http_requests_total",
      help: "Answers by route, method and status; 499 is a client that closed its connection first.",
      labelNames: ["route", "method", "status"],
      registers,
    });
    this.#durations = new client.Histogram({
      name: "flowturbo_http_request_duration_seconds",
      help: "Time from a request to the end of its answer.",
      labelNames: ["route"],
      buckets: secondBounds,
      registers,
    });
    this.#phases = new client.Histogram({
      name: "flowturbo_phase_seconds",
      help: "Time of a request by phase: queue, encode, steps, upscale, edit, decode, and total. Shared launches count in full.",
      labelNames: ["model", "phase"],
      buckets: secondBounds,
      registers,
    });
    this.#steps = new client.Histogram({
      name: "flowturbo_step_seconds",
      help: "Time of a step of a schedule. Shared launches count in full.",
      labelNames: ["model"],
      buckets: secondBounds,
      registers,
    });
    this.#hangUps = new client.Counter({
      name: "flowturbo_hang_ups_total",
      help: "Clients that closed their connection before they were answered.",
      registers,
    });
    this.#dropped = new client.Counter({
      name: "flowturbo_dropped_partials_total",
      help: "Partial pictures that were not sent, since their reader was slow.",
      registers,
    });
    this.#jobs = new client.Counter({
      name: "flowturbo_jobs_total",
      help: "Jobs that have ended, by how.",
      labelNames: ["status"],
      registers,
    });
    new client.Gauge({
      name: "flowturbo_runs_open",
      help: "Requests that the server works on or that wait, whatever their model.",
      registers,
      collect() {
        this.set(openRuns());
      },
    });
  }

  answered(route: string, method: string, status: number, milliseconds: number): void {
    this.#answers.inc({ route, method, status });
    this.#durations.observe({ route }, milliseconds / 1000);
    if (status === 499) this.#hangUps.inc();
  }

  drawn({ model, timings }: Pick<Answer, "model" | "timings">): void {
    const { steps, ...phases } = timings;
    const all = { ...phases, steps: steps.reduce((sum, step) => sum + step, 0) };
    for (const [phase, milliseconds] of Object.entries(all))
      this.#phases.observe({ model, phase }, milliseconds / 1000);
    for (const step of steps) this.#steps.observe({ model }, step / 1000);
  }

  droppedPartial(): void {
    this.#dropped.inc();
  }

  jobEnded(status: string): void {
    this.#jobs.inc({ status });
  }
}

const snake = (name: string) => name.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);

/** The lines of one histogram, in seconds: counts are of all values up to each bound. */
function histogram(name: string, labels: Labels, { bounds, counts, count, sum }: Histogram): Value[] {
  let below = 0;
  const buckets = bounds.map((bound, index) => {
    below += counts[index]!;
    return { metricName: `${name}_bucket`, labels: { ...labels, le: bound / 1000 }, value: below };
  });
  return [...buckets, ...ends(name, labels, count, sum / 1000)];
}

function rowsHistogram(name: string, labels: Labels, rowsPerLaunch: Readonly<Record<string, number>>): Value[] {
  let [below, sum] = [0, 0];
  const buckets = Object.entries(rowsPerLaunch).map(([rows, launches]) => {
    below += launches;
    sum += launches * Number(rows);
    return { metricName: `${name}_bucket`, labels: { ...labels, le: Number(rows) }, value: below };
  });
  return [...buckets, ...ends(name, labels, below, sum)];
}

function ends(name: string, labels: Labels, count: number, sum: number): Value[] {
  return [
    { metricName: `${name}_bucket`, labels: { ...labels, le: "+Inf" }, value: count },
    { metricName: `${name}_sum`, labels, value: sum },
    { metricName: `${name}_count`, labels, value: count },
  ];
}
