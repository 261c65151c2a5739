// The operators `CalibratedAttention` and `Attention`: their attributes, inputs and outputs, checked.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "attention.h"
#include "node.h"
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
  std::vector<float> sink_logits;  // per head; empty = none
  int64_t calibrated_count = 0;
  std::vector<int64_t> calibrated_index;  // per head: index among the calibrated heads, or -1
  bool relative_threshold = false;

 private:
  void ReadSinkLogits(const ort::Attributes& attributes);
  void ReadCalibratedHeads(const ort::Attributes& attributes);
};

// Checks the inputs of one call and makes its outputs; calibrated_index and sink_logits are left to the caller, who
// knows which memory the kernel reads, and so are the values of the calibration. T: float, Float16 or BFloat16.
template <typename T>
AttentionArguments<T> ReadArguments(const AttentionAttributes& attributes, const ort::Tensors& tensors);

// A node on the CPU.
template <typename T>
std::unique_ptr<Node> MakeCpuNode(const ort::Api& api, const ort::KernelInfo* info, bool calibrated);

}  // namespace act
