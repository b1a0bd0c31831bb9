// PagedAttention on the GPU: a plan that the host makes once a step, and the op that every layer
// runs over it. The plan lies in fixed buffers, so that a captured CUDA graph replays with new
// lengths: fill the same host buffer, copy it to the same device buffer, replay.
#pragma once

#include <vector>

#include "cuda/ops.h"

namespace fastpage::cuda {

struct AttentionPlanConfig {
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  int32_t max_num_seqs = 0;
  int32_t max_num_tokens = 0;  // new ones, of a step
  int32_t max_seq_len = 0;     // of one sequence
  int32_t num_multiprocessors = 132;
  // A row is the same to the bit whatever the batch, and however many new tokens its sequence
  // brings in a step: KV is cut into pieces at absolute positions, each is summed up in one order,
  // and they are folded from the first to the last. Who computes which piece is the plan's choice.
  bool batch_invariant = false;
  // The grids are as large as any plan within the maxima needs, rather than as this step's plan
  // does.
  bool fixed_grid = false;
  // No sequence brings more than one new token: nothing is launched for those that would.
  bool decode_only = false;
};

// Constants of the batch-invariant mode: tokens of a piece of KV, and rows ((token, head) pairs of
// a KV head) of a tile where a sequence has few: one new token, or no more than two such tiles.
constexpr int32_t kPieceTokens = 512;
constexpr int32_t kFewRows = 16;

// One thread block's work. Sequences with one new token are decoded: their KV is split over several
// blocks, which leave partial results, and the last to finish merges them. The others' new tokens,
// times the heads that share a KV head, are cut into tiles of rows.
struct DecodeItem {
  int32_t seq;
  int32_t begin;    // first token of the KV; a multiple of 16
  int32_t end;      // behind its last
  int32_t partial;  // where its partial result goes; -1: it is the only one
};
struct PrefillItem {
  int32_t seq;
  int32_t tile;
};

class AttentionPlan {
 public:
  // Throws InvalidArgument.
  explicit AttentionPlan(const AttentionPlanConfig& config);

  // Sizes of the buffers: of the plan (int32), of partial results (fp32), and of counters (uint32,
  // which have to be zero before the first run and are again after each). Batch-invariant partial
  // results are num_heads * (head_dim + 2) floats for each of max_num_tokens (unless decode_only)
  // and of min(kMostSplits, max_num_tokens * pieces of max_seq_len); none if that is one piece.
  int64_t plan_size() const { return layout_.size; }
  int64_t workspace_size() const;
  int64_t num_counters() const { return num_counters_; }

  // Lays out a step into `buffer`, [plan_size()], in host memory. query_start_loc: [num_seqs + 1],
  // seq_lens: [num_seqs], the new tokens included. Throws InvalidArgument if a maximum is exceeded.
  void plan(Span<const int32_t> query_start_loc, Span<const int32_t> seq_lens,
            Span<int32_t> buffer);

  const AttentionPlanConfig& config() const { return config_; }
  // Batch-invariant: of few rows, and of many.
  int32_t num_decode_items() const { return num_decode_items_; }
  int32_t num_prefill_items() const { return num_prefill_items_; }
  // Of the step laid out last: 0 before the first.
  int32_t num_seqs() const { return num_seqs_; }
  int32_t num_tokens() const { return num_tokens_; }
  int32_t longest_seq_len() const { return longest_seq_len_; }

  // Offsets in int32s.
  struct Layout {
    int64_t counts = 0;           // num_seqs, decode items, prefill items, 0
    int64_t query_start_loc = 0;  // [max_num_seqs + 1]
    int64_t seq_lens = 0;         // [max_num_seqs]
    int64_t first_partial = 0;    // [max_num_seqs]
    int64_t num_partials = 0;     // [max_num_seqs]
    int64_t decode = 0;           // [max_decode_items][4]; batch-invariant: [8]
    int64_t prefill = 0;          // [max_prefill_items][2]; batch-invariant: [8]
    int64_t size = 0;
  };
  const Layout& layout() const { return layout_; }
  int32_t max_decode_items() const { return max_decode_items_; }
  int32_t max_prefill_items() const { return max_prefill_items_; }
  // Rows of a prefill tile, (token, head) pairs.
  int32_t tile_rows() const;
  // Of the workspace, for partial results of a head: a decoded split's, or of a row and its pieces.
  int64_t max_partials() const { return max_partials_; }

 private:
  // A tile of rows, batch-invariant, and how many pieces its last row sees.
  struct PieceTile {
    int32_t seq;
    int32_t tile;
    int32_t rows;
    int32_t pieces;
  };
  struct PieceRun {
    int32_t tile;  // of those that are laid out
    int32_t first, end;
    int32_t slot_row;  // of a KV head's part of the workspace
    int32_t counter;
  };

  void set_sizes();
  void set_batch_invariant_sizes();
  void check_step(Span<const int32_t> query_start_loc, Span<const int32_t> seq_lens) const;
  void plan_splits(Span<const int32_t> query_start_loc, Span<const int32_t> seq_lens,
                   Span<int32_t> buffer);
  void plan_pieces(Span<const int32_t> query_start_loc, Span<const int32_t> seq_lens,
                   Span<int32_t> buffer);
  int32_t run_length(const std::vector<PieceTile>& tiles, bool many_rows) const;
  int32_t lay_out_runs(const std::vector<PieceTile>& tiles, bool many_rows, int32_t* to);
  int32_t split_size(const std::vector<int32_t>& lens) const;

  AttentionPlanConfig config_;
  Layout layout_;
  int32_t max_decode_items_ = 0;
  int32_t max_prefill_items_ = 0;
  int64_t max_partials_ = 0;
  int64_t num_counters_ = 0;
  int32_t num_decode_items_ = 0;
  int32_t num_prefill_items_ = 0;
  int32_t num_seqs_ = 0;
  int32_t num_tokens_ = 0;
  int32_t longest_seq_len_ = 0;
  std::vector<DecodeItem> decode_;
  std::vector<std::pair<int64_t, PrefillItem>> prefill_;  // by the length of the KV
  std::vector<PieceTile> few_rows_, many_rows_;
  std::vector<PieceRun> runs_;
};

struct AttentionParams {
  float scale = 1.0f;
  int32_t sliding_window = 0;           // 0 = none; else the last positions, oneself included
  float soft_cap = 0.0f;                // 0 = none; else cap * tanh(score / cap)
  const float* alibi_slopes = nullptr;  // [num_heads], or null
};

// Causal attention; see fastpage/ops.h for what it computes. q, out: [num_tokens][num_heads *
// head_dim], of one type, the cache's (float8: bfloat16 or float16; float32 is slow); block_tables:
// int32, row i is sequence i's, with as many rows as the plan has sequences and blocks for the
// longest of them. With fixed_grid all three have the sizes of the plan's maxima: rows and
// sequences behind those of the plan in the buffer are padding, neither read nor written. head_dim:
// a multiple of 16 up to 128, or 256. plan_buffer, workspace, counters: on the device, see
// AttentionPlan. Rows without a token before or at their own come out as zeros.
void paged_attention(const Rows& q, const KvCache& cache, const Rows& block_tables,
                     const AttentionPlan& plan, const int32_t* plan_buffer, float* workspace,
                     uint32_t* counters, const AttentionParams& params, const Rows& out,
                     Stream stream);

}  // namespace fastpage::cuda
