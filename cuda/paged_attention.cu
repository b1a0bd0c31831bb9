// The attention op: checks, and the launches that a plan may need.
#include "cuda/attention_tile.cuh"

namespace fastpage::cuda {

namespace {

// That the kernels read no row and no block id beyond what is there: for the plan as it is now, or
// for any that may be in the buffer when a captured launch is replayed.
void check_sizes(const Rows& q, const KvCache& cache, const Rows& block_tables,
                 const AttentionPlan& plan) {
  const AttentionPlanConfig& config = plan.config();
  const char* const whose =
      config.fixed_grid ? "the plan (fixed_grid) is for " : "the plan is for ";
  const int32_t tokens = config.fixed_grid ? config.max_num_tokens : plan.num_tokens();
  const int32_t seqs = config.fixed_grid ? config.max_num_seqs : plan.num_seqs();
  const int32_t seq_len = config.fixed_grid ? config.max_seq_len : plan.longest_seq_len();
  check(q.rows == tokens, q.name,
        "has " + std::to_string(q.rows) + " rows, " + whose + std::to_string(tokens) + " tokens");
  check(block_tables.dtype == DType::kInt32, block_tables.name, "must be int32");
  check(block_tables.rows == seqs, block_tables.name,
        "has " + std::to_string(block_tables.rows) + " rows, " + whose + std::to_string(seqs) +
            " sequences");
  const int64_t blocks = (int64_t{seq_len} + cache.block_size - 1) / cache.block_size;
  check(block_tables.cols >= blocks, block_tables.name,
        "has " + std::to_string(block_tables.cols) + " blocks a row, " + whose +
            std::to_string(seq_len) + " tokens of a sequence, which are " + std::to_string(blocks));
}

}  // namespace

void paged_attention(const Rows& q, const KvCache& cache, const Rows& block_tables,
                     const AttentionPlan& plan, const int32_t* plan_buffer, float* workspace,
                     uint32_t* counters, const AttentionParams& params, const Rows& out,
                     Stream stream) {
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
  check_sizes(q, cache, block_tables, plan);
  check_rows(out, q.rows, q.cols);
  check(out.dtype == q.dtype, "out", "must be of the type of q");
  check_cached_type(q, cache);
  check_vectorized(q);
  check_vectorized(out);
  check(reinterpret_cast<uintptr_t>(plan_buffer) % 16 == 0, "plan_buffer",
        "must begin on 16 bytes");
  check(reinterpret_cast<uintptr_t>(workspace) % 16 == 0, "workspace", "must begin on 16 bytes");
  check(int64_t{config.max_seq_len} * cache.block_size < (int64_t{1} << 40), "cache",
        "has blocks of " + std::to_string(cache.block_size) +
            " tokens: with max_seq_len that is too many");
  check(params.scale > 0.0f, "scale", "must be positive");
  check(params.sliding_window >= 0, "sliding_window", "must not be negative");
  check(params.soft_cap >= 0.0f, "soft_cap", "must not be negative");

  AttentionArgs args{};
  args.q = q.data;
  args.out = out.data;
  args.q_stride = q.stride;
  args.out_stride = out.stride;
  args.cache = cache;
  args.block_tables = block_tables.as<const int32_t>();
  args.block_table_stride = block_tables.stride;
  args.tiles_per_block = cache.block_size / 16;
  args.inverse =
      static_cast<uint32_t>(((int64_t{1} << 32) + args.tiles_per_block - 1) / args.tiles_per_block);
  args.num_heads = config.num_heads;
  args.group = config.num_heads / config.num_kv_heads;
  args.params = params;
  args.plan = plan_buffer;
  args.layout = plan.layout();
  args.partial_sums = workspace;
  args.partial_stats = workspace + plan.max_partials() * config.num_heads * config.head_dim;
  args.counters = counters;
  if (q.dtype == DType::kFloat32) return launch_float32(args, q.rows, stream);
  const int32_t decode = config.fixed_grid ? plan.max_decode_items() : plan.num_decode_items();
  const int32_t prefill = config.fixed_grid ? plan.max_prefill_items() : plan.num_prefill_items();
  if (config.batch_invariant) {
    launch_few_rows(q.dtype, args, decode, stream);
    launch_many_rows(q.dtype, args, prefill, stream);
  } else {
    launch_decode(q.dtype, args, decode, stream);
    launch_prefill(q.dtype, args, prefill, stream);
  }
}

}  // namespace fastpage::cuda
