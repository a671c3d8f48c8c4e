// Access to the parts of libtorch's optimizers that tch hides: options, groups, parameters, state. A function with an
// `error` argument catches all exceptions: it returns 0, or non-zero with a message in *error that the caller frees
// with tig_free.

#include "bridge.h"

#include <algorithm>
#include <memory>
#include <unordered_set>

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
  switch (abi::of<Algorithm>(kind)) {
    case Algorithm::Sgd: return f(static_cast<torch::optim::SGDOptions&>(options));
    case Algorithm::Adam: return f(static_cast<torch::optim::AdamOptions&>(options));
    case Algorithm::AdamW: return f(static_cast<torch::optim::AdamWOptions&>(options));
    case Algorithm::RmsProp: return f(static_cast<torch::optim::RMSpropOptions&>(options));
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

Tensor* copy(const Tensor& tensor) { return tensor.defined() ? new Tensor(tensor) : nullptr; }

}  // namespace

extern "C" {

// Lists the enums of abi.h and their numbers, one in a line.
const char* tig_numbers() {
#define TIG_LINE(NAME, NUMBER) #NAME " = " #NUMBER "\n"
#define TIG_LINES(ENUM, LIST, WHAT) "enum " #ENUM "\n" LIST(TIG_LINE)
  return TIG_ALL_NUMBERS(TIG_LINES);
}

void tig_free(char* text) { free(text); }

int tig_kind(Optimizer* optimizer, int* kind, char** error) {
  return guarded(error, [&] {
    const auto give = [&](Algorithm algorithm) { *kind = static_cast<int>(algorithm); };
    if (dynamic_cast<torch::optim::SGD*>(optimizer)) give(Algorithm::Sgd);
    else if (dynamic_cast<torch::optim::Adam*>(optimizer)) give(Algorithm::Adam);
    else if (dynamic_cast<torch::optim::AdamW*>(optimizer)) give(Algorithm::AdamW);
    else if (dynamic_cast<torch::optim::RMSprop*>(optimizer)) give(Algorithm::RmsProp);
    else throw std::invalid_argument("only SGD, Adam, AdamW and RMSprop are known");
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

int tig_get(Optimizer* optimizer, int kind, size_t group, int option, double* value, char** error) {
  return guarded(error, [&] {
    with_options(kind, optimizer->param_groups().at(group).options(), [&](auto& options) {
      with_option(options, abi::of<Hyper>(option), [&](auto get, auto) { *value = get(); });
    });
  });
}

int tig_set(Optimizer* optimizer, int kind, size_t group, int option, double value, char** error) {
  return guarded(error, [&] {
    with_options(kind, optimizer->param_groups().at(group).options(), [&](auto& options) {
      with_option(options, abi::of<Hyper>(option), [&](auto, auto set) { set(value); });
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

// Gives the state of one parameter: up to three tensors (null where there is none) and the number of steps (-1 where
// the optimizer does not count). `found` is 0 before the parameter's first step.
int tig_state(Optimizer* optimizer, int kind, const Tensor* parameter, int* found, int64_t* step, Tensor** tensors,
              char** error) {
  return guarded(error, [&] {
    *found = 0;
    *step = -1;
    tensors[0] = tensors[1] = tensors[2] = nullptr;
    auto adam = [&](auto s) {
      if (!s) return;
      *found = 1;
      *step = s->step();
      tensors[0] = copy(s->exp_avg());
      tensors[1] = copy(s->exp_avg_sq());
      tensors[2] = copy(s->max_exp_avg_sq());
    };
    switch (abi::of<Algorithm>(kind)) {
      case Algorithm::Sgd:
        if (auto s = state_of<torch::optim::SGDParamState>(optimizer, parameter)) {
          *found = 1;
          tensors[0] = copy(s->momentum_buffer());
        }
        break;
      case Algorithm::RmsProp:
        if (auto s = state_of<torch::optim::RMSpropParamState>(optimizer, parameter)) {
          *found = 1;
          *step = s->step();
          tensors[0] = copy(s->square_avg());
          tensors[1] = copy(s->momentum_buffer());
          tensors[2] = copy(s->grad_avg());
        }
        break;
      case Algorithm::Adam: return adam(state_of<torch::optim::AdamParamState>(optimizer, parameter));
      case Algorithm::AdamW: return adam(state_of<torch::optim::AdamWParamState>(optimizer, parameter));
    }
  });
}

// Sets the state of one parameter, in the form that tig_state gives. The tensors are shared, not copied.
int tig_set_state(Optimizer* optimizer, int kind, const Tensor* parameter, int64_t step, Tensor* const* tensors,
                  char** error) {
  return guarded(error, [&] {
    auto tensor = [&](int index) { return tensors[index] ? *tensors[index] : Tensor(); };
    auto set = [&](auto state) { optimizer->state()[parameter->unsafeGetTensorImpl()] = std::move(state); };
    auto adam = [&](auto s) {
      s->step(step);
      s->exp_avg(tensor(0));
      s->exp_avg_sq(tensor(1));
      s->max_exp_avg_sq(tensor(2));
      set(std::move(s));
    };
    switch (abi::of<Algorithm>(kind)) {
      case Algorithm::Sgd: {
        auto s = std::make_unique<torch::optim::SGDParamState>();
        s->momentum_buffer(tensor(0));
        return set(std::move(s));
      }
      case Algorithm::RmsProp: {
        auto s = std::make_unique<torch::optim::RMSpropParamState>();
        s->step(step);
        s->square_avg(tensor(0));
        s->momentum_buffer(tensor(1));
        s->grad_avg(tensor(2));
        return set(std::move(s));
      }
      case Algorithm::Adam: return adam(std::make_unique<torch::optim::AdamParamState>());
      case Algorithm::AdamW: return adam(std::make_unique<torch::optim::AdamWParamState>());
    }
  });
}

// Removes the state of one parameter, as if the parameter had never been stepped.
int tig_clear_state(Optimizer* optimizer, const Tensor* parameter, char** error) {
  return guarded(error, [&] { optimizer->state().erase(parameter->unsafeGetTensorImpl()); });
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
