#include "ort_context.h"

#include <mutex>

namespace act::ort {
namespace {

struct ParallelCall {
  const std::function<void(int64_t)>& body;
  std::mutex mutex;
  std::exception_ptr error;

  static void Run(void* data, size_t index) {
    auto* call = static_cast<ParallelCall*>(data);
    try {
      call->body(static_cast<int64_t>(index));
    } catch (...) {
      const std::lock_guard<std::mutex> lock(call->mutex);
      if (!call->error) call->error = std::current_exception();
    }
  }
};

}  // namespace

void Call::ParallelFor(int64_t count, const std::function<void(int64_t)>& body) {
  if (count == 0) return;
  if (count == 1) return body(0);
  ParallelCall call{body, {}, nullptr};
  // As many batches as bodies: a thread that is done takes the next one, for bodies take different times.
  const auto bodies = static_cast<size_t>(count);
  Check(api_, api_.KernelContext_ParallelFor(context_, &ParallelCall::Run, bodies, bodies, &call));
  if (call.error) std::rethrow_exception(call.error);
}

}  // namespace act::ort
