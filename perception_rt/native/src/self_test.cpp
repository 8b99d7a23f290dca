// Compares the kernels of an instruction set with the reference, bit by bit.
#include <cmath>
#include <cstring>
#include <vector>

#include "decoder.h"
#include "half.h"

namespace prt {
namespace {

struct Random {
  uint64_t state;

  uint64_t next() {  // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }
  int upto(int most) { return 1 + int(next() % uint64_t(most)); }
  // Mostly of order 1; now and then 0, tiny or huge.
  float number() {
    const float x = float(int32_t(next() >> 32)) * 4.6566e-10f;
    switch (next() % 64) {
      case 0: return 0.0f;
      case 1: return x * 1e-38f;
      case 2: return x * 1e6f;
      default: return x;
    }
  }
  std::vector<float> numbers(size_t count) {
    std::vector<float> found(count);
    for (float& x : found) x = number();
    return found;
  }
};

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return !std::memcmp(a.data(), b.data(), a.size() * sizeof(T));
}

struct Rounded {
  std::vector<int8_t> values;
  std::vector<float> scales;
  std::vector<int32_t> offsets;

  Rounded(const Kernels& k, const Matrix& m, const std::vector<float>& x, int width)
      : values(size_t(blocks_of(m)) * width * kBlock), scales(size_t(spans_of(m)) * width),
        offsets(size_t(blocks_of(m)) * width) {
    for (int t = 0; t < width; ++t) k.round(m, x.data() + size_t(t) * padded_of(m), t, tile(width));
  }
  Tile tile(int width) { return {values.data(), scales.data(), offsets.data(), width}; }
};

bool same_products(const Kernels& k, Random& random) {
  const int columns = random.upto(700), width = random.upto(kTile);
  Matrix m{nullptr, int32_t(random.next() % 3), kRows, columns};
  std::vector<uint8_t> data(panel_bytes_of(m));
  const bool extreme = random.next() % 8 == 0;  // the largest sums
  for (uint8_t& byte : data) byte = extreme ? 0xff : uint8_t(random.next());
  m.data = data.data();
  const size_t pair = 64 + (m.format == kInt4 ? 512 : 1024);
  if (m.format == kFloat32) {
    for (size_t i = 0; i < data.size(); i += 4) {
      const float x = random.number();
      std::memcpy(&data[i], &x, 4);
    }
  } else {
    for (size_t i = 0; i < data.size(); i += pair)
      for (int s = 0; s < 64; s += 2) {
        const uint16_t scale = float_to_half(random.number());
        std::memcpy(&data[i + s], &scale, 2);
      }
  }
  auto x = random.numbers(size_t(width) * padded_of(m));
  for (int t = 0; t < width; ++t)
    for (int i = columns; i < padded_of(m); ++i) x[size_t(t) * padded_of(m) + i] = 0.0f;
  if (extreme)
    for (float& v : x) v = 1.0f;
  std::vector<float> a(size_t(width) * kRows), b(a.size());
  if (m.format == kFloat32) {
    k.float_product(m, 0, x.data(), padded_of(m), width, a.data(), kRows);
    kScalar.float_product(m, 0, x.data(), padded_of(m), width, b.data(), kRows);
    return same(a, b);
  }
  Rounded p(k, m, x, width), q(kScalar, m, x, width);
  k.product(m, 0, p.tile(width), a.data(), kRows);
  kScalar.product(m, 0, q.tile(width), b.data(), kRows);
  return same(p.values, q.values) && same(p.scales, q.scales) && same(p.offsets, q.offsets) &&
         same(a, b);
}

bool same_vectors(const Kernels& k, Random& random) {
  const int count = 16 * random.upto(40);
  const auto x = random.numbers(count), y = random.numbers(count);
  std::vector<float> a(count), b(count);
  k.rms_norm(x.data(), y.data(), 1e-5f, count, a.data());
  kScalar.rms_norm(x.data(), y.data(), 1e-5f, count, b.data());
  bool equal = same(a, b);
  k.swiglu(x.data(), y.data(), count, a.data());
  kScalar.swiglu(x.data(), y.data(), count, b.data());
  equal = equal && same(a, b);
  std::vector<uint16_t> h(count), i(count);
  k.store_half(x.data(), count, h.data());
  kScalar.store_half(x.data(), count, i.data());
  equal = equal && same(h, i);
  a = b = x;
  k.add(a.data(), y.data(), count);
  kScalar.add(b.data(), y.data(), count);
  return equal && same(a, b);
}

bool same_attention(const Kernels& k, Random& random) {
  const int heads = random.upto(8), head_dim = 16 * random.upto(8), tokens = random.upto(5);
  const int past = random.upto(150) - 1, length = past + tokens;
  const bool half = random.next() % 2;
  const auto q = random.numbers(size_t(tokens) * heads * head_dim);
  const auto keys = random.numbers(size_t(length) * head_dim);
  const auto values = random.numbers(size_t(length) * head_dim);
  std::vector<uint16_t> half_keys(keys.size()), half_values(values.size());
  kScalar.store_half(keys.data(), int(keys.size()), half_keys.data());
  kScalar.store_half(values.data(), int(values.size()), half_values.data());
  const void* stored_keys = half ? (const void*)half_keys.data() : keys.data();
  const void* stored_values = half ? (const void*)half_values.data() : values.data();
  std::vector<float> scratch(attend_floats(tokens, heads, head_dim)), a(q.size()), b(q.size());
  const size_t stride = size_t(heads) * head_dim;
  k.attend(q.data(), stride, tokens, heads, head_dim, stored_keys, stored_values, half, past,
           scratch.data(), a.data(), stride);
  kScalar.attend(q.data(), stride, tokens, heads, head_dim, stored_keys, stored_values, half, past,
                 scratch.data(), b.data(), stride);
  return same(a, b);
}

}  // namespace
}  // namespace prt

extern "C" int32_t prt_self_test(const char* name, uint64_t seed, int32_t rounds) {
  const prt::Kernels* kernels = prt::find_kernels(name);
  if (!kernels) return 1;
  prt::Random random{seed};
  for (int32_t i = 0; i < rounds; ++i)
    if (!prt::same_products(*kernels, random) || !prt::same_vectors(*kernels, random) ||
        !prt::same_attention(*kernels, random))
      return 2;
  return 0;
}
