// Which rows go to which experts of a mixture.
#pragma once

#include "fastpage/tensor.h"
#include "fastpage/thread_pool.h"
#include "ops/scratch.h"

namespace fastpage::ops {

// Assignments of rows to experts, sorted by expert, those of an expert by row.
class Routing {
 public:
  // For each row of logits the top_k largest, of equal ones the first, weighed by their softmax
  // over all experts, or over those chosen (`renormalize`). 1 <= top_k <= logits.cols.
  void route(ThreadPool& pool, Matrix<const float> logits, int64_t top_k, bool renormalize);

  int64_t count() const { return begin_[num_experts_]; }
  int64_t num_experts() const { return num_experts_; }
  // An expert's assignments: [begin(e), begin(e + 1)).
  int64_t begin(int64_t expert) const { return begin_[expert]; }
  int64_t rows_of(int64_t expert) const { return begin(expert + 1) - begin(expert); }

  int64_t row(int64_t assignment) const { return rows_[assignment]; }
  float weight(int64_t assignment) const { return weights_[assignment]; }
  // The assignments of a row, [top_k], in the order of their experts.
  const int32_t* of_row(int64_t row) const { return of_row_ + row * top_k_; }

 private:
  void sort(int64_t rows);

  int64_t num_experts_ = 0;
  int64_t top_k_ = 0;
  int32_t* begin_ = nullptr;   // [num_experts + 1]
  int32_t* rows_ = nullptr;    // [count]
  float* weights_ = nullptr;   // [count]
  int32_t* of_row_ = nullptr;  // [rows][top_k]
  int32_t* chosen_ = nullptr;  // [rows][top_k], ascending
  float* shares_ = nullptr;    // [rows][top_k], of the chosen
  Scratch scratch_;
};

}  // namespace fastpage::ops
