// Compiled once for each instruction set: the table of this one.
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
