// Schedule-Free SGD and AdamW, Defazio et al. 2024, as in the package schedulefree.
#pragma once

#include <algorithm>
#include <cmath>

#include "../arithmetic.h"
#include "../own.h"

namespace tig::rules {

// While an optimizer trains, its parameters are the points `y` at which gradients are computed. The state has the points
// `z` that the steps move; in evaluation also the `y` to which the parameters go back.
struct ScheduleFree : RuleDefaults {
  static constexpr int kept = 1;
  static constexpr bool counts = false;

  static void begin(OwnState& s, const Tensor& p, const OwnOptions&) { s.tensors[0].copy_(p); }

  // The learning rate of the step that `advance` counted last.
  static double rate(const OwnOptions& o) {
    const double k = o[Hyper::K], warmup = o[Hyper::WarmupSteps];
    return o[Hyper::Lr] * (k <= warmup ? k / warmup : 1.);
  }

  static double weight(const OwnOptions& o) {
    return std::pow(o[Hyper::K], o[Hyper::R]) * std::pow(o[Hyper::LrMax], o[Hyper::WeightLrPower]);
  }

  static void advance(OwnOptions& o) {
    o[Hyper::K] += 1;
    o[Hyper::LrMax] = std::max(rate(o), o[Hyper::LrMax]);
    o[Hyper::WeightSum] += weight(o);
  }

  // The weight of the new `z` in the average of all.
  static double share(const OwnOptions& o) {
    return o[Hyper::WeightSum] != 0 ? weight(o) / o[Hyper::WeightSum] : 0.;
  }

  // Moves `y` (the parameter) and `z` by the step `d`. k: share, factor of the step for `y`, learning rate.
  template <bool FMA, typename S>
  static TIG_INLINE void move(S& y, S d, S& z, const S* k) {
    y = mul_add<FMA>(d, k[1], lerp<FMA>(y, z, k[0]));
    z = mul_add<FMA>(d, -k[2], z);
  }

  static void move(const Tensor& y, const Tensor& d, const Tensor& z, const double* k) {
    y.lerp_(z, k[0]);
    y.add_(d, k[1]);
    z.sub_(d, k[2]);
  }
};

// k: share, factor of the step for `y`, learning rate, weight decay. s: z.
struct SgdScheduleFree : ScheduleFree {
  static constexpr const char* name = "SGDScheduleFree";
  static constexpr int tensors = 1;

  static Numbers prepare(const OwnOptions& o, int64_t, OwnState&) {
    const double lr = rate(o), part = share(o);
    return {part, lr * (o[Hyper::Momentum] * (1 - part) - 1), lr, o.weight_decay()};
  }

  template <bool DECAY, bool FMA, typename S>
  static TIG_INLINE void element(S& w, S d, S* s, const S* k) {
    if constexpr (DECAY) d = mul_add<FMA>(w, k[3], d);
    move<FMA>(w, d, s[0], k);
  }

  static void loop(const Tensor& p, const Tensor& g, OwnState& s, const Numbers& k, const OwnOptions&) {
    move(p, with_decay(g, p, k[3]), s.tensors[0], k.data());
  }
};

// k: share, factor of the step for `y`, learning rate, weight decay, beta2, 1 - beta2, bias correction 2, eps. s: z,
// exp_avg_sq.
struct AdamWScheduleFree : ScheduleFree {
  static constexpr const char* name = "AdamWScheduleFree";
  static constexpr int tensors = 2;

  static Numbers prepare(const OwnOptions& o, int64_t, OwnState&) {
    const double lr = rate(o), part = share(o), beta2 = o[Hyper::Beta2];
    return {part,
            lr * (o[Hyper::Beta1] * (1 - part) - 1),
            lr,
            o.weight_decay(),
            beta2,
            1 - beta2,
            1 - std::pow(beta2, o[Hyper::K]),
            o[Hyper::Eps]};
  }

  template <bool DECAY, bool FMA, typename S>
  static TIG_INLINE void element(S& w, S d, S* s, const S* k) {
    s[1] = mul_add<FMA>(k[5] * d, d, s[1] * k[4]);
    S step = d / (root(s[1] / k[6]) + k[7]);
    if constexpr (DECAY) step = mul_add<FMA>(w, k[3], step);
    move<FMA>(w, step, s[0], k);
  }

  static void loop(const Tensor& p, const Tensor& g, OwnState& s, const Numbers& k, const OwnOptions&) {
    s.tensors[1].mul_(k[4]).addcmul_(g, g, k[5]);
    const Tensor step = g.div(s.tensors[1].div(k[6]).sqrt_().add_(k[7]));
    move(p, with_decay(step, p, k[3]), s.tensors[0], k.data());
  }
};

}  // namespace tig::rules
