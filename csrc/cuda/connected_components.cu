// Connected components by union-find in the label image. The label of a pixel is the index of an earlier pixel of its
// component; the label of a root is its own index. Unions lower labels by atomic minimum. So for any schedule the root
// of a component is its first pixel in raster order, and components are numbered by counting roots.

#include "launch.cuh"

namespace corrmatch::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp, kScanThreads = 1024;

template <class T>
struct Image {
  const T* data;
  int64_t stride_b, stride_y, stride_x;
  int64_t batch;
  int height, width;
  bool has_background;
  T background;

  __device__ T at(int64_t b, int y, int x) const { return data[b * stride_b + y * stride_y + x * stride_x]; }
  __device__ bool is_front(T value) const { return !(has_background && value == background); }
};

__device__ int find(const int* labels, int pixel) {
  for (int above = __ldcg(labels + pixel); above != pixel; above = __ldcg(labels + pixel)) pixel = above;
  return pixel;
}

__device__ void unite(int* labels, int a, int b) {
  a = find(labels, a);
  b = find(labels, b);
  while (a != b) {
    const int low = min(a, b), high = max(a, b);
    const int before = atomicMin(labels + high, low);
    a = low;
    b = before == high ? low : before;  // another thread has lowered it: its new label is united, too
  }
}

// Calls f(image, y, x, whether x is inside) for each pixel. A warp has 32 neighbours of a row.
template <class T, class F>
__device__ void for_each_pixel(const Image<T>& image, F&& f) {
  const int lane = int(threadIdx.x) % kWarp, words = (image.width + kWarp - 1) / kWarp;
  const int64_t items = int64_t(image.height) * words;
  for (int64_t b = blockIdx.y; b < image.batch; b += gridDim.y) {
    const int64_t item = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
    if (item >= items) continue;
    const int y = int(item / words), x = int(item % words) * kWarp + lane;
    f(b, y, x, x < image.width);
  }
}

// Each pixel points to the first pixel of its run among the 32 pixels of its warp; background is -1.
template <class T>
__global__ void __launch_bounds__(kThreads) start_kernel(Image<T> image, int* out) {
  for_each_pixel(image, [&](int64_t b, int y, int x, bool inside) {
    const int lane = x % kWarp;
    const T value = inside ? image.at(b, y, x) : T{};
    const bool front = inside && image.is_front(value);
    const bool joins = front && lane > 0 && image.at(b, y, x - 1) == value;
    const uint32_t joined = __ballot_sync(~0u, joins);
    const int run = __clz(int(~(joined << (kWarp - 1 - lane))));  // pixels of the run before this one
    const int64_t pixel = int64_t(y) * image.width + x;
    if (inside) out[b * image.height * image.width + pixel] = front ? int(pixel) - run : -1;
  });
}

// Unites runs that touch, without the contacts that a neighbour unites.
template <class T>
__global__ void __launch_bounds__(kThreads) unite_kernel(Image<T> image, bool diagonal, int* out) {
  for_each_pixel(image, [&](int64_t b, int y, int x, bool inside) {
    if (!inside) return;
    const T value = image.at(b, y, x);
    if (!image.is_front(value)) return;
    const auto same = [&](int dy, int dx) {
      return y + dy >= 0 && x + dx >= 0 && x + dx < image.width && image.at(b, y + dy, x + dx) == value;
    };
    int* labels = out + b * image.height * image.width;
    const int width = image.width, pixel = y * width + x;
    const bool left = same(0, -1), above = same(-1, 0), above_left = same(-1, -1);
    if (left && x % kWarp == 0) unite(labels, pixel, pixel - 1);
    if (above && !(left && above_left)) unite(labels, pixel, pixel - width);
    if (!diagonal || above) return;
    if (above_left && !left) unite(labels, pixel, pixel - width - 1);
    if (same(-1, 1) && !same(0, 1)) unite(labels, pixel, pixel - width + 1);
  });
}

// Points each pixel to its root. Bit i of roots[w] is set if pixel 32 w + i is a root.
__global__ void __launch_bounds__(kThreads)
    flatten_kernel(int64_t batch, int pixels, int words, int* out, uint32_t* roots) {
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t word = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (word >= words) return;
  const int64_t pixel = word * kWarp + lane;
  for (int64_t b = blockIdx.y; b < batch; b += gridDim.y) {
    int* labels = out + b * pixels;
    int root = -1;
    if (pixel < pixels && labels[pixel] >= 0) {
      root = find(labels, int(pixel));
      labels[pixel] = root;
    }
    const uint32_t found = __ballot_sync(~0u, root == pixel);
    if (lane == 0) roots[b * words + word] = found;
  }
}

// before[w] = number of roots in the words before w. Each image has one block.
__global__ void __launch_bounds__(kScanThreads)
    count_kernel(int64_t batch, int words, const uint32_t* roots, int* before) {
  int* sums = shared_memory<int>();  // of the warps
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  for (int64_t b = blockIdx.y; b < batch; b += gridDim.y) {
    int total = 0;
    for (int first = 0; first < words; first += kScanThreads) {
      const int word = first + int(threadIdx.x);
      const int own = word < words ? __popc(roots[b * words + word]) : 0;
      int sum = own;
      for (int step = 1; step < kWarp; step *= 2) {
        const int other = __shfl_up_sync(~0u, sum, step);
        if (lane >= step) sum += other;
      }
      if (lane == kWarp - 1) sums[warp] = sum;
      __syncthreads();
      int of_warp = sums[lane];  // kScanThreads / kWarp is kWarp
      const int below = __reduce_add_sync(~0u, lane < warp ? of_warp : 0);
      if (word < words) before[b * words + word] = total + below + sum - own;
      total += __reduce_add_sync(~0u, of_warp);
      __syncthreads();
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    number_kernel(int64_t batch, int pixels, int words, const uint32_t* roots, const int* before, int* out) {
  const int64_t pixel = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (pixel >= pixels) return;
  for (int64_t b = blockIdx.y; b < batch; b += gridDim.y) {
    const int root = out[b * pixels + pixel];
    int number = 0;
    if (root >= 0) {
      const int64_t word = b * words + root / kWarp;
      number = before[word] + __popc(roots[word] & ((2u << (root % kWarp)) - 1));
    }
    out[b * pixels + pixel] = number;
  }
}

template <class T>
void run(const Tensor& image, bool diagonal, int64_t background, bool has_background, int* out, uint32_t* roots,
         uintptr_t stream) {
  const int64_t batch = image.size[1];
  const int height = int(image.size[2]), width = int(image.size[3]), pixels = height * width;
  const int words = int(ceil_div(pixels, kWarp));
  const Image<T> input{image.at<const T>(0), image.stride[1], image.stride[2], image.stride[3], batch, height, width,
                       has_background,       T(background)};
  int* before = reinterpret_cast<int*>(roots) + batch * words;
  const Shape rows{ceil_div(height * ceil_div(width, kWarp), kWarps), batch, kThreads};
  const Shape flat{ceil_div(pixels, kThreads), batch, kThreads};
  launch("connected_components: start", start_kernel<T>, rows, stream, input, out);
  launch("connected_components: unite", unite_kernel<T>, rows, stream, input, diagonal, out);
  launch("connected_components: flatten", flatten_kernel, flat, stream, batch, pixels, words, out, roots);
  launch("connected_components: count", count_kernel, Shape{1, batch, kScanThreads, kWarp * sizeof(int)}, stream, batch,
         words, roots, before);
  launch("connected_components: number", number_kernel, flat, stream, batch, pixels, words, roots, before, out);
}

}  // namespace

int64_t connected_components_scratch(Tensor image) {
  return 2 * sizeof(uint32_t) * image.size[1] * ceil_div(image.size[2] * image.size[3], kWarp);
}

void connected_components(Tensor image, int connectivity, int64_t background, Tensor out, Tensor scratch,
                          uintptr_t stream) {
  const bool has_background = representable(image.dtype, background);
  const auto call = [&](auto zero) {
    run<decltype(zero)>(image, connectivity == 8, background, has_background, out.at<int>(0), scratch.at<uint32_t>(0),
                        stream);
  };
  switch (image.dtype) {
    case DType::int16:
      return call(uint16_t{});
    case DType::int32:
      return call(uint32_t{});
    case DType::int64:
      return call(uint64_t{});
    default:
      return call(uint8_t{});
  }
}

}  // namespace corrmatch::cuda
