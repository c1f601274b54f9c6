/** The Model Context Protocol's own package: an optional peer, which only `flowturbo mcp` needs. */

import { Dependency } from "../common/dependency.js";

export const mcpSdk = new Dependency(
  "@modelcontextprotocol/sdk",
  async () => {
    const [{ McpServer }, { StdioServerTransport }] = await Promise.all([
      import("@modelcontextprotocol/sdk/server/mcp.js"),
      import("@modelcontextprotocol/sdk/server/stdio.js"),
    ]);
    return { McpServer, StdioServerTransport };
  },
  () => null,
  () => "`flowturbo mcp` needs a package that flowturbo does not bring: npm install @modelcontextprotocol/sdk",
);
