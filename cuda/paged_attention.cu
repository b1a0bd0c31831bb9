// The attention op: checks, and the two launches that a plan may need.
#include "cuda/attention_tile.cuh"

namespace fastpage::cuda {

void paged_attention(const Rows& q, const KvCache& cache, const int32_t* block_tables,
                     int64_t block_table_stride, const AttentionPlan& plan,
                     const int32_t* plan_buffer, float* workspace, uint32_t* counters,
                     const AttentionParams& params, const Rows& out, Stream stream) {
  const AttentionPlanConfig& config = plan.config();
  check_cache(cache);
  check(cache.head_dim == config.head_dim, "cache",
        "has heads of " + std::to_string(cache.head_dim) + ", the plan is for " +
            std::to_string(config.head_dim));
  check(cache.num_kv_heads == config.num_kv_heads, "cache",
        "has " + std::to_string(cache.num_kv_heads) + " heads, the plan is for " +
            std::to_string(config.num_kv_heads));
  check(cache.num_blocks > 0, "cache", "has no blocks");
  check_rows(q, q.rows, int64_t{config.num_heads} * config.head_dim);
  check_rows(out, q.rows, q.cols);
  check(out.dtype == q.dtype, "out", "must be of the type of q");
  check(cache.dtype == DType::kUInt8 || cache.dtype == q.dtype, "q",
        "must be of the type of the cache");
  check_vectorized(q);
  check_vectorized(out);
  check(reinterpret_cast<uintptr_t>(plan_buffer) % 16 == 0, "plan_buffer",
        "must begin on 16 bytes");
  check(reinterpret_cast<uintptr_t>(workspace) % 8 == 0, "workspace", "must begin on 8 bytes");
  check(params.sliding_window >= 0, "sliding_window", "must not be negative");
  check(params.soft_cap >= 0.0f, "soft_cap", "must not be negative");

  AttentionArgs args{};
  args.q = q.data;
  args.out = out.data;
  args.q_stride = q.stride;
  args.out_stride = out.stride;
  args.cache = cache;
  args.block_tables = block_tables;
  args.block_table_stride = block_table_stride;
  args.num_heads = config.num_heads;
  args.group = config.num_heads / config.num_kv_heads;
  args.params = params;
  args.plan = plan_buffer;
  args.layout = plan.layout();
  args.partial_stats = workspace;
  args.partial_sums = workspace + int64_t{plan.max_decode_items()} * config.num_heads * 2;
  args.counters = counters;
  launch_decode(q.dtype, args,
                config.fixed_grid ? plan.max_decode_items() : plan.num_decode_items(), stream);
  launch_prefill(q.dtype, args,
                 config.fixed_grid ? plan.max_prefill_items() : plan.num_prefill_items(), stream);
}

}  // namespace fastpage::cuda
