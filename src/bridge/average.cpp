// Averages of the tensors that training changes (EMA and SWA), and the exchange of averages and tensors.

#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_div.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_sub.h>

#include <map>
#include <memory>
#include <utility>

#include "bridge.h"
#include "one_pass.h"

using at::Tensor;
using abi::Update;
using tig::Rule;

// Pairs of an average and the tensor that it averages (its source). `other_*` are lists, filled anew at each update, of
// the pairs that the one pass cannot handle. `kept` holds, while a pair of different types is swapped, the values of
// both from before, because each is rounded in the other.
struct Pairs {
  std::vector<Tensor> averages, sources;
  std::vector<Tensor> other_averages, other_sources;
  std::map<size_t, std::pair<Tensor, Tensor>> kept;
  tig::OnePass pass;
};

namespace {

// Whether an update copies the source. Integers count something, such as batches, so they are copied, not averaged.
bool is_copied(const Tensor& average, Update how) {
  return how == Update::Copy || (!average.is_floating_point() && !average.is_complex());
}

// Throws if a pair does not fit, before the first pair is changed.
void check(const Pairs& pairs, Update how) {
  for (size_t i = 0; i < pairs.averages.size(); ++i) {
    const Tensor &average = pairs.averages[i], &source = pairs.sources[i];
    TORCH_CHECK(average.sizes() == source.sizes(), "variable ", i, " has size ", source.sizes(),
                " now, and its average ", average.sizes());
    TORCH_CHECK(average.is_complex() || !source.is_complex(), "variable ", i,
                " is complex now, and its average is not");
    TORCH_CHECK(average.layout() == source.layout(), "variable ", i, " has layout ", source.layout(),
                " now, and its average ", average.layout());
    if (how == Update::Swap || how == Update::SwapBack || is_copied(average, how)) continue;
    TORCH_CHECK(average.device() == source.device(), "variable ", i, " is on ", source.device(),
                " now, and its average on ", average.device());
    TORCH_CHECK(source.scalar_type() != at::kBool, "variable ", i, " is of type bool now, and its average is not");
  }
}

// The values of a tensor after it was swapped in and out: those from before, but where `now`, which had them in another
// type, has been changed since.
Tensor back(const Tensor& before, const Tensor& now) {
  const auto like_now = now.eq(before.to(now.options()));
  return at::where(like_now.to(before.device()), before, now.to(before.options()));
}

void exchange(Pairs& pairs, size_t i, bool back_again) {
  const Tensor &average = pairs.averages[i], &source = pairs.sources[i];
  Tensor for_source = average.clone(), for_average = source;
  if (average.scalar_type() != source.scalar_type()) {
    const auto before = pairs.kept.find(i);
    if (!back_again) {
      for_average = source.clone();
      pairs.kept[i] = {for_source, for_average};
    } else if (before != pairs.kept.end()) {
      for_average = back(before->second.first, source);
      for_source = back(before->second.second, average);
      pairs.kept.erase(before);
    }
  }
  average.copy_(for_average);
  source.copy_(for_source);
}

void swap(Pairs& pairs, bool back) {
  const auto own = [&](size_t i) {
    return tig::is_plain_cpu(pairs.averages[i]) && tig::is_alike(pairs.averages[i], pairs.sources[i]);
  };
  const size_t count = pairs.averages.size();
  for (size_t k = 0; k < count; ++k) {
    const size_t i = back ? count - 1 - k : k;
    if (!own(i)) continue;
    tig::Task task{};
    task.p = pairs.averages[i].mutable_data_ptr();
    task.s[0] = pairs.sources[i].mutable_data_ptr();
    task.n = pairs.averages[i].numel();
    task.dtype = pairs.averages[i].scalar_type();
    task.rule = Rule::Swap;
    pairs.averages[i].unsafeGetTensorImpl()->bump_version();
    pairs.sources[i].unsafeGetTensorImpl()->bump_version();
    pairs.pass.add(task);
  }
  if (back) pairs.pass.update();
  for (size_t k = 0; k < count; ++k) {
    const size_t i = back ? count - 1 - k : k;
    if (!own(i)) exchange(pairs, i, back);
  }
  if (!back) pairs.pass.update();
}

void average(Pairs& pairs, Update how, double number) {
  pairs.other_averages.clear();
  pairs.other_sources.clear();
  for (size_t i = 0; i < pairs.averages.size(); ++i) {
    const Tensor &average = pairs.averages[i], &source = pairs.sources[i];
    if (is_copied(average, how)) {
      average.copy_(source);
    } else if (tig::is_plain_cpu(average) && tig::is_alike(average, source)) {
      tig::Task task{};
      task.p = average.mutable_data_ptr();
      task.g = source.const_data_ptr();
      task.n = average.numel();
      task.dtype = average.scalar_type();
      task.rule = how == Update::Lerp ? Rule::Lerp : Rule::Mean;
      average.unsafeGetTensorImpl()->bump_version();
      pairs.pass.add(task);
    } else {
      pairs.other_averages.push_back(average);
      pairs.other_sources.push_back(source);
    }
  }
  pairs.pass.update();
  if (pairs.other_averages.empty()) return;
  if (how == Update::Lerp) {
    at::_foreach_mul_(pairs.other_averages, 1. - number);
    at::_foreach_add_(pairs.other_averages, pairs.other_sources, number);
  } else {
    auto difference = at::_foreach_sub(pairs.other_sources, pairs.other_averages);
    at::_foreach_div_(difference, number);
    at::_foreach_add_(pairs.other_averages, difference);
  }
}

void update(Pairs& pairs, Update how, double number) {
  at::NoGradGuard no_grad;
  check(pairs, how);
  pairs.pass.clear();
  pairs.pass.add(tig::Numbers{how == Update::Lerp ? 1. - number : number, number});  // all tasks use these numbers
  if (how == Update::Swap || how == Update::SwapBack) return swap(pairs, how == Update::SwapBack);
  average(pairs, how, number);
}

}  // namespace

extern "C" {

// Makes pairs from two lists of `count` tensors. The tensors are shared, not copied.
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

// Throws if tig_pairs_update would refuse this update.
int tig_pairs_check(const Pairs* pairs, int how, char** error) {
  return guarded(error, [&] { check(*pairs, abi::of<Update>(how)); });
}

int tig_pairs_update(Pairs* pairs, int how, double number, char** error) {
  return guarded(error, [&] { update(*pairs, abi::of<Update>(how), number); });
}

}  // extern "C"
