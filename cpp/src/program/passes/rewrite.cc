#include "program/passes/rewrite.h"

#include <algorithm>

namespace fastpage {

Rewrite::Rewrite(const Program& program)
    : buffers_(program.buffers()),
      ops_(program.ops().begin(), program.ops().end()),
      output_(program.output()) {}

const Op* Rewrite::writer(const Operand& operand, int* index) const {
  for (int i = 0; i < num_ops(); ++i) {
    if (!ops_[i]) continue;
    for (const Operand& out : ops_[i]->outputs) {
      if (out.buffer != operand.buffer) continue;
      if (index != nullptr) *index = i;
      return op(i);
    }
  }
  return nullptr;
}

bool Rewrite::is_whole(const Operand& operand) const {
  return operand.offset == 0 && operand.cols == buffer(operand).shape[0];
}

std::vector<int> Rewrite::readers(BufferId buffer) const {
  std::vector<int> result;
  for (int i = 0; i < num_ops(); ++i) {
    if (!ops_[i]) continue;
    for (const Operand& in : ops_[i]->inputs) {
      if (in.buffer == buffer) result.push_back(i);
    }
  }
  return result;
}

bool Rewrite::only_reader(const Operand& operand, int reader) const {
  return operand.buffer != output_ && readers(operand.buffer) == std::vector<int>{reader};
}

bool Rewrite::last_reader(const Operand& operand, int reader) const {
  if (operand.buffer == output_) return false;
  const std::vector<int> places = readers(operand.buffer);
  return std::count(places.begin(), places.end(), reader) == 1 && places.back() == reader;
}

Operand Rewrite::add_activation(const std::string& name, Rows rows, int64_t cols) {
  buffers_.push_back({name, Buffer::Kind::kActivation, rows, {cols}});
  return {static_cast<BufferId>(buffers_.size() - 1), 0, cols};
}

Program Rewrite::program() const {
  Program program;
  for (const Buffer& buffer : buffers_) {
    if (buffer.kind == Buffer::Kind::kWeight) {
      program.add_weight(buffer.name, buffer.shape);
    } else {
      program.add_activation(buffer.name, buffer.rows, buffer.shape[0]);
    }
  }
  for (const auto& op : ops_) {
    if (op) program.add_op(*op);
  }
  if (output_ >= 0) program.set_output(output_);
  return program;
}

}  // namespace fastpage
