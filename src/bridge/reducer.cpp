// libtorch's DDP reducer, driven in the order of Python's DistributedDataParallel.

#include <torch/csrc/distributed/c10d/comm.hpp>
#include <torch/csrc/distributed/c10d/logger.hpp>
#include <torch/csrc/distributed/c10d/reducer.hpp>

#include <algorithm>
#include <string>

#include "dist.h"

using at::Tensor;
using c10d::ProcessGroup;
using c10d::Reducer;

namespace {

constexpr size_t BROADCAST_BYTES = size_t{250} << 20;

enum Compression : int { NONE = 0, FP16 = 1, BF16 = 2 };

// Gradients travel as bf16 and come back in their own type.
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
  std::vector<Tensor> buffers;
  std::shared_ptr<Reducer> reducer;
  // Tells the reducer's times; without it they are not taken.
  std::shared_ptr<c10d::Logger> logger;
  bool find_unused;
  // As in Python: buffers are equal until a forward that is followed by a reduction.
  bool buffers_may_differ;
};

}  // namespace

// Mirrored in reducer.rs.
struct DataParallelOptions {
  int64_t bucket_bytes;
  int64_t first_bucket_bytes;
  int find_unused;
  int bucket_view;
  int broadcast_buffers;
  int compression;
};

extern "C" {

// `parameters` that require a gradient are reduced, in this order. All parameters and all buffers become those of
// rank 0.
int tig_ddp_new(DistGroup* group, const Tensor* const* parameters, const char* const* names, size_t parameter_count,
                const Tensor* const* buffers, size_t buffer_count, const DataParallelOptions* options,
                DataParallel** made, int* cause, char** error) {
  return dist_guarded(cause, error, [&] {
    const int compression = options->compression;
    if (compression != NONE && compression != FP16 && compression != BF16) unknown("compression", compression);
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
    // As in Python: one bucket until the first backward has shown the order in which gradients come.
    std::vector<size_t> sizes{static_cast<size_t>(INT64_MAX)};
    if (ddp->find_unused) sizes = {static_cast<size_t>(first), static_cast<size_t>(rest)};
    auto [buckets, limits] = c10d::compute_bucket_assignment_by_size(reduced, sizes, sparse);
    // Gradients come in the reverse order of the parameters, more or less.
    std::reverse(buckets.begin(), buckets.end());
    ddp->reducer = std::make_shared<Reducer>(reduced, buckets, group->tensors, sparse, rest, ddp->find_unused,
                                             options->bucket_view != 0, reduced_names, first, false, false,
                                             std::vector<int64_t>{first, rest});
    ddp->logger = std::make_shared<c10d::Logger>(ddp->reducer);
    ddp->reducer->set_logger(ddp->logger);
    // At the level DETAIL this crashes in libtorch 2.13, in Python too.
    if (c10d::debug_level() != c10d::DebugLevel::Detail)
      ddp->logger->set_construction_data_and_log("tch-ignite", {}, -1, !ddp->buffers.empty(), false, false);
    if (compression == FP16)
      ddp->reducer->register_builtin_comm_hook(c10d::BuiltinCommHookType::FP16_COMPRESS);
    else if (compression == BF16)
      ddp->reducer->register_comm_hook(std::make_unique<Bf16Hook>(group->tensors));
    ddp->buffers_may_differ = true;
    *made = ddp.release();
  });
}

void tig_ddp_free(DataParallel* ddp) {
  try {
    delete ddp;
  } catch (...) {
    // The reducer's destructor may throw, and there is nobody to tell.
  }
}

// `sync`: gradients will be reduced in the backward of this forward.
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

// `outputs` are only looked at where unused parameters are to be found.
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

// Lines of `name value`: what the reducer has measured, in nanoseconds, and how it is set up.
int tig_ddp_logging_data(DataParallel* ddp, char** text, int* cause, char** error) {
  return dist_guarded(cause, error, [&] {
    std::string lines;
    const auto data = ddp->logger->get_ddp_logging_data();
    for (const auto& [name, value] : data.ints_map) lines += name + " " + std::to_string(value) + "\n";
    *text = strdup(lines.c_str());
  });
}

}  // extern "C"
