// What each kind of op demands of its operands and attributes.
#pragma once

#include "fastpage/program.h"

namespace fastpage {

// Throws InvalidArgument, naming the op, unless `op` may be appended to `program`.
void check_op(const Program& program, const Op& op);

bool writes_cache(OpKind kind);
// The keys and values that such an op writes begin at this input.
size_t first_cache_input(OpKind kind);

// The inputs and attributes of a linear op by their names; absent ones have buffer -1.
struct LinearParts {
  Operand x;
  Operand weight;
  Operand bias;
  Operand norm_weight;
  double norm_eps = 0;
  std::string activation;  // empty: none
  Operand residual;
  Operand y;

  static LinearParts of(const Op& op);
  Op op() const;
};

// The inputs and outputs of a norm op by their names; absent ones have buffer -1.
struct NormParts {
  Operand x;
  Operand weight;
  Operand bias;
  Operand residual;
  Operand y;
  Operand sum;  // of x and residual

  static NormParts of(const Op& op);
};

// The inputs of a moe op by their names.
struct MoeParts {
  static constexpr size_t kFirstExpert = 2;  // input: its gate_up, its down, the next one's, ...

  static int64_t num_experts(const Op& op) {
    return static_cast<int64_t>(op.inputs.size() - kFirstExpert) / 2;
  }
  static const Operand& gate_up(const Op& op, int64_t expert) {
    return op.inputs[kFirstExpert + 2 * static_cast<size_t>(expert)];
  }
  static const Operand& down(const Op& op, int64_t expert) {
    return op.inputs[kFirstExpert + 2 * static_cast<size_t>(expert) + 1];
  }
};

// True if the op computes in place when an output shares the memory of input `index`.
bool may_run_in_place(OpKind kind, size_t index);

std::string shape_to_string(const std::vector<int64_t>& shape);

}  // namespace fastpage
