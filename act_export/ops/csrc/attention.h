// Attention over a KV cache with attention sink calibration (ACT, https://arxiv.org/abs/2406.15765). Kernels know
// nothing of ONNX Runtime: raw pointers, sizes and a parallel for. Every kernel has this name and these arguments.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace act {

// What a kernel needs of the program it runs in. Every function may be called from any thread.
class Host {
 public:
  virtual ~Host() = default;
  // Calls body(0) ... body(count - 1), in any order and on any threads, and returns when all have returned. Throws what
  // a body threw.
  virtual void ParallelFor(int64_t count, const std::function<void(int64_t)>& body) = 0;
  // At least 16-byte aligned, never null: throws where there is no memory.
  virtual void* Allocate(size_t bytes) = 0;
  virtual void Free(void* memory) noexcept = 0;
};

// Of a head without a learned sink: draws nothing.
constexpr float kNoSinkLogit = -0x1p127f;

// How one head is calibrated in one sequence: a row of the calibration tensor.
struct Strengths {
  float beta = 1.0f;       // on the later sinks, in [kLeastBeta, kMostBeta]
  float gamma = 1.0f;      // on the initial token, in [kLeastGamma, kMostGamma]
  float threshold = 0.0f;  // sinks score above it

  // Whether later sinks stay as they are: then nobody asks which they are.
  bool KeepsSinks() const { return beta == 1.0f; }
};
static_assert(sizeof(Strengths) == 3 * sizeof(float));

constexpr float kLeastBeta = 0.0f;
constexpr float kMostBeta = 2.0f;
constexpr float kLeastGamma = 1.0f / 16.0f;
constexpr float kMostGamma = 16.0f;

// Tensors are contiguous, in the layout of their comment. past_* and present_* of the same name may be the same memory.
// Storage is float, Float16 or BFloat16; all arithmetic is float32.
template <typename T>
struct AttentionArguments {
  int64_t batch = 0;
  int64_t sequence = 0;          // S: new tokens in this call
  int64_t total = 0;             // cached and new tokens; row i of this call sits at position total - sequence + i
  int64_t past_capacity = 0;     // positions that the past buffers have room for, at least total - sequence
  int64_t present_capacity = 0;  // the same for the present buffers: max(past_capacity, total)
  int64_t num_heads = 0;
  int64_t kv_num_heads = 0;  // divides num_heads
  int64_t head_size = 0;
  int64_t value_head_size = 0;

  const T* query = nullptr;                 // (batch, sequence, num_heads, head_size)
  const T* key = nullptr;                   // (batch, sequence, kv_num_heads, head_size)
  const T* value = nullptr;                 // (batch, sequence, kv_num_heads, value_head_size)
  const T* past_key = nullptr;              // (batch, kv_num_heads, past_capacity, head_size)
  const T* past_value = nullptr;            // (batch, kv_num_heads, past_capacity, value_head_size)
  const float* past_sink_scores = nullptr;  // (batch, calibrated_count, past_capacity)
  const int64_t* attention_mask = nullptr;  // (batch, total), 0 = padding, all else real
  T* output = nullptr;                      // (batch, sequence, num_heads, value_head_size)
  T* present_key = nullptr;                 // (batch, kv_num_heads, present_capacity, head_size)
  T* present_value = nullptr;               // (batch, kv_num_heads, present_capacity, value_head_size)
  float* present_sink_scores = nullptr;     // (batch, calibrated_count, present_capacity)

  float scale = 1.0f;           // logits = scale * query . key
  float softcap = 0.0f;         // 0 = none, otherwise logits = softcap * tanh(logits / softcap)
  int64_t sliding_window = -1;  // -1 = none, otherwise a row sees this many positions, its own included
  // (num_heads): learned logits of one more key, without value, that every row sees; null = none
  const float* sink_logits = nullptr;

  int64_t calibrated_count = 0;
  const int64_t* calibrated_index = nullptr;  // (num_heads): index of a head in the sink scores, -1 = not calibrated
  const Strengths* calibration = nullptr;     // (calibrations, calibrated_count)
  int64_t calibrations = 1;                   // 1 for all sequences, or batch
  bool relative_threshold = false;            // thresholds are multiples of 1 / real tokens of the sequence

  // Of the calibrated head `index` in sequence `b`.
  const Strengths& StrengthsOf(int64_t b, int64_t index) const {
    return calibration[(calibrations == 1 ? 0 : b) * calibrated_count + index];
  }
};

// The readable kernel, which the fast one is tested against.
namespace plain {

// Memory: the present buffers, and O(sequence + total) floats for each head in flight.
template <typename T>
void Attention(const AttentionArguments<T>& arguments, Host& host);

}  // namespace plain

namespace fast {

// What the vectorised parts were compiled for. kPortable: whatever every machine of this architecture has.
enum class InstructionSet { kPortable, kAvx2, kAvx512 };

constexpr InstructionSet kInstructionSets[] = {InstructionSet::kPortable, InstructionSet::kAvx2,
                                               InstructionSet::kAvx512};

const char* Name(InstructionSet instruction_set);
// Whether it was compiled into this library, and this machine has it.
bool IsSupported(InstructionSet instruction_set);
// The widest that is supported.
InstructionSet Best();

// Beyond this, about, the sequences of a call are taken in parts, one after the other.
constexpr int64_t kMostScratchBytes = int64_t{1} << 30;

// Memory from `host`. Prompts: 48 * total floats for each thread, about 20 * sequence + 8 * total for each head with a
// beta that is not 1, in half types value_head_size * sequence more. A few tokens: total floats for each row of each
// head, as long as these of a sequence take no more than `most_bytes` or than its cache; otherwise as a prompt. Results
// do not depend on the number of threads.
template <typename T>
void Attention(const AttentionArguments<T>& arguments, Host& host, InstructionSet instruction_set = Best(),
               int64_t most_bytes = kMostScratchBytes);

}  // namespace fast

}  // namespace act
