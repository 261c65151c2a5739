#include "cuda_driver.h"

#include <dlfcn.h>

#include <stdexcept>

namespace act::cuda {
namespace {

constexpr char kDriverName[] = "libcuda.so.1";

std::string VersionText(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// Null where the driver has no such function.
template <typename Function>
void Find(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
}

Driver Load() {
  void* library = dlopen(kDriverName, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* reason = dlerror();
    throw std::runtime_error(std::string("no CUDA driver: ") + kDriverName + " can't be loaded (" +
                             (reason == nullptr ? "no reason given" : reason) +
                             "). Install NVIDIA's driver, or run on the CPU");
  }
  Driver driver;
  const char* missing = nullptr;
#define ACT_CUDA_FIND(name, ...)     \
  Find(library, #name, driver.name); \
  if (driver.name == nullptr && missing == nullptr) missing = #name;
  ACT_CUDA_FUNCTIONS(ACT_CUDA_FIND)
#undef ACT_CUDA_FIND
#define ACT_CUDA_FIND_OPTIONAL(name, ...) Find(library, #name, driver.name);
  ACT_CUDA_OPTIONAL_FUNCTIONS(ACT_CUDA_FIND_OPTIONAL)
#undef ACT_CUDA_FIND_OPTIONAL
  if (missing != nullptr) {
    int version = 0;
    const bool known = driver.cuDriverGetVersion != nullptr && driver.cuDriverGetVersion(&version) == kSuccess;
    throw std::runtime_error(std::string("the CUDA driver") + (known ? ", of CUDA " + VersionText(version) + "," : "") +
                             " has no " + missing + ": update it to one of CUDA 12.0 or newer");
  }
  driver.Check(driver.cuInit(0), "starting the CUDA driver");
  return driver;
}

}  // namespace

const Driver& Driver::Get() {
  static const Driver driver = Load();
  return driver;
}

void Driver::Check(int result, const std::string& what) const {
  if (result != kSuccess) throw std::runtime_error(what + " failed: " + Describe(result));
}

std::string Driver::Describe(int result) const {
  const char* name = nullptr;
  const char* text = nullptr;
  if (cuGetErrorName(result, &name) != kSuccess || name == nullptr) return "CUDA error " + std::to_string(result);
  if (cuGetErrorString(result, &text) != kSuccess || text == nullptr) return name;
  return std::string(name) + " (" + text + ")";
}

CurrentContext::CurrentContext(Context context) {
  const Driver& driver = Driver::Get();
  Context current = nullptr;
  driver.Check(driver.cuCtxGetCurrent(&current), "asking for the current CUDA context");
  if (current == context) return;
  driver.Check(driver.cuCtxPushCurrent_v2(context), "changing the current CUDA context");
  pushed_ = true;
}

CurrentContext::~CurrentContext() {
  Context popped = nullptr;
  if (pushed_) Driver::Get().cuCtxPopCurrent_v2(&popped);
}

DeviceCopy::DeviceCopy(Context context, const std::vector<char>& data) : context_(context) {
  const Driver& driver = Driver::Get();
  const CurrentContext current(context);
  const std::string what = std::to_string(data.size()) + " bytes of GPU memory";
  driver.Check(driver.cuMemAlloc_v2(&address_, data.size()), "allocating " + what);
  int result = driver.cuMemcpyHtoD_v2(address_, data.data(), data.size());
  // The copy itself may return before the data has arrived.
  if (result == kSuccess) result = driver.cuStreamSynchronize(nullptr);
  if (result != kSuccess) {
    driver.cuMemFree_v2(address_);
    driver.Check(result, "filling " + what);
  }
}

DeviceCopy::~DeviceCopy() {
  try {
    const CurrentContext current(context_);
    Driver::Get().cuMemFree_v2(address_);
  } catch (...) {
  }
}

}  // namespace act::cuda
