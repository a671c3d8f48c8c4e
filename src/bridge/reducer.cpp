// libtorch's DDP reducer, called in the same order as by Python's DistributedDataParallel.

#include <torch/csrc/distributed/c10d/comm.hpp>
#include <torch/csrc/distributed/c10d/logger.hpp>
#include <torch/csrc/distributed/c10d/reducer.hpp>

#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>

#include <algorithm>
#include <string>
#include <unordered_set>

#include "dist.h"

using at::Tensor;
using c10d::ProcessGroup;
using c10d::Reducer;

namespace {

constexpr size_t BROADCAST_BYTES = size_t{250} << 20;

// Sends gradients as bf16, and converts the averages back to the gradients' type.
class Bf16Hook : public c10d::CppCommHookInterface<c10::intrusive_ptr<ProcessGroup>> {
 public:
  using CppCommHookInterface::CppCommHookInterface;

  c10::intrusive_ptr<c10::ivalue::Future> runHook(c10d::GradBucket& bucket) override {
    const Tensor whole = bucket.getBuffer();
    std::vector<Tensor> half{whole.to(at::kBFloat16).div_(state_->getSize())};
    auto reduced = state_->allreduce(half)->getFuture();
    auto widen = [whole](c10::ivalue::Future& future) {
      whole.copy_(future.value().toTensorVector().at(0));
      return c10::IValue(whole);
    };
    return reduced->then(widen, reduced->elementType());
  }
};

struct DataParallel {
  c10::intrusive_ptr<ProcessGroup> group;
  // The parameters that the reducer reduces.
  std::vector<Tensor> parameters;
  std::vector<Tensor> buffers;
  std::shared_ptr<Reducer> reducer;
  // Reports the reducer's timings. Without a logger the reducer measures none.
  std::shared_ptr<c10d::Logger> logger;
  bool find_unused;
  // Whether the next forward broadcasts the buffers: true at first, then if the last forward had gradients to reduce,
  // as in Python.
  bool buffers_may_differ;
};

// The parameters that a tensor depends on.
std::vector<Tensor> parameters_of(const Tensor& tensor) {
  using torch::autograd::Node;
  std::vector<Tensor> parameters;
  std::vector<Node*> left;
  std::unordered_set<Node*> seen;
  const auto visit = [&](Node* node) {
    if (node && seen.insert(node).second) left.push_back(node);
  };
  visit(tensor.grad_fn().get());
  while (!left.empty()) {
    Node* node = left.back();
    left.pop_back();
    if (auto* leaf = dynamic_cast<torch::autograd::AccumulateGrad*>(node)) parameters.push_back(leaf->variable);
    for (const auto& edge : node->next_edges()) visit(edge.function.get());
  }
  return parameters;
}

}  // namespace

// Must have the fields of `ReducerOptions` in reducer.rs, in the same order.
struct DataParallelOptions {
  int64_t bucket_bytes;
  int64_t first_bucket_bytes;
  int find_unused;
  int bucket_view;
  int broadcast_buffers;
  int compression;
};

extern "C" {

// Makes a reducer for the parameters that require a gradient, in this order. All parameters and buffers get the values
// of rank 0. Throws if the ranks' parameters differ in number or shape.
int tig_ddp_new(DistGroup* group, const Tensor* const* parameters, const char* const* names, size_t parameter_count,
                const Tensor* const* buffers, size_t buffer_count, const DataParallelOptions* options,
                DataParallel** made, int* cause, char** error) {
  return dist_guarded(cause, error, [&] {
    const auto compression = abi::of<abi::Compression>(options->compression);
    auto ddp = std::make_unique<DataParallel>();
    ddp->group = group->tensors;
    ddp->find_unused = options->find_unused != 0;
    std::vector<Tensor> reduced, states;
    std::unordered_map<size_t, std::string> reduced_names;
    for (size_t i = 0; i < parameter_count; ++i) {
      states.push_back(parameters[i]->detach());
      if (!parameters[i]->requires_grad()) continue;
      reduced_names[reduced.size()] = names[i];
      reduced.push_back(*parameters[i]);
    }
    TORCH_CHECK(!reduced.empty(), "no parameter requires a gradient");
    ddp->parameters = reduced;
    for (size_t i = 0; i < buffer_count; ++i) {
      states.push_back(buffers[i]->detach());
      if (options->broadcast_buffers) ddp->buffers.push_back(buffers[i]->detach());
    }
    c10d::verify_params_across_processes(group->tensors, reduced, {});
    {
      at::NoGradGuard no_grad;
      c10d::broadcast_coalesced(group->tensors, states, BROADCAST_BYTES, 0);
    }
    const std::vector<bool> sparse(reduced.size(), false);
    const auto first = options->first_bucket_bytes, rest = options->bucket_bytes;
    // As in Python, there is one bucket until the first backward has shown the order in which gradients become ready.
    std::vector<size_t> sizes{static_cast<size_t>(INT64_MAX)};
    if (ddp->find_unused) sizes = {static_cast<size_t>(first), static_cast<size_t>(rest)};
    auto [buckets, limits] = c10d::compute_bucket_assignment_by_size(reduced, sizes, sparse);
    // Gradients become ready in roughly the reverse order of the parameters.
    std::reverse(buckets.begin(), buckets.end());
    ddp->reducer = std::make_shared<Reducer>(reduced, buckets, group->tensors, sparse, rest, ddp->find_unused,
                                             options->bucket_view != 0, reduced_names, first, false, false,
                                             std::vector<int64_t>{first, rest});
    ddp->logger = std::make_shared<c10d::Logger>(ddp->reducer);
    ddp->reducer->set_logger(ddp->logger);
    // With TORCH_DISTRIBUTED_DEBUG=DETAIL this call crashes in libtorch 2.13, in Python too.
    if (c10d::debug_level() != c10d::DebugLevel::Detail)
      ddp->logger->set_construction_data_and_log("tch-ignite", {}, -1, !ddp->buffers.empty(), false, false);
    if (compression == abi::Compression::Fp16)
      ddp->reducer->register_builtin_comm_hook(c10d::BuiltinCommHookType::FP16_COMPRESS);
    else if (compression == abi::Compression::Bf16)
      ddp->reducer->register_comm_hook(std::make_unique<Bf16Hook>(group->tensors));
    ddp->buffers_may_differ = true;
    *made = ddp.release();
  });
}

void tig_ddp_free(DataParallel* ddp) {
  try {
    delete ddp;
  } catch (...) {
    // The reducer's destructor threw. The caller is dropping the reducer and cannot handle an error.
  }
}

// Prepares for a forward. `sync` says whether the backward of this forward will reduce the gradients.
int tig_ddp_before_forward(DataParallel* ddp, int sync, int* cause, char** error) {
  return dist_guarded(cause, error, [&] {
    const bool graph = at::GradMode::is_enabled();
    if (graph && sync) {
      ddp->logger->set_runtime_stats_and_log();
      ddp->reducer->prepare_for_forward();
    }
    if (graph) ddp->reducer->rebuild_buckets();
    if (ddp->buffers_may_differ && !ddp->buffers.empty()) {
      at::NoGradGuard no_grad;
      c10d::broadcast_coalesced(ddp->group, ddp->buffers, BROADCAST_BYTES, 0);
    }
  });
}

// Prepares for backward. `outputs` are searched for unused parameters if the options asked for that.
int tig_ddp_after_forward(DataParallel* ddp, int sync, const Tensor* const* outputs, size_t count, int* cause,
                          char** error) {
  return dist_guarded(cause, error, [&] {
    ddp->buffers_may_differ = at::GradMode::is_enabled() && sync;
    if (!ddp->buffers_may_differ) return;
    std::vector<Tensor> list;
    if (ddp->find_unused)
      for (size_t i = 0; i < count; ++i) list.push_back(*outputs[i]);
    ddp->reducer->prepare_for_backward(list);
  });
}

int tig_ddp_backward(const Tensor* loss, int* cause, char** error) {
  return dist_guarded(cause, error, [&] { loss->backward(); });
}

// Runs a backward that adds zeros to the parameters' gradients: to all, or, if unused parameters are searched for, to
// those that the loss depends on. The reducer waits for exactly these.
int tig_ddp_backward_nothing(DataParallel* ddp, const Tensor* loss, int* cause, char** error) {
  return dist_guarded(cause, error, [&] {
    const at::AutoGradMode with_graph(true);
    auto parameters = ddp->find_unused ? parameters_of(*loss) : ddp->parameters;
    const bool all = parameters.empty();
    if (all) parameters = ddp->parameters;
    // The gradient of p * 0 is 0 whatever p is.
    std::vector<Tensor> zeros, ones;
    for (const Tensor& parameter : parameters) {
      zeros.push_back(parameter.mul(0).sum());
      ones.push_back(at::ones_like(zeros.back()));
    }
    // A loss that depends on no parameter leaves the reducer without any to wait for, and then it would not begin.
    if (all && ddp->find_unused) ddp->reducer->prepare_for_backward(zeros);
    torch::autograd::backward(zeros, ones);
  });
}

// Gives lines of `name value`: the reducer's timings, in nanoseconds, and its settings.
int tig_ddp_logging_data(DataParallel* ddp, char** text, int* cause, char** error) {
  return dist_guarded(cause, error, [&] {
    std::string lines;
    const auto data = ddp->logger->get_ddp_logging_data();
    for (const auto& [name, value] : data.ints_map) lines += name + " " + std::to_string(value) + "\n";
    *text = strdup(lines.c_str());
  });
}

}  // extern "C"
