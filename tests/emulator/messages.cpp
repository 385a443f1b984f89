// What the emulator says when something is wrong.
#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <utility>

#include "machine.hpp"

namespace corrmatch_emulator {
namespace {

std::string text(const uint3& index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
}

std::string text(const Where& where) {
  const char* slash = std::strrchr(where.file_name(), '/');
  const std::string file = slash ? slash + 1 : where.file_name();
  return file + ":" + std::to_string(where.line()) + " in " + where.function_name();
}

std::string text(const Thread& thread) {
  return "block " + text(thread.block->index) + ", thread " + text(thread.index);
}

// The kernel's name, where it can be looked up: one of internal linkage has none.
std::string kernel_and(const Thread& thread) {
  Dl_info info{};
  dladdr(machine.kernel, &info);
  const std::unique_ptr<char, decltype(&std::free)> name{
      info.dli_sname ? abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, nullptr) : nullptr, &std::free};
  return "emulated kernel" + (name ? " " + std::string(name.get()) : "") + ", " + text(thread);
}

std::string status(const Thread& thread) {
  if (thread.finished) return "finished";
  std::ostringstream out;
  out << (thread.waits_for ? "waiting for " : "running, last seen") << (thread.waits_for ? thread.waits_for : "");
  if (thread.waits_for && thread.collective) out << " with mask 0x" << std::hex << thread.mask;
  if (thread.where.line()) out << " at " << text(thread.where);
  return out.str();
}

}  // namespace

std::runtime_error stuck(const char* what, const Group& group) {
  std::map<std::string, std::pair<int, const Thread*>> found;
  const Thread* named = nullptr;
  for (const Thread* thread = group.threads; thread != group.threads + group.size; ++thread) {
    auto& [count, first] = found[status(*thread)];
    if (count++ == 0) first = thread;
    if (!named && !thread->finished) named = thread;
  }
  std::ostringstream out;
  out << kernel_and(*named) << ": " << what;
  for (const auto& [name, who] : found)
    out << "\n  " << who.first << " " << name << " (the first: " << text(*who.second) << ")";
  return std::runtime_error(out.str());
}

void fail(const char* what, const Where& where) {
  throw std::runtime_error(kernel_and(*machine.current) + ": " + what + ", at " + text(where));
}

void name_culprit() {
  if (machine.current) std::cerr << "in " << kernel_and(*machine.current) << std::endl;
}

}  // namespace corrmatch_emulator
