// Region masks from correlation rows. A row lives on the small key grid and is never enlarged as a whole:
// - its products with the keys are computed for kMasks sampled queries at once;
// - the extrema of the enlarged row are found by branch and bound, for no enlarged value leaves the range of the grid
//   values around it;
// - an enlarged picture row is linear between two neighbouring grid columns, so that only the cells with the threshold
//   between their ends are looked at pixel by pixel; everything else is whole runs of bits.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "bilinear.hpp"
#include "bits.hpp"
#include "checks.hpp"
#include "ops.hpp"
#include "pixel_propagate.hpp"
#include "runs.hpp"

namespace corrmatch::CORRMATCH_ISA {
namespace {

inline constexpr int kMasks = 4;

enum Connected { kWhole = 0, kPeak = 1, kSeed = 2 };

struct Pixel {
  int64_t y, x;
};

template <class T>
struct Extrema {
  T least = std::numeric_limits<T>::infinity();
  T largest = -std::numeric_limits<T>::infinity();
  Pixel peak{0, 0};  // the first in raster order that has the largest value
};

template <class T>
Vec<T> load_unaligned(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// The smallest of both halves of every vector, lane by lane.
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

// Enlarges rows of the grid. Rows have a pitch of whole words of columns; what is behind the last column repeats it,
// so that reading one column too far is harmless.
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

  // Takes 2^(S - max S) of a row of scores; false where that is constant or NaN. `scores` may be read a vector too far.
  bool assign(const T* scores) {
    const int64_t rows = y_.inputs(), columns = x_.inputs();
    const T peak = largest_score(scores, rows * columns);
    if (!std::isfinite(peak)) return false;
    T least = 1, largest = 0;
    for (int64_t i = 0; i < rows; ++i) {
      T* out = grid_ + i * pitch_;
      for (int64_t j = 0; j < columns; j += kLanes<T>)
        store(out + j, exp2<true>(load_unaligned(scores + i * columns + j) - peak));
      std::fill(out + columns, out + round_up(columns + 1, kLanes<T>), out[columns - 1]);
      reduce_extrema<T>(out, round_up(columns, kLanes<T>), row_least_[i], row_largest_[i]);
      if (row_largest_[i] > largest) peak_row_ = i;
      if (row_least_[i] < least) least_row_ = i;
      largest = std::max(largest, row_largest_[i]);
      least = std::min(least, row_least_[i]);
    }
    return least < largest;
  }

  Extrema<T> extrema() {
    Extrema<T> found;
    search_band(peak_row_, found);  // good bounds first
    search_band(least_row_, found);
    for (int64_t band = 0; band < y_.inputs(); ++band)
      if (band_largest(band) >= found.largest || band_least(band) < found.least) search_band(band, found);
    return found;
  }

  // emit(y, begin, end) for every run of pixels above the threshold, in raster order.
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
    Vec<T> largest = splat(-std::numeric_limits<T>::infinity());
    int64_t j = 0;
    for (; j + kLanes<T> <= count; j += kLanes<T>) largest = max_nan<T>(largest, load(scores + j));
    T peak = -std::numeric_limits<T>::infinity();
    const auto include = [&peak](T x) { peak = x > peak || x != x ? x : peak; };
    for (int i = 0; i < kLanes<T>; ++i) include(largest[i]);
    for (; j < count; ++j) include(scores[j]);
    return peak;
  }

  // A band is the picture rows between grid rows `band` and band + 1.
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

  // The value of the current picture row at column x of cell `cell`.
  T at(int64_t cell, int64_t x) const { return lerp(line_[cell], line_[cell + 1], x_.weight()[x]); }

  void search_band(int64_t band, Extrema<T>& found) {
    for (int64_t y = y_.first(band); y < y_.first(band + 1); ++y) {
      enlarge_vertically(y);
      T least, largest;
      reduce_extrema<T>(line_, round_up(x_.inputs(), kLanes<T>), least, largest);
      if (largest >= found.largest || least < found.least) search_line(y, found);
    }
  }

  // Between grid columns the row is monotone: its extrema are among the first and the last pixels of the cells.
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
        if (column == columns) return;  // closed below, at the picture's edge
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

  const Axis<T>&y_, &x_;
  const int64_t pitch_;
  Buffer<T> grid_;
  Buffer<T> line_;  // a picture row, enlarged vertically only
  Buffer<T> row_least_, row_largest_;
  int64_t peak_row_ = 0, least_row_ = 0;
};

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
      // Runs meet where the grid column between them falls between two pixels.
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

// The nearest pixel of `outputs` to grid position i of `inputs`, halves up.
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

template <class T>
void run(const Tensor& query, const Tensor& key, const Tensor& index, int64_t height, int64_t width, double scale,
         double threshold, Connected connected, int connectivity, const Tensor& packed, int threads) {
  const int64_t batch = query.size[0], depth = query.size[1], masks = index.size[3];
  const int64_t n_q = positions(query), n_k = positions(key), tiles = tile_count<T>(n_k), padded = tiles * kWidth<T>;
  const int64_t blocks = (masks + kMasks - 1) / kMasks, row = padded + kLanes<T>;
  Buffer<T> keys(batch * depth * padded), queries(batch * depth * blocks * kMasks);
  Buffer<T> planes(threads * std::max(n_q, padded)), scores(threads * kMasks * row);
  const Axis<T> y(key.size[2], height), x(key.size[3], width);
  std::vector<Masker<T>> maskers;
  maskers.reserve(threads);
  for (int i = 0; i < threads; ++i) maskers.emplace_back(y, x, T(threshold), connected, connectivity);

#pragma omp parallel num_threads(threads)
  {
    T* plane = planes + thread_number() * std::max(n_q, padded);
#pragma omp for schedule(dynamic) collapse(2)
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t d = 0; d < depth; ++d) {
        pack_channel<T>(key, b, d, depth, keys + b * depth * padded, plane);
        read_plane(query, b, d, plane);
        T* sampled = queries + (b * depth + d) * blocks * kMasks;
        for (int64_t k = 0; k < blocks * kMasks; ++k)
          sampled[k] = plane[*index.at<const int64_t>(0, 0, b, std::min(k, masks - 1))] * T(scale * kLog2e<double>);
      }
    }
#pragma omp for schedule(dynamic) collapse(2)
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t block = 0; block < blocks; ++block) {
        T* block_scores = scores + thread_number() * kMasks * row;
        const T* sampled = queries + b * depth * blocks * kMasks + block * kMasks;
        for (int64_t t = 0; t < tiles; ++t) {
          Vec<T> acc[kMasks][2] = {};
          multiply_add<kMasks>(sampled, blocks * kMasks, keys + (b * tiles + t) * depth * kWidth<T>, depth, acc);
          for (int m = 0; m < kMasks; ++m)
            for (int h = 0; h < 2; ++h) store(block_scores + m * row + t * kWidth<T> + h * kLanes<T>, acc[m][h]);
        }
        for (int64_t k = block * kMasks; k < std::min(masks, (block + 1) * kMasks); ++k) {
          const int64_t position = *index.at<const int64_t>(0, 0, b, k);
          const Pixel seed{nearest(position / query.size[3], query.size[2], height),
                           nearest(position % query.size[3], query.size[3], width)};
          maskers[thread_number()].mask(block_scores + k % kMasks * row, seed, packed.at<uint32_t>(0, b, k));
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
  const auto kernel = wide ? run<double> : run<float>;
  kernel(query, key, index, height, width, scale, threshold, Connected(connected), connectivity, packed, threads);
}

}  // namespace corrmatch::CORRMATCH_ISA
