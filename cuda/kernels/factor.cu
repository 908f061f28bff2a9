// Around the factorization H = R D R^T (see src/solver/factor.rs and triangle.rs), which is cuSOLVER's:
// H in reversed solving order before it, R in solving order after it, and what orders and scales the
// right-hand sides of the triangular solutions.

extern "C" __global__ void diagonal(float* out, const float* square, size_t n) {
  for (size_t i = thread_index(); i < n; i += n_threads()) out[i] = square[i * n + i];
}

// The lower triangle of H, damped, in units of its mean, its columns in reversed solving order; zero
// above the diagonal. Dead columns are cut loose from all others. Only H's lower triangle is read.
// Shapes: out, hessian [n, n]; order, is_dead [n], is_dead by original column.
extern "C" __global__ void fill_reversed(float* out, const float* hessian, const int* order,
                                         const unsigned char* is_dead, size_t n, double mean,
                                         double damping) {
  for (size_t at = thread_index(); at < n * n; at += n_threads()) {
    size_t i = at / n, j = at % n;
    double value = 0.0;
    if (j <= i) {
      size_t a = order[n - 1 - i], b = order[n - 1 - j];
      bool is_cut = is_dead[a] || is_dead[b];
      if (!is_cut) {
        value = (double)(a > b ? hessian[a * n + b] : hessian[b * n + a]) / mean;
      } else if (a == b) {
        value = 1.0;
      }
      if (a == b) value += damping;
    }
    out[at] = (float)value;
  }
}

// R from the factor L of the reversed matrix: L mirrored at the antidiagonal, each column divided by its
// diagonal; one on the diagonal, zero below. Shapes: out, lower [n, n].
extern "C" __global__ void unit_upper(float* out, const float* lower, size_t n) {
  for (size_t at = thread_index(); at < n * n; at += n_threads()) {
    size_t i = at / n, j = at % n;
    float value = i == j ? 1.0f : 0.0f;
    if (j > i) {
      size_t row = n - 1 - i, column = n - 1 - j;
      value = lower[row * n + column] / lower[column * n + column];
    }
    out[at] = value;
  }
}

// out[i][j] = square[order[i]][order[j]] / mean. Shapes: out, square [n, n].
extern "C" __global__ void order_square(float* out, const float* square, const int* order, size_t n,
                                        double mean) {
  for (size_t at = thread_index(); at < n * n; at += n_threads()) {
    out[at] = (float)((double)square[(size_t)order[at / n] * n + order[at % n]] / mean);
  }
}

// out[i][j] = x[i][order[j]] * factor. Shapes: out [rows, n_out], x [rows, n], order [n_out].
extern "C" __global__ void order_columns(float* out, const float* x, const int* order, size_t rows,
                                         size_t n_out, size_t n, double factor) {
  for (size_t at = thread_index(); at < rows * n_out; at += n_threads()) {
    out[at] = (float)((double)x[at / n_out * n + order[at % n_out]] * factor);
  }
}

// out[i][order[j]] = x[i][j]. Shapes: out, x [rows, n].
extern "C" __global__ void restore_columns(float* out, const float* x, const int* order, size_t rows,
                                           size_t n) {
  for (size_t at = thread_index(); at < rows * n; at += n_threads()) {
    out[at / n * n + order[at % n]] = x[at];
  }
}

// x[i][j] /= pivots[j]; where is_strictly_upper, entries on and below the diagonal of the square that
// the rows begin at row `first` of become zero. Shapes: x [rows, n], pivots [n].
extern "C" __global__ void divide_columns(float* x, const float* pivots, size_t rows, size_t n,
                                          size_t first, int is_strictly_upper) {
  for (size_t at = thread_index(); at < rows * n; at += n_threads()) {
    size_t i = at / n, j = at % n;
    x[at] = is_strictly_upper && j <= first + i ? 0.0f : x[at] / pivots[j];
  }
}

// out = w + alpha * x, alpha by row; w itself where alpha is zero. Shapes: out, w, x [rows, n].
extern "C" __global__ void add_rows(float* out, const float* w, const float* x, const float* alphas,
                                    size_t rows, size_t n) {
  for (size_t at = thread_index(); at < rows * n; at += n_threads()) {
    float alpha = alphas[at / n];
    out[at] = alpha > 0.0f ? w[at] + alpha * x[at] : w[at];
  }
}

// out[i] = sum over j of a[i][j] * b[i][j]; one warp a row. Shapes: a, b [rows, n].
extern "C" __global__ void row_dots(double* out, const float* a, const float* b, size_t rows, size_t n) {
  size_t row = warp_index();
  if (row >= rows) return;
  double sum = 0.0;
  for (size_t j = lane_index(); j < n; j += WARP) {
    sum += (double)a[row * n + j] * (double)b[row * n + j];
  }
  sum = warp_sum(sum);
  if (lane_index() == 0) out[row] = sum;
}

// out = w - (code - zero) * scale. Shapes: out, w, codes [rows, n]; scales, zeros [rows, n / group_len].
extern "C" __global__ void rounding_errors(float* out, const float* w, const unsigned char* codes,
                                           const float* scales, const float* zeros, size_t rows,
                                           size_t n, size_t group_len) {
  size_t n_groups = n / group_len;
  for (size_t at = thread_index(); at < rows * n; at += n_threads()) {
    size_t group = at / n * n_groups + at % n / group_len;
    out[at] = w[at] - ((float)codes[at] - zeros[group]) * scales[group];
  }
}
