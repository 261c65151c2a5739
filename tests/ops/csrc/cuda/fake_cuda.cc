// Stands in for libcuda.so.1 on a machine without a GPU, as far as act_export/ops/csrc/cuda_driver.h goes: device
// memory is host memory, streams are done at once, and a launch calls a function of the test. It is as strict as the
// driver: limits of launches, contexts, images for other GPUs.
//
// An image is text, "fake kernel NAME TARGET", TARGET being sm_80, sm_90, .. or ptx. One with "damaged" behind it
// loads, but has no code that runs.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

enum Result {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kInvalidDevice = 101,
  kInvalidImage = 200,
  kInvalidContext = 201,
  kNoBinaryForGpu = 209,
  kInvalidHandle = 400,
  kNotFound = 500,
  kLaunchFailed = 719,
};

const std::map<int, std::pair<const char*, const char*>> kErrors = {
    {kInvalidValue, {"CUDA_ERROR_INVALID_VALUE", "invalid argument"}},
    {kOutOfMemory, {"CUDA_ERROR_OUT_OF_MEMORY", "out of memory"}},
    {kInvalidDevice, {"CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"}},
    {kInvalidImage, {"CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"}},
    {kInvalidContext, {"CUDA_ERROR_INVALID_CONTEXT", "invalid device context"}},
    {kNoBinaryForGpu, {"CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"}},
    {kInvalidHandle, {"CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"}},
    {kNotFound, {"CUDA_ERROR_NOT_FOUND", "named symbol not found"}},
    {kLaunchFailed, {"CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"}},
};

#ifdef FAKE_CUDA_11
constexpr int kVersion = 11080;
#else
constexpr int kVersion = 12000;
#endif

constexpr unsigned kMostThreads = 1024;
constexpr unsigned kMostBlocksX = 2147483647;
constexpr unsigned kMostBlocksYZ = 65535;
constexpr int kPlainSharedBytes = 48 * 1024;
constexpr size_t kAlignment = 256;
constexpr int kFreshByte = 0xFF;  // of memory that nothing has been written to: not a number

struct Device {
  int ordinal;
  int major;
  int minor;
  int multiprocessors;
  int most_shared_bytes;
};

struct Kernel {
  std::string name;
  std::string target;
  bool is_damaged = false;
  int shared_bytes = kPlainSharedBytes;  // that a launch may ask for
  bool is_function = false;              // its code was asked for
};

using OnLaunch = int (*)(const char* name, const char* target, const unsigned* grid, unsigned threads, unsigned shared,
                         void* stream, void** parameters);

struct State {
  std::mutex mutex;
  std::vector<std::unique_ptr<Device>> devices;
  std::vector<std::unique_ptr<Kernel>> kernels;
  std::map<uintptr_t, size_t> memory;
  int64_t allocations_left = INT64_MAX;
  OnLaunch on_launch = nullptr;
  std::string refused;  // a kernel whose images have no code
  bool started = false;
};

State& TheState() {
  static State& state = *new State();
  return state;
}

// A context is its device.
thread_local std::vector<Device*> contexts;

Device* Current() { return contexts.empty() ? nullptr : contexts.back(); }

bool Runs(const std::string& target, const Device& device) {
  if (target == "ptx") return true;
  const int number = std::atoi(target.c_str() + std::strlen("sm_"));
  const int capability = 10 * device.major + device.minor;
  if (number >= 90) return number == capability;  // as of sm_90a
  return number / 10 == device.major && number <= capability;
}

Kernel* AsKernel(void* handle) {
  for (const auto& kernel : TheState().kernels) {
    if (kernel.get() == handle) return kernel.get();
  }
  return nullptr;
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// For the test.

EXPORT void FakeCudaAddDevice(int major, int minor, int multiprocessors, int most_shared_bytes) {
  State& state = TheState();
  const std::lock_guard<std::mutex> lock(state.mutex);
  const int ordinal = static_cast<int>(state.devices.size());
  state.devices.push_back(std::make_unique<Device>(Device{ordinal, major, minor, multiprocessors, most_shared_bytes}));
}

EXPORT void FakeCudaOnLaunch(OnLaunch on_launch) { TheState().on_launch = on_launch; }

// From now on images of this kernel load, but have no code that runs; "" for none.
EXPORT void FakeCudaRefuse(const char* kernel) { TheState().refused = kernel; }

// From now on that many succeed.
EXPORT void FakeCudaFailAllocations(int64_t after) { TheState().allocations_left = after; }

EXPORT int64_t FakeCudaLiveAllocations() { return static_cast<int64_t>(TheState().memory.size()); }

// How often an image was loaded.
EXPORT int64_t FakeCudaLoads() { return static_cast<int64_t>(TheState().kernels.size()); }

// Which allocation an address is in: its first address; 0 for none.
EXPORT uint64_t FakeCudaAllocation(uint64_t address) {
  State& state = TheState();
  const std::lock_guard<std::mutex> lock(state.mutex);
  auto after = state.memory.upper_bound(address);
  if (after == state.memory.begin()) return 0;
  const auto found = std::prev(after);
  return address < found->first + found->second ? found->first : 0;
}

// Contexts of the calling thread.
EXPORT int64_t FakeCudaContexts() { return static_cast<int64_t>(contexts.size()); }

// ---------------------------------------------------------------------------------------------------------------------
// The driver.

// With FAKE_CUDA_DEVICE in the environment there is a device of compute capability 9.0, whose launches do nothing.
EXPORT int cuInit(unsigned flags) {
  State& state = TheState();
  if (flags != 0) return kInvalidValue;
  if (!state.started && std::getenv("FAKE_CUDA_DEVICE") != nullptr) {
    FakeCudaAddDevice(9, 0, 132, 227 * 1024);
    state.on_launch = [](const char*, const char*, const unsigned*, unsigned, unsigned, void*, void**) { return 0; };
  }
  state.started = true;
  return kSuccess;
}

EXPORT int cuDriverGetVersion(int* version) {
  *version = kVersion;
  return kSuccess;
}

EXPORT int cuGetErrorName(int result, const char** name) {
  const auto found = kErrors.find(result);
  if (found == kErrors.end()) return kInvalidValue;
  *name = found->second.first;
  return kSuccess;
}

EXPORT int cuGetErrorString(int result, const char** text) {
  const auto found = kErrors.find(result);
  if (found == kErrors.end()) return kInvalidValue;
  *text = found->second.second;
  return kSuccess;
}

EXPORT int cuDeviceGet(int* device, int ordinal) {
  State& state = TheState();
  if (!state.started || ordinal < 0 || ordinal >= static_cast<int>(state.devices.size())) return kInvalidDevice;
  *device = ordinal;
  return kSuccess;
}

EXPORT int cuDeviceGetAttribute(int* value, int attribute, int ordinal) {
  const Device& device = *TheState().devices.at(ordinal);
  switch (attribute) {
    case 16:
      *value = device.multiprocessors;
      return kSuccess;
    case 75:
      *value = device.major;
      return kSuccess;
    case 76:
      *value = device.minor;
      return kSuccess;
    case 97:
      *value = device.most_shared_bytes;
      return kSuccess;
    default:
      return kInvalidValue;
  }
}

EXPORT int cuDeviceGetName(char* name, int size, int) {
  std::snprintf(name, static_cast<size_t>(size), "Stand-in");
  return kSuccess;
}

EXPORT int cuDevicePrimaryCtxRetain(void** context, int ordinal) {
  *context = TheState().devices.at(ordinal).get();
  return kSuccess;
}

EXPORT int cuCtxGetCurrent(void** context) {
  *context = Current();
  return kSuccess;
}

EXPORT int cuCtxPushCurrent_v2(void* context) {
  contexts.push_back(static_cast<Device*>(context));
  return kSuccess;
}

EXPORT int cuCtxPopCurrent_v2(void** context) {
  if (contexts.empty()) return kInvalidContext;
  *context = Current();
  contexts.pop_back();
  return kSuccess;
}

EXPORT int cuStreamSynchronize(void*) { return Current() == nullptr ? kInvalidContext : kSuccess; }

EXPORT int cuMemAlloc_v2(unsigned long long* address, size_t bytes) {
  State& state = TheState();
  const std::lock_guard<std::mutex> lock(state.mutex);
  if (Current() == nullptr) return kInvalidContext;
  if (bytes == 0) return kInvalidValue;
  if (state.allocations_left == 0) return kOutOfMemory;
  --state.allocations_left;
  const size_t size = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  void* memory = std::aligned_alloc(kAlignment, size);
  if (memory == nullptr) return kOutOfMemory;
  std::memset(memory, kFreshByte, size);
  state.memory[reinterpret_cast<uintptr_t>(memory)] = bytes;
  *address = reinterpret_cast<uintptr_t>(memory);
  return kSuccess;
}

EXPORT int cuMemFree_v2(unsigned long long address) {
  State& state = TheState();
  const std::lock_guard<std::mutex> lock(state.mutex);
  if (Current() == nullptr) return kInvalidContext;
  if (state.memory.erase(address) == 0) return kInvalidValue;
  std::free(reinterpret_cast<void*>(address));
  return kSuccess;
}

EXPORT int cuMemcpyHtoD_v2(unsigned long long to, const void* from, size_t bytes) {
  State& state = TheState();
  const std::lock_guard<std::mutex> lock(state.mutex);
  const auto found = state.memory.find(to);
  if (found == state.memory.end() || bytes > found->second) return kInvalidValue;
  std::memcpy(reinterpret_cast<void*>(to), from, bytes);
  return kSuccess;
}

EXPORT int cuMemcpyDtoH_v2(void* to, unsigned long long from, size_t bytes) {
  State& state = TheState();
  const std::lock_guard<std::mutex> lock(state.mutex);
  const auto found = state.memory.find(from);
  if (found == state.memory.end() || bytes > found->second) return kInvalidValue;
  std::memcpy(to, reinterpret_cast<void*>(from), bytes);
  return kSuccess;
}

#ifndef FAKE_CUDA_11
#ifndef FAKE_CUDA_WITHOUT_MAPS
// A map as it is given, as 16 numbers: a mark, type, address, two sizes, stride, box, steps and options. In order to be
// as strict as the driver, only matrices of 16 bits.
EXPORT int cuTensorMapEncodeTiled(uint64_t* map, int type, unsigned rank, void* address, const uint64_t* sizes,
                                  const uint64_t* stride_bytes, const unsigned* box, const unsigned* steps,
                                  int interleave, int swizzle, int promotion, int fill) {
  constexpr uint64_t kMark = 0x5041'4D54;
  const auto start = reinterpret_cast<uintptr_t>(address);
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0 || start % 16 != 0 || start == 0 || rank != 2) return kInvalidValue;
  if ((type != 6 && type != 9) || stride_bytes[0] % 16 != 0 || stride_bytes[0] < 2 * sizes[0]) return kInvalidValue;
  for (int i = 0; i < 2; ++i) {
    if (sizes[i] == 0 || sizes[i] > UINT32_MAX + 1ull || box[i] == 0 || box[i] > 256) return kInvalidValue;
    if (steps[i] != 1) return kInvalidValue;
  }
  if (swizzle != 3 || 2 * box[0] > 128 || 2 * box[0] % 16 != 0) return kInvalidValue;
  const uint64_t numbers[16] = {kMark,
                                static_cast<uint64_t>(type),
                                start,
                                sizes[0],
                                sizes[1],
                                stride_bytes[0],
                                box[0],
                                box[1],
                                static_cast<uint64_t>(interleave),
                                static_cast<uint64_t>(swizzle),
                                static_cast<uint64_t>(promotion),
                                static_cast<uint64_t>(fill)};
  std::memcpy(map, numbers, sizeof(numbers));
  return kSuccess;
}

#endif

EXPORT int cuLibraryLoadData(void** library, const void* image, int*, void**, unsigned, int*, void**, unsigned) {
  State& state = TheState();
  const std::lock_guard<std::mutex> lock(state.mutex);
  char name[128];
  char target[16];
  char damage[16] = "";
  if (std::sscanf(static_cast<const char*>(image), "fake kernel %127s %15s %15s", name, target, damage) < 2) {
    return kInvalidImage;
  }
  if (Current() == nullptr) return kInvalidContext;
  if (!Runs(target, *Current())) return kNoBinaryForGpu;
  state.kernels.push_back(std::make_unique<Kernel>(Kernel{name, target, damage[0] != 0 || name == state.refused}));
  *library = state.kernels.back().get();
  return kSuccess;
}

// The symbol of a placeholder is the first part of its name.
EXPORT int cuLibraryGetKernel(void** handle, void* library, const char* symbol) {
  const std::lock_guard<std::mutex> lock(TheState().mutex);
  const Kernel* kernel = AsKernel(library);
  if (kernel == nullptr) return kInvalidHandle;
  if (kernel->name.substr(0, kernel->name.find('.')) != symbol) return kNotFound;
  *handle = library;
  return kSuccess;
}

EXPORT int cuKernelGetFunction(void** function, void* handle) {
  const std::lock_guard<std::mutex> lock(TheState().mutex);
  Kernel* kernel = AsKernel(handle);
  if (kernel == nullptr) return kInvalidHandle;
  if (Current() == nullptr) return kInvalidContext;
  if (kernel->is_damaged) return kInvalidImage;
  kernel->is_function = true;
  *function = handle;
  return kSuccess;
}

EXPORT int cuKernelSetAttribute(int attribute, int value, void* handle, int ordinal) {
  const std::lock_guard<std::mutex> lock(TheState().mutex);
  Kernel* kernel = AsKernel(handle);
  if (kernel == nullptr) return kInvalidHandle;
  if (attribute != 8 || value > TheState().devices.at(ordinal)->most_shared_bytes) return kInvalidValue;
  kernel->shared_bytes = value;
  return kSuccess;
}
#endif

EXPORT int cuLaunchKernel(void* handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                          unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** parameters,
                          void** extra) {
  State& state = TheState();
  Kernel kernel;
  {
    const std::lock_guard<std::mutex> lock(state.mutex);
    if (Current() == nullptr) return kInvalidContext;
    const Kernel* found = AsKernel(handle);
    if (found == nullptr || !found->is_function) return kInvalidHandle;
    kernel = *found;
  }
  if (grid_x == 0 || grid_y == 0 || grid_z == 0 || block_x == 0 || block_y != 1 || block_z != 1) return kInvalidValue;
  if (grid_x > kMostBlocksX || grid_y > kMostBlocksYZ || grid_z > kMostBlocksYZ) return kInvalidValue;
  if (block_x > kMostThreads || shared_bytes > static_cast<unsigned>(kernel.shared_bytes)) return kInvalidValue;
  if (extra != nullptr || parameters == nullptr) return kInvalidValue;
  if (state.on_launch == nullptr) return kLaunchFailed;
  const unsigned grid[] = {grid_x, grid_y, grid_z};
  return state.on_launch(kernel.name.c_str(), kernel.target.c_str(), grid, block_x, shared_bytes, stream, parameters);
}
