// What a download shows: bytes, totals and the speed of the last seconds, for all of it and for each file under way.
import { expect, it } from "vitest";
import { type Progress, showDownload } from "../../lib/cli/progress.js";

it("shows bytes, speed and files", () => {
  const shown: string[] = [];
  const progress = { show: (text: string) => void shown.push(text) } as unknown as Progress;
  let time = 0;
  const show = showDownload(progress, () => time);
  const at = (seconds: number, megabytes: number, files: string[] = []) => {
    time = 1000 * seconds;
    const bytes = { done: megabytes * 1e6, total: 100e6 };
    show({ ...bytes, files: files.map((path) => ({ path, ...bytes })) });
    return shown.at(-1)!;
  };
  // What was there at first is no speed.
  expect(at(0, 50)).toBe(`${"█".repeat(12)}${"░".repeat(12)} 50.0 MB of 100.0 MB, 0.0 MB/s`);
  expect(at(1, 60)).toMatch(/60\.0 MB of 100\.0 MB, 10\.0 MB\/s$/);
  expect(at(3, 62)).toMatch(/ 4\.0 MB\/s$/);
  // After a long time the first seconds count no more.
  for (let second = 4; second <= 10; second++) at(second, 62 + 2 * (second - 3));
  expect(at(11, 78)).toMatch(/ 2\.0 MB\/s$/);
  // What has to be downloaded again is no negative speed.
  expect(at(12, 20)).toMatch(/ 0\.0 MB\/s$/);
  const [first, ...files] = at(13, 30, ["vae/config.json", "transformer/x"]).split("\n");
  expect(first).toContain("30.0 MB of 100.0 MB");
  expect(files.map((line) => line.trim().replace(/^[█░]+ /, ""))).toEqual([
    "30.0 MB of 100.0 MB vae/config.json",
    "30.0 MB of 100.0 MB transformer/x",
  ]);
});

it("shows a total of nothing", () => {
  const shown: string[] = [];
  showDownload({ show: (text: string) => void shown.push(text) } as unknown as Progress)({
    done: 0,
    total: 0,
    files: [],
  });
  expect(shown[0]).toContain("0.0 MB of 0.0 MB");
});
