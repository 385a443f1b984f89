// The scheduler: fibers, barriers, warp-wide calls, and what it says when they do not come together.
#include "emulator.hpp"

#include <cuda_runtime.h>
#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <iostream>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fiber.hpp"

namespace corrmatch_emulator {

namespace cuda {
uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
}  // namespace cuda

namespace {

struct Thread;

// The threads of a block, or of a cluster: they are neighbours in Machine::threads.
struct Group {
  Thread* threads;
  size_t size;
  size_t arrived = 0;  // at a barrier
  int votes = 0;
};

struct Block {
  uint3 index;
  unsigned rank;  // in the cluster
  Group group;
  Group* cluster;
  size_t alive;
  std::byte* shared;
};

struct Thread {
  Fiber* fiber;
  Block* block;
  uint3 index;
  unsigned rank;  // in the block

  bool finished = false;
  const char* waits_for = nullptr;  // null: can run
  Where where{};
  const Collective* collective = nullptr;
  uint32_t mask = 0;
  uint64_t value = 0;
  int argument = 0;
  uint64_t result = 0;

  void wait(const char* name, const Where& place) {
    waits_for = name;
    where = place;
    fiber->suspend();
  }
};

// Turns without a thread finishing or passing a barrier, after which waiting in a loop counts as waiting for ever.
constexpr size_t kPatience = 20'000'000;
constexpr size_t kBlocksTogether = 4;      // at most, beyond one cluster
constexpr size_t kThreadsTogether = 4096;  // at most, beyond one cluster

struct Machine {
  std::mutex one_launch;
  std::mt19937 lot;
  std::deque<Fiber> fibers;

  const void* kernel;
  const std::function<void()>* body;
  Extent cluster_extent;
  std::vector<Block> blocks;
  std::vector<Group> clusters;
  std::vector<Thread> threads;
  std::vector<Thread*> ready;
  Thread* current = nullptr;
  size_t turns = 0;  // since a thread finished or a barrier was passed
  std::exception_ptr error;

  Machine() {
    const char* seed = std::getenv("CORRMATCH_EMULATOR_SEED");
    lot.seed(seed ? std::strtoul(seed, nullptr, 10) : 0);
  }
  size_t draw(size_t n) { return (uint64_t{lot()} * n) >> 32; }

  void release(Thread& thread) {
    thread.waits_for = nullptr;
    thread.collective = nullptr;
    ready.push_back(&thread);
  }
} machine;

std::string text(const uint3& index) {
  std::ostringstream out;
  out << "(" << index.x << "," << index.y << "," << index.z << ")";
  return out.str();
}

std::string text(const Where& where) {
  const char* slash = std::strrchr(where.file_name(), '/');
  std::ostringstream out;
  out << (slash ? slash + 1 : where.file_name()) << ":" << where.line() << " in " << where.function_name();
  return out.str();
}

std::string text(const Thread& thread) {
  return "block " + text(thread.block->index) + ", thread " + text(thread.index);
}

std::string kernel_name() {
  Dl_info info;
  if (!dladdr(machine.kernel, &info) || !info.dli_sname) return "kernel";  // of internal linkage
  const std::unique_ptr<char, decltype(&std::free)> name{abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, nullptr),
                                                         &std::free};
  return "kernel " + std::string(name ? name.get() : info.dli_sname);
}

std::string status(const Thread& thread) {
  if (thread.finished) return "finished";
  std::ostringstream out;
  if (!thread.waits_for)
    out << "running, last seen";
  else if (thread.collective)
    out << "waiting for " << thread.waits_for << " with mask 0x" << std::hex << thread.mask;
  else
    out << "waiting for " << thread.waits_for;
  if (thread.where.line()) out << " at " << text(thread.where);
  return out.str();
}

// Who is where, threads of the same status counted together.
std::runtime_error stuck(const char* what, const Group& group) {
  std::map<std::string, std::pair<int, const Thread*>> found;
  const Thread* named = nullptr;
  for (const Thread* thread = group.threads; thread != group.threads + group.size; ++thread) {
    auto& [count, first] = found[status(*thread)];
    if (count++ == 0) first = thread;
    if (!named && !thread->finished) named = thread;
  }
  std::ostringstream out;
  out << "emulated " << kernel_name() << ", " << text(*named) << ": " << what;
  for (const auto& [name, who] : found)
    out << "\n  " << who.first << " " << name << " (the first: " << text(*who.second) << ")";
  return std::runtime_error(out.str());
}

bool same_place(const Where& a, const Where& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || !std::strcmp(a.file_name(), b.file_name()));
}

// AddressSanitizer's report knows nothing of blocks and threads; this line follows it.
void name_culprit() {
  if (machine.current) std::cerr << "in emulated " << kernel_name() << ", " << text(*machine.current) << std::endl;
}

// What a fiber runs.
void thread_body() {
  try {
    (*machine.body)();
  } catch (...) {
    machine.error = std::current_exception();
  }
  Thread& thread = *machine.current;
  thread.finished = true;
  machine.turns = 0;
  if (--thread.block->alive == 0) std::free(thread.block->shared);  // a neighbour that still reads it is caught
  thread.fiber->suspend(true);
}

uint3 position(size_t number, const Extent& extent) {
  return {unsigned(number % extent.x), unsigned(number / extent.x % extent.y), unsigned(number / extent.x / extent.y)};
}

// Forgets the last wave; what an error has left behind is freed.
void clear() {
  for (Block& block : machine.blocks)
    if (block.alive > 0) std::free(block.shared);
  machine.current = nullptr;
  machine.ready.clear();
  machine.blocks.clear();
  machine.clusters.clear();
  machine.threads.clear();
}

// Lays out these clusters and their threads; all of them start ready.
void prepare(const std::vector<size_t>& numbers, Extent grid, Extent block, Extent cluster, size_t shared_bytes) {
  const Extent clusters{grid.x / cluster.x, grid.y / cluster.y, grid.z / cluster.z};
  const size_t per_cluster = cluster.count(), per_block = block.count();
  clear();
  machine.blocks.resize(numbers.size() * per_cluster);
  machine.clusters.resize(numbers.size());
  machine.threads.resize(machine.blocks.size() * per_block);
  while (machine.fibers.size() < machine.threads.size()) machine.fibers.emplace_back(machine.fibers.size());

  for (size_t b = 0; b < machine.blocks.size(); ++b) {
    const uint3 origin = position(numbers[b / per_cluster], clusters), inner = position(b % per_cluster, cluster);
    Block& made = machine.blocks[b];
    Group& around = machine.clusters[b / per_cluster];
    Thread* first = &machine.threads[b * per_block];
    if (b % per_cluster == 0) around = {first, per_cluster * per_block};
    made.index = {origin.x * cluster.x + inner.x, origin.y * cluster.y + inner.y, origin.z * cluster.z + inner.z};
    made.rank = unsigned(b % per_cluster);
    made.group = {first, per_block};
    made.cluster = &around;
    made.alive = per_block;
    made.shared = static_cast<std::byte*>(std::malloc(shared_bytes));
    // Every float of 0xff bytes is NaN; but as an integer it may happen to be a fitting start, so try others too.
    std::memset(made.shared, machine.draw(2) ? 0xff : int(machine.draw(256)), shared_bytes);
    for (size_t t = 0; t < per_block; ++t) {
      first[t].fiber = &machine.fibers[b * per_block + t];
      first[t].block = &made;
      first[t].index = position(t, block);
      first[t].rank = unsigned(t);
      first[t].fiber->start(&thread_body);
      machine.ready.push_back(&first[t]);
    }
  }
}

// Gives turns until all threads have finished.
void take_turns() {
  while (!machine.ready.empty()) {
    std::swap(machine.ready[machine.draw(machine.ready.size())], machine.ready.back());
    Thread& thread = *machine.ready.back();
    machine.ready.pop_back();
    machine.current = &thread;
    threadIdx = thread.index;
    blockIdx = thread.block->index;
    thread.fiber->resume();
    if (machine.error) std::rethrow_exception(std::exchange(machine.error, nullptr));
    if (++machine.turns > kPatience) throw stuck("livelock: no thread gets anywhere", *thread.block->cluster);
  }
  for (const Thread& thread : machine.threads)
    if (!thread.finished) throw stuck("divergence: no thread can go on", *thread.block->cluster);
}

}  // namespace

void run(const void* kernel, Extent grid, Extent block, Extent cluster, size_t shared_bytes,
         const std::function<void()>& body) {
  const std::lock_guard lock(machine.one_launch);
  machine.kernel = kernel;
  machine.body = &body;
  machine.cluster_extent = cluster;
  machine.turns = 0;
  __sanitizer_set_death_callback(&name_culprit);
  gridDim = {grid.x, grid.y, grid.z};
  blockDim = {block.x, block.y, block.z};

  std::vector<size_t> order(grid.count() / cluster.count());
  std::iota(order.begin(), order.end(), size_t{0});
  std::shuffle(order.begin(), order.end(), machine.lot);
  const size_t blocks = std::min(kBlocksTogether, kThreadsTogether / block.count());
  const size_t most = std::max<size_t>(1, blocks / cluster.count());
  for (size_t done = 0; done < order.size();) {
    const size_t count = std::min(1 + machine.draw(most), order.size() - done);
    prepare({order.begin() + done, order.begin() + done + count}, grid, block, cluster, shared_bytes);
    take_turns();
    done += count;
  }
}

void* shared_memory() { return machine.current->block->shared; }

void* shared_memory_of(const void* address, unsigned rank, const Where& where) {
  const Block& own = *machine.current->block;
  if (rank >= cluster_blocks()) fail("the cluster has no block of that rank", where);
  const Block& other = *(&own - own.rank + rank);
  if (other.alive == 0) fail("the block of that rank has ended, and its shared memory with it", where);
  return other.shared + (static_cast<const std::byte*>(address) - own.shared);
}

int barrier(Scope scope, const char* name, bool predicate, const Where& where) {
  Thread& self = *machine.current;
  Group& group = scope == Scope::block ? self.block->group : *self.block->cluster;
  group.votes += predicate;
  if (++group.arrived == group.size) {
    self.waits_for = name;
    self.where = where;
    const Thread* end = group.threads + group.size;
    for (Thread* thread = group.threads; thread != end; ++thread)
      if (!same_place(thread->where, where)) throw stuck("divergence: barriers at different places", group);
    for (Thread* thread = group.threads; thread != end; ++thread) {
      thread->result = uint64_t(group.votes);
      machine.release(*thread);
    }
    group.arrived = 0;
    group.votes = 0;
    machine.turns = 0;
    self.fiber->suspend();
  } else {
    self.wait(name, where);
  }
  return int(self.result);
}

uint64_t collective(const Collective& what, uint32_t mask, uint64_t value, int argument, const Where& where) {
  Thread& self = *machine.current;
  const Group& group = self.block->group;
  const int lane = int(self.rank % 32);
  Thread* warp = &self - lane;
  const size_t lanes = std::min<size_t>(32, size_t(group.threads + group.size - warp));
  if (!(mask >> lane & 1)) fail("the mask of a warp-wide call does not name its caller", where);

  self.collective = &what;
  self.mask = mask;
  self.value = value;
  self.argument = argument;
  Lanes there{0, {}};
  for (size_t i = 0; i < lanes; ++i) {
    if (!(mask >> i & 1)) continue;
    if (warp[i].collective != &what || warp[i].mask != mask) {
      self.wait(what.name, where);
      return self.result;
    }
    there.mask |= 1u << i;
    there.value[i] = warp[i].value;
  }
  self.where = where;
  for (size_t i = 0; i < lanes; ++i) {
    if (!(there.mask >> i & 1)) continue;
    warp[i].result = what.result(there, int(i), warp[i].argument);
    machine.release(warp[i]);
  }
  self.fiber->suspend();
  return self.result;
}

void yield(const Where& where) {
  Thread& self = *machine.current;
  self.where = where;
  machine.ready.push_back(&self);
  self.fiber->suspend();
}

void maybe_yield(const Where& where) {
  if (machine.draw(2)) yield(where);
}

void fail(const char* what, const Where& where) {
  throw std::runtime_error("emulated " + kernel_name() + ", " + text(*machine.current) + ": " + what + ", at " +
                           text(where));
}

unsigned cluster_blocks() { return unsigned(machine.cluster_extent.count()); }
unsigned block_rank() { return machine.current->block->rank; }
unsigned thread_rank() { return machine.current->rank; }

}  // namespace corrmatch_emulator

// Called from Python by ctypes: from here on, launches are scheduled as they are after every other call with this seed.
extern "C" __attribute__((visibility("default"))) void corrmatch_emulator_seed(uint32_t seed) {
  const std::lock_guard lock(corrmatch_emulator::machine.one_launch);
  corrmatch_emulator::machine.lot.seed(seed);
}
