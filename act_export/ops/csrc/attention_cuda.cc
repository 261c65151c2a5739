// The launches of the CUDA operators. Kernels, their arguments and their block sizes are in ops/cuda/kernels.py and
// ops/cuda/specs.py; nothing here reads device memory, so that the calls can be captured into a CUDA graph.
#include "attention_cuda.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "float16.h"

namespace act::cuda {
namespace {

// As in ops/cuda/specs.py.
constexpr int64_t kPositions = 32;
constexpr int64_t kChunk = 4096;
constexpr int64_t kTokens = 16;
constexpr int64_t kDecodeColumns = 64;
constexpr int64_t kMaxSections = 64;
constexpr int64_t kSmallRows = 16;
constexpr int64_t kBounds = 4;
constexpr int64_t kStrengths = sizeof(Strengths) / sizeof(float);
constexpr int64_t kMostBlocks = 65535;  // in the second and third dimension of a grid
constexpr int64_t kSizeMultiple = 16;   // of head sizes that general kernels read in vectors

constexpr unsigned kMapRows = 128;  // of a box that TMA copies for the kernel for Hopper
constexpr unsigned kMapColumns = 64;

constexpr double kLog2E = 1.4426950408889634074;
constexpr int64_t kAlignment = 256;

int64_t BlocksOf(int64_t count, int64_t size) { return (count + size - 1) / size; }

template <typename T>
constexpr bool kWide = std::is_same_v<T, float>;

template <typename T>
const char* TypeName() {
  if constexpr (kWide<T>) return "fp32";
  return std::is_same_v<T, Float16> ? "fp16" : "bf16";
}

template <typename T>
TensorMapType MapType() {
  return std::is_same_v<T, Float16> ? kMapFloat16 : kMapBFloat16;
}

// Rows, or columns, of the attention map that a program of a kernel takes.
template <typename T>
int64_t ForwardRows(int64_t head_size) {
  if (kWide<T>) return head_size <= 64 ? 32 : 16;
  return head_size <= 128 ? 128 : 64;
}

template <typename T>
int64_t ColumnsColumns(int64_t head_size) {
  if (kWide<T>) return head_size <= 128 ? 32 : 16;
  return head_size <= 128 ? 128 : 64;
}

template <typename T>
int64_t CorrectRows(int64_t head_size) {
  if (kWide<T>) return head_size <= 64 ? 32 : 16;
  return 64;
}

// New tokens times query heads of a group that the decode kernels take, at the most.
template <typename T>
int64_t MostDecodeRows(int64_t head_size) {
  if (kWide<T>) return head_size <= 64 ? 32 : kSmallRows;
  return 64;
}

// Device memory of one call, in one piece: sizes first, then the pointers.
class Scratch {
 public:
  explicit Scratch(DeviceCall& call) : call_(call) {}
  ~Scratch() {
    if (memory_ != nullptr) call_.Free(memory_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // `pointer` is set by Allocate, to `count` elements.
  template <typename Element>
  void Add(Element*& pointer, int64_t count) {
    parts_.push_back({reinterpret_cast<void**>(&pointer), bytes_});
    bytes_ += BlocksOf(count * static_cast<int64_t>(sizeof(Element)), kAlignment) * kAlignment;
  }

  void Allocate() {
    memory_ = call_.Allocate(static_cast<size_t>(bytes_));
    for (const Part& part : parts_) *part.pointer = static_cast<char*>(memory_) + part.offset;
  }

 private:
  struct Part {
    void** pointer;
    int64_t offset;
  };

  DeviceCall& call_;
  std::vector<Part> parts_;
  int64_t bytes_ = 0;
  void* memory_ = nullptr;
};

// int32 where kernels take int32; positions and heads are checked to fit.
int32_t Int(int64_t value) { return static_cast<int32_t>(value); }

template <typename T>
class Sequence {
 public:
  Sequence(const AttentionArguments<T>& arguments, const DeviceConstants& constants, DeviceCall& call)
      : a_(arguments), c_(constants), call_(call), scratch_(call) {
    const int64_t largest = std::max(a_.head_size, a_.value_head_size);
    head_size_ = largest <= 64 ? 64 : largest <= 128 ? 128 : 256;
    if (largest > head_size_) {
      throw std::invalid_argument("the CUDA kernels take head sizes up to 256; this model's is " +
                                  std::to_string(largest) + ": run the portable functions instead");
    }
    const int64_t most = std::numeric_limits<int32_t>::max();
    const int64_t elements = std::max(a_.sequence * a_.num_heads, a_.present_capacity) * largest;
    // Of `prepare`, the only kernel whose grid has the batch in its first dimension.
    const int64_t programs = (BlocksOf(a_.present_capacity, kPositions) * (a_.kv_num_heads + a_.calibrated_count) +
                              BlocksOf(a_.total, kChunk)) *
                             a_.batch;
    const bool too_many = a_.sequence > 0 && a_.batch > kMostBlocks;
    if (std::max(elements, programs) > most || too_many) {
      throw std::invalid_argument(std::to_string(a_.sequence) + " new tokens in a cache for " +
                                  std::to_string(a_.present_capacity) + ", in a batch of " + std::to_string(a_.batch) +
                                  ", are more than the CUDA kernels count");
    }
    const bool exact = a_.head_size == head_size_ && a_.value_head_size == head_size_;
    const bool general = !exact || a_.softcap > 0.0f || a_.scale <= 0.0f;
    const bool odd = a_.head_size % kSizeMultiple != 0 || a_.value_head_size % kSizeMultiple != 0;
    family_ = std::string(".") + TypeName<T>() +
              (odd       ? ".odd"
               : general ? ".general"
                         : ".") +
              std::to_string(head_size_);
    scale_ = static_cast<float>(a_.scale * kLog2E);
    softcap_ = static_cast<float>(a_.softcap * kLog2E);
    window_ = a_.sliding_window > 0 ? Int(std::min(a_.sliding_window, most / 2)) : -1;
    past_ = a_.total - a_.sequence;
    calibration_ = reinterpret_cast<const float*>(a_.calibration);
    calibration_stride_ = a_.calibrations == 1 ? 0 : Int(a_.calibrated_count * kStrengths);
  }

  void Run() {
    scratch_.Add(real_before_, a_.batch * (a_.total + 1));
    scratch_.Add(bounds_, a_.batch * kBounds);
    const int64_t rows = a_.sequence * (a_.num_heads / a_.kv_num_heads);
    if (a_.sequence == 0) {
      scratch_.Allocate();
      Prepare();
    } else if (a_.sequence <= kTokens && rows <= MostDecodeRows<T>(head_size_)) {
      Decode(rows <= kSmallRows ? kSmallRows : MostDecodeRows<T>(head_size_));
    } else {
      Prompt();
    }
  }

 private:
  template <typename... Arguments>
  void Launch(const std::string& kernel, int64_t x, int64_t y, int64_t z, const Arguments&... arguments) {
    Launch(call_.kernels.Find(kernel), x, y, z, arguments...);
  }

  template <typename... Arguments>
  void Launch(const Function& function, int64_t x, int64_t y, int64_t z, const Arguments&... arguments) {
    const Grid grid{static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)};
    cuda::Launch(function, grid, call_.stream, {Argument(arguments)...});
  }

  // Of a cache as (rows, head size).
  TensorMap Map(const T* cache, int64_t rows) const {
    const Driver& driver = Driver::Get();
    const uint64_t sizes[] = {static_cast<uint64_t>(a_.head_size), static_cast<uint64_t>(rows)};
    const uint64_t stride_bytes[] = {sizes[0] * sizeof(T)};
    const unsigned box[] = {kMapColumns, kMapRows}, steps[] = {1, 1};
    TensorMap map;
    driver.Check(driver.cuTensorMapEncodeTiled(&map, MapType<T>(), 2, const_cast<T*>(cache), sizes, stride_bytes, box,
                                               steps, kMapNoInterleave, kMapSwizzle128, kMapPromote128, kMapFillZero),
                 "describing the cache of " + std::to_string(rows) + " rows to the GPU");
    return map;
  }

  bool InPlace(const void* past, const void* present) const { return past == present || a_.past_capacity == 0; }

  void Prepare() {
    const bool in_place = InPlace(a_.past_key, a_.present_key) && InPlace(a_.past_value, a_.present_value) &&
                          (a_.calibrated_count == 0 || InPlace(a_.past_sink_scores, a_.present_sink_scores));
    // A copy onto itself is harmless: each program reads the positions that it writes.
    const int64_t copy_blocks = BlocksOf(in_place ? a_.sequence : a_.present_capacity, kPositions);
    const int64_t mask_blocks = BlocksOf(a_.total, kChunk);
    const int64_t sums_programs = in_place ? 0 : copy_blocks * a_.batch * a_.calibrated_count;
    const int64_t programs = copy_blocks * a_.batch * a_.kv_num_heads + mask_blocks * a_.batch + sums_programs;
    // An empty past begins in place, at position 0.
    Launch("prepare" + family_, programs, 1, 1, a_.past_key, a_.past_value, a_.past_sink_scores, a_.key, a_.value,
           a_.attention_mask, a_.present_key, a_.present_value, a_.present_sink_scores, real_before_, bounds_,
           Int(a_.batch), Int(past_), Int(a_.total), Int(a_.past_capacity), Int(a_.present_capacity),
           Int(a_.kv_num_heads), Int(a_.head_size), Int(a_.value_head_size), Int(in_place ? 1 : 0), Int(copy_blocks),
           Int(mask_blocks));
  }

  void Prompt() {
    float *lse, *maxima, *inverse, *rows_output;
    int32_t *sinks, *sinks_before;
    const int64_t states = a_.batch * a_.calibrated_count;
    scratch_.Add(lse, states * a_.sequence);
    scratch_.Add(maxima, states * a_.sequence);
    scratch_.Add(inverse, states * a_.sequence);
    scratch_.Add(rows_output, states * a_.sequence * a_.value_head_size);
    scratch_.Add(sinks, states * a_.total);
    scratch_.Add(sinks_before, states * (a_.total + 1));
    scratch_.Allocate();
    Prepare();

    const auto count = Int(a_.calibrated_count);
    const auto forward = [&](const Function& function, const auto&... maps) {
      Launch(function, BlocksOf(a_.sequence, ForwardRows<T>(head_size_)), a_.num_heads, a_.batch, maps..., a_.query,
             a_.present_key, a_.present_value, real_before_, bounds_, c_.calibrated_index, calibration_, c_.sink_logits,
             a_.output, lse, maxima, inverse, rows_output, Int(a_.sequence), Int(a_.total), Int(a_.present_capacity),
             Int(a_.num_heads), Int(a_.kv_num_heads), count, calibration_stride_, Int(a_.head_size),
             Int(a_.value_head_size), window_, scale_, softcap_);
    };
    const int64_t cache_rows = a_.batch * a_.kv_num_heads * a_.present_capacity;
    const Function* hopper =
        cache_rows <= std::numeric_limits<int32_t>::max() ? call_.kernels.FindHopper(family_) : nullptr;
    if (hopper == nullptr) {
      forward(call_.kernels.Find("forward" + family_));
    } else {
      // Behind each map its sizes and strides, as Triton has them among the parameters.
      const int64_t size = a_.head_size, one = 1;
      forward(*hopper, Map(a_.present_key, cache_rows), Int(cache_rows), Int(size), size, one,
              Map(a_.present_value, cache_rows), Int(cache_rows), Int(size), size, one);
    }
    if (count == 0) return;
    Launch("columns" + family_, BlocksOf(a_.total, ColumnsColumns<T>(head_size_)), count, a_.batch, a_.query,
           a_.present_key, real_before_, bounds_, c_.calibrated_heads, calibration_, lse, a_.present_sink_scores,
           Int(a_.sequence), Int(a_.total), Int(a_.present_capacity), Int(a_.num_heads), Int(a_.kv_num_heads), count,
           calibration_stride_, Int(a_.head_size), window_, scale_, softcap_);
    Launch("select", count, a_.batch, 1, a_.present_sink_scores, real_before_, calibration_, sinks, sinks_before,
           Int(a_.total), Int(a_.present_capacity), count, calibration_stride_, window_, Relative());
    Launch("correct" + family_, BlocksOf(a_.sequence, CorrectRows<T>(head_size_)), count, a_.batch, a_.query,
           a_.present_key, a_.present_value, real_before_, bounds_, c_.calibrated_heads, calibration_, c_.sink_logits,
           maxima, inverse, rows_output, sinks, sinks_before, a_.output, Int(a_.sequence), Int(a_.total),
           Int(a_.present_capacity), Int(a_.num_heads), Int(a_.kv_num_heads), count, calibration_stride_,
           Int(a_.head_size), Int(a_.value_head_size), window_, scale_, softcap_);
  }

  // `rows` of a tile: tokens times the query heads of a group, rounded up to what there is a kernel for.
  void Decode(int64_t rows) {
    // Columns that some row sees, in sections that give every multiprocessor about two programs.
    const int64_t first = window_ > 0 ? std::max<int64_t>(0, past_ - window_ + 1) / kDecodeColumns * kDecodeColumns : 0;
    const int64_t tiles = BlocksOf(a_.total - first, kDecodeColumns);
    const int64_t wanted = BlocksOf(2 * call_.kernels.multiprocessors(), a_.batch * a_.kv_num_heads);
    const int64_t tiles_each = BlocksOf(tiles, std::min({wanted, tiles, kMaxSections}));
    const int64_t sections = BlocksOf(tiles, tiles_each);
    const auto section = Int(tiles_each * kDecodeColumns);

    float *logits, *part_maxima, *part_sums, *part_output, *sink_mass, *sink_output;
    int32_t* arrived;
    const int64_t parts = a_.batch * a_.kv_num_heads * sections * rows;
    const int64_t states = a_.batch * a_.calibrated_count;
    scratch_.Add(part_maxima, parts);
    scratch_.Add(part_sums, parts);
    scratch_.Add(part_output, parts * a_.value_head_size);
    scratch_.Add(logits, states * a_.sequence * a_.total);
    scratch_.Add(sink_mass, states * sections * kTokens);
    scratch_.Add(sink_output, states * sections * kTokens * a_.value_head_size);
    scratch_.Add(arrived, states);
    scratch_.Allocate();
    Prepare();

    const auto count = Int(a_.calibrated_count);
    const std::string suffix = family_ + "." + std::to_string(rows);
    Launch("decode_split" + suffix, sections, a_.kv_num_heads, a_.batch, a_.query, a_.present_key, a_.present_value,
           real_before_, bounds_, c_.calibrated_index, calibration_, logits, part_maxima, part_sums, part_output,
           arrived, Int(a_.sequence), Int(a_.total), Int(a_.present_capacity), Int(a_.num_heads), Int(a_.kv_num_heads),
           count, calibration_stride_, Int(a_.head_size), Int(a_.value_head_size), window_, Int(first), section, scale_,
           softcap_);
    Launch("decode_finish" + suffix, std::max(sections, a_.sequence), a_.num_heads, a_.batch, a_.present_value,
           real_before_, c_.calibrated_index, calibration_, c_.sink_logits, logits, part_maxima, part_sums, part_output,
           a_.present_sink_scores, sink_mass, sink_output, arrived, a_.output, Int(a_.sequence), Int(a_.total),
           Int(a_.present_capacity), Int(a_.num_heads), Int(a_.kv_num_heads), count, calibration_stride_,
           Int(a_.value_head_size), Int(sections), window_, Int(first), section, Relative());
  }

  int32_t Relative() const { return a_.relative_threshold ? 1 : 0; }

  const AttentionArguments<T>& a_;
  const DeviceConstants& c_;
  DeviceCall& call_;
  Scratch scratch_;
  int64_t head_size_ = 0;  // of the kernels: 64, 128 or 256
  std::string family_;
  float scale_ = 0.0f;    // logits are in base 2
  float softcap_ = 0.0f;  // so is their cap
  int32_t window_ = -1;
  int64_t past_ = 0;
  const float* calibration_ = nullptr;
  int32_t calibration_stride_ = 0;  // floats from one sequence's to the next one's; 0: all have the same
  int32_t* real_before_ = nullptr;
  int32_t* bounds_ = nullptr;
};

}  // namespace

std::vector<float> SinkLogitsOfKernels(const float* sink_logits, int64_t num_heads) {
  constexpr double kMost = 3.0e38;
  std::vector<float> logits(static_cast<size_t>(num_heads), -std::numeric_limits<float>::infinity());
  for (size_t head = 0; head < logits.size() && sink_logits != nullptr; ++head) {
    if (sink_logits[head] <= kNoSinkLogit) continue;
    logits[head] = static_cast<float>(std::clamp(sink_logits[head] * kLog2E, -kMost, kMost));
  }
  return logits;
}

template <typename T>
void Attention(const AttentionArguments<T>& arguments, const DeviceConstants& constants, DeviceCall& call) {
  if (arguments.batch == 0 || arguments.present_capacity == 0) return;
  Sequence<T>(arguments, constants, call).Run();
}

template void Attention(const AttentionArguments<float>&, const DeviceConstants&, DeviceCall&);
template void Attention(const AttentionArguments<Float16>&, const DeviceConstants&, DeviceCall&);
template void Attention(const AttentionArguments<BFloat16>&, const DeviceConstants&, DeviceCall&);

}  // namespace act::cuda
