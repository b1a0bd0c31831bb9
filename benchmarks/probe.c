// What the machine can do at most: a read loop and an FMA loop, on all threads.
// Built at run time by probe.py with the flags of the machine; vectors are the compiler's own.
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#if defined(__AVX512F__)
enum { kLanes = 16 };
#elif defined(__AVX__)
enum { kLanes = 8 };
#else
enum { kLanes = 4 };
#endif
enum { kChains = 12, kMaxThreads = 1024 };
enum { kAhead = 8192 };  // bytes to fetch ahead: the hardware alone stops at each page
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));

typedef struct {
  const Vec* data;
  size_t count;           // vectors to read, rounds of multiply-adds, or pieces
  float result;           // so that the work is not dropped
  const uint32_t* order;  // of pieces
  size_t piece;           // bytes
} Part;

static void* read_part(void* argument) {
  Part* part = argument;
  Vec sum[8] = {0};
  for (size_t i = 0; i + 8 <= part->count; i += 8) {
    const char* ahead = (const char*)&part->data[i] + kAhead;
    for (size_t j = 0; j < 8 * sizeof(Vec); j += 64) __builtin_prefetch(ahead + j);
    for (int j = 0; j < 8; ++j) sum[j] += part->data[i + j];
  }
  for (int j = 0; j < 8; ++j) part->result += sum[j][0];
  return NULL;
}

static void* fma_part(void* argument) {
  Part* part = argument;
  Vec sum[kChains];
  for (int j = 0; j < kChains; ++j) sum[j] = (Vec){0} + (float)j;
  const Vec factor = (Vec){0} + 0.999f;
  const Vec term = (Vec){0} + 0.5f;
  for (size_t i = 0; i < part->count; ++i) {
    for (int j = 0; j < kChains; ++j) sum[j] = sum[j] * factor + term;
  }
  for (int j = 0; j < kChains; ++j) part->result += sum[j][0];
  return NULL;
}

// Pieces of memory in any order, each line fetched one piece ahead, with arithmetic on it as in
// attention: that of three query heads, and a widening of bf16.
static void* scattered_part(void* argument) {
  enum { kPerLine = 8 };
  Part* part = argument;
  Vec sum[kPerLine] = {0};
  const Vec factor = (Vec){0} + 0.5f;
  for (size_t i = 0; i < part->count; ++i) {
    const char* piece = (const char*)part->data + part->order[i] * part->piece;
    const size_t next = i + 1 < part->count ? i + 1 : i;
    const char* ahead = (const char*)part->data + part->order[next] * part->piece;
    for (size_t at = 0; at < part->piece; at += 64) {
      __builtin_prefetch(ahead + at);
      for (size_t v = 0; v < 64; v += sizeof(Vec)) {
        const Vec x = *(const Vec*)(piece + at + v);
        for (int j = 0; j < kPerLine; ++j) sum[j] = x * factor + sum[j];
      }
    }
  }
  for (int j = 0; j < kPerLine; ++j) part->result += sum[j][0];
  return NULL;
}

static double seconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

static double run(void* (*work)(void*), Part* parts, int threads) {
  pthread_t ids[kMaxThreads];
  const double began = seconds();
  for (int t = 1; t < threads; ++t) pthread_create(&ids[t], NULL, work, &parts[t]);
  work(&parts[0]);
  for (int t = 1; t < threads; ++t) pthread_join(ids[t], NULL);
  return seconds() - began;
}

// `bytes` of memory, kept from call to call; null if it is short.
static Vec* memory(size_t bytes) {
  static Vec* data;
  static size_t size;
  if (size == bytes) return data;
  free(data);
  size = 0;
  data = aligned_alloc(1 << 21, bytes >> 21 << 21);
  if (data == NULL) return NULL;
  // As fastpage keeps its weights: with small pages the loop measures page walks, not memory.
  madvise(data, bytes >> 21 << 21, MADV_HUGEPAGE);
  memset(data, 0, bytes >> 21 << 21);
  size = bytes;
  return data;
}

// GB/s of reading `bytes` of memory once, the best of `repeats`; 0 if memory is short.
double probe_read_gbs(int threads, size_t bytes, int repeats) {
  if (threads < 1 || threads > kMaxThreads) return 0;
  const Vec* data = memory(bytes);
  if (data == NULL) return 0;
  static Part parts[kMaxThreads];
  const size_t each = bytes / sizeof(Vec) / (size_t)threads / 8 * 8;
  for (int t = 0; t < threads; ++t) parts[t] = (Part){data + (size_t)t * each, each, 0, NULL, 0};
  double best = 0;
  for (int i = 0; i < repeats; ++i) {
    const double gbs = (double)each * sizeof(Vec) * threads / run(read_part, parts, threads) * 1e-9;
    if (gbs > best) best = gbs;
  }
  return best;
}

// GB/s of reading `bytes` of memory once, in pieces of so many bytes (a multiple of 64) in random
// order, with arithmetic on them; the best of `repeats`; 0 if memory is short.
double probe_scattered_gbs(int threads, size_t bytes, size_t piece, int repeats) {
  if (threads < 1 || threads > kMaxThreads) return 0;
  const Vec* data = memory(bytes);
  const size_t count = (bytes >> 21 << 21) / piece;
  uint32_t* order = malloc(count * sizeof *order);
  if (data == NULL || order == NULL) {
    free(order);
    return 0;
  }
  for (size_t i = 0; i < count; ++i) order[i] = (uint32_t)i;
  uint64_t state = 1;
  for (size_t i = count; i > 1; --i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const size_t j = (state >> 33) % i;
    const uint32_t other = order[j];
    order[j] = order[i - 1];
    order[i - 1] = other;
  }
  static Part parts[kMaxThreads];
  const size_t each = count / (size_t)threads;
  for (int t = 0; t < threads; ++t) parts[t] = (Part){data, each, 0, order + t * each, piece};
  double best = 0;
  for (int i = 0; i < repeats; ++i) {
    const double gbs = (double)each * piece * threads / run(scattered_part, parts, threads) * 1e-9;
    if (gbs > best) best = gbs;
  }
  free(order);
  return best;
}

// GFLOP/s in fp32 (a multiply-add counts two), the best of `repeats`.
double probe_fma_gflops(int threads, size_t rounds, int repeats) {
  if (threads < 1 || threads > kMaxThreads) return 0;
  static Part parts[kMaxThreads];
  for (int t = 0; t < threads; ++t) parts[t] = (Part){NULL, rounds, 0, NULL, 0};
  double best = 0;
  for (int i = 0; i < repeats; ++i) {
    const double gflops =
        2.0 * kChains * kLanes * rounds * threads / run(fma_part, parts, threads) * 1e-9;
    if (gflops > best) best = gflops;
  }
  return best;
}
