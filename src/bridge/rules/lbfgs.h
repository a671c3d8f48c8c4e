// LBFGS evaluates the loss several times in a step, and all parameters are one vector to it: so its steps are made in
// Rust (optim/lbfgs.rs), and a step by gradients alone is refused.
#pragma once

#include "../own.h"

namespace tig::rules {

struct Lbfgs : RuleDefaults {
  static constexpr const char* name = "LBFGS";
  static constexpr int tensors = 0;
  static constexpr bool counts = false;

  static std::string refused(const Tensor&, const Tensor&, const OwnState*, const OwnOptions&) {
    return "LBFGS evaluates the loss several times in a step, and needs a closure for that";
  }

  static Numbers prepare(const OwnOptions&, int64_t, OwnState&) { return {}; }
  static void loop(const Tensor&, const Tensor&, OwnState&, const Numbers&, const OwnOptions&) {}
};

}  // namespace tig::rules
