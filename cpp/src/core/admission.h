// What may enter the queue at all.
#pragma once

#include "fastpage/scheduler.h"

namespace fastpage {

// Length at which a sequence ends: prompt and output.
int32_t final_length(const SchedulerConfig& config, size_t num_prompt_tokens,
                     const SamplingParams& params);

// Throws InvalidArgument, with the numbers, for what could never finish.
void check_fits(const SchedulerConfig& config, size_t num_prompt_tokens,
                const SamplingParams& params);

// What waits and was never admitted, or is about to.
struct QueueLoad {
  int64_t num_sequences = 0;
  int64_t num_prompt_tokens = 0;  // each prompt once
};

// Throws ResourceExhausted if `added` does not fit into the queue now, InvalidArgument if it never
// will.
void check_queue(const SchedulerConfig& config, const QueueLoad& waiting, const QueueLoad& added);

}  // namespace fastpage
