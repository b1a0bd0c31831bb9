// What is in the prefix cache, from its KV events: for front ends that come when there is
// something.
#pragma once

#include <list>
#include <unordered_map>
#include <vector>

#include "fastpage/kv_events.h"

namespace fastpage {

class CachedBlocks {
 public:
  void take_in(const std::vector<KvEvent>& events);
  // As events: a block for each tier that it is in, with its tokens, in the order in which the
  // blocks were stored first. Each part is as much as one message should hold.
  std::vector<std::vector<KvEvent>> parts() const;

 private:
  struct Block {
    KvEvent stored;
    bool in_tier[2] = {false, false};
  };
  struct HashOfBlock {  // it is a hash already
    size_t operator()(const BlockHash& hash) const { return static_cast<size_t>(hash.lo); }
  };

  void store(const KvEvent& event);
  void remove(const KvEvent& event);

  std::list<Block> blocks_;
  std::unordered_map<BlockHash, std::list<Block>::iterator, HashOfBlock> by_hash_;
};

}  // namespace fastpage
