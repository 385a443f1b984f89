// Region masks: a block computes one row of the correlation map on the small key grid, and enlarges, cuts and packs it.
// So no row and no mask in floating point is stored in global memory. An exception is a row that is too long for shared
// memory: it is stored in scratch memory of the block, and each block then computes many masks.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <type_traits>

#include "bilinear.cuh"
#include "flood.cuh"
#include "launch.cuh"

namespace corrmatch::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kBlocksInScratch = 4;  // of a multiprocessor, if rows are stored in global memory

// A map of some floating dtype, (batch, channels, height, width).
template <class T>
struct Map {
  const T* data;
  int64_t stride_b, stride_c, stride_y, stride_x;

  explicit Map(const Tensor& t)
      : data(t.at<const T>(0)),
        stride_b(t.stride[0]),
        stride_c(t.stride[1]),
        stride_y(t.stride[2]),
        stride_x(t.stride[3]) {}
  __device__ int64_t offset(int64_t b, int64_t y, int64_t x) const {
    return b * stride_b + y * stride_y + x * stride_x;
  }
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(Half x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ float widen(BFloat16 x) { return __bfloat162float(__ushort_as_bfloat16(x.bits)); }

__device__ inline float load(const void* data, int64_t offset, DType dtype) {
  if (dtype == DType::float32) return static_cast<const float*>(data)[offset];
  if (dtype == DType::float16) return widen(static_cast<const Half*>(data)[offset]);
  return widen(static_cast<const BFloat16*>(data)[offset]);
}

struct RegionMasks {
  Map<uint16_t> query;  // of query_dtype
  DType query_dtype;
  const int64_t* index;
  int64_t index_b, index_k;
  int64_t batch, masks;
  int depth, query_height, query_width;
  Axis y, x;
  Divisor width;  // of a mask
  int words, row_words;
  float scale, threshold;
  Connected connected;
  bool diagonal;
  uint32_t* packed;

  __device__ int pixels() const { return y.outputs * x.outputs; }
  __host__ __device__ int positions() const { return y.inputs * x.inputs; }
};

// Memory of a block, in words: 64 bits a warp, the query, the row, and two masks by rows.
constexpr int kQuery = 2 * kWarps;
struct Layout {
  int64_t row, mask_rows, bytes;

  Layout(int64_t depth, int64_t positions, int64_t mask_row_words) {
    row = kQuery + depth;
    mask_rows = row + positions;
    bytes = 8 * ceil_div(mask_rows + 2 * mask_row_words, 2);
  }
};

// A value of a map, encoded as a number of the same order, and the first pixel with this value.
struct Extremum {
  unsigned long long key;
  __device__ static Extremum of(float value, int pixel) {  // value >= 0
    return {static_cast<unsigned long long>(__float_as_uint(value)) << 32 | ~uint32_t(pixel)};
  }
  __device__ float value() const { return __uint_as_float(uint32_t(key >> 32)); }
  __device__ int pixel() const { return int(~uint32_t(key)); }
};

// Combines the values of all threads.
template <class T, class F>
__device__ T reduce(T value, T* cells, F&& combine) {
  const int lane = int(threadIdx.x) % kWarp;
  for (int step = kWarp / 2; step > 0; step /= 2) value = combine(value, __shfl_xor_sync(~0u, value, step));
  __syncthreads();  // the previous result has been read
  if (lane == 0) cells[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = cells[0];
  for (int i = 1; i < kWarps; ++i) value = combine(value, cells[i]);
  return value;
}

// The row of a mask, and its enlargement.
struct Row {
  const RegionMasks& problem;
  const float* grid;

  __device__ float at(int y, int x) const {
    int top, bottom, left, right;
    const float down = problem.y.at(y, top, bottom), across = problem.x.at(x, left, right);
    const float *above = grid + top * problem.x.inputs, *below = grid + bottom * problem.x.inputs;
    const float near = above[left] + down * (below[left] - above[left]);
    const float far = above[right] + down * (below[right] - above[right]);
    return near + across * (far - near);
  }
};

// Computes scores of all keys, then 2^(score - largest). Returns false if these are constant or NaN. Called by all
// threads.
template <class K>
__device__ bool compute_row(const RegionMasks& problem, const Map<K>& keys, int64_t b, int64_t position, float* query,
                            float* row, unsigned long long* cells, float& least, Extremum& largest) {
  const int positions = problem.positions(), width = problem.x.inputs;
  const int64_t at = problem.query.offset(b, position / problem.query_width, position % problem.query_width);
  for (int d = int(threadIdx.x); d < problem.depth; d += kThreads)
    query[d] = load(problem.query.data, at + d * problem.query.stride_c, problem.query_dtype) * problem.scale;
  __syncthreads();
  float top = -INFINITY;
  bool bad = false;
  for (int j = int(threadIdx.x); j < positions; j += kThreads) {
    const K* key = keys.data + keys.offset(b, j / width, j % width);
    float score = 0;
    for (int d = 0; d < problem.depth; ++d) score = fmaf(query[d], widen(key[d * keys.stride_c]), score);
    row[j] = score;
    top = fmaxf(top, score);
    bad |= score != score;
  }
  if (__syncthreads_or(bad)) return false;
  const auto bits = static_cast<unsigned long long>(__float_as_uint(top));
  const auto larger = [](unsigned long long p, unsigned long long q) {
    return __uint_as_float(uint32_t(p)) < __uint_as_float(uint32_t(q)) ? q : p;
  };
  top = __uint_as_float(uint32_t(reduce(bits, cells, larger)));
  if (!(fabsf(top) < INFINITY)) return false;
  least = INFINITY;
  largest = Extremum::of(0, 0);
  for (int j = int(threadIdx.x); j < positions; j += kThreads) {
    row[j] = exp2f(row[j] - top);
    least = fminf(least, row[j]);
    const int pixel = nearest(j / width, problem.y.inputs, problem.y.outputs) * problem.x.outputs +
                      nearest(j % width, width, problem.x.outputs);
    largest.key = max(largest.key, Extremum::of(row[j], pixel).key);
  }
  return true;
}

// Extrema of the enlarged row, from the extrema of each thread. Called by all threads.
__device__ void find_extrema(const RegionMasks& problem, const Row& row, unsigned long long* cells, float& least,
                             Extremum& largest) {
  __syncthreads();  // the row is complete
  if (!problem.y.coincides() || !problem.x.coincides()) {
    least = INFINITY;
    largest = Extremum::of(0, 0);
    for (int pixel = int(threadIdx.x); pixel < problem.pixels(); pixel += kThreads) {
      const int y = int(problem.width.divide(uint32_t(pixel)));
      const float value = row.at(y, pixel - y * problem.x.outputs);
      least = fminf(least, value);
      largest.key = max(largest.key, Extremum::of(value, pixel).key);
    }
  }
  const auto smaller = [](unsigned long long p, unsigned long long q) { return min(p, q); };
  const auto larger = [](unsigned long long p, unsigned long long q) { return max(p, q); };
  const auto bits = static_cast<unsigned long long>(__float_as_uint(least));  // values are not negative
  least = __uint_as_float(uint32_t(reduce(bits, cells, smaller)));
  largest.key = reduce(largest.key, cells, larger);
}

// Writes words of 32 pixels in raster order, whose bits are bit(y, x). Called by all threads; each warp writes a word.
template <class F>
__device__ void pack(const RegionMasks& problem, uint32_t* packed, F&& bit) {
  const int lane = int(threadIdx.x) % kWarp;
  for (int word = int(threadIdx.x) / kWarp; word < problem.words; word += kWarps) {
    const int pixel = word * kWarp + lane;
    const int y = int(problem.width.divide(uint32_t(pixel))), x = pixel - y * problem.x.outputs;
    const uint32_t bits = __ballot_sync(~0u, pixel < problem.pixels() && bit(y, x));
    if (lane == 0) packed[word] = bits;
  }
}

// Keeps the part of the mask that is connected with the marked pixel. Called by all threads.
template <class F>
__device__ void pack_connected(const RegionMasks& problem, uint32_t* packed, uint32_t* memory, int mark_y, int mark_x,
                               F&& above) {
  const BitRows mask{memory, problem.y.outputs, problem.row_words};
  const BitRows filled{memory + int64_t(mask.height) * mask.pitch, mask.height, mask.pitch};
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  for (int i = warp; i < mask.height * mask.pitch; i += kWarps) {
    const int y = i / mask.pitch, x = i % mask.pitch * kWarp + lane;
    const uint32_t bits = __ballot_sync(~0u, x < problem.x.outputs && above(y, x));
    if (lane == 0) {
      mask.data[i] = bits;
      filled.data[i] = 0;
    }
  }
  __syncthreads();
  if (warp == 0 && mask.test(mark_y, mark_x)) flood(mask, filled, mark_y, mark_x, problem.diagonal);
  __syncthreads();
  pack(problem, packed, [&](int y, int x) { return filled.test(y, x); });
}

// A separate kernel for whole masks, which needs fewer registers.
template <class K, bool kShared, bool kConnected>
__global__ void __launch_bounds__(kThreads, kConnected ? 2 : 4)
    mask_kernel(RegionMasks problem, Map<K> keys, Layout layout, float* scratch) {
  float* memory = shared_memory<float>();
  if constexpr (!kShared) memory = scratch + int64_t(blockIdx.x) * (layout.bytes / 4);
  auto* cells = reinterpret_cast<unsigned long long*>(memory);
  float *query = memory + kQuery, *grid = memory + layout.row;
  const Row row{problem, grid};
  for (int64_t item = blockIdx.x; item < problem.batch * problem.masks; item += gridDim.x) {
    const int64_t b = item / problem.masks;
    const int64_t position = problem.index[b * problem.index_b + item % problem.masks * problem.index_k];
    uint32_t* packed = problem.packed + item * problem.words;
    float least = 0;
    Extremum largest{0};
    bool varies = position >= 0 && position < int64_t(problem.query_height) * problem.query_width;
    __syncthreads();  // the previous mask no longer uses the memory
    if (varies) varies = compute_row(problem, keys, b, position, query, grid, cells, least, largest);
    if (varies) {
      find_extrema(problem, row, cells, least, largest);
      varies = least < largest.value();
    }
    if (!varies) {
      for (int word = int(threadIdx.x); word < problem.words; word += kThreads) packed[word] = 0;
      continue;
    }
    const float limit = least + problem.threshold * (largest.value() - least);
    const auto above = [&](int y, int x) { return row.at(y, x) > limit; };
    if constexpr (!kConnected) {
      pack(problem, packed, above);
      continue;
    }
    int mark_y = largest.pixel() / problem.x.outputs, mark_x = largest.pixel() % problem.x.outputs;
    if (problem.connected == kSeed) {
      mark_y = nearest(position / problem.query_width, problem.query_height, problem.y.outputs);
      mark_x = nearest(position % problem.query_width, problem.query_width, problem.x.outputs);
    }
    pack_connected(problem, packed, reinterpret_cast<uint32_t*>(memory + layout.mask_rows), mark_y, mark_x, above);
  }
}

Layout layout_of(const Tensor& key, int64_t height, int64_t width, int connected) {
  const int64_t mask_row_words = connected == kWhole ? 0 : height * ceil_div(width, kWarp);
  return Layout(key.size[1], key.size[2] * key.size[3], mask_row_words);
}

// The number of blocks with scratch memory; 0 if shared memory is enough.
int64_t scratch_blocks(const Layout& layout, int64_t masks) {
  if (layout.bytes <= shared_limit()) return 0;
  return std::min<int64_t>(masks, kBlocksInScratch * device_attribute(cudaDevAttrMultiProcessorCount));
}

}  // namespace

int64_t region_masks_scratch(Tensor query, Tensor key, Tensor index, int64_t height, int64_t width, int connected) {
  const Layout layout = layout_of(key, height, width, connected);
  return layout.bytes * scratch_blocks(layout, query.size[0] * index.size[3]);
}

void region_masks(Tensor query, Tensor key, Tensor index, int64_t height, int64_t width, double scale, double threshold,
                  int connected, int connectivity, Tensor packed, Tensor scratch, uintptr_t stream) {
  const Layout layout = layout_of(key, height, width, connected);
  const RegionMasks problem{Map<uint16_t>(query),
                            query.dtype,
                            index.at<const int64_t>(0),
                            index.stride[2],
                            index.stride[3],
                            query.size[0],
                            index.size[3],
                            int(query.size[1]),
                            int(query.size[2]),
                            int(query.size[3]),
                            Axis(key.size[2], height),
                            Axis(key.size[3], width),
                            Divisor(width),
                            int(ceil_div(height * width, kWarp)),
                            int(ceil_div(width, kWarp)),
                            float(scale * M_LOG2E),
                            float(threshold),
                            Connected(connected),
                            connectivity == 8,
                            packed.at<uint32_t>(0)};
  const int64_t masks = problem.batch * problem.masks, blocks = scratch_blocks(layout, masks);
  const auto run = [&](auto zero, auto is_shared, auto is_connected) {
    using K = decltype(zero);
    const auto kernel = mask_kernel<K, is_shared(), is_connected()>;
    const Shape shape{is_shared ? std::min<int64_t>(masks, INT32_MAX) : blocks, 1, kThreads,
                      is_shared ? layout.bytes : 0};
    launch("region_masks", kernel, shape, stream, problem, Map<K>(key), layout, scratch.at<float>(0));
  };
  const std::true_type yes;
  const std::false_type no;
  const auto call = [&](auto zero) {
    if (connected == kWhole) return blocks == 0 ? run(zero, yes, no) : run(zero, no, no);
    return blocks == 0 ? run(zero, yes, yes) : run(zero, no, yes);
  };
  switch (key.dtype) {
    case DType::float16:
      return call(Half{});
    case DType::bfloat16:
      return call(BFloat16{});
    case DType::float32:
      return call(float{});
    default:
      throw std::invalid_argument("region_masks: no CUDA kernel takes this dtype");
  }
}

}  // namespace corrmatch::cuda
