// The host's side of attention: who computes what.
#include <algorithm>
#include <string>

#include "cuda/attention.h"

namespace fastpage::cuda {

namespace {

constexpr int32_t kGranule = 64;                 // four warps times 16 tokens
constexpr int32_t kSmallestSplit = 128;          // below it, a block costs more than it reads
constexpr int32_t kBlocksPerMultiprocessor = 2;  // of decode, that run at once (shared memory)

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
  // Enough for the shares that fill the device, and one end of a sequence each.
  max_decode_items_ = c.batch_invariant ? 0 : c.max_num_seqs + wanted_splits(c);
  const int64_t group = c.num_heads / c.num_kv_heads;
  if (!c.decode_only || c.batch_invariant) {
    max_prefill_items_ = ceil_div(int64_t{c.max_num_tokens} * group, tile_rows()) +
                         std::min(c.max_num_seqs, c.max_num_tokens);
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
  layout_.decode = place(int64_t{max_decode_items_} * 4);
  layout_.prefill = place(int64_t{max_prefill_items_} * 2);
  layout_.size = at;
}

int32_t AttentionPlan::tile_rows() const { return config_.head_dim <= 128 ? 128 : 64; }

// Of each split and head: head_dim sums, the greatest score, and the sum of weights.
int64_t AttentionPlan::workspace_size() const {
  return int64_t{max_decode_items_} * config_.num_heads * (config_.head_dim + 2);
}

int64_t AttentionPlan::num_counters() const {
  return config_.batch_invariant ? 0 : int64_t{config_.max_num_seqs} * blocks_per_split(config_);
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

void AttentionPlan::plan(Span<const int32_t> query_start_loc, Span<const int32_t> seq_lens,
                         Span<int32_t> buffer) {
  const AttentionPlanConfig& c = config_;
  const auto num_seqs = static_cast<int32_t>(seq_lens.size());
  check(num_seqs <= c.max_num_seqs, "seq_lens",
        "has " + std::to_string(num_seqs) + " sequences: max_num_seqs is " +
            std::to_string(c.max_num_seqs));
  check(query_start_loc.size() == seq_lens.size() + 1, "query_start_loc",
        "must have one element more than seq_lens");
  check(static_cast<int64_t>(buffer.size()) == layout_.size, "buffer",
        "must have plan_size elements");
  std::vector<int32_t> decode_lens;
  for (int32_t i = 0; i < num_seqs; ++i) {
    const int32_t tokens = query_start_loc[i + 1] - query_start_loc[i];
    check(tokens >= 0, "query_start_loc", "must not descend");
    check(tokens <= 1 || !c.decode_only, "query_start_loc",
          "has " + std::to_string(tokens) + " new tokens of a sequence: the plan is decode_only");
    check(seq_lens[i] >= tokens && seq_lens[i] <= c.max_seq_len, "seq_lens",
          "holds " + std::to_string(seq_lens[i]) + " for " + std::to_string(tokens) +
              " new tokens; max_seq_len is " + std::to_string(c.max_seq_len));
    if (is_decoded(tokens)) decode_lens.push_back(seq_lens[i]);
  }
  check(query_start_loc[0] == 0, "query_start_loc", "must begin with 0");
  check(query_start_loc[num_seqs] <= c.max_num_tokens, "query_start_loc",
        "has more than max_num_tokens, " + std::to_string(c.max_num_tokens));

  const int32_t split = split_size(decode_lens);
  const int64_t group = c.num_heads / c.num_kv_heads;
  decode_.clear();
  prefill_.clear();
  int32_t partial = 0;
  std::fill(buffer.begin(), buffer.end(), 0);
  for (int32_t i = 0; i < num_seqs; ++i) {
    const int32_t tokens = query_start_loc[i + 1] - query_start_loc[i];
    const int32_t len = seq_lens[i];
    if (is_decoded(tokens)) {
      const int32_t splits = std::max(1, ceil_div(len, split));
      buffer[layout_.first_partial + i] = partial;
      buffer[layout_.num_partials + i] = splits;
      for (int32_t s = 0; s < splits; ++s) {
        decode_.push_back(
            {i, s * split, std::min(len, (s + 1) * split), splits == 1 ? -1 : partial + s});
      }
      if (splits > 1) partial += splits;
    }
    const int32_t tiles = is_decoded(tokens) ? 0 : ceil_div(tokens * group, tile_rows());
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
  num_seqs_ = num_seqs;
  num_tokens_ = query_start_loc[num_seqs];
  longest_seq_len_ = num_seqs > 0 ? *std::max_element(seq_lens.begin(), seq_lens.end()) : 0;
  buffer[layout_.counts] = num_seqs;
  buffer[layout_.counts + 1] = num_decode_items_;
  buffer[layout_.counts + 2] = num_prefill_items_;
  std::copy(query_start_loc.begin(), query_start_loc.end(), &buffer[layout_.query_start_loc]);
  std::copy(seq_lens.begin(), seq_lens.end(), &buffer[layout_.seq_lens]);
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

}  // namespace fastpage::cuda
