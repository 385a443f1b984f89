// Labels and flags of an image as bit maps: one for each flag, and one for each bit of the labels.
#pragma once

#include <algorithm>

#include "../tensor.hpp"
#include "bits.hpp"

namespace corrmatch::CORRMATCH_ISA {

// Each map has `words` words.
struct LabelMaps {
  uint64_t* valid;
  uint64_t* counted;  // valid, and reliable before the first mask
  uint64_t* claimed;  // in an accepted region
  uint64_t* planes;   // (planes, words): bits of the labels; only counted and claimed pixels hold anything of use
  int64_t words;
  int planes_count;

  uint64_t* plane(int i) const { return planes + i * words; }
};

// Whether a label was out of range, and its value.
struct BadLabel {
  bool found = false;
  int64_t value = 0;
};

// Pixels p..p+n-1 of an image, counted in raster order.
template <class T>
void read_pixels(const Tensor& t, int64_t image, int64_t p, int64_t n, T* out) {
  const int64_t width = t.size[3];
  for (int64_t y = p / width, x = p % width; n > 0; ++y, x = 0) {
    const int64_t count = std::min(n, width - x);
    const T* in = t.at<const T>(0, image, y, x);
    if (t.stride[3] == 1)
      std::copy_n(in, count, out);
    else
      for (int64_t i = 0; i < count; ++i) out[i] = in[i * t.stride[3]];
    out += count;
    n -= count;
  }
}

inline uint64_t truth(const uint8_t* flags) {
  return word_of([=](int i) { return flags[i] != 0; });
}

// Writes the bits of 64 labels into word i of the planes.
template <class T>
void pack_labels(const T* labels, int64_t i, const LabelMaps& maps) {
  for (int low = 0; low < maps.planes_count; low += 8) {
    alignas(64) uint8_t bytes[kWordBits];
    for (int x = 0; x < kWordBits; ++x) bytes[x] = uint8_t(labels[x] >> low);
    for (int bit = 7; bit >= 0; --bit) {
      if (low + bit < maps.planes_count) maps.plane(low + bit)[i] = top_bits(bytes);
      for (int x = 0; x < kWordBits; ++x) bytes[x] = uint8_t(bytes[x] + bytes[x]);
    }
  }
}

inline constexpr int64_t kChunk = 2048;  // pixels that are packed at once

// Copies n <= kChunk pixels, beginning at p (a multiple of 64), to the outputs and packs them.
template <class T>
BadLabel pack_chunk(const Tensor& labels, const Tensor& reliable, const OptionalTensor& valid, int64_t b, int64_t p,
                    int64_t n, T largest, T* out_labels, uint8_t* out_reliable, const LabelMaps& maps) {
  alignas(64) uint8_t valid_pixels[kChunk] = {};
  read_pixels(labels, b, p, n, out_labels);
  read_pixels(reliable, b, p, n, out_reliable);
  if (valid) read_pixels(valid, b, p, n, valid_pixels);

  BadLabel first_bad;
  for (int64_t x = 0; x < n; x += kWordBits) {
    const int64_t i = (p + x) / kWordBits;
    const T* label = out_labels + x;
    const uint8_t* flags = out_reliable + x;
    T last_labels[kWordBits] = {};
    uint8_t last_flags[kWordBits] = {};
    if (n - x < kWordBits) {
      label = std::copy_n(label, n - x, last_labels) - (n - x);
      flags = std::copy_n(flags, n - x, last_flags) - (n - x);
    }
    maps.valid[i] = low_bits(n - x);
    if (valid) maps.valid[i] &= truth(valid_pixels + x);
    maps.counted[i] = maps.valid[i] & truth(flags);
    maps.claimed[i] = 0;
    pack_labels(label, i, maps);
    const uint64_t bad = maps.counted[i] & word_of([=](int k) { return label[k] < 0 || label[k] > largest; });
    if (bad && !first_bad.found) [[unlikely]]
      first_bad = {true, int64_t(label[std::countr_zero(bad)])};
  }
  return first_bad;
}

// Writes the labels of the claimed pixels of word i, class by class.
template <class T>
void unpack_word(const LabelMaps& maps, int64_t i, T* labels, uint8_t* reliable) {
  uint64_t left = maps.claimed[i];
  while (left != 0) {
    const int pixel = std::countr_zero(left);
    int64_t label = 0;
    uint64_t same = left;
    for (int k = 0; k < maps.planes_count; ++k) {
      const uint64_t bits = maps.plane(k)[i], bit = bits >> pixel & 1;
      label |= int64_t(bit) << k;
      same &= bits ^ (bit - 1);
    }
    for_each_run(same, [&](int begin, int end) {
      std::fill(labels + begin, labels + end, T(label));
      std::fill(reliable + begin, reliable + end, uint8_t(1));
    });
    left &= ~same;
  }
}

}  // namespace corrmatch::CORRMATCH_ISA
