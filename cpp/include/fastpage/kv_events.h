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
  BlockHash hash;                  // opaque: its key is a secret of the process
  BlockHash parent_hash;           // of the block before it; none for a prompt's first (stored only)
  std::vector<TokenId> token_ids;  // the block's (stored only, and on the device)
};

}  // namespace fastpage
