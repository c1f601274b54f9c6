/**
 * Stands in for onnxruntime-node in the process that runs graphs, for what no GPU here can do: every graph doubles its input x,
 * and does what its name says besides. "throws{message}." fails with these words at a launch, "refuses{message}." when it is compiled, "takes[20]" takes so many milliseconds,
 * "sessions" gives how many sessions were created and released so far, "tensors" how many results are on the device.
 */

let created = 0;
let released = 0;

let onDevice = 0;

class Tensor {
  location = "cpu";
  readonly gpuBuffer = this;
  constructor(
    readonly type: string,
    readonly data: Float32Array,
    readonly dims: readonly number[],
  ) {}

  static fromGpuBuffer(buffer: Tensor, { dataType, dims }: { dataType: string; dims: readonly number[] }): Tensor {
    return new Tensor(dataType, buffer.data, dims);
  }

  get size(): number {
    return this.data.length;
  }

  /** A result of a session that leaves its results on the device. */
  held(): this {
    onDevice++;
    this.location = "gpu-buffer";
    return this;
  }

  dispose(): void {
    onDevice--;
  }
}

class InferenceSession {
  constructor(
    private readonly text: string,
    private readonly isHeld: boolean,
  ) {
    created++;
  }

  static async create(bytes: Uint8Array, options: { preferredOutputLocation?: string }): Promise<InferenceSession> {
    // The name of the graph is in it.
    const text = Buffer.from(bytes).toString("latin1");
    const [, message] = text.match(/refuses\{(.*?)\}\./s) ?? [];
    if (message !== undefined) throw new Error(message);
    return new InferenceSession(text, options.preferredOutputLocation === "gpu-buffer");
  }

  async run({ x }: { readonly x: Tensor }): Promise<{ y: Tensor }> {
    const [, message] = this.text.match(/throws\{(.*?)\}\./s) ?? [];
    if (message !== undefined) throw new Error(message);
    const [, milliseconds] = this.text.match(/takes\[(\d+)\]/) ?? [];
    // As the library does, this holds the thread.
    const start = performance.now();
    while (performance.now() - start < Number(milliseconds ?? 0));
    const doubled = x.data.map((value) => 2 * value);
    const counts = this.text.includes("sessions") ? [created, released] : [onDevice, onDevice];
    const values = /sessions|tensors/.test(this.text) ? counts : doubled;
    const y = new Tensor("float32", Float32Array.from(values), x.dims);
    return { y: this.isHeld ? y.held() : y };
  }

  async release(): Promise<void> {
    released++;
  }
}

export default { Tensor, InferenceSession, env: { versions: { node: "1.0.0" } } };
