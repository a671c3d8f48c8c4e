// Arithmetic of the kernels, rounded as that of libtorch's own.
#pragma once

#include <algorithm>

#include "one_pass.h"

namespace tig {

// a * b + c, rounded once (fused multiply-add) where libtorch's kernels use that instruction too.
template <bool FMA>
TIG_INLINE float mul_add(float a, float b, float c) {
  return FMA ? __builtin_fmaf(a, b, c) : a * b + c;
}
template <bool FMA>
TIG_INLINE double mul_add(double a, double b, double c) {
  return FMA ? __builtin_fma(a, b, c) : a * b + c;
}
// x / k where r = 1 / k. The exact remainder corrects x * r, so that the result is rounded as the division is. Faster
// than dividing where one k divides many x.
template <bool FMA, typename S>
TIG_INLINE S quotient(S x, S k, S r) {
  if (!FMA) return x / k;
  const S q = x * r;
  const S rest = mul_add<FMA>(-q, k, x);
  return rest == rest ? mul_add<FMA>(rest, r, q) : q;  // an infinite x has no remainder (NaN)
}
TIG_INLINE float root(float x) { return __builtin_sqrtf(x); }
TIG_INLINE double root(double x) { return __builtin_sqrt(x); }

TIG_INLINE float magnitude(float x) { return __builtin_fabsf(x); }
TIG_INLINE double magnitude(double x) { return __builtin_fabs(x); }
// 1, -1, or 0; 0 for NaN too, as in libtorch.
template <typename S>
TIG_INLINE S sign(S x) {
  return (x > 0 ? S(1) : S(0)) - (x < 0 ? S(1) : S(0));
}
// The larger of two values, or NaN if one is NaN.
template <typename S>
TIG_INLINE S larger(S a, S b) {
  const S most = a > b ? a : b;
  return a != a ? a : most;
}
// torch's lerp: from a to b by the weight w, counted from the nearer end.
template <bool FMA, typename S>
TIG_INLINE S lerp(S a, S b, S w) {
  const bool near = magnitude(w) < S(0.5);
  return mul_add<FMA>(near ? w : w - S(1), b - a, near ? a : b);
}

}  // namespace tig
