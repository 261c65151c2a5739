// Which tokens are later sinks, and what calibration does to a row: the part of ACT that every kernel shares.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace act {

// The real (not padding) tokens of one sequence.
class RealTokens {
 public:
  RealTokens(const int64_t* mask, int64_t total) : before_(total + 1, 0) {
    for (int64_t j = 0; j < total; ++j) before_[j + 1] = before_[j] + (mask[j] != 0);
  }

  bool IsReal(int64_t j) const { return before_[j + 1] != before_[j]; }
  // Position of the first one; the number of positions where there is none.
  int64_t Initial() const { return std::upper_bound(before_.begin(), before_.end(), 0) - before_.begin() - 1; }
  int64_t Count() const { return before_.back(); }
  int64_t Count(int64_t begin, int64_t end) const { return end > begin ? before_[end] - before_[begin] : 0; }

 private:
  std::vector<int64_t> before_;
};

// First position that the row at `position` may see.
inline int64_t FirstVisible(int64_t position, int64_t sliding_window) {
  return sliding_window > 0 ? std::max<int64_t>(0, position - sliding_window + 1) : 0;
}

// Which positions of one sequence are later sinks, for any head.
class SinkTest {
 public:
  // Of a sequence none of whose heads asks.
  SinkTest() = default;

  SinkTest(int64_t total, const RealTokens& real, int64_t sliding_window, bool relative_threshold)
      : rows_(total, std::numeric_limits<float>::infinity()) {
    if (real.Count() == 0) return;
    if (relative_threshold) divisor_ = static_cast<float>(real.Count());
    for (int64_t j = real.Initial() + 1; j < total; ++j) {
      if (!real.IsReal(j)) continue;
      const int64_t end = sliding_window > 0 ? std::min(total, j + sliding_window) : total;
      rows_[j] = static_cast<float>(std::max<int64_t>(1, real.Count(j, end)));
    }
  }

  // Mean attention above which a token is a sink: tau.
  float Tau(float threshold) const { return threshold / divisor_; }

  // In ascending order, from running column sums over all rows so far. The initial token is never one.
  std::vector<int64_t> LaterSinks(const float* column_sums, float threshold) const {
    constexpr int64_t kBlock = 64;  // a comparison that vectorises tells blocks without any from those to look into
    const float tau = Tau(threshold);
    const float surely_not = tau * (1.0f - 1e-5f);  // a mean that is no higher is no later sink's
    std::vector<int64_t> sinks;
    const auto total = static_cast<int64_t>(rows_.size());
    for (int64_t block = 0; block < total; block += kBlock) {
      const int64_t end = std::min(block + kBlock, total);
      int candidates = 0;
      for (int64_t j = block; j < end; ++j) candidates += column_sums[j] > surely_not * rows_[j];
      for (int64_t j = block; j < end && candidates > 0; ++j) {
        if (column_sums[j] > surely_not * rows_[j] && column_sums[j] / rows_[j] > tau) sinks.push_back(j);
      }
    }
    return sinks;
  }

 private:
  float divisor_ = 1.0f;     // of thresholds
  std::vector<float> rows_;  // by position: real rows that could see it; infinity where none is a later sink
};

// Factors on the probabilities of a row: on its later sinks, and on the rest.
struct RowFactors {
  float sinks = 1.0f;
  float rest = 1.0f;
};

// `sinks` and `rest` are the row's mass on its later sinks and elsewhere.
inline RowFactors Calibrate(float beta, double sinks, double rest) {
  if (rest <= 1e-6) return {1.0f, 1.0f};  // nothing to move the mass to
  const double moved = (1.0 - static_cast<double>(beta)) * sinks;
  if (-moved > rest) return {static_cast<float>(1.0 + rest / sinks), 0.0f};  // no probability may turn negative
  return {beta, static_cast<float>(1.0 + moved / rest)};
}

}  // namespace act
