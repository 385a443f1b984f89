// Region propagation on bit maps. An image has one bit map for reliable and valid pixels and one for each bit of its
// labels. So the labels inside a mask are counted by intersections and population counts.
#include <algorithm>
#include <limits>
#include <vector>

#include "bits.hpp"
#include "buffer.hpp"
#include "checks.hpp"
#include "label_maps.hpp"
#include "ops.hpp"
#include "parallel.hpp"

namespace corrmatch::CORRMATCH_ISA {
namespace {

// A mask: its pixels R = mask & valid, and the pixels Q of R that are counted.
struct Region {
  const int32_t* mask;
  int64_t mask_words;  // of 32 bits
  int64_t begin, end;  // the 64-bit words that hold all of Q and R
  int64_t area, counted;

  uint64_t word(int64_t i) const {
    uint64_t bits = 0;
    std::memcpy(&bits, mask + 2 * i, 2 * i + 1 < mask_words ? 8 : 4);
    return bits;
  }

  // Calls f(i, word i) for all words. The loop over whole words has no branch.
  template <class F>
  void for_each_word(F&& f) const {
    int64_t i = begin;
    const int64_t whole = std::min(end, mask_words / 2);
#pragma GCC unroll 4
    for (; i < whole; ++i) {
      uint64_t word;
      std::memcpy(&word, mask + 2 * i, 8);
      f(i, word);
    }
    for (; i < end; ++i) f(i, word(i));
  }
};

Region measure(const LabelMaps& maps, const int32_t* mask, int64_t mask_words) {
  Region region{mask, mask_words, 0, maps.words, 0, 0};
  while (region.begin < region.end && region.word(region.begin) == 0) ++region.begin;
  while (region.begin < region.end && region.word(region.end - 1) == 0) --region.end;
  const uint64_t *valid = maps.valid, *counted = maps.counted;
  int64_t area = 0, votes = 0;
  region.for_each_word([&](int64_t i, uint64_t word) {
    area += popcount(word & valid[i]);
    votes += popcount(word & counted[i]);
  });
  region.area = area;
  region.counted = votes;
  return region;
}

// Processes the masks of an image in order: a later mask sees the labels that earlier ones wrote.
class Propagation {
 public:
  Propagation(const LabelMaps& maps, float threshold)
      : maps_(maps), threshold_(threshold), members_((maps.planes_count + 1) * maps.words) {}

  void run(const Region* regions, int64_t count) {
    for (region_ = regions; region_ < regions + count; ++region_) {
      if (region_->counted == 0 || float(region_->counted) / float(region_->area) < threshold_) continue;
      const int64_t label = elect();
      if (label >= 0) claim(label);
    }
  }

 private:
  int64_t words() const { return region_->end - region_->begin; }
  uint64_t* plane(int i) const { return maps_.plane(i) + region_->begin; }
  uint64_t* members(int depth) { return members_ + depth * maps_.words; }
  bool passes(int64_t count) const { return float(count) / float(region_->counted) > threshold_; }

  // out = words of the region & map.
  void intersect(const uint64_t* map, uint64_t* out) const {
    region_->for_each_word([=, begin = region_->begin](int64_t i, uint64_t word) { out[i - begin] = word & map[i]; });
  }

  int64_t count_ones(const uint64_t* members, const uint64_t* plane) const {
    const int64_t n = words();
    int64_t count = 0;
#pragma GCC unroll 8
    for (int64_t i = 0; i < n; ++i) count += popcount(members[i] & plane[i]);
    return count;
  }

  // The most frequent class of Q if its share of Q exceeds the threshold, otherwise -1.
  int64_t elect() {
    uint64_t* all = members(maps_.planes_count);
    intersect(maps_.counted, all);
    if (threshold_ >= 0.5f) return majority(all);
    winner_ = -1;
    most_ = 0;
    split(maps_.planes_count, region_->counted, 0);
    return winner_;
  }

  // A class with more than half of Q has the majority in every plane.
  int64_t majority(const uint64_t* members) const {
    int64_t candidate = 0, dissent = 0;  // at most `dissent` pixels of Q have another class
    for (int i = 0; i < maps_.planes_count; ++i) {
      const int64_t ones = count_ones(members, plane(i)), most = std::max(ones, region_->counted - ones);
      if (!passes(most)) return -1;
      candidate |= int64_t(most == ones) << i;
      dissent += region_->counted - most;
    }
    if (passes(region_->counted - dissent)) return candidate;
    return passes(count_class(members, candidate)) ? candidate : -1;
  }

  int64_t count_class(const uint64_t* members, int64_t candidate) const {
    int64_t count = 0;
    for (int64_t i = 0, n = words(); i < n; ++i) {
      uint64_t word = members[i];
      for (int k = 0; k < maps_.planes_count; ++k) word &= plane(k)[i] ^ ((candidate >> k & 1) - 1);
      count += popcount(word);
    }
    return count;
  }

  // Exact counts: the members at `depth` share the bits of `prefix` from `depth` on. Lower classes come first and win
  // ties, so a branch with no more pixels than the best class up to now is cut off.
  void split(int depth, int64_t count, int64_t prefix) {
    if (count <= most_ || !passes(count)) return;
    if (depth == 0) {
      most_ = count;
      winner_ = prefix;
      return;
    }
    const uint64_t *all = members(depth), *bits = plane(depth - 1);
    uint64_t* half = members(depth - 1);
    const int64_t n = words(), ones = count_ones(all, bits);
    for (int64_t i = 0; i < n; ++i) half[i] = all[i] & ~bits[i];
    split(depth - 1, count - ones, prefix);
    for (int64_t i = 0; i < n; ++i) half[i] = all[i] & bits[i];
    split(depth - 1, ones, prefix | int64_t(1) << (depth - 1));
  }

  void claim(int64_t label) {
    uint64_t *pixels = members(0), *claimed = maps_.claimed + region_->begin;
    const int64_t n = words();
    intersect(maps_.valid, pixels);
    for (int64_t i = 0; i < n; ++i) claimed[i] |= pixels[i];
    for (int k = 0; k < maps_.planes_count; ++k) {
      uint64_t* bits = plane(k);
      if (label >> k & 1)
        for (int64_t i = 0; i < n; ++i) bits[i] |= pixels[i];
      else
        for (int64_t i = 0; i < n; ++i) bits[i] &= ~pixels[i];
    }
  }

  const LabelMaps& maps_;
  const float threshold_;
  Buffer<uint64_t> members_;  // (planes + 1, words): pixels of the region, down the levels of `split`
  const Region* region_ = nullptr;
  int64_t winner_ = -1, most_ = 0;
};

// The masks with contiguous words. They are copied only if their words are not contiguous.
class PackedMasks {
 public:
  explicit PackedMasks(const Tensor& packed) : packed_(packed), copy_(packed.stride[3] == 1 ? 0 : total(packed)) {
    if (packed.stride[3] == 1) return;
    const auto& size = packed.size;
    int32_t* out = copy_;
    for (int64_t b = 0; b < size[1]; ++b)
      for (int64_t k = 0; k < size[2]; ++k)
        for (int64_t i = 0; i < size[3]; ++i) *out++ = *packed.at<const int32_t>(0, b, k, i);
    packed_.data = static_cast<int32_t*>(copy_);
    packed_.stride = {0, size[2] * size[3], size[3], 1};
  }
  const int32_t* at(int64_t b, int64_t k) const { return packed_.at<const int32_t>(0, b, k); }

 private:
  static int64_t total(const Tensor& t) { return t.size[1] * t.size[2] * t.size[3]; }
  Tensor packed_;
  Buffer<int32_t> copy_;
};

template <class T>
void run(const Tensor& labels, const Tensor& reliable, const Tensor& packed, float threshold,
         const OptionalTensor& valid, int64_t num_classes, const Tensor& out_labels, const Tensor& out_reliable,
         int threads) {
  const int64_t batch = labels.size[1], pixels = labels.size[2] * labels.size[3], masks = packed.size[2];
  const int64_t words = words_for(pixels), chunks = (pixels + kChunk - 1) / kChunk;
  const int64_t largest = std::min<int64_t>(num_classes - 1, std::numeric_limits<T>::max());
  const int planes = std::max(1, int(std::bit_width(uint64_t(largest))));
  const PackedMasks packed_masks(packed);
  Buffer<uint64_t> maps(batch * (3 + planes) * words);
  std::vector<LabelMaps> images;
  std::vector<Propagation> propagations;
  images.reserve(batch);
  propagations.reserve(batch);
  for (int64_t b = 0; b < batch; ++b) {
    uint64_t* map = maps + b * (3 + planes) * words;
    images.push_back({map, map + words, map + 2 * words, map + 3 * words, words, planes});
    propagations.emplace_back(images[b], threshold);
  }

  std::vector<BadLabel> bad_labels(batch * chunks);
#pragma omp parallel for num_threads(threads) schedule(dynamic) collapse(2)
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t p = chunk * kChunk;
      bad_labels[b * chunks + chunk] =
          pack_chunk(labels, reliable, valid, b, p, std::min(kChunk, pixels - p), T(largest),
                     out_labels.at<T>(0, b) + p, out_reliable.at<uint8_t>(0, b) + p, images[b]);
    }
  }
  for (const BadLabel& bad : bad_labels)
    if (bad.found) refuse("labels", " where reliable", 0, num_classes - 1, bad.value);

  std::vector<Region> regions(batch * masks);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic) collapse(2)
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t k = 0; k < masks; ++k)
        regions[b * masks + k] = measure(images[b], packed_masks.at(b, k), packed.size[3]);
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < batch; ++b) propagations[b].run(regions.data() + b * masks, masks);
#pragma omp for schedule(static) collapse(2)
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t i = 0; i < words; ++i)
        unpack_word(images[b], i, out_labels.at<T>(0, b) + i * kWordBits,
                    out_reliable.at<uint8_t>(0, b) + i * kWordBits);
  }
}

}  // namespace

void region_propagate(Tensor labels, Tensor reliable, Tensor packed, Tensor threshold, OptionalTensor valid,
                      int64_t num_classes, Tensor out_labels, Tensor out_reliable, int threads) {
  visit_integer(labels.dtype, [&](auto zero) {
    run<decltype(zero)>(labels, reliable, packed, float(*threshold.at<const double>(0)), valid, num_classes, out_labels,
                        out_reliable, threads);
  });
}

}  // namespace corrmatch::CORRMATCH_ISA
