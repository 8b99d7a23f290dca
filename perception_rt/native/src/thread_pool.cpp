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
  uint64_t seen = 0;
  for (;;) {
    int spins = 0;
    uint64_t ticket;
    while ((ticket = ticket_.load(std::memory_order_acquire)) == seen && spins < kSpins)
      rest(spins++);
    if (ticket == seen) {
      std::unique_lock<std::mutex> lock(mutex_);
      sleeping_.fetch_add(1, std::memory_order_seq_cst);
      wake_.wait(lock, [&] { return (ticket = ticket_.load(std::memory_order_seq_cst)) != seen; });
      sleeping_.fetch_sub(1, std::memory_order_seq_cst);
    }
    seen = ticket;
    if (index < int(ticket & 0xffff)) {
      take(index + 1);
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }
}

}  // namespace prt
