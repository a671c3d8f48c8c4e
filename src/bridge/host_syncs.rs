//! Finds operations that make the CPU wait for a device; the C++ is in host_syncs.cpp.

use std::ffi::{c_char, c_int};
use std::marker::PhantomData;
use std::ptr::null_mut;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{BridgeError, checked, taken_text};

unsafe extern "C" {
    fn tig_host_syncs_begin(callback: *mut u64, error: *mut *mut c_char) -> c_int;
    fn tig_host_syncs_end(callback: u64, names: *mut *mut c_char, error: *mut *mut c_char)
    -> c_int;
}

/// While a value of this type lives, operations of this thread that wait for a device are noted. Only one such value
/// exists at a time: `begin` on another thread waits.
pub(crate) struct HostSyncs {
    callback: u64,
    ended: bool,
    _one: MutexGuard<'static, ()>,
    /// The observer belongs to one thread.
    _not_send: PhantomData<*const ()>,
}

impl HostSyncs {
    pub(crate) fn begin() -> Result<Self, BridgeError> {
        static ONE: Mutex<()> = Mutex::new(());
        let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let mut callback = 0;
        // SAFETY: the C++ side adds an observer to this thread, which `end` or `drop` removes.
        checked(|error| unsafe { tig_host_syncs_begin(&mut callback, error) })?;
        Ok(Self { callback, ended: false, _one, _not_send: PhantomData })
    }

    /// Stops noting, and returns the names of the operations in their order.
    pub(crate) fn end(mut self) -> Result<Vec<String>, BridgeError> {
        let names = self.remove()?;
        Ok(names.lines().map(str::to_owned).collect())
    }

    fn remove(&mut self) -> Result<String, BridgeError> {
        if std::mem::replace(&mut self.ended, true) {
            return Ok(String::new());
        }
        let mut names = null_mut();
        // SAFETY: `begin` added the callback on this thread, and it is removed once; on success `names` is a text that
        // strdup allocated.
        checked(|error| unsafe { tig_host_syncs_end(self.callback, &mut names, error) })?;
        // SAFETY: as above; nobody else frees it.
        Ok(unsafe { taken_text(names) })
    }
}

impl Drop for HostSyncs {
    fn drop(&mut self) {
        let _ = self.remove();
    }
}
