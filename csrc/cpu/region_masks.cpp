// Region masks from rows of the correlation map. A row is stored on the small key grid and never enlarged as a whole:
// - the scores of kQueriesAtOnce sampled queries are computed at the same time;
// - branch and bound finds the extrema of the enlarged row, because an enlarged value lies in the range of the grid
//   values around it;
// - an enlarged image row is linear between two neighbouring grid columns. Only cells with the threshold between the
//   values at their ends are processed pixel by pixel; all others are whole runs of bits.
#include <algorithm>
#include <limits>
#include <vector>

#include "bits.hpp"
#include "buffer.hpp"
#include "checks.hpp"
#include "enlarger.hpp"
#include "ops.hpp"
#include "parallel.hpp"
#include "runs.hpp"
#include "tiles.hpp"

namespace corrmatch::CORRMATCH_ISA {
namespace {

inline constexpr int kQueriesAtOnce = 4;

// Masks of one thread.
template <class T>
class Masker {
 public:
  Masker(const Axis<T>& y, const Axis<T>& x, T threshold, Connected connected, int connectivity)
      : height_(y.outputs()),
        width_(x.outputs()),
        threshold_(threshold),
        connected_(connected),
        reach_(connectivity == 8),
        enlarger_(y, x),
        runs_(connected == kWhole ? 0 : height_ * (x.inputs() / 2 + 1)),
        sets_(connected == kWhole ? 0 : height_ * (x.inputs() / 2 + 1)) {}

  void mask(const T* scores, Pixel seed, uint32_t* packed) {
    std::fill_n(packed, (height_ * width_ + 31) / 32, uint32_t(0));
    if (!enlarger_.assign(scores)) return;
    const Extrema<T> range = enlarger_.extrema();
    if (!(range.least < range.largest)) return;
    const T threshold = lerp(range.least, range.largest, threshold_);

    const auto write = [&](int64_t y, int64_t begin, int64_t end) {
      set_bits(packed, y * width_ + begin, y * width_ + end);
    };
    if (connected_ == kWhole) return enlarger_.for_each_run_above(threshold, write);

    const int32_t count = list_runs(threshold);
    DisjointSets sets(sets_);
    link_runs(runs_, count, reach_, sets);
    const int32_t kept = find_run(count, connected_ == kPeak ? range.peak : seed);
    if (kept < 0) return;
    const int32_t root = sets.find(kept);
    for (int32_t i = 0; i < count; ++i)
      if (sets.find(i) == root) write(runs_[i].row, runs_[i].begin, runs_[i].end);
  }

 private:
  int32_t list_runs(T threshold) {
    Run* runs = runs_;
    int32_t count = 0;
    enlarger_.for_each_run_above(threshold, [&](int64_t y, int64_t begin, int64_t end) {
      // Runs of neighbouring cells touch if the grid column between them lies between two pixels.
      if (count > 0 && runs[count - 1].row == y && runs[count - 1].end == begin)
        runs[count - 1].end = int32_t(end);
      else
        runs[count++] = {int32_t(y), int32_t(begin), int32_t(end)};
    });
    return count;
  }

  int32_t find_run(int32_t count, Pixel pixel) const {
    const Run* runs = runs_;
    for (int32_t i = 0; i < count; ++i)
      if (runs[i].row == pixel.y && runs[i].begin <= pixel.x && pixel.x < runs[i].end) return i;
    return -1;
  }

  const int64_t height_, width_;
  const T threshold_;
  const Connected connected_;
  const int reach_;
  Enlarger<T> enlarger_;
  Buffer<Run> runs_;
  Buffer<int32_t> sets_;
};

// The pixel of `outputs` that is nearest to grid position i of `inputs`; halves round up.
int64_t nearest(int64_t i, int64_t inputs, int64_t outputs) {
  return inputs == 1 ? 0 : (2 * i * (outputs - 1) + inputs - 1) / (2 * (inputs - 1));
}

void check_index(const Tensor& index, int64_t positions) {
  for (int64_t b = 0; b < index.size[2]; ++b) {
    for (int64_t k = 0; k < index.size[3]; ++k) {
      const int64_t value = *index.at<const int64_t>(0, 0, b, k);
      if (value < 0 || value >= positions) refuse("index", "", 0, positions - 1, value);
    }
  }
}

// The sampled queries, in blocks of kQueriesAtOnce, multiplied by the factor of the scores. The last block repeats the
// last query.
template <class T>
class SampledQueries {
 public:
  SampledQueries(const Tensor& query, const Tensor& index, T factor)
      : index_(index),
        factor_(factor),
        depth_(query.size[1]),
        count_(index.size[3]),
        blocks_((count_ + kQueriesAtOnce - 1) / kQueriesAtOnce),
        values_(query.size[0] * depth_ * step()) {}

  int64_t blocks() const { return blocks_; }
  int64_t step() const { return blocks_ * kQueriesAtOnce; }  // between two channels of a query
  // Channel 0 of a block of queries. The next channels follow at distances of `step`.
  const T* block(int64_t b, int64_t i) const { return values_ + b * depth_ * step() + i * kQueriesAtOnce; }
  int64_t position(int64_t b, int64_t k) const { return *index_.at<const int64_t>(0, 0, b, k); }

  // Copies the sampled positions of channel d of image b from its plane.
  void gather(int64_t b, int64_t d, const T* plane) {
    T* out = values_ + (b * depth_ + d) * step();
    for (int64_t k = 0; k < step(); ++k) out[k] = plane[position(b, std::min(k, count_ - 1))] * factor_;
  }

 private:
  const Tensor index_;
  const T factor_;
  const int64_t depth_, count_, blocks_;
  Buffer<T> values_;  // (batch, depth, blocks, kQueriesAtOnce)
};

struct RegionMasks {
  Tensor query, key, index;
  int64_t height, width;
  double scale, threshold;
  Connected connected;
  int connectivity;
  Tensor packed;
};

template <class T>
void run(const RegionMasks& p, int threads) {
  const int64_t batch = p.query.size[0], depth = p.query.size[1], masks = p.index.size[3];
  const int64_t n_q = positions(p.query), n_k = positions(p.key), tiles = tile_count<T>(n_k);
  const int64_t padded = tiles * kWidth<T>, pitch = padded + kLanes<T>;
  SampledQueries<T> queries(p.query, p.index, T(p.scale * kLog2e<double>));
  Buffer<T> keys(batch * depth * padded);
  Buffer<T> planes(threads * std::max(n_q, padded)), scores(threads * kQueriesAtOnce * pitch);
  const Axis<T> y(p.key.size[2], p.height), x(p.key.size[3], p.width);
  std::vector<Masker<T>> maskers;
  maskers.reserve(threads);
  for (int i = 0; i < threads; ++i) maskers.emplace_back(y, x, T(p.threshold), p.connected, p.connectivity);

#pragma omp parallel num_threads(threads)
  {
    T* plane = planes + thread_number() * std::max(n_q, padded);
#pragma omp for schedule(dynamic) collapse(2)
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t d = 0; d < depth; ++d) {
        pack_channel<T>(p.key, b, d, depth, keys + b * depth * padded, plane);
        read_plane(p.query, b, d, plane);
        queries.gather(b, d, plane);
      }
    }
#pragma omp for schedule(dynamic) collapse(2)
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t block = 0; block < queries.blocks(); ++block) {
        T* block_scores = scores + thread_number() * kQueriesAtOnce * pitch;
        for (int64_t t = 0; t < tiles; ++t) {
          Vec<T> acc[kQueriesAtOnce][2] = {};
          multiply_add<kQueriesAtOnce>(queries.block(b, block), queries.step(),
                                       keys + (b * tiles + t) * depth * kWidth<T>, depth, acc);
          for (int m = 0; m < kQueriesAtOnce; ++m)
            for (int h = 0; h < 2; ++h) store(block_scores + m * pitch + t * kWidth<T> + h * kLanes<T>, acc[m][h]);
        }
        for (int m = 0; m < kQueriesAtOnce; ++m)
          std::fill(block_scores + m * pitch + n_k, block_scores + (m + 1) * pitch,
                    -std::numeric_limits<T>::infinity());
        for (int64_t k = block * kQueriesAtOnce; k < std::min(masks, (block + 1) * kQueriesAtOnce); ++k) {
          const int64_t position = queries.position(b, k), grid_width = p.query.size[3];
          const Pixel seed{nearest(position / grid_width, p.query.size[2], p.height),
                           nearest(position % grid_width, grid_width, p.width)};
          maskers[thread_number()].mask(block_scores + k % kQueriesAtOnce * pitch, seed,
                                        p.packed.at<uint32_t>(0, b, k));
        }
      }
    }
  }
}

}  // namespace

void region_masks(Tensor query, Tensor key, Tensor index, int64_t height, int64_t width, double scale, double threshold,
                  int connected, int connectivity, Tensor packed, int threads) {
  check_index(index, positions(query));
  const bool wide = query.dtype == DType::float64 || key.dtype == DType::float64;
  const RegionMasks problem{query,        key,   index, height, width, scale, threshold, Connected(connected),
                            connectivity, packed};
  (wide ? run<double> : run<float>)(problem, threads);
}

}  // namespace corrmatch::CORRMATCH_ISA
