// The CUDA ops: what fastpage/ops.h is for the CPU. Raw device pointers, sizes and a stream;
// nothing here allocates, synchronizes or knows of a tensor library, so everything can be captured
// into a CUDA graph, except where the comment says otherwise. Shapes that do not fit throw
// InvalidArgument, which names the argument; a CUDA call that fails throws Error. Indices on the
// device cannot be checked: those out of range are a caller's bug, and are skipped or clamped,
// never followed.
#pragma once

#include "fastpage/ops.h"
#include "fastpage/tensor.h"

namespace fastpage::cuda {

using Stream = void*;  // a cudaStream_t; null: the default stream

bool is_available();
// Why there is none, in one line; empty if there is one.
std::string unavailable_reason();

// Throw InvalidArgument: tensors are on device `index`, which must be the current one; memory must
// be pinned host memory, which kernels can reach.
void check_current_device(int32_t index, const char* name);
void check_pinned(const void* memory, const char* name);

// [rows][cols] of float32, bfloat16 or float16 (or, where an op says so, of something else), rows
// `stride` elements apart.
struct Rows {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;
  const char* name = "";  // of the argument, for errors

  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// One layer's paged KV cache: [num_blocks][block_size][num_kv_heads][head_dim] in any order of
// strides (elements), the last dimension contiguous, every row of head_dim on 16 bytes. float32,
// bfloat16, float16, or uint8: float8 e4m3 bits, which stand for value / scale of their head.
struct KvCache {
  void* k = nullptr;
  void* v = nullptr;
  DType dtype = DType::kBFloat16;
  int32_t num_blocks = 0;
  int32_t block_size = 0;  // a multiple of 16
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  int64_t block_stride = 0;
  int64_t token_stride = 0;
  int64_t head_stride = 0;
  const float* k_scale = nullptr;  // [num_kv_heads]; float8 only; null: 1
  const float* v_scale = nullptr;
};

// ---- around attention; see fastpage/ops.h for what they compute

// y = norm(x); with `residual` (or null), x + residual is normed, and left in residual, rounded to
// its type. y may be x.
void norm(const Rows& x, const Rows* residual, const ops::NormParams& params, const Rows& y,
          Stream stream);
void activate(const Rows& x, ops::Activation activation, const Rows& y, Stream stream);
// ids: [y.rows]; table and y of one type.
void embed(const int32_t* ids, const Rows& table, const Rows& y, Stream stream);

// ---- sampling. logits: float32 [rows][vocab_size <= 4194304]; the arrays below are on the device.

// What is asked for, a row each.
struct SamplingRows {
  const float* temperature = nullptr;  // 0: the most likely, the lowest id on ties
  const int32_t* top_k = nullptr;      // <= 0, or the vocabulary's size and more: all
  const float* top_p = nullptr;
  const float* min_p = nullptr;
  const int64_t* seeds = nullptr;      // as uint64
  const int64_t* positions = nullptr;  // number of tokens before the one to be drawn
};

// float32s and as many int32s.
int64_t sampling_workspace_size(int64_t rows, int64_t vocab_size);

// tokens: [rows]; -1 where no token is possible. The same draw as the CPU's sampler for the same
// logits: see sampling.cu.
void sample(const Rows& logits, const SamplingRows& rows, float* workspace, int32_t* tokens,
            Stream stream);

// What changes logits, in place, before a token is chosen: each may be null. In the order of the
// CPU's logits processors.
struct LogitsRows {
  const uint32_t* allowed = nullptr;  // [rows][(vocab_size + 31) / 32], a bit for each token
  // Added: those of row i are [bias_start[i], bias_start[i + 1]), no token twice.
  const int32_t* bias_start = nullptr;
  const int32_t* bias_ids = nullptr;
  const float* bias = nullptr;
  // Penalties: prompt and output tokens of row i are [token_start[i], token_start[i + 1]).
  const int32_t* token_start = nullptr;
  const int32_t* tokens = nullptr;
  const int32_t* num_prompt_tokens = nullptr;
  const float* repetition_penalty = nullptr;
  const float* frequency_penalty = nullptr;
  const float* presence_penalty = nullptr;
  int32_t* counts = nullptr;  // [rows][vocab_size], zeros, which it is left as
};
void process_logits(const Rows& logits, const LogitsRows& rows, Stream stream);

// Of tokens[row] first, then of the k most likely, the lower id first on ties; -1 and -inf where
// fewer are possible. out_ids, out_logprobs: [rows][1 + k]; out_ranks: [rows]. workspace as
// sample's.
void logprobs(const Rows& logits, const int32_t* tokens, int32_t k, float* workspace,
              int32_t* out_ids, float* out_logprobs, int32_t* out_ranks, Stream stream);

// ---- the cache

// Writes keys and values of new tokens. k, v: [rows][num_kv_heads * head_dim], of the cache's type,
// or bfloat16 or float16 for float8; slot_mapping: [rows], block id * block_size + offset, a
// negative one is skipped.
void reshape_and_cache(const Rows& k, const Rows& v, const int32_t* slot_mapping,
                       const KvCache& cache, Stream stream);

// Rotary embedding of the first cos_sin.cols columns of each head; the rest is copied. x, y:
// [rows][heads * head_dim], head_dim a multiple of 8; positions: [rows]; cos_sin: float32
// [max_position][rotary_dim], cos in the first half of a row, sin in the second. y may be x.
void rotary(const Rows& x, const int32_t* positions, const Rows& cos_sin, int64_t head_dim,
            ops::RotaryStyle style, const Rows& y, Stream stream);

// RMSNorms of each head of q and of k, before they are turned. Weights: [head_dim], on 16 bytes;
// null: none.
struct HeadNorms {
  const float* q_weight = nullptr;
  const float* k_weight = nullptr;
  float eps = 0.0f;
};

// Rotary embedding of q and of k, whose result goes to the cache together with v, in one pass: to
// the bit what norm(), rotary() and reshape_and_cache() give. rotated_q may be q. Heads are
// cache.head_dim wide; see rotary() for the rest.
void rotary_and_cache(const Rows& q, const Rows& k, const Rows& v, const int32_t* positions,
                      const int32_t* slot_mapping, const Rows& cos_sin, ops::RotaryStyle style,
                      const KvCache& cache, const HeadNorms& norms, const Rows& rotated_q,
                      Stream stream);

// Copies of whole blocks, all layers at once. Layers are layer_stride bytes apart and blocks
// block_stride; bytes of each are copied. All four are multiples of 16.
struct BlockMemory {
  void* data = nullptr;  // on the device, or pinned host memory
  int64_t num_blocks = 0;
  int64_t num_layers = 0;
  int64_t layer_stride = 0;
  int64_t block_stride = 0;
  int64_t bytes = 0;
};

// In order: a block that was copied to may be copied from. Not to be captured: the list is `copies`
// as they are now.
void copy_blocks(const BlockMemory& cache, Span<const BlockCopy> copies, Stream stream);

// Between the device's cache and pinned host memory, by a kernel that reads and writes both, on a
// few multiprocessors: give it a stream of its own. No block may be named twice.
void swap_blocks(const BlockMemory& device, const BlockMemory& host, Span<const BlockSwap> swaps,
                 ops::SwapDirection direction, Stream stream);

}  // namespace fastpage::cuda
