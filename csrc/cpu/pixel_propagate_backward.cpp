// Gradients of pixel propagation. With G = dL/dZ, t_ij = <V_i, G_j> and delta_i = sum_j P_ij t_ij:
//   dV_i = sum_j P_ij G_j,  dquery_i = scale sum_j P_ij (t_ij - delta_i) key_j,  dkey_j = scale sum_i P_ij (t_ij -
//   delta_i) query_i.
//
// A block of rows is swept twice: E = 2^(S - shift) and t go into two buffers that stay in the second-level cache, then
// delta is known and the products follow from W = E (t - delta). The scores are those of the forward to the last bit
// and P = E / sum with its sum, so the rows of P sum to 1 however large the scores; the division waits until the
// results.
#include <limits>

#include "ops.hpp"
#include "pixel_propagate.hpp"

namespace corrmatch::CORRMATCH_ISA {
namespace {

// One picture in flight. Channels of V and G include the mass where it has a gradient.
template <class T>
struct Picture {
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
  void block(const Picture<T>& picture, const int64_t* rows, int64_t count, T* dkey) {
    gather(picture, rows, count);
    const bool scores_matter = dkey || picture.dquery;
    for (int64_t t = 0; t < tiles_; ++t) sweep(picture, t, count, scores_matter);
    for (int64_t r = 0; r < count; ++r) delta_[r] = inverse_sum_[r] * sum_lanes<T>(load(delta_lanes_ + r * kLanes<T>));
    for (int64_t t = 0; t < tiles_; t += kChunk) {
      const int64_t stop = std::min(t + kChunk, tiles_);
      if (scores_matter)
        for (int64_t i = t; i < stop; ++i) subtract_delta(i, count);
      if (dkey)
        for (int64_t i = t; i < stop; ++i)
          accumulate_tile<T>(query_rows_, depth_, tile(products_, i), count, depth_, dkey + i * depth_ * kWidth<T>);
      if (picture.dquery) add_dots(products_, picture.key, depth_, t, stop, count, query_dots_);
      if (picture.dvalue) add_dots(weights_, picture.grad, channels_, t, stop, count, value_dots_);
    }
    if (picture.dquery) write_rows(query_dots_, depth_, scale_, rows, count, picture.dquery);
    if (picture.dvalue) write_rows(value_dots_, channels_, T(1), rows, count, picture.dvalue);
  }

 private:
  // Tiles that the last products take at once: their factors fit the first-level cache.
  static constexpr int64_t kChunk = 8;

  static T* tile(Buffer<T>& buffer, int64_t t) { return buffer + t * kBlock * kWidth<T>; }

  // Copies the rows of query and value side by side, zero behind the last.
  void gather(const Picture<T>& picture, const int64_t* rows, int64_t count) {
    std::fill_n(static_cast<T*>(query_columns_), depth_ * kBlock, T(0));
    std::fill_n(static_cast<T*>(value_columns_), channels_ * kBlock, T(0));
    std::fill_n(shift_, kBlock, T(0));
    std::fill_n(delta_lanes_, kBlock * kLanes<T>, T(0));
    std::fill_n(static_cast<T*>(query_dots_), kBlock * depth_ * kLanes<T>, T(0));
    std::fill_n(static_cast<T*>(value_dots_), kBlock * channels_ * kLanes<T>, T(0));

    for (int64_t r = 0; r < count; ++r) {
      shift_[r] = picture.normalizer[rows[r]];
      inverse_sum_[r] = 1 / picture.normalizer[n_q_ + rows[r]];
    }
    for (int64_t d = 0; d < depth_; ++d) {
      for (int64_t r = 0; r < count; ++r) {
        const T q = picture.query[d * n_q_ + rows[r]];
        query_columns_[d * kBlock + r] = q * score_scale_;
        query_rows_[r * depth_ + d] = q * scale_ * inverse_sum_[r];
      }
    }
    for (int64_t c = 0; c < channels_; ++c)
      for (int64_t r = 0; r < count; ++r) value_columns_[c * kBlock + r] = picture.value[c * n_q_ + rows[r]];
  }

  // E of tile t and, where scores matter, t itself with its part of delta.
  void sweep(const Picture<T>& picture, int64_t t, int64_t count, bool scores_matter) {
    const int64_t columns = std::min<int64_t>(kWidth<T>, n_k_ - t * kWidth<T>);
    T *e = tile(weights_, t), *product = tile(products_, t);
    set_tile<T>(query_columns_, picture.key + t * depth_ * kWidth<T>, depth_, count, e);
    if (scores_matter) set_tile<T>(value_columns_, picture.grad + t * channels_ * kWidth<T>, channels_, count, product);
    for (int64_t r = 0; r < count; ++r, e += kWidth<T>, product += kWidth<T>) {
      for (int h = 0; h < 2; ++h) store(e + h * kLanes<T>, exp2<true>(load(e + h * kLanes<T>) - shift_[r]));
      if (columns < kWidth<T>) [[unlikely]]
        clear_padding(e, columns);
      if (!scores_matter) continue;
      T* delta = delta_lanes_ + r * kLanes<T>;
      store(delta, load(delta) + (load(e) * load(product) + load(e + kLanes<T>) * load(product + kLanes<T>)));
    }
  }

  // t becomes W = E (t - delta).
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

template <class T>
void run(const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& normalizer,
         double scale, const Tensor& dquery, const Tensor& dkey, const Tensor& dvalue, int threads) {
  const int64_t batch = query.size[0], depth = query.size[1], values = value.size[1], channels = grad_out.size[1];
  const int64_t n_q = positions(query), n_k = positions(key), tiles = tile_count<T>(n_k), padded = tiles * kWidth<T>;
  const Groups most(n_q);
  const int64_t flight = pictures_in_flight(batch, most.count, threads);
  const bool with_dquery(dquery), with_dkey(dkey), with_dvalue(dvalue);

  Buffer<T> queries(flight * depth * n_q), vals(flight * channels * n_q);
  Buffer<T> keys(flight * depth * padded), grads(flight * channels * padded);
  Buffer<T> dqueries(with_dquery * flight * depth * n_q), dvalues(with_dvalue * flight * channels * n_q);
  Buffer<T> partials(with_dkey * flight * most.count * depth * padded), planes(int64_t(threads) * padded);
  std::vector<Picture<T>> pictures(flight);
  for (int64_t p = 0; p < flight; ++p) {
    Picture<T>& picture = pictures[p];
    picture.query = queries + p * depth * n_q;
    picture.value = vals + p * channels * n_q;
    picture.key = keys + p * depth * padded;
    picture.grad = grads + p * channels * padded;
    picture.dquery = with_dquery ? dqueries + p * depth * n_q : nullptr;
    picture.dvalue = with_dvalue ? dvalues + p * channels * n_q : nullptr;
    picture.partials = with_dkey ? partials + p * most.count * depth * padded : nullptr;
    picture.rows.reserve(n_q);
  }
  std::vector<Backward<T>> workers;
  for (int i = 0; i < threads; ++i) workers.emplace_back(n_q, n_k, depth, channels, scale);

  for (int64_t first = 0; first < batch; first += flight) {
    const int64_t count = std::min(flight, batch - first);
#pragma omp parallel num_threads(threads)
    {
      T* plane = planes + thread_number() * padded;
#pragma omp for schedule(static) collapse(2)
      for (int64_t p = 0; p < count; ++p) {
        for (int64_t c = 0; c < 2 * (depth + channels); ++c) {
          const int64_t b = first + p;
          if (c < depth) {
            pack_channel<T>(key, b, c, depth, keys + p * depth * padded, plane);
          } else if (c < depth + channels) {
            pack_channel<T>(grad_out, b, c - depth, channels, grads + p * channels * padded, plane);
          } else if (c < 2 * depth + channels) {
            const int64_t d = c - depth - channels;
            read_plane(query, b, d, queries + (p * depth + d) * n_q);
            if (with_dquery) std::fill_n(dqueries + (p * depth + d) * n_q, n_q, T(0));
          } else {
            const int64_t v = c - 2 * depth - channels;
            T* out = vals + (p * channels + v) * n_q;
            if (v < values)
              read_plane(value, b, v, out);
            else
              std::fill_n(out, n_q, T(1));  // the mass is what a channel of ones gathers
            if (with_dvalue) std::fill_n(dvalues + (p * channels + v) * n_q, n_q, T(0));
          }
        }
      }
#pragma omp for schedule(static)
      for (int64_t p = 0; p < count; ++p) {
        Picture<T>& picture = pictures[p];
        picture.normalizer = normalizer.at<const T>(0, first + p);
        picture.rows.clear();
        for (int64_t i = 0; i < n_q; ++i)
          if (picture.normalizer[n_q + i] != std::numeric_limits<T>::infinity()) picture.rows.push_back(i);
      }
#pragma omp for schedule(dynamic) collapse(2)
      for (int64_t p = 0; p < count; ++p) {
        for (int64_t g = 0; g < most.count; ++g) {
          const Picture<T>& picture = pictures[p];
          const Groups groups(int64_t(picture.rows.size()));
          if (g >= groups.count) continue;
          T* dk = with_dkey ? picture.partials + g * depth * padded : nullptr;
          if (dk) std::fill_n(dk, depth * padded, T(0));
          const int64_t stop = std::min<int64_t>(picture.rows.size(), (g + 1) * groups.rows_per_group);
          for (int64_t row = g * groups.rows_per_group; row < stop; row += kBlock)
            workers[thread_number()].block(picture, picture.rows.data() + row, std::min<int64_t>(kBlock, stop - row),
                                           dk);
        }
      }
#pragma omp for schedule(static) collapse(2)
      for (int64_t p = 0; p < count; ++p) {
        for (int64_t c = 0; c < 2 * depth + values; ++c) {
          const int64_t b = first + p;
          if (c < depth) {
            if (!with_dkey) continue;
            const int64_t groups = Groups(int64_t(pictures[p].rows.size())).count;
            add_partials(pictures[p].partials, groups, depth, c, tiles, plane);
            write_plane<T>(dkey, b, c, plane);
          } else if (c < 2 * depth) {
            if (with_dquery) write_plane<T>(dquery, b, c - depth, pictures[p].dquery + (c - depth) * n_q);
          } else if (with_dvalue) {
            write_plane<T>(dvalue, b, c - 2 * depth, pictures[p].dvalue + (c - 2 * depth) * n_q);
          }
        }
      }
    }
  }
}

}  // namespace

void pixel_propagate_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor normalizer, double scale,
                              Tensor dquery, Tensor dkey, Tensor dvalue, int threads) {
  if (normalizer.dtype == DType::float64)
    run<double>(grad_out, query, key, value, normalizer, scale, dquery, dkey, dvalue, threads);
  else
    run<float>(grad_out, query, key, value, normalizer, scale, dquery, dkey, dvalue, threads);
}

}  // namespace corrmatch::CORRMATCH_ISA
