// Mixtures of experts: what a step of one costs besides its arithmetic. (What they compute is
// tested in tests/python/test_moe_ops.py.)
#include <gtest/gtest.h>

#include <random>

#include "counting_allocator.h"
#include "fastpage/ops.h"

namespace fastpage::ops {
namespace {

constexpr int64_t kHidden = 256;
constexpr int64_t kIntermediate = 128;

struct Mixture {
  explicit Mixture(int32_t num_experts, WeightFormat format) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::vector<float> values(2 * kIntermediate * kHidden);
    for (float& v : values) v = normal(random);
    const auto pack = [&](int64_t out, int64_t in) {
      TensorView view;
      view.data = values.data();
      view.ndim = 2;
      view.shape = {out, in};
      view.strides = {in, 1};
      return PackedWeight::pack(view, format, pool);
    };
    weights.reserve(2 * num_experts);
    for (int32_t i = 0; i < num_experts; ++i) {
      weights.push_back(pack(2 * kIntermediate, kHidden));
      weights.push_back(pack(kHidden, kIntermediate));
      experts.push_back({&weights[2 * i], &weights[2 * i + 1]});
    }
    for (float& v : x) v = normal(random);
    for (float& v : logits) v = normal(random);
    params.top_k = 2;
  }

  void run(int64_t rows) {
    const auto num_experts = static_cast<int64_t>(experts.size());
    moe(pool, {x.data(), rows, kHidden}, {logits.data(), rows, num_experts}, experts, params,
        {y.data(), rows, kHidden});
  }

  ThreadPool pool{3};
  std::vector<PackedWeight> weights;
  std::vector<Expert> experts;
  MoeParams params;
  std::vector<float> x = std::vector<float>(64 * kHidden);
  std::vector<float> logits = std::vector<float>(64 * 64);
  std::vector<float> y = std::vector<float>(64 * kHidden);
};

TEST(Moe, AllocatesNothingOnceItHasSeenSoManyRows) {
  for (const WeightFormat format : {WeightFormat::kFloat32, WeightFormat::kInt8}) {
    Mixture mixture(8, format);
    mixture.run(64);
    const int64_t before = num_allocations.load();
    for (const int64_t rows : {1, 7, 64}) mixture.run(rows);
    EXPECT_EQ(num_allocations.load() - before, 0);
  }
}

TEST(Moe, CostsTheSameFewLoopsHoweverManyExperts) {
  for (const int32_t num_experts : {2, 8, 64}) {
    Mixture mixture(num_experts, WeightFormat::kFloat32);
    for (const int64_t rows : {1, 64}) {
      const uint64_t before = mixture.pool.num_loops();
      mixture.run(rows);
      EXPECT_LE(mixture.pool.num_loops() - before, rows == 1 ? 2u : 4u) << num_experts;
    }
  }
}

}  // namespace
}  // namespace fastpage::ops
