#include "fastpage/passes.h"

#include <algorithm>

#include "program/passes/list.h"

namespace fastpage {

namespace {

constexpr Pass kPasses[] = {
    {"fuse_rotary_cache", "rotary of q and k, write_cache: one pass over the rows of qkv",
     fuse_rotary_cache},
    {"fuse_activation", "linear, activate: of a gated one, gate_up is never written",
     fuse_activation},
    {"fuse_residual", "linear, add: the residual is added to what is still in a cache",
     fuse_residual},
    {"fuse_norm", "norm, linear: rows are normed as they are packed for the linear layer",
     fuse_norm},
};

void check_names(const std::vector<std::string>& names) {
  std::string known = "all";
  for (const Pass& pass : kPasses) known += std::string(", ") + pass.name;
  for (const std::string& name : names) {
    const bool found =
        name == "all" || std::any_of(std::begin(kPasses), std::end(kPasses),
                                     [&](const Pass& pass) { return name == pass.name; });
    if (!found) throw InvalidArgument("unknown pass '" + name + "': one of " + known);
  }
}

}  // namespace

Span<const Pass> passes() { return {kPasses, std::size(kPasses)}; }

Program apply_passes(const Program& program, const std::vector<std::string>& disabled) {
  check_names(disabled);
  const auto is_disabled = [&](const std::string& name) {
    return std::find(disabled.begin(), disabled.end(), name) != disabled.end();
  };
  Program result = program;
  for (const Pass& pass : kPasses) {
    if (!is_disabled("all") && !is_disabled(pass.name)) result = pass.apply(result);
  }
  return result;
}

}  // namespace fastpage
