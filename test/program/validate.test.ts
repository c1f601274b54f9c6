// A planner's slips are found before anything runs, and named.
import { describe, expect, it } from "vitest";
import { float32, int64 } from "../../lib/common/tensor.js";
import { RuntimeError } from "../../lib/errors.js";
import type { CopyRows, Program, StoredConstant } from "../../lib/program/program.js";
import { allFinite, validateProgram } from "../../lib/program/validate.js";
import { launch, program } from "../runtimes/models.js";

const check = (work: Program) => validateProgram(work, (name) => name === "graph");
const copy: CopyRows = { op: "copy", from: "x", fromRow: 0, to: "b", toRow: 0, rows: 2 };
const base = program([1, 2], [launch("graph", "x", "a"), launch("graph", "a", "b")], ["b"]);
const stored: StoredConstant = {
  kind: "stored",
  source: { name: "table", dtype: "BF16", shape: [4, 3], file: "/file", offset: 0, length: 24 },
  shape: [2, 2],
  firstElement: 4,
  rowElements: 2,
  strideElements: 3,
  rows: 2,
};

describe("validateProgram", () => {
  it("accepts what can run", () => {
    check(base);
    check({ ...base, instructions: [...base.instructions, { ...copy, from: "a", rows: 1, toRow: 1 }] });
    check({ ...base, constants: { ...base.constants, stored } });
    const fromStored = {
      registers: { r: { dtype: "float32", shape: [2, 2] } },
      constants: { stored },
      results: ["r"],
    } as const;
    check({ ...fromStored, instructions: [{ ...copy, from: "stored", to: "r" }] });
  });

  const cases: Record<string, [Partial<Program>, RegExp]> = {
    "an unknown graph": [{ instructions: [launch("grpah", "x", "b")] }, /"grpah" .*no graph of that name/],
    "an unknown operand": [{ instructions: [launch("graph", "y", "b")] }, /there is no register "y"/],
    "an operand named as a method": [{ instructions: [launch("graph", "toString", "b")] }, /no register "toString"/],
    "a read before the write": [{ instructions: [launch("graph", "a", "b")] }, /"a" is read before/],
    "an output that is an input": [
      { instructions: [launch("graph", "x", "b"), launch("graph", "b", "b")] },
      /"b" is both an input and an output/,
    ],
    "an output that is a constant": [{ instructions: [launch("graph", "x", "x")] }, /there is no register "x"/],
    "two outputs to one register": [
      { instructions: [launch("graph", "x", "b", { outputs: { y: "b", z: "b" } })] },
      /two outputs go to one register/,
    ],
    "a result that nothing writes": [{ results: ["c"] }, /the result "c"/],
    "a result that does not exist": [{ results: ["e"] }, /the result "e"/],
    "a finite register that is no output": [
      { instructions: [launch("graph", "x", "b", { mustBeFinite: ["a"] })] },
      /"a" must be finite but is none of its outputs/,
    ],
    "a copy to itself": [{ instructions: [...base.instructions, { ...copy, from: "b" }] }, /copied to itself/],
    "a copy out of range": [{ instructions: [{ ...copy, fromRow: 1 }] }, /rows 1 to 2 are outside "x" \[2\]/],
    "a copy to rows out of range": [{ instructions: [{ ...copy, toRow: 1 }] }, /rows 1 to 2 are outside "b" \[2\]/],
    "a copy of no rows": [{ instructions: [{ ...copy, rows: 0 }] }, /0 is no number of rows/],
    "a copy of another row size": [
      { registers: { b: { dtype: "float32", shape: [2, 2] } }, instructions: [copy] },
      /a row of \[2\] is not as long as one of \[2,2\]/,
    ],
    "a copy of another type": [
      { constants: { x: { kind: "value", tensor: int64([2], new BigInt64Array(2)) } }, instructions: [copy] },
      /one is int64, the other float32/,
    ],
    "NaN in a constant": [
      { constants: { x: { kind: "value", tensor: float32([2], Float32Array.of(1, Number.NaN)) } } },
      /the constant "x" holds NaN or an infinity/,
    ],
    "a constant of too few values": [
      { constants: { x: { kind: "value", tensor: { dtype: "float32", shape: [3], data: new Float32Array(2) } } } },
      /the constant "x" has 2 values for its shape \[3\]/,
    ],
    "a register of another type": [
      { registers: { ...base.registers, c: { dtype: "float16" as "float32", shape: [2] } } },
      /the register "c" is of the type float16, not float32 or int64/,
    ],
    "a register without a size": [
      { registers: { ...base.registers, c: { dtype: "float32", shape: [2, Number.NaN] } } },
      /the register "c" has the shape \[2,NaN\]/,
    ],
    "a register of a negative size": [
      { registers: { ...base.registers, c: { dtype: "float32", shape: [-1] } } },
      /the register "c" has the shape \[-1\]/,
    ],
    "values of another type": [
      {
        constants: {
          x: { kind: "value", tensor: { dtype: "float32", shape: [2], data: new Float64Array(2) as never } },
        },
      },
      /the constant "x" of the type float32 has its values in no Float32Array/,
    ],
    "stored rows that begin nowhere": [
      { constants: { ...base.constants, stored: { ...stored, firstElement: 0.5 } } },
      /"stored" takes rows of table that are none/,
    ],
    "a name used twice": [{ constants: { a: base.constants.x! } }, /"a" is both a register and a constant/],
    "stored rows outside the tensor": [
      { constants: { ...base.constants, stored: { ...stored, firstElement: 8 } } },
      /"stored" reads outside the tensor table \[4,3\]/,
    ],
    "stored rows that do not make the shape": [
      { constants: { ...base.constants, stored: { ...stored, shape: [3, 2] } } },
      /"stored" has 2 rows of 2 elements for its shape \[3,2\]/,
    ],
    "a stored tensor of another length": [
      { constants: { ...base.constants, stored: { ...stored, source: { ...stored.source, length: 48 } } } },
      /does not have 48 bytes/,
    ],
  };

  it.each(Object.entries(cases))("refuses %s", (_, [change, message]) => {
    const work = { ...base, ...change };
    expect(() => check(work)).toThrow(RuntimeError);
    expect(() => check(work)).toThrow(message);
  });
});

it("allFinite sees NaN and both infinities anywhere", () => {
  expect(allFinite(Float32Array.of(0, -0, 3.4e38, -3.4e38, 1e-45))).toBe(true);
  expect(allFinite(new Float32Array(0))).toBe(true);
  for (const value of [Number.NaN, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY])
    for (const index of [0, 500, 999])
      expect(allFinite(new Float32Array(1000).fill(value, index, index + 1))).toBe(false);
});
