// A GPU as the kernels see it, on a CPU: enough of CUDA's language for cuda/kernels.
//
// The lanes of a warp are fibres of one thread. A lane runs until it comes to a shuffle, leaves its value
// and hands over to the next; when its turn comes again all lanes have left theirs. Warps run one after
// the other. A lane that meets another shuffle than its neighbours, which on a GPU would hang or give
// nonsense, is found out and ends the launch with an error. Arithmetic is IEEE's, and nothing is
// contracted (-ffp-contract=off), as with nvcc --fmad=false.
//
// Kernels that share memory in a block or wait for one another are not for this: there is no
// __shared__ and no __syncthreads, so that such a kernel does not compile.
#pragma once
#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <cmath>
#include <cstdlib>
#include <ucontext.h>
#include <functional>
#include <memory>

#define __global__
#define __device__

namespace emulation {

constexpr int LANES = 32;
constexpr size_t STACK_BYTES = 64 * 1024;

// Dimensions of a launch, of which the first is all that the kernels use.
struct Dimension {
  unsigned x;
};

class Warp {
 public:
  Warp() : stacks(new char[LANES * STACK_BYTES]) {}

  // Runs all lanes; whether they stayed together.
  bool run(const std::function<void()>& body) {
    work = &body;
    is_sound = true;
    for (int i = 0; i < LANES; ++i) {
      has_begun[i] = is_done[i] = false;
      n_shuffles[i] = 0;
      getcontext(&contexts[i]);
      contexts[i].uc_stack.ss_sp = stacks.get() + i * STACK_BYTES;
      contexts[i].uc_stack.ss_size = STACK_BYTES;
      contexts[i].uc_link = nullptr;
      makecontext(&contexts[i], reinterpret_cast<void (*)()>(begin), 0);
    }
    if (_setjmp(home) == 0) enter(0);
    return is_sound;
  }

  // What lane `from` has left at this shuffle.
  template <typename T>
  T exchange(T value, int from) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle carries one word");
    int own = lane;
    unsigned turn = n_shuffles[own]++;
    std::memcpy(&slots[turn % 2][own], &value, sizeof(T));
    turns[turn % 2][own] = turn;
    if (_setjmp(at[own]) == 0) leave();
    // A lane that is gone, or at another shuffle, has left nothing here.
    if (turns[turn % 2][from] != turn || n_shuffles[from] < turn + 1) is_sound = false;
    T found;
    std::memcpy(&found, &slots[turn % 2][from], sizeof(T));
    return found;
  }

  int lane = 0;
  unsigned warp_of_block = 0;

 private:
  static void begin();

  void enter(int next) {
    lane = next;
    if (has_begun[next]) _longjmp(at[next], 1);
    has_begun[next] = true;
    setcontext(&contexts[next]);
  }

  void leave() {
    for (int step = 1; step <= LANES; ++step) {
      int next = (lane + step) % LANES;
      if (!is_done[next]) enter(next);
    }
    _longjmp(home, 1);
  }

  void finish() {
    is_done[lane] = true;
    // Those still at work must have been through as many shuffles by the end.
    for (int i = 0; i < LANES; ++i) {
      if (is_done[i] && n_shuffles[i] != n_shuffles[lane]) is_sound = false;
    }
    leave();
  }

  std::unique_ptr<char[]> stacks;
  const std::function<void()>* work = nullptr;
  bool is_sound = true;
  jmp_buf home, at[LANES];
  ucontext_t contexts[LANES];
  bool has_begun[LANES], is_done[LANES];
  unsigned n_shuffles[LANES], turns[2][LANES];
  uint64_t slots[2][LANES];
};

inline thread_local Warp warp;
inline thread_local Dimension block, block_size, grid_size;

inline void Warp::begin() {
  (*warp.work)();
  warp.finish();
}

inline Dimension thread() { return {warp.warp_of_block * LANES + warp.lane}; }

}  // namespace emulation

#define threadIdx (emulation::thread())
#define blockIdx (emulation::block)
#define blockDim (emulation::block_size)
#define gridDim (emulation::grid_size)

template <typename T>
static T __shfl_sync(unsigned, T value, int from) {
  return emulation::warp.exchange(value, from);
}

template <typename T>
static T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::warp.exchange(value, emulation::warp.lane ^ mask);
}

static inline unsigned atomicAdd(unsigned* at, unsigned value) {
  unsigned before = *at;
  *at += value;
  return before;
}

template <typename To, typename From>
static inline To same_bits(From from) {
  To to;
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

static inline float __int_as_float(int bits) { return same_bits<float>(bits); }
static inline float __uint_as_float(unsigned bits) { return same_bits<float>(bits); }
static inline unsigned __float_as_uint(float x) { return same_bits<unsigned>(x); }
