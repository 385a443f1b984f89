// Bilinear resampling with align_corners=True: the first and last samples of both grids coincide.
#pragma once

#include <cstdint>

#include "buffer.hpp"

namespace corrmatch::CORRMATCH_ISA {

// Exact if a = b or w = 0, unlike (1 - w) a + w b. The result is NaN if a and b are the same infinity.
template <class T, class Weight>
inline T lerp(T a, T b, Weight w) {
  return a + w * (b - a);
}

// One axis: output x lies between inputs low(x) and low(x) + 1, at `weight(x)` of the way. The last output is the last
// input (low = inputs - 1, weight 0), so readers have to pad an input row by one sample, or clamp.
template <class T>
class Axis {
 public:
  Axis(int64_t inputs, int64_t outputs)
      : low_(padded(outputs)), weight_(padded(outputs)), first_(inputs + 1), inputs_(inputs), outputs_(outputs) {
    const int64_t steps = outputs > 1 ? outputs - 1 : 1;
    int64_t cell = 0;
    for (int64_t x = 0; x < outputs; ++x) {
      // In whole numbers, so that samples which coincide have the weight 0 for all sizes.
      const int64_t position = x * (inputs - 1);
      low_[x] = int32_t(position / steps);
      weight_[x] = T(double(position % steps) / double(steps));
      while (cell <= low_[x]) first_[cell++] = int32_t(x);
    }
    while (cell <= inputs) first_[cell++] = int32_t(outputs);
    // Coordinates behind the end are valid, too, for readers of whole vectors.
    for (int64_t x = outputs; x < padded(outputs); ++x) {
      low_[x] = low_[outputs - 1];
      weight_[x] = weight_[outputs - 1];
    }
  }

  int64_t inputs() const { return inputs_; }
  int64_t outputs() const { return outputs_; }
  const int32_t* low() const { return low_; }
  const T* weight() const { return weight_; }
  // The first output x with low(x) >= cell, or `outputs`. Cell c contains the outputs first(c)..first(c + 1) - 1.
  int64_t first(int64_t cell) const { return first_[cell]; }
  int64_t high(int64_t x) const { return low_[x] + 1 < inputs_ ? low_[x] + 1 : low_[x]; }

 private:
  // Whole vectors of any width.
  static int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

  Buffer<int32_t> low_;
  Buffer<T> weight_;
  Buffer<int32_t> first_;
  int64_t inputs_, outputs_;
};

}  // namespace corrmatch::CORRMATCH_ISA
