/**
 * A writer for the few protobuf constructs that an ONNX file uses. The format is small and frozen; a general library
 * would bring megabytes and a schema to keep in step.
 */

/** Bytes of a new message. Most of those that ONNX has are nodes and their parts. */
const initialBytes = 128;

/** Collects the fields of one protobuf message, as bytes: a checkpoint's graphs have tens of thousands. */
export class MessageWriter {
  #buffer = Buffer.allocUnsafe(initialBytes);
  #length = 0;

  /** A varint field (int32, int64, enum, bool). Negative values take ten bytes, as protobuf prescribes. */
  int(field: number, value: number | bigint): this {
    this.#key(field, 0);
    this.#varint(value);
    return this;
  }

  /** A 32-bit float field. */
  float(field: number, value: number): this {
    this.#key(field, 5);
    this.#reserve(4);
    this.#length = this.#buffer.writeFloatLE(value, this.#length);
    return this;
  }

  string(field: number, value: string): this {
    const length = Buffer.byteLength(value);
    this.#key(field, 2);
    this.#varint(length);
    this.#reserve(length);
    this.#length += this.#buffer.write(value, this.#length);
    return this;
  }

  bytes(field: number, value: Uint8Array): this {
    this.#key(field, 2);
    this.#varint(value.length);
    return this.#append(value);
  }

  message(field: number, value: MessageWriter): this {
    return this.bytes(field, value.#written);
  }

  /** A packed repeated int64 field. */
  packedInts(field: number, values: readonly number[]): this {
    const packed = new MessageWriter();
    for (const value of values) packed.#varint(value);
    return this.bytes(field, packed.#written);
  }

  /** The fields of another message, behind those of this one. */
  merge(other: MessageWriter): this {
    return this.#append(other.#written);
  }

  /** The message, in memory of its own. */
  finish(): Uint8Array {
    return Buffer.from(this.#written);
  }

  get #written(): Uint8Array {
    return this.#buffer.subarray(0, this.#length);
  }

  #key(field: number, wireType: number): void {
    this.#varint(field * 8 + wireType);
  }

  #varint(value: number | bigint): void {
    this.#reserve(10);
    let rest = value;
    if (typeof rest === "bigint" || rest < 0 || rest > 0x7fffffff) {
      let big = BigInt.asUintN(64, BigInt(rest));
      for (; big > 0x7fn; big >>= 7n) this.#buffer[this.#length++] = Number(big & 0x7fn) | 0x80;
      rest = Number(big);
    }
    for (; rest > 0x7f; rest >>= 7) this.#buffer[this.#length++] = (rest & 0x7f) | 0x80;
    this.#buffer[this.#length++] = rest;
  }

  #append(bytes: Uint8Array): this {
    this.#reserve(bytes.length);
    this.#buffer.set(bytes, this.#length);
    this.#length += bytes.length;
    return this;
  }

  #reserve(bytes: number): void {
    const needed = this.#length + bytes;
    if (needed <= this.#buffer.length) return;
    const grown = Buffer.allocUnsafe(Math.max(needed, 2 * this.#buffer.length));
    grown.set(this.#written);
    this.#buffer = grown;
  }
}
