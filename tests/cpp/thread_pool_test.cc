#include "fastpage/thread_pool.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <thread>
#include <vector>

namespace fastpage {
namespace {

// Blocks until as many threads have come as there are.
class Meeting {
 public:
  explicit Meeting(int num_threads) : num_missing_(num_threads) {}
  void wait() {
    --num_missing_;
    while (num_missing_ > 0) std::this_thread::yield();
  }

 private:
  std::atomic<int> num_missing_;
};

TEST(ThreadPool, RunsEveryPartOnce) {
  for (const int n : {1, 2, 3, 8}) {
    ThreadPool pool(n);
    ASSERT_EQ(pool.num_threads(), n);
    std::vector<std::atomic<int>> calls(static_cast<size_t>(n));
    pool.run([&](int part) { ++calls[static_cast<size_t>(part)]; });
    for (const auto& count : calls) EXPECT_EQ(count, 1);
  }
}

TEST(ThreadPool, EveryThreadHasItsNumberAndTheCallerIsTheFirst) {
  constexpr int kThreads = 4;
  ThreadPool pool(kThreads);
  for (int loop = 0; loop < 20; ++loop) {
    Meeting meeting(kThreads);
    std::vector<std::thread::id> ids(kThreads);
    std::vector<std::atomic<int>> calls(kThreads);
    pool.share([](int) { return 1; },
               [&](ThreadPool::Pieces& pieces) {
                 meeting.wait();  // each has one piece: none is left
                 const auto t = static_cast<size_t>(pieces.thread());
                 ++calls[t];
                 ids[t] = std::this_thread::get_id();
                 EXPECT_FALSE(pieces.next());
               });
    for (const auto& count : calls) EXPECT_EQ(count, 1);
    EXPECT_EQ(ids[0], std::this_thread::get_id());
    EXPECT_EQ(std::set<std::thread::id>(ids.begin(), ids.end()).size(), ids.size());
  }
}

TEST(ThreadPool, EveryPieceIsDoneOnce) {
  for (const int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    std::mt19937 random(7);
    for (int loop = 0; loop < 300; ++loop) {
      std::vector<int64_t> counts(static_cast<size_t>(threads));
      for (int64_t& count : counts) {
        count = random() % 3 == 0 ? 0 : static_cast<int64_t>(random() % 40);
      }
      std::vector<std::vector<std::atomic<int>>> seen;
      for (const int64_t count : counts) seen.emplace_back(static_cast<size_t>(count));
      std::atomic<int> bad{0};
      pool.share([&](int part) { return counts[static_cast<size_t>(part)]; },
                 [&](ThreadPool::Pieces& pieces) {
                   int64_t before = -1;
                   do {
                     const auto part = static_cast<size_t>(pieces.part());
                     if (pieces.index() < 0 || pieces.index() >= counts[part]) {
                       ++bad;
                       continue;
                     }
                     ++seen[part][static_cast<size_t>(pieces.index())];
                     if (pieces.in_order() && pieces.index() != before + 1) ++bad;
                     before = pieces.index();
                   } while (pieces.next());
                 });
      EXPECT_EQ(bad, 0);
      for (const auto& part : seen) {
        for (const auto& count : part) EXPECT_EQ(count, 1);
      }
    }
  }
}

// One that has a piece in hand and does not go on, as when the system runs something else.
TEST(ThreadPool, TheOthersDoWhatAThreadThatIsHeldUpHasLeft) {
  ThreadPool pool(3);
  constexpr int kPieces = 50;
  std::atomic<int> done{0};
  std::atomic<bool> others_did_the_rest{true};
  const auto too_late = std::chrono::steady_clock::now() + std::chrono::seconds(120);
  pool.share([](int) { return kPieces; },
             [&](ThreadPool::Pieces& pieces) {
               do {
                 while (pieces.thread() == 1 && done < 3 * kPieces - 1) {
                   if (std::chrono::steady_clock::now() < too_late) {
                     std::this_thread::yield();
                     continue;
                   }
                   others_did_the_rest = false;
                   break;
                 }
                 ++done;
               } while (pieces.next());
             });
  EXPECT_EQ(done, 3 * kPieces);
  EXPECT_TRUE(others_did_the_rest);
}

TEST(ThreadPool, DefaultsToTheCoresAndRefusesNegativeNumbers) {
  EXPECT_GE(ThreadPool().num_threads(), 1);
  EXPECT_THROW(ThreadPool(-1), InvalidArgument);
}

std::vector<int> cpus_of_this_thread() {
  cpu_set_t set;
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return cpus;
  for (int i = 0; i < CPU_SETSIZE; ++i) {
    if (CPU_ISSET(static_cast<size_t>(i), &set)) cpus.push_back(i);
  }
  return cpus;
}

TEST(ThreadPool, ThreadsStayOnTheCpusTheyAreGiven) {
  const std::vector<int> all = cpus_of_this_thread();
  std::vector<int> cpus(all.rbegin(), all.rend());
  std::vector<std::vector<int>> found(cpus.size());
  std::thread([&] {  // a caller that may stay bound
    ThreadPool pool(0, cpus);
    ASSERT_EQ(pool.num_threads(), static_cast<int>(cpus.size()));
    Meeting meeting(pool.num_threads());
    pool.share([](int) { return 1; },
               [&](ThreadPool::Pieces& pieces) {
                 meeting.wait();
                 found[static_cast<size_t>(pieces.thread())] = cpus_of_this_thread();
               });
  })
      .join();
  for (size_t t = 0; t < cpus.size(); ++t) EXPECT_EQ(found[t], std::vector<int>{cpus[t]});
  EXPECT_EQ(cpus_of_this_thread(), all);

  std::thread([&] {
    ThreadPool pool(2);
    Meeting meeting(2);
    std::vector<int> found_by[2];
    pool.run([&](int part) {
      meeting.wait();
      found_by[part] = cpus_of_this_thread();
    });
    EXPECT_EQ(found_by[0], all);
    EXPECT_EQ(found_by[1], all);
  }).join();
}

TEST(ThreadPool, RefusesCpusThatAreNotThere) {
  EXPECT_THROW(ThreadPool(1, {CPU_SETSIZE - 1}), InvalidArgument);
  EXPECT_THROW(ThreadPool(1, {-1}), InvalidArgument);
  EXPECT_THROW(ThreadPool(2, {cpus_of_this_thread().front()}), InvalidArgument);
}

TEST(ThreadPool, ParallelForCoversTheRangeInWholeGrains) {
  for (const int threads : {1, 2, 3, 5}) {
    ThreadPool pool(threads);
    for (const int64_t n : {0, 1, 7, 16, 17, 100, 1000}) {
      for (const int64_t grain : {1, 7, 16, 2000}) {
        std::vector<std::atomic<int>> seen(static_cast<size_t>(n));
        std::atomic<int> bad{0};
        pool.parallel_for(n, grain, [&](int64_t begin, int64_t end, int t) {
          if (begin % grain != 0 || (end % grain != 0 && end != n)) ++bad;
          if (begin >= end || t < 0 || t >= threads) ++bad;
          for (int64_t i = begin; i < end; ++i) ++seen[static_cast<size_t>(i)];
        });
        EXPECT_EQ(bad, 0);
        for (const auto& count : seen) EXPECT_EQ(count, 1);
      }
    }
  }
}

// Loops of every kind of gap: back to back (workers spin), and far enough apart for them to sleep.
// As many as a few seconds have room for: threads that share one busy core take milliseconds each.
TEST(ThreadPool, ManyTinyLoopsAlsoWithMoreThreadsThanCores) {
  for (const int threads : {2, 4, 16}) {
    ThreadPool pool(threads);
    std::vector<int64_t> sums(static_cast<size_t>(threads), 0);
    const int most = threads == 2 ? 20000 : 2000;
    const auto enough = std::chrono::steady_clock::now() + std::chrono::seconds(4);
    int64_t loops = 0;
    for (; loops < most && (loops < 200 || std::chrono::steady_clock::now() < enough); ++loops) {
      const int64_t i = loops;
      pool.run([&](int t) { sums[static_cast<size_t>(t)] += i; });
      if (i % 500 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      if (i % 100 == 0) std::this_thread::sleep_for(std::chrono::microseconds(80));
    }
    const int64_t want = loops * (loops - 1) / 2;
    for (const int64_t sum : sums) EXPECT_EQ(sum, want);
  }
}

TEST(ThreadPool, TheCallerWaitsForASlowWorker) {
  ThreadPool pool(3);
  std::atomic<int> done{0};
  pool.run([&](int t) {
    if (t > 0) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    ++done;
  });
  EXPECT_EQ(done, 3);
}

TEST(ThreadPool, SeveralCallersTakeTurns) {
  ThreadPool pool(2);
  std::atomic<int> inside{0};
  std::atomic<int> most{0};
  std::atomic<int64_t> calls{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c) {
    callers.emplace_back([&] {
      for (int i = 0; i < 500; ++i) {
        pool.run([&](int) {
          const int now = ++inside;
          int before = most;
          while (now > before && !most.compare_exchange_weak(before, now)) {
          }
          ++calls;
          --inside;
        });
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(calls, 4 * 500 * 2);
  EXPECT_LE(most, 2);
}

// What a forked child's body() returned; the alarm ends one that hangs.
template <typename Body>
int exit_status_of_fork(Body body) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(600);
    _exit(body());
  }
  int status = 0;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status)) << "signal " << WTERMSIG(status);
  return WEXITSTATUS(status);
}

TEST(ThreadPool, AForkedChildDoesAllThePartsItself) {
  auto pool = std::make_unique<ThreadPool>(3);
  pool->run([](int) {});
  EXPECT_EQ(exit_status_of_fork([&] {
              int parts = 0;
              pool->run([&](int t) { parts |= 1 << t; });
              pool.reset();
              return parts;
            }),
            7);
  std::atomic<int> parts{0};
  pool->run([&](int t) { parts |= 1 << t; });
  EXPECT_EQ(parts, 7);
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // they need address space
TEST(ThreadPool, ThreadsThatTheSystemRefusesAreAnError) {
  EXPECT_EQ(exit_status_of_fork([] {
              const rlimit limit{size_t{1} << 30, size_t{1} << 30};  // 8 MiB a stack, as a rule
              setrlimit(RLIMIT_AS, &limit);
              try {
                ThreadPool pool(100000);
              } catch (const ResourceExhausted&) {
                return 42;
              }
              return 1;
            }),
            42);
}
#endif

TEST(ThreadPool, ComesAndGoes) {
  for (int i = 0; i < 200; ++i) {
    ThreadPool pool(1 + i % 4);
    std::atomic<int> calls{0};
    if (i % 3 != 0) pool.run([&](int) { ++calls; });
    EXPECT_EQ(calls, i % 3 == 0 ? 0 : pool.num_threads());
  }
}

}  // namespace
}  // namespace fastpage
