#include "thread_pool.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace prt {

ThreadPool& ThreadPool::shared() {
  static ThreadPool* pool = new ThreadPool;
  return *pool;
}

void ThreadPool::rest(int spins) {
  if (spins > kSpins) {
    std::this_thread::yield();  // the other thread has no core now
    return;
  }
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void ThreadPool::start(int workers) {
  for (; started_ < workers; ++started_) std::thread([this, i = started_] { work(i); }).detach();
}

void ThreadPool::work(int index) {
  uint64_t seen = 0;  // number of the latest call, in the high bits
  for (;;) {
    uint64_t state;
    int spins = 0;
    const auto is_new = [&] {
      state = state_.load(std::memory_order_seq_cst);
      return state / kCall != seen;
    };
    while (!is_new() && spins < kSpins) rest(spins++);
    if (state / kCall == seen) {
      std::unique_lock<std::mutex> lock(mutex_);
      sleeping_.fetch_add(1, std::memory_order_seq_cst);
      wake_.wait(lock, is_new);
      sleeping_.fetch_sub(1, std::memory_order_seq_cst);
    }
    seen = state / kCall;
    // The state may change meanwhile, even to another call: then look again.
    while (state / kCall == seen && state & kOpen &&
           index < int(state % kOpen / kHelper)) {
      if (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) continue;
      take(index + 1);
      state_.fetch_sub(1, std::memory_order_release);
      break;
    }
  }
}

}  // namespace prt
