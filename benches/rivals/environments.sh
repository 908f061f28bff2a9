#!/bin/bash
# usage: environments.sh DIR -- makes DIR/gptqmodel and DIR/llmcompressor, CPU only, for Python 3.11 or later.
# Two environments, since the rivals exclude each other: GPTQModel wants torch 2.14.1 and transformers
# 5.20.2 or later, llm-compressor forbids both.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
target=$(cd "$1" && pwd)
# A script `recipe VENV TORCH_VERSION` for a slim CPU torch, where there is one; else pip's torch.
recipe=${VLMQ_TORCH_RECIPE:-$here/../../../shared/oracle/make_oracle.sh}

# environment NAME TORCH TORCHVISION PACKAGES...
environment() {
  local venv=$target/$1 torch=$2 torchvision=$3
  shift 3
  if [ -f "$venv/complete" ]; then return; fi
  if [ -f "$recipe" ]; then
    bash "$recipe" "$venv" "$torch"
    # The torchvision that belongs to this torch; with dependencies it would drag a GPU torch along.
    "$venv/bin/pip" install -q --no-deps "torchvision==$torchvision"
  else
    python3 -m venv "$venv"
    # From wherever pip is set up to look; CPU builds are the smaller ones, and any build will do.
    "$venv/bin/pip" install -q "torch==$torch" "torchvision==$torchvision"
  fi
  "$venv/bin/pip" install -q "torch==$torch" accelerate safetensors pillow numpy "$@"
  touch "$venv/complete"
}

environment gptqmodel 2.15.0 0.29.2 transformers==5.23.0 \
  gptqmodel==7.7.0 compressed-tensors==0.20.0 optimum==2.3.0
environment llmcompressor 2.14.0 0.29.0 transformers==5.17.0 \
  llmcompressor==0.14.0.1 compressed-tensors==0.19.0 datasets auto-round==0.15.1

# GPTQModel packs with a piece of C++ that it compiles at first use; here, so that no measured run does
# and none does without. It needs g++ and, on the path, the environment's ninja.
PATH="$target/gptqmodel/bin:$PATH" GPTQMODEL_TORCH_EXTENSIONS_DIR=$target/gptqmodel/extensions \
  GPTQMODEL_CPU_WORKERS=2 CUDA_VISIBLE_DEVICES="" "$target/gptqmodel/bin/python" -c '
from gptqmodel.utils.cpp import load_pack_block_extension as load
print("compiled packing:", bool(load()))' | tail -n 1
