// Memory of one call, from the host and back to it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#include "attention.h"

namespace act {

// An array of trivial values, not initialised, aligned to 64 bytes.
template <typename T>
class Scratch {
 public:
  Scratch(Host& host, int64_t size) : host_(host) {
    if (size == 0) return;
    memory_ = host.Allocate(static_cast<size_t>(size) * sizeof(T) + 64);
    data_ = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_) + 63) / 64 * 64);
  }
  ~Scratch() {
    if (memory_ != nullptr) host_.Free(memory_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* Data() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  Host& host_;
  void* memory_ = nullptr;
  T* data_ = nullptr;
};

}  // namespace act
