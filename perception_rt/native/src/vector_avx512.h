// 16 float lanes in one AVX-512 register.
#pragma once

#include <immintrin.h>

namespace prt {
namespace {

using F16 = __m512;

inline F16 load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F16 a) { _mm512_storeu_ps(p, a); }
inline F16 all(float x) { return _mm512_set1_ps(x); }
inline F16 add(F16 a, F16 b) { return _mm512_add_ps(a, b); }
inline F16 sub(F16 a, F16 b) { return _mm512_sub_ps(a, b); }
inline F16 mul(F16 a, F16 b) { return _mm512_mul_ps(a, b); }
inline F16 div(F16 a, F16 b) { return _mm512_div_ps(a, b); }
inline F16 fma(F16 a, F16 b, F16 c) { return _mm512_fmadd_ps(a, b, c); }
inline F16 max(F16 a, F16 b) { return _mm512_max_ps(a, b); }
inline F16 min(F16 a, F16 b) { return _mm512_min_ps(a, b); }
inline F16 absolute(F16 a) { return _mm512_abs_ps(a); }
inline F16 nearest(F16 a) { return _mm512_roundscale_ps(a, 0x08); }
inline F16 power_of_two(F16 n) {
  __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
}
inline F16 load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
inline void store_half16(uint16_t* p, F16 a) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a, 0x08));
}
inline void store_int8(int8_t* p, F16 a) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a)));
}
inline void transpose(const F16 in[16], float* out, size_t stride) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(in[i], in[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps(in[i], in[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // b[i + j]: columns j, 4 + j, 8 + j, 12 + j of rows i to i + 3
    b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int j = 0; j < 4; ++j) {
    __m512 low = _mm512_shuffle_f32x4(b[j], b[4 + j], 0x88);       // columns j, 8 + j
    __m512 high = _mm512_shuffle_f32x4(b[j], b[4 + j], 0xdd);      // columns 4 + j, 12 + j
    __m512 low2 = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0x88);
    __m512 high2 = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0xdd);
    store(out + j * stride, _mm512_shuffle_f32x4(low, low2, 0x88));
    store(out + (8 + j) * stride, _mm512_shuffle_f32x4(low, low2, 0xdd));
    store(out + (4 + j) * stride, _mm512_shuffle_f32x4(high, high2, 0x88));
    store(out + (12 + j) * stride, _mm512_shuffle_f32x4(high, high2, 0xdd));
  }
}

}  // namespace
}  // namespace prt
