// What a program outside this repository can do with an installed libfastpage: serve a model of its
// own through fastpage::Engine, and call the CPU attention by itself.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <memory>
#include <vector>

#include "fastpage/engine.h"
#include "fastpage/ops.h"

namespace {

using fastpage::Matrix;
using fastpage::TokenId;

constexpr int32_t kVocab = 1000;

TokenId next_token(TokenId previous, int32_t position) {
  return (previous * 31 + position * 7 + 1) % kVocab;
}

// A "model" whose next token depends on the last token and on where it stands.
class ToyRunner : public fastpage::ModelRunner {
 public:
  void execute(const fastpage::InputBatch& batch) override {
    output_.step_id = batch.step_id;
    output_.sampled_token_ids.clear();
    for (const fastpage::SamplingRow& row : batch.sampling_rows) {
      const int32_t last = batch.query_start_loc[row.seq + 1] - 1;
      output_.sampled_token_ids.push_back(next_token(batch.token_ids[last], batch.positions[last]));
    }
  }
  const fastpage::ModelRunnerOutput& wait(int64_t) override { return output_; }

 private:
  fastpage::ModelRunnerOutput output_;
};

// Nine requests on a pool too small for all of them at once; every output token is known.
bool serve() {
  fastpage::EngineConfig config;
  config.vocab_size = kVocab;
  config.scheduler.num_blocks = 12;
  config.scheduler.block_size = 16;
  config.scheduler.max_num_seqs = 4;
  config.scheduler.max_num_batched_tokens = 64;
  config.scheduler.max_model_len = 128;
  fastpage::Engine engine(config, std::make_shared<ToyRunner>());

  struct Expected {
    TokenId last;
    int32_t position;
    int32_t missing;
  };
  std::map<fastpage::RequestId, Expected> expected;
  for (int32_t i = 0; i < 9; ++i) {
    fastpage::Request request;
    for (int32_t j = 0; j < 5 + 9 * i; ++j) request.prompt_token_ids.push_back(i * 100 + j);
    request.params.temperature = 0;
    request.params.max_tokens = 20 + i;
    const Expected e{request.prompt_token_ids.back(), 4 + 9 * i, 20 + i};
    expected[engine.add_request(std::move(request))] = e;
  }

  int finished = 0;
  while (engine.has_unfinished()) {
    for (const fastpage::RequestOutput& output : engine.step().outputs) {
      Expected& e = expected.at(output.request_id);
      for (const TokenId token : output.new_token_ids) {
        if (token != next_token(e.last, e.position)) return false;
        e = {token, e.position + 1, e.missing - 1};
      }
      if (output.finish_reason == fastpage::FinishReason::kNone) continue;
      if (output.finish_reason != fastpage::FinishReason::kLength || e.missing != 0) return false;
      ++finished;
    }
  }
  engine.check_integrity();
  const fastpage::SchedulerStats stats = engine.stats().scheduler;
  std::printf("served %d of %zu requests, %d of %d blocks free\n", finished, expected.size(),
              stats.num_free_blocks, stats.num_blocks);
  return finished == 9 && stats.num_free_blocks == stats.num_blocks;
}

float value(int64_t i) { return static_cast<float>(std::sin(0.37 * static_cast<double>(i))); }

// One sequence of 21 tokens in blocks 2 and 0; the last one attends, two query heads to one KV
// head.
bool attend() {
  constexpr int32_t kTokens = 21, kHeads = 2, kDim = 8, kBlockSize = 16, kBlocks = 3;
  fastpage::ThreadPool pool(2);
  std::vector<float> k_cache(kBlocks * kBlockSize * kDim), v_cache(k_cache.size());
  fastpage::ops::KvCacheView cache;
  cache.k = k_cache.data();
  cache.v = v_cache.data();
  cache.num_blocks = kBlocks;
  cache.num_kv_heads = 1;
  cache.block_size = kBlockSize;
  cache.head_dim = kDim;

  std::vector<float> k(kTokens * kDim), v(kTokens * kDim), q(kHeads * kDim), out(kHeads * kDim);
  for (size_t i = 0; i < k.size(); ++i) k[i] = value(i), v[i] = value(1000 + i);
  for (size_t i = 0; i < q.size(); ++i) q[i] = value(2000 + i);
  const fastpage::BlockId block_table[] = {2, 0};
  std::vector<int32_t> slots;
  for (int32_t t = 0; t < kTokens; ++t)
    slots.push_back(block_table[t / kBlockSize] * kBlockSize + t % kBlockSize);
  fastpage::ops::reshape_and_cache(pool, Matrix<float>(k.data(), kTokens, kDim),
                                   Matrix<float>(v.data(), kTokens, kDim), slots, cache);

  const int32_t query_start_loc[] = {0, 1}, seq_lens[] = {kTokens};
  const fastpage::ops::AttentionBatch batch{1, query_start_loc, seq_lens, block_table, nullptr, 2};
  fastpage::ops::AttentionParams params;
  params.num_heads = kHeads;
  params.scale = 1.0f / std::sqrt(static_cast<float>(kDim));
  fastpage::ops::paged_attention(pool, Matrix<float>(q.data(), 1, kHeads * kDim), cache, batch,
                                 params, Matrix<float>(out.data(), 1, kHeads * kDim));

  double worst = 0;
  for (int32_t h = 0; h < kHeads; ++h) {
    double sum = 0, want[kDim] = {};
    for (int32_t t = 0; t < kTokens; ++t) {
      double score = 0;
      for (int32_t d = 0; d < kDim; ++d) score += double(q[h * kDim + d]) * k[t * kDim + d];
      const double weight = std::exp(score * params.scale);
      sum += weight;
      for (int32_t d = 0; d < kDim; ++d) want[d] += weight * v[t * kDim + d];
    }
    for (int32_t d = 0; d < kDim; ++d)
      worst = std::max(worst, std::abs(want[d] / sum - out[h * kDim + d]));
  }
  std::printf("attention: largest error %.2g\n", worst);
  return worst < 1e-5;
}

}  // namespace

int main() { return serve() && attend() ? 0 : 1; }
