// The connected region of a bit mask that contains a given pixel, computed by one warp.
//
// Sweeps go down and up the rows in turns. A row takes over the bits that touch it from the previous row, and then
// fills its runs as a whole by the carries of an addition. So a sweep follows any path that does not turn back, and a
// region of usual shape takes a few sweeps.
#pragma once

#include "launch.cuh"

namespace corrmatch::cuda {

// Rows of `pitch` words; bit i of word w is column 32 w + i.
struct BitRows {
  uint32_t* data;
  int height, pitch;

  __device__ uint32_t* row(int y) const { return data + int64_t(y) * pitch; }
  __device__ bool test(int y, int x) const { return row(y)[x / kWarp] >> (x % kWarp) & 1; }
};

// Fills the runs of `mask` from the set bits of `some` (a part of it) upwards: in their sum a carry clears all bits
// from the first one on.
__device__ __forceinline__ uint32_t fill_up(uint32_t mask, uint32_t some) { return (mask & ~(mask + some)) | some; }

__device__ __forceinline__ uint32_t fill_both(uint32_t mask, uint32_t some) {
  return __brev(fill_up(__brev(mask), __brev(fill_up(mask, some))));
}

// Bit i of the result is set if a carry enters lane i. `makes` marks lanes that create a carry, `passes` lanes that
// pass one on. `carry` enters lane 0 and is replaced by the carry that leaves the last lane.
__device__ __forceinline__ uint32_t carries(uint32_t makes, uint32_t passes, uint32_t& carry) {
  const uint32_t a = makes | passes;
  const uint64_t sum = uint64_t(a) + makes + carry;
  carry = uint32_t(sum >> 32);
  return uint32_t(sum) ^ a ^ makes;
}

// Adds the bits of row `from` that touch row y to row y of `filled`, and fills its runs in `mask`. Returns whether the
// row has changed.
__device__ inline bool fill_row(const BitRows& mask, const BitRows& filled, int y, int from, bool diagonal) {
  const int lane = int(threadIdx.x) % kWarp, pitch = mask.pitch;
  const uint32_t* near = filled.row(from);
  uint32_t* row = filled.row(y);
  bool changed = false;
  uint32_t carry = 0;
  for (int first = 0; first < pitch; first += kWarp) {
    const int w = first + lane;
    uint32_t allowed = 0, before = 0, touched = 0;
    if (w < pitch) {
      allowed = mask.row(y)[w];
      before = row[w];
      touched = near[w];
      if (diagonal) {
        touched |= touched << 1 | touched >> 1;
        if (w > 0) touched |= near[w - 1] >> 31;
        if (w + 1 < pitch) touched |= near[w + 1] << 31;
      }
    }
    uint32_t bits = fill_both(allowed, before | (touched & allowed));
    const uint32_t makes = __ballot_sync(~0u, bits >> 31), passes = __ballot_sync(~0u, allowed == ~0u);
    if (carries(makes, passes, carry) >> lane & allowed & 1) bits = fill_up(allowed, bits | 1);
    if (w < pitch) row[w] = bits;
    changed |= bits != before;
  }
  __syncwarp();  // from here on other lanes own the words
  carry = 0;
  for (int first = (pitch - 1) / kWarp * kWarp; first >= 0; first -= kWarp) {
    const int w = first + kWarp - 1 - lane;  // the carry goes down: lane 0 has the last word
    const uint32_t allowed = w < pitch ? mask.row(y)[w] : 0, before = w < pitch ? row[w] : 0;
    uint32_t bits = before;
    const uint32_t makes = __ballot_sync(~0u, bits & 1), passes = __ballot_sync(~0u, allowed == ~0u);
    if (carries(makes, passes, carry) >> lane & allowed >> 31)
      bits = __brev(fill_up(__brev(allowed), __brev(bits | 1u << 31)));
    if (w < pitch) row[w] = bits;
    changed |= bits != before;
  }
  __syncwarp();
  return __any_sync(~0u, changed);
}

// Fills `filled`, all 0, with the region of `mask` around its pixel (y, x). Called by one warp.
__device__ inline void flood(const BitRows& mask, const BitRows& filled, int y, int x, bool diagonal) {
  if (threadIdx.x % kWarp == 0) filled.row(y)[x / kWarp] = 1u << (x % kWarp);
  __syncwarp();
  fill_row(mask, filled, y, y, false);
  int idle = 0;  // sweeps in a row without a change
  for (bool down = true; idle < 2; down = !down) {
    bool changed = false;
    for (int i = 1; i < mask.height; ++i) {
      const int row = down ? i : mask.height - 1 - i;
      changed |= fill_row(mask, filled, row, down ? row - 1 : row + 1, diagonal);
    }
    idle = changed ? 0 : idle + 1;
  }
}

}  // namespace corrmatch::cuda
