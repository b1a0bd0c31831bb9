// Rewrites of a Program that save memory traffic or calls, and change nothing else: a fused program
// gives the bits of the unfused one.
#pragma once

#include <string>
#include <vector>

#include "fastpage/program.h"

namespace fastpage {

struct Pass {
  const char* name;     // "fuse_norm", ...
  const char* summary;  // one line
  Program (*apply)(const Program&);
};

// All of them, in the order in which they are applied.
Span<const Pass> passes();

// Applies all passes but those named; "all" names all. Throws InvalidArgument for an unknown name.
// Buffers keep their ids, weights among them; new activations come behind.
Program apply_passes(const Program& program, const std::vector<std::string>& disabled = {});

}  // namespace fastpage
