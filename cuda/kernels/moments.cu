// What statistics are made of: inputs weighted by token, looked over for what is no number.
// Their products are cuBLAS's.

// out = sqrt(omega) * (x - minus), rows of tokens; without roots as they are, without minus x itself.
// Written as bfloat16 where as_bf16, else as float. Shapes: x, minus, out [rows, cols], roots [rows].
extern "C" __global__ void weigh_rows(void* out, const float* x, const float* minus, const float* roots,
                                      size_t rows, size_t cols, int as_bf16) {
  for (size_t i = thread_index(); i < rows * cols; i += n_threads()) {
    float value = x[i];
    if (minus) value -= minus[i];
    if (roots) value *= roots[i / cols];
    if (as_bf16) {
      ((unsigned short*)out)[i] = bf16_bits(value);
    } else {
      ((float*)out)[i] = value;
    }
  }
}

// Adds to *count how many of x are NaN or infinite.
extern "C" __global__ void count_not_finite(unsigned* count, const float* x, size_t n) {
  unsigned own = 0;
  for (size_t i = thread_index(); i < n; i += n_threads()) own += is_finite(x[i]) ? 0u : 1u;
  if (own > 0u) atomicAdd(count, own);
}

// What lies above the diagonal becomes zero. Shape: square [n, n].
extern "C" __global__ void clear_upper(float* square, size_t n) {
  for (size_t i = thread_index(); i < n * n; i += n_threads()) {
    if (i % n > i / n) square[i] = 0.0f;
  }
}
