#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "fastpage/sampler.h"
#include "fastpage/thread_pool.h"
#include "module.h"

namespace fastpage {

namespace py = pybind11;

namespace {

using LogitsArray = py::array_t<float, py::array::c_style>;

void check(bool ok, const std::string& message) {
  if (!ok) throw InvalidArgument(message);
}

// One thread needs no pool.
std::unique_ptr<ThreadPool> make_pool(int num_threads) {
  check(num_threads >= 1, "num_threads must be >= 1, got " + std::to_string(num_threads));
  return num_threads == 1 ? nullptr : std::make_unique<ThreadPool>(num_threads);
}

class PySampler {
 public:
  PySampler(int32_t vocab_size, int num_threads)
      : pool_(make_pool(num_threads)), sampler_(vocab_size, pool_.get()) {}

  // rows: of the batch's sampling_rows, those to sample, a row of logits each. None: all of the
  // batch, from all rows of its logits.
  ModelRunnerOutput sample(LogitsArray logits, const InputBatch& batch,
                           const std::optional<std::vector<int32_t>>& rows) {
    return rows ? sample_all(logits, some_of(batch, *rows)) : sample_all(logits, batch);
  }

 private:
  ModelRunnerOutput sample_all(LogitsArray logits, const InputBatch& batch) {
    check(logits.ndim() == 2 && logits.shape(0) == batch.num_logits(),
          "logits must be of shape [" + std::to_string(batch.num_logits()) + ", vocab_size]");
    const Matrix<const float> matrix(logits.data(), logits.shape(0), logits.shape(1));
    ModelRunnerOutput out;
    py::gil_scoped_release release;
    sampler_.begin(batch, &out);
    sampler_.sample(matrix, 0, batch, &out);
    return out;
  }

  // With a row of logits for each.
  static InputBatch some_of(const InputBatch& batch, const std::vector<int32_t>& rows) {
    InputBatch some;
    some.step_id = batch.step_id;
    for (const int32_t row : rows) {
      check(row >= 0 && static_cast<size_t>(row) < batch.sampling_rows.size(),
            "rows holds " + std::to_string(row) + ": the batch has " +
                std::to_string(batch.sampling_rows.size()) + " sampling rows");
      some.sampling_rows.push_back(batch.sampling_rows[row]);
      some.sampling_rows.back().logits_row = some.num_logits();
      some.logits_indices.push_back(some.num_logits());
    }
    return some;
  }

  std::unique_ptr<ThreadPool> pool_;
  Sampler sampler_;
};

py::tuple sample_logits(const py::array_t<float, py::array::c_style | py::array::forcecast>& logits,
                        const std::vector<SamplingParams>& params,
                        const std::vector<std::vector<TokenId>>& token_ids,
                        const std::vector<int32_t>& num_prompt_tokens,
                        const std::vector<uint64_t>& seeds,
                        const std::vector<TokenId>& eos_token_ids, int num_threads) {
  check(logits.ndim() == 2 && logits.shape(1) > 0,
        "logits must be of shape [rows, vocab_size], got " + std::to_string(logits.ndim()) +
            " dimension(s)");
  const auto num_rows = static_cast<size_t>(logits.shape(0));
  const auto vocab_size = static_cast<int32_t>(logits.shape(1));
  check(params.size() == num_rows && token_ids.size() == num_rows &&
            num_prompt_tokens.size() == num_rows && seeds.size() == num_rows,
        "params, token_ids, num_prompt_tokens and seeds must have one entry for each of the " +
            std::to_string(num_rows) + " rows of logits");
  InputBatch batch;
  for (size_t i = 0; i < num_rows; ++i) {
    params[i].validate(vocab_size);
    check(num_prompt_tokens[i] >= 0 &&
              static_cast<size_t>(num_prompt_tokens[i]) <= token_ids[i].size(),
          "num_prompt_tokens must be between 0 and the number of tokens, got " +
              std::to_string(num_prompt_tokens[i]));
    const auto row = static_cast<int32_t>(i);
    const Span<const TokenId> eos =
        params[i].ignore_eos ? Span<const TokenId>() : Span<const TokenId>(eos_token_ids);
    batch.sampling_rows.push_back(
        {row, row, &params[i], token_ids[i], num_prompt_tokens[i], seeds[i], eos});
  }
  const Matrix<const float> matrix(logits.data(), logits.shape(0), vocab_size);
  ModelRunnerOutput out;
  {
    py::gil_scoped_release release;
    const auto pool = make_pool(num_threads);
    Sampler sampler(vocab_size, pool.get());
    sampler.begin(batch, &out);
    sampler.sample(matrix, 0, batch, &out);
  }
  py::list logprobs;
  for (size_t i = 0; i < num_rows; ++i) {
    const bool wanted = params[i].logprobs != SamplingParams::kNoLogprobs;
    logprobs.append(wanted ? py::cast(out.logprobs[i]) : py::none());
  }
  const auto& sampled = out.sampled_token_ids;
  return py::make_tuple(
      py::array_t<TokenId>(static_cast<py::ssize_t>(sampled.size()), sampled.data()), logprobs);
}

}  // namespace

void bind_sampler(py::module_& m) {
  py::class_<PySampler>(m, "Sampler")
      .def(py::init<int32_t, int>(), py::arg("vocab_size"), py::arg("num_threads") = 1)
      .def("sample", &PySampler::sample, py::arg("logits").noconvert(), py::arg("batch"),
           py::arg("rows") = py::none());
  m.def("sample_logits", &sample_logits, py::arg("logits"), py::arg("params"), py::arg("token_ids"),
        py::arg("num_prompt_tokens"), py::arg("seeds"), py::arg("eos_token_ids") = py::tuple(),
        py::arg("num_threads") = 1);
}

}  // namespace fastpage
