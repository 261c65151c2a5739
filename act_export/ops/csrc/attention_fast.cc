// The fast kernel: which rows and columns to look at, in which order and on which thread. The arithmetic is in
// kernels.h.
//
// Prompts: a block of rows of one head at a time, its map in cache from the logits to the last use. Then the later
// sinks are known, and the rows that see some are corrected from the sinks' columns alone. Decode (a few rows): the
// cache is read once, in slices.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#ifdef ACT_X86_KERNELS
#include <cpuid.h>
#endif

#include "attention.h"
#include "cache.h"
#include "kernels.h"
#include "scratch.h"
#include "sinks.h"

namespace act::fast {
namespace {

constexpr int64_t kDecodeRows = 8;        // calls with more new tokens are prompts
constexpr int64_t kDecodeSlice = 256;     // positions
constexpr int64_t kMaxChunks = 8;         // of the rows of a prompt, for one head
constexpr int64_t kChunkBlocks = 2;       // row blocks in a chunk, at least
constexpr int64_t kAppendRows = 512;      // positions that are copied to the cache at a time
constexpr int64_t kWaveFloats = 8 << 20;  // scratch for the heads of a prompt that are in flight
constexpr float kCancellation = 0.125f;   // of a row's sum: with less outside the later sinks, o - oK loses digits
constexpr float kSavedShare = 0.5f;       // of the threshold: mean of a column over a block from which it is saved
constexpr int64_t kUnlimited = INT64_MAX / 4;
constexpr float kTinySoftcap = 1e-10f;  // logits that are capped lower are all the same
constexpr float kNoSoftcap = 1e30f;     // no logit comes near caps from here on
constexpr float kMostFactor = 1e30f;    // of queries, under a soft cap: logits are at it, or 0
constexpr float kTinyScale = 1e-18f;    // smaller scales go into the queries: scores of learned sinks stay finite

template <typename T>
const TypedKernels<T>& Select(InstructionSet instruction_set) {
  const Kernels* kernels = &kPortableKernels;
#ifdef ACT_X86_KERNELS
  if (instruction_set == InstructionSet::kAvx512) kernels = &kAvx512Kernels;
  if (instruction_set == InstructionSet::kAvx2) kernels = &kAvx2Kernels;
#else
  static_cast<void>(instruction_set);
#endif
  if constexpr (std::is_same_v<T, float>) {
    return kernels->of_float;
  } else if constexpr (std::is_same_v<T, Float16>) {
    return kernels->of_float16;
  } else {
    return kernels->of_bfloat16;
  }
}

// Which positions of a sequence are real.
struct Sequence {
  RealTokens real;
  int64_t begin = 0;            // first real position
  int64_t end = 0;              // after the last
  std::vector<uint8_t> hidden;  // by position: padding; empty where all of [begin, end) are real

  Sequence(const int64_t* mask, int64_t total) : real(mask, total) {
    while (begin < total && mask[begin] == 0) ++begin;
    end = total;
    while (end > begin && mask[end - 1] == 0) --end;
    if (real.Count() == end - begin) return;
    hidden.resize(total);
    for (int64_t j = 0; j < total; ++j) hidden[j] = mask[j] == 0;
  }

  const uint8_t* Hidden() const { return hidden.empty() ? nullptr : hidden.data(); }
};

// What the two ways of working share.
template <typename T>
class Layer {
 public:
  Layer(const AttentionArguments<T>& arguments, Host& host, InstructionSet instruction_set)
      : a_(arguments), host_(host), kernels_(Select<T>(instruction_set)), past_(a_.total - a_.sequence) {
    for (int64_t b = 0; b < a_.batch; ++b) {
      sequences_.emplace_back(a_.attention_mask + b * a_.total, a_.total);
      bool wanted = false;
      for (int64_t index = 0; index < a_.calibrated_count; ++index) {
        wanted = wanted || !a_.StrengthsOf(b, index).KeepsSinks();
      }
      sink_tests_.push_back(wanted ? SinkTest(a_.total, sequences_[b].real, a_.sliding_window, a_.relative_threshold)
                                   : SinkTest());
    }
  }

 protected:
  int64_t Group() const { return a_.num_heads / a_.kv_num_heads; }
  int64_t Window() const { return a_.sliding_window > 0 ? a_.sliding_window : kUnlimited; }
  int64_t CalibratedIndex(int64_t h) const { return a_.calibrated_count > 0 ? a_.calibrated_index[h] : -1; }

  // Of a head that can't be calibrated: those that leave it as it is.
  Strengths StrengthsOf(int64_t b, int64_t h) const {
    const int64_t index = CalibratedIndex(h);
    return index >= 0 ? a_.StrengthsOf(b, index) : Strengths{};
  }

  // No factor, and no query times it, is infinite: 0 times that is not a number.
  Scores ScoresOfLayer() const {
    if (a_.softcap > 0.0f && a_.softcap < kTinySoftcap) return {0.0f, 0.0f, kLog2E};
    if (a_.softcap > 0.0f && a_.softcap < kNoSoftcap) {
      return {std::clamp(a_.scale / a_.softcap, -kMostFactor, kMostFactor), a_.softcap, kLog2E};
    }
    const float magnitude = std::abs(a_.scale);
    if (magnitude < kTinyScale) return {a_.scale, 0.0f, kLog2E};
    return {a_.scale > 0.0f ? 1.0f : -1.0f, 0.0f, std::min(magnitude * kLog2E, std::numeric_limits<float>::max())};
  }

  // What a logit that was scaled and capped is as a score; finite.
  float Score(double logit) const {
    constexpr double kMost = 3.0e38;
    return static_cast<float>(std::clamp(logit * kLog2E / ScoresOfLayer().exponent, -kMost, kMost));
  }

  // Score of the learned sink of a head; -infinity for none.
  float SinkScore(int64_t h) const {
    if (a_.sink_logits == nullptr || a_.sink_logits[h] <= kNoSinkLogit) return -std::numeric_limits<float>::infinity();
    return Score(a_.sink_logits[h]);
  }

  // Added to the scores of the initial token: its weight times gamma.
  float OnInitial(const Strengths& strengths) const {
    return strengths.gamma == 1.0f ? 0.0f : Score(std::log(static_cast<double>(strengths.gamma)));
  }

  Cache<T> CacheOf(int64_t b, int64_t kv_head) const {
    const int64_t head = (b * a_.kv_num_heads + kv_head) * a_.present_capacity;
    return {a_.present_key + head * a_.head_size, a_.present_value + head * a_.value_head_size, a_.head_size,
            a_.value_head_size};
  }

  const T* Query(int64_t b, int64_t h, int64_t row) const {
    return a_.query + ((b * a_.sequence + row) * a_.num_heads + h) * a_.head_size;
  }

  T* Output(int64_t b, int64_t h, int64_t row) const {
    return a_.output + ((b * a_.sequence + row) * a_.num_heads + h) * a_.value_head_size;
  }

  void StoreRow(const float* row, T* to) const { kernels_.store(row, a_.value_head_size, to); }

  // Running column sums before the rows of this call add to them: those of the past, nothing for new tokens, and what
  // the past buffer holds beyond `total`.
  float* CarrySums(int64_t b, int64_t index) const {
    const int64_t head = b * a_.calibrated_count + index;
    const float* past = a_.past_sink_scores + head * a_.past_capacity;
    float* present = a_.present_sink_scores + head * a_.present_capacity;
    if (past != present) {
      std::copy(past, past + past_, present);
      if (a_.past_capacity > a_.total) std::copy(past + a_.total, past + a_.past_capacity, present + a_.total);
    }
    std::fill(present + past_, present + a_.total, 0.0f);
    return present;
  }

  // o = factors on its parts from the later sinks and from the rest.
  void Combine(const RowFactors& factors, const float* from_sinks, const float* from_rest, float* o) const {
    for (int64_t d = 0; d < a_.value_head_size; ++d) {
      o[d] = factors.sinks * from_sinks[d] + factors.rest * from_rest[d];
    }
  }

  const AttentionArguments<T>& a_;
  Host& host_;
  const TypedKernels<T>& kernels_;
  const int64_t past_;
  std::vector<Sequence> sequences_;
  std::vector<SinkTest> sink_tests_;  // of each sequence; made where a head has use for it
};

// ---------------------------------------------------------------------------------------------------------------------

template <typename T>
class Prompt : Layer<T> {
  using Base = Layer<T>;
  using Base::a_;
  using Base::host_;
  using Base::kernels_;
  using Base::past_;
  using Base::sequences_;
  using Base::sink_tests_;

 public:
  Prompt(const AttentionArguments<T>& arguments, Host& host, InstructionSet instruction_set)
      : Base(arguments, host, instruction_set) {
    blocks_ = (a_.sequence + kRowBlock - 1) / kRowBlock;
    const int64_t chunks = std::clamp<int64_t>(blocks_ / kChunkBlocks, 1, kMaxChunks);
    chunk_rows_ = (blocks_ + chunks - 1) / chunks * kRowBlock;
    chunks_ = (a_.sequence + chunk_rows_ - 1) / chunk_rows_;
  }

  void Attend() {
    Append();
    const int64_t count = a_.batch * a_.num_heads;
    for (int64_t next = 0; next < count;) {
      std::vector<Head> heads;
      int64_t number = 0;
      for (int64_t floats = 0; next < count && floats < kWaveFloats; ++next) {
        const int64_t b = next / a_.num_heads;
        const int64_t h = next % a_.num_heads;
        heads.push_back({b, h, Base::CalibratedIndex(h), Base::StrengthsOf(b, h)});
        if (heads.back().MovesMass()) {
          heads.back().number = number++;
          heads.back().scratch = floats;
          floats += ScratchOfHead();
        }
      }
      AttendHeads(heads);
    }
  }

 private:
  struct Head {
    int64_t b;
    int64_t h;
    int64_t index;  // among the calibrated heads, or -1
    Strengths strengths;
    int64_t number = 0;   // among those of the wave whose later sinks change
    int64_t scratch = 0;  // where its scratch begins
    std::vector<int64_t> sinks = {};
    std::vector<int64_t> recompute = {};  // first rows of blocks with a later sink that was not saved

    bool MovesMass() const { return !strengths.KeepsSinks(); }
  };

  // A head whose later sinks change: statistics of the rows, column sums of each chunk, and rows that wait for their
  // correction.
  int64_t ScratchOfHead() const {
    const int64_t output = std::is_same_v<T, float> ? 0 : a_.sequence * a_.value_head_size;
    return (3 * a_.sequence + chunks_ * a_.total + output + 15) / 16 * 16;
  }
  SavedColumns& SavedAt(const Head& head, int64_t row) const { return saved_[head.number * blocks_ + row / kRowBlock]; }
  float* Maxima(const Head& head) const { return wave_ + head.scratch; }
  float* Normalisers(const Head& head) const { return Maxima(head) + a_.sequence; }
  float* RowSums(const Head& head) const { return Normalisers(head) + a_.sequence; }
  float* ColumnSums(const Head& head, int64_t chunk) const { return RowSums(head) + a_.sequence + chunk * a_.total; }

  // Attention of such a head in float: (sequence, value_head_size), rows `AttendedStride` apart.
  float* Attended(const Head& head, int64_t row) const {
    if constexpr (std::is_same_v<T, float>) {
      return Base::Output(head.b, head.h, row);
    } else {
      return ColumnSums(head, chunks_) + row * a_.value_head_size;
    }
  }
  int64_t AttendedStride() const {
    return std::is_same_v<T, float> ? a_.num_heads * a_.value_head_size : a_.value_head_size;
  }

  void Append() {
    const int64_t parts = (a_.present_capacity + kAppendRows - 1) / kAppendRows;
    host_.ParallelFor(a_.batch * a_.kv_num_heads * parts, [&](int64_t i) {
      const int64_t head = i / parts;
      const int64_t begin = i % parts * kAppendRows;
      AppendKeysAndValues(a_, head / a_.kv_num_heads, head % a_.kv_num_heads, begin,
                          std::min(begin + kAppendRows, a_.present_capacity));
    });
  }

  void AttendHeads(std::vector<Head>& heads) {
    int64_t floats = 0;
    std::vector<Head*> calibrated;
    for (Head& head : heads) {
      if (!head.MovesMass()) continue;
      floats += ScratchOfHead();
      calibrated.push_back(&head);
    }
    Scratch<float> wave(host_, floats);
    wave_ = wave.Data();
    Scratch<SavedColumns> saved(host_, static_cast<int64_t>(calibrated.size()) * blocks_);
    saved_ = saved.Data();
    std::vector<std::atomic<int64_t>> waiting(heads.size());
    for (auto& count : waiting) count.store(chunks_, std::memory_order_relaxed);
    // The last rows see the most columns: they begin, so that no thread is left alone with much work.
    const auto head_count = static_cast<int64_t>(heads.size());
    host_.ParallelFor(head_count * chunks_, [&](int64_t i) {
      Head& head = heads[i % head_count];
      AttendChunk(head, chunks_ - 1 - i / head_count);
      if (waiting[i % head_count].fetch_sub(1, std::memory_order_acq_rel) != 1 || head.index < 0) return;
      float* sums = Base::CarrySums(head.b, head.index);
      if (head.MovesMass()) CalibrateHead(head, sums);
    });
    std::vector<std::pair<const Head*, int64_t>> blocks;
    for (const Head* head : calibrated) {
      for (const int64_t row : head->recompute) blocks.emplace_back(head, row);
    }
    host_.ParallelFor(static_cast<int64_t>(blocks.size()), [&](int64_t i) {
      const auto [head, row] = blocks[i];
      const int64_t rows = std::min(kRowBlock, a_.sequence - row);
      RecomputeBlock(*head, row, rows);
      StoreBlock(*head, row, rows);
    });
  }

  // Rows of a chunk, and everything of them but what the caller wants to know.
  RowBlock<T> BlockAt(const Head& head, int64_t row, int64_t rows) const {
    RowBlock<T> block;
    block.cache = Base::CacheOf(head.b, head.h / Base::Group());
    block.scores = Base::ScoresOfLayer();
    block.query = Base::Query(head.b, head.h, row);
    block.query_stride = a_.num_heads * a_.head_size;
    block.rows = rows;
    block.position = past_ + row;
    block.window = Base::Window();
    block.sink = Base::SinkScore(head.h);
    const Sequence& sequence = sequences_[head.b];
    block.columns.begin = std::max(sequence.begin, FirstVisible(block.position, a_.sliding_window));
    block.columns.end = std::max(block.columns.begin, std::min(sequence.end, block.position + rows));
    block.columns.hidden = sequence.Hidden();
    block.initial = sequence.begin;
    block.on_initial = Base::OnInitial(head.strengths);
    return block;
  }

  int64_t ScratchOfBlocks() const {
    const int64_t columns = std::min(a_.total, Base::Window() + kRowBlock);
    return RowBlockScratch(a_.head_size, a_.value_head_size, columns);
  }

  // Positions that the rows of a chunk may see end here.
  int64_t ChunkEnd(int64_t chunk) const { return past_ + std::min((chunk + 1) * chunk_rows_, a_.sequence); }

  template <typename Body>
  void ForEachBlock(int64_t chunk, const Body& body) const {
    const int64_t end = std::min((chunk + 1) * chunk_rows_, a_.sequence);
    for (int64_t row = chunk * chunk_rows_; row < end; row += kRowBlock) body(row, std::min(kRowBlock, end - row));
  }

  // Attention as it is before later sinks change, and the column sums of the chunk.
  void AttendChunk(const Head& head, int64_t chunk) const {
    const int64_t padded = PaddedSize(a_.value_head_size);
    Scratch<float> scratch(host_, ScratchOfBlocks() + (std::is_same_v<T, float> ? 0 : kRowBlock * padded));
    if (head.MovesMass()) std::fill_n(ColumnSums(head, chunk), ChunkEnd(chunk), 0.0f);
    ForEachBlock(chunk, [&](int64_t row, int64_t rows) {
      float maxima[kRowBlock];
      float normalisers[kRowBlock];
      float weights[kRowBlock];
      RowBlock<T> block = BlockAt(head, row, rows);
      block.scratch = scratch.Data();
      block.maxima = maxima;
      block.normalisers = normalisers;
      if (head.MovesMass()) {
        for (int64_t r = 0; r < rows; ++r)
          weights[r] = sequences_[head.b].real.IsReal(block.position + r) ? 1.0f : 0.0f;
        block.maxima = Maxima(head) + row;
        block.normalisers = Normalisers(head) + row;
        block.weights = weights;
        block.column_sums = ColumnSums(head, chunk);
        block.row_sums = RowSums(head) + row;
        block.saved = &SavedAt(head, row);
        block.saved->count = 0;
        block.saved_above = sink_tests_[head.b].Tau(head.strengths.threshold) * kSavedShare;
        block.last = row + rows == a_.sequence;
      }
      if constexpr (std::is_same_v<T, float>) {
        block.output = Base::Output(head.b, head.h, row);
        block.output_stride = a_.num_heads * a_.value_head_size;
        kernels_.attend(block);
      } else if (head.MovesMass()) {
        block.output = Attended(head, row);
        block.output_stride = AttendedStride();
        kernels_.attend(block);
      } else {
        block.output = scratch.Data() + ScratchOfBlocks();
        block.output_stride = padded;
        kernels_.attend(block);
        for (int64_t r = 0; r < rows; ++r) {
          Base::StoreRow(block.output + r * padded, Base::Output(head.b, head.h, row + r));
        }
      }
    });
  }

  // All rows of this head have been attended to; `sums` are its column sums before them.
  void CalibrateHead(Head& head, float* sums) const {
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      const float* of_chunk = ColumnSums(head, chunk);
      const int64_t end = ChunkEnd(chunk);
      for (int64_t j = 0; j < end; ++j) sums[j] += of_chunk[j];
    }
    head.sinks = sink_tests_[head.b].LaterSinks(sums, head.strengths.threshold);
    for (int64_t row = 0; row < a_.sequence; row += kRowBlock) {
      const int64_t rows = std::min(kRowBlock, a_.sequence - row);
      if (AddSavedColumns(head, row, rows)) {
        StoreBlock(head, row, rows);
      } else {
        head.recompute.push_back(row);
      }
    }
  }

  // Calibrates a block, where all of its later sinks were saved; otherwise their columns are as they were.
  bool AddSavedColumns(const Head& head, int64_t row, int64_t rows) const {
    const SavedColumns& saved = SavedAt(head, row);
    const RowBlock<T> block = BlockAt(head, row, rows);
    const auto begin = std::lower_bound(head.sinks.begin(), head.sinks.end(), block.columns.begin);
    const auto end = std::lower_bound(begin, head.sinks.end(), block.columns.end);
    if (saved.count == 0) return begin == end;
    Correction<T> correction;
    int64_t found = 0;
    for (int64_t k = 0; k < saved.count; ++k) {
      correction.sinks[k] = std::binary_search(begin, end, saved.positions[k]);
      found += correction.sinks[k];
    }
    const bool all = found == end - begin;
    correction.cache = block.cache;
    correction.saved = &saved;
    correction.beta = all ? head.strengths.beta : 1.0f;
    correction.rows = rows;
    correction.output = Attended(head, row);
    correction.output_stride = AttendedStride();
    kernels_.correct(correction);
    return all;
  }

  void StoreBlock(const Head& head, int64_t row, int64_t rows) const {
    if constexpr (!std::is_same_v<T, float>) {
      for (int64_t r = row; r < row + rows; ++r) Base::StoreRow(Attended(head, r), Base::Output(head.b, head.h, r));
    }
  }

  // Calibrates a block, its later sinks computed again.
  void RecomputeBlock(const Head& head, int64_t row, int64_t rows) const {
    const int64_t padded = PaddedSize(a_.value_head_size);
    RowBlock<T> block = BlockAt(head, row, rows);
    const auto begin = std::lower_bound(head.sinks.begin(), head.sinks.end(), block.columns.begin);
    const auto end = std::lower_bound(begin, head.sinks.end(), block.columns.end);
    Scratch<float> scratch(host_, RowBlockScratch(a_.head_size, a_.value_head_size, end - begin) + kRowBlock * padded);
    float mass[kRowBlock];
    block.columns = {head.sinks.data(), begin - head.sinks.begin(), end - head.sinks.begin(), nullptr};
    block.given = true;
    block.maxima = Maxima(head) + row;
    block.normalisers = Normalisers(head) + row;
    block.mass = mass;
    block.output = scratch.Data();
    block.output_stride = padded;
    block.scratch = scratch.Data() + kRowBlock * padded;
    kernels_.attend(block);

    const float* row_sums = RowSums(head) + row;
    bool cancels = false;
    for (int64_t r = 0; r < rows; ++r) cancels = cancels || row_sums[r] - mass[r] < kCancellation * row_sums[r];
    if (cancels) return CalibrateFromRest(head, row, rows, mass, scratch.Data());
    for (int64_t r = 0; r < rows; ++r) {
      if (mass[r] == 0.0f) continue;
      const double rest = static_cast<double>(row_sums[r]) - mass[r];
      const RowFactors factors = Calibrate(head.strengths.beta, mass[r], rest);
      const float* from_sinks = scratch.Data() + r * padded;
      float* o = Attended(head, row + r);
      for (int64_t d = 0; d < a_.value_head_size; ++d) {
        o[d] = factors.sinks * from_sinks[d] + factors.rest * (o[d] - from_sinks[d]);
      }
    }
  }

  // As RecomputeBlock, with what comes from the other columns summed anew.
  void CalibrateFromRest(const Head& head, int64_t row, int64_t rows, const float* mass,
                         const float* from_sinks) const {
    const int64_t padded = PaddedSize(a_.value_head_size);
    Scratch<float> scratch(host_, ScratchOfBlocks() + kRowBlock * padded);
    Scratch<uint8_t> hidden(host_, a_.total);
    float rest[kRowBlock];
    RowBlock<T> block = BlockAt(head, row, rows);
    for (int64_t j = block.columns.begin; j < block.columns.end; ++j) hidden[j] = !sequences_[head.b].real.IsReal(j);
    for (const int64_t j : head.sinks) hidden[j] = 1;
    block.columns.hidden = hidden.Data();
    block.given = true;
    block.maxima = Maxima(head) + row;
    block.normalisers = Normalisers(head) + row;
    block.mass = rest;
    block.output = scratch.Data();
    block.output_stride = padded;
    block.scratch = scratch.Data() + kRowBlock * padded;
    kernels_.attend(block);
    for (int64_t r = 0; r < rows; ++r) {
      if (mass[r] == 0.0f) continue;
      Base::Combine(Calibrate(head.strengths.beta, mass[r], rest[r]), from_sinks + r * padded,
                    block.output + r * padded, Attended(head, row + r));
    }
  }

  int64_t blocks_;
  int64_t chunk_rows_;
  int64_t chunks_;
  float* wave_ = nullptr;
  SavedColumns* saved_ = nullptr;
};

// ---------------------------------------------------------------------------------------------------------------------

template <typename T>
class Decode : Layer<T> {
  using Base = Layer<T>;
  using Base::a_;
  using Base::host_;
  using Base::kernels_;
  using Base::past_;
  using Base::sequences_;
  using Base::sink_tests_;

 public:
  Decode(const AttentionArguments<T>& arguments, Host& host, InstructionSet instruction_set)
      : Base(arguments, host, instruction_set),
        rows_(Base::Group() * a_.sequence),
        padded_key_(PaddedSize(a_.head_size)),
        padded_value_(PaddedSize(a_.value_head_size)),
        slices_(Slices(a_)),
        padded_total_(PaddedSize(a_.total)),
        heads_(a_.batch * a_.kv_num_heads) {}

  // Floats for each key-value head: queries, probabilities, what gamma adds, what comes of each slice, and what joins
  // them.
  static int64_t ScratchOfHead(const AttentionArguments<T>& a) {
    const int64_t rows = a.num_heads / a.kv_num_heads * a.sequence;
    const int64_t of_slices = Slices(a) * rows * (2 + PaddedSize(a.value_head_size));
    return rows * (PaddedSize(a.head_size) + PaddedSize(a.total) + 1) + of_slices + FinishScratch(a);
  }

  void Attend() {
    // One allocation: threads that all asked for memory would wait for each other as long as the work takes.
    Scratch<float> memory(host_, heads_ * ScratchOfHead(a_));
    queries_ = memory.Data();
    probabilities_ = queries_ + heads_ * rows_ * padded_key_;
    outputs_ = probabilities_ + heads_ * rows_ * padded_total_;
    finish_ = outputs_ + heads_ * slices_ * rows_ * padded_value_;
    maxima_ = finish_ + heads_ * FinishScratch(a_);
    sums_ = maxima_ + heads_ * slices_ * rows_;
    on_initial_ = sums_ + heads_ * slices_ * rows_;
    Scratch<int64_t> visible(host_, 2 * a_.batch * rows_);
    visible_ = visible.Data();
    PrepareRows();
    std::vector<std::atomic<int64_t>> waiting(heads_);
    for (auto& count : waiting) count.store(slices_, std::memory_order_relaxed);
    host_.ParallelFor(heads_ * slices_, [&](int64_t i) {
      const int64_t head = i / slices_;
      AttendSlice(head, i % slices_);
      if (waiting[head].fetch_sub(1, std::memory_order_acq_rel) == 1) Finish(head);
    });
  }

 private:
  static int64_t Slices(const AttentionArguments<T>& a) { return (a.total + kDecodeSlice - 1) / kDecodeSlice; }

  // Of a key-value head: its rows' outputs, two more, factors by slice, and sums of the probabilities.
  static int64_t FinishScratch(const AttentionArguments<T>& a) {
    const int64_t rows = a.num_heads / a.kv_num_heads * a.sequence;
    return (rows + 2) * PaddedSize(a.value_head_size) + PaddedSize(rows * (Slices(a) + 1));
  }

  // Rows of a key-value head: those of its first query head, then of the next.
  int64_t QueryHead(int64_t head, int64_t row) const {
    return head % a_.kv_num_heads * Base::Group() + row / a_.sequence;
  }
  int64_t QueryRow(int64_t row) const { return row % a_.sequence; }

  float* Probabilities(int64_t head, int64_t row) const {
    return probabilities_ + (head * rows_ + row) * padded_total_;
  }
  float* Output(int64_t head, int64_t slice) const {
    return outputs_ + (head * slices_ + slice) * rows_ * padded_value_;
  }

  // See DecodeSlice.
  float Shift() const { return std::ceil(std::log2(static_cast<float>(a_.total))); }

  void AttendSlice(int64_t head, int64_t slice) const {
    const int64_t b = head / a_.kv_num_heads;
    const Sequence& sequence = sequences_[b];
    const int64_t begin = slice * kDecodeSlice;
    const int64_t end = std::min(begin + kDecodeSlice, a_.total);
    AppendKeysAndValues(a_, b, head % a_.kv_num_heads, begin, slice == slices_ - 1 ? a_.present_capacity : end);

    constexpr int64_t kOnStack = 8192;
    const int64_t scratch_size = DecodeScratch(a_.value_head_size);
    alignas(kAlignment) float stack[kOnStack];
    Scratch<float> heap(host_, scratch_size > kOnStack ? scratch_size : 0);
    DecodeSlice<T> s;
    s.cache = Base::CacheOf(b, head % a_.kv_num_heads);
    // Positions that some row sees: with a window, or padding, there may be few, or none.
    const int64_t* row_begin = visible_ + 2 * b * rows_;
    const int64_t* row_end = row_begin + rows_;
    s.begin = std::clamp(*std::min_element(row_begin, row_begin + rows_), begin, end);
    s.end = std::clamp(*std::max_element(row_end, row_end + rows_), s.begin, end);
    for (int64_t row = 0; row < rows_; ++row) {
      float* p = Probabilities(head, row);
      std::fill(p + begin, p + s.begin, 0.0f);
      std::fill(p + s.end, p + end, 0.0f);
    }
    s.hidden = sequence.Hidden();
    s.scores = Base::ScoresOfLayer();
    if (s.begin <= sequence.begin && sequence.begin < s.end) s.on_initial = on_initial_ + head * rows_;
    s.initial = sequence.begin;
    s.shift = Shift();
    s.rows = rows_;
    s.queries = queries_ + head * rows_ * padded_key_;
    s.row_begin = row_begin;
    s.row_end = row_end;
    s.maxima = maxima_ + (head * slices_ + slice) * rows_;
    s.sums = sums_ + (head * slices_ + slice) * rows_;
    s.probabilities = Probabilities(head, 0);
    s.probability_stride = padded_total_;
    s.output = Output(head, slice);
    s.scratch = scratch_size > kOnStack ? heap.Data() : stack;
    kernels_.decode(s);
  }

  // What every slice needs of the rows: queries as floats, what gamma adds, and the positions that they see.
  void PrepareRows() const {
    for (int64_t head = 0; head < heads_; ++head) {
      const int64_t b = head / a_.kv_num_heads;
      for (int64_t row = 0; row < rows_; ++row) {
        const int64_t h = QueryHead(head, row);
        PackQuery(Base::Query(b, h, QueryRow(row)), queries_ + (head * rows_ + row) * padded_key_);
        on_initial_[head * rows_ + row] = Base::OnInitial(Base::StrengthsOf(b, h));
      }
    }
    for (int64_t b = 0; b < a_.batch; ++b) {
      for (int64_t row = 0; row < rows_; ++row) {
        const int64_t position = past_ + QueryRow(row);
        visible_[2 * b * rows_ + row] = std::max(FirstVisible(position, a_.sliding_window), sequences_[b].begin);
        visible_[(2 * b + 1) * rows_ + row] = std::min(position + 1, sequences_[b].end);
      }
    }
  }

  void PackQuery(const T* query, float* to) const {
    const float factor = Base::ScoresOfLayer().query_factor;
    for (int64_t d = 0; d < a_.head_size; ++d) to[d] = ToFloat(query[d]) * factor;
    std::fill(to + a_.head_size, to + padded_key_, 0.0f);
  }

  // All slices of this head have been attended to.
  void Finish(int64_t head) const {
    const int64_t b = head / a_.kv_num_heads;
    float* attended = finish_ + head * FinishScratch(a_);
    float* factors = attended + (rows_ + 2) * padded_value_;
    float* row_sums = factors + rows_ * slices_;
    for (int64_t row = 0; row < rows_; ++row) {
      row_sums[row] = JoinSlices(head, row, attended + row * padded_value_, factors + row * slices_);
    }
    for (int64_t first = 0; first < rows_; first += a_.sequence) {
      const int64_t index = Base::CalibratedIndex(QueryHead(head, first));
      if (index < 0) continue;
      float* sums = Base::CarrySums(b, index);
      const Strengths& strengths = a_.StrengthsOf(b, index);
      if (strengths.KeepsSinks()) continue;
      SumColumns(head, first, factors + first * slices_, sums);
      const std::vector<int64_t> sinks = sink_tests_[b].LaterSinks(sums, strengths.threshold);
      for (int64_t row = first; row < first + a_.sequence && !sinks.empty(); ++row) {
        CalibrateRow(head, row, strengths.beta, sinks, row_sums[row], factors + row * slices_,
                     attended + row * padded_value_, attended + rows_ * padded_value_);
      }
    }
    for (int64_t row = 0; row < rows_; ++row) {
      Base::StoreRow(attended + row * padded_value_, Base::Output(b, QueryHead(head, row), QueryRow(row)));
    }
  }

  // The output of a row, and what its exponentials in each slice are multiplied by to be probabilities; returns the sum
  // of these.
  float JoinSlices(int64_t head, int64_t row, float* attended, float* factors) const {
    const float* maxima = maxima_ + head * slices_ * rows_ + row;
    const float* sums = sums_ + head * slices_ * rows_ + row;
    const float exponent = Base::ScoresOfLayer().exponent;
    const float sink = Base::SinkScore(QueryHead(head, row));
    float maximum = sink;
    for (int64_t s = 0; s < slices_; ++s) maximum = std::max(maximum, maxima[s * rows_]);
    double total = 0.0;
    for (int64_t s = 0; s < slices_; ++s) {
      // A slice that the row does not see has a sum of 0, and any maximum.
      factors[s] = sums[s * rows_] == 0.0f ? 0.0f : std::exp2((maxima[s * rows_] - maximum) * exponent);
      total += static_cast<double>(factors[s]) * sums[s * rows_];
    }
    const double of_keys = total;
    const bool has_sink = sink > -std::numeric_limits<float>::infinity();
    if (has_sink) total += std::exp2((sink - maximum) * exponent - Shift());
    const auto normaliser = static_cast<float>(total == 0.0 ? 0.0 : 1.0 / total);
    std::fill_n(attended, padded_value_, 0.0f);
    for (int64_t s = 0; s < slices_; ++s) {
      factors[s] *= normaliser;
      const float* output = Output(head, s) + row * padded_value_;
      for (int64_t d = 0; d < padded_value_; ++d) attended[d] += factors[s] * output[d];
    }
    return has_sink ? static_cast<float>(of_keys / total) : 1.0f;
  }

  // Adds to the column sums of a query head, whose rows begin at `first`; its factors are (sequence, slices).
  void SumColumns(int64_t head, int64_t first, const float* factors, float* sums) const {
    for (int64_t i = 0; i < a_.sequence; ++i) {
      if (!sequences_[head / a_.kv_num_heads].real.IsReal(past_ + i)) continue;
      const float* p = Probabilities(head, first + i);
      for (int64_t s = 0; s < slices_; ++s) {
        const float factor = factors[i * slices_ + s];
        const int64_t end = std::min((s + 1) * kDecodeSlice, a_.total);
        for (int64_t j = s * kDecodeSlice; j < end; ++j) sums[j] += factor * p[j];
      }
    }
  }

  void CalibrateRow(int64_t head, int64_t row, float beta, const std::vector<int64_t>& sinks, float row_sum,
                    const float* factors, float* attended, float* scratch) const {
    float* p = Probabilities(head, row);
    float* from_sinks = scratch;
    float* from_rest = scratch + padded_value_;
    const Cache<T> cache = Base::CacheOf(head / a_.kv_num_heads, head % a_.kv_num_heads);
    double mass = 0.0;
    std::fill_n(from_sinks, padded_value_, 0.0f);
    for (const int64_t j : sinks) {
      const float probability = p[j] * factors[j / kDecodeSlice];
      if (probability == 0.0f) continue;
      mass += probability;
      const T* value = cache.values + j * a_.value_head_size;
      for (int64_t d = 0; d < a_.value_head_size; ++d) from_sinks[d] += probability * ToFloat(value[d]);
    }
    if (mass == 0.0) return;
    double rest = row_sum - mass;
    if (rest < kCancellation * row_sum) {
      for (const int64_t j : sinks) p[j] = 0.0f;
      rest = 0.0;
      for (int64_t j = 0; j < a_.total; ++j) {
        p[j] *= factors[j / kDecodeSlice];
        rest += p[j];
      }
      kernels_.add_values({cache, p, 0, a_.total, from_rest});
    } else {
      for (int64_t d = 0; d < a_.value_head_size; ++d) from_rest[d] = attended[d] - from_sinks[d];
    }
    Base::Combine(Calibrate(beta, mass, rest), from_sinks, from_rest, attended);
  }

  const int64_t rows_;  // of a key-value head
  const int64_t padded_key_;
  const int64_t padded_value_;
  const int64_t slices_;
  const int64_t padded_total_;
  const int64_t heads_;  // key-value heads of all sequences
  float* queries_ = nullptr;
  float* probabilities_ = nullptr;
  float* outputs_ = nullptr;
  float* finish_ = nullptr;
  int64_t* visible_ = nullptr;
  float* maxima_ = nullptr;
  float* sums_ = nullptr;
  float* on_initial_ = nullptr;  // of each row
};

}  // namespace

const char* Name(InstructionSet instruction_set) {
  switch (instruction_set) {
    case InstructionSet::kAvx512:
      return "AVX-512";
    case InstructionSet::kAvx2:
      return "AVX2";
    default:
      return "portable";
  }
}

bool IsSupported(InstructionSet instruction_set) {
  if (instruction_set == InstructionSet::kPortable) return true;
#ifdef ACT_X86_KERNELS
  // Of all compilers, not all know the name "f16c".
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & (1u << 29)) != 0;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  if (instruction_set == InstructionSet::kAvx2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

InstructionSet Best() {
  static const InstructionSet best = IsSupported(InstructionSet::kAvx512) ? InstructionSet::kAvx512
                                     : IsSupported(InstructionSet::kAvx2) ? InstructionSet::kAvx2
                                                                          : InstructionSet::kPortable;
  return best;
}

namespace {

// Sequences [begin, begin + count) of a call.
template <typename T>
AttentionArguments<T> Part(const AttentionArguments<T>& a, int64_t begin, int64_t count) {
  AttentionArguments<T> part = a;
  const int64_t tokens = begin * a.sequence;
  const int64_t key_width = a.kv_num_heads * a.head_size;
  const int64_t value_width = a.kv_num_heads * a.value_head_size;
  part.batch = count;
  part.query += tokens * a.num_heads * a.head_size;
  part.key += tokens * key_width;
  part.value += tokens * value_width;
  part.past_key += begin * a.past_capacity * key_width;
  part.past_value += begin * a.past_capacity * value_width;
  part.past_sink_scores += begin * a.past_capacity * a.calibrated_count;
  part.attention_mask += begin * a.total;
  part.output += tokens * a.num_heads * a.value_head_size;
  part.present_key += begin * a.present_capacity * key_width;
  part.present_value += begin * a.present_capacity * value_width;
  part.present_sink_scores += begin * a.present_capacity * a.calibrated_count;
  if (a.calibrations > 1) {
    part.calibration += begin * a.calibrated_count;
    part.calibrations = count;
  }
  return part;
}

// What the tables of a sequence take, about: sums of its mask, rows that see each position, what is hidden.
int64_t TableBytes(int64_t total) { return 16 * total + 512; }

}  // namespace

template <typename T>
void Attention(const AttentionArguments<T>& a, Host& host, InstructionSet instruction_set, int64_t most_bytes) {
  if (a.batch == 0 || a.present_capacity == 0) return;
  if (a.sequence == 0) return KeepCache(a);
  const int64_t cache = a.present_capacity * a.kv_num_heads * (a.head_size + a.value_head_size);
  int64_t bytes_each = TableBytes(a.total);
  bool decode = a.sequence <= kDecodeRows;
  if (decode) {
    const int64_t bytes = Decode<T>::ScratchOfHead(a) * a.kv_num_heads * static_cast<int64_t>(sizeof(float));
    decode = bytes <= std::max(most_bytes, cache * static_cast<int64_t>(sizeof(T)));
    if (decode) bytes_each += bytes;
  }
  const int64_t count = std::clamp<int64_t>(most_bytes / bytes_each, 1, a.batch);
  for (int64_t begin = 0; begin < a.batch; begin += count) {
    const AttentionArguments<T> part = Part(a, begin, std::min(count, a.batch - begin));
    if (decode) {
      Decode<T>(part, host, instruction_set).Attend();
    } else {
      Prompt<T>(part, host, instruction_set).Attend();
    }
  }
}

template void Attention(const AttentionArguments<float>&, Host&, InstructionSet, int64_t);
template void Attention(const AttentionArguments<Float16>&, Host&, InstructionSet, int64_t);
template void Attention(const AttentionArguments<BFloat16>&, Host&, InstructionSet, int64_t);

}  // namespace act::fast
