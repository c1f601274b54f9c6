// What stays in a workspace when the rows that needed it are over.
import { describe, expect, it } from "vitest";
import type { Constant, Program } from "../../lib/program/program.js";
import { Gatherer, type Lane } from "../../lib/serving/gather.js";
import { rowProgram } from "../../lib/serving/rows.js";
import { numbers } from "./programs.js";

const shapes = () => ({
  inputs: new Map([
    ["x", ["rows", 20]],
    ["matrices", ["rows", 100]],
  ]),
  outputs: new Map([["y", ["rows", 20]]]),
});

/** The same for all lanes. */
const x = numbers(1, 1, 20);

/** Launches, one after the other, that read x, and then what the one before gave, and matrices. */
function lane(name: string, matrices: Constant, launches = 1): Lane {
  const program: Program = {
    registers: Object.fromEntries(
      Array.from({ length: launches }, (_, at) => [`y${at}`, { dtype: "float32", shape: [1, 20] }]),
    ),
    constants: { x: { kind: "value", tensor: x }, matrices },
    instructions: Array.from({ length: launches }, (_, at) => ({
      ...{ op: "launch", graph: "g", inputs: { x: at === 0 ? "x" : `y${at - 1}`, matrices: "matrices" } },
      ...{ outputs: { y: `y${at}` }, sharing: { size: "" }, label: { kind: "step", name: "step" } },
    })),
    results: [],
  };
  return { name, row: rowProgram(program, shapes) };
}

let submissions = 0;
/** Runs the lanes' launches, all lanes in each. @returns the program */
function run(gatherer: Gatherer, ...lanes: Lane[]) {
  const launches = lanes[0]!.row.launches.map((_, launch) => ({
    ...{ graph: "g", size: "", batch: lanes.length },
    rows: lanes.map((_, row) => ({ job: 0, attempt: 0, row, launch, last: false })),
  }));
  const submission = { id: submissions++, launches, preemptible: false };
  return gatherer.gather(submission as never, ({ row }) => lanes[row]!);
}

/** 400 bytes, by itself or kept. */
const matrices = (seed: number, keep = true): Constant => ({ kind: "value", tensor: numbers(seed, 1, 100), keep });
const uploaded = (gathered: ReturnType<typeof run>) =>
  Object.values(gathered.program.constants).filter(
    (constant) => constant.kind === "value" && constant.tensor.data.length === 100,
  ).length;

/** Names of constants among those to free. */
const constants = (names: string[]) => names.filter((name) => name.startsWith("constant "));

describe("A constant", () => {
  it("is freed with the last row that needs it; one that is to be kept stays, and is not uploaded again", () => {
    for (const keep of [false, true]) {
      const gatherer = new Gatherer(shapes, 1000);
      const constant = matrices(2, keep);
      const [first, second] = [lane("a", constant), lane("b", constant)];
      expect(uploaded(run(gatherer, first))).toBe(1);
      expect(uploaded(run(gatherer, second))).toBe(0);
      expect(constants(gatherer.release([first]))).toEqual([]);
      expect(gatherer.uploads).toBe(2);
      expect(constants(gatherer.release([second]))).toHaveLength(keep ? 1 : 2);
      expect(gatherer.uploads).toBe(0);
      expect(uploaded(run(gatherer, lane("c", constant)))).toBe(keep ? 0 : 1);
    }
  });

  it("is kept up to a number of bytes, all together: what was not used for longest goes first", () => {
    const gatherer = new Gatherer(shapes, 1000);
    const [a, b, c] = [matrices(1), matrices(2), matrices(3)];
    const draw = (constant: Constant) => {
      const one = lane(`row of ${submissions}`, constant);
      const uploads = uploaded(run(gatherer, one));
      // x is freed each time.
      return [uploads, constants(gatherer.release([one])).length - 1];
    };
    expect([draw(a), draw(b), draw(a)]).toEqual([
      [1, 0],
      [1, 0],
      [0, 0],
    ]);
    // Two have room: b leaves, which was used before a.
    expect(draw(c)).toEqual([1, 1]);
    expect(draw(a)).toEqual([0, 0]);
    expect(draw(b)).toEqual([1, 1]);
    expect(draw(c)).toEqual([1, 1]);
    // Those in use do not count, and one that is larger than the bound alone is not kept.
    const users = [a, b, c].map((constant, index) => lane(`user ${index}`, constant));
    for (const user of users) run(gatherer, user);
    expect(constants(gatherer.release([users[0]!]))).toEqual([]);
    expect(constants(gatherer.release(users.slice(1)))).toHaveLength(2);
    const tight = new Gatherer(shapes, 399);
    const one = lane("one", a);
    run(tight, one);
    expect(constants(tight.release([one]))).toHaveLength(2);
  });

  it("that is kept goes where its memory is wanted, where its upload failed, and with the workspace", () => {
    for (const forgotten of ["dropped", "failed", "lost"] as const) {
      const gatherer = new Gatherer(shapes, 1000);
      const one = lane("one", matrices(1));
      const { uploads } = run(gatherer, one);
      // Not while a row needs it.
      expect(gatherer.dropKept()).toEqual([]);
      gatherer.release([one]);
      expect(uploads.some((identity) => gatherer.isUsed(identity))).toBe(false);
      if (forgotten === "lost") gatherer.reset();
      else expect(forgotten === "failed" ? gatherer.forget(uploads) : gatherer.dropKept()).toHaveLength(1);
      expect(uploaded(run(gatherer, lane("two", one.row.program.constants.matrices!)))).toBe(1);
    }
  });
});

describe("A batch of constants", () => {
  it("is gathered once for all launches of a submission, and anew for other rows", () => {
    const gatherer = new Gatherer(shapes, 1000);
    const lanes = [1, 2, 3].map((seed) => lane(`row ${seed}`, matrices(seed), 3));
    const { program } = run(gatherer, ...lanes);
    const launches = program.instructions.filter((instruction) => instruction.op === "launch");
    expect(new Set(launches.map(({ inputs }) => inputs.matrices)).size).toBe(1);
    expect(new Set(launches.map(({ inputs }) => inputs.x)).size).toBe(3);
    const copied = program.instructions.filter(({ op, ...copy }) => op === "copy" && (copy as { to: string }).to === launches[0]!.inputs.matrices); // biome-ignore format: one line
    expect(copied.map((copy) => ("toRow" in copy ? copy.toRow : -1))).toEqual([0, 1, 2]);
    const others = [lanes[1]!, lanes[0]!].map(({ row }, index) => ({ name: `other ${index}`, row }));
    const swapped = run(gatherer, ...others).program.instructions.filter(({ op }) => op === "copy");
    expect(swapped.length).toBeGreaterThan(0);
  });
});
