/**
 * Names a node of an ONNX model with the tensors that it reads and writes, for error messages: the parser of TensorRT
 * says which node it refused by index, and often nothing else that a person could look for.
 */

export interface OnnxNode {
  readonly operator: string;
  readonly inputs: readonly string[];
  readonly outputs: readonly string[];
}

/** @returns null for an index that the model does not have, or for bytes that are no model */
export function describeNode(model: Uint8Array, index: number): OnnxNode | null {
  try {
    const graph = fields(model).find(({ number }) => number === 7)?.bytes;
    const node = graph && fields(graph).filter(({ number }) => number === 1)[index]?.bytes;
    if (!node) return null;
    const parts = fields(node);
    const texts = (wanted: number) =>
      parts.filter(({ number }) => number === wanted).map(({ bytes }) => Buffer.from(bytes).toString("utf8"));
    return { operator: texts(4)[0] ?? "", inputs: texts(1).filter(Boolean), outputs: texts(2) };
  } catch {
    return null;
  }
}

/** The length-delimited fields of a protobuf message; others are skipped. */
function fields(message: Uint8Array): { number: number; bytes: Uint8Array }[] {
  const found: { number: number; bytes: Uint8Array }[] = [];
  let position = 0;
  const varint = (): number => {
    let value = 0;
    for (let scale = 1; ; scale *= 128) {
      const byte = message[position++];
      if (byte === undefined || scale > 2 ** 63) throw new RangeError("not a message");
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
  };
  while (position < message.length) {
    const tag = varint();
    switch (tag & 7) {
      case 0:
        varint();
        break;
      case 1:
        position += 8;
        break;
      case 2: {
        const length = varint();
        if (length > message.length - position) throw new RangeError("not a message");
        found.push({ number: Math.floor(tag / 8), bytes: message.subarray(position, position + length) });
        position += length;
        break;
      }
      case 5:
        position += 4;
        break;
      default:
        throw new RangeError("not a message");
    }
  }
  return found;
}
