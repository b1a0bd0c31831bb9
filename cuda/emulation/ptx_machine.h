// Threads, warps and a block's shared memory, for the instructions of ptx_instructions.cc.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "cuda/emulation/ptx.h"

namespace fastpage::cuda::emulation {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

struct Machine;
struct PtxWarp;

// What an instruction does for the lanes of `mask`.
using Effect = std::function<void(PtxWarp&, uint32_t mask)>;

struct Instruction {
  enum class Kind : uint8_t { kPlain, kBranch, kExit, kTogether, kBarrier };
  Kind kind = Kind::kPlain;
  bool negated = false;
  int predicate = -1;  // a register
  int target = -1;     // of a branch
  Effect effect;
  std::string text;
};

// A kernel, parsed. Operands are registers: constants and special registers, too.
struct PtxKernel {
  std::string name;
  std::vector<Instruction> code;
  int num_registers = 0;
  struct Constant {
    int reg;
    uint64_t value;
  };
  std::vector<Constant> constants;
  std::map<std::string, int> specials;  // %tid.x and so on: their registers
  std::vector<size_t> param_offsets, param_sizes;
  size_t param_bytes = 0;
  size_t static_shared = 0;
  int max_threads = 1024;
};

struct PtxWarp {
  Machine* machine;
  int index;
  std::vector<uint64_t> registers;  // [register][lane]
  std::array<int, kLanes> pc;
  uint32_t done = 0;
  uint32_t waiting = 0;     // at an instruction that takes the whole warp
  bool at_barrier = false;  // of the block
  uint32_t epoch = 0;       // number of bar.warp.sync
  struct AsyncCopy {
    uint32_t to;
    const char* from;
    uint32_t bytes;
  };
  std::array<std::vector<AsyncCopy>, kLanes> copies;
  std::array<std::vector<std::vector<AsyncCopy>>, kLanes> groups;

  uint64_t* reg(int r) { return registers.data() + static_cast<size_t>(r) * kLanes; }
  int thread(int lane) const { return index * kLanes + lane; }
};

// Who has last touched a byte of shared memory.
struct Shadow {
  static constexpr uint16_t kNobody = 0xffff;
  uint16_t writer = kNobody, reader = kNobody;
  uint16_t pending = 0;       // copies on their way
  bool many_readers = false;  // of several warps, since `read_barrier`
  bool many_lanes = false;    // several of the reader's warp, since `read_epoch`
  uint32_t write_barrier = 0, write_epoch = 0, read_barrier = 0, read_epoch = 0;
};

// Who has last written four bytes of global memory in this launch, and whether others may know:
// after a fence of the writer and an atomic of its block (by the writer, or with a barrier
// between), those that have found the atomic's address changed, and then fenced.
struct GlobalWrite {
  int64_t block;
  uint16_t thread;
  uint32_t barrier, epoch;
  uint64_t atomic = 0;   // its address
  int64_t released = 0;  // when; 0: not yet
};

enum class Access { kRead, kReadL2, kWrite, kAtomic };

struct Machine {
  const PtxKernel* kernel;
  PtxCounts* counts;
  std::vector<PtxWarp> warps;
  std::vector<char> params;
  std::vector<char> shared;
  std::vector<Shadow> shadow;
  uint32_t barriers = 0;
  std::mt19937_64 random;
  const Instruction* now = nullptr;

  [[noreturn]] void fail_at(const PtxWarp& warp, int lane, const std::string& what);

  // `bytes` at an offset of shared memory, for a thread: checked, and remembered.
  char* read_shared(PtxWarp& warp, int lane, uint64_t offset, size_t bytes);
  char* write_shared(PtxWarp& warp, int lane, uint64_t offset, size_t bytes);
  char* atomic_shared(PtxWarp& warp, int lane, uint64_t offset, size_t bytes);
  // Global memory, likewise. What was there before the launch anybody may read, and write.
  char* global(PtxWarp& warp, int lane, uint64_t address, size_t bytes, Access access);
  void fence(PtxWarp& warp, int lane);
  void start_block(int64_t index);
  const char* param(PtxWarp& warp, int lane, uint64_t offset, size_t bytes);

  void start_copy(PtxWarp& warp, int lane, PtxWarp::AsyncCopy copy);
  void finish_copies(PtxWarp& warp, int lane, size_t pending_groups);

  void count_shared(const uint64_t* offsets, uint32_t mask, int bytes);
  void count_global(const uint64_t* addresses, uint32_t mask, int bytes);

 private:
  struct Fenced {
    uint64_t word;
    uint16_t thread;
    uint32_t barrier;
  };
  void check_global_order(PtxWarp& warp, int lane, const GlobalWrite& last, Access access);
  void release_and_acquire(const PtxWarp& warp, int lane, uint64_t address);

  int64_t block_ = 0;
  int64_t clock_ = 0;
  std::unordered_map<uint64_t, GlobalWrite> written_;  // by address / 4
  std::unordered_set<uint64_t> written_pages_;
  // Of the block that runs.
  std::unordered_map<uint16_t, std::vector<uint64_t>> unfenced_;  // words, by thread
  std::vector<Fenced> fenced_;
  std::unordered_map<uint64_t, int64_t> acquired_;    // when, by the atomic's address
  std::unordered_map<uint16_t, int64_t> last_fence_;  // when, by thread

  char* shared_at(PtxWarp& warp, int lane, uint64_t offset, size_t bytes);
  bool in_order(const PtxWarp& warp, int lane, uint16_t other, uint32_t barrier,
                uint32_t epoch) const;
};

// Operands as they stand in the text; registers by name.
struct Operands {
  std::vector<std::string> words;                  // of the operation's name
  std::vector<std::vector<std::string>> operands;  // vectors have several, others one
  // The register of an operand: of a name, a number, a symbol.
  std::function<int(const std::string&)> reg;

  bool has(std::string_view word) const;
  int operator()(size_t i) const { return reg(operands.at(i).at(0)); }
  std::vector<int> vector(size_t i) const;
  struct Address {
    int reg;
    int64_t offset;
  };
  Address address(size_t i) const;
};

// Throws std::runtime_error for what is not known.
Instruction make_instruction(const Operands& op);

// All blocks of a launch. params: the bytes of each.
void run_ptx(const PtxKernel& kernel, PtxCounts* counts, dim3 grid, dim3 size, size_t shared_bytes,
             const std::vector<std::vector<char>>& params);

}  // namespace fastpage::cuda::emulation
