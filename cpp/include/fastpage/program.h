// A model as plain data: a flat list of ops over named buffers, the number of rows symbolic. Traced
// once from Python (fastpage.ops), or built here; printed, checked, rewritten by passes, run by an
// executor.
#pragma once

#include <map>
#include <string>
#include <unordered_set>
#include <variant>
#include <vector>

#include "fastpage/tensor.h"

namespace fastpage {

using BufferId = int32_t;

// How many rows a buffer has in a step.
enum class Rows : uint8_t {
  kTokens,  // one per new token of the batch
  kLogits,  // one per token whose logits are wanted
  kFixed    // weights: shape is known
};

struct Buffer {
  std::string name;
  enum class Kind : uint8_t { kActivation, kWeight } kind = Kind::kActivation;
  Rows rows = Rows::kTokens;
  std::vector<int64_t> shape;  // activation: {cols}; weight: its whole shape
};

// A buffer, or a range of an activation's columns.
struct Operand {
  BufferId buffer = -1;
  int64_t offset = 0;  // first column
  int64_t cols = 0;    // width (0 for a weight: all of it)
};

enum class OpKind : uint8_t {
  //              inputs                   outputs  attributes
  kEmbed,           // weight             y      -                    ids come from the batch
  kEmbedPositions,  // table              y      offset               rows: positions + offset
  kNorm,            // x, weight [, bias] y      kind="rms"|"layer", eps, group; weight and bias:
                    //                           [group] or [columns of x]
                    // Fused: residual=1: another input, the last one; x + residual is normed, and
                    // a second output.
  // Fused (by passes): an RMSNorm's weight after the bias, and norm_eps: x is normed first;
  // activation: of what comes out; residual=1: another input, the last one, is added in the end.
  kLinear,      // x, weight [, bias]       y        [norm_eps] [activation] [residual]
  kRotary,      // x, cos_sin               y        head_dim, style="neox"|"interleaved"
  kWriteCache,  // k, v                     -        layer
  // Fused: rotary of q and of k, write_cache of that k and of v. With norm_eps, RMSNorms of each
  // head of q and of k come first: two more inputs, their weights [head_dim] (not on the CPU).
  kRotaryWriteCache,  // q, k, v, cos_sin    rotated q  layer, head_dim, style [, norm_eps]
  kAttend,    // q [, alibi_slopes]       y        layer, num_heads, num_kv_heads, head_dim, scale,
              // sliding_window, soft_cap
  kActivate,  // x, or gate | up          y        kind: see ops::activation_from_name
  kScale,     // x                        y        factor
  kClamp,     // x                        y        limit
  kSoftCap,   // x                        y        cap
  kAdd,       // a, b                     y        -
  // Mixture of experts: to input 2 + 2 * i and the one after it belong the matrices of expert i.
  kMoe,         // x, router_logits, gate_up, down, gate_up, ...    y
                // top_k, renormalize=0|1, kind: of a gate
  kGatherRows,  // x (kTokens)              y (kLogits)
};
const char* op_name(OpKind kind);              // "embed", "norm", ...
OpKind op_from_name(const std::string& name);  // throws InvalidArgument

using AttrValue = std::variant<int64_t, double, std::string>;

struct Op {
  OpKind kind;
  std::vector<Operand> inputs;
  std::vector<Operand> outputs;
  std::map<std::string, AttrValue> attrs;

  int64_t attr_int(const std::string& name, int64_t fallback) const;
  double attr_double(const std::string& name, double fallback) const;  // an int will do
  std::string attr_string(const std::string& name, const std::string& fallback) const;
};

// The KV cache that a program's attention ops need.
struct KvCacheSpec {
  int32_t num_layers = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
};

class Program {
 public:
  BufferId add_activation(const std::string& name, Rows rows, int64_t cols);
  BufferId add_weight(const std::string& name, std::vector<int64_t> shape);
  void add_op(Op op);  // checks operand count, widths, rows and attributes; throws InvalidArgument
                       // naming the op
  void set_output(BufferId logits);

  const std::vector<Buffer>& buffers() const { return buffers_; }
  const std::vector<Op>& ops() const { return ops_; }
  BufferId output() const { return output_; }
  KvCacheSpec kv_cache_spec() const;  // throws if layers disagree
  int64_t vocab_size() const;         // columns of the output
  // One line per buffer that matters and per op, stable: meant to be read and diffed.
  std::string to_string() const;
  void validate()
      const;  // the whole of it: everything is written before it is read, an output exists

 private:
  std::vector<Buffer> buffers_;
  std::unordered_set<std::string> weight_names_;
  std::vector<Op> ops_;
  BufferId output_ = -1;
};

// Where each activation lives inside one workspace, in columns times symbolic rows: buffers whose
// lives do not overlap share space (greedy by size, best fit).
struct WorkspacePlan {
  struct Slot {
    int32_t region = -1;  // index into region_cols
  };
  std::vector<Slot> slots;           // per buffer; region -1 for weights
  std::vector<int64_t> region_cols;  // widest buffer placed there
  std::vector<Rows> region_rows;
  int64_t bytes(int64_t max_tokens, int64_t max_logits) const;  // fp32
};
WorkspacePlan plan_workspace(const Program& program);

}  // namespace fastpage
