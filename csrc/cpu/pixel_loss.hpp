// Data of the losses of an image row: its pixels by cells of the grid, and gradients on the grid.
#pragma once

#include <algorithm>
#include <optional>

#include "bilinear.hpp"
#include "buffer.hpp"
#include "planes.hpp"

namespace corrmatch::CORRMATCH_ISA {

// The arguments of the op, without the sum of the losses.
struct PixelLoss {
  Tensor logits;
  OptionalTensor labels, target;
  Tensor weight, pixels;
  OptionalTensor grad;
  bool resize() const { return weight.size[2] != logits.size[2] || weight.size[3] != logits.size[3]; }
};

// The layout of the pixels of an image row. Place k of all cells is a line of `pitch` lanes. Lanes of cells with fewer
// pixels are empty.
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
  int64_t pitch() const { return pitch_; }
  const int32_t* lane() const { return lane_; }  // of each pixel

 private:
  const int64_t pitch_;
  int64_t count_ = 0;
  Buffer<int32_t> lane_;
};

// The loss of an image row and its inputs other than logits, by places.
template <class T>
class PixelRow {
 public:
  PixelRow(const PixelLoss& problem, const Axis<T>& x, int64_t pitch)
      : p_(problem),
        classes_(problem.logits.size[1]),
        places_(x, pitch),
        across_(places_.lanes()),
        weight_(places_.lanes()),
        label_(places_.lanes()),
        loss_(places_.lanes()) {
    for (int64_t i = 0; i < places_.lanes(); ++i) across_[i] = weight_[i] = 0, label_[i] = 0;
    for (int64_t px = 0; px < x.outputs(); ++px) across_[places_.lane()[px]] = x.weight()[px];
  }

  const Places<T>& places() const { return places_; }
  const T* across() const { return across_; }      // distance of each pixel from the grid column on its left
  const T* weight() const { return weight_; }      // 0 in empty lanes
  const Lane<T>* label() const { return label_; }  // 0 where the label is not a class
  T* loss() { return loss_; }

  // The least label of a counted pixel that is not a class.
  std::optional<int64_t> bad_label() const { return bad_label_; }

  // Reads row y of image b and clears the loss. Returns whether any pixel counts.
  bool read(int64_t b, int64_t y) {
    std::fill_n(static_cast<T*>(loss_), places_.lanes(), T(0));
    const bool any = read_weights(b, y);
    if (any && p_.labels) read_labels(b, y);
    return any;
  }

  // Writes the loss of each pixel and returns their sum.
  double write(int64_t b, int64_t y) const {
    double total = 0;
    T* out = p_.pixels.at<T>(0, b, y);
    for (int64_t x = 0; x < p_.weight.size[3]; ++x) {
      out[x] = loss_[places_.lane()[x]];
      total += out[x];
    }
    return total;
  }

 private:
  bool read_weights(int64_t b, int64_t y) {
    bool any = false;
    visit_floating(p_.weight.dtype, [&](auto zero) {
      const auto* row = p_.weight.at<const decltype(zero)>(0, b, y);
      for (int64_t x = 0; x < p_.weight.size[3]; ++x) {
        const T weight = T(widen(row[x * p_.weight.stride[3]]));
        weight_[places_.lane()[x]] = weight;
        any |= weight != 0;
      }
    });
    return any;
  }

  void read_labels(int64_t b, int64_t y) {
    visit_integer(p_.labels.dtype, [&](auto zero) {
      const auto* row = p_.labels.at<const decltype(zero)>(0, b, y);
      for (int64_t x = 0; x < p_.labels.size[3]; ++x) {
        const int64_t label = row[x * p_.labels.stride[3]], lane = places_.lane()[x];
        const bool known = label >= 0 && label < classes_;
        if (!known && weight_[lane] != 0) bad_label_ = std::min(label, bad_label_.value_or(label));
        label_[lane] = known ? Lane<T>(label) : 0;
      }
    });
  }

  const PixelLoss p_;
  const int64_t classes_;
  Places<T> places_;
  Buffer<T> across_, weight_;
  Buffer<Lane<T>> label_;
  Buffer<T> loss_;
  std::optional<int64_t> bad_label_;
};

// Gradients on the grid, (classes, pitch) each. Gradients of pixels are added to the grid columns on both sides, and at
// the end of an image row these are added to the grid rows above and below.
template <class T>
class GridGradient {
 public:
  GridGradient(int64_t classes, int64_t pitch)
      : pitch_(pitch), size_(classes * pitch), left_(size_), right_(size_), above_(size_), below_(size_) {}

  int64_t size() const { return size_; }
  T* above() { return above_; }  // of the grid row above the band, up to now

  void start_task() { clear(above_), clear(below_); }
  void start_row() { clear(left_), clear(right_); }
  void next_band() {
    std::swap(above_, below_);
    clear(below_);
  }

  // Adds the gradients of pixels of class c, `across` of the way between two grid columns.
  void add_between(int c, int64_t cell, Vec<T> gradient, Vec<T> across) {
    T *left = left_ + c * pitch_ + cell, *right = right_ + c * pitch_ + cell + 1;
    const Vec<T> part = gradient * across;
    store(left, load(left) + (gradient - part));
    store_unaligned(right, load_unaligned(right) + part);
  }

  // Adds the gradients of pixels that are grid points.
  void add_at(int c, int64_t cell, Vec<T> gradient) {
    T* here = above_ + c * pitch_ + cell;
    store(here, load(here) + gradient);
  }

  // Adds the gradients of the grid columns at an image row that is `down` of the way between two grid rows.
  void finish_row(T down) {
    T *left = left_, *right = right_, *above = above_, *below = below_;
    for (int64_t i = 0; i < size_; i += kLanes<T>) {
      const Vec<T> columns = load(left + i) + load(right + i), part = down * columns;
      store(above + i, load(above + i) + (columns - part));
      store(below + i, load(below + i) + part);
    }
  }

 private:
  void clear(T* line) const { std::fill_n(line, size_, T(0)); }

  const int64_t pitch_, size_;
  Buffer<T> left_, right_;   // of the pixels of the current image row, for the grid column on either side
  Buffer<T> above_, below_;  // of the grid rows above and below the current band, up to now
};

}  // namespace corrmatch::CORRMATCH_ISA
