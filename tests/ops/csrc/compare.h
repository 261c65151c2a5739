// Whether two kernels gave the same answer.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "inputs.h"

namespace act::test {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What has been compared so far.
struct Tally {
  int64_t heads = 0;  // calibrated ones of single sequences
  int64_t undecided = 0;
  double worst = 0.0;  // error over tolerance
};

// Rows whose output is not compared.
struct Ignored {
  int64_t from_row = INT64_MAX;
  bool padding = false;
};

// Throws Failure where `got`, the answer to `inputs`, is not the expected one.
template <typename T>
void Compare(const Inputs<T>& inputs, const Outputs<T>& expected, const Outputs<T>& got, Tally& tally,
             const Ignored& ignored = {});

}  // namespace act::test
