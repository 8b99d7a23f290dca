// 16 float lanes in plain C++: the reference of the other instruction sets.
#pragma once

#include <cmath>
#include <cstring>

#include "half.h"

namespace prt {
namespace {

struct F16 {
  float v[16];
};

inline F16 load(const float* p) {
  F16 r;
  std::memcpy(r.v, p, 64);
  return r;
}
inline void store(float* p, const F16& a) { std::memcpy(p, a.v, 64); }
inline F16 all(float x) {
  F16 r;
  for (float& v : r.v) v = x;
  return r;
}
#define PRT_LANES(expression)                  \
  F16 r;                                       \
  for (int i = 0; i < 16; ++i) r.v[i] = (expression); \
  return r
inline F16 add(const F16& a, const F16& b) { PRT_LANES(a.v[i] + b.v[i]); }
inline F16 sub(const F16& a, const F16& b) { PRT_LANES(a.v[i] - b.v[i]); }
inline F16 mul(const F16& a, const F16& b) { PRT_LANES(a.v[i] * b.v[i]); }
inline F16 div(const F16& a, const F16& b) { PRT_LANES(a.v[i] / b.v[i]); }
inline F16 fma(const F16& a, const F16& b, const F16& c) { PRT_LANES(std::fmaf(a.v[i], b.v[i], c.v[i])); }
// As maxps and minps: the second operand if either is a NaN.
inline F16 max(const F16& a, const F16& b) { PRT_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline F16 min(const F16& a, const F16& b) { PRT_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline F16 absolute(const F16& a) { PRT_LANES(std::fabs(a.v[i])); }
inline F16 nearest(const F16& a) { PRT_LANES(std::nearbyintf(a.v[i])); }
// 2 ** n of whole numbers -126 to 127.
inline F16 power_of_two(const F16& n) {
  F16 r;
  for (int i = 0; i < 16; ++i) {
    int32_t bits = (int32_t(n.v[i]) + 127) << 23;
    std::memcpy(&r.v[i], &bits, 4);
  }
  return r;
}
inline F16 load_half(const uint16_t* p) { PRT_LANES(half_to_float(p[i])); }
inline void store_half16(uint16_t* p, const F16& a) {
  for (int i = 0; i < 16; ++i) p[i] = float_to_half(a.v[i]);
}
// 16 whole numbers as int8.
inline void store_int8(int8_t* p, const F16& a) {
  for (int i = 0; i < 16; ++i) p[i] = int8_t(int32_t(a.v[i]));
}
// out[c * stride + r] = in[r][c]
inline void transpose(const F16 in[16], float* out, size_t stride) {
  for (int c = 0; c < 16; ++c)
    for (int r = 0; r < 16; ++r) out[c * stride + r] = in[r].v[c];
}
#undef PRT_LANES

}  // namespace
}  // namespace prt
