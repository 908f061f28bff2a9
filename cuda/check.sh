#!/bin/bash
# Compiles the kernels for GPUs of a generation and says what each takes: registers, spills, shared memory.
#
#   cuda/check.sh [sm_90]     needs nvcc (cuda/toolkit.sh)
set -euo pipefail
cd "$(dirname "$0")/kernels"
arch=${1:-sm_90}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat number.cu moments.cu factor.cu column_block.cu grid.cu > "$work/kernels.cu"
nvcc -arch="$arch" -O3 --fmad=false -Werror all-warnings -Xptxas -v -cubin -o "$work/kernels.cubin" \
  "$work/kernels.cu" 2> "$work/told" || { cat "$work/told" >&2; exit 1; }
awk '
  /Compiling entry function/ { split($0, part, "\x27"); name = part[2] }
  /bytes stack frame/ { spills = $5 + $9 }
  /Used [0-9]+ registers/ {
    shared = 0
    if (match($0, /[0-9]+ bytes smem/)) shared = substr($0, RSTART, RLENGTH) + 0
    printf "%-18s %3d registers  %d bytes spilled  %d bytes shared\n", name, $5, spills, shared
  }' "$work/told" | sort
