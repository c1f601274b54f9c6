// What workspaces must do, whatever runs the graphs: submissions over registers that outlive them.
import { describe, expect, it } from "vitest";
import { float32 } from "../../lib/common/tensor.js";
import { DisposedError, RuntimeError } from "../../lib/errors.js";
import type { Instruction, Program } from "../../lib/program/program.js";
import type { Runtime } from "../../lib/runtimes/runtime.js";
import { gathering, launch, program, slowProgram } from "./models.js";

export const double = (x: string, y: string) => launch("double", x, y);
export const values = (tensor: { data: ArrayLike<unknown> } | undefined) => Array.from(tensor!.data);
export const submission = (instructions: Instruction[], results: string[]): Program => ({
  ...program([0], instructions, results),
  constants: {},
});
/** As `slowProgram`, with operands of its own. */
export const slowSubmission = (launches: number): Program => {
  const { registers, constants } = slowProgram("slow", 512, launches);
  return {
    registers: { slow: registers.a! },
    constants: { "slow.x": constants.x! },
    instructions: Array.from({ length: launches }, () => launch("slow", "slow.x", "slow")),
    results: [],
  };
};
/** @param open a runtime with the graphs double, huge and slow, disposed of after the test */
export function describeWorkspaces(open: () => Runtime): void {
  describe("a workspace", () => {
    it("keeps registers and constants from submission to submission, in their order, before the runtime is ready", async () => {
      const workspace = open().open();
      const first = workspace.submit(program([3], [double("x", "a")], []));
      const second = workspace.submit(submission([double("a", "b"), double("x", "c")], ["b", "c"]));
      workspace.free(["a"]);
      const third = workspace.submit(submission([double("b", "d")], ["d"]));
      expect(values((await third).d)).toEqual([24]);
      expect(await first).toEqual({});
      const results = await second;
      expect([values(results.b), values(results.c)]).toEqual([[12], [6]]);
    });

    it("gathers rows of earlier submissions into one launch and scatters the results", async () => {
      const workspace = open().open();
      const { submissions, expected } = gathering(1, 10);
      const [, , shared] = await Promise.all(submissions.map((each) => workspace.submit(each)));
      expect([values(shared!.p), values(shared!.q)]).toEqual([[expected.p], [expected.q]]);
    });

    it("does not see another's registers, and ordinary programs run between its submissions", async () => {
      const runtime = open();
      const [one, other] = [runtime.open(), runtime.open()];
      void one.submit(program([1], [double("x", "a")], []));
      const ordinary = runtime.run(program([7], [double("x", "a")], ["a"]));
      await expect(other.submit(submission([double("a", "b")], ["b"]))).rejects.toThrow(/"a" is read before anything/);
      expect(values((await one.submit(submission([double("a", "b")], ["b"]))).b)).toEqual([4]);
      expect(values((await ordinary).a)).toEqual([14]);
    });

    it("refuses submissions that cannot run, by name", async () => {
      const workspace = open().open();
      await workspace.submit(program([1], [double("x", "a")], []));
      const wide = { a: { dtype: "float32", shape: [2] } } as const;
      const cases: [Program, RegExp][] = [
        [submission([double("d", "b")], []), /"d" is read before/],
        [program([1], [double("x", "a")], []), /"x" is there already/],
        [
          { ...submission([], []), registers: wide },
          /"a" is float32 \[2\] here and float32 \[1\] in an earlier submission/,
        ],
        [{ ...submission([], []), registers: { x: { dtype: "float32", shape: [1] } } }, /"x" is a register here/],
        [{ ...submission([double("a", "b")], []), registers: {} }, /there is no register "b"/],
        [{ ...submission([], ["a"]), registers: {} }, /the result "a"/],
      ];
      for (const [wrong, message] of cases) await expect(workspace.submit(wrong)).rejects.toThrow(message);
      workspace.free(["a", "unknown"]);
      await expect(workspace.submit(submission([double("a", "b")], []))).rejects.toThrow(/"a" is read before/);
    });

    it("lives on after a submission that failed; what would read its registers fails by name", async () => {
      const workspace = open().open();
      void workspace.submit(program([1], [double("x", "c")], []));
      const infinite = { ...launch("huge", "c", "a"), mustBeFinite: ["a"] };
      const failed = workspace.submit(submission([infinite, launch("huge", "a", "b", { mustBeFinite: ["b"] })], []));
      const dependent = workspace.submit(submission([double("b", "d")], ["d"]));
      const other = workspace.submit(submission([double("c", "d")], ["d"]));
      await expect(failed).rejects.toThrow(/NaN or an infinity/);
      await expect(dependent).rejects.toThrow(/reads "b", which has no value, since an earlier submission/);
      expect(values((await other).d)).toEqual([4]);
      expect(workspace.lost).toBe(false);
    });

    it("drops submissions that are aborted before their turn, and runs the others", async () => {
      const workspace = open().open();
      const controller = new AbortController();
      const slow = workspace.submit(slowSubmission(3));
      const launches: string[] = [];
      const dropped = workspace.submit(program([1], [double("x", "c")], []), {
        signal: controller.signal,
        onLaunch: ({ launch }) => launches.push(launch.graph),
      });
      const after = workspace.submit({ ...program([5], [double("y", "d")], ["d"]), constants: { y: constant(5) } });
      controller.abort(new Error("no longer"));
      await expect(dropped).rejects.toThrow("no longer");
      await slow;
      expect(values((await after).d)).toEqual([10]);
      expect(launches).toEqual([]);
    });

    it("is closed once and for all", async () => {
      const workspace = open().open();
      void workspace.submit(program([1], [double("x", "a")], []));
      workspace.close();
      expect(workspace.lost).toBe(true);
      await expect(workspace.submit(submission([double("a", "b")], []))).rejects.toBeInstanceOf(RuntimeError);
    });

    it("ends with the runtime, which waits for submissions under way", async () => {
      const runtime = open();
      const workspace = runtime.open();
      const slow = workspace.submit(slowSubmission(3));
      await runtime.dispose();
      await slow;
      await expect(workspace.submit(program([1], [double("x", "a")], []))).rejects.toBeInstanceOf(DisposedError);
      expect(() => runtime.open()).toThrow(DisposedError);
    });
  });
}

function constant(value: number) {
  return { kind: "value", tensor: float32([1], Float32Array.of(value)) } as const;
}
