// Numbers as the solver on the CPU rounds them: what the other kernels share.
//
// All files here are compiled as one, in the order of src/gpu/kernels.rs, with neither headers nor
// contraction of products and sums: where one rounding instead of two is wanted, fmaf says so. Sums are
// then the same on every GPU, and in the emulation of cuda/emulation, to the last bit.
//
// Matrices are row-major. One warp works where it says so; its lanes never part ways around a shuffle.

#define WARP 32
#define ALL_LANES 0xffffffffu

// As ScaleDtype in src/plan.rs, but for super-blocks, which the GPU does not fit.
enum ScaleType { SCALE_BF16 = 0, SCALE_F16 = 1, SCALE_F32 = 2 };

// Adding and subtracting it rounds a small float to the nearest integer, ties to even.
#define ROUND 12582912.0f

// The least positive normal float.
#define LEAST_NORMAL 1.17549435e-38f

static __device__ float infinity() { return __int_as_float(0x7f800000); }

static __device__ bool is_finite(float x) { return fabsf(x) < infinity(); }

// To bfloat16, ties to even, of a number that is not NaN; as its bits.
static __device__ unsigned short bf16_bits(float x) {
  unsigned bits = __float_as_uint(x);
  return (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static __device__ float round_bf16(float x) {
  return __uint_as_float((unsigned)bf16_bits(x) << 16);
}

// To half precision, ties to even: 10 bits of mantissa down to 2^-14, whole multiples of 2^-24 below.
static __device__ float round_f16(float x) {
  float size = fabsf(x);
  float rounded;
  if (size < 6.103515625e-5f) {
    // The unit in the last place of numbers between 0.5 and 1 is 2^-24.
    rounded = (size + 0.5f) - 0.5f;
  } else {
    unsigned bits = __float_as_uint(size);
    bits += 0xfffu + ((bits >> 13) & 1u);
    rounded = __uint_as_float(bits & ~0x1fffu);
    if (rounded > 65504.0f) rounded = infinity();
  }
  return x < 0.0f ? -rounded : rounded;
}

static __device__ float round_scale(float x, int type) {
  if (type == SCALE_BF16) return round_bf16(x);
  if (type == SCALE_F16) return round_f16(x);
  return x;
}

// round(weight / scale), clamped so that adding the zero point stays among the codes.
static __device__ float steps_of(float weight, float scale, float zero, float max_code) {
  return (fminf(fmaxf(weight / scale, -zero), max_code - zero) + ROUND) - ROUND;
}

// Sums, the least and the greatest over the lanes of a warp. All lanes get the same bits: a sum of two
// does not depend on which is the first.
static __device__ float warp_sum(float x) {
  for (int apart = WARP / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(ALL_LANES, x, apart);
  return x;
}

static __device__ double warp_sum(double x) {
  for (int apart = WARP / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(ALL_LANES, x, apart);
  return x;
}

static __device__ float warp_min(float x) {
  for (int apart = WARP / 2; apart > 0; apart /= 2) {
    x = fminf(x, __shfl_xor_sync(ALL_LANES, x, apart));
  }
  return x;
}

static __device__ float warp_max(float x) {
  for (int apart = WARP / 2; apart > 0; apart /= 2) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, apart));
  }
  return x;
}

// The task of this warp, and its lane.
static __device__ size_t warp_index() {
  return (size_t)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
}

static __device__ int lane_index() { return threadIdx.x % WARP; }

// The first element of this thread where all threads share out many, and how far the next one is.
static __device__ size_t thread_index() { return (size_t)blockIdx.x * blockDim.x + threadIdx.x; }

static __device__ size_t n_threads() { return (size_t)gridDim.x * blockDim.x; }
