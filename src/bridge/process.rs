//! Signals to other processes, which std cannot send.

use std::ffi::c_int;

unsafe extern "C" {
    fn kill(pid: c_int, signal: c_int) -> c_int;
}

/// Sends a signal to a child process that nobody has waited for yet, so that no other process can have its number. A
/// child that has ended already is no error.
pub(crate) fn send_signal(child: &std::process::Child, signal: i32) {
    let Ok(pid) = c_int::try_from(child.id()) else { return };
    // SAFETY: kill takes no pointers; a number above 0 names one process, not a group.
    unsafe { kill(pid, signal) };
}
