// Register-tiled products on tile-packed matrices.
//
// A matrix with one column for each position is stored as tiles of kWidth columns: tile, then row, then column. The
// products of pixel propagation and of its gradients all use the two loops below.
#pragma once

#include <algorithm>

#include "planes.hpp"
#include "simd.hpp"

namespace corrmatch::CORRMATCH_ISA {

// Accumulators use all vector registers except those for operands: 6 x 2 of 16, or 12 x 2 of 32.
inline constexpr int kRows = kVectorRegisters == 32 ? 12 : 6;
template <class T>
inline constexpr int kWidth = 2 * kLanes<T>;

// For products along the columns: 3 x 4 accumulators of 16 registers, or 4 x 6 of 32.
inline constexpr int kDotRows = kVectorRegisters == 32 ? 4 : 3;
inline constexpr int kDotColumns = kVectorRegisters == 32 ? 6 : 4;

// Rows of a block, a multiple of kRows and kDotRows. Their tiles stay in the second-level cache between two sweeps.
inline constexpr int kBlock = 24;
static_assert(kBlock % kRows == 0 && kRows % kDotRows == 0);

template <class T>
constexpr int64_t tile_count(int64_t columns) {
  return (columns + kWidth<T> - 1) / kWidth<T>;
}

// Packs channels of one image as tiles (tile, channel, column), with zeros in the columns behind the last. `scratch`
// has room for a plane.
template <class T>
void pack_channel(const Tensor& t, int64_t b, int64_t c, int64_t channels, T* tiles, T* scratch) {
  const int64_t columns = positions(t), padded = tile_count<T>(columns) * kWidth<T>;
  read_plane(t, b, c, scratch);
  std::fill(scratch + columns, scratch + padded, T(0));
  for (int64_t j = 0; j < padded; j += kWidth<T>)
    std::copy_n(scratch + j, kWidth<T>, tiles + j * channels + c * kWidth<T>);
}

// acc[m] += sum_k a[k * a_step + m] * b[k], where b[k] is a row of a tile.
template <int M, class T>
[[gnu::always_inline]] inline void multiply_add(const T* a, int64_t a_step, const T* b, int64_t depth,
                                                Vec<T> (&acc)[M][2]) {
  for (int64_t k = 0; k < depth; ++k, a += a_step, b += kWidth<T>) {
    const Vec<T> b0 = load(b), b1 = load(b + kLanes<T>);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Vec<T> x = splat(a[m]);
      acc[m][0] += x * b0;
      acc[m][1] += x * b1;
    }
  }
}

// Stores accumulators to M rows of a tile.
template <int M, class T>
[[gnu::always_inline]] inline void store_rows(T* out, const Vec<T> (&acc)[M][2]) {
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m, out += kWidth<T>) {
    store(out, acc[m][0]);
    store(out + kLanes<T>, acc[m][1]);
  }
}

// Calls f(integral_constant<M>, start) for blocks of M <= Max that divide [0, n) evenly.
template <int Max, class F>
inline void for_even_blocks(int64_t n, F&& f) {
  const int64_t count = (n + Max - 1) / Max;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t start = n * i / count, size = n * (i + 1) / count - start;
    [&]<int... Smaller>(std::integer_sequence<int, Smaller...>) {
      ((size == Smaller + 1 ? f(std::integral_constant<int, Smaller + 1>{}, start) : void()), ...);
    }(std::make_integer_sequence<int, Max>{});
  }
}

// tile[m] = sum_k a[k * kBlock + m] * b[k] for m < rows (rounded up to kRows). Long sums are divided into panels,
// so their rounding errors are as small as those of short sums.
template <class T>
inline void set_tile(const T* a, const T* b, int64_t depth, int64_t rows, T* tile) {
  constexpr int64_t panel = 64;
  for (int64_t row = 0; row < rows; row += kRows, a += kRows, tile += kRows * kWidth<T>) {
    for (int64_t k = 0; k < depth; k += panel) {
      Vec<T> acc[kRows][2] = {};
      multiply_add<kRows>(a + k * kBlock, kBlock, b + k * kWidth<T>, std::min(panel, depth - k), acc);
      if (k > 0) [[unlikely]]
        for (int m = 0; m < kRows; ++m)
          for (int h = 0; h < 2; ++h) acc[m][h] += load(tile + m * kWidth<T> + h * kLanes<T>);
      store_rows(tile, acc);
    }
  }
}

// tile[m] += sum_k a[k * a_step + m] * b[k] for all m < rows: the tile of a matrix with `rows` rows.
template <class T>
inline void accumulate_tile(const T* a, int64_t a_step, const T* b, int64_t depth, int64_t rows, T* tile) {
  for_even_blocks<kRows>(rows, [&](auto size, int64_t start) {
    constexpr int M = decltype(size)::value;
    Vec<T> acc[M][2];
    T* out = tile + start * kWidth<T>;
    for (int m = 0; m < M; ++m)
      for (int h = 0; h < 2; ++h) acc[m][h] = load(out + m * kWidth<T> + h * kLanes<T>);
    multiply_add<M>(a + start, a_step, b, depth, acc);
    store_rows(out, acc);
  });
}

// sums[m * columns + n] (one vector each, its lanes still to be added) += sum_j a[m, j] * b[n, j] over the given tiles,
// for m < rows (rounded up to kDotRows) and n < columns.
template <class T>
inline void accumulate_dots(const T* a, int64_t a_tile, const T* b, int64_t b_tile, int64_t tiles, int64_t rows,
                            int64_t columns, T* sums) {
  for (int64_t row = 0; row < rows; row += kDotRows) {
    for_even_blocks<kDotColumns>(columns, [&](auto size, int64_t column) {
      constexpr int M = kDotRows, N = decltype(size)::value;
      Vec<T> acc[M][N];
      T* out = sums + (row * columns + column) * kLanes<T>;
      for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) acc[m][n] = load(out + (m * columns + n) * kLanes<T>);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const T* at = a + tile * a_tile + row * kWidth<T>;
        const T* bt = b + tile * b_tile + column * kWidth<T>;
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h, at += kLanes<T>, bt += kLanes<T>) {
          Vec<T> x[M];
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) x[m] = load(at + m * kWidth<T>);
#pragma GCC unroll 6
          for (int n = 0; n < N; ++n) {
            const Vec<T> y = load(bt + n * kWidth<T>);
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) acc[m][n] += x[m] * y;
          }
        }
      }
      for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) store(out + (m * columns + n) * kLanes<T>, acc[m][n]);
    });
  }
}

}  // namespace corrmatch::CORRMATCH_ISA
