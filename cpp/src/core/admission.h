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

// Throws ResourceExhausted if `num_new` more do not fit into the queue now, InvalidArgument if they
// never will.
void check_queue(const SchedulerConfig& config, int64_t num_waiting, int64_t num_new);

}  // namespace fastpage
