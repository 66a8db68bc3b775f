// Memory that is kept from call to call.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace {

struct Free {
  void operator()(float* memory) const { std::free(memory); }
};

// Of one call. It outlives it, because the pages of fresh memory cost more to touch than many calls cost to compute.
class Scratch {
 public:
  explicit Scratch(size_t floats) : size_(std::max<size_t>(floats, 1)) {
    std::lock_guard<std::mutex> lock(Mutex());
    auto& spare = Spare();
    auto fits = std::find_if(spare.begin(), spare.end(), [&](const Block& block) { return block.second >= size_; });
    if (fits != spare.end()) {
      block_ = std::move(*fits);
      spare.erase(fits);
    } else {
      size_t bytes = (size_ * sizeof(float) + 4095) / 4096 * 4096;
      block_ = {std::unique_ptr<float, Free>(static_cast<float*>(std::aligned_alloc(4096, bytes))), bytes / 4};
    }
  }
  ~Scratch() {
    std::lock_guard<std::mutex> lock(Mutex());
    auto& spare = Spare();
    spare.push_back(std::move(block_));
    std::sort(spare.begin(), spare.end(), [](const Block& a, const Block& b) { return a.second < b.second; });
    if (spare.size() > 64) spare.erase(spare.begin());
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* get() { return block_.first.get(); }

 private:
  using Block = std::pair<std::unique_ptr<float, Free>, size_t>;
  static std::mutex& Mutex() {
    static std::mutex* mutex = new std::mutex;
    return *mutex;
  }
  static std::vector<Block>& Spare() {
    static auto* spare = new std::vector<Block>;
    return *spare;
  }
  size_t size_;
  Block block_;
};

float* Local(size_t floats, int which) {  // of this thread, for one task
  static thread_local std::vector<float> buffers[3];
  std::vector<float>& buffer = buffers[which];
  if (buffer.size() < floats + 16) buffer.resize(floats + 16);
  auto address = reinterpret_cast<uintptr_t>(buffer.data());
  return reinterpret_cast<float*>((address + 63) / 64 * 64);
}

}  // namespace
