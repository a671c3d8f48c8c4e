// The storage of low_precision.h in loops over memory, for the one pass. Each has a twin there by operations of libtorch.
#pragma once

#include <cstring>
#include <limits>
#include <type_traits>

#include "low_precision.h"
#include "one_pass.h"

namespace tig {

template <typename T>
constexpr int SIGNIFICAND = 24 - dropped_bits(std::is_same<T, c10::BFloat16>::value ? at::kBFloat16 : at::kHalf);

TIG_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
TIG_INLINE float of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Changes about half of all bits for any change of `x` (the finaliser of MurmurHash3).
TIG_INLINE uint32_t scrambled(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85ebca6b;
  x = (x ^ (x >> 13)) * 0xc2b2ae35;
  return x ^ (x >> 16);
}

// The random number of the element with this index in memory, in the step with this key.
TIG_INLINE uint32_t random_bits(uint64_t key, uint64_t index) {
  const uint32_t first = scrambled(static_cast<uint32_t>(index) ^ static_cast<uint32_t>(key));
  const uint32_t beyond = static_cast<uint32_t>(index >> 32) * 0x9e3779b9;
  return scrambled(first + beyond + static_cast<uint32_t>(key >> 32));
}

// The value, rounded up or down to a number that T has; larger values than T's are left to the usual rounding.
template <typename T>
TIG_INLINE float rounded_at_random(float value, uint32_t random) {
  constexpr uint32_t SIGN = 0x80000000, DROPPED = (uint32_t{1} << (24 - SIGNIFICAND<T>)) - 1;
  const float size = of_bits(bits_of(value) & ~SIGN);
  float up_or_down = of_bits((bits_of(size) + (random & DROPPED)) & ~DROPPED);
  if constexpr (std::is_same<T, c10::Half>::value) {
    // Below its smallest normal number, f16 has steps of 2^-24. Larger sizes are replaced, because they may not fit int.
    const bool small = size < 0x1p-14f;
    const float steps = (small ? size : 0.f) * 0x1p24f;
    const float whole = static_cast<float>(static_cast<int32_t>(steps));
    const float up = static_cast<float>(static_cast<int32_t>(random & 0xffffff)) * 0x1p-24f < steps - whole ? 1.f : 0.f;
    up_or_down = small ? (whole + up) * 0x1p-24f : up_or_down;
  }
  up_or_down = of_bits(bits_of(up_or_down) | (bits_of(value) & SIGN));
  return size < static_cast<float>(std::numeric_limits<T>::max()) ? up_or_down : value;
}

// Brings master weights up to date with parameters that were given other values.
template <typename T>
TIG_INLINE void read_master(float* __restrict master, const T* __restrict p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float now = static_cast<float>(p[i]), rounded = static_cast<float>(static_cast<T>(master[i]));
    master[i] = rounded == now ? master[i] : now;
  }
}

template <typename T>
TIG_INLINE void read_kahan(float* __restrict to, const T* __restrict p, const T* __restrict compensation, int64_t n) {
  constexpr float MOST = 1.f / static_cast<float>(1 << SIGNIFICAND<T>);
  for (int64_t i = 0; i < n; ++i) {
    const float now = static_cast<float>(p[i]), lost = static_cast<float>(compensation[i]);
    to[i] = of_bits(bits_of(lost) & 0x7fffffff) <= of_bits(bits_of(now) & 0x7fffffff) * MOST ? now + lost : now;
  }
}

template <typename T>
TIG_INLINE void write_kahan(T* __restrict p, T* __restrict compensation, const float* __restrict value, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    p[i] = static_cast<T>(value[i]);
    const float lost = value[i] - static_cast<float>(p[i]);
    // Nothing is kept of a value that T cannot hold.
    compensation[i] = static_cast<T>(lost - lost == 0.f ? lost : 0.f);
  }
}

template <typename T>
TIG_INLINE void write_at_random(T* __restrict p, const float* __restrict value, int64_t n, uint64_t key, uint64_t first) {
  for (int64_t i = 0; i < n; ++i)
    p[i] = static_cast<T>(rounded_at_random<T>(value[i], random_bits(key, first + static_cast<uint64_t>(i))));
}

// Reads `n` values; master weights are read in their own memory, which is `to`.
template <typename T>
TIG_INLINE void read_stored(float* to, const T* p, const void* kept, int64_t n, LowPrecision how) {
  switch (how) {
    case LowPrecision::MasterWeights: return read_master(to, p, n);
    case LowPrecision::KahanSum: return read_kahan(to, p, static_cast<const T*>(kept), n);
    default:
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(p[i]);
  }
}

// Writes `n` values, of which the first is the element `first` in memory.
template <typename T>
TIG_INLINE void write_stored(T* p, void* kept, const float* value, int64_t n, LowPrecision how, uint64_t key,
                             uint64_t first) {
  switch (how) {
    case LowPrecision::KahanSum: return write_kahan(p, static_cast<T*>(kept), value, n);
    case LowPrecision::StochasticRounding: return write_at_random(p, value, n, key, first);
    default:
      for (int64_t i = 0; i < n; ++i) p[i] = static_cast<T>(value[i]);
  }
}

}  // namespace tig
