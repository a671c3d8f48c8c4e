// ASGD, Polyak and Juditsky 1992, as in torch.optim.ASGD.
#pragma once

#include <algorithm>
#include <cmath>

#include "../arithmetic.h"
#include "../own.h"

namespace tig::rules {

// k: weight decay, what the parameter is multiplied by, eta, mu. s: ax (the average). numbers: eta and mu of the next
// step.
struct Asgd : RuleDefaults {
  static constexpr const char* name = "ASGD";
  static constexpr int tensors = 1, numbers = 2;

  static void begin(OwnState& s, const Tensor&, const OwnOptions& o) {
    s.numbers = {static_cast<float>(o[Hyper::Lr]), 1};
  }

  static Numbers prepare(const OwnOptions& o, int64_t step, OwnState& s) {
    const double lr = o[Hyper::Lr], lambd = o[Hyper::Lambd], count = static_cast<double>(step);
    const double eta = s.numbers[0], mu = s.numbers[1];
    s.numbers = {static_cast<float>(lr / std::pow(1 + lambd * lr * count, o[Hyper::Alpha])),
                 static_cast<float>(1 / std::max(1., count - o[Hyper::T0]))};
    return {o.weight_decay(), 1 - lambd * eta, eta, mu};
  }

  template <bool DECAY, bool FMA, typename S>
  static TIG_INLINE void element(S& w, S d, S* s, const S* k) {
    if constexpr (DECAY) d = mul_add<FMA>(w, k[0], d);
    w = mul_add<FMA>(d, -k[2], w * k[1]);
    s[0] = k[3] == 1 ? w : s[0] + (w - s[0]) * k[3];
  }

  static void loop(const Tensor& p, const Tensor& gradient, OwnState& s, const Numbers& k, const OwnOptions&) {
    const Tensor g = with_decay(gradient, p, k[0]);
    p.mul_(k[1]).add_(g, -k[2]);
    if (k[3] == 1) s.tensors[0].copy_(p);
    else s.tensors[0].add_(p.sub(s.tensors[0]).mul_(k[3]));
  }
};

}  // namespace tig::rules
