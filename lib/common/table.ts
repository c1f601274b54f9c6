/** Tables: objects of rows whose names the compiler knows, while rows may be added to them when a program starts. */

/** @returns the rows, as a record of their names */
export function table<Row>() {
  return <Name extends string>(rows: Record<Name, Row>): Record<Name, Row> => rows;
}
