/** .safetensors files as a test wants them: read whole, written with whatever header and bytes. */

import { readFileSync, writeFileSync } from "node:fs";

/** Tensors by name. */
export type StoredFile = Record<string, { dtype: string; shape: number[]; bytes: Buffer }>;

/** An entry of a header. */
export interface Entry {
  dtype: string;
  shape: number[];
  data_offsets: [number, number];
}

export function readHeader(file: string): { header: Record<string, Entry>; data: Buffer } {
  const bytes = readFileSync(file);
  const length = Number(bytes.readBigUInt64LE(0));
  const { __metadata__, ...header } = JSON.parse(bytes.toString("utf8", 8, 8 + length));
  return { header, data: bytes.subarray(8 + length) };
}

export function readSafetensors(file: string): StoredFile {
  const { header, data } = readHeader(file);
  const entries = Object.entries(header).map(
    ([
      name,
      {
        dtype,
        shape,
        data_offsets: [begin, end],
      },
    ]) => {
      return [name, { dtype, shape, bytes: data.subarray(begin, end) }] as const;
    },
  );
  return Object.fromEntries(entries);
}

export function writeHeader(file: string, header: object, data: Buffer): void {
  const json = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(json.length));
  writeFileSync(file, Buffer.concat([length, json, data]));
}

export function writeSafetensors(file: string, tensors: StoredFile): void {
  const header: Record<string, Entry> = {};
  let end = 0;
  for (const [name, { dtype, shape, bytes }] of Object.entries(tensors)) {
    header[name] = { dtype, shape, data_offsets: [end, end + bytes.length] };
    end += bytes.length;
  }
  writeHeader(file, header, Buffer.concat(Object.values(tensors).map(({ bytes }) => bytes)));
}
