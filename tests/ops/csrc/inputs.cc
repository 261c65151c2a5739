#include "inputs.h"

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <utility>

namespace act::test {
namespace {

// Appends `count` positions of a sequence to its mask.
void DrawMask(Random& random, Padding padding, int64_t b, int64_t count, std::vector<int64_t>& mask) {
  if (padding == Padding::kMixed) padding = random.Pick(kPaddings);
  const bool left = padding == Padding::kLeft || padding == Padding::kBoth;
  const bool right = padding == Padding::kRight || padding == Padding::kBoth;
  const bool whole = padding == Padding::kWholeSequences && b % 2 == 0;
  const int64_t begin = left ? random.Between(1, count) : 0;
  const int64_t end = whole ? 0 : right ? random.Between(begin, count - 1) : count;
  for (int64_t j = 0; j < count; ++j) {
    const bool real = j >= begin && j < end && !(padding == Padding::kHoles && random.Chance(0.3));
    mask.push_back(real ? random.Pick<int64_t>({1, 1, 1, -1, int64_t{1} << 40}) : 0);
  }
}

template <typename T>
void Fill(Random& random, Tensor<T>& tensor) {
  for (int64_t i = 0; i < tensor.Size(); ++i) tensor[i] = FromFloat<T>(random.Normal());
}

// Keys that dominate. The first element of every query is the same and that of other keys is 0: so their logits are
// exact but for one rounding, and equal ones stay equal in whatever order a kernel adds.
template <typename T>
void Plant(Random& random, const Problem& p, float scale, Tensor<T>& query, std::initializer_list<Tensor<T>*> keys) {
  constexpr float kQuery = 16.0f;
  for (int64_t i = 0; i < query.Size(); i += p.head_size) query[i] = FromFloat<T>(kQuery);
  for (Tensor<T>* key : keys) {
    for (int64_t i = 0; i < key->Size(); i += p.head_size) {
      (*key)[i] = FromFloat<T>(0.0f);
      if (!random.Chance(std::min(0.125, 8.0 / static_cast<double>(p.Total())))) continue;
      const float part = random.Pick({1.0f, 1.0f, 0.5f, -0.5f, -1.0f});
      for (int64_t d = 0; d < p.head_size; ++d) (*key)[i + d] = FromFloat<T>(0.0f);
      (*key)[i] = FromFloat<T>(part * p.planted_logit / (kQuery * scale));
    }
  }
}

template <typename T>
void SetCalibration(Inputs<T>& inputs) {
  const Problem& p = inputs.problem;
  const auto count = static_cast<size_t>((p.each_sequence ? p.batch : 1) * inputs.calibrated_count);
  const auto in_turn = [](const std::vector<float>& values, size_t turn) { return values[turn % values.size()]; };
  inputs.calibration.clear();
  for (size_t turn = p.seed; turn < p.seed + count; ++turn) {
    inputs.calibration.push_back({in_turn(p.beta, turn), in_turn(p.gamma, turn), in_turn(p.threshold, turn)});
  }
}

// The tokens of a call: query, key and value.
template <typename T>
void DrawTokens(Random& random, Inputs<T>& inputs) {
  const Problem& p = inputs.problem;
  inputs.query = Tensor<T>(p.batch * p.sequence * p.NumHeads() * p.head_size);
  inputs.key = Tensor<T>(p.batch * p.sequence * p.kv_num_heads * p.head_size);
  inputs.value = Tensor<T>(p.batch * p.sequence * p.kv_num_heads * p.value_head_size);
  Fill(random, inputs.query);
  Fill(random, inputs.key);
  Fill(random, inputs.value);
}

// `width` elements from `begin` on become NaN or infinite.
template <typename T>
void Poison(Random& random, Tensor<T>& tensor, int64_t begin, int64_t width) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const float all_ones = FloatFromBits(0xffffffffu);  // one more NaN: its bits overflow where they are added to
  for (int64_t i = begin; i < begin + width; ++i) {
    tensor[i] = FromFloat<T>(random.Pick({NAN, all_ones, kInfinity, -kInfinity}));
  }
}

}  // namespace

template <typename T>
Inputs<T> Draw(const Problem& p) {
  Random random(p.seed);
  Inputs<T> inputs;
  inputs.problem = p;
  for (int64_t b = 0; b < p.batch; ++b) DrawMask(random, p.padding, b, p.Total(), inputs.mask);
  for (int64_t h = 0; h < p.NumHeads(); ++h) {
    const bool calibrated = p.calibrated == Heads::kAll || (p.calibrated == Heads::kSome && random.Chance(0.5));
    inputs.calibrated_index.push_back(calibrated ? inputs.calibrated_count++ : -1);
  }
  // Heads may be listed in any order.
  for (int64_t& index : inputs.calibrated_index) index = index < 0 ? index : inputs.calibrated_count - 1 - index;
  SetCalibration(inputs);

  for (int64_t h = 0; h < p.NumHeads() && p.sink_deviation != 0.0f; ++h) {
    inputs.sink_logits.push_back(random.Chance(0.2) ? kNoSinkLogit : p.sink_deviation * random.Normal());
  }

  DrawTokens(random, inputs);
  inputs.past_key = Tensor<T>(p.batch * p.kv_num_heads * p.PastCapacity() * p.head_size);
  inputs.past_value = Tensor<T>(p.batch * p.kv_num_heads * p.PastCapacity() * p.value_head_size);
  inputs.past_sink_scores = Tensor<float>(p.batch * inputs.calibrated_count * p.PastCapacity());
  Fill(random, inputs.past_key);
  Fill(random, inputs.past_value);
  for (int64_t i = 0; i < inputs.past_sink_scores.Size(); ++i) {
    const int64_t rows = p.past - i % p.PastCapacity();
    const auto seen = static_cast<double>(p.window > 0 ? std::min(rows, p.window) : rows);
    inputs.past_sink_scores[i] = static_cast<float>(std::pow(random.Uniform(), 8) * seen);
  }
  if (p.planted_logit != 0.0f) Plant(random, p, inputs.Scale(), inputs.query, {&inputs.key, &inputs.past_key});
  return inputs;
}

template <typename T>
void Continue(int64_t sequence, const Outputs<T>& outputs, Inputs<T>& inputs) {
  Problem& p = inputs.problem;
  const std::vector<int64_t> mask = std::move(inputs.mask);
  const int64_t total = p.Total();
  const int64_t capacity = p.PresentCapacity();
  p.seed += 1;
  p.past = total;
  p.spare = capacity - total;
  p.sequence = sequence;
  Random random(p.seed);
  inputs.mask.clear();
  for (int64_t b = 0; b < p.batch; ++b) {
    inputs.mask.insert(inputs.mask.end(), mask.begin() + b * total, mask.begin() + (b + 1) * total);
    DrawMask(random, p.padding, b, sequence, inputs.mask);
  }
  SetCalibration(inputs);
  DrawTokens(random, inputs);
  if (p.planted_logit != 0.0f) Plant(random, p, inputs.Scale(), inputs.query, {&inputs.key});
  inputs.past_key = outputs.present_key;
  inputs.past_value = outputs.present_value;
  inputs.past_sink_scores = outputs.present_sink_scores;
}

template <typename T>
void PoisonKeys(Random& random, Inputs<T>& inputs, int64_t b, int64_t row) {
  const Problem& p = inputs.problem;
  const int64_t width = p.kv_num_heads * p.head_size;
  Poison(random, inputs.key, (b * p.sequence + row) * width, width);
}

template <typename T>
void PoisonValues(Random& random, Inputs<T>& inputs, int64_t b, int64_t row) {
  const Problem& p = inputs.problem;
  const int64_t width = p.kv_num_heads * p.value_head_size;
  Poison(random, inputs.value, (b * p.sequence + row) * width, width);
}

namespace {

// Poison where no row looks: padding, what the window left behind, unused room in the cache.
template <typename T>
void PoisonUnseen(Random& random, Inputs<T>& inputs) {
  const Problem& p = inputs.problem;
  for (int64_t head = 0; head < p.batch * p.kv_num_heads; ++head) {
    for (int64_t j = 0; j < p.PastCapacity(); ++j) {
      if (j < p.past && inputs.IsSeen(head / p.kv_num_heads, j)) continue;
      const int64_t position = head * p.PastCapacity() + j;
      Poison(random, inputs.past_key, position * p.head_size, p.head_size);
      Poison(random, inputs.past_value, position * p.value_head_size, p.value_head_size);
    }
  }
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t row = 0; row < p.sequence; ++row) {
      if (inputs.IsSeen(b, p.past + row)) continue;
      PoisonKeys(random, inputs, b, row);
      PoisonValues(random, inputs, b, row);
    }
  }
  for (int64_t head = 0; head < p.batch * inputs.calibrated_count; ++head) {
    Poison(random, inputs.past_sink_scores, head * p.PastCapacity() + p.past, p.spare);
  }
}

template <typename T>
void PoisonQueriesOfPadding(Random& random, Inputs<T>& inputs) {
  const Problem& p = inputs.problem;
  const int64_t width = p.NumHeads() * p.head_size;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t row = 0; row < p.sequence; ++row) {
      if (inputs.IsSeen(b, p.past + row)) continue;
      Poison(random, inputs.query, (b * p.sequence + row) * width, width);
    }
  }
}

}  // namespace

template <typename T>
Inputs<T> Poisoned(Inputs<T> inputs) {
  Random random(inputs.problem.seed + 1);
  if (inputs.problem.poisoned) PoisonUnseen(random, inputs);
  if (inputs.problem.poisoned_queries) PoisonQueriesOfPadding(random, inputs);
  return inputs;
}

template <typename T>
Outputs<T> Answer(const Inputs<T>& inputs, Host& host, std::optional<fast::InstructionSet> instruction_set,
                  int64_t most_bytes) {
  const Problem& p = inputs.problem;
  const bool cache_in_place = p.cache_in_place && p.HasRoom();
  const bool sinks_in_place = p.sinks_in_place && p.HasRoom();
  const int64_t heads = p.batch * p.kv_num_heads * p.PresentCapacity();
  Outputs<T> outputs;
  outputs.output = Tensor<T>(p.batch * p.sequence * p.NumHeads() * p.value_head_size);
  outputs.present_key = cache_in_place ? inputs.past_key : Tensor<T>(heads * p.head_size);
  outputs.present_value = cache_in_place ? inputs.past_value : Tensor<T>(heads * p.value_head_size);
  outputs.present_sink_scores =
      sinks_in_place ? inputs.past_sink_scores : Tensor<float>(p.batch * inputs.calibrated_count * p.PresentCapacity());
  AttentionArguments<T> a;
  a.batch = p.batch;
  a.sequence = p.sequence;
  a.total = p.Total();
  a.past_capacity = p.PastCapacity();
  a.present_capacity = p.PresentCapacity();
  a.num_heads = p.NumHeads();
  a.kv_num_heads = p.kv_num_heads;
  a.head_size = p.head_size;
  a.value_head_size = p.value_head_size;
  a.query = inputs.query.Data();
  a.key = inputs.key.Data();
  a.value = inputs.value.Data();
  a.past_key = (cache_in_place ? outputs.present_key : inputs.past_key).Data();
  a.past_value = (cache_in_place ? outputs.present_value : inputs.past_value).Data();
  a.past_sink_scores = (sinks_in_place ? outputs.present_sink_scores : inputs.past_sink_scores).Data();
  a.attention_mask = inputs.mask.data();
  a.output = outputs.output.Data();
  a.present_key = outputs.present_key.Data();
  a.present_value = outputs.present_value.Data();
  a.present_sink_scores = outputs.present_sink_scores.Data();
  a.scale = inputs.Scale();
  a.softcap = p.softcap;
  a.sliding_window = p.window;
  if (!inputs.sink_logits.empty()) a.sink_logits = inputs.sink_logits.data();
  a.calibrated_count = inputs.calibrated_count;
  a.calibrated_index = inputs.calibrated_index.data();
  a.calibration = inputs.calibration.data();
  a.calibrations = p.each_sequence ? p.batch : 1;
  a.relative_threshold = p.relative_threshold;
  if (instruction_set.has_value()) {
    fast::Attention(a, host, *instruction_set, most_bytes);
  } else {
    plain::Attention(a, host);
  }
  return outputs;
}

#define ACT_INSTANTIATE(T)                                           \
  template Inputs<T> Draw(const Problem&);                           \
  template void Continue(int64_t, const Outputs<T>&, Inputs<T>&);    \
  template Inputs<T> Poisoned(Inputs<T>);                            \
  template void PoisonKeys(Random&, Inputs<T>&, int64_t, int64_t);   \
  template void PoisonValues(Random&, Inputs<T>&, int64_t, int64_t); \
  template Outputs<T> Answer(const Inputs<T>&, Host&, std::optional<fast::InstructionSet>, int64_t);

ACT_INSTANTIATE(float)
ACT_INSTANTIATE(Float16)
ACT_INSTANTIATE(BFloat16)

}  // namespace act::test
