// Access to the parts of libtorch's optimizers that tch hides: options, groups, parameters, state. A function with an
// `error` argument catches all exceptions: it returns 0, or non-zero with a message in *error that the caller frees
// with tig_free.

#include "bridge.h"
#include "own.h"
#include "plan.h"

#include <algorithm>
#include <memory>
#include <unordered_set>

using abi::Class;
using abi::Hyper;
using torch::Tensor;
using torch::optim::Optimizer;
using torch::optim::OptimizerOptions;

namespace {

[[noreturn]] void no_option() { throw std::invalid_argument("this optimizer has no such option"); }

// Calls f(options) with the options cast to their own type. Rust passes the `kind` that tig_kind gave, so the casts
// are right.
template <typename F>
void with_options(int kind, OptimizerOptions& options, F&& f) {
  switch (abi::of<Class>(kind)) {
    case Class::Sgd: return f(static_cast<torch::optim::SGDOptions&>(options));
    case Class::Adam: return f(static_cast<torch::optim::AdamOptions&>(options));
    case Class::AdamW: return f(static_cast<torch::optim::AdamWOptions&>(options));
    case Class::RmsProp: return f(static_cast<torch::optim::RMSpropOptions&>(options));
    case Class::Own: no_option();
  }
}

template <typename T> struct is_sgd : std::is_same<T, torch::optim::SGDOptions> {};
template <typename T> struct is_rmsprop : std::is_same<T, torch::optim::RMSpropOptions> {};

// Calls f(getter, setter) for the option with that number; throws if this optimizer has no such option.
template <typename O, typename F>
void with_option(O& o, Hyper option, F&& f) {
  switch (option) {
    case Hyper::Lr: return f([&] { return o.lr(); }, [&](double v) { o.lr(v); });
    case Hyper::WeightDecay: return f([&] { return o.weight_decay(); }, [&](double v) { o.weight_decay(v); });
    default: break;
  }
  if constexpr (is_sgd<O>::value) {
    switch (option) {
      case Hyper::Momentum: return f([&] { return o.momentum(); }, [&](double v) { o.momentum(v); });
      case Hyper::Dampening: return f([&] { return o.dampening(); }, [&](double v) { o.dampening(v); });
      case Hyper::Nesterov: return f([&] { return o.nesterov() ? 1. : 0.; }, [&](double v) { o.nesterov(v != 0.); });
      default: no_option();
    }
  } else if constexpr (is_rmsprop<O>::value) {
    switch (option) {
      case Hyper::Momentum: return f([&] { return o.momentum(); }, [&](double v) { o.momentum(v); });
      case Hyper::Eps: return f([&] { return o.eps(); }, [&](double v) { o.eps(v); });
      case Hyper::Alpha: return f([&] { return o.alpha(); }, [&](double v) { o.alpha(v); });
      case Hyper::Centered: return f([&] { return o.centered() ? 1. : 0.; }, [&](double v) { o.centered(v != 0.); });
      default: no_option();
    }
  } else {
    switch (option) {
      case Hyper::Beta1:
        return f([&] { return std::get<0>(o.betas()); }, [&](double v) { std::get<0>(o.betas()) = v; });
      case Hyper::Beta2:
        return f([&] { return std::get<1>(o.betas()); }, [&](double v) { std::get<1>(o.betas()) = v; });
      case Hyper::Eps: return f([&] { return o.eps(); }, [&](double v) { o.eps(v); });
      case Hyper::Amsgrad: return f([&] { return o.amsgrad() ? 1. : 0.; }, [&](double v) { o.amsgrad(v != 0.); });
      default: no_option();
    }
  }
}

template <typename S>
const S* state_of(Optimizer* optimizer, const Tensor* parameter) {
  auto& all = optimizer->state();
  auto found = all.find(parameter->unsafeGetTensorImpl());
  return found == all.end() ? nullptr : static_cast<const S*>(found->second.get());
}

constexpr size_t DEFAULTS = SIZE_MAX;

Tensor* copy(const Tensor& tensor) { return tensor.defined() ? new Tensor(tensor) : nullptr; }

// The rule by which one of our own optimizers steps a parameter.
const tig::OwnRule& own_rule(Optimizer* optimizer, const Tensor* parameter) {
  const auto algorithm_of = [](const OptimizerOptions& options) {
    return static_cast<const tig::OwnOptions&>(options).algorithm;
  };
  const auto& groups = optimizer->param_groups();
  const Algorithm most = algorithm_of(optimizer->defaults());
  for (const auto& group : groups) {
    if (algorithm_of(group.options()) == most) continue;
    for (const Tensor& p : group.params())
      if (p.is_same(*parameter)) return tig::rule_of(algorithm_of(group.options()));
  }
  return tig::rule_of(most);
}

}  // namespace

extern "C" {

// Lists the enums of abi.h and their numbers, one in a line.
const char* tig_numbers() {
#define TIG_LINE(NAME, NUMBER) #NAME " = " #NUMBER "\n"
#define TIG_LINES(ENUM, LIST, WHAT) "enum " #ENUM "\n" LIST(TIG_LINE)
  return TIG_ALL_NUMBERS(TIG_LINES);
}

void tig_free(char* text) { free(text); }

// Gives the class of an optimizer (an abi::Class), and its algorithm.
int tig_kind(Optimizer* optimizer, int* kind, int* algorithm, char** error) {
  return guarded(error, [&] {
    const auto give = [&](Class known, Algorithm named) {
      *kind = static_cast<int>(known);
      *algorithm = static_cast<int>(named);
    };
    if (dynamic_cast<torch::optim::SGD*>(optimizer)) give(Class::Sgd, Algorithm::Sgd);
    else if (dynamic_cast<torch::optim::Adam*>(optimizer)) give(Class::Adam, Algorithm::Adam);
    else if (dynamic_cast<torch::optim::AdamW*>(optimizer)) give(Class::AdamW, Algorithm::AdamW);
    else if (dynamic_cast<torch::optim::RMSprop*>(optimizer)) give(Class::RmsProp, Algorithm::RmsProp);
    else if (dynamic_cast<tig::OwnOptimizer*>(optimizer))
      give(Class::Own, static_cast<const tig::OwnOptions&>(optimizer->defaults()).algorithm);
    else throw std::invalid_argument("only optimizers of tch and of this crate are known");
  });
}

// Makes an optimizer of our own with `count` hyper-parameters.
int tig_own_new(int algorithm, const int* hypers, const double* values, size_t count, Optimizer** made, char** error) {
  return guarded(error, [&] {
    tig::OwnOptions options;
    options.algorithm = abi::of<Algorithm>(algorithm);
    tig::rule_of(options.algorithm);  // throws if there is none
    for (size_t i = 0; i < count; ++i) options[abi::of<Hyper>(hypers[i])] = values[i];
    *made = new tig::OwnOptimizer(options);
  });
}

// Gives a group of one of our own optimizers an algorithm, with all its `count` hyper-parameters.
int tig_set_algorithm(Optimizer* optimizer, int kind, size_t group, int algorithm, const int* hypers,
                      const double* values, size_t count, char** error) {
  return guarded(error, [&] {
    if (abi::of<Class>(kind) != Class::Own) throw std::invalid_argument("this class has one algorithm");
    auto options = std::make_unique<tig::OwnOptions>();
    options->algorithm = abi::of<Algorithm>(algorithm);
    tig::rule_of(options->algorithm);  // throws if there is none
    for (size_t i = 0; i < count; ++i) (*options)[abi::of<Hyper>(hypers[i])] = values[i];
    optimizer->param_groups().at(group).set_options(std::move(options));
  });
}

size_t tig_group_count(Optimizer* optimizer) { return optimizer->param_groups().size(); }

// New groups start as copies of the optimizer's defaults, as in tch.
int tig_reserve_groups(Optimizer* optimizer, size_t count, char** error) {
  return guarded(error, [&] {
    auto& groups = optimizer->param_groups();
    while (groups.size() < count) groups.emplace_back(std::vector<Tensor>{}, optimizer->defaults().clone());
  });
}

int tig_get(Optimizer* optimizer, int kind, const Plan* plan, size_t group, int option, double* value, char** error) {
  return guarded(error, [&] {
    const Hyper hyper = abi::of<Hyper>(option);
    auto& options = optimizer->param_groups().at(group).options();
    if (abi::of<Class>(kind) == Class::Own) *value = static_cast<const tig::OwnOptions&>(options)[hyper];
    else if (hyper == Hyper::Maximize) *value = plan->maximizes(group) ? 1. : 0.;
    else
      with_options(kind, options, [&](auto& options) {
        with_option(options, hyper, [&](auto get, auto) { *value = get(); });
      });
  });
}

// `group` may be DEFAULTS: groups that do not exist yet.
int tig_set(Optimizer* optimizer, int kind, Plan* plan, size_t group, int option, double value, char** error) {
  return guarded(error, [&] {
    const Hyper hyper = abi::of<Hyper>(option);
    const Class known = abi::of<Class>(kind);
    auto& groups = optimizer->param_groups();
    auto& options = group == DEFAULTS ? optimizer->defaults() : groups.at(group).options();
    // Schedules set the learning rate all the time, and all classes have it.
    if (hyper == Hyper::Lr) options.set_lr(value);
    else if (known == Class::Own) static_cast<tig::OwnOptions&>(options)[hyper] = value;
    else if (hyper == Hyper::Maximize) {
      plan->maximize.resize(std::max(plan->maximize.size(), groups.size()), plan->maximize_others);
      if (group == DEFAULTS) plan->maximize_others = value != 0;
      else plan->maximize[group] = value != 0;
    } else
      with_options(kind, options, [&](auto& options) {
        with_option(options, hyper, [&](auto, auto set) { set(value); });
      });
  });
}

int tig_parameter_count(Optimizer* optimizer, size_t group, size_t* count, char** error) {
  return guarded(error, [&] { *count = optimizer->param_groups().at(group).params().size(); });
}

// `parameters` has room for tig_parameter_count entries.
int tig_parameters(Optimizer* optimizer, size_t group, Tensor** parameters, char** error) {
  return guarded(error, [&] {
    for (const auto& parameter : optimizer->param_groups().at(group).params()) *parameters++ = new Tensor(parameter);
  });
}

// A tensor that was added more than once stays where it was added first: it is one parameter.
int tig_remove_repeated(Optimizer* optimizer, char** error) {
  return guarded(error, [&] {
    std::unordered_set<const void*> seen;
    for (auto& group : optimizer->param_groups()) {
      auto& all = group.params();
      const auto repeated = [&](const Tensor& p) { return !seen.insert(p.unsafeGetTensorImpl()).second; };
      all.erase(std::remove_if(all.begin(), all.end(), repeated), all.end());
    }
  });
}

// Prints a warning through libtorch's warning handler.
int tig_warn(const char* text, char** error) {
  return guarded(error, [&] { TORCH_WARN(text); });
}

const void* tig_tensor_id(const Tensor* tensor) { return tensor->unsafeGetTensorImpl(); }

// Sets all gradients to none. The optimizer's own zero_grad is not called, because it detaches each gradient first,
// and a gradient that is a view of a DDP bucket cannot be detached.
int tig_zero_grad(Optimizer* optimizer, char** error) {
  return guarded(error, [&] {
    for (auto& group : optimizer->param_groups())
      for (Tensor& parameter : group.params()) parameter.mutable_grad().reset();
  });
}

// Gives the state of one parameter: up to three tensors (null where there is none), the data that its storage of low
// precision keeps (master weights, compensation, or the number of random numbers as i64), and the number of steps (-1
// where libtorch's class does not count). Numbers of our own optimizers are copied to tensors of one element, which stand
// after the others. `found` is 0 before the parameter's first step.
int tig_state(Optimizer* optimizer, int kind, Plan* plan, const Tensor* parameter, int* found, int64_t* step,
              Tensor** tensors, Tensor** kept, char** error) {
  return guarded(error, [&] {
    *found = 0;
    *step = -1;
    tensors[0] = tensors[1] = tensors[2] = *kept = nullptr;
    if (const tig::Kept* own = plan->kept_of(*parameter)) {
      *found = 1;
      *kept = copy(own->tensor.defined() ? own->tensor : at::full({}, own->stream, at::kLong));
    }
    auto adam = [&](auto s) {
      if (!s) return;
      *found = 1;
      *step = s->step();
      tensors[0] = copy(s->exp_avg());
      tensors[1] = copy(s->exp_avg_sq());
      tensors[2] = copy(s->max_exp_avg_sq());
    };
    switch (abi::of<Class>(kind)) {
      case Class::Sgd:
        if (auto s = state_of<torch::optim::SGDParamState>(optimizer, parameter)) {
          *found = 1;
          tensors[0] = copy(s->momentum_buffer());
        }
        break;
      case Class::RmsProp:
        if (auto s = state_of<torch::optim::RMSpropParamState>(optimizer, parameter)) {
          *found = 1;
          *step = s->step();
          tensors[0] = copy(s->square_avg());
          tensors[1] = copy(s->momentum_buffer());
          tensors[2] = copy(s->grad_avg());
        }
        break;
      case Class::Own:
        if (auto s = state_of<tig::OwnState>(optimizer, parameter)) {
          const auto& rule = own_rule(optimizer, parameter);
          *found = 1;
          if (rule.counts) *step = s->step;
          const int all = rule.tensors + rule.kept;
          for (int i = 0; i < all; ++i) tensors[i] = copy(s->tensors[i]);
          for (int i = 0; i < rule.numbers; ++i) tensors[all + i] = copy(at::full({}, s->numbers[i], at::kFloat));
        }
        break;
      case Class::Adam: return adam(state_of<torch::optim::AdamParamState>(optimizer, parameter));
      case Class::AdamW: return adam(state_of<torch::optim::AdamWParamState>(optimizer, parameter));
    }
  });
}

// Sets the state of one parameter, in the form that tig_state gives. The tensors are shared, not copied.
int tig_set_state(Optimizer* optimizer, int kind, Plan* plan, const Tensor* parameter, int64_t step,
                  Tensor* const* tensors, const Tensor* kept, char** error) {
  return guarded(error, [&] {
    if (!kept) plan->kept.erase(parameter->unsafeGetTensorImpl());
    else if (kept->scalar_type() == at::kLong) plan->kept[parameter->unsafeGetTensorImpl()] = {{}, kept->item<int64_t>()};
    else plan->kept[parameter->unsafeGetTensorImpl()] = {*kept, 0};
    auto tensor = [&](int index) { return tensors[index] ? *tensors[index] : Tensor(); };
    auto set = [&](auto state) { optimizer->state()[parameter->unsafeGetTensorImpl()] = std::move(state); };
    auto adam = [&](auto s) {
      s->step(step);
      s->exp_avg(tensor(0));
      s->exp_avg_sq(tensor(1));
      s->max_exp_avg_sq(tensor(2));
      set(std::move(s));
    };
    switch (abi::of<Class>(kind)) {
      case Class::Sgd: {
        // SGD has no state before its first step with momentum.
        if (!tensors[0]) {
          optimizer->state().erase(parameter->unsafeGetTensorImpl());
          return;
        }
        auto s = std::make_unique<torch::optim::SGDParamState>();
        s->momentum_buffer(tensor(0));
        return set(std::move(s));
      }
      case Class::RmsProp: {
        auto s = std::make_unique<torch::optim::RMSpropParamState>();
        s->step(step);
        s->square_avg(tensor(0));
        s->momentum_buffer(tensor(1));
        s->grad_avg(tensor(2));
        return set(std::move(s));
      }
      case Class::Own: {
        const auto& rule = own_rule(optimizer, parameter);
        auto s = std::make_unique<tig::OwnState>();
        s->step = std::max<int64_t>(step, 0);
        const int all = rule.tensors + rule.kept;
        for (int i = 0; i < all; ++i) s->tensors[i] = tensor(i);
        for (int i = 0; i < rule.numbers; ++i) s->numbers[i] = tensor(all + i).item<float>();
        return set(std::move(s));
      }
      case Class::Adam: return adam(std::make_unique<torch::optim::AdamParamState>());
      case Class::AdamW: return adam(std::make_unique<torch::optim::AdamWParamState>());
    }
  });
}

// Removes the state of one parameter, as if the parameter had never been stepped.
int tig_clear_state(Optimizer* optimizer, Plan* plan, const Tensor* parameter, char** error) {
  return guarded(error, [&] {
    optimizer->state().erase(parameter->unsafeGetTensorImpl());
    plan->kept.erase(parameter->unsafeGetTensorImpl());
  });
}

// Sets the gradient of a parameter; null removes it. The tensor is shared, not copied.
int tig_set_gradient(const Tensor* parameter, const Tensor* gradient, char** error) {
  return guarded(error, [&] { parameter->mutable_grad() = gradient ? *gradient : Tensor(); });
}

// Makes a copy in pinned memory. tch's `pin_memory` passes a device, and libtorch warns about that.
int tig_pin_memory(const Tensor* tensor, Tensor** pinned, char** error) {
  return guarded(error, [&] { *pinned = new Tensor(tensor->pin_memory()); });
}

}  // extern "C"
