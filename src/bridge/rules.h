// How a step treats each class of optimizer, libtorch's four and ours: which state it needs, which update its options
// choose, and the numbers of that update.
#pragma once

#include <torch/optim.h>

#include <array>
#include <cmath>
#include <memory>

#include "one_pass.h"
#include "own.h"

namespace tig {

// The tensors of a parameter's state in the order of Task::s; null where the options need no tensor.
using StateTensors = std::array<const at::Tensor*, 3>;

struct SgdRules {
  using Options = torch::optim::SGDOptions;
  using State = torch::optim::SGDParamState;
  // Whether libtorch has kernels that step a list of parameters, and skip the step if they are told so on the device.
  static constexpr bool kernels = true, kernels_skip = true;
  static bool in_pass(const Options&) { return true; }
  // The count of the parameter's steps; null where there is none.
  static int64_t* steps(State&) { return nullptr; }
  // Whether parameters with the same count of steps share the numbers of a step.
  static bool shares_numbers(const Options&) { return true; }
  // Says why the loop would refuse a parameter, beside what every loop refuses; empty where it does not.
  static std::string refused(const at::Tensor&, const at::Tensor& g, const State* state, const Options& o) {
    const bool sparse_buffer = state && state->momentum_buffer().is_sparse();
    if (g.layout() == at::kStrided)
      return sparse_buffer ? "its gradient is dense, and its momentum buffer sparse" : "";
    if (!g.is_sparse()) return "its gradient has a layout that SGD does not support";
    if (o.weight_decay() != 0) return "SGD does not support sparse gradients with weight decay";
    if (o.momentum() != 0 && o.nesterov() && state && !sparse_buffer)
      return "SGD does not support sparse gradients with Nesterov momentum and a dense momentum buffer";
    return "";
  }

  static bool has_state(const Options& o) { return o.momentum() != 0; }

  static std::unique_ptr<State> make(const at::Tensor& p, const Options&) {
    auto state = std::make_unique<State>();
    state->momentum_buffer(at::zeros_like(p));
    return state;
  }

  static StateTensors tensors(const State& s, const Options&) { return {&s.momentum_buffer()}; }

  static Rule rule(const Options& o, bool first) {
    if (o.momentum() == 0) return Rule::Sgd;
    if (first) return o.nesterov() ? Rule::SgdFirstNesterov : Rule::SgdFirst;
    return o.nesterov() ? Rule::SgdNesterov : Rule::SgdMomentum;
  }

  static Numbers numbers(const Options& o, int64_t, torch::optim::OptimizerParamState*) {
    return {o.lr(), o.weight_decay(), o.momentum(), 1 - o.dampening()};
  }
};

template <typename O, typename S>
struct AdamRules {
  using Options = O;
  using State = S;
  static constexpr bool kernels = true, kernels_skip = true;
  static bool in_pass(const Options&) { return true; }
  static int64_t* steps(State& s) { return &s.step(); }
  static bool shares_numbers(const Options&) { return true; }
  static constexpr bool decoupled = std::is_same<O, torch::optim::AdamWOptions>::value;

  static std::string refused(const at::Tensor& p, const at::Tensor& g, const State*, const Options&) {
    // libtorch's class takes the square of the magnitude, PyTorch's those of both parts.
    if (p.is_complex()) return decoupled ? "AdamW does not support complex parameters" : "Adam does not support complex parameters";
    if (g.layout() == at::kStrided) return "";
    return decoupled ? "AdamW does not support sparse gradients" : "Adam does not support sparse gradients";
  }

  static bool has_state(const Options&) { return true; }

  static std::unique_ptr<State> make(const at::Tensor& p, const Options& o) {
    auto state = std::make_unique<State>();
    state->step(0);
    state->exp_avg(at::zeros_like(p));
    state->exp_avg_sq(at::zeros_like(p));
    if (o.amsgrad()) state->max_exp_avg_sq(at::zeros_like(p));
    return state;
  }

  static StateTensors tensors(const State& s, const Options& o) {
    return {&s.exp_avg(), &s.exp_avg_sq(), o.amsgrad() ? &s.max_exp_avg_sq() : nullptr};
  }

  static Rule rule(const Options& o, bool) {
    if (decoupled) return o.amsgrad() ? Rule::AdamWAmsgrad : Rule::AdamW;
    return o.amsgrad() ? Rule::AdamAmsgrad : Rule::Adam;
  }

  static Numbers numbers(const Options& o, int64_t steps, torch::optim::OptimizerParamState*) {
    const auto [beta1, beta2] = o.betas();
    const double correction1 = 1 - std::pow(beta1, steps), correction2 = 1 - std::pow(beta2, steps);
    const double decay = decoupled ? 1 - o.lr() * o.weight_decay() : o.weight_decay();
    return {o.lr() / correction1, decay, beta1, 1 - beta1, beta2, 1 - beta2, std::sqrt(correction2), o.eps()};
  }
};

struct RmsPropRules {
  using Options = torch::optim::RMSpropOptions;
  using State = torch::optim::RMSpropParamState;
  static constexpr bool kernels = true, kernels_skip = false;
  static bool in_pass(const Options&) { return true; }
  static int64_t* steps(State& s) { return &s.step(); }
  static bool shares_numbers(const Options&) { return true; }

  static std::string refused(const at::Tensor& p, const at::Tensor& g, const State*, const Options&) {
    if (p.is_complex()) return "RMSprop does not support complex parameters";
    return g.layout() == at::kStrided ? "" : "RMSprop does not support sparse gradients";
  }

  static bool has_state(const Options&) { return true; }

  static std::unique_ptr<State> make(const at::Tensor& p, const Options& o) {
    auto state = std::make_unique<State>();
    state->step(0);
    state->square_avg(at::zeros_like(p));
    if (o.momentum() > 0) state->momentum_buffer(at::zeros_like(p));
    if (o.centered()) state->grad_avg(at::zeros_like(p));
    return state;
  }

  static StateTensors tensors(const State& s, const Options& o) {
    return {&s.square_avg(), o.momentum() > 0 ? &s.momentum_buffer() : nullptr,
            o.centered() ? &s.grad_avg() : nullptr};
  }

  static Rule rule(const Options& o, bool) {
    const bool momentum = o.momentum() > 0;
    if (o.centered()) return momentum ? Rule::RmsPropCenteredMomentum : Rule::RmsPropCentered;
    return momentum ? Rule::RmsPropMomentum : Rule::RmsProp;
  }

  static Numbers numbers(const Options& o, int64_t, torch::optim::OptimizerParamState*) {
    return {o.lr(), o.weight_decay(), o.alpha(), 1 - o.alpha(), o.eps(), o.momentum()};
  }
};

// Our own optimizers. The options of each group name the algorithm.
struct OwnRules {
  using Options = OwnOptions;
  using State = OwnState;
  static constexpr bool kernels = false, kernels_skip = false;
  static bool in_pass(const Options& o) { return rule_of(o.algorithm).kernel != nullptr; }
  static int64_t* steps(State& s) { return &s.step; }
  static bool shares_numbers(const Options& o) { return rule_of(o.algorithm).numbers == 0; }

  static std::string refused(const at::Tensor& p, const at::Tensor& g, const State* state, const Options& o) {
    const OwnRule& rule = rule_of(o.algorithm);
    const std::string name = rule.name;
    if (p.is_complex()) return name + " does not support complex parameters";
    if (p.layout() != at::kStrided) return name + " does not support sparse parameters";
    if (g.layout() != at::kStrided && !(rule.sparse && g.is_sparse()))
      return name + " does not support " + (g.is_sparse() ? "sparse gradients" : "gradients of this layout");
    for (int i = 0; state && rule.shaped_like_parameter && i < rule.count(o); ++i)
      if (state->tensors[i].defined() && state->tensors[i].layout() != at::kStrided)
        return "the optimizer's state of it is sparse";
    return rule.refused(p, g, state, o);
  }

  static bool has_state(const Options&) { return true; }
  static std::unique_ptr<State> make(const at::Tensor& p, const Options& o) { return make_state(p, o); }

  // The tensors that are shaped like the parameter.
  static StateTensors tensors(const State& s, const Options& o) {
    const OwnRule& rule = rule_of(o.algorithm);
    StateTensors tensors{};
    for (int i = 0; rule.shaped_like_parameter && i < rule.count(o); ++i) tensors[i] = &s.tensors[i];
    return tensors;
  }

  static Rule rule(const Options& o, bool) { return rule_of(o.algorithm).kernel(o); }

  static Numbers numbers(const Options& o, int64_t steps, torch::optim::OptimizerParamState* state) {
    return rule_of(o.algorithm).prepare(o, steps, static_cast<State&>(*state));
  }
};

}  // namespace tig
