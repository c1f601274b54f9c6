// Closed forms for the simulated builder, and the same computed in plain TypeScript: what a whole run of graphs gives is known
// without a GPU and without the simulation.
import { mkdirSync, writeFileSync } from "node:fs";
import path from "node:path";

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

/** A file for each graph, for FLOWTURBO_SIMULATED_FORMS. */
export function writeForms(folder: string, forms: Readonly<Record<string, Form>>): void {
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
