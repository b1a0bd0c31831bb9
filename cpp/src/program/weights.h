// The constants of a Program, in the form in which the CPU ops want them.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "fastpage/executor.h"
#include "fastpage/ops.h"
#include "fastpage/program.h"

namespace fastpage {

class WeightStore {
 public:
  // Linear weights and embedding tables are packed (once, if tied) as `quantization` says, or as
  // `dtype`; the rest is fp32.
  WeightStore(const Program& program, DType dtype, Quantization quantization);

  // Throws InvalidArgument for an unknown name, a wrong shape or a second loading.
  void load(const std::string& name, const TensorView& weight, ThreadPool& pool);
  void load_blocks(const std::string& name, const TensorView& blocks, WeightFormat format,
                   ThreadPool& pool);
  // Throws InvalidArgument listing what is missing.
  void check_complete() const;

  const ops::PackedWeight& packed(BufferId id) const { return entries_[id].packed; }
  Matrix<const float> table(BufferId id) const;  // one row if the weight has one dimension
  size_t linear_bytes() const;

 private:
  struct Entry {
    bool is_packed = false;
    bool is_int4 = false;   // with Quantization::kInt4
    bool is_float = false;  // whatever the quantization
    bool is_table = false;  // of a rotary op, which reads it as it is, packed or not
    bool is_loaded = false;
    double read_by_a_row = 0;  // how much of it, where linear layers read it
    ops::PackedWeight packed;
    std::vector<float> values;
  };
  void add_experts(const Op& op);
  Entry& entry_to_load(const std::string& name, const std::vector<int64_t>& shape);
  WeightFormat format_of(const Entry& entry) const;

  const Program& program_;
  DType dtype_;
  Quantization quantization_;
  std::map<std::string, BufferId> ids_;
  std::vector<Entry> entries_;  // per buffer
};

}  // namespace fastpage
