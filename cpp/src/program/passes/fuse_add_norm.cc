#include <algorithm>

#include "program/op_checks.h"
#include "program/passes/list.h"
#include "program/passes/rewrite.h"

namespace fastpage {

Program fuse_add_norm(const Program& program) {
  Rewrite rewrite(program);
  for (int i = 0; i < rewrite.num_ops(); ++i) {
    const Op* norm = rewrite.op(i);
    if (norm == nullptr || norm->kind != OpKind::kNorm || norm->attrs.count("residual")) continue;
    const Operand& x = norm->inputs[0];
    int at = -1;
    const Op* add = rewrite.writer(x, &at);
    if (add == nullptr || add->kind != OpKind::kAdd || !rewrite.is_whole(x)) continue;
    // The sum will be there only once it is normed.
    const std::vector<int> readers = rewrite.readers(x.buffer);
    if (std::any_of(readers.begin(), readers.end(), [&](int j) { return j < i; })) continue;
    const Operand a = add->inputs[0];
    const Operand b = add->inputs[1];
    // Written over by the sum, which nobody may miss.
    const auto may_go = [&](const Operand& operand) {
      return rewrite.is_whole(operand) && rewrite.last_reader(operand, at);
    };
    const bool into_a = may_go(a);
    if (!into_a && !may_go(b)) continue;
    Op fused = *norm;
    fused.inputs[0] = into_a ? b : a;
    fused.inputs.push_back(into_a ? a : b);
    fused.outputs.push_back(x);
    fused.attrs["residual"] = int64_t{1};
    rewrite.replace(i, std::move(fused));
    rewrite.drop(at);
  }
  return rewrite.program();
}

}  // namespace fastpage
