/** A place for messages; `console` is one. Without one nothing is written: the library never prints. */
export interface Logger {
  debug?(message: string): void;
  info?(message: string): void;
  warn?(message: string): void;
}
