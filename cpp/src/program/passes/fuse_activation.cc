#include "program/op_checks.h"
#include "program/passes/list.h"
#include "program/passes/rewrite.h"

namespace fastpage {

Program fuse_activation(const Program& program) {
  Rewrite rewrite(program);
  for (int i = 0; i < rewrite.num_ops(); ++i) {
    const Op* activate = rewrite.op(i);
    if (activate == nullptr || activate->kind != OpKind::kActivate) continue;
    const Operand& x = activate->inputs[0];
    int at = -1;
    const Op* linear = rewrite.writer(x, &at);
    if (linear == nullptr || linear->kind != OpKind::kLinear) continue;
    LinearParts parts = LinearParts::of(*linear);
    const bool is_plain = parts.activation.empty() && parts.residual.buffer < 0;
    if (!is_plain || !rewrite.is_whole(x) || !rewrite.only_reader(x, i)) continue;
    parts.activation = activate->attr_string("kind", "");
    parts.y = activate->outputs[0];
    rewrite.replace(i, parts.op());
    rewrite.drop(at);
  }
  return rewrite.program();
}

}  // namespace fastpage
