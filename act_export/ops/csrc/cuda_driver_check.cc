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
// `cuTensorMapEncodeTiled` has names of its own for integers and the map.
static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));
static_assert(sizeof(cuuint64_t) == sizeof(uint64_t) && sizeof(cuuint32_t) == sizeof(unsigned));
static_assert(static_cast<int>(kMapFloat16) == CU_TENSOR_MAP_DATA_TYPE_FLOAT16);
static_assert(static_cast<int>(kMapBFloat16) == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16);
static_assert(static_cast<int>(kMapNoInterleave) == CU_TENSOR_MAP_INTERLEAVE_NONE);
static_assert(static_cast<int>(kMapSwizzle128) == CU_TENSOR_MAP_SWIZZLE_128B);
static_assert(static_cast<int>(kMapPromote128) == CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
static_assert(static_cast<int>(kMapFillZero) == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
static_assert(
    std::is_same_v<Plain<decltype(::cuTensorMapEncodeTiled)*>::Type,
                   CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill)>);

static_assert(static_cast<int>(kSuccess) == CUDA_SUCCESS);
static_assert(static_cast<int>(kMultiprocessors) == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
static_assert(static_cast<int>(kComputeCapabilityMajor) == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
static_assert(static_cast<int>(kComputeCapabilityMinor) == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
static_assert(static_cast<int>(kMostSharedBytes) == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
static_assert(static_cast<int>(kDynamicSharedBytes) == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
static_assert(std::is_same_v<Address, CUdeviceptr> && std::is_same_v<Stream, CUstream>);

}  // namespace
}  // namespace act::cuda
