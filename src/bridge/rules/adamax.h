// Adamax, Kingma and Ba 2014 (section 7.1), as in torch.optim.Adamax.
#pragma once

#include <cmath>

#include "../arithmetic.h"
#include "../own.h"

namespace tig::rules {

// k: weight decay, 1 - beta1, beta2, eps, step size. s: exp_avg, exp_inf.
struct Adamax : RuleDefaults {
  static constexpr const char* name = "Adamax";
  static constexpr int tensors = 2;

  static Numbers prepare(const OwnOptions& o, int64_t step, OwnState&) {
    const double beta1 = o[Hyper::Beta1];
    return {o.weight_decay(), 1 - beta1, o[Hyper::Beta2], o[Hyper::Eps], o[Hyper::Lr] / (1 - std::pow(beta1, step))};
  }

  template <bool DECAY, bool FMA, typename S>
  static TIG_INLINE void element(S& w, S d, S* s, const S* k) {
    if constexpr (DECAY) d = mul_add<FMA>(w, k[0], d);
    s[0] = lerp<FMA>(s[0], d, k[1]);
    s[1] = larger(s[1] * k[2], magnitude(d) + k[3]);
    w = w + (-k[4] * s[0]) / s[1];
  }

  static void loop(const Tensor& p, const Tensor& gradient, OwnState& s, const Numbers& k, const OwnOptions&) {
    const Tensor g = with_decay(gradient, p, k[0]);
    s.tensors[0].lerp_(g, k[1]);
    at::maximum_out(s.tensors[1], s.tensors[1].mul_(k[2]), g.abs().add_(k[3]));
    p.addcdiv_(s.tensors[0], s.tensors[1], -k[4]);
  }
};

}  // namespace tig::rules
