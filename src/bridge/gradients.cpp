// Norms, clipping and checks of an optimizer's gradients: one pass on the CPU, libtorch's foreach kernels elsewhere.
// No number is read from a device.

#include <ATen/ops/_amp_foreach_non_finite_check_and_unscale.h>
#include <ATen/ops/_foreach_clamp_max.h>
#include <ATen/ops/_foreach_clamp_min.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_foreach_zero.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>

#include <cmath>
#include <map>

#include "bridge.h"
#include "plan.h"

using at::Tensor;
using torch::optim::Optimizer;

namespace {

// The numbers of the optimizer's groups that a call works on.
struct Groups {
  const size_t* numbers;
  size_t count;
};

// Calls f(gradient), once for each parameter that has one.
template <typename F>
void for_gradients(Optimizer& optimizer, Groups groups, F&& f) {
  auto& all = optimizer.param_groups();
  for (size_t i = 0; i < groups.count; ++i)
    for (const Tensor& p : all.at(groups.numbers[i]).params()) {
      const Tensor& gradient = p.unsafeGetTensorImpl()->grad();
      if (gradient.defined()) f(gradient);
    }
}

// A task on a gradient alone, which is its `p` and its `g`.
tig::Task task_of(const Tensor& gradient) {
  tig::Task task{};
  task.p = gradient.mutable_data_ptr();
  task.g = task.p;
  task.n = gradient.numel();
  task.dtype = gradient.scalar_type();
  return task;
}

struct Sorted {
  std::map<std::pair<c10::DeviceType, c10::DeviceIndex>, std::vector<Tensor>> lists;
  at::ScalarType norm_type = at::kFloat;  // f64 where a gradient is
};

// Puts the gradients that the one pass can handle into it, and the others into lists by device. Of
// a sparse gradient only the values are listed; `coalesced` adds up the values of equal indices first.
Sorted sort(Optimizer& optimizer, Groups groups, tig::OnePass& pass, bool coalesced, bool all_in_lists = false) {
  Sorted sorted;
  pass.clear();
  for_gradients(optimizer, groups, [&](const Tensor& gradient) {
    if (gradient.scalar_type() == at::kDouble) sorted.norm_type = at::kDouble;
    if (!all_in_lists && tig::is_plain_cpu(gradient)) {
      pass.add(task_of(gradient));
    } else {
      const Tensor dense = !gradient.is_sparse() ? gradient
          : coalesced                            ? gradient.coalesce()._values()
                                                 : gradient._values();
      sorted.lists[{dense.device().type(), dense.device().index()}].push_back(dense);
    }
  });
  return sorted;
}

// Reads a tensor of one element. On the CPU it is read directly, because host_syncs would report `item` as a wait for
// a device.
double value(const Tensor& element) {
  if (!element.device().is_cpu()) return element.item<double>();
  return *element.to(at::kDouble).const_data_ptr<double>();
}

void scale(tig::OnePass& pass, const Sorted& sorted, const Tensor& factor) {
  if (!pass.empty()) {
    const double number = value(factor);
    if (number != 1.) pass.update(tig::Rule::Scale, number);
  }
  for (const auto& [device, list] : sorted.lists) {
    if (!factor.device().is_cpu()) {
      at::_foreach_mul_(list, factor.to(list[0].device()).reshape({}));
    } else if (const double number = value(factor); number != 1.) {
      // A number goes to the device without a copy that the host would wait for.
      at::_foreach_mul_(list, number);
    }
  }
}

// Brings the results of the lists and the result of the pass to one device: the first list's device, or the CPU if
// there are no lists.
template <typename F>
std::vector<Tensor> gathered(std::vector<Tensor> parts, const tig::OnePass& pass, F&& of_pass) {
  if (!pass.empty() || parts.empty()) parts.push_back(of_pass());
  for (Tensor& part : parts) part = part.to(parts[0].device());
  return parts;
}

// The norm of all gradients together: f64 if a gradient is f64, otherwise f32; 0 if there are no gradients.
Tensor norm(Optimizer& optimizer, Groups groups, Plan& plan, double order) {
  const bool infinity = std::isinf(order) && order > 0;
  const Sorted sorted = sort(optimizer, groups, plan.gradients, true, order != 2. && !infinity);
  std::vector<Tensor> parts;
  for (const auto& [device, list] : sorted.lists)
    // In f64, because gradients that a GradScaler has scaled may have a norm beyond what f32 holds.
    for (const Tensor& part : at::_foreach_norm(list, order, at::kDouble)) parts.push_back(part);
  parts = gathered(std::move(parts), plan.gradients, [&] {
    return at::full({}, plan.gradients.norm(infinity ? tig::Norm::Infinity : tig::Norm::Two), at::kDouble);
  });
  const Tensor all = parts.size() == 1 ? parts[0] : at::linalg_vector_norm(at::stack(parts), order);
  return all.to(sorted.norm_type);
}

Tensor* give(const Tensor& tensor) { return new Tensor(tensor); }

}  // namespace

extern "C" {

// Gives the norm of all gradients together, and the factor (at most 1) that brings this norm down to `max`.
int tig_clip_norm(Optimizer* optimizer, const size_t* numbers, size_t count, Plan* plan, double max, double order,
                  Tensor** total, Tensor** factor, char** error) {
  return guarded(error, [&] {
    at::NoGradGuard no_grad;
    const Tensor all = norm(*optimizer, {numbers, count}, *plan, order);
    const Tensor by = (max / (all + 1e-6)).clamp_max_(1.);
    *total = give(all);
    *factor = give(by);
  });
}

// Multiplies the gradients in place. On the CPU nothing is written if the factor is 1.
int tig_scale_gradients(Optimizer* optimizer, const size_t* numbers, size_t count, Plan* plan, const Tensor* factor,
                        char** error) {
  return guarded(error, [&] {
    at::NoGradGuard no_grad;
    const Sorted sorted = sort(*optimizer, {numbers, count}, plan->gradients, false);
    scale(plan->gradients, sorted, *factor);
  });
}

int tig_clip_value(Optimizer* optimizer, const size_t* numbers, size_t count, Plan* plan, double max, char** error) {
  return guarded(error, [&] {
    at::NoGradGuard no_grad;
    // A sparse gradient may list an index more than once. Such entries are one element, so they are added up first,
    // and the gradient stays that way.
    auto& all = optimizer->param_groups();
    for (size_t i = 0; i < count; ++i)
      for (const Tensor& p : all.at(numbers[i]).params())
        if (p.mutable_grad().defined() && p.mutable_grad().is_sparse()) p.mutable_grad() = p.mutable_grad().coalesce();
    Sorted sorted = sort(*optimizer, {numbers, count}, plan->gradients, true);
    if (!plan->gradients.empty()) plan->gradients.update(tig::Rule::Clamp, max);
    for (auto& [device, list] : sorted.lists) {
      at::_foreach_clamp_max_(list, max);
      at::_foreach_clamp_min_(list, -max);
    }
  });
}

int tig_zero_gradients(Optimizer* optimizer, const size_t* numbers, size_t count, Plan* plan, char** error) {
  return guarded(error, [&] {
    at::NoGradGuard no_grad;
    tig::OnePass& pass = plan->gradients;
    pass.clear();
    std::vector<Tensor> dense;
    for_gradients(*optimizer, {numbers, count}, [&](const Tensor& gradient) {
      // A gradient with a graph (create_graph) is detached, because the graph may still need its values.
      if (gradient.grad_fn()) gradient.detach_();
      if (tig::is_plain_cpu(gradient)) {
        pass.add(task_of(gradient));
        gradient.unsafeGetTensorImpl()->bump_version();
      } else if (gradient.layout() == at::kStrided) {
        dense.push_back(gradient);
      } else {
        Tensor(gradient).zero_();
      }
    });
    pass.zero();
    if (!dense.empty()) at::_foreach_zero_(dense);
  });
}

int tig_clear_gradients(Optimizer* optimizer, const size_t* numbers, size_t count, char** error) {
  return guarded(error, [&] {
    auto& all = optimizer->param_groups();
    for (size_t i = 0; i < count; ++i)
      for (Tensor& p : all.at(numbers[i]).params()) p.mutable_grad().reset();
  });
}

// Makes gradients in f16 and bf16 f32, so that backward adds to them in f32.
int tig_widen_gradients(Optimizer* optimizer, const size_t* numbers, size_t count, char** error) {
  return guarded(error, [&] {
    at::NoGradGuard no_grad;
    auto& all = optimizer->param_groups();
    for (size_t i = 0; i < count; ++i)
      for (const Tensor& p : all.at(numbers[i]).params()) {
        const Tensor& gradient = p.unsafeGetTensorImpl()->grad();
        if (gradient.defined() && tig::is_low_precision(gradient.scalar_type()))
          p.mutable_grad() = gradient.detach().to(at::kFloat);
      }
  });
}

// Gives 1 if a gradient has an element that is not finite, else 0: an f32 tensor of one element, on the gradients'
// device.
int tig_found_inf(Optimizer* optimizer, const size_t* numbers, size_t count, Plan* plan, Tensor** found,
                  char** error) {
  return guarded(error, [&] {
    at::NoGradGuard no_grad;
    const Sorted sorted = sort(*optimizer, {numbers, count}, plan->gradients, true);
    std::vector<Tensor> parts;
    for (const auto& [device, list] : sorted.lists) {
      const auto options = at::device(list[0].device()).dtype(at::kFloat);
      parts.push_back(at::zeros({1}, options));
      at::_amp_foreach_non_finite_check_and_unscale_(list, parts.back(), at::ones({1}, options));
    }
    parts = gathered(std::move(parts), plan->gradients, [&] {
      return at::full({1}, plan->gradients.any_nonfinite() ? 1. : 0., at::kFloat);
    });
    const Tensor all = parts.size() == 1 ? parts[0] : at::stack(parts).amax({0});
    *found = give(all);
  });
}

}  // extern "C"
