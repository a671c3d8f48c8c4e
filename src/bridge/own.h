// Optimizers that libtorch does not have, as subclasses of its Optimizer, so that tch can own them. There is one class
// for all of them: the options of a group name its algorithm, and the rule of that algorithm (rules/) does the rest.
#pragma once

#include <torch/optim.h>

#include <array>
#include <memory>
#include <string>

#include "abi.h"
#include "one_pass.h"

namespace tig {

using abi::Algorithm;
using abi::Hyper;
using at::Tensor;

// Options of a group.
struct OwnOptions : torch::optim::OptimizerOptions {
#define TIG_COUNT(NAME, NUMBER) +1
  static constexpr size_t COUNT = 0 TIG_HYPERS(TIG_COUNT);
#undef TIG_COUNT

  Algorithm algorithm;
  std::array<double, COUNT> values{};  // by the numbers of Hyper; 0 for those that the algorithm does not have

  double& operator[](Hyper hyper) { return values[static_cast<size_t>(hyper)]; }
  double operator[](Hyper hyper) const { return values[static_cast<size_t>(hyper)]; }
  bool on(Hyper hyper) const { return (*this)[hyper] != 0; }
  double weight_decay() const { return (*this)[Hyper::WeightDecay]; }

  std::unique_ptr<OptimizerOptions> clone() const override { return std::make_unique<OwnOptions>(*this); }
  double get_lr() const override { return (*this)[Hyper::Lr]; }
  void set_lr(const double lr) override { (*this)[Hyper::Lr] = lr; }
};

// State of a parameter.
struct OwnState : torch::optim::OptimizerParamState {
  int64_t step = 0;
  std::array<Tensor, 3> tensors;  // as many as the rule has, and those that it keeps
  // Numbers that torch keeps as tensors of one f32 element.
  std::array<float, 2> numbers{};

  std::unique_ptr<OptimizerParamState> clone() const override { return std::make_unique<OwnState>(*this); }
};

// A rule is a class with the members below, and the defaults that stand here.
//   name       torch's name of the optimizer
//   tensors    how many tensors a parameter's state has
//   prepare    the numbers `k` of one step, whose count is `step`; may change the state's `numbers`
//   loop       the step of one parameter by operations of libtorch, on any device
//   element    for element-wise rules: the same for one element, with its gradient `d` and its state `s`
struct RuleDefaults {
  // How many `numbers` a parameter's state has. If it has some, parameters do not share `k`.
  static constexpr int numbers = 0;

  // The hyper-parameter that is not 0 while the state has its last tensor; Lr if it always has.
  static constexpr Hyper last_for = Hyper::Lr;

  // How many tensors the state has behind these that no step needs.
  static constexpr int kept = 0;

  // Counts a step in the options of a group, before any of its parameters is stepped; null where nothing is counted.
  static constexpr void (*advance)(OwnOptions&) = nullptr;

  // Whether the count of steps is a part of the state.
  static constexpr bool counts = true;

  // The state before the first step; the tensors are zeros already, if they are shaped like the parameter.
  static constexpr bool shaped_like_parameter = true;
  static void begin(OwnState&, const Tensor&, const OwnOptions&) {}

  // Says why a parameter cannot be stepped, beside what is wrong for all rules; empty if nothing is wrong.
  static constexpr bool sparse = false;
  static std::string refused(const Tensor&, const Tensor&, const OwnState*, const OwnOptions&) { return {}; }
};

// A rule as a value.
struct OwnRule {
  const char* name;
  int tensors;
  Hyper last_for;
  int kept;
  int numbers;
  void (*advance)(OwnOptions&);  // null where a group counts nothing
  bool counts;
  bool shaped_like_parameter;
  bool sparse;  // whether it takes sparse gradients
  Rule (*kernel)(const OwnOptions&);  // null where it has none
  void (*begin)(OwnState&, const Tensor& p, const OwnOptions&);
  std::string (*refused)(const Tensor& p, const Tensor& g, const OwnState*, const OwnOptions&);
  Numbers (*prepare)(const OwnOptions&, int64_t step, OwnState&);
  void (*loop)(const Tensor& p, const Tensor& g, OwnState&, const Numbers& k, const OwnOptions&);

  // How many tensors a parameter's state has with these options.
  int count(const OwnOptions& o) const { return tensors - (last_for != Hyper::Lr && !o.on(last_for) ? 1 : 0); }
};

// The rule of an algorithm; throws for those that are libtorch's own.
const OwnRule& rule_of(Algorithm algorithm);

std::unique_ptr<OwnState> make_state(const Tensor& p, const OwnOptions& options);

class OwnOptimizer : public torch::optim::Optimizer {
 public:
  explicit OwnOptimizer(const OwnOptions& options)
      : Optimizer(std::vector<Tensor>{}, std::make_unique<OwnOptions>(options)) {}

  // Steps all parameters that have a gradient, one after the other.
  Tensor step(LossClosure closure = nullptr) override;
};

// The gradient with weight decay, which adds a multiple of the parameter to it.
inline Tensor with_decay(const Tensor& g, const Tensor& p, double decay) { return decay != 0 ? g.add(p, decay) : g; }

}  // namespace tig
