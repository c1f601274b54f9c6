/**
 * W += up · down for matrices of low rank, in float32: for SD3.5-medium at rank 128 3·10¹¹ products, which JavaScript's own loops take five
 * minutes for. So the inner loops are a function of WebAssembly's vector instructions, 64 bytes at a time, which is assembled here: some hundred bytes,
 * as readable as a binary file would not be. Every Node that the package runs on has them.
 */

/** What is used of WebAssembly: TypeScript has its types only beside those of browsers. */
interface Memory {
  readonly buffer: ArrayBuffer;
  grow(pages: number): number;
}
const { WebAssembly: wasm } = globalThis as unknown as {
  readonly WebAssembly: {
    readonly Memory: new (limits: { readonly initial: number }) => Memory;
    readonly Module: new (bytes: Uint8Array) => object;
    readonly Instance: new (
      module: object,
      imports: object,
    ) => { readonly exports: Readonly<Record<string, (...numbers: number[]) => void>> };
  };
};

/** Columns that are computed together: four vectors of four values, for two rows of W. They stay in registers. */
const [blockColumns, blockRows] = [16, 2];
const blockBytes = 4 * blockColumns;
const pageBytes = 65536;

/** Products of one call at most, so that no turn of the event loop takes more than some milliseconds. */
const productsAtOnce = 2 ** 24;

/** The matrices that are added to one weight. */
export interface Term {
  /** [rank, columns] */
  readonly down: Float32Array;
  /** [rows, rank] */
  readonly up: Float32Array;
  readonly rank: number;
  /** The product is multiplied by it. */
  readonly factor: number;
}

/** Adds products of low rank to the rows of a weight. Of its sums the products come first, then the weight, as when they are computed apart. */
export class LowRankSum {
  readonly #memory: Memory;
  readonly #add: (weights: number, up: number, down: number, rows: number, rank: number, blocks: number) => void;

  constructor() {
    this.#memory = new wasm.Memory({ initial: 1 });
    const { exports } = new wasm.Instance(new wasm.Module(assembled()), { js: { memory: this.#memory } });
    this.#add = exports.add!;
  }

  /**
   * Prepares for the rows of one weight.
   * @param columns of the weight
   * @returns what adds to rows from `first` on, in place, and takes as many turns as it yields
   */
  of(terms: readonly Term[], columns: number): (rows: Float32Array, first: number) => Generator<void> {
    const rank = terms.reduce((sum, term) => sum + term.rank, 0);
    const blocks = Math.ceil(columns / blockColumns);
    const rowsAtOnce = Math.max(blockRows, Math.floor(productsAtOnce / (rank * columns)) & ~1);
    // One behind another: down, weights, up.
    const weights = blocks * rank * blockBytes;
    const up = weights + rowsAtOnce * blocks * blockBytes;
    const bytes = up + 4 * rowsAtOnce * rank;
    const missing = Math.ceil(bytes / pageBytes) - this.#memory.buffer.byteLength / pageBytes;
    if (missing > 0) this.#memory.grow(missing);
    const values = new Float32Array(this.#memory.buffer);
    packDown(terms, columns, blocks, values.subarray(0, blocks * rank * blockColumns));
    const add = this.#add;
    return function* (rows, first) {
      const count = rows.length / columns;
      const stride = blocks * blockColumns;
      for (let row = 0; row < count; row += rowsAtOnce) {
        const some = Math.min(rowsAtOnce, count - row);
        packUp(terms, first + row, some, values.subarray(up / 4, up / 4 + rowsAtOnce * rank));
        for (let each = 0; each < some; each++)
          values.set(rows.subarray((row + each) * columns, (row + each + 1) * columns), weights / 4 + each * stride);
        add(weights, up, 0, some, rank, blocks);
        for (let each = 0; each < some; each++) {
          const at = weights / 4 + each * stride;
          rows.set(values.subarray(at, at + columns), (row + each) * columns);
        }
        yield;
      }
    };
  }
}

/** The rows of all terms as [blocks, rank, columns of a block]; columns behind the last are left as they are, since nothing reads their sums. */
function packDown(terms: readonly Term[], columns: number, blocks: number, into: Float32Array): void {
  const total = into.length / (blocks * blockColumns);
  let place = 0;
  for (const { down, rank } of terms) {
    for (let k = 0; k < rank; k++, place++)
      for (let column = 0; column < columns; column++) {
        const block = Math.floor(column / blockColumns);
        into[(block * total + place) * blockColumns + (column % blockColumns)] = down[k * columns + column]!;
      }
  }
}

/** Rows of all terms, multiplied by their factors, as [pairs of rows, rank, 2]; what is behind an odd last row is not stored. */
function packUp(terms: readonly Term[], first: number, count: number, into: Float32Array): void {
  const total = terms.reduce((sum, { rank }) => sum + rank, 0);
  let place = 0;
  for (const { up, rank, factor } of terms) {
    for (let row = 0; row < count; row++) {
      const at = (row >> 1) * total * blockRows + (row & 1);
      for (let k = 0; k < rank; k++) into[at + (place + k) * blockRows] = up[(first + row) * rank + k]! * factor;
    }
    place += rank;
  }
}

/*
 * The module. Instructions are lists of bytes (WebAssembly core specification 2.0, section 5.4).
 */

type Code = readonly number[];

const [i32, v128] = [0x7f, 0x7b];

/** LEB128 of a number that is not negative. */
function leb(value: number): Code {
  return value < 128 ? [value] : [(value % 128) | 128, ...leb(Math.floor(value / 128))];
}
/** A constant below 8192, whose LEB128 is signed: above 63 it takes a second byte. */
const constant = (value: number): Code => [0x41, ...(value < 64 ? [value] : [(value % 128) | 128, ...leb(value >> 7)])];
const get = (local: number): Code => [0x20, local];
const set = (local: number): Code => [0x21, local];
const sum = (a: Code, b: Code): Code => [...a, ...b, 0x6a];
const times = (a: Code, b: Code): Code => [...a, ...b, 0x6c];
const vectorSum = (a: Code, b: Code): Code => [...a, ...b, 0xfd, 0xe4, 0x01];
const vectorTimes = (a: Code, b: Code): Code => [...a, ...b, 0xfd, 0xe6, 0x01];
const load = (address: Code, offset: number): Code => [...address, 0xfd, 0x00, 4, ...leb(offset)];
const store = (address: Code, offset: number, value: Code): Code => [
  ...address,
  ...value,
  0xfd,
  0x0b,
  4,
  ...leb(offset),
];
/** Four times the value at an address. */
const splat = (address: Code, offset: number): Code => [...address, 0xfd, 0x09, 2, ...leb(offset)];
const zeros: Code = [0xfd, 0x0c, ...new Array<number>(16).fill(0)];
const repeated = (count: number, code: (index: number) => Code): Code =>
  Array.from({ length: count }, (_, index) => code(index)).flat();

/** for (local = 0; local < end; local += step) body */
const loop = (local: number, end: Code, step: number, body: Code): Code => [
  ...constant(0),
  ...set(local),
  // block, loop, leave where local >= end (unsigned).
  ...[0x02, 0x40, 0x03, 0x40, ...get(local), ...end, 0x4f, 0x0d, 1],
  ...body,
  ...sum(get(local), constant(step)),
  ...set(local),
  ...[0x0c, 0, 0x0b, 0x0b],
];

const section = (id: number, content: Code): Code => [id, ...leb(content.length), ...content];

/**
 * A module with the function add(weights, up, down, rows, rank, blocks): addresses of rows of `blocks` blocks, of [rows / 2, rank, 2] and of
 * [blocks, rank, columns of a block]. An odd last row has a neighbour that nobody reads.
 */
function assembled(): Uint8Array {
  const [weights, up, down, rows, rank, blocks] = [0, 1, 2, 3, 4, 5];
  const [block, row, k, downAt, upAt, weightAt] = [6, 7, 8, 9, 10, 11];
  const vectors = blockColumns / 4;
  const sumOf = (each: number, vector: number) => 12 + each * vectors + vector;
  const factorOf = (each: number) => sumOf(blockRows, each);
  const loaded = factorOf(blockRows);

  const step = [
    ...repeated(blockRows, (each) => [...splat(get(upAt), 4 * each), ...set(factorOf(each))]),
    ...repeated(vectors, (vector) => [
      ...[...load(get(downAt), 16 * vector), ...set(loaded)],
      ...repeated(blockRows, (each) => [
        ...vectorSum(get(sumOf(each, vector)), vectorTimes(get(factorOf(each)), get(loaded))),
        ...set(sumOf(each, vector)),
      ]),
    ]),
    ...[...sum(get(downAt), constant(blockBytes)), ...set(downAt)],
    ...[...sum(get(upAt), constant(4 * blockRows)), ...set(upAt)],
  ];
  const pair = [
    ...repeated(blockRows * vectors, (index) => [...zeros, ...set(sumOf(0, index))]),
    ...[...sum(get(down), times(times(get(block), get(rank)), constant(blockBytes))), ...set(downAt)],
    ...[...sum(get(up), times(times(get(row), get(rank)), constant(4))), ...set(upAt)],
    ...loop(k, get(rank), 1, step),
    ...repeated(blockRows, (each) => {
      const place = sum(times(sum(get(row), constant(each)), get(blocks)), get(block));
      return [
        ...[...sum(get(weights), times(place, constant(blockBytes))), ...set(weightAt)],
        ...repeated(vectors, (vector) =>
          store(get(weightAt), 16 * vector, vectorSum(load(get(weightAt), 16 * vector), get(sumOf(each, vector)))),
        ),
      ];
    }),
  ];
  const body = loop(block, get(blocks), 1, loop(row, get(rows), blockRows, pair));
  const locals = [2, ...leb(6), i32, ...leb(blockRows * vectors + blockRows + 1), v128];
  const code = [...locals, ...body, 0x0b];
  const text = (letters: string): Code => [letters.length, ...Buffer.from(letters)];
  return Uint8Array.from([
    ...[...Buffer.from("\0asm"), 1, 0, 0, 0],
    // One type: six numbers, no result. The memory is given; one function has the type, and a name.
    ...section(1, [1, 0x60, 6, ...repeated(6, () => [i32]), 0]),
    ...section(2, [1, ...text("js"), ...text("memory"), 0x02, 0x00, 0x01]),
    ...section(3, [1, 0]),
    ...section(7, [1, ...text("add"), 0x00, 0x00]),
    ...section(10, [1, ...leb(code.length), ...code]),
  ]);
}
