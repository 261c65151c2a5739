// Compiled only when CMake is given CUDA_INCLUDE_DIR: compares cuda_driver.h with the real header.
#include <cuda.h>

#include <type_traits>

#include "cuda_driver.h"

namespace act::cuda {
namespace {

// Enumerations are declared as int.
template <typename T>
struct Plain {
  using Type = std::conditional_t<std::is_enum_v<T>, int, T>;
};
template <typename T>
struct Plain<T*> {
  using Type = std::conditional_t<std::is_enum_v<T>, int*, T*>;
};

template <typename T>
struct Declared;
template <typename Return, typename... Parameters>
struct Declared<Return(Parameters...)> {
  using Type = typename Plain<Return>::Type (*)(typename Plain<Parameters>::Type...);
};

#define ACT_CUDA_SAME(name, ...) \
  static_assert(std::is_same_v<Declared<decltype(::name)>::Type, decltype(Driver::name)>, #name);
ACT_CUDA_FUNCTIONS(ACT_CUDA_SAME)

static_assert(static_cast<int>(kSuccess) == CUDA_SUCCESS);
static_assert(static_cast<int>(kMultiprocessors) == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
static_assert(static_cast<int>(kComputeCapabilityMajor) == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
static_assert(static_cast<int>(kComputeCapabilityMinor) == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
static_assert(static_cast<int>(kMostSharedBytes) == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
static_assert(static_cast<int>(kDynamicSharedBytes) == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
static_assert(std::is_same_v<Address, CUdeviceptr> && std::is_same_v<Stream, CUstream>);

}  // namespace
}  // namespace act::cuda
