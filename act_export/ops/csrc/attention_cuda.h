// The operators on a GPU: the same arguments as on the CPU, in device memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "attention.h"
#include "cuda_kernels.h"

namespace act::cuda {

// What a call needs of the program it runs in.
class DeviceCall {
 public:
  DeviceCall(Stream stream, Kernels& kernels) : stream(stream), kernels(kernels) {}
  virtual ~DeviceCall() = default;

  // Device memory, aligned to 256 bytes, never null: throws where there is none.
  virtual void* Allocate(size_t bytes) = 0;
  // As soon as the last launch that uses it is in the stream: what comes after it there may have the memory.
  virtual void Free(void* memory) noexcept = 0;

  const Stream stream;
  Kernels& kernels;
};

// What AttentionArguments has of a node in host memory, in device memory.
struct DeviceConstants {
  const int32_t* calibrated_index = nullptr;  // (num_heads): index among the calibrated heads, or -1
  const int32_t* calibrated_heads = nullptr;  // (calibrated_count)
  const float* sink_logits = nullptr;         // (num_heads), of SinkLogitsOfKernels
};

// The learned sinks of a node, or null for none, as kernels take them: in base 2, -infinity for a head without one.
std::vector<float> SinkLogitsOfKernels(const float* sink_logits, int64_t num_heads);

// Enqueues one call and returns; nothing waits for the GPU. Pointers of `arguments` are device pointers, aligned to 16
// bytes but for the sink scores, the mask and the calibration; its calibrated_index and sink_logits are not used.
// Nobody here sees the calibration's values: kernels take the nearest in range for one that is out of it. T: float,
// Float16, BFloat16.
template <typename T>
void Attention(const AttentionArguments<T>& arguments, const DeviceConstants& constants, DeviceCall& call);

}  // namespace act::cuda
