// What is refused before a call works: sizes that no model has, and memory that is read and written at a time.
#pragma once

#include <cstdint>

#include "attention.h"
#include "ort_context.h"

namespace act {

// Far beyond any model, and small enough that what is sized by a node or by one sequence never overflows.
constexpr int64_t kMostHeads = 4096;
constexpr int64_t kMostHeadSize = 65536;
constexpr int64_t kMostWidth = 1 << 20;  // of all query heads
constexpr int64_t kMostSequences = INT32_MAX;
constexpr int64_t kMostPositions = INT32_MAX;

// Throws the message unless `condition`.
template <typename... Parts>
void Expect(bool condition, const Parts&... message) {
  if (!condition) throw ort::InvalidArgument(ort::Concatenate(message...));
}

inline void ExpectRank(const char* name, const ort::Shape& shape, size_t rank, const char* dimensions) {
  Expect(shape.size() == rank, name, " has shape ", ort::ToString(shape), ", expected ", rank,
         " dimensions: ", dimensions);
}

inline void ExpectShape(const char* name, const ort::Shape& shape, const ort::Shape& expected, const char* dimensions) {
  Expect(shape == expected, name, " has shape ", ort::ToString(shape), ", expected ", ort::ToString(expected), " = ",
         dimensions);
}

// Tensors without elements may claim any size: what is made of their sizes would not be bounded by memory.
inline void ExpectAtMost(const char* name, const ort::Shape& shape, const char* what, int64_t value, int64_t most) {
  Expect(value <= most, name, " has shape ", ort::ToString(shape), ": its ", what, " is ", value, ", expected at most ",
         most);
}

// Positions and sequences in an input: what is left of the shape is checked against head sizes.
inline void ExpectCountable(const char* name, const ort::Shape& shape, size_t batch, size_t positions,
                            const char* what) {
  ExpectAtMost(name, shape, "batch", shape[batch], kMostSequences);
  ExpectAtMost(name, shape, what, shape[positions], kMostPositions);
}

// Head size of a tensor that has `heads` heads in its last dimension, where `num_heads` of that size are to be had.
inline int64_t HeadSize(const char* name, const ort::Shape& shape, const char* heads_name, int64_t heads,
                        int64_t num_heads) {
  const int64_t size = shape.back() / heads;
  Expect(size > 0 && shape.back() % heads == 0, name, " has shape ", ort::ToString(shape),
         ", expected a last dimension that is a multiple of ", heads_name, ", ", heads);
  ExpectAtMost(name, shape, "head size", size, kMostHeadSize);
  ExpectAtMost(name, shape, "head size times num_heads", size * num_heads, kMostWidth);
  return size;
}

// Memory of one tensor.
struct Memory {
  Memory(const char* name, const void* data, int64_t elements, size_t element_size)
      : name(name),
        begin(reinterpret_cast<uintptr_t>(data)),
        end(begin + static_cast<uintptr_t>(elements) * element_size) {}

  bool Overlaps(const Memory& other) const { return begin < other.end && other.begin < end && begin < end; }

  const char* name;
  uintptr_t begin;
  uintptr_t end;
};

// A call writes its outputs while it reads its inputs. Past and present may be the very same memory: then the call adds
// to them in place. No other two tensors, of which one is written, may share any.
template <typename T>
void ExpectApart(const AttentionArguments<T>& a) {
  // No product overflows: a tensor with elements is in memory, and one of no sequences or positions is 0 before.
  const int64_t tokens = a.batch * a.sequence;
  const auto cache = [&](int64_t capacity, int64_t width) { return capacity == 0 ? 0 : a.batch * capacity * width; };
  const int64_t key_width = a.kv_num_heads * a.head_size;
  const int64_t value_width = a.kv_num_heads * a.value_head_size;
  const Memory inputs[] = {
      // The first three are the pasts of the presents below, in their order.
      {"past_key", a.past_key, cache(a.past_capacity, key_width), sizeof(T)},
      {"past_value", a.past_value, cache(a.past_capacity, value_width), sizeof(T)},
      {"past_sink_scores", a.past_sink_scores, cache(a.past_capacity, a.calibrated_count), sizeof(float)},
      {"query", a.query, tokens * a.num_heads * a.head_size, sizeof(T)},
      {"key", a.key, tokens * key_width, sizeof(T)},
      {"value", a.value, tokens * value_width, sizeof(T)},
      {"attention_mask", a.attention_mask, a.batch * a.total, sizeof(int64_t)},
      {"calibration", a.calibration, a.calibrated_count == 0 ? 0 : a.calibrations * a.calibrated_count,
       sizeof(Strengths)},
  };
  const Memory outputs[] = {
      {"present_key", a.present_key, cache(a.present_capacity, key_width), sizeof(T)},
      {"present_value", a.present_value, cache(a.present_capacity, value_width), sizeof(T)},
      {"present_sink_scores", a.present_sink_scores, cache(a.present_capacity, a.calibrated_count), sizeof(float)},
      {"output", a.output, tokens * a.num_heads * a.value_head_size, sizeof(T)},
  };
  constexpr size_t kPresents = 3;
  for (size_t o = 0; o < std::size(outputs); ++o) {
    const Memory& output = outputs[o];
    for (size_t i = 0; i < std::size(inputs); ++i) {
      if (!output.Overlaps(inputs[i])) continue;
      const bool is_past = i == o && o < kPresents;
      if (is_past && output.begin == inputs[i].begin) continue;
      Expect(false, "the memory of ", inputs[i].name, " and ", output.name, " overlaps: bind ", output.name,
             is_past ? " to all of the past's memory, to extend it in place, or to memory of its own"
                     : " to memory of its own");
    }
    for (size_t other = 0; other < o; ++other) {
      Expect(!output.Overlaps(outputs[other]), "the memory of ", outputs[other].name, " and ", output.name,
             " overlaps: bind each output to memory of its own");
    }
  }
}

}  // namespace act
