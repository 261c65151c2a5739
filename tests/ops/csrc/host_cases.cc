// Threads, callers side by side, and hosts that fail.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <iterator>
#include <new>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "cases.h"

namespace act::test {
namespace {

// Prompts of one and of several blocks, a few tokens, one token; some heads in each way of calibrating a row.
std::vector<Problem> Problems() {
  std::vector<Problem> problems;
  for (const auto& [sequence, past] : {std::pair<int64_t, int64_t>{1, 700}, {5, 300}, {17, 0}, {250, 50}}) {
    Problem problem;
    problem.seed = 5000 + static_cast<uint64_t>(sequence);
    problem.sequence = sequence;
    problem.past = past;
    problem.spare = sequence + 10;
    problem.cache_in_place = problem.sinks_in_place = sequence % 2 == 1;
    problem.head_size = problem.value_head_size = 20;
    problem.padding = Padding::kMixed;
    problem.calibrated = Heads::kSome;
    problem.deviation = 0.5f;
    problem.planted_logit = 4.0f;
    problem.beta = {0.4f, 1.0f};
    problem.threshold = {0.01f};
    problem.sink_deviation = sequence > 10 ? 1.0f : 0.0f;
    problems.push_back(problem);
  }
  return problems;
}

template <typename T>
void CheckThreads(const Problem& problem, Tally&) {
  const Inputs<T> inputs = Draw<T>(problem);
  ForEachInstructionSet([&](fast::InstructionSet instruction_set) {
    const Outputs<T> expected = AnswerAlone(inputs, instruction_set);
    const auto check = [&](TestHost& host, const std::string& name) {
      if (!SameBits(expected, Answer(inputs, host, instruction_set))) throw Failure(name + ": not the answer of one");
      if (host.LiveAllocations() != 0) throw Failure(name + ": not all memory is freed");
    };
    for (const int threads : {2, 3, 16}) {
      TestHost host(threads);
      check(host, std::to_string(threads) + " threads");
    }
    TestHost reversed(1, true);
    check(reversed, "bodies in reverse order");
  });
}

// With room for one sequence at a time, or for less than that, the answer is the same, and no allocation grows with the
// batch, or with the heads that share a cache.
template <typename T>
void CheckParts(const Problem& problem, Tally& tally) {
  const Inputs<T> inputs = Draw<T>(problem);
  const Outputs<T> expected = AnswerAlone(inputs);
  ForEachInstructionSet([&](fast::InstructionSet instruction_set) {
    for (const int64_t most_bytes : {int64_t{1}, int64_t{1} << 20}) {
      TestHost host;
      Compare(inputs, expected, Answer(inputs, host, instruction_set, most_bytes), tally);
      const auto cache = static_cast<size_t>(problem.PresentCapacity() * problem.kv_num_heads *
                                             (problem.head_size + problem.value_head_size)) *
                         sizeof(T);
      const size_t for_blocks = 64 * static_cast<size_t>(problem.Total() + 512) * sizeof(float);
      if (host.MostBytes() > std::max(static_cast<size_t>(most_bytes), cache) + for_blocks) {
        throw Failure("an allocation of " + std::to_string(host.MostBytes()) + " bytes");
      }
      if (host.LiveAllocations() != 0) throw Failure("not all memory is freed");
    }
  });
}

std::vector<Problem> ProblemsInParts() {
  std::vector<Problem> problems;
  for (const int64_t sequence : {1, 8, 30}) {
    for (const int64_t head_size : {2, 64}) {
      Problem problem;
      problem.seed = 6000 + static_cast<uint64_t>(sequence + head_size);
      problem.batch = 7;
      problem.sequence = sequence;
      problem.past = 1000;
      problem.spare = sequence;
      problem.cache_in_place = problem.sinks_in_place = sequence == 8;
      problem.kv_num_heads = head_size == 2 ? 1 : 4;
      problem.group = head_size == 2 ? 64 : 2;
      problem.head_size = problem.value_head_size = head_size;
      problem.padding = Padding::kMixed;
      problem.calibrated = Heads::kSome;
      problem.beta.assign(std::begin(kBetas), std::end(kBetas));
      problems.push_back(problem);
    }
  }
  return problems;
}

// Eight callers at once, of one host with two threads for each.
template <typename T>
void CheckCallers(Tally&) {
  constexpr int kCallers = 8;
  constexpr int kRounds = 3;
  const std::vector<Problem> problems = Problems();
  ForEachInstructionSet([&](fast::InstructionSet instruction_set) {
    std::vector<Inputs<T>> inputs;
    std::vector<Outputs<T>> alone;
    for (int i = 0; i < kCallers; ++i) {
      Problem problem = problems[i % problems.size()];
      problem.seed += 100 * i;
      inputs.push_back(Draw<T>(problem));
      alone.push_back(AnswerAlone(inputs.back(), instruction_set));
    }
    TestHost host(2);
    std::atomic<int> wrong{0};
    std::vector<std::thread> callers;
    for (int i = 0; i < kCallers; ++i) {
      callers.emplace_back([&, i] {
        for (int round = 0; round < kRounds; ++round) {
          if (!SameBits(alone[i], Answer(inputs[i], host, instruction_set))) ++wrong;
        }
      });
    }
    for (std::thread& caller : callers) caller.join();
    if (wrong > 0) throw Failure(std::to_string(wrong) + " of " + std::to_string(kCallers * kRounds) + " are wrong");
    if (host.LiveAllocations() != 0) throw Failure("not all memory is freed");
  });
}

// The host fails after 0, 1, 2 .. successes: the failure comes out of the kernel and nothing is left behind, until a
// call gets by.
template <typename T, typename Expected>
void CheckFailures(const Problem& problem, void (TestHost::*fail)(int64_t)) {
  constexpr int64_t kMost = 10'000;
  const Inputs<T> inputs = Draw<T>(problem);
  const Outputs<T> expected = AnswerAlone(inputs, fast::Best());
  for (const int threads : {1, 3}) {
    bool failed = true;
    for (int64_t successes = 0; failed; ++successes) {
      TestHost host(threads);
      (host.*fail)(successes);
      try {
        if (!SameBits(expected, Answer(inputs, host, fast::Best()))) throw Failure("not the usual answer");
        failed = false;
      } catch (const Expected&) {
      }
      const std::string where = "failure " + std::to_string(successes) + " on " + std::to_string(threads) + " threads";
      if (host.HasFailed() != failed) throw Failure(where + ": does not come out of the kernel");
      if (host.LiveAllocations() != 0) throw Failure(where + ": not all memory is freed");
      if (successes == kMost) throw Failure(where + ": no call gets by");
    }
  }
}

}  // namespace

void AddHostCases(Cases& cases) {
  ForEachType([&](auto type, const char* type_name) {
    using T = decltype(type);
    for (const Problem& problem : Problems()) {
      const std::string shape = "/sequence=" + std::to_string(problem.sequence) + '/' + type_name;
      const auto add = [&](const char* name, const std::function<void(Tally&)>& run) {
        cases.push_back({name + shape, problem.Total(), run});
      };
      add("threads/of one caller", [problem](Tally& tally) { CheckThreads<T>(problem, tally); });
      if (std::is_same_v<T, Float16>) continue;  // allocates as BFloat16 does
      add("failing/allocation",
          [problem](Tally&) { CheckFailures<T, std::bad_alloc>(problem, &TestHost::FailAllocation); });
      add("failing/body", [problem](Tally&) { CheckFailures<T, BodyFailure>(problem, &TestHost::FailBody); });
    }
    cases.push_back({std::string("threads/of eight callers/") + type_name, 701, CheckCallers<T>});
    for (const Problem& problem : ProblemsInParts()) {
      const std::string shape = "sequence=" + std::to_string(problem.sequence) +
                                ",head_size=" + std::to_string(problem.head_size) + '/' + type_name;
      cases.push_back({"parts/" + shape, problem.Total(), [problem](Tally& tally) { CheckParts<T>(problem, tally); }});
    }
  });
}

}  // namespace act::test
