// The operators `CalibratedAttention` and `Attention`: their attributes, inputs and outputs, checked, around a kernel.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ort_context.h"

namespace act {

// Attributes of a node. `Attention` is the operator without calibrated heads.
struct AttentionAttributes {
  AttentionAttributes(const ort::Attributes& attributes, bool calibrated);

  bool calibrated;
  int64_t num_heads;
  int64_t kv_num_heads;
  float scale;
  float softcap;
  int64_t sliding_window;
  int64_t calibrated_count = 0;
  std::vector<int64_t> calibrated_index;  // per head: index among the calibrated heads, or -1
  std::vector<float> beta;                // per calibrated head
  float threshold = 0.0f;
  bool relative_threshold = false;

 private:
  void ReadCalibration(const ort::Attributes& attributes);
};

// Checks the inputs of one call, makes its outputs and runs the kernel. T: float, Float16 or BFloat16.
template <typename T>
void RunAttention(const AttentionAttributes& attributes, ort::Call& call);

}  // namespace act
