// Compiled once for each instruction set: the table of this one.
#include "table.hpp"

#include "ops.hpp"

#define CORRMATCH_STRING_(x) #x
#define CORRMATCH_STRING(x) CORRMATCH_STRING_(x)

namespace corrmatch::CORRMATCH_ISA {

extern const CpuKernels kernels;
const CpuKernels kernels = {
    CORRMATCH_STRING(CORRMATCH_ISA),
    pixel_propagate_forward,
    pixel_propagate_backward,
    region_masks,
    region_propagate,
    connected_components,
    pseudo_label,
    pixel_loss,
};

}  // namespace corrmatch::CORRMATCH_ISA
