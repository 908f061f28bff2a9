// Scales and zero points of groups of weights, one warp a group: src/solver/grid.rs and grid/weighted.rs
// define them. Sums over a group are taken in another order than there, so that of two grids that are
// equally good to a rounding error the other may be found.

enum ClipKind { CLIP_NONE = 0, CLIP_MSE = 1, CLIP_WEIGHTED = 2 };
enum NormKind { NORM_SQUARE = 0, NORM_BETWEEN = 1, NORM_CUBE = 2 };

struct Grid {
  float scale, zero;
};

struct Format {
  float max_code;
  int is_symmetric, scale_type;
};

// A group's weights and what a squared error counts in each column, or nothing where all count alike.
struct Group {
  const float* weights;
  const float* moved;
  const float* counts;
  size_t len;
  Format format;

  // moved is what the columns before the group have shifted it by.
  __device__ float weight(size_t i) const { return moved ? weights[i] + moved[i] : weights[i]; }
  __device__ float count(size_t i) const { return counts ? counts[i] : 1.0f; }
};

static __device__ Grid grid_of_range(float low, float high, Format format) {
  float n_steps = format.max_code;
  float middle = (n_steps + 1.0f) / 2.0f;
  float raw = format.is_symmetric ? fmaxf(high, -low) / (n_steps / 2.0f)
                                  : high / n_steps - low / n_steps;
  Grid grid;
  grid.scale = round_scale(raw, format.scale_type);
  if (grid.scale < LEAST_NORMAL) {
    grid.scale = 1.0f;
    grid.zero = format.is_symmetric ? middle : 0.0f;
  } else if (format.is_symmetric) {
    grid.zero = middle;
  } else {
    grid.zero = fminf(fmaxf(rintf(-low / grid.scale), 0.0f), n_steps);
  }
  return grid;
}

// |x|^2.4, by Newton's method for the fifth root of its square.
static __device__ float power_2_4(float x) {
  float square = x * x;
  float root = __uint_as_float(__float_as_uint(square) / 5u + 852282573u);
  for (int i = 0; i < 3; ++i) {
    float root2 = root * root;
    root = 0.8f * root + 0.2f * square / (root2 * root2);
  }
  return square * root;
}

static __device__ double mse_error(const Group& group, Grid grid) {
  float sum = 0.0f;
  for (size_t i = lane_index(); i < group.len; i += WARP) {
    float weight = group.weight(i);
    float steps = steps_of(weight, grid.scale, grid.zero, group.format.max_code);
    sum += power_2_4(weight / grid.scale - steps);
  }
  return (double)power_2_4(grid.scale) * (double)warp_sum(sum);
}

static __device__ Grid search_mse(const Group& group, float low, float high) {
  Grid best = grid_of_range(low, high, group.format);
  double least = infinity();
  for (int i = 0; i < 80; ++i) {
    float factor = 1.0f - (float)i / 100.0f;
    Grid grid = grid_of_range(low * factor, high * factor, group.format);
    double error = mse_error(group, grid);
    if (error < least) {
      best = grid;
      least = error;
    }
  }
  return best;
}

static __device__ float weighted_error(const Group& group, Grid grid, int norm) {
  float inverse = 1.0f / grid.scale;
  float least = -grid.zero, most = group.format.max_code - grid.zero;
  float sum = 0.0f;
  for (size_t i = lane_index(); i < group.len; i += WARP) {
    float weight = group.weight(i);
    float steps = (fminf(fmaxf(weight * inverse, least), most) + ROUND) - ROUND;
    float off = weight - steps * grid.scale;
    float power = off * off;
    if (norm == NORM_BETWEEN) power = power * sqrtf(fabsf(off));
    if (norm == NORM_CUBE) power = power * fabsf(off);
    sum += group.count(i) * power;
  }
  return warp_sum(sum);
}

// The best grid so far, and its error.
struct Best {
  Grid grid;
  float error;

  __device__ bool keep_better(const Group& group, int norm, float scale, float zero) {
    Grid tried;
    tried.scale = round_scale(scale, group.format.scale_type);
    tried.zero = zero;
    if (!(tried.scale >= LEAST_NORMAL && is_finite(tried.scale))) return false;
    float error_of_tried = weighted_error(group, tried, norm);
    if (!(error_of_tried < error)) return false;
    grid = tried;
    error = error_of_tried;
    return true;
  }
};

// Moves the scale to that of least squared error for the codes, as long as that helps.
static __device__ void move_scale(const Group& group, int norm, Best* best) {
  for (int i = 0; i < 3; ++i) {
    double above = 0.0, below = 0.0;
    for (size_t j = lane_index(); j < group.len; j += WARP) {
      float weight = group.weight(j);
      double steps = steps_of(weight, best->grid.scale, best->grid.zero, group.format.max_code);
      double count = group.count(j);
      above += count * (double)weight * steps;
      below += count * steps * steps;
    }
    above = warp_sum(above);
    below = warp_sum(below);
    if (!(below > 0.0)) return;
    if (!best->keep_better(group, norm, (float)(above / below), best->grid.zero)) return;
  }
}

static __device__ Grid search_weighted(const Group& group, int norm, float low, float high) {
  const int n_shrinks = 36, stride = 3;
  Grid widest = grid_of_range(low, high, group.format);
  Best best;
  best.grid = widest;
  best.error = weighted_error(group, widest, norm);
  bool is_symmetric = group.format.is_symmetric;
  float first = is_symmetric ? widest.zero : fmaxf(widest.zero - 1.0f, 0.0f);
  float last = is_symmetric ? widest.zero : fminf(widest.zero + 1.0f, group.format.max_code);
  int least = 0;
  for (float zero = first; zero <= last; zero += 1.0f) {
    for (int i = 0; i < n_shrinks; i += stride) {
      float scale = widest.scale * (1.0f - (float)i / 50.0f);
      if (best.keep_better(group, norm, scale, zero)) least = i;
    }
  }
  float zero = best.grid.zero;
  int from = least >= stride - 1 ? least - (stride - 1) : 0;
  int until = least + stride < n_shrinks ? least + stride : n_shrinks;
  for (int i = from; i < until; ++i) {
    if (i != least) best.keep_better(group, norm, widest.scale * (1.0f - (float)i / 50.0f), zero);
  }
  move_scale(group, norm, &best);
  return best.grid;
}

// Fits groups first_group to first_group + n_fitted - 1 of every row. Shapes: weights [rows, n]; moved
// [rows, n_fitted * group_len] or none; counts [n] or none; scales, zeros [rows, n / group_len].
extern "C" __global__ void fit_grids(float* scales, float* zeros, const float* weights,
                                     const float* moved, const float* counts, size_t rows, size_t n,
                                     size_t group_len, size_t first_group, size_t n_fitted,
                                     float max_code, int is_symmetric, int scale_type, int clip,
                                     int norm) {
  size_t task = warp_index();
  if (task >= rows * n_fitted) return;
  size_t row = task / n_fitted, fitted = task % n_fitted, index = first_group + fitted;
  Group group;
  group.weights = weights + row * n + index * group_len;
  group.moved = moved ? moved + task * group_len : 0;
  group.counts = counts ? counts + index * group_len : 0;
  group.len = group_len;
  group.format.max_code = max_code;
  group.format.is_symmetric = is_symmetric;
  group.format.scale_type = scale_type;
  float low = 0.0f, high = 0.0f, greatest_count = 0.0f;
  for (size_t i = lane_index(); i < group_len; i += WARP) {
    low = fminf(low, group.weight(i));
    high = fmaxf(high, group.weight(i));
    greatest_count = fmaxf(greatest_count, group.count(i));
  }
  low = warp_min(low);
  high = warp_max(high);
  // Where no column counts, all count alike.
  if (!(warp_max(greatest_count) > 0.0f)) group.counts = 0;
  Grid grid;
  if (clip == CLIP_MSE) {
    grid = search_mse(group, low, high);
  } else if (clip == CLIP_WEIGHTED) {
    grid = search_weighted(group, norm, low, high);
  } else {
    grid = grid_of_range(low, high, group.format);
  }
  if (lane_index() == 0) {
    scales[row * (n / group_len) + index] = grid.scale;
    zeros[row * (n / group_len) + index] = grid.zero;
  }
}
