/** The page at `/`: files of the package, read once. */

import { createHash } from "node:crypto";
import { readdirSync, readFileSync } from "node:fs";
import path from "node:path";
import type { FastifyInstance } from "fastify";
import { packageFile } from "../common/package.js";

const types: Record<string, string> = {
  ".html": "text/html; charset=utf-8",
  ".css": "text/css; charset=utf-8",
  ".js": "text/javascript; charset=utf-8",
};
/** Nothing but the page's own files, and no script or style within the page. */
const policy =
  "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

export function addPage(app: FastifyInstance): void {
  const folder = packageFile("page");
  for (const name of readdirSync(folder)) {
    const content = readFileSync(path.join(folder, name));
    const address = name === "index.html" ? "" : name;
    const tag = `"${createHash("sha256").update(content).digest("base64url").slice(0, 22)}"`;
    app.get(`/${address}`, { config: { isOpen: true } }, async (request, reply) => {
      // Without the slash the page's own addresses, which are relative, would be those of the folder above.
      const { pathname } = new URL(request.url, "http://localhost");
      if (address === "" && !pathname.endsWith("/")) return reply.redirect(`${path.posix.basename(pathname)}/`, 308);
      reply.headers({
        "content-type": types[path.extname(name)]!,
        "content-security-policy": policy,
        "cache-control": "no-cache",
        etag: tag,
      });
      return request.headers["if-none-match"] === tag ? reply.code(304).send() : reply.send(content);
    });
  }
}
