// Memory of a call on a GPU, from ONNX Runtime.
#pragma once

#include <cstddef>

#include "ort_context.h"

namespace act::ort {

// From a session's arena, for the stream of this call: what is freed goes to later work of the same stream, and to
// another stream once that has waited for this one. An allocator need not know of streams. Null where there is no
// memory. `allocator` is of version kSyncStreamVersion at least.
inline void* AllocateOnStream(const Api& api, const KernelContext* context, Allocator* allocator, size_t bytes) {
  SyncStream* stream = nullptr;
  Check(api, api.KernelContext_GetSyncStream(context, &stream));
  try {
    const bool any_stream = stream == nullptr || allocator->AllocOnStream == nullptr;
    return any_stream ? allocator->Alloc(allocator, bytes) : allocator->AllocOnStream(allocator, bytes, stream);
  } catch (...) {
    return nullptr;  // ONNX Runtime's own exception, of its own C++ runtime: it goes no further
  }
}

}  // namespace act::ort
