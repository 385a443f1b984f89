// Region propagation on bit maps: bit i of word w is pixel 32 w + i in raster order. The labels of an image are bit
// planes, so the votes of a region are population counts.
//
// There are four launches. The first packs pixels. The second filters all masks at the same time, because this test
// does not depend on labels. In the third one team of blocks for each image lets the remaining masks vote, in order.
// The fourth unpacks claimed pixels. In the vote each thread owns some words of all maps, so threads exchange only
// counts. The maps are stored in shared memory: of one block, of a cluster if one block has not enough, or else in
// global memory.
#include "launch.cuh"
#include "team.cuh"

namespace corrmatch::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMostPlanes = Counter::kMost;
constexpr int kBestCells = 4;  // words of two 64-bit integers

enum BitMap { kValid, kCounted, kClaimed, kPlanes };  // counted: valid and reliable before the first mask

// Bit maps of all images, (batch, maps, words).
struct Maps {
  uint32_t* data;
  int words, planes;

  __host__ __device__ int count() const { return kPlanes + planes; }
  __device__ uint32_t* of(int64_t image) const { return data + image * count() * words; }
};

// An image of a strided tensor.
template <class T>
struct Image {
  const T* data = nullptr;
  int64_t stride_b = 0, stride_y = 0, stride_x = 0;

  Image() = default;
  explicit Image(const Tensor& t)
      : data(t.at<const T>(0)), stride_b(t.stride[1]), stride_y(t.stride[2]), stride_x(t.stride[3]) {}
  __device__ T at(int64_t b, int y, int x) const { return data[b * stride_b + y * stride_y + x * stride_x]; }
};

struct Grid {
  int64_t batch;
  int pixels;
  Divisor width;
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(Image<T> labels, Image<bool> reliable, Image<bool> valid, Grid grid, Maps maps) {
  const int64_t pixel = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int word = int(pixel / kWarp);
  if (word >= maps.words) return;  // the whole warp
  const bool inside = pixel < grid.pixels, writes = threadIdx.x % kWarp == 0;
  const int y = int(grid.width.divide(uint32_t(pixel))), x = int(pixel) - y * int(grid.width.value());
  for (int64_t b = blockIdx.y; b < grid.batch; b += gridDim.y) {
    uint32_t* map = maps.of(b) + word;
    const bool is_valid = inside && (valid.data == nullptr || valid.at(b, y, x));
    const uint32_t valid_bits = __ballot_sync(~0u, is_valid);
    const uint32_t counted_bits = __ballot_sync(~0u, is_valid && reliable.at(b, y, x));
    const T label = inside ? labels.at(b, y, x) : T{};
    if (writes) {
      map[int64_t(kValid) * maps.words] = valid_bits;
      map[int64_t(kCounted) * maps.words] = counted_bits;
      map[int64_t(kClaimed) * maps.words] = 0;
    }
    for (int i = 0; i < maps.planes; ++i) {
      const uint32_t bits = __ballot_sync(~0u, label >> i & 1);
      if (writes) map[int64_t(kPlanes + i) * maps.words] = bits;
    }
  }
}

struct Masks {
  const uint32_t* data;
  int64_t stride_b, stride_k, stride_w;
  int count;

  __device__ uint32_t at(int64_t b, int k, int word) const {
    return data[b * stride_b + k * stride_k + word * stride_w];
  }
};

// votes[b, k] = |Q|, or 0 if the mask is skipped. Each mask has one block.
__global__ void __launch_bounds__(kThreads)
    filter_kernel(Masks masks, Maps maps, int64_t batch, const double* threshold, int* votes) {
  uint32_t* sums = shared_memory<uint32_t>();
  const int k = int(blockIdx.x), lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  for (int64_t b = blockIdx.y; b < batch; b += gridDim.y) {
    const uint32_t* map = maps.of(b);
    uint32_t area = 0, counted = 0;
    for (int word = int(threadIdx.x); word < maps.words; word += kThreads) {
      const uint32_t region = masks.at(b, k, word) & map[int64_t(kValid) * maps.words + word];
      area += __popc(region);
      counted += __popc(region & map[int64_t(kCounted) * maps.words + word]);
    }
    area = __reduce_add_sync(~0u, area);
    counted = __reduce_add_sync(~0u, counted);
    if (lane == 0) {
      sums[2 * warp] = area;
      sums[2 * warp + 1] = counted;
    }
    __syncthreads();
    if (warp == 0) {
      area = __reduce_add_sync(~0u, lane < kThreads / kWarp ? sums[2 * lane] : 0);
      counted = __reduce_add_sync(~0u, lane < kThreads / kWarp ? sums[2 * lane + 1] : 0);
      const bool skipped = counted == 0 || __fdiv_rn(float(counted), float(area)) < float(*threshold);
      if (lane == 0) votes[b * masks.count + k] = skipped ? 0 : int(counted);
    }
    __syncthreads();
  }
}

// A team's part of the maps of an image: `words` of each map, which lie `pitch` apart, from word `first` of the image.
struct Part {
  uint32_t* data;
  int64_t pitch;
  int first, words;

  __device__ uint32_t& at(int map, int word) const { return data[map * pitch + word]; }
  // The pixels of a word whose label is c.
  __device__ uint32_t labelled(uint32_t c, int planes, int word) const {
    uint32_t same = ~0u;
    for (int i = 0; i < planes; ++i) same &= at(kPlanes + i, word) ^ ((c >> i & 1) - 1);
    return same;
  }
};

// The class with more than half of the votes, if it exists: its bits are the majorities of the planes.
__device__ uint32_t majority(const Part& part, const Masks& masks, int64_t b, int k, int planes, uint32_t votes,
                             Counter& counter, uint32_t& of_class) {
  uint32_t ones[kMostPlanes] = {};
  for (int word = int(threadIdx.x); word < part.words; word += kTeamThreads) {
    const uint32_t counted = masks.at(b, k, part.first + word) & part.at(kCounted, word);
#pragma unroll
    for (int i = 0; i < kMostPlanes; ++i)
      if (i < planes) ones[i] += __popc(counted & part.at(kPlanes + i, word));
  }
  counter.sum(ones, planes);
  uint32_t c = 0;
#pragma unroll
  for (int i = 0; i < kMostPlanes; ++i)
    if (i < planes && ones[i] > votes / 2) c |= 1u << i;
  of_class = 0;
  for (int word = int(threadIdx.x); word < part.words; word += kTeamThreads) {
    const uint32_t counted = masks.at(b, k, part.first + word) & part.at(kCounted, word);
    of_class += __popc(counted & part.labelled(c, planes, word));
  }
  counter.sum(&of_class, 1);
  return c;
}

// The class with the most votes, the lowest on ties, from the counts of all. `histogram` has a cell for each class that
// the planes can represent; each block of a cluster has its own.
__device__ uint32_t plurality(const Part& part, const Masks& masks, int64_t b, int k, int planes, const Team& team,
                              uint32_t* histogram, unsigned long long* best, uint32_t& of_class) {
  const int classes = 1 << planes;
  for (int c = int(threadIdx.x); c < classes; c += kTeamThreads) histogram[c] = 0;
  if (threadIdx.x == 0) *best = 0;
  team.sync();
  for (int word = int(threadIdx.x); word < part.words; word += kTeamThreads) {
    uint32_t left = masks.at(b, k, part.first + word) & part.at(kCounted, word);
    while (left != 0) {
      const int pixel = __ffs(int(left)) - 1;
      uint32_t c = 0;
      for (int i = 0; i < planes; ++i) c |= (part.at(kPlanes + i, word) >> pixel & 1) << i;
      const uint32_t same = left & part.labelled(c, planes, word);
      atomicAdd(histogram + c, uint32_t(__popc(same)));
      left &= ~same;
    }
  }
  team.sync();
  unsigned long long largest = 0;  // votes, and then the lowest class
  for (int c = int(threadIdx.x); c < classes; c += kTeamThreads) {
    uint32_t votes = 0;
    for (int rank = 0; rank < team.blocks(); ++rank) votes += team.of(histogram, rank)[c];
    largest = max(largest, static_cast<unsigned long long>(votes) << 32 | uint32_t(~c));
  }
  atomicMax(best, largest);
  team.sync();
  largest = *best;
  of_class = uint32_t(largest >> 32);
  return ~uint32_t(largest);
}

// Each image has one team.
template <bool kShared>
__global__ void __launch_bounds__(kTeamThreads)
    vote_kernel(Masks masks, Maps maps, const double* threshold, const int* votes, uint32_t* histograms) {
  const Team team;
  const int64_t b = blockIdx.x / team.blocks();
  uint32_t* memory = shared_memory<uint32_t>();
  // Two cells are used in turns, because a slow thread may still read the previous result.
  unsigned long long *best = reinterpret_cast<unsigned long long*>(memory), *next_best = best + 1;
  Counter counter(team, memory + kBestCells);
  const int share = (maps.words + team.blocks() - 1) / team.blocks();
  Part part;
  part.first = min(share * team.rank(), maps.words);
  part.words = min(share, maps.words - part.first);
  uint32_t* histogram = histograms + (b << maps.planes);
  uint32_t* global = maps.of(b) + part.first;
  if constexpr (kShared) {
    histogram = memory + kBestCells + Counter::kCells;
    part.data = histogram + (1 << maps.planes);
    part.pitch = share;
    for (int map = 0; map < maps.count(); ++map)
      for (int word = int(threadIdx.x); word < part.words; word += kTeamThreads)
        part.at(map, word) = global[int64_t(map) * maps.words + word];
  } else {
    part.data = global;
    part.pitch = maps.words;
  }
  team.sync();  // all blocks of a cluster have started
  // From here on a thread reads and writes only its own words of the maps.

  const float limit = float(*threshold);
  for (int k = 0; k < masks.count; ++k) {
    const uint32_t all = uint32_t(votes[b * masks.count + k]);
    if (all == 0) continue;
    uint32_t of_class = 0, c;
    if (limit >= 0.5f) {
      c = majority(part, masks, b, k, maps.planes, all, counter, of_class);
    } else {
      c = plurality(part, masks, b, k, maps.planes, team, histogram, best, of_class);
      unsigned long long* used = best;
      best = next_best;
      next_best = used;
    }
    if (!(__fdiv_rn(float(of_class), float(all)) > limit)) continue;
    for (int word = int(threadIdx.x); word < part.words; word += kTeamThreads) {
      const uint32_t region = masks.at(b, k, part.first + word) & part.at(kValid, word);
      part.at(kClaimed, word) |= region;
      for (int i = 0; i < maps.planes; ++i) {
        uint32_t& plane = part.at(kPlanes + i, word);
        plane = c >> i & 1 ? plane | region : plane & ~region;
      }
    }
  }
  if constexpr (kShared)
    for (int map = kClaimed; map < maps.count(); ++map)
      for (int word = int(threadIdx.x); word < part.words; word += kTeamThreads)
        global[int64_t(map) * maps.words + word] = part.at(map, word);
  team.sync();  // no block of a cluster ends while others may read its memory
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    unpack_kernel(Image<T> labels, Image<bool> reliable, Grid grid, Maps maps, T* out_labels, bool* out_reliable) {
  const int64_t pixel = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (pixel >= grid.pixels) return;
  const int y = int(grid.width.divide(uint32_t(pixel))), x = int(pixel) - y * int(grid.width.value());
  const int word = int(pixel / kWarp), bit = int(pixel % kWarp);
  for (int64_t b = blockIdx.y; b < grid.batch; b += gridDim.y) {
    const uint32_t* map = maps.of(b) + word;
    const bool claimed = map[int64_t(kClaimed) * maps.words] >> bit & 1;
    uint32_t c = 0;
    for (int i = 0; claimed && i < maps.planes; ++i) c |= (map[int64_t(kPlanes + i) * maps.words] >> bit & 1) << i;
    out_labels[b * grid.pixels + pixel] = claimed ? T(c) : labels.at(b, y, x);
    out_reliable[b * grid.pixels + pixel] = claimed || reliable.at(b, y, x);
  }
}

int planes_for(int64_t classes) {
  int planes = 1;
  while ((int64_t(1) << planes) < classes) ++planes;
  return planes;
}

struct Sizes {
  int64_t batch, masks;
  int pixels, words, planes;

  Sizes(const Tensor& labels, const Tensor& packed, int64_t classes)
      : batch(labels.size[1]),
        masks(packed.size[2]),
        pixels(int(labels.size[2] * labels.size[3])),
        words(int(ceil_div(pixels, kWarp))),
        planes(planes_for(classes)) {}
  int64_t map_bytes() const { return int64_t(4) * batch * (kPlanes + planes) * words; }
  int64_t histogram_bytes() const { return int64_t(4) * batch << planes; }
  int64_t votes_bytes() const { return 4 * batch * masks; }
  // Shared memory of a block in any team.
  int64_t fixed_bytes() const { return 4 * (kBestCells + Counter::kCells); }
  // Shared memory of a block with its part of the maps, in a team of so many blocks.
  int64_t shared_bytes(int blocks) const {
    return fixed_bytes() + (int64_t(4) << planes) + 4 * (kPlanes + planes) * ceil_div(words, blocks);
  }
};

// The least number of blocks whose shared memory has room for the maps of an image; 0 if a cluster is too small.
int team_size(const Sizes& sizes) {
  const int64_t limit = shared_limit();
  // The architecture is that of the loaded code: code for an older GPU also runs on a newer one, but without clusters.
  cudaFuncAttributes code;
  check(cudaFuncGetAttributes(&code, vote_kernel<true>), "region_propagate: vote");
  const int most = code.ptxVersion >= 90 ? kMostCluster : 1;
  for (int blocks = 1; blocks <= most; blocks *= 2)
    if (sizes.shared_bytes(blocks) <= limit) return blocks;
  return 0;
}

template <class T>
void run(const Tensor& labels, const Tensor& reliable, const Tensor& packed, const double* threshold,
         const OptionalTensor& valid, const Sizes& sizes, const Tensor& out_labels, const Tensor& out_reliable,
         unsigned char* scratch, uintptr_t stream) {
  const Maps maps{reinterpret_cast<uint32_t*>(scratch), sizes.words, sizes.planes};
  uint32_t* histograms = reinterpret_cast<uint32_t*>(scratch + sizes.map_bytes());
  int* votes = reinterpret_cast<int*>(scratch + sizes.map_bytes() + sizes.histogram_bytes());
  const Image<T> in_labels(labels);
  const Image<bool> in_reliable(reliable), in_valid = valid ? Image<bool>(valid) : Image<bool>();
  const Masks masks{packed.at<const uint32_t>(0), packed.stride[1], packed.stride[2], packed.stride[3],
                    int(sizes.masks)};
  const Grid grid{sizes.batch, sizes.pixels, Divisor(labels.size[3])};
  const Shape pixels{ceil_div(sizes.pixels, kThreads), sizes.batch, kThreads};

  launch("region_propagate: pack", pack_kernel<T>, pixels, stream, in_labels, in_reliable, in_valid, grid, maps);
  if (sizes.masks > 0) {
    launch("region_propagate: filter", filter_kernel, Shape{sizes.masks, sizes.batch, kThreads, 8 * kThreads / kWarp},
           stream, masks, maps, sizes.batch, threshold, votes);
    const int team = team_size(sizes);
    if (team > 0)
      launch("region_propagate: vote", vote_kernel<true>,
             Shape{sizes.batch * team, 1, kTeamThreads, sizes.shared_bytes(team), team}, stream, masks, maps, threshold,
             votes, histograms);
    else
      launch("region_propagate: vote", vote_kernel<false>, Shape{sizes.batch, 1, kTeamThreads, sizes.fixed_bytes()},
             stream, masks, maps, threshold, votes, histograms);
  }
  launch("region_propagate: unpack", unpack_kernel<T>, pixels, stream, in_labels, in_reliable, grid, maps,
         out_labels.at<T>(0), out_reliable.at<bool>(0));
}

}  // namespace

int64_t region_propagate_scratch(Tensor labels, Tensor packed, int64_t num_classes) {
  const Sizes sizes(labels, packed, num_classes);
  return sizes.map_bytes() + sizes.histogram_bytes() + sizes.votes_bytes();
}

void region_propagate(Tensor labels, Tensor reliable, Tensor packed, Tensor threshold, OptionalTensor valid,
                      int64_t num_classes, Tensor out_labels, Tensor out_reliable, Tensor scratch, uintptr_t stream) {
  const Sizes sizes(labels, packed, num_classes);
  visit_integer(labels.dtype, [&](auto zero) {
    run<decltype(zero)>(labels, reliable, packed, threshold.at<const double>(0), valid, sizes, out_labels, out_reliable,
                        scratch.at<unsigned char>(0), stream);
  });
}

}  // namespace corrmatch::cuda
