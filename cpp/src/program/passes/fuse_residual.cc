#include "program/op_checks.h"
#include "program/passes/list.h"
#include "program/passes/rewrite.h"

namespace fastpage {

namespace {

// add(residual, linear(...)) at place i, the linear layer being its input `index`.
bool fuse(Rewrite* rewrite, int i, size_t index) {
  const Op& add = *rewrite->op(i);
  const Operand& x = add.inputs[index];
  int at = -1;
  const Op* linear = rewrite->writer(x, &at);
  if (linear == nullptr || linear->kind != OpKind::kLinear) return false;
  LinearParts parts = LinearParts::of(*linear);
  if (parts.residual.buffer >= 0 || !rewrite->is_whole(x) || !rewrite->only_reader(x, i)) {
    return false;
  }
  parts.residual = add.inputs[1 - index];
  parts.y = add.outputs[0];
  rewrite->replace(i, parts.op());
  rewrite->drop(at);
  return true;
}

}  // namespace

Program fuse_residual(const Program& program) {
  Rewrite rewrite(program);
  for (int i = 0; i < rewrite.num_ops(); ++i) {
    const Op* add = rewrite.op(i);
    if (add == nullptr || add->kind != OpKind::kAdd) continue;
    if (!fuse(&rewrite, i, 1)) fuse(&rewrite, i, 0);
  }
  return rewrite.program();
}

}  // namespace fastpage
