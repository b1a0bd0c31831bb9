#include "program/batch_checks.h"

#include <algorithm>

namespace fastpage {

namespace {

void check_size(const char* name, size_t size, size_t expected) {
  if (size == expected) return;
  throw InvalidArgument(std::string(name) + " has " + std::to_string(size) + " entries, " +
                        std::to_string(expected) + " needed");
}

void check_range(const char* name, Span<const int32_t> values, int64_t low, int64_t high) {
  for (int32_t value : values) {
    if (value >= low && value < high) continue;
    throw InvalidArgument(std::string(name) + " holds " + std::to_string(value) + ", outside [" +
                          std::to_string(low) + ", " + std::to_string(high) + ")");
  }
}

// The smallest of the sizes that ops of this kind give to their weight's first dimension.
int64_t smallest_table(const Program& program, OpKind kind, size_t input) {
  int64_t rows = INT32_MAX;
  for (const Op& op : program.ops()) {
    if (op.kind != kind) continue;
    rows = std::min(rows, program.buffers()[op.inputs[input].buffer].shape[0]);
  }
  return rows;
}

// How many positions every table that is read by position has an entry for.
int64_t num_positions(const Program& program) {
  int64_t smallest = std::min(smallest_table(program, OpKind::kRotary, 1),
                              smallest_table(program, OpKind::kRotaryWriteCache, 3));
  for (const Op& op : program.ops()) {
    if (op.kind != OpKind::kEmbedPositions) continue;
    const int64_t rows = program.buffers()[op.inputs[0].buffer].shape[0];
    smallest = std::min(smallest, rows - op.attr_int("offset", 0));
  }
  return smallest;
}

void check_sequence(const InputBatch& batch, int32_t seq, const ExecutorConfig& config) {
  const int32_t begin = batch.query_start_loc[seq];
  const int32_t end = batch.query_start_loc[seq + 1];
  const int32_t seq_len = batch.seq_lens[seq];
  if (begin < 0 || begin > end || end - begin > seq_len) {
    throw InvalidArgument("sequence " + std::to_string(seq) + " has " +
                          std::to_string(end - begin) + " new tokens of " +
                          std::to_string(seq_len));
  }
  const int64_t num_blocks = (int64_t{seq_len} + config.block_size - 1) / config.block_size;
  if (num_blocks > batch.block_table_stride) {
    throw InvalidArgument("sequence " + std::to_string(seq) + " needs " +
                          std::to_string(num_blocks) + " blocks, its block table has " +
                          std::to_string(batch.block_table_stride));
  }
  check_range("block_tables", {batch.block_table(seq), static_cast<size_t>(num_blocks)}, 0,
              config.num_kv_blocks);
}

void check_transfers(const BlockTransfers& transfers, const ExecutorConfig& config) {
  const auto check = [](const char* list, BlockId block, int32_t num_blocks) {
    check_range(list, {&block, 1}, 0, num_blocks);
  };
  for (const auto& [list, swaps] :
       {std::pair{"swap_outs", &transfers.swap_outs}, std::pair{"swap_ins", &transfers.swap_ins}}) {
    for (const BlockSwap& swap : *swaps) {
      check(list, swap.device, config.num_kv_blocks);
      check(list, swap.host, config.num_host_kv_blocks);
    }
  }
  for (const BlockCopy& copy : transfers.block_copies) {
    check("block_copies", copy.src, config.num_kv_blocks);
    check("block_copies", copy.dst, config.num_kv_blocks);
  }
}

}  // namespace

void check_batch(const InputBatch& batch, const Program& program, const ExecutorConfig& config) {
  const size_t tokens = batch.token_ids.size();
  const auto seqs = static_cast<size_t>(std::max(batch.num_seqs, 0));
  check_size("positions", batch.positions.size(), tokens);
  check_size("slot_mapping", batch.slot_mapping.size(), tokens);
  check_size("query_start_loc", batch.query_start_loc.size(), seqs + 1);
  check_size("seq_lens", batch.seq_lens.size(), seqs);
  check_size("block_table_rows", batch.block_table_rows.size(), seqs);
  if (batch.query_start_loc[0] != 0 || batch.query_start_loc[seqs] != batch.num_tokens()) {
    throw InvalidArgument("query_start_loc must run from 0 to " + std::to_string(tokens));
  }
  check_range("token_ids", batch.token_ids, 0, smallest_table(program, OpKind::kEmbed, 0));
  check_range("positions", batch.positions, 0, num_positions(program));
  check_range("slot_mapping", batch.slot_mapping, INT32_MIN,
              static_cast<int64_t>(config.num_kv_blocks) * config.block_size);
  check_range("logits_indices", batch.logits_indices, 0, batch.num_tokens());
  for (int32_t seq = 0; seq < batch.num_seqs; ++seq) check_sequence(batch, seq, config);
  check_transfers(batch.transfers, config);
}

}  // namespace fastpage
