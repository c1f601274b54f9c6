#!/usr/bin/env node
/**
 * The command line. Exit codes: 0; 2 for a usage error (an option that is wrong or does not fit the model); 130 and
 * 143 after SIGINT and SIGTERM; 1 otherwise.
 */

import { Command, CommanderError } from "commander";
import { packageVersion } from "../common/package.js";
import { FlowTurboError, OptionError } from "../errors.js";
import { calibrateSchema, compileSchema, generateSchema, loadSchema, profileSchema } from "../options.js";
import { serverSchema } from "../server/options.js";
import { namedByCommand } from "./adapters.js";
import { cacheCommand } from "./cache.js";
import { calibrateCommand } from "./calibrate.js";
import { compileCommand } from "./compile.js";
import { doctorCommand } from "./doctor.js";
import { flagOf } from "./flags.js";
import { generateCommand } from "./generate.js";
import { inspectCommand } from "./inspect.js";
import { mcpCommand } from "./mcp.js";
import { profileCommand } from "./profile.js";
import { pruneCommand } from "./prune.js";
import { pullCommand } from "./pull.js";
import { serveCommand } from "./serve.js";

// Whoever reads stdout may have seen enough, as `flowturbo --help | head` has: that is no failure.
process.stdout.on("error", (error: NodeJS.ErrnoException) => {
  if (error.code !== "EPIPE") throw error;
  process.exit();
});

const signals = { SIGINT: 130, SIGTERM: 143 } as const;

async function main(): Promise<number> {
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
  generateCommand(program.command("generate").exitOverride(), controller.signal);
  inspectCommand(program.command("inspect").exitOverride());
  compileCommand(program.command("compile").exitOverride(), controller.signal);
  profileCommand(program.command("profile").exitOverride(), controller.signal);
  calibrateCommand(program.command("calibrate").exitOverride(), controller.signal);
  cacheCommand(program.command("cache").exitOverride(), controller.signal);
  // A server is ended by a signal: that is no failure.
  const endServing = () => {
    interrupted = undefined;
  };
  serveCommand(program.command("serve").exitOverride(), controller.signal, endServing);
  mcpCommand(program.command("mcp").exitOverride(), controller.signal, endServing);
  pullCommand(program.command("pull").exitOverride(), controller.signal);
  doctorCommand(program.command("doctor").exitOverride());
  pruneCommand(program.command("prune").exitOverride());

  try {
    await program.parseAsync();
    return interrupted ?? (process.exitCode as number | undefined) ?? 0;
  } catch (error) {
    if (interrupted !== undefined) return interrupted;
    // commander has printed its own message.
    if (error instanceof CommanderError) return error.exitCode === 0 ? 0 : 2;
    if (error instanceof OptionError) {
      const flag = namedByCommand.includes(error.option)
        ? undefined
        : [generateSchema, loadSchema, compileSchema, profileSchema, calibrateSchema, serverSchema]
            .map((schema) => flagOf(schema, error.option))
            .find((name) => name !== undefined);
      process.stderr.write(`error: ${flag ? `${flag}: ` : ""}${error.message}\n`);
      return 2;
    }
    if (error instanceof FlowTurboError) process.stderr.write(`error: ${error.message}\n`);
    else process.stderr.write(`error: ${(error as Error).stack ?? String(error)}\n`);
    return 1;
  }
}

process.exitCode = await main();
