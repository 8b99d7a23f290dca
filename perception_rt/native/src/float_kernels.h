// The float part of the kernels, for the 16 lanes of an instruction set. Include it after a
// vector_*.h, inside the namespace of the set.

inline float sum(const F16& a) {
  alignas(64) float v[16];
  store(v, a);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}

inline float largest(const F16& a) {
  alignas(64) float v[16];
  store(v, a);
  float result = v[0];
  for (int i = 1; i < 16; ++i) result = v[i] > result ? v[i] : result;
  return result;
}

// e ** x to about 1e-7; x is clamped to -87 to 88.
inline F16 exponential(const F16& value) {
  F16 x = min(max(value, all(-87.0f)), all(88.0f));
  F16 n = nearest(mul(x, all(1.44269504f)));
  F16 r = fma(n, all(-0.693359375f), x);  // ln 2 in two parts
  r = fma(n, all(2.12194440e-4f), r);
  F16 y = all(1.0f / 5040);
  y = fma(y, r, all(1.0f / 720));
  y = fma(y, r, all(1.0f / 120));
  y = fma(y, r, all(1.0f / 24));
  y = fma(y, r, all(1.0f / 6));
  y = fma(y, r, all(0.5f));
  y = fma(y, r, all(1.0f));
  y = fma(y, r, all(1.0f));
  return mul(y, power_of_two(n));
}

inline void round(const Matrix& m, const float* x, int t, const Tile& tile) {
  const int zero = zero_of(m), width = tile.width;
  for (int first = 0, span = 0; first < padded_of(m); first += kSpan, ++span) {
    const int stop = first + kSpan < padded_of(m) ? first + kSpan : padded_of(m);
    F16 top = all(0.0f), poison = all(0.0f);
    for (int i = first; i < stop; i += 16) {
      F16 v = load(x + i);
      top = max(top, absolute(v));
      poison = fma(v, all(0.0f), poison);
    }
    const float peak = largest(top), inverse = peak > 1e-30f ? 127.0f / peak : 0.0f;
    // The sum is 0 for finite numbers, else NaN, which the product hands on.
    tile.scales[span * width + t] = peak / 127.0f + sum(poison);
    const F16 by = all(inverse), low = all(-127.0f), high = all(127.0f);
    for (int i = first; i < stop; i += kBlock) {
      const size_t place = size_t(i / kBlock) * width + t;
      F16 a = nearest(min(max(mul(load(x + i), by), low), high));
      F16 b = nearest(min(max(mul(load(x + i + 16), by), low), high));
      store_int8(tile.values + place * kBlock, a);
      store_int8(tile.values + place * kBlock + 16, b);
      tile.offsets[place] = -zero * int32_t(sum(add(a, b)));  // whole numbers, exact
    }
  }
}

inline void rms_norm(const float* x, const float* gain, float eps, int columns, float* out) {
  F16 squares = all(0.0f);
  for (int i = 0; i < columns; i += 16) {
    F16 v = load(x + i);
    squares = fma(v, v, squares);
  }
  float factor = 1.0f / std::sqrt(sum(squares) / float(columns) + eps);
  for (int i = 0; i < columns; i += 16)
    store(out + i, mul(mul(load(x + i), all(factor)), load(gain + i)));
}

inline void swiglu(const float* gate, const float* up, int count, float* out) {
  for (int i = 0; i < count; i += 16) {
    F16 g = load(gate + i), one = all(1.0f);
    F16 sigmoid = div(one, add(one, exponential(sub(all(0.0f), g))));
    store(out + i, mul(mul(g, sigmoid), load(up + i)));
  }
}

inline void add_to(float* x, const float* y, int count) {
  for (int i = 0; i < count; i += 16) store(x + i, add(load(x + i), load(y + i)));
}

inline void store_half(const float* x, int count, uint16_t* out) {
  for (int i = 0; i < count; i += 16) store_half16(out + i, load(x + i));
}

template <bool HALF>
inline F16 load_item(const void* p, size_t i) {
  return HALF ? load_half((const uint16_t*)p + i) : load((const float*)p + i);
}

template <int HEADS>
inline void score_keys(const float* q, int head_dim, const float* columns, float scale,
                       float* scores) {
  F16 s[HEADS][4];
  for (auto& row : s)
    for (F16& v : row) v = all(0.0f);
  for (int e = 0; e < head_dim; ++e) {
    const float* k = columns + size_t(e) * kKeys;
    F16 k0 = load(k), k1 = load(k + 16), k2 = load(k + 32), k3 = load(k + 48);
    for (int h = 0; h < HEADS; ++h) {
      F16 x = all(q[h * head_dim + e]);
      s[h][0] = fma(x, k0, s[h][0]);
      s[h][1] = fma(x, k1, s[h][1]);
      s[h][2] = fma(x, k2, s[h][2]);
      s[h][3] = fma(x, k3, s[h][3]);
    }
  }
  for (int h = 0; h < HEADS; ++h)
    for (int i = 0; i < 4; ++i) store(scores + h * kKeys + 16 * i, mul(s[h][i], all(scale)));
}

template <int HEADS, bool HALF>
inline void add_values(const float* p, int count, int head_dim, const void* values, float* out) {
  for (int d = 0; d < head_dim; d += 32) {
    bool pair = d + 16 < head_dim;
    F16 acc[HEADS][2];
    for (int h = 0; h < HEADS; ++h) {
      acc[h][0] = load(out + h * head_dim + d);
      acc[h][1] = pair ? load(out + h * head_dim + d + 16) : acc[h][0];
    }
    for (int s = 0; s < count; ++s) {
      const size_t place = size_t(s) * head_dim + d;
      F16 v0 = load_item<HALF>(values, place);
      F16 v1 = pair ? load_item<HALF>(values, place + 16) : v0;
      for (int h = 0; h < HEADS; ++h) {
        F16 x = all(p[h * kKeys + s]);
        acc[h][0] = fma(x, v0, acc[h][0]);
        acc[h][1] = fma(x, v1, acc[h][1]);
      }
    }
    for (int h = 0; h < HEADS; ++h) {
      store(out + h * head_dim + d, acc[h][0]);
      if (pair) store(out + h * head_dim + d + 16, acc[h][1]);
    }
  }
}

// One block of keys for HEADS heads of a token; `peak` and `total` are the running softmax.
template <int HEADS, bool HALF>
inline void attend_block(const float* q, int head_dim, const float* columns, const void* values,
                         int count, float scale, float* peak, float* total, float* acc) {
  alignas(64) float p[HEADS * kKeys];
  score_keys<HEADS>(q, head_dim, columns, scale, p);
  for (int h = 0; h < HEADS; ++h) {
    float* row = p + h * kKeys;
    for (int i = count; i < kKeys; ++i) row[i] = -3.0e38f;
    F16 top = max(max(load(row), load(row + 16)), max(load(row + 32), load(row + 48)));
    float high = largest(top);
    high = peak[h] > high ? peak[h] : high;
    alignas(64) float shrink[16];
    store(shrink, exponential(all(peak[h] - high)));
    peak[h] = high;
    F16 v[4];
    for (int i = 0; i < 4; ++i) {
      v[i] = exponential(sub(load(row + 16 * i), all(high)));
      store(row + 16 * i, v[i]);
    }
    if (count < kKeys) {
      for (int i = count; i < kKeys; ++i) row[i] = 0.0f;
      for (int i = 0; i < 4; ++i) v[i] = load(row + 16 * i);
    }
    float sums = sum(add(add(v[0], v[1]), add(v[2], v[3])));
    total[h] = std::fma(total[h], shrink[0], sums);
    float* out = acc + h * head_dim;
    for (int d = 0; d < head_dim; d += 16) store(out + d, mul(load(out + d), all(shrink[0])));
  }
  add_values<HEADS, HALF>(p, count, head_dim, values, acc);
}

// Heads of consecutive tokens with one block of keys.
template <bool HALF>
inline void attend_tokens(const float* q, size_t q_stride, int first, int tokens, int heads,
                          int head_dim, const float* columns, const void* values, int past,
                          float* peaks, float* totals, float* out, size_t out_stride) {
  const float scale = 1.0f / std::sqrt(float(head_dim));
  for (int t = first; t < tokens; ++t) {
    const int seen = past + t + 1 < kKeys ? past + t + 1 : kKeys;
    const float* x = q + t * q_stride;
    float *acc = out + t * out_stride, *peak = peaks + t * heads, *total = totals + t * heads;
    int h = 0;
    for (; h + 4 <= heads; h += 4)
      attend_block<4, HALF>(x + h * head_dim, head_dim, columns, values, seen, scale, peak + h,
                            total + h, acc + h * head_dim);
    for (; h < heads; ++h)
      attend_block<1, HALF>(x + h * head_dim, head_dim, columns, values, seen, scale, peak + h,
                            total + h, acc + h * head_dim);
  }
}

// columns[e * kKeys + s] = keys[s * head_dim + e], 0 from s = count on.
template <bool HALF>
inline void turn_keys(const void* keys, int count, int head_dim, float* columns) {
  for (int s = 0; s < kKeys; s += 16)
    for (int e = 0; e < head_dim; e += 16) {
      F16 block[16];
      const size_t place = size_t(s) * head_dim + e;
      if (s + 16 <= count) {
        for (int i = 0; i < 16; ++i)
          block[i] = load_item<HALF>(keys, place + size_t(i) * head_dim);
      } else {
        for (int i = 0; i < 16; ++i)
          block[i] = s + i < count ? load_item<HALF>(keys, place + size_t(i) * head_dim) : all(0.0f);
      }
      transpose(block, columns + size_t(e) * kKeys + s, kKeys);
    }
}

template <bool HALF>
inline void attend_with(const float* q, size_t q_stride, int tokens, int heads, int head_dim,
                        const void* keys, const void* values, int past, float* scratch, float* out,
                        size_t out_stride) {
  float* columns = scratch;                          // (head_dim, kKeys)
  float* rows = columns + size_t(kKeys) * head_dim;  // (kKeys, head_dim)
  float* peaks = rows + size_t(kKeys) * head_dim;    // (tokens, heads)
  float* totals = peaks + size_t(tokens) * heads;    // (tokens, heads)
  for (int i = 0; i < tokens * heads; ++i) peaks[i] = -3.0e38f, totals[i] = 0.0f;
  for (int t = 0; t < tokens; ++t)
    for (int i = 0; i < heads * head_dim; i += 16) store(out + t * out_stride + i, all(0.0f));
  for (int start = 0; start < past + tokens; start += kKeys) {
    const int count = past + tokens - start < kKeys ? past + tokens - start : kKeys;
    const size_t item = size_t(start) * head_dim, bytes = HALF ? 2 : 4;
    const char *block = (const char*)values + item * bytes, *key = (const char*)keys + item * bytes;
    const size_t length = size_t(kKeys) * head_dim * bytes;
    if (start + kKeys < past + tokens)  // the next block
      for (size_t i = length; i < 2 * length; i += 64) {
        __builtin_prefetch(key + i);
        __builtin_prefetch(block + i);
      }
    turn_keys<HALF>(key, count, head_dim, columns);
    const int first = start > past ? start - past : 0;
    if (HALF && tokens > 2) {  // decoded once for all tokens
      for (int i = 0; i < count * head_dim; i += 16) store(rows + i, load_item<true>(block, i));
      attend_tokens<false>(q, q_stride, first, tokens, heads, head_dim, columns, rows,
                           past - start, peaks, totals, out, out_stride);
    } else {
      attend_tokens<HALF>(q, q_stride, first, tokens, heads, head_dim, columns, block,
                          past - start, peaks, totals, out, out_stride);
    }
  }
  for (int t = 0; t < tokens; ++t)
    for (int h = 0; h < heads; ++h) {
      const F16 by = all(1.0f / totals[t * heads + h]);
      float* row = out + t * out_stride + h * head_dim;
      for (int d = 0; d < head_dim; d += 16) store(row + d, mul(load(row + d), by));
    }
}

inline void attend(const float* q, size_t q_stride, int tokens, int heads, int head_dim,
                   const void* keys, const void* values, bool half, int past, float* scratch,
                   float* out, size_t out_stride) {
  (half ? attend_with<true> : attend_with<false>)(q, q_stride, tokens, heads, head_dim, keys,
                                                  values, past, scratch, out, out_stride);
}

inline void float_product(const Matrix& m, int panel, const float* x, size_t x_stride, int width,
                          float* out, size_t stride) {
  const float* weights = (const float*)(m.data + size_t(panel) * panel_bytes_of(m));
  for (int t = 0; t < width; ++t) {
    F16 acc = all(0.0f);
    const float* row = x + t * x_stride;
    for (int k = 0; k < m.columns; ++k) acc = fma(all(row[k]), load(weights + k * kRows), acc);
    store(out + t * stride, acc);
  }
}

inline void decode_row(const Matrix& m, int row, float* out) {
  const uint8_t* panel = m.data + size_t(row / kRows) * panel_bytes_of(m);
  int lane = row % kRows;
  if (m.format == kFloat32) {
    for (int k = 0; k < padded_of(m); ++k) out[k] = at<float>(panel + 4 * (k * kRows + lane));
    return;
  }
  int bytes = m.format == kInt4 ? 256 : 512;
  for (int b = 0; b < blocks_of(m); ++b) {
    const uint8_t* pair = panel + size_t(b / 2) * (64 + 2 * bytes);
    float scale = half_to_float(at<uint16_t>(pair + 2 * (b % 2 * kRows + lane)));
    const uint8_t* block = pair + 64 + b % 2 * bytes;
    for (int k = 0; k < kBlock; ++k) {
      int group = k / 4, value;
      if (m.format == kInt4) {
        uint8_t both = block[group % 4 * 64 + lane * 4 + k % 4];
        value = int(group < 4 ? both & 15 : both >> 4) - 8;
      } else {
        value = int(block[group * 64 + lane * 4 + k % 4]) - 128;
      }
      out[b * kBlock + k] = float(value) * scale;
    }
  }
}
