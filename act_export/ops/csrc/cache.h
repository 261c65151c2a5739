// Present buffers of a cache from past buffers and the tokens of this call, in place where they are the same memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "attention.h"

namespace act {

// Positions [begin, end) of one head: present (.., width) = past (.., width) but for the rows of this call, which begin
// at past_length; they are row_stride apart.
template <typename T>
void AppendToCache(const T* past, int64_t past_capacity, int64_t past_length, const T* rows, int64_t row_stride,
                   int64_t row_count, int64_t width, T* present, int64_t begin, int64_t end) {
  const int64_t total = past_length + row_count;
  const auto keep = [&](int64_t from, int64_t to) {
    if (from < to) std::memcpy(present + from * width, past + from * width, (to - from) * width * sizeof(T));
  };
  if (past != present) {
    keep(begin, std::min(end, past_length));
    keep(std::max(begin, total), std::min(end, past_capacity));
  }
  for (int64_t j = std::max(begin, past_length); j < std::min(end, total); ++j) {
    std::memcpy(present + j * width, rows + (j - past_length) * row_stride, width * sizeof(T));
  }
}

// Keys and values of KV head `kv_head` of sequence `b` at positions [begin, end) of the present buffers.
template <typename T>
void AppendKeysAndValues(const AttentionArguments<T>& a, int64_t b, int64_t kv_head, int64_t begin, int64_t end) {
  const int64_t head = b * a.kv_num_heads + kv_head;
  const auto append = [&](const T* past, const T* rows, T* present, int64_t width) {
    AppendToCache(past + head * a.past_capacity * width, a.past_capacity, a.total - a.sequence,
                  rows + (b * a.sequence * a.kv_num_heads + kv_head) * width, a.kv_num_heads * width, a.sequence, width,
                  present + head * a.present_capacity * width, begin, end);
  };
  append(a.past_key, a.key, a.present_key, a.head_size);
  append(a.past_value, a.value, a.present_value, a.value_head_size);
}

// The present buffers of a call without new tokens: what the past buffers hold.
template <typename T>
void KeepCache(const AttentionArguments<T>& a) {
  const auto keep = [&](const auto* past, auto* present, int64_t heads, int64_t width) {
    if (past != present) std::copy_n(past, a.batch * heads * a.past_capacity * width, present);
  };
  keep(a.past_key, a.present_key, a.kv_num_heads, a.head_size);
  keep(a.past_value, a.present_value, a.kv_num_heads, a.value_head_size);
  keep(a.past_sink_scores, a.present_sink_scores, a.calibrated_count, 1);
}

}  // namespace act
