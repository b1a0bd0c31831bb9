#include "fastpage/passes.h"

#include <algorithm>
#include <cstdlib>
#include <sstream>

#include "program/passes/list.h"

namespace fastpage {

namespace {

constexpr Pass kPasses[] = {
    {"fuse_rotary_cache", "rotary of q and k, write_cache: one pass over the rows of qkv",
     fuse_rotary_cache, true, true},
    {"fuse_activation", "linear, activate: of a gated one, gate_up is never written",
     fuse_activation, true, false},
    {"fuse_residual", "linear, add: the residual is added to what is still in a cache",
     fuse_residual, true, false},
    {"fuse_norm", "norm, linear: rows are normed as they are packed for the linear layer",
     fuse_norm, true, false},
    {"fuse_add_norm", "add, norm: what is added is normed before it leaves the multiprocessor",
     fuse_add_norm, false, true},
    {"fuse_qk_norm", "norms of q's and k's heads, rotary_write_cache: of a row that is read once",
     fuse_qk_norm, false, true},
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

Target target_from_name(const std::string& name) {
  if (name == "cpu") return Target::kCpu;
  if (name == "gpu") return Target::kGpu;
  throw InvalidArgument("unknown target '" + name + "': one of cpu, gpu");
}

Program apply_passes(const Program& program, Target target,
                     const std::vector<std::string>& disabled) {
  check_names(disabled);
  const auto is_disabled = [&](const std::string& name) {
    return std::find(disabled.begin(), disabled.end(), name) != disabled.end();
  };
  Program result = program;
  for (const Pass& pass : kPasses) {
    if (!pass.is_for(target) || is_disabled("all") || is_disabled(pass.name)) continue;
    result = pass.apply(result);
  }
  return result;
}

Program optimized(const Program& program, Target target, std::vector<std::string> disabled) {
  program.validate();
  const char* const value = std::getenv("FASTPAGE_DISABLED_PASSES");
  std::istringstream list(value == nullptr ? "" : value);
  for (std::string name; std::getline(list, name, ',');) disabled.push_back(name);
  return apply_passes(program, target, disabled);
}

}  // namespace fastpage
