#include <immintrin.h>

#define ACT_INSTRUCTION_SET avx512
#define ACT_LANES 16
#define ACT_REGISTERS 32
#include "kernels_simd.inc"

namespace act::fast {
const Kernels kAvx512Kernels = {avx512::kTyped<float>, avx512::kTyped<Float16>, avx512::kTyped<BFloat16>};
}  // namespace act::fast
