// Mixtures of experts: rows are sorted by expert, and the threads share out the panels of all the
// experts that have rows, so that a layer costs the same few parallel loops however many there are.
#include <algorithm>
#include <string>

#include "ops/linear_part.h"
#include "ops/packed_weight.h"
#include "ops/routing.h"

namespace fastpage::ops {

namespace {

// Rows of an expert that are gathered and packed at a time.
constexpr int64_t kRowBlock = 192;
// Fewer rows than this take as long as these do: what it takes to read a panel of weights.
constexpr int64_t kReadRows = 6;
// What lies between the layers, as floats: more rows are computed one part after the other.
constexpr int64_t kMaxScratch = int64_t{16} << 20;

std::string shape(int64_t rows, int64_t cols) {
  return std::to_string(rows) + " x " + std::to_string(cols);
}

[[noreturn]] void fail(const std::string& what) { throw InvalidArgument("moe: " + what); }

void check_arguments(const Matrix<const float>& x, const Matrix<const float>& logits,
                     const Span<const Expert>& experts, const MoeParams& params,
                     const Matrix<float>& y) {
  const auto num_experts = static_cast<int64_t>(experts.size());
  if (num_experts == 0) fail("there are no experts");
  if (logits.rows != x.rows || logits.cols != num_experts) {
    fail("router_logits are " + shape(logits.rows, logits.cols) + ", not " +
         shape(x.rows, num_experts));
  }
  if (params.top_k < 1 || params.top_k > num_experts) {
    fail("top_k is " + std::to_string(params.top_k) + " of " + std::to_string(num_experts) +
         " experts");
  }
  if (!params.activation.is_gated) fail("the activation is not gated");
  if (y.rows != x.rows || y.cols != x.cols) {
    fail("y is " + shape(y.rows, y.cols) + ", not " + shape(x.rows, x.cols));
  }
}

void check_expert(const Expert& expert, int64_t index, int64_t hidden, int64_t intermediate) {
  const PackedWeight& gate_up = *expert.gate_up;
  const PackedWeight& down = *expert.down;
  const bool fits = gate_up.in_features() == hidden && gate_up.out_features() == 2 * intermediate &&
                    down.in_features() == intermediate && down.out_features() == hidden;
  if (fits) return;
  fail("expert " + std::to_string(index) + " has gate_up " +
       shape(gate_up.out_features(), gate_up.in_features()) + " and down " +
       shape(down.out_features(), down.in_features()) + ", not " + shape(2 * intermediate, hidden) +
       " and " + shape(hidden, intermediate));
}

// The rows of one call, or as many of them as the scratch holds.
class Mixture {
 public:
  Mixture(ThreadPool& pool, Span<const Expert> experts, const MoeParams& params,
          const Routing& routing)
      : pool_(pool), experts_(experts), params_(params), routing_(routing) {
    const PackedWeight& gate_up = *experts[0].gate_up;
    intermediate_ = gate_up.out_features() / 2;
    hidden_ = gate_up.in_features();
    if (can_fuse_activation(gate_up)) fusion_.activation = params.activation;
    for (int64_t e = 0; e < routing.num_experts(); ++e) {
      if (routing.rows_of(e) > 0) check_expert(experts[e], e, hidden_, intermediate_);
    }
  }

  // Floats between the layers, per assignment.
  static int64_t scratch_cols(const Expert& expert) {
    const int64_t both = can_fuse_activation(*expert.gate_up) ? 0 : expert.gate_up->out_features();
    return both + expert.down->in_features() + expert.down->out_features();
  }

  void run(Matrix<const float> x, Matrix<float> y, float* scratch) {
    const int64_t n = routing_.count();
    gated_ = {scratch, n, intermediate_};
    outputs_ = {gated_.data + n * intermediate_, n, hidden_};
    if (is_fused()) {
      gate_up(x, gated_);
    } else {
      const Matrix<float> both(outputs_.data + n * hidden_, n, 2 * intermediate_);
      gate_up(x, both);
      activate(both);
    }
    down();
    add_up(y);
  }

 private:
  bool is_fused() const { return fusion_.activation.is_gated; }

  // What the assignments of an expert take to compute, for one panel.
  int64_t cost(int64_t expert) const {
    const int64_t rows = routing_.rows_of(expert);
    return rows == 0 ? 0 : std::max(rows, kReadRows);
  }

  // fn(expert, first part, past the last): the parts of all experts' layers, one expert after the
  // other, shared out between the threads by their cost.
  template <typename F>
  void for_parts(const PackedWeight& layer, const LinearFusion& fusion, const F& fn) const {
    const int64_t parts = linear_split(layer, fusion).count;
    const int64_t num_experts = routing_.num_experts();
    int64_t total = 0;
    for (int64_t e = 0; e < num_experts; ++e) total += parts * cost(e);
    const auto share = [&](int64_t low, int64_t high) {
      int64_t at = 0;
      for (int64_t e = 0; e < num_experts && at < high; ++e) {
        const int64_t each = cost(e);
        if (each == 0) continue;
        const auto part = [&](int64_t position) {
          return std::clamp<int64_t>((position - at + each - 1) / each, 0, parts);
        };
        const int64_t first = low <= at ? 0 : part(low);
        const int64_t last = part(high);
        if (first < last) fn(e, first, last);
        at += parts * each;
      }
    };
    if (routing_.count() * layer.in_features() * layer.out_features() < kSerialElements) {
      return share(0, total);
    }
    const int64_t threads = pool_.num_threads();
    pool_.run([&](int t) { share(total * t / threads, total * (t + 1) / threads); });
  }

  void gate_up(const Matrix<const float>& x, const Matrix<float>& y) const {
    const int64_t width = linear_split(*experts_[0].gate_up, fusion_).width;
    for_parts(*experts_[0].gate_up, fusion_, [&](int64_t e, int64_t first, int64_t last) {
      const int64_t column = first * width;
      const int64_t cols = std::min(last * width, y.cols) - column;
      for (int64_t i = routing_.begin(e); i < routing_.begin(e + 1); i += kRowBlock) {
        const int64_t rows = std::min(kRowBlock, routing_.begin(e + 1) - i);
        const Matrix<float> out(y.row(i), rows, y.cols);
        linear_part(gather(x, i, rows), *experts_[e].gate_up, params_.activations, fusion_, first,
                    last, out);
        if (is_fused()) weigh(out, i, column, cols);
      }
    });
  }

  // The rows of x that assignments [first, first + count) of one expert are about.
  Matrix<const float> gather(const Matrix<const float>& x, int64_t first, int64_t count) const {
    const int64_t row = routing_.row(first);
    if (routing_.row(first + count - 1) - row == count - 1) {
      return {x.row(row), count, x.cols, x.stride};
    }
    thread_local Scratch scratch;
    float* room = scratch.floats(static_cast<size_t>(count * x.cols));
    for (int64_t i = 0; i < count; ++i) {
      std::copy_n(x.row(routing_.row(first + i)), x.cols, room + i * x.cols);
    }
    return {room, count, x.cols};
  }

  // Here, where there are fewer columns than after `down`, which is linear.
  void weigh(const Matrix<float>& gated, int64_t first, int64_t column, int64_t cols) const {
    for (int64_t i = 0; i < gated.rows; ++i) {
      float* row = gated.row(i) + column;
      kernels().scale(row, routing_.weight(first + i), cols, row);
    }
  }

  void activate(const Matrix<float>& both) const {
    const ActivationKernel activate = activation_kernel(params_.activation.kind);
    for_rows(both.rows, both.cols, [&](int64_t i) {
      activate(both.row(i), both.row(i) + intermediate_, intermediate_, gated_.row(i));
      weigh({gated_.row(i), 1, intermediate_}, i, 0, intermediate_);
    });
  }

  void down() const {
    for_parts(*experts_[0].down, {}, [&](int64_t e, int64_t first, int64_t last) {
      for (int64_t i = routing_.begin(e); i < routing_.begin(e + 1); i += kRowBlock) {
        const int64_t rows = std::min(kRowBlock, routing_.begin(e + 1) - i);
        linear_part(Matrix<float>(gated_.row(i), rows, intermediate_), *experts_[e].down,
                    params_.activations, {}, first, last,
                    Matrix<float>(outputs_.row(i), rows, hidden_));
      }
    });
  }

  void add_up(const Matrix<float>& y) const {
    for_rows(y.rows, y.cols * params_.top_k, [&](int64_t i) {
      const int32_t* assignments = routing_.of_row(i);
      const float* sum = outputs_.row(assignments[0]);
      for (int64_t j = 1; j < params_.top_k; ++j, sum = y.row(i)) {
        kernels().add(sum, outputs_.row(assignments[j]), hidden_, y.row(i));
      }
      if (params_.top_k == 1) std::copy_n(sum, hidden_, y.row(i));
    });
  }

  template <typename F>
  void for_rows(int64_t rows, int64_t cols, const F& fn) const {
    const int64_t grain = rows * cols < kSerialElements ? rows : 1;
    pool_.parallel_for(rows, grain, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) fn(i);
    });
  }

  ThreadPool& pool_;
  const Span<const Expert> experts_;
  const MoeParams& params_;
  const Routing& routing_;
  int64_t intermediate_;
  int64_t hidden_;
  LinearFusion fusion_;    // of gate_up
  Matrix<float> gated_;    // [assignments][intermediate], weighed
  Matrix<float> outputs_;  // [assignments][hidden]
};

}  // namespace

void moe(ThreadPool& pool, Matrix<const float> x, Matrix<const float> router_logits,
         Span<const Expert> experts, const MoeParams& params, Matrix<float> y) {
  check_arguments(x, router_logits, experts, params, y);
  check_expert(experts[0], 0, x.cols, experts[0].gate_up->out_features() / 2);
  const int64_t row_scratch =
      std::max<int64_t>(1, params.top_k * Mixture::scratch_cols(experts[0]));
  const int64_t most_rows = std::max<int64_t>(1, kMaxScratch / row_scratch);
  thread_local Routing routing;
  thread_local Scratch scratch;
  for (int64_t first = 0; first < x.rows; first += most_rows) {
    const int64_t rows = std::min(most_rows, x.rows - first);
    const auto part = [&](const auto& m) {
      auto some = m;
      some.data = m.row(first);
      some.rows = rows;
      return some;
    };
    routing.route(pool, part(router_logits), params.top_k, params.renormalize);
    float* room = scratch.floats(static_cast<size_t>(rows * row_scratch));
    Mixture(pool, experts, params, routing).run(part(x), part(y), room);
  }
}

}  // namespace fastpage::ops
