#include "ops/kernels.h"

#include <cstdlib>
#include <string>

#include "fastpage/ops.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace fastpage::ops {

namespace {

using cpu::KernelTable;

#if defined(__x86_64__)
bool machine_has_f16c() {  // clang 14 does not know the name in __builtin_cpu_supports
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

bool machine_has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && machine_has_f16c();
#else
  return false;
#endif
}

bool machine_has_avx2_vnni() {
#if defined(__x86_64__)
  unsigned eax, ebx, ecx, edx;
  return machine_has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 &&
         (eax & (1u << 4)) != 0;  // AVX-VNNI, a name that clang 14 does not know either
#else
  return false;
#endif
}

bool machine_has_avx512() {
#if defined(__x86_64__)
  return machine_has_avx2() && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
#else
  return false;
#endif
}

bool machine_has_avx512_vnni() {
#if defined(__x86_64__)
  return machine_has_avx512() && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

bool machine_has_avx512_bf16() {
#if defined(__x86_64__)
  unsigned eax, ebx, ecx, edx;
  return machine_has_avx512_vnni() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 &&
         (eax & (1u << 5)) != 0;
#else
  return false;
#endif
}

#if defined(__x86_64__) && defined(__linux__) && !defined(FASTPAGE_EMULATE_AMX)
// The system saves tiles only for processes that ask for it, once (Linux 5.16).
bool system_grants_tiles() {
  unsigned low, high;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kTileStates = 3u << 17;  // of XCR0: the configuration, and the tiles
  constexpr long kRequestPermission = 0x1023;
  constexpr long kTileData = 18;
  return (low & kTileStates) == kTileStates &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

bool machine_has_amx() {
#if defined(FASTPAGE_EMULATE_AMX)
  const char* env = std::getenv("FASTPAGE_CPU_ISA");
  return env != nullptr && std::string(env) == "amx" && machine_has_avx512_bf16();
#elif defined(__x86_64__) && defined(__linux__)
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kBf16TilesInt8 = 1u << 22 | 1u << 24 | 1u << 25;
  return machine_has_avx512_bf16() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 &&
         (edx & kBf16TilesInt8) == kBf16TilesInt8 && system_grants_tiles();
#else
  return false;
#endif
}

struct InstructionSet {
  const char* name;
  const KernelTable* (*kernels)();
  bool (*is_here)();
};
// Best first.
const InstructionSet kInstructionSets[] = {
    {"amx", cpu::amx_kernels, machine_has_amx},
    {"avx512_bf16", cpu::avx512_bf16_kernels, machine_has_avx512_bf16},
    {"avx512_vnni", cpu::avx512_vnni_kernels, machine_has_avx512_vnni},
    {"avx512", cpu::avx512_kernels, machine_has_avx512},
    {"avx2_vnni", cpu::avx2_vnni_kernels, machine_has_avx2_vnni},
    {"avx2", cpu::avx2_kernels, machine_has_avx2},
    {"portable", cpu::portable_kernels, [] { return true; }},
};

const KernelTable* choose_kernels() {
  const char* env = std::getenv("FASTPAGE_CPU_ISA");
  const std::string highest = env == nullptr ? "" : env;
  bool is_allowed = highest.empty();
  for (const InstructionSet& isa : kInstructionSets) {
    is_allowed = is_allowed || highest == isa.name;
    if (is_allowed && isa.kernels() != nullptr && isa.is_here()) return isa.kernels();
  }
  throw InvalidArgument(
      "FASTPAGE_CPU_ISA is '" + highest +
      "': one of portable, avx2, avx2_vnni, avx512, avx512_vnni, avx512_bf16, amx");
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable* table = choose_kernels();
  return *table;
}

const char* cpu_isa() { return kernels().name; }

cpu::ElementType element_type(DType dtype, const char* what) {
  switch (dtype) {
    case DType::kFloat32:
      return cpu::kF32;
    case DType::kBFloat16:
      return cpu::kBf16;
    case DType::kFloat16:
      return cpu::kF16;
    default:
      throw InvalidArgument(std::string(what) + " is " + dtype_name(dtype) +
                            ": float32, bfloat16 or float16 is needed");
  }
}

cpu::CacheType cache_type(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return cpu::kCacheF32;
    case DType::kBFloat16:
      return cpu::kCacheBf16;
    case DType::kFloat16:
      return cpu::kCacheF16;
    case DType::kInt8:
      return cpu::kCacheI8;
    default:
      throw InvalidArgument(std::string("kv cache is ") + dtype_name(dtype) +
                            ": float32, bfloat16, float16 or int8 is needed");
  }
}

}  // namespace fastpage::ops
