// Choosing tokens: the most likely one, and draws by the Gumbel trick. See ops/sampling.py, which says what is chosen.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "memory.h"
#include "threads.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace {

struct Likeliest {
  int64_t place;  // the first on ties
  float logit, log_sum;
};

Likeliest LikeliestOf(const float* logits, int64_t count) {
  int64_t whole = count / kLanes * kLanes, place = 0;
  float largest = -INFINITY;
  Vec most = Splat(-INFINITY);
  for (int64_t i = 0; i < whole; i += kLanes) most = Max(most, Load(logits + i));
  for (int i = 0; i < kLanes; ++i) largest = std::max(largest, most[i]);
  for (int64_t i = whole; i < count; ++i) largest = std::max(largest, logits[i]);
  while (place + 1 < count && logits[place] != largest) ++place;
  Vec sums = {};
  for (int64_t i = 0; i < whole; i += kLanes) sums += Exp(Load(logits + i) - largest);
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += sums[i];
  for (int64_t i = whole; i < count; ++i) sum += std::exp(logits[i] - largest);
  return {place, largest, largest + static_cast<float>(std::log(sum))};
}

// Random bits by Threefry-2x32 with 20 rounds (Salmon et al., SC 2011), as jax.random draws them: those of place i are the
// two words of the block (0, i), one xor the other.
inline UVec RandomBits(uint32_t seed, uint32_t position, UVec place) {
  const uint32_t keys[3] = {seed, position, seed ^ position ^ 0x1BD11BDA};
  const int turns[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  UVec a = place ^ place, b = place;
  a += keys[0];
  b += keys[1];
#pragma GCC unroll 5
  for (int block = 0; block < 5; ++block) {
#pragma GCC unroll 4
    for (int turn : turns[block % 2]) {
      a += b;
      b = b << turn | b >> (32 - turn);
      b ^= a;
    }
    a += keys[(block + 1) % 3];
    b += keys[(block + 2) % 3] + block + 1;
  }
  return a ^ b;
}

// Noise by Gumbel's distribution from uniform numbers of 23 bits, as jax.random.gumbel makes it of random bits.
inline Vec Gumbel(UVec bits) {
  Vec uniform = (Vec)(bits >> 9 | 0x3F800000) - 1.0f;
  return Vec{} - Log(Vec{} - Log(Max(uniform, Splat(0x1p-126f))));
}

struct Choice {
  float temperature;
  int32_t top_k;
  float top_p, min_p;
  uint32_t seed, position;
};

// Numbers of at least 0 are in the order of their bits. The greatest bits for which a condition holds that holds for 0 and
// for no more once it fails, if they are at most 1.0's.
template <typename Holds>
int32_t Greatest(const Holds& holds) {
  int32_t low = 0, high = 0x3F800000;
  while (low < high) {
    int32_t middle = low + (high - low + 1) / 2;
    if (holds(middle)) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// The bits of the least probability that is kept. likely: probabilities, 0 up to whole vectors. most: the greatest.
int32_t LeastKept(const float* likely, int64_t count, float most, const Choice& how) {
  int32_t least = 0;
  auto each = [&](auto&& take) {
    for (int64_t i = 0; i < count; i += kLanes) take(Load(likely + i));
  };
  if (how.top_k > 0 && how.top_k < count) {
    least = Greatest([&](int32_t bound) {
      IVec found = {};
      each([&](Vec value) { found -= (IVec)value >= bound; });
      int64_t total = 0;
      for (int i = 0; i < kLanes; ++i) total += found[i];
      return total >= how.top_k;
    });
  }
  auto sum_from = [&](int32_t bound) {
    Vec found = {};
    each([&](Vec value) { found += (Vec)((IVec)value & ((IVec)value >= bound)); });
    double total = 0;
    for (int i = 0; i < kLanes; ++i) total += found[i];
    return total;
  };
  if (how.top_p < 1) {
    double needed = static_cast<double>(how.top_p) * sum_from(least);
    least = std::max(least, Greatest([&](int32_t bound) { return sum_from(std::max(bound, least)) >= needed; }));
  }
  float lowest = how.min_p * most;
  int32_t bits;
  std::memcpy(&bits, &lowest, 4);
  return std::max(least, bits);
}

int64_t Draw(const float* logits, int64_t count, const Likeliest& best, const Choice& how) {
  int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  float* scaled = Local(padded, 0);
  // The likeliest token stays at 0, so that no temperature, however small, carries it to infinity.
  for (int64_t i = 0; i + kLanes <= count; i += kLanes)
    Store((Load(logits + i) - best.logit) / how.temperature, scaled + i);
  for (int64_t i = count / kLanes * kLanes; i < padded; ++i)
    scaled[i] = i < count ? (logits[i] - best.logit) / how.temperature : -INFINITY;
  const float* likely = nullptr;
  int32_t least = 0;
  if (how.top_k > 0 || how.top_p < 1 || how.min_p > 0) {
    float* of_each = Local(padded, 1);
    Vec sums = {};
    for (int64_t i = 0; i < padded; i += kLanes) {
      Vec value = Exp(Load(scaled + i));
      sums += value;
      Store(value, of_each + i);
    }
    double sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += sums[i];
    float share = static_cast<float>(1 / sum);
    for (int64_t i = 0; i < padded; i += kLanes) Store(Load(of_each + i) * share, of_each + i);
    likely = of_each;
    least = LeastKept(likely, padded, share, how);
  }
  UVec lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  Vec most = Splat(-INFINITY);
  IVec place = {};
  for (int64_t i = 0; i < padded; i += kLanes) {
    Vec value = Load(scaled + i);
    if (likely) {
      IVec kept = (IVec)Load(likely + i) >= least;
      int32_t any = 0;
      for (int j = 0; j < kLanes; ++j) any |= kept[j];
      if (!any) continue;
      value = kept ? value : Splat(-INFINITY);
    }
    UVec at = lanes + static_cast<uint32_t>(i);
    value += Gumbel(RandomBits(how.seed, how.position, at));
    IVec grown = value > most;
    most = grown ? value : most;
    place = grown ? (IVec)at : place;
  }
  int chosen = 0;
  for (int i = 1; i < kLanes; ++i)
    if (most[i] > most[chosen] || (most[i] == most[chosen] && place[i] < place[chosen])) chosen = i;
  return most[chosen] > -INFINITY ? place[chosen] : best.place;
}

// logits [B, V] -> the place of the greatest of each row [B], and the logarithm of the sum of all exponentials [B].
ffi::Error Greedy(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> logits, ffi::ResultBuffer<ffi::S32> best,
                  ffi::ResultBuffer<ffi::F32> log_sum) {
  int64_t cols = logits.dimensions()[1];
  Team team(pool);
  team.Run(logits.dimensions()[0], [&](int64_t row) {
    Likeliest found = LikeliestOf(logits.typed_data() + row * cols, cols);
    best->typed_data()[row] = static_cast<int32_t>(found.place);
    log_sum->typed_data()[row] = found.log_sum;
  });
  return ffi::Error::Success();
}

// logits [B, V], then temperature, top_k, top_p, min_p, seed and position of each row [B] -> its token [B] and the
// logarithm of its probability [B].
ffi::Error Sample(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> logits, ffi::Buffer<ffi::F32> temperature,
                  ffi::Buffer<ffi::S32> top_k, ffi::Buffer<ffi::F32> top_p, ffi::Buffer<ffi::F32> min_p,
                  ffi::Buffer<ffi::S32> seed, ffi::Buffer<ffi::S32> position, ffi::ResultBuffer<ffi::S32> tokens,
                  ffi::ResultBuffer<ffi::F32> logprobs) {
  int64_t cols = logits.dimensions()[1];
  Team team(pool);
  team.Run(logits.dimensions()[0], [&](int64_t row) {
    const float* own = logits.typed_data() + row * cols;
    Choice how{temperature.typed_data()[row], top_k.typed_data()[row], top_p.typed_data()[row],
               min_p.typed_data()[row], static_cast<uint32_t>(seed.typed_data()[row]),
               static_cast<uint32_t>(position.typed_data()[row])};
    Likeliest best = LikeliestOf(own, cols);
    int64_t token = how.temperature > 0 ? Draw(own, cols, best, how) : best.place;
    tokens->typed_data()[row] = static_cast<int32_t>(token);
    logprobs->typed_data()[row] = own[token] - best.log_sum;
  });
  return ffi::Error::Success();
}

}  // namespace
