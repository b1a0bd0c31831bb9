// Into and out of the panels of quantized weights (cpu/quant_format.h): plain moves of bytes.
#pragma once

#include "ops/packed_weight.h"

namespace fastpage::ops {

// Fills one panel, which it clears first, column by column.
class PanelWriter {
 public:
  PanelWriter(const PackedWeight::Impl& weight, int64_t panel);

  // blocks: num_steps of cpu::block_bytes.
  void write_column(int column, const uint8_t* blocks);
  void write_scale(int column, float scale) { scales_[column] = scale; }  // kInt8

 private:
  const PackedWeight::Impl& weight_;
  char* const data_;
  float* const scales_;
};

// The values of one out_feature, as ggml's dequantization gives them.
void unpack_quantized_row(const PackedWeight::Impl& weight, int64_t panel, int column, float* out);

}  // namespace fastpage::ops
