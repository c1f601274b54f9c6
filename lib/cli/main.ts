/**
 * The commands. Exit codes: 0; 2 for a usage error (an option that is wrong or does not fit the model); 130 and
 * 143 after SIGINT and SIGTERM; 1 otherwise.
 */

import { Command, CommanderError } from "commander";
import { packageVersion } from "../common/package.js";
import { FlowTurboError, OptionError } from "../errors.js";

// Whoever reads stdout may have seen enough, as `flowturbo --help | head` has: that is no failure.
process.stdout.on("error", (error: NodeJS.ErrnoException) => {
  if (error.code !== "EPIPE") throw error;
  process.exit();
});

const signals = { SIGINT: 130, SIGTERM: 143 } as const;

/** What commands are given. */
interface Setting {
  /** Aborts at the first signal. */
  readonly signal: AbortSignal;
  /** Called by a server that a signal has ended: that is no failure. */
  readonly endServing: () => void;
}

/** Describes a command. */
type Describe = (command: Command, setting: Setting) => void;

/** The commands in the order of `--help`, each with how it is imported: one that is named is imported alone. */
const commands: Readonly<Record<string, () => Promise<Describe>>> = {
  async generate() {
    const { generateCommand } = await import("./generate.js");
    return (command, { signal }) => generateCommand(command, signal);
  },
  async inspect() {
    return (await import("./inspect.js")).inspectCommand;
  },
  async compile() {
    const { compileCommand } = await import("./compile.js");
    return (command, { signal }) => compileCommand(command, signal);
  },
  async profile() {
    const { profileCommand } = await import("./profile.js");
    return (command, { signal }) => profileCommand(command, signal);
  },
  async calibrate() {
    const { calibrateCommand } = await import("./calibrate.js");
    return (command, { signal }) => calibrateCommand(command, signal);
  },
  async cache() {
    const { cacheCommand } = await import("./cache.js");
    return (command, { signal }) => cacheCommand(command, signal);
  },
  async serve() {
    const { serveCommand } = await import("./serve.js");
    return (command, { signal, endServing }) => serveCommand(command, signal, endServing);
  },
  async worker() {
    const { workerCommand } = await import("./worker.js");
    return (command, { signal, endServing }) => workerCommand(command, signal, endServing);
  },
  async fleet() {
    const { fleetCommand } = await import("./fleet.js");
    return (command, { signal }) => fleetCommand(command, signal);
  },
  async mcp() {
    const { mcpCommand } = await import("./mcp.js");
    return (command, { signal, endServing }) => mcpCommand(command, signal, endServing);
  },
  async pull() {
    const { pullCommand } = await import("./pull.js");
    return (command, { signal }) => pullCommand(command, signal);
  },
  async doctor() {
    return (await import("./doctor.js")).doctorCommand;
  },
  async prune() {
    return (await import("./prune.js")).pruneCommand;
  },
};

/** Runs the command line of this process. @returns its exit code */
export async function main(): Promise<number> {
  const controller = new AbortController();
  let interrupted: number | undefined;
  for (const [name, code] of Object.entries(signals))
    process.on(name, () => {
      // A second signal does not wait for the step to end.
      if (interrupted !== undefined) process.exit(code);
      interrupted = code;
      controller.abort(new Error(`Stopped by ${name}.`));
    });

  const program = new Command("flowturbo")
    .description("Text-to-image with Stable Diffusion 3 and 3.5 checkpoints, accelerated by FlowTurbo.")
    .version(packageVersion())
    .exitOverride();
  const setting: Setting = {
    signal: controller.signal,
    endServing: () => {
      interrupted = undefined;
    },
  };
  // Without one that is named all are described: --help lists them, and an unknown one is compared with them.
  const named = process.argv[2] ?? "";
  for (const name of Object.hasOwn(commands, named) ? [named] : Object.keys(commands))
    (await commands[name]!())(program.command(name).exitOverride(), setting);

  try {
    await program.parseAsync();
    return interrupted ?? (process.exitCode as number | undefined) ?? 0;
  } catch (error) {
    if (interrupted !== undefined) return interrupted;
    // commander has printed its own message.
    if (error instanceof CommanderError) return error.exitCode === 0 ? 0 : 2;
    if (error instanceof OptionError) {
      const flag = await flagNamed(error.option);
      process.stderr.write(`error: ${flag ? `${flag}: ` : ""}${error.message}\n`);
      return 2;
    }
    if (error instanceof FlowTurboError) process.stderr.write(`error: ${error.message}\n`);
    else process.stderr.write(`error: ${(error as Error).stack ?? String(error)}\n`);
    return 1;
  }
}

/** The flag of an option, if any command has one. */
async function flagNamed(option: string): Promise<string | undefined> {
  const [{ namedByCommand }, { flagOf }, schemas, { serverSchema }, { workerSchema }] = await Promise.all([
    import("./adapters.js"),
    import("./flags.js"),
    import("../options.js"),
    import("../server/options.js"),
    import("../fleet/options.js"),
  ]);
  if (namedByCommand.includes(option)) return undefined;
  const { calibrateSchema, compileSchema, generateSchema, loadSchema, profileSchema } = schemas;
  return [generateSchema, loadSchema, compileSchema, profileSchema, calibrateSchema, serverSchema, workerSchema]
    .map((schema) => flagOf(schema, option))
    .find((name) => name !== undefined);
}
