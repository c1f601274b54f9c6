import fc from "fast-check";
import { expect, it } from "vitest";
import { LruCache } from "../../lib/common/lru-cache.js";

it("keeps what was used last, whatever is asked of it", () => {
  interface Sized {
    readonly size: number;
  }
  const key = fc.constantFrom("a", "b", "c", "d", "constructor");
  const commands = fc.array(
    fc.oneof(
      fc.record({ kind: fc.constant("get" as const), key }),
      fc.record({ kind: fc.constant("set" as const), key, size: fc.integer({ min: 0, max: 6 }) }),
    ),
  );
  fc.assert(
    fc.property(commands, (commands) => {
      const recent = new LruCache<Sized>(10, ({ size }) => size);
      // The same as a list, the latest last.
      let list: { key: string; value: Sized }[] = [];
      for (const command of commands) {
        const known = list.find(({ key }) => key === command.key);
        expect(recent.has(command.key)).toBe(known !== undefined);
        if (command.kind === "get") {
          expect(recent.get(command.key)).toBe(known?.value);
          if (known) list = [...list.filter((entry) => entry !== known), known];
          continue;
        }
        const value = { size: command.size };
        expect(recent.set(command.key, value)).toBe(value);
        list = [...list.filter((entry) => entry !== known), { key: command.key, value }];
        while (list.length > 1 && list.reduce((sum, { value }) => sum + value.size, 0) > 10) list.shift();
      }
      for (const { key, value } of list) expect(recent.get(key)).toBe(value);
    }),
  );
});

it("keeps the latest value even if it alone is too large", () => {
  const recent = new LruCache<number[]>(2, (values) => values.length);
  recent.set("small", [1]);
  recent.set("large", [1, 2, 3]);
  expect([recent.has("small"), recent.get("large")]).toEqual([false, [1, 2, 3]]);
  recent.set("next", [1]);
  expect([recent.has("large"), recent.has("next")]).toEqual([false, true]);
});
