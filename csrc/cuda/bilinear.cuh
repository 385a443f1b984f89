// Bilinear enlargement with align_corners=True, in whole numbers: the first and last samples of both grids coincide.
#pragma once

#include "launch.cuh"

namespace corrmatch::cuda {

// One axis of an enlargement.
struct Axis {
  int inputs, outputs;
  Divisor steps;
  float weight;  // of one step

  Axis(int64_t from, int64_t to)
      : inputs(int(from)), outputs(int(to)), steps(to > 1 ? to - 1 : 1), weight(1.0f / float(to > 1 ? to - 1 : 1)) {
    if (to > INT32_MAX / from)
      throw std::invalid_argument("size: expected at most " + std::to_string(INT32_MAX / from) +
                                  " pixels where key has " + std::to_string(from) + " positions, got " +
                                  std::to_string(to));
  }
  // Output x lies between the inputs `low` and `high`, by this share of the way.
  __device__ __forceinline__ float at(int x, int& low, int& high) const {
    const uint32_t position = uint32_t(x) * uint32_t(inputs - 1);
    low = int(steps.divide(position));
    high = min(low + 1, inputs - 1);
    return float(position - uint32_t(low) * steps.value()) * weight;
  }
  // Whether every input is an output.
  __host__ __device__ bool coincides() const {
    return inputs == 1 || (outputs > 1 && (outputs - 1) % (inputs - 1) == 0);
  }
};

// The pixel of `outputs` that is nearest to position i of `inputs`; halves round up.
__device__ inline int nearest(int64_t i, int64_t inputs, int64_t outputs) {
  return inputs == 1 ? 0 : int((2 * i * (outputs - 1) + inputs - 1) / (2 * (inputs - 1)));
}

}  // namespace corrmatch::cuda
