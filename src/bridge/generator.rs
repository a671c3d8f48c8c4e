//! The state of libtorch's default random number generators; the C++ is in generator.cpp.

use std::ffi::{c_char, c_int};
use std::ptr::null_mut;

use tch::{Device, Tensor};
use torch_sys::C_tensor;

use super::{BridgeError, checked};

unsafe extern "C" {
    fn tig_generator_state(
        cuda: c_int,
        state: *mut *mut C_tensor,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_set_generator_state(
        cuda: c_int,
        state: *const C_tensor,
        error: *mut *mut c_char,
    ) -> c_int;
}

/// The number by which the C++ side knows a device: the CUDA index, or -1 for the CPU.
fn number(device: Device) -> Result<c_int, BridgeError> {
    match device {
        Device::Cpu => Ok(-1),
        Device::Cuda(index) => c_int::try_from(index).map_err(|error| error.to_string()),
        other => Err(format!("{other:?} has no generator that can be saved")),
    }
}

/// A copy of the state of the device's default generator: a uint8 tensor on the CPU.
pub(crate) fn generator_state(device: Device) -> Result<Tensor, BridgeError> {
    let device = number(device)?;
    let mut state = null_mut();
    // SAFETY: on success `state` is a torch::Tensor that was made with `new` for us.
    checked(|error| unsafe { tig_generator_state(device, &mut state, error) })?;
    // SAFETY: as above; we own it from here on.
    Ok(unsafe { Tensor::from_ptr(state) })
}

/// Sets the state of the device's default generator; libtorch checks the state's size and content.
pub(crate) fn set_generator_state(device: Device, state: &Tensor) -> Result<(), BridgeError> {
    let device = number(device)?;
    // SAFETY: the pointer of a live tch tensor is a live torch::Tensor.
    checked(|error| unsafe { tig_set_generator_state(device, state.as_ptr(), error) })
}
