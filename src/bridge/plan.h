// What a step needs besides the optimizer, kept from one to the next so that the lists do not grow anew.
#pragma once

#include <map>
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

  tig::OnePass pass;
  std::vector<std::vector<at::Tensor>> left;  // for each group, what goes through the loop
  std::map<BucketKey, Bucket> buckets;
  std::vector<void*> on_device;
  Ahead ahead;
};
