// The partition of the work in the forward and the backward of pixel propagation.
//
// Rows (query positions) with an open gate are divided into groups, which depend only on the number of rows. Each group
// adds into its own partial result, and the partial results are added in order. So results do not depend on the number
// of threads. The memory is the number of groups (at most 16) times the result of the images in process.
#pragma once

#include <algorithm>
#include <vector>

#include "buffer.hpp"
#include "parallel.hpp"
#include "planes.hpp"
#include "tiles.hpp"

namespace corrmatch::CORRMATCH_ISA {

// The number of groups is a power of two. Each group has at least four blocks of rows, so that clearing and adding its
// partial result is a small share of the work. There are at most 16, because each needs memory for a partial result.
struct Groups {
  explicit Groups(int64_t rows) {
    const int64_t blocks = (rows + kBlock - 1) / kBlock;
    while (count < 16 && blocks >= 8 * count) count *= 2;
    rows_per_group = (blocks + count - 1) / count * kBlock;
  }
  explicit Groups(const std::vector<int64_t>& rows) : Groups(int64_t(rows.size())) {}
  int64_t count = 1;
  int64_t rows_per_group;
};

// Images that are processed at a time: just enough for all threads to have tasks, because each image needs memory.
inline int64_t images_in_flight(int64_t batch, int64_t groups, int threads) {
  return std::clamp<int64_t>((4 * int64_t(threads) + groups - 1) / groups, 1, batch);
}

// Channel c of the sum of all partials, (group, tile, channel, column), as a plane.
template <class T>
void add_partials(const T* partials, int64_t groups, int64_t channels, int64_t c, int64_t tiles, T* plane) {
  const int64_t size = tiles * channels * kWidth<T>;
  for (int64_t t = 0; t < tiles; ++t, plane += kWidth<T>) {
    const T* in = partials + (t * channels + c) * kWidth<T>;
    Vec<T> sum[2] = {load(in), load(in + kLanes<T>)};
    for (int64_t g = 1; g < groups; ++g)
      for (int h = 0; h < 2; ++h) sum[h] += load(in + g * size + h * kLanes<T>);
    for (int h = 0; h < 2; ++h) store(plane + h * kLanes<T>, sum[h]);
  }
}

// Calls f(rows, count) for each block of the open rows in group g.
template <class F>
void for_each_block(const std::vector<int64_t>& rows, int64_t g, F&& f) {
  const Groups groups(rows);
  const int64_t stop = std::min<int64_t>(rows.size(), (g + 1) * groups.rows_per_group);
  for (int64_t row = g * groups.rows_per_group; row < stop; row += kBlock)
    f(rows.data() + row, std::min<int64_t>(kBlock, stop - row));
}

// Clears the columns behind the last one in the tile of a row, which contain 2^0.
template <class T>
inline void clear_padding(T* row, int64_t columns_in_tile) {
  std::fill(row + columns_in_tile, row + kWidth<T>, T(0));
}

}  // namespace corrmatch::CORRMATCH_ISA
