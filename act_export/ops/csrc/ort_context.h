// ONNX Runtime's C ABI in C++: errors become exceptions, handles are released, shapes are vectors.
#pragma once

#include <cstdint>
#include <cstdio>
#include <exception>
#include <functional>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention.h"
#include "ort_abi.h"

namespace act::ort {

// What the user got wrong: reported as an invalid argument. Any other exception is a failure.
class InvalidArgument : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

using Shape = std::vector<int64_t>;

inline std::string ToText(const char* text) { return text; }
inline std::string ToText(const std::string& text) { return text; }

inline std::string ToText(float number) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", static_cast<double>(number));
  return text;
}

template <typename Integer>
std::string ToText(Integer number) {
  return std::to_string(number);
}

// Not a string stream: those make the library need a far newer C library than the rest of it.
template <typename... Parts>
std::string Concatenate(const Parts&... parts) {
  return (std::string() + ... + ToText(parts));
}

inline std::string ToString(const Shape& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + ")";
}

inline void Check(const Api& api, Status* status) {
  if (status == nullptr) return;
  const std::string message = api.GetErrorMessage(status);
  api.ReleaseStatus(status);
  throw std::runtime_error(message);
}

// True where the call succeeded.
inline bool Succeeded(const Api& api, Status* status) {
  if (status == nullptr) return true;
  api.ReleaseStatus(status);
  return false;
}

// Runs `body`; no exception leaves it, each becomes a status whose message starts with the operator's name.
template <typename Body>
Status* Guard(const Api& api, const char* operator_name, const Body& body) noexcept {
  const auto status = [&](ErrorCode code, const char* what) {
    try {
      return api.CreateStatus(code, Concatenate(operator_name, ": ", what).c_str());
    } catch (...) {
      return api.CreateStatus(code, "out of memory");
    }
  };
  try {
    body();
    return nullptr;
  } catch (const InvalidArgument& error) {
    return status(kInvalidArgument, error.what());
  } catch (const std::bad_alloc&) {
    return status(kFail, "out of memory");
  } catch (const std::exception& error) {
    return status(kFail, error.what());
  } catch (...) {
    return status(kFail, "unknown error");
  }
}

// Attributes of one node. A read of an attribute that is missing returns false; of another type, it throws.
class Attributes {
 public:
  Attributes(const Api& api, const KernelInfo* info) : api_(api), info_(info) {}

  bool Read(const char* name, int64_t& value) const {
    return Succeeded(api_, api_.KernelInfoGetAttribute_int64(info_, name, &value)) || Missing(name, "an int");
  }

  bool Read(const char* name, float& value) const {
    return Succeeded(api_, api_.KernelInfoGetAttribute_float(info_, name, &value)) || Missing(name, "a float");
  }

  bool Read(const char* name, std::string& value) const {
    size_t size = 0;
    if (!Succeeded(api_, api_.KernelInfoGetAttribute_string(info_, name, nullptr, &size))) {
      return Missing(name, "a string");
    }
    std::vector<char> buffer(size + 1, '\0');
    Check(api_, api_.KernelInfoGetAttribute_string(info_, name, buffer.data(), &size));
    value = buffer.data();
    return true;
  }

  bool Read(const char* name, std::vector<int64_t>& values) const {
    return ReadArray(api_.KernelInfoGetAttributeArray_int64, name, values) || Missing(name, "ints");
  }

  bool Read(const char* name, std::vector<float>& values) const {
    return ReadArray(api_.KernelInfoGetAttributeArray_float, name, values) || Missing(name, "floats");
  }

  template <typename T>
  T Required(const char* name) const {
    T value{};
    if (!Read(name, value)) throw InvalidArgument(Concatenate("attribute ", name, " is missing"));
    return value;
  }

  template <typename T>
  T Optional(const char* name, T value) const {
    Read(name, value);
    return value;
  }

 private:
  template <typename Get, typename T>
  bool ReadArray(Get get, const char* name, std::vector<T>& values) const {
    size_t size = 0;
    if (!Succeeded(api_, get(info_, name, nullptr, &size))) return false;
    values.resize(size);
    if (size > 0) Check(api_, get(info_, name, values.data(), &size));
    return true;
  }

  // ONNX Runtime reports a missing attribute and one of another type alike: tell them apart by reading it as each type.
  bool Missing(const char* name, const char* expected) const {
    int64_t number;
    float real;
    size_t size = 0;
    if (Succeeded(api_, api_.KernelInfoGetAttribute_int64(info_, name, &number)) ||
        Succeeded(api_, api_.KernelInfoGetAttribute_float(info_, name, &real)) ||
        Succeeded(api_, api_.KernelInfoGetAttribute_string(info_, name, nullptr, &size)) ||
        Succeeded(api_, api_.KernelInfoGetAttributeArray_int64(info_, name, nullptr, &size)) ||
        Succeeded(api_, api_.KernelInfoGetAttributeArray_float(info_, name, nullptr, &size))) {
      throw InvalidArgument(
          Concatenate("attribute ", name, " has another type than expected: it has to be ", expected));
    }
    return false;
  }

  const Api& api_;
  const KernelInfo* info_;
};

template <typename T>
struct Tensor {
  T* data = nullptr;
  Shape shape;
};

// Inputs and outputs of one call of a kernel.
class Tensors {
 public:
  Tensors(const Api& api, KernelContext* context) : api_(api), context_(context) {}

  template <typename T>
  Tensor<const T> Input(size_t index) const {
    const Value* value = nullptr;
    Check(api_, api_.KernelContext_GetInput(context_, index, &value));
    if (value == nullptr) throw InvalidArgument(Concatenate("input ", index, " is not given"));
    TensorTypeAndShapeInfo* info = nullptr;
    Check(api_, api_.GetTensorTypeAndShape(value, &info));
    Tensor<const T> tensor;
    size_t rank = 0;
    Status* status = api_.GetDimensionsCount(info, &rank);
    if (status == nullptr) {
      tensor.shape.resize(rank);
      status = api_.GetDimensions(info, tensor.shape.data(), rank);
    }
    api_.ReleaseTensorTypeAndShapeInfo(info);
    Check(api_, status);
    tensor.data = static_cast<const T*>(Data(const_cast<Value*>(value)));
    return tensor;
  }

  template <typename T>
  T* Output(size_t index, const Shape& shape) const {
    Value* value = nullptr;
    Check(api_, api_.KernelContext_GetOutput(context_, index, shape.data(), shape.size(), &value));
    if (value == nullptr) throw InvalidArgument(Concatenate("output ", index, " is not given"));
    return static_cast<T*>(Data(value));
  }

 protected:
  const Api& api_;
  KernelContext* const context_;

 private:
  void* Data(Value* value) const {
    void* data = nullptr;
    Check(api_, api_.GetTensorMutableData(value, &data));
    return data;
  }
};

// Which of the session's allocators a kernel takes its scratch memory from: the arena of the CPU.
class ScratchMemory {
 public:
  explicit ScratchMemory(const Api& api) : api_(api) {
    Check(api, api.CreateMemoryInfo("Cpu", kArenaAllocator, 0, kMemoryDefault, &info_));
  }
  ~ScratchMemory() { api_.ReleaseMemoryInfo(info_); }
  ScratchMemory(const ScratchMemory&) = delete;
  ScratchMemory& operator=(const ScratchMemory&) = delete;

  const MemoryInfo* Info() const { return info_; }

 private:
  const Api& api_;
  MemoryInfo* info_ = nullptr;
};

// One call of a kernel on the CPU.
class Call final : public Host, public Tensors {
 public:
  Call(const Api& api, KernelContext* context, const ScratchMemory& scratch) : Tensors(api, context) {
    Check(api, api.KernelContext_GetAllocator(context, scratch.Info(), &allocator_));
  }
  ~Call() override { api_.ReleaseAllocator(allocator_); }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  // On the session's threads. The first exception of a body is thrown again here, after all have returned.
  void ParallelFor(int64_t count, const std::function<void(int64_t)>& body) override;
  // From the session's arena, which keeps what is freed: the next call takes no memory from the system.
  void* Allocate(size_t bytes) override {
    void* memory = nullptr;
    try {
      memory = allocator_->Alloc(allocator_, bytes);
    } catch (...) {
      // ONNX Runtime's own exception, of its own C++ runtime: it goes no further.
    }
    if (memory == nullptr) {
      throw std::runtime_error(Concatenate("out of memory: this call needs ", bytes, " bytes more beside its outputs"));
    }
    return memory;
  }
  void Free(void* memory) noexcept override { allocator_->Free(allocator_, memory); }

 private:
  Allocator* allocator_ = nullptr;
};

}  // namespace act::ort
