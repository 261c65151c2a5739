#include <immintrin.h>

#define ACT_INSTRUCTION_SET avx2
#define ACT_LANES 8
#define ACT_REGISTERS 16
#include "kernels_simd.inc"

namespace act::fast {
const Kernels kAvx2Kernels = {avx2::kTyped<float>, avx2::kTyped<Float16>, avx2::kTyped<BFloat16>};
}  // namespace act::fast
