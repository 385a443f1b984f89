// The table of one instruction set. This file is compiled once for each.
#include "table.hpp"

#include "ops.hpp"

#define CORRMATCH_STRING_(x) #x
#define CORRMATCH_STRING(x) CORRMATCH_STRING_(x)

namespace corrmatch::CORRMATCH_ISA {

extern const CpuTable table;
const CpuTable table = {
    CORRMATCH_STRING(CORRMATCH_ISA),
#define OP(name, parameters) name,
#include "ops.def"
#undef OP
};

}  // namespace corrmatch::CORRMATCH_ISA
