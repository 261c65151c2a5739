#include "attention_cuda_operator.h"

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention_cuda.h"
#include "attention_operator.h"
#include "device_memory.h"
#include "float16.h"
#include "ort_context.h"

namespace act::cuda {
namespace {

// Kernels read and write vectors of this many bytes.
constexpr uintptr_t kAlignment = 16;

// The allocator of the provider that a node is on, and its GPU.
class DeviceAllocator {
 public:
  DeviceAllocator(const ort::Api& api, const ort::KernelInfo* info) : api_(api) {
    ort::Check(api, api.KernelInfoGetAllocator(info, ort::kMemoryDefault, &allocator_));
    ort::Status* status = api.AllocatorGetInfo(allocator_, &info_);
    if (status == nullptr) status = api.MemoryInfoGetId(info_, &device_);
    if (status != nullptr) api.ReleaseAllocator(allocator_);
    ort::Check(api, status);
  }
  ~DeviceAllocator() { api_.ReleaseAllocator(allocator_); }
  DeviceAllocator(const DeviceAllocator&) = delete;
  DeviceAllocator& operator=(const DeviceAllocator&) = delete;

  const ort::MemoryInfo* Info() const { return info_; }
  int Device() const { return device_; }

 private:
  const ort::Api& api_;
  ort::Allocator* allocator_ = nullptr;
  const ort::MemoryInfo* info_ = nullptr;
  int device_ = 0;
};

Stream ComputeStream(const ort::Api& api, const ort::KernelContext* context) {
  void* stream = nullptr;
  ort::Check(api, api.KernelContext_GetGPUComputeStream(context, &stream));
  return static_cast<Stream>(stream);
}

// One call of a kernel on a GPU.
class Call final : public DeviceCall, public ort::Tensors {
 public:
  Call(const ort::Api& api, ort::KernelContext* context, const DeviceAllocator& memory, Kernels& kernels)
      : DeviceCall(ComputeStream(api, context), kernels), Tensors(api, context), info_(memory.Info()) {
    ort::Check(api, api.KernelContext_GetAllocator(context, info_, &allocator_));
  }
  ~Call() override { api_.ReleaseAllocator(allocator_); }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  void* Allocate(size_t bytes) override {
    void* memory = nullptr;
    if (allocator_->version >= ort::kSyncStreamVersion) {
      memory = ort::AllocateOnStream(api_, context_, allocator_, bytes);
    } else {
      // An older runtime ends the process here where there is no memory.
      ort::Check(api_, api_.KernelContext_GetScratchBuffer(context_, info_, bytes, &memory));
    }
    if (memory == nullptr) {
      throw std::runtime_error(
          ort::Concatenate("out of GPU memory: this call needs ", bytes, " bytes beside its outputs"));
    }
    return memory;
  }
  void Free(void* memory) noexcept override { allocator_->Free(allocator_, memory); }

 private:
  const ort::MemoryInfo* info_;
  ort::Allocator* allocator_ = nullptr;
};

// What kernels read of a node's attributes, on its GPU: one copy for all its calls.
class Constants {
 public:
  Constants(const AttentionAttributes& attributes, Context context)
      : heads_(static_cast<size_t>(attributes.num_heads)),
        calibrated_(static_cast<size_t>(attributes.calibrated_count)),
        copy_(context, Pack(attributes)) {}

  DeviceConstants Pointers() const {
    const char* index = copy_.Data();
    const char* calibrated = index + heads_ * sizeof(int32_t);
    const char* sink_logits = calibrated + calibrated_ * sizeof(int32_t);
    return {reinterpret_cast<const int32_t*>(index), reinterpret_cast<const int32_t*>(calibrated),
            reinterpret_cast<const float*>(sink_logits)};
  }

 private:
  // Index of every head, calibrated heads, sink logit of every head: 4 bytes each.
  static std::vector<char> Pack(const AttentionAttributes& attributes) {
    std::vector<int32_t> index(static_cast<size_t>(attributes.num_heads), -1);
    std::vector<int32_t> calibrated(static_cast<size_t>(attributes.calibrated_count));
    for (size_t head = 0; head < attributes.calibrated_index.size(); ++head) {
      index[head] = static_cast<int32_t>(attributes.calibrated_index[head]);
      if (index[head] >= 0) calibrated[static_cast<size_t>(index[head])] = static_cast<int32_t>(head);
    }
    std::vector<char> packed;
    const auto append = [&](const auto& values) {
      const char* bytes = reinterpret_cast<const char*>(values.data());
      packed.insert(packed.end(), bytes, bytes + values.size() * sizeof(values[0]));
    };
    append(index);
    append(calibrated);
    const std::vector<float>& sinks = attributes.sink_logits;
    append(SinkLogitsOfKernels(sinks.empty() ? nullptr : sinks.data(), attributes.num_heads));
    return packed;
  }

  size_t heads_;
  size_t calibrated_;
  DeviceCopy copy_;
};

void ExpectAligned(const char* name, const void* memory, int64_t elements) {
  if (elements == 0 || reinterpret_cast<uintptr_t>(memory) % kAlignment == 0) return;
  throw ort::InvalidArgument(ort::Concatenate(name, " begins at an address that is not a multiple of ", kAlignment,
                                              " bytes, which the CUDA kernels need: bind memory that is"));
}

template <typename T>
void ExpectAligned(const AttentionArguments<T>& a) {
  const int64_t rows = a.batch * a.sequence;
  const int64_t past = a.batch * a.kv_num_heads * a.past_capacity;
  const int64_t present = a.batch * a.kv_num_heads * a.present_capacity;
  ExpectAligned("query", a.query, rows);
  ExpectAligned("key", a.key, rows);
  ExpectAligned("value", a.value, rows);
  ExpectAligned("past_key", a.past_key, past);
  ExpectAligned("past_value", a.past_value, past);
  ExpectAligned("output", a.output, rows);
  ExpectAligned("present_key", a.present_key, present);
  ExpectAligned("present_value", a.present_value, present);
}

template <typename T>
class CudaNode final : public Node {
 public:
  CudaNode(const ort::Api& api, const ort::KernelInfo* info, bool calibrated)
      : api_(api),
        attributes_(ort::Attributes(api, info), calibrated),
        allocator_(api, info),
        kernels_(Kernels::ForDevice(allocator_.Device())),
        constants_(attributes_, kernels_.context()) {}

  void Run(ort::KernelContext* context) const override {
    const CurrentContext current(kernels_.context());
    Call call(api_, context, allocator_, kernels_);
    const AttentionArguments<T> arguments = ReadArguments<T>(attributes_, call);
    ExpectAligned(arguments);
    Attention(arguments, constants_.Pointers(), call);
  }

 private:
  const ort::Api& api_;
  const AttentionAttributes attributes_;
  const DeviceAllocator allocator_;
  Kernels& kernels_;
  const Constants constants_;
};

}  // namespace

template <typename T>
std::unique_ptr<Node> MakeNode(const ort::Api& api, const ort::KernelInfo* info, bool calibrated) {
  return std::make_unique<CudaNode<T>>(api, info, calibrated);
}

template NodeMaker MakeNode<float>;
template NodeMaker MakeNode<Float16>;
template NodeMaker MakeNode<BFloat16>;

}  // namespace act::cuda
