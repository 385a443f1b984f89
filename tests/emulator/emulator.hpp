// What the CUDA names in include/ are made of. emulator.cpp runs it.
//
// Every thread of a block is a fiber. Only one runs at a time, from one synchronising call to the next; which one comes
// next is drawn by lot, from a seed. Several blocks (or clusters) are under way together, in any order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>

namespace corrmatch_emulator {
namespace cuda {

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

}  // namespace cuda

using Where = std::source_location;  // the call in the kernel, for messages

// The calling block's shared memory: exactly as long as the launch says, filled with rubbish.
void* shared_memory();
// The same place in the shared memory of another block of the cluster.
void* shared_memory_of(const void* address, unsigned rank, const Where& where);

enum class Scope { block, cluster };

// Waits for every thread of the scope at the same place; the number of them that passed true.
int barrier(Scope scope, const char* name, bool predicate, const Where& where);

// What the lanes of a warp hold while they are in one call together.
struct Lanes {
  uint32_t mask;
  uint64_t value[32];
};

// A call that all lanes of a mask make together; result() is what the call returns to one of them.
struct Collective {
  const char* name;
  uint64_t (*result)(const Lanes& lanes, int lane, int argument);
};
uint64_t collective(const Collective& what, uint32_t mask, uint64_t value, int argument, const Where& where);

// Lets others run: always, or (before an atomic) every other time.
void yield(const Where& where);
void maybe_yield(const Where& where);

// Ends the launch with an exception that names the calling thread.
[[noreturn]] void fail(const char* what, const Where& where);

// Runs the body once for every thread of the grid. One launch at a time; the others wait.
void run(const void* kernel, cuda::dim3 grid, cuda::dim3 block, cuda::dim3 cluster, size_t shared_bytes,
         const std::function<void()>& body);
inline size_t count(const cuda::dim3& size) { return size_t{size.x} * size.y * size.z; }

unsigned cluster_blocks();
unsigned block_rank();   // in the cluster
unsigned thread_rank();  // in the block

}  // namespace corrmatch_emulator
