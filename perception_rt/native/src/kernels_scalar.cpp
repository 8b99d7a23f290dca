// The reference: plain C++, whose bits all other instruction sets reproduce.
#include "kernels.h"
#include "vector_scalar.h"

namespace prt {
namespace {

#include "float_kernels.h"

void product(const Matrix& m, int panel, const Tile& tile, float* out, size_t stride) {
  const uint8_t* data = m.data + size_t(panel) * panel_bytes_of(m);
  const bool four = m.format == kInt4;
  const int bytes = four ? 256 : 512, blocks = blocks_of(m), width = tile.width;
  for (int t = 0; t < width; ++t)
    for (int row = 0; row < kRows; ++row) {
      float acc = 0;
      for (int first = 0; first < blocks; first += kSpan / kBlock) {
        float part = 0;
        for (int b = first; b < blocks && b < first + kSpan / kBlock; ++b) {
          const uint8_t* pair = data + size_t(b / 2) * (64 + 2 * bytes);
          const uint8_t* block = pair + 64 + b % 2 * bytes + row * 4;
          const int8_t* x = tile.values + (size_t(b) * width + t) * kBlock;
          int32_t dot = tile.offsets[size_t(b) * width + t];
          for (int k = 0; k < kBlock; ++k) {
            const int group = k / 4;
            const uint8_t byte = block[(four ? group % 4 : group) * 64 + k % 4];
            dot += (!four ? byte : group < 4 ? byte & 15 : byte >> 4) * x[k];
          }
          const float scale = half_to_float(at<uint16_t>(pair + 2 * (b % 2 * kRows + row)));
          part = std::fmaf(float(dot), scale, part);
        }
        acc = std::fmaf(part, tile.scales[first / (kSpan / kBlock) * width + t], acc);
      }
      out[t * stride + row] = acc;
    }
}

}  // namespace

const Kernels kScalar = {"scalar", product,    float_product, round, decode_row,
                         rms_norm, swiglu,     store_half,    add_to,       attend};

}  // namespace prt
