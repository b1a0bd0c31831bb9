#include "program/op_checks.h"
#include "program/passes/list.h"
#include "program/passes/rewrite.h"

namespace fastpage {

Program fuse_norm(const Program& program) {
  Rewrite rewrite(program);
  for (int i = 0; i < rewrite.num_ops(); ++i) {
    const Op* linear = rewrite.op(i);
    if (linear == nullptr || linear->kind != OpKind::kLinear) continue;
    LinearParts parts = LinearParts::of(*linear);
    int at = -1;
    const Op* norm = rewrite.writer(parts.x, &at);
    if (norm == nullptr || norm->kind != OpKind::kNorm || parts.norm_weight.buffer >= 0) continue;
    const bool over_all_columns = norm->attr_int("group", norm->inputs[0].cols) == parts.x.cols;
    const bool is_plain_rms = norm->attr_string("kind", "") == "rms" && norm->inputs.size() == 2;
    if (!over_all_columns || !is_plain_rms || !rewrite.only_reader(parts.x, i)) continue;
    parts.x = norm->inputs[0];
    parts.norm_weight = norm->inputs[1];
    parts.norm_eps = norm->attr_double("eps", 0);
    rewrite.replace(i, parts.op());
    rewrite.drop(at);
  }
  return rewrite.program();
}

}  // namespace fastpage
