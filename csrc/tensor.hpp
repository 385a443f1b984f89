// A tensor in the operators: borrowed memory with a type, sizes and strides. It does not depend on torch.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>

namespace corrmatch {

enum class DType { boolean, uint8, int8, int16, int32, int64, float16, bfloat16, float32, float64 };

// Stored numbers of IEEE half and bfloat16. Arithmetic is done in float32.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::float32;
  std::array<int64_t, 4> size{1, 1, 1, 1};    // leading dimensions of lower-rank tensors are 1
  std::array<int64_t, 4> stride{0, 0, 0, 0};  // in elements

  template <class T>
  T* at(int64_t i0, int64_t i1 = 0, int64_t i2 = 0, int64_t i3 = 0) const {
    return static_cast<T*>(data) + i0 * stride[0] + i1 * stride[1] + i2 * stride[2] + i3 * stride[3];
  }
};

// A tensor that may be absent; then it converts to false.
struct OptionalTensor : Tensor {
  OptionalTensor() = default;
  explicit OptionalTensor(const Tensor& tensor) : Tensor(tensor) {}
  explicit operator bool() const { return data != nullptr; }
};

// The number of positions of a map (batch, channels, height, width).
inline int64_t positions(const Tensor& map) { return map.size[2] * map.size[3]; }

// The part of a region mask that is kept: all of it, or the component of its peak or of the sampled pixel. Python
// passes these numbers.
enum Connected { kWhole = 0, kPeak = 1, kSeed = 2 };

// Calls f, a generic lambda, with a value of the floating C++ type that `dtype` names.
template <class F>
decltype(auto) visit_floating(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float16:
      return f(Half{});
    case DType::bfloat16:
      return f(BFloat16{});
    case DType::float32:
      return f(float{});
    case DType::float64:
      return f(double{});
    default:
      throw std::invalid_argument("corrmatch: a floating dtype was expected");
  }
}

// The same for integer types.
template <class F>
decltype(auto) visit_integer(DType dtype, F&& f) {
  switch (dtype) {
    case DType::uint8:
      return f(uint8_t{});
    case DType::int8:
      return f(int8_t{});
    case DType::int16:
      return f(int16_t{});
    case DType::int32:
      return f(int32_t{});
    case DType::int64:
      return f(int64_t{});
    default:
      throw std::invalid_argument("corrmatch: an integer dtype was expected");
  }
}

// Whether a bool or integer dtype can represent the value.
inline bool representable(DType dtype, int64_t value) {
  if (dtype == DType::boolean) return value == 0 || value == 1;
  return visit_integer(dtype, [value](auto zero) { return int64_t(decltype(zero)(value)) == value; });
}

}  // namespace corrmatch
