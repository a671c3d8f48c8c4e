// Reads and writes the state of libtorch's default random number generators; tch can only seed them.

#include <ATen/Context.h>
#include <ATen/core/Generator.h>
#include <torch/types.h>

#include <mutex>

#include "guarded.h"

namespace {

// The default generator of the CPU (-1) or of the CUDA device with this number.
at::Generator generator(int cuda) {
  const auto device = cuda < 0 ? at::Device(at::kCPU) : at::Device(at::kCUDA, cuda);
  return at::globalContext().defaultGenerator(device);
}

}  // namespace

extern "C" {

int tig_generator_state(int cuda, at::Tensor** state, char** error) {
  return guarded(error, [&] {
    auto found = generator(cuda);
    std::lock_guard<std::mutex> lock(found.mutex());
    *state = new at::Tensor(found.get_state());
  });
}

int tig_set_generator_state(int cuda, const at::Tensor* state, char** error) {
  return guarded(error, [&] {
    auto found = generator(cuda);
    std::lock_guard<std::mutex> lock(found.mutex());
    found.set_state(*state);
  });
}

}  // extern "C"
