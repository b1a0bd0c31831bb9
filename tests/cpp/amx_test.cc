// The AMX kernels over emulated tiles (ops/cpu/amx_emulation.h), on any machine: tiling, tails and
// the order of sums, to the bit, against loops over rows, out_features and in_features.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "ops/cpu/kernel_table.h"

namespace fastpage::ops::cpu {
namespace {

#include "ops/cpu/convert_scalar.h"
#include "ops/cpu/vec_portable.h"
//
#include "ops/cpu/dot_portable.h"
//
#include "ops/cpu/tile_impl.h"
//
#include "ops/cpu/amx_config.h"
//
#include "ops/cpu/amx_emulation.h"
using KernelTiles = EmulatedTiles;
#include "ops/cpu/amx_impl.h"

using TileFunction = void (*)(const LinearTile&);
constexpr int kGroups = 3;
constexpr int kDepth = kGroups * kGroup;
constexpr int kStride = 40;  // of y
constexpr float kUntouched = -77.0f;

struct Case {
  int rows;
  int columns;  // of the panel that exist
  bool accumulate;
  bool with_bias;
};

std::vector<Case> cases(int most_rows) {
  std::vector<Case> result;
  for (int rows = 1; rows <= most_rows; ++rows) {
    result.push_back({rows, kTilePanel, rows % 2 == 0, rows % 3 == 0});
  }
  for (const int columns : {1, 15, 16, 17, 31}) {
    result.push_back({most_rows, columns, true, true});
    result.push_back({1, columns, false, false});
  }
  return result;
}

// What every case needs around its operands.
struct Tile {
  std::vector<float> y, bias, scale;
  LinearTile t = {};

  Tile(const Case& c, std::mt19937* random) : y(static_cast<size_t>(c.rows * kStride)), bias(32) {
    std::normal_distribution<float> normal;
    for (float& v : y) v = kUntouched;
    for (float& v : bias) v = normal(*random);
    for (int r = 0; r < c.rows && c.accumulate; ++r) {
      for (int n = 0; n < c.columns; ++n) at(r, n) = normal(*random);
    }
    t.k = kGroups;
    t.y = y.data();
    t.y_stride = kStride;
    t.n = c.columns;
    t.accumulate = c.accumulate;
    t.bias = c.with_bias ? bias.data() : nullptr;
  }
  float& at(int row, int column) { return y[static_cast<size_t>(row * kStride + column)]; }
};

// want: of [rows][columns]; whatever lies beside them must not have been written.
void expect_result(const Case& c, Tile* tile, const std::vector<float>& want) {
  for (int r = 0; r < c.rows; ++r) {
    for (int n = 0; n < kStride; ++n) {
      const float expected =
          n < c.columns ? want[static_cast<size_t>(r * c.columns + n)] : kUntouched;
      ASSERT_EQ(float_bits(tile->at(r, n)), float_bits(expected))
          << c.rows << " rows, " << c.columns << " columns: row " << r << ", column " << n;
    }
  }
}

float random_bf16(std::mt19937* random) {
  std::normal_distribution<float> normal;
  return f32_from_bf16(bf16_from_f32(normal(*random)));
}

TEST(Amx, Bf16TilesSumInTheOrderOfTheManual) {
  TileFunction tiles[kMaxRowTile] = {};
  set_bf16_tiles<2 * kTileRows>(tiles);
  std::mt19937 random(1);
  for (const Case& c : cases(2 * kTileRows)) {
    Tile tile(c, &random);
    std::vector<float> x(static_cast<size_t>(c.rows * kDepth)), w(kTilePanel * kDepth);
    for (float& v : x) v = random_bf16(&random);
    for (float& v : w) v = random_bf16(&random);
    x[0] = 0x1p-130f;  // a denormal, which counts as zero
    // [group][row][32], and [pair of in_features][out_feature][2]
    std::vector<uint16_t> a(x.size()), b(w.size());
    for (int k = 0; k < kDepth; ++k) {
      for (int r = 0; r < c.rows; ++r) {
        a[static_cast<size_t>((k / kGroup * c.rows + r) * kGroup + k % kGroup)] =
            bf16_from_f32(x[static_cast<size_t>(r * kDepth + k)]);
      }
      for (int n = 0; n < kTilePanel; ++n) {
        b[static_cast<size_t>((k / 2 * kTilePanel + n) * 2 + k % 2)] =
            bf16_from_f32(w[static_cast<size_t>(n * kDepth + k)]);
      }
    }
    x[0] = 0.0f;
    std::vector<float> want;
    for (int r = 0; r < c.rows; ++r) {
      for (int n = 0; n < c.columns; ++n) {
        float sum = c.accumulate ? tile.at(r, n) : 0.0f;
        for (int g = 0; g < kGroups; ++g) {
          float parts[2] = {0.0f, 0.0f};
          for (int k = g * kGroup; k < (g + 1) * kGroup; ++k) {
            parts[k % 2] = std::fma(x[static_cast<size_t>(r * kDepth + k)],
                                    w[static_cast<size_t>(n * kDepth + k)], parts[k % 2]);
          }
          sum += parts[0] + parts[1];
        }
        want.push_back(c.with_bias ? sum + tile.bias[static_cast<size_t>(n)] : sum);
      }
    }
    tile.t.a = a.data();
    tile.t.panel = b.data();
    tiles[c.rows - 1](tile.t);
    expect_result(c, &tile, want);
  }
}

// Integer sums of each group, scaled and added in fp32, as quant_impl.h does.
template <QuantFormat F>
void test_int8() {
  TileFunction tiles[kMaxRowTile] = {};
  set_int8_tiles<kTileRows, 1, F>(tiles);
  std::mt19937 random(2);
  for (const Case& c : cases(kTileRows)) {
    Tile tile(c, &random);
    const auto byte = [&] { return static_cast<int8_t>(static_cast<int>(random() % 255) - 127); };
    std::vector<float> column_scales(kTilePanel);
    for (float& v : column_scales) v = 0.25f + static_cast<float>(random() % 7);
    std::vector<uint8_t> a, b;
    std::vector<float> sums(static_cast<size_t>(c.rows * c.columns), 0.0f);
    const auto sum = [&](int r, int n) -> float& {
      return sums[static_cast<size_t>(r * c.columns + n)];
    };
    for (int r = 0; r < c.rows && c.accumulate; ++r) {
      for (int n = 0; n < c.columns; ++n) sum(r, n) = tile.at(r, n);
    }
    const auto append = [](std::vector<uint8_t>* to, const void* p, size_t bytes) {
      const auto* from = static_cast<const uint8_t*>(p);
      to->insert(to->end(), from, from + bytes);
    };
    for (int g = 0; g < kGroups; ++g) {
      std::vector<int8_t> x(static_cast<size_t>(c.rows * kGroup)), w(kTilePanel * kGroup);
      for (int8_t& v : x) v = byte();
      for (int8_t& v : w) v = byte();
      x[0] = -127;
      std::vector<float> scales;
      std::vector<int32_t> begins;
      for (int r = 0; r < c.rows; ++r) {
        int32_t total = 0;
        for (int k = 0; k < kGroup; ++k) total += x[static_cast<size_t>(r * kGroup + k)];
        scales.push_back(0.5f + static_cast<float>(random() % 100) / 64.0f);
        begins.push_back(-128 * total);
      }
      append(&a, x.data(), x.size());
      append(&a, scales.data(), scales.size() * 4);
      append(&a, scales.data(), scales.size() * 4);  // of minimums, which int8 has not
      append(&a, begins.data(), begins.size() * 4);
      std::vector<uint16_t> header(kTilePanel);
      for (uint16_t& h : header) h = static_cast<uint16_t>(0x3000 + random() % 0x800);
      if (has_group_scales(F)) append(&b, header.data(), header.size() * 2);
      for (int k = 0; k < kGroup; k += 4) {
        for (int n = 0; n < kTilePanel; ++n) {
          for (int i = 0; i < 4; ++i) {
            b.push_back(static_cast<uint8_t>(w[static_cast<size_t>(n * kGroup + k + i)] + 128));
          }
        }
      }
      for (int r = 0; r < c.rows; ++r) {
        for (int n = 0; n < c.columns; ++n) {
          int32_t dot = 0;
          for (int k = 0; k < kGroup; ++k) {
            dot += x[static_cast<size_t>(r * kGroup + k)] * w[static_cast<size_t>(n * kGroup + k)];
          }
          auto y = static_cast<float>(dot);
          if (has_group_scales(F)) y *= f32_from_f16(header[static_cast<size_t>(n)]);
          sum(r, n) = y * scales[static_cast<size_t>(r)] + sum(r, n);
        }
      }
    }
    if (!has_group_scales(F)) tile.t.scale = column_scales.data();
    for (int r = 0; r < c.rows; ++r) {
      for (int n = 0; n < c.columns; ++n) {
        if (!has_group_scales(F)) sum(r, n) *= column_scales[static_cast<size_t>(n)];
        if (c.with_bias) sum(r, n) += tile.bias[static_cast<size_t>(n)];
      }
    }
    tile.t.a = a.data();
    tile.t.panel = b.data();
    tiles[c.rows - 1](tile.t);
    expect_result(c, &tile, sums);
  }
}

TEST(Amx, Int8TilesGiveWhatVnniGives) { test_int8<kInt8>(); }
TEST(Amx, Q80TilesGiveWhatVnniGives) { test_int8<kQ8_0>(); }

}  // namespace
}  // namespace fastpage::ops::cpu
