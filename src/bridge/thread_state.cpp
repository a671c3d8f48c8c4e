// Reads and writes the settings of the current thread that scoped calls change: gradient mode, autocast, and the keys
// of the dispatcher.

#include <ATen/autocast_mode.h>
#include <c10/core/AutogradState.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cstdint>

#include "guarded.h"

namespace {

// The depth of nested autocast regions. libtorch returns it only from the functions that change it.
int nesting() {
  at::autocast::increment_nesting();
  return at::autocast::decrement_nesting();
}

}  // namespace

extern "C" {

// Writes 9 numbers, in the order in which tig_set_thread_state reads them. Whether autocast is on is part of the keys
// of the dispatcher.
int tig_thread_state(int64_t* out, char** error) {
  return guarded(error, [&] {
    const auto& autograd = c10::AutogradState::get_tls_state();
    out[0] = autograd.get_grad_mode();
    out[1] = autograd.get_inference_mode();
    out[2] = autograd.get_fw_grad_mode();
    out[3] = autograd.get_multithreading_enabled();
    const auto keys = c10::impl::tls_local_dispatch_key_set();
    out[4] = static_cast<int64_t>(keys.included_.raw_repr());
    out[5] = static_cast<int64_t>(keys.excluded_.raw_repr());
    out[6] = static_cast<int64_t>(at::autocast::get_autocast_dtype(at::kCPU));
    out[7] = static_cast<int64_t>(at::autocast::get_autocast_dtype(at::kCUDA));
    out[8] = nesting();
  });
}

int tig_set_thread_state(const int64_t* state, char** error) {
  return guarded(error, [&] {
    auto& autograd = c10::AutogradState::get_tls_state();
    autograd.set_grad_mode(state[0] != 0);
    autograd.set_inference_mode(state[1] != 0);
    autograd.set_fw_grad_mode(state[2] != 0);
    autograd.set_multithreading_enabled(state[3] != 0);
    const auto keys = [](int64_t raw) {
      return c10::DispatchKeySet(c10::DispatchKeySet::RAW, static_cast<uint64_t>(raw));
    };
    c10::impl::LocalDispatchKeySet local(c10::impl::PODLocalDispatchKeySet{0, 0});
    local.included_ = keys(state[4]);
    local.excluded_ = keys(state[5]);
    c10::impl::_force_tls_local_dispatch_key_set(local);
    at::autocast::set_autocast_dtype(at::kCPU, static_cast<at::ScalarType>(state[6]));
    at::autocast::set_autocast_dtype(at::kCUDA, static_cast<at::ScalarType>(state[7]));
    int depth = nesting();
    for (; depth < state[8]; ++depth) at::autocast::increment_nesting();
    for (; depth > state[8]; --depth) {
      // The end of the outermost region clears the cache of cast weights, as libtorch does.
      if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
    }
  });
}

}  // extern "C"
