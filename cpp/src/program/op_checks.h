// What each kind of op demands of its operands and attributes.
#pragma once

#include "fastpage/program.h"

namespace fastpage {

// Throws InvalidArgument, naming the op, unless `op` may be appended to `program`.
void check_op(const Program& program, const Op& op);

// True if the op computes in place when its output shares the memory of input `index`.
bool may_run_in_place(OpKind kind, size_t index);

std::string shape_to_string(const std::vector<int64_t>& shape);

}  // namespace fastpage
