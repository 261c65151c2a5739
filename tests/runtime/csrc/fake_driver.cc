// A stand-in for NVIDIA's driver: answers what act_export/runtime/cuda_driver.py asks, as environment variables say.
#include <cstddef>
#include <cstdio>
#include <cstdlib>

namespace {

int Number(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr ? std::atoi(text) : otherwise;
}

constexpr int kInvalidValue = 1;
constexpr int kInvalidContext = 201;
constexpr std::size_t kMemoryBytes = 80000000000u;
constexpr std::size_t kFreeBytes = 79000000000u;

int retained = 0;
void* current = nullptr;

}  // namespace

extern "C" {

int cuInit(unsigned flags) { return flags == 0 ? Number("FAKE_CUDA_INIT", 0) : kInvalidValue; }

int cuDriverGetVersion(int* version) {
  *version = Number("FAKE_CUDA_VERSION", 13000);
  return 0;
}

int cuDeviceGetCount(int* count) {
  *count = Number("FAKE_CUDA_COUNT", 1);
  return 0;
}

int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal + 40;  // a handle, not the ordinal
  return 0;
}

int cuDeviceGetName(char* name, int length, int device) {
  std::snprintf(name, static_cast<std::size_t>(length), "Stand-in %d", device - 40);
  return 0;
}

int cuDeviceTotalMem_v2(std::size_t* bytes, int device) {
  *bytes = kMemoryBytes;
  return device >= 40 ? 0 : kInvalidValue;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  if (device < 40 || (attribute != 75 && attribute != 76)) return kInvalidValue;
  *value = attribute == 75 ? 9 : 0;
  return 0;
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = &retained;
  ++retained;
  return device >= 40 ? 0 : kInvalidValue;
}

int cuDevicePrimaryCtxRelease_v2(int) { return --retained >= 0 ? 0 : kInvalidContext; }

int cuCtxPushCurrent_v2(void* context) {
  current = context;
  return context == &retained ? 0 : kInvalidContext;
}

int cuCtxPopCurrent_v2(void** context) {
  *context = current;
  current = nullptr;
  return 0;
}

int cuMemGetInfo_v2(std::size_t* free_bytes, std::size_t* total) {
  *free_bytes = kFreeBytes;
  *total = kMemoryBytes;
  return current != nullptr ? 0 : kInvalidContext;
}

int cuGetErrorName(int code, const char** name) {
  *name = code == 999 ? "CUDA_ERROR_UNKNOWN" : nullptr;
  return code == 999 ? 0 : kInvalidValue;
}
}
