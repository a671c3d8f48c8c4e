//! Watches batch normalisation in training: which layers run, and with which statistics. The C++ is in batch_norm.cpp.

use std::ffi::{c_char, c_int, c_void};
use std::marker::PhantomData;
use std::ptr::{NonNull, null_mut};

use super::{BridgeError, TensorId, checked};

type Raw = *mut c_void;

unsafe extern "C" {
    fn tig_batch_norm_watch(averages: c_int, made: *mut Raw, error: *mut *mut c_char) -> c_int;
    fn tig_batch_norm_layers(watch: Raw) -> usize;
    fn tig_batch_norm_layer(watch: Raw, index: usize) -> *const c_void;
    fn tig_batch_norm_single(watch: Raw, index: usize) -> c_int;
    fn tig_batch_norm_evaluated(watch: Raw) -> c_int;
    fn tig_batch_norm_end(watch: Raw, keep: c_int, error: *mut *mut c_char) -> c_int;
    fn tig_batch_norm_free(watch: Raw);
}

/// Watches the batch normalisation of this thread. When the watch is dropped, all layers that ran in training mode get
/// back the running averages that they had when the watch first saw them.
pub(crate) struct BatchNormWatch {
    raw: NonNull<c_void>,
    /// The observer belongs to one thread.
    _not_send: PhantomData<*const ()>,
}

impl BatchNormWatch {
    /// Averages the statistics of each layer over all its calls in training mode. Until the watch ends, the layers'
    /// running averages are meaningless.
    pub(crate) fn averaging() -> Result<Self, BridgeError> {
        Self::begin(true)
    }

    /// Looks for layers that get a single value for each channel, whose variance is NaN.
    pub(crate) fn looking_for_single_values() -> Result<Self, BridgeError> {
        Self::begin(false)
    }

    fn begin(averages: bool) -> Result<Self, BridgeError> {
        let mut raw = null_mut();
        // SAFETY: on success `raw` is a watch that was made with `new` for us; `drop` frees it.
        checked(|error| unsafe { tig_batch_norm_watch(averages.into(), &mut raw, error) })?;
        let raw = NonNull::new(raw).ok_or_else(|| BridgeError::from("no watch was made"))?;
        Ok(Self { raw, _not_send: PhantomData })
    }

    /// The number of layers that ran in training mode.
    pub(crate) fn layers(&self) -> usize {
        // SAFETY: `raw` is a live watch.
        unsafe { tig_batch_norm_layers(self.raw.as_ptr()) }
    }

    /// The running variances of the layers that got a single value for each channel.
    pub(crate) fn single_values(&self) -> Vec<TensorId> {
        let raw = self.raw.as_ptr();
        // SAFETY: `raw` is a live watch, and the indices are below its count.
        let single = |index: &usize| unsafe { tig_batch_norm_single(raw, *index) != 0 };
        // SAFETY: as above; the watch keeps the variances alive.
        let id = |index| TensorId(unsafe { tig_batch_norm_layer(raw, index) } as usize);
        (0..self.layers()).filter(single).map(id).collect()
    }

    /// Whether a layer ran in evaluation mode.
    pub(crate) fn evaluated(&self) -> bool {
        // SAFETY: `raw` is a live watch.
        unsafe { tig_batch_norm_evaluated(self.raw.as_ptr()) != 0 }
    }

    /// Ends the watch. If it averages, the averages over all calls become the running averages of the layers; otherwise
    /// the running averages stay as the calls left them.
    pub(crate) fn keep(self) -> Result<(), BridgeError> {
        // SAFETY: `raw` is a live watch of this thread.
        checked(|error| unsafe { tig_batch_norm_end(self.raw.as_ptr(), 1, error) })
    }
}

impl Drop for BatchNormWatch {
    fn drop(&mut self) {
        // After `keep` this restores nothing. An error cannot be returned from `drop`.
        // SAFETY: `raw` is a live watch of this thread, and nobody uses it afterwards.
        unsafe {
            let _ = checked(|error| tig_batch_norm_end(self.raw.as_ptr(), 0, error));
            tig_batch_norm_free(self.raw.as_ptr());
        }
    }
}
