// What a process of bench/serve.ts is told by the one that started it: calls by name with a value that is JSON, over Node's own channel.

/** Answers calls from now on, and tells that it does. @param functions what can be called, by name */
export function answerCalls(functions) {
  process.on("message", async ({ id, name, params }) => {
    try {
      process.send({ id, value: (await functions[name](params)) ?? null });
    } catch (error) {
      process.send({ id, error: error.stack ?? String(error) });
    }
  });
  // It does not outlive the benchmark.
  process.on("disconnect", () => process.exit());
  process.send({ id: 0, value: null });
}
