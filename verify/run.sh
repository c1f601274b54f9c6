#!/usr/bin/env bash
# Part of what `npm run pack:gpu` makes; called on the machine with the GPU, from any folder: checks the parts, unpacks them
# and has everything verified within a budget of time. It needs bash, coreutils, tar, and xz or python3; no network, no Node.
#
#   BUDGET   seconds for all of it; default: 420
#   OUT      folder for the summary, logs, reports and pictures; default: ./gpu-report
#   PARTS    folder of the parts; default: that of this file
#   WORK     folder to unpack to, which the next call uses again; default: flowturbo-gpu-<user> in $TMPDIR or /tmp
#   STEPS    names of the only steps to run, with commas, as the summary has them; they run without a GPU, too
#
# Ends with 0 if all passed, 1 if something failed or was left out for want of time, 2 for wrong values, 3 where there is no GPU.
set -u
export LC_ALL=C
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# A part of this file that runs as a process of its own, so that `timeout` ends everything of it: checks a group of parts and
# unpacks it.
if [ "${1:-}" = --unpack ]; then
  set -o pipefail
  group=$2 parts=$3 to=$4 sound=1 files=()
  while read -r sum name; do
    [ "${name%-*}" = "$group" ] || continue
    file=$parts/$name
    files+=("$file")
    if [ ! -f "$file" ]; then echo "the part $name is missing in $parts"; sound=0; continue; fi
    found=$(sha256sum <"$file")
    if [ "${found%% *}" != "$sum" ]; then echo "the part $name is damaged: copy it again"; sound=0; fi
  done <"$here/sums"
  [ $sound = 1 ] || exit 1
  if command -v xz >/dev/null; then decompress() { xz -dc -T0; }; else
    decompress() { python3 -c 'import lzma, shutil, sys; shutil.copyfileobj(lzma.open(sys.stdin.buffer), sys.stdout.buffer, 1 << 22)'; }
  fi
  if ! why=$({ cat "${files[@]}" | decompress | tar -x --no-same-owner -C "$to" -f -; } 2>&1); then
    echo "$group cannot be unpacked: ${why%%$'\n'*}"
    exit 1
  fi
  exit 0
fi

BUDGET=${BUDGET:-420} OUT=${OUT:-$PWD/gpu-report} PARTS=${PARTS:-$here} WORK=${WORK:-${TMPDIR:-/tmp}/flowturbo-gpu-$UID} STEPS=${STEPS:-}
if ! [[ $BUDGET =~ ^[1-9][0-9]{0,6}$ ]]; then echo "BUDGET is a whole number of seconds above 0, not $BUDGET." >&2; exit 2; fi
mkdir -p "$OUT" "$WORK" || exit 2
# Others may not prepare what is run here.
if [ ! -O "$WORK" ]; then echo "$WORK belongs to somebody else; name another folder with WORK." >&2; exit 2; fi
OUT=$(cd "$OUT" && pwd) WORK=$(cd "$WORK" && pwd) PARTS=$(cd "$PARTS" && pwd) || exit 2
rm -f "$OUT/summary.txt" "$OUT/summary.json"
left() { echo $((BUDGET - SECONDS > 1 ? BUDGET - SECONDS : 1)); }
quoted() { local text=${1//\\/\\\\}; text=${text//\"/\\\"}; printf '"%s"' "${text//[$'\n\r\t']/ }"; }

# The summary where Node cannot write it. $1: the code to end with; then what is wrong, a line each.
give_up() {
  local code=$1 list='' first=1; shift
  { printf 'problem: %s\n' "$@"; printf 'FAILED: '; for each in "$@"; do [ $first = 1 ] || printf '; '; first=0; printf '%s' "$each"; done
    printf ' (%s s of %s s)\n' "$SECONDS" "$BUDGET"; } | tee "$OUT/summary.txt"
  for each in "$@"; do list+=${list:+, }$(quoted "$each"); done
  printf '{ "state": "finished", "passed": false, "noGpu": null, "running": null, "budgetSeconds": %s, "seconds": %s, "about": [], "problems": [%s], "steps": [] }\n' \
    "$BUDGET" "$SECONDS" "$list" >"$OUT/summary.json"
  exit "$code"
}

pids=() stopped=0
stop() { stopped=$1; for pid in "${pids[@]}"; do kill -TERM "$pid" 2>/dev/null; done; }
trap 'stop 143' TERM; trap 'stop 130' INT; trap 'stop 129' HUP
# $1: a process. Until it has ended, whatever signals come meanwhile.
await() { local code; while :; do wait "$1"; code=$?; kill -0 "$1" 2>/dev/null || return $code; done; }

# 1. Checked and unpacked, unless an earlier call has done so with the same parts.
pack=$WORK/pack problems=()
[ -s "$here/sums" ] || give_up 1 "the file sums is missing in $here"
if [ "$(cat "$pack/sums" 2>/dev/null)" != "$(cat "$here/sums")" ]; then
  rm -rf "$pack"; mkdir -p "$pack"
  declare -A groups=()
  while read -r _ name; do groups[${name%-*}]=1; done <"$here/sums"
  declare -A running=()
  for group in "${!groups[@]}"; do
    # `timeout` makes a process group of its own, with all that it starts.
    timeout -k 3 "$(left)" bash "${BASH_SOURCE[0]}" --unpack "$group" "$PARTS" "$pack" >"$WORK/$group.said" 2>&1 </dev/null &
    running[$group]=$!; pids+=($!)
  done
  lost=()
  for group in "${!running[@]}"; do
    await "${running[$group]}"; code=$?
    [ $code = 0 ] && continue
    lost+=("$group")
    if [ -s "$WORK/$group.said" ]; then while read -r line; do problems+=("$line"); done <"$WORK/$group.said"
    elif [ $stopped = 0 ]; then problems+=("unpacking $group did not end within the budget of $BUDGET s"); fi
  done
  pids=()
  [ $stopped = 0 ] || give_up $stopped "stopped while it unpacked"
  for group in "${lost[@]}"; do rm -rf "${pack:?}/$group"; done
  for group in "${lost[@]}"; do case $group in base | node) give_up 1 "${problems[@]}" ;; esac; done
  [ ${#problems[@]} = 0 ] && cp "$here/sums" "$pack/sums"
fi

[ $stopped = 0 ] || give_up $stopped "stopped before the first step"

# 2. Everything else is in Node's hands (verify/machine.ts).
arguments=(--out "$OUT" --seconds "$(left)" --budget "$BUDGET")
[ -z "$STEPS" ] || arguments+=(--steps "$STEPS")
for problem in "${problems[@]}"; do arguments+=(--problem "$problem"); done
"$pack/node" "$pack/node_modules/flowturbo/verify/machine.js" "${arguments[@]}" </dev/null &
pids=($!)
await "${pids[0]}"; code=$?
case $code in 0 | 1 | 3 | 129 | 130 | 143) [ -f "$OUT/summary.json" ] && exit $code ;; esac
if [ -f "$OUT/summary.json" ]; then
  echo "FAILED: the process that runs the steps ended with $code before its end." | tee -a "$OUT/summary.txt"
  exit 1
fi
give_up 1 "${problems[@]}" "the packed Node ended with $code before the first step; $OUT has no log of it"
