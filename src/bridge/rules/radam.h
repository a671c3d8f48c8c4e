// RAdam, Liu et al. 2019, as in torch.optim.RAdam.
#pragma once

#include <cmath>

#include "../arithmetic.h"
#include "../own.h"

namespace tig::rules {

// k: weight decay (decoupled: what the parameter is multiplied by), whether it is decoupled, 1 - beta1, beta2,
// 1 - beta2, whether the step is rectified, its size, eps. s: exp_avg, exp_avg_sq.
struct RAdam : RuleDefaults {
  static constexpr const char* name = "RAdam";
  static constexpr int tensors = 2;

  static Numbers prepare(const OwnOptions& o, int64_t step, OwnState&) {
    const double lr = o[Hyper::Lr], beta1 = o[Hyper::Beta1], beta2 = o[Hyper::Beta2];
    const bool decoupled = o.on(Hyper::DecoupledWeightDecay);
    const double power = std::pow(beta2, step), correction2 = 1 - power;
    // The length of the average as a simple moving one, now and in the end.
    const double most = 2 / (1 - beta2) - 1, now = most - 2 * static_cast<double>(step) * power / correction2;
    const bool rectified = now > 5;
    double size = lr / (1 - std::pow(beta1, step));
    if (rectified)
      size *= std::sqrt(correction2) * std::sqrt((now - 4) * (now - 2) * most / ((most - 4) * (most - 2) * now));
    return {decoupled ? 1 - lr * o.weight_decay() : o.weight_decay(),
            decoupled ? 1. : 0.,
            1 - beta1,
            beta2,
            1 - beta2,
            rectified ? 1. : 0.,
            size,
            o[Hyper::Eps]};
  }

  template <bool DECAY, bool FMA, typename S>
  static TIG_INLINE void element(S& w, S d, S* s, const S* k) {
    if constexpr (DECAY) {
      const bool decoupled = k[1] != 0;
      d = decoupled ? d : mul_add<FMA>(w, k[0], d);
      w = decoupled ? w * k[0] : w;
    }
    s[0] = lerp<FMA>(s[0], d, k[2]);
    s[1] = mul_add<FMA>(k[4] * d, d, s[1] * k[3]);
    const S step = s[0] * k[6];
    w = w - (k[5] != 0 ? step / (root(s[1]) + k[7]) : step);
  }

  static void loop(const Tensor& p, const Tensor& gradient, OwnState& s, const Numbers& k, const OwnOptions& o) {
    const bool decays = o.weight_decay() != 0, decoupled = k[1] != 0;
    if (decays && decoupled) p.mul_(k[0]);
    const Tensor g = with_decay(gradient, p, decays && !decoupled ? k[0] : 0);
    s.tensors[0].lerp_(g, k[2]);
    s.tensors[1].mul_(k[3]).addcmul_(g, g, k[4]);
    if (k[5] != 0) p.addcdiv_(s.tensors[0], s.tensors[1].sqrt().add_(k[7]), -k[6]);
    else p.add_(s.tensors[0], -k[6]);
  }
};

}  // namespace tig::rules
