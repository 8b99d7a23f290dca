// The interface of the library, called through ctypes. All numbers are little-endian.
#pragma once

#include <cstdint>

#include "kernels.h"

#pragma GCC visibility push(default)
extern "C" {

struct PrtShape {
  int32_t dim, layers, heads, kv_heads, head_dim, ffn_dim, vocab_size, max_length;
  float norm_eps;
  int32_t half_cache;  // 1: keys and values in float16, 0: in float32
};

struct PrtLayer {
  const float* attention_norm;  // (dim)
  prt::Matrix qkv;              // rows: queries, keys, values
  prt::Matrix out;
  const float* ffn_norm;        // (dim)
  prt::Matrix gate_up;          // rows: gate, up
  prt::Matrix down;
};

struct PrtModel {
  PrtShape shape;
  const PrtLayer* layers;
  const float* norm;          // (dim)
  prt::Matrix head;
  const float *cos, *sin;     // (max_length, head_dim / 2)
};

struct PrtCall {
  const float* hidden;        // (sequences, tokens, dim)
  const int32_t* past;        // (sequences)
  void* const* keys;          // per layer, (sequences, kv_heads, slots, head_dim)
  void* const* values;
  const int64_t* positions;   // (sequences, count)
  float* logits;              // (sequences, count, vocab_size)
  int32_t sequences, tokens, slots, count;
};

// Names of the instruction sets that this processor has, best first, separated by commas.
const char* prt_instruction_sets();
// Compares an instruction set with the reference; 0 if all bits agree.
int32_t prt_self_test(const char* name, uint64_t seed, int32_t rounds);
// The model's memory must outlive the decoder. NULL: no such instruction set, or no memory.
void* prt_open(const PrtModel* model, const char* name, int32_t threads);
// 0, or 1 if there is no memory for the call; then nothing was computed.
int32_t prt_forward(void* decoder, const PrtCall* call);
void prt_close(void* decoder);
// Rows of a table, float32 (count, columns).
int32_t prt_rows(const prt::Matrix* table, const int64_t* rows, int64_t count, float* out);
}
#pragma GCC visibility pop
