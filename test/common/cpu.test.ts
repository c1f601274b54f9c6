// Processors: quotas of control groups of both versions, wherever they are mounted, and cores among the allowed ones.
import { describe, expect, it } from "vitest";
import {
  hasVnni,
  isIntelAvx512,
  type Processors,
  processorKind,
  processors,
  usableThreads,
} from "../../lib/common/cpu.js";

const unified = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate";
const cpuMount = "33 32 0:28 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct";
const memoryMount = "34 32 0:29 / /sys/fs/cgroup/memory rw shared:10 - cgroup cgroup rw,memory";
const given = (files: Record<string, string>) => processors((file) => files[file] ?? null);
const quota = (files: Record<string, string>) => given(files).quota;

describe("quota", () => {
  it("version 2: the least of the group and all above it", () => {
    const files = {
      "/proc/self/cgroup": "0::/kubepods/pod1/main\n",
      "/proc/self/mountinfo": `22 1 8:1 / / rw - ext4 /dev/sda rw\n${unified}\n`,
      "/sys/fs/cgroup/kubepods/pod1/main/cpu.max": "max 100000\n",
      "/sys/fs/cgroup/kubepods/pod1/cpu.max": "150000 100000\n",
      "/sys/fs/cgroup/kubepods/cpu.max": "800000 100000\n",
    };
    expect(quota(files)).toBe(1.5);
    expect(quota({ ...files, "/sys/fs/cgroup/kubepods/pod1/main/cpu.max": "5000 10000\n" })).toBe(0.5);
    expect(quota({ ...files, "/sys/fs/cgroup/kubepods/cpu.max": "100000 100000\n" })).toBe(1);
    expect(quota({ ...files, "/sys/fs/cgroup/kubepods/pod1/cpu.max": "max 100000\n" })).toBe(8);
  });

  it("version 2 in a container, which sees its own group as the root", () => {
    const files = { "/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": "200000 100000\n" };
    expect(quota({ ...files, "/proc/self/mountinfo": unified })).toBe(2);
    // A process that was moved to a group outside of what it sees.
    expect(quota({ ...files, "/proc/self/cgroup": "0::/../other\n", "/proc/self/mountinfo": unified })).toBe(2);
  });

  it("version 1", () => {
    const files = {
      "/proc/self/cgroup": "4:memory:/docker/7\n3:cpu,cpuacct:/docker/7\n1:name=systemd:/docker/7\n0::/\n",
      "/proc/self/mountinfo": `${memoryMount}\n${cpuMount}\n`,
      "/sys/fs/cgroup/cpu,cpuacct/docker/7/cpu.cfs_quota_us": "250000\n",
      "/sys/fs/cgroup/cpu,cpuacct/docker/7/cpu.cfs_period_us": "100000\n",
      "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
      "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
      "/sys/fs/cgroup/memory/docker/7/cpu.cfs_quota_us": "1\n",
      "/sys/fs/cgroup/memory/docker/7/cpu.cfs_period_us": "1\n",
    };
    expect(quota(files)).toBe(2.5);
    // Docker's: the mount shows the container's group only, the path is the host's.
    expect(
      quota({
        ...{ "/proc/self/cgroup": files["/proc/self/cgroup"] },
        "/proc/self/mountinfo": cpuMount.replace("0:28 / ", "0:28 /docker/7 "),
        "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000",
        "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
      }),
    ).toBe(0.5);
    // A group whose name only begins alike is another one.
    expect(
      quota({
        ...files,
        "/proc/self/cgroup": "3:cpu,cpuacct:/docker/77\n",
        "/proc/self/mountinfo": cpuMount.replace("0:28 / ", "0:28 /docker/7 "),
      }),
    ).toBeNull();
  });

  it("none, or none that can be read", () => {
    expect(quota({})).toBeNull();
    expect(quota({ "/proc/self/cgroup": "0::/a\n", "/proc/self/mountinfo": unified })).toBeNull();
    const odd = { "/proc/self/cgroup": "0::/a\nnonsense\n", "/proc/self/mountinfo": `nonsense\n${unified}` };
    for (const text of ["", "max", "max 100000", "0 100000", "-1 100000", "x y", "100000"])
      expect(quota({ ...odd, "/sys/fs/cgroup/a/cpu.max": text }), text).toBeNull();
  });
});

describe("cores", () => {
  const siblings = (pairs: string[]) =>
    Object.fromEntries(
      pairs.map((pair, cpu) => [`/sys/devices/system/cpu/cpu${cpu}/topology/thread_siblings_list`, `${pair}\n`]),
    );
  const four = siblings(["0,4", "1,5", "2,6", "3,7", "0,4", "1,5", "2,6", "3,7"]);

  it("are counted among those that the process may run on", () => {
    const allowed = (list: string) => ({ ...four, "/proc/self/status": `Name:\tnode\nCpus_allowed_list:\t${list}\n` });
    expect(given(allowed("0-7")).cores).toBe(4);
    expect(given(allowed("0-1,4-5")).cores).toBe(2);
    expect(given(allowed("3")).cores).toBe(1);
  });

  it("without a topology each processor is one; without a list none is known", () => {
    expect(given({ "/proc/self/status": "Cpus_allowed_list:\t0-2\n" }).cores).toBe(3);
    expect(given({}).cores).toBeNull();
  });

  it("are found here", () => {
    const { cores } = processors();
    if (process.platform === "linux") expect(cores).toBeGreaterThanOrEqual(1);
    else expect(cores).toBeNull();
  });
});

it.each<[Processors, number | null]>([
  [{ cores: 8, quota: null }, 8],
  [{ cores: 8, quota: 16 }, 8],
  [{ cores: 8, quota: 2 }, 2],
  [{ cores: 8, quota: 1.5 }, 1],
  [{ cores: 8, quota: 0.2 }, 1],
  [{ cores: null, quota: 3 }, 3],
  [{ cores: null, quota: null }, null],
])("threads for %j: %j", (available, threads) => {
  expect(usableThreads(available)).toBe(threads);
});

it("knows instructions for products of 8-bit integers by Linux's list of features", () => {
  expect(hasVnni(() => "processor : 0\nflags\t\t: fpu avx2 avx512_vnni rdtscp\n")).toBe(true);
  expect(hasVnni(() => "flags\t\t: fpu avx2 avx_vnni\n")).toBe(true);
  expect(hasVnni(() => "flags\t\t: fpu avx2 avx512_vnni2\n")).toBe(false);
  expect(hasVnni(() => null)).toBe(false);
});

it("processors of one name with other instruction sets are of another kind", () => {
  const kind = (line: string) => processorKind(() => `processor\t: 0\nmodel name\t: Some CPU\n${line}\n`);
  expect(kind("flags\t\t: fpu sse avx2")).not.toBe(kind("flags\t\t: fpu sse avx2 avx512f"));
  expect(kind("Features\t: fp asimd")).not.toBe(kind("Features\t: fp asimd i8mm"));
  expect(kind("flags\t\t: fpu sse")).toBe(kind("flags\t\t: fpu sse"));
  expect(processorKind(() => null)).toContain(process.arch);
});

it.each([
  ["GenuineIntel", "fpu avx2 avx512f avx512bw", true],
  ["GenuineIntel", "fpu avx2", false],
  ["AuthenticAMD", "fpu avx2 avx512f", false],
])("%s with %s: AVX-512 of Intel's %s", (vendor, flags, expected) => {
  const text = `processor\t: 0\nvendor_id\t: ${vendor}\nflags\t\t: ${flags}\n`;
  expect(isIntelAvx512(() => text)).toBe(expected);
  expect(isIntelAvx512(() => null)).toBe(false);
});
