// Pseudo-labels: the most probable class of each pixel and its softmax probability. Image rows are processed one after
// another, and enlarged logits exist for one vector of pixels at a time.
#include <algorithm>
#include <vector>

#include "enlarged_rows.hpp"
#include "ops.hpp"
#include "parallel.hpp"

namespace corrmatch::CORRMATCH_ISA {
namespace {

inline constexpr int64_t kRowsPerTask = 8;

// The larger of `peak` and x; NaN if one of them is NaN.
inline void raise(float& peak, float x) { peak = x > peak || x != x ? x : peak; }

enum class Sampling { copy, permute, gather };

// The sources of the vectors of an enlarged row.
template <class T>
class Columns {
 public:
  Columns(int64_t inputs, int64_t outputs, bool resize) : axis_(inputs, outputs), lane_(round_up(outputs)) {
    sampling_ = !resize ? Sampling::copy : kFastPermute ? Sampling::permute : Sampling::gather;
    for (int64_t x = 0; x < round_up(outputs); ++x) {
      lane_[x] = axis_.low()[x] - axis_.low()[x / kLanes<T> * kLanes<T>];
      if (lane_[x] >= kLanes<T> && resize) sampling_ = Sampling::gather;  // shrinking
    }
  }
  Sampling sampling() const { return sampling_; }

  // Values x..x+lanes-1 of an enlarged row.
  template <Sampling S>
  Vec<T> at(const T* row, int64_t x) const {
    if constexpr (S == Sampling::copy) return load(row + x);
    const int32_t* low = axis_.low() + x;
    Vec<T> a, b;
    if constexpr (S == Sampling::permute) {
      a = permute(row + low[0], load_lanes<T>(lane_ + x));
      b = permute(row + low[0] + 1, load_lanes<T>(lane_ + x));
    } else {
      for (int i = 0; i < kLanes<T>; ++i) a[i] = row[low[i]], b[i] = row[low[i] + 1];
    }
    return lerp(a, b, load(axis_.weight() + x));
  }

 private:
#if defined(__AVX2__) && defined(__GNUC__) && !defined(__clang__)
  static constexpr bool kFastPermute = true;
  static Vec<T> permute(const T* p, Int<T> lanes) {
    Vec<T> v;
    std::memcpy(&v, p, sizeof v);
    return __builtin_shuffle(v, lanes);
  }
#else
  static constexpr bool kFastPermute = false;
  static Vec<T> permute(const T* p, Int<T> lanes) {
    Vec<T> v;
    for (int i = 0; i < kLanes<T>; ++i) v[i] = p[lanes[i]];
    return v;
  }
#endif
  static int64_t round_up(int64_t n) { return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>; }

  Axis<T> axis_;
  Buffer<Lane<T>> lane_;  // low(x) - low(first x of the vector)
  Sampling sampling_;
};

// Rows of labels and confidences of one thread.
template <class T>
class Labeller {
 public:
  Labeller(const Tensor& logits, const Axis<T>& y, const Columns<T>& columns, int64_t width)
      : classes_(int(logits.size[1])),
        width_(width),
        columns_(columns),
        rows_(logits, y, columns.sampling() != Sampling::copy),
        values_(logits.size[1] * kLanes<T>),
        labels_(width + kLanes<T>),
        confidences_(width + kLanes<T>) {}

  // Labels and confidences of image row y, `width` of each.
  void row(int64_t b, int64_t y) {
    const T* source = rows_.at(b, y);
    switch (columns_.sampling()) {
      case Sampling::copy:
        return label_row<Sampling::copy>(source);
      case Sampling::permute:
        return label_row<Sampling::permute>(source);
      case Sampling::gather:
        return label_row<Sampling::gather>(source);
    }
  }
  const int64_t* labels() const { return labels_; }
  const float* confidences() const { return confidences_; }

 private:
  template <Sampling S>
  void label_row(const T* source) {
    for (int64_t x = 0; x < width_; x += kLanes<T>) {
      Vec<T> largest = columns_.template at<S>(source, x), sum{};
      Int<T> label{};
      store<T>(values_, largest);
      for (int c = 1; c < classes_; ++c) {
        const Vec<T> value = columns_.template at<S>(source + c * rows_.pitch(), x);
        store<T>(values_ + c * kLanes<T>, value);
        // A NaN counts as larger than all numbers but an earlier NaN.
        const Int<T> better = ~(value <= largest) & (largest == largest);
        largest = better ? value : largest;
        label = better ? Int<T>{} + c : label;
      }
      for (int c = 0; c < classes_; ++c) sum += exp<T>(load<T>(values_ + c * kLanes<T>) - largest);
      const Vec<T> confidence = T(1) / sum;
      for (int i = 0; i < kLanes<T>; ++i) {
        labels_[x + i] = label[i];
        confidences_[x + i] = float(confidence[i]);
      }
    }
  }

  const int classes_;
  const int64_t width_;
  const Columns<T>& columns_;
  EnlargedRows<T> rows_;
  Buffer<T> values_;  // (classes, lanes)
  Buffer<int64_t> labels_;
  Buffer<float> confidences_;
};

template <class T>
void run(const Tensor& logits, const OptionalTensor& ignore, const Tensor& labels, const Tensor& confidence,
         const Tensor& class_peak, int threads) {
  const int64_t batch = logits.size[0], channels = logits.size[1], height = labels.size[2], width = labels.size[3];
  const bool resize = height != logits.size[2] || width != logits.size[3];
  const int64_t tasks = (height + kRowsPerTask - 1) / kRowsPerTask;
  const Axis<T> y_axis(logits.size[2], height);
  const Columns<T> columns(logits.size[3], width, resize);
  std::vector<Labeller<T>> labellers;
  labellers.reserve(threads);
  for (int i = 0; i < threads; ++i) labellers.emplace_back(logits, y_axis, columns, width);
  const int64_t peak_pitch = (channels + 15) / 16 * 16;  // threads write to cache lines of their own
  Buffer<float> peaks(threads * peak_pitch);
  std::fill_n(static_cast<float*>(peaks), threads * peak_pitch, 0.0f);

#pragma omp parallel for num_threads(threads) schedule(dynamic) collapse(2)
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t task = 0; task < tasks; ++task) {
      Labeller<T>& labeller = labellers[thread_number()];
      float* peak = peaks + thread_number() * peak_pitch;
      for (int64_t y = task * kRowsPerTask; y < std::min(height, (task + 1) * kRowsPerTask); ++y) {
        labeller.row(b, y);
        std::copy_n(labeller.labels(), width, labels.at<int64_t>(0, b, y));
        std::copy_n(labeller.confidences(), width, confidence.at<float>(0, b, y));
        for (int64_t x = 0; x < width; ++x)
          if (!ignore || !*ignore.at<const bool>(0, b, y, x))
            raise(peak[labeller.labels()[x]], labeller.confidences()[x]);
      }
    }
  }
  float* out = class_peak.at<float>(0);
  std::fill_n(out, channels, 0.0f);
  for (int thread = 0; thread < threads; ++thread)
    for (int64_t c = 0; c < channels; ++c) raise(out[c], peaks[thread * peak_pitch + c]);
}

}  // namespace

void pseudo_label(Tensor logits, OptionalTensor ignore, Tensor labels, Tensor confidence, Tensor class_peak,
                  int threads) {
  const auto kernel = logits.dtype == DType::float64 ? run<double> : run<float>;
  kernel(logits, ignore, labels, confidence, class_peak, threads);
}

}  // namespace corrmatch::CORRMATCH_ISA
