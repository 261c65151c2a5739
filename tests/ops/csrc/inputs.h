// The tensors of a problem, and a kernel's answer to it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "attention.h"
#include "float16.h"
#include "problem.h"
#include "sinks.h"

namespace act::test {

// Aligned to no more than its elements, and not a number until written.
template <typename T>
class Tensor {
 public:
  explicit Tensor(int64_t size = 0) : storage_(size + 1) {
    std::memset(static_cast<void*>(storage_.data()), 0xff, storage_.size() * sizeof(T));
  }

  int64_t Size() const { return static_cast<int64_t>(storage_.size()) - 1; }
  T* Data() { return Size() > 0 ? storage_.data() + 1 : nullptr; }
  const T* Data() const { return Size() > 0 ? storage_.data() + 1 : nullptr; }
  T& operator[](int64_t i) { return storage_[i + 1]; }
  const T& operator[](int64_t i) const { return storage_[i + 1]; }

 private:
  std::vector<T> storage_;
};

template <typename T>
bool SameBits(const Tensor<T>& x, const Tensor<T>& y) {
  return x.Size() == y.Size() && (x.Size() == 0 || std::memcmp(x.Data(), y.Data(), x.Size() * sizeof(T)) == 0);
}

template <typename T>
struct Inputs {
  Problem problem;
  std::vector<int64_t> mask;
  std::vector<int64_t> calibrated_index;
  int64_t calibrated_count = 0;
  std::vector<Strengths> calibration;  // (1 or batch, calibrated_count)
  std::vector<float> sink_logits;      // by head; empty = none
  Tensor<T> query;
  Tensor<T> key;
  Tensor<T> value;
  Tensor<T> past_key;
  Tensor<T> past_value;
  Tensor<float> past_sink_scores;

  float Scale() const { return problem.deviation / std::sqrt(static_cast<float>(problem.head_size)); }
  // Of the calibrated head `index` in sequence `b`.
  const Strengths& StrengthsOf(int64_t b, int64_t index) const {
    return calibration[((problem.each_sequence ? b : 0) * calibrated_count + index)];
  }
  RealTokens Real(int64_t b) const { return {&mask[b * problem.Total()], problem.Total()}; }

  // Whether some row of this call sees the position.
  bool IsSeen(int64_t b, int64_t j) const {
    return mask[b * problem.Total() + j] != 0 && j >= FirstVisible(problem.past, problem.window);
  }
};

template <typename T>
struct Outputs {
  Tensor<T> output;
  Tensor<T> present_key;
  Tensor<T> present_value;
  Tensor<float> present_sink_scores;
};

template <typename T>
bool SameBits(const Outputs<T>& x, const Outputs<T>& y) {
  return SameBits(x.output, y.output) && SameBits(x.present_key, y.present_key) &&
         SameBits(x.present_value, y.present_value) && SameBits(x.present_sink_scores, y.present_sink_scores);
}

template <typename T>
Inputs<T> Draw(const Problem& problem);

// The next call of a conversation: `sequence` tokens after what `outputs` left in the cache.
template <typename T>
void Continue(int64_t sequence, const Outputs<T>& outputs, Inputs<T>& inputs);

// With NaN and infinities where the problem wants them.
template <typename T>
Inputs<T> Poisoned(Inputs<T> inputs);

// Token `row` of this call becomes NaN or infinite in all key-value heads.
template <typename T>
void PoisonKeys(Random& random, Inputs<T>& inputs, int64_t b, int64_t row);
template <typename T>
void PoisonValues(Random& random, Inputs<T>& inputs, int64_t b, int64_t row);

// The answer of the plain kernel, or of the fast one for an instruction set, in parts of about `most_bytes`. Throws
// what the kernel throws.
template <typename T>
Outputs<T> Answer(const Inputs<T>& inputs, Host& host, std::optional<fast::InstructionSet> instruction_set = {},
                  int64_t most_bytes = fast::kMostScratchBytes);

}  // namespace act::test
