/**
 * scheduler/scheduler_config.json, for each class that diffusers has for flow matching: a row says which keys the class takes, and what
 * is used of them. The sampler is the caller's choice, so that every class gives noise levels (a shift, and what else changes them). How
 * a class steps is used by the sampler of the same name alone; what that one does not compute is refused when it is asked for.
 */

import { basename, dirname } from "node:path";
import * as z from "zod";
import { readIndexEntry } from "../common/model-index.js";
import { type JsonObject, readJsonObject } from "./files.js";
import { indexOf } from "./model-index.js";

const positive = z.number().refine((value) => value > 0, "expected a positive number");
const count = z.int().positive();
/** A switch that may be absent or null. */
const flag = z
  .boolean()
  .nullish()
  .transform((value) => value ?? false);

/** Values of a config that this package does not compute, each with what to set instead. */
interface Unsupported {
  readonly key: string;
  readonly value: unknown;
  readonly instead: string;
}

/** How a multistep scheduler steps. */
interface Solver {
  /** The sampler that takes these steps. */
  readonly sampler: "dpmpp_2m" | "unipc";
  readonly order: number;
  readonly type: "midpoint" | "heun" | "bh1" | "bh2";
  readonly lowerOrderFinal: boolean;
  readonly eulerAtFinal: boolean;
  /** Steps after which UniPC does not correct. */
  readonly uncorrected: readonly number[];
  /** Noise level after the last step; "last" for that of the last step again. */
  readonly end: number | "last";
  /** Ends of the levels before they are mapped to those of flow matching, s/(1 + s), which are spaced as Karras et al. do; or null. */
  readonly karras: { readonly high: number; readonly low: number } | null;
  /** What the sampler of this name does not compute. */
  readonly unsupported: readonly Unsupported[];
}

/** What is used of the scheduler. */
export interface SchedulerConfig {
  /** Class of diffusers. */
  readonly className: string;
  readonly shift: number;
  readonly numTrainTimesteps: number;
  /** How the shift follows from the size of a picture, or null. */
  readonly dynamic: {
    readonly baseShift: number;
    readonly maxShift: number;
    readonly baseTokens: number;
    readonly maxTokens: number;
    readonly type: "exponential" | "linear";
  } | null;
  /** Spacing of diffusers' noise levels, or null. */
  readonly spacing: "karras" | "exponential" | "beta" | null;
  /** Noise level of the last step, to which the others are stretched, or null. */
  readonly terminal: number | null;
  readonly solver: Solver | null;
  /** What diffusers does with this config and this package does not, for a warning. */
  readonly notes: readonly string[];
}

const trainSteps = { num_train_timesteps: count.default(1000) };

/** @param most the default of max_shift */
const dynamicKeys = (most: number) => ({
  use_dynamic_shifting: flag,
  base_shift: z.number().default(0.5),
  max_shift: z.number().default(most),
  base_image_seq_len: count.default(256),
  max_image_seq_len: count.default(4096),
  time_shift_type: z
    .enum(["exponential", "linear"], 'only "exponential" and "linear" are known')
    .default("exponential"),
});

type DynamicKeys = z.output<z.ZodObject<ReturnType<typeof dynamicKeys>>>;

const dynamicOf = (config: DynamicKeys): SchedulerConfig["dynamic"] =>
  config.use_dynamic_shifting
    ? {
        ...{ baseShift: config.base_shift, maxShift: config.max_shift, type: config.time_shift_type },
        ...{ baseTokens: config.base_image_seq_len, maxTokens: config.max_image_seq_len },
      }
    : null;

function checkLengths(config: DynamicKeys, context: z.RefinementCtx): void {
  if (config.max_image_seq_len <= config.base_image_seq_len)
    refuse(context, "max_image_seq_len", `is not above base_image_seq_len = ${config.base_image_seq_len}`);
}

function refuse(context: z.RefinementCtx, key: string, message: string): void {
  context.addIssue({ code: "custom", path: [key], message });
}

/** `use_…_sigmas`, in the order in which diffusers looks at them. */
const spacings = ["karras", "exponential", "beta"] as const;
const spacingKeys = { use_karras_sigmas: flag, use_exponential_sigmas: flag, use_beta_sigmas: flag };

function checkSpacings(config: z.output<z.ZodObject<typeof spacingKeys>>, context: z.RefinementCtx): void {
  const [, second] = spacings.filter((name) => config[`use_${name}_sigmas`]);
  if (second) refuse(context, `use_${second}_sigmas`, "is on beside another spacing; turn one of them off");
}

/** 0 is as none, as in diffusers. */
const terminal = z
  .number()
  .min(0)
  .lt(1)
  .nullish()
  .transform((level) => level || null);

/** FlowMatchEulerDiscreteScheduler and FlowMatchLCMScheduler. @param isLcm whether steps draw new noise whatever the config says */
const flowMatch = (isLcm: boolean) =>
  z
    .object({
      ...{ ...trainSteps, ...dynamicKeys(1.15), ...spacingKeys },
      shift: positive.default(1),
      shift_terminal: terminal,
      invert_sigmas: z
        .union([z.literal(false), z.null()], {
          error: "is set, which is not supported: noise levels would rise. Set it to false",
        })
        .optional(),
      stochastic_sampling: flag,
      scale_factors: z
        .union([z.null(), z.array(z.unknown()).max(0)], {
          error: "is set, which is not supported. Set it to null, and give sizes that rise as the option stages",
        })
        .optional(),
    })
    .superRefine(checkLengths)
    .superRefine(checkSpacings)
    .transform((config): Values => {
      const isStochastic = isLcm || config.stochastic_sampling;
      return {
        ...{ shift: config.shift, numTrainTimesteps: config.num_train_timesteps, dynamic: dynamicOf(config) },
        spacing: spacings.find((name) => config[`use_${name}_sigmas`]) ?? null,
        ...{ terminal: config.shift_terminal, solver: null },
        notes: isStochastic
          ? [
              "draws new noise at each step, which this package does not do: its noise levels are used, and steps are those of the sampler, Euler's for a distilled model",
            ]
          : [],
      };
    });

/** All but the class. */
type Values = Omit<SchedulerConfig, "className">;

const heun = z.object({ ...trainSteps, shift: positive.default(1) }).transform(
  (config): Values => ({
    ...{ shift: config.shift, numTrainTimesteps: config.num_train_timesteps, dynamic: null },
    ...{ spacing: null, terminal: null, solver: null, notes: [] },
  }),
);

const isForNoise =
  'This scheduler is for flow matching with use_flow_sigmas true, prediction_type "flow_prediction" and flow_shift (3 for SD3) alone. Set them, or take the model\'s own scheduler folder';

/** What all solvers have; the pipelines of diffusers read the keys of a dynamic shift with another default. */
const solverKeys = {
  ...{ ...trainSteps, ...dynamicKeys(1.16) },
  use_flow_sigmas: z.literal(true, {
    error: `has to be true: otherwise noise levels are not those of SD3. ${isForNoise}`,
  }),
  prediction_type: z.literal("flow_prediction", {
    error: `has to be "flow_prediction", which SD3 predicts. ${isForNoise}`,
  }),
  flow_shift: positive.default(1),
};

const shiftOnly = z
  .object(solverKeys)
  .superRefine(checkLengths)
  .transform(
    (config): Values => ({
      ...{ shift: config.flow_shift, numTrainTimesteps: config.num_train_timesteps, dynamic: dynamicOf(config) },
      ...{ spacing: null, terminal: null, solver: null },
      notes: ["has a method that this package does not have: its shift is used, and steps are those of the sampler"],
    }),
  );

/** What a multistep scheduler has besides, whose sampler is here. Those without a meaning for flow matching are not read. */
const multistepKeys = {
  ...{ ...solverKeys, ...spacingKeys },
  solver_order: count.default(2),
  lower_order_final: z.boolean().default(true),
  final_sigmas_type: z.enum(["zero", "sigma_min"]).default("zero"),
  thresholding: flag,
  beta_start: z.number().default(0.0001),
  beta_end: z.number().default(0.02),
  beta_schedule: z.string().default("linear"),
  trained_betas: z.unknown().optional(),
  rescale_betas_zero_snr: flag,
};

type Multistep = z.output<z.ZodObject<typeof multistepKeys>>;

/** Marks what is not computed. */
const unless = (isFine: boolean, key: string, value: unknown, instead: string): Unsupported[] =>
  isFine ? [] : [{ key, value, instead }];

/**
 * The largest and the smallest level of the noise schedule that a solver has beside flow matching, in single precision as there; null for
 * a schedule that is not known here.
 */
function betaLevels(config: Multistep): { readonly high: number; readonly low: number } | null {
  const {
    num_train_timesteps: steps,
    beta_start,
    beta_end,
    beta_schedule,
    trained_betas,
    rescale_betas_zero_snr,
  } = config;
  const exponent = { linear: 1, scaled_linear: 2 }[beta_schedule];
  if (exponent === undefined || (trained_betas ?? null) !== null || rescale_betas_zero_snr) return null;
  const [first, last] = [beta_start, beta_end].map((beta) => beta ** (1 / exponent)) as [number, number];
  const alphas = Array.from({ length: steps }, (_, i) => {
    const root = Math.fround(first + ((last - first) * i) / Math.max(1, steps - 1));
    return Math.fround(1 - Math.fround(root ** exponent));
  });
  const level = (product: number) => Math.sqrt(Math.fround(1 - Math.fround(product)) / Math.fround(product));
  return { high: level(alphas.reduce((product, alpha) => product * alpha)), low: level(alphas[0]!) };
}

const knownBetas = '"linear" or "scaled_linear", without trained_betas and rescale_betas_zero_snr';

const uniPC = z
  .object({
    ...multistepKeys,
    solver_type: z.enum(["bh1", "bh2", "midpoint", "heun", "logrho"]).default("bh2"),
    predict_x0: z.boolean().default(true),
    disable_corrector: z.array(z.int()).default([]),
    solver_p: z.unknown().optional(),
    shift_terminal: terminal,
    sigma_min: z.number().positive().nullish(),
    sigma_max: z.number().positive().nullish(),
  })
  .superRefine(checkLengths)
  .superRefine(checkSpacings)
  .transform((config): Values => {
    const levels = config.use_karras_sigmas ? betaLevels(config) : null;
    const low = config.sigma_min ?? levels?.low;
    const high = config.sigma_max ?? levels?.high;
    const ends = config.final_sigmas_type === "zero";
    return {
      ...{ shift: config.flow_shift, numTrainTimesteps: config.num_train_timesteps, dynamic: dynamicOf(config) },
      ...{ spacing: null, terminal: config.shift_terminal, notes: [] },
      solver: {
        ...{ sampler: "unipc", order: config.solver_order, uncorrected: config.disable_corrector },
        type: config.solver_type === "bh1" ? "bh1" : "bh2",
        ...{ lowerOrderFinal: config.lower_order_final, eulerAtFinal: false, end: ends ? 0 : "last" },
        karras: config.use_karras_sigmas && low !== undefined && high !== undefined ? { high, low } : null,
        unsupported: [
          ...unless(config.solver_order <= 2, "solver_order", config.solver_order, "1 or 2"),
          ...unless(config.predict_x0, "predict_x0", false, "true"),
          ...unless(!config.thresholding, "thresholding", true, "false"),
          ...unless((config.solver_p ?? null) === null, "solver_p", "set", "null"),
          ...unless(config.lower_order_final || !ends || config.solver_order === 1, "lower_order_final", false, "true"),
          ...unless(!config.use_exponential_sigmas, "use_exponential_sigmas", true, "false"),
          ...unless(!config.use_beta_sigmas, "use_beta_sigmas", true, "false"),
          ...unless(
            !config.use_karras_sigmas || (low !== undefined && high !== undefined),
            ...(["beta_schedule", config.beta_schedule, knownBetas] as const),
          ),
        ],
      },
    };
  });

const dpmSolver = z
  .object({
    ...multistepKeys,
    algorithm_type: z.string().default("dpmsolver++"),
    solver_type: z.enum(["midpoint", "heun", "logrho", "bh1", "bh2"]).default("midpoint"),
    euler_at_final: flag,
    use_lu_lambdas: flag,
  })
  .superRefine(checkLengths)
  .superRefine(checkSpacings)
  .transform((config): Values => {
    const isZero = config.final_sigmas_type === "zero";
    const low = isZero ? 0 : betaLevels(config)?.low;
    return {
      ...{ shift: config.flow_shift, numTrainTimesteps: config.num_train_timesteps, dynamic: dynamicOf(config) },
      ...{ spacing: null, terminal: null, notes: [] },
      solver: {
        ...{ sampler: "dpmpp_2m", order: config.solver_order, uncorrected: [], karras: null },
        type: config.solver_type === "heun" ? "heun" : "midpoint",
        ...{ lowerOrderFinal: config.lower_order_final, eulerAtFinal: config.euler_at_final, end: low ?? 0 },
        unsupported: [
          ...unless(config.solver_order <= 3, "solver_order", config.solver_order, "1, 2 or 3"),
          ...unless(
            ["dpmsolver++", "deis"].includes(config.algorithm_type),
            ...(["algorithm_type", config.algorithm_type, '"dpmsolver++"'] as const),
          ),
          ...unless(!config.thresholding, "thresholding", true, "false"),
          ...spacings.flatMap((name) => unless(!config[`use_${name}_sigmas`], `use_${name}_sigmas`, true, "false")),
          ...unless(!config.use_lu_lambdas, "use_lu_lambdas", true, "false"),
          ...unless(low !== undefined, "beta_schedule", config.beta_schedule, knownBetas),
          ...unless(
            !config.use_dynamic_shifting || config.time_shift_type === "exponential",
            ...(["time_shift_type", config.time_shift_type, '"exponential"'] as const),
          ),
        ],
      },
    };
  });

const classes = {
  FlowMatchEulerDiscreteScheduler: flowMatch(false),
  FlowMatchHeunDiscreteScheduler: heun,
  FlowMatchLCMScheduler: flowMatch(true),
  UniPCMultistepScheduler: uniPC,
  DPMSolverMultistepScheduler: dpmSolver,
  DPMSolverSinglestepScheduler: shiftOnly,
  DEISMultistepScheduler: shiftOnly,
  SASolverScheduler: shiftOnly,
} as const;

type SchedulerClass = keyof typeof classes;

/** Classes of schedulers, as model_index.json and scheduler_config.json name them. */
export const schedulerClasses = Object.keys(classes) as SchedulerClass[];

const names = z.enum(schedulerClasses);

/**
 * A scheduler's config as this package uses it.
 * @param className as model_index.json says, whose word counts in diffusers too; null where there is none
 */
export const schedulerSchema = (className: SchedulerClass | null) =>
  z
    .looseObject({
      _class_name: className === null ? names.default("FlowMatchEulerDiscreteScheduler") : z.unknown().optional(),
    })
    .transform((config, context): SchedulerConfig => {
      const name = className ?? (config._class_name as SchedulerClass);
      const { data, error } = classes[name].safeParse(config);
      if (data) return { className: name, ...data };
      for (const issue of error!.issues) context.addIssue({ ...issue, input: config } as never);
      return z.NEVER;
    });

/** The class that the index beside the folder of a scheduler names; null where there is none. */
export async function schedulerClassOf(file: string): Promise<SchedulerClass | null> {
  const folder = dirname(file);
  const index: JsonObject | null = await readJsonObject(await indexOf(dirname(folder))).catch(() => null);
  const part = basename(folder);
  const name = names.safeParse(readIndexEntry(part, index?.[part]).className);
  return name.success ? name.data : null;
}
