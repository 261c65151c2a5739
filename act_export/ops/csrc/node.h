// A node of a graph, as ONNX Runtime makes, runs and frees it.
#pragma once

#include <memory>

#include "ort_abi.h"

namespace act {

class Node {
 public:
  virtual ~Node() = default;
  // One call. Several may be under way at a time, on any threads.
  virtual void Run(ort::KernelContext* context) const = 0;
};

// Reads the attributes of a node. `calibrated`: of `CalibratedAttention`, otherwise of `Attention`.
using NodeMaker = std::unique_ptr<Node>(const ort::Api& api, const ort::KernelInfo* info, bool calibrated);

}  // namespace act
