/**
 * The pictures that were drawn, newest first, as many as fit within a number and a size. They are kept in IndexedDB, where the browser
 * has it; otherwise they last as long as the page.
 */

/** Pictures at most. */
export const mostPictures = 60;
/** Bytes at most, of the pictures and of what they were made from. */
const mostBytes = 64e6;

const bytesOf = ({ blob, request }) => blob.size + (request.image?.length ?? 0) + (request.mask?.length ?? 0);

const settled = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

export class History {
  #database = null;
  #urls = new Map();
  /** { id, blob, seed, size, request, … }, newest first. */
  entries = [];

  /** Reads what was kept. Never fails: without storage there is nothing. */
  async open() {
    try {
      // Servers under several paths of one origin do not mix.
      const request = indexedDB.open(`flowturbo ${location.pathname}`, 1);
      request.onupgradeneeded = () => request.result.createObjectStore("pictures", { keyPath: "id" });
      const database = await settled(request);
      const kept = await settled(database.transaction("pictures").objectStore("pictures").getAll());
      this.#database = database;
      this.entries = [...this.entries, ...kept.reverse()];
      this.#trim();
    } catch {}
  }

  /** Adds a picture, and gives up the oldest ones if there are too many. */
  add(entry) {
    const id = Math.max(Date.now(), 1 + (this.entries[0]?.id ?? 0));
    const added = { ...entry, id };
    this.entries.unshift(added);
    this.#write((store) => store.put(added));
    this.#trim();
    return added;
  }

  clear() {
    for (const entry of this.entries) this.#release(entry);
    this.entries = [];
    this.#write((store) => store.clear());
  }

  /** An address of the picture, for as long as it is in the history. */
  url(entry) {
    if (!this.#urls.has(entry.id)) this.#urls.set(entry.id, URL.createObjectURL(entry.blob));
    return this.#urls.get(entry.id);
  }

  #trim() {
    let bytes = 0;
    // The newest one is kept whatever its size.
    const kept = this.entries.filter((entry, index) => {
      bytes += bytesOf(entry);
      return index === 0 || (index < mostPictures && bytes <= mostBytes);
    });
    const gone = this.entries.filter((entry) => !kept.includes(entry));
    this.entries = kept;
    for (const entry of gone) {
      this.#release(entry);
      this.#write((store) => store.delete(entry.id));
    }
  }

  #release({ id }) {
    if (this.#urls.has(id)) URL.revokeObjectURL(this.#urls.get(id));
    this.#urls.delete(id);
  }

  /** What cannot be written is not kept; the page has it all the same. */
  #write(change) {
    if (this.#database === null) return;
    try {
      change(this.#database.transaction("pictures", "readwrite").objectStore("pictures"));
    } catch {
      this.#database = null;
    }
  }
}
