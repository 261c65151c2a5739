// A Host that is as unkind as attention.h allows.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <mutex>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

#include "attention.h"

namespace act::test {

struct BodyFailure : std::runtime_error {
  BodyFailure() : std::runtime_error("a body of ParallelFor failed") {}
};

// Runs bodies on `threads` threads, the last body first where `reversed`. Fresh memory is not a number, and its
// alignment is the least that is promised. Nothing here orders one body after another: a kernel that relies on it is a
// data race, which the thread sanitizer sees.
class TestHost : public Host {
 public:
  explicit TestHost(int threads = 1, bool reversed = false) : threads_(threads), reversed_(reversed) {}

  // From now on that many succeed, and the next one throws.
  void FailAllocation(int64_t after) { allocations_left_ = after; }
  void FailBody(int64_t after) { bodies_left_ = after; }
  bool HasFailed() const { return allocations_left_ < 0 || bodies_left_ < 0; }

  int64_t LiveAllocations() const { return live_; }
  // Of one allocation.
  size_t MostBytes() const { return most_bytes_; }

  void ParallelFor(int64_t count, const std::function<void(int64_t)>& body) override {
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::exception_ptr failure;
    const auto work = [&] {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
        try {
          if (IsLast(bodies_left_)) throw BodyFailure();
          body(reversed_ ? count - 1 - i : i);
        } catch (...) {
          next.store(count, std::memory_order_relaxed);
          const std::lock_guard lock(mutex);
          if (failure == nullptr) failure = std::current_exception();
        }
      }
    };
    std::vector<std::thread> helpers;
    for (int64_t i = 1; i < std::min<int64_t>(threads_, count); ++i) helpers.emplace_back(work);
    work();
    for (std::thread& helper : helpers) helper.join();
    if (failure != nullptr) std::rethrow_exception(failure);
  }

  void* Allocate(size_t bytes) override {
    if (IsLast(allocations_left_)) throw std::bad_alloc();
    void* block = operator new(kOffset + bytes, kBlockAlignment);
    std::memcpy(block, &kLive, sizeof(kLive));
    void* memory = static_cast<char*>(block) + kOffset;
    std::memset(memory, 0xff, bytes);
    live_.fetch_add(1, std::memory_order_relaxed);
    for (size_t most = most_bytes_; most < bytes && !most_bytes_.compare_exchange_weak(most, bytes);) {
    }
    return memory;
  }

  void Free(void* memory) noexcept override {
    void* block = static_cast<char*>(memory) - kOffset;
    if (std::memcmp(block, &kLive, sizeof(kLive)) != 0) std::terminate();  // not from Allocate, or freed twice
    std::memset(block, 0, sizeof(kLive));
    live_.fetch_sub(1, std::memory_order_relaxed);
    operator delete(block, kBlockAlignment);
  }

 private:
  static constexpr uint64_t kLive = 0x6576696c20736920;
  static constexpr std::align_val_t kBlockAlignment{64};
  static constexpr size_t kOffset = 16;

  static bool IsLast(std::atomic<int64_t>& left) { return left.fetch_sub(1, std::memory_order_relaxed) == 0; }

  const int threads_;
  const bool reversed_;
  std::atomic<int64_t> allocations_left_{INT64_MAX};
  std::atomic<int64_t> bodies_left_{INT64_MAX};
  std::atomic<int64_t> live_{0};
  std::atomic<size_t> most_bytes_{0};
};

}  // namespace act::test
