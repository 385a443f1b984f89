// Gradients of pixel propagation. With G = dL/dZ, t_ij = <V_i, G_j> and delta_i = sum_j P_ij t_ij:
//   dV_i = sum_j P_ij G_j,  dquery_i = scale sum_j P_ij (t_ij - delta_i) key_j,  dkey_j = scale sum_i P_ij (t_ij -
//   delta_i) query_i.
//
// Each block of rows is processed in two sweeps. The first computes E = 2^(S - shift), t and delta; E and t stay in
// buffers in the second-level cache. The second computes the products of W = E (t - delta). Scores have the same bits
// as in the forward, and P = E / sum uses the sum of the forward, so the rows of P sum to 1 even for large scores. The
// results are divided, not P.
#include <limits>

#include "ops.hpp"
#include "pixel_propagate.hpp"

namespace corrmatch::CORRMATCH_ISA {
namespace {

// An image that is being processed. V and G have one more channel if the mass has a gradient.
template <class T>
struct Image {
  const T* query;       // (D, N_q)
  const T* value;       // (C, N_q)
  const T* key;         // tiles of D channels
  const T* grad;        // G, tiles of C channels
  const T* normalizer;  // (2, N_q): shift and sum
  T* dquery;            // (D, N_q), or null
  T* dvalue;            // (C, N_q), or null
  T* partials;          // a dkey for each group, tiles of D channels, or null
  std::vector<int64_t> rows;
};

template <class T>
class Backward {
 public:
  Backward(int64_t n_q, int64_t n_k, int64_t depth, int64_t channels, double scale)
      : n_q_(n_q),
        n_k_(n_k),
        tiles_(tile_count<T>(n_k)),
        depth_(depth),
        channels_(channels),
        scale_(T(scale)),
        score_scale_(T(scale * kLog2e<double>)),
        weights_(tiles_ * kBlock * kWidth<T>),
        products_(tiles_ * kBlock * kWidth<T>),
        query_columns_(depth * kBlock),
        query_rows_(kBlock * depth),
        value_columns_(channels * kBlock),
        query_dots_(kBlock * depth * kLanes<T>),
        value_dots_(kBlock * channels * kLanes<T>) {}

  // Adds the part of rows[0 .. count) to dkey and writes dquery and dvalue of those rows.
  void block(const Image<T>& image, const int64_t* rows, int64_t count, T* dkey) {
    gather(image, rows, count);
    const bool scores_matter = dkey || image.dquery;
    for (int64_t t = 0; t < tiles_; ++t) sweep(image, t, count, scores_matter);
    for (int64_t r = 0; r < count; ++r) delta_[r] = inverse_sum_[r] * sum_lanes<T>(load(delta_lanes_ + r * kLanes<T>));
    for (int64_t t = 0; t < tiles_; t += kChunk) {
      const int64_t stop = std::min(t + kChunk, tiles_);
      if (scores_matter)
        for (int64_t i = t; i < stop; ++i) subtract_delta(i, count);
      if (dkey)
        for (int64_t i = t; i < stop; ++i)
          accumulate_tile<T>(query_rows_, depth_, tile(products_, i), count, depth_, dkey + i * depth_ * kWidth<T>);
      if (image.dquery) add_dots(products_, image.key, depth_, t, stop, count, query_dots_);
      if (image.dvalue) add_dots(weights_, image.grad, channels_, t, stop, count, value_dots_);
    }
    if (image.dquery) write_rows(query_dots_, depth_, scale_, rows, count, image.dquery);
    if (image.dvalue) write_rows(value_dots_, channels_, T(1), rows, count, image.dvalue);
  }

 private:
  // Tiles of one turn of the last products: their factors fit into the first-level cache.
  static constexpr int64_t kChunk = 8;

  static T* tile(Buffer<T>& buffer, int64_t t) { return buffer + t * kBlock * kWidth<T>; }

  // Copies the rows of query and value side by side, with zeros behind the last.
  void gather(const Image<T>& image, const int64_t* rows, int64_t count) {
    std::fill_n(static_cast<T*>(query_columns_), depth_ * kBlock, T(0));
    std::fill_n(static_cast<T*>(value_columns_), channels_ * kBlock, T(0));
    std::fill_n(shift_, kBlock, T(0));
    std::fill_n(delta_lanes_, kBlock * kLanes<T>, T(0));
    std::fill_n(static_cast<T*>(query_dots_), kBlock * depth_ * kLanes<T>, T(0));
    std::fill_n(static_cast<T*>(value_dots_), kBlock * channels_ * kLanes<T>, T(0));

    for (int64_t r = 0; r < count; ++r) {
      shift_[r] = image.normalizer[rows[r]];
      inverse_sum_[r] = 1 / image.normalizer[n_q_ + rows[r]];
    }
    for (int64_t d = 0; d < depth_; ++d) {
      for (int64_t r = 0; r < count; ++r) {
        const T q = image.query[d * n_q_ + rows[r]];
        query_columns_[d * kBlock + r] = q * score_scale_;
        query_rows_[r * depth_ + d] = q * scale_ * inverse_sum_[r];
      }
    }
    for (int64_t c = 0; c < channels_; ++c)
      for (int64_t r = 0; r < count; ++r) value_columns_[c * kBlock + r] = image.value[c * n_q_ + rows[r]];
  }

  // Computes E of tile t and, if scores have a gradient, t and its part of delta.
  void sweep(const Image<T>& image, int64_t t, int64_t count, bool scores_matter) {
    const int64_t columns = std::min<int64_t>(kWidth<T>, n_k_ - t * kWidth<T>);
    T *e = tile(weights_, t), *product = tile(products_, t);
    set_tile<T>(query_columns_, image.key + t * depth_ * kWidth<T>, depth_, count, e);
    if (scores_matter) set_tile<T>(value_columns_, image.grad + t * channels_ * kWidth<T>, channels_, count, product);
    for (int64_t r = 0; r < count; ++r, e += kWidth<T>, product += kWidth<T>) {
      for (int h = 0; h < 2; ++h) store(e + h * kLanes<T>, exp2<true>(load(e + h * kLanes<T>) - shift_[r]));
      if (columns < kWidth<T>) [[unlikely]]
        clear_padding(e, columns);
      if (!scores_matter) continue;
      T* delta = delta_lanes_ + r * kLanes<T>;
      store(delta, load(delta) + (load(e) * load(product) + load(e + kLanes<T>) * load(product + kLanes<T>)));
    }
  }

  // Turns t into W = E (t - delta).
  void subtract_delta(int64_t t, int64_t count) {
    const T* p = tile(weights_, t);
    T* w = tile(products_, t);
    for (int64_t r = 0; r < count; ++r)
      for (int h = 0; h < 2; ++h, p += kLanes<T>, w += kLanes<T>) store(w, load(p) * (load(w) - delta_[r]));
  }

  // Adds sum_j a[row, j] b[channel, j] over the tiles from t to stop.
  static void add_dots(Buffer<T>& a, const T* b, int64_t channels, int64_t t, int64_t stop, int64_t count, T* dots) {
    accumulate_dots<T>(tile(a, t), kBlock * kWidth<T>, b + t * channels * kWidth<T>, channels * kWidth<T>, stop - t,
                       count, channels, dots);
  }

  void write_rows(const T* dots, int64_t channels, T factor, const int64_t* rows, int64_t count, T* out) {
    for (int64_t r = 0; r < count; ++r)
      for (int64_t c = 0; c < channels; ++c, dots += kLanes<T>)
        out[c * n_q_ + rows[r]] = factor * inverse_sum_[r] * sum_lanes<T>(load(dots));
  }

  int64_t n_q_, n_k_, tiles_, depth_, channels_;
  T scale_, score_scale_;
  Buffer<T> weights_;        // E: tiles of kBlock rows
  Buffer<T> products_;       // t, then W
  Buffer<T> query_columns_;  // (D, kBlock), times scale * log2(e)
  Buffer<T> query_rows_;     // (kBlock, D), times scale / sum
  Buffer<T> value_columns_;  // (C, kBlock)
  Buffer<T> query_dots_;     // dquery: (kBlock, D) vectors, their lanes still to be added
  Buffer<T> value_dots_;     // dvalue: (kBlock, C) vectors
  alignas(64) T delta_lanes_[kBlock * kLanes<T>];
  T delta_[kBlock];
  T shift_[kBlock];
  T inverse_sum_[kBlock];
};

// The whole op. As in the forward p is the place of an image among those in process, b its number.
template <class T>
class PixelPropagateBackward {
 public:
  PixelPropagateBackward(const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value,
                         const Tensor& normalizer, double scale, const OptionalTensor& dquery,
                         const OptionalTensor& dkey, const OptionalTensor& dvalue, int threads)
      : grad_out_(grad_out),
        query_(query),
        key_(key),
        value_(value),
        normalizer_(normalizer),
        dquery_(dquery),
        dkey_(dkey),
        dvalue_(dvalue),
        threads_(threads),
        depth_(query.size[1]),
        values_(value.size[1]),
        channels_(grad_out.size[1]),
        n_q_(positions(query)),
        tiles_(tile_count<T>(positions(key))),
        padded_(tiles_ * kWidth<T>),
        groups_(Groups(n_q_).count),
        flight_(images_in_flight(query.size[0], groups_, threads)),
        queries_(flight_ * depth_ * n_q_),
        vals_(flight_ * channels_ * n_q_),
        keys_(flight_ * depth_ * padded_),
        grads_(flight_ * channels_ * padded_),
        dqueries_(dquery ? flight_ * depth_ * n_q_ : 0),
        dvalues_(dvalue ? flight_ * channels_ * n_q_ : 0),
        partials_(dkey ? flight_ * groups_ * depth_ * padded_ : 0),
        planes_(threads * padded_),
        images_(flight_) {
    for (int64_t p = 0; p < flight_; ++p) {
      Image<T>& image = images_[p];
      image.query = queries_ + p * depth_ * n_q_;
      image.value = vals_ + p * channels_ * n_q_;
      image.key = keys_ + p * depth_ * padded_;
      image.grad = grads_ + p * channels_ * padded_;
      image.dquery = dquery ? dqueries_ + p * depth_ * n_q_ : nullptr;
      image.dvalue = dvalue ? dvalues_ + p * channels_ * n_q_ : nullptr;
      image.partials = dkey ? partials_ + p * groups_ * depth_ * padded_ : nullptr;
      image.rows.reserve(n_q_);
    }
    for (int i = 0; i < threads; ++i) workers_.emplace_back(n_q_, positions(key), depth_, channels_, scale);
  }

  void run() {
    for (int64_t first = 0; first < query_.size[0]; first += flight_) {
      const int64_t count = std::min(flight_, query_.size[0] - first);
#pragma omp parallel num_threads(threads_)
      {
#pragma omp for schedule(static) collapse(2)
        for (int64_t p = 0; p < count; ++p)
          for (int64_t c = 0; c < 2 * (depth_ + channels_); ++c) read_channel(p, first + p, c);
#pragma omp for schedule(static)
        for (int64_t p = 0; p < count; ++p) list_rows(images_[p], first + p);
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t p = 0; p < count; ++p)
          for (int64_t g = 0; g < groups_; ++g) add_group(images_[p], g);
#pragma omp for schedule(static) collapse(2)
        for (int64_t p = 0; p < count; ++p)
          for (int64_t c = 0; c < 2 * depth_ + values_; ++c) write_channel(images_[p], first + p, c);
      }
    }
  }

 private:
  T* plane() { return planes_ + thread_number() * padded_; }

  // Channels are numbered through key, grad_out, query and value.
  void read_channel(int64_t p, int64_t b, int64_t c) {
    if (c < depth_) return pack_channel<T>(key_, b, c, depth_, keys_ + p * depth_ * padded_, plane());
    c -= depth_;
    if (c < channels_) return pack_channel<T>(grad_out_, b, c, channels_, grads_ + p * channels_ * padded_, plane());
    c -= channels_;
    if (c < depth_) {
      read_plane(query_, b, c, queries_ + (p * depth_ + c) * n_q_);
      if (dquery_) std::fill_n(dqueries_ + (p * depth_ + c) * n_q_, n_q_, T(0));
      return;
    }
    c -= depth_;
    T* value = vals_ + (p * channels_ + c) * n_q_;
    if (c < values_)
      read_plane(value_, b, c, value);
    else
      std::fill_n(value, n_q_, T(1));  // a channel of ones gathers the mass
    if (dvalue_) std::fill_n(dvalues_ + (p * channels_ + c) * n_q_, n_q_, T(0));
  }

  void list_rows(Image<T>& image, int64_t b) {
    image.normalizer = normalizer_.at<const T>(0, b);
    image.rows.clear();
    for (int64_t i = 0; i < n_q_; ++i)
      if (image.normalizer[n_q_ + i] != std::numeric_limits<T>::infinity()) image.rows.push_back(i);
  }

  void add_group(const Image<T>& image, int64_t g) {
    T* dkey = dkey_ ? image.partials + g * depth_ * padded_ : nullptr;
    if (dkey && g < Groups(image.rows).count) std::fill_n(dkey, depth_ * padded_, T(0));
    for_each_block(image.rows, g, [&](const int64_t* rows, int64_t count) {
      workers_[thread_number()].block(image, rows, count, dkey);
    });
  }

  // Channels are numbered through dkey, dquery and dvalue.
  void write_channel(const Image<T>& image, int64_t b, int64_t c) {
    if (c < depth_) {
      if (!dkey_) return;
      add_partials(image.partials, Groups(image.rows).count, depth_, c, tiles_, plane());
      return write_plane<T>(dkey_, b, c, plane());
    }
    c -= depth_;
    if (c < depth_) {
      if (dquery_) write_plane<T>(dquery_, b, c, image.dquery + c * n_q_);
      return;
    }
    c -= depth_;
    if (dvalue_) write_plane<T>(dvalue_, b, c, image.dvalue + c * n_q_);
  }

  const Tensor grad_out_, query_, key_, value_, normalizer_;
  const OptionalTensor dquery_, dkey_, dvalue_;
  const int threads_;
  const int64_t depth_, values_, channels_, n_q_, tiles_, padded_, groups_, flight_;
  Buffer<T> queries_, vals_, keys_, grads_, dqueries_, dvalues_, partials_;
  Buffer<T> planes_;  // one a thread
  std::vector<Image<T>> images_;
  std::vector<Backward<T>> workers_;
};

}  // namespace

void pixel_propagate_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor normalizer, double scale,
                              OptionalTensor dquery, OptionalTensor dkey, OptionalTensor dvalue, int threads) {
  const auto run = [&](auto zero) {
    PixelPropagateBackward<decltype(zero)>(grad_out, query, key, value, normalizer, scale, dquery, dkey, dvalue,
                                           threads)
        .run();
  };
  normalizer.dtype == DType::float64 ? run(double{}) : run(float{});
}

}  // namespace corrmatch::CORRMATCH_ISA
