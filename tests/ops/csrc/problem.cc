#include "problem.h"

#include <sstream>

namespace act::test {
namespace {

constexpr int64_t kMostProducts = 12'000'000;  // of a query's element and a key's: bounds the time that a problem takes

int64_t Products(const Problem& p) {
  return p.batch * p.NumHeads() * p.sequence * p.Total() * (p.head_size + p.value_head_size) / 2;
}

Problem Draw(uint64_t seed, Random& random, int64_t sequence, int64_t past) {
  Problem p;
  p.seed = seed;
  p.batch = random.Between(1, 4);
  p.sequence = sequence;
  p.past = past;
  p.spare = random.Pick<int64_t>({0, 0, 1, sequence, sequence + 1, sequence + 70});
  p.kv_num_heads = random.Between(1, 2);
  p.group = random.Pick(kGroups);
  p.head_size = random.Pick(kHeadSizes);
  p.value_head_size = random.Chance(0.6) ? p.head_size : random.Pick(kHeadSizes);
  p.padding = random.Pick(kPaddings);
  p.window = random.Chance(0.5) ? -1 : random.Pick(kWindows);
  p.softcap = random.Pick({0.0f, 0.0f, 1.5f, 30.0f, 50.0f});
  p.planted_logit = random.Pick({0.0f, 0.0f, 0.0f, 4.0f, 8.0f, 80.0f, 1e4f});
  p.deviation = p.planted_logit != 0.0f ? 0.5f : random.Pick({1e-3f, 0.5f, 1.0f, 2.0f});
  p.calibrated = random.Pick(kCalibratedHeads);
  p.beta = {random.Pick(kBetas), random.Pick(kBetas), random.Pick(kBetas)};
  p.gamma = {random.Pick(kGammas), random.Pick(kGammas)};
  if (p.planted_logit > kMostLogitWithGamma) p.gamma = {1.0f};
  p.relative_threshold = random.Chance(0.4);
  p.threshold.resize(4);
  for (float& threshold : p.threshold) {
    threshold =
        p.relative_threshold ? random.Pick({0.5f, 1.3f, 2.1f, 5.0f}) : random.Pick({0.0f, 0.001f, 0.03f, 0.1f, 0.3f});
  }
  p.each_sequence = random.Chance(0.5);
  p.cache_in_place = random.Chance(0.5);
  p.sinks_in_place = random.Chance(0.8) ? p.cache_in_place : !p.cache_in_place;
  p.poisoned = random.Chance(0.4);
  p.poisoned_queries = random.Chance(0.1);
  p.sink_deviation = random.Pick({0.0f, 0.0f, 0.0f, 1.0f, 5.0f, 40.0f});
  return p;
}

Problem DrawAffordable(uint64_t seed, Random& random, int64_t sequence, int64_t past) {
  for (;;) {
    Problem problem = Draw(seed, random, sequence, past);
    if (Products(problem) <= kMostProducts) return problem;
  }
}

}  // namespace

const char* Name(Padding padding) {
  switch (padding) {
    case Padding::kNone:
      return "none";
    case Padding::kLeft:
      return "left";
    case Padding::kRight:
      return "right";
    case Padding::kBoth:
      return "both";
    case Padding::kHoles:
      return "holes";
    case Padding::kWholeSequences:
      return "whole sequences";
    default:
      return "mixed";
  }
}

const char* Name(Heads heads) {
  switch (heads) {
    case Heads::kNone:
      return "none";
    case Heads::kSome:
      return "some";
    default:
      return "all";
  }
}

std::string Describe(const Problem& p) {
  std::ostringstream text;
  const auto list = [&](const char* name, const std::vector<float>& values) {
    text << ", " << name;
    for (const float value : values) text << ' ' << value;
  };
  text << std::boolalpha << "seed " << p.seed << ", batch " << p.batch << ", sequence " << p.sequence << ", past "
       << p.past << ", spare " << p.spare << ", kv_num_heads " << p.kv_num_heads << ", group " << p.group
       << ", head_size " << p.head_size << ", value_head_size " << p.value_head_size << ", padding " << Name(p.padding)
       << ", window " << p.window << ", softcap " << p.softcap << ", deviation " << p.deviation << ", planted logit "
       << p.planted_logit << ", calibrated heads " << Name(p.calibrated);
  list("beta", p.beta);
  list("gamma", p.gamma);
  list("threshold", p.threshold);
  text << (p.relative_threshold ? " relative" : " absolute") << ", each sequence " << p.each_sequence
       << ", cache in place " << p.cache_in_place << ", sinks in place " << p.sinks_in_place << ", poisoned "
       << p.poisoned << ", poisoned queries " << p.poisoned_queries << ", sink deviation " << p.sink_deviation;
  return text.str();
}

Problem RandomProblem(uint64_t seed, int64_t sequence, int64_t past) {
  Random random(~seed);  // not the numbers that the tensors are drawn from
  return DrawAffordable(seed, random, sequence, past);
}

Problem RandomProblem(uint64_t seed) {
  Random random(~seed);
  const int64_t sequence = random.Pick(kSequences);
  return DrawAffordable(seed, random, sequence, random.Pick(kPasts));
}

}  // namespace act::test
