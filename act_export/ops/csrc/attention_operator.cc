#include "attention_operator.h"

#include <algorithm>
#include <cmath>

#include "argument_checks.h"
#include "float16.h"

namespace act {
namespace {

using ort::Tensor;
using ort::ToString;

// A calibration comes with every call, so that this is not known when the node is made.
void ExpectInRange(const Strengths* calibration, int64_t calibrations, int64_t heads) {
  for (int64_t i = 0; i < calibrations * heads; ++i) {
    const Strengths& each = calibration[i];
    const auto expect = [&](bool condition, const char* name, float value, const auto&... allowed) {
      Expect(condition, "calibration[", i / heads, ", ", i % heads, "] has ", name, " ", value, ", expected ",
             allowed...);
    };
    expect(each.beta >= kLeastBeta && each.beta <= kMostBeta, "beta", each.beta, kLeastBeta, " to ", kMostBeta);
    expect(each.gamma >= kLeastGamma && each.gamma <= kMostGamma, "gamma", each.gamma, kLeastGamma, " to ", kMostGamma);
    expect(std::isfinite(each.threshold) && each.threshold >= 0.0f, "threshold", each.threshold, "0 or more");
  }
}

// In place where past and present are the same memory: then nothing may move.
void ExpectSameLayout(const char* name, const void* past, const void* present, int64_t past_capacity,
                      int64_t present_capacity) {
  Expect(past != present || past_capacity == present_capacity || past_capacity == 0, "past and present ", name,
         " are the same memory, which has room for ", past_capacity, " tokens, but ", present_capacity, " are needed");
}

template <typename T>
class CpuNode final : public Node {
 public:
  CpuNode(const ort::Api& api, const ort::KernelInfo* info, bool calibrated)
      : api_(api), attributes_(ort::Attributes(api, info), calibrated), scratch_(api) {}

  void Run(ort::KernelContext* context) const override {
    ort::Call call(api_, context, scratch_);
    AttentionArguments<T> arguments = ReadArguments<T>(attributes_, call);
    arguments.calibrated_index = attributes_.calibrated_index.data();
    arguments.sink_logits = attributes_.sink_logits.empty() ? nullptr : attributes_.sink_logits.data();
    ExpectInRange(arguments.calibration, arguments.calibrations, arguments.calibrated_count);
    fast::Attention(arguments, call);
  }

 private:
  const ort::Api& api_;
  const AttentionAttributes attributes_;
  const ort::ScratchMemory scratch_;
};

}  // namespace

AttentionAttributes::AttentionAttributes(const ort::Attributes& attributes, bool is_calibrated)
    : calibrated(is_calibrated),
      num_heads(attributes.Required<int64_t>("num_heads")),
      kv_num_heads(attributes.Required<int64_t>("kv_num_heads")),
      scale(attributes.Required<float>("scale")),
      softcap(attributes.Optional<float>("softcap", 0.0f)),
      sliding_window(attributes.Optional<int64_t>("sliding_window", -1)) {
  Expect(num_heads > 0 && kv_num_heads > 0, "num_heads is ", num_heads, " and kv_num_heads is ", kv_num_heads,
         ", expected both to be positive");
  Expect(num_heads % kv_num_heads == 0, "num_heads is ", num_heads, ", expected a multiple of kv_num_heads, ",
         kv_num_heads);
  Expect(num_heads <= kMostHeads, "num_heads is ", num_heads, ", expected at most ", kMostHeads);
  Expect(std::isfinite(scale), "scale is ", scale, ", expected a finite number");
  Expect(std::isfinite(softcap) && softcap >= 0.0f, "softcap is ", softcap, ", expected 0 (none) or a positive number");
  Expect(sliding_window == -1 || sliding_window > 0, "sliding_window is ", sliding_window,
         ", expected -1 (none) or a positive number");
  sliding_window = std::min(sliding_window, INT64_MAX / 4);  // sums with positions stay in range
  ReadSinkLogits(attributes);
  if (calibrated) ReadCalibratedHeads(attributes);
}

void AttentionAttributes::ReadSinkLogits(const ort::Attributes& attributes) {
  sink_logits = attributes.Optional("sink_logits", std::vector<float>{kNoSinkLogit});
  const auto heads = static_cast<size_t>(num_heads);
  Expect(sink_logits.size() == 1 || sink_logits.size() == heads, "sink_logits has ", sink_logits.size(),
         " values, expected 1 or ", heads, ", one for each query head");
  for (const float logit : sink_logits) Expect(std::isfinite(logit), "sink_logits has ", logit, ", expected numbers");
  const auto is_none = [](float logit) { return logit <= kNoSinkLogit; };
  if (std::all_of(sink_logits.begin(), sink_logits.end(), is_none)) {
    sink_logits.clear();
  } else if (sink_logits.size() == 1) {
    sink_logits.resize(heads, sink_logits.front());
  }
}

void AttentionAttributes::ReadCalibratedHeads(const ort::Attributes& attributes) {
  const auto heads = attributes.Required<std::vector<int64_t>>("calibrated_heads");
  Expect(!heads.empty(), "calibrated_heads is empty, expected at least one head: use Attention for a layer without");
  calibrated_count = static_cast<int64_t>(heads.size());
  calibrated_index.assign(num_heads, -1);
  for (int64_t i = 0; i < calibrated_count; ++i) {
    Expect(heads[i] >= 0 && heads[i] < num_heads, "calibrated_heads has head ", heads[i], ", expected 0 to ",
           num_heads - 1);
    Expect(calibrated_index[heads[i]] == -1, "calibrated_heads has head ", heads[i], " twice");
    calibrated_index[heads[i]] = i;
  }

  const auto mode = attributes.Optional<std::string>("threshold_mode", "absolute");
  Expect(mode == "absolute" || mode == "relative", "threshold_mode is \"", mode,
         "\", expected \"absolute\" or \"relative\"");
  relative_threshold = mode == "relative";
}

template <typename T>
AttentionArguments<T> ReadArguments(const AttentionAttributes& attributes, const ort::Tensors& tensors) {
  size_t next = 0;
  const auto query = tensors.Input<T>(next++);
  const auto key = tensors.Input<T>(next++);
  const auto value = tensors.Input<T>(next++);
  const auto past_key = tensors.Input<T>(next++);
  const auto past_value = tensors.Input<T>(next++);
  const auto past_sink_scores = attributes.calibrated ? tensors.Input<float>(next++) : Tensor<const float>{};
  const auto attention_mask = tensors.Input<int64_t>(next++);
  const auto calibration = attributes.calibrated ? tensors.Input<float>(next++) : Tensor<const float>{};

  ExpectRank("query", query.shape, 3, "(batch, sequence, num_heads * head_size)");
  ExpectRank("key", key.shape, 3, "(batch, sequence, kv_num_heads * head_size)");
  ExpectRank("value", value.shape, 3, "(batch, sequence, kv_num_heads * head_size)");
  ExpectRank("past_key", past_key.shape, 4, "(batch, kv_num_heads, past, head_size)");
  ExpectRank("attention_mask", attention_mask.shape, 2, "(batch, past + sequence)");

  ExpectCountable("query", query.shape, 0, 1, "sequence");
  ExpectCountable("attention_mask", attention_mask.shape, 0, 1, "length");
  ExpectCountable("past_key", past_key.shape, 0, 2, "past");

  AttentionArguments<T> a;
  a.batch = query.shape[0];
  a.sequence = query.shape[1];
  a.total = attention_mask.shape[1];
  a.num_heads = attributes.num_heads;
  a.kv_num_heads = attributes.kv_num_heads;
  a.head_size = HeadSize("query", query.shape, "num_heads", a.num_heads, a.num_heads);
  a.value_head_size = HeadSize("value", value.shape, "kv_num_heads", a.kv_num_heads, a.num_heads);
  a.past_capacity = past_key.shape[2];
  a.present_capacity = std::max(a.past_capacity, a.total);

  ExpectShape("key", key.shape, {a.batch, a.sequence, a.kv_num_heads * a.head_size},
              "(batch, sequence, kv_num_heads * head_size)");
  ExpectShape("value", value.shape, {a.batch, a.sequence, a.kv_num_heads * a.value_head_size},
              "(batch, sequence, kv_num_heads * head_size)");
  ExpectShape("past_key", past_key.shape, {a.batch, a.kv_num_heads, a.past_capacity, a.head_size},
              "(batch, kv_num_heads, past, head_size)");
  ExpectShape("past_value", past_value.shape, {a.batch, a.kv_num_heads, a.past_capacity, a.value_head_size},
              "(batch, kv_num_heads, past, head_size), past as in past_key");
  if (attributes.calibrated) {
    ExpectShape("past_sink_scores", past_sink_scores.shape, {a.batch, attributes.calibrated_count, a.past_capacity, 1},
                "(batch, calibrated heads, past, 1), past as in past_key");
    ExpectRank("calibration", calibration.shape, 3, "(1 or batch, calibrated heads, 3)");
    a.calibrations = calibration.shape[0] == 1 ? 1 : a.batch;
    ExpectShape("calibration", calibration.shape, {a.calibrations, attributes.calibrated_count, 3},
                "(1 or batch, calibrated heads, 3)");
  }
  ExpectShape("attention_mask", attention_mask.shape, {a.batch, a.total}, "(batch, past + sequence)");
  Expect(a.total >= a.sequence, "attention_mask has ", a.total, " positions, expected at least the ", a.sequence,
         " of query: it covers the past and this call");
  Expect(a.past_capacity >= a.total - a.sequence, "past_key has room for ", a.past_capacity,
         " tokens, but attention_mask (", a.total, " positions) and query (", a.sequence, ") say that ",
         a.total - a.sequence, " are in the cache");

  a.query = query.data;
  a.key = key.data;
  a.value = value.data;
  a.past_key = past_key.data;
  a.past_value = past_value.data;
  a.past_sink_scores = past_sink_scores.data;
  a.attention_mask = attention_mask.data;
  a.calibration = reinterpret_cast<const Strengths*>(calibration.data);
  a.output = tensors.Output<T>(0, {a.batch, a.sequence, a.num_heads * a.value_head_size});
  a.present_key = tensors.Output<T>(1, {a.batch, a.kv_num_heads, a.present_capacity, a.head_size});
  a.present_value = tensors.Output<T>(2, {a.batch, a.kv_num_heads, a.present_capacity, a.value_head_size});
  ExpectSameLayout("keys", a.past_key, a.present_key, a.past_capacity, a.present_capacity);
  ExpectSameLayout("values", a.past_value, a.present_value, a.past_capacity, a.present_capacity);
  if (attributes.calibrated) {
    a.present_sink_scores =
        tensors.Output<float>(3, {a.batch, attributes.calibrated_count, a.present_capacity, int64_t{1}});
    ExpectSameLayout("sink scores", a.past_sink_scores, a.present_sink_scores, a.past_capacity, a.present_capacity);
  }

  a.calibrated_count = attributes.calibrated_count;
  ExpectApart(a);

  a.scale = attributes.scale;
  a.softcap = attributes.softcap;
  a.sliding_window = attributes.sliding_window;
  a.relative_threshold = attributes.relative_threshold;
  return a;
}

template AttentionArguments<float> ReadArguments(const AttentionAttributes&, const ort::Tensors&);
template AttentionArguments<Float16> ReadArguments(const AttentionAttributes&, const ort::Tensors&);
template AttentionArguments<BFloat16> ReadArguments(const AttentionAttributes&, const ort::Tensors&);

template <typename T>
std::unique_ptr<Node> MakeCpuNode(const ort::Api& api, const ort::KernelInfo* info, bool calibrated) {
  return std::make_unique<CpuNode<T>>(api, info, calibrated);
}

template NodeMaker MakeCpuNode<float>;
template NodeMaker MakeCpuNode<Float16>;
template NodeMaker MakeCpuNode<BFloat16>;

}  // namespace act
