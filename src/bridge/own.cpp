#include "own.h"

#include "rules/all.h"

namespace tig {
namespace {

using Kernel = Rule (*)(const OwnOptions&);

template <typename R>
OwnRule rule_with(Kernel kernel) {
  return {R::name,   R::tensors,                R::last_for, R::kept, R::numbers, R::advance,
          R::counts, R::shaped_like_parameter, R::sparse,   kernel,  R::begin,   R::refused,
          R::prepare, R::loop};
}

// The kernel of an algorithm; null where there is none.
Kernel kernel_of(Algorithm algorithm) {
#define TIG_KERNEL_CASE(NAME) \
  case Algorithm::NAME: return [](const OwnOptions&) { return Rule::NAME; };
  switch (algorithm) {
    TIG_OWN_KERNELS(TIG_KERNEL_CASE)
    case Algorithm::AdamW: return rules::AdamW::kernel;
    default: return nullptr;
  }
#undef TIG_KERNEL_CASE
}

}  // namespace

const OwnRule& rule_of(Algorithm algorithm) {
#define TIG_RULE_CASE(NAME)                                                            \
  case Algorithm::NAME: {                                                              \
    static const OwnRule rule = rule_with<rules::NAME>(kernel_of(Algorithm::NAME));    \
    return rule;                                                                       \
  }
  switch (algorithm) {
    TIG_OWN_RULES(TIG_RULE_CASE)
    default: unknown("rule for algorithm", static_cast<int>(algorithm));
  }
#undef TIG_RULE_CASE
}

std::unique_ptr<OwnState> make_state(const Tensor& p, const OwnOptions& options) {
  const OwnRule& rule = rule_of(options.algorithm);
  auto state = std::make_unique<OwnState>();
  if (rule.shaped_like_parameter)
    for (int i = 0; i < rule.count(options); ++i) state->tensors[i] = at::zeros_like(p);
  rule.begin(*state, p, options);
  return state;
}

Tensor OwnOptimizer::step(LossClosure closure) {
  Tensor loss;
  if (closure) {
    at::AutoGradMode with_grad(true);
    loss = closure();
  }
  at::NoGradGuard no_grad;
  for (auto& group : param_groups_) {
    const auto& options = static_cast<const OwnOptions&>(group.options());
    const OwnRule& rule = rule_of(options.algorithm);
    for (const Tensor& p : group.params()) {
      if (!p.grad().defined()) continue;
      auto& kept = state_[p.unsafeGetTensorImpl()];
      if (!kept) kept = make_state(p, options);
      auto& state = static_cast<OwnState&>(*kept);
      const Numbers k = rule.prepare(options, ++state.step, state);
      rule.loop(p, options.on(Hyper::Maximize) ? p.grad().neg() : p.grad(), state, k, options);
    }
  }
  return loss;
}

}  // namespace tig
