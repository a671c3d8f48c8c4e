// Averages of tensors that training changes: EMA and SWA, and the exchange of both.

#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_div.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_sub.h>

#include <memory>

#include "bridge.h"
#include "one_pass.h"

using at::Tensor;
using tig::Rule;

// An average and what it is of, for each pair; those the one pass cannot take are kept apart.
struct Pairs {
  std::vector<Tensor> averages, sources;
  std::vector<Tensor> other_averages, other_sources;
  tig::OnePass pass;
};

namespace {

// The numbers of the enum in average.rs.
enum Update : int {
  LERP = 0,  // average * (1 - number) + source * number
  MEAN = 1,  // average + (source - average) / number
  COPY = 2,
  SWAP = 3,
};

void update(Pairs& pairs, Update how, double number) {
  at::NoGradGuard no_grad;
  pairs.pass.clear();
  pairs.pass.add(tig::Numbers{how == LERP ? 1. - number : number, number});  // of all tasks
  pairs.other_averages.clear();
  pairs.other_sources.clear();
  for (size_t i = 0; i < pairs.averages.size(); ++i) {
    const Tensor &average = pairs.averages[i], &source = pairs.sources[i];
    const bool own = tig::is_plain_cpu(average) && tig::is_alike(average, source);
    if (how == SWAP && !own) {
      const Tensor kept = average.clone();
      average.copy_(source);
      source.copy_(kept);
    } else if (how == COPY || (how != SWAP && !average.is_floating_point() && !average.is_complex())) {
      // Integers count something: they are not averaged, but taken over.
      average.copy_(source);
    } else if (own) {
      tig::Task task{};
      task.p = average.mutable_data_ptr();
      task.n = average.numel();
      task.dtype = average.scalar_type();
      if (how == SWAP) {
        task.s[0] = source.mutable_data_ptr();
        task.rule = Rule::Swap;
        source.unsafeGetTensorImpl()->bump_version();
      } else {
        task.g = source.const_data_ptr();
        task.rule = how == LERP ? Rule::Lerp : Rule::Mean;
      }
      average.unsafeGetTensorImpl()->bump_version();
      pairs.pass.add(task);
    } else {
      pairs.other_averages.push_back(average);
      pairs.other_sources.push_back(source);
    }
  }
  pairs.pass.update();
  if (pairs.other_averages.empty()) return;
  if (how == LERP) {
    at::_foreach_mul_(pairs.other_averages, 1. - number);
    at::_foreach_add_(pairs.other_averages, pairs.other_sources, number);
  } else {
    auto difference = at::_foreach_sub(pairs.other_sources, pairs.other_averages);
    at::_foreach_div_(difference, number);
    at::_foreach_add_(pairs.other_averages, difference);
  }
}

}  // namespace

extern "C" {

// Shares the tensors.
int tig_pairs_new(const Tensor* const* averages, const Tensor* const* sources, size_t count, Pairs** made,
                  char** error) {
  return guarded(error, [&] {
    auto pairs = std::make_unique<Pairs>();
    for (size_t i = 0; i < count; ++i) {
      pairs->averages.push_back(*averages[i]);
      pairs->sources.push_back(*sources[i]);
    }
    *made = pairs.release();
  });
}

void tig_pairs_free(Pairs* pairs) { delete pairs; }

int tig_pairs_update(Pairs* pairs, int how, double number, char** error) {
  return guarded(error, [&] { update(*pairs, static_cast<Update>(how), number); });
}

}  // extern "C"
