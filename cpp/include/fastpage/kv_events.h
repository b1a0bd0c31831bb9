// What became findable in the prefix cache, and what no longer is: for routers that send a request
// where its prefix is cached.
#pragma once

#include <vector>

#include "fastpage/block_pool.h"
#include "fastpage/types.h"

namespace fastpage {

enum class KvTier : uint8_t { kDevice, kHost };

struct KvEvent {
  enum class Kind : uint8_t {
    kStored,   // the block can be found in `tier` from now on
    kRemoved,  // it no longer can
    kCleared,  // nothing can, in either tier
  };
  Kind kind;
  KvTier tier = KvTier::kDevice;
  BlockHash hash;  // opaque: its key is a secret of the process
  // Only of blocks stored on the device; a block stored on the host has been there before.
  BlockHash parent_hash;  // of the block before it; none for a prompt's first
  std::vector<TokenId> token_ids;
};

}  // namespace fastpage
