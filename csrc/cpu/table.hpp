// The table of CPU operators. Every instruction set fills one (see table.cpp); the processor chooses at run time.
#pragma once

#include <string>
#include <vector>

#include "../tensor.hpp"

namespace corrmatch {

struct CpuTable {
  const char* isa;
#define OP(name, parameters) void(*name) parameters;
#include "ops.def"
#undef OP
};

// The table in use. By default it is the one of the widest instruction set of this processor.
const CpuTable& cpu_table();
// Names of the instruction sets that this processor supports, narrowest first.
std::vector<std::string> cpu_isas();
// Selects one of cpu_isas() by name. Other names throw std::invalid_argument.
void select_cpu_isa(const std::string& name);

}  // namespace corrmatch
