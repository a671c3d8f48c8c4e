// NAdam, Dozat 2016, as in torch.optim.NAdam.
#pragma once

#include <cmath>

#include "../arithmetic.h"
#include "../own.h"

namespace tig::rules {

// k: weight decay (decoupled: what the parameter is multiplied by), whether it is decoupled, 1 - beta1, beta2,
// 1 - beta2, bias correction 2, eps, the factors of gradient and moment. s: exp_avg, exp_avg_sq. numbers: mu_product.
struct NAdam : RuleDefaults {
  static constexpr const char* name = "NAdam";
  static constexpr int tensors = 2, numbers = 1;

  static void begin(OwnState& s, const Tensor&, const OwnOptions&) { s.numbers[0] = 1; }

  static Numbers prepare(const OwnOptions& o, int64_t step, OwnState& s) {
    const double lr = o[Hyper::Lr], beta1 = o[Hyper::Beta1], beta2 = o[Hyper::Beta2];
    const bool decoupled = o.on(Hyper::DecoupledWeightDecay);
    const auto mu_of = [&](double at) { return beta1 * (1 - 0.5 * std::pow(0.96, at * o[Hyper::MomentumDecay])); };
    const double mu = mu_of(static_cast<double>(step)), mu_next = mu_of(static_cast<double>(step + 1));
    s.numbers[0] *= static_cast<float>(mu);
    const double product = s.numbers[0];
    return {decoupled ? 1 - lr * o.weight_decay() : o.weight_decay(),
            decoupled ? 1. : 0.,
            1 - beta1,
            beta2,
            1 - beta2,
            1 - std::pow(beta2, step),
            o[Hyper::Eps],
            -lr * (1 - mu) / (1 - product),
            (-lr * mu_next) / (1 - product * mu_next)};
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
    const S denominator = root(s[1] / k[5]) + k[6];
    w = w + (k[7] * d) / denominator;
    w = w + (k[8] * s[0]) / denominator;
  }

  static void loop(const Tensor& p, const Tensor& gradient, OwnState& s, const Numbers& k, const OwnOptions& o) {
    const bool decays = o.weight_decay() != 0, decoupled = k[1] != 0;
    if (decays && decoupled) p.mul_(k[0]);
    const Tensor g = with_decay(gradient, p, decays && !decoupled ? k[0] : 0);
    s.tensors[0].lerp_(g, k[2]);
    s.tensors[1].mul_(k[3]).addcmul_(g, g, k[4]);
    const Tensor denominator = s.tensors[1].div(k[5]).sqrt_().add_(k[6]);
    p.addcdiv_(g, denominator, k[7]);
    p.addcdiv_(s.tensors[0], denominator, k[8]);
  }
};

}  // namespace tig::rules
