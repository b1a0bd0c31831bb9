// The log of a scheduler's calls, run again: the same steps, byte for byte. For bug reports.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <string>

namespace fastpage {

struct ReplayResult {
  int64_t num_calls = 0;
  int64_t num_steps = 0;
  bool complete = true;    // false: the log ends in the midst of a call (its process died)
  std::string divergence;  // empty, or what the first call that went otherwise was, and how
};

// Runs the calls that Scheduler::record() wrote on a new Scheduler, checking its invariants after
// each, and compares every step's outputs and inputs with those recorded. Throws InvalidArgument
// for what is no such log, or one of another version.
ReplayResult replay(std::istream& log);

}  // namespace fastpage
