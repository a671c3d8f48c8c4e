// What steps need besides the optimizer, kept from one to the next.
#pragma once

#include <torch/optim.h>

#include <map>
#include <memory>
#include <tuple>
#include <vector>

#include "one_pass.h"

struct Plan {
  // Parameters of one call of libtorch's fused kernels.
  struct Bucket {
    std::vector<at::Tensor> p, g, a, b, c;
  };
  // Group, type, device, and the steps done before (SGD: 0 before its first).
  using BucketKey = std::tuple<size_t, at::ScalarType, c10::DeviceType, c10::DeviceIndex, int64_t>;
  // Step counts that the host has run ahead with, because it did not wait to hear which steps a GradScaler
  // skipped on the device.
  struct Ahead {
    at::Tensor skipped;  // how many, on the device
    std::vector<void*> parameters;
  };

  // Who steps a parameter.
  enum class Way { NONE, ONE_PASS, KERNELS, LOOP };
  // What a step is going to do with one parameter, decided before it changes anything.
  struct Decision {
    size_t group;
    const at::Tensor* p;
    Way way;
    torch::optim::OptimizerParamState* state;  // null before its first step, and where the options need none
    std::unique_ptr<torch::optim::OptimizerParamState> made;  // for a first step, not the optimizer's yet
  };

  // What the tasks of the last step were made of. If the next one finds the same it uses them again.
  struct Known {
    // Of tasks with the same numbers, which stand at the same index in the pass.
    struct Shared {
      size_t group;
      tig::Rule rule;
      bool decay;
      int64_t steps;  // done
    };
    struct Parameter {
      size_t group;
      c10::TensorImpl* p;
      c10::DispatchKeySet keys;
      c10::TensorImpl* state[3];
      int64_t* steps;  // where the optimizer counts
      uint32_t task;   // NONE: it had no gradient
    };
    static constexpr uint32_t NONE = UINT32_MAX;

    bool valid = false;
    std::vector<Shared> shared;
    std::vector<Parameter> parameters;
  };

  tig::OnePass pass, gradients;
  Known known;
  std::vector<Decision> decisions;
  std::vector<std::vector<at::Tensor>> left;  // for each group, what goes through the loop
  std::map<BucketKey, Bucket> buckets;
  std::vector<void*> on_device;
  Ahead ahead;
};
