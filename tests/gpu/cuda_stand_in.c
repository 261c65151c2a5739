// The part of the CUDA runtime that ONNX Runtime needs to open a session, over host memory. Device memory is host
// memory, every call is finished when it returns, and no kernel runs. tests/gpu/cuda_stand_in.py builds it.
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { kPage = 4096, kMultiprocessors = 132, kThreads = 1024, kSharedBytes = 227 * 1024 };

typedef struct {
  size_t bytes;
} Allocation;

static char object;  // what every handle points to
static atomic_size_t used_bytes;
static _Thread_local cudaError_t last_error;  // of this thread, until it is asked for

static size_t MemoryBytes(void) {
  const char* given = getenv("CUDA_STAND_IN_BYTES");
  return given == NULL ? 80ull << 30 : strtoull(given, NULL, 10);
}

static cudaError_t Handle(void* out) {
  *(void**)out = &object;
  return cudaSuccess;
}

// Zeroed, and taken from the system only where it is touched. The page before it tells its size.
static cudaError_t Allocate(void** out, size_t bytes) {
  bytes += kPage;
  if (atomic_fetch_add(&used_bytes, bytes) + bytes > MemoryBytes()) {
    atomic_fetch_sub(&used_bytes, bytes);
    return last_error = cudaErrorMemoryAllocation;
  }
  char* base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) {
    atomic_fetch_sub(&used_bytes, bytes);
    return last_error = cudaErrorMemoryAllocation;
  }
  ((Allocation*)base)->bytes = bytes;
  *out = base + kPage;
  return cudaSuccess;
}

static cudaError_t Release(void* pointer) {
  if (pointer == NULL) return cudaSuccess;
  Allocation* allocation = (Allocation*)((char*)pointer - kPage);
  const size_t bytes = allocation->bytes;
  munmap(allocation, bytes);
  atomic_fetch_sub(&used_bytes, bytes);
  return cudaSuccess;
}

static void FillProperties(struct cudaDeviceProp* p) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "stand-in for a GPU");
  p->totalGlobalMem = MemoryBytes();
  p->sharedMemPerBlock = 48 * 1024;
  p->regsPerBlock = 65536;
  p->warpSize = 32;
  p->memPitch = 0x7fffffff;
  p->maxThreadsPerBlock = kThreads;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = kThreads;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 0x7fffffff;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->totalConstMem = 65536;
  p->major = 9;
  p->textureAlignment = 512;
  p->multiProcessorCount = kMultiprocessors;
  p->canMapHostMemory = 1;
  p->concurrentKernels = 1;
  p->unifiedAddressing = 1;
  p->l2CacheSize = 50 << 20;
  p->maxThreadsPerMultiProcessor = 2048;
  p->sharedMemPerMultiprocessor = 228 * 1024;
  p->regsPerMultiprocessor = 65536;
  p->cooperativeLaunch = 1;
  p->sharedMemPerBlockOptin = kSharedBytes;
  p->maxBlocksPerMultiProcessor = 32;
  p->reservedSharedMemPerBlock = 1024;
}

// Devices

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* properties, int device) {
  if (device != 0) return cudaErrorInvalidDevice;
  FillProperties(properties);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr attribute, int device) {
  if (device != 0) return cudaErrorInvalidDevice;
  struct cudaDeviceProp p;
  FillProperties(&p);
  const int values[][2] = {
      {cudaDevAttrMaxThreadsPerBlock, p.maxThreadsPerBlock},
      {cudaDevAttrMaxSharedMemoryPerBlock, (int)p.sharedMemPerBlock},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, (int)p.sharedMemPerBlockOptin},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, (int)p.sharedMemPerMultiprocessor},
      {cudaDevAttrMaxRegistersPerBlock, p.regsPerBlock},
      {cudaDevAttrMultiProcessorCount, p.multiProcessorCount},
      {cudaDevAttrMaxThreadsPerMultiProcessor, p.maxThreadsPerMultiProcessor},
      {cudaDevAttrWarpSize, p.warpSize},
      {cudaDevAttrL2CacheSize, p.l2CacheSize},
      {cudaDevAttrComputeCapabilityMajor, p.major},
      {cudaDevAttrComputeCapabilityMinor, p.minor},
      {cudaDevAttrCooperativeLaunch, p.cooperativeLaunch},
      {cudaDevAttrUnifiedAddressing, p.unifiedAddressing},
  };
  *value = 0;
  for (size_t i = 0; i < sizeof values / sizeof *values; ++i) {
    if (values[i][0] == (int)attribute) *value = values[i][1];
  }
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    default:
      return "unrecognized error code";
  }
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    default:
      return "unrecognized error code";
  }
}

cudaError_t cudaPeekAtLastError(void) { return last_error; }

cudaError_t cudaGetLastError(void) {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

// Memory

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  *total_bytes = MemoryBytes();
  *free_bytes = *total_bytes - atomic_load(&used_bytes);
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** out, size_t bytes) { return Allocate(out, bytes); }

cudaError_t cudaMallocFromPoolAsync(void** out, size_t bytes, cudaMemPool_t pool, cudaStream_t stream) {
  (void)pool, (void)stream;
  return Allocate(out, bytes);
}

cudaError_t cudaMallocHost(void** out, size_t bytes) { return Allocate(out, bytes); }

cudaError_t cudaHostAlloc(void** out, size_t bytes, unsigned flags) {
  (void)flags;
  return Allocate(out, bytes);
}

cudaError_t cudaFree(void* pointer) { return Release(pointer); }

cudaError_t cudaFreeAsync(void* pointer, cudaStream_t stream) {
  (void)stream;
  return Release(pointer);
}

cudaError_t cudaFreeHost(void* pointer) { return Release(pointer); }

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, enum cudaMemcpyKind kind) {
  (void)kind;
  memmove(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
  (void)stream;
  return cudaMemcpy(to, from, bytes, kind);
}

cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
  (void)kind, (void)stream;
  for (size_t row = 0; row < height; ++row) {
    memmove((char*)to + row * to_pitch, (const char*)from + row * from_pitch, width);
  }
  return cudaSuccess;
}

cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  memset(to, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  (void)stream;
  return cudaMemset(to, value, bytes);
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* attributes, const void* pointer) {
  memset(attributes, 0, sizeof *attributes);
  attributes->type = cudaMemoryTypeDevice;
  attributes->devicePointer = attributes->hostPointer = (void*)pointer;
  return cudaSuccess;
}

cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const struct cudaMemPoolProps* properties) {
  (void)properties;
  return Handle(pool);
}

cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void* value) {
  (void)pool, (void)attribute;
  *(unsigned long long*)value = 0;
  return cudaSuccess;
}

// Streams, events, graphs

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return Handle(stream); }

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  (void)flags;
  return Handle(stream);
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus* status) {
  (void)stream;
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  (void)stream;
  return Handle(graph);
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags) {
  (void)graph, (void)flags;
  return Handle(executable);
}

cudaError_t cudaEventCreate(cudaEvent_t* event) { return Handle(event); }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  (void)flags;
  return Handle(event);
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  (void)start, (void)end;
  *milliseconds = 1;
  return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  (void)stream;
  function(data);
  return cudaSuccess;
}

// Kernels: known, never run

void** __cudaRegisterFatBinary(void* binary) {
  (void)binary;
  static void* handle = &object;
  return &handle;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  (void)function;
  return Handle(kernel);
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, struct CUstream_st* stream) {
  (void)grid, (void)block, (void)shared_bytes, (void)stream;
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void* stream) {
  grid->x = grid->y = grid->z = 1;
  *block = *grid;
  *shared_bytes = 0;
  *(cudaStream_t*)stream = NULL;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* attributes, const void* function) {
  (void)function;
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = kThreads;
  attributes->maxDynamicSharedSizeBytes = kSharedBytes;
  attributes->numRegs = 32;
  attributes->ptxVersion = attributes->binaryVersion = 90;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* function, int block_size,
                                                                   size_t shared_bytes, unsigned flags) {
  (void)function, (void)block_size, (void)shared_bytes, (void)flags;
  *blocks = 1;
  return cudaSuccess;
}

cudaError_t cudaLibraryLoadData(cudaLibrary_t* library, const void* code, enum cudaJitOption* jit_options,
                                void** jit_values, unsigned jit_count, enum cudaLibraryOption* options, void** values,
                                unsigned count) {
  (void)code, (void)jit_options, (void)jit_values, (void)jit_count, (void)options, (void)values, (void)count;
  return Handle(library);
}

cudaError_t cudaLibraryGetKernel(cudaKernel_t* kernel, cudaLibrary_t library, const char* name) {
  (void)library, (void)name;
  return Handle(kernel);
}

static int DriverFunction(void) { return 0; }

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult* status) {
  (void)symbol, (void)version, (void)flags;
  *function = (void*)DriverFunction;
  if (status != NULL) *status = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
