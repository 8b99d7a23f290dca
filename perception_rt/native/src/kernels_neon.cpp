// NEON with the dot product of ARMv8.2: 4 rows per register, 4 columns per product.
#include <cmath>

#include "half.h"
#include "kernels.h"
#include "vector_neon.h"

namespace prt {
namespace {

#include "float_kernels.h"

// Values of 16 rows in 4 columns, as 4 registers; of 8 bits without their zero point.
template <bool FOUR>
inline int8x16_t values_of(const uint8_t* block, int group, int quarter) {
  if (!FOUR) {
    uint8x16_t bytes = vld1q_u8(block + 64 * group + 16 * quarter);
    return vreinterpretq_s8_u8(veorq_u8(bytes, vdupq_n_u8(128)));
  }
  uint8x16_t both = vld1q_u8(block + 64 * (group % 4) + 16 * quarter);
  return vreinterpretq_s8_u8(group < 4 ? vandq_u8(both, vdupq_n_u8(15)) : vshrq_n_u8(both, 4));
}

template <bool FOUR>
void product_of(const Matrix& m, int panel, const Tile& tile, float* out, size_t stride) {
  constexpr int kBytes = FOUR ? 256 : 512;
  const uint8_t* data = m.data + size_t(panel) * panel_bytes_of(m);
  const int width = tile.width, blocks = blocks_of(m);
  for (int t = 0; t < width; ++t) store(out + t * stride, all(0.0f));
  for (int first = 0; first < blocks; first += kSpan / kBlock) {
    F16 part[kTile];
    for (int t = 0; t < width; ++t) part[t] = all(0.0f);
    for (int b = first; b < blocks && b < first + kSpan / kBlock; ++b) {
      const uint8_t* pair = data + size_t(b / 2) * (64 + 2 * kBytes);
      const uint8_t* block = pair + 64 + b % 2 * kBytes;
      const F16 scale = load_half((const uint16_t*)pair + b % 2 * kRows);
      for (int quarter = 0; quarter < 4; ++quarter) {
        int8x16_t w[8];
        for (int g = 0; g < 8; ++g) w[g] = values_of<FOUR>(block, g, quarter);
        for (int t = 0; t < width; ++t) {
          const size_t place = size_t(b) * width + t;
          const int8x16_t low = vld1q_s8(tile.values + place * kBlock);
          const int8x16_t high = vld1q_s8(tile.values + place * kBlock + 16);
          int32x4_t dot = vdupq_n_s32(FOUR ? tile.offsets[place] : 0);
          dot = vdotq_laneq_s32(dot, w[0], low, 0);
          dot = vdotq_laneq_s32(dot, w[1], low, 1);
          dot = vdotq_laneq_s32(dot, w[2], low, 2);
          dot = vdotq_laneq_s32(dot, w[3], low, 3);
          dot = vdotq_laneq_s32(dot, w[4], high, 0);
          dot = vdotq_laneq_s32(dot, w[5], high, 1);
          dot = vdotq_laneq_s32(dot, w[6], high, 2);
          dot = vdotq_laneq_s32(dot, w[7], high, 3);
          part[t].v[quarter] = vfmaq_f32(part[t].v[quarter], vcvtq_f32_s32(dot), scale.v[quarter]);
        }
      }
    }
    for (int t = 0; t < width; ++t) {
      float* place = out + t * stride;
      store(place, fma(part[t], all(tile.scales[first / (kSpan / kBlock) * width + t]), load(place)));
    }
  }
}

void product(const Matrix& m, int panel, const Tile& tile, float* out, size_t stride) {
  (m.format == kInt4 ? product_of<true> : product_of<false>)(m, panel, tile, out, stride);
}

}  // namespace

extern const Kernels kNeon;
const Kernels kNeon = {"neon-dotprod", product, float_product, round,  decode_row,
                       rms_norm,       swiglu,  store_half,    add_to, attend};

}  // namespace prt
