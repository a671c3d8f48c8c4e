//! Settings that libtorch keeps for each thread; the C++ is in thread_state.cpp.

use std::ffi::{c_char, c_int};

use super::{BridgeError, checked};

const VALUES: usize = 9;

unsafe extern "C" {
    fn tig_thread_state(state: *mut i64, error: *mut *mut c_char) -> c_int;
    fn tig_set_thread_state(state: *const i64, error: *mut *mut c_char) -> c_int;
}

/// The settings of this thread that scoped calls such as `tch::no_grad` and `tch::autocast` change. These calls
/// do not restore the settings after a panic in their closure, so whoever catches a panic does.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ThreadState([i64; VALUES]);

impl ThreadState {
    /// Reads the current settings of this thread. Takes about 50 ns.
    pub(crate) fn now() -> Result<Self, BridgeError> {
        let mut state = [0; VALUES];
        // SAFETY: the C++ side writes VALUES numbers, for which there is room.
        checked(|error| unsafe { tig_thread_state(state.as_mut_ptr(), error) })?;
        Ok(Self(state))
    }

    /// Restores these settings, on the thread where they were read.
    pub(crate) fn put_back(&self) -> Result<(), BridgeError> {
        // SAFETY: the C++ side reads VALUES numbers, which it wrote itself in `now`.
        checked(|error| unsafe { tig_set_thread_state(self.0.as_ptr(), error) })
    }
}
