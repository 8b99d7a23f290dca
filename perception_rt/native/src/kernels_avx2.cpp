// AVX2, and AVX-VNNI where PRT_AVX_VNNI is defined: 8 rows per register.
#include <cmath>
#include <utility>  // product_by_width.h

#include "half.h"
#include "kernels.h"
#include "vector_avx2.h"

namespace prt {
namespace {

#include "float_kernels.h"

constexpr int kAhead = 2048;  // bytes between reading and prefetching

// Products of 32 columns of 8 rows with one token, from 8 groups of 4 columns.
template <bool FOUR>
inline __m256i dot_of(const __m256i w[8], const int8_t* x, int32_t offset) {
  __m256i dot = _mm256_set1_epi32(offset);
#ifdef PRT_AVX_VNNI
#pragma GCC unroll 8
  for (int g = 0; g < 8; ++g)
    dot = _mm256_dpbusd_avx_epi32(dot, w[g], _mm256_set1_epi32(at<int32_t>(x + 4 * g)));
  return dot;
#else
  const __m256i one = _mm256_set1_epi16(1);
  if (FOUR) {  // 8 sums of two products of at most 15 * 127 fit 16 bits
    __m256i pairs = _mm256_maddubs_epi16(w[0], _mm256_set1_epi32(at<int32_t>(x)));
#pragma GCC unroll 8
    for (int g = 1; g < 8; ++g)
      pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w[g], _mm256_set1_epi32(at<int32_t>(x + 4 * g))));
    return _mm256_add_epi32(dot, _mm256_madd_epi16(pairs, one));
  }
  // Of 8-bit weights, the low 7 bits and the highest bit apart: two products of at most 127 * 127
  // fit 16 bits.
  const __m256i low = _mm256_set1_epi8(127);
  const __m256i high = _mm256_set1_epi8(1);
#pragma GCC unroll 8
  for (int g = 0; g < 8; ++g) {
    __m256i v = _mm256_set1_epi32(at<int32_t>(x + 4 * g));
    __m256i a = _mm256_maddubs_epi16(_mm256_and_si256(w[g], low), v);
    __m256i b = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(w[g], 7), high), v);
    dot = _mm256_add_epi32(dot, _mm256_madd_epi16(a, one));
    dot = _mm256_add_epi32(dot, _mm256_madd_epi16(b, _mm256_set1_epi16(128)));
  }
  return dot;
#endif
}

template <bool FOUR, int W>
void product_of(const Matrix& m, int panel, const Tile& tile, float* out, size_t stride) {
  constexpr int kBytes = FOUR ? 256 : 512;
  const uint8_t* data = m.data + size_t(panel) * panel_bytes_of(m);
  const int8_t* x = tile.values;
  const float* scales = tile.scales;
  const int32_t* offsets = tile.offsets;
  const __m256i low = _mm256_set1_epi8(15);
  for (int t = 0; t < W; ++t) store(out + t * stride, all(0.0f));
  for (int left = blocks_of(m) / 2; left > 0; left -= kSpan / kBlock / 2, scales += W) {
    __m256 part[2][W];
    for (auto& half : part)
      for (auto& v : half) v = _mm256_setzero_ps();
    const int pairs = left < kSpan / kBlock / 2 ? left : kSpan / kBlock / 2;
    for (int pair = 0; pair < pairs; ++pair, data += 64 + 2 * kBytes)
      for (int b = 0; b < 2; ++b, x += W * kBlock, offsets += W) {
        const uint8_t* block = data + 64 + b * kBytes;
        if (W == 1)  // the hardware stops at the end of a page
          for (int i = 0; i < kBytes; i += 64)
            _mm_prefetch((const char*)block + kAhead + i, _MM_HINT_T0);
        for (int half = 0; half < 2; ++half) {
          __m256i w[8];
#pragma GCC unroll 8
          for (int g = 0; g < (FOUR ? 4 : 8); ++g) {
            w[g] = _mm256_loadu_si256((const __m256i*)(block + 64 * g + 32 * half));
            if (FOUR) {
              w[g + 4] = _mm256_and_si256(_mm256_srli_epi16(w[g], 4), low);
              w[g] = _mm256_and_si256(w[g], low);
            }
          }
          const __m128i* halves = (const __m128i*)(data + 32 * b + 16 * half);
          const __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128(halves));
#pragma GCC unroll 16
          for (int t = 0; t < W; ++t) {
            __m256i dot = dot_of<FOUR>(w, x + t * kBlock, offsets[t]);
            part[half][t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), scale, part[half][t]);
          }
        }
      }
    for (int t = 0; t < W; ++t) {
      float* place = out + t * stride;
      store(place, fma({part[0][t], part[1][t]}, all(scales[t]), load(place)));
    }
  }
}

#include "product_by_width.h"

}  // namespace

#ifdef PRT_AVX_VNNI
#define PRT_TABLE kAvxVnni
#define PRT_NAME "avx-vnni"
#else
#define PRT_TABLE kAvx2
#define PRT_NAME "avx2"
#endif
extern const Kernels PRT_TABLE;
const Kernels PRT_TABLE = {PRT_NAME, product, float_product, round, decode_row,
                           rms_norm, swiglu,  store_half,    add_to,       attend};

}  // namespace prt
