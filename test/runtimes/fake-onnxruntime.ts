/**
 * Stands in for onnxruntime-node in the process that runs graphs, for what no GPU here can do: every graph doubles its input x,
 * and does what its name says besides. "throws{message}." fails with these words at a launch, "refuses{message}." when it is compiled, "takes[20]" takes so many milliseconds,
 * "sessions" gives how many sessions were created and released so far.
 */

let created = 0;
let released = 0;

class Tensor {
  readonly location = "cpu";
  constructor(
    readonly type: string,
    readonly data: Float32Array,
    readonly dims: readonly number[],
  ) {}
}

class InferenceSession {
  constructor(private readonly text: string) {
    created++;
  }

  static async create(bytes: Uint8Array): Promise<InferenceSession> {
    // The name of the graph is in it.
    const text = Buffer.from(bytes).toString("latin1");
    const [, message] = text.match(/refuses\{(.*?)\}\./s) ?? [];
    if (message !== undefined) throw new Error(message);
    return new InferenceSession(text);
  }

  async run({ x }: { readonly x: Tensor }): Promise<{ y: Tensor }> {
    const [, message] = this.text.match(/throws\{(.*?)\}\./s) ?? [];
    if (message !== undefined) throw new Error(message);
    const [, milliseconds] = this.text.match(/takes\[(\d+)\]/) ?? [];
    // As the library does, this holds the thread.
    const start = performance.now();
    while (performance.now() - start < Number(milliseconds ?? 0));
    const values = this.text.includes("sessions") ? [created, released] : x.data.map((value) => 2 * value);
    return { y: new Tensor("float32", Float32Array.from(values), x.dims) };
  }

  async release(): Promise<void> {
    released++;
  }
}

export default { Tensor, InferenceSession, env: { versions: { node: "1.0.0" } } };
