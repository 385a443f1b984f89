// Declarations of the operators of one instruction set; table.hpp says what they compute.
#pragma once

#include "../tensor.hpp"

namespace corrmatch::CORRMATCH_ISA {

void pixel_propagate_forward(Tensor query, Tensor key, Tensor value, OptionalTensor gate, OptionalTensor threshold,
                             double scale, Tensor out, Tensor normalizer, int threads);
void pixel_propagate_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor normalizer, double scale,
                              OptionalTensor dquery, OptionalTensor dkey, OptionalTensor dvalue, int threads);
void region_masks(Tensor query, Tensor key, Tensor index, int64_t height, int64_t width, double scale, double threshold,
                  int connected, int connectivity, Tensor packed, int threads);
void region_propagate(Tensor labels, Tensor reliable, Tensor packed, Tensor threshold, OptionalTensor valid,
                      int64_t num_classes, Tensor out_labels, Tensor out_reliable, int threads);
void connected_components(Tensor image, int connectivity, int64_t background, Tensor out, int threads);
void pseudo_label(Tensor logits, OptionalTensor ignore, Tensor labels, Tensor confidence, Tensor class_peak,
                  int threads);
void pixel_loss(Tensor logits, OptionalTensor labels, OptionalTensor target, Tensor weight, Tensor pixels, Tensor loss,
                OptionalTensor grad, int threads);

}  // namespace corrmatch::CORRMATCH_ISA
