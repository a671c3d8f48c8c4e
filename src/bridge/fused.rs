//! Steps of all parameters at once; the C++ is in fused.cpp.

use std::ffi::{c_char, c_int, c_void};
use std::ptr::{NonNull, null, null_mut};

use tch::Tensor;
use torch_sys::C_tensor;

use super::{BridgeError, Native, Raw, TensorId, checked};

unsafe extern "C" {
    fn tig_plan_new(made: *mut Raw, error: *mut *mut c_char) -> c_int;
    fn tig_plan_free(plan: Raw);
    fn tig_step(
        optimizer: Raw,
        kind: c_int,
        plan: Raw,
        mode: c_int,
        factor: *const C_tensor,
        found_inf: *const C_tensor,
        refused: *mut *const c_void,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_settle(optimizer: Raw, kind: c_int, plan: Raw, error: *mut *mut c_char) -> c_int;
}

/// How steps are done; the numbers are those of fused.cpp.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub(crate) enum Mode {
    /// libtorch's own loop, parameter by parameter.
    Loop = 0,
    /// One pass of our own on the CPU, libtorch's fused kernels on CUDA, the loop for what neither takes.
    Fused = 1,
    /// libtorch's fused kernels on the CPU too: what CUDA does, for tests without one.
    #[cfg(test)]
    Kernels = 2,
}

/// A step that was not made.
#[derive(Debug)]
pub(crate) struct StepError {
    /// The parameter because of which the step was refused, if it was one: nothing has changed then.
    pub(crate) parameter: Option<TensorId>,
    pub(crate) text: BridgeError,
}

/// The C++ side's lists, kept from step to step.
#[derive(Debug)]
pub(super) struct Plan(NonNull<c_void>);

impl Plan {
    pub(super) fn new() -> Result<Self, BridgeError> {
        let mut made = null_mut();
        // SAFETY: makes an object of its own.
        checked(|error| unsafe { tig_plan_new(&mut made, error) })?;
        NonNull::new(made).map(Self).ok_or_else(|| "no memory".into())
    }

    pub(super) fn as_ptr(&self) -> Raw {
        self.0.as_ptr()
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: made by tig_plan_new, freed once, here.
        unsafe { tig_plan_free(self.0.as_ptr()) };
    }
}

impl Native {
    /// One update. The gradients count `factor` times, and nothing happens where `found_inf` is not 0;
    /// both have one element and are not read where they live on a device, but for RMSprop and for
    /// parameters on several devices.
    pub(crate) fn step(
        &mut self,
        factor: Option<&Tensor>,
        found_inf: Option<&Tensor>,
    ) -> Result<(), StepError> {
        let pointer = |tensor: Option<&Tensor>| tensor.map_or(null(), |t| t.as_ptr());
        let mut refused: *const c_void = null();
        // SAFETY: `raw` is the live optimizer inside `self.tch`, the plan is live; the pointers of live
        // tch tensors are live torch::Tensors, and null is allowed for them.
        let stepped = checked(|error| unsafe {
            tig_step(
                self.raw.as_ptr(),
                self.algorithm as c_int,
                self.plan.as_ptr(),
                self.mode as c_int,
                pointer(factor),
                pointer(found_inf),
                &mut refused,
                error,
            )
        });
        stepped.map_err(|text| StepError {
            parameter: (!refused.is_null()).then_some(TensorId(refused as usize)),
            text,
        })
    }

    /// Makes the step counts right after steps that were skipped on a device: a host sync, if there were
    /// steps with `found_inf` on a device since the last time.
    pub(crate) fn settle(&self) -> Result<(), BridgeError> {
        // SAFETY: as in `step`; the borrow of `self` keeps other threads out, because Native is not Sync.
        checked(|error| unsafe {
            tig_settle(self.raw.as_ptr(), self.algorithm as c_int, self.plan.as_ptr(), error)
        })
    }
}

/// A step by these numbers of the kind of optimizer and of the mode.
///
/// # Safety
/// One of them is unknown, so that the optimizer is not taken for one of another kind.
#[cfg(test)]
pub(super) unsafe fn step_with_numbers(
    native: &Native,
    kind: c_int,
    mode: c_int,
) -> Result<(), BridgeError> {
    let (raw, plan, mut refused) = (native.raw.as_ptr(), native.plan.as_ptr(), null());
    // SAFETY: as in `step`; the caller promises the rest.
    checked(|error| unsafe { tig_step(raw, kind, plan, mode, null(), null(), &mut refused, error) })
}
