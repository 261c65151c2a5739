// Every kernel against the plain one: shapes, one feature at a time, everything at random, conversations, and tokens
// that are not numbers.
#include <cmath>
#include <cstdint>
#include <exception>
#include <iterator>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "cases.h"

namespace act::test {
namespace {

struct Lengths {
  int64_t sequence;
  int64_t past;
};

std::string Name(const Lengths& lengths) {
  return "sequence=" + std::to_string(lengths.sequence) + ",past=" + std::to_string(lengths.past);
}

// A failure of `test` gets the problem's description.
template <typename Test>
void Described(const Problem& problem, const Test& test) {
  try {
    test();
  } catch (const std::exception& exception) {
    throw Failure(std::string(exception.what()) + "\n  " + Describe(problem));
  }
}

template <typename T>
void Check(const Problem& problem, Tally& tally) {
  Described(problem, [&] {
    const Inputs<T> clean = Draw<T>(problem);
    const Outputs<T> expected = AnswerAlone(clean);
    const Inputs<T> inputs = Poisoned(clean);
    const Ignored ignored{INT64_MAX, problem.poisoned_queries};
    if (problem.poisoned || problem.poisoned_queries) Compare(inputs, expected, AnswerAlone(inputs), tally, ignored);
    ForEachInstructionSet([&](fast::InstructionSet instruction_set) {
      Compare(inputs, expected, AnswerAlone(inputs, instruction_set), tally, ignored);
    });
  });
}

void Add(const std::string& name, const Problem& problem, Cases& cases) {
  ForEachType([&](auto type, const char* type_name) {
    cases.push_back(
        {name + '/' + type_name, problem.Total(), [problem](Tally& tally) { Check<decltype(type)>(problem, tally); }});
  });
}

void AddShapes(Cases& cases) {
  uint64_t seed = 1000;
  for (const int64_t sequence : kSequences) {
    for (const int64_t past : kPasts) {
      Add("shape/" + Name(Lengths{sequence, past}), RandomProblem(++seed, sequence, past), cases);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------

struct Feature {
  std::string name;
  Problem problem;
};

std::vector<Feature> Features() {
  std::vector<Feature> features;
  const auto add = [&](const std::string& name, const auto& set) {
    features.push_back({name, {}});
    set(features.back().problem);
  };
  const auto text = [](float value) {
    std::ostringstream stream;
    stream << value;
    return stream.str();
  };

  for (const int64_t batch : {1, 3, 4}) {
    add("batch=" + std::to_string(batch), [&](Problem& p) {
      p.batch = batch;
      p.padding = Padding::kMixed;
    });
  }
  for (const Padding padding : kPaddings) {
    add(std::string("padding=") + Name(padding), [&](Problem& p) { p.padding = padding; });
  }
  for (const int64_t size : kHeadSizes) {
    const auto set = [&](Problem& p, int64_t head_size, int64_t value_head_size) {
      p.group = 1;
      p.head_size = head_size;
      p.value_head_size = value_head_size;
    };
    add("head_size=" + std::to_string(size), [&](Problem& p) { set(p, size, size); });
    add("value_head_size=" + std::to_string(size), [&](Problem& p) { set(p, 20, size); });
  }
  for (const int64_t group : kGroups) add("group=" + std::to_string(group), [&](Problem& p) { p.group = group; });
  for (const int64_t window : kWindows) {
    add("window=" + std::to_string(window), [&](Problem& p) { p.window = window; });
    add("window=" + std::to_string(window) + ",padding", [&](Problem& p) {
      p.window = window;
      p.padding = Padding::kMixed;
    });
  }
  for (const float softcap : {1.5f, 30.0f}) add("softcap=" + text(softcap), [&](Problem& p) { p.softcap = softcap; });
  add("logits=tiny", [&](Problem& p) { p.deviation = 1e-3f; });
  for (const bool each : {false, true}) {
    add(std::string("strengths=") + (each ? "of each sequence" : "of all"), [&](Problem& p) {
      p.beta.assign(std::begin(kBetas), std::end(kBetas));
      p.gamma.assign(std::begin(kGammas), std::end(kGammas));
      p.threshold = {0.0f, 0.001f, 0.1f, 0.3f};
      p.each_sequence = each;
      p.padding = Padding::kMixed;
    });
  }
  add("gamma alone", [](Problem& p) {
    p.beta = {1.0f};
    p.gamma = {0.0625f, 16.0f};
    p.padding = Padding::kMixed;
  });
  for (const float logit : {4.0f, 8.0f, 80.0f, 1e4f}) {
    add("planted=" + text(logit), [&](Problem& p) {
      p.deviation = 0.5f;
      p.planted_logit = logit;
      p.beta = {0.4f, 1.7f};
      if (logit > kMostLogitWithGamma) p.gamma = {1.0f};
      p.threshold = {0.001f};
    });
  }
  for (const float deviation : {1.0f, 5.0f, 40.0f}) {
    add("sinks=" + text(deviation), [&](Problem& p) {
      p.sink_deviation = deviation;
      p.padding = Padding::kMixed;
      p.threshold = {0.001f};
    });
  }
  add("sinks,softcap,window", [](Problem& p) {
    p.sink_deviation = 3.0f;
    p.softcap = 1.5f;
    p.window = 17;
    p.threshold = {0.01f};
  });
  add("sinks,planted=8", [](Problem& p) {
    p.sink_deviation = 9.0f;
    p.deviation = 0.5f;
    p.planted_logit = 8.0f;
    p.beta = {0.4f, 1.7f};
    p.threshold = {0.001f};
  });
  for (const Heads heads : kCalibratedHeads) {
    add(std::string("calibrated=") + Name(heads), [&](Problem& p) { p.calibrated = heads; });
  }
  add("relative thresholds", [](Problem& p) {
    p.relative_threshold = true;
    p.threshold = {0.5f, 1.3f, 5.0f};
  });
  for (const int64_t spare : {1, 300}) {
    add("spare=" + std::to_string(spare), [&](Problem& p) { p.spare = spare; });
    add("spare=" + std::to_string(spare) + ",in place", [&](Problem& p) {
      p.spare = spare;
      p.cache_in_place = p.sinks_in_place = true;
    });
  }
  add("poisoned=padding", [](Problem& p) {
    p.poisoned = true;
    p.padding = Padding::kMixed;
  });
  add("poisoned=queries of padding", [](Problem& p) {
    p.poisoned_queries = true;
    p.padding = Padding::kMixed;
  });
  add("poisoned=window", [](Problem& p) {
    p.poisoned = true;
    p.window = 17;
  });
  for (const bool in_place : {false, true}) {
    add(std::string("poisoned=spare") + (in_place ? ",in place" : ""), [&](Problem& p) {
      p.poisoned = true;
      p.padding = Padding::kMixed;
      p.spare = 300;
      p.cache_in_place = p.sinks_in_place = in_place;
    });
  }
  return features;
}

void AddFeatures(Cases& cases) {
  constexpr Lengths kLengths[] = {{1, 0}, {1, 65}, {1, 1000}, {5, 64}, {8, 257}, {9, 7}, {49, 0}, {65, 63}, {127, 257}};
  uint64_t seed = 2000;
  for (const auto& [name, featured] : Features()) {
    for (const Lengths& lengths : kLengths) {
      Problem problem = featured;
      problem.seed = ++seed;
      problem.sequence = lengths.sequence;
      problem.past = lengths.past;
      Add(name + '/' + Name(lengths), problem, cases);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------

// What is no number for the plain kernel must not look like one.
template <typename T>
void CheckSpoiled(const Outputs<T>& spoiled, const Outputs<T>& got) {
  for (int64_t i = 0; i < spoiled.output.Size(); ++i) {
    if (std::isnan(ToFloat(spoiled.output[i])) && std::isfinite(ToFloat(got.output[i]))) {
      throw Failure("output " + std::to_string(i) + " is a number, though its row sees some that are none");
    }
  }
}

// One token is not a number: nothing changes for the rows before it. Its key spoils the column sums of a head whose
// later sinks change, its value does not.
template <typename T>
void CheckFuture(const Problem& problem, int64_t token, bool poisons_keys, Tally& tally) {
  Described(problem, [&] {
    const Inputs<T> clean = Draw<T>(problem);
    const Outputs<T> expected = AnswerAlone(clean);
    Inputs<T> inputs = clean;
    Random random(problem.seed + 1);
    for (int64_t b = 0; b < problem.batch; ++b) {
      if (poisons_keys) {
        PoisonKeys(random, inputs, b, token);
      } else {
        PoisonValues(random, inputs, b, token);
      }
    }
    const Outputs<T> spoiled = AnswerAlone(inputs);
    ForEachInstructionSet([&](fast::InstructionSet instruction_set) {
      const Outputs<T> got = AnswerAlone(inputs, instruction_set);
      Compare(inputs, expected, got, tally, {token, false});
      CheckSpoiled(spoiled, got);
    });
  });
}

void AddFutures(Cases& cases) {
  uint64_t seed = 3000;
  for (const Lengths& lengths : {Lengths{5, 64}, {8, 257}, {9, 7}, {65, 63}, {127, 0}}) {
    for (const int64_t token : {int64_t{1}, lengths.sequence / 2, lengths.sequence - 1}) {
      for (const bool keys : {false, true}) {
        Problem problem;
        problem.seed = ++seed;
        problem.sequence = lengths.sequence;
        problem.past = lengths.past;
        if (keys) problem.beta = {1.0f};
        problem.threshold = {0.005f};
        problem.softcap = token == 1 ? 30.0f : 0.0f;
        const std::string name =
            std::string(keys ? "future_keys" : "future_values") + "/token=" + std::to_string(token);
        ForEachType([&](auto type, const char* type_name) {
          cases.push_back({name + "/" + Name(lengths) + '/' + type_name, problem.Total(),
                           [=](Tally& tally) { CheckFuture<decltype(type)>(problem, token, keys, tally); }});
        });
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------

template <typename T>
void CheckConversation(const Problem& problem, Tally& tally) {
  ForEachInstructionSet([&](fast::InstructionSet instruction_set) {
    Inputs<T> plain_inputs = Draw<T>(problem);
    Inputs<T> inputs = plain_inputs;
    for (const int64_t next : {17, 1, 1, 1, 5, 1, 1, 30, 1, 0}) {
      const Outputs<T> expected = AnswerAlone(plain_inputs);
      const Outputs<T> got = AnswerAlone(inputs, instruction_set);
      Described(inputs.problem, [&] { Compare(inputs, expected, got, tally); });
      if (next == 0) break;
      Continue(next, expected, plain_inputs);
      Continue(next, got, inputs);
    }
  });
}

void AddConversations(Cases& cases) {
  uint64_t seed = 4000;
  const auto add = [&](const std::string& name, const auto& set) {
    for (const int64_t prompt : {1, 49, 127}) {
      Problem problem;
      problem.seed = seed += 100;
      problem.sequence = prompt;
      set(problem);
      ForEachType([&](auto type, const char* type_name) {
        cases.push_back({"conversation/" + name + "/prompt=" + std::to_string(prompt) + '/' + type_name, prompt + 58,
                         [=](Tally& tally) { CheckConversation<decltype(type)>(problem, tally); }});
      });
    }
  };
  const auto share = [](Problem& p) {
    p.beta = {0.4f, 1.0f, 1.7f};
    p.spare = 300;
    p.cache_in_place = p.sinks_in_place = true;
  };
  add("growing", [](Problem&) {});
  add("preallocated", [](Problem& p) { p.spare = 300; });
  add("shared", share);
  add("shared,padding", [&](Problem& p) {
    share(p);
    p.padding = Padding::kMixed;
  });
  add("shared,window", [&](Problem& p) {
    share(p);
    p.window = 17;
  });
  add("growing,planted", [](Problem& p) {
    p.deviation = 0.5f;
    p.planted_logit = 8.0f;
    p.beta = {0.0f, 1.7f, 1.0f};
  });
}

}  // namespace

void AddKernelCases(Cases& cases) {
  AddShapes(cases);
  AddFeatures(cases);
  AddFutures(cases);
  AddConversations(cases);
}

void AddRandomCases(int64_t count, uint64_t first_seed, Cases& cases) {
  for (uint64_t seed = first_seed; seed < first_seed + count; ++seed) {
    const Problem problem = RandomProblem(seed);
    Add("random/seed=" + std::to_string(seed), problem, cases);
  }
}

}  // namespace act::test
