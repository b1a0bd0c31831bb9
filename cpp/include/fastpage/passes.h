// Rewrites of a Program that save memory traffic or calls, and change nothing else: a fused program
// gives the bits of the unfused one.
#pragma once

#include <string>
#include <vector>

#include "fastpage/program.h"

namespace fastpage {

// Who is to run the program: what saves time there.
enum class Target : uint8_t { kCpu, kGpu };
Target target_from_name(const std::string& name);  // "cpu", "gpu"; else throws InvalidArgument

struct Pass {
  const char* name;     // "fuse_norm", ...
  const char* summary;  // one line
  Program (*apply)(const Program&);
  bool on_cpu;
  bool on_gpu;

  bool is_for(Target target) const { return target == Target::kCpu ? on_cpu : on_gpu; }
};

// All of them, in the order in which they are applied.
Span<const Pass> passes();

// Applies the target's passes but those named; "all" names all. Throws InvalidArgument for an
// unknown name. Buffers keep their ids, weights among them; new activations come behind.
Program apply_passes(const Program& program, Target target,
                     const std::vector<std::string>& disabled = {});

// What an executor runs: validated, and all passes applied but those named, here or, separated by
// commas, by FASTPAGE_DISABLED_PASSES in the environment.
Program optimized(const Program& program, Target target, std::vector<std::string> disabled = {});

}  // namespace fastpage
