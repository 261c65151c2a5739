// What this library was built with, and what it loaded, for programs that load it.
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

std::string Quoted(const std::string& text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') quoted += '\\';
    quoted += static_cast<unsigned char>(c) < ' ' ? ' ' : c;
  }
  return quoted + '"';
}

// JSON: {"kernels": {"forward.bf16.128": "sm_90", ...}, "refused": "why the driver took no better image"}.
std::string LoadedKernels() {
  std::string kernels, refused;
#ifdef ACT_CUDA_KERNELS
  const cuda::Loaded loaded = cuda::Kernels::AllLoaded();
  for (const auto& [name, target] : loaded.targets) {
    kernels += (kernels.empty() ? "" : ", ") + Quoted(name) + ": " + Quoted(target);
  }
  refused = loaded.refused;
#endif
  return "{\"kernels\": {" + kernels + "}, \"refused\": " + Quoted(refused) + "}";
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

// Until this thread asks again. Null where there is no memory.
extern "C" ACT_EXPORT const char* ActOpsLoadedKernels() {
  try {
    thread_local std::string loaded;
    loaded = act::LoadedKernels();
    return loaded.c_str();
  } catch (...) {
    return nullptr;
  }
}
