// The part of the CUDA driver API that launching kernels takes, declared here and found in the driver when the first
// CUDA operator is made: the library links nothing of CUDA and loads without a driver. cuda_driver_check.cc compares
// it with the real header where one is given.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

// The driver's own names of its handles.
struct CUctx_st;
struct CUfunc_st;
struct CUkern_st;
struct CUlib_st;
struct CUstream_st;

namespace act::cuda {

using Context = CUctx_st*;
using FunctionHandle = CUfunc_st*;
using KernelHandle = CUkern_st*;
using Library = CUlib_st*;
using Stream = CUstream_st*;
using Address = unsigned long long;  // of device memory

enum Result { kSuccess = 0 };
enum DeviceAttribute {
  kMultiprocessors = 16,
  kComputeCapabilityMajor = 75,
  kComputeCapabilityMinor = 76,
  kMostSharedBytes = 97,  // of a block that asks for more than it may have otherwise
};
enum KernelAttribute { kDynamicSharedBytes = 8 };

// How TMA finds a box of a tensor in memory, in the driver's encoding.
struct alignas(128) TensorMap {
  uint64_t opaque[16];
};
enum TensorMapType { kMapFloat16 = 6, kMapBFloat16 = 9 };
enum TensorMapOption { kMapNoInterleave = 0, kMapSwizzle128 = 3, kMapPromote128 = 2, kMapFillZero = 0 };

// Shared memory that a block may have without asking for it.
constexpr uint32_t kPlainSharedBytes = 48 * 1024;

// Every function returns a CUresult. Options and flags are not used: they are null, and their number 0.
#define ACT_CUDA_FUNCTIONS(FUNCTION)                                                                            \
  FUNCTION(cuInit, unsigned flags)                                                                              \
  FUNCTION(cuDriverGetVersion, int* version)                                                                    \
  FUNCTION(cuGetErrorName, int result, const char** name)                                                       \
  FUNCTION(cuGetErrorString, int result, const char** text)                                                     \
  FUNCTION(cuDeviceGet, int* device, int ordinal)                                                               \
  FUNCTION(cuDeviceGetAttribute, int* value, int attribute, int device)                                         \
  FUNCTION(cuDeviceGetName, char* name, int size, int device)                                                   \
  FUNCTION(cuDevicePrimaryCtxRetain, Context* context, int device)                                              \
  FUNCTION(cuCtxGetCurrent, Context* context)                                                                   \
  FUNCTION(cuCtxPushCurrent_v2, Context context)                                                                \
  FUNCTION(cuCtxPopCurrent_v2, Context* context)                                                                \
  FUNCTION(cuStreamSynchronize, Stream stream)                                                                  \
  FUNCTION(cuMemAlloc_v2, Address* address, size_t bytes)                                                       \
  FUNCTION(cuMemFree_v2, Address address)                                                                       \
  FUNCTION(cuMemcpyHtoD_v2, Address to, const void* from, size_t bytes)                                         \
  FUNCTION(cuLibraryLoadData, Library* library, const void* image, int* options, void** values, unsigned count, \
           int* library_options, void** library_values, unsigned library_count)                                 \
  FUNCTION(cuLibraryGetKernel, KernelHandle* kernel, Library library, const char* name)                         \
  FUNCTION(cuKernelGetFunction, FunctionHandle* function, KernelHandle kernel)                                  \
  FUNCTION(cuKernelSetAttribute, int attribute, int value, KernelHandle kernel, int device)                     \
  FUNCTION(cuLaunchKernel, FunctionHandle function, unsigned grid_x, unsigned grid_y, unsigned grid_z,          \
           unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes, Stream stream,          \
           void** parameters, void** extra)

// Null where the driver has none: those of CUDA 12.0 have it, and what takes it goes on without.
#define ACT_CUDA_OPTIONAL_FUNCTIONS(FUNCTION)                                                                     \
  FUNCTION(cuTensorMapEncodeTiled, TensorMap* map, int type, unsigned rank, void* address, const uint64_t* sizes, \
           const uint64_t* stride_bytes, const unsigned* box, const unsigned* steps, int interleave, int swizzle, \
           int promotion, int fill)

struct Driver {
#define ACT_CUDA_MEMBER(name, ...) int (*name)(__VA_ARGS__) = nullptr;
  ACT_CUDA_FUNCTIONS(ACT_CUDA_MEMBER)
  ACT_CUDA_OPTIONAL_FUNCTIONS(ACT_CUDA_MEMBER)
#undef ACT_CUDA_MEMBER

  // Loads and starts the driver, once. Throws std::runtime_error, which says what is missing.
  static const Driver& Get();

  // Throws std::runtime_error with `what` failed and CUDA's name of the error, unless `result` is success.
  void Check(int result, const std::string& what) const;
  // CUDA's name and description of an error.
  std::string Describe(int result) const;
};

// Makes a context the current one of this thread for as long as this lives.
class CurrentContext {
 public:
  explicit CurrentContext(Context context);
  ~CurrentContext();
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;

 private:
  bool pushed_ = false;
};

// A copy of host memory on the device of a context.
class DeviceCopy {
 public:
  // Returns when the copy is there, for all streams.
  DeviceCopy(Context context, const std::vector<char>& data);
  // Errors are ignored: at the end of a process the driver may be gone already.
  ~DeviceCopy();
  DeviceCopy(const DeviceCopy&) = delete;
  DeviceCopy& operator=(const DeviceCopy&) = delete;

  const char* Data() const { return reinterpret_cast<const char*>(static_cast<uintptr_t>(address_)); }

 private:
  Context context_;
  Address address_ = 0;
};

}  // namespace act::cuda
