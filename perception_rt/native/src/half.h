// float16 by integer arithmetic; rounds to nearest, ties to even, as F16C and NEON do.
#pragma once

#include <cstdint>
#include <cstring>

namespace prt {

static inline float half_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ff, bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000 | mantissa << 13 | (mantissa ? 0x400000 : 0);
  } else if (exponent) {
    bits = sign | (exponent + 112) << 23 | mantissa << 13;
  } else {
    float value = float(mantissa) * 5.9604644775390625e-8f;  // 2 ** -24, exact
    std::memcpy(&bits, &value, 4);
    bits |= sign;
  }
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

static inline uint16_t float_to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return uint16_t(sign | 0x7e00 | (rest >> 13 & 0x3ff));  // NaN
  if (rest >= 0x47800000) return uint16_t(sign | 0x7c00);                        // infinity
  if (rest < 0x38800000) {  // subnormal: add 0.5 so that the last bit has the weight 2 ** -24
    float value;
    std::memcpy(&value, &rest, 4);
    value += 0.5f;
    std::memcpy(&rest, &value, 4);
    return uint16_t(sign | (rest - 0x3f000000));
  }
  rest += 0xfff + (rest >> 13 & 1);
  return uint16_t(sign | ((rest - 0x38000000) >> 13));
}

}  // namespace prt
