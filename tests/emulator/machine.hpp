// The state of a launch, for emulator.cpp, which drives it, and messages.cpp, which describes it.
#pragma once

#include <cuda_runtime.h>

#include <deque>
#include <exception>
#include <mutex>
#include <random>
#include <stdexcept>
#include <vector>

#include "fiber.hpp"

namespace corrmatch_emulator {

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
  std::byte* shared;  // freed when the last thread ends
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

struct Machine {
  std::mutex one_launch;
  std::mt19937 lot;
  std::deque<Fiber> fibers;

  const void* kernel;
  const std::function<void()>* body;
  std::vector<Block> blocks;
  std::vector<Group> clusters;
  std::vector<Thread> threads;
  std::vector<Thread*> ready;
  Thread* current = nullptr;
  size_t turns = 0;  // since threads met, or the launch began
  std::exception_ptr error;

  Machine();

  size_t draw(size_t n) { return (uint64_t{lot()} * n) >> 32; }
};
extern Machine machine;

// Who of the group is where, as an error; threads of the same status are counted together.
std::runtime_error stuck(const char* what, const Group& group);

// Prints kernel, block and thread: AddressSanitizer's report knows nothing of them, and this follows it.
void name_culprit();

}  // namespace corrmatch_emulator
