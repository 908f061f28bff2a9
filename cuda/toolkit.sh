#!/bin/bash
# Lays out a CUDA toolkit in TARGET from wheels of the Python package index: enough to build with the
# feature `cuda` on a machine that has neither a GPU nor CUDA.
#
#   cuda/toolkit.sh TARGET     then set what it prints, and build
#
# Wheels hold what the toolkit's archives hold, in the same folders under `nvidia/cu13`. Versions are
# those of one toolkit, 13.0.2, since headers, compiler and libraries must agree.
set -euo pipefail
target=${1:?usage: cuda/toolkit.sh TARGET}
mkdir -p "$target"
target=$(cd "$target" && pwd)

wheels=(
  nvidia-cuda-nvcc==13.0.88    # nvcc, ptxas, fatbinary
  nvidia-cuda-crt==13.0.88     # headers that nvcc includes by itself
  nvidia-nvvm==13.0.88         # cicc, libdevice
  nvidia-cuda-cccl==13.0.85    # headers of libcu++, which candle's kernels include
  nvidia-cuda-runtime==13.0.96 # cuda_runtime.h, libcudart
  nvidia-cuda-nvrtc==13.0.88   # compiles kernels when they are first used
  nvidia-cublas==13.1.0.3      # products of matrices
  nvidia-cusolver==12.0.4.66   # the factor
  nvidia-cusparse==12.6.3.3    # libcusolver asks for it
  nvidia-nvjitlink==13.0.88    # libcusparse asks for it
  nvidia-curand==10.4.0.35     # candle asks for it
)
python3 -m pip install --quiet --no-deps --target "$target/wheels" --upgrade "${wheels[@]}"
home=$(dirname "$(dirname "$(find "$target/wheels/nvidia" -name nvcc -path '*/bin/*' | head -1)")")

# A linker wants names without a version, and the folder that compilers guess.
cd "$home/lib"
for library in *.so.*; do
  ln -sf "$library" "${library%%.so.*}.so"
done
ln -sfn lib "$home/lib64"
ln -sfn "$home" "$target/cuda"

# The driver comes with a GPU. For linking, and for starting the program without a GPU, a library with
# its name does whose functions all answer 34, CUDA_ERROR_STUB_LIBRARY, as the toolkit's own stub does.
mkdir -p "$home/lib/stubs"
grep -ohE '\bcu[A-Z][A-Za-z0-9_]*' "$home/include/cuda.h" | sort -u |
  sed 's/.*/int &(void) { return 34; }/' > "$target/stub.c"
gcc -shared -w -Wl,-soname,libcuda.so.1 -o "$home/lib/stubs/libcuda.so" "$target/stub.c"
ln -sf libcuda.so "$home/lib/stubs/libcuda.so.1"

echo "export CUDA_HOME=$target/cuda"
echo "export CUDA_PATH=$target/cuda"
echo "export PATH=$target/cuda/bin:\$PATH"
echo "export LIBRARY_PATH=$target/cuda/lib:$target/cuda/lib/stubs"
echo "export LD_LIBRARY_PATH=$target/cuda/lib # and $target/cuda/lib/stubs where there is no driver"
echo 'export CUDA_COMPUTE_CAP=90 # of the GPU: 80 A100, 86 RTX 30, 89 RTX 40, 90 H100, 100 B200'
