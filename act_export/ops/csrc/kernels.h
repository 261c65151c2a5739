// The vectorised parts of the fast kernel: everything whose time grows with rows x columns. kernels_simd.inc has the
// one implementation, compiled once for each instruction set; nothing here may use the standard library's code, of
// which the linker keeps one copy for all.
#pragma once

#include <cstdint>

#include "float16.h"

namespace act::fast {

constexpr int64_t kRowBlock = 48;     // rows of a RowBlock: a multiple of the floats in any vector
constexpr int64_t kColumnTile = 128;  // columns whose probabilities meet the values at a time

constexpr float kLog2E = 1.44269504088896341f;

// Columns of the attention map that some rows look at.
struct Columns {
  // Column c is position c, or list[c] where there is a list; the list ascends.
  const int64_t* list = nullptr;
  int64_t begin = 0;
  int64_t end = 0;
  const uint8_t* hidden = nullptr;  // by position: nonzero where no row sees it; null: all are seen
};

// Keys and values of one head, by position.
template <typename T>
struct Cache {
  const T* keys = nullptr;    // (.., head_size)
  const T* values = nullptr;  // (.., value_head_size)
  int64_t head_size = 0;
  int64_t value_head_size = 0;
};

// What turns query . key into a probability. Scores, and their maxima, are softcap * tanh(query_factor * query . key),
// or query_factor * query . key without a soft cap; a difference of scores times `exponent` is a power of two. Without
// a soft cap query_factor is 1 or -1: scaling costs no digits.
struct Scores {
  float query_factor = 1.0f;
  float softcap = 0.0f;  // 0 = none
  float exponent = kLog2E;
};

// Columns of a block of rows that may turn out to be later sinks. Their values are left out of the block's output until
// it is known what to multiply them by: no difference of almost equal numbers is ever taken.
struct SavedColumns {
  static constexpr int64_t kCapacity = 8;
  int64_t count = 0;  // the first kCapacity that were found
  int64_t positions[kCapacity];
  float probabilities[kCapacity][kRowBlock];
  float rest[kRowBlock];  // of a row: what all other columns draw
};

// Attention of up to kRowBlock consecutive rows of one head.
template <typename T>
struct RowBlock {
  Cache<T> cache;
  Columns columns;
  Scores scores;
  const T* query = nullptr;  // row r at query + r * query_stride
  int64_t query_stride = 0;
  int64_t rows = 0;
  int64_t position = 0;            // of row 0
  int64_t window = 0;              // a row sees this many positions, its own included
  float sink = -__builtin_inff();  // score of one more key, without value, that every row sees; -infinity = none

  // Softmax statistics of the rows. Results, or given: then attention is over some of the columns they were found with.
  bool given = false;
  float* maxima = nullptr;       // (rows), of the scores
  float* normalisers = nullptr;  // (rows), one over the sum of exponentials; 0 where there are none

  const float* weights = nullptr;  // (rows) of a row in the column sums; null: none are wanted
  float* column_sums = nullptr;    // by position: += weight * probability
  float* row_sums = nullptr;       // (rows), with column sums: of the probabilities of a row; 1 without a sink
  SavedColumns* saved = nullptr;   // with column sums: columns whose mean over these rows is above `saved_above`
  float saved_above = 0.0f;
  int64_t initial = -1;     // position of the initial token, which is never saved
  float on_initial = 0.0f;  // added to its scores
  bool last = false;        // no rows come after these: a mean over the few rows that see a column counts as well

  float* mass = nullptr;    // (rows), where given: sum of the probabilities
  float* output = nullptr;  // row r at output + r * output_stride
  int64_t output_stride = 0;
  float* scratch = nullptr;  // RowBlockScratch() floats, aligned to kAlignment
};

// Adds the saved columns to the output of their block: the later sinks among them with the factor that calibration
// gives them, the others with that of the rest.
template <typename T>
struct Correction {
  Cache<T> cache;
  const SavedColumns* saved = nullptr;
  bool sinks[SavedColumns::kCapacity] = {};
  float beta = 1.0f;
  int64_t rows = 0;
  float* output = nullptr;  // row r at output + r * output_stride
  int64_t output_stride = 0;
};

// Attention of a few rows over a slice of the cache, unnormalised.
template <typename T>
struct DecodeSlice {
  Cache<T> cache;
  int64_t begin = 0;  // positions
  int64_t end = 0;
  const uint8_t* hidden = nullptr;  // by position; null: none
  Scores scores;
  int64_t initial = -1;               // position of the initial token
  const float* on_initial = nullptr;  // (rows), added to its scores; null: it isn't in the slice
  float shift = 0.0f;  // exponentials are divided by 2 to this power: then no sum overflows that a mean doesn't

  int64_t rows = 0;
  const float* queries = nullptr;      // (rows, PaddedSize(head_size)), times query_factor; zeros at the end
  const int64_t* row_begin = nullptr;  // (rows): positions that a row sees
  const int64_t* row_end = nullptr;

  float* maxima = nullptr;         // (rows), of the scores
  float* sums = nullptr;           // (rows), of the exponentials
  float* probabilities = nullptr;  // row r, position j at probabilities + r * probability_stride + j: exponentials
  int64_t probability_stride = 0;
  float* output = nullptr;   // (rows, PaddedSize(value_head_size))
  float* scratch = nullptr;  // DecodeScratch() floats, aligned to kAlignment
};

// output (value_head_size) = sum over positions of weights[j] * values[j]
template <typename T>
struct WeightedValues {
  Cache<T> cache;
  const float* weights = nullptr;  // by position; where it is 0 the value may be anything
  int64_t begin = 0;
  int64_t end = 0;
  float* output = nullptr;  // (PaddedSize(value_head_size))
};

template <typename T>
struct TypedKernels {
  void (*attend)(const RowBlock<T>&);
  void (*correct)(const Correction<T>&);
  void (*decode)(const DecodeSlice<T>&);
  void (*add_values)(const WeightedValues<T>&);
  void (*store)(const float* from, int64_t size, T* to);  // rounds to nearest even
};

struct Kernels {
  TypedKernels<float> of_float;
  TypedKernels<Float16> of_float16;
  TypedKernels<BFloat16> of_bfloat16;
};

extern const Kernels kPortableKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;

constexpr int64_t kAlignment = 64;  // bytes
constexpr int64_t kPadding = 16;    // floats: rows of scratch are multiples of this

static constexpr int64_t PaddedSize(int64_t size) { return (size + kPadding - 1) / kPadding * kPadding; }

// Floats of scratch for attention over this many columns.
static constexpr int64_t RowBlockScratch(int64_t head_size, int64_t value_head_size, int64_t columns) {
  const int64_t wider = PaddedSize(head_size > value_head_size ? head_size : value_head_size);
  return kRowBlock * (PaddedSize(head_size) + PaddedSize(value_head_size) + columns + kPadding) + kColumnTile * wider;
}

// Values that a DecodeSlice has in float at a time, where they are stored otherwise.
static constexpr int64_t DecodeTile(int64_t value_head_size) {
  const int64_t fit = 8192 / PaddedSize(value_head_size);
  return fit < 1 ? 1 : (fit < kColumnTile ? fit : kColumnTile);
}

static constexpr int64_t DecodeScratch(int64_t value_head_size) {
  return DecodeTile(value_head_size) * PaddedSize(value_head_size);
}

}  // namespace act::fast
