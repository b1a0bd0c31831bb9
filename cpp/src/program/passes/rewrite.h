// A Program taken apart for a pass, and put together again.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "fastpage/program.h"

namespace fastpage {

class Rewrite {
 public:
  explicit Rewrite(const Program& program);

  int num_ops() const { return static_cast<int>(ops_.size()); }
  // Null if it was dropped.
  const Op* op(int i) const { return ops_[i] ? &*ops_[i] : nullptr; }
  const Buffer& buffer(const Operand& operand) const { return buffers_[operand.buffer]; }

  // The op that writes an activation, or null. `index`, if given, receives its place.
  const Op* writer(const Operand& operand, int* index = nullptr) const;
  // All its columns.
  bool is_whole(const Operand& operand) const;
  // True if op `reader` reads the buffer in one operand, and no other op reads it at all.
  bool only_reader(const Operand& operand, int reader) const;
  // True if op `reader` reads the buffer in one operand, and no later op reads it.
  bool last_reader(const Operand& operand, int reader) const;
  // Places of the ops that read the buffer, one per operand that does.
  std::vector<int> readers(BufferId buffer) const;

  void replace(int i, Op op) { ops_[i] = std::move(op); }
  void drop(int i) { ops_[i].reset(); }
  Operand add_activation(const std::string& name, Rows rows, int64_t cols);

  Program program() const;

 private:
  std::vector<Buffer> buffers_;
  std::vector<std::optional<Op>> ops_;
  BufferId output_;
};

}  // namespace fastpage
