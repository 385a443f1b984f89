// The scheduler: fibers take turns, barriers and warp-wide calls bring them together.
#include "emulator.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <iostream>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "fiber.hpp"

namespace corrmatch_emulator {

uint3 cuda::threadIdx, cuda::blockIdx;
dim3 cuda::blockDim, cuda::gridDim;

namespace {

// Turns without a thread finishing or passing a barrier, after which waiting in a loop counts as waiting for ever.
constexpr size_t kPatience = 20'000'000;
constexpr size_t kBlocksTogether = 4;  // at most, beyond one cluster

struct Block {
  uint3 index;
  size_t alive;                         // threads
  std::unique_ptr<std::byte[]> shared;  // freed when the last of them ends: a neighbour that still reads it is caught
};

struct Thread {
  Block* block;
  Fiber* fiber;
  uint3 index;
  bool finished = false;

  const char* waits_for = nullptr;  // null: can run
  Where where{};
  Scope scope{};
  uint32_t mask = 0;
  uint64_t value = 0;
  std::shared_ptr<const Lanes> met;  // what the call that it waited for gave it
};

std::mutex one_launch;
std::mt19937 lot(std::strtoul(std::getenv("CORRMATCH_EMULATOR_SEED") ?: "0", nullptr, 10));
std::deque<Fiber> fibers;

const std::function<void()>* body;
dim3 clusterDim;
std::vector<Block> blocks;    // those of a cluster are neighbours
std::vector<Thread> threads;  // those of a block, too
std::vector<Thread*> ready;
Thread* current = nullptr;
size_t turns = 0;  // since threads met, or the launch began
std::exception_ptr error;

size_t draw(size_t n) { return (uint64_t{lot()} * n) >> 32; }

bool same_place(const Where& a, const Where& b) {
  return a.line() == b.line() && a.column() == b.column() && !std::strcmp(a.file_name(), b.file_name());
}

std::span<Thread> neighbours(const Thread& thread, Scope scope) {
  const size_t per_block = count(blockDim), number = size_t(&thread - threads.data());
  const size_t size = scope == Scope::cluster ? count(clusterDim) * per_block : per_block;
  const std::span<Thread> all = std::span(threads).subspan(number / size * size, size);
  if (scope != Scope::warp) return all;
  const size_t first = number % size / 32 * 32;
  return all.subspan(first, std::min<size_t>(32, size - first));
}

// ---- What is said when something is wrong ----

std::string text(const uint3& index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
}

std::string text(const Where& where) {
  const std::string_view path = where.file_name();
  return std::string(path.substr(path.rfind('/') + 1)) + ":" + std::to_string(where.line()) + " in " +
         where.function_name();
}

std::string text(const Thread& thread) {
  return "block " + text(thread.block->index) + ", thread " + text(thread.index);
}

std::string status(const Thread& thread) {
  if (thread.finished) return "finished";
  std::ostringstream out;
  out << (thread.waits_for ? "waiting for " : "running, last seen") << (thread.waits_for ? thread.waits_for : "");
  if (thread.waits_for && thread.scope == Scope::warp) out << " with mask 0x" << std::hex << thread.mask;
  if (thread.where.line()) out << " at " << text(thread.where);
  return out.str();
}

// Who of the cluster is where, as an error; threads of the same status are counted together.
std::runtime_error stuck(const char* what, const Thread& one) {
  std::map<std::string, std::pair<int, const Thread*>> found;
  for (const Thread& thread : neighbours(one, Scope::cluster)) {
    auto& [count, first] = found[status(thread)];
    if (count++ == 0) first = &thread;
  }
  std::ostringstream out;
  out << "emulated kernel: " << what;
  for (const auto& [name, who] : found)
    out << "\n  " << who.first << " " << name << " (the first: " << text(*who.second) << ")";
  return std::runtime_error(out.str());
}

// AddressSanitizer's report has no block and thread. This is printed after it.
void name_culprit() {
  if (current) std::cerr << "in emulated " << text(*current) << std::endl;
}

// ---- Turns ----

// What a fiber runs.
void thread_body() {
  try {
    (*body)();
  } catch (...) {
    error = std::current_exception();
  }
  current->finished = true;
  turns = 0;
  if (--current->block->alive == 0) current->block->shared.reset();
}

uint3 position(size_t number, const dim3& extent) {
  return {unsigned(number % extent.x), unsigned(number / extent.x % extent.y), unsigned(number / extent.x / extent.y)};
}

// Lays out these clusters and their threads in place of the last; all of them start ready.
void prepare(std::span<const size_t> numbers, size_t shared_bytes) {
  const dim3 per{clusterDim}, extent{gridDim.x / per.x, gridDim.y / per.y, gridDim.z / per.z};
  const size_t per_cluster = count(clusterDim), per_block = count(blockDim);
  blocks = std::vector<Block>(numbers.size() * per_cluster);
  threads = std::vector<Thread>(blocks.size() * per_block);
  ready.clear();
  while (fibers.size() < threads.size()) fibers.emplace_back(&thread_body, fibers.size());

  for (size_t b = 0; b < blocks.size(); ++b) {
    const uint3 outer = position(numbers[b / per_cluster], extent), inner = position(b % per_cluster, per);
    blocks[b].index = {outer.x * per.x + inner.x, outer.y * per.y + inner.y, outer.z * per.z + inner.z};
    blocks[b].alive = per_block;
    blocks[b].shared.reset(new std::byte[shared_bytes]);
    // Every float of 0xff bytes is NaN; but as an integer it may happen to be a fitting start, so try others too.
    std::memset(blocks[b].shared.get(), draw(2) ? 0xff : int(draw(256)), shared_bytes);
  }
  for (size_t t = 0; t < threads.size(); ++t) {
    threads[t].block = &blocks[t / per_block];
    threads[t].fiber = &fibers[t];
    threads[t].index = position(t % per_block, blockDim);
    ready.push_back(&threads[t]);
  }
}

// Gives turns until all threads have finished.
void take_turns() try {
  while (!ready.empty()) {
    std::swap(ready[draw(ready.size())], ready.back());
    Thread& thread = *ready.back();
    ready.pop_back();
    current = &thread;
    threadIdx = thread.index;
    blockIdx = thread.block->index;
    thread.fiber->resume();
    current = nullptr;
    if (error) std::rethrow_exception(std::exchange(error, nullptr));
    if (++turns > kPatience) throw stuck("livelock: no thread gets anywhere", thread);
  }
  for (const Thread& thread : threads)
    if (!thread.finished) throw stuck("divergence: no thread can go on", thread);
} catch (...) {
  fibers.clear();  // some are in the middle of the kernel
  throw;
}

}  // namespace

void run(dim3 grid, dim3 block, dim3 cluster, size_t shared_bytes, const std::function<void()>& kernel) {
  const std::lock_guard lock(one_launch);
  __sanitizer_set_death_callback(&name_culprit);
  body = &kernel;
  turns = 0;
  gridDim = grid;
  blockDim = block;
  clusterDim = cluster;

  std::vector<size_t> order(count(grid) / count(cluster));
  std::iota(order.begin(), order.end(), size_t{0});
  std::shuffle(order.begin(), order.end(), lot);
  const size_t most = std::max<size_t>(1, kBlocksTogether / count(cluster));
  for (std::span<const size_t> left(order); !left.empty();) {
    const size_t next = std::min(1 + draw(most), left.size());
    prepare(left.first(next), shared_bytes);
    take_turns();
    left = left.subspan(next);
  }
}

// ---- What threads call ----

void fail(const char* what, const Where& where) {
  throw std::runtime_error("emulated kernel, " + text(*current) + ": " + what + ", at " + text(where));
}

void* shared_memory() { return current->block->shared.get(); }

void* shared_memory_of(const void* address, unsigned rank, const Where& where) {
  if (rank >= cluster_blocks()) fail("the cluster has no block of that rank", where);
  const Block &own = *current->block, &other = *(&own - block_rank() + rank);
  if (!other.shared) fail("the block of that rank has ended, and its shared memory with it", where);
  return other.shared.get() + (static_cast<const std::byte*>(address) - own.shared.get());
}

unsigned cluster_blocks() { return unsigned(count(clusterDim)); }
unsigned block_rank() { return unsigned(current->block - blocks.data()) % cluster_blocks(); }
unsigned lane() { return unsigned(current - neighbours(*current, Scope::warp).data()); }

const Lanes& meet(Scope scope, const char* name, uint32_t mask, uint64_t value, const Where& where) {
  Thread& self = *current;
  if (!(mask >> lane() & 1)) fail("the mask of a warp-wide call does not name its caller", where);
  self.waits_for = name;
  self.where = where;
  self.scope = scope;
  self.mask = mask;
  self.value = value;

  const std::span<Thread> group = neighbours(self, scope);
  for (size_t i = 0; i < group.size(); ++i) {
    if (!(mask >> i % 32 & 1)) continue;
    if (!group[i].waits_for || group[i].mask != mask || !same_place(group[i].where, where)) {
      self.fiber->suspend();  // the last to come goes on below
      return *self.met;
    }
  }
  const auto met = std::make_shared<Lanes>();
  for (size_t i = 0; i < group.size(); ++i) {
    if (!(mask >> i % 32 & 1)) continue;
    met->mask |= 1u << i % 32;
    met->value[i % 32] |= group[i].value;
    group[i].met = met;
    group[i].waits_for = nullptr;
    ready.push_back(&group[i]);
  }
  turns = 0;
  self.fiber->suspend();
  return *self.met;
}

void maybe_yield(const Where& where) {
  if (!draw(2)) return;
  current->where = where;
  ready.push_back(current);
  current->fiber->suspend();
}

}  // namespace corrmatch_emulator

// Called from Python by ctypes: from here on, launches are scheduled as they are after every other call with this seed.
extern "C" __attribute__((visibility("default"))) void corrmatch_emulator_seed(uint32_t seed) {
  const std::lock_guard lock(corrmatch_emulator::one_launch);
  corrmatch_emulator::lot.seed(seed);
}
