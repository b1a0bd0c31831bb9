// A Request from the arguments that Engine and EngineClient take in Python.
#pragma once

#include <string>
#include <utility>

#include "arrays.h"
#include "fastpage/engine.h"

namespace fastpage {

inline Request to_request(const pybind11::object& prompt_token_ids, const SamplingParams& params,
                          int32_t priority, std::string cache_salt) {
  Request request;
  request.prompt_token_ids = to_token_ids(prompt_token_ids, "prompt_token_ids");
  request.params = params;
  request.priority = priority;
  request.cache_salt = std::move(cache_salt);
  return request;
}

}  // namespace fastpage
