//! What libtorch keeps per thread; the C++ is in thread_state.cpp.

use std::ffi::{c_char, c_int};

use super::{BridgeError, checked};

const VALUES: usize = 9;

unsafe extern "C" {
    fn tig_thread_state(state: *mut i64, error: *mut *mut c_char) -> c_int;
    fn tig_set_thread_state(state: *const i64, error: *mut *mut c_char) -> c_int;
}

/// The settings of this thread that scoped calls such as `tch::no_grad` and `tch::autocast` change:
/// a panic within these leaves them as they are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ThreadState([i64; VALUES]);

impl ThreadState {
    /// As the settings are now. Takes some 50 ns.
    pub(crate) fn now() -> Result<Self, BridgeError> {
        let mut state = [0; VALUES];
        // SAFETY: writes as many numbers as there are.
        checked(|error| unsafe { tig_thread_state(state.as_mut_ptr(), error) })?;
        Ok(Self(state))
    }

    /// Makes the settings of this thread these again; they have to be of this thread.
    pub(crate) fn put_back(&self) -> Result<(), BridgeError> {
        // SAFETY: reads as many numbers as there are, which this thread's libtorch gave.
        checked(|error| unsafe { tig_set_thread_state(self.0.as_ptr(), error) })
    }
}
