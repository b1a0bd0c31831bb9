// Replaces the global operator new and delete of a test program by ones that count, and that fail
// when they are told to. To be included by one source file of the program.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

inline std::atomic<int64_t> num_allocations{0};
inline std::atomic<int64_t> num_allocated_bytes{0};  // those given back are not taken off
// So many more succeed in this thread, then one fails. Negative: none fails.
inline thread_local int64_t num_until_failure = -1;
// The same for all threads together that are not exempt.
inline std::atomic<int64_t> num_until_failure_of_others{-1};
inline thread_local bool is_exempt = false;

inline bool is_to_fail() {
  if (num_until_failure >= 0) return num_until_failure-- == 0;
  if (is_exempt || num_until_failure_of_others < 0) return false;
  return num_until_failure_of_others.fetch_sub(1) == 0;
}

// None is inlined, or GCC sees malloc and delete, new and free, and warns of a mismatch. All forms
// are there, or a sanitizer's own ones meet them.
[[gnu::noinline]] void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  num_allocations.fetch_add(1, std::memory_order_relaxed);
  num_allocated_bytes.fetch_add(static_cast<int64_t>(size), std::memory_order_relaxed);
  if (is_to_fail()) return nullptr;
  return std::malloc(size);
}
[[gnu::noinline]] void* operator new(std::size_t size) {
  if (void* memory = operator new(size, std::nothrow)) return memory;
  throw std::bad_alloc();
}
void* operator new[](std::size_t size, const std::nothrow_t& tag) noexcept {
  return operator new(size, tag);
}
void* operator new[](std::size_t size) { return operator new(size); }
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { operator delete(memory); }
void operator delete(void* memory, const std::nothrow_t&) noexcept { operator delete(memory); }
void operator delete[](void* memory) noexcept { operator delete(memory); }
void operator delete[](void* memory, std::size_t) noexcept { operator delete(memory); }
void operator delete[](void* memory, const std::nothrow_t&) noexcept { operator delete(memory); }
