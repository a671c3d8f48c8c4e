// Lion, Chen et al. 2023, as in the package lion-pytorch.
#pragma once

#include "../arithmetic.h"
#include "../own.h"

namespace tig::rules {

// k: what the parameter is multiplied by, learning rate, beta1, 1 - beta1, beta2, 1 - beta2. s: exp_avg.
struct Lion : RuleDefaults {
  static constexpr const char* name = "Lion";
  static constexpr int tensors = 1;
  static constexpr bool counts = false;

  static Numbers prepare(const OwnOptions& o, int64_t, OwnState&) {
    const double lr = o[Hyper::Lr], beta1 = o[Hyper::Beta1], beta2 = o[Hyper::Beta2];
    return {1 - lr * o.weight_decay(), lr, beta1, 1 - beta1, beta2, 1 - beta2};
  }

  template <bool DECAY, bool FMA, typename S>
  static TIG_INLINE void element(S& w, S d, S* s, const S* k) {
    if constexpr (DECAY) w = w * k[0];
    w = mul_add<FMA>(sign(mul_add<FMA>(d, k[3], s[0] * k[2])), -k[1], w);
    s[0] = mul_add<FMA>(d, k[5], s[0] * k[4]);
  }

  static void loop(const Tensor& p, const Tensor& g, OwnState& s, const Numbers& k, const OwnOptions& o) {
    if (o.weight_decay() != 0) p.mul_(k[0]);
    p.add_(s.tensors[0].mul(k[2]).add_(g, k[3]).sign_(), -k[1]);
    s.tensors[0].mul_(k[4]).add_(g, k[5]);
  }
};

}  // namespace tig::rules
