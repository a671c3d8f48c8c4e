// Adadelta, Zeiler 2012, as in torch.optim.Adadelta.
#pragma once

#include "../arithmetic.h"
#include "../own.h"

namespace tig::rules {

// k: weight decay, learning rate, rho, 1 - rho, eps. s: square_avg, acc_delta.
struct Adadelta : RuleDefaults {
  static constexpr const char* name = "Adadelta";
  static constexpr int tensors = 2;

  static Numbers prepare(const OwnOptions& o, int64_t, OwnState&) {
    const double rho = o[Hyper::Rho];
    return {o.weight_decay(), o[Hyper::Lr], rho, 1 - rho, o[Hyper::Eps]};
  }

  template <bool DECAY, bool FMA, typename S>
  static TIG_INLINE void element(S& w, S d, S* s, const S* k) {
    if constexpr (DECAY) d = mul_add<FMA>(w, k[0], d);
    s[0] = mul_add<FMA>(k[3] * d, d, s[0] * k[2]);
    const S delta = root(s[1] + k[4]) / root(s[0] + k[4]) * d;
    s[1] = mul_add<FMA>(k[3] * delta, delta, s[1] * k[2]);
    w = mul_add<FMA>(delta, -k[1], w);
  }

  static void loop(const Tensor& p, const Tensor& gradient, OwnState& s, const Numbers& k, const OwnOptions&) {
    const Tensor g = with_decay(gradient, p, k[0]);
    s.tensors[0].mul_(k[2]).addcmul_(g, g, k[3]);
    const Tensor delta = s.tensors[1].add(k[4]).sqrt_().div_(s.tensors[0].add(k[4]).sqrt_()).mul_(g);
    s.tensors[1].mul_(k[2]).addcmul_(delta, delta, k[3]);
    p.add_(delta, -k[1]);
  }
};

}  // namespace tig::rules
