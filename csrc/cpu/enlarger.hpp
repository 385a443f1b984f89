// A map on a small grid that is enlarged bilinearly, without an array of the full size.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "bilinear.hpp"
#include "bits.hpp"
#include "simd.hpp"

namespace corrmatch::CORRMATCH_ISA {

struct Pixel {
  int64_t y, x;
};

template <class T>
struct Extrema {
  T least = std::numeric_limits<T>::infinity();
  T largest = -std::numeric_limits<T>::infinity();
  Pixel peak{0, 0};  // the first in raster order that has the largest value
};

// Extrema of `count` values. The last vector counts in full even if it is incomplete.
template <class T>
void reduce_extrema(const T* row, int64_t count, T& least, T& largest) {
  Vec<T> low = load(row), high = low;
  for (int64_t j = kLanes<T>; j < count; j += kLanes<T>) {
    const Vec<T> x = load(row + j);
    low = x < low ? x : low;
    high = x > high ? x : high;
  }
  least = low[0];
  largest = high[0];
  for (int i = 1; i < kLanes<T>; ++i) {
    least = std::min<T>(least, low[i]);
    largest = std::max<T>(largest, high[i]);
  }
}

// Grid rows have a pitch of whole words of columns. The last column is repeated behind the end, so reading one column
// beyond it is harmless.
template <class T>
class Enlarger {
 public:
  Enlarger(const Axis<T>& y, const Axis<T>& x)
      : y_(y),
        x_(x),
        pitch_(round_up(x.inputs() + 1, kWordBits)),
        grid_(y.inputs() * pitch_),
        line_(pitch_),
        row_least_(y.inputs()),
        row_largest_(y.inputs()) {}

  // Computes 2^(S - max S) of a row of scores S, which a vector of -inf follows; false if it is constant or NaN.
  bool assign(const T* scores) {
    const int64_t rows = y_.inputs(), columns = x_.inputs();
    const T peak = largest_score(scores, rows * columns);
    if (!std::isfinite(peak)) return false;
    T least = std::numeric_limits<T>::infinity(), largest = 0;
    for (int64_t i = 0; i < rows; ++i) {
      T* out = grid_ + i * pitch_;
      for (int64_t j = 0; j < columns; j += kLanes<T>)
        store(out + j, exp2<true>(load_unaligned(scores + i * columns + j) - peak));
      std::fill(out + columns, out + round_up(columns + 1, kLanes<T>), out[columns - 1]);
      reduce_extrema<T>(out, columns, row_least_[i], row_largest_[i]);
      if (row_largest_[i] > largest) peak_row_ = i;
      if (row_least_[i] < least) least_row_ = i;
      largest = std::max(largest, row_largest_[i]);
      least = std::min(least, row_least_[i]);
    }
    return least < largest;
  }

  Extrema<T> extrema() {
    Extrema<T> found;
    search_band(peak_row_, found);  // to begin with good bounds
    search_band(least_row_, found);
    for (int64_t band = 0; band < y_.inputs(); ++band)
      if (band_largest(band) >= found.largest || band_least(band) < found.least) search_band(band, found);
    return found;
  }

  // Calls emit(y, begin, end) for each run of pixels above the threshold, in raster order.
  template <class Emit>
  void for_each_run_above(T threshold, Emit&& emit) {
    for (int64_t band = 0; band < y_.inputs(); ++band) {
      if (!(band_largest(band) > threshold)) continue;
      for (int64_t y = y_.first(band); y < y_.first(band + 1); ++y) {
        enlarge_vertically(y);
        emit_runs(y, threshold, emit);
      }
    }
  }

 private:
  static int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

  static T largest_score(const T* scores, int64_t count) {
    Vec<T> largest = load(scores);
    for (int64_t j = kLanes<T>; j < count; j += kLanes<T>) largest = max_nan<T>(largest, load(scores + j));
    return max_lanes<T>(largest);
  }

  // A band is the image rows between grid rows `band` and band + 1.
  T band_largest(int64_t band) const {
    return std::max(row_largest_[band], row_largest_[std::min(band + 1, y_.inputs() - 1)]);
  }
  T band_least(int64_t band) const {
    return std::min(row_least_[band], row_least_[std::min(band + 1, y_.inputs() - 1)]);
  }

  void enlarge_vertically(int64_t y) {
    const T *a = grid_ + y_.low()[y] * pitch_, *b = grid_ + y_.high(y) * pitch_;
    const T weight = y_.weight()[y];
    for (int64_t j = 0; j <= x_.inputs(); j += kLanes<T>) store(line_ + j, lerp(load(a + j), load(b + j), weight));
  }

  // The value of the current image row at column x of cell `cell`.
  T at(int64_t cell, int64_t x) const { return lerp(line_[cell], line_[cell + 1], x_.weight()[x]); }

  void search_band(int64_t band, Extrema<T>& found) {
    for (int64_t y = y_.first(band); y < y_.first(band + 1); ++y) {
      enlarge_vertically(y);
      T least, largest;
      reduce_extrema<T>(line_, x_.inputs(), least, largest);
      if (largest >= found.largest || least < found.least) search_line(y, found);
    }
  }

  // A row is monotone between grid columns, so its extrema are among the first and the last pixels of the cells.
  void search_line(int64_t y, Extrema<T>& found) {
    for (int64_t cell = 0; cell < x_.inputs(); ++cell) {
      const int64_t begin = x_.first(cell), end = x_.first(cell + 1);
      if (begin == end) continue;
      for (const int64_t x : {begin, end - 1}) {
        const T value = at(cell, x);
        const bool earlier = y < found.peak.y || (y == found.peak.y && x < found.peak.x);
        if (value > found.largest || (value == found.largest && earlier)) {
          found.largest = value;
          found.peak = {y, x};
        }
        found.least = std::min(found.least, value);
      }
    }
  }

  int64_t count_above(int64_t cell, T threshold) const {
    const T *weight = x_.weight(), a = line_[cell], b = line_[cell + 1];
    int64_t count = 0;
    for (int64_t x = x_.first(cell); x < x_.first(cell + 1); ++x) count += lerp(a, b, weight[x]) > threshold;
    return count;
  }

  template <class Emit>
  void emit_runs(int64_t y, T threshold, Emit&& emit) {
    const int64_t columns = x_.inputs();
    int64_t begin = 0;
    uint64_t carry = 0;
    for (int64_t j = 0; j < columns; j += kWordBits) {
      const T* line = line_ + j;
      const uint64_t above = word_of([=](int i) { return line[i] > threshold; }) & low_bits(columns - j);
      for_each_bit(above ^ (above << 1 | carry), [&](int bit) {
        const int64_t column = j + bit;
        if (column == columns) return;  // its end is emitted below, at the edge of the image
        if (above >> bit & 1) {
          begin = column == 0 ? 0 : x_.first(column) - count_above(column - 1, threshold);
        } else {
          const int64_t end = x_.first(column - 1) + count_above(column - 1, threshold);
          if (begin < end) emit(y, begin, end);
        }
      });
      carry = above >> (kWordBits - 1);
    }
    if (line_[columns - 1] > threshold && begin < x_.outputs()) emit(y, begin, x_.outputs());
  }

  const Axis<T>& y_;
  const Axis<T>& x_;
  const int64_t pitch_;
  Buffer<T> grid_;
  Buffer<T> line_;  // an image row, enlarged vertically only
  Buffer<T> row_least_, row_largest_;
  int64_t peak_row_ = 0, least_row_ = 0;
};

}  // namespace corrmatch::CORRMATCH_ISA
