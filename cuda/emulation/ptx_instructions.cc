// What each instruction does, as the PTX ISA (9.0) says it.
#include <cfenv>
#include <cmath>
#include <limits>
#include <tuple>
#include <type_traits>

#include "cuda/emulation/ptx_machine.h"
#include "cuda/instructions.cuh"

namespace fastpage::cuda::emulation {
namespace {

template <typename T>
T get(uint64_t bits) {
  T x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
template <typename T>
uint64_t put(T x) {
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}

template <typename Fn>
void for_lanes(uint32_t mask, Fn fn) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (mask >> lane & 1) fn(lane);
  }
}

[[noreturn]] void unknown(const Operands& op) {
  std::string name;
  for (const std::string& word : op.words) name += (name.empty() ? "" : ".") + word;
  throw std::runtime_error("no such instruction is emulated: " + name);
}

// ---- of values: fn(A...) for each lane, from registers to a register

template <typename R, typename... A, typename Fn, size_t... I>
Effect map(Fn fn, int to, std::array<int, sizeof...(A)> from, std::index_sequence<I...>) {
  return [=](PtxWarp& w, uint32_t mask) {
    uint64_t* const out = w.reg(to);
    const uint64_t* const in[] = {w.reg(from[I])...};
    for_lanes(mask, [&](int lane) { out[lane] = put<R>(fn(get<A>(in[I][lane])...)); });
  };
}

template <typename R, typename... A, typename Fn>
Effect map(const Operands& op, Fn fn) {
  std::array<int, sizeof...(A)> from;
  for (size_t i = 0; i < from.size(); ++i) from[i] = op(i + 1);
  return map<R, A...>(fn, op(0), from, std::make_index_sequence<sizeof...(A)>());
}

template <typename T>
struct As {
  using type = T;
};

// fn(As<T>) for a type's name; what is not a number is so many bits.
template <typename Fn>
auto with_integer(const Operands& op, const std::string& name, Fn fn) {
  if (name == "s16") return fn(As<int16_t>());
  if (name == "s32") return fn(As<int32_t>());
  if (name == "s64") return fn(As<int64_t>());
  if (name == "u8" || name == "b8") return fn(As<uint8_t>());
  if (name == "u16" || name == "b16") return fn(As<uint16_t>());
  if (name == "u32" || name == "b32") return fn(As<uint32_t>());
  if (name == "u64" || name == "b64") return fn(As<uint64_t>());
  if (name == "s8") return fn(As<int8_t>());
  unknown(op);
}
template <typename Fn>
auto with_type(const Operands& op, const std::string& name, Fn fn) {
  if (name == "f32") return fn(As<float>());
  if (name == "f64") return fn(As<double>());
  return with_integer(op, name, fn);
}

template <typename T>
constexpr bool is_float = std::is_floating_point_v<T>;

// Signed overflow wraps.
template <typename T, typename Fn>
T wrapping(T a, T b, Fn fn) {
  if constexpr (is_float<T>) {
    return fn(a, b);
  } else {
    using U = std::make_unsigned_t<T>;
    return static_cast<T>(fn(static_cast<U>(a), static_cast<U>(b)));
  }
}

float fma_down(float a, float b, float c) {
  const int mode = std::fegetround();
  std::fesetround(FE_DOWNWARD);
  volatile float x = a, y = b, z = c;
  volatile float result = std::fma(x, y, z);
  std::fesetround(mode);
  return result;
}

Effect make_multiplication(const Operands& op) {
  const std::string& type = op.words.back();
  if (type == "f32" || type == "f64") {
    return with_type(op, type, [&](auto t) {
      using T = typename decltype(t)::type;
      return map<T, T, T>(op, [](T a, T b) { return static_cast<T>(a * b); });
    });
  }
  return with_integer(op, type, [&](auto t) -> Effect {
    using T = typename decltype(t)::type;
    if (op.has("lo")) {
      return map<T, T, T>(op, [](T a, T b) {
        return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
      });
    }
    if (op.has("wide")) {
      using Wide = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
      return map<Wide, T, T>(op, [](T a, T b) { return Wide{a} * Wide{b}; });
    }
    if constexpr (sizeof(T) == 4) {
      using Wide = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
      if (op.has("hi")) {
        return map<T, T, T>(op, [](T a, T b) { return static_cast<T>(Wide{a} * Wide{b} >> 32); });
      }
    }
    unknown(op);
  });
}

Effect make_arithmetic(const Operands& op) {
  const std::string& name = op.words[0];
  if (name == "mul") return make_multiplication(op);
  if (op.words.back() == "bf16x2" && name == "fma") {
    return map<uint32_t, uint32_t, uint32_t, uint32_t>(op, [](uint32_t a, uint32_t b, uint32_t c) {
      const auto half = [&](int shift) {
        const auto value = [&](uint32_t x) {
          return bfloat16_value(static_cast<uint16_t>(x >> shift));
        };
        // A product has 16 bits, so a double holds the sum but for what rounding cannot see.
        return bfloat16_bits(
            static_cast<float>(double{value(a)} * double{value(b)} + double{value(c)}));
      };
      return half(0) | static_cast<uint32_t>(half(16)) << 16;
    });
  }
  return with_type(op, op.words.back(), [&](auto t) -> Effect {
    using T = typename decltype(t)::type;
    if (name == "add") {
      return map<T, T, T>(
          op, [](T a, T b) { return wrapping(a, b, [](auto x, auto y) { return x + y; }); });
    }
    if (name == "sub") {
      return map<T, T, T>(
          op, [](T a, T b) { return wrapping(a, b, [](auto x, auto y) { return x - y; }); });
    }
    if (name == "neg") {
      return map<T, T>(op, [](T a) {
        if constexpr (is_float<T>) return -a;
        return wrapping(T{0}, a, [](auto x, auto y) { return x - y; });
      });
    }
    if (name == "abs") {
      return map<T, T>(op, [](T a) {
        if constexpr (is_float<T>) return std::fabs(a);
        return static_cast<T>(a < T{0} ? T{0} - a : a);
      });
    }
    if (name == "min") {
      return map<T, T, T>(op, [](T a, T b) {
        if constexpr (is_float<T>) return std::fmin(a, b);
        return std::min(a, b);
      });
    }
    if (name == "max") {
      return map<T, T, T>(op, [](T a, T b) {
        if constexpr (is_float<T>) return std::fmax(a, b);
        return std::max(a, b);
      });
    }
    if constexpr (is_float<T>) {
      if (name == "div") return map<T, T, T>(op, [](T a, T b) { return a / b; });
      if (name == "rcp") return map<T, T>(op, [](T a) { return 1 / a; });
      if (name == "sqrt") return map<T, T>(op, [](T a) { return std::sqrt(a); });
      if (name == "rsqrt") return map<T, T>(op, [](T a) { return 1 / std::sqrt(a); });
      if (name == "ex2") return map<T, T>(op, [](T a) { return std::exp2(a); });
      if (name == "copysign") {
        return map<T, T, T>(op, [](T sign, T value) { return std::copysign(value, sign); });
      }
      if constexpr (sizeof(T) == 4) {
        if (name == "fma" && op.has("rm")) return map<T, T, T, T>(op, fma_down);
      }
      if (name == "fma" && op.has("rn")) {
        return map<T, T, T, T>(op, [](T a, T b, T c) { return std::fma(a, b, c); });
      }
    } else {
      // By zero PTX gives what it likes, and never ends a thread.
      if (name == "div") {
        return map<T, T, T>(op, [](T a, T b) { return static_cast<T>(b == T{0} ? ~T{0} : a / b); });
      }
      if (name == "rem") {
        return map<T, T, T>(op, [](T a, T b) { return static_cast<T>(b == T{0} ? a : a % b); });
      }
      if (name == "mad" && op.has("lo")) {
        return map<T, T, T, T>(op, [](T a, T b, T c) {
          return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b) +
                                static_cast<uint64_t>(c));
        });
      }
    }
    unknown(op);
  });
}

// ---- of bits

Effect make_bits(const Operands& op) {
  const std::string& name = op.words[0];
  if (op.words.back() == "pred") {
    if (name == "not") return map<bool, bool>(op, [](bool a) { return !a; });
    return map<bool, bool, bool>(op, [name](bool a, bool b) {
      return name == "and" ? a && b : name == "or" ? a || b : a != b;
    });
  }
  if (name == "popc") return map<uint32_t, uint32_t>(op, [](uint32_t a) { return __popc(a); });
  if (name == "clz")
    return map<uint32_t, uint32_t>(op, [](uint32_t a) { return __clz(static_cast<int>(a)); });
  if (name == "brev") {
    return map<uint32_t, uint32_t>(op, [](uint32_t a) {
      uint32_t reversed = 0;
      for (int i = 0; i < 32; ++i) reversed |= (a >> i & 1) << (31 - i);
      return reversed;
    });
  }
  if (name == "bfind" && op.has("shiftamt") && op.has("u32")) {
    return map<uint32_t, uint32_t>(op, [](uint32_t a) {
      return a == 0 ? 0xffffffffu : static_cast<uint32_t>(__clz(static_cast<int>(a)));
    });
  }
  if (name == "prmt") {
    return map<uint32_t, uint32_t, uint32_t, uint32_t>(
        op, [](uint32_t a, uint32_t b, uint32_t how) {
          const uint64_t bytes = uint64_t{b} << 32 | a;
          uint32_t result = 0;
          for (int i = 0; i < 4; ++i) {
            const uint32_t selector = how >> (4 * i) & 15;
            uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (selector & 7))) & 255;
            if (selector & 8) byte = byte & 128 ? 255 : 0;  // its sign
            result |= byte << (8 * i);
          }
          return result;
        });
  }
  return with_integer(op, op.words.back(), [&](auto t) -> Effect {
    using T = typename decltype(t)::type;
    constexpr uint32_t kBits = 8 * sizeof(T);
    if (name == "and") return map<T, T, T>(op, [](T a, T b) { return static_cast<T>(a & b); });
    if (name == "or") return map<T, T, T>(op, [](T a, T b) { return static_cast<T>(a | b); });
    if (name == "xor") return map<T, T, T>(op, [](T a, T b) { return static_cast<T>(a ^ b); });
    if (name == "not") return map<T, T>(op, [](T a) { return static_cast<T>(~a); });
    // Shifts by more than there are bits leave none, or the sign.
    if (name == "shl") {
      return map<T, T, uint32_t>(op, [](T a, uint32_t by) {
        return static_cast<T>(by >= kBits ? 0 : static_cast<uint64_t>(a) << by);
      });
    }
    if (name == "shr") {
      return map<T, T, uint32_t>(op, [](T a, uint32_t by) {
        if (by >= kBits) return static_cast<T>(a < T{0} ? -1 : 0);
        return static_cast<T>(a >> by);
      });
    }
    if (name == "bfi") {
      return map<T, T, T, uint32_t, uint32_t>(op, [](T a, T b, uint32_t at, uint32_t bits) {
        using U = std::make_unsigned_t<T>;
        at &= 255, bits &= 255;
        if (at >= kBits || bits == 0) return b;
        U field = bits >= kBits ? static_cast<U>(~U{0}) : static_cast<U>((U{1} << bits) - 1);
        field = static_cast<U>(field << at);
        return static_cast<T>((static_cast<U>(b) & ~field) | (static_cast<U>(a) << at & field));
      });
    }
    unknown(op);
  });
}

// ---- comparisons and choices

template <typename T>
bool unordered(T a, T b) {
  return a != a || b != b;
}

template <typename T>
bool (*comparison(const std::string& how))(T, T) {
  if (how == "eq") return [](T a, T b) { return a == b; };
  if (how == "ne") return [](T a, T b) { return !unordered(a, b) && a != b; };
  if (how == "lt" || how == "lo") return [](T a, T b) { return a < b; };
  if (how == "le" || how == "ls") return [](T a, T b) { return a <= b; };
  if (how == "gt" || how == "hi") return [](T a, T b) { return a > b; };
  if (how == "ge" || how == "hs") return [](T a, T b) { return a >= b; };
  if (how == "equ") return [](T a, T b) { return unordered(a, b) || a == b; };
  if (how == "neu") return [](T a, T b) { return unordered(a, b) || a != b; };
  if (how == "ltu") return [](T a, T b) { return unordered(a, b) || a < b; };
  if (how == "leu") return [](T a, T b) { return unordered(a, b) || a <= b; };
  if (how == "gtu") return [](T a, T b) { return unordered(a, b) || a > b; };
  if (how == "geu") return [](T a, T b) { return unordered(a, b) || a >= b; };
  return nullptr;
}

Effect make_comparison(const Operands& op) {
  if (op.words.size() != 3) unknown(op);
  const std::string how = op.words[1];
  return with_type(op, op.words.back(), [&](auto t) {
    using T = typename decltype(t)::type;
    const auto compare = comparison<T>(how);
    if (compare == nullptr) unknown(op);
    return map<bool, T, T>(op, compare);
  });
}

Effect make_choice(const Operands& op) {
  return map<uint64_t, uint64_t, uint64_t, bool>(
      op, [](uint64_t a, uint64_t b, bool first) { return first ? a : b; });
}

// ---- conversions

template <typename To, typename From>
To saturated(From x) {
  constexpr auto kLeast = std::numeric_limits<To>::min(), kMost = std::numeric_limits<To>::max();
  if (x != x) return 0;
  if (x <= static_cast<From>(kLeast)) return kLeast;
  if (x >= static_cast<From>(kMost)) return kMost;
  return static_cast<To>(x);
}

Effect make_conversion(const Operands& op) {
  const std::string &to = op.words[op.words.size() - 2], &from = op.words.back();
  if (from == "f32" && (to == "f16x2" || to == "bf16x2") && op.has("rn")) {
    const bool is_half = to == "f16x2";
    return map<uint32_t, float, float>(op, [is_half](float high, float low) {
      return is_half ? pack<Half>(low, high) : pack<BFloat16>(low, high);
    });
  }
  if (from == "f32" && to == "e4m3x2" && op.has("rn") && op.has("satfinite")) {
    const auto bits = [](float x) { return x != x ? 0x7f : from_float<Float8>(x).bits; };
    return map<uint16_t, float, float>(op, [bits](float high, float low) {
      return static_cast<uint16_t>(bits(high) << 8 | bits(low));
    });
  }
  if (from == "f16" && to == "f32") return map<float, uint16_t>(op, half_value);
  return with_type(op, from, [&](auto source) {
    return with_type(op, to, [&](auto target) -> Effect {
      using S = typename decltype(source)::type;
      using T = typename decltype(target)::type;
      if constexpr (is_float<S> && !is_float<T>) {
        if (op.has("rzi")) return map<T, S>(op, [](S x) { return saturated<T>(std::trunc(x)); });
        if (op.has("rni"))
          return map<T, S>(op, [](S x) { return saturated<T>(std::nearbyint(x)); });
        if (op.has("rmi")) return map<T, S>(op, [](S x) { return saturated<T>(std::floor(x)); });
        unknown(op);
      } else if constexpr (is_float<S> && std::is_same_v<S, T>) {
        if (!op.has("sat")) unknown(op);
        return map<T, S>(op, [](S x) { return x > 0 ? std::min(x, S{1}) : S{0}; });
      } else {
        // A register may be wider than the result, which is then extended.
        using Wide = std::conditional_t<is_float<T>, T,
                                        std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;
        return map<Wide, S>(op, [](S x) { return static_cast<Wide>(static_cast<T>(x)); });
      }
    });
  });
}

// ---- moves and memory

Effect make_move(const Operands& op) {
  const std::vector<std::string>&to = op.operands.at(0), &from = op.operands.at(1);
  if (to.size() == 1 && from.size() == 1) {
    return map<uint64_t, uint64_t>(op, [](uint64_t x) { return x; });
  }
  // Parts of a register, the lowest first.
  const size_t parts = std::max(to.size(), from.size());
  const int bits = std::stoi(op.words.back().substr(1)) / static_cast<int>(parts);
  const uint64_t field = (uint64_t{1} << bits) - 1;
  const std::vector<int> out = op.vector(0), in = op.vector(1);
  if (to.size() > 1) {
    return [=](PtxWarp& w, uint32_t mask) {
      for_lanes(mask, [&](int lane) {
        const uint64_t x = w.reg(in[0])[lane];
        for (size_t i = 0; i < parts; ++i) w.reg(out[i])[lane] = x >> (bits * i) & field;
      });
    };
  }
  return [=](PtxWarp& w, uint32_t mask) {
    for_lanes(mask, [&](int lane) {
      uint64_t x = 0;
      for (size_t i = 0; i < parts; ++i) x |= (w.reg(in[i])[lane] & field) << (bits * i);
      w.reg(out[0])[lane] = x;
    });
  };
}

enum class Space { kParam, kShared, kGlobal };

Space space_of(const Operands& op) {
  if (op.words[1] == "param") return Space::kParam;
  if (op.words[1] == "shared") return Space::kShared;
  if (op.words[1] == "global") return Space::kGlobal;
  unknown(op);
}

// Where each lane accesses `bytes`; counted.
void locate(PtxWarp& w, uint32_t mask, Space space, Operands::Address where, int bytes,
            uint64_t* at) {
  const uint64_t* const base = w.reg(where.reg);
  for_lanes(mask, [&](int lane) {
    at[lane] = base[lane] + static_cast<uint64_t>(where.offset);
    if (space == Space::kShared) at[lane] = static_cast<uint32_t>(at[lane]);
  });
  if (space == Space::kShared) w.machine->count_shared(at, mask, bytes);
  if (space == Space::kGlobal) w.machine->count_global(at, mask, bytes);
}

Effect make_load(const Operands& op) {
  const Space space = space_of(op);
  const Operands::Address from = op.address(1);
  const std::vector<int> to = op.vector(0);
  const Access access = op.has("cg") || op.has("volatile") ? Access::kReadL2 : Access::kRead;
  return with_type(op, op.words.back(), [&](auto t) -> Effect {
    using T = typename decltype(t)::type;
    using Wide = std::conditional_t<is_float<T>, T,
                                    std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;
    const int bytes = static_cast<int>(sizeof(T) * to.size());
    return [=](PtxWarp& w, uint32_t mask) {
      uint64_t at[kLanes];
      locate(w, mask, space, from, bytes, at);
      Machine& m = *w.machine;
      for_lanes(mask, [&](int lane) {
        const char* const p = space == Space::kShared   ? m.read_shared(w, lane, at[lane], bytes)
                              : space == Space::kGlobal ? m.global(w, lane, at[lane], bytes, access)
                                                        : m.param(w, lane, at[lane], bytes);
        T values[4];
        std::memcpy(values, p, bytes);
        for (size_t i = 0; i < to.size(); ++i) {
          w.reg(to[i])[lane] = put<Wide>(static_cast<Wide>(values[i]));
        }
      });
    };
  });
}

Effect make_store(const Operands& op) {
  const Space space = space_of(op);
  const Operands::Address to = op.address(0);
  const std::vector<int> from = op.vector(1);
  return with_type(op, op.words.back(), [&](auto t) -> Effect {
    using T = typename decltype(t)::type;
    const int bytes = static_cast<int>(sizeof(T) * from.size());
    return [=](PtxWarp& w, uint32_t mask) {
      uint64_t at[kLanes];
      locate(w, mask, space, to, bytes, at);
      Machine& m = *w.machine;
      for_lanes(mask, [&](int lane) {
        T values[4];
        for (size_t i = 0; i < from.size(); ++i) values[i] = get<T>(w.reg(from[i])[lane]);
        char* const p = space == Space::kShared
                            ? m.write_shared(w, lane, at[lane], bytes)
                            : m.global(w, lane, at[lane], bytes, Access::kWrite);
        std::memcpy(p, values, bytes);
      });
    };
  });
}

Effect make_atomic(const Operands& op) {
  const Space space = space_of(op);
  const Operands::Address where = op.address(1);
  const int to = op(0), with = op(2);
  const std::string how = op.words[op.words.size() - 2];
  if (how != "add" && how != "min" && how != "max" && how != "exch" && how != "or") unknown(op);
  return with_integer(op, op.words.back(), [&](auto t) -> Effect {
    using T = typename decltype(t)::type;
    return [=](PtxWarp& w, uint32_t mask) {
      Machine& m = *w.machine;
      for_lanes(mask, [&](int lane) {
        const uint64_t at = w.reg(where.reg)[lane] + static_cast<uint64_t>(where.offset);
        char* const p = space == Space::kShared
                            ? m.atomic_shared(w, lane, static_cast<uint32_t>(at), sizeof(T))
                            : m.global(w, lane, at, sizeof(T), Access::kAtomic);
        const T x = get<T>(w.reg(with)[lane]);
        T old;
        std::memcpy(&old, p, sizeof old);
        const T now = how == "add"   ? wrapping(old, x, [](auto a, auto b) { return a + b; })
                      : how == "min" ? std::min(old, x)
                      : how == "max" ? std::max(old, x)
                      : how == "or"  ? static_cast<T>(old | x)
                                     : x;
        std::memcpy(p, &now, sizeof now);
        w.reg(to)[lane] = put<T>(old);
      });
    };
  });
}

Effect make_async_copy(const Operands& op) {
  if (op.has("commit_group")) {
    return [](PtxWarp& w, uint32_t mask) {
      for_lanes(mask, [&](int lane) {
        w.groups[lane].emplace_back();
        w.groups[lane].back().swap(w.copies[lane]);
      });
    };
  }
  if (op.has("wait_group")) {
    const size_t pending = std::stoul(op.operands.at(0).at(0));
    return [pending](PtxWarp& w, uint32_t mask) {
      for_lanes(mask, [&](int lane) { w.machine->finish_copies(w, lane, pending); });
    };
  }
  if (!op.has("shared") || !op.has("global") || op.operands.at(2).at(0) != "16") unknown(op);
  const Operands::Address to = op.address(0), from = op.address(1);
  const int size = op(3);
  return [=](PtxWarp& w, uint32_t mask) {
    Machine& m = *w.machine;
    uint64_t out[kLanes], in[kLanes];
    uint32_t reading = 0;
    for_lanes(mask, [&](int lane) {
      out[lane] = static_cast<uint32_t>(w.reg(to.reg)[lane] + static_cast<uint64_t>(to.offset));
      in[lane] = w.reg(from.reg)[lane] + static_cast<uint64_t>(from.offset);
      if (static_cast<uint32_t>(w.reg(size)[lane]) != 0) reading |= 1u << lane;
    });
    m.count_shared(out, mask, 16);
    m.count_global(in, reading, 16);
    for_lanes(mask, [&](int lane) {
      const auto bytes = static_cast<uint32_t>(w.reg(size)[lane]);
      if (bytes > 16) m.fail_at(w, lane, "cp.async of more than 16 bytes");
      const char* const p = bytes == 0 ? nullptr : m.global(w, lane, in[lane], 16, Access::kReadL2);
      m.start_copy(w, lane, {static_cast<uint32_t>(out[lane]), p, bytes});
    });
  };
}

// ---- of whole warps

Effect make_shuffle(const Operands& op) {
  const std::string mode = op.words[2];
  const std::string both = op.operands.at(0).at(0);
  const size_t bar = both.find('|');
  const int to = op.reg(both.substr(0, bar));
  const int valid = bar == std::string::npos ? -1 : op.reg(both.substr(bar + 1));
  const int from = op(1), by = op(2), clamp = op(3), members = op(4);
  return [=](PtxWarp& w, uint32_t) {
    uint64_t in[kLanes];
    std::memcpy(in, w.reg(from), sizeof in);
    for (int lane = 0; lane < kLanes; ++lane) {
      if (static_cast<uint32_t>(w.reg(members)[lane]) != kAllLanes) {
        w.machine->fail_at(w, lane, "only whole warps are emulated");
      }
      const int b = static_cast<int>(w.reg(by)[lane] & 31);
      const int c = static_cast<int>(w.reg(clamp)[lane] & 31);
      const int segment = static_cast<int>(w.reg(clamp)[lane] >> 8 & 31);
      const int most = (lane & segment) | (c & ~segment);
      int source;
      bool ok;
      if (mode == "up") {
        source = lane - b;
        ok = source >= most;
      } else {
        source = mode == "down"   ? lane + b
                 : mode == "bfly" ? lane ^ b
                                  : (lane & segment) | (b & ~segment);
        ok = source <= most;
      }
      w.reg(to)[lane] = static_cast<uint32_t>(in[ok ? source : lane]);
      if (valid >= 0) w.reg(valid)[lane] = ok;
    }
  };
}

Effect make_vote(const Operands& op) {
  const int to = op(0), from = op(1), members = op(2);
  const bool ballot = op.has("ballot"), all = op.has("all");
  if (!ballot && !all && !op.has("any")) unknown(op);
  return [=](PtxWarp& w, uint32_t) {
    uint32_t votes = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (static_cast<uint32_t>(w.reg(members)[lane]) != kAllLanes) {
        w.machine->fail_at(w, lane, "only whole warps are emulated");
      }
      votes |= static_cast<uint32_t>(w.reg(from)[lane] & 1) << lane;
    }
    const uint32_t result = ballot ? votes : all ? votes == kAllLanes : votes != 0;
    for (int lane = 0; lane < kLanes; ++lane) w.reg(to)[lane] = result;
  };
}

// Fragments: "Matrix fragments for mma.m16n8k16 with floating point type". Group g = lane / 4, and
// t = lane % 4: a0,a1 (row g, columns 2t, 2t+1), a2,a3 (row g+8), a4,a5 (row g, columns 2t+8, +9),
// a6,a7 (row g+8); b0,b1 (rows 2t, 2t+1 of column g), b2,b3 (rows 2t+8, +9); c0,c1 (row g, columns
// 2t, 2t+1), c2,c3 (row g+8).
Effect make_mma(const Operands& op) {
  if (!op.has("m16n8k16") || !op.has("row") || !op.has("col")) unknown(op);
  const bool is_half = op.words[op.words.size() - 2] == "f16";
  const std::vector<int> d = op.vector(0), a = op.vector(1), b = op.vector(2), c = op.vector(3);
  if (d.size() != 4 || a.size() != 4 || b.size() != 2 || c.size() != 4) unknown(op);
  return [=](PtxWarp& w, uint32_t) {
    const auto element = [&](int reg, int lane, int i) {
      const auto bits = static_cast<uint16_t>(w.reg(reg)[lane] >> (16 * i));
      return is_half ? half_value(bits) : bfloat16_value(bits);
    };
    float rows[16][16], columns[8][16];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 8; ++i) {
        rows[g + i / 2 % 2 * 8][2 * t + i / 4 * 8 + i % 2] = element(a[i / 2], lane, i % 2);
      }
      for (int i = 0; i < 4; ++i) {
        columns[g][2 * t + i / 2 * 8 + i % 2] = element(b[i / 2], lane, i % 2);
      }
    }
    float sums[kLanes][4];
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const float *const row = rows[lane / 4 + i / 2 * 8], *const column =
                                                                 columns[lane % 4 * 2 + i % 2];
        float sum = get<float>(w.reg(c[i])[lane]);
        for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
        sums[lane][i] = sum;
      }
    }
    for (int i = 0; i < 4; ++i) {
      uint64_t* const out = w.reg(d[i]);
      for (int lane = 0; lane < kLanes; ++lane) out[lane] = put<float>(sums[lane][i]);
    }
  };
}

// Thread t gets elements 2 (t % 4) and the next of row t / 4, of each matrix; the addresses of
// matrix i's rows come from threads 8 i and following.
Effect make_ldmatrix(const Operands& op) {
  if (!op.has("m8n8") || !op.has("x4") || !op.has("b16") || !op.has("shared")) unknown(op);
  const bool transposed = op.has("trans");
  const std::vector<int> to = op.vector(0);
  const Operands::Address from = op.address(1);
  return [=](PtxWarp& w, uint32_t) {
    Machine& m = *w.machine;
    uint64_t at[kLanes];
    uint16_t rows[kLanes][8];
    for (int lane = 0; lane < kLanes; ++lane) {
      at[lane] = static_cast<uint32_t>(w.reg(from.reg)[lane] + static_cast<uint64_t>(from.offset));
      std::memcpy(rows[lane], m.read_shared(w, lane, at[lane], 16), 16);
    }
    m.count_shared(at, kAllLanes, 16);
    for (int i = 0; i < 4; ++i) {
      uint64_t* const out = w.reg(to[i]);
      for (int lane = 0; lane < kLanes; ++lane) {
        const int r = lane / 4, c = lane % 4 * 2;
        const uint32_t low = transposed ? rows[8 * i + c][r] : rows[8 * i + r][c];
        const uint32_t high_half = transposed ? rows[8 * i + c + 1][r] : rows[8 * i + r][c + 1];
        out[lane] = low | high_half << 16;
      }
    }
  };
}

bool is_one_of(const std::string& name, std::initializer_list<const char*> names) {
  for (const char* each : names) {
    if (name == each) return true;
  }
  return false;
}

}  // namespace

Instruction make_instruction(const Operands& op) {
  using Kind = Instruction::Kind;
  Instruction result;
  const std::string& name = op.words[0];
  if (name == "bra") {
    result.kind = Kind::kBranch;
  } else if (name == "ret" || name == "exit") {
    result.kind = Kind::kExit;
  } else if (name == "bar" && op.has("warp")) {
    result.kind = Kind::kTogether;
    result.effect = [](PtxWarp& w, uint32_t) { ++w.epoch; };
  } else if (name == "bar" || name == "barrier") {
    if (!op.has("sync") || op.operands.size() != 1) unknown(op);
    result.kind = Kind::kBarrier;
  } else if (is_one_of(name, {"shfl", "vote", "mma", "ldmatrix"})) {
    result.kind = Kind::kTogether;
    result.effect = name == "shfl"   ? make_shuffle(op)
                    : name == "vote" ? make_vote(op)
                    : name == "mma"  ? make_mma(op)
                                     : make_ldmatrix(op);
  } else if (name == "membar" || name == "fence") {
    result.effect = [](PtxWarp& w, uint32_t mask) {
      for_lanes(mask, [&](int lane) { w.machine->fence(w, lane); });
    };
  } else if (name == "mov") {
    result.effect = make_move(op);
  } else if (name == "cvta") {
    if (!op.has("to") || !op.has("global")) unknown(op);
    result.effect = make_move(op);
  } else if (name == "ld") {
    result.effect = make_load(op);
  } else if (name == "st") {
    result.effect = make_store(op);
  } else if (name == "atom") {
    result.effect = make_atomic(op);
  } else if (name == "cp" && op.has("async")) {
    result.effect = make_async_copy(op);
  } else if (name == "cvt") {
    result.effect = make_conversion(op);
  } else if (name == "setp") {
    result.effect = make_comparison(op);
  } else if (name == "selp") {
    result.effect = make_choice(op);
  } else if (is_one_of(name, {"and", "or", "xor", "not", "shl", "shr", "popc", "clz", "brev",
                              "bfind", "prmt", "bfi"})) {
    result.effect = make_bits(op);
  } else {
    result.effect = make_arithmetic(op);
  }
  return result;
}

}  // namespace fastpage::cuda::emulation
