// Compiled only when CMake is given ONNXRUNTIME_INCLUDE_DIR: compares ort_abi.h with the real header, slot by slot.
#include <cstddef>

#include "onnxruntime_c_api.h"
#include "ort_abi.h"

#define SAME_SLOT(name) static_assert(offsetof(act::ort::Api, name) == offsetof(OrtApi, name), "OrtApi::" #name)
SAME_SLOT(CreateStatus);
SAME_SLOT(GetErrorMessage);
SAME_SLOT(CreateCustomOpDomain);
SAME_SLOT(CustomOpDomain_Add);
SAME_SLOT(AddCustomOpDomain);
SAME_SLOT(GetTensorMutableData);
SAME_SLOT(CreateTensorTypeAndShapeInfo);
SAME_SLOT(SetTensorElementType);
SAME_SLOT(SetDimensions);
SAME_SLOT(GetTensorElementType);
SAME_SLOT(GetDimensionsCount);
SAME_SLOT(GetDimensions);
SAME_SLOT(GetSymbolicDimensions);
SAME_SLOT(GetTensorTypeAndShape);
SAME_SLOT(CreateMemoryInfo);
SAME_SLOT(MemoryInfoGetId);
SAME_SLOT(AllocatorGetInfo);
SAME_SLOT(KernelInfoGetAttribute_float);
SAME_SLOT(KernelInfoGetAttribute_int64);
SAME_SLOT(KernelInfoGetAttribute_string);
SAME_SLOT(KernelContext_GetInput);
SAME_SLOT(KernelContext_GetOutput);
SAME_SLOT(ReleaseStatus);
SAME_SLOT(ReleaseMemoryInfo);
SAME_SLOT(ReleaseTensorTypeAndShapeInfo);
SAME_SLOT(ReleaseAllocator);
SAME_SLOT(KernelInfoGetAttributeArray_float);
SAME_SLOT(KernelInfoGetAttributeArray_int64);
SAME_SLOT(KernelContext_GetGPUComputeStream);
SAME_SLOT(KernelContext_GetAllocator);
SAME_SLOT(ShapeInferContext_GetInputCount);
SAME_SLOT(ShapeInferContext_GetInputTypeShape);
SAME_SLOT(ShapeInferContext_SetOutputTypeShape);
SAME_SLOT(SetSymbolicDimensions);
SAME_SLOT(KernelContext_ParallelFor);
SAME_SLOT(KernelContext_GetScratchBuffer);
SAME_SLOT(KernelInfoGetAllocator);
#if ORT_API_VERSION >= 28
SAME_SLOT(KernelContext_GetSyncStream);
#endif

static_assert(offsetof(act::ort::ApiBase, GetApi) == offsetof(OrtApiBase, GetApi), "OrtApiBase::GetApi");

static_assert(offsetof(act::ort::Allocator, Alloc) == offsetof(OrtAllocator, Alloc), "OrtAllocator::Alloc");
static_assert(offsetof(act::ort::Allocator, Free) == offsetof(OrtAllocator, Free), "OrtAllocator::Free");
#if ORT_API_VERSION >= 23
static_assert(offsetof(act::ort::Allocator, AllocOnStream) == offsetof(OrtAllocator, AllocOnStream),
              "OrtAllocator::AllocOnStream");
#endif

#define SAME_ENTRY(name) \
  static_assert(offsetof(act::ort::CustomOp, name) == offsetof(OrtCustomOp, name), "OrtCustomOp::" #name)
SAME_ENTRY(version);
SAME_ENTRY(CreateKernel);
SAME_ENTRY(GetName);
SAME_ENTRY(GetExecutionProviderType);
SAME_ENTRY(GetInputType);
SAME_ENTRY(GetInputTypeCount);
SAME_ENTRY(GetOutputType);
SAME_ENTRY(GetOutputTypeCount);
SAME_ENTRY(KernelCompute);
SAME_ENTRY(KernelDestroy);
SAME_ENTRY(GetInputCharacteristic);
SAME_ENTRY(GetOutputCharacteristic);
SAME_ENTRY(GetInputMemoryType);
SAME_ENTRY(GetVariadicInputMinArity);
SAME_ENTRY(GetVariadicInputHomogeneity);
SAME_ENTRY(GetVariadicOutputMinArity);
SAME_ENTRY(GetVariadicOutputHomogeneity);
SAME_ENTRY(CreateKernelV2);
SAME_ENTRY(KernelComputeV2);
SAME_ENTRY(InferOutputShapeFn);
SAME_ENTRY(GetStartVersion);
SAME_ENTRY(GetEndVersion);
SAME_ENTRY(GetMayInplace);
SAME_ENTRY(ReleaseMayInplace);
SAME_ENTRY(GetAliasMap);
SAME_ENTRY(ReleaseAliasMap);

#define SAME_VALUE(ours, theirs) static_assert(static_cast<int>(act::ort::ours) == static_cast<int>(theirs), #theirs)
SAME_VALUE(kFail, ORT_FAIL);
SAME_VALUE(kInvalidArgument, ORT_INVALID_ARGUMENT);
SAME_VALUE(kUndefined, ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED);
SAME_VALUE(kFloat, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
SAME_VALUE(kInt64, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
SAME_VALUE(kFloat16, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16);
SAME_VALUE(kBFloat16, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16);
SAME_VALUE(kRequired, INPUT_OUTPUT_REQUIRED);
SAME_VALUE(kMemoryDefault, OrtMemTypeDefault);
SAME_VALUE(kArenaAllocator, OrtArenaAllocator);
