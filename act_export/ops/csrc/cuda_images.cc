#include "cuda_images.h"

#include <cstddef>
#include <cstring>
#include <stdexcept>

// ACT_CUDA_KERNELS: path of the catalogue, from CMake.
__asm__(
    ".section .rodata\n"
    ".balign 16\n"
    ".hidden act_cuda_kernels_begin\n"
    ".globl act_cuda_kernels_begin\n"
    "act_cuda_kernels_begin:\n"
    ".incbin \"" ACT_CUDA_KERNELS
    "\"\n"
    ".hidden act_cuda_kernels_end\n"
    ".globl act_cuda_kernels_end\n"
    "act_cuda_kernels_end:\n"
    ".byte 0\n"
    ".previous\n");

extern "C" {
extern const char act_cuda_kernels_begin[] __attribute__((visibility("hidden")));
extern const char act_cuda_kernels_end[] __attribute__((visibility("hidden")));
}

namespace act::cuda {
namespace {

constexpr char kMagic[] = "ACTCUDA1";

struct Header {
  char magic[8];
  uint32_t count;
  uint32_t zero;
  uint64_t size;
};

struct Record {
  uint32_t target;
  uint32_t hidden_pointers;
  uint32_t threads;
  uint32_t shared_bytes;
  uint32_t name_size;
  uint32_t parameters_size;
  uint32_t symbol_size;
  uint32_t zero;
  uint64_t offset;
  uint64_t size;
};

static_assert(sizeof(Header) == 24 && sizeof(Record) == 48, "as in the file");

void Expect(bool condition) {
  if (!condition) throw std::runtime_error("the CUDA kernels in this library are damaged: install it again");
}

// Reads the file from front to back, inside its bounds.
class Reader {
 public:
  Reader(const char* data, size_t size) : data_(data), size_(size) {}

  template <typename T>
  T Next() {
    T value;
    std::memcpy(&value, Take(sizeof(T)), sizeof(T));
    return value;
  }

  std::string_view Text(size_t size) { return {Take(size), size}; }

  void Align(size_t alignment) { Take((alignment - position_ % alignment) % alignment); }

 private:
  const char* Take(size_t size) {
    Expect(size <= size_ - position_);
    position_ += size;
    return data_ + position_ - size;
  }

  const char* data_;
  size_t size_;
  size_t position_ = 0;
};

std::vector<Image> Read(const char* data, size_t size) {
  Reader reader(data, size);
  const auto header = reader.Next<Header>();
  Expect(std::memcmp(header.magic, kMagic, sizeof(header.magic)) == 0 && header.size == size);
  std::vector<Image> images;
  for (uint32_t i = 0; i < header.count; ++i) {
    const auto record = reader.Next<Record>();
    Image image;
    image.name = reader.Text(record.name_size);
    image.parameters = reader.Text(record.parameters_size);
    image.symbol = reader.Text(record.symbol_size);
    reader.Align(8);
    image.target = record.target;
    image.hidden_pointers = record.hidden_pointers;
    image.threads = record.threads;
    image.shared_bytes = record.shared_bytes;
    Expect(record.offset < size && record.size < size - record.offset);
    image.data = data + record.offset;
    images.push_back(image);
  }
  return images;
}

}  // namespace

const std::vector<Image>& Images() {
  static const std::vector<Image> images =
      Read(act_cuda_kernels_begin, static_cast<size_t>(act_cuda_kernels_end - act_cuda_kernels_begin));
  return images;
}

}  // namespace act::cuda
