// Steps of libtorch's optimizers on the optimizer's own state, all parameters at once. What they cannot take
// (sparse gradients, odd layouts, mixed types) goes through libtorch's own loop.

#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_addcdiv.h>
#include <ATen/ops/_foreach_addcmul.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_sqrt.h>
#include <ATen/ops/_fused_adam.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/_fused_sgd.h>

#include <cmath>
#include <map>
#include <memory>
#include <tuple>

#include "bridge.h"
#include "plan.h"

using at::Tensor;
using tig::Rule;
using torch::optim::Optimizer;

namespace {

// How steps are done; the numbers of the enum in fused.rs.
enum Mode : int {
  LOOP = 0,      // libtorch's own loop
  FUSED = 1,     // one pass on CPU, libtorch's fused kernels elsewhere
  KERNELS = 2,   // libtorch's fused kernels everywhere: what CUDA does, for tests without one
};

// Puts other parameters into the groups while it lives.
class Swapped {
 public:
  Swapped(Optimizer& optimizer, std::vector<std::vector<Tensor>>& parameters)
      : optimizer_(optimizer), parameters_(parameters) { swap(); }
  ~Swapped() { swap(); }

 private:
  void swap() {
    auto& groups = optimizer_.param_groups();
    for (size_t i = 0; i < groups.size(); ++i) groups[i].params().swap(parameters_[i]);
  }
  Optimizer& optimizer_;
  std::vector<std::vector<Tensor>>& parameters_;
};

void scale_gradient(Tensor gradient, const Tensor& factor) {
  if (gradient.layout() == at::kStrided) gradient.mul_(factor.to(gradient.device()).reshape({}));
  else gradient.mul_(factor.item());
}

template <typename State>
State* find(Optimizer& optimizer, const Tensor& p) {
  auto& all = optimizer.state();
  auto found = all.find(p.unsafeGetTensorImpl());
  return found == all.end() ? nullptr : static_cast<State*>(found->second.get());
}

template <typename State>
State& put(Optimizer& optimizer, const Tensor& p, std::unique_ptr<State> state) {
  State& kept = *state;
  optimizer.state()[p.unsafeGetTensorImpl()] = std::move(state);
  return kept;
}

// Makes the step counts those of the steps that were made. Reads from the device if steps were made there
// with a GradScaler since the last time: a host sync.
void settle(Optimizer& optimizer, int kind, Plan& plan) {
  if (!plan.ahead.skipped.defined()) return;
  const auto skipped = static_cast<int64_t>(plan.ahead.skipped.item<double>());
  auto& all = optimizer.state();
  for (void* parameter : plan.ahead.parameters) {
    auto found = all.find(parameter);
    if (found == all.end()) continue;
    auto back = [&](auto& state) { state.step(state.step() - skipped); };
    if (kind == ADAM) back(static_cast<torch::optim::AdamParamState&>(*found->second));
    else back(static_cast<torch::optim::AdamWParamState&>(*found->second));
  }
  plan.ahead = {};
}

class Step {
 public:
  Step(Optimizer& optimizer, int kind, Plan& plan, Mode mode, const Tensor* factor, const Tensor* found_inf)
      : optimizer_(optimizer), kind_(kind), plan_(plan), mode_(mode), factor_(factor), found_inf_(found_inf) {}

  void run() {
    at::NoGradGuard no_grad;
    if (mode_ == LOOP) return loop();
    if (skipped_on_host()) return;
    auto& groups = optimizer_.param_groups();
    plan_.pass.clear();
    plan_.left.resize(groups.size());
    for (auto& left : plan_.left) left.clear();
    plan_.buckets.clear();
    any_left_ = false;
    for (group_ = 0; group_ < groups.size(); ++group_)
      for (const Tensor& p : groups[group_].params()) {
        const Tensor& g = p.grad();
        if (g.defined() && !take(p, g)) {
          plan_.left[group_].push_back(p);
          any_left_ = true;
        }
      }
    // First, so that what the loop refuses leaves the rest as it was.
    if (any_left_) loop_over_left();
    plan_.pass.update();
    run_buckets();
  }

 private:
  bool skipped() const { return found_inf_->item<double>() != 0.; }

  // Whether the step is known to be skipped. Where all can be left to the device's kernels it is not asked.
  bool skipped_on_host() {
    if (found_inf_ && found_inf_->device().is_cpu() && mode_ != KERNELS) return skipped();
    bool all = kind_ != RMSPROP;  // libtorch has no fused one
    plan_.on_device.clear();
    for (auto& group : optimizer_.param_groups())
      for (const Tensor& p : group.params()) {
        if (!p.grad().defined()) continue;
        if (for_kernels(p) && tig::is_alike(p, p.grad()) && !p.is_alias_of(p.grad())) plan_.on_device.push_back(p.unsafeGetTensorImpl());
        else all = false;
        // A first step leaves another buffer than zeros do.
        all = all && !(kind_ == SGD && static_cast<torch::optim::SGDOptions&>(group.options()).dampening() != 0 &&
                       !find<torch::optim::SGDParamState>(optimizer_, p));
      }
    const auto& ahead = plan_.ahead;
    if (ahead.skipped.defined() && (!all || ahead.parameters != plan_.on_device)) settle(optimizer_, kind_, plan_);
    if (!found_inf_ || all) return false;
    const bool known = skipped();
    found_inf_ = nullptr;
    return known;
  }

  void loop() {
    settle(optimizer_, kind_, plan_);
    if (found_inf_ && skipped()) return;
    if (factor_)
      for (auto& group : optimizer_.param_groups())
        for (const Tensor& p : group.params())
          if (p.grad().defined()) scale_gradient(p.grad(), *factor_);
    optimizer_.step();
  }

  void loop_over_left() {
    if (factor_)
      for (const auto& left : plan_.left)
        for (const Tensor& p : left) scale_gradient(p.grad(), *factor_);
    Swapped only_left(optimizer_, plan_.left);
    optimizer_.step();
  }

  // Puts a parameter on the list it belongs to; false where only the loop can.
  bool take(const Tensor& p, const Tensor& g) {
    if (!tig::is_alike(p, g) || p.is_alias_of(g)) return false;
    const bool own = mode_ == FUSED && tig::is_plain_cpu(p);
    if (!own && !for_kernels(p)) return false;
    // For parameters on the CPU a number; where it is there, nothing waits for it.
    if (own && factor_ && !host_factor_) host_factor_ = factor_->item<double>();
    auto& options = optimizer_.param_groups()[group_].options();
    switch (kind_) {
      case SGD: return sgd(p, g, own, static_cast<torch::optim::SGDOptions&>(options));
      case ADAM:
        return adam<torch::optim::AdamParamState>(p, g, own, static_cast<torch::optim::AdamOptions&>(options));
      case ADAMW:
        return adam<torch::optim::AdamWParamState>(p, g, own, static_cast<torch::optim::AdamWOptions&>(options));
      default: return rmsprop(p, g, own, static_cast<torch::optim::RMSpropOptions&>(options));
    }
  }

  bool for_kernels(const Tensor& p) const {
    const bool device = p.device().is_cuda() || (mode_ == KERNELS && p.device().is_cpu());
    return device && p.layout() == at::kStrided && at::isFloatingType(p.scalar_type()) &&
           p.is_non_overlapping_and_dense() && !p.is_inference() && !p.is_neg();
  }

  bool fits(const Tensor& p, const Tensor& state) const { return state.defined() && tig::is_alike(p, state); }

  tig::Task task(const Tensor& p, const Tensor& g, Rule rule, bool decay) const {
    tig::Task task{};
    task.p = p.mutable_data_ptr();
    task.g = g.const_data_ptr();
    task.n = p.numel();
    task.dtype = p.scalar_type();
    task.rule = rule;
    task.decay = decay;
    task.factor = host_factor_.value_or(1.);
    return task;
  }

  Plan::Bucket& bucket(const Tensor& p, const Tensor& g, int64_t steps) {
    Plan::Bucket& bucket = plan_.buckets[{group_, p.scalar_type(), p.device().type(), p.device().index(), steps}];
    bucket.p.push_back(p);
    bucket.g.push_back(g);
    return bucket;
  }

  bool sgd(const Tensor& p, const Tensor& g, bool own, const torch::optim::SGDOptions& o) {
    const bool decay = o.weight_decay() != 0, momentum = o.momentum() != 0;
    Tensor buffer;
    bool first = false;
    if (momentum) {
      auto state = find<torch::optim::SGDParamState>(optimizer_, p);
      if (state && !fits(p, state->momentum_buffer())) return false;
      first = state == nullptr;
      if (first) {
        auto made = std::make_unique<torch::optim::SGDParamState>();
        made->momentum_buffer(at::zeros_like(p));
        state = &put(optimizer_, p, std::move(made));
      }
      buffer = state->momentum_buffer();
    }
    if (!own) {
      Plan::Bucket& into = bucket(p, g, first ? 0 : 1);
      if (momentum) into.a.push_back(buffer);
      return true;
    }
    const Rule rule = !momentum ? Rule::Sgd
        : first ? (o.nesterov() ? Rule::SgdFirstNesterov : Rule::SgdFirst)
                : (o.nesterov() ? Rule::SgdNesterov : Rule::SgdMomentum);
    auto one = task(p, g, rule, decay);
    if (momentum) one.s[0] = buffer.mutable_data_ptr();
    one.k[0] = o.lr();
    one.k[1] = o.weight_decay();
    one.k[2] = o.momentum();
    one.k[3] = 1 - o.dampening();
    plan_.pass.add(one);
    p.unsafeGetTensorImpl()->bump_version();
    return true;
  }

  template <typename State, typename Options>
  bool adam(const Tensor& p, const Tensor& g, bool own, const Options& o) {
    constexpr bool decoupled = std::is_same<Options, torch::optim::AdamWOptions>::value;
    auto state = find<State>(optimizer_, p);
    if (!state) {
      auto made = std::make_unique<State>();
      made->step(0);
      made->exp_avg(at::zeros_like(p));
      made->exp_avg_sq(at::zeros_like(p));
      if (o.amsgrad()) made->max_exp_avg_sq(at::zeros_like(p));
      state = &put(optimizer_, p, std::move(made));
    }
    if (!fits(p, state->exp_avg()) || !fits(p, state->exp_avg_sq())) return false;
    if (o.amsgrad() && !fits(p, state->max_exp_avg_sq())) return false;
    state->step(state->step() + 1);
    if (!own) {
      Plan::Bucket& into = bucket(p, g, state->step() - 1);
      into.a.push_back(state->exp_avg());
      into.b.push_back(state->exp_avg_sq());
      if (o.amsgrad()) into.c.push_back(state->max_exp_avg_sq());
      return true;
    }
    const double beta1 = std::get<0>(o.betas()), beta2 = std::get<1>(o.betas());
    const double correction1 = 1 - std::pow(beta1, state->step());
    const double correction2 = 1 - std::pow(beta2, state->step());
    const Rule rule = decoupled ? (o.amsgrad() ? Rule::AdamWAmsgrad : Rule::AdamW)
                                : (o.amsgrad() ? Rule::AdamAmsgrad : Rule::Adam);
    auto one = task(p, g, rule, o.weight_decay() != 0);
    one.s[0] = state->exp_avg().mutable_data_ptr();
    one.s[1] = state->exp_avg_sq().mutable_data_ptr();
    if (o.amsgrad()) one.s[2] = state->max_exp_avg_sq().mutable_data_ptr();
    one.k[0] = o.lr() / correction1;
    one.k[1] = decoupled ? 1 - o.lr() * o.weight_decay() : o.weight_decay();
    one.k[2] = beta1;
    one.k[3] = 1 - beta1;
    one.k[4] = beta2;
    one.k[5] = 1 - beta2;
    one.k[6] = std::sqrt(correction2);
    one.k[7] = o.eps();
    plan_.pass.add(one);
    p.unsafeGetTensorImpl()->bump_version();
    return true;
  }

  bool rmsprop(const Tensor& p, const Tensor& g, bool own, const torch::optim::RMSpropOptions& o) {
    const bool momentum = o.momentum() > 0, centered = o.centered();
    auto state = find<torch::optim::RMSpropParamState>(optimizer_, p);
    if (!state) {
      auto made = std::make_unique<torch::optim::RMSpropParamState>();
      made->step(0);
      made->square_avg(at::zeros_like(p));
      if (momentum) made->momentum_buffer(at::zeros_like(p));
      if (centered) made->grad_avg(at::zeros_like(p));
      state = &put(optimizer_, p, std::move(made));
    }
    if (!fits(p, state->square_avg())) return false;
    if (momentum && !fits(p, state->momentum_buffer())) return false;
    if (centered && !fits(p, state->grad_avg())) return false;
    state->step(state->step() + 1);
    if (!own) {
      Plan::Bucket& into = bucket(p, g, 0);
      into.a.push_back(state->square_avg());
      if (momentum) into.b.push_back(state->momentum_buffer());
      if (centered) into.c.push_back(state->grad_avg());
      return true;
    }
    const Rule rule = centered ? (momentum ? Rule::RmsPropCenteredMomentum : Rule::RmsPropCentered)
                               : (momentum ? Rule::RmsPropMomentum : Rule::RmsProp);
    auto one = task(p, g, rule, o.weight_decay() != 0);
    one.s[0] = state->square_avg().mutable_data_ptr();
    if (momentum) one.s[1] = state->momentum_buffer().mutable_data_ptr();
    if (centered) one.s[2] = state->grad_avg().mutable_data_ptr();
    one.k[0] = o.lr();
    one.k[1] = o.weight_decay();
    one.k[2] = o.alpha();
    one.k[3] = 1 - o.alpha();
    one.k[4] = o.eps();
    one.k[5] = o.momentum();
    plan_.pass.add(one);
    p.unsafeGetTensorImpl()->bump_version();
    return true;
  }

  // libtorch's kernels: one call for each bucket.
  void run_buckets() {
    for (auto& [key, bucket] : plan_.buckets) {
      auto& options = optimizer_.param_groups()[std::get<0>(key)].options();
      const auto device = bucket.p[0].device();
      std::optional<Tensor> scale, found_inf;
      if (factor_) scale = factor_->to(device, at::kFloat).reciprocal().reshape({});
      if (found_inf_) found_inf = found_inf_->to(device, at::kFloat).reshape({});
      switch (kind_) {
        case SGD: {
          const auto& o = static_cast<torch::optim::SGDOptions&>(options);
          bool first = o.momentum() != 0 && std::get<4>(key) == 0;
          // Skipped on the device, a first step must not count as made: from zeros the next one is right.
          if (found_inf_) first = false;
          at::_fused_sgd_(bucket.p, bucket.g, bucket.a, o.weight_decay(), o.momentum(), o.lr(), o.dampening(),
                          o.nesterov(), /*maximize=*/false, first, scale, found_inf);
          break;
        }
        case RMSPROP: rmsprop_kernels(bucket, static_cast<torch::optim::RMSpropOptions&>(options)); break;
        default: {
          // Filled on the device; nothing is copied there.
          auto done = at::full({}, static_cast<double>(std::get<4>(key) + 1), at::device(device).dtype(at::kFloat));
          if (plan_.ahead.skipped.defined()) done = done - plan_.ahead.skipped.to(device);
          const std::vector<Tensor> steps(bucket.p.size(), done);
          auto call = [&](auto fused, const auto& o) {
            fused(bucket.p, bucket.g, bucket.a, bucket.b, bucket.c, steps, o.lr(), std::get<0>(o.betas()),
                  std::get<1>(o.betas()), o.weight_decay(), o.eps(), o.amsgrad(), /*maximize=*/false, scale,
                  found_inf);
          };
          if (kind_ == ADAM)
            call([](auto&&... args) { at::_fused_adam_(args...); }, static_cast<torch::optim::AdamOptions&>(options));
          else
            call([](auto&&... args) { at::_fused_adamw_(args...); },
                 static_cast<torch::optim::AdamWOptions&>(options));
        }
      }
    }
    if (found_inf_ && (kind_ == ADAM || kind_ == ADAMW) && !plan_.buckets.empty()) {
      auto now = found_inf_->ne(0).to(at::kFloat).reshape({});
      plan_.ahead.skipped = plan_.ahead.skipped.defined() ? plan_.ahead.skipped + now : now;
      plan_.ahead.parameters = plan_.on_device;
    }
  }

  void rmsprop_kernels(Plan::Bucket& bucket, const torch::optim::RMSpropOptions& o) {
    std::vector<Tensor> g = bucket.g;
    if (factor_) {
      const auto factor = factor_->to(bucket.p[0].device()).reshape({});
      at::_foreach_mul_(g, factor);
    }
    if (o.weight_decay() != 0) g = at::_foreach_add(g, bucket.p, o.weight_decay());
    at::_foreach_mul_(bucket.a, o.alpha());
    at::_foreach_addcmul_(bucket.a, g, g, 1 - o.alpha());
    std::vector<Tensor> average;
    if (o.centered()) {
      at::_foreach_mul_(bucket.c, o.alpha());
      at::_foreach_add_(bucket.c, g, 1 - o.alpha());
      average = at::_foreach_addcmul(bucket.a, bucket.c, bucket.c, -1);
      at::_foreach_sqrt_(average);
    } else {
      average = at::_foreach_sqrt(bucket.a);
    }
    at::_foreach_add_(average, o.eps());
    if (o.momentum() > 0) {
      at::_foreach_mul_(bucket.b, o.momentum());
      at::_foreach_addcdiv_(bucket.b, g, average, 1);
      at::_foreach_add_(bucket.p, bucket.b, -o.lr());
    } else {
      at::_foreach_addcdiv_(bucket.p, g, average, -o.lr());
    }
  }

  Optimizer& optimizer_;
  const int kind_;
  Plan& plan_;
  const Mode mode_;
  const Tensor* factor_;
  const Tensor* found_inf_;
  size_t group_ = 0;
  std::optional<double> host_factor_;
  bool any_left_ = false;
};

}  // namespace

extern "C" {

int tig_plan_new(Plan** made, char** error) {
  return guarded(error, [&] { *made = new Plan; });
}
void tig_plan_free(Plan* plan) { delete plan; }

// One step. The gradients count `factor` times, and nothing happens if `found_inf` is not 0; both are tensors
// of one element, or null. The gradients themselves may be scaled.
int tig_step(Optimizer* optimizer, int kind, Plan* plan, int mode, const Tensor* factor, const Tensor* found_inf,
             char** error) {
  return guarded(error, [&] { Step(*optimizer, kind, *plan, static_cast<Mode>(mode), factor, found_inf).run(); });
}

int tig_settle(Optimizer* optimizer, int kind, Plan* plan, char** error) {
  return guarded(error, [&] { settle(*optimizer, kind, *plan); });
}

}  // extern "C"
