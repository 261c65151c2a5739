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
#include "device_memory.h"
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

// Memory from the driver, freed as soon as the operator lets it go.
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

// Memory that the caller has: nothing is allocated in a call, so that a stream may be captured into a graph.
class GivenCall final : public act::cuda::DeviceCall {
 public:
  GivenCall(act::cuda::Stream stream, Kernels& kernels, void* memory, size_t bytes)
      : DeviceCall(stream, kernels), memory_(memory), bytes_(bytes) {}

  void* Allocate(size_t bytes) override {
    if (bytes > bytes_) {
      throw std::runtime_error("the call needs " + std::to_string(bytes) + " bytes, not " + std::to_string(bytes_));
    }
    return memory_;
  }
  void Free(void*) noexcept override {}

 private:
  void* memory_;
  size_t bytes_;
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

// A node: what kernels read of its attributes is on the GPU.
class Node {
 public:
  Node(const AttentionCall& c, int device, int type)
      : type_(type),
        kernels_(Kernels::ForDevice(device)),
        index_(kernels_.context(), Index(c)),
        // One element at least: there are no empty allocations.
        heads_(kernels_.context(),
               c.calibrated_count > 0 ? Bytes(c.calibrated_heads, c.calibrated_count) : std::vector<char>(4)),
        sinks_(kernels_.context(),
               Bytes(act::cuda::SinkLogitsOfKernels(c.sink_logits, c.num_heads).data(), c.num_heads)) {}

  Kernels& kernels() const { return kernels_; }

  void Run(const AttentionCall& c, act::cuda::DeviceCall& call) const {
    const CurrentContext current(kernels_.context());
    act::cuda::DeviceConstants constants;
    constants.calibrated_index = reinterpret_cast<const int32_t*>(index_.Data());
    constants.calibrated_heads = reinterpret_cast<const int32_t*>(heads_.Data());
    constants.sink_logits = reinterpret_cast<const float*>(sinks_.Data());
    if (type_ == 1) return act::cuda::Attention(Arguments<float>(c), constants, call);
    if (type_ == 10) return act::cuda::Attention(Arguments<act::Float16>(c), constants, call);
    if (type_ == 16) return act::cuda::Attention(Arguments<act::BFloat16>(c), constants, call);
    throw std::logic_error("type " + std::to_string(type_));
  }

 private:
  static std::vector<char> Index(const AttentionCall& c) {
    std::vector<int32_t> index(static_cast<size_t>(c.num_heads), -1);
    for (int32_t i = 0; i < c.calibrated_count; ++i) index.at(static_cast<size_t>(c.calibrated_heads[i])) = i;
    return Bytes(index.data(), c.num_heads);
  }

  int type_;
  Kernels& kernels_;
  DeviceCopy index_, heads_, sinks_;
};

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

// A call in a stream, with memory from the driver. `type`: 1 float32, 10 float16, 16 bfloat16, as in ONNX.
EXPORT int ActCudaAttention(int device, int type, void* stream, const AttentionCall* call, char* error) {
  return Guard(error, [&] {
    const Node node(*call, device, type);
    const CurrentContext current(node.kernels().context());
    DriverCall in_stream(static_cast<act::cuda::Stream>(stream), node.kernels());
    node.Run(*call, in_stream);
  });
}

// The same in parts, for a program that times calls or captures them: a node of these heads and sink logits, and a call
// of it with the caller's memory, which is at a multiple of 256 bytes.
EXPORT int ActCudaCreate(int device, int type, const AttentionCall* call, void** node, char* error) {
  return Guard(error, [&] { *node = new Node(*call, device, type); });
}

EXPORT int ActCudaRun(const void* node, const AttentionCall* call, void* stream, void* scratch, int64_t bytes,
                      char* error) {
  return Guard(error, [&] {
    const Node& made = *static_cast<const Node*>(node);
    GivenCall in_stream(static_cast<act::cuda::Stream>(stream), made.kernels(), scratch, static_cast<size_t>(bytes));
    made.Run(*call, in_stream);
  });
}

EXPORT void ActCudaDestroy(void* node) { delete static_cast<Node*>(node); }

EXPORT int ActPlainAttention(int type, const AttentionCall* call, char* error) {
  return Guard(error, [&] {
    if (type == 1) return RunPlain<float>(*call);
    if (type == 10) return RunPlain<act::Float16>(*call);
    if (type == 16) return RunPlain<act::BFloat16>(*call);
    throw std::logic_error("type " + std::to_string(type));
  });
}

// Loads a kernel; `target`, of 16 bytes, says which image was taken: "sm_90", ..., "ptx".
EXPORT int ActCudaFind(int device, const char* kernel, char* target, char* error) {
  return Guard(error, [&] { std::snprintf(target, 16, "%s", Kernels::ForDevice(device).Find(kernel).target.c_str()); });
}

// Names of all kernels that were loaded, with spaces between; to be asked where they are few.
EXPORT int ActCudaLoaded(char* error) {
  return Guard(error, [&] {
    std::string names;
    for (const auto& loaded : Kernels::AllLoaded().targets) names += loaded.first + " ";
    std::snprintf(error, kErrorSize, "%s", names.c_str());
  });
}

// Why the driver took no better image of some kernel; empty where it took the best of each.
EXPORT int ActCudaRefused(char* error) {
  return Guard(error, [&] { std::snprintf(error, kErrorSize, "%s", Kernels::AllLoaded().refused.c_str()); });
}

EXPORT int ActCudaMultiprocessors(int device, int* count, char* error) {
  return Guard(error, [&] { *count = Kernels::ForDevice(device).multiprocessors(); });
}

// Which of an allocator's functions ONNX Runtime is asked for memory by: "Alloc", "AllocOnStream", or "null" where that
// has none or throws. `streams`: the call has a stream; `knows`: the allocator knows of streams.
EXPORT const char* ActAllocatesBy(bool streams, bool knows, bool throws) {
  static bool has_stream, fails;
  has_stream = streams;
  fails = throws;
  act::ort::Api api{};
  api.KernelContext_GetSyncStream = [](const act::ort::KernelContext*, act::ort::SyncStream** out) {
    static char stream;
    *out = has_stream ? reinterpret_cast<act::ort::SyncStream*>(&stream) : nullptr;
    return static_cast<act::ort::Status*>(nullptr);
  };
  act::ort::Allocator allocator{};
  allocator.Alloc = [](act::ort::Allocator*, size_t) -> void* {
    if (fails) throw std::runtime_error("no memory");
    return const_cast<char*>("Alloc");
  };
  if (knows) {
    allocator.AllocOnStream = [](act::ort::Allocator*, size_t, act::ort::SyncStream* stream) -> void* {
      if (fails) throw std::runtime_error("no memory");
      return stream == nullptr ? nullptr : const_cast<char*>("AllocOnStream");
    };
  }
  const void* memory = act::ort::AllocateOnStream(api, nullptr, &allocator, 1);
  return memory == nullptr ? "null" : static_cast<const char*>(memory);
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
