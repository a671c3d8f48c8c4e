// Muon, Jordan et al. 2024, as in torch.optim.Muon.
#pragma once

#include <algorithm>
#include <cmath>

#include "../kernel_form.h"
#include "../own.h"

namespace tig::rules {

// k: what the parameter is multiplied by, 1 - momentum, momentum. s: momentum_buffer.
struct Muon : RuleDefaults {
  static constexpr const char* name = "Muon";
  static constexpr int tensors = 1;
  static constexpr bool counts = false;

  static std::string refused(const Tensor& p, const Tensor&, const OwnState*, const OwnOptions&) {
    if (p.dim() == 2) return {};
    return "Muon steps matrices only: give parameters of one or more than two dimensions to another optimizer, or to "
           "a group with another algorithm";
  }

  static Numbers prepare(const OwnOptions& o, int64_t, OwnState&) {
    const double momentum = o[Hyper::Momentum];
    return {1 - o[Hyper::Lr] * o.weight_decay(), 1 - momentum, momentum};
  }

  // The orthogonal matrix next to `matrix`, roughly, by the Newton-Schulz iteration in bf16.
  //
  // libtorch's products of bf16 are sums in f32 that are rounded once. On a processor that has no fast ones, products in f32
  // of the same numbers, rounded to bf16, give the same in a ninth of the time.
  static Tensor orthogonal(const Tensor& matrix, const OwnOptions& o) {
    const bool tall = matrix.size(0) > matrix.size(1), widen = matrix.is_cpu() && !multiplies_bf16_fast();
    const auto rounded = [widen](const Tensor& product) {
      return widen ? product.to(at::kBFloat16).to(at::kFloat) : product;
    };
    Tensor x = matrix.to(at::kBFloat16, /*non_blocking=*/false, /*copy=*/true);
    if (tall) x = x.t();
    x.div_(x.norm().clamp_min(o[Hyper::Eps]));
    if (widen) x = x.to(at::kFloat);
    const auto steps = static_cast<int>(o[Hyper::NsSteps]);
    for (int i = 0; i < steps; ++i) {
      const Tensor gram = rounded(at::mm(x, x.t()));
      const Tensor polynomial = rounded(at::addmm(gram, gram, gram, o[Hyper::NsB], o[Hyper::NsC]));
      x = rounded(at::addmm(x, polynomial, x, o[Hyper::NsA], 1));
    }
    x = x.to(at::kBFloat16);
    return tall ? x.t() : x;
  }

  static void loop(const Tensor& p, const Tensor& g, OwnState& s, const Numbers& k, const OwnOptions& o) {
    Tensor& buffer = s.tensors[0];
    buffer.lerp_(g, k[1]);
    const Tensor update = orthogonal(o.on(Hyper::Nesterov) ? g.lerp(buffer, k[2]) : buffer, o);
    const double rows = static_cast<double>(p.size(0)), columns = static_cast<double>(p.size(1));
    const double scale =
        o.on(Hyper::MatchRmsAdamW) ? 0.2 * std::sqrt(std::max(rows, columns)) : std::sqrt(std::max(1., rows / columns));
    p.mul_(k[0]);
    p.add_(update, -o[Hyper::Lr] * scale);
  }
};

}  // namespace tig::rules
