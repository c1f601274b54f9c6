/** Small dense systems of linear equations. */

/** Gauss–Jordan with pivoting; the right-hand sides stand behind the matrix, in each row, and become the solutions. */
export function solve(rows: Float64Array[], unknowns: number): void {
  for (let column = 0; column < unknowns; column++) {
    let pivot = column;
    for (let r = column + 1; r < unknowns; r++)
      if (Math.abs(rows[r]![column]!) > Math.abs(rows[pivot]![column]!)) pivot = r;
    [rows[column], rows[pivot]] = [rows[pivot]!, rows[column]!];
    const head = rows[column]!;
    const scale = 1 / head[column]!;
    for (let i = column; i < head.length; i++) head[i]! *= scale;
    for (let r = 0; r < unknowns; r++) {
      const factor = r === column ? 0 : rows[r]![column]!;
      if (factor !== 0) for (let i = column; i < head.length; i++) rows[r]![i]! -= factor * head[i]!;
    }
  }
}

/** x of A·x = b, both left as they are; A is square and not singular. */
export function solved(matrix: readonly ArrayLike<number>[], right: ArrayLike<number>): Float64Array {
  const rows = matrix.map((row, r) => Float64Array.from([...Array.from(row), right[r]!]));
  solve(rows, rows.length);
  return Float64Array.from(rows, (row) => row.at(-1)!);
}
