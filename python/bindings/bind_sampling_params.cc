// SamplingParams: every field is a keyword argument and an attribute. Values of the wrong type are
// TypeErrors of one line that name the field; ranges are checked by validate().
#include <functional>
#include <map>
#include <string>

#include "fastpage/sampling_params.h"
#include "module.h"

namespace fastpage {

namespace py = pybind11;

namespace {

[[noreturn]] void throw_type_error(const std::string& field, const char* expected, py::handle got) {
  throw py::type_error(field + " must be " + expected + ", got " + std::string(py::repr(got)));
}

int64_t to_int64(py::handle value, const std::string& field) {
  if (!PyIndex_Check(value.ptr()) || PyBool_Check(value.ptr())) {
    throw_type_error(field, "an integer", value);
  }
  const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (!index) throw py::error_already_set();
  int overflow = 0;
  const int64_t result = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow != 0)
    throw InvalidArgument(field + " is out of range: " + std::string(py::str(index)));
  return result;
}

template <typename T>
struct Converter;

template <>
struct Converter<int32_t> {
  static int32_t from(py::handle value, const std::string& field) {
    const int64_t wide = to_int64(value, field);
    const auto narrow = static_cast<int32_t>(wide);
    if (narrow != wide) throw InvalidArgument(field + " is out of range: " + std::to_string(wide));
    return narrow;
  }
  static py::object to(int32_t value) { return py::int_(value); }
};

template <>
struct Converter<float> {
  static float from(py::handle value, const std::string& field) {
    const double number = PyFloat_AsDouble(value.ptr());
    if (number == -1.0 && PyErr_Occurred()) {
      PyErr_Clear();
      throw_type_error(field, "a number", value);
    }
    return static_cast<float>(number);
  }
  static py::object to(float value) { return py::float_(value); }
};

template <>
struct Converter<bool> {
  static bool from(py::handle value, const std::string& field) {
    if (!PyBool_Check(value.ptr())) throw_type_error(field, "True or False", value);
    return value.ptr() == Py_True;
  }
  static py::object to(bool value) { return py::bool_(value); }
};

// Any 64-bit pattern is a seed; negative ones are taken modulo 2^64.
template <>
struct Converter<std::optional<uint64_t>> {
  static std::optional<uint64_t> from(py::handle value, const std::string& field) {
    if (value.is_none()) return std::nullopt;
    if (!PyLong_Check(value.ptr())) return static_cast<uint64_t>(to_int64(value, field));
    return PyLong_AsUnsignedLongLongMask(value.ptr());
  }
  static py::object to(const std::optional<uint64_t>& value) {
    return value ? py::object(py::int_(*value)) : py::none();
  }
};

// transformers' values: False, True, "never".
template <>
struct Converter<EarlyStopping> {
  static EarlyStopping from(py::handle value, const std::string& field) {
    if (value.ptr() == Py_False) return EarlyStopping::kNo;
    if (value.ptr() == Py_True) return EarlyStopping::kYes;
    if (!py::isinstance<py::str>(value) || value.cast<std::string>() != "never") {
      throw_type_error(field, "False, True or 'never'", value);
    }
    return EarlyStopping::kNever;
  }
  static py::object to(EarlyStopping value) {
    if (value == EarlyStopping::kNever) return py::str("never");
    return py::bool_(value == EarlyStopping::kYes);
  }
};

template <typename T>
struct Converter<std::vector<T>> {
  static std::vector<T> from(py::handle value, const std::string& field) {
    std::vector<T> result;
    if (value.is_none()) return result;
    if (!py::isinstance<py::iterable>(value) || py::isinstance<py::str>(value)) {
      throw_type_error(field, "a list", value);
    }
    for (py::handle item : value) result.push_back(Converter<T>::from(item, field));
    return result;
  }
  static py::object to(const std::vector<T>& values) {
    py::list list;
    for (const T& value : values) list.append(Converter<T>::to(value));
    return std::move(list);
  }
};

using LogitBias = std::vector<std::pair<TokenId, float>>;

template <>
struct Converter<LogitBias> {
  static LogitBias from(py::handle value, const std::string& field) {
    LogitBias result;
    if (value.is_none()) return result;
    if (!py::isinstance<py::dict>(value)) throw_type_error(field, "a dict", value);
    for (auto [token, bias] : py::reinterpret_borrow<py::dict>(value)) {
      result.emplace_back(Converter<TokenId>::from(token, field),
                          Converter<float>::from(bias, field));
    }
    return result;
  }
  static py::object to(const LogitBias& pairs) {
    py::dict dict;
    for (const auto& [token, bias] : pairs) dict[py::int_(token)] = py::float_(bias);
    return std::move(dict);
  }
};

using Setter = std::function<void(SamplingParams&, py::handle)>;

std::map<std::string, Setter>& setters() {
  static std::map<std::string, Setter> table;
  return table;
}

template <typename T>
void bind_field(py::class_<SamplingParams>& cls, const char* name, T SamplingParams::* field) {
  const Setter set = [name, field](SamplingParams& params, py::handle value) {
    params.*field = Converter<T>::from(value, name);
  };
  setters()[name] = set;
  cls.def_property(
      name, [field](const SamplingParams& params) { return Converter<T>::to(params.*field); },
      [set](SamplingParams& params, const py::object& value) { set(params, value); });
}

SamplingParams from_kwargs(const py::kwargs& kwargs) {
  SamplingParams params;
  for (auto [key, value] : kwargs) {
    const auto name = key.cast<std::string>();
    const auto setter = setters().find(name);
    if (setter == setters().end())
      throw py::type_error("SamplingParams has no field '" + name + "'");
    setter->second(params, value);
  }
  return params;
}

}  // namespace

void bind_sampling_params(py::module_& m) {
  py::class_<SamplingParams> cls(m, "SamplingParams");
  cls.def(py::init(&from_kwargs));
  bind_field(cls, "n", &SamplingParams::n);
  bind_field(cls, "best_of", &SamplingParams::best_of);
  bind_field(cls, "temperature", &SamplingParams::temperature);
  bind_field(cls, "top_p", &SamplingParams::top_p);
  bind_field(cls, "top_k", &SamplingParams::top_k);
  bind_field(cls, "min_p", &SamplingParams::min_p);
  bind_field(cls, "repetition_penalty", &SamplingParams::repetition_penalty);
  bind_field(cls, "presence_penalty", &SamplingParams::presence_penalty);
  bind_field(cls, "frequency_penalty", &SamplingParams::frequency_penalty);
  bind_field(cls, "logit_bias", &SamplingParams::logit_bias);
  bind_field(cls, "allowed_token_ids", &SamplingParams::allowed_token_ids);
  bind_field(cls, "bad_words", &SamplingParams::bad_words);
  bind_field(cls, "max_tokens", &SamplingParams::max_tokens);
  bind_field(cls, "min_tokens", &SamplingParams::min_tokens);
  bind_field(cls, "stop_token_ids", &SamplingParams::stop_token_ids);
  bind_field(cls, "ignore_eos", &SamplingParams::ignore_eos);
  bind_field(cls, "seed", &SamplingParams::seed);
  bind_field(cls, "logprobs", &SamplingParams::logprobs);
  bind_field(cls, "prompt_logprobs", &SamplingParams::prompt_logprobs);
  bind_field(cls, "beam_width", &SamplingParams::beam_width);
  bind_field(cls, "length_penalty", &SamplingParams::length_penalty);
  bind_field(cls, "early_stopping", &SamplingParams::early_stopping);
  cls.def("validate", &SamplingParams::validate, py::arg("vocab_size"));
}

}  // namespace fastpage
