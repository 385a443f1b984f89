// Connected components by runs. A row becomes two bit maps: pixels that belong to a component, and first pixels of its
// runs. The number of a run is the rank of its first pixel. Bit operations on 64 pixels at a time find contacts between
// runs of neighbouring rows, and each contact unites two runs. Besides the result this takes two bits and at most four
// bytes a pixel; the bytes are touched only where there are runs.
#include <algorithm>
#include <vector>

#include "bits.hpp"
#include "buffer.hpp"
#include "ops.hpp"
#include "parallel.hpp"
#include "runs.hpp"

namespace corrmatch::CORRMATCH_ISA {
namespace {

// Values are only compared for equality, so elements are read as unsigned integers of their size.
struct Image {
  Tensor tensor;
  int64_t height, width, words;  // words of a row's bit map
  bool has_background;
  uint64_t background;
};

// Bit maps of rows and the sets of all runs of one image.
struct Runs {
  uint64_t* first;   // (height, words)
  uint64_t* member;  // (height, words)
  int32_t* number;   // (height): number of the row's first run
  DisjointSets sets;
};

// Rows y0..y1-1. Their runs are numbered from y0 * width on: numbers ascend over the image, with gaps.
struct Strip {
  int64_t image, y0, y1;
  int32_t begin, end;  // numbers of its runs
};

// Copies of two rows, padded so that whole words and the left neighbour of the first pixel can be read.
template <class T>
class RowPair {
 public:
  explicit RowPair(int64_t width) : pitch_((words_for(width) + 1) * kWordBits), rows_(2 * pitch_) {
    std::fill_n(static_cast<T*>(rows_), 2 * pitch_, T(0));
  }
  const T* row(int64_t y) const { return rows_ + (y % 2) * pitch_ + kWordBits; }

  void read(const Tensor& image, int64_t b, int64_t y) {
    const T* in = image.at<const T>(0, b, y);
    T* out = rows_ + (y % 2) * pitch_ + kWordBits;
    if (image.stride[3] == 1)
      std::copy_n(in, image.size[3], out);
    else
      for (int64_t x = 0; x < image.size[3]; ++x) out[x] = in[x * image.stride[3]];
  }

 private:
  int64_t pitch_;
  Buffer<T> rows_;
};

// Fills the bit maps of row y and returns its number of runs.
template <class T>
int32_t find_runs(const Image& image, const T* row, uint64_t* first, uint64_t* member) {
  const T background = T(image.background);
  int32_t count = 0;
  for (int64_t i = 0; i < image.words; ++i, row += kWordBits) {
    const uint64_t start = i == 0;  // the first pixel begins a run for any padding before it
    member[i] = low_bits(image.width - i * kWordBits);
    if (image.has_background) member[i] &= word_of([&](int x) { return row[x] != background; });
    first[i] = member[i] & (start | word_of([&](int x) { return row[x] != row[x - 1]; }));
    count += popcount(first[i]);
  }
  return count;
}

// Unites the runs of row y with the runs of the row above that they touch.
template <class T>
void link_to_row_above(const Image& image, int64_t y, const T* row, const T* above, bool diagonal, Runs& runs) {
  const uint64_t *first = runs.first + y * image.words, *first_above = first - image.words;
  const uint64_t* member = runs.member + y * image.words;
  int32_t number = runs.number[y] - 1, number_above = runs.number[y - 1] - 1;  // of the last run before this word
  uint64_t carry = 0;
  for (int64_t i = 0; i < image.words; ++i, row += kWordBits, above += kWordBits) {
    const uint64_t starts = first[i], starts_above = first_above[i];
    const auto run_at = [=](int x) { return number + popcount(starts & low_bits(x + 1)); };
    const auto run_before = [=](int x) { return number + popcount(starts & low_bits(x)); };
    const auto run_above = [=](int x) { return number_above + popcount(starts_above & low_bits(x + 1)); };
    const auto run_above_before = [=](int x) { return number_above + popcount(starts_above & low_bits(x)); };

    // A contact of two runs is a segment of equal pixels, represented by its first pixel.
    const uint64_t same = member[i] & word_of([&](int x) { return row[x] == above[x]; });
    const uint64_t continued = (same << 1 | carry) & ~starts;
    for_each_bit(same & ~continued, [&](int x) { runs.sets.unite(run_at(x), run_above(x)); });
    carry = same >> (kWordBits - 1);

    if (diagonal) {
      // A diagonal contact is new only where a run begins and has no contact straight above or below.
      const uint64_t inner = ~(same | uint64_t(i == 0));
      uint64_t falling = starts & inner, rising = starts_above & inner;
      if (falling) falling &= word_of([&](int x) { return row[x] == above[x - 1]; });
      if (rising) rising &= word_of([&](int x) { return above[x] == row[x - 1]; });
      for_each_bit(falling, [&](int x) { runs.sets.unite(run_at(x), run_above_before(x)); });
      for_each_bit(rising, [&](int x) { runs.sets.unite(run_before(x), run_above(x)); });
    }
    number += popcount(starts);
    number_above += popcount(starts_above);
  }
}

template <class T>
void scan_strip(const Image& image, bool diagonal, RowPair<T>& rows, Strip& strip, Runs& runs) {
  strip.begin = strip.end = int32_t(strip.y0 * image.width);
  for (int64_t y = strip.y0; y < strip.y1; ++y) {
    rows.read(image.tensor, strip.image, y);
    runs.number[y] = strip.end;
    strip.end += find_runs(image, rows.row(y), runs.first + y * image.words, runs.member + y * image.words);
    for (int32_t run = runs.number[y]; run < strip.end; ++run) runs.sets.add(run);
    if (y > strip.y0) link_to_row_above(image, y, rows.row(y), rows.row(y - 1), diagonal, runs);
  }
}

// Joins the strips of an image and turns run numbers into labels.
template <class T>
void label_runs(const Image& image, bool diagonal, RowPair<T>& rows, const Strip* strips, int64_t count, Runs& runs) {
  for (const Strip* strip = strips + 1; strip < strips + count; ++strip) {
    rows.read(image.tensor, strip->image, strip->y0 - 1);
    rows.read(image.tensor, strip->image, strip->y0);
    link_to_row_above(image, strip->y0, rows.row(strip->y0), rows.row(strip->y0 - 1), diagonal, runs);
  }
  int32_t label = 1;
  for (const Strip* strip = strips; strip < strips + count; ++strip)
    label = runs.sets.label_members(strip->begin, strip->end, label);
}

// out[begin..end) = label. Pixels after `end` are overwritten later, so short segments may write a whole block.
inline void fill_segment(int32_t* out, int64_t begin, int64_t end, int64_t width, int32_t label) {
  constexpr int64_t block = 8;
  if (begin + block <= width) {
    std::fill_n(out + begin, block, label);
    begin += block;
  }
  if (begin < end) std::fill(out + begin, out + end, label);
}

void write_labels(const Image& image, const uint64_t* first, const uint64_t* member, const int32_t* labels,
                  int32_t* out) {
  int32_t label = 0;
  int64_t begin = 0;
  uint64_t carry = 0;
  for (int64_t i = 0; i < image.words; ++i) {
    const uint64_t ends = ~member[i] & (member[i] << 1 | carry);
    carry = member[i] >> (kWordBits - 1);
    for_each_bit(first[i] | ends, [&](int bit) {
      const int64_t x = i * kWordBits + bit;
      if (x >= image.width) return;  // the end of a run that reaches the edge of the image
      fill_segment(out, begin, x, image.width, label);
      begin = x;
      label = member[i] >> bit & 1 ? *labels++ : 0;
    });
  }
  fill_segment(out, begin, image.width, image.width, label);
}

// Strips of at least 32 rows, enough to keep all threads busy.
std::vector<Strip> cut(int64_t images, int64_t height, int threads) {
  const int64_t wanted = (threads + images - 1) / images;
  const int64_t count = std::clamp<int64_t>(height / 32, 1, wanted);
  std::vector<Strip> strips;
  for (int64_t b = 0; b < images; ++b)
    for (int64_t i = 0; i < count; ++i) strips.push_back({b, height * i / count, height * (i + 1) / count, 0, 0});
  return strips;
}

template <class T>
void label_image(const Image& image, bool diagonal, const Tensor& out, int threads) {
  const int64_t images = image.tensor.size[1], height = image.height, map = height * image.words;
  std::vector<Strip> strips = cut(images, height, threads);
  const int64_t per_image = int64_t(strips.size()) / images;
  std::vector<RowPair<T>> rows;
  for (int i = 0; i < threads; ++i) rows.emplace_back(image.width);
  Buffer<uint64_t> first(images * map), member(images * map);
  Buffer<int32_t> numbers(images * height), sets(images * height * image.width);
  const auto runs_of = [&](int64_t b) {
    return Runs{first + b * map, member + b * map, numbers + b * height, DisjointSets(sets + b * height * image.width)};
  };

#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic)
    for (Strip& strip : strips) {
      Runs runs = runs_of(strip.image);
      scan_strip(image, diagonal, rows[thread_number()], strip, runs);
    }
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < images; ++b) {
      Runs runs = runs_of(b);
      label_runs(image, diagonal, rows[thread_number()], strips.data() + b * per_image, per_image, runs);
    }
#pragma omp for schedule(dynamic)
    for (const Strip& strip : strips) {
      const Runs runs = runs_of(strip.image);
      const int32_t* labels = sets + strip.image * height * image.width;
      for (int64_t y = strip.y0; y < strip.y1; ++y)
        write_labels(image, runs.first + y * image.words, runs.member + y * image.words, labels + runs.number[y],
                     out.at<int32_t>(0, strip.image, y));
    }
  }
}

}  // namespace

void connected_components(Tensor image, int connectivity, int64_t background, Tensor out, int threads) {
  const int64_t height = image.size[2], width = image.size[3];
  const Image input{
      image, height, width, words_for(width), representable(image.dtype, background), uint64_t(background)};
  const bool diagonal = connectivity == 8;
  switch (image.dtype) {
    case DType::int16:
      return label_image<uint16_t>(input, diagonal, out, threads);
    case DType::int32:
      return label_image<uint32_t>(input, diagonal, out, threads);
    case DType::int64:
      return label_image<uint64_t>(input, diagonal, out, threads);
    default:
      return label_image<uint8_t>(input, diagonal, out, threads);
  }
}

}  // namespace corrmatch::CORRMATCH_ISA
