// Losses of bilinearly enlarged logits, and their gradients on the small grid. Enlarged logits exist for one vector of
// pixels at a time.
//
// The lanes of a vector are neighbouring cells of the grid. A vector processes the pixels of its cells place by place:
// the first pixel of each cell, then the second of each. So for all sizes the grid points around the pixels, and their
// gradients, are contiguous vectors.
#include "pixel_loss.hpp"

#include <limits>
#include <optional>
#include <vector>

#include "checks.hpp"
#include "enlarged_rows.hpp"
#include "ops.hpp"
#include "parallel.hpp"

namespace corrmatch::CORRMATCH_ISA {
namespace {

inline constexpr int64_t kBandsPerTask = 4;  // a band is the image rows of one row of cells

// Exponentials of the logits of a vector of pixels, all classes.
template <class T>
class Softmax {
 public:
  explicit Softmax(int classes) : classes_(classes), values_(int64_t(classes) * kLanes<T>) {}

  Vec<T> operator[](int c) const { return load(values_ + c * kLanes<T>); }
  void set(int c, Vec<T> value) { store(values_ + c * kLanes<T>, value); }

  // Reads the logits around the pixels and returns the largest of each pixel. Logits may be any number where `counted`
  // is not set, and are replaced by 0 there. The maximum may ignore a NaN.
  template <bool Resize>
  Vec<T> gather(const T* line, int64_t pitch, Vec<T> across, Int<T> counted) {
    Vec<T> largest = splat(-std::numeric_limits<T>::infinity());
    for (int c = 0; c < classes_; ++c, line += pitch) {
      Vec<T> value = load(line);
      if constexpr (Resize) value = lerp(value, load_unaligned(line + 1), across);
      value = counted ? value : Vec<T>{};
      largest = value > largest ? value : largest;
      set(c, value);
    }
    return largest;
  }

 private:
  const int classes_;
  Buffer<T> values_;
};

// The loss of image rows: the state of one thread.
template <class T>
class RowLoss {
 public:
  RowLoss(const PixelLoss& problem, const Axis<T>& y, const Axis<T>& x)
      : p_(problem),
        y_(y),
        classes_(int(problem.logits.size[1])),
        rows_(problem.logits, y, problem.resize()),
        pitch_(rows_.pitch()),
        pixels_(problem, x, pitch_),
        gradient_(classes_, pitch_),
        softmax_(classes_),
        target_softmax_(problem.target ? classes_ : 0) {
    if (problem.target) target_rows_.emplace(problem.target, y, problem.resize());
    constexpr Sweep sweeps[2][2] = {{&RowLoss::sweep<false, false>, &RowLoss::sweep<false, true>},
                                    {&RowLoss::sweep<true, false>, &RowLoss::sweep<true, true>}};
    sweep_ = sweeps[problem.resize()][bool(problem.target)];
  }

  GridGradient<T>& gradient() { return gradient_; }
  std::optional<int64_t> bad_label() const { return pixels_.bad_label(); }

  // Returns the summed loss of row y of image b, writes the loss of its pixels and adds its gradient.
  double row(int64_t b, int64_t y) {
    if (pixels_.read(b, y)) {
      const bool between_rows = p_.grad && p_.resize();
      if (between_rows) gradient_.start_row();
      (this->*sweep_)(b, y);
      if (between_rows) gradient_.finish_row(y_.weight()[y]);
    }
    return pixels_.write(b, y);
  }

 private:
  using Sweep = void (RowLoss::*)(int64_t, int64_t);

  template <bool Resize, bool Divergence>
  void sweep(int64_t b, int64_t y) {
    const T *line = rows_.at(b, y), *target = Divergence ? target_rows_->at(b, y) : nullptr;
    const int64_t cells = p_.logits.size[3];
    for (int64_t cell = 0; cell < cells; cell += kLanes<T>) {
      for (int64_t place = 0; place < pixels_.places().count(); ++place) {
        const int64_t at = place * pitch_ + cell;
        bool any = false;
        for (int i = 0; i < kLanes<T>; ++i) any |= pixels_.weight()[at + i] != 0;
        if (!any) continue;
        if constexpr (Divergence)
          divergence<Resize>(line + cell, target + cell, cell, at);
        else
          cross_entropy<Resize>(line + cell, cell, at);
      }
    }
  }

  template <bool Resize>
  void cross_entropy(const T* line, int64_t cell, int64_t at) {
    const Vec<T> weight = load(pixels_.weight() + at), across = load(pixels_.across() + at);
    const Int<T> counted = weight != 0, label = load_lanes<T>(pixels_.label() + at);
    const Vec<T> largest = softmax_.template gather<Resize>(line, pitch_, across, counted);
    Vec<T> sum{}, chosen{};
    for (int c = 0; c < classes_; ++c) {
      const Vec<T> shifted = softmax_[c] - largest, e = exp<T>(shifted);
      chosen = label == c ? shifted : chosen;
      sum += e;
      softmax_.set(c, e);
    }
    store(pixels_.loss() + at, counted ? weight * (log<T>(sum) - chosen) : Vec<T>{});
    if (!p_.grad) return;
    const Vec<T> share = weight / sum;
    for (int c = 0; c < classes_; ++c) {
      const Vec<T> e = softmax_[c];
      add<Resize>(c, cell, share * (label == c ? e - sum : e), across);  // e - sum is exactly 0 where P is 1
    }
  }

  template <bool Resize>
  void divergence(const T* line, const T* target, int64_t cell, int64_t at) {
    const Vec<T> weight = load(pixels_.weight() + at), across = load(pixels_.across() + at);
    const Int<T> counted = weight != 0;
    const Vec<T> largest = softmax_.template gather<Resize>(line, pitch_, across, counted);
    const Vec<T> target_largest = target_softmax_.template gather<Resize>(target, pitch_, across, counted);
    Vec<T> sum{}, target_sum{}, difference{};
    for (int c = 0; c < classes_; ++c) {
      const Vec<T> shifted = softmax_[c] - largest, target_shifted = target_softmax_[c] - target_largest;
      const Vec<T> e = exp<T>(shifted), q = exp<T>(target_shifted);
      difference += q == 0 ? Vec<T>{} : q * (target_shifted - shifted);
      sum += e;
      target_sum += q;
      softmax_.set(c, e);
      target_softmax_.set(c, q);
    }
    const Vec<T> loss = difference / target_sum + log<T>(sum) - log<T>(target_sum);
    store(pixels_.loss() + at, counted ? weight * loss : Vec<T>{});
    if (!p_.grad) return;
    const Vec<T> share = weight / sum, target_share = weight / target_sum;
    for (int c = 0; c < classes_; ++c)
      add<Resize>(c, cell, share * softmax_[c] - target_share * target_softmax_[c], across);
  }

  template <bool Resize>
  void add(int c, int64_t cell, Vec<T> gradient, Vec<T> across) {
    if constexpr (Resize)
      gradient_.add_between(c, cell, gradient, across);
    else
      gradient_.add_at(c, cell, gradient);
  }

  const PixelLoss p_;
  const Axis<T>& y_;
  const int classes_;
  EnlargedRows<T> rows_;
  std::optional<EnlargedRows<T>> target_rows_;
  const int64_t pitch_;
  PixelRow<T> pixels_;
  GridGradient<T> gradient_;
  Softmax<T> softmax_, target_softmax_;
  Sweep sweep_;
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
void run(const PixelLoss& p, const Tensor& loss, int threads) {
  const int64_t batch = p.logits.size[0], bands = p.logits.size[2];
  const int64_t tasks = (bands + kBandsPerTask - 1) / kBandsPerTask;
  const Axis<T> y_axis(bands, p.weight.size[2]), x_axis(p.logits.size[3], p.weight.size[3]);
  std::vector<RowLoss<T>> losses;
  losses.reserve(threads);
  for (int i = 0; i < threads; ++i) losses.emplace_back(p, y_axis, x_axis);

  // Grid rows that two tasks share: the first row of each task, and the row after its last.
  const int64_t row_size = losses[0].gradient().size(), pitch = row_size / p.logits.size[1];
  Buffer<T> first(p.grad ? batch * tasks * row_size : 0), last(p.grad ? batch * tasks * row_size : 0);
  std::vector<double> totals(batch * tasks);

#pragma omp parallel for num_threads(threads) schedule(dynamic) collapse(2)
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t task = 0; task < tasks; ++task) {
      RowLoss<T>& row_loss = losses[thread_number()];
      GridGradient<T>& gradient = row_loss.gradient();
      const int64_t index = b * tasks + task, begin = task * kBandsPerTask;
      double total = 0;
      if (p.grad) gradient.start_task();
      for (int64_t band = begin; band < std::min(bands, begin + kBandsPerTask); ++band) {
        for (int64_t y = y_axis.first(band); y < y_axis.first(band + 1); ++y) total += row_loss.row(b, y);
        if (!p.grad) continue;
        if (band == begin)
          std::copy_n(gradient.above(), row_size, first + index * row_size);
        else
          write_row(p.grad, b, band, gradient.above(), pitch);
        gradient.next_band();
      }
      if (p.grad) std::copy_n(gradient.above(), row_size, last + index * row_size);
      totals[index] = total;
    }
  }

  std::optional<int64_t> bad_label;
  for (const RowLoss<T>& row_loss : losses)
    if (const auto found = row_loss.bad_label()) bad_label = std::min(*found, bad_label.value_or(*found));
  if (bad_label) refuse("labels", " where the weight is not 0", 0, p.logits.size[1] - 1, *bad_label);
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
    write_row(p.grad, index / tasks, index % tasks * kBandsPerTask, row, pitch);
  }
}

}  // namespace

void pixel_loss(Tensor logits, OptionalTensor labels, OptionalTensor target, Tensor weight, Tensor pixels, Tensor loss,
                OptionalTensor grad, int threads) {
  const bool wide = pixels.dtype == DType::float64;
  (wide ? run<double> : run<float>)({logits, labels, target, weight, pixels, grad}, loss, threads);
}

}  // namespace corrmatch::CORRMATCH_ISA
