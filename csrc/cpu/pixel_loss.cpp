// Losses of logits that are enlarged bilinearly, and their gradients on the small grid. Of the enlarged logits only one
// vector of pixels exists at a time.
//
// The lanes of a vector are neighbouring cells of the grid, and it takes the pixels of its cells place by place: the
// first of each, the second of each. So the grid points around them are read, and given their gradients, as contiguous
// vectors, whatever the sizes.
#include <limits>
#include <optional>
#include <vector>

#include "checks.hpp"
#include "ops.hpp"
#include "parallel.hpp"
#include "rows.hpp"

namespace corrmatch::CORRMATCH_ISA {
namespace {

inline constexpr int64_t kBandsPerTask = 4;  // a band is the picture rows of one row of cells

// Where the pixels of a picture row lie: place k of every cell is one line of `pitch` lanes, empty where a cell has
// fewer pixels.
template <class T>
class Places {
 public:
  Places(const Axis<T>& x, int64_t pitch) : pitch_(pitch), lane_(x.outputs()) {
    for (int64_t cell = 0; cell < x.inputs(); ++cell) {
      count_ = std::max(count_, x.first(cell + 1) - x.first(cell));
      for (int64_t p = x.first(cell); p < x.first(cell + 1); ++p)
        lane_[p] = int32_t((p - x.first(cell)) * pitch + cell);
    }
  }
  int64_t count() const { return count_; }
  int64_t lanes() const { return count_ * pitch_; }
  const int32_t* lane() const { return lane_; }  // of each pixel

 private:
  const int64_t pitch_;
  int64_t count_ = 0;
  Buffer<int32_t> lane_;
};

struct Problem {
  Tensor logits;
  OptionalTensor labels, target;
  Tensor weight, pixels;
  OptionalTensor grad;
  bool resize() const { return weight.size[2] != logits.size[2] || weight.size[3] != logits.size[3]; }
};

// What one thread works with.
template <class T>
class Worker {
 public:
  Worker(const Problem& problem, const Axis<T>& y, const Axis<T>& x)
      : p_(problem),
        y_(y),
        classes_(int(problem.logits.size[1])),
        rows_(problem.logits, y, problem.resize()),
        pitch_(rows_.pitch()),
        places_(x, pitch_),
        across_(places_.lanes()),
        weight_(places_.lanes()),
        label_(places_.lanes()),
        loss_(places_.lanes()),
        values_(classes_ * kLanes<T>),
        others_(problem.target ? classes_ * kLanes<T> : 0),
        left_(classes_ * pitch_),
        right_(classes_ * pitch_),
        near_(classes_ * pitch_),
        far_(classes_ * pitch_) {
    if (problem.target) target_rows_.emplace(problem.target, y, problem.resize());
    for (int64_t i = 0; i < places_.lanes(); ++i) across_[i] = weight_[i] = 0, label_[i] = 0;
    for (int64_t px = 0; px < x.outputs(); ++px) across_[places_.lane()[px]] = x.weight()[px];
  }

  int64_t pitch() const { return pitch_; }
  // Gradients of the grid row of the band, so far: (classes, pitch).
  T* near() { return near_; }

  void start_task() { clear(near_), clear(far_); }
  void next_band() {
    std::swap(near_, far_);
    clear(far_);
  }

  // The loss of picture row y, summed; its pixels are written, its gradient added to the grid rows on both sides.
  double row(int64_t b, int64_t y) {
    const bool some = read_weights(b, y);
    if (some && p_.labels) read_labels(b, y);
    std::fill_n(static_cast<T*>(loss_), places_.lanes(), T(0));
    if (some) {
      const bool spreads = p_.grad && p_.resize();
      if (spreads) clear(left_), clear(right_);
      if (p_.resize())
        p_.target ? blocks<true, true>(b, y) : blocks<true, false>(b, y);
      else
        p_.target ? blocks<false, true>(b, y) : blocks<false, false>(b, y);
      if (spreads) spread(y_.weight()[y]);
    }
    double total = 0;
    T* out = p_.pixels.at<T>(0, b, y);
    for (int64_t x = 0; x < p_.weight.size[3]; ++x) {
      out[x] = loss_[places_.lane()[x]];
      total += out[x];
    }
    return total;
  }

  // The least label that is no class though its pixel counts.
  std::optional<int64_t> offender() const { return offender_; }

 private:
  void clear(T* line) const { std::fill_n(line, classes_ * pitch_, T(0)); }

  bool read_weights(int64_t b, int64_t y) {
    bool some = false;
    visit_floating(p_.weight.dtype, [&](auto zero) {
      const auto* row = p_.weight.at<const decltype(zero)>(0, b, y);
      for (int64_t x = 0; x < p_.weight.size[3]; ++x) {
        const T weight = T(widen(row[x * p_.weight.stride[3]]));
        weight_[places_.lane()[x]] = weight;
        some |= weight != 0;
      }
    });
    return some;
  }

  void read_labels(int64_t b, int64_t y) {
    visit_integer(p_.labels.dtype, [&](auto zero) {
      const auto* row = p_.labels.at<const decltype(zero)>(0, b, y);
      for (int64_t x = 0; x < p_.labels.size[3]; ++x) {
        const int64_t label = row[x * p_.labels.stride[3]], lane = places_.lane()[x];
        const bool known = label >= 0 && label < classes_;
        if (!known && weight_[lane] != 0) offender_ = std::min(label, offender_.value_or(label));
        label_[lane] = known ? Lane<T>(label) : 0;
      }
    });
  }

  template <bool Resize, bool Divergence>
  void blocks(int64_t b, int64_t y) {
    const T *line = rows_.at(b, y), *target = Divergence ? target_rows_->at(b, y) : nullptr;
    const int64_t cells = p_.logits.size[3];
    for (int64_t cell = 0; cell < cells; cell += kLanes<T>) {
      for (int64_t k = 0; k < places_.count(); ++k) {
        const int64_t at = k * pitch_ + cell;
        bool some = false;
        for (int i = 0; i < kLanes<T>; ++i) some |= weight_[at + i] != 0;
        if (!some) continue;
        if constexpr (Divergence)
          divergence<Resize>(line + cell, target + cell, cell, at);
        else
          cross_entropy<Resize>(line + cell, cell, at);
      }
    }
  }

  // The logits of a class at one pixel of each cell; 0 where `counted` is not: what does not count may be anything.
  template <bool Resize>
  static Vec<T> logits_at(const T* line, Vec<T> across, Int<T> counted) {
    Vec<T> value = load(line);
    if constexpr (Resize) value = lerp(value, load_unaligned(line + 1), across);
    return counted ? value : Vec<T>{};
  }
  T* vector(Buffer<T>& buffer, int c) { return buffer + c * kLanes<T>; }

  // Puts the logits of all classes into `values` and returns the largest of each. A NaN may be passed over.
  template <bool Resize>
  Vec<T> gather(const T* line, Vec<T> across, Int<T> counted, Buffer<T>& values) {
    Vec<T> largest = splat(-std::numeric_limits<T>::infinity());
    for (int c = 0; c < classes_; ++c) {
      const Vec<T> value = logits_at<Resize>(line + c * pitch_, across, counted);
      largest = value > largest ? value : largest;
      store(vector(values, c), value);
    }
    return largest;
  }

  template <bool Resize>
  void cross_entropy(const T* line, int64_t cell, int64_t at) {
    const Vec<T> weight = load(weight_ + at), across = load(across_ + at);
    const Int<T> counted = weight != 0, label = load_lanes<T>(label_ + at);
    const Vec<T> largest = gather<Resize>(line, across, counted, values_);
    Vec<T> sum{}, chosen{};
    for (int c = 0; c < classes_; ++c) {
      const Vec<T> shifted = load(vector(values_, c)) - largest, e = exp<T>(shifted);
      chosen = label == c ? shifted : chosen;
      sum += e;
      store(vector(values_, c), e);
    }
    store(loss_ + at, counted ? weight * (log<T>(sum) - chosen) : Vec<T>{});
    if (!p_.grad) return;
    const Vec<T> share = weight / sum;
    for (int c = 0; c < classes_; ++c) {
      const Vec<T> e = load(vector(values_, c));
      add<Resize>(c, cell, share * (label == c ? e - sum : e), across);  // e - sum: where P is 1 exactly 0
    }
  }

  template <bool Resize>
  void divergence(const T* line, const T* target, int64_t cell, int64_t at) {
    const Vec<T> weight = load(weight_ + at), across = load(across_ + at);
    const Int<T> counted = weight != 0;
    const Vec<T> largest = gather<Resize>(line, across, counted, values_);
    const Vec<T> other_largest = gather<Resize>(target, across, counted, others_);
    Vec<T> sum{}, other_sum{}, difference{};
    for (int c = 0; c < classes_; ++c) {
      const Vec<T> shifted = load(vector(values_, c)) - largest, other = load(vector(others_, c)) - other_largest;
      const Vec<T> e = exp<T>(shifted), q = exp<T>(other);
      difference += q == 0 ? Vec<T>{} : q * (other - shifted);
      sum += e;
      other_sum += q;
      store(vector(values_, c), e);
      store(vector(others_, c), q);
    }
    const Vec<T> loss = difference / other_sum + log<T>(sum) - log<T>(other_sum);
    store(loss_ + at, counted ? weight * loss : Vec<T>{});
    if (!p_.grad) return;
    const Vec<T> share = weight / sum, other_share = weight / other_sum;
    for (int c = 0; c < classes_; ++c)
      add<Resize>(c, cell, share * load(vector(values_, c)) - other_share * load(vector(others_, c)), across);
  }

  // Adds the gradients of pixels to the grid columns on both sides; where nothing is enlarged, to their grid row.
  template <bool Resize>
  void add(int c, int64_t cell, Vec<T> gradient, Vec<T> across) {
    T* left = (Resize ? left_ : near_) + c * pitch_ + cell;
    if constexpr (!Resize) return store(left, load(left) + gradient);
    T* right = right_ + c * pitch_ + cell + 1;
    const Vec<T> part = gradient * across;
    store(left, load(left) + (gradient - part));
    store_unaligned(right, load_unaligned(right) + part);
  }

  // Adds those of the columns to the grid rows on both sides.
  void spread(T down) {
    T *left = left_, *right = right_, *near = near_, *far = far_;
    for (int64_t i = 0; i < classes_ * pitch_; i += kLanes<T>) {
      const Vec<T> columns = load(left + i) + load(right + i), part = down * columns;
      store(near + i, load(near + i) + (columns - part));
      store(far + i, load(far + i) + part);
    }
  }

  const Problem p_;
  const Axis<T>& y_;
  const int classes_;
  Rows<T> rows_;
  std::optional<Rows<T>> target_rows_;
  const int64_t pitch_;
  Places<T> places_;
  Buffer<T> across_;        // of each lane: how far right of the grid column its pixel lies
  Buffer<T> weight_;        // of the row's pixels; 0 in empty lanes
  Buffer<Lane<T>> label_;   // of the row's pixels
  Buffer<T> loss_;          // of the row's pixels
  Buffer<T> values_;        // (classes, lanes): logits of a vector of pixels, then their exponentials
  Buffer<T> others_;        // the same of the target
  Buffer<T> left_, right_;  // (classes, pitch): the row's gradients of the grid columns, of the pixels on either side
  Buffer<T> near_, far_;    // (classes, pitch): of the grid row of the band, and of the row below, so far
  std::optional<int64_t> offender_;
};

template <class T>
void write_row(const Tensor& grad, int64_t b, int64_t y, const T* row, int64_t pitch) {
  visit_floating(grad.dtype, [&](auto zero) {
    for (int64_t c = 0; c < grad.size[1]; ++c) {
      auto* out = grad.at<decltype(zero)>(b, c, y);
      for (int64_t x = 0; x < grad.size[3]; ++x) narrow(row[c * pitch + x], out[x]);
    }
  });
}

template <class T>
void run(const Problem& p, const Tensor& loss, int threads) {
  const int64_t batch = p.logits.size[0], classes = p.logits.size[1], bands = p.logits.size[2];
  const int64_t tasks = (bands + kBandsPerTask - 1) / kBandsPerTask;
  const Axis<T> y_axis(bands, p.weight.size[2]), x_axis(p.logits.size[3], p.weight.size[3]);
  std::vector<Worker<T>> workers;
  workers.reserve(threads);
  for (int i = 0; i < threads; ++i) workers.emplace_back(p, y_axis, x_axis);

  // Grid rows that two tasks share: the first of each task, and the one after its last.
  const int64_t row_size = classes * workers[0].pitch();
  Buffer<T> first(p.grad ? batch * tasks * row_size : 0), last(p.grad ? batch * tasks * row_size : 0);
  std::vector<double> totals(batch * tasks);

#pragma omp parallel for num_threads(threads) schedule(dynamic) collapse(2)
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t task = 0; task < tasks; ++task) {
      Worker<T>& worker = workers[thread_number()];
      const int64_t index = b * tasks + task, begin = task * kBandsPerTask;
      double total = 0;
      if (p.grad) worker.start_task();
      for (int64_t band = begin; band < std::min(bands, begin + kBandsPerTask); ++band) {
        for (int64_t y = y_axis.first(band); y < y_axis.first(band + 1); ++y) total += worker.row(b, y);
        if (!p.grad) continue;
        if (band == begin)
          std::copy_n(worker.near(), row_size, first + index * row_size);
        else
          write_row(p.grad, b, band, worker.near(), worker.pitch());
        worker.next_band();
      }
      if (p.grad) std::copy_n(worker.near(), row_size, last + index * row_size);
      totals[index] = total;
    }
  }

  std::optional<int64_t> offender;
  for (const Worker<T>& worker : workers)
    if (worker.offender()) offender = std::min(*worker.offender(), offender.value_or(*worker.offender()));
  if (offender) refuse("labels", " where the weight is not 0", 0, classes - 1, *offender);
  double total = 0;
  for (const double part : totals) total += part;
  *loss.at<T>(0) = T(total);
  if (!p.grad) return;
  for (int64_t index = 0; index < batch * tasks; ++index) {
    T* row = first + index * row_size;
    if (index % tasks > 0) {
      const T* before = last + (index - 1) * row_size;
      for (int64_t i = 0; i < row_size; ++i) row[i] += before[i];
    }
    write_row(p.grad, index / tasks, index % tasks * kBandsPerTask, row, workers[0].pitch());
  }
}

}  // namespace

void pixel_loss(Tensor logits, OptionalTensor labels, OptionalTensor target, Tensor weight, Tensor pixels, Tensor loss,
                OptionalTensor grad, int threads) {
  const bool wide = pixels.dtype == DType::float64;
  (wide ? run<double> : run<float>)({logits, labels, target, weight, pixels, grad}, loss, threads);
}

}  // namespace corrmatch::CORRMATCH_ISA
