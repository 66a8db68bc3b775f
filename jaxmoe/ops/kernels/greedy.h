// The most likely token.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "threads.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace {

// logits [B, V] -> the place of the greatest of each row, the first on ties [B], and the logarithm of the sum of all
// exponentials [B].
ffi::Error Greedy(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> logits, ffi::ResultBuffer<ffi::S32> best,
                  ffi::ResultBuffer<ffi::F32> log_sum) {
  int64_t rows = logits.dimensions()[0], cols = logits.dimensions()[1], whole = cols / kLanes * kLanes;
  Team team(pool);
  team.Run(rows, [&](int64_t row) {
    const float* from = logits.typed_data() + row * cols;
    float largest = -INFINITY;
    Vec most = Splat(-INFINITY);
    for (int64_t i = 0; i < whole; i += kLanes) most = Max(most, Load(from + i));
    for (int i = 0; i < kLanes; ++i) largest = std::max(largest, most[i]);
    for (int64_t i = whole; i < cols; ++i) largest = std::max(largest, from[i]);
    int64_t at = 0;
    while (at + 1 < cols && from[at] != largest) ++at;
    Vec sums = {};
    for (int64_t i = 0; i < whole; i += kLanes) sums += Exp(Load(from + i) - largest);
    double sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += sums[i];
    for (int64_t i = whole; i < cols; ++i) sum += std::exp(from[i] - largest);
    best->typed_data()[row] = static_cast<int32_t>(at);
    log_sum->typed_data()[row] = largest + static_cast<float>(std::log(sum));
  });
  return ffi::Error::Success();
}

}  // namespace
