// Running PTX: threads that diverge and meet, shared memory that knows who has touched it.
#include "cuda/emulation/ptx_machine.h"

#include <algorithm>
#include <set>

namespace fastpage::cuda::emulation {

// ---- memory

void Machine::fail_at(const PtxWarp& warp, int lane, const std::string& what) {
  threadIdx = dim3(static_cast<unsigned>(warp.thread(lane)), 0, 0);
  fail(what + " at \"" + (now == nullptr ? "" : now->text) + "\"");
}

bool Machine::in_order(const PtxWarp& warp, int lane, uint16_t other, uint32_t barrier,
                       uint32_t epoch) const {
  if (other == Shadow::kNobody || other == warp.thread(lane) || barrier != barriers) return true;
  return other / kLanes == warp.index && epoch != warp.epoch;
}

char* Machine::shared_at(PtxWarp& warp, int lane, uint64_t offset, size_t bytes) {
  if (offset + bytes > shared.size()) fail_at(warp, lane, "outside of shared memory");
  if (offset % bytes != 0) fail_at(warp, lane, "misaligned in shared memory");
  return shared.data() + offset;
}

char* Machine::read_shared(PtxWarp& warp, int lane, uint64_t offset, size_t bytes) {
  char* const p = shared_at(warp, lane, offset, bytes);
  const auto me = static_cast<uint16_t>(warp.thread(lane));
  for (size_t i = offset; i < offset + bytes; ++i) {
    Shadow& s = shadow[i];
    if (s.pending > 0) fail_at(warp, lane, "reads what a cp.async is still bringing");
    if (!in_order(warp, lane, s.writer, s.write_barrier, s.write_epoch)) {
      fail_at(
          warp, lane,
          "reads what thread " + std::to_string(s.writer) + " wrote, and no barrier lies between");
    }
    if (s.reader == Shadow::kNobody || s.read_barrier != barriers) {
      s.many_readers = s.many_lanes = false;
    } else if (s.reader / kLanes != warp.index) {
      s.many_readers = true;
    } else if (s.read_epoch != warp.epoch) {
      s.many_lanes = false;
    } else if (s.reader != me) {
      s.many_lanes = true;
    }
    s.reader = me;
    s.read_barrier = barriers;
    s.read_epoch = warp.epoch;
  }
  return p;
}

char* Machine::write_shared(PtxWarp& warp, int lane, uint64_t offset, size_t bytes) {
  char* const p = shared_at(warp, lane, offset, bytes);
  const auto me = static_cast<uint16_t>(warp.thread(lane));
  for (size_t i = offset; i < offset + bytes; ++i) {
    Shadow& s = shadow[i];
    if (s.pending > 0) fail_at(warp, lane, "writes where a cp.async is still bringing something");
    if (!in_order(warp, lane, s.writer, s.write_barrier, s.write_epoch)) {
      fail_at(warp, lane,
              "writes where thread " + std::to_string(s.writer) +
                  " wrote, and no barrier lies between");
    }
    const bool read_now = s.reader != Shadow::kNobody && s.read_barrier == barriers;
    if (read_now &&
        (s.many_readers ||
         (s.many_lanes && s.reader / kLanes == warp.index && s.read_epoch == warp.epoch) ||
         !in_order(warp, lane, s.reader, s.read_barrier, s.read_epoch))) {
      fail_at(warp, lane,
              "writes where thread " + std::to_string(s.reader) +
                  " or another reads, and no barrier lies between");
    }
    s.writer = me;
    s.write_barrier = barriers;
    s.write_epoch = warp.epoch;
    s.reader = Shadow::kNobody;
  }
  return p;
}

// Atomics are in order among themselves: what they leave belongs to nobody until the next barrier,
// but a plain access beside them is checked.
char* Machine::atomic_shared(PtxWarp& warp, int lane, uint64_t offset, size_t bytes) {
  char* const p = shared_at(warp, lane, offset, bytes);
  for (size_t i = offset; i < offset + bytes; ++i) {
    Shadow& s = shadow[i];
    if (s.pending > 0 || !in_order(warp, lane, s.writer, s.write_barrier, s.write_epoch)) {
      fail_at(warp, lane,
              "an atomic where thread " + std::to_string(s.writer) +
                  " wrote, and no barrier lies between");
    }
  }
  return p;
}

char* Machine::global(PtxWarp& warp, int lane, uint64_t address, size_t bytes, Access access) {
  threadIdx = dim3(static_cast<unsigned>(warp.thread(lane)), 0, 0);
  char* const p = reinterpret_cast<char*>(address);
  check_global(p, bytes, bytes);
  if (access == Access::kAtomic) {
    release_and_acquire(warp, lane, address);
    return p;
  }
  constexpr uint64_t kPage = 4096;
  const bool is_write = access == Access::kWrite;
  if (is_write) {
    written_pages_.insert(address / kPage);
  } else if (written_pages_.count(address / kPage) == 0) {
    return p;
  }
  const auto me = static_cast<uint16_t>(warp.thread(lane));
  for (uint64_t word = address / 4; word * 4 < address + bytes; ++word) {
    const auto last = written_.find(word);
    // Parts of a word may be several threads'.
    if (last != written_.end() && bytes >= 4) check_global_order(warp, lane, last->second, access);
    if (!is_write) continue;
    written_[word] = GlobalWrite{block_, me, barriers, warp.epoch};
    unfenced_[me].push_back(word);
  }
  return p;
}

void Machine::check_global_order(PtxWarp& warp, int lane, const GlobalWrite& last, Access access) {
  const std::string verb = access == Access::kWrite ? "writes where " : "reads what ";
  if (last.block == block_) {
    if (in_order(warp, lane, last.thread, last.barrier, last.epoch)) return;
    fail_at(warp, lane,
            verb + "thread " + std::to_string(last.thread) +
                " wrote in global memory, and no barrier lies between");
  }
  const auto known = acquired_.find(last.atomic);
  const auto fence = last_fence_.find(static_cast<uint16_t>(warp.thread(lane)));
  if (last.released == 0 || known == acquired_.end() || known->second < last.released ||
      fence == last_fence_.end() || fence->second < known->second) {
    fail_at(warp, lane,
            verb + "block " + std::to_string(last.block) +
                " wrote, and fence, atomic and fence do not lie between");
  }
  if (access == Access::kRead) {
    fail_at(warp, lane, "reads through L1 what block " + std::to_string(last.block) + " wrote");
  }
}

void Machine::fence(PtxWarp& warp, int lane) {
  const auto me = static_cast<uint16_t>(warp.thread(lane));
  last_fence_[me] = ++clock_;
  for (const uint64_t word : unfenced_[me]) fenced_.push_back({word, me, barriers});
  unfenced_[me].clear();
}

void Machine::release_and_acquire(const PtxWarp& warp, int lane, uint64_t address) {
  ++clock_;
  std::vector<Fenced> left;
  for (const Fenced& f : fenced_) {
    if (f.barrier == barriers && f.thread != warp.thread(lane)) {
      left.push_back(f);
      continue;
    }
    GlobalWrite& last = written_.at(f.word);
    if (last.block == block_ && last.thread == f.thread && last.released == 0) {
      last.atomic = address;
      last.released = clock_;
    }
  }
  fenced_.swap(left);
  acquired_[address] = ++clock_;
}

void Machine::start_block(int64_t index) {
  block_ = index;
  unfenced_.clear();
  fenced_.clear();
  acquired_.clear();
  last_fence_.clear();
}

const char* Machine::param(PtxWarp& warp, int lane, uint64_t offset, size_t bytes) {
  if (offset + bytes > params.size()) fail_at(warp, lane, "outside of the parameters");
  return params.data() + offset;
}

void Machine::start_copy(PtxWarp& warp, int lane, PtxWarp::AsyncCopy copy) {
  std::memset(write_shared(warp, lane, copy.to, 16), kPoison, 16);
  for (uint32_t i = copy.to; i < copy.to + 16; ++i) ++shadow[i].pending;
  warp.copies[lane].push_back(copy);
}

void Machine::finish_copies(PtxWarp& warp, int lane, size_t pending_groups) {
  auto& groups = warp.groups[lane];
  while (groups.size() > pending_groups) {
    for (const PtxWarp::AsyncCopy& copy : groups.front()) {
      for (uint32_t i = copy.to; i < copy.to + 16; ++i) --shadow[i].pending;
      char* const to = write_shared(warp, lane, copy.to, 16);
      std::memset(to, 0, 16);
      if (copy.bytes > 0) std::memcpy(to, copy.from, copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

void Machine::count_shared(const uint64_t* offsets, uint32_t mask, int bytes) {
  const int lanes = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  for (int first = 0; first < kLanes; first += lanes) {
    std::array<std::set<uint64_t>, 32> words;
    for (int lane = first; lane < first + lanes; ++lane) {
      if ((mask >> lane & 1) == 0) continue;
      for (uint64_t word = offsets[lane] / 4; word * 4 < offsets[lane] + bytes; ++word) {
        words[word % 32].insert(word);
      }
    }
    size_t most = 0;
    for (const std::set<uint64_t>& bank : words) most = std::max(most, bank.size());
    counts->shared_wavefronts += static_cast<int64_t>(most);
    counts->shared_least += most > 0;
  }
}

void Machine::count_global(const uint64_t* addresses, uint32_t mask, int bytes) {
  std::set<uint64_t> sectors, different;
  for (int lane = 0; lane < kLanes; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    different.insert(addresses[lane]);
    for (uint64_t s = addresses[lane] / 32; s * 32 < addresses[lane] + bytes; ++s)
      sectors.insert(s);
  }
  counts->global_sectors += static_cast<int64_t>(sectors.size());
  counts->global_least += static_cast<int64_t>((different.size() * bytes + 31) / 32);
}

// ---- threads

namespace {

constexpr int64_t kMostInstructions = 1 << 30;  // of a launch

class Runner {
 public:
  Runner(const PtxKernel& kernel, PtxCounts* counts, dim3 size, size_t shared_bytes)
      : first_(counts->instructions) {
    m_.kernel = &kernel;
    m_.counts = counts;
    m_.random.seed(settings.seed);
    m_.shared.resize(kernel.static_shared + shared_bytes);
    m_.shadow.resize(m_.shared.size());
    m_.warps.resize(size.x / kLanes);
    for (size_t i = 0; i < m_.warps.size(); ++i) {
      PtxWarp& w = m_.warps[i];
      w.machine = &m_;
      w.index = static_cast<int>(i);
      w.registers.resize(static_cast<size_t>(kernel.num_registers) * kLanes);
      for (const PtxKernel::Constant& c : kernel.constants) {
        std::fill_n(w.reg(c.reg), kLanes, c.value);
      }
    }
  }

  Machine& machine() { return m_; }

  void run_block() {
    m_.start_block(next_block_++);
    std::fill(m_.shared.begin(), m_.shared.end(), static_cast<char>(kPoison));
    std::fill(m_.shadow.begin(), m_.shadow.end(), Shadow());
    m_.barriers = 0;
    for (PtxWarp& w : m_.warps) start(&w);
    for (;;) {
      std::vector<int> order(m_.warps.size());
      for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
      if (settings.order == Order::kDescending) std::reverse(order.begin(), order.end());
      if (settings.order == Order::kRandom) std::shuffle(order.begin(), order.end(), m_.random);
      for (const int i : order) run(&m_.warps[i]);
      size_t done = 0, waiting = 0;
      for (const PtxWarp& w : m_.warps) {
        done += w.done == kAllLanes;
        waiting += w.at_barrier;
      }
      if (done == m_.warps.size()) break;
      if (waiting != m_.warps.size()) fail("some warps wait at a barrier, others have ended");
      ++m_.barriers;
      for (PtxWarp& w : m_.warps) w.at_barrier = false;
    }
    for (PtxWarp& w : m_.warps) {
      for (int lane = 0; lane < kLanes; ++lane) {
        bool left = !w.copies[lane].empty();
        for (const auto& group : w.groups[lane]) left |= !group.empty();
        if (left) m_.fail_at(w, lane, "a cp.async that nothing waits for");
      }
    }
  }

 private:
  void start(PtxWarp* w) {
    w->pc.fill(0);
    w->done = w->waiting = 0;
    w->at_barrier = false;
    w->epoch = 0;
    for (auto& groups : w->groups) groups.clear();
    for (const auto& [name, reg] : m_.kernel->specials) {
      for (int lane = 0; lane < kLanes; ++lane) w->reg(reg)[lane] = special(name, *w, lane);
    }
  }

  static unsigned component(const dim3& v, char name) {
    return name == 'x' ? v.x : name == 'y' ? v.y : v.z;
  }

  static uint64_t special(const std::string& name, const PtxWarp& w, int lane) {
    const char last = name.back();
    if (name.rfind("%tid.", 0) == 0) return last == 'x' ? static_cast<uint64_t>(w.thread(lane)) : 0;
    if (name.rfind("%ntid.", 0) == 0) return component(blockDim, last);
    if (name.rfind("%ctaid.", 0) == 0) return component(blockIdx, last);
    if (name.rfind("%nctaid.", 0) == 0) return component(gridDim, last);
    return static_cast<uint64_t>(name == "%laneid" ? lane : w.index);
  }

  // The lanes that go on, one group of those that are at the same instruction.
  uint32_t choose(const PtxWarp& w, uint32_t runnable) {
    std::vector<int> places;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (runnable >> lane & 1) places.push_back(w.pc[lane]);
    }
    std::sort(places.begin(), places.end());
    places.erase(std::unique(places.begin(), places.end()), places.end());
    size_t which = settings.order == Order::kDescending ? places.size() - 1 : 0;
    if (settings.order == Order::kRandom) which = m_.random() % places.size();
    return at(w, runnable, places[which]);
  }

  static uint32_t at(const PtxWarp& w, uint32_t lanes, int pc) {
    uint32_t mask = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      mask |= static_cast<uint32_t>((lanes >> lane & 1) != 0 && w.pc[lane] == pc) << lane;
    }
    return mask;
  }

  static void go_to(PtxWarp* w, uint32_t mask, int pc) {
    for (int lane = 0; lane < kLanes; ++lane) {
      if (mask >> lane & 1) w->pc[lane] = pc;
    }
  }

  // Until all its threads have ended, or wait for other warps.
  void run(PtxWarp* w) {
    while (w->done != kAllLanes && !w->at_barrier) {
      const uint32_t runnable = ~w->done & ~w->waiting;
      if (runnable != 0) {
        run_group(w, runnable, choose(*w, runnable));
      } else {
        meet(w);
      }
    }
  }

  // All that have not ended wait: it must be at the same instruction.
  void meet(PtxWarp* w) {
    int lane = 0;
    while (w->done >> lane & 1) ++lane;
    const int pc = w->pc[lane];
    m_.now = &m_.kernel->code[pc];
    if (at(*w, w->waiting, pc) != kAllLanes) {
      for (int other = lane; other < kLanes; ++other) {
        if ((w->done >> other & 1) == 0 && w->pc[other] == pc) continue;
        m_.fail_at(
            *w, lane,
            "lanes of a warp that wait for ever, others " +
                (w->done >> other & 1 ? std::string("have ended,")
                                      : "at \"" + m_.kernel->code[w->pc[other]].text + "\""));
      }
    }
    count();
    w->waiting = 0;
    go_to(w, kAllLanes, pc + 1);
    if (m_.now->kind == Instruction::Kind::kBarrier) {
      w->at_barrier = true;
    } else {
      m_.now->effect(*w, kAllLanes);
    }
  }

  void count() {
    if (++m_.counts->instructions - first_ > kMostInstructions) fail("runs for ever");
  }

  void run_group(PtxWarp* w, uint32_t runnable, uint32_t mask) {
    using Kind = Instruction::Kind;
    int lane = 0;
    while ((mask >> lane & 1) == 0) ++lane;
    int pc = w->pc[lane];
    const uint32_t others = runnable & ~mask;
    for (;;) {
      const Instruction& now = m_.kernel->code[pc];
      m_.now = &now;
      uint32_t active = mask;
      if (now.predicate >= 0) {
        const uint64_t* const p = w->reg(now.predicate);
        for (int i = 0; i < kLanes; ++i) {
          if (((p[i] & 1) != 0) == now.negated) active &= ~(1u << i);
        }
      }
      if (now.kind == Kind::kTogether || now.kind == Kind::kBarrier) {
        if (mask == kAllLanes && active == kAllLanes && now.kind == Kind::kTogether) {
          count();
          now.effect(*w, kAllLanes);
          ++pc;
          continue;
        }
        w->waiting |= active;
        go_to(w, active, pc);
        go_to(w, mask & ~active, pc + 1);
        return;
      }
      count();
      if (now.kind == Kind::kPlain) {
        if (active != 0) now.effect(*w, active);
        ++pc;
      } else if (now.kind == Kind::kExit) {
        w->done |= active;
        mask &= ~active;
        ++pc;
        if (mask == 0) return;
      } else if (active == mask) {
        pc = now.target;
      } else if (active == 0) {
        ++pc;
      } else {
        go_to(w, active, now.target);
        go_to(w, mask & ~active, pc + 1);
        return;
      }
      if (others == 0) continue;
      bool stop = false;
      for (int i = 0; i < kLanes; ++i) {
        if ((others >> i & 1) == 0) continue;
        stop |= w->pc[i] == pc || (settings.order == Order::kAscending && w->pc[i] < pc);
      }
      if (stop) {
        go_to(w, mask, pc);
        return;
      }
    }
  }

  Machine m_;
  int64_t first_;  // number of instructions before this launch
  int64_t next_block_ = 0;
};

}  // namespace

void run_ptx(const PtxKernel& kernel, PtxCounts* counts, dim3 grid, dim3 size, size_t shared_bytes,
             const std::vector<std::vector<char>>& params) {
  blockDim = size;
  gridDim = grid;
  if (size.y != 1 || size.z != 1 || size.x % kLanes != 0 ||
      size.x > static_cast<unsigned>(kernel.max_threads)) {
    fail("a block of " + std::to_string(size.x) + " threads, of at most " +
         std::to_string(kernel.max_threads));
  }
  if (kernel.static_shared + shared_bytes > static_cast<size_t>(max_shared)) {
    fail("a block needs " + std::to_string(kernel.static_shared) + " and " +
         std::to_string(shared_bytes) + " bytes of shared memory, of " +
         std::to_string(max_shared));
  }
  if (params.size() != kernel.param_sizes.size()) fail("another number of parameters");
  ++counts->launches;
  Runner runner(kernel, counts, size, shared_bytes);
  runner.machine().params.resize(kernel.param_bytes);
  for (size_t i = 0; i < params.size(); ++i) {
    if (params[i].size() != kernel.param_sizes[i]) fail("a parameter of another size");
    std::copy(
        params[i].begin(), params[i].end(),
        runner.machine().params.begin() + static_cast<std::ptrdiff_t>(kernel.param_offsets[i]));
  }
  for_blocks(grid, [&] { runner.run_block(); });
}

}  // namespace fastpage::cuda::emulation
