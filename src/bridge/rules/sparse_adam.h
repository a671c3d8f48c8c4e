// Adam for sparse gradients, which steps the rows that have a gradient, as in torch.optim.SparseAdam.
#pragma once

#include <cmath>

#include "../own.h"

namespace tig::rules {

// k: 1 - beta1, 1 - beta2, step size, eps. s: exp_avg, exp_avg_sq.
struct SparseAdam : RuleDefaults {
  static constexpr const char* name = "SparseAdam";
  static constexpr int tensors = 2;
  static constexpr bool sparse = true;

  static std::string refused(const Tensor&, const Tensor& g, const OwnState*, const OwnOptions&) {
    if (g.is_sparse()) return {};
    return "SparseAdam does not support dense gradients: take Adam for it";
  }

  static Numbers prepare(const OwnOptions& o, int64_t step, OwnState&) {
    const double beta1 = o[Hyper::Beta1], beta2 = o[Hyper::Beta2];
    const double size = o[Hyper::Lr] * std::sqrt(1 - std::pow(beta2, step)) / (1 - std::pow(beta1, step));
    return {1 - beta1, 1 - beta2, size, o[Hyper::Eps]};
  }

  static void loop(const Tensor& p, const Tensor& gradient, OwnState& s, const Numbers& k, const OwnOptions&) {
    // The rows of one index are added up first, because the update is not linear.
    const Tensor g = gradient.coalesce(), values = g._values();
    if (values.numel() == 0) return;
    const auto like = [&](const Tensor& values) {
      return at::_sparse_coo_tensor_unsafe(g._indices(), values, g.sizes(), g.options());
    };
    // Moves a moment's rows towards `to`, and gives them after that.
    const auto moved = [&](Tensor& moment, const Tensor& to, double weight) {
      const Tensor before = moment.sparse_mask(g)._values();
      const Tensor by = to.sub(before).mul_(weight);
      moment.add_(like(by));
      return by.add_(before);
    };
    const Tensor first = moved(s.tensors[0], values, k[0]);
    const Tensor second = moved(s.tensors[1], values.pow(2), k[1]);
    p.add_(like(first.div_(second.sqrt_().add_(k[3])).mul_(-k[2])));
  }
};

}  // namespace tig::rules
