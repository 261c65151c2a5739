// The CUDA side of the library as C functions for tests: no ONNX Runtime, device memory from the driver. A function
// returns 0, or 1 with the message of what was thrown in `error`.
#include <cstdint>
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention.h"
#include "attention_cuda.h"
#include "cuda_driver.h"
#include "cuda_kernels.h"
#include "float16.h"
#include "test_host.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using act::cuda::Address;
using act::cuda::CurrentContext;
using act::cuda::DeviceCopy;
using act::cuda::Driver;
using act::cuda::Kernels;

constexpr size_t kErrorSize = 1024;

template <typename Body>
int Guard(char* error, const Body& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& thrown) {
    std::snprintf(error, kErrorSize, "%s", thrown.what());
  }
  return 1;
}

class DriverCall final : public act::cuda::DeviceCall {
 public:
  using DeviceCall::DeviceCall;

  void* Allocate(size_t bytes) override {
    const Driver& driver = Driver::Get();
    Address address = 0;
    driver.Check(driver.cuMemAlloc_v2(&address, bytes), "allocating " + std::to_string(bytes) + " bytes");
    return reinterpret_cast<void*>(address);
  }
  void Free(void* memory) noexcept override { Driver::Get().cuMemFree_v2(reinterpret_cast<Address>(memory)); }
};

template <typename T>
std::vector<char> Bytes(const T* values, int64_t count) {
  const char* bytes = reinterpret_cast<const char*>(values);
  return std::vector<char>(bytes, bytes + count * static_cast<int64_t>(sizeof(T)));
}

}  // namespace

// AttentionArguments, field by field; `calibrated_heads` and `sink_logits` are host memory, the tensors device memory.
// The same fields in the same order are in tests/ops/cuda/fake_driver.py.
struct AttentionCall {
  int64_t batch, sequence, total, past_capacity, present_capacity, num_heads, kv_num_heads, head_size, value_head_size;
  const void *query, *key, *value, *past_key, *past_value, *past_sink_scores, *attention_mask, *calibration;
  void *output, *present_key, *present_value, *present_sink_scores;
  float scale, softcap;
  int64_t sliding_window, calibrations, calibrated_count;
  const int32_t* calibrated_heads;
  const float* sink_logits;  // null: none
  int32_t relative_threshold;
};

namespace {

template <typename T>
act::AttentionArguments<T> Arguments(const AttentionCall& c) {
  act::AttentionArguments<T> a;
  a.batch = c.batch;
  a.sequence = c.sequence;
  a.total = c.total;
  a.past_capacity = c.past_capacity;
  a.present_capacity = c.present_capacity;
  a.num_heads = c.num_heads;
  a.kv_num_heads = c.kv_num_heads;
  a.head_size = c.head_size;
  a.value_head_size = c.value_head_size;
  a.query = static_cast<const T*>(c.query);
  a.key = static_cast<const T*>(c.key);
  a.value = static_cast<const T*>(c.value);
  a.past_key = static_cast<const T*>(c.past_key);
  a.past_value = static_cast<const T*>(c.past_value);
  a.past_sink_scores = static_cast<const float*>(c.past_sink_scores);
  a.attention_mask = static_cast<const int64_t*>(c.attention_mask);
  a.output = static_cast<T*>(c.output);
  a.present_key = static_cast<T*>(c.present_key);
  a.present_value = static_cast<T*>(c.present_value);
  a.present_sink_scores = static_cast<float*>(c.present_sink_scores);
  a.scale = c.scale;
  a.softcap = c.softcap;
  a.sliding_window = c.sliding_window;
  a.calibrated_count = c.calibrated_count;
  a.calibration = static_cast<const act::Strengths*>(c.calibration);
  a.calibrations = c.calibrations;
  a.relative_threshold = c.relative_threshold != 0;
  return a;
}

template <typename T>
void Run(const AttentionCall& c, int device) {
  const act::AttentionArguments<T> a = Arguments<T>(c);
  Kernels& kernels = Kernels::ForDevice(device);
  const CurrentContext current(kernels.context());
  std::vector<int32_t> index(static_cast<size_t>(c.num_heads), -1);
  for (int32_t i = 0; i < c.calibrated_count; ++i) index.at(static_cast<size_t>(c.calibrated_heads[i])) = i;
  // One element at least: there are no empty allocations.
  const int64_t count = c.calibrated_count;
  const DeviceCopy device_index(kernels.context(), Bytes(index.data(), c.num_heads));
  const DeviceCopy device_heads(kernels.context(), count > 0 ? Bytes(c.calibrated_heads, count) : std::vector<char>(4));
  const std::vector<float> sinks = act::cuda::SinkLogitsOfKernels(c.sink_logits, c.num_heads);
  const DeviceCopy device_sinks(kernels.context(), Bytes(sinks.data(), c.num_heads));
  act::cuda::DeviceConstants constants;
  constants.calibrated_index = reinterpret_cast<const int32_t*>(device_index.Data());
  constants.calibrated_heads = reinterpret_cast<const int32_t*>(device_heads.Data());
  constants.sink_logits = reinterpret_cast<const float*>(device_sinks.Data());

  DriverCall call(nullptr, kernels);
  act::cuda::Attention(a, constants, call);
}

// The plain kernel on the same memory.
template <typename T>
void RunPlain(const AttentionCall& c) {
  act::AttentionArguments<T> a = Arguments<T>(c);
  std::vector<int64_t> index(static_cast<size_t>(c.num_heads), -1);
  for (int64_t i = 0; i < c.calibrated_count; ++i) index.at(static_cast<size_t>(c.calibrated_heads[i])) = i;
  a.calibrated_index = index.data();
  a.sink_logits = c.sink_logits;
  act::test::TestHost host;
  act::plain::Attention(a, host);
}

}  // namespace

// `type`: 1 float32, 10 float16, 16 bfloat16, as in ONNX.
EXPORT int ActCudaAttention(int device, int type, const AttentionCall* call, char* error) {
  return Guard(error, [&] {
    if (type == 1) return Run<float>(*call, device);
    if (type == 10) return Run<act::Float16>(*call, device);
    if (type == 16) return Run<act::BFloat16>(*call, device);
    throw std::logic_error("type " + std::to_string(type));
  });
}

EXPORT int ActPlainAttention(int type, const AttentionCall* call, char* error) {
  return Guard(error, [&] {
    if (type == 1) return RunPlain<float>(*call);
    if (type == 10) return RunPlain<act::Float16>(*call);
    if (type == 16) return RunPlain<act::BFloat16>(*call);
    throw std::logic_error("type " + std::to_string(type));
  });
}

EXPORT int ActCudaFind(int device, const char* kernel, char* error) {
  return Guard(error, [&] { Kernels::ForDevice(device).Find(kernel); });
}

EXPORT int ActCudaMultiprocessors(int device, int* count, char* error) {
  return Guard(error, [&] { *count = Kernels::ForDevice(device).multiprocessors(); });
}

// Launches a kernel with parameters "pilf".
EXPORT int ActCudaLaunch(int device, const char* kernel, const unsigned* grid, void* stream, const void* pointer,
                         int32_t number, int64_t large_number, float real, char* error) {
  return Guard(error, [&] {
    Kernels& kernels = Kernels::ForDevice(device);
    const CurrentContext current(kernels.context());
    act::cuda::Launch(kernels.Find(kernel), {grid[0], grid[1], grid[2]}, static_cast<act::cuda::Stream>(stream),
                      {pointer, number, large_number, real});
  });
}
