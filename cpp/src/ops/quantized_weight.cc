#include "ops/quantized_weight.h"

#include <algorithm>
#include <cstring>

namespace fastpage::ops {

namespace {

// Stored int8 weights have the instruction set's zero added: a flip of the highest bit, or nothing.
uint32_t stored_flip(cpu::QuantFormat format) {
  return cpu::has_4_bits(format) ? 0
                                 : static_cast<uint32_t>(kernels().quant.int8_zero) * 0x01010101u;
}

void fill_words(char* words, int64_t count, uint32_t value) {
  for (int64_t i = 0; i < count; ++i) std::memcpy(words + i * 4, &value, 4);
}

}  // namespace

PanelWriter::PanelWriter(const PackedWeight::Impl& weight, int64_t panel)
    : weight_(weight), data_(weight.panel(panel)), scales_(weight.scales(panel)) {
  std::memset(data_, 0, static_cast<size_t>(weight.panel_bytes));
  const int width = kernels().panel_width;
  const int64_t header = cpu::group_header_bytes(weight.quant, width);
  const uint32_t zero = stored_flip(weight.quant);
  if (zero == 0) return;
  for (int64_t g = 0; g < weight.num_steps; ++g) {
    fill_words(data_ + g * weight.step_bytes + header, (weight.step_bytes - header) / 4, zero);
  }
}

void PanelWriter::write_column(int column, const uint8_t* blocks) {
  const int width = kernels().panel_width;
  const cpu::QuantFormat format = weight_.quant;
  const int64_t block_header = cpu::block_header_bytes(format);
  const uint32_t flip = stored_flip(format);
  for (int64_t g = 0; g < weight_.num_steps; ++g, blocks += cpu::block_bytes(format)) {
    char* group = data_ + g * weight_.step_bytes;
    for (int64_t i = 0; i < block_header; i += 2, group += 2 * width) {
      std::memcpy(group + column * 2, blocks + i, 2);
    }
    for (int i = 0; i < cpu::words_per_group(format); ++i) {
      uint32_t word;
      std::memcpy(&word, blocks + block_header + 4 * i, 4);
      word ^= flip;
      std::memcpy(group + (static_cast<int64_t>(i) * width + column) * 4, &word, 4);
    }
  }
}

void unpack_quantized_row(const PackedWeight::Impl& weight, int64_t panel, int column, float* out) {
  const int width = kernels().panel_width;
  const cpu::QuantFormat format = weight.quant;
  const int64_t header = cpu::group_header_bytes(format, width);
  const uint32_t flip = stored_flip(format);
  for (int64_t g = 0; g < weight.num_steps; ++g) {
    const char* group = weight.panel(panel) + g * weight.step_bytes;
    float scale = 0.0f;
    float min = 0.0f;
    if (cpu::has_group_scales(format)) {
      kernels().widen(cpu::kF16, group + column * 2, 1, &scale);
    } else {
      scale = weight.scales(panel)[column];
    }
    if (cpu::has_minimums(format)) {
      kernels().widen(cpu::kF16, group + (width + column) * 2, 1, &min);
    }
    float values[cpu::kGroup];
    for (int i = 0; i < cpu::words_per_group(format); ++i) {
      uint32_t word;
      std::memcpy(&word, group + header + (static_cast<int64_t>(i) * width + column) * 4, 4);
      word ^= flip;
      for (int j = 0; j < 4; ++j, word >>= 8) {
        if (!cpu::has_4_bits(format)) {
          values[4 * i + j] = scale * static_cast<float>(static_cast<int8_t>(word & 0xff));
          continue;
        }
        const int zero = cpu::has_minimums(format) ? 0 : 8;
        const float low = scale * static_cast<float>(static_cast<int>(word & 15) - zero);
        const float high = scale * static_cast<float>(static_cast<int>((word >> 4) & 15) - zero);
        values[4 * i + j] = cpu::has_minimums(format) ? low + min : low;
        values[16 + 4 * i + j] = cpu::has_minimums(format) ? high + min : high;
      }
    }
    const int64_t left = weight.in_features - g * cpu::kGroup;
    std::copy_n(values, std::min<int64_t>(cpu::kGroup, left), out + g * cpu::kGroup);
  }
}

}  // namespace fastpage::ops
