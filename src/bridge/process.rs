//! Signals to other processes, which std cannot send.

use std::ffi::c_int;

unsafe extern "C" {
    fn kill(pid: c_int, signal: c_int) -> c_int;
}

/// Sends a signal to a process of ours that was not waited for yet, so that its number is still its own. That it may have
/// ended already is no error.
pub(crate) fn send_signal(child: &std::process::Child, signal: i32) {
    let Ok(pid) = c_int::try_from(child.id()) else { return };
    // SAFETY: no pointers; the number is that of one process, not of a group (it is above 0).
    unsafe { kill(pid, signal) };
}
