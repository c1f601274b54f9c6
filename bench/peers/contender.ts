/** What a contender is, and what it is asked to draw. */

export interface Subject {
  readonly name: string;
  /** Where a checkpoint is, a folder in the diffusers layout or a file; made where it must be. */
  readonly model: () => Promise<string>;
  readonly size: number;
  /** Euler steps. */
  readonly steps: number;
  readonly guidance: number;
  /** Of T5. */
  readonly tokens: number;
  readonly rounds: number;
  /** FlowTurbo schedules beside the equal work. */
  readonly schedules: readonly string[];
  /** Whether processes are timed from their start, too. */
  readonly start: boolean;
  /** A checkpoint in one file, in Stability's names: for those that read nothing else. */
  readonly oneFile?: boolean;
}

/** Where a contender works on a subject. */
export interface Place {
  readonly subject: Subject;
  /** The checkpoint. */
  readonly model: string;
  /** A folder for what the contenders make of the checkpoint; it outlives a run. */
  readonly work: string;
  readonly threads: number;
}

export interface PictureRequest {
  readonly prompt: string;
  readonly steps: number;
  readonly guidance: number;
  readonly size: number;
  readonly tokens: number;
  readonly seed: number;
  /** A file for the PNG. */
  readonly out?: string;
  /** A file of starting noise: float32, [1, C, h, w]. Default: drawn from the seed. */
  readonly noise?: string;
  /** A file for the decoded picture: float32, [3, H, W], from 0 to 1. */
  readonly pixels?: string;
}

/** Milliseconds: of the picture from the prompt to the PNG, and of its steps. */
export interface Drawn {
  readonly milliseconds: number;
  readonly denoise: number;
  /** Of the transformer. */
  readonly evaluations: number;
}

/** A contender, loaded. */
export interface Session {
  draw(request: PictureRequest): Promise<Drawn>;
  close(): unknown;
}

export interface Command {
  readonly file: string;
  readonly args: (request: PictureRequest) => string[];
}

export interface Contender {
  readonly name: string;
  /** What it computes in. Only float32 must draw our picture; of the others the difference is said. */
  readonly precision: "float32" | "bfloat16" | "float16" | "int8" | "its own choice";
  /** It skips evaluations, so that its picture is another. */
  readonly skips?: boolean;
  /** It takes no starting noise, so that its picture cannot be compared. */
  readonly ownNoise?: boolean;
  /** Left out of --quick. */
  readonly slow?: boolean;
  /** It is not one of the peers. */
  readonly ours?: boolean;
  /** @throws Error that says why it cannot draw here */
  open(place: Place): Promise<Session>;
  /** A process that draws one picture. */
  process?(place: Place): Promise<Command>;
}
