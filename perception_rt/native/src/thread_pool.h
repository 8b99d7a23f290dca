// Threads that share the work of one call at a time.
//
// A worker that has nothing to do spins for a moment, because the next piece of a decode step comes
// within microseconds, and then sleeps. The pool is never destroyed: the process ends with it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

namespace prt {

class ThreadPool {
 public:
  // Runs work(i, worker) for i in 0 to count - 1 on `threads` threads; the caller is worker 0.
  template <class Work>
  void run(int threads, int count, const Work& work) {
    if (threads <= 1 || count <= 1) {
      for (int i = 0; i < count; ++i) work(i, 0);
      return;
    }
    start(threads - 1);
    call_ = [](const void* data, int i, int worker) {
      (*static_cast<const Work*>(data))(i, worker);
    };
    data_ = &work;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    const int helpers = threads < count ? threads - 1 : count - 1;
    call_number_ += kCall;
    state_.store(call_number_ | kOpen | uint64_t(helpers) * kHelper, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst)) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    take(0);
    // A worker that has not begun, because other programs have its core, is not waited for.
    state_.fetch_and(~kOpen, std::memory_order_acq_rel);
    for (int spins = 0; state_.load(std::memory_order_acquire) % kHelper; ++spins) rest(spins);
  }

  // One call at a time.
  std::mutex& calls() { return calls_; }

  static ThreadPool& shared();

 private:
  static constexpr int kSpins = 20000;  // about 100 microseconds to 1 millisecond

  static void rest(int spins);
  void start(int workers);
  void take(int worker) {
    for (int i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;)
      call_(data_, i, worker);
  }
  void work(int index);

  std::mutex calls_, mutex_;
  std::condition_variable wake_;
  // Of the call in progress: how many workers are busy with it (12 bits), how many may take part
  // (11 bits), whether more may begin (1 bit), and its number.
  static constexpr uint64_t kHelper = 1 << 12, kOpen = 1 << 23, kCall = 1 << 24;
  std::atomic<uint64_t> state_{0};
  std::atomic<int> sleeping_{0}, next_{0};
  uint64_t call_number_ = 0;
  int started_ = 0, count_ = 0;
  void (*call_)(const void*, int, int) = nullptr;
  const void* data_ = nullptr;
};

}  // namespace prt
