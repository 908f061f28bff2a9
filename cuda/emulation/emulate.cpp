// The kernels as a library for the CPU, launched by name as the driver launches them: an array of
// pointers to the arguments. Built and used by the tests of src/gpu (emulated.rs):
//
//   g++ -std=c++17 -O2 -ffp-contract=off -U_FORTIFY_SOURCE -shared -fPIC -o libkernels.so emulate.cpp
#include "device.hpp"

#include "../kernels/number.cu"
#include "../kernels/moments.cu"
#include "../kernels/factor.cu"
#include "../kernels/column_block.cu"
#include "../kernels/grid.cu"

#include <utility>

namespace {

template <typename... Args, size_t... I>
void call(void (*kernel)(Args...), void** args, std::index_sequence<I...>) {
  kernel(*static_cast<Args*>(args[I])...);
}

template <typename... Args>
bool launch(void (*kernel)(Args...), unsigned n_blocks, unsigned n_threads, void** args) {
  emulation::grid_size = {n_blocks};
  emulation::block_size = {n_threads};
  std::function<void()> body = [&] { call(kernel, args, std::index_sequence_for<Args...>()); };
  for (unsigned block = 0; block < n_blocks; ++block) {
    emulation::block = {block};
    for (unsigned warp = 0; warp < n_threads / emulation::LANES; ++warp) {
      emulation::warp.warp_of_block = warp;
      if (!emulation::warp.run(body)) return false;
    }
  }
  return true;
}

}  // namespace

// 0 done, 1 no such kernel, 2 lanes of a warp parted ways at a shuffle, 3 no whole warps.
extern "C" int emulate(const char* name, unsigned n_blocks, unsigned n_threads, void** args) {
  if (n_threads == 0 || n_threads % emulation::LANES != 0) return 3;
#define KERNEL(kernel) \
  if (std::strcmp(name, #kernel) == 0) return launch(kernel, n_blocks, n_threads, args) ? 0 : 2;
  KERNEL(weigh_rows)
  KERNEL(count_not_finite)
  KERNEL(clear_upper)
  KERNEL(diagonal)
  KERNEL(fill_reversed)
  KERNEL(unit_upper)
  KERNEL(order_square)
  KERNEL(order_columns)
  KERNEL(restore_columns)
  KERNEL(divide_columns)
  KERNEL(add_rows)
  KERNEL(row_dots)
  KERNEL(rounding_errors)
  KERNEL(solve_block)
  KERNEL(fit_grids)
#undef KERNEL
  return 1;
}
