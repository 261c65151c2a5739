// Vectors of four floats: SSE2 on x86-64, NEON on Arm, whatever the compiler makes of them elsewhere.
#define ACT_INSTRUCTION_SET portable
#define ACT_LANES 4
#if defined(__aarch64__)
#define ACT_REGISTERS 32
#else
#define ACT_REGISTERS 16
#endif
#include "kernels_simd.inc"

namespace act::fast {
const Kernels kPortableKernels = {portable::kTyped<float>, portable::kTyped<Float16>, portable::kTyped<BFloat16>};
}  // namespace act::fast
