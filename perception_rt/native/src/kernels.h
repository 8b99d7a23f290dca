// The kernels of a decoder, in one table per instruction set.
//
// Every table gives the same bits. Integer sums are exact. Float sums have one order: a product
// adds blocks of 32 columns from left to right with fused multiply-adds; other sums use 16 lanes
// and then halve them. So a token's result depends neither on the processor nor on the tokens that
// are computed beside it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace prt {

constexpr int kRows = 16;         // rows of a panel, the lanes of a vector
constexpr int kBlock = 32;        // columns of a weight that share a scale
constexpr int kSpan = 256;        // columns of an activation that share a scale
constexpr int kTile = 16;         // most tokens that a product computes at once
constexpr int kKeys = 64;         // keys that attention scores at once, aligned to multiples of it

enum Format : int32_t { kFloat32 = 0, kInt8 = 1, kInt4 = 2 };

// A weight (rows, columns) in panels of 16 rows; columns are padded to a multiple of 64.
//
// Of each panel and 64 columns, int4 and int8 hold 2 x 16 float16 scales, then the two blocks of 32
// columns. A block is 8 groups of 4 columns; a group has 4 bytes of each of the 16 rows. int4 holds
// value + 8, group g in the low halves and group g + 4 in the high halves of the same 64 bytes;
// int8 holds value + 128. float32 holds 16 rows per column.
struct Matrix {
  const uint8_t* data;
  int32_t format;
  int32_t rows;
  int32_t columns;
};

// Functions here are static: a shared copy could be the one that was compiled for another
// instruction set than this machine has.
template <class T>
static inline T at(const void* place) {
  T value;
  __builtin_memcpy(&value, place, sizeof value);
  return value;
}
static inline int blocks_of(const Matrix& m) { return (m.columns + 63) / 64 * 2; }
static inline int padded_of(const Matrix& m) { return blocks_of(m) * kBlock; }
static inline int spans_of(const Matrix& m) { return (padded_of(m) + kSpan - 1) / kSpan; }
static inline int zero_of(const Matrix& m) { return m.format == kInt4 ? 8 : 128; }
static inline int panels_of(const Matrix& m) { return (m.rows + kRows - 1) / kRows; }
static inline size_t panel_bytes_of(const Matrix& m) {
  if (m.format == kFloat32) return size_t(padded_of(m)) * kRows * 4;
  return size_t(blocks_of(m)) * kRows * (m.format == kInt4 ? 2 + 16 : 2 + 32);
}

// Rounded activations of up to 16 tokens, w of them.
struct Tile {
  int8_t* values;   // (blocks, w, 32)
  float* scales;    // (spans, w)
  int32_t* offsets; // (blocks, w): minus the sum of a block's values times the weights' zero point
  int width;
};

struct Kernels {
  const char* name;

  // out[t * stride + row] = weight[row] . tile[t] for the rows of one panel.
  void (*product)(const Matrix&, int panel, const Tile&, float* out, size_t stride);
  // The same for float32 activations, x[t * x_stride + column], padded with zeros.
  void (*float_product)(const Matrix&, int panel, const float* x, size_t x_stride, int width,
                        float* out, size_t stride);
  // Rounds the activations of one token for a matrix into place t of a tile; x is padded with zeros.
  void (*round)(const Matrix&, const float* x, int t, const Tile&);
  // Decodes a row of a matrix; columns are padded.
  void (*row)(const Matrix&, int row, float* out);
  void (*rms_norm)(const float* x, const float* gain, float eps, int columns, float* out);
  // gate * sigmoid(gate) * up
  void (*swiglu)(const float* gate, const float* up, int count, float* out);
  void (*store_half)(const float* x, int count, uint16_t* out);
  void (*add)(float* x, const float* y, int count);
  // Attends with the heads of consecutive tokens that share keys and values (length, head_dim).
  // Token t sees the first `past + t + 1` of them. q and out: token t, head h at t * stride +
  // h * head_dim. `scratch` has `attend_floats` numbers.
  void (*attend)(const float* q, size_t q_stride, int tokens, int heads, int head_dim,
                 const void* keys, const void* values, bool half, int past, float* scratch,
                 float* out, size_t out_stride);
};

// float32 numbers of scratch that `attend` needs.
static inline size_t attend_floats(int tokens, int heads, int head_dim) {
  return size_t(kKeys) * (head_dim * 2 + 2) + size_t(tokens) * heads * (head_dim + 16);
}

extern const Kernels kScalar;
const Kernels* find_kernels(const char* name);

}  // namespace prt
