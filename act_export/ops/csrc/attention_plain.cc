// The plain kernel: one head of one sequence per task, a block of rows at a time, no T x T buffer.
//
// Pass 1 computes attention with the initial token's weight times gamma, keeps each row's softmax maximum and
// normaliser, and sums the columns of the map. Then the later sinks are known, and pass 2 recomputes the map at those
// few columns only:
//   o'[i] = f_sinks * oK[i] + f_rest * (o[i] - oK[i]),   oK = the part of o that comes from the later sinks.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "attention.h"
#include "cache.h"
#include "float16.h"
#include "sinks.h"

namespace act::plain {
namespace {

constexpr int64_t kRowBlock = 16;     // rows that share one conversion of keys and values to float
constexpr int64_t kColumnBlock = 64;  // keys, or values, that are in float at a time

// Below this part of a row's sum outside the later sinks, o - oK would lose digits: such rows are recomputed from their
// other columns.
constexpr double kCancellation = 0.125;

float Dot(const float* x, const float* y, int64_t size) {
  constexpr int64_t kLanes = 16;  // independent sums: without them float addition cannot be vectorised
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += x[i + lane] * y[i + lane];
  }
  float sum = 0.0f;
  for (; i < size; ++i) sum += x[i] * y[i];
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += sums[lane];
  return sum;
}

void AddScaled(float factor, const float* x, int64_t size, float* y) {
  for (int64_t i = 0; i < size; ++i) y[i] += factor * x[i];
}

template <typename T>
void ConvertRow(const T* from, int64_t size, float* to) {
  for (int64_t i = 0; i < size; ++i) to[i] = ToFloat(from[i]);
}

// Columns of the attention map, ascending: `count` from `first`, or those listed.
struct Columns {
  int64_t first;
  int64_t count;
  const int64_t* list = nullptr;

  int64_t operator[](int64_t c) const { return list != nullptr ? list[c] : first + c; }
};

// Rows of `matrix` (.., width) at `count` columns from the begin-th, as floats; no copy where they are that already.
template <typename T>
const float* Tile(const T* matrix, int64_t width, const Columns& columns, int64_t begin, int64_t count,
                  std::vector<float>& storage) {
  if constexpr (std::is_same_v<T, float>) {
    if (columns.list == nullptr) return matrix + columns[begin] * width;
  }
  for (int64_t c = 0; c < count; ++c) ConvertRow(matrix + columns[begin + c] * width, width, &storage[c * width]);
  return storage.data();
}

// One head of one sequence.
template <typename T>
class Head {
 public:
  Head(const AttentionArguments<T>& arguments, const RealTokens& real, int64_t b, int64_t h)
      : a_(arguments),
        real_(real),
        past_(arguments.total - arguments.sequence),
        calibrated_(arguments.calibrated_count > 0 ? arguments.calibrated_index[h] : -1),
        strengths_(calibrated_ >= 0 ? arguments.StrengthsOf(b, calibrated_) : Strengths{}),
        initial_(real.Initial()),
        on_initial_(std::log(strengths_.gamma)),
        sink_logit_(arguments.sink_logits != nullptr ? arguments.sink_logits[h] : kNoSinkLogit),
        query_(a_.query + (b * a_.sequence * a_.num_heads + h) * a_.head_size),
        output_(a_.output + (b * a_.sequence * a_.num_heads + h) * a_.value_head_size),
        query_rows_(kRowBlock * a_.head_size),
        tile_(kColumnBlock * std::max(a_.head_size, a_.value_head_size)),
        map_(kRowBlock * a_.total),
        column_sums_(calibrated_ >= 0 ? a_.total : 0) {
    const int64_t kv_head = b * a_.kv_num_heads + h / (a_.num_heads / a_.kv_num_heads);
    keys_ = a_.present_key + kv_head * a_.present_capacity * a_.head_size;
    values_ = a_.present_value + kv_head * a_.present_capacity * a_.value_head_size;
    if (calibrated_ >= 0) {
      const int64_t state = b * a_.calibrated_count + calibrated_;
      past_sums_ = a_.past_sink_scores + state * a_.past_capacity;
      present_sums_ = a_.present_sink_scores + state * a_.present_capacity;
    }
  }

  void Attend() {
    if (strengths_.KeepsSinks()) {
      if (calibrated_ >= 0) UpdateSinkScores();
      std::vector<float> attended(kRowBlock * a_.value_head_size);
      for (int64_t row = 0; row < a_.sequence; row += kRowBlock) {
        const int64_t rows = std::min(kRowBlock, a_.sequence - row);
        AttendRows(row, rows, attended.data());
        Store(row, rows, attended.data());
      }
      return;
    }
    std::vector<float> attended(a_.sequence * a_.value_head_size);
    maxima_.resize(a_.sequence);
    normalisers_.resize(a_.sequence);
    row_sums_.resize(a_.sequence);
    for (int64_t row = 0; row < a_.sequence; row += kRowBlock) {
      AttendRows(row, std::min(kRowBlock, a_.sequence - row), &attended[row * a_.value_head_size]);
    }
    UpdateSinkScores();
    const std::vector<int64_t> sinks = SinkTest(a_.total, real_, a_.sliding_window, a_.relative_threshold)
                                           .LaterSinks(present_sums_, strengths_.threshold);
    for (int64_t row = 0; row < a_.sequence && !sinks.empty(); row += kRowBlock) {
      CalibrateRows(row, std::min(kRowBlock, a_.sequence - row), sinks, &attended[row * a_.value_head_size]);
    }
    Store(0, a_.sequence, attended.data());
  }

 private:
  int64_t Position(int64_t row) const { return past_ + row; }
  int64_t FirstColumn(int64_t row) const { return FirstVisible(Position(row), a_.sliding_window); }
  bool SeesNothing(int64_t row) const { return real_.Count(FirstColumn(row), Position(row) + 1) == 0; }

  // Pass 1 over a block of rows: attention into `attended`, and what pass 2 needs of it.
  void AttendRows(int64_t row, int64_t rows, float* attended) {
    const int64_t first = FirstColumn(row);
    const Columns columns{first, Position(row + rows - 1) + 1 - first};
    Logits(row, rows, columns);
    for (int64_t r = 0; r < rows; ++r) {
      float* probabilities = &map_[r * columns.count];
      float maximum = 0.0f;
      float normaliser = 0.0f;
      double row_sum = 0.0;
      if (SeesNothing(row + r)) {
        std::fill_n(probabilities, columns.count, 0.0f);
      } else {
        maximum = std::max(*std::max_element(probabilities, probabilities + columns.count), sink_logit_);
        double sum = 0.0;
        for (int64_t c = 0; c < columns.count; ++c) {
          probabilities[c] = std::exp(probabilities[c] - maximum);
          sum += probabilities[c];
        }
        const double total = sum + std::exp(sink_logit_ - maximum);
        normaliser = static_cast<float>(1.0 / total);
        row_sum = sum / total;
        for (int64_t c = 0; c < columns.count; ++c) probabilities[c] *= normaliser;
      }
      if (strengths_.KeepsSinks()) continue;
      maxima_[row + r] = maximum;
      normalisers_[row + r] = normaliser;
      row_sums_[row + r] = row_sum;
      if (!real_.IsReal(Position(row + r))) continue;
      for (int64_t c = 0; c < columns.count; ++c) column_sums_[columns[c]] += probabilities[c];
    }
    std::fill_n(attended, rows * a_.value_head_size, 0.0f);
    AddValues(rows, columns, attended);
  }

  // Pass 2 over a block of rows: calibrates the later sinks of what is in `attended`.
  void CalibrateRows(int64_t row, int64_t rows, const std::vector<int64_t>& all_sinks, float* attended) {
    const auto begin = std::lower_bound(all_sinks.begin(), all_sinks.end(), FirstColumn(row));
    const auto end = std::upper_bound(begin, all_sinks.end(), Position(row + rows - 1));
    if (begin == end) return;
    const Columns sinks{0, end - begin, &*begin};
    std::vector<float> from_sinks(rows * a_.value_head_size, 0.0f);
    std::vector<double> sink_mass(rows);
    Probabilities(row, rows, sinks);
    for (int64_t r = 0; r < rows; ++r) sink_mass[r] = Sum(&map_[r * sinks.count], sinks.count);
    AddValues(rows, sinks, from_sinks.data());

    std::vector<float> from_rest(a_.value_head_size);
    for (int64_t r = 0; r < rows; ++r) {
      if (sink_mass[r] == 0.0) continue;
      const float* o_sinks = &from_sinks[r * a_.value_head_size];
      float* o = attended + r * a_.value_head_size;
      double rest_mass = row_sums_[row + r] - sink_mass[r];
      if (rest_mass < kCancellation * row_sums_[row + r]) {
        rest_mass = AttendRest(row + r, all_sinks, from_rest.data());
      } else {
        for (int64_t d = 0; d < a_.value_head_size; ++d) from_rest[d] = o[d] - o_sinks[d];
      }
      const RowFactors factors = Calibrate(strengths_.beta, sink_mass[r], rest_mass);
      for (int64_t d = 0; d < a_.value_head_size; ++d) {
        o[d] = factors.sinks * o_sinks[d] + factors.rest * from_rest[d];
      }
    }
  }

  // Mass and output of one row from every column that is not a later sink.
  double AttendRest(int64_t row, const std::vector<int64_t>& sinks, float* from_rest) {
    std::vector<int64_t> list;
    for (int64_t j = FirstColumn(row); j <= Position(row); ++j) {
      if (!std::binary_search(sinks.begin(), sinks.end(), j)) list.push_back(j);
    }
    const Columns columns{0, static_cast<int64_t>(list.size()), list.data()};
    std::fill_n(from_rest, a_.value_head_size, 0.0f);
    Probabilities(row, 1, columns);
    AddValues(1, columns, from_rest);
    return Sum(map_.data(), columns.count);
  }

  void UpdateSinkScores() {
    for (int64_t j = 0; j < a_.total; ++j) {
      present_sums_[j] = static_cast<float>((j < past_ ? past_sums_[j] : 0.0f) + column_sums_[j]);
    }
    if (past_sums_ != present_sums_ && a_.past_capacity > a_.total) {
      std::copy(past_sums_ + a_.total, past_sums_ + a_.past_capacity, present_sums_ + a_.total);
    }
  }

  // Fills map_ (rows, columns) with logits; -inf where a row cannot see a column.
  void Logits(int64_t row, int64_t rows, const Columns& columns) {
    for (int64_t r = 0; r < rows; ++r) {
      ConvertRow(query_ + (row + r) * a_.num_heads * a_.head_size, a_.head_size, &query_rows_[r * a_.head_size]);
    }
    for (int64_t block = 0; block < columns.count; block += kColumnBlock) {
      const int64_t count = std::min(kColumnBlock, columns.count - block);
      const float* tile = Tile(keys_, a_.head_size, columns, block, count, tile_);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t first = FirstColumn(row + r);
        for (int64_t c = 0; c < count; ++c) {
          const int64_t j = columns[block + c];
          const bool visible = real_.IsReal(j) && j >= first && j <= Position(row + r);
          float& logit = map_[r * columns.count + block + c];
          logit = visible ? Logit(&query_rows_[r * a_.head_size], tile + c * a_.head_size)
                          : -std::numeric_limits<float>::infinity();
          if (j == initial_) logit += on_initial_;
        }
      }
    }
  }

  float Logit(const float* query, const float* key) const {
    const float logit = a_.scale * Dot(query, key, a_.head_size);
    return a_.softcap > 0.0f ? a_.softcap * std::tanh(logit / a_.softcap) : logit;
  }

  // Fills map_ with the probabilities that pass 1 found at these columns, bit for bit.
  void Probabilities(int64_t row, int64_t rows, const Columns& columns) {
    Logits(row, rows, columns);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns.count; ++c) {
        float& p = map_[r * columns.count + c];
        p = std::exp(p - maxima_[row + r]) * normalisers_[row + r];
      }
    }
  }

  // sums (rows, value_head_size) += map_ (rows, columns) x values at the columns.
  void AddValues(int64_t rows, const Columns& columns, float* sums) {
    for (int64_t block = 0; block < columns.count; block += kColumnBlock) {
      const int64_t count = std::min(kColumnBlock, columns.count - block);
      const float* tile = Tile(values_, a_.value_head_size, columns, block, count, tile_);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < count; ++c) {
          const float p = map_[r * columns.count + block + c];
          // Values that a row does not see may be anything, NaN included.
          if (p != 0.0f) AddScaled(p, tile + c * a_.value_head_size, a_.value_head_size, sums + r * a_.value_head_size);
        }
      }
    }
  }

  static double Sum(const float* values, int64_t count) {
    double sum = 0.0;
    for (int64_t i = 0; i < count; ++i) sum += values[i];
    return sum;
  }

  void Store(int64_t row, int64_t rows, const float* attended) {
    for (int64_t r = 0; r < rows; ++r) {
      T* to = output_ + (row + r) * a_.num_heads * a_.value_head_size;
      for (int64_t d = 0; d < a_.value_head_size; ++d) to[d] = FromFloat<T>(attended[r * a_.value_head_size + d]);
    }
  }

  const AttentionArguments<T>& a_;
  const RealTokens& real_;
  const int64_t past_;
  const int64_t calibrated_;  // index among the calibrated heads, or -1
  const Strengths strengths_;
  const int64_t initial_;   // position of the sequence's first real token
  const float on_initial_;  // added to its logits
  const float sink_logit_;
  const T* query_;
  const T* keys_;
  const T* values_;
  T* output_;
  const float* past_sums_ = nullptr;
  float* present_sums_ = nullptr;
  std::vector<float> query_rows_;
  std::vector<float> tile_;
  std::vector<float> map_;
  std::vector<float> maxima_;
  std::vector<float> normalisers_;
  std::vector<double> row_sums_;     // of the probabilities: 1, less where there is a learned sink
  std::vector<double> column_sums_;  // of this call; double, as a prompt adds thousands of small probabilities
};

}  // namespace

template <typename T>
void Attention(const AttentionArguments<T>& a, Host& host) {
  if (a.batch == 0 || a.present_capacity == 0) return;
  if (a.sequence == 0) return KeepCache(a);
  std::vector<RealTokens> real;
  for (int64_t b = 0; b < a.batch; ++b) real.emplace_back(a.attention_mask + b * a.total, a.total);
  host.ParallelFor(a.batch * a.kv_num_heads, [&](int64_t i) {
    AppendKeysAndValues(a, i / a.kv_num_heads, i % a.kv_num_heads, 0, a.present_capacity);
  });
  host.ParallelFor(a.batch * a.num_heads, [&](int64_t i) {
    const int64_t b = i / a.num_heads;
    Head<T>(a, real[b], b, i % a.num_heads).Attend();
  });
}

template void Attention(const AttentionArguments<float>&, Host&);
template void Attention(const AttentionArguments<Float16>&, Host&);
template void Attention(const AttentionArguments<BFloat16>&, Host&);

}  // namespace act::plain
