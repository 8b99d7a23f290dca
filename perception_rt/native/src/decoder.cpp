// Runs a decoder with the kernels of one instruction set.
//
// Activations are float32 rows of tokens, padded with zeros to a multiple of 64 columns.
#include "decoder.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "thread_pool.h"

namespace prt {
namespace {

constexpr int kPanelsAtOnce = 8;  // panels of one piece of work
constexpr size_t kFewProducts = 1 << 19;  // some 5 microseconds of one core

int padded(int columns) { return (columns + 63) / 64 * 64; }

// Numbers at an address that is a multiple of 64, initially zero.
template <class T>
class Buffer {
 public:
  // Keeps what is there, and its zeros, unless it has to grow.
  T* reserve(size_t count) {
    if (count > count_) {
      memory_.reset();
      count_ = 0;
      memory_.reset(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(64))));
      std::memset(memory_.get(), 0, count * sizeof(T));
      count_ = count;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<T, Free> memory_;
  size_t count_ = 0;
};

struct Decoder {
  PrtModel model;
  std::vector<PrtLayer> layers;
  const Kernels* kernels;
  int threads;

  // Of the call in progress, and kept for the next one.
  Buffer<float> stream, normed, qkv, attended, gate_up, inner, picked, scratch;
  Buffer<int8_t> values;
  Buffer<float> scales;
  Buffer<int32_t> offsets;
};

class Pass {
 public:
  Pass(Decoder& decoder, const PrtCall& call)
      : d_(decoder), c_(call), k_(*decoder.kernels), s_(decoder.model.shape),
        count_(call.sequences * call.tokens), dim_(padded(s_.dim)),
        q_dim_(s_.heads * s_.head_dim), kv_dim_(s_.kv_heads * s_.head_dim),
        qkv_dim_(padded(q_dim_ + 2 * kv_dim_)), out_dim_(padded(q_dim_)),
        ffn_dim_(padded(s_.ffn_dim)), gates_dim_(padded(2 * s_.ffn_dim)),
        group_(s_.heads / s_.kv_heads) {
    const size_t n = size_t(count_);
    x_ = d_.stream.reserve(n * dim_);
    normed_ = d_.normed.reserve(std::max(n, size_t(c_.sequences) * c_.count) * dim_);
    qkv_ = d_.qkv.reserve(n * qkv_dim_);
    attended_ = d_.attended.reserve(n * out_dim_);
    gate_up_ = d_.gate_up.reserve(n * gates_dim_);
    inner_ = d_.inner.reserve(n * ffn_dim_);
    scratch_floats_ = attend_floats(kTile, group_, s_.head_dim);
    scratch_ = d_.scratch.reserve(scratch_floats_ * d_.threads);
  }

  void run() {
    for (int t = 0; t < count_; ++t)
      std::memcpy(x_ + size_t(t) * dim_, c_.hidden + size_t(t) * s_.dim, size_t(s_.dim) * 4);
    for (int i = 0; i < s_.layers; ++i) layer(i);
    logits();
  }

 private:
  // Runs work(i, worker) for i in 0 to count - 1, several of them at a time. Work of few products is
  // not worth the start of a thread.
  template <class Work>
  void each(int count, int at_once, const Work& work, size_t products = kFewProducts) {
    const int pieces = (count + at_once - 1) / at_once;
    const int threads = products < kFewProducts ? 1 : d_.threads;
    ThreadPool::shared().run(threads, pieces, [&](int piece, int worker) {
      const int stop = std::min((piece + 1) * at_once, count);
      for (int i = piece * at_once; i < stop; ++i) work(i, worker);
    });
  }

  void layer(int index) {
    const PrtLayer& l = d_.layers[index];
    norm(l.attention_norm, x_, count_);
    product(l.qkv, normed_, count_, qkv_, qkv_dim_);
    rotate_and_store(index);
    attend(index);
    product(l.out, attended_, count_, normed_, dim_);
    add();
    norm(l.ffn_norm, x_, count_);
    product(l.gate_up, normed_, count_, gate_up_, gates_dim_);
    each(count_, 1, [&](int t, int) {
      const float* gate = gate_up_ + size_t(t) * gates_dim_;
      k_.swiglu(gate, gate + s_.ffn_dim, s_.ffn_dim, inner_ + size_t(t) * ffn_dim_);
    });
    product(l.down, inner_, count_, normed_, dim_);
    add();
  }

  void norm(const float* gain, const float* x, int tokens) {
    each(tokens, 4, [&](int t, int) {
      k_.rms_norm(x + size_t(t) * dim_, gain, s_.norm_eps, s_.dim, normed_ + size_t(t) * dim_);
    });
  }

  void add() {
    each(count_, 4, [&](int t, int) {
      k_.add(x_ + size_t(t) * dim_, normed_ + size_t(t) * dim_, s_.dim);
    });
  }

  // out[t * stride + row] = m[row] . x[t]
  void product(const Matrix& m, const float* x, int tokens, float* out, size_t stride) {
    if (m.format != kFloat32) round(m, x, tokens);
    const size_t x_stride = padded_of(m);
    each(panels_of(m), kPanelsAtOnce, [&](int panel, int) {
      alignas(64) float sums[kTile * kRows];  // rows of `out` are too far apart to add to them
      const int rows = std::min(m.rows - panel * kRows, kRows);
      for (int first = 0; first < tokens; first += kTile) {
        const int width = std::min(tokens - first, kTile);
        if (m.format == kFloat32)
          k_.float_product(m, panel, x + first * x_stride, x_stride, width, sums, kRows);
        else
          k_.product(m, panel, tile(m, first, width), sums, kRows);
        float* place = out + first * stride + size_t(panel) * kRows;
        for (int t = 0; t < width; ++t)
          std::memcpy(place + t * stride, sums + t * kRows, size_t(rows) * 4);
      }
    }, size_t(m.rows) * x_stride * tokens);
  }

  void round(const Matrix& m, const float* x, int tokens) {
    d_.values.reserve(size_t(tokens) * padded_of(m));
    d_.scales.reserve(size_t(tokens) * spans_of(m));
    d_.offsets.reserve(size_t(tokens) * blocks_of(m));
    each(tokens, 1, [&](int t, int) {
      const int first = t / kTile * kTile;
      const Tile place = tile(m, first, std::min(tokens - first, kTile));
      k_.round(m, x + size_t(t) * padded_of(m), t - first, place);
    });
  }

  // Place of the rounded tokens from `first` on.
  Tile tile(const Matrix& m, int first, int width) {
    const size_t t = size_t(first);
    return {d_.values.reserve(0) + t * padded_of(m), d_.scales.reserve(0) + t * spans_of(m),
            d_.offsets.reserve(0) + t * blocks_of(m), width};
  }

  // Rotates adjacent pairs of queries and keys; appends keys and values to the caches.
  void rotate_and_store(int index) {
    const int half = s_.head_dim / 2;
    each(count_, 1, [&](int t, int) {
      const int n = t / c_.tokens, slot = c_.past[n] + t % c_.tokens;
      const float* cos = d_.model.cos + size_t(slot) * half;
      const float* sin = d_.model.sin + size_t(slot) * half;
      float* row = qkv_ + size_t(t) * qkv_dim_;
      for (int h = 0; h < s_.heads + s_.kv_heads; ++h) {
        float* x = row + size_t(h) * s_.head_dim;
        for (int i = 0; i < half; ++i) {
          const float a = x[2 * i], b = x[2 * i + 1];
          x[2 * i] = a * cos[i] - b * sin[i];
          x[2 * i + 1] = a * sin[i] + b * cos[i];
        }
      }
      for (int h = 0; h < s_.kv_heads; ++h) {
        const size_t place = cache_row(n, h) + size_t(slot) * s_.head_dim;
        store(c_.keys[index], place, row + q_dim_ + size_t(h) * s_.head_dim);
        store(c_.values[index], place, row + q_dim_ + kv_dim_ + size_t(h) * s_.head_dim);
      }
    });
  }

  size_t cache_row(int sequence, int head) const {
    return (size_t(sequence) * s_.kv_heads + head) * c_.slots * s_.head_dim;
  }

  void store(void* cache, size_t place, const float* x) {
    if (s_.half_cache)
      k_.store_half(x, s_.head_dim, static_cast<uint16_t*>(cache) + place);
    else
      std::memcpy(static_cast<float*>(cache) + place, x, size_t(s_.head_dim) * 4);
  }

  void attend(int index) {
    const int tiles = (c_.tokens + kTile - 1) / kTile, rows = c_.sequences * s_.kv_heads;
    const size_t item = s_.half_cache ? 2 : 4;
    const int longest = *std::max_element(c_.past, c_.past + c_.sequences);
    each(rows * tiles, 1, [&](int i, int worker) {
      // The last tokens see the most keys, so they come first.
      const int first = (tiles - 1 - i / rows) * kTile, n = i % rows / s_.kv_heads;
      const int h = i % s_.kv_heads, tokens = std::min(c_.tokens - first, kTile);
      const size_t t = size_t(n) * c_.tokens + first, head = size_t(h) * group_ * s_.head_dim;
      const size_t place = cache_row(n, h) * item;
      k_.attend(qkv_ + t * qkv_dim_ + head, qkv_dim_, tokens, group_, s_.head_dim,
                static_cast<const char*>(c_.keys[index]) + place,
                static_cast<const char*>(c_.values[index]) + place, s_.half_cache,
                c_.past[n] + first, scratch_ + size_t(worker) * scratch_floats_,
                attended_ + t * out_dim_ + head, out_dim_);
    }, size_t(longest + c_.tokens) * count_ * q_dim_ * 16);  // floats take more time
  }

  void logits() {
    const int count = c_.sequences * c_.count;
    float* picked = d_.picked.reserve(size_t(count) * dim_);
    for (int i = 0; i < count; ++i) {
      const size_t t = size_t(i / c_.count) * c_.tokens + size_t(c_.positions[i]);
      std::memcpy(picked + size_t(i) * dim_, x_ + t * dim_, size_t(dim_) * 4);
    }
    norm(d_.model.norm, picked, count);
    product(d_.model.head, normed_, count, c_.logits, s_.vocab_size);
  }

  Decoder& d_;
  const PrtCall& c_;
  const Kernels& k_;
  const PrtShape& s_;
  const int count_, dim_, q_dim_, kv_dim_, qkv_dim_, out_dim_, ffn_dim_, gates_dim_, group_;
  float *x_, *normed_, *qkv_, *attended_, *gate_up_, *inner_, *scratch_;
  size_t scratch_floats_;
};

}  // namespace
}  // namespace prt

extern "C" {

void* prt_open(const PrtModel* model, const char* name, int32_t threads) {
  const prt::Kernels* kernels = prt::find_kernels(name);
  if (!kernels) return nullptr;
  try {
    auto decoder = std::make_unique<prt::Decoder>();
    decoder->model = *model;
    decoder->layers.assign(model->layers, model->layers + model->shape.layers);
    decoder->kernels = kernels;
    decoder->threads = threads;
    return decoder.release();
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

void prt_close(void* decoder) { delete static_cast<prt::Decoder*>(decoder); }

int32_t prt_forward(void* decoder, const PrtCall* call) {
  std::lock_guard<std::mutex> lock(prt::ThreadPool::shared().calls());
  try {
    prt::Pass(*static_cast<prt::Decoder*>(decoder), *call).run();
  } catch (const std::exception&) {  // no memory, or no thread
    return 1;
  }
  return 0;
}

int32_t prt_rows(const prt::Matrix* table, const int64_t* rows, int64_t count, float* out) {
  try {
    std::vector<float> row(size_t(prt::padded_of(*table)));
    for (int64_t i = 0; i < count; ++i) {
      prt::kScalar.row(*table, int(rows[i]), row.data());
      std::memcpy(out + i * table->columns, row.data(), size_t(table->columns) * 4);
    }
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
}
