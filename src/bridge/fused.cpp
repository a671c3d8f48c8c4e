// Steps on the optimizer's own state, all parameters at once. Parameters that these steps cannot handle (sparse
// gradients, odd layouts, mixed types) go through the loop of the optimizer's class.

#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_addcdiv.h>
#include <ATen/ops/_foreach_addcmul.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_neg.h>
#include <ATen/ops/_foreach_sqrt.h>
#include <ATen/ops/_fused_adam.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/_fused_sgd.h>
#include <ATen/MemoryOverlap.h>

#include <algorithm>
#include <memory>
#include <sstream>
#include <tuple>

#include "bridge.h"
#include "kernel_form.h"
#include "plan.h"
#include "rules.h"

using abi::Class;
using abi::Mode;
using at::Tensor;
using torch::optim::Optimizer;

namespace {

using Sgd = tig::SgdRules;
using Adam = tig::AdamRules<torch::optim::AdamOptions, torch::optim::AdamParamState>;
using AdamW = tig::AdamRules<torch::optim::AdamWOptions, torch::optim::AdamWParamState>;
using RmsProp = tig::RmsPropRules;

// Calls f(rules) with the rules of this kind of optimizer.
template <typename F>
auto with_rules(Class kind, F&& f) {
  switch (kind) {
    case Class::Sgd: return f(Sgd());
    case Class::Adam: return f(Adam());
    case Class::AdamW: return f(AdamW());
    case Class::RmsProp: return f(RmsProp());
    case Class::Own: return f(tig::OwnRules());
  }
  unknown("kind of optimizer", static_cast<int>(kind));
}

// Thrown when one parameter makes the whole step impossible.
struct Refused : std::runtime_error {
  Refused(const Tensor& p, const std::string& why) : std::runtime_error(why), parameter(p.unsafeGetTensorImpl()) {}
  const void* parameter;
};

// While an object of this class lives, the optimizer's groups hold other parameters.
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

// While an object of this class lives, the state of a parameter is that of another tensor, which stands for it. The
// parameter keeps its place in the map, so that the state goes back without new memory.
class Lent {
 public:
  Lent(Optimizer& optimizer, const Tensor& from, const Tensor& to)
      : optimizer_(optimizer), from_(from.unsafeGetTensorImpl()), to_(to.unsafeGetTensorImpl()) {
    auto& all = optimizer_.state();
    if (all.find(from_) == all.end()) {
      all[from_] = nullptr;
    } else {
      auto& lent = all[to_];
      lent = std::move(all.find(from_)->second);
    }
  }
  ~Lent() {
    auto& all = optimizer_.state();
    if (const auto lent = all.find(to_); lent != all.end()) {
      all.find(from_)->second = std::move(lent->second);
      all.erase(lent);
    }
    if (const auto own = all.find(from_); !own->second) all.erase(own);
  }

 private:
  Optimizer& optimizer_;
  void* from_;
  void* to_;
};

// While an object of this class lives, some parameters have other gradients.
class Replaced {
 public:
  void set(const Tensor& p, Tensor gradient) {
    gradients_.emplace_back(p, p.grad());
    p.mutable_grad() = std::move(gradient);
  }
  ~Replaced() {
    for (auto last = gradients_.rbegin(); last != gradients_.rend(); ++last)
      last->first.mutable_grad() = std::move(last->second);
  }

 private:
  std::vector<std::pair<Tensor, Tensor>> gradients_;
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

// Subtracts the steps that a GradScaler skipped on a device from the step counts. Costs a host sync if there were
// steps with a GradScaler on a device since the last call. Everything but Step calls this before it touches the state.
void settle(Optimizer& optimizer, Class kind, Plan& plan) {
  plan.known.valid = false;
  if (!plan.ahead.skipped.defined()) return;
  const auto skipped = static_cast<int64_t>(plan.ahead.skipped.item<double>());
  auto& all = optimizer.state();
  for (void* parameter : plan.ahead.parameters) {
    auto found = all.find(parameter);
    if (found == all.end()) continue;
    auto back = [&](auto& state) { state.step(state.step() - skipped); };
    if (kind == Class::Adam) back(static_cast<torch::optim::AdamParamState&>(*found->second));
    else back(static_cast<torch::optim::AdamWParamState&>(*found->second));
  }
  plan.ahead = {};
}

using tig::storage_of;

// The address of the first element, to write to and to read from; each element has `item` bytes.
TIG_INLINE void* memory(c10::TensorImpl& t, size_t item) {
  return static_cast<char*>(storage_of(t).mutable_data()) + static_cast<size_t>(t.storage_offset()) * item;
}
TIG_INLINE const void* read_memory(c10::TensorImpl& t, size_t item) {
  return static_cast<const char*>(storage_of(t).data()) + static_cast<size_t>(t.storage_offset()) * item;
}

class Step {
 public:
  Step(Optimizer& optimizer, Class kind, Plan& plan, Mode mode, const Tensor* factor, const Tensor* found_inf)
      : optimizer_(optimizer), kind_(kind), plan_(plan), mode_(mode), factor_(factor), found_inf_(found_inf) {}

  // Makes the step. Everything that can refuse it comes before the first change.
  void run() {
    at::NoGradGuard no_grad;
    tig::kernel_form();  // throws if the environment variable is wrong, which is read once
    if (mode_ == Mode::Loop) settle(optimizer_, kind_, plan_);
    if (mode_ == Mode::Loop ? found_inf_ && skipped() : skipped_on_host()) return;
    with_rules(kind_, [&](auto rules) {
      using Rules = decltype(rules);
      if (recall<Rules>()) return;
      decide<Rules>();
      commit<Rules>();
    });
    plan_.pass.update(host_factor_);
    run_buckets();
  }

 private:
  bool skipped() const { return found_inf_->item<double>() != 0.; }

  // Returns true if the host knows that the step is skipped. Where the device's kernels can step all parameters, they
  // read found_inf themselves, and the host does not.
  bool skipped_on_host() {
    if (found_inf_ && found_inf_->device().is_cpu() && mode_ != Mode::Kernels) return skipped();
    if (!found_inf_ && !plan_.ahead.skipped.defined()) return false;
    bool all = with_rules(kind_, [](auto rules) { return decltype(rules)::kernels_skip; });
    plan_.on_device.clear();
    with_rules(kind_, [&](auto rules) {
      using Rules = decltype(rules);
      for (size_t group = 0; group < optimizer_.param_groups().size(); ++group) {
        const auto& o = options<Rules>(group);
        for (const Tensor& p : optimizer_.param_groups()[group].params()) {
          const Tensor& g = p.grad();
          if (!g.defined()) continue;
          auto* state = Rules::has_state(o) ? find<typename Rules::State>(optimizer_, p) : nullptr;
          if (way<Rules>(group, p, g, state, o) == Plan::Way::KERNELS) plan_.on_device.push_back(p.unsafeGetTensorImpl());
          else all = false;
          // With dampening the first step copies the undamped gradient into the buffer; a step from a buffer of zeros
          // would damp it. So the device cannot skip this first step by itself.
          if constexpr (std::is_same_v<Rules, Sgd>) all = all && (o.dampening() == 0 || state);
        }
      }
    });
    const auto& ahead = plan_.ahead;
    if (ahead.skipped.defined() && (!all || ahead.parameters != plan_.on_device)) settle(optimizer_, kind_, plan_);
    if (!found_inf_ || all) return false;
    const bool known = skipped();
    found_inf_ = nullptr;
    return known;
  }

  void loop_over_left() {
    if (factor_)
      for (const auto& left : plan_.left)
        for (const Tensor& p : left) scale_gradient(p.grad(), *factor_);
    Replaced gradients;
    for (size_t group = 0; group < plan_.left.size(); ++group)
      for (const Tensor& p : plan_.left[group]) {
        // A gradient that was widened: what the optimizer's class keeps of it must have the parameter's type.
        if (tig::is_low_precision(p.scalar_type()) && p.grad().scalar_type() == at::kFloat)
          gradients.set(p, p.grad().to(p.scalar_type()));
        if (kind_ != Class::Own && plan_.maximizes(group)) gradients.set(p, p.grad().neg());  // ours do it by themselves
      }
    Swapped only_left(optimizer_, plan_.left);
    optimizer_.step();
  }

  // Steps a parameter with a storage of low precision by the loop, which steps its value in f32. If its first step
  // throws, nothing is kept of it, because a half of what is kept could not be saved and loaded.
  void loop_over_value(Plan::Decision& decision) {
    void* const p = decision.p->unsafeGetTensorImpl();
    const bool first = plan_.kept_of(*decision.p) == nullptr, no_state = !has_state_of(p);
    try {
      if (decision.kept) plan_.kept[p] = *std::move(decision.kept);
      step_value(decision, *plan_.kept_of(*decision.p));
    } catch (...) {
      if (first) plan_.kept.erase(p);
      if (no_state) optimizer_.state().erase(p);
      throw;
    }
  }

  bool has_state_of(void* p) const { return optimizer_.state().find(p) != optimizer_.state().end(); }

  void step_value(const Plan::Decision& decision, tig::Kept& kept) {
    const Tensor& p = *decision.p;
    const auto how = decision.storage.how;
    const Tensor value = tig::low_precision_to_step(p, kept, how);
    Tensor gradient = p.grad().to(at::kFloat);
    if (factor_) gradient = gradient.mul(factor_->to(gradient.device()).reshape({}));
    if (kind_ != Class::Own && plan_.maximizes(decision.group)) gradient = gradient.neg();
    std::vector<std::vector<Tensor>> alone(optimizer_.param_groups().size());
    alone[decision.group].push_back(value);
    {
      Replaced gradients;  // master weights live on, and have none between steps
      gradients.set(value, gradient);
      Lent state(optimizer_, p, value);
      Swapped only_value(optimizer_, alone);
      optimizer_.step();
    }
    tig::store_low_precision(p, value, kept, how);
  }

  // Uses the tasks of the last step again, if only values have changed since. Returns false, and has changed nothing
  // that counts, if something else is different.
  template <typename Rules>
  bool recall() {
    auto& known = plan_.known;
    if (!known.valid || mode_ != Mode::Fused) return false;
    auto& groups = optimizer_.param_groups();
    for (const auto& shared : known.shared) {
      if (shared.group >= groups.size()) return false;
      const auto& o = options<Rules>(shared.group);
      if (shared.rule != Rules::rule(o, false) || shared.decay != (o.weight_decay() != 0)) return false;
      if (shared.maximize != maximizes<Rules>(shared.group)) return false;
    }
    size_t next = 0;
    for (size_t group = 0; group < groups.size(); ++group)
      for (const Tensor& p : groups[group].params()) {
        if (next == known.parameters.size()) return false;
        const auto& before = known.parameters[next++];
        if (before.group != group || !recall(before, p)) return false;
      }
    if (next != known.parameters.size()) return false;

    read_factor(!plan_.pass.empty());
    advance<Rules>();
    for (const auto& parameter : known.parameters) {
      if (parameter.task == Plan::Known::NONE) continue;
      if (parameter.steps) ++*parameter.steps;
      if (parameter.kept) plan_.pass.task(parameter.task).low.key = tig::next_key(parameter.kept->stream);
      parameter.p->bump_version();
    }
    for (uint32_t i = 0; i < known.shared.size(); ++i) {
      auto& shared = known.shared[i];
      plan_.pass.numbers(i) = Rules::numbers(options<Rules>(shared.group), ++shared.steps, shared.state);
    }
    return true;
  }

  // Checks one parameter. Each step calls this for each parameter, so the compiler inlines all calls in it.
  __attribute__((flatten)) bool recall(const Plan::Known::Parameter& before, const Tensor& p) {
    c10::TensorImpl* const now = p.unsafeGetTensorImpl();
    if (now != before.p) return false;
    const Tensor& gradient = now->grad();
    if (gradient.defined() != (before.task != Plan::Known::NONE)) return false;
    if (!gradient.defined()) return true;
    c10::TensorImpl* const g = gradient.unsafeGetTensorImpl();
    tig::Task& task = plan_.pass.task(before.task);
    // These are the conditions that decide() checks, less those that follow from others.
    if (now->key_set() != before.keys || now->dtype().toScalarType() != task.dtype || now->numel() != task.n) return false;
    const size_t item = c10::elementSize(task.dtype);
    if (!now->is_non_overlapping_and_dense() || memory(*now, item) != task.p) return false;
    if (before.kept) return recall_low(before, *now, *g, task, item);
    if (!tig::is_within_storage(*now, item) || !tig::is_alike(*now, *g, item)) return false;
    if (&storage_of(*now) == &storage_of(*g)) return false;
    for (int i = 0; i < 3; ++i) {
      c10::TensorImpl* const state = before.state[i];
      if (!state) continue;
      if (!tig::is_alike(*now, *state, item) || memory(*state, item) != task.s[i]) return false;
      if (&storage_of(*state) == &storage_of(*g)) return false;
    }
    if (before.steps && *before.steps != plan_.known.shared[task.numbers].steps) return false;
    task.g = read_memory(*g, item);
    return true;
  }

  // The rest of recall() for a parameter with a storage of low precision.
  bool recall_low(const Plan::Known::Parameter& before, c10::TensorImpl& p, c10::TensorImpl& g, tig::Task& task,
                  size_t item) {
    const auto wide = caffe2::TypeMeta::Make<float>();
    const size_t wide_item = sizeof(float), gradient_item = task.low.wide_gradient ? wide_item : item;
    if (!tig::is_within_storage(p, item)) return false;
    if (!tig::is_alike(p, g, gradient_item, task.low.wide_gradient ? wide : p.dtype())) return false;
    if (&storage_of(p) == &storage_of(g)) return false;
    const auto fits = [&](c10::TensorImpl& tensor, size_t size, caffe2::TypeMeta type, const void* at) {
      return tig::is_alike(p, tensor, size, type) && memory(tensor, size) == at && &storage_of(tensor) != &storage_of(g);
    };
    for (int i = 0; i < 3; ++i)
      if (before.state[i] && !fits(*before.state[i], wide_item, wide, task.s[i])) return false;
    if (before.kept->tensor.defined()) {
      const bool master = task.low.how == tig::LowPrecision::MasterWeights;
      c10::TensorImpl& kept = *before.kept->tensor.unsafeGetTensorImpl();
      if (!fits(kept, master ? wide_item : item, master ? wide : p.dtype(), task.low.kept)) return false;
    }
    if (before.steps && *before.steps != plan_.known.shared[task.numbers].steps) return false;
    task.g = read_memory(g, gradient_item);
    return true;
  }

  // Decides who steps which parameter. Changes no tensor, and throws Refused for a parameter that nobody can step.
  template <typename Rules>
  void decide() {
    auto& groups = optimizer_.param_groups();
    auto& decisions = plan_.decisions;
    decisions.clear();
    bool any_in_pass = false;
    for (size_t group = 0; group < groups.size(); ++group) {
      const auto& o = options<Rules>(group);
      for (const Tensor& p : groups[group].params()) {
        Plan::Decision made{group, &p, Plan::Way::NONE, nullptr, nullptr, plan_.storage(group, p), std::nullopt};
        const Tensor& g = p.unsafeGetTensorImpl()->grad();
        if (g.defined()) {
          auto* state = Rules::has_state(o) ? find<typename Rules::State>(optimizer_, p) : nullptr;
          made.state = state;
          made.way = way<Rules>(group, p, g, state, o);
          if (made.storage.how != tig::LowPrecision::None) decide_low<Rules>(made, g, state, o);
          else if (made.way == Plan::Way::LOOP) check_loop<Rules>(p, g, state, o, false);
          else if (Rules::has_state(o) && !state) made.made = Rules::make(p, o);
          any_in_pass = any_in_pass || made.way == Plan::Way::ONE_PASS;
        }
        decisions.push_back(std::move(made));
      }
    }
    read_factor(any_in_pass);
  }

  // Decides about a parameter with a storage of low precision.
  template <typename Rules>
  void decide_low(Plan::Decision& decision, const Tensor& g, const typename Rules::State* state,
                  const typename Rules::Options& o) {
    const Tensor& p = *decision.p;
    const auto how = decision.storage.how;
    const tig::Kept* kept = kept_that_counts(p, how);
    if (decision.way == Plan::Way::LOOP) {
      if (g.layout() != at::kStrided || p.layout() != at::kStrided)
        throw Refused(p, "a storage of low precision (master weights, Kahan summation, stochastic rounding) needs dense "
                         "parameters and gradients");
      check_loop<Rules>(p, g, state, o, true);
      if (const std::string why = kept ? tig::low_precision_misfit(p, *kept, how) : ""; !why.empty())
        throw Refused(p, why);
    }
    if (!kept) {
      size_t place = 0;
      const auto& all = optimizer_.param_groups()[decision.group].params();
      while (!all[place].is_same(p)) ++place;
      decision.kept = tig::begin_low_precision(p, decision.storage, {decision.group, place});
    }
    if (decision.way == Plan::Way::ONE_PASS && Rules::has_state(o) && !state)
      decision.made = Rules::make(tig::low_precision_value(p, kept ? *kept : *decision.kept, how), o);
  }

  // Finds what was kept of a parameter. A compensation of another type belongs to values that the parameter had before its own type
  // was changed, so it counts no more.
  const tig::Kept* kept_that_counts(const Tensor& p, tig::LowPrecision how) const {
    const tig::Kept* kept = plan_.kept_of(p);
    const bool outdated = kept && how == tig::LowPrecision::KahanSum && kept->tensor.defined() &&
                          kept->tensor.scalar_type() != p.scalar_type();
    return outdated ? nullptr : kept;
  }

  template <typename Rules>
  Plan::Way way(size_t group, const Tensor& p, const Tensor& g, const typename Rules::State* state,
                const typename Rules::Options& o) {
    if (mode_ == Mode::Loop) return Plan::Way::LOOP;
    const bool own = mode_ == Mode::Fused && Rules::in_pass(o) && tig::is_plain_cpu(p);
    if (const auto how = plan_.storage(group, p).how; how != tig::LowPrecision::None)
      return own && in_pass_low<Rules>(p, g, state, o, how) ? Plan::Way::ONE_PASS : Plan::Way::LOOP;
    if (!own && !(Rules::kernels && for_kernels(p))) return Plan::Way::LOOP;
    if (!tig::is_alike(p, g) || p.is_alias_of(g)) return Plan::Way::LOOP;
    if (state) {
      const auto tensors = Rules::tensors(*state, o);
      for (size_t i = 0; i < tensors.size(); ++i) {
        if (!tensors[i]) continue;
        const Tensor& tensor = *tensors[i];
        if (!tig::is_alike(p, tensor) || tensor.is_alias_of(p) || tensor.is_alias_of(g)) return Plan::Way::LOOP;
        for (size_t j = 0; j < i; ++j)
          if (tensors[j] && tensor.is_alias_of(*tensors[j])) return Plan::Way::LOOP;
      }
    }
    return own ? Plan::Way::ONE_PASS : Plan::Way::KERNELS;
  }

  // Whether the pass can step a parameter with a storage of low precision.
  template <typename Rules>
  bool in_pass_low(const Tensor& p, const Tensor& g, const typename Rules::State* state,
                   const typename Rules::Options& o, tig::LowPrecision how) {
    if (!tig::is_alike(p, g) && !tig::is_alike(p, g, at::kFloat)) return false;
    std::vector<Tensor> apart{p, g};
    const auto fits = [&](const Tensor& tensor, at::ScalarType type) {
      for (const Tensor& other : apart)
        if (!tensor.defined() || tensor.is_alias_of(other)) return false;
      apart.push_back(tensor);
      return tig::is_alike(p, tensor, type);
    };
    if (p.is_alias_of(g)) return false;
    if (const tig::Kept* kept = kept_that_counts(p, how); kept && how != tig::LowPrecision::StochasticRounding)
      if (!fits(kept->tensor, how == tig::LowPrecision::MasterWeights ? at::kFloat : p.scalar_type())) return false;
    if (state)
      for (const Tensor* tensor : Rules::tensors(*state, o))
        if (tensor && !fits(*tensor, at::kFloat)) return false;
    return true;
  }

  // Refuses a parameter that libtorch's loop would refuse. The loop itself would do so too late, after it has stepped
  // the parameters before this one. `in_f32` says that the loop steps the parameter's value in f32.
  template <typename Rules>
  static void check_loop(const Tensor& p, const Tensor& g, const typename Rules::State* state,
                         const typename Rules::Options& o, bool in_f32) {
    // Rules look at type, size and device alone, so one element stands for the value.
    const Tensor stepped = in_f32 ? at::empty({}, p.options().dtype(at::kFloat)).expand(p.sizes()) : p;
    if (const std::string why = Rules::refused(stepped, g, state, o); !why.empty()) throw Refused(p, why);
    check_written(p, p, "it");
    check_read(p, p, "it", g);
    if (!state) return;
    for (const Tensor* tensor : Rules::tensors(*state, o)) {
      if (!tensor) continue;
      if (!tensor->defined()) throw Refused(p, "the optimizer's state of it is not complete");
      check_read(p, *tensor, "the optimizer's state of it", g);
      if (in_f32 && tensor->scalar_type() != at::kFloat)
        throw Refused(p, "the optimizer's state of it is not f32, which a storage of low precision needs: build the optimizer "
                         "anew");
      if (tensor->layout() != at::kStrided) continue;
      check_written(p, *tensor, "the optimizer's state of it");
      if (p.layout() == at::kStrided && at::get_overlap_status(p, *tensor) == at::MemOverlapStatus::Partial)
        throw Refused(p, "the optimizer's state of it shares a part of its memory");
    }
  }

  static void check_written(const Tensor& p, const Tensor& written, const char* what) {
    const std::string name = what;
    if (written.is_inference() && !c10::InferenceMode::is_enabled()) throw Refused(p, name + " is an inference tensor");
    if (written.layout() == at::kStrided && at::has_internal_overlap(written) == at::MemOverlap::Yes)
      throw Refused(p, name + " has several elements at one place in memory");
  }

  // Refuses a `gradient` that cannot be added to `written`, which is the parameter or a tensor of its state.
  static void check_read(const Tensor& p, const Tensor& written, const char* what, const Tensor& gradient) {
    const auto all = c10::promoteTypes(written.scalar_type(), gradient.scalar_type());
    if (written.sizes() == gradient.sizes() && written.device() == gradient.device() &&
        c10::canCast(all, written.scalar_type()) && !c10::isIntegralType(written.scalar_type(), true)) {
      if (written.layout() == at::kStrided && gradient.layout() == at::kStrided &&
          at::get_overlap_status(written, gradient) == at::MemOverlapStatus::Partial)
        throw Refused(p, "its gradient shares a part of the memory of " + std::string(what));
      return;
    }
    std::ostringstream why;
    const auto described = [&](const Tensor& t) { why << t.scalar_type() << ' ' << t.sizes() << " on " << t.device(); };
    why << what << " is ";
    described(written);
    why << ", and its gradient ";
    described(gradient);
    throw Refused(p, why.str());
  }

  // Turns the decisions into tasks and buckets, and steps the parameters that only libtorch's loop can step.
  template <typename Rules>
  void commit() {
    auto& known = plan_.known;
    known.valid = false;
    known.shared.clear();
    known.parameters.clear();
    plan_.pass.clear();
    plan_.buckets.clear();
    plan_.left.resize(optimizer_.param_groups().size());
    for (auto& left : plan_.left) left.clear();
    bool any_left = false;
    bool any_plain = false;
    for (const auto& decision : plan_.decisions)
      if (decision.way == Plan::Way::LOOP) {
        any_left = true;
        if (decision.storage.how != tig::LowPrecision::None) continue;
        plan_.left[decision.group].push_back(*decision.p);
        any_plain = true;
      }
    std::vector<typename Rules::Options> before;
    if (any_left)
      for (size_t group = 0; group < optimizer_.param_groups().size(); ++group) before.push_back(options<Rules>(group));
    advance<Rules>();
    // The loop comes first, because it may run out of memory. Then the groups do not count the step, and of the parameters
    // those that the loop had reached are stepped.
    try {
      if (any_plain) loop_over_left();
      for (auto& decision : plan_.decisions)
        if (decision.way == Plan::Way::LOOP && decision.storage.how != tig::LowPrecision::None)
          loop_over_value(decision);
    } catch (...) {
      for (size_t group = 0; group < before.size(); ++group) options<Rules>(group) = before[group];
      throw;
    }
    for (auto& decision : plan_.decisions) take<Rules>(decision);
    plan_.decisions.clear();
    known.valid = mode_ == Mode::Fused && !any_left && plan_.buckets.empty();
  }

  template <typename Rules>
  void take(Plan::Decision& decision) {
    const Tensor& p = *decision.p;
    group_ = decision.group;
    if (decision.way == Plan::Way::NONE)
      plan_.known.parameters.push_back({group_, p.unsafeGetTensorImpl(), {}, {}, nullptr, nullptr, Plan::Known::NONE});
    if (decision.way == Plan::Way::NONE || decision.way == Plan::Way::LOOP) return;
    const auto& o = options<Rules>(group_);
    const Tensor& g = p.unsafeGetTensorImpl()->grad();
    const bool first = decision.made != nullptr;
    auto* state = static_cast<typename Rules::State*>(first ? decision.made.get() : decision.state);
    if (first) optimizer_.state()[p.unsafeGetTensorImpl()] = std::move(decision.made);
    if (decision.kept) plan_.kept[p.unsafeGetTensorImpl()] = *std::move(decision.kept);
    const tig::StateTensors tensors = state ? Rules::tensors(*state, o) : tig::StateTensors{};
    int64_t* const steps = state ? Rules::steps(*state) : nullptr;
    if (decision.way == Plan::Way::ONE_PASS) add<Rules>(decision, g, o, tensors, state, steps, first);
    else add_to_bucket(p, g, tensors, steps ? *steps : first ? 0 : 1);
    if (steps) ++*steps;
  }

  template <typename Rules>
  void add(const Plan::Decision& decision, const Tensor& g, const typename Rules::Options& o,
           const tig::StateTensors& tensors, typename Rules::State* state, int64_t* steps, bool first) {
    const Tensor& p = *decision.p;
    auto& known = plan_.known;
    const Plan::Known::Shared shared{group_, Rules::rule(o, first), o.weight_decay() != 0, maximizes<Rules>(group_),
                                     steps ? *steps + 1 : 0, state};
    const auto same = [&](const Plan::Known::Shared& other) {
      return other.group == shared.group && other.rule == shared.rule && other.steps == shared.steps;
    };
    auto found = known.shared.end();
    if (Rules::shares_numbers(o)) found = std::find_if(known.shared.begin(), known.shared.end(), same);
    const auto numbers = static_cast<uint32_t>(found - known.shared.begin());
    if (found == known.shared.end()) {
      known.shared.push_back(shared);
      plan_.pass.add(Rules::numbers(o, shared.steps, state));
    }
    tig::Task task{};
    task.p = memory(*p.unsafeGetTensorImpl(), p.element_size());
    task.g = g.const_data_ptr();
    task.n = p.numel();
    task.dtype = p.scalar_type();
    task.rule = shared.rule;
    task.decay = shared.decay;
    task.maximize = shared.maximize;
    task.numbers = numbers;
    Plan::Known::Parameter parameter{group_, p.unsafeGetTensorImpl(), p.key_set(), {}, steps, nullptr, 0};
    size_t state_item = p.element_size();
    if (const auto how = decision.storage.how; how != tig::LowPrecision::None) {
      const bool master = how == tig::LowPrecision::MasterWeights;
      tig::Kept& kept = *(parameter.kept = plan_.kept_of(p));
      void* const memory_of_kept =
          kept.tensor.defined() ? memory(*kept.tensor.unsafeGetTensorImpl(), master ? sizeof(float) : state_item) : nullptr;
      task.low = {how, g.scalar_type() == at::kFloat, memory_of_kept, tig::next_key(kept.stream)};
      state_item = sizeof(float);
    }
    for (int i = 0; i < 3; ++i) {
      if (!tensors[i]) continue;
      parameter.state[i] = tensors[i]->unsafeGetTensorImpl();
      task.s[i] = memory(*parameter.state[i], state_item);
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

  template <typename Rules>
  bool maximizes(size_t group) const {
    if constexpr (std::is_same<Rules, tig::OwnRules>::value) return options<Rules>(group).on(abi::Hyper::Maximize);
    else return plan_.maximizes(group);
  }

  // Counts the step in the groups whose algorithm counts for the group.
  template <typename Rules>
  void advance() {
    if constexpr (std::is_same<Rules, tig::OwnRules>::value)
      for (size_t group = 0; group < optimizer_.param_groups().size(); ++group) {
        auto& o = options<Rules>(group);
        if (const auto count = tig::rule_of(o.algorithm).advance) count(o);
      }
  }

  // Reads the factor as a number, which the pass on the CPU needs. This costs a host sync only if the factor is on a
  // device.
  void read_factor(bool wanted) { host_factor_ = factor_ && wanted ? factor_->item<double>() : 1.; }

  bool for_kernels(const Tensor& p) const {
    const bool device = p.device().is_cuda() || (mode_ == Mode::Kernels && p.device().is_cpu());
    return device && p.layout() == at::kStrided && at::isFloatingType(p.scalar_type()) &&
           p.is_non_overlapping_and_dense() && !p.is_inference() && !p.is_neg();
  }

  // Calls libtorch's kernels once for each bucket.
  void run_buckets() {
    for (auto& [key, bucket] : plan_.buckets) {
      auto& options = optimizer_.param_groups()[std::get<0>(key)].options();
      const bool maximize = plan_.maximizes(std::get<0>(key));
      const auto device = bucket.p[0].device();
      std::optional<Tensor> scale, found_inf;
      if (factor_) scale = factor_->to(device, at::kFloat).reciprocal().reshape({});
      if (found_inf_) found_inf = found_inf_->to(device, at::kFloat).reshape({});
      switch (kind_) {
        case Class::Sgd: {
          const auto& o = static_cast<torch::optim::SGDOptions&>(options);
          bool first = o.momentum() != 0 && std::get<4>(key) == 0;
          // The device may skip this step, and then the next one is the first. From a buffer of zeros an ordinary step
          // gives the same as a first one (without dampening), so it is right in both cases.
          if (found_inf_) first = false;
          at::_fused_sgd_(bucket.p, bucket.g, bucket.a, o.weight_decay(), o.momentum(), o.lr(), o.dampening(),
                          o.nesterov(), maximize, first, scale, found_inf);
          break;
        }
        case Class::RmsProp:
          rmsprop_kernels(bucket, static_cast<torch::optim::RMSpropOptions&>(options), maximize);
          break;
        case Class::Own: break;  // has no buckets
        case Class::Adam:
        case Class::AdamW: {
          // The step count is filled in on the device, so nothing is copied from the host.
          auto done = at::full({}, static_cast<double>(std::get<4>(key) + 1), at::device(device).dtype(at::kFloat));
          if (plan_.ahead.skipped.defined()) done = done - plan_.ahead.skipped.to(device);
          const std::vector<Tensor> steps(bucket.p.size(), done);
          auto call = [&](auto fused, const auto& o) {
            fused(bucket.p, bucket.g, bucket.a, bucket.b, bucket.c, steps, o.lr(), std::get<0>(o.betas()),
                  std::get<1>(o.betas()), o.weight_decay(), o.eps(), o.amsgrad(), maximize, scale,
                  found_inf);
          };
          if (kind_ == Class::Adam)
            call([](auto&&... args) { at::_fused_adam_(args...); }, static_cast<torch::optim::AdamOptions&>(options));
          else
            call([](auto&&... args) { at::_fused_adamw_(args...); },
                 static_cast<torch::optim::AdamWOptions&>(options));
        }
      }
    }
    if (found_inf_ && (kind_ == Class::Adam || kind_ == Class::AdamW) && !plan_.buckets.empty()) {
      auto now = found_inf_->ne(0).to(at::kFloat).reshape({});
      plan_.ahead.skipped = plan_.ahead.skipped.defined() ? plan_.ahead.skipped + now : now;
      plan_.ahead.parameters = plan_.on_device;
    }
    // The buckets hold the gradients, which would outlive zero_grad.
    plan_.buckets.clear();
  }

  void rmsprop_kernels(Plan::Bucket& bucket, const torch::optim::RMSpropOptions& o, bool maximize) {
    std::vector<Tensor> g = bucket.g;
    if (factor_) {
      const auto factor = factor_->to(bucket.p[0].device()).reshape({});
      at::_foreach_mul_(g, factor);
    }
    if (maximize) g = at::_foreach_neg(g);
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
  const Class kind_;
  Plan& plan_;
  const Mode mode_;
  const Tensor* factor_;
  const Tensor* found_inf_;
  size_t group_ = 0;
  double host_factor_ = 1.;
};

}  // namespace

extern "C" {

int tig_plan_new(Plan** made, char** error) {
  return guarded(error, [&] { *made = new Plan; });
}
void tig_plan_free(Plan* plan) { delete plan; }

// Makes one step. The gradients count `factor` times, and nothing happens if `found_inf` is not 0; both are tensors
// of one element, or null. The gradients may be multiplied by `factor` in place. If one parameter makes the step
// impossible, `refused` names it (as tig_tensor_id does); otherwise `refused` is null.
int tig_step(Optimizer* optimizer, int kind, Plan* plan, int mode, const Tensor* factor, const Tensor* found_inf,
             const void** refused, char** error) {
  *refused = nullptr;
  return guarded(error, [&] {
    try {
      Step(*optimizer, abi::of<Class>(kind), *plan, abi::of<Mode>(mode), factor, found_inf).run();
    } catch (const Refused& why) {
      *refused = why.parameter;
      plan->decisions.clear();
      throw;
    }
  });
}

// Sets how the f16 and bf16 parameters of a group are stored; SIZE_MAX stands for groups that do not exist yet.
int tig_set_low_precision(Plan* plan, size_t group, int how, uint64_t seed, char** error) {
  return guarded(error, [&] {
    const tig::Storage storage{abi::of<abi::LowPrecision>(how), seed};
    if (group == SIZE_MAX) {
      plan->storage_others = storage;
      return;
    }
    if (plan->storages.size() <= group) plan->storages.resize(group + 1, plan->storage_others);
    plan->storages[group] = storage;
  });
}

// Gives the f32 value of a parameter that has the values `p` and this data (i64: none that counts), with the storage of
// its group.
int tig_low_precision_value(const Tensor* p, const Tensor* kept, Tensor** value, char** error) {
  return guarded(error, [&] {
    at::NoGradGuard no_grad;
    const auto type = kept->scalar_type();
    const auto how = type == at::kFloat  ? tig::LowPrecision::MasterWeights
                     : type == at::kLong ? tig::LowPrecision::StochasticRounding
                                         : tig::LowPrecision::KahanSum;
    *value = new Tensor(tig::low_precision_value(*p, {*kept, 0}, how));
  });
}

int tig_settle(Optimizer* optimizer, int kind, Plan* plan, char** error) {
  return guarded(error, [&] { settle(*optimizer, abi::of<Class>(kind), *plan); });
}

}  // extern "C"
