// The grouped arguments of rel_attention's schema by name, for the bindings of every device. The
// groups and their order are those of txl_kernels/_rel_attention_call.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

#include "txl/key_range.h"

namespace txl {

// An absent tensor is undefined.
struct OptionalTensors {
  at::Tensor r_w_bias, r_r_bias;      // [H, D], [H, Dp]
  at::Tensor mem_k, mem_v;            // [B, Hk, Tm, D], [B, Hk, Tm, Dv]
  at::Tensor q_pos;                   // [B, H, Tq, Dp]
  at::Tensor q_start;                 // int32 or int64 [B]
  at::Tensor key_start, key_lens;     // int32 or int64 [B] or [B, Tq]
  at::Tensor mask;                    // bool [B, H, Tq, Tk]
  at::Tensor dropout_seed;            // int64, one element

  explicit OptionalTensors(at::TensorList list) {
    at::Tensor* const fields[] = {&r_w_bias, &r_r_bias,  &mem_k,    &mem_v, &q_pos,
                                  &q_start,  &key_start, &key_lens, &mask,  &dropout_seed};
    TORCH_CHECK_VALUE(list.size() == std::size(fields), "rel_attention: optional must have ",
                      std::size(fields), " tensors, got ", list.size());
    for (size_t n = 0; n < list.size(); ++n) {
      const at::Tensor& x = list[n];
      if (x.dim() != 1 || x.numel() != 0) *fields[n] = x;
    }
  }
};

struct Rules {
  int64_t offset;
  bool clamp;
  KeyRule keys;

  explicit Rules(at::IntArrayRef list) {
    TORCH_CHECK_VALUE(list.size() == 7, "rel_attention: rules must have 7 integers, got ",
                      list.size());
    offset = list[0], clamp = list[1] != 0;
    keys.window_left = std::min(list[2], kOpen), keys.window_right = std::min(list[3], kOpen);
    keys.chunk_size = list[4], keys.chunk_left = list[5], keys.chunk_phase = list[6];
  }
};

struct Numbers {
  double scale, pos_scale, softcap, dropout_p;

  explicit Numbers(at::ArrayRef<double> list) {
    TORCH_CHECK_VALUE(list.size() == 4, "rel_attention: numbers must have 4 elements, got ",
                      list.size());
    scale = list[0], pos_scale = list[1], softcap = list[2], dropout_p = list[3];
  }
};

}  // namespace txl
