// Switches autocast of one device type, on the current thread.

#include <ATen/autocast_mode.h>

#include "bridge.h"

namespace {

at::DeviceType device_of(int device) {
  return abi::of<abi::AutocastDevice>(device) == abi::AutocastDevice::Cuda ? at::kCUDA : at::kCPU;
}

}  // namespace

extern "C" {

// Begins a region: sets autocast of the device (an AutocastDevice) and writes the settings from before. `dtype` is
// libtorch's number of a type; it is not used if `enabled` is 0.
int tig_autocast_enter(int device, int enabled, int dtype, int* was_enabled, int* had_dtype, char** error) {
  return guarded(error, [&] {
    const auto type = device_of(device);
    const auto cast_to = static_cast<at::ScalarType>(dtype);
    if (enabled && cast_to != at::kHalf && cast_to != at::kBFloat16) unknown("type of autocast", dtype);
    *was_enabled = at::autocast::is_autocast_enabled(type);
    *had_dtype = static_cast<int>(at::autocast::get_autocast_dtype(type));
    at::autocast::set_autocast_enabled(type, enabled != 0);
    if (enabled) at::autocast::set_autocast_dtype(type, cast_to);
    at::autocast::increment_nesting();
  });
}

// Ends a region: restores the settings from before it. The cache of cast weights is cleared when the outermost region
// ends.
int tig_autocast_leave(int device, int was_enabled, int had_dtype, char** error) {
  return guarded(error, [&] {
    const auto type = device_of(device);
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(type, was_enabled != 0);
    at::autocast::set_autocast_dtype(type, static_cast<at::ScalarType>(had_dtype));
  });
}

}  // extern "C"
