// What changes logits before a token is chosen: masks, bias, penalties.
#include "cuda/launch.cuh"

namespace fastpage::cuda {

namespace {

constexpr int kThreads = 1024;

struct ProcessArgs {
  float* logits;
  int64_t stride;
  int32_t vocab_size;
  LogitsRows rows;
};

// A block a row. Every step is over before the next begins; counts are zero before and after, and
// atomic in between, as several threads may have one token.
__global__ void __launch_bounds__(kThreads) process_kernel(ProcessArgs a) {
  const int64_t row = blockIdx.x;
  const int32_t n = a.vocab_size;
  float* const logits = a.logits + row * a.stride;
  const LogitsRows& r = a.rows;
  if (r.allowed != nullptr) {
    // A warp takes 32 words at once, one a lane, and then the tokens of each: with a load for every
    // token it would wait a thousand times as often for memory.
    const int32_t words = (n + 31) / 32;
    const uint32_t* const bits = r.allowed + row * words;
    const int lane = static_cast<int>(threadIdx.x % 32);
    for (int32_t first = static_cast<int32_t>(threadIdx.x) - lane; first < words;
         first += kThreads) {
      const uint32_t mine = first + lane < words ? load_global(bits + first + lane) : 0;
      for (int i = 0; i < 32; ++i) {
        const bool is_allowed = __shfl_sync(kFullWarp, mine, i) >> lane & 1;
        const int32_t token = (first + i) * 32 + lane;
        if (!is_allowed && token < n) store_global(logits + token, -INFINITY);
      }
    }
    __syncthreads();
  }
  if (r.bias_start != nullptr) {
    const int32_t end = load_global(r.bias_start + row + 1);
    for (int32_t i = load_global(r.bias_start + row) + threadIdx.x; i < end; i += kThreads) {
      const int32_t token = load_global(r.bias_ids + i);
      if (token < 0 || token >= n) continue;
      store_global(logits + token, load_global(logits + token) + load_global(r.bias + i));
    }
    __syncthreads();
  }
  if (r.token_start == nullptr) return;
  int32_t* const counts = r.counts + row * n;
  const int32_t begin = load_global(r.token_start + row),
                end = load_global(r.token_start + row + 1);
  const int32_t output = begin + load_global(r.num_prompt_tokens + row);
  const auto for_tokens = [&](int32_t first, auto fn) {
    for (int32_t i = first + threadIdx.x; i < end; i += kThreads) {
      const int32_t token = load_global(r.tokens + i);
      if (token >= 0 && token < n) fn(token);
    }
    __syncthreads();
  };
  const float repetition = load_global(r.repetition_penalty + row);
  if (repetition != 1.0f) {
    for_tokens(begin, [&](int32_t token) {
      if (atomicExch(counts + token, 1) != 0) return;  // once, however often it occurs
      const float x = load_global(logits + token);
      store_global(logits + token, x > 0.0f ? x / repetition : x * repetition);
    });
    for_tokens(begin, [&](int32_t token) { atomicExch(counts + token, 0); });
  }
  const float frequency = load_global(r.frequency_penalty + row);
  const float presence = load_global(r.presence_penalty + row);
  if (frequency == 0.0f && presence == 0.0f) return;
  for_tokens(output, [&](int32_t token) { atomicAdd(counts + token, 1); });
  for_tokens(output, [&](int32_t token) {
    const int32_t count = atomicExch(counts + token, 0);
    if (count == 0) return;
    const float x =
        __fadd_rn(load_global(logits + token), -__fmul_rn(frequency, static_cast<float>(count)));
    store_global(logits + token, __fadd_rn(x, -presence));
  });
}

}  // namespace

void process_logits(const Rows& logits, const LogitsRows& rows, Stream stream) {
  check_vocabulary(logits);
  const ProcessArgs a{logits.as<float>(), logits.stride, static_cast<int32_t>(logits.cols), rows};
  launch("process_logits", process_kernel, dim3(static_cast<unsigned>(logits.rows)), kThreads, 0,
         stream, a);
}

}  // namespace fastpage::cuda
