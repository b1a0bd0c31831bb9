// The block manager against memory: random rows on a device and a host tier whose contents are
// kept, with the transfers executed in their documented order. Every row must read what was written
// for it, and every block that can be found must hold what its hash stands for.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <deque>
#include <map>
#include <random>
#include <set>

#include "fastpage/block_manager.h"

namespace fastpage {
namespace {

constexpr int32_t kBlockSize = 4;
constexpr int32_t kMaxLen = 24;
constexpr uint64_t kGarbage = ~uint64_t{0};

using Contents = std::array<uint64_t, kBlockSize>;

// The KV of a token depends on all the tokens before it.
uint64_t next_kv(uint64_t before, TokenId token) {
  uint64_t x = (before ^ static_cast<uint64_t>(token + 1)) * 0x9e3779b97f4a7c15;
  return x ^ (x >> 29);
}

struct Row {
  bool used = false;
  int64_t life = 0;  // a later one must not get an earlier one's results
  std::vector<TokenId> tokens;
  std::vector<uint64_t> kv;
  std::vector<BlockHash> hashes;
  int32_t num_computed = 0;
  int32_t num_scheduled = 0;  // computed, or in a step under way
  int32_t num_published = 0;  // blocks
};

struct Work {
  int32_t row;
  int64_t life;
  int32_t first, end;  // tokens it computes
  std::vector<BlockId> table;
  std::vector<uint64_t> kv;
};

struct Step {
  BlockTransfers transfers;
  std::vector<Work> works;
};

struct CachedContents {
  Contents kv;
  BlockHash parent;
  std::vector<TokenId> tokens;
};

struct Coverage {
  int64_t swapped_out = 0, swapped_in = 0, copied = 0, discarded = 0, held_hits = 0, events = 0;
};

class World {
 public:
  World(uint64_t seed, Coverage* coverage)
      : random_(seed), blocks_(random_config()), coverage_(*coverage) {
    device_.resize(blocks_.config().num_blocks, filled(kGarbage));
    host_.resize(blocks_.config().num_host_blocks, filled(kGarbage));
    rows_.resize(blocks_.config().max_num_seqs);
    max_under_way_ = 1 + below(2);
  }

  void run(int num_turns) {
    for (int i = 0; i < num_turns && !testing::Test::HasFailure(); ++i) {
      if (static_cast<int32_t>(under_way_.size()) < max_under_way_) {
        schedule();
      } else if (one_in(12)) {
        discard();
      } else {
        execute(under_way_.front());
        update(under_way_.front());
        under_way_.pop_front();
      }
      if (one_in(6)) end(random_row(), random_keep());
      if (one_in(6)) fork();
      if (one_in(200)) blocks_.reset_prefix_cache();
      check();
    }
    EXPECT_EQ(blocks_.stats().num_swapped_out, num_swapped_out_);
    EXPECT_EQ(blocks_.stats().num_swapped_in, num_swapped_in_);
    EXPECT_EQ(blocks_.stats().num_copied, num_copied_);
    coverage_.swapped_out += num_swapped_out_;
    coverage_.swapped_in += num_swapped_in_;
    coverage_.copied += num_copied_;
  }

 private:
  static Contents filled(uint64_t value) {
    Contents contents;
    contents.fill(value);
    return contents;
  }
  int32_t below(int32_t n) { return static_cast<int32_t>(random_() % static_cast<uint64_t>(n)); }
  bool one_in(int32_t n) { return below(n) == 0; }
  int32_t random_row() { return below(static_cast<int32_t>(rows_.size())); }
  Keep random_keep() {
    return one_in(5) ? Keep::kForget : one_in(3) ? Keep::kCache : Keep::kOffload;
  }
  BlockManagerConfig random_config() {
    BlockManagerConfig config;
    config.num_blocks = 7 + below(14);
    config.num_host_blocks = below(4) * 4;
    config.block_size = kBlockSize;
    config.max_num_seqs = 5;
    config.max_model_len = kMaxLen;
    config.enable_kv_events = !one_in(4);
    return config;
  }

  // A token more; two kinds of them, so that rows have prefixes in common.
  void push_token(Row* row) {
    row->tokens.push_back(below(2));
    row->kv.push_back(next_kv(row->kv.empty() ? 0 : row->kv.back(), row->tokens.back()));
    const size_t n = row->tokens.size();
    if (n % kBlockSize != 0) return;
    const BlockHash hash{row->kv.back(), n};
    CachedContents& contents = contents_[hash.lo];
    std::copy_n(row->kv.end() - kBlockSize, kBlockSize, contents.kv.begin());
    contents.parent = row->hashes.empty() ? BlockHash{} : row->hashes.back();
    contents.tokens.assign(row->tokens.end() - kBlockSize, row->tokens.end());
    row->hashes.push_back(hash);
  }

  // A step: rows come, go on, fork and are pushed out again, in any order.
  void schedule() {
    under_way_.emplace_back();
    Step& step = under_way_.back();
    blocks_.begin_step(&step.transfers);
    for (int i = 1 + below(8); i > 0; --i) {
      const int32_t id = random_row();
      if (!rows_[id].used) {
        admit(id);
      } else if (one_in(8)) {
        end(id, random_keep());
      }
      if (one_in(8)) fork();
      if (rows_[id].used && !works_in(step, id)) go_on(&step, id);
      blocks_.check_integrity();
    }
    // Whoever was pushed out later in the step is not in it.
    step.works.erase(std::remove_if(step.works.begin(), step.works.end(),
                                    [this](const Work& work) { return !is_alive(work); }),
                     step.works.end());
    for (Work& work : step.works) {
      for (int32_t i = 0; i < blocks_.num_blocks_of(work.row); ++i) {
        work.table.push_back(blocks_.block_at(work.row, i));
      }
    }
    check_step(step);
  }

  void admit(int32_t id) {
    Row& row = rows_[id];
    const int64_t life = row.life + 1;
    row = Row();
    row.life = life;
    for (int32_t i = 1 + below(kMaxLen - 2); i > 0; --i) push_token(&row);
    // As a scheduler would: one token at least is computed.
    const size_t num_looked_up = (row.tokens.size() - 1) / kBlockSize;
    const CachedPrefix prefix = blocks_.find_cached({row.hashes.data(), num_looked_up});
    const int32_t num_found = static_cast<int32_t>(prefix.blocks.size());
    if (num_found - prefix.num_held > blocks_.pool().num_free()) return;
    coverage_.held_hits += prefix.num_held;
    row.used = true;
    row.num_published = blocks_.take_cached(id, prefix.blocks);
    row.num_computed = row.num_scheduled = num_found * kBlockSize;
  }

  void go_on(Step* step, int32_t id) {
    Row& row = rows_[id];
    const int32_t first = row.num_scheduled;
    const int32_t end = std::min(kMaxLen, first + 1 + below(one_in(2) ? 2 : 9));
    if (first == end || !blocks_.grow(id, end)) return;
    for (int32_t i = first / kBlockSize; i < blocks_.blocks_for(end); ++i) {
      if (!blocks_.make_writable(id, i)) return;
    }
    while (static_cast<int32_t>(row.tokens.size()) < end) push_token(&row);
    row.num_scheduled = end;
    step->works.push_back({id, row.life, first, end, {}, {row.kv.begin(), row.kv.begin() + end}});
  }

  void fork() {
    const int32_t from = random_row(), to = random_row();
    Row& parent = rows_[from];
    if (!parent.used || rows_[to].used || parent.num_scheduled != parent.num_computed) return;
    const int64_t life = rows_[to].life + 1;
    rows_[to] = parent;
    Row& child = rows_[to];
    child.life = life;
    child.tokens.clear();
    child.kv.clear();
    child.hashes.clear();
    for (int32_t i = 0; i < child.num_computed; ++i) {
      child.tokens.push_back(parent.tokens[i]);
      child.kv.push_back(parent.kv[i]);
    }
    child.hashes.assign(parent.hashes.begin(),
                        parent.hashes.begin() + child.num_computed / kBlockSize);
    blocks_.fork(from, to, blocks_.blocks_for(child.num_computed));
  }

  void end(int32_t id, Keep keep) {
    if (!rows_[id].used) return;
    rows_[id].used = false;
    blocks_.free(id, keep);
  }

  bool is_alive(const Work& work) const {
    return rows_[work.row].used && rows_[work.row].life == work.life;
  }
  bool works_in(const Step& step, int32_t id) const {
    return std::any_of(step.works.begin(), step.works.end(),
                       [&](const Work& w) { return w.row == id && is_alive(w); });
  }

  void check_step(const Step& step) {
    std::set<std::pair<BlockId, int32_t>> written;
    for (const Work& work : step.works) {
      for (int32_t i = work.first; i < work.end; ++i) {
        const BlockId id = work.table[i / kBlockSize];
        EXPECT_TRUE(written.insert({id, i % kBlockSize}).second) << "a slot is written twice";
        EXPECT_EQ(blocks_.pool().block(id).ref_count, 1);
        EXPECT_FALSE(blocks_.pool().block(id).hash);
      }
    }
    std::set<BlockId> hosts, devices;
    for (const BlockSwap& swap : step.transfers.swap_outs) hosts.insert(swap.host);
    for (const BlockSwap& swap : step.transfers.swap_ins) devices.insert(swap.device);
    EXPECT_EQ(hosts.size(), step.transfers.swap_outs.size());
    EXPECT_EQ(devices.size(), step.transfers.swap_ins.size());
    num_swapped_out_ += static_cast<int64_t>(step.transfers.swap_outs.size());
    num_swapped_in_ += static_cast<int64_t>(step.transfers.swap_ins.size());
    num_copied_ += static_cast<int64_t>(step.transfers.block_copies.size());
  }

  // Swaps in any order among themselves; copies in theirs.
  void execute(Step& step) {
    std::shuffle(step.transfers.swap_outs.begin(), step.transfers.swap_outs.end(), random_);
    std::shuffle(step.transfers.swap_ins.begin(), step.transfers.swap_ins.end(), random_);
    for (const BlockSwap& swap : step.transfers.swap_outs) host_[swap.host] = device_[swap.device];
    for (const BlockCopy& copy : step.transfers.block_copies) device_[copy.dst] = device_[copy.src];
    for (const BlockSwap& swap : step.transfers.swap_ins) device_[swap.device] = host_[swap.host];
    for (const Work& work : step.works) write(work, /*garbage=*/false);
    for (const Work& work : step.works) {
      if (!is_alive(work)) continue;
      for (int32_t i = 0; i < work.end; ++i) {
        ASSERT_EQ(device_[work.table[i / kBlockSize]][i % kBlockSize], work.kv[i])
            << "row " << work.row << " reads something else at position " << i;
      }
    }
  }

  void write(const Work& work, bool garbage) {
    for (int32_t i = work.first; i < work.end; ++i) {
      device_[work.table[i / kBlockSize]][i % kBlockSize] = garbage ? kGarbage : work.kv[i];
    }
  }

  void update(const Step& step) {
    for (const Work& work : step.works) {
      if (!is_alive(work)) continue;
      Row& row = rows_[work.row];
      row.num_computed = work.end;
      const int32_t num_full = row.num_computed / kBlockSize;
      if (num_full > row.num_published) {
        blocks_.publish(work.row, row.num_published, num_full, row.hashes.data(), row.tokens.data(),
                        one_in(2));
        row.num_published = num_full;
      }
      if (row.num_scheduled == kMaxLen && row.num_computed == kMaxLen) end(work.row, Keep::kCache);
    }
  }

  // The oldest step fails in its midst, whatever it did until then; those after it are not run.
  void discard() {
    const Step& failed = under_way_.front();
    for (const BlockSwap& swap : failed.transfers.swap_outs) {
      if (one_in(2)) host_[swap.host] = filled(kGarbage);
    }
    for (const BlockCopy& copy : failed.transfers.block_copies) {
      if (one_in(2)) device_[copy.dst] = filled(kGarbage);
    }
    for (const BlockSwap& swap : failed.transfers.swap_ins) {
      if (one_in(2)) device_[swap.device] = filled(kGarbage);
    }
    for (const Work& work : failed.works) {
      if (one_in(2)) write(work, /*garbage=*/true);
    }
    std::set<BlockId> unfilled;
    for (const Step& step : under_way_) {
      for (const BlockCopy& copy : step.transfers.block_copies) unfilled.insert(copy.dst);
      for (const BlockSwap& swap : step.transfers.swap_ins) unfilled.insert(swap.device);
    }
    if (one_in(2)) std::reverse(under_way_.begin(), under_way_.end());
    for (const Step& step : under_way_) blocks_.discard_step(step.transfers);
    under_way_.clear();
    for (int32_t id = 0; id < static_cast<int32_t>(rows_.size()); ++id) {
      Row& row = rows_[id];
      if (!row.used) continue;
      bool relied_on_it = false;
      for (int32_t i = 0; i < blocks_.num_blocks_of(id); ++i) {
        relied_on_it |= unfilled.count(blocks_.block_at(id, i)) > 0;
      }
      if (relied_on_it) {
        end(id, random_keep());
      } else {
        row.num_scheduled = row.num_computed;
        if (one_in(2)) blocks_.free(id, Keep::kCache, blocks_.blocks_for(row.num_computed));
      }
    }
    ++coverage_.discarded;
  }

  void check() {
    blocks_.check_integrity();
    std::set<BlockId> awaited;  // swapped out by a step under way
    for (const Step& step : under_way_) {
      for (const BlockSwap& swap : step.transfers.swap_outs) awaited.insert(swap.host);
    }
    check_contents(blocks_.pool(), device_, {});
    check_contents(blocks_.host_pool(), host_, awaited);
    check_events();
  }

  void check_contents(const BlockPool& pool, const std::vector<Contents>& memory,
                      const std::set<BlockId>& awaited) {
    for (BlockId id = 0; id < pool.num_blocks(); ++id) {
      const BlockHash hash = pool.block(id).hash;
      if (!hash || awaited.count(id) > 0) continue;
      ASSERT_TRUE(memory[id] == contents_.at(hash.lo).kv)
          << (&pool == &blocks_.pool() ? "device" : "host") << " block " << id
          << " holds something else than its hash says";
    }
  }

  // Who follows the events knows what can be found (of what is announced).
  void check_events() {
    std::vector<KvEvent> events;
    blocks_.take_kv_events(&events);
    coverage_.events += static_cast<int64_t>(events.size());
    for (const KvEvent& event : events) {
      std::set<uint64_t>& known = known_[event.tier == KvTier::kHost];
      switch (event.kind) {
        case KvEvent::Kind::kCleared:
          known_[0].clear();
          known_[1].clear();
          break;
        case KvEvent::Kind::kRemoved:
          EXPECT_EQ(known.erase(event.hash.lo), 1u) << "removed, yet never stored";
          break;
        case KvEvent::Kind::kStored:
          EXPECT_TRUE(known.insert(event.hash.lo).second) << "stored twice";
          if (event.tier == KvTier::kHost) break;
          EXPECT_TRUE(event.parent_hash == contents_.at(event.hash.lo).parent);
          EXPECT_EQ(event.token_ids, contents_.at(event.hash.lo).tokens);
          break;
      }
    }
    const BlockPool* pools[] = {&blocks_.pool(), &blocks_.host_pool()};
    for (int tier = 0; tier < 2; ++tier) {
      std::set<uint64_t> announced;
      for (BlockId id = 0; id < pools[tier]->num_blocks(); ++id) {
        if (pools[tier]->block(id).announced) announced.insert(pools[tier]->block(id).hash.lo);
      }
      EXPECT_EQ(known_[tier], announced);
    }
  }

  std::mt19937_64 random_;
  BlockManager blocks_;
  Coverage& coverage_;
  int32_t max_under_way_;
  std::vector<Contents> device_, host_;
  std::vector<Row> rows_;
  std::deque<Step> under_way_;                   // begin_step() keeps a pointer into it
  std::map<uint64_t, CachedContents> contents_;  // by hash
  std::set<uint64_t> known_[2];                  // what the events said: device, host
  int64_t num_swapped_out_ = 0, num_swapped_in_ = 0, num_copied_ = 0;
};

TEST(BlockContents, EveryRowReadsWhatWasWrittenForIt) {
  Coverage coverage;
  for (uint64_t seed = 0; seed < 400 && !HasFailure(); ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    World(seed, &coverage).run(150);
  }
  // Else the above proves nothing.
  for (const int64_t count : {coverage.swapped_out, coverage.swapped_in, coverage.copied,
                              coverage.discarded, coverage.held_hits, coverage.events}) {
    EXPECT_GT(count, 500);
  }
  RecordProperty("swapped_out", std::to_string(coverage.swapped_out));
  RecordProperty("swapped_in", std::to_string(coverage.swapped_in));
  RecordProperty("copied", std::to_string(coverage.copied));
}

}  // namespace
}  // namespace fastpage
