// The log of a scheduler's calls, run again: the same steps, byte for byte.
//
// For bug reports: Scheduler::record() from the start of the program until the bug shows, then send
// the log. Whoever has it can run it under a debugger without the model, as often as it takes, and
// see whether a change mends it. A call that ended the process is the log's last one, and replay()
// makes it, too; lest it stay in the stream's buffer, set std::unitbuf on the stream.
//
// A LOG HOLDS WHAT THE USERS WROTE: the token ids of every prompt and every output, cache salts,
// and the secret key of the block hashes. It is as confidential as the prompts.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <string>

namespace fastpage {

struct ReplayResult {
  int64_t num_calls = 0;
  int64_t num_steps = 0;   // schedule() calls that found something to do
  bool complete = true;    // false: the log ends in the midst of a call (its process died)
  std::string divergence;  // empty, or what the first call that went otherwise was, and how
};

struct ReplayOptions {
  // Scheduler::check_integrity() after every call: it walks all blocks, so a large pool and a long
  // log take their time.
  bool check_integrity = true;
};

// Runs the calls that Scheduler::record() wrote on a new Scheduler, and compares every result, and
// every step's outputs and inputs, with those recorded; it ends at the first that differs. Throws
// InvalidArgument for what is no such log, is damaged, or is of another version, and
// ResourceExhausted for a log whose scheduler would take more than 4 GiB. No log makes it crash:
// what a scheduler's caller has to see to, it checks first.
ReplayResult replay(std::istream& log, const ReplayOptions& options = {});

}  // namespace fastpage
