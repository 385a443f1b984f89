// The choice of a table of operators. This file is compiled once, for the oldest processor.
#include <atomic>
#include <stdexcept>

#include "table.hpp"

namespace corrmatch {

// setup.py defines CORRMATCH_X86 if and only if it compiles the wider variants.
namespace generic {
extern const CpuTable table;
}
#ifdef CORRMATCH_X86
namespace avx2 {
extern const CpuTable table;
}
namespace avx512 {
extern const CpuTable table;
}
#endif

namespace {

std::vector<const CpuTable*> runnable() {
  std::vector<const CpuTable*> tables{&generic::table};
#ifdef CORRMATCH_X86
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
  if (v3) tables.push_back(&avx2::table);
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (v4) tables.push_back(&avx512::table);
#endif
  return tables;
}

std::atomic<const CpuTable*>& selected() {
  static std::atomic<const CpuTable*> table{runnable().back()};
  return table;
}

}  // namespace

const CpuTable& cpu_table() { return *selected().load(std::memory_order_relaxed); }

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const CpuTable* table : runnable()) names.emplace_back(table->isa);
  return names;
}

void select_cpu_isa(const std::string& name) {
  std::string choices;
  for (const CpuTable* table : runnable()) {
    if (name == table->isa) {
      selected() = table;
      return;
    }
    choices += (choices.empty() ? "" : ", ") + std::string(table->isa);
  }
  throw std::invalid_argument("instruction set '" + name + "' is not one that this processor runs: " + choices);
}

}  // namespace corrmatch
