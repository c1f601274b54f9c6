/**
 * Chromium for tests of pages: `CHROMIUM`, or where distributions, browsers' installers and playwright put it. Tests on it say why they are skipped where it is
 * absent.
 */

import { existsSync } from "node:fs";
import { chromium } from "playwright-core";

const places = [
  process.env.CHROMIUM,
  "/usr/bin/chromium",
  "/usr/bin/chromium-browser",
  "/usr/bin/google-chrome",
  "/usr/bin/google-chrome-stable",
  "/snap/bin/chromium",
  "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
  "/Applications/Chromium.app/Contents/MacOS/Chromium",
  chromium.executablePath(),
];

const executablePath = places.find((place) => place && existsSync(place));

/** Why it cannot be used here; null if it can. */
export const noChromium = executablePath
  ? null
  : "there is no Chromium (apt-get install chromium, or CHROMIUM=<its executable>)";

// In CI it is always there, so that nothing is skipped silently.
if (noChromium && process.env.CI) throw new Error(`Chromium: ${noChromium}.`);

/** Starts it, without a window. */
export function launchChromium() {
  // Its sandbox needs rights that containers do not give.
  return chromium.launch({ executablePath: executablePath!, args: ["--no-sandbox"] });
}
