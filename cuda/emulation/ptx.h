// Runs the PTX that nvcc made of a kernel, on the CPU: what is emulated otherwise is the kernel's
// source. Instructions are those that our kernels come to, with the meaning that the PTX ISA gives
// them; another one ends the launch by name. Each thread has a program counter of its own: threads
// of a warp that diverge run in an order that Settings choose (on Volta and later they may run in
// any), and meet again only where an instruction says so (.sync).
//
// What a GPU would leave undefined ends the launch with an exception: accesses to shared memory by
// two threads, at least one a write, without bar.sync (or, in a warp, bar.warp.sync) between them;
// to what a cp.async is still bringing; to global memory that another thread of the launch has
// written, without a barrier or, of another block, fence, atomic and fence between; misaligned
// ones; those outside of all arguments.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "cuda/emulation/runtime.h"

namespace fastpage::cuda::emulation {

// What the launches of a kernel did. A warp's access to shared memory takes as many wavefronts as
// the most words that it wants of one bank (by halves or quarters of a warp, for 8 or 16 bytes a
// thread), to global memory as many sectors of 32 bytes as it touches; "least": with the best
// addresses for as many bytes.
struct PtxCounts {
  int64_t launches = 0;
  int64_t instructions = 0;  // of warps
  int64_t shared_wavefronts = 0, shared_least = 0;
  int64_t global_sectors = 0, global_least = 0;
};

// Kernels of these files (as nvcc -ptx writes them) run as PTX from now on, others end with an
// error; none: the sources run.
void load_ptx(const std::vector<std::string>& paths);

const std::map<std::string, PtxCounts>& ptx_counts();

}  // namespace fastpage::cuda::emulation
