// Watches batch normalisation in training with libtorch's observers (RecordFunction): which layers run, and with which
// statistics.

// libtorch is built with NDEBUG. Without it RecordFunction::inputs checks a flag that libtorch then never sets.
#ifndef NDEBUG
#define NDEBUG
#endif

#include <ATen/ATen.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>

#include <string>
#include <string_view>
#include <vector>

#include "guarded.h"

using at::Tensor;

namespace {

// A layer that ran in training mode, known by its running averages.
struct Layer {
  Tensor mean, var;
  // The values of `mean` and `var` before the layer's first call.
  Tensor mean_before, var_before;
  // The averages of the batch statistics over all calls so far, in f64 if the device supports it.
  Tensor mean_average, var_average;
  int64_t calls = 0;
  // True if a call had a single value for each channel, so that the variance is NaN.
  bool single = false;
};

void average(Tensor& average, const Tensor& running, double momentum, int64_t calls) {
  // begin() set the running average to 0, so after the call it is the batch statistic times the momentum.
  const bool wide = running.device().type() != c10::DeviceType::MPS;
  const Tensor statistic = (wide ? running.to(at::kDouble) : running) / momentum;
  const double weight = 1. / static_cast<double>(calls);
  average = calls == 1 ? statistic : average * (1. - weight) + statistic * weight;
}

}  // namespace

// A watch on the batch normalisation of one thread, until tig_batch_norm_end.
struct BatchNormWatch {
  // True: average the statistics over all calls. False: look for layers that get a single value for each channel.
  bool averages;
  std::vector<Layer> layers;
  // True if a layer ran in evaluation mode.
  bool evaluated = false;
  // The text of an exception in an observer. Observers must not throw, so tig_batch_norm_end throws it.
  std::string failure;
  // The number of calls of instance normalisation under way. They call batch normalisation, which is not counted.
  int within_instance_norm = 0;
  at::CallbackHandle callback = 0;
  bool ended = false;
  BatchNormWatch* outer = nullptr;
};

namespace {

thread_local BatchNormWatch* current = nullptr;

constexpr size_t INSTANCE_NORM = SIZE_MAX;

// Data of one observed call, from begin() to end().
struct Call : at::ObserverContext {
  size_t layer;
  double momentum;
};

size_t layer_of(BatchNormWatch& watch, const Tensor& mean, const Tensor& var) {
  for (size_t i = 0; i < watch.layers.size(); ++i)
    if (watch.layers[i].var.is_same(var)) return i;
  Layer layer;
  layer.mean = mean;
  layer.var = var;
  layer.mean_before = mean.clone();
  layer.var_before = var.clone();
  watch.layers.push_back(std::move(layer));
  return watch.layers.size() - 1;
}

std::unique_ptr<at::ObserverContext> begin(const at::RecordFunction& function) {
  BatchNormWatch* const watch = current;
  if (watch == nullptr) return nullptr;
  const std::string_view name = function.name();
  if (name == "aten::instance_norm") {
    ++watch->within_instance_norm;
    auto call = std::make_unique<Call>();
    call->layer = INSTANCE_NORM;
    return call;
  }
  if (name != "aten::batch_norm" || watch->within_instance_norm > 0) return nullptr;
  try {
    // input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled
    const auto inputs = function.inputs();
    if (inputs.size() < 7 || !inputs[3].isTensor() || !inputs[4].isTensor()) return nullptr;
    const Tensor &mean = inputs[3].toTensor(), &var = inputs[4].toTensor();
    if (!mean.defined() || !var.defined()) return nullptr;
    if (!inputs[5].toBool()) {
      watch->evaluated = true;
      return nullptr;
    }
    at::NoGradGuard no_grad;
    if (!watch->averages) {
      const Tensor& input = inputs[0].toTensor();
      const bool one_value = input.dim() >= 2 && input.numel() > 0 && input.numel() == input.size(1);
      Layer& layer = watch->layers[layer_of(*watch, mean, var)];
      layer.single = layer.single || one_value;
      return nullptr;
    }
    auto call = std::make_unique<Call>();
    call->momentum = inputs[6].toDouble();
    call->layer = layer_of(*watch, mean, var);
    Tensor(mean).zero_();
    Tensor(var).zero_();
    if (call->momentum == 0.) {
      // The call leaves the running averages as they are, so they get the statistics of the batch here.
      const Tensor& input = inputs[0].toTensor();
      if (input.dim() < 2) return nullptr;
      std::vector<int64_t> others{0};
      for (int64_t i = 2; i < input.dim(); ++i) others.push_back(i);
      const auto [batch_var, batch_mean] = at::var_mean(input.to(var.scalar_type()), others, /*correction=*/1);
      Tensor(mean).copy_(batch_mean);
      Tensor(var).copy_(batch_var);
      call->momentum = 1.;
    }
    return call;
  } catch (const std::exception& e) {
    watch->failure = e.what();
  }
  return nullptr;
}

void end(const at::RecordFunction&, at::ObserverContext* context) {
  BatchNormWatch* const watch = current;
  if (watch == nullptr || context == nullptr) return;
  const auto& call = static_cast<const Call&>(*context);
  if (call.layer == INSTANCE_NORM) {
    --watch->within_instance_norm;
    return;
  }
  try {
    at::NoGradGuard no_grad;
    Layer& layer = watch->layers.at(call.layer);
    ++layer.calls;
    average(layer.mean_average, layer.mean, call.momentum, layer.calls);
    average(layer.var_average, layer.var, call.momentum, layer.calls);
  } catch (const std::exception& e) {
    watch->failure = e.what();
  }
}

void stop(BatchNormWatch& watch) {
  if (watch.ended) return;
  watch.ended = true;
  at::removeCallback(watch.callback);
  current = watch.outer;
}

}  // namespace

extern "C" {

int tig_batch_norm_watch(int averages, BatchNormWatch** made, char** error) {
  return guarded(error, [&] {
    auto watch = std::make_unique<BatchNormWatch>();
    watch->averages = averages != 0;
    watch->outer = current;
    watch->callback = at::addThreadLocalCallback(
        at::RecordFunctionCallback(begin, end).needsInputs(true).scopes({at::RecordScope::FUNCTION}));
    current = watch.get();
    *made = watch.release();
  });
}

size_t tig_batch_norm_layers(const BatchNormWatch* watch) { return watch->layers.size(); }

// Identifies a listed layer by its running variance, as tig_tensor_id does.
const void* tig_batch_norm_layer(const BatchNormWatch* watch, size_t index) {
  return watch->layers[index].var.unsafeGetTensorImpl();
}

// Whether a call of a listed layer had a single value for each channel.
int tig_batch_norm_single(const BatchNormWatch* watch, size_t index) { return watch->layers[index].single ? 1 : 0; }

int tig_batch_norm_evaluated(const BatchNormWatch* watch) { return watch->evaluated ? 1 : 0; }

// Ends the watch, on the thread where it began. With `keep` the running averages become the averages over all calls, or
// stay as they are if the watch does not average; without it they get the values from before the watch.
int tig_batch_norm_end(BatchNormWatch* watch, int keep, char** error) {
  return guarded(error, [&] {
    if (watch->ended) return;
    stop(*watch);
    at::NoGradGuard no_grad;
    const bool restore = keep == 0 || !watch->failure.empty();
    for (Layer& layer : watch->layers) {
      if (!restore && layer.calls == 0) continue;
      layer.mean.copy_(restore ? layer.mean_before : layer.mean_average);
      layer.var.copy_(restore ? layer.var_before : layer.var_average);
    }
    TORCH_CHECK(watch->failure.empty(), watch->failure);
  });
}

void tig_batch_norm_free(BatchNormWatch* watch) {
  try {
    stop(*watch);
    delete watch;
  } catch (...) {
    // A destructor of libtorch threw. The caller is dropping the watch and cannot handle an error.
  }
}

}  // extern "C"
