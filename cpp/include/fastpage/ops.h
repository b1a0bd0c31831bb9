// The CPU ops. They know nothing of requests: matrices, block tables and lengths only. Activations
// are fp32. Every output element is a sum in one fixed order (ascending k, by fused multiply-add;
// the portable kernels round the product first; with bf16 weights the order within 32 in_features
// is the kernel's own), whatever the number of rows and threads and wherever a chunk begins: a
// row's result does not depend on its batch.
//
// The implementations are one source compiled for several instruction sets and chosen at run time.
#pragma once

#include <memory>
#include <string>

#include "fastpage/tensor.h"
#include "fastpage/thread_pool.h"
#include "fastpage/types.h"

namespace fastpage::ops {

// Instruction set in use: "amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2_vnni", "avx2" or
// "portable". FASTPAGE_CPU_ISA in the environment, read once, lowers it (for tests).
const char* cpu_isa();

// A weight matrix [out_features][in_features] repacked for `linear`: panels of out_features, in the
// order in which the kernel of this machine reads them. Movable, not copyable.
class PackedWeight {
 public:
  PackedWeight();
  ~PackedWeight();
  PackedWeight(PackedWeight&&) noexcept;
  PackedWeight& operator=(PackedWeight&&) noexcept;

  // weight: [out][in], fp32, bf16 or fp16, row-major, any row stride. What is stored: floats are
  // rounded to nearest even; int8: the largest magnitude of an out_feature becomes 127; q4_1: the
  // line of least squares through the values of each group (the best of nine). Throws
  // InvalidArgument for q4_0 and q8_0, and for a weight to be quantized that is not finite.
  static PackedWeight pack(const TensorView& weight, WeightFormat format, ThreadPool& pool);

  // Blocks of GGUF, as they are: [out][in / 32] blocks of `format` (q8_0, q4_0, q4_1), as uint8
  // [out][bytes of a row], row-major, any row stride.
  static PackedWeight pack_blocks(const TensorView& blocks, WeightFormat format, ThreadPool& pool);

  int64_t in_features() const;
  int64_t out_features() const;
  WeightFormat format() const;
  size_t bytes() const;  // of packed storage

  struct Impl;
  const Impl& impl() const { return *impl_; }

 private:
  std::unique_ptr<Impl> impl_;
};

// What activations are turned into before they meet the weights of a linear layer.
enum class Activations : uint8_t {
  // What the weights are:
  // - int8 for quantized weights, in groups of 32 along a row, the largest magnitude of each
  //   becoming 127; sums of products are integers within a group, and fp32 over the groups, in
  //   order;
  // - bf16 for bf16 weights where the instruction set multiplies bf16 (avx512_bf16, amx), rounded
  // to
  //   nearest even; sums are fp32;
  // - nothing else for other weights.
  kQuantized,
  kFloat32  // nothing: the weights are widened
};

Activations activations_from_name(const std::string& name);  // "quantized", "float32"

// A function of single activations.
enum class ActivationKind : uint8_t {
  kNone,
  kSilu,      // x / (1 + e^-x)
  kGelu,      // x times the normal distribution's cumulative function (Hendrycks & Gimpel 2016)
  kGeluTanh,  // the same by x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3)
  kRelu
};
struct Activation {
  ActivationKind kind = ActivationKind::kNone;
  bool is_gated = false;  // of the left half of the columns, times the right half
};

// "silu", "gelu", "gelu_tanh" or "relu", or one of these with "_and_mul" behind it, which is gated.
Activation activation_from_name(const std::string& name);

// What a linear layer does besides, without a pass of its own over the activations; to the bit what
// norm, activate and add would have made of them.
struct LinearFusion {
  const float* norm_weight = nullptr;  // [in]: RMSNorm of x first, over all its columns; null: not
  float norm_eps = 0.0f;
  Activation activation;         // gated: y is [rows][out / 2]
  Matrix<const float> residual;  // like y, which it must not overlap: added last; no data: nothing
};

// y = x w^T (+ bias). x: [rows][in], y: [rows][out], bias: [out] or null. y must not overlap x.
// Against exact sums over the weights as they are stored, int8 activations are off by at most half
// a quantum: by the sum over the groups of (largest |x| / 254) * (sum of |w|), bf16 ones by the sum
// of |x w| / 256, and both by fp32 rounding. Products of bf16 take and give zero for denormals.
void linear(ThreadPool& pool, Matrix<const float> x, const PackedWeight& w, const float* bias,
            Matrix<float> y, Activations activations = Activations::kQuantized,
            const LinearFusion& fusion = {});

// One expert of a mixture: a gated feed-forward layer.
struct Expert {
  const PackedWeight* gate_up = nullptr;  // [2 * intermediate][hidden], the gate above
  const PackedWeight* down = nullptr;     // [hidden][intermediate]
};

struct MoeParams {
  int32_t top_k = 1;
  bool renormalize = false;  // the weights of a row's experts are divided by their sum
  Activation activation = {ActivationKind::kSilu, true};  // gated
  Activations activations = Activations::kQuantized;
};

// Sparse mixture of experts (Shazeer et al. 2017): y[i] = sum of p[e] * down_e(f(gate_e(x[i])) *
// up_e(x[i])) over the top_k experts of row i, p being softmax(router_logits[i]) over all experts.
// Of equal logits the first ones are chosen. x, y: [rows][hidden]; router_logits: [rows][experts];
// all experts are of one shape. y must not overlap x or router_logits. A row's experts are added up
// in the order of their indices, so that its result does not depend on its batch.
void moe(ThreadPool& pool, Matrix<const float> x, Matrix<const float> router_logits,
         Span<const Expert> experts, const MoeParams& params, Matrix<float> y);

// y[i] = table[ids[i]]. table: [vocab][hidden], fp32, bf16 or fp16. Ids out of range are a caller's
// bug and are clamped, never read out of bounds.
void embed(ThreadPool& pool, Span<const TokenId> ids, const TensorView& table, Matrix<float> y);

// The same from a weight packed for `linear` (tied embeddings share one copy).
void embed(ThreadPool& pool, Span<const TokenId> ids, const PackedWeight& table, Matrix<float> y);

enum class NormKind : uint8_t {
  kRms,   // x / sqrt(mean(x^2) + eps) (Zhang & Sennrich 2019)
  kLayer  // (x - mean(x)) / sqrt(variance(x) + eps) (Ba et al. 2016)
};
struct NormParams {
  NormKind kind = NormKind::kRms;
  const float* weight = nullptr;  // what comes out is multiplied by it
  const float* bias = nullptr;    // added to it then; or null
  float eps = 0.0f;
  int64_t group = 0;           // columns that are normed together: cols, or the width of a head
  bool is_per_column = false;  // weight and bias are [cols]; else [group], the same for each group
};

// Normalizes groups of columns; cols % group == 0. y may be x.
void norm(ThreadPool& pool, Matrix<const float> x, const NormParams& params, Matrix<float> y);

enum class RotaryStyle : uint8_t {
  kNeox,        // rotates (x[i], x[i + rotary_dim/2]): GPT-NeoX, and Llama in Hugging Face layout
  kInterleaved  // rotates (x[2i], x[2i + 1]): GPT-J, and Llama in Meta and GGUF layout
};

// Rotary embedding (Su et al. 2021) of the first rotary_dim columns of each head; the rest is
// copied. x: [rows][heads * head_dim]; positions: [rows]; cos_sin: [max_position][rotary_dim], cos
// in the first half of a row, sin in the second. y may be x.
void rotary(ThreadPool& pool, Matrix<const float> x, Span<const int32_t> positions,
            Matrix<const float> cos_sin, int64_t head_dim, RotaryStyle style, Matrix<float> y);

// y = f(x), or if gated y = f(x[:, :d]) * x[:, d:], d = y.cols. y may be x if not gated.
void activate(ThreadPool& pool, Matrix<const float> x, Activation activation, Matrix<float> y);

// y = x * factor. y may be x.
void scale(ThreadPool& pool, Matrix<const float> x, float factor, Matrix<float> y);

// y = x held within [-limit, limit]. y may be x.
void clamp(ThreadPool& pool, Matrix<const float> x, float limit, Matrix<float> y);

// y = cap * tanh(x / cap). y may be x.
void soft_cap(ThreadPool& pool, Matrix<const float> x, float cap, Matrix<float> y);

// y = a + b. y may be a or b.
void add(ThreadPool& pool, Matrix<const float> a, Matrix<const float> b, Matrix<float> y);

// y[i] = x[indices[i]].
void gather_rows(ThreadPool& pool, Matrix<const float> x, Span<const int32_t> indices,
                 Matrix<float> y);

// One layer's paged KV cache. fp32, bf16, fp16 or int8; 16-token granularity inside a block, so
// that both halves are GEMM panels:
//   k: [num_blocks][num_kv_heads][block_size / 16][head_dim][16]
//   v: [num_blocks][num_kv_heads][block_size / 16][16][head_dim]
// bf16 keys go in pairs, [head_dim / 2][16][2] (and [16] for the last of an odd head_dim), so that
// a shift and a mask widen one register to two. int8 is symmetric with a scale per token and head:
// behind the 16 * head_dim integers of 16 tokens stand their 16 scales, fp32. So a token's bytes
// depend on nothing but its own key or value, and copying a block copies its scales.
// block_size is a multiple of 16. Memory that holds no token may hold anything.
struct KvCacheView {
  void* k = nullptr;
  void* v = nullptr;
  DType dtype = DType::kFloat32;
  int32_t num_blocks = 0;
  int32_t num_kv_heads = 0;
  int32_t block_size = 0;
  int32_t head_dim = 0;

  // Of k, and of v: 16 tokens of one head, and a block.
  int64_t granule_bytes() const {
    const int64_t elements = int64_t{16} * head_dim * static_cast<int64_t>(dtype_size(dtype));
    return elements + (dtype == DType::kInt8 ? 16 * static_cast<int64_t>(sizeof(float)) : 0);
  }
  int64_t bytes_per_block() const { return num_kv_heads * (block_size / 16) * granule_bytes(); }
};

// Writes keys and values of new tokens. k, v: [rows][num_kv_heads * head_dim]; slot_mapping:
// [rows], block id * block_size
// + offset; a negative slot is skipped.
void reshape_and_cache(ThreadPool& pool, Matrix<const float> k, Matrix<const float> v,
                       Span<const int32_t> slot_mapping, const KvCacheView& cache);

// rotary() of q and of k, and reshape_and_cache() of that k and of v, in one pass over the rows; to
// the bit what the three would give. Heads are cache.head_dim wide. rotated_q may be q.
void rotary_and_cache(ThreadPool& pool, Matrix<const float> q, Matrix<const float> k,
                      Matrix<const float> v, Span<const int32_t> positions,
                      Span<const int32_t> slot_mapping, Matrix<const float> cos_sin,
                      RotaryStyle style, const KvCacheView& cache, Matrix<float> rotated_q);

// A ragged batch: prefill chunks and decode rows alike.
struct AttentionBatch {
  int32_t num_seqs = 0;
  const int32_t* query_start_loc = nullptr;   // [num_seqs + 1]
  const int32_t* seq_lens = nullptr;          // [num_seqs], the new tokens included
  const BlockId* block_tables = nullptr;      // [*][block_table_stride]
  const int32_t* block_table_rows = nullptr;  // [num_seqs], or null: row i
  int32_t block_table_stride = 0;
};

struct AttentionParams {
  int32_t num_heads = 0;
  float scale = 1.0f;
  int32_t sliding_window =
      0;                  // 0 = none; else the last `sliding_window` positions, oneself included
  float soft_cap = 0.0f;  // 0 = none; else cap * tanh(score / cap)
  // [num_heads], or null: ALiBi (Press et al. 2022), slope * (position - own position) is added.
  const float* alibi_slopes = nullptr;
  // What queries (scaled) and probabilities are turned into before they meet the cache: kQuantized
  // makes them bf16 where the cache is and the instruction set multiplies bf16, rounded to nearest
  // even; sums and softmax are fp32. Nothing changes for other caches.
  Activations activations = Activations::kQuantized;
};

// Causal PagedAttention (Kwon et al. 2023) with an online softmax over KV tiles at fixed absolute
// positions. Sequences of few new tokens whose block tables begin alike read what they share once,
// for all of them. q, out: [num_tokens][num_heads * head_dim]; num_heads % num_kv_heads == 0; the
// new tokens' keys and values are in the cache already. Token j of sequence i sits at position
// seq_lens[i] - new_tokens(i) + j. Rounded to bf16, queries change a score by at most the sum of
// |q k| * scale / 512, and probabilities a result by the largest |v| / 512.
void paged_attention(ThreadPool& pool, Matrix<const float> q, const KvCacheView& cache,
                     const AttentionBatch& batch, const AttentionParams& params, Matrix<float> out);

// Copies whole blocks of one layer, in order.
void copy_blocks(ThreadPool& pool, const KvCacheView& cache, Span<const BlockCopy> copies);

enum class SwapDirection : uint8_t { kOut, kIn };  // device -> host, host -> device

// Copies whole blocks of one layer between its cache and a host cache of the same layout (any
// number of blocks), in order.
void swap_blocks(ThreadPool& pool, const KvCacheView& device, const KvCacheView& host,
                 Span<const BlockSwap> swaps, SwapDirection direction);

// All that a step asks to be done to the caches, in every layer (element l of both spans):
// swap_outs, then block_copies, then swap_ins. Nothing is moved if anything is out of range.
void transfer_blocks(ThreadPool& pool, Span<const KvCacheView> device, Span<const KvCacheView> host,
                     const BlockTransfers& transfers);

}  // namespace fastpage::ops
