// Pixel propagation, forward: Z[:, j] = sum_i g_i V[:, i] P_ij.
//
// A block of rows is swept twice. The first sweep computes E = 2^(S - shift) tile by tile, straight from the score
// registers into a buffer that stays in the second-level cache, and its row sums; the second adds (g V / row sum) E
// to Z. Each pair of positions costs one exponential, D + C multiply-adds and no trip to memory.
#include "pixel_propagate.hpp"

#include <cmath>
#include <limits>

#include "ops.hpp"

namespace corrmatch::CORRMATCH_ISA {
namespace {

// One picture in flight.
template <class T>
struct Picture {
  const T* query;  // (D, N_q), times scale * log2(e)
  const T* value;  // (C, value_stride)
  int64_t value_stride;
  const T* key;               // tiles of D channels
  T largest_key;              // largest norm of a key
  bool moderate;              // whether values may be divided by any sum of exponentials
  T* partials;                // a Z for each group, tiles of `channels`
  std::vector<int64_t> rows;  // query positions with an open gate
};

template <class T>
class Forward {
 public:
  Forward(int64_t n_q, int64_t n_k, int64_t depth, int64_t values, bool mass)
      : n_q_(n_q),
        n_k_(n_k),
        tiles_(tile_count<T>(n_k)),
        depth_(depth),
        values_(values),
        channels_(values + mass),
        scores_(tiles_ * kBlock * kWidth<T>),
        query_(depth * kBlock),
        shares_(kBlock * channels_) {}

  // Adds rows[0 .. count) to z and writes their shift and sum.
  void block(const Picture<T>& picture, const int64_t* rows, int64_t count, T* z, T* normalizer) {
    std::fill_n(static_cast<T*>(query_), depth_ * kBlock, T(0));
    T norms[kBlock] = {};
    for (int64_t d = 0; d < depth_; ++d) {
      for (int64_t r = 0; r < count; ++r) {
        const T q = picture.query[d * n_q_ + rows[r]];
        query_[d * kBlock + r] = q;
        norms[r] += q * q;
      }
    }
    // |S| <= |q| |k|: where that bound is small no shift is needed, else the true row maximum is found first.
    T largest = 0;
    for (const T norm : norms) largest = max_nan(largest, norm);
    const T bound = std::sqrt(largest) * picture.largest_key;
    std::fill_n(sums_, kBlock * kLanes<T>, T(0));
    std::fill_n(shift_, kBlock, T(0));
    const bool shifted = !(bound <= kSafe && picture.moderate);  // NaN included
    for (int64_t t = 0; t < tiles_; ++t) {
      set_tile<T>(query_, picture.key + t * depth_ * kWidth<T>, depth_, count, score_tile(t));
      if (!shifted) exponentials<false>(t, count);
    }
    if (shifted) {
      row_maxima(count);
      for (int64_t t = 0; t < tiles_; ++t) exponentials<true>(t, count);
    }

    for (int64_t r = 0; r < count; ++r) {
      const T sum = sum_lanes<T>(load(sums_ + r * kLanes<T>));
      normalizer[rows[r]] = shift_[r];
      normalizer[n_q_ + rows[r]] = sum;
      T* share = shares_ + r * channels_;
      for (int64_t c = 0; c < values_; ++c) share[c] = picture.value[c * picture.value_stride + rows[r]] / sum;
      if (channels_ > values_) share[values_] = T(1) / sum;
    }
    for (int64_t t = 0; t < tiles_; ++t)
      accumulate_tile<T>(shares_, channels_, score_tile(t), count, channels_, z + t * channels_ * kWidth<T>);
  }

 private:
  // Scores up to kSafe in size neither overflow, nor do their sums and quotients lose anything.
  static constexpr T kSafe = sizeof(T) == 4 ? 40 : 300;

  T* score_tile(int64_t t) { return scores_ + t * kBlock * kWidth<T>; }
  int64_t columns_in(int64_t t) const { return std::min<int64_t>(kWidth<T>, n_k_ - t * kWidth<T>); }

  void row_maxima(int64_t count) {
    for (int64_t r = 0; r < count; ++r) {
      const T* row = scores_ + r * kWidth<T>;
      Vec<T> largest = splat(row[0]);
      for (int64_t t = 0; t < tiles_; ++t, row += kBlock * kWidth<T>) {
        if (columns_in(t) < kWidth<T>) [[unlikely]]
          for (int64_t j = 0; j < columns_in(t); ++j) largest = max_nan<T>(largest, splat(row[j]));
        else
          largest = max_nan<T>(largest, max_nan<T>(load(row), load(row + kLanes<T>)));
      }
      shift_[r] = max_lanes<T>(largest);
    }
  }

  // S of tile t becomes E and adds to the row sums.
  template <bool Shifted>
  void exponentials(int64_t t, int64_t count) {
    T* out = score_tile(t);
    for (int64_t r = 0; r < count; ++r, out += kWidth<T>) {
      Vec<T> e0 = exp2<Shifted>(load(out) - shift_[r]), e1 = exp2<Shifted>(load(out + kLanes<T>) - shift_[r]);
      store(out, e0);
      store(out + kLanes<T>, e1);
      if (columns_in(t) < kWidth<T>) [[unlikely]] {
        clear_padding(out, columns_in(t));
        e0 = load(out), e1 = load(out + kLanes<T>);
      }
      T* sum = sums_ + r * kLanes<T>;
      store(sum, load(sum) + (e0 + e1));
    }
  }

  int64_t n_q_, n_k_, tiles_, depth_, values_, channels_;
  Buffer<T> scores_;  // S, then E: tiles of kBlock rows
  Buffer<T> query_;   // (D, kBlock)
  Buffer<T> shares_;  // (kBlock, channels): V / row sum
  alignas(64) T sums_[kBlock * kLanes<T>];
  T shift_[kBlock];
};

template <class T>
T largest_norm(const T* tiles, int64_t count, int64_t channels) {
  Vec<T> largest{};
  for (int64_t t = 0; t < count; ++t) {
    Vec<T> squares[2] = {};
    for (int64_t c = 0; c < channels; ++c, tiles += kWidth<T>)
      for (int h = 0; h < 2; ++h) squares[h] += load(tiles + h * kLanes<T>) * load(tiles + h * kLanes<T>);
    largest = max_nan<T>(largest, max_nan<T>(squares[0], squares[1]));
  }
  return std::sqrt(max_lanes<T>(largest));
}

// Whether the largest finite value, divided by a sum of exponentials of scores up to kSafe, is still well in range.
template <class T>
bool is_moderate(const Picture<T>& picture, int64_t channels, int64_t n) {
  constexpr T limit = sizeof(T) == 4 ? T(0x1p80) : T(0x1p700);
  Vec<T> sizes{};
  for (int64_t c = 0; c < channels; ++c) {
    const T* value = picture.value + c * picture.value_stride;
    int64_t i = 0;
    for (; i + kLanes<T> <= n; i += kLanes<T>) {
      const Vec<T> x = load(value + i), size = x < 0 ? -x : x;
      sizes = size > sizes && size < std::numeric_limits<T>::infinity() ? size : sizes;
    }
    for (; i < n; ++i)
      if (std::isfinite(value[i])) sizes = max_nan<T>(sizes, splat(std::abs(value[i])));
  }
  const T largest = max_lanes<T>(sizes);
  return largest == 0 || (largest <= limit && largest >= 1 / limit);
}

// Positions whose gate is open: given as a mask, or where the largest softmax probability over the channels of V
// reaches the threshold, or all.
template <class T>
void open_rows(const Picture<T>& picture, int64_t channels, const Tensor& gate, const Tensor& threshold, int64_t b,
               int64_t n, std::vector<int64_t>& rows) {
  rows.clear();
  if (gate) {
    for (int64_t i = 0; i < n; ++i)
      if (*gate.at<const bool>(b, 0, i / gate.size[3], i % gate.size[3])) rows.push_back(i);
  } else if (threshold) {
    const T least = T(*threshold.at<const double>(0));
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const T* value = picture.value + i;
      Vec<T> largest = load(value), sum{};
      for (int64_t c = 1; c < channels; ++c) largest = max_nan<T>(largest, load(value + c * picture.value_stride));
      for (int64_t c = 0; c < channels; ++c)
        sum += exp2<true>((load(value + c * picture.value_stride) - largest) * kLog2e<T>);
      const Vec<T> confidence = T(1) / sum;
      for (int64_t lane = 0; lane < std::min<int64_t>(kLanes<T>, n - i); ++lane)
        if (confidence[lane] >= least) rows.push_back(i + lane);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) rows.push_back(i);
  }
}

template <class T>
void run(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& gate, const Tensor& threshold,
         double scale, const Tensor& out, const Tensor& normalizer, int threads) {
  const int64_t batch = query.size[0], depth = query.size[1], values = value.size[1], channels = out.size[1];
  const int64_t n_q = positions(query), n_k = positions(key), tiles = tile_count<T>(n_k), padded = tiles * kWidth<T>;
  const int64_t value_stride = tile_count<T>(n_q) * kWidth<T>;
  const Groups most(n_q);
  const int64_t flight = pictures_in_flight(batch, most.count, threads);

  Buffer<T> queries(flight * depth * n_q), vals(flight * values * value_stride), keys(flight * depth * padded);
  Buffer<T> partials(flight * most.count * channels * padded), planes(int64_t(threads) * padded);
  std::vector<Picture<T>> pictures(flight);
  for (Picture<T>& picture : pictures) picture.rows.reserve(n_q);
  std::vector<Forward<T>> workers;
  for (int i = 0; i < threads; ++i) workers.emplace_back(n_q, n_k, depth, values, channels > values);

  for (int64_t first = 0; first < batch; first += flight) {
    const int64_t count = std::min(flight, batch - first);
#pragma omp parallel num_threads(threads)
    {
      T* plane = planes + thread_number() * padded;
#pragma omp for schedule(static) collapse(2)
      for (int64_t p = 0; p < count; ++p) {
        for (int64_t c = 0; c < 2 * depth + values; ++c) {
          if (c < depth) {
            pack_channel<T>(key, first + p, c, depth, keys + p * depth * padded, plane);
          } else if (c < 2 * depth) {
            T* q = queries + (p * depth + c - depth) * n_q;
            read_plane(query, first + p, c - depth, q);
            for (int64_t i = 0; i < n_q; ++i) q[i] *= T(scale * kLog2e<double>);
          } else {
            read_plane(value, first + p, c - 2 * depth, vals + (p * values + c - 2 * depth) * value_stride);
          }
        }
      }
#pragma omp for schedule(static)
      for (int64_t p = 0; p < count; ++p) {
        Picture<T>& picture = pictures[p];
        picture.query = queries + p * depth * n_q;
        picture.value = vals + p * values * value_stride;
        picture.value_stride = value_stride;
        picture.key = keys + p * depth * padded;
        picture.partials = partials + p * most.count * channels * padded;
        picture.largest_key = largest_norm(picture.key, tiles, depth);
        picture.moderate = is_moderate(picture, values, n_q);
        open_rows(picture, values, gate, threshold, first + p, n_q, picture.rows);
        T* rows = normalizer.at<T>(0, first + p);
        std::fill_n(rows, n_q, T(0));
        std::fill_n(rows + n_q, n_q, std::numeric_limits<T>::infinity());
      }
#pragma omp for schedule(dynamic) collapse(2)
      for (int64_t p = 0; p < count; ++p) {
        for (int64_t g = 0; g < most.count; ++g) {
          const Picture<T>& picture = pictures[p];
          const Groups groups(int64_t(picture.rows.size()));
          if (g >= groups.count) continue;
          T* z = picture.partials + g * channels * padded;
          std::fill_n(z, channels * padded, T(0));
          const int64_t stop = std::min<int64_t>(picture.rows.size(), (g + 1) * groups.rows_per_group);
          for (int64_t row = g * groups.rows_per_group; row < stop; row += kBlock)
            workers[thread_number()].block(picture, picture.rows.data() + row, std::min<int64_t>(kBlock, stop - row), z,
                                           normalizer.at<T>(0, first + p));
        }
      }
#pragma omp for schedule(static) collapse(2)
      for (int64_t p = 0; p < count; ++p) {
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t groups = Groups(int64_t(pictures[p].rows.size())).count;
          add_partials(pictures[p].partials, groups, channels, c, tiles, plane);
          write_plane(out, first + p, c, plane);
        }
      }
    }
  }
}

}  // namespace

void pixel_propagate_forward(Tensor query, Tensor key, Tensor value, Tensor gate, Tensor threshold, double scale,
                             Tensor out, Tensor normalizer, int threads) {
  if (normalizer.dtype == DType::float64)
    run<double>(query, key, value, gate, threshold, scale, out, normalizer, threads);
  else
    run<float>(query, key, value, gate, threshold, scale, out, normalizer, threads);
}

}  // namespace corrmatch::CORRMATCH_ISA
