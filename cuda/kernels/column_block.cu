// The columns of one column block of GPTQ and GPTAQ, one launch a block (src/solver/gptq.rs tells the
// recurrence). Column q is rounded to q_q from v_q = t_q + s_q; its difference t_q - q_q times R_qj goes
// to the shift s_j of every later column j of the block, with a pull also v_q times alpha P_qj to its
// target t_j. Columns after the block get theirs by one product of matrices afterwards, which takes the
// differences and the values that are left here.
//
// One warp a row: rows never meet, so there is nothing to wait for. A lane holds every 32nd column of its
// row in registers; the lane of column q rounds it and tells the others. R is read from memory once a
// row, of which the first-level cache serves all but one.

// Columns of a block at most: this many to a lane.
#define COLUMNS_A_LANE 4

struct Column {
  float scale, zero;
  int original;
  double step_loss;
};

// Shapes: targets, shifts [rows, n] in solving order, of which those of this block are read; differences
// and values [rows, width], values only with a pull; codes [rows, n] in original order; losses and
// live_squares [rows], which the block's are added to; n_bad [rows], likewise; unit_upper, pull [n, n];
// scales, zeros [rows, n / group_len]; first_values [rows] or none; step_losses, order [n].
extern "C" __global__ void solve_block(
    float* differences, float* values, unsigned char* codes, double* losses, double* live_squares,
    unsigned* n_bad, const float* targets, const float* shifts, const float* unit_upper,
    const float* pull, const float* scales, const float* zeros, const float* first_values,
    const double* step_losses, const int* order, size_t rows, size_t n, size_t start, int width,
    size_t group_len, float max_code, float alpha) {
  size_t row = warp_index();
  if (row >= rows) return;
  int lane = lane_index();
  size_t n_groups = n / group_len;
  float t[COLUMNS_A_LANE], s[COLUMNS_A_LANE];
  Column own[COLUMNS_A_LANE];
#pragma unroll
  for (int k = 0; k < COLUMNS_A_LANE; ++k) {
    size_t column = start + lane + WARP * k;
    bool is_there = lane + WARP * k < width;
    t[k] = is_there ? targets[row * n + column] : 0.0f;
    s[k] = is_there ? shifts[row * n + column] : 0.0f;
    own[k].original = is_there ? order[column] : 0;
    size_t group = row * n_groups + own[k].original / group_len;
    own[k].scale = scales[group];
    own[k].zero = zeros[group];
    own[k].step_loss = is_there ? step_losses[column] : 0.0;
  }
  double loss = 0.0, live_square = 0.0;
  unsigned bad = 0;
#pragma unroll
  for (int k = 0; k < COLUMNS_A_LANE; ++k) {
    for (int turn = 0; turn < WARP && WARP * k + turn < width; ++turn) {
      int place = WARP * k + turn;
      float difference = 0.0f, value = 0.0f;
      if (lane == turn) {
        if (first_values && start + place == 0) s[k] = first_values[row] - t[k];
        value = t[k] + s[k];
        float steps = steps_of(value, own[k].scale, own[k].zero, max_code);
        float rounded = steps * own[k].scale;
        difference = t[k] - rounded;
        float error = value - rounded;
        codes[row * n + own[k].original] = (unsigned char)(steps + own[k].zero);
        if (own[k].step_loss > 0.0) {
          loss += own[k].step_loss * ((double)error * (double)error);
          live_square += (double)difference * (double)difference;
        }
        bad += is_finite(error) ? 0u : 1u;
        differences[row * width + place] = difference;
        if (pull) values[row * width + place] = value;
      }
      difference = __shfl_sync(ALL_LANES, difference, turn);
      if (pull) value = __shfl_sync(ALL_LANES, value, turn);
      size_t line = (start + place) * n + start;
#pragma unroll
      for (int later = k; later < COLUMNS_A_LANE; ++later) {
        int other = lane + WARP * later;
        if (other > place && other < width) {
          s[later] = fmaf(difference, unit_upper[line + other], s[later]);
          if (pull) t[later] = fmaf(value, alpha * pull[line + other], t[later]);
        }
      }
    }
  }
  loss = warp_sum(loss);
  live_square = warp_sum(live_square);
  if (bad > 0u) atomicAdd(&n_bad[row], bad);
  if (lane == 0) {
    losses[row] += loss;
    live_squares[row] += live_square;
  }
}
