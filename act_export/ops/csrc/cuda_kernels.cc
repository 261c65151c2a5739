#include "cuda_kernels.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>

#include "cuda_images.h"

namespace act::cuda {
namespace {

constexpr int kLeastCapability = 80;
// From here on machine code is for exactly one compute capability (sm_90a); below, for later minor versions too.
constexpr int kExactFrom = 90;
constexpr int kHopper = 90;

// Which kernel computes prompts on Hopper; Triton's is the default until the other one has been run on a GPU.
constexpr char kForwardVariable[] = "ACT_CUDA_FORWARD";
constexpr char kTritonForward[] = "triton";
constexpr char kHopperForward[] = "hopper";

bool AsksForHopper() {
  const char* given = std::getenv(kForwardVariable);
  const std::string forward = given == nullptr || *given == 0 ? kTritonForward : given;
  if (forward != kTritonForward && forward != kHopperForward) {
    throw std::runtime_error(std::string(kForwardVariable) + " is \"" + forward + "\": set it to \"" + kTritonForward +
                             "\" or \"" + kHopperForward + "\", or unset it");
  }
  return forward == kHopperForward;
}

std::string CapabilityText(int capability) {
  return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

std::string TargetName(uint32_t target) { return target == 0 ? "ptx" : "sm_" + std::to_string(target); }

bool Runs(int target, int capability) {
  if (target == 0) return true;
  if (target >= kExactFrom) return target == capability;
  return target / 10 == capability / 10 && target <= capability;
}

std::string ToText(Grid grid) {
  return std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z);
}

int Attribute(const Driver& driver, DeviceAttribute attribute, int device) {
  int value = 0;
  driver.Check(driver.cuDeviceGetAttribute(&value, attribute, device), "asking for a property of the GPU");
  return value;
}

}  // namespace

namespace {

struct Devices {
  std::mutex mutex;
  std::map<int, std::unique_ptr<Kernels>> kernels;
};

Devices& AllDevices() {
  static Devices& devices = *new Devices();
  return devices;
}

}  // namespace

Kernels& Kernels::ForDevice(int device) {
  Devices& devices = AllDevices();
  const std::lock_guard<std::mutex> lock(devices.mutex);
  auto& kernels = devices.kernels[device];
  if (kernels == nullptr) kernels.reset(new Kernels(device));
  return *kernels;
}

Loaded Kernels::AllLoaded() {
  Devices& devices = AllDevices();
  const std::lock_guard<std::mutex> lock(devices.mutex);
  Loaded loaded;
  for (const auto& entry : devices.kernels) {
    Kernels* kernels = entry.second.get();
    if (kernels == nullptr) continue;  // of a GPU that isn't there
    const std::lock_guard<std::mutex> kernels_lock(kernels->mutex_);
    for (const auto& function : kernels->functions_) loaded.targets[function.first] = function.second.target;
    if (loaded.refused.empty()) loaded.refused = kernels->refused_;
  }
  return loaded;
}

Kernels::Kernels(int ordinal) {
  const bool asks_for_hopper = AsksForHopper();
  const Driver& driver = Driver::Get();
  driver.Check(driver.cuDeviceGet(&device_, ordinal), "finding GPU " + std::to_string(ordinal));
  char name[256] = "";
  driver.Check(driver.cuDeviceGetName(name, sizeof(name), device_), "asking for the name of the GPU");
  capability_ =
      10 * Attribute(driver, kComputeCapabilityMajor, device_) + Attribute(driver, kComputeCapabilityMinor, device_);
  device_name_ = std::string(name) + ", compute capability " + CapabilityText(capability_);
  if (capability_ < kLeastCapability) {
    throw std::runtime_error("the GPU (" + device_name_ + ") is older than the CUDA kernels, which need " +
                             CapabilityText(kLeastCapability) + " or newer: run the portable functions instead");
  }
  takes_hopper_ = asks_for_hopper && capability_ == kHopper && driver.cuTensorMapEncodeTiled != nullptr;
  multiprocessors_ = Attribute(driver, kMultiprocessors, device_);
  most_shared_bytes_ = static_cast<uint32_t>(Attribute(driver, kMostSharedBytes, device_));
  driver.Check(driver.cuDevicePrimaryCtxRetain(&context_, device_), "starting the GPU (" + device_name_ + ")");
}

const Function& Kernels::Find(const std::string& name) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return FindLocked(name);
}

const Function* Kernels::FindHopper(const std::string& family) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::string name = kHopperForward + family;
  if (!takes_hopper_ || Choose(name).empty()) return nullptr;
  try {
    return &FindLocked(name);
  } catch (const std::runtime_error& error) {
    refused_ = error.what();
    takes_hopper_ = false;
    return nullptr;
  }
}

const Function& Kernels::FindLocked(const std::string& name) {
  const auto found = functions_.find(name);
  if (found != functions_.end()) return found->second;
  const std::vector<const Image*> images = Choose(name);
  if (images.empty()) {
    throw std::runtime_error("this library has no CUDA kernel " + name + " for the GPU (" + device_name_ +
                             "): run the portable functions instead");
  }
  for (size_t i = 0;; ++i) {
    try {
      return functions_.emplace(name, Load(*images[i])).first->second;
    } catch (const std::runtime_error& error) {
      if (i + 1 == images.size()) throw;  // a driver older than the machine code still takes PTX
      refused_ = error.what();
    }
  }
}

std::vector<const Image*> Kernels::Choose(const std::string& name) const {
  std::vector<const Image*> images;
  for (const Image& image : Images()) {
    if (image.name == name && Runs(static_cast<int>(image.target), capability_)) images.push_back(&image);
  }
  std::sort(images.begin(), images.end(), [](const Image* a, const Image* b) { return a->target > b->target; });
  return images;
}

Function Kernels::Load(const Image& image) const {
  const Driver& driver = Driver::Get();
  const CurrentContext current(context_);
  const std::string what =
      "kernel " + std::string(image.name) + " (" + TargetName(image.target) + ") on the GPU (" + device_name_ + ")";
  if (image.shared_bytes > most_shared_bytes_) {
    throw std::runtime_error(what + " needs " + std::to_string(image.shared_bytes) +
                             " bytes of shared memory, but there are " + std::to_string(most_shared_bytes_) +
                             ": run the portable functions instead");
  }
  Library library = nullptr;
  driver.Check(driver.cuLibraryLoadData(&library, image.data, nullptr, nullptr, 0, nullptr, nullptr, 0),
               "loading " + what);
  KernelHandle kernel = nullptr;
  driver.Check(driver.cuLibraryGetKernel(&kernel, library, std::string(image.symbol).c_str()), "finding " + what);
  Function function{std::string(image.name),
                    TargetName(image.target),
                    std::string(image.parameters),
                    image.hidden_pointers,
                    image.threads,
                    image.shared_bytes,
                    nullptr};
  // A driver that loads lazily looks into the image only now.
  driver.Check(driver.cuKernelGetFunction(&function.handle, kernel), "loading the code of " + what);
  if (function.shared_bytes > kPlainSharedBytes) {
    driver.Check(
        driver.cuKernelSetAttribute(kDynamicSharedBytes, static_cast<int>(function.shared_bytes), kernel, device_),
        "getting shared memory for " + what);
  }
  return function;
}

void Launch(const Function& function, Grid grid, Stream stream, std::initializer_list<Argument> arguments) {
  const auto same = [](const Argument& argument, char letter) { return argument.Letter() == letter; };
  if (!std::equal(arguments.begin(), arguments.end(), function.parameters.begin(), function.parameters.end(), same)) {
    std::string letters;
    for (const Argument& argument : arguments) letters += argument.Letter();
    throw std::logic_error("kernel " + function.name + " takes parameters " + function.parameters + ", not " + letters);
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const void* null = nullptr;
  std::vector<void*> parameters;
  parameters.reserve(arguments.size() + function.hidden_pointers);
  for (const Argument& argument : arguments) parameters.push_back(const_cast<void*>(argument.Data()));
  parameters.insert(parameters.end(), function.hidden_pointers, &null);
  const Driver& driver = Driver::Get();
  const int result = driver.cuLaunchKernel(function.handle, grid.x, grid.y, grid.z, function.threads, 1, 1,
                                           function.shared_bytes, stream, parameters.data(), nullptr);
  if (result != kSuccess) {
    driver.Check(result, "launching kernel " + function.name + " on a grid of " + ToText(grid));
  }
}

std::vector<std::string> Targets() {
  std::set<uint32_t> targets;
  for (const Image& image : Images()) targets.insert(image.target);
  std::vector<std::string> names;
  for (const uint32_t target : targets) {
    if (target != 0) names.push_back(TargetName(target));
  }
  if (targets.count(0) > 0) names.push_back(TargetName(0));
  return names;
}

}  // namespace act::cuda
