// Batch normalisation in training, by libtorch's own observers: which layers run, and with which statistics.

// libtorch is built with it. Without it RecordFunction::inputs looks at a flag that libtorch never sets.
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
  // Their values before the first call.
  Tensor mean_before, var_before;
  // The averages of the statistics of all calls so far, in f64 where the device has it.
  Tensor mean_average, var_average;
  int64_t calls = 0;
};

void average(Tensor& average, const Tensor& running, double momentum, int64_t calls) {
  // The running average was 0 before the call, so it is the statistic times the momentum.
  const bool wide = running.device().type() != c10::DeviceType::MPS;
  const Tensor statistic = (wide ? running.to(at::kDouble) : running) / momentum;
  const double weight = 1. / static_cast<double>(calls);
  average = calls == 1 ? statistic : average * (1. - weight) + statistic * weight;
}

}  // namespace

// Watches one thread until it is ended.
struct BatchNormWatch {
  // Averages statistics over all calls; otherwise it looks for layers that get one value for each channel, whose
  // variance is no number.
  bool averages;
  std::vector<Layer> layers;
  // Some layer ran in evaluation mode.
  bool evaluated = false;
  // What went wrong in an observer, from which nothing may be thrown.
  std::string failure;
  // Instance normalisation calls batch normalisation with statistics of its own.
  int within_instance_norm = 0;
  at::CallbackHandle callback = 0;
  bool ended = false;
  BatchNormWatch* outer = nullptr;
};

namespace {

thread_local BatchNormWatch* current = nullptr;

constexpr size_t INSTANCE_NORM = SIZE_MAX;

// What a call is about until it ends.
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
      if (one_value) layer_of(*watch, mean, var);
      return nullptr;
    }
    auto call = std::make_unique<Call>();
    call->momentum = inputs[6].toDouble();
    // It would leave the running averages as they are.
    if (call->momentum == 0.) return nullptr;
    call->layer = layer_of(*watch, mean, var);
    Tensor(mean).zero_();
    Tensor(var).zero_();
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

// The running variance, as tig_tensor_id knows it.
const void* tig_batch_norm_layer(const BatchNormWatch* watch, size_t index) {
  return watch->layers[index].var.unsafeGetTensorImpl();
}

int tig_batch_norm_evaluated(const BatchNormWatch* watch) { return watch->evaluated ? 1 : 0; }

// Ends the watch, on the thread where it began. With `keep` the running averages become the averages over all calls;
// without they become what they were before.
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
    // A destructor of libtorch threw, and there is nobody to tell.
  }
}

}  // extern "C"
