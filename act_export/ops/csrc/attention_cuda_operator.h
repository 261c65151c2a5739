// The operators as nodes of ONNX Runtime's CUDA provider.
#pragma once

#include <memory>

#include "node.h"

namespace act::cuda {

constexpr char kProvider[] = "CUDAExecutionProvider";

// A node on the GPU of its session. Throws where that GPU can't run it. T: float, Float16 or BFloat16.
template <typename T>
std::unique_ptr<Node> MakeNode(const ort::Api& api, const ort::KernelInfo* info, bool calibrated);

}  // namespace act::cuda
