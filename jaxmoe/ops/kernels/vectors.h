// Vectors of float32, the narrower types that are widened into them, and e^x.
//
// They are GCC's and clang's vector extensions: one source for AVX-512, AVX2 and NEON.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef float VecU __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t IVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfU __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
typedef int8_t ByteU __attribute__((vector_size(kLanes), aligned(1), may_alias));

struct Bf16 {
  uint16_t bits;
};
struct Fp8 {  // float8_e4m3fn
  uint8_t bits;
};

inline float Widen(float value) { return value; }
inline float Widen(Bf16 value) {
  uint32_t bits = uint32_t{value.bits} << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}
inline float Widen(int8_t value) { return value; }
inline float Widen(Fp8 value) {
  int exponent = value.bits >> 3 & 15, mantissa = value.bits & 7;
  float magnitude = exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  if ((value.bits & 127) == 127) magnitude = NAN;
  return value.bits & 128 ? -magnitude : magnitude;
}
inline void Narrow(float value, float* out) { *out = value; }
inline void Narrow(float value, Bf16* out) {  // to the nearest, even on ties, as XLA rounds
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  out->bits = std::isnan(value) ? 0x7FC0 : (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}

inline Vec Splat(float value) { return value - Vec{}; }
inline Vec Load(const float* from) { return *reinterpret_cast<const VecU*>(from); }
inline Vec Load(const Bf16* from) {
  UVec wide = __builtin_convertvector(*reinterpret_cast<const HalfU*>(from), UVec) << 16;
  return (Vec)wide;
}
// GCC converts bytes one by one unless told which instruction it has.
inline IVec Bytes(const void* from) {
#if defined(__AVX512F__)
  return (IVec)_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from)));
#elif defined(__AVX2__)
  return (IVec)_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(from)));
#else
  return __builtin_convertvector(*static_cast<const ByteU*>(from), IVec);
#endif
}
inline Vec Load(const int8_t* from) { return __builtin_convertvector(Bytes(from), Vec); }
inline Vec Load(const Fp8* from) {
  IVec bits = Bytes(from);
  // With the exponent moved from a bias of 7 to 127. Denormals, whose exponent of 0 counts as 1, are then 2^-7 too much
  // and half of what they should be; they must not pass through float32's own, which XLA has the processor flush.
  Vec value = (Vec)(((bits & 127) << 20) + (120 << 23));
  value = (bits & 120) == 0 ? (value - 0x1p-7f) * 2.0f : value;
  return (Vec)((IVec)value | (bits & (int32_t)0x80000000));
}
inline void Store(Vec value, float* to) { *reinterpret_cast<VecU*>(to) = value; }
template <typename X>
inline void Copy(const X* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) Store(Load(from + i), to + i);
  for (; i < count; ++i) to[i] = Widen(from[i]);
}
inline Vec Max(Vec a, Vec b) { return a > b ? a : b; }

// Of every two lanes whose numbers differ in bit S alone, the one that has it in `low` and the other in `high` change
// places.
template <int S, size_t... I>
inline void ChangePlaces(Vec& low, Vec& high, std::index_sequence<I...>) {
  Vec a = low, b = high;
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
  low = __builtin_shufflevector(a, b, ((I & S) ? kLanes + (I ^ S) : I)...);
  high = __builtin_shufflevector(a, b, ((I & S) ? kLanes + I : I ^ S)...);
#else
  ((low[I] = (I & S) ? b[I ^ S] : a[I], high[I] = (I & S) ? b[I] : a[I ^ S]), ...);
#endif
}
// A square of kLanes vectors.
template <int S = 1>
inline void Transpose(Vec* rows) {
  if constexpr (S < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      if (!(i & S)) ChangePlaces<S>(rows[i], rows[i | S], std::make_index_sequence<kLanes>());
    Transpose<2 * S>(rows);
  }
}

// The natural logarithm of normal numbers, to 2 units in the last place (the polynomial of Cephes' logf).
__attribute__((always_inline)) inline Vec Log(Vec x) {
  IVec bits = (IVec)x;
  Vec part = (Vec)((bits & 0x7FFFFF) | 0x3F000000);  // from 0.5 to 1
  IVec low = part < Splat(0.707106781f);
  Vec exponent = __builtin_convertvector((bits >> 23) - 126 + low, Vec);
  part = (low ? part + part : part) - 1.0f;
  Vec square = part * part, p = Splat(7.0376836292e-2f);
  p = p * part - 1.1514610310e-1f;
  p = p * part + 1.1676998740e-1f;
  p = p * part - 1.2420140846e-1f;
  p = p * part + 1.4249322787e-1f;
  p = p * part - 1.6668057665e-1f;
  p = p * part + 2.0000714765e-1f;
  p = p * part - 2.4999993993e-1f;
  p = p * part + 3.3333331174e-1f;
  Vec small = p * part * square - exponent * 2.12194440e-4f - 0.5f * square;
  return part + small + exponent * 0.693359375f;
}

// e^x to 2 units in the last place; 0 for x below -87, where results would be denormal.
__attribute__((always_inline)) inline Vec Exp(Vec x) {
  const Vec magic = Splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  Vec bounded = x > Splat(88.0f) ? Splat(88.0f) : x;
  bounded = bounded < Splat(-87.0f) ? Splat(-87.0f) : bounded;
  Vec n = bounded * 1.44269504f + magic;
  IVec exponent = ((IVec)n - (IVec)magic + 127) << 23;
  n = n - magic;
  Vec r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = Splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Vec result = p * (Vec)exponent;
  return x < Splat(-87.0f) ? Vec{} : result;
}

}  // namespace
