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

/// The error of a step.
#[derive(Debug)]
pub(crate) struct StepError {
    /// The parameter that made the step impossible, if one did; then nothing was changed.
    pub(crate) parameter: Option<TensorId>,
    pub(crate) text: BridgeError,
}

/// The lists that the C++ side keeps from step to step (plan.h).
#[derive(Debug)]
pub(super) struct Plan(NonNull<c_void>);

impl Plan {
    pub(super) fn new() -> Result<Self, BridgeError> {
        let mut made = null_mut();
        // SAFETY: the C++ side makes an object that depends on nothing else.
        checked(|error| unsafe { tig_plan_new(&mut made, error) })?;
        NonNull::new(made).map(Self).ok_or_else(|| "no memory".into())
    }

    pub(super) fn as_ptr(&self) -> Raw {
        self.0.as_ptr()
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: tig_plan_new made the object, and it is freed once, here.
        unsafe { tig_plan_free(self.0.as_ptr()) };
    }
}

impl Native {
    /// Makes one step. The gradients count `factor` times, and nothing happens if `found_inf` is not 0. Both
    /// are tensors of one element. `found_inf` on a device is read (a host sync) only for RMSprop and our own, a first step of
    /// SGD with dampening, and if the fused kernels cannot step all parameters; `factor`, if a parameter is on the CPU.
    pub(crate) fn step(
        &mut self,
        factor: Option<&Tensor>,
        found_inf: Option<&Tensor>,
    ) -> Result<(), StepError> {
        let pointer = |tensor: Option<&Tensor>| tensor.map_or(null(), tch::Tensor::as_ptr);
        let mut refused: *const c_void = null();
        // SAFETY: `raw` is the live optimizer inside `self.tch`, and the plan is live. The pointers of live
        // tch tensors are live torch::Tensors; `factor` and `found_inf` may be null.
        let stepped = checked(|error| unsafe {
            tig_step(
                self.raw.as_ptr(),
                self.class as c_int,
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

    /// Corrects the step counts after steps that were skipped on a device. This costs a host sync if there were steps
    /// with `found_inf` on a device since the last call.
    pub(crate) fn settle(&self) -> Result<(), BridgeError> {
        // SAFETY: as in `step`; the borrow of `self` keeps other threads out, because Native is not Sync.
        checked(|error| unsafe {
            tig_settle(self.raw.as_ptr(), self.class as c_int, self.plan.as_ptr(), error)
        })
    }
}

/// Makes a step with any numbers for the kind of optimizer and the mode, to test that unknown ones are refused.
///
/// # Safety
/// One of the numbers must be unknown to the C++ side. Otherwise the optimizer may be taken for another kind.
#[cfg(test)]
pub(super) unsafe fn step_with_numbers(
    native: &Native,
    kind: c_int,
    mode: c_int,
) -> Result<(), BridgeError> {
    let (raw, plan, mut refused) = (native.raw.as_ptr(), native.plan.as_ptr(), null());
    // SAFETY: as in `step`; the caller promises that a number is unknown.
    checked(|error| unsafe { tig_step(raw, kind, plan, mode, null(), null(), &mut refused, error) })
}
