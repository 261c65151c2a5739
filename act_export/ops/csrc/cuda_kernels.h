// The kernels that the library carries, loaded onto a GPU when first launched. They are compiled from Triton by
// ops/cuda/build.py and packed as ops/cuda/catalogue.py describes.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda_driver.h"

namespace act::cuda {

struct Grid {
  unsigned x = 1, y = 1, z = 1;
};

// One launch parameter: what it is ('p' pointer, 'i' int32, 'l' int64, 'f' float, 't' map) and its bytes.
class Argument {
 public:
  template <typename T>
  Argument(T* pointer) : Argument('p', pointer) {}
  Argument(int32_t value) : Argument('i', value) {}
  Argument(int64_t value) : Argument('l', value) {}
  Argument(float value) : Argument('f', value) {}
  // Is read at the launch.
  Argument(const TensorMap& map) : Argument('t', &map) {}

  char Letter() const { return letter_; }
  const void* Data() const {
    if (letter_ != 't') return &bytes_;
    const void* map;
    std::memcpy(&map, &bytes_, sizeof(map));
    return map;
  }

 private:
  template <typename T>
  Argument(char letter, T value) : letter_(letter) {
    static_assert(sizeof(value) <= sizeof(bytes_));
    std::memcpy(&bytes_, &value, sizeof(value));
  }

  char letter_;
  uint64_t bytes_ = 0;
};

// An image of the catalogue; the strings are in the library.
struct Image;

// A kernel that is ready on its GPU.
struct Function {
  std::string name;
  std::string target;      // of the image: "sm_80", ..., "ptx"
  std::string parameters;  // a letter for each
  uint32_t hidden_pointers;
  uint32_t threads;
  uint32_t shared_bytes;
  FunctionHandle handle;
};

// What became of the kernels that were looked for.
struct Loaded {
  std::map<std::string, std::string> targets;  // of the image of each, by the kernel's name: "sm_80", ..., "ptx"
  std::string refused;  // why the driver took no better image of one of them; empty where it took the best of all
};

// All kernels for one GPU. Every function may be called from any thread.
class Kernels {
 public:
  // One for each GPU in the process, never freed. Throws std::runtime_error where the library carries no kernels, there
  // is no driver or no such GPU, or its compute capability is below 8.0.
  static Kernels& ForDevice(int device);

  // The best image for the GPU that the driver takes: machine code, otherwise PTX. The first call for a name loads it.
  // Throws std::runtime_error where there is none.
  const Function& Find(const std::string& name);

  // The kernel for Hopper of a name's family (".bf16.128") that takes maps of tensors, where the environment asks for
  // it
  // (`ACT_CUDA_FORWARD=hopper`), the GPU is one, and library and driver have what it takes; otherwise null.
  const Function* FindHopper(const std::string& family);

  // Of all GPUs of the process.
  static Loaded AllLoaded();

  int multiprocessors() const { return multiprocessors_; }
  // The context that kernels run in, and in which device memory has to be: the one that CUDA's runtime uses.
  Context context() const { return context_; }

 private:
  explicit Kernels(int ordinal);
  // Those that the GPU runs, the best one first.
  std::vector<const Image*> Choose(const std::string& name) const;
  Function Load(const Image& image) const;
  // The caller has the mutex.
  const Function& FindLocked(const std::string& name);

  int device_ = 0;
  std::string device_name_;
  int capability_ = 0;  // compute capability times ten
  int multiprocessors_ = 0;
  uint32_t most_shared_bytes_ = 0;  // of a block
  Context context_ = nullptr;
  std::mutex mutex_;
  std::unordered_map<std::string, Function> functions_;
  std::string refused_;
  bool takes_hopper_ = false;
};

// Puts a kernel into a stream, of the GPU that it was found for, in the current context. An empty grid is left out.
// Throws std::logic_error where the arguments are not the kernel's parameters, std::runtime_error where CUDA refuses.
void Launch(const Function& function, Grid grid, Stream stream, std::initializer_list<Argument> arguments);

// What the library carries kernels for: "sm_80", ..., "ptx", in that order.
std::vector<std::string> Targets();

}  // namespace act::cuda
