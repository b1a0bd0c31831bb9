#include "program/passes/list.h"
#include "program/passes/rewrite.h"

namespace fastpage {

namespace {

// The RMSNorm of heads that makes `normed`, all of it, for op `reader` alone; else null.
const Op* norm_of(const Rewrite& rewrite, const Operand& normed, int reader, int64_t head_dim,
                  int* at) {
  const Op* norm = rewrite.writer(normed, at);
  if (norm == nullptr || norm->kind != OpKind::kNorm || norm->inputs.size() != 2) return nullptr;
  const bool of_heads = norm->attr_string("kind", "") == "rms" &&
                        norm->attr_int("group", 0) == head_dim &&
                        rewrite.buffer(norm->inputs[1]).shape[0] == head_dim;
  const bool is_private = rewrite.is_whole(normed) && rewrite.only_reader(normed, reader);
  return of_heads && is_private ? norm : nullptr;
}

}  // namespace

Program fuse_qk_norm(const Program& program) {
  Rewrite rewrite(program);
  for (int i = 0; i < rewrite.num_ops(); ++i) {
    const Op* op = rewrite.op(i);
    if (op == nullptr || op->kind != OpKind::kRotaryWriteCache || op->attrs.count("norm_eps")) {
      continue;
    }
    const int64_t head_dim = op->attr_int("head_dim", 0);
    int q_at = -1;
    int k_at = -1;
    const Op* q_norm = norm_of(rewrite, op->inputs[0], i, head_dim, &q_at);
    const Op* k_norm = norm_of(rewrite, op->inputs[1], i, head_dim, &k_at);
    if (q_norm == nullptr || k_norm == nullptr) continue;
    const double eps = q_norm->attr_double("eps", 0);
    if (k_norm->attr_double("eps", 0) != eps) continue;
    Op fused = *op;
    fused.inputs[0] = q_norm->inputs[0];
    fused.inputs[1] = k_norm->inputs[0];
    fused.inputs.push_back(q_norm->inputs[1]);
    fused.inputs.push_back(k_norm->inputs[1]);
    fused.attrs["norm_eps"] = eps;
    rewrite.replace(i, std::move(fused));
    rewrite.drop(q_at);
    rewrite.drop(k_at);
  }
  return rewrite.program();
}

}  // namespace fastpage
