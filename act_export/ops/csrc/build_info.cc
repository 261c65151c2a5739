// What this library was built with, for programs that load it: ActOpsBuildInfo().
#include <string>
#include <vector>

#include "ort_abi.h"

#ifdef ACT_CUDA_KERNELS
#include "cuda_kernels.h"
#endif

namespace act {
namespace {

std::vector<std::string> CudaTargets() {
#ifdef ACT_CUDA_KERNELS
  return cuda::Targets();
#else
  return {};
#endif
}

// JSON: {"version": 1, "cuda": ["sm_80", ..., "ptx"]}, without CUDA kernels {"version": 1, "cuda": []}.
std::string BuildInfo() {
  std::string targets;
  for (const std::string& target : CudaTargets()) targets += (targets.empty() ? "\"" : ", \"") + target + "\"";
  return "{\"version\": 1, \"cuda\": [" + targets + "]}";
}

}  // namespace
}  // namespace act

// Never freed. Null where the library is damaged.
extern "C" ACT_EXPORT const char* ActOpsBuildInfo() {
  try {
    static const std::string info = act::BuildInfo();
    return info.c_str();
  } catch (...) {
    return nullptr;
  }
}
