// Rows of a map on a small grid, enlarged to image rows vertically only, all channels at a time.
#pragma once

#include <algorithm>

#include "bilinear.hpp"
#include "planes.hpp"

namespace corrmatch::CORRMATCH_ISA {

// A row is a (channels, pitch) array. The last column is repeated behind the end, so reading beyond it is harmless.
template <class T>
class EnlargedRows {
 public:
  // Without `resize` the rows of the image are the rows of the map.
  EnlargedRows(const Tensor& map, const Axis<T>& y, bool resize)
      : map_(map),
        y_(y),
        resize_(resize),
        pitch_((map.size[3] / 16 + 2) * 16),
        upper_(map.size[1] * pitch_),
        lower_(resize ? map.size[1] * pitch_ : 0),
        line_(resize ? map.size[1] * pitch_ : 0) {}

  int64_t pitch() const { return pitch_; }

  // Returns row y of image b, which is valid until the next call.
  const T* at(int64_t b, int64_t y) {
    if (!resize_) return read(b, y, upper_);
    const int64_t low = y_.low()[y];
    if (b != loaded_image_ || low != loaded_row_) {
      read(b, low, upper_);
      read(b, y_.high(y), lower_);
      loaded_image_ = b;
      loaded_row_ = low;
    }
    const T weight = y_.weight()[y];
    const T *upper = upper_, *lower = lower_;
    T* line = line_;
    for (int64_t i = 0; i < map_.size[1] * pitch_; i += kLanes<T>)
      store(line + i, lerp(load(upper + i), load(lower + i), weight));
    return line_;
  }

 private:
  const T* read(int64_t b, int64_t y, T* out) const {
    Tensor row = map_;
    row.size[2] = 1;
    for (int64_t c = 0; c < map_.size[1]; ++c) {
      visit_floating(map_.dtype, [&](auto zero) { row.data = map_.at<decltype(zero)>(b, c, y); });
      T* channel = out + c * pitch_;
      read_plane(row, 0, 0, channel);
      std::fill(channel + map_.size[3], channel + pitch_, channel[map_.size[3] - 1]);
    }
    return out;
  }

  const Tensor map_;
  const Axis<T>& y_;
  const bool resize_;
  const int64_t pitch_;
  Buffer<T> upper_, lower_;  // the map's rows around the current one
  Buffer<T> line_;           // their mixture
  int64_t loaded_image_ = -1, loaded_row_ = -1;
};

}  // namespace corrmatch::CORRMATCH_ISA
