// docs/guides/clients.md against the AI SDK provider and the tools of the Model Context Protocol: it names every option that they take.
import { expect, it } from "vitest";
import { z } from "zod";
import { readOptions } from "../../lib/ai/options.js";
import { toolSchemas } from "../../lib/mcp/tools.js";
import { read } from "./documents.js";

const guide = read("docs/guides/clients.md");
/** What is code in a section of the guide. */
const codesOf = (heading: string) => {
  const [, text] = guide.match(new RegExp(`^## ${heading}\n([\\s\\S]*?)(?=^## )`, "m"))!;
  return new Set([...text!.matchAll(/`([^`\n]+)`/g)].map(([, code]) => code!));
};

it("names every option of the provider", () => {
  const [, list] = (() => {
    try {
      readOptions({ xxxxxxxxxxxxxxxx: 1 });
    } catch (error) {
      return (error as Error).message.match(/There are (.*)\./)!;
    }
    return expect.fail("no error");
  })();
  const names = list!.split(", ");
  expect(names.length).toBeGreaterThan(15);
  for (const name of names) expect(codesOf("The AI SDK"), name).toContain(name);
});

it("names every field of the tools", () => {
  for (const { input } of Object.values(toolSchemas("shapes", true))) {
    const names = Object.keys((z.toJSONSchema(input, { io: "input" }) as { properties: object }).properties);
    expect(names.length).toBeGreaterThan(15);
    for (const name of names) expect(codesOf("The Model Context Protocol"), name).toContain(name);
  }
});
