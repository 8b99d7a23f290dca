// 16 float lanes in four NEON registers.
#pragma once

#include <arm_neon.h>

namespace prt {
namespace {

struct F16 {
  float32x4_t v[4];
};

#define PRT_QUARTERS(expression)                     \
  F16 r;                                             \
  for (int i = 0; i < 4; ++i) r.v[i] = (expression); \
  return r
inline F16 load(const float* p) { PRT_QUARTERS(vld1q_f32(p + 4 * i)); }
inline void store(float* p, const F16& a) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.v[i]);
}
inline F16 all(float x) { PRT_QUARTERS(vdupq_n_f32(x)); }
inline F16 add(const F16& a, const F16& b) { PRT_QUARTERS(vaddq_f32(a.v[i], b.v[i])); }
inline F16 sub(const F16& a, const F16& b) { PRT_QUARTERS(vsubq_f32(a.v[i], b.v[i])); }
inline F16 mul(const F16& a, const F16& b) { PRT_QUARTERS(vmulq_f32(a.v[i], b.v[i])); }
inline F16 div(const F16& a, const F16& b) { PRT_QUARTERS(vdivq_f32(a.v[i], b.v[i])); }
inline F16 fma(const F16& a, const F16& b, const F16& c) {
  PRT_QUARTERS(vfmaq_f32(c.v[i], a.v[i], b.v[i]));
}
inline F16 max(const F16& a, const F16& b) {
  PRT_QUARTERS(vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]));
}
inline F16 min(const F16& a, const F16& b) {
  PRT_QUARTERS(vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]));
}
inline F16 absolute(const F16& a) { PRT_QUARTERS(vabsq_f32(a.v[i])); }
inline F16 nearest(const F16& a) { PRT_QUARTERS(vrndnq_f32(a.v[i])); }
inline F16 power_of_two(const F16& n) {
  PRT_QUARTERS(vreinterpretq_f32_s32(
      vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n.v[i]), vdupq_n_s32(127)), 23)));
}
inline F16 load_half(const uint16_t* p) {
  PRT_QUARTERS(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))));
}
inline void store_half16(uint16_t* p, const F16& a) {
  for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.v[i])));
}
inline void store_int8(int8_t* p, const F16& a) {
  int16x4_t h[4];
  for (int i = 0; i < 4; ++i) h[i] = vqmovn_s32(vcvtnq_s32_f32(a.v[i]));
  vst1_s8(p, vqmovn_s16(vcombine_s16(h[0], h[1])));
  vst1_s8(p + 8, vqmovn_s16(vcombine_s16(h[2], h[3])));
}
inline void transpose(const F16 in[16], float* out, size_t stride) {
  for (int r = 0; r < 16; r += 4)
    for (int q = 0; q < 4; ++q) {
      float32x4x2_t a = vtrnq_f32(in[r].v[q], in[r + 1].v[q]);
      float32x4x2_t b = vtrnq_f32(in[r + 2].v[q], in[r + 3].v[q]);
      float* place = out + 4 * q * stride + r;
      vst1q_f32(place, vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0])));
      vst1q_f32(place + stride, vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1])));
      vst1q_f32(place + 2 * stride, vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0])));
      vst1q_f32(place + 3 * stride, vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1])));
    }
}
#undef PRT_QUARTERS

}  // namespace
}  // namespace prt
