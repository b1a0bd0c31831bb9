// What a C++ caller may get wrong. (What the ops compute is tested in tests/python/test_ops.py.)
#include "fastpage/ops.h"

#include <gtest/gtest.h>

#include <vector>

namespace fastpage::ops {
namespace {

struct OpsMisuse : testing::Test {
  ThreadPool pool{1};
  std::vector<float> values = std::vector<float>(1024);

  Matrix<float> matrix(int64_t rows, int64_t cols) { return {values.data(), rows, cols}; }
  KvCacheView cache(int32_t block_size) {
    KvCacheView view;
    view.k = view.v = values.data();
    view.num_blocks = view.num_kv_heads = 1;
    view.block_size = block_size;
    view.head_dim = 16;
    return view;
  }
};

TEST_F(OpsMisuse, AttentionWithoutHeadsOrBlocks) {
  const std::vector<int32_t> start{0, 1}, lens{1}, tables{0};
  const AttentionBatch batch{1, start.data(), lens.data(), tables.data(), nullptr, 1};
  const auto attend = [&](int32_t block_size, int32_t num_heads) {
    AttentionParams params;
    params.num_heads = num_heads;
    const Matrix<float> q = matrix(1, int64_t{num_heads} * 16);
    paged_attention(pool, q, cache(block_size), batch, params, q);
  };
  EXPECT_THROW(attend(16, 0), InvalidArgument);
  EXPECT_THROW(attend(0, 1), InvalidArgument);
  EXPECT_NO_THROW(attend(16, 1));
}

TEST_F(OpsMisuse, CacheBlocksThatAreNoMultipleOf16) {
  for (const int32_t block_size : {-16, 0, 8, 24}) {
    EXPECT_THROW(reshape_and_cache(pool, matrix(1, 16), matrix(1, 16), std::vector<int32_t>{0},
                                   cache(block_size)),
                 InvalidArgument);
  }
}

TEST_F(OpsMisuse, RotaryWithAnEmptyTable) {
  const std::vector<int32_t> positions{0};
  EXPECT_THROW(rotary(pool, matrix(1, 4), positions, Matrix<const float>(values.data(), 0, 4), 4,
                      RotaryStyle::kNeox, matrix(1, 4)),
               InvalidArgument);
}

TEST_F(OpsMisuse, EmbedFromATableThatIsNotRowMajor) {
  TensorView table;
  table.data = values.data();
  table.ndim = 2;
  table.shape = {4, 8};
  table.strides = {1, 4};
  EXPECT_THROW(embed(pool, std::vector<TokenId>{0}, table, matrix(1, 8)), InvalidArgument);
}

}  // namespace
}  // namespace fastpage::ops
