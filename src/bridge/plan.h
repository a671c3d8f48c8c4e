// Data that the steps of one optimizer keep from one step to the next, so that most steps allocate nothing.
#pragma once

#include <torch/optim.h>

#include <map>
#include <memory>
#include <optional>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "one_pass.h"

struct Plan {
  // The tensors of one call of libtorch's fused kernels: parameters, gradients, and up to three lists of state.
  struct Bucket {
    std::vector<at::Tensor> p, g, a, b, c;
  };
  // Parameters share a bucket if these are equal: group, type, device, and the number of steps done before (for SGD,
  // which does not count: 0 before a parameter's first step, else 1).
  using BucketKey = std::tuple<size_t, at::ScalarType, c10::DeviceType, c10::DeviceIndex, int64_t>;
  // Parameters whose step counts are too high, because the host counted each step without waiting to hear whether a
  // GradScaler skipped it on the device.
  struct Ahead {
    at::Tensor skipped;  // the number of skipped steps, on the device; undefined if the counts are right
    std::vector<void*> parameters;
  };

  // Who steps a parameter: nobody (it has no gradient), our pass on the CPU, libtorch's fused kernels, or its loop.
  enum class Way { NONE, ONE_PASS, KERNELS, LOOP };
  // How a step will treat one parameter. All decisions are made before the step changes anything.
  struct Decision {
    size_t group;
    const at::Tensor* p;
    Way way;
    torch::optim::OptimizerParamState* state;  // null before the parameter's first step, and if the options need none
    std::unique_ptr<torch::optim::OptimizerParamState> made;  // new state for a first step; commit() hands it over
    tig::Storage storage;           // of a parameter in f16 or bf16
    std::optional<tig::Kept> kept;  // new data of such a parameter, likewise
  };

  // The data from which the tasks of the last step were built. If the next step finds all of it unchanged, it uses
  // those tasks again.
  struct Known {
    // Data of all tasks that share one entry of numbers in the pass; both have the same index.
    struct Shared {
      size_t group;
      tig::Rule rule;
      bool decay;
      bool maximize;
      int64_t steps;  // the number of steps done, this one included
      torch::optim::OptimizerParamState* state;  // that of the parameter, or of one of those that share the numbers
    };
    struct Parameter {
      size_t group;
      c10::TensorImpl* p;
      c10::DispatchKeySet keys;
      c10::TensorImpl* state[3];
      int64_t* steps;  // the optimizer's own count for this parameter; null if it does not count
      tig::Kept* kept;  // of a parameter with a storage of low precision
      uint32_t task;   // index in the pass; NONE if the parameter had no gradient
    };
    static constexpr uint32_t NONE = UINT32_MAX;

    bool valid = false;
    std::vector<Shared> shared;
    std::vector<Parameter> parameters;
  };

  tig::OnePass pass, gradients;
  Known known;
  std::vector<Decision> decisions;
  std::vector<std::vector<at::Tensor>> left;  // for each group, the parameters that libtorch's loop steps
  std::map<BucketKey, Bucket> buckets;
  std::vector<void*> on_device;
  Ahead ahead;
  // For each group whether its gradients count negated, which the options of libtorch's own classes cannot say, and
  // the same for groups that are not in the list.
  std::vector<bool> maximize;
  bool maximize_others = false;

  // The storage of f16 and bf16 parameters of each group, and of groups that are not in the list; and data of each
  // parameter that has such a storage and was stepped.
  std::vector<tig::Storage> storages;
  tig::Storage storage_others;
  std::unordered_map<const void*, tig::Kept> kept;

  bool maximizes(size_t group) const { return group < maximize.size() ? maximize[group] : maximize_others; }

  tig::Storage storage(size_t group, const at::Tensor& p) const {
    if (!tig::is_low_precision(p.scalar_type())) return {};
    return group < storages.size() ? storages[group] : storage_others;
  }

  tig::Kept* kept_of(const at::Tensor& p) {
    const auto found = kept.find(p.unsafeGetTensorImpl());
    return found == kept.end() || !tig::is_low_precision(p.scalar_type()) ? nullptr : &found->second;
  }
};
