//! Batch normalisation in training: which layers run, and with which statistics.

use std::ffi::{c_char, c_int, c_void};
use std::marker::PhantomData;
use std::ptr::{NonNull, null_mut};

use super::{BridgeError, TensorId, checked};

type Raw = *mut c_void;

unsafe extern "C" {
    fn tig_batch_norm_watch(averages: c_int, made: *mut Raw, error: *mut *mut c_char) -> c_int;
    fn tig_batch_norm_layers(watch: Raw) -> usize;
    fn tig_batch_norm_layer(watch: Raw, index: usize) -> *const c_void;
    fn tig_batch_norm_evaluated(watch: Raw) -> c_int;
    fn tig_batch_norm_end(watch: Raw, keep: c_int, error: *mut *mut c_char) -> c_int;
    fn tig_batch_norm_free(watch: Raw);
}

/// Watches the batch normalisation of this thread until it is dropped, which puts the running averages of the layers
/// that it lists back to what they were when it first saw them.
pub(crate) struct BatchNormWatch {
    raw: NonNull<c_void>,
    /// The observer belongs to one thread.
    _not_send: PhantomData<*const ()>,
}

impl BatchNormWatch {
    /// Averages the statistics of each layer over all its calls in training mode. Meanwhile the running averages hold
    /// nothing of use.
    pub(crate) fn averaging() -> Result<Self, BridgeError> {
        Self::begin(true)
    }

    /// Lists the layers that get one value for each channel, whose variance is no number.
    pub(crate) fn looking_for_single_values() -> Result<Self, BridgeError> {
        Self::begin(false)
    }

    fn begin(averages: bool) -> Result<Self, BridgeError> {
        let mut raw = null_mut();
        // SAFETY: on success `raw` is a watch made with `new` for us, which `drop` frees.
        checked(|error| unsafe { tig_batch_norm_watch(averages.into(), &mut raw, error) })?;
        let raw = NonNull::new(raw).ok_or_else(|| BridgeError::from("no watch was made"))?;
        Ok(Self { raw, _not_send: PhantomData })
    }

    /// The running variances of the layers that it lists.
    pub(crate) fn layers(&self) -> Vec<TensorId> {
        // SAFETY: `raw` is a live watch; the indices are below its count, and the variances are kept alive by it.
        unsafe {
            let count = tig_batch_norm_layers(self.raw.as_ptr());
            let id = |index| TensorId(tig_batch_norm_layer(self.raw.as_ptr(), index) as usize);
            (0..count).map(id).collect()
        }
    }

    /// Whether a layer ran in evaluation mode.
    pub(crate) fn evaluated(&self) -> bool {
        // SAFETY: `raw` is a live watch.
        unsafe { tig_batch_norm_evaluated(self.raw.as_ptr()) != 0 }
    }

    /// Makes the averages over all calls the running averages.
    pub(crate) fn keep(self) -> Result<(), BridgeError> {
        // SAFETY: `raw` is a live watch of this thread.
        checked(|error| unsafe { tig_batch_norm_end(self.raw.as_ptr(), 1, error) })
    }
}

impl Drop for BatchNormWatch {
    fn drop(&mut self) {
        // Where the watch was ended already nothing is put back; an error has nobody to hear it.
        // SAFETY: `raw` is a live watch of this thread, and nobody uses it afterwards.
        unsafe {
            let _ = checked(|error| tig_batch_norm_end(self.raw.as_ptr(), 0, error));
            tig_batch_norm_free(self.raw.as_ptr());
        }
    }
}
