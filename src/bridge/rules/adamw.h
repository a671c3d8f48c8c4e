// AdamW, Loshchilov and Hutter 2017, for groups of an optimizer of ours. The numbers and the kernel are those of
// libtorch's class (../rules.h).
#pragma once

#include <cmath>

#include "../own.h"

namespace tig::rules {

// k: step size, what the parameter is multiplied by, beta1, 1 - beta1, beta2, 1 - beta2, root of bias correction 2, eps.
// s: exp_avg, exp_avg_sq, max_exp_avg_sq.
struct AdamW : RuleDefaults {
  static constexpr const char* name = "AdamW";
  static constexpr int tensors = 3;
  static constexpr Hyper last_for = Hyper::Amsgrad;

  static Rule kernel(const OwnOptions& o) { return o.on(Hyper::Amsgrad) ? Rule::AdamWAmsgrad : Rule::AdamW; }

  static Numbers prepare(const OwnOptions& o, int64_t step, OwnState&) {
    const double lr = o[Hyper::Lr], beta1 = o[Hyper::Beta1], beta2 = o[Hyper::Beta2];
    return {lr / (1 - std::pow(beta1, step)),
            1 - lr * o.weight_decay(),
            beta1,
            1 - beta1,
            beta2,
            1 - beta2,
            std::sqrt(1 - std::pow(beta2, step)),
            o[Hyper::Eps]};
  }

  static void loop(const Tensor& p, const Tensor& g, OwnState& s, const Numbers& k, const OwnOptions& o) {
    if (o.weight_decay() != 0) p.mul_(k[1]);
    s.tensors[0].mul_(k[2]).add_(g, k[3]);
    s.tensors[1].mul_(k[4]).addcmul_(g, g, k[5]);
    Tensor squares = s.tensors[1];
    if (o.on(Hyper::Amsgrad)) {
      at::maximum_out(s.tensors[2], s.tensors[2], squares);
      squares = s.tensors[2];
    }
    p.addcdiv_(s.tensors[0], squares.sqrt().div_(k[6]).add_(k[7]), -k[0]);
  }
};

}  // namespace tig::rules
