// Tasks of a call, on the threads that XLA has.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// Spreads tasks over XLA's own threads. The caller works too and waits for nothing but tasks that a thread is at work
// on, so that callers on every thread of the pool, as with many virtual devices, cannot wait for each other.
class Team {
 public:
  explicit Team(ffi::ThreadPool& pool) : pool_(pool) { Active().fetch_add(1); }
  ~Team() { Active().fetch_sub(1); }

  // Cores that are not busy with other calls, this thread's included.
  int size() const {
    static const int cores = std::max(1u, std::thread::hardware_concurrency());
    return std::max(1, std::min<int>(cores - Active().load() + 1, pool_.num_threads()));
  }

  template <typename Task>
  void Run(int64_t tasks, const Task& task) {
    int helpers = static_cast<int>(std::min<int64_t>(size(), tasks)) - 1;
    if (helpers <= 0) {
      for (int64_t i = 0; i < tasks; ++i) task(i);
      return;
    }
    struct Shared {
      std::atomic<int64_t> next{0}, done{0};
      int64_t tasks;
      const Task* task;
      void Work() {
        for (int64_t i; (i = next.fetch_add(1)) < tasks; done.fetch_add(1)) (*task)(i);
      }
    };
    auto shared = std::make_shared<Shared>();
    shared->tasks = tasks;
    shared->task = &task;
    for (int i = 0; i < helpers; ++i) pool_.Schedule([shared] { shared->Work(); });
    shared->Work();
    for (int spins = 0; shared->done.load() < tasks; ++spins) {
      if (spins > 2000) std::this_thread::yield();
    }
  }

 private:
  static std::atomic<int>& Active() {
    static std::atomic<int> active{0};
    return active;
  }
  ffi::ThreadPool& pool_;
};

}  // namespace
