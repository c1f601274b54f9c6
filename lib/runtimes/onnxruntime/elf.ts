/**
 * What a shared library of Linux says of itself, read from its file without loading it: the libraries that it needs, and its
 * texts. To load one in order to find out would run its code in this process, and the loader names only the first library
 * that is missing. Only what this needs of the format is read: 64 bits, little endian.
 */

import { type FileHandle, open } from "node:fs/promises";

/** A shared library's file. */
export interface SharedLibrary {
  /** Names of the libraries that the loader must find with it (DT_NEEDED). */
  readonly needed: readonly string[];
  /** Reads the section of constants (.rodata); empty if there is none. @throws the file system's error */
  constants(): Promise<Buffer>;
}

/** Numbers of processors in the header (e_machine), as `process.arch` names them. */
const machines: Readonly<Record<string, number>> = { x64: 62, arm64: 183 };

interface Section {
  readonly name: number;
  readonly type: number;
  readonly offset: number;
  readonly size: number;
  /** Of a section of entries: the section with their texts. */
  readonly link: number;
}
const [dynamicType, noBitsType] = [6, 8];
const neededTag = 1;

/**
 * @param cpu that it must be for, as `process.arch`
 * @throws Error that says what is wrong with the file, or the file system's error
 */
export async function readSharedLibrary(file: string, cpu: string = process.arch): Promise<SharedLibrary> {
  const handle = await open(file);
  try {
    const { size } = await handle.stat();
    const header = await read(handle, 0, Math.min(size, 64));
    if (header.length < 64 || header.readUInt32BE(0) !== 0x7f454c46) throw new Error("is no shared library");
    if (header[4] !== 2 || header[5] !== 1 || header.readUInt16LE(18) !== machines[cpu])
      throw new Error(`is for another processor than ${cpu}`);
    const [entrySize, count, names] = [58, 60, 62].map((at) => header.readUInt16LE(at)) as [number, number, number];
    const start = Number(header.readBigUInt64LE(40));
    if (entrySize !== 64 || start + count * entrySize > size) throw new Error("is incomplete");
    const table = await read(handle, start, count * entrySize);
    const sections = Array.from({ length: count }, (_, index): Section => {
      const at = index * entrySize;
      return {
        name: table.readUInt32LE(at),
        type: table.readUInt32LE(at + 4),
        offset: Number(table.readBigUInt64LE(at + 24)),
        size: Number(table.readBigUInt64LE(at + 32)),
        link: table.readUInt32LE(at + 40),
      };
    });
    // Data that is zero has no bytes in the file.
    if (sections.some((section) => section.type !== noBitsType && section.offset + section.size > size))
      throw new Error("is incomplete");
    const bytesOf = async (section: Section | undefined) =>
      section ? read(handle, section.offset, section.size) : Buffer.alloc(0);
    const sectionNames = await bytesOf(sections[names]);
    const constants = sections.find(({ name }) => textAt(sectionNames, name) === ".rodata");
    const dynamic = sections.find(({ type }) => type === dynamicType);
    const [entries, texts] = [await bytesOf(dynamic), await bytesOf(dynamic && sections[dynamic.link])];
    const needed: string[] = [];
    for (let at = 0; at + 16 <= entries.length; at += 16)
      if (Number(entries.readBigUInt64LE(at)) === neededTag)
        needed.push(textAt(texts, Number(entries.readBigUInt64LE(at + 8))));
    return {
      needed,
      async constants() {
        const again = await open(file);
        try {
          return constants ? await read(again, constants.offset, constants.size) : Buffer.alloc(0);
        } finally {
          await again.close();
        }
      },
    };
  } finally {
    await handle.close();
  }
}

async function read(handle: FileHandle, position: number, length: number): Promise<Buffer> {
  const buffer = Buffer.alloc(length);
  const { bytesRead } = await handle.read(buffer, 0, length, position);
  return buffer.subarray(0, bytesRead);
}

function textAt(texts: Buffer, start: number): string {
  const end = texts.indexOf(0, start);
  return texts.toString("latin1", start, end < 0 ? texts.length : end);
}
