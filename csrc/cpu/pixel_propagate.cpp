// Pixel propagation, forward: Z[:, j] = sum_i g_i V[:, i] P_ij.
//
// Each block of rows is processed in two sweeps. The first computes E = 2^(S - shift) tile by tile, and its row sums.
// Scores never leave the registers, and E stays in a buffer in the second-level cache. The second sweep adds
// (g V / row sum) E to Z. A pair of positions costs one exponential, D + C multiply-adds and no access to memory.
#include "pixel_propagate.hpp"

#include <cmath>
#include <limits>

#include "ops.hpp"

namespace corrmatch::CORRMATCH_ISA {
namespace {

// An image that is being processed.
template <class T>
struct Image {
  const T* query;  // (D, N_q), times scale * log2(e)
  const T* value;  // (C, value_stride)
  int64_t value_stride;
  const T* key;               // tiles of D channels
  T largest_key;              // largest norm of a key
  bool values_in_range;       // values divided by row sums neither overflow nor underflow
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
  void block(const Image<T>& image, const int64_t* rows, int64_t count, T* z, T* normalizer) {
    std::fill_n(static_cast<T*>(query_), depth_ * kBlock, T(0));
    T norms[kBlock] = {};
    for (int64_t d = 0; d < depth_; ++d) {
      for (int64_t r = 0; r < count; ++r) {
        const T q = image.query[d * n_q_ + rows[r]];
        query_[d * kBlock + r] = q;
        norms[r] += q * q;
      }
    }
    // |S| <= |q| |k|. If this bound is small, no shift is needed; else the maximum of the row is found first.
    T largest = 0;
    for (const T norm : norms) largest = max_nan(largest, norm);
    const T bound = std::sqrt(largest) * image.largest_key;
    std::fill_n(sums_, kBlock * kLanes<T>, T(0));
    std::fill_n(shift_, kBlock, T(0));
    const bool shifted = !(bound <= kSafe && image.values_in_range);  // true for NaN, too
    for (int64_t t = 0; t < tiles_; ++t) {
      set_tile<T>(query_, image.key + t * depth_ * kWidth<T>, depth_, count, score_tile(t));
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
      for (int64_t c = 0; c < values_; ++c) share[c] = image.value[c * image.value_stride + rows[r]] / sum;
      if (channels_ > values_) share[values_] = T(1) / sum;
    }
    for (int64_t t = 0; t < tiles_; ++t)
      accumulate_tile<T>(shares_, channels_, score_tile(t), count, channels_, z + t * channels_ * kWidth<T>);
  }

 private:
  // With scores up to kSafe exponentials do not overflow, and their sums and quotients keep full precision.
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

  // Turns S of tile t into E and adds it to the row sums.
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

// Whether the largest finite value stays in range when it is divided by a sum of exponentials of scores up to kSafe.
template <class T>
bool are_in_range(const Image<T>& image, int64_t channels, int64_t n) {
  constexpr T limit = sizeof(T) == 4 ? T(0x1p80) : T(0x1p700);
  Vec<T> sizes{};
  for (int64_t c = 0; c < channels; ++c) {
    const T* value = image.value + c * image.value_stride;
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

// Positions whose gate is open: those of a mask, those where the largest softmax probability over the channels of V
// reaches the threshold, or all.
template <class T>
void open_rows(const Image<T>& image, int64_t channels, const OptionalTensor& gate, const OptionalTensor& threshold,
               int64_t b, int64_t n, std::vector<int64_t>& rows) {
  rows.clear();
  if (gate) {
    for (int64_t i = 0; i < n; ++i)
      if (*gate.at<const bool>(b, 0, i / gate.size[3], i % gate.size[3])) rows.push_back(i);
  } else if (threshold) {
    const T least = T(*threshold.at<const double>(0));
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const T* value = image.value + i;
      Vec<T> largest = load(value), sum{};
      for (int64_t c = 1; c < channels; ++c) largest = max_nan<T>(largest, load(value + c * image.value_stride));
      for (int64_t c = 0; c < channels; ++c) sum += exp<T>(load(value + c * image.value_stride) - largest);
      const Vec<T> confidence = T(1) / sum;
      for (int64_t lane = 0; lane < std::min<int64_t>(kLanes<T>, n - i); ++lane)
        if (confidence[lane] >= least) rows.push_back(i + lane);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) rows.push_back(i);
  }
}

// The whole op. Several images are processed at a time: p is the place of an image among these, b its number.
template <class T>
class PixelPropagate {
 public:
  PixelPropagate(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& gate,
                 const OptionalTensor& threshold, double scale, const Tensor& out, const Tensor& normalizer,
                 int threads)
      : query_(query),
        key_(key),
        value_(value),
        gate_(gate),
        threshold_(threshold),
        out_(out),
        normalizer_(normalizer),
        scale_(T(scale * kLog2e<double>)),
        threads_(threads),
        depth_(query.size[1]),
        values_(value.size[1]),
        channels_(out.size[1]),
        n_q_(positions(query)),
        tiles_(tile_count<T>(positions(key))),
        padded_(tiles_ * kWidth<T>),
        value_stride_(tile_count<T>(n_q_) * kWidth<T>),
        groups_(Groups(n_q_).count),
        flight_(images_in_flight(query.size[0], groups_, threads)),
        queries_(flight_ * depth_ * n_q_),
        vals_(flight_ * values_ * value_stride_),
        keys_(flight_ * depth_ * padded_),
        partials_(flight_ * groups_ * channels_ * padded_),
        planes_(threads * padded_),
        images_(flight_) {
    for (int64_t p = 0; p < flight_; ++p) {
      Image<T>& image = images_[p];
      image.query = queries_ + p * depth_ * n_q_;
      image.value = vals_ + p * values_ * value_stride_;
      image.value_stride = value_stride_;
      image.key = keys_ + p * depth_ * padded_;
      image.partials = partials_ + p * groups_ * channels_ * padded_;
      image.rows.reserve(n_q_);
    }
    for (int i = 0; i < threads; ++i) workers_.emplace_back(n_q_, positions(key), depth_, values_, channels_ > values_);
  }

  void run() {
    for (int64_t first = 0; first < query_.size[0]; first += flight_) {
      const int64_t count = std::min(flight_, query_.size[0] - first);
#pragma omp parallel num_threads(threads_)
      {
#pragma omp for schedule(static) collapse(2)
        for (int64_t p = 0; p < count; ++p)
          for (int64_t c = 0; c < 2 * depth_ + values_; ++c) read_channel(p, first + p, c);
#pragma omp for schedule(static)
        for (int64_t p = 0; p < count; ++p) list_rows(images_[p], first + p);
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t p = 0; p < count; ++p)
          for (int64_t g = 0; g < groups_; ++g) add_group(images_[p], first + p, g);
#pragma omp for schedule(static) collapse(2)
        for (int64_t p = 0; p < count; ++p)
          for (int64_t c = 0; c < channels_; ++c) write_channel(images_[p], first + p, c);
      }
    }
  }

 private:
  T* plane() { return planes_ + thread_number() * padded_; }

  // Channels are numbered through key, query and value.
  void read_channel(int64_t p, int64_t b, int64_t c) {
    if (c < depth_) return pack_channel<T>(key_, b, c, depth_, keys_ + p * depth_ * padded_, plane());
    c -= depth_;
    if (c < depth_) {
      T* query = queries_ + (p * depth_ + c) * n_q_;
      read_plane(query_, b, c, query);
      for (int64_t i = 0; i < n_q_; ++i) query[i] *= scale_;
      return;
    }
    c -= depth_;
    read_plane(value_, b, c, vals_ + (p * values_ + c) * value_stride_);
  }

  void list_rows(Image<T>& image, int64_t b) {
    image.largest_key = largest_norm(image.key, tiles_, depth_);
    image.values_in_range = are_in_range(image, values_, n_q_);
    open_rows(image, values_, gate_, threshold_, b, n_q_, image.rows);
    T* rows = normalizer_.at<T>(0, b);
    std::fill_n(rows, n_q_, T(0));
    std::fill_n(rows + n_q_, n_q_, std::numeric_limits<T>::infinity());
  }

  void add_group(const Image<T>& image, int64_t b, int64_t g) {
    T* z = image.partials + g * channels_ * padded_;
    if (g < Groups(image.rows).count) std::fill_n(z, channels_ * padded_, T(0));
    for_each_block(image.rows, g, [&](const int64_t* rows, int64_t count) {
      workers_[thread_number()].block(image, rows, count, z, normalizer_.at<T>(0, b));
    });
  }

  void write_channel(const Image<T>& image, int64_t b, int64_t c) {
    add_partials(image.partials, Groups(image.rows).count, channels_, c, tiles_, plane());
    write_plane<T>(out_, b, c, plane());
  }

  const Tensor query_, key_, value_;
  const OptionalTensor gate_, threshold_;
  const Tensor out_, normalizer_;
  const T scale_;  // of the packed query
  const int threads_;
  const int64_t depth_, values_, channels_, n_q_, tiles_, padded_, value_stride_, groups_, flight_;
  Buffer<T> queries_, vals_, keys_, partials_;
  Buffer<T> planes_;  // one a thread
  std::vector<Image<T>> images_;
  std::vector<Forward<T>> workers_;
};

}  // namespace

void pixel_propagate_forward(Tensor query, Tensor key, Tensor value, OptionalTensor gate, OptionalTensor threshold,
                             double scale, Tensor out, Tensor normalizer, int threads) {
  const auto run = [&](auto zero) {
    PixelPropagate<decltype(zero)>(query, key, value, gate, threshold, scale, out, normalizer, threads).run();
  };
  normalizer.dtype == DType::float64 ? run(double{}) : run(float{});
}

}  // namespace corrmatch::CORRMATCH_ISA
