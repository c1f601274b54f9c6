// Closed forms for the simulated builder, and the same computed in plain TypeScript: what whole runs of a checkpoint's graphs
// give is then known without a GPU and without the simulation. The networks themselves are replaced, by a few sums and
// products of all their operands; everything around them is the product's.
import { mkdirSync, writeFileSync } from "node:fs";
import path from "node:path";
import { elementCount, float32, int64, type Tensor } from "../../lib/common/tensor.js";
import { graphKey } from "../../lib/networks/index.js";
import type { Launch, Program } from "../../lib/program/program.js";
import { ConstantReader } from "../../lib/program/stored.js";
import type { Kept } from "../../lib/program/validate.js";
import type { CompilableGraph, RunOptions, Runtime, SubmissionOptions, Workspace } from "../../lib/runtimes/runtime.js";
import { NamedWorkspace } from "../../lib/runtimes/workspace.js";

/** What a graph computes: see native/simulated/builder.cpp. */
export interface Form {
  /** Dimensions of outputs that no input has: name, then an expression in postfix order. */
  readonly sizes?: Readonly<Record<string, string>>;
  /** Scratch tensors, each with the operand whose shape it has. */
  readonly temporaries?: Readonly<Record<string, string>>;
  /** "y x 2 *": y is x times two. */
  readonly formulas: readonly string[];
  /** Bytes of device memory that an engine takes. */
  readonly weights?: number;
}

export type Forms = Readonly<Record<string, Form>>;

/** A file for each graph, for FLOWTURBO_SIMULATED_FORMS. */
export function writeForms(folder: string, forms: Forms): void {
  mkdirSync(folder, { recursive: true });
  for (const [graph, { sizes = {}, temporaries = {}, formulas, weights = 0 }] of Object.entries(forms))
    writeFileSync(
      path.join(folder, `${graph}.txt`),
      [
        ...Object.entries(sizes).map(([name, expression]) => `size ${name} ${expression}`),
        `weights ${weights}`,
        ...Object.entries(temporaries).map(([name, like]) => `temporary ${name} ${like}`),
        ...formulas.map((formula) => `formula ${formula}`),
        "",
      ].join("\n"),
    );
}

const guide = (velocity: string, guided: boolean) =>
  guided ? `${velocity}.u guidance ${velocity}.c ${velocity}.u - * +` : velocity;

const step = (network: string, guided: boolean): Form => ({
  temporaries: { old: "x", point: "x", new: "x" },
  formulas: [
    `old ${guide("velocity", guided)}`,
    "point x a_in old * +",
    `velocity_next ${network} context 0.25 * + pooled 0.125 * + position_embedding 0.0625 * +`,
    `new ${guide("velocity_next", guided)}`,
    "x_next x a_old old * + a_new new * +",
  ],
});

/** What stands for low-rank branches: all three of their inputs are read. */
const lowRank = "lora_scale lora_down * lora_up + 0.03125 * +";

/** Of text encoders. */
const texts: Forms = {
  clip_l: { formulas: ["hidden ids 0.0001 *", "pooled ids 0.0002 *"] },
  clip_g: { formulas: ["hidden ids 0.0002 *", "pooled ids 0.0001 *"] },
  t5: { formulas: ["hidden ids 0.0003 *"] },
};

/** Of a variant with dynamic LoRAs, ControlNets or skip-layer guidance: it reads what the variant has besides. */
function variantForm(name: string): Form {
  const { network } = graphKey(name);
  if (network === "predict") return variantStep(name);
  return { formulas: texts[network]!.formulas.map((formula) => `${formula} ${lowRank}`) };
}

function variantStep(name: string): Form {
  const { guidance, lora, controls, skipped } = graphKey(name);
  const more = [
    ...(lora ? [lowRank] : []),
    ...(controls?.split("+") ?? []).map((_, index) => `control_${index + 1} control_${index + 1}_scale * +`),
    ...(skipped ? ["skip_scale 0.0625 * +"] : []),
  ];
  return step(["point 0.5 * sigma +", ...more].join(" "), Boolean(guidance));
}

/**
 * Of every graph of a checkpoint.
 * @param factor pixels of a latent's side
 * @param names of graphs, among which there may be variants with dynamic LoRAs, ControlNets or skip-layer guidance
 */
export function checkpointForms(factor: number, names: readonly string[] = []): Forms {
  const withNoise = "latents 1 sigma - * noise sigma * +";
  const variants = names.filter((name) => /\.(lora|controls|skipped)-/.test(name));
  const forms: Record<string, Form> = {
    ...Object.fromEntries(variants.map((name) => [name, variantForm(name)])),
    ...texts,
    vae_decoder: {
      sizes: { image_height: `height ${factor} *`, image_width: `width ${factor} *` },
      formulas: ["image latents 0.5 * 0.25 +"],
    },
    vae_encoder: {
      sizes: { height: `image_height ${factor} /`, width: `image_width ${factor} /` },
      formulas: ["latents image 2 *"],
    },
    upscale: { formulas: [`x ${withNoise}`] },
    upscale_latents: { formulas: ["x latents scale * noise sigma * + weights 0.125 * +"] },
    scale_noise: { formulas: [`x ${withNoise}`] },
  };
  for (const guided of [false, true]) {
    const name = (network: string) => (guided ? `${network}.guidance` : network);
    forms[name("predict")] = step("point 0.5 * sigma +", guided);
    forms[name("refine")] = step("point 0.75 * velocity + sigma 0.5 * -", guided);
    const sum = (output: string) => `${output}_velocity mean * ${output}_first first * + ${output}_second second * +`;
    forms[name("combine")] = {
      temporaries: { mean: "x" },
      formulas: [
        `mean ${guide("velocity", guided)}`,
        `x_next x ${sum("x")} +`,
        `first_next ${sum("first")}`,
        `second_next ${sum("second")}`,
      ],
    };
    forms[name("extrapolate")] = { formulas: ["velocity_next velocity weight velocity before - * +"] };
    forms[name("inpaint_blend")] = {
      temporaries: { known: "noise", direction: "noise" },
      formulas: [
        `known ${withNoise}`,
        "direction noise latents -",
        "x_next mask x * 1 mask - known * +",
        "velocity_next mask velocity * 1 mask - direction * +",
      ],
    };
    forms[name("preview")] = {
      temporaries: { mean: "x" },
      formulas: [`mean ${guide("velocity", guided)}`, "latents x mean sigma * -", "image latents 0.5 * bias 0.1 * +"],
    };
  }
  return forms;
}

const float = Math.fround;

/** A tensor as formulas see it: rows, each of as many elements. */
function viewOf({ shape, data }: Tensor) {
  const rows = shape[0] ?? 1;
  const elements = data.length / rows;
  return {
    rows,
    at: (row: number, place: number) => float(Number(data[(row % rows) * elements + (place % elements)])),
  };
}

/** @param operands inputs with their values, and outputs and temporaries, which are written */
function evaluate(formulas: readonly string[], operands: Readonly<Record<string, Tensor>>): void {
  const binary: Record<string, (a: number, b: number) => number> = {
    "+": (a, b) => a + b,
    "-": (a, b) => a - b,
    "*": (a, b) => a * b,
  };
  for (const formula of formulas) {
    const [target, ...words] = formula.split(" ");
    const { shape, data } = operands[target!]!;
    const [rows, elements] = [shape[0] ?? 1, data.length / (shape[0] ?? 1)];
    const values = words.map((word): ((row: number, place: number) => number) | null => {
      if (binary[word]) return null;
      if (!Number.isNaN(Number(word))) return () => float(Number(word));
      const [, name, half] = word.match(/^(.+?)(?:\.([uc]))?$/)!;
      const view = viewOf(operands[name!]!);
      if (!half) return view.at;
      const pairs = view.rows / 2;
      return (row, place) => view.at((row % pairs) + (half === "c" ? pairs : 0), place);
    });
    for (let row = 0; row < rows; row++)
      for (let place = 0; place < elements; place++) {
        const stack: number[] = [];
        for (const [index, value] of values.entries()) {
          if (value) stack.push(value(row, place));
          else {
            const second = stack.pop()!;
            stack.push(float(binary[words[index]!]!(stack.pop()!, second)));
          }
        }
        data[row * elements + place] = stack[0]!;
      }
  }
}

const empty = (dtype: Tensor["dtype"], shape: readonly number[]): Tensor =>
  dtype === "float32"
    ? float32(shape, new Float32Array(elementCount(shape)))
    : int64(shape, new BigInt64Array(elementCount(shape)));

/** Runs programs whose graphs have closed forms, on the thread of JavaScript. */
export class ClosedFormRuntime implements Runtime {
  readonly name = "onnxruntime";
  readonly capabilities = { preemption: false, capture: false, anyShape: true };
  readonly #forms: Forms;
  readonly #graphs = new Set<string>();
  readonly #constants = new ConstantReader();

  constructor(forms: Forms) {
    this.#forms = forms;
  }

  add(graph: Pick<CompilableGraph, "name">): void {
    this.#graphs.add(graph.name);
  }
  has(name: string): boolean {
    return this.#graphs.has(name);
  }
  throwIfDisposed(): void {}
  async dispose(): Promise<void> {}

  run(program: Program, options: RunOptions = {}): Promise<Record<string, Tensor>> {
    return this.compute(program, options, new Map());
  }

  open(): Workspace {
    return new ClosedFormWorkspace(this);
  }

  async compute(program: Program, { signal, onBegin, onLaunch }: RunOptions, tensors: Map<string, Tensor>) {
    for (const [name, constant] of Object.entries(program.constants))
      tensors.set(name, await this.#constants.tensor(name, constant));
    for (const [name, { dtype, shape }] of Object.entries(program.registers))
      if (!tensors.has(name)) tensors.set(name, empty(dtype, shape));
    onBegin?.();
    let index = 0;
    for (const instruction of program.instructions) {
      signal?.throwIfAborted();
      if (instruction.op === "launch") {
        this.#launch(instruction, tensors);
        const named = (instruction.reported ?? []).map((name) => [name, copy(tensors.get(name)!)] as const);
        onLaunch?.({ launch: instruction, index: index++, milliseconds: 1, values: Object.fromEntries(named) });
      } else {
        const [from, to] = [tensors.get(instruction.from)!, tensors.get(instruction.to)!];
        const elements = from.data.length / from.shape[0]!;
        const [begin, end] = [instruction.fromRow, instruction.fromRow + instruction.rows].map((row) => row * elements);
        (to.data as Float32Array).set((from.data as Float32Array).slice(begin, end), instruction.toRow * elements);
      }
    }
    return Object.fromEntries(program.results.map((name) => [name, copy(tensors.get(name)!)]));
  }

  #launch({ graph, inputs, outputs }: Launch, tensors: ReadonlyMap<string, Tensor>): void {
    const { formulas, temporaries = {} } = this.#forms[graph]!;
    const operands: Record<string, Tensor> = {};
    for (const [name, operand] of Object.entries({ ...inputs, ...outputs })) operands[name] = tensors.get(operand)!;
    for (const [name, like] of Object.entries(temporaries)) operands[name] = empty("float32", operands[like]!.shape);
    evaluate(formulas, operands);
  }
}

class ClosedFormWorkspace extends NamedWorkspace {
  readonly lost = false;
  readonly #runtime: ClosedFormRuntime;
  readonly #tensors = new Map<string, Tensor>();
  #last: Promise<unknown> = Promise.resolve();

  constructor(runtime: ClosedFormRuntime) {
    super(runtime, "runtime");
    this.#runtime = runtime;
  }

  close(): void {
    this.#tensors.clear();
  }

  protected run(program: Program, options: SubmissionOptions, _left: Kept, _kept: Kept) {
    const turn = this.#last.then(() => this.#runtime.compute(program, options, this.#tensors));
    this.#last = turn.catch(() => undefined);
    return turn;
  }

  protected release(names: readonly string[]): void {
    // After what was submitted before.
    this.#last = this.#last.then(() => {
      for (const name of names) this.#tensors.delete(name);
    });
  }
}

function copy({ dtype, shape, data }: Tensor): Tensor {
  return dtype === "float32"
    ? float32(shape, Float32Array.from(data as Float32Array))
    : int64(shape, BigInt64Array.from(data as BigInt64Array));
}
