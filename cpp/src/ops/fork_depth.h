// Threads and fork(): a child has the calling thread alone.
#pragma once

namespace fastpage {

// How many forks lie between this process and the first one that asked. Whoever started a thread at
// another depth does not have it here.
int fork_depth();

}  // namespace fastpage
