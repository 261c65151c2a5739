// The named cases of attention_test.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "attention.h"
#include "compare.h"
#include "inputs.h"
#include "test_host.h"

namespace act::test {

struct Case {
  std::string name;
  int64_t total;  // positions of the longest call
  std::function<void(Tally&)> run;
};

using Cases = std::vector<Case>;

// Calls test(T{}, name of T) for every storage type.
template <typename Test>
void ForEachType(const Test& test) {
  test(float{}, "float");
  test(Float16{}, "float16");
  test(BFloat16{}, "bfloat16");
}

// Calls test(instruction set) for every one that this machine has. A failure says which it was.
template <typename Test>
void ForEachInstructionSet(const Test& test) {
  for (const fast::InstructionSet instruction_set : fast::kInstructionSets) {
    if (!fast::IsSupported(instruction_set)) continue;
    try {
      test(instruction_set);
    } catch (const std::exception& exception) {
      throw Failure(std::string(fast::Name(instruction_set)) + ": " + exception.what());
    }
  }
}

// The answer, on one thread. Fails where memory is left behind.
template <typename T>
Outputs<T> AnswerAlone(const Inputs<T>& inputs, std::optional<fast::InstructionSet> instruction_set = {}) {
  TestHost host;
  Outputs<T> outputs = Answer(inputs, host, instruction_set);
  if (host.LiveAllocations() != 0) throw Failure(std::to_string(host.LiveAllocations()) + " allocations are not freed");
  return outputs;
}

// Every kernel against the plain one.
void AddKernelCases(Cases& cases);
void AddRandomCases(int64_t count, uint64_t seed, Cases& cases);
// Threads, and hosts that fail.
void AddHostCases(Cases& cases);

}  // namespace act::test
