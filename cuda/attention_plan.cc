// The host's side of attention: who computes what.
#include <algorithm>
#include <string>

#include "cuda/attention.h"

namespace fastpage::cuda {

namespace {

constexpr int32_t kGranule = 64;                 // four warps times 16 tokens
constexpr int32_t kSmallestSplit = 128;          // below it, a block costs more than it reads
constexpr int32_t kBlocksPerMultiprocessor = 2;  // that run at once (shared memory, registers)
constexpr int32_t kRunSize = 8;                  // int32s of a run of pieces
constexpr int32_t kRounds = 2;  // of blocks that run at once: what ends late is short
// Partial results of pieces, in tokens, for which there is room beside the least that is needed.
constexpr int64_t kMostSplits = 4096;

void check(bool ok, const char* name, const std::string& what) {
  if (!ok) throw InvalidArgument(std::string(name) + " " + what);
}

int32_t ceil_div(int64_t a, int64_t b) { return static_cast<int32_t>((a + b - 1) / b); }

int64_t num_splits(const std::vector<int32_t>& lens, int32_t split) {
  int64_t n = 0;
  for (const int32_t len : lens) n += std::max(1, ceil_div(len, split));
  return n;
}

// Of decode, for a sequence: KV heads, and groups of 16 of the heads that share one.
int32_t blocks_per_split(const AttentionPlanConfig& c) {
  return c.num_kv_heads * ceil_div(c.num_heads / c.num_kv_heads, 16);
}

// How many splits of KV fill the device.
int32_t wanted_splits(const AttentionPlanConfig& c) {
  return std::max(1, c.num_multiprocessors * kBlocksPerMultiprocessor / blocks_per_split(c));
}

// How many runs of pieces fill the device.
int32_t wanted_runs(const AttentionPlanConfig& c) {
  return std::max(1, c.num_multiprocessors * kBlocksPerMultiprocessor / c.num_kv_heads);
}

}  // namespace

AttentionPlan::AttentionPlan(const AttentionPlanConfig& config) : config_(config) {
  const AttentionPlanConfig& c = config_;
  check(c.num_kv_heads > 0 && c.num_heads > 0 && c.num_heads % c.num_kv_heads == 0, "num_heads",
        "must be a multiple of num_kv_heads");
  check((c.head_dim > 0 && c.head_dim <= 128 && c.head_dim % 16 == 0) || c.head_dim == 256,
        "head_dim",
        "must be a multiple of 16 up to 128, or 256, not " + std::to_string(c.head_dim));
  check(c.max_num_seqs > 0, "max_num_seqs", "must be positive");
  check(c.max_num_tokens > 0, "max_num_tokens", "must be positive");
  check(c.max_seq_len > 0, "max_seq_len", "must be positive");
  check(c.num_multiprocessors > 0, "num_multiprocessors", "must be positive");
  if (c.batch_invariant) {
    set_batch_invariant_sizes();
  } else {
    set_sizes();
  }
  int64_t at = 0;
  const auto place = [&at](int64_t n) {
    const int64_t begin = at;
    at += (n + 3) / 4 * 4;
    return begin;
  };
  layout_.counts = place(4);
  layout_.query_start_loc = place(c.max_num_seqs + 1);
  layout_.seq_lens = place(c.max_num_seqs);
  layout_.first_partial = place(c.max_num_seqs);
  layout_.num_partials = place(c.max_num_seqs);
  layout_.decode = place(int64_t{max_decode_items_} * (c.batch_invariant ? kRunSize : 4));
  layout_.prefill = place(int64_t{max_prefill_items_} * (c.batch_invariant ? kRunSize : 2));
  layout_.size = at;
}

int32_t AttentionPlan::tile_rows() const { return config_.head_dim <= 128 ? 128 : 64; }

// Of each partial result: head_dim sums, the greatest score, and the sum of weights.
int64_t AttentionPlan::workspace_size() const {
  return max_partials_ * config_.num_heads * (config_.head_dim + 2);
}

void AttentionPlan::set_sizes() {
  const AttentionPlanConfig& c = config_;
  // Enough for the shares that fill the device, and one end of a sequence each.
  max_decode_items_ = c.max_num_seqs + wanted_splits(c);
  if (!c.decode_only) {
    const int64_t group = c.num_heads / c.num_kv_heads;
    max_prefill_items_ = ceil_div(int64_t{c.max_num_tokens} * group, tile_rows()) +
                         std::min(c.max_num_seqs, c.max_num_tokens);
  }
  max_partials_ = max_decode_items_;
  num_counters_ = int64_t{c.max_num_seqs} * blocks_per_split(c);
}

void AttentionPlan::set_batch_invariant_sizes() {
  const AttentionPlanConfig& c = config_;
  const int64_t group = c.num_heads / c.num_kv_heads;
  const int64_t pieces = ceil_div(c.max_seq_len, kPieceTokens);
  const int32_t num_seqs = std::min(c.max_num_seqs, c.max_num_tokens);
  const int32_t few = num_seqs * std::max(c.decode_only ? 1 : 2, ceil_div(group, kFewRows));
  const int32_t many =
      c.decode_only ? 0 : ceil_div(c.max_num_tokens * group, tile_rows()) + num_seqs;
  // See run_length.
  const int32_t more = pieces > 1 ? kRounds * wanted_runs(c) : 0;
  max_decode_items_ = few + more;
  max_prefill_items_ = c.decode_only ? 0 : many + more;
  if (pieces == 1) return;
  max_partials_ = (c.decode_only ? 0 : c.max_num_tokens) +
                  std::min(kMostSplits, int64_t{c.max_num_tokens} * pieces);
  num_counters_ = int64_t{std::max(few, many)} * c.num_kv_heads;
}

// The smallest number of tokens that cuts `lens` into no more splits than the device runs at once;
// if there are more sequences than that, the longest are still cut to an average block's share.
int32_t AttentionPlan::split_size(const std::vector<int32_t>& lens) const {
  int64_t limit = wanted_splits(config_);
  const auto num_seqs = static_cast<int64_t>(lens.size());
  if (num_seqs >= limit) limit += num_seqs;
  int32_t low = kSmallestSplit / kGranule,
          high = std::max(low, ceil_div(config_.max_seq_len, kGranule));
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    if (num_splits(lens, middle * kGranule) <= limit) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low * kGranule;
}

void AttentionPlan::check_step(Span<const int32_t> query_start_loc,
                               Span<const int32_t> seq_lens) const {
  const AttentionPlanConfig& c = config_;
  const auto num_seqs = static_cast<int32_t>(seq_lens.size());
  check(num_seqs <= c.max_num_seqs, "seq_lens",
        "has " + std::to_string(num_seqs) + " sequences: max_num_seqs is " +
            std::to_string(c.max_num_seqs));
  check(query_start_loc.size() == seq_lens.size() + 1, "query_start_loc",
        "must have one element more than seq_lens");
  for (int32_t i = 0; i < num_seqs; ++i) {
    const int32_t tokens = query_start_loc[i + 1] - query_start_loc[i];
    check(tokens >= 0, "query_start_loc", "must not descend");
    check(tokens <= 1 || !c.decode_only, "query_start_loc",
          "has " + std::to_string(tokens) + " new tokens of a sequence: the plan is decode_only");
    check(seq_lens[i] >= tokens && seq_lens[i] <= c.max_seq_len, "seq_lens",
          "holds " + std::to_string(seq_lens[i]) + " for " + std::to_string(tokens) +
              " new tokens; max_seq_len is " + std::to_string(c.max_seq_len));
  }
  check(query_start_loc[0] == 0, "query_start_loc", "must begin with 0");
  check(query_start_loc[num_seqs] <= c.max_num_tokens, "query_start_loc",
        "has more than max_num_tokens, " + std::to_string(c.max_num_tokens));
}

void AttentionPlan::plan(Span<const int32_t> query_start_loc, Span<const int32_t> seq_lens,
                         Span<int32_t> buffer) {
  check(static_cast<int64_t>(buffer.size()) == layout_.size, "buffer",
        "must have plan_size elements");
  check_step(query_start_loc, seq_lens);
  const auto num_seqs = static_cast<int32_t>(seq_lens.size());
  std::fill(buffer.begin(), buffer.end(), 0);
  std::copy(query_start_loc.begin(), query_start_loc.end(), &buffer[layout_.query_start_loc]);
  std::copy(seq_lens.begin(), seq_lens.end(), &buffer[layout_.seq_lens]);
  if (config_.batch_invariant) {
    plan_pieces(query_start_loc, seq_lens, buffer);
  } else {
    plan_splits(query_start_loc, seq_lens, buffer);
  }
  num_seqs_ = num_seqs;
  num_tokens_ = query_start_loc[num_seqs];
  longest_seq_len_ = num_seqs > 0 ? *std::max_element(seq_lens.begin(), seq_lens.end()) : 0;
  buffer[layout_.counts] = num_seqs;
  buffer[layout_.counts + 1] = num_decode_items_;
  buffer[layout_.counts + 2] = num_prefill_items_;
}

void AttentionPlan::plan_splits(Span<const int32_t> query_start_loc, Span<const int32_t> seq_lens,
                                Span<int32_t> buffer) {
  const auto num_seqs = static_cast<int32_t>(seq_lens.size());
  const auto new_tokens = [&](int32_t i) { return query_start_loc[i + 1] - query_start_loc[i]; };
  std::vector<int32_t> decode_lens;
  for (int32_t i = 0; i < num_seqs; ++i) {
    if (new_tokens(i) == 1) decode_lens.push_back(seq_lens[i]);
  }
  const int32_t split = split_size(decode_lens);
  const int64_t group = config_.num_heads / config_.num_kv_heads;
  decode_.clear();
  prefill_.clear();
  int32_t partial = 0;
  for (int32_t i = 0; i < num_seqs; ++i) {
    const int32_t tokens = new_tokens(i), len = seq_lens[i];
    if (tokens == 1) {
      const int32_t splits = std::max(1, ceil_div(len, split));
      buffer[layout_.first_partial + i] = partial;
      buffer[layout_.num_partials + i] = splits;
      for (int32_t s = 0; s < splits; ++s) {
        decode_.push_back(
            {i, s * split, std::min(len, (s + 1) * split), splits == 1 ? -1 : partial + s});
      }
      if (splits > 1) partial += splits;
    }
    const int32_t tiles = tokens == 1 ? 0 : ceil_div(tokens * group, tile_rows());
    for (int32_t t = 0; t < tiles; ++t) {
      const int64_t last = std::min<int64_t>(tokens, ceil_div(int64_t{t + 1} * tile_rows(), group));
      prefill_.push_back({len - tokens + last, {i, t}});
    }
  }
  check(static_cast<int64_t>(decode_.size()) <= max_decode_items_, "seq_lens",
        "need more splits than there is room for");
  // The longest first: no block begins a long one when the others are done.
  const auto longer = [](const DecodeItem& a, const DecodeItem& b) {
    return a.end - a.begin > b.end - b.begin;
  };
  std::stable_sort(decode_.begin(), decode_.end(), longer);
  std::stable_sort(prefill_.begin(), prefill_.end(),
                   [](const auto& a, const auto& b) { return a.first > b.first; });

  num_decode_items_ = static_cast<int32_t>(decode_.size());
  num_prefill_items_ = static_cast<int32_t>(prefill_.size());
  int32_t* to = &buffer[layout_.decode];
  for (const DecodeItem& item : decode_) {
    for (const int32_t x : {item.seq, item.begin, item.end, item.partial}) *to++ = x;
  }
  to = &buffer[layout_.prefill];
  for (const auto& [length, item] : prefill_) {
    *to++ = item.seq;
    *to++ = item.tile;
  }
}

// Pieces of a run: as many as make an average block's share when every multiprocessor runs kRounds
// blocks one after the other, so that there are no more than that many runs and one end of a tile
// each; or as many more as the workspace has room for.
int32_t AttentionPlan::run_length(const std::vector<PieceTile>& tiles, bool many_rows) const {
  int64_t total = 0;
  for (const PieceTile& tile : tiles) total += tile.pieces;
  const int64_t room = max_partials_ * (config_.num_heads / config_.num_kv_heads);
  const auto needed = [&](int32_t length) {
    int64_t rows = 0;
    for (const PieceTile& tile : tiles) {
      if (tile.pieces > length) {
        rows += int64_t{tile.rows} * (tile.pieces - length + 1);
      } else if (many_rows && tile.pieces > 1) {
        rows += tile.rows;  // what is folded so far does not fit into registers beside a piece
      }
    }
    return rows;
  };
  int32_t length = std::max(1, ceil_div(total, int64_t{kRounds} * wanted_runs(config_)));
  while (needed(length) > room) length += std::max(1, length / 4);
  return length;
}

int32_t AttentionPlan::lay_out_runs(const std::vector<PieceTile>& tiles, bool many_rows,
                                    int32_t* to) {
  const int32_t length = run_length(tiles, many_rows);
  int32_t slot_row = 0, counter = 0;
  runs_.clear();
  for (size_t i = 0; i < tiles.size(); ++i) {
    const PieceTile& tile = tiles[i];
    for (int32_t first = 0; first < tile.pieces; first += length) {
      runs_.push_back({static_cast<int32_t>(i), first, std::min(tile.pieces, first + length),
                       slot_row, counter});
    }
    if (tile.pieces > length) {
      slot_row += tile.rows * (tile.pieces - length + 1);
      ++counter;
    } else if (many_rows && tile.pieces > 1) {
      slot_row += tile.rows;
    }
  }
  std::stable_sort(runs_.begin(), runs_.end(), [](const PieceRun& a, const PieceRun& b) {
    return a.end - a.first > b.end - b.first;
  });
  for (const PieceRun& run : runs_) {
    const PieceTile& tile = tiles[run.tile];
    for (const int32_t x : {tile.seq, tile.tile, run.first, run.end, tile.pieces, length,
                            run.slot_row, run.counter}) {
      *to++ = x;
    }
  }
  return static_cast<int32_t>(runs_.size());
}

// Sequences that bring few rows go to one kernel, the others to another; one runs after the other,
// over the same workspace.
void AttentionPlan::plan_pieces(Span<const int32_t> query_start_loc, Span<const int32_t> seq_lens,
                                Span<int32_t> buffer) {
  const int32_t group = config_.num_heads / config_.num_kv_heads;
  few_rows_.clear();
  many_rows_.clear();
  for (int32_t i = 0; i < static_cast<int32_t>(seq_lens.size()); ++i) {
    const int32_t tokens = query_start_loc[i + 1] - query_start_loc[i];
    const int32_t rows = tokens * group;
    const bool is_few = tokens == 1 || rows <= 2 * kFewRows;
    const int32_t size = is_few ? kFewRows : tile_rows();
    for (int32_t first = 0; first < rows; first += size) {
      const int32_t end = std::min(rows, first + size);
      const int32_t seen = seq_lens[i] - tokens + ceil_div(end, group);
      (is_few ? few_rows_ : many_rows_)
          .push_back({i, first / size, end - first, ceil_div(seen, kPieceTokens)});
    }
  }
  num_decode_items_ = lay_out_runs(few_rows_, false, &buffer[layout_.decode]);
  num_prefill_items_ = lay_out_runs(many_rows_, true, &buffer[layout_.prefill]);
}

}  // namespace fastpage::cuda
