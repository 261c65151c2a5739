// Present buffers of a cache from past buffers and the tokens of this call, in place where they are the same memory.
#pragma once

#include <cstdint>
#include <cstring>

#include "attention.h"

namespace act {

// One head of one sequence: past (past_capacity, width) -> present (present_capacity, width).
// New rows go to past_length ...; whatever the past buffer holds beyond them is kept.
template <typename T>
void AppendToCache(const T* past, int64_t past_capacity, int64_t past_length, const T* rows, int64_t row_stride,
                   int64_t row_count, int64_t width, T* present) {
  const int64_t total = past_length + row_count;
  if (past != present) {
    if (past_length > 0) std::memcpy(present, past, past_length * width * sizeof(T));
    if (past_capacity > total) {
      std::memcpy(present + total * width, past + total * width, (past_capacity - total) * width * sizeof(T));
    }
  }
  for (int64_t i = 0; i < row_count; ++i) {
    std::memcpy(present + (past_length + i) * width, rows + i * row_stride, width * sizeof(T));
  }
}

// Keys and values of KV head `kv_head` of sequence `b`.
template <typename T>
void AppendKeysAndValues(const AttentionArguments<T>& a, int64_t b, int64_t kv_head) {
  const int64_t head = b * a.kv_num_heads + kv_head;
  const int64_t past_length = a.total - a.sequence;
  const auto append = [&](const T* past, const T* rows, T* present, int64_t width) {
    AppendToCache(past + head * a.past_capacity * width, a.past_capacity, past_length,
                  rows + (b * a.sequence * a.kv_num_heads + kv_head) * width, a.kv_num_heads * width, a.sequence, width,
                  present + head * a.present_capacity * width);
  };
  append(a.past_key, a.key, a.present_key, a.head_size);
  append(a.past_value, a.value, a.present_value, a.value_head_size);
}

}  // namespace act
