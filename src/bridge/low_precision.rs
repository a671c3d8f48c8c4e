//! Storages of f16 and bf16 parameters whose steps compute in f32; the C++ is in low_precision.h.

use std::ffi::{c_char, c_int};
use std::ptr::null_mut;

use tch::{Kind, Tensor};
use torch_sys::C_tensor;

use super::{BridgeError, LowPrecision, Native, Raw, checked};

unsafe extern "C" {
    fn tig_set_low_precision(
        plan: Raw,
        group: usize,
        how: c_int,
        seed: u64,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_low_precision_value(
        parameter: *const C_tensor,
        kept: *const C_tensor,
        value: *mut *mut C_tensor,
        error: *mut *mut c_char,
    ) -> c_int;
}

impl Native {
    /// Sets how the f16 and bf16 parameters of a group are stored; `None` stands for groups that do not exist yet. `seed`
    /// is of stochastic rounding.
    pub(crate) fn set_low_precision(
        &mut self,
        group: Option<usize>,
        how: LowPrecision,
        seed: u64,
    ) -> Result<(), BridgeError> {
        self.settle()?;
        self.set_low_precision_number(group.unwrap_or(usize::MAX), how as c_int, seed)
    }

    pub(super) fn set_low_precision_number(
        &self,
        group: usize,
        how: c_int,
        seed: u64,
    ) -> Result<(), BridgeError> {
        // SAFETY: the plan is live, the C++ side checks `how`, and the borrow of `self` keeps other threads out, because
        // Native is not Sync.
        checked(|error| unsafe {
            tig_set_low_precision(self.plan.as_ptr(), group, how, seed, error)
        })
    }
}

/// Whether a tensor is of a type that storages of low precision are for: f16 or bf16.
pub(crate) fn is_low_precision(tensor: &Tensor) -> bool {
    matches!(tensor.kind(), Kind::Half | Kind::BFloat16)
}

/// The f32 value of a parameter that has the values `parameter`, with what its storage keeps: `RawState::kept`.
pub(crate) fn low_precision_value(
    parameter: &Tensor,
    kept: &Tensor,
) -> Result<Tensor, BridgeError> {
    let mut value = null_mut();
    // SAFETY: the pointers of live tch tensors are live torch::Tensors.
    checked(|error| unsafe {
        tig_low_precision_value(parameter.as_ptr(), kept.as_ptr(), &mut value, error)
    })?;
    // SAFETY: the C++ side made it with `new` for us, and we own it from here on.
    Ok(unsafe { Tensor::from_ptr(value) })
}
