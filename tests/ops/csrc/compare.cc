#include "compare.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <sstream>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace act::test {
namespace {

// The only tolerances of these tests. Keys and values are copies: they agree bit for bit.
constexpr double kOutputTolerance = 2e-5;     // of the largest value of a head
constexpr double kUnitsInLastPlace = 2.0;     // of the output's storage type, beside that; float: none
constexpr double kSinkScoreTolerance = 1e-5;  // of the score, or of 1 where that is more
constexpr float kThresholdTolerance = 2e-6f;  // of the threshold: as near to it kernels may disagree about a sink

template <typename T>
double UnitInLastPlace(double value) {
  if constexpr (std::is_same_v<T, float>) return 0.0;
  const bool is_half = std::is_same_v<T, Float16>;
  const int exponent = std::max(value == 0.0 ? INT_MIN : std::ilogb(value), is_half ? -14 : -126);
  return std::ldexp(1.0, exponent - (is_half ? 10 : 7));
}

// Compares element by element, and says what is known of the first that differs.
class Comparison {
 public:
  Comparison(const char* tensor, std::vector<const char*> axes, Tally& tally)
      : tensor_(tensor), axes_(std::move(axes)), tally_(tally) {}

  void Add(double expected, double got, double tolerance, std::initializer_list<int64_t> indices) {
    ++count_;
    const double error = std::abs(got - expected);
    if (error <= tolerance) {
      if (tolerance > 0.0) tally_.worst = std::max(tally_.worst, error / tolerance);
      return;
    }
    if (wrong_++ > 0) return;
    std::ostringstream text;
    text.precision(9);
    text << tensor_ << '[';
    for (size_t i = 0; i < axes_.size(); ++i) text << (i > 0 ? ", " : "") << axes_[i] << ' ' << indices.begin()[i];
    text << "]: expected " << expected << ", got " << got << ", tolerance " << tolerance;
    first_ = text.str();
  }

  void Finish() const {
    if (wrong_ == 0) return;
    throw Failure(first_ + "; " + std::to_string(wrong_) + " of " + std::to_string(count_) + " elements are wrong");
  }

 private:
  const char* tensor_;
  std::vector<const char*> axes_;
  Tally& tally_;
  int64_t count_ = 0;
  int64_t wrong_ = 0;
  std::string first_;
};

// Present keys or values: the past ones with those of this call, which are `width` wide.
template <typename T>
void CompareCache(const char* name, const Problem& p, const Tensor<T>& past, const Tensor<T>& added, int64_t width,
                  const Tensor<T>& present) {
  for (int64_t head = 0; head < p.batch * p.kv_num_heads; ++head) {
    for (int64_t j = 0; j < p.PresentCapacity(); ++j) {
      const bool is_new = j >= p.past && j < p.Total();
      const int64_t row = head / p.kv_num_heads * p.sequence + j - p.past;
      const T* from = is_new ? added.Data() + (row * p.kv_num_heads + head % p.kv_num_heads) * width
                             : past.Data() + (head * p.PastCapacity() + j) * width;
      const T* to = present.Data() + (head * p.PresentCapacity() + j) * width;
      if (std::memcmp(from, to, width * sizeof(T)) == 0) continue;
      std::ostringstream text;
      text << name << "[batch " << head / p.kv_num_heads << ", kv_head " << head % p.kv_num_heads << ", position " << j
           << "] is not the " << (is_new ? "new" : "past") << " one";
      throw Failure(text.str());
    }
  }
}

template <typename T>
void CompareSinkScores(const Inputs<T>& inputs, const Outputs<T>& expected, const Outputs<T>& got, Tally& tally) {
  const Problem& p = inputs.problem;
  Comparison scores("present_sink_scores", {"batch", "index", "position"}, tally);
  for (int64_t head = 0; head < p.batch * inputs.calibrated_count; ++head) {
    for (int64_t j = 0; j < p.Total(); ++j) {
      const int64_t i = head * p.PresentCapacity() + j;
      const double score = expected.present_sink_scores[i];
      scores.Add(score, got.present_sink_scores[i], kSinkScoreTolerance * std::max(1.0, score),
                 {head / inputs.calibrated_count, head % inputs.calibrated_count, j});
    }
    const int64_t unused = p.PresentCapacity() - p.Total();
    if (unused == 0) continue;
    const float* from = &inputs.past_sink_scores[head * p.PastCapacity() + p.Total()];
    const float* to = &got.present_sink_scores[head * p.PresentCapacity() + p.Total()];
    if (std::memcmp(from, to, unused * sizeof(float)) != 0) {
      throw Failure("present_sink_scores beyond the last token are not the past ones");
    }
  }
  scores.Finish();
}

// Whether rounding may decide about a later sink of this head.
template <typename T>
bool IsUndecided(const Inputs<T>& inputs, int64_t b, int64_t c, const Outputs<T>& expected, const Outputs<T>& got) {
  const Problem& p = inputs.problem;
  const RealTokens real = inputs.Real(b);
  const Strengths& strengths = inputs.StrengthsOf(b, c);
  if (strengths.KeepsSinks()) return false;
  const float tau = p.relative_threshold ? strengths.threshold / static_cast<float>(real.Count()) : strengths.threshold;
  const int64_t first = (b * inputs.calibrated_count + c) * p.PresentCapacity();
  for (int64_t j = 0; j < p.Total(); ++j) {
    if (!real.IsReal(j) || real.Count(0, j) == 0) continue;
    const int64_t end = p.window > 0 ? std::min(p.Total(), j + p.window) : p.Total();
    const auto rows = static_cast<float>(real.Count(j, end));
    const float score = expected.present_sink_scores[first + j] / rows;
    const bool other_is_sink = got.present_sink_scores[first + j] / rows > tau;
    if (std::abs(score - tau) < kThresholdTolerance * tau || (score > tau) != other_is_sink) return true;
  }
  return false;
}

template <typename T>
double LargestValue(const Inputs<T>& inputs, const Outputs<T>& expected, int64_t b, int64_t kv_head) {
  const Problem& p = inputs.problem;
  double largest = 0.0;
  for (int64_t j = 0; j < p.Total(); ++j) {
    if (!inputs.IsSeen(b, j)) continue;
    const T* value =
        expected.present_value.Data() + ((b * p.kv_num_heads + kv_head) * p.PresentCapacity() + j) * p.value_head_size;
    for (int64_t d = 0; d < p.value_head_size; ++d) largest = std::max<double>(largest, std::abs(ToFloat(value[d])));
  }
  return largest;
}

template <typename T>
void CompareOutput(const Inputs<T>& inputs, const Outputs<T>& expected, const Outputs<T>& got, const Ignored& ignored,
                   Tally& tally) {
  const Problem& p = inputs.problem;
  Comparison output("output", {"batch", "row", "head", "element"}, tally);
  for (int64_t b = 0; b < p.batch; ++b) {
    const RealTokens real = inputs.Real(b);
    for (int64_t h = 0; h < p.NumHeads(); ++h) {
      const int64_t c = inputs.calibrated_index[h];
      if (c >= 0) {
        ++tally.heads;
        if (IsUndecided(inputs, b, c, expected, got)) {
          ++tally.undecided;
          continue;
        }
      }
      const double largest = LargestValue(inputs, expected, b, h / p.group);
      for (int64_t row = 0; row < std::min(p.sequence, ignored.from_row); ++row) {
        const int64_t position = p.past + row;
        if (ignored.padding && !real.IsReal(position)) continue;
        const bool sees_nothing = real.Count(FirstVisible(position, p.window), position + 1) == 0;
        for (int64_t d = 0; d < p.value_head_size; ++d) {
          const int64_t i = ((b * p.sequence + row) * p.NumHeads() + h) * p.value_head_size + d;
          const double value = sees_nothing ? 0.0 : ToFloat(expected.output[i]);
          const double tolerance = kOutputTolerance * largest + kUnitsInLastPlace * UnitInLastPlace<T>(value);
          output.Add(value, ToFloat(got.output[i]), sees_nothing ? 0.0 : tolerance, {b, row, h, d});
        }
      }
    }
  }
  output.Finish();
}

}  // namespace

template <typename T>
void Compare(const Inputs<T>& inputs, const Outputs<T>& expected, const Outputs<T>& got, Tally& tally,
             const Ignored& ignored) {
  const Problem& p = inputs.problem;
  CompareCache("present_key", p, inputs.past_key, inputs.key, p.head_size, got.present_key);
  CompareCache("present_value", p, inputs.past_value, inputs.value, p.value_head_size, got.present_value);
  CompareSinkScores(inputs, expected, got, tally);
  CompareOutput(inputs, expected, got, ignored, tally);
}

template void Compare(const Inputs<float>&, const Outputs<float>&, const Outputs<float>&, Tally&, const Ignored&);
template void Compare(const Inputs<Float16>&, const Outputs<Float16>&, const Outputs<Float16>&, Tally&, const Ignored&);
template void Compare(const Inputs<BFloat16>&, const Outputs<BFloat16>&, const Outputs<BFloat16>&, Tally&,
                      const Ignored&);

}  // namespace act::test
