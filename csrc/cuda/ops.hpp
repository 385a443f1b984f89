// The CUDA operators. Shapes, dtypes and conventions are those of cpu/table.hpp; in addition:
// - every tensor is on the current device, work goes to `stream`, and nothing waits for it;
// - `scratch` is memory of as many bytes as the function `<op>_scratch` says, which need not be initialised;
// - a bad value (an index, a label) is not noticed, but never reads or writes out of bounds;
// - what a launch refuses throws std::runtime_error, an enlargement beyond the index arithmetic std::invalid_argument.
#pragma once

#include "../tensor.hpp"

namespace corrmatch::cuda {

int64_t connected_components_scratch(Tensor image);
void connected_components(Tensor image, int connectivity, int64_t background, Tensor out, Tensor scratch,
                          uintptr_t stream);

int64_t region_masks_scratch(Tensor query, Tensor key, Tensor index, int64_t height, int64_t width, int connected);
void region_masks(Tensor query, Tensor key, Tensor index, int64_t height, int64_t width, double scale, double threshold,
                  int connected, int connectivity, Tensor packed, Tensor scratch, uintptr_t stream);

int64_t region_propagate_scratch(Tensor labels, Tensor packed, int64_t num_classes);
void region_propagate(Tensor labels, Tensor reliable, Tensor packed, Tensor threshold, OptionalTensor valid,
                      int64_t num_classes, Tensor out_labels, Tensor out_reliable, Tensor scratch, uintptr_t stream);

}  // namespace corrmatch::cuda
