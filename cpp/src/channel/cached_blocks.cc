#include "channel/cached_blocks.h"

namespace fastpage {

namespace {

constexpr size_t kMostTokensInAPart = 1 << 16;

size_t index_of(KvTier tier) { return tier == KvTier::kDevice ? 0 : 1; }

}  // namespace

void CachedBlocks::take_in(const std::vector<KvEvent>& events) {
  for (const KvEvent& event : events) {
    switch (event.kind) {
      case KvEvent::Kind::kStored:
        store(event);
        break;
      case KvEvent::Kind::kRemoved:
        remove(event);
        break;
      case KvEvent::Kind::kCleared:
        blocks_.clear();
        by_hash_.clear();
        break;
    }
  }
}

std::vector<std::vector<KvEvent>> CachedBlocks::parts() const {
  std::vector<std::vector<KvEvent>> made;
  size_t num_tokens = kMostTokensInAPart;
  for (const Block& block : blocks_) {
    for (const KvTier tier : {KvTier::kDevice, KvTier::kHost}) {
      if (!block.in_tier[index_of(tier)]) continue;
      if (num_tokens >= kMostTokensInAPart) {
        made.emplace_back();
        num_tokens = 0;
      }
      made.back().push_back(block.stored);
      made.back().back().tier = tier;
      num_tokens += block.stored.token_ids.size();
    }
  }
  return made;
}

void CachedBlocks::store(const KvEvent& event) {
  const auto [place, is_new] = by_hash_.try_emplace(event.hash);
  if (is_new) place->second = blocks_.insert(blocks_.end(), Block{event});
  place->second->in_tier[index_of(event.tier)] = true;
}

void CachedBlocks::remove(const KvEvent& event) {
  const auto place = by_hash_.find(event.hash);
  if (place == by_hash_.end()) return;
  Block& block = *place->second;
  block.in_tier[index_of(event.tier)] = false;
  if (block.in_tier[0] || block.in_tier[1]) return;
  blocks_.erase(place->second);
  by_hash_.erase(place);
}

}  // namespace fastpage
