// Declarations of the operators of one instruction set; ops.def says what they compute.
#pragma once

#include "../tensor.hpp"

namespace corrmatch::CORRMATCH_ISA {

#define OP(name, parameters) void name parameters;
#include "ops.def"
#undef OP

}  // namespace corrmatch::CORRMATCH_ISA
