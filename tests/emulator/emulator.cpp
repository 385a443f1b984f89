// The scheduler: fibers take turns, barriers and warp-wide calls bring them together.
#include "emulator.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <utility>

#include "machine.hpp"

namespace corrmatch_emulator {

Machine machine;

Machine::Machine() {
  const char* seed = std::getenv("CORRMATCH_EMULATOR_SEED");
  lot.seed(seed ? std::strtoul(seed, nullptr, 10) : 0);
}

namespace cuda {
uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
}  // namespace cuda

namespace {

// Turns without a thread finishing or passing a barrier, after which waiting in a loop counts as waiting for ever.
constexpr size_t kPatience = 20'000'000;
constexpr size_t kBlocksTogether = 4;      // at most, beyond one cluster
constexpr size_t kThreadsTogether = 4096;  // at most, beyond one cluster

size_t draw(size_t n) { return (uint64_t{machine.lot()} * n) >> 32; }

bool same_place(const Where& a, const Where& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || !std::strcmp(a.file_name(), b.file_name()));
}

void release(Thread& thread) {
  thread.waits_for = nullptr;
  thread.collective = nullptr;
  machine.ready.push_back(&thread);
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

uint3 position(size_t number, const dim3& extent) {
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
void prepare(const std::vector<size_t>& numbers, dim3 grid, dim3 block, dim3 cluster, size_t shared_bytes) {
  const dim3 clusters{grid.x / cluster.x, grid.y / cluster.y, grid.z / cluster.z};
  const size_t per_cluster = count(cluster), per_block = count(block);
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
    std::memset(made.shared, draw(2) ? 0xff : int(draw(256)), shared_bytes);
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
    std::swap(machine.ready[draw(machine.ready.size())], machine.ready.back());
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

void run(const void* kernel, dim3 grid, dim3 block, dim3 cluster, size_t shared_bytes,
         const std::function<void()>& body) {
  const std::lock_guard lock(machine.one_launch);
  machine.kernel = kernel;
  machine.body = &body;
  machine.turns = 0;
  __sanitizer_set_death_callback(&name_culprit);
  gridDim = grid;
  blockDim = block;

  std::vector<size_t> order(count(grid) / count(cluster));
  std::iota(order.begin(), order.end(), size_t{0});
  std::shuffle(order.begin(), order.end(), machine.lot);
  const size_t blocks = std::min(kBlocksTogether, kThreadsTogether / count(block));
  const size_t most = std::max<size_t>(1, blocks / count(cluster));
  for (size_t done = 0; done < order.size();) {
    const size_t count = std::min(1 + draw(most), order.size() - done);
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
      release(*thread);
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
    release(warp[i]);
  }
  machine.turns = 0;
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
  if (draw(2)) yield(where);
}

unsigned cluster_blocks() {
  const Block& block = *machine.current->block;
  return unsigned(block.cluster->size / block.group.size);
}
unsigned block_rank() { return machine.current->block->rank; }
unsigned thread_rank() { return machine.current->rank; }

}  // namespace corrmatch_emulator

// Called from Python by ctypes: from here on, launches are scheduled as they are after every other call with this seed.
extern "C" __attribute__((visibility("default"))) void corrmatch_emulator_seed(uint32_t seed) {
  const std::lock_guard lock(corrmatch_emulator::machine.one_launch);
  corrmatch_emulator::machine.lot.seed(seed);
}
