/** A place for messages; `console` is one. Without one nothing is written: the library never prints. */
export interface Logger {
  /** What only helps to find a fault. */
  debug?(message: string): void;
  /** What takes long, and what it was: an engine that is built. */
  info?(message: string): void;
  /** What the caller should know: a prompt that was cut, a process that ended. */
  warn?(message: string): void;
}
