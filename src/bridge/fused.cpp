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

#include <algorithm>
#include <memory>
#include <tuple>

#include "bridge.h"
#include "plan.h"
#include "rules.h"

using at::Tensor;
using torch::optim::Optimizer;

namespace {

using Sgd = tig::SgdRules;
using Adam = tig::AdamRules<torch::optim::AdamOptions, torch::optim::AdamParamState>;
using AdamW = tig::AdamRules<torch::optim::AdamWOptions, torch::optim::AdamWParamState>;
using RmsProp = tig::RmsPropRules;

// Calls f(rules) with those of this kind of optimizer.
template <typename F>
auto with_rules(int kind, F&& f) {
  switch (kind) {
    case SGD: return f(Sgd());
    case ADAM: return f(Adam());
    case ADAMW: return f(AdamW());
    default: return f(RmsProp());
  }
}

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
// with a GradScaler since the last time: a host sync. To be called before anything but Step touches the state.
void settle(Optimizer& optimizer, int kind, Plan& plan) {
  plan.known.valid = false;
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

c10::StorageImpl& storage(c10::TensorImpl& t) { return *t.unsafe_storage().unsafeGetStorageImpl(); }

int64_t offset(const c10::TensorImpl& t) { return t.storage_offset() * static_cast<int64_t>(t.dtype().itemsize()); }

// The first element, to write to and to read from.
void* memory(c10::TensorImpl& t) { return static_cast<char*>(storage(t).mutable_data()) + offset(t); }
const void* read_memory(c10::TensorImpl& t) { return static_cast<const char*>(storage(t).data()) + offset(t); }

class Step {
 public:
  Step(Optimizer& optimizer, int kind, Plan& plan, Mode mode, const Tensor* factor, const Tensor* found_inf)
      : optimizer_(optimizer), kind_(kind), plan_(plan), mode_(mode), factor_(factor), found_inf_(found_inf) {}

  void run() {
    at::NoGradGuard no_grad;
    if (mode_ == LOOP) return loop();
    if (skipped_on_host()) return;
    with_rules(kind_, [&](auto rules) {
      using Rules = decltype(rules);
      if (!recall<Rules>()) build<Rules>();
    });
    plan_.pass.update(factor());
    run_buckets();
  }

 private:
  bool skipped() const { return found_inf_->item<double>() != 0.; }

  // Whether the step is known to be skipped. Where all can be left to the device's kernels it is not asked.
  bool skipped_on_host() {
    if (found_inf_ && found_inf_->device().is_cpu() && mode_ != KERNELS) return skipped();
    if (!found_inf_ && !plan_.ahead.skipped.defined()) return false;
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

  // Uses the tasks of the last step again, if nothing they were made of has changed but values. Else nothing
  // has happened.
  template <typename Rules>
  bool recall() {
    auto& known = plan_.known;
    if (!known.valid || mode_ != FUSED) return false;
    auto& groups = optimizer_.param_groups();
    for (const auto& shared : known.shared) {
      if (shared.group >= groups.size()) return false;
      const auto& o = options<Rules>(shared.group);
      if (shared.rule != Rules::rule(o, false) || shared.decay != (o.weight_decay() != 0)) return false;
    }
    size_t next = 0;
    for (size_t group = 0; group < groups.size(); ++group)
      for (const Tensor& p : groups[group].params()) {
        if (next == known.parameters.size()) return false;
        const auto& before = known.parameters[next++];
        if (before.group != group || !recall(before, p)) return false;
      }
    if (next != known.parameters.size()) return false;

    for (const auto& parameter : known.parameters) {
      if (parameter.task == Plan::Known::NONE) continue;
      if (parameter.steps) ++*parameter.steps;
      parameter.p->bump_version();
    }
    for (uint32_t i = 0; i < known.shared.size(); ++i) {
      auto& shared = known.shared[i];
      plan_.pass.numbers(i) = Rules::numbers(options<Rules>(shared.group), ++shared.steps);
    }
    return true;
  }

  bool recall(const Plan::Known::Parameter& before, const Tensor& p) {
    c10::TensorImpl* const now = p.unsafeGetTensorImpl();
    if (now != before.p) return false;
    const Tensor& gradient = now->grad();
    if (gradient.defined() != (before.task != Plan::Known::NONE)) return false;
    if (!gradient.defined()) return true;
    c10::TensorImpl* const g = gradient.unsafeGetTensorImpl();
    tig::Task& task = plan_.pass.task(before.task);
    // The keys tell device, layout and negated views.
    if (now->key_set() != before.keys || g->key_set() != before.keys) return false;
    if (now->dtype() != g->dtype() || now->dtype().toScalarType() != task.dtype || now->numel() != task.n) return false;
    if (!tig::same_layout(*now, *g) || !now->is_non_overlapping_and_dense()) return false;
    if (&storage(*now) == &storage(*g) || memory(*now) != task.p) return false;
    for (int i = 0; i < 3; ++i) {
      c10::TensorImpl* const state = before.state[i];
      if (state && (memory(*state) != task.s[i] || !tig::same_layout(*now, *state))) return false;
    }
    if (before.steps && *before.steps != plan_.known.shared[task.numbers].steps) return false;
    task.g = read_memory(*g);
    return true;
  }

  // Makes the tasks and lists of all parameters, and steps those that only the loop can.
  template <typename Rules>
  void build() {
    auto& groups = optimizer_.param_groups();
    auto& known = plan_.known;
    known.valid = false;
    known.shared.clear();
    known.parameters.clear();
    plan_.pass.clear();
    plan_.left.resize(groups.size());
    for (auto& left : plan_.left) left.clear();
    plan_.buckets.clear();
    bool any_left = false;
    for (group_ = 0; group_ < groups.size(); ++group_)
      for (const Tensor& p : groups[group_].params()) {
        const Tensor& g = p.unsafeGetTensorImpl()->grad();
        if (!g.defined()) {
          known.parameters.push_back({group_, p.unsafeGetTensorImpl(), {}, {}, nullptr, Plan::Known::NONE});
        } else if (!take<Rules>(p, g, options<Rules>(group_))) {
          plan_.left[group_].push_back(p);
          any_left = true;
        }
      }
    known.valid = mode_ == FUSED && !any_left && plan_.buckets.empty();
    // First, so that what the loop refuses leaves the rest as it was.
    if (any_left) loop_over_left();
  }

  // Puts a parameter on the list it belongs to; false where only the loop can.
  template <typename Rules>
  bool take(const Tensor& p, const Tensor& g, const typename Rules::Options& o) {
    using State = typename Rules::State;
    if (!tig::is_alike(p, g) || p.is_alias_of(g)) return false;
    const bool own = mode_ == FUSED && tig::is_plain_cpu(p);
    if (!own && !for_kernels(p)) return false;
    State* state = nullptr;
    tig::StateTensors tensors{};
    bool first = false;
    if (Rules::has_state(o)) {
      state = find<State>(optimizer_, p);
      first = state == nullptr;
      if (first) state = &put(optimizer_, p, Rules::make(p, o));
      tensors = Rules::tensors(*state, o);
      for (const Tensor* tensor : tensors)
        if (tensor && !tig::is_alike(p, *tensor)) return false;
    }
    int64_t* steps = nullptr;
    if constexpr (Rules::counts) steps = &state->step();
    if (own) add<Rules>(p, g, o, tensors, steps, first);
    else add_to_bucket(p, g, tensors, steps ? *steps : first ? 0 : 1);
    if (steps) ++*steps;
    return true;
  }

  template <typename Rules>
  void add(const Tensor& p, const Tensor& g, const typename Rules::Options& o, const tig::StateTensors& tensors,
           int64_t* steps, bool first) {
    auto& known = plan_.known;
    const Plan::Known::Shared shared{group_, Rules::rule(o, first), o.weight_decay() != 0, steps ? *steps + 1 : 0};
    const auto same = [&](const Plan::Known::Shared& other) {
      return other.group == shared.group && other.rule == shared.rule && other.steps == shared.steps;
    };
    auto found = std::find_if(known.shared.begin(), known.shared.end(), same);
    const auto numbers = static_cast<uint32_t>(found - known.shared.begin());
    if (found == known.shared.end()) {
      known.shared.push_back(shared);
      plan_.pass.add(Rules::numbers(o, shared.steps));
    }
    tig::Task task{};
    task.p = memory(*p.unsafeGetTensorImpl());
    task.g = g.const_data_ptr();
    task.n = p.numel();
    task.dtype = p.scalar_type();
    task.rule = shared.rule;
    task.decay = shared.decay;
    task.numbers = numbers;
    Plan::Known::Parameter parameter{group_, p.unsafeGetTensorImpl(), p.key_set(), {}, steps, 0};
    for (int i = 0; i < 3; ++i) {
      if (!tensors[i]) continue;
      parameter.state[i] = tensors[i]->unsafeGetTensorImpl();
      task.s[i] = memory(*parameter.state[i]);
    }
    parameter.task = plan_.pass.add(task);
    known.parameters.push_back(parameter);
    p.unsafeGetTensorImpl()->bump_version();
  }

  void add_to_bucket(const Tensor& p, const Tensor& g, const tig::StateTensors& tensors, int64_t steps) {
    Plan::Bucket& bucket = plan_.buckets[{group_, p.scalar_type(), p.device().type(), p.device().index(), steps}];
    bucket.p.push_back(p);
    bucket.g.push_back(g);
    std::vector<Tensor>* const lists[] = {&bucket.a, &bucket.b, &bucket.c};
    for (int i = 0; i < 3; ++i)
      if (tensors[i]) lists[i]->push_back(*tensors[i]);
  }

  template <typename Rules>
  typename Rules::Options& options(size_t group) const {
    return static_cast<typename Rules::Options&>(optimizer_.param_groups()[group].options());
  }

  // For parameters on the CPU a number; where it is there, nothing waits for it.
  double factor() const { return factor_ && !plan_.pass.empty() ? factor_->item<double>() : 1.; }

  bool for_kernels(const Tensor& p) const {
    const bool device = p.device().is_cuda() || (mode_ == KERNELS && p.device().is_cpu());
    return device && p.layout() == at::kStrided && at::isFloatingType(p.scalar_type()) &&
           p.is_non_overlapping_and_dense() && !p.is_inference() && !p.is_neg();
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
