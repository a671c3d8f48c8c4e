// Rprop, Riedmiller and Braun 1993, as in torch.optim.Rprop.
#pragma once

#include "../arithmetic.h"
#include "../own.h"

namespace tig::rules {

// k: etaminus, etaplus, smallest and largest step size. s: prev (the gradient before), step_size.
struct Rprop : RuleDefaults {
  static constexpr const char* name = "Rprop";
  static constexpr int tensors = 2;

  static void begin(OwnState& s, const Tensor&, const OwnOptions& o) { s.tensors[1].fill_(o[Hyper::Lr]); }

  static Numbers prepare(const OwnOptions& o, int64_t, OwnState&) {
    return {o[Hyper::EtaMinus], o[Hyper::EtaPlus], o[Hyper::StepSizeMin], o[Hyper::StepSizeMax]};
  }

  template <bool DECAY, bool FMA, typename S>
  static TIG_INLINE void element(S& w, S d, S* s, const S* k) {
    const S product = d * s[0];
    S size = s[1] * (product > 0 ? k[1] : product < 0 ? k[0] : S(1));
    size = size < k[2] ? k[2] : size;
    size = size > k[3] ? k[3] : size;
    d = product < 0 ? S(0) : d;
    s[0] = d;
    s[1] = size;
    w = w - sign(d) * size;
  }

  static void loop(const Tensor& p, const Tensor& gradient, OwnState& s, const Numbers& k, const OwnOptions&) {
    const Tensor product = gradient * s.tensors[0], turned = product < 0;
    const Tensor factor = at::ones_like(product).masked_fill_(product > 0, k[1]).masked_fill_(turned, k[0]);
    s.tensors[1].mul_(factor).clamp_(k[2], k[3]);
    const Tensor g = gradient.masked_fill(turned, 0);
    p.addcmul_(g.sign(), s.tensors[1], -1);
    s.tensors[0].copy_(g);
  }
};

}  // namespace tig::rules
