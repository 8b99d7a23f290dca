// AVX-512 with VNNI: 16 rows per register, 4 columns per product.
#include <cmath>
#include <utility>  // product_by_width.h

#include "half.h"
#include "kernels.h"
#include "vector_avx512.h"

namespace prt {
namespace {

#include "float_kernels.h"

constexpr int kAhead = 2048;  // bytes between reading and prefetching

inline __m512i bytes_at(const uint8_t* p) { return _mm512_loadu_si512(p); }

inline void expand(const uint8_t* block, bool four, __m512i w[8]) {
  if (!four) {
    for (int g = 0; g < 8; ++g) w[g] = bytes_at(block + 64 * g);
    return;
  }
  const __m512i low = _mm512_set1_epi8(15);
  for (int g = 0; g < 4; ++g) {
    __m512i both = bytes_at(block + 64 * g);
    w[g] = _mm512_and_si512(both, low);
    w[g + 4] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
  }
}

template <bool FOUR, int W>
void product_of(const Matrix& m, int panel, const Tile& tile, float* out, size_t stride) {
  constexpr int kBytes = FOUR ? 256 : 512;
  const uint8_t* data = m.data + size_t(panel) * panel_bytes_of(m);
  const int8_t* x = tile.values;
  const float* scales = tile.scales;
  const int32_t* offsets = tile.offsets;
  for (int t = 0; t < W; ++t) store(out + t * stride, all(0.0f));
  for (int left = blocks_of(m) / 2; left > 0; left -= kSpan / kBlock / 2, scales += W) {
    F16 part[W];
    for (auto& v : part) v = all(0.0f);
    const int pairs = left < kSpan / kBlock / 2 ? left : kSpan / kBlock / 2;
    for (int pair = 0; pair < pairs; ++pair, data += 64 + 2 * kBytes)
      for (int b = 0; b < 2; ++b, x += W * kBlock, offsets += W) {
        const uint8_t* block = data + 64 + b * kBytes;
        if (W == 1)  // the hardware stops at the end of a page
          for (int i = 0; i < kBytes; i += 64)
            _mm_prefetch((const char*)block + kAhead + i, _MM_HINT_T0);
        __m512i w[8];
        expand(block, FOUR, w);
        const F16 scale = load_half((const uint16_t*)(data + 32 * b));
#pragma GCC unroll 16
        for (int t = 0; t < W; ++t) {
          const int8_t* groups = x + t * kBlock;
          __m512i dot = _mm512_set1_epi32(offsets[t]);
#pragma GCC unroll 8
          for (int g = 0; g < 8; ++g)
            dot = _mm512_dpbusd_epi32(dot, w[g], _mm512_set1_epi32(at<int32_t>(groups + 4 * g)));
          part[t] = fma(_mm512_cvtepi32_ps(dot), scale, part[t]);
        }
      }
    for (int t = 0; t < W; ++t) {
      float* place = out + t * stride;
      store(place, fma(part[t], all(scales[t]), load(place)));
    }
  }
}

#include "product_by_width.h"

}  // namespace

extern const Kernels kAvx512;
const Kernels kAvx512 = {"avx512-vnni", product, float_product, round, decode_row,
                         rms_norm,      swiglu,  store_half,    add_to,       attend};

}  // namespace prt
