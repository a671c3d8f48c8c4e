// Adafactor, Shazeer and Stern 2018, as in torch.optim.Adafactor.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../own.h"

namespace tig::rules {

// k: 1 - beta2 of this step, the bound of the relative step, what the parameter is multiplied by. s: row_var and
// col_var of matrices, variance of vectors.
struct Adafactor : RuleDefaults {
  static constexpr const char* name = "Adafactor";
  static constexpr int tensors = 3;
  static constexpr bool shaped_like_parameter = false;

  // The parameter's sizes, with 1 at the last dimension but `from_last`.
  static std::vector<int64_t> reduced(const Tensor& p, int64_t from_last) {
    auto sizes = p.sizes().vec();
    sizes[sizes.size() - 1 - static_cast<size_t>(from_last)] = 1;
    return sizes;
  }

  static void begin(OwnState& s, const Tensor& p, const OwnOptions&) {
    if (p.dim() > 1) {
      s.tensors[0] = at::zeros(reduced(p, 0), p.options().requires_grad(false));
      s.tensors[1] = at::zeros(reduced(p, 1), p.options().requires_grad(false));
    } else {
      s.tensors[2] = at::zeros_like(p);
    }
  }

  static std::string refused(const Tensor& p, const Tensor&, const OwnState* s, const OwnOptions&) {
    if (!s) return {};
    const auto fits = [&](const Tensor& tensor, at::IntArrayRef sizes) {
      return tensor.defined() && tensor.sizes() == sizes && tensor.device() == p.device() &&
             tensor.scalar_type() == p.scalar_type();
    };
    const bool all = p.dim() > 1 ? fits(s->tensors[0], reduced(p, 0)) && fits(s->tensors[1], reduced(p, 1))
                                 : fits(s->tensors[2], p.sizes());
    return all ? std::string() : "the optimizer's state of it does not fit";
  }

  static Numbers prepare(const OwnOptions& o, int64_t step, OwnState&) {
    const double count = static_cast<double>(step), lr = o[Hyper::Lr];
    return {std::pow(count, o[Hyper::Beta2Decay]), std::min(lr, 1 / std::sqrt(count)), 1 - lr * o.weight_decay()};
  }

  // The smallest number that changes 1 when it is added, in the type of the parameter.
  static double precision(at::ScalarType type) {
    switch (type) {
      case at::kDouble: return std::numeric_limits<double>::epsilon();
      case at::kHalf: return static_cast<float>(std::numeric_limits<c10::Half>::epsilon());
      case at::kBFloat16: return static_cast<float>(std::numeric_limits<c10::BFloat16>::epsilon());
      default: return std::numeric_limits<float>::epsilon();
    }
  }

  static void loop(const Tensor& p, const Tensor& g, OwnState& s, const Numbers& k, const OwnOptions& o) {
    const double eps1 = o.on(Hyper::Eps1) ? o[Hyper::Eps1] : precision(p.scalar_type());
    const double root_of_size = std::sqrt(static_cast<double>(p.numel()));
    const double size = std::max(o[Hyper::Eps2], p.norm().item<double>() / root_of_size) * k[1];
    if (o.weight_decay() != 0) p.mul_(k[2]);
    Tensor update;
    if (g.dim() > 1) {
      const auto mean_of_squares = [&](int64_t dim) {
        return at::norm(g, 2, dim, /*keepdim=*/true).square_().div_(g.size(dim));
      };
      s.tensors[0].lerp_(mean_of_squares(-1), k[0]);
      s.tensors[1].lerp_(mean_of_squares(-2), k[0]);
      update = at::matmul(s.tensors[0], s.tensors[1]);
      update.div_(s.tensors[0].mean(-2, /*keepdim=*/true).clamp_min_(eps1));
    } else {
      s.tensors[2].lerp_(g * g, k[0]);
      update = s.tensors[2].clone();
    }
    update.clamp_min_(eps1 * eps1).rsqrt_().mul_(g);
    const double most = std::max(1., update.norm().item<double>() / (root_of_size * o[Hyper::D]));
    p.add_(update, -size / most);
  }
};

}  // namespace tig::rules
