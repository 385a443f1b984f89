// The table of CPU operators. Every instruction set fills one (see table.cpp); the processor chooses at run time.
//
// Conventions: N_q = Hq * Wq query positions, N_k = Hk * Wk key positions; maps are (B, channels, H, W). All inputs may
// have any strides; outputs are contiguous and written in full. `threads` bounds the OpenMP threads; results do not
// depend on it. Shapes, sizes and dtypes were validated by the Python side, so pixels are counted in 32 bits; a bad
// *value* (an index, a label) throws std::invalid_argument, which Python sees as ValueError.
#pragma once

#include <string>
#include <vector>

#include "../tensor.hpp"

namespace corrmatch {

struct CpuKernels {
  const char* isa;

  // out (B, C [+ 1], Hk, Wk), any floating dtype: Z = sum_i g_i V_i P_ij, with the arriving mass as one more channel if
  // out has C + 1. normalizer (B, 2, N_q), float32 or (if an input is float64) float64: shift and sum of each row, so
  // that P_ij = 2^(scale log2(e) <q_i, k_j> - shift_i) / sum_i; the sum is +inf where the gate is closed. gate: bool
  // (B, 1, Hq, Wq). threshold: one float64: the gate is then the largest softmax probability of
  // V_i >= threshold.
  void (*pixel_propagate_forward)(Tensor query, Tensor key, Tensor value, OptionalTensor gate, OptionalTensor threshold,
                                  double scale, Tensor out, Tensor normalizer, int threads);

  // Gradients of the sum of grad_out * out. grad_out may have C + 1 channels.
  void (*pixel_propagate_backward)(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor normalizer,
                                   double scale, OptionalTensor dquery, OptionalTensor dkey, OptionalTensor dvalue,
                                   int threads);

  // packed: int32 (B, K, ceil(H W / 32)). index: int64 (B, K), flat query positions. connected: 0 keeps the whole mask,
  // 1 the component of the peak, 2 the component of the sampled pixel. connectivity: 4 or 8.
  void (*region_masks)(Tensor query, Tensor key, Tensor index, int64_t height, int64_t width, double scale,
                       double threshold, int connected, int connectivity, Tensor packed, int threads);

  // labels: any integer dtype (B, H, W). reliable, valid: bool (B, H, W). packed: int32 (B, K, words). threshold: one
  // float64. out_labels has the dtype of labels.
  void (*region_propagate)(Tensor labels, Tensor reliable, Tensor packed, Tensor threshold, OptionalTensor valid,
                           int64_t num_classes, Tensor out_labels, Tensor out_reliable, int threads);

  // image: bool or integer (B, H, W); out: int32 (B, H, W).
  void (*connected_components)(Tensor image, int connectivity, int64_t background, Tensor out, int threads);

  // logits (B, C, h, w); labels int64 (B, H, W), confidence float32 (B, H, W), class_peak float32 (C). ignore: bool
  // (B, H, W). Logits are enlarged bilinearly (align_corners) where (H, W) differs from (h, w).
  void (*pseudo_label)(Tensor logits, OptionalTensor ignore, Tensor labels, Tensor confidence, Tensor class_peak,
                       int threads);

  // logits (B, C, h, w), enlarged as above to the pixels of weight (B, H, W), any floating dtype. Either labels, any
  // integer dtype (B, H, W): cross-entropy; or target, floating (B, C, h, w), enlarged as well: divergence of the
  // softmax of logits from that of target. pixels (B, H, W) and loss, one number, float32 or float64: weight times the
  // loss of each pixel, and their sum. grad (B, C, h, w): the gradient of the sum.
  void (*pixel_loss)(Tensor logits, OptionalTensor labels, OptionalTensor target, Tensor weight, Tensor pixels,
                     Tensor loss, OptionalTensor grad, int threads);
};

// The table in use: the widest that this processor runs, unless another was selected.
const CpuKernels& cpu_kernels();
// Names of the instruction sets that this processor runs, narrowest first.
std::vector<std::string> cpu_isas();
// Selects one of cpu_isas() by name; anything else throws std::invalid_argument.
void select_cpu_isa(const std::string& name);

}  // namespace corrmatch
