#include "fastpage/program.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <random>

namespace fastpage {
namespace {

// A program under construction, one line an op.
struct Builder {
  Program program;
  int count = 0;

  BufferId weight(std::vector<int64_t> shape) {
    return program.add_weight("w" + std::to_string(count++), std::move(shape));
  }
  Operand activation(Rows rows, int64_t cols) {
    return {program.add_activation("a" + std::to_string(count++), rows, cols), 0, cols};
  }
  Operand op(OpKind kind, std::vector<Operand> inputs, Rows rows, int64_t cols,
             std::map<std::string, AttrValue> attrs = {}) {
    const Operand y = activation(rows, cols);
    program.add_op({kind, std::move(inputs), {y}, std::move(attrs)});
    return y;
  }

  Operand embed(int64_t cols) {
    return op(OpKind::kEmbed, {{weight({10, cols})}}, Rows::kTokens, cols);
  }
  Operand linear(Operand x, int64_t cols) {
    return op(OpKind::kLinear, {x, {weight({cols, x.cols})}}, rows_of(x), cols);
  }
  Operand norm(Operand x) {
    return op(OpKind::kNorm, {x, {weight({x.cols})}}, rows_of(x), x.cols,
              {{"kind", std::string("rms")}, {"eps", 1e-6}});
  }
  Operand add(Operand a, Operand b) { return op(OpKind::kAdd, {a, b}, rows_of(a), a.cols); }
  Operand activate(Operand x) {
    return op(OpKind::kActivate, {x}, rows_of(x), x.cols / 2,
              {{"kind", std::string("silu_and_mul")}});
  }
  Operand rotary(Operand x, int64_t head_dim) {
    return op(OpKind::kRotary, {x, {weight({32, head_dim})}}, Rows::kTokens, x.cols,
              {{"head_dim", head_dim}, {"style", std::string("neox")}});
  }
  void write_cache(Operand k, Operand v, int64_t layer) {
    program.add_op({OpKind::kWriteCache, {k, v}, {}, {{"layer", layer}}});
  }
  Operand attend(Operand q, int64_t layer, int64_t num_heads, int64_t num_kv_heads,
                 int64_t head_dim) {
    return op(OpKind::kAttend, {q}, Rows::kTokens, q.cols,
              {{"layer", layer},
               {"num_heads", num_heads},
               {"num_kv_heads", num_kv_heads},
               {"head_dim", head_dim},
               {"scale", 0.5}});
  }
  Operand gather_rows(Operand x) { return op(OpKind::kGatherRows, {x}, Rows::kLogits, x.cols); }

  Rows rows_of(Operand x) const { return program.buffers()[x.buffer].rows; }
};

void expect_error(const std::function<void()>& action, const std::string& words) {
  try {
    action();
    ADD_FAILURE() << "nothing thrown; expected: " << words;
  } catch (const InvalidArgument& e) {
    EXPECT_NE(std::string(e.what()).find(words), std::string::npos) << e.what();
    EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos);
  }
}

TEST(Program, OpNamesRoundTrip) {
  for (int i = 0; i <= static_cast<int>(OpKind::kGatherRows); ++i) {
    EXPECT_EQ(op_from_name(op_name(static_cast<OpKind>(i))), static_cast<OpKind>(i));
  }
  expect_error([] { op_from_name("softmax"); },
               "unknown op 'softmax': one of embed, embed_positions, norm");
}

TEST(Program, RefusesBadBuffers) {
  Program program;
  program.add_weight("w", {4});
  expect_error([&] { program.add_weight("w", {4}); }, "'w' is declared twice");
  expect_error([&] { program.add_weight("", {4}); }, "needs a name");
  expect_error([&] { program.add_weight("x", {}); }, "one or two dimensions");
  expect_error([&] { program.add_weight("x", {4, 0}); }, "[4, 0] has a dimension below 1");
  expect_error([&] { program.add_activation("x", Rows::kTokens, 0); }, "0 columns");
  expect_error([&] { program.add_activation("x", Rows::kFixed, 1); }, "not fixed");
  expect_error([&] { program.set_output(7); }, "there is no buffer 7");
}

TEST(Program, RefusesBadOps) {
  Builder b;
  const Operand x = b.embed(8);
  const Operand unwritten = b.activation(Rows::kTokens, 8);
  expect_error([&] { b.add(x, unwritten); }, "op 1 (add): 'a2' is read before it is written");
  expect_error([&] { b.add(x, {x.buffer, 4, 8}); }, "columns [4, 12) of 'a1', which has 8");
  expect_error([&] { b.add(x, {x.buffer, 0, 4}); }, "differ in shape");
  expect_error([&] { b.add(x, {99, 0, 8}); }, "there is no buffer 99");
  expect_error(
      [&] {
        b.linear({x.buffer, 0, 4}, 3);
        b.linear(b.embed(5), 0);
      },
      "has a dimension below 1");
  const BufferId weight = b.weight({3, 7});
  expect_error([&] { b.op(OpKind::kLinear, {x, {weight}}, Rows::kTokens, 3); },
               "does not fit input 'a1' (8 columns)");
  expect_error([&] { b.op(OpKind::kLinear, {x, x}, Rows::kTokens, 3); }, "must be a weight");
  expect_error([&] { b.op(OpKind::kLinear, {x}, Rows::kTokens, 3); }, "1 inputs, 2 to 3 needed");
  expect_error([&] { b.op(OpKind::kGatherRows, {x}, Rows::kTokens, 8); }, "rows of the same kind");
  expect_error([&] { b.op(OpKind::kAdd, {x, x}, Rows::kTokens, 9); }, "must have 8 columns");
  expect_error([&] { b.op(OpKind::kAdd, {x, x}, Rows::kTokens, 8, {{"bias", int64_t{1}}}); },
               "unknown attribute bias");
  expect_error([&] { b.program.add_op({OpKind::kAdd, {x, x}, {x}, {}}); }, "written twice");
  expect_error([&] { b.op(OpKind::kNorm, {x, {b.weight({8})}}, Rows::kTokens, 8); },
               "attribute kind is ''");
  expect_error([&] { b.rotary(x, 3); }, "head_dim 3 does not divide");
  expect_error([&] { b.activate({x.buffer, 0, 5}); }, "side by side");
  expect_error(
      [&] {
        b.op(OpKind::kActivate, {x}, Rows::kTokens, 8, {{"kind", std::string("sine_and_mul")}});
      },
      "'sine_and_mul': one of silu, silu_and_mul, gelu");
  for (const char* attribute : {"factor", "limit", "cap"}) {
    const OpKind kind = attribute == std::string("factor")  ? OpKind::kScale
                        : attribute == std::string("limit") ? OpKind::kClamp
                                                            : OpKind::kSoftCap;
    for (const double value : {0.0, -1.0, 1e-46, 1e39, std::nan("")}) {
      expect_error([&] { b.op(kind, {x}, Rows::kTokens, 8, {{attribute, value}}); },
                   std::string("attribute ") + attribute + " must be given, a number above 0");
    }
    EXPECT_NO_THROW(b.op(kind, {x}, Rows::kTokens, 8, {{attribute, 0.5}}));
  }
}

TEST(Program, NormsAndPositionsDemandFittingTables) {
  Builder b;
  const Operand x = b.embed(8);
  const auto norm = [&](std::vector<Operand> inputs, int64_t group) {
    b.op(OpKind::kNorm, std::move(inputs), Rows::kTokens, 8,
         {{"kind", std::string("layer")}, {"eps", 1e-6}, {"group", group}});
  };
  EXPECT_NO_THROW(norm({x, {b.weight({8})}, {b.weight({8})}}, 4));
  EXPECT_NO_THROW(norm({x, {b.weight({4})}, {b.weight({4})}}, 4));
  expect_error([&] { norm({x, {b.weight({2})}}, 4); }, "must be [4] or [8]");
  expect_error([&] { norm({x, {b.weight({4})}, {b.weight({8})}}, 4); }, "differ in shape");
  expect_error([&] { norm({x, {b.weight({8})}}, 3); }, "group 3 does not divide");
  const auto positions = [&](int64_t offset) {
    b.op(OpKind::kEmbedPositions, {{b.weight({10, 8})}}, Rows::kTokens, 8, {{"offset", offset}});
  };
  EXPECT_NO_THROW(positions(9));
  expect_error([&] { positions(10); }, "offset lies past the rows");
  expect_error([&] { positions(-1); }, "0 or more");
}

TEST(Program, RefusesBadMixtures) {
  Builder b;
  const Operand x = b.embed(8);
  const Operand logits = b.linear(x, 2);
  const auto moe = [&](std::vector<std::vector<int64_t>> shapes, int64_t top_k = 1,
                       int64_t renormalize = 1, const char* kind = "silu_and_mul") {
    std::vector<Operand> inputs{x, logits};
    for (std::vector<int64_t>& shape : shapes) inputs.push_back({b.weight(std::move(shape))});
    return b.op(OpKind::kMoe, std::move(inputs), Rows::kTokens, 8,
                {{"top_k", top_k}, {"renormalize", renormalize}, {"kind", std::string(kind)}});
  };
  expect_error([&] { moe({}); }, "(moe): 2 inputs: x, router_logits, and gate_up and down of each");
  expect_error([&] { moe({{6, 8}, {8, 3}, {6, 8}}); }, "5 inputs: x, router_logits, and gate_up");
  expect_error([&] { moe({{6, 8}, {8, 3}}); }, "(2 columns) must have a row like x and a column");
  expect_error([&] { moe({{6, 8}, {8, 3}, {6, 8}, {8, 4}}); },
               "[6, 8] and 'w15' [8, 4] must be [6, 8] and [8, 3]");
  expect_error([&] { moe({{6, 7}, {8, 3}, {6, 8}, {8, 3}}); }, "must be [6, 8] and [8, 3]");
  expect_error([&] { moe({{6, 8}, {8, 3}, {6, 8}, {8}}); }, "must have 2 dimension(s)");
  const std::vector<std::vector<int64_t>> good{{6, 8}, {8, 3}, {6, 8}, {8, 3}};
  expect_error([&] { moe(good, 3); }, "top_k is 3, there are 2 experts");
  expect_error([&] { moe(good, 0); }, "top_k is 0, a positive number needed");
  expect_error([&] { moe(good, 1, 2); }, "renormalize must be 0 or 1");
  expect_error([&] { moe(good, 1, 1, "silu"); }, "kind must be of a gate");
  EXPECT_NO_THROW(moe(good, 2, 0, "gelu_and_mul"));
}

TEST(Program, AttentionWantsItsCacheWritten) {
  Builder b;
  const Operand x = b.embed(8);
  expect_error([&] { b.attend(x, 0, 2, 2, 4); }, "layer 0 is read before it is written");
  b.write_cache({x.buffer, 0, 4}, {x.buffer, 4, 4}, 0);
  expect_error([&] { b.attend(x, 0, 2, 2, 4); }, "holds 4 columns, not 8");
  expect_error([&] { b.attend(x, 0, 2, 1, 3); }, "is not 2 heads of 3");
  expect_error([&] { b.attend(x, 0, 3, 2, 4); }, "cannot share");
  b.attend(x, 0, 2, 1, 4);
  expect_error([&] { b.write_cache(x, x, 0); }, "layer 0 is written twice");
}

TEST(Program, KvCacheSpecDemandsOneShapeAndNoGaps) {
  Builder b;
  const Operand x = b.embed(8);
  b.write_cache({x.buffer, 0, 4}, {x.buffer, 4, 4}, 0);
  b.attend(x, 0, 2, 1, 4);
  EXPECT_EQ(b.program.kv_cache_spec().num_layers, 1);
  EXPECT_EQ(b.program.kv_cache_spec().head_dim, 4);
  b.write_cache(x, x, 2);
  expect_error([&] { b.program.kv_cache_spec(); }, "without gaps");
  b.write_cache(x, x, 1);
  b.attend(x, 1, 2, 2, 4);
  expect_error([&] { b.program.kv_cache_spec(); }, "layer 1 has 2 KV heads of 4");
}

TEST(Program, ValidateDemandsAnOutputAndTheGatherLast) {
  Builder b;
  const Operand x = b.embed(8);
  expect_error([&] { b.program.validate(); }, "no output");
  expect_error([&] { b.program.set_output(x.buffer); }, "must have a row per logit");
  const Operand unwritten = b.activation(Rows::kLogits, 3);
  b.program.set_output(unwritten.buffer);
  expect_error([&] { b.program.validate(); }, "is never written");
  const Operand logits = b.linear(b.gather_rows(x), 10);
  b.program.set_output(logits.buffer);
  EXPECT_NO_THROW(b.program.validate());
  EXPECT_EQ(b.program.vocab_size(), 10);
  expect_error([&] { b.norm(x); }, "cannot follow gather_rows");
}

// ---- the planner

bool computes_in_place(const Op& op, const Operand& in, const Program& program) {
  const bool elementwise = op.kind == OpKind::kAdd || op.kind == OpKind::kNorm ||
                           op.kind == OpKind::kRotary || op.kind == OpKind::kScale ||
                           op.kind == OpKind::kClamp || op.kind == OpKind::kSoftCap;
  return elementwise && in.cols == program.buffers()[in.buffer].shape[0] &&
         in.cols == op.outputs[0].cols;
}

// Plays the program on regions that remember whose values they hold.
void expect_plan_is_sound(const Program& program, const WorkspacePlan& plan) {
  std::vector<BufferId> holder(plan.region_cols.size(), -1);
  for (size_t i = 0; i < program.ops().size(); ++i) {
    const Op& op = program.ops()[i];
    const int32_t target = op.outputs.empty() ? -1 : plan.slots[op.outputs[0].buffer].region;
    for (const Operand& in : op.inputs) {
      const Buffer& buffer = program.buffers()[in.buffer];
      const int32_t region = plan.slots[in.buffer].region;
      if (buffer.kind == Buffer::Kind::kWeight) {
        EXPECT_EQ(region, -1);
        continue;
      }
      ASSERT_EQ(holder[region], in.buffer) << "op " << i << " reads a region taken from it";
      if (region == target) {
        ASSERT_TRUE(computes_in_place(op, in, program)) << "op " << i << " writes over its input";
      }
    }
    if (op.outputs.empty()) continue;
    const Buffer& output = program.buffers()[op.outputs[0].buffer];
    ASSERT_EQ(plan.region_rows[target], output.rows);
    ASSERT_GE(plan.region_cols[target], output.shape[0]);
    holder[target] = op.outputs[0].buffer;
  }
  EXPECT_EQ(holder[plan.slots[program.output()].region], program.output());
}

class RandomProgram {
 public:
  explicit RandomProgram(uint32_t seed) : random_(seed) {}

  Program build() {
    written_.push_back(b_.embed(pick_cols()));
    const int token_ops = pick(1, 30);
    for (int i = 0; i < token_ops; ++i) written_.push_back(append());
    std::vector<Operand> gathered;
    for (int i = pick(1, 3); i > 0; --i) gathered.push_back(b_.gather_rows(any()));
    written_ = gathered;
    const int logits_ops = pick(0, 20);
    for (int i = 0; i < logits_ops; ++i) written_.push_back(append());
    b_.program.set_output(written_[pick(0, static_cast<int>(written_.size()) - 1)].buffer);
    b_.program.validate();
    return b_.program;
  }

 private:
  int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_); }
  int64_t pick_cols() { return 4 * pick(1, 6); }

  // A buffer written so far, mostly a late one, mostly whole; an even number of columns.
  Operand any() {
    const int size = static_cast<int>(written_.size());
    Operand x = written_[pick(0, 3) == 0 ? pick(0, size - 1) : std::max(0, size - pick(1, 3))];
    if (x.cols > 4 && pick(0, 2) == 0) {
      x.cols -= 4;
      x.offset += 4 * pick(0, 1);
    }
    return x;
  }

  Operand append() {
    const Operand x = any();
    switch (pick(0, 5)) {
      case 0:
        return b_.norm(x);
      case 1:
        return b_.linear(x, pick_cols());
      case 2:
        return x.cols % 4 == 0 ? b_.activate(x) : b_.norm(x);
      case 3:
        return b_.rows_of(x) == Rows::kTokens ? b_.rotary(x, 2) : b_.norm(x);
      default:
        for (const Operand& y : written_) {
          if (y.cols == x.cols && pick(0, 1) == 0) return b_.add(x, y);
        }
        return b_.add(x, x);
    }
  }

  std::mt19937 random_;
  Builder b_;
  std::vector<Operand> written_;
};

TEST(Planner, NeverOverwritesWhatIsStillRead) {
  for (uint32_t seed = 0; seed < 3000; ++seed) {
    const Program program = RandomProgram(seed).build();
    expect_plan_is_sound(program, plan_workspace(program));
    if (HasFailure()) {
      FAIL() << "seed " << seed << "\n" << program.to_string();
    }
  }
}

TEST(Planner, AChainOfLayersNeedsNoMoreThanOneLayer) {
  const auto bytes = [](int layers) {
    Builder b;
    Operand x = b.embed(16);
    for (int i = 0; i < layers; ++i)
      x = b.add(x, b.linear(b.activate(b.linear(b.norm(x), 64)), 16));
    b.program.set_output(b.linear(b.gather_rows(x), 100).buffer);
    return plan_workspace(b.program).bytes(10, 3);
  };
  EXPECT_EQ(bytes(2), bytes(40));
  // x, its norm or the gated columns, and the wide one: 16 + 32 + 64 columns a token.
  EXPECT_EQ(bytes(2), static_cast<int64_t>(sizeof(float)) * (10 * (16 + 32 + 64) + 3 * (16 + 100)));
}

TEST(Planner, ElementwiseOpsRunInPlace) {
  Builder b;
  Operand x = b.embed(8);
  for (int i = 0; i < 5; ++i) x = b.norm(x);
  b.program.set_output(b.gather_rows(x).buffer);
  const WorkspacePlan plan = plan_workspace(b.program);
  EXPECT_EQ(plan.region_cols, (std::vector<int64_t>{8, 8}));  // tokens, logits
}

}  // namespace
}  // namespace fastpage
