// The small, append-only part of ONNX Runtime's C ABI that a custom operator needs, declared here because no package
// registry carries the C headers for Linux. ort_abi_check.cc compares every slot with the real header where one is
// given.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef _WIN32
#define ACT_ORT_CALL __stdcall
#define ACT_EXPORT __declspec(dllexport)
#else
#define ACT_ORT_CALL
#define ACT_EXPORT __attribute__((visibility("default")))
#endif

namespace act::ort {

// The oldest API with everything below but what is marked; newer runtimes keep serving it.
constexpr uint32_t kApiVersion = 18;
// The API that has KernelContext_GetSyncStream. An allocator's version tells which one the runtime has.
constexpr uint32_t kSyncStreamVersion = 28;

struct Allocator;
struct CustomOp;
struct CustomOpDomain;
struct KernelContext;
struct KernelInfo;
struct MemoryInfo;
struct SessionOptions;
struct ShapeInferContext;
struct Status;
struct SyncStream;
struct TensorTypeAndShapeInfo;
struct Value;

enum ErrorCode { kFail = 1, kInvalidArgument = 2 };
enum ElementType { kUndefined = 0, kFloat = 1, kInt64 = 7, kFloat16 = 10, kBFloat16 = 16 };
enum Characteristic { kRequired = 0 };
enum MemoryType { kMemoryDefault = 0 };
enum AllocatorType { kArenaAllocator = 1 };

#define ACT_ORT_FUNCTION(name, ...) Status*(ACT_ORT_CALL * name)(__VA_ARGS__)
#define ACT_ORT_RELEASE(name, type) void(ACT_ORT_CALL * name)(type*)

// OrtApi up to KernelContext_GetSyncStream; the gaps are functions that are not used here.
struct Api {
  ACT_ORT_FUNCTION(CreateStatus, ErrorCode code, const char* message);
  void* unused_1;
  const char*(ACT_ORT_CALL* GetErrorMessage)(const Status*);
  void* unused_3[23];
  ACT_ORT_FUNCTION(CreateCustomOpDomain, const char* domain, CustomOpDomain** out);
  ACT_ORT_FUNCTION(CustomOpDomain_Add, CustomOpDomain*, const CustomOp*);
  ACT_ORT_FUNCTION(AddCustomOpDomain, SessionOptions*, CustomOpDomain*);
  void* unused_29[22];
  ACT_ORT_FUNCTION(GetTensorMutableData, Value*, void** out);
  void* unused_52[5];
  ACT_ORT_FUNCTION(CreateTensorTypeAndShapeInfo, TensorTypeAndShapeInfo** out);
  ACT_ORT_FUNCTION(SetTensorElementType, TensorTypeAndShapeInfo*, ElementType type);
  ACT_ORT_FUNCTION(SetDimensions, TensorTypeAndShapeInfo*, const int64_t* dimensions, size_t rank);
  ACT_ORT_FUNCTION(GetTensorElementType, const TensorTypeAndShapeInfo*, ElementType* out);
  ACT_ORT_FUNCTION(GetDimensionsCount, const TensorTypeAndShapeInfo*, size_t* out);
  ACT_ORT_FUNCTION(GetDimensions, const TensorTypeAndShapeInfo*, int64_t* dimensions, size_t rank);
  ACT_ORT_FUNCTION(GetSymbolicDimensions, const TensorTypeAndShapeInfo*, const char** names, size_t rank);
  void* unused_64;
  ACT_ORT_FUNCTION(GetTensorTypeAndShape, const Value*, TensorTypeAndShapeInfo** out);
  void* unused_66[2];
  ACT_ORT_FUNCTION(CreateMemoryInfo, const char* name, AllocatorType type, int id, MemoryType memory, MemoryInfo** out);
  void* unused_69[3];
  ACT_ORT_FUNCTION(MemoryInfoGetId, const MemoryInfo*, int* out);
  void* unused_73[4];
  // The result belongs to the allocator.
  ACT_ORT_FUNCTION(AllocatorGetInfo, const Allocator*, const MemoryInfo** out);
  void* unused_78[7];
  ACT_ORT_FUNCTION(KernelInfoGetAttribute_float, const KernelInfo*, const char* name, float* out);
  ACT_ORT_FUNCTION(KernelInfoGetAttribute_int64, const KernelInfo*, const char* name, int64_t* out);
  ACT_ORT_FUNCTION(KernelInfoGetAttribute_string, const KernelInfo*, const char* name, char* out, size_t* size);
  void* unused_88[2];
  ACT_ORT_FUNCTION(KernelContext_GetInput, const KernelContext*, size_t index, const Value** out);
  ACT_ORT_FUNCTION(KernelContext_GetOutput, KernelContext*, size_t index, const int64_t* dimensions, size_t rank,
                   Value** out);
  void* unused_92;
  ACT_ORT_RELEASE(ReleaseStatus, Status);
  ACT_ORT_RELEASE(ReleaseMemoryInfo, MemoryInfo);
  void* unused_95[4];
  ACT_ORT_RELEASE(ReleaseTensorTypeAndShapeInfo, TensorTypeAndShapeInfo);
  void* unused_100[32];
  ACT_ORT_RELEASE(ReleaseAllocator, Allocator);
  void* unused_133[29];
  ACT_ORT_FUNCTION(KernelInfoGetAttributeArray_float, const KernelInfo*, const char* name, float* out, size_t* size);
  ACT_ORT_FUNCTION(KernelInfoGetAttributeArray_int64, const KernelInfo*, const char* name, int64_t* out, size_t* size);
  void* unused_164[29];
  ACT_ORT_FUNCTION(KernelContext_GetGPUComputeStream, const KernelContext*, void** out);
  void* unused_194[59];
  ACT_ORT_FUNCTION(KernelContext_GetAllocator, const KernelContext*, const MemoryInfo*, Allocator** out);
  void* unused_254[13];
  ACT_ORT_FUNCTION(ShapeInferContext_GetInputCount, const ShapeInferContext*, size_t* out);
  // The result belongs to the context: it is not to be released.
  ACT_ORT_FUNCTION(ShapeInferContext_GetInputTypeShape, const ShapeInferContext*, size_t index,
                   TensorTypeAndShapeInfo** out);
  void* unused_269;
  ACT_ORT_FUNCTION(ShapeInferContext_SetOutputTypeShape, const ShapeInferContext*, size_t index,
                   const TensorTypeAndShapeInfo*);
  ACT_ORT_FUNCTION(SetSymbolicDimensions, TensorTypeAndShapeInfo*, const char** names, size_t rank);
  void* unused_272[2];
  ACT_ORT_FUNCTION(KernelContext_ParallelFor, const KernelContext*, void (*body)(void*, size_t), size_t total,
                   size_t batches, void* data);
  void* unused_275[2];
  ACT_ORT_FUNCTION(KernelContext_GetScratchBuffer, const KernelContext*, const MemoryInfo*, size_t bytes, void** out);
  ACT_ORT_FUNCTION(KernelInfoGetAllocator, const KernelInfo*, MemoryType memory, Allocator** out);
  void* unused_279[144];
  // From kSyncStreamVersion on. Null where the provider has no streams.
  ACT_ORT_FUNCTION(KernelContext_GetSyncStream, const KernelContext*, SyncStream** out);
};

#undef ACT_ORT_FUNCTION
#undef ACT_ORT_RELEASE

struct ApiBase {
  const Api*(ACT_ORT_CALL* GetApi)(uint32_t version);
  const char*(ACT_ORT_CALL* GetVersionString)();
};

// The beginning of OrtAllocator. Its functions throw ONNX Runtime's exceptions.
struct Allocator {
  uint32_t version;
  void*(ACT_ORT_CALL* Alloc)(Allocator*, size_t bytes);
  void(ACT_ORT_CALL* Free)(Allocator*, void* memory);
  void* unused_3[3];
  // From version 23 on.
  void*(ACT_ORT_CALL* AllocOnStream)(Allocator*, size_t bytes, SyncStream* stream);
};

// OrtCustomOp. A null entry means ONNX Runtime's default.
struct CustomOp {
  uint32_t version = kApiVersion;
  void*(ACT_ORT_CALL* CreateKernel)(const CustomOp*, const Api*, const KernelInfo*) = nullptr;
  const char*(ACT_ORT_CALL* GetName)(const CustomOp*) = nullptr;
  const char*(ACT_ORT_CALL* GetExecutionProviderType)(const CustomOp*) = nullptr;
  ElementType(ACT_ORT_CALL* GetInputType)(const CustomOp*, size_t) = nullptr;
  size_t(ACT_ORT_CALL* GetInputTypeCount)(const CustomOp*) = nullptr;
  ElementType(ACT_ORT_CALL* GetOutputType)(const CustomOp*, size_t) = nullptr;
  size_t(ACT_ORT_CALL* GetOutputTypeCount)(const CustomOp*) = nullptr;
  void(ACT_ORT_CALL* KernelCompute)(void* kernel, KernelContext*) = nullptr;
  void(ACT_ORT_CALL* KernelDestroy)(void* kernel) = nullptr;
  Characteristic(ACT_ORT_CALL* GetInputCharacteristic)(const CustomOp*, size_t) = nullptr;
  Characteristic(ACT_ORT_CALL* GetOutputCharacteristic)(const CustomOp*, size_t) = nullptr;
  MemoryType(ACT_ORT_CALL* GetInputMemoryType)(const CustomOp*, size_t) = nullptr;
  int(ACT_ORT_CALL* GetVariadicInputMinArity)(const CustomOp*) = nullptr;
  int(ACT_ORT_CALL* GetVariadicInputHomogeneity)(const CustomOp*) = nullptr;
  int(ACT_ORT_CALL* GetVariadicOutputMinArity)(const CustomOp*) = nullptr;
  int(ACT_ORT_CALL* GetVariadicOutputHomogeneity)(const CustomOp*) = nullptr;
  Status*(ACT_ORT_CALL* CreateKernelV2)(const CustomOp*, const Api*, const KernelInfo*, void** kernel) = nullptr;
  Status*(ACT_ORT_CALL* KernelComputeV2)(void* kernel, KernelContext*) = nullptr;
  Status*(ACT_ORT_CALL* InferOutputShapeFn)(const CustomOp*, ShapeInferContext*) = nullptr;
  int(ACT_ORT_CALL* GetStartVersion)(const CustomOp*) = nullptr;
  int(ACT_ORT_CALL* GetEndVersion)(const CustomOp*) = nullptr;
  // Left null: past and present are graph inputs and outputs, which ONNX Runtime never merges through these, and an
  // alias map lets a kernel write into the caller's input. A caller shares a buffer by binding it to both.
  size_t(ACT_ORT_CALL* GetMayInplace)(int**, int**) = nullptr;
  void(ACT_ORT_CALL* ReleaseMayInplace)(int*, int*) = nullptr;
  size_t(ACT_ORT_CALL* GetAliasMap)(int**, int**) = nullptr;
  void(ACT_ORT_CALL* ReleaseAliasMap)(int*, int*) = nullptr;
};

}  // namespace act::ort
