// The catalogue of compiled kernels inside the library.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace act::cuda {

// One kernel for one target. The strings are parts of the library, and the image is followed by a zero.
struct Image {
  std::string_view name;
  std::string_view parameters;
  std::string_view symbol;
  uint32_t target;  // compute capability times ten; 0 for PTX
  uint32_t hidden_pointers;
  uint32_t threads;
  uint32_t shared_bytes;
  const void* data;
};

// All of the catalogue. Throws std::runtime_error where it is not as ops/cuda/catalogue.py describes.
const std::vector<Image>& Images();

}  // namespace act::cuda
