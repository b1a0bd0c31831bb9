#include <algorithm>
#include <numeric>

#include "fastpage/program.h"
#include "program/op_checks.h"

namespace fastpage {

namespace {

// From the op that writes a buffer to the last one that reads it.
struct Life {
  int32_t begin = -1;  // -1: never written
  int32_t end = -1;
};

std::vector<Life> lives(const Program& program) {
  std::vector<Life> result(program.buffers().size());
  const auto num_ops = static_cast<int32_t>(program.ops().size());
  for (int32_t i = 0; i < num_ops; ++i) {
    const Op& op = program.ops()[i];
    for (const Operand& in : op.inputs) result[in.buffer].end = i;
    for (const Operand& out : op.outputs) result[out.buffer] = {i, i};
  }
  if (program.output() >= 0) result[program.output()].end = num_ops;
  return result;
}

class Planner {
 public:
  explicit Planner(const Program& program) : program_(program), lives_(lives(program)) {}

  WorkspacePlan plan() {
    plan_.slots.resize(program_.buffers().size());
    for (BufferId id : by_size()) place(id);
    return std::move(plan_);
  }

 private:
  int64_t cols(BufferId id) const { return program_.buffers()[id].shape[0]; }

  // Activations that are written, widest first; equals in program order.
  std::vector<BufferId> by_size() const {
    std::vector<BufferId> ids(program_.buffers().size());
    std::iota(ids.begin(), ids.end(), 0);
    ids.erase(std::remove_if(ids.begin(), ids.end(),
                             [&](BufferId id) {
                               return program_.buffers()[id].kind == Buffer::Kind::kWeight ||
                                      lives_[id].begin < 0;
                             }),
              ids.end());
    std::stable_sort(ids.begin(), ids.end(),
                     [&](BufferId a, BufferId b) { return cols(a) > cols(b); });
    return ids;
  }

  // Takes the tightest region that is free during the buffer's life, or opens one.
  void place(BufferId id) {
    const Rows rows = program_.buffers()[id].rows;
    int32_t best = -1;
    for (int32_t r = 0; r < static_cast<int32_t>(members_.size()); ++r) {
      if (plan_.region_rows[r] != rows || !is_free(r, id)) continue;
      if (best < 0 || plan_.region_cols[r] < plan_.region_cols[best]) best = r;
    }
    if (best < 0) {
      best = static_cast<int32_t>(members_.size());
      members_.emplace_back();
      plan_.region_cols.push_back(cols(id));
      plan_.region_rows.push_back(rows);
    }
    members_[best].push_back(id);
    plan_.slots[id].region = best;
  }

  bool is_free(int32_t region, BufferId id) const {
    return std::none_of(members_[region].begin(), members_[region].end(),
                        [&](BufferId other) { return conflict(id, other); });
  }

  bool conflict(BufferId a, BufferId b) const {
    const Life& x = lives_[a];
    const Life& y = lives_[b];
    if (x.end < y.begin || y.end < x.begin) return false;
    return !(x.end == y.begin && in_place(a, b)) && !(y.end == x.begin && in_place(b, a));
  }

  // The op that writes `to` reads `from` for the last time, and may write over it.
  bool in_place(BufferId from, BufferId to) const {
    const Op& op = program_.ops()[lives_[to].begin];
    bool is_read = false;  // else it is another output
    for (size_t i = 0; i < op.inputs.size(); ++i) {
      const Operand& in = op.inputs[i];
      if (in.buffer != from) continue;
      // A range of columns has other row starts than the output.
      if (!may_run_in_place(op.kind, i) || in.cols != cols(from)) return false;
      is_read = true;
    }
    return is_read;
  }

  const Program& program_;
  const std::vector<Life> lives_;
  std::vector<std::vector<BufferId>> members_;  // per region
  WorkspacePlan plan_;
};

}  // namespace

int64_t WorkspacePlan::bytes(int64_t max_tokens, int64_t max_logits) const {
  int64_t elements = 0;
  for (size_t r = 0; r < region_cols.size(); ++r) {
    elements += region_cols[r] * (region_rows[r] == Rows::kTokens ? max_tokens : max_logits);
  }
  return elements * static_cast<int64_t>(sizeof(float));
}

WorkspacePlan plan_workspace(const Program& program) { return Planner(program).plan(); }

}  // namespace fastpage
