// Declarations of the CUDA operators; ops.def says what they compute.
#pragma once

#include "../tensor.hpp"

namespace corrmatch::cuda {

#define OP(name, parameters) void name parameters;
#define SCRATCH(name, parameters) int64_t name parameters;
#include "ops.def"
#undef OP
#undef SCRATCH

}  // namespace corrmatch::cuda
