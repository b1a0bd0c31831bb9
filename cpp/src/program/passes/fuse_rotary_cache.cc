#include <algorithm>

#include "program/passes/list.h"
#include "program/passes/rewrite.h"

namespace fastpage {

namespace {

// A range of columns of a rotary's output, as columns of its input.
Operand before_rotary(const Op& rotary, const Operand& rotated) {
  const Operand& x = rotary.inputs[0];
  return {x.buffer, x.offset + rotated.offset, rotated.cols};
}

bool alike(const Op& a, const Op& b) {
  return a.inputs[1].buffer == b.inputs[1].buffer && a.attrs == b.attrs;
}

class Fusion {
 public:
  Fusion(Rewrite* rewrite, int write) : rewrite_(*rewrite), write_(write) {}

  void run() {
    const Op write = *rewrite_.op(write_);
    const int64_t layer = write.attr_int("layer", 0);
    find_attend(layer);
    if (attend_ < 0) return;
    Op attend = *rewrite_.op(attend_);
    int k_at = -1;
    int q_at = -1;
    const Operand& rotated_k = write.inputs[0];
    const Operand& rotated_q = attend.inputs[0];
    const Op* k_rotary = rotary_of(rotated_k, &k_at);
    const Op* q_rotary = rotary_of(rotated_q, &q_at);
    if (k_rotary == nullptr || q_rotary == nullptr || !alike(*k_rotary, *q_rotary)) return;
    const int64_t head_dim = k_rotary->attr_int("head_dim", 0);
    if (attend.attr_int("head_dim", 0) != head_dim || rotated_k.offset % head_dim != 0 ||
        rotated_q.offset % head_dim != 0) {
      return;
    }
    const Operand y = rewrite_.add_activation(rewrite_.buffer(rotated_q).name + ".q", Rows::kTokens,
                                              rotated_q.cols);
    Op fused{
        OpKind::kRotaryWriteCache,
        {before_rotary(*q_rotary, rotated_q), before_rotary(*k_rotary, rotated_k), write.inputs[1],
         k_rotary->inputs[1]},
        {y},
        {{"layer", layer}, {"head_dim", head_dim}, {"style", k_rotary->attr_string("style", "")}}};
    attend.inputs[0] = y;
    rewrite_.replace(write_, std::move(fused));
    rewrite_.replace(attend_, std::move(attend));
    rewrite_.drop(k_at);
    if (q_at != k_at) rewrite_.drop(q_at);
  }

 private:
  // The layer's one attend.
  void find_attend(int64_t layer) {
    int count = 0;
    for (int i = 0; i < rewrite_.num_ops(); ++i) {
      const Op* op = rewrite_.op(i);
      if (op == nullptr || op->kind != OpKind::kAttend || op->attr_int("layer", 0) != layer) {
        continue;
      }
      attend_ = i;
      ++count;
    }
    if (count != 1) attend_ = -1;
  }

  // The rotary before the write that made these columns, if nobody else reads what it made.
  const Op* rotary_of(const Operand& rotated, int* at) const {
    const Op* op = rewrite_.writer(rotated, at);
    if (op == nullptr || op->kind != OpKind::kRotary || *at > write_) return nullptr;
    const std::vector<int> readers = rewrite_.readers(rotated.buffer);
    const bool private_to_layer = std::all_of(readers.begin(), readers.end(),
                                              [&](int i) { return i == write_ || i == attend_; });
    const bool values_are_rotated = rewrite_.op(write_)->inputs[1].buffer == rotated.buffer;
    return private_to_layer && !values_are_rotated ? op : nullptr;
  }

  Rewrite& rewrite_;
  const int write_;
  int attend_ = -1;
};

}  // namespace

Program fuse_rotary_cache(const Program& program) {
  Rewrite rewrite(program);
  for (int i = 0; i < rewrite.num_ops(); ++i) {
    const Op* op = rewrite.op(i);
    if (op != nullptr && op->kind == OpKind::kWriteCache) Fusion(&rewrite, i).run();
  }
  return rewrite.program();
}

}  // namespace fastpage
