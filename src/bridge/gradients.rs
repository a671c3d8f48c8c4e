//! Operations on all gradients of some groups at once; the C++ is in gradients.cpp. A group that does not exist is an
//! error.

use std::ffi::{c_char, c_int};
use std::ptr::null_mut;

use tch::Tensor;
use torch_sys::C_tensor;

use super::{BridgeError, Native, Raw, checked};

unsafe extern "C" {
    fn tig_clip_norm(
        optimizer: Raw,
        groups: *const usize,
        count: usize,
        plan: Raw,
        max: f64,
        order: f64,
        total: *mut *mut C_tensor,
        factor: *mut *mut C_tensor,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_scale_gradients(
        optimizer: Raw,
        groups: *const usize,
        count: usize,
        plan: Raw,
        factor: *const C_tensor,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_clip_value(
        optimizer: Raw,
        groups: *const usize,
        count: usize,
        plan: Raw,
        max: f64,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_zero_gradients(
        optimizer: Raw,
        groups: *const usize,
        count: usize,
        plan: Raw,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_clear_gradients(
        optimizer: Raw,
        groups: *const usize,
        count: usize,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_widen_gradients(
        optimizer: Raw,
        groups: *const usize,
        count: usize,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_found_inf(
        optimizer: Raw,
        groups: *const usize,
        count: usize,
        plan: Raw,
        found: *mut *mut C_tensor,
        error: *mut *mut c_char,
    ) -> c_int;
}

// For the SAFETY comments below: `raw` is the live optimizer inside `self.tch`, the plan is live, `groups` is passed
// with its length, and the borrow of `self` keeps other threads out.
impl Native {
    /// The norm of all gradients of the groups together, and the factor (at most 1) that brings it to `max`.
    pub(crate) fn clip_norm(
        &mut self,
        groups: &[usize],
        max: f64,
        order: f64,
    ) -> Result<(Tensor, Tensor), BridgeError> {
        let (mut total, mut factor) = (null_mut(), null_mut());
        // SAFETY: see above.
        checked(|error| unsafe {
            tig_clip_norm(
                self.raw.as_ptr(),
                groups.as_ptr(),
                groups.len(),
                self.plan.as_ptr(),
                max,
                order,
                &mut total,
                &mut factor,
                error,
            )
        })?;
        // SAFETY: the C++ side made both with `new` for us, and we own them from here on.
        Ok(unsafe { (Tensor::from_ptr(total), Tensor::from_ptr(factor)) })
    }

    /// Multiplies the gradients by a tensor of one element, in place.
    pub(crate) fn scale_gradients(
        &mut self,
        groups: &[usize],
        factor: &Tensor,
    ) -> Result<(), BridgeError> {
        // SAFETY: see above; the pointer of a live tch tensor is a live torch::Tensor.
        checked(|error| unsafe {
            tig_scale_gradients(
                self.raw.as_ptr(),
                groups.as_ptr(),
                groups.len(),
                self.plan.as_ptr(),
                factor.as_ptr(),
                error,
            )
        })
    }

    /// Limits every element of the gradients to `-max` to `max`, in place.
    pub(crate) fn clip_value(&mut self, groups: &[usize], max: f64) -> Result<(), BridgeError> {
        // SAFETY: see above.
        checked(|error| unsafe {
            tig_clip_value(
                self.raw.as_ptr(),
                groups.as_ptr(),
                groups.len(),
                self.plan.as_ptr(),
                max,
                error,
            )
        })
    }

    /// Fills the gradients with zeros.
    pub(crate) fn zero_gradients(&mut self, groups: &[usize]) -> Result<(), BridgeError> {
        // SAFETY: see above.
        checked(|error| unsafe {
            tig_zero_gradients(
                self.raw.as_ptr(),
                groups.as_ptr(),
                groups.len(),
                self.plan.as_ptr(),
                error,
            )
        })
    }

    /// Sets the gradients to none.
    pub(crate) fn clear_gradients(&mut self, groups: &[usize]) -> Result<(), BridgeError> {
        // SAFETY: see above.
        checked(|error| unsafe {
            tig_clear_gradients(self.raw.as_ptr(), groups.as_ptr(), groups.len(), error)
        })
    }

    /// Makes gradients in f16 and bf16 f32.
    pub(crate) fn widen_gradients(&mut self, groups: &[usize]) -> Result<(), BridgeError> {
        // SAFETY: see above.
        checked(|error| unsafe {
            tig_widen_gradients(self.raw.as_ptr(), groups.as_ptr(), groups.len(), error)
        })
    }

    /// 1 if a gradient has an element that is not finite, else 0: one f32 element on the gradients' device.
    pub(crate) fn found_inf(&mut self, groups: &[usize]) -> Result<Tensor, BridgeError> {
        let mut found = null_mut();
        // SAFETY: see above.
        checked(|error| unsafe {
            tig_found_inf(
                self.raw.as_ptr(),
                groups.as_ptr(),
                groups.len(),
                self.plan.as_ptr(),
                &mut found,
                error,
            )
        })?;
        // SAFETY: the C++ side made it with `new` for us, and we own it from here on.
        Ok(unsafe { Tensor::from_ptr(found) })
    }
}
