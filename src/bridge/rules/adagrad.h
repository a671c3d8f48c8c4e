// Adagrad, Duchi et al. 2011, as in torch.optim.Adagrad.
#pragma once

#include "../arithmetic.h"
#include "../own.h"

namespace tig::rules {

// k: weight decay, learning rate of this step, eps. s: sum (of squares).
struct Adagrad : RuleDefaults {
  static constexpr const char* name = "Adagrad";
  static constexpr int tensors = 1;
  static constexpr bool sparse = true;

  static void begin(OwnState& s, const Tensor&, const OwnOptions& o) {
    s.tensors[0].fill_(o[Hyper::InitialAccumulatorValue]);
  }

  static std::string refused(const Tensor&, const Tensor& g, const OwnState*, const OwnOptions& o) {
    if (g.is_sparse() && o.weight_decay() != 0) return "Adagrad does not support sparse gradients with weight decay";
    return {};
  }

  static Numbers prepare(const OwnOptions& o, int64_t step, OwnState&) {
    const double rate = o[Hyper::Lr] / (1 + static_cast<double>(step - 1) * o[Hyper::LrDecay]);
    return {o.weight_decay(), rate, o[Hyper::Eps]};
  }

  template <bool DECAY, bool FMA, typename S>
  static TIG_INLINE void element(S& w, S d, S* s, const S* k) {
    if constexpr (DECAY) d = mul_add<FMA>(w, k[0], d);
    s[0] = mul_add<FMA>(d, d, s[0]);
    w = w + (-k[1] * d) / (root(s[0]) + k[2]);
  }

  static void loop(const Tensor& p, const Tensor& gradient, OwnState& s, const Numbers& k, const OwnOptions&) {
    Tensor& sum = s.tensors[0];
    if (gradient.is_sparse()) {
      // The rows of one index are added up first, because the update is not linear.
      const Tensor g = gradient.coalesce();
      const auto like = [&](const Tensor& values) {
        return at::_sparse_coo_tensor_unsafe(g._indices(), values, g.sizes(), g.options());
      };
      sum.add_(like(g._values().pow(2)));
      const Tensor deviation = sum.sparse_mask(g)._values().sqrt_().add_(k[2]);
      p.add_(like(g._values() / deviation), -k[1]);
      return;
    }
    const Tensor g = with_decay(gradient, p, k[0]);
    sum.addcmul_(g, g);
    p.addcdiv_(g, sum.sqrt().add_(k[2]), -k[1]);
  }
};

}  // namespace tig::rules
