//! libtorch's DDP reducer, which averages gradients over ranks; the C++ is in reducer.cpp.

use std::ffi::{CString, c_char, c_int, c_void};
use std::ptr::{NonNull, null_mut};

use tch::Tensor;
use torch_sys::C_tensor;

use super::abi::Compression;
use super::dist::{DistException, ProcessGroups, dist_checked, pointers};
use super::taken_text;

type Raw = *mut c_void;

/// How gradients are reduced; the fields are those of
/// `DataParallelOptions` in reducer.cpp, in the same order.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct ReducerOptions {
    pub(crate) bucket_bytes: i64,
    pub(crate) first_bucket_bytes: i64,
    pub(crate) find_unused: c_int,
    pub(crate) bucket_view: c_int,
    pub(crate) broadcast_buffers: c_int,
    pub(crate) compression: Compression,
}

unsafe extern "C" {
    fn tig_ddp_new(
        group: Raw,
        parameters: *const *const C_tensor,
        names: *const *const c_char,
        parameter_count: usize,
        buffers: *const *const C_tensor,
        buffer_count: usize,
        options: *const ReducerOptions,
        ddp: *mut Raw,
        cause: *mut c_int,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_ddp_free(ddp: Raw);
    fn tig_ddp_before_forward(
        ddp: Raw,
        sync: c_int,
        cause: *mut c_int,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_ddp_after_forward(
        ddp: Raw,
        sync: c_int,
        outputs: *const *const C_tensor,
        count: usize,
        cause: *mut c_int,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_ddp_backward(loss: *const C_tensor, cause: *mut c_int, error: *mut *mut c_char)
    -> c_int;
    fn tig_ddp_backward_nothing(
        ddp: *mut c_void,
        loss: *const C_tensor,
        cause: *mut c_int,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_ddp_logging_data(
        ddp: Raw,
        text: *mut *mut c_char,
        cause: *mut c_int,
        error: *mut *mut c_char,
    ) -> c_int;
}

/// The reducer of a model's gradients.
#[derive(Debug)]
pub(crate) struct Reducer(NonNull<c_void>);

// SAFETY: the C++ object is not bound to a thread.
unsafe impl Send for Reducer {}
// SAFETY: `DistributedDataParallel`, the owner, makes calls only while it holds the lock of the process group. The
// hooks that backward calls lock by themselves.
unsafe impl Sync for Reducer {}

impl Reducer {
    /// Makes a reducer for the parameters that require a gradient. Checks that they are alike on all ranks, and gives
    /// all parameters and buffers the values of rank 0.
    pub(crate) fn new(
        group: &ProcessGroups,
        parameters: &[(String, Tensor)],
        buffers: &[(String, Tensor)],
        options: &ReducerOptions,
    ) -> Result<Self, DistException> {
        let names: Vec<_> = parameters
            .iter()
            .map(|(name, _)| CString::new(name.as_str()).unwrap_or_default())
            .collect();
        let names: Vec<_> = names.iter().map(|name| name.as_ptr()).collect();
        let tensors = |list: &[(String, Tensor)]| -> Vec<*const C_tensor> {
            list.iter().map(|(_, tensor)| tensor.as_ptr()).collect()
        };
        let (parameters, buffers) = (tensors(parameters), tensors(buffers));
        let mut ddp = null_mut();
        // SAFETY: the group is live; lists are passed with their lengths, and hold live tensors and texts that end with
        // NUL, which outlive the call.
        dist_checked(|cause, error| unsafe {
            tig_ddp_new(
                group.as_ptr(),
                parameters.as_ptr(),
                names.as_ptr(),
                parameters.len(),
                buffers.as_ptr(),
                buffers.len(),
                options,
                &mut ddp,
                cause,
                error,
            )
        })?;
        NonNull::new(ddp).map(Self).ok_or_else(|| DistException::other("no reducer was made"))
    }

    /// Prepares for a forward, and broadcasts buffers. `sync` says whether the backward of this forward will reduce the
    /// gradients.
    pub(crate) fn before_forward(&self, sync: bool) -> Result<(), DistException> {
        // SAFETY: the object lives as long as `self`.
        dist_checked(|cause, error| unsafe {
            tig_ddp_before_forward(self.0.as_ptr(), c_int::from(sync), cause, error)
        })
    }

    /// Prepares for the backward of a forward that gave `outputs`.
    pub(crate) fn after_forward(
        &self,
        sync: bool,
        outputs: &[&Tensor],
    ) -> Result<(), DistException> {
        let outputs = pointers(outputs);
        // SAFETY: as above; pointers of live tch tensors are live torch::Tensors.
        dist_checked(|cause, error| unsafe {
            tig_ddp_after_forward(
                self.0.as_ptr(),
                c_int::from(sync),
                outputs.as_ptr(),
                outputs.len(),
                cause,
                error,
            )
        })
    }

    /// Runs backward from a scalar; the reducer's hooks reduce the gradients meanwhile.
    pub(crate) fn backward(&self, loss: &Tensor) -> Result<(), DistException> {
        // SAFETY: as above.
        dist_checked(|cause, error| unsafe { tig_ddp_backward(loss.as_ptr(), cause, error) })
    }

    /// Runs a backward that adds nothing, for parameters that `loss` depends on. The reducer's hooks reduce the gradients
    /// meanwhile.
    pub(crate) fn backward_nothing(&self, loss: &Tensor) -> Result<(), DistException> {
        // SAFETY: as above.
        dist_checked(|cause, error| unsafe {
            tig_ddp_backward_nothing(self.0.as_ptr(), loss.as_ptr(), cause, error)
        })
    }

    /// The reducer's timings and settings, as names and numbers.
    pub(crate) fn logging_data(&self) -> Result<Vec<(String, i64)>, DistException> {
        let mut text: *mut c_char = null_mut();
        // SAFETY: as above.
        dist_checked(|cause, error| unsafe {
            tig_ddp_logging_data(self.0.as_ptr(), &mut text, cause, error)
        })?;
        // SAFETY: on success `text` is a text that strdup allocated; `taken_text` frees it.
        let lines = unsafe { taken_text(text) };
        let number = |line: &str| {
            let (name, value) = line.split_once(' ')?;
            Some((name.to_owned(), value.parse().ok()?))
        };
        Ok(lines.lines().filter_map(number).collect())
    }
}

impl Drop for Reducer {
    fn drop(&mut self) {
        // SAFETY: tig_ddp_new made the object, and it is freed once, here.
        unsafe { tig_ddp_free(self.0.as_ptr()) }
    }
}
