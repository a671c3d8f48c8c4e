// AdEMAMix, Pagliardini et al. 2024, as in its authors' implementation for PyTorch.
#pragma once

#include <cmath>

#include "../arithmetic.h"
#include "../own.h"

namespace tig::rules {

// k: beta1, 1 - beta1, beta3, 1 - beta3, beta2, 1 - beta2, bias correction 1, root of bias correction 2, eps, alpha,
// weight decay, learning rate. s: exp_avg_fast, exp_avg_slow, exp_avg_sq.
struct AdEMAMix : RuleDefaults {
  static constexpr const char* name = "AdEMAMix";
  static constexpr int tensors = 3;

  // alpha rises in a straight line.
  static double alpha(const OwnOptions& o, double step) {
    const double warmup = o[Hyper::AlphaWarmup];
    return step < warmup ? step / warmup * o[Hyper::Alpha] : o[Hyper::Alpha];
  }

  // The half-life of the slow average rises in a straight line, from that of the fast one.
  static double beta3(const OwnOptions& o, double step) {
    const double warmup = o[Hyper::Beta3Warmup];
    if (step >= warmup) return o[Hyper::Beta3];
    const auto half_life = [](double beta) { return std::log(0.5) / std::log(beta + 1e-8) - 1; };
    const double part = step / warmup;
    const double now = (1 - part) * half_life(o[Hyper::Beta1]) + part * half_life(o[Hyper::Beta3]);
    return std::pow(0.5, 1 / (now + 1));
  }

  static Numbers prepare(const OwnOptions& o, int64_t step, OwnState&) {
    const double beta1 = o[Hyper::Beta1], beta2 = o[Hyper::Beta2], slow = beta3(o, static_cast<double>(step));
    return {beta1,
            1 - beta1,
            slow,
            1 - slow,
            beta2,
            1 - beta2,
            1 - std::pow(beta1, step),
            std::sqrt(1 - std::pow(beta2, step)),
            o[Hyper::Eps],
            alpha(o, static_cast<double>(step)),
            o.weight_decay(),
            o[Hyper::Lr]};
  }

  template <bool DECAY, bool FMA, typename S>
  static TIG_INLINE void element(S& w, S d, S* s, const S* k) {
    s[0] = mul_add<FMA>(d, k[1], s[0] * k[0]);
    s[1] = mul_add<FMA>(d, k[3], s[1] * k[2]);
    s[2] = mul_add<FMA>(k[5] * d, d, s[2] * k[4]);
    S step = (s[0] / k[6] + k[9] * s[1]) / (root(s[2]) / k[7] + k[8]);
    if constexpr (DECAY) step = mul_add<FMA>(w, k[10], step);
    w = w - k[11] * step;
  }

  static void loop(const Tensor& p, const Tensor& g, OwnState& s, const Numbers& k, const OwnOptions&) {
    s.tensors[0].mul_(k[0]).add_(g, k[1]);
    s.tensors[1].mul_(k[2]).add_(g, k[3]);
    s.tensors[2].mul_(k[4]).addcmul_(g, g, k[5]);
    Tensor step = s.tensors[0].div(k[6]).add_(s.tensors[1].mul(k[9]));
    step.div_(s.tensors[2].sqrt().div_(k[7]).add_(k[8]));
    p.sub_(with_decay(step, p, k[10]).mul(k[11]));
  }
};

}  // namespace tig::rules
