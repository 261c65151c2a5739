// One call of a kernel, described by a few numbers: everything else is drawn from its seed.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

namespace act::test {

constexpr int64_t kSequences[] = {1, 2, 3, 5, 15, 16, 17, 47, 48, 49, 63, 64, 65, 127, 1000};
constexpr int64_t kPasts[] = {0, 1, 7, 63, 64, 255, 256, 257, 1000};
constexpr int64_t kHeadSizes[] = {5, 8, 20, 32, 64, 80, 96, 128, 256};
constexpr int64_t kGroups[] = {1, 3, 8};
constexpr int64_t kWindows[] = {1, 2, 17, 64, 5000};
constexpr float kBetas[] = {0.0f, 0.4f, 1.0f, 1.7f, 2.0f};
constexpr float kGammas[] = {0.0625f, 0.3f, 1.0f, 1.0f, 5.0f, 16.0f};

enum class Padding { kNone, kLeft, kRight, kBoth, kHoles, kWholeSequences, kMixed };
constexpr Padding kPaddings[] = {Padding::kNone,  Padding::kLeft,           Padding::kRight, Padding::kBoth,
                                 Padding::kHoles, Padding::kWholeSequences, Padding::kMixed};
const char* Name(Padding padding);

enum class Heads { kNone, kSome, kAll };
constexpr Heads kCalibratedHeads[] = {Heads::kNone, Heads::kSome, Heads::kAll};
const char* Name(Heads heads);

struct Problem {
  uint64_t seed = 1;
  int64_t batch = 2;
  int64_t sequence = 1;
  int64_t past = 0;
  int64_t spare = 0;  // positions of the past buffers beyond `past`
  int64_t kv_num_heads = 2;
  int64_t group = 3;
  int64_t head_size = 32;
  int64_t value_head_size = 32;
  Padding padding = Padding::kNone;
  int64_t window = -1;
  float softcap = 0.0f;
  float deviation = 1.0f;       // standard deviation of the logits
  float sink_deviation = 0.0f;  // of the learned sink logits; 0 = none
  float planted_logit = 0.0f;   // not 0: a few keys have this logit, half of it, or minus one of the two, in every row
  Heads calibrated = Heads::kAll;
  // Of the calibrated heads, and of the sequences, in turn: whose turn is first goes by the seed.
  std::vector<float> beta = {0.4f};
  std::vector<float> gamma = {1.0f, 0.3f, 5.0f};
  std::vector<float> threshold = {0.05f};
  bool relative_threshold = false;
  bool each_sequence = true;      // has strengths of its own
  bool cache_in_place = false;    // where it has room: present keys and values are the past ones' memory
  bool sinks_in_place = false;    // the same for the sink scores
  bool poisoned = false;          // what no row may see is NaN or infinite
  bool poisoned_queries = false;  // so are the queries of padding

  int64_t Total() const { return past + sequence; }
  int64_t PastCapacity() const { return past + spare; }
  int64_t PresentCapacity() const { return std::max(PastCapacity(), Total()); }
  int64_t NumHeads() const { return kv_num_heads * group; }
  bool HasRoom() const { return PastCapacity() >= Total(); }
};

// Beside logits above this one, what gamma adds is rounded so that kernels rightly differ.
constexpr float kMostLogitWithGamma = 1e3f;

std::string Describe(const Problem& problem);

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}

  double Uniform() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }
  // Near enough: the sum of four uniform numbers, of mean 0 and variance 1.
  float Normal() {
    const uint64_t bits = engine_();
    const uint64_t sum = (bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48);
    return (static_cast<float>(sum) - 131070.0f) * (1.7320508f / 65536.0f);
  }
  bool Chance(double probability) { return Uniform() < probability; }
  int64_t Between(int64_t least, int64_t most) {
    return least + static_cast<int64_t>(Uniform() * static_cast<double>(most - least + 1));
  }
  template <typename T, size_t N>
  T Pick(const T (&choices)[N]) {
    return choices[Between(0, N - 1)];
  }

 private:
  std::mt19937_64 engine_;
};

// Everything at random.
Problem RandomProblem(uint64_t seed);

// Everything but the lengths at random.
Problem RandomProblem(uint64_t seed, int64_t sequence, int64_t past);

}  // namespace act::test
