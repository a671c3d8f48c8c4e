//! Autocast on the current thread; the C++ is in autocast.cpp.

use std::ffi::{c_char, c_int};
use std::marker::PhantomData;

use tch::Kind;

use super::{BridgeError, checked};

unsafe extern "C" {
    fn tig_autocast_enter(
        device: c_int,
        enabled: c_int,
        dtype: c_int,
        was_enabled: *mut c_int,
        had_dtype: *mut c_int,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_autocast_leave(
        device: c_int,
        was_enabled: c_int,
        had_dtype: c_int,
        error: *mut *mut c_char,
    ) -> c_int;
}

/// While it lives, autocast of a device is as it says; then as it was. It belongs to its thread.
#[derive(Debug)]
pub(crate) struct AutocastRegion {
    device: c_int,
    was_enabled: c_int,
    had_dtype: c_int,
    // Autocast is a setting of the thread.
    of_thread: PhantomData<*const ()>,
}

impl AutocastRegion {
    /// Casts to `kind`, f16 or bf16; `None` switches autocast off.
    pub(crate) fn enter(cuda: bool, kind: Option<Kind>) -> Result<Self, BridgeError> {
        let dtype = match kind {
            Some(Kind::Half) => 5,
            Some(Kind::BFloat16) => 15,
            None => 6,
            Some(other) => return Err(format!("autocast to {other:?} is not possible")),
        };
        let mut region = Self {
            device: c_int::from(cuda),
            was_enabled: 0,
            had_dtype: 6,
            of_thread: PhantomData,
        };
        // SAFETY: writes to two numbers; the C++ side catches.
        let entered = checked(|error| unsafe {
            tig_autocast_enter(
                region.device,
                c_int::from(kind.is_some()),
                dtype,
                &mut region.was_enabled,
                &mut region.had_dtype,
                error,
            )
        });
        match entered {
            Ok(()) => Ok(region),
            Err(text) => {
                // Not entered, so not to be left.
                std::mem::forget(region);
                Err(text)
            }
        }
    }
}

impl Drop for AutocastRegion {
    fn drop(&mut self) {
        // SAFETY: as above. Setting what was set before cannot fail, and there is nobody to tell.
        let _ = checked(|error| unsafe {
            tig_autocast_leave(self.device, self.was_enabled, self.had_dtype, error)
        });
    }
}

/// Enters autocast of the device of that number, which must be unknown.
#[cfg(test)]
pub(super) fn enter_device(device: c_int) -> Result<(), BridgeError> {
    let (mut was_enabled, mut had_dtype) = (0, 0);
    // SAFETY: as in `AutocastRegion::enter`.
    checked(|error| unsafe {
        tig_autocast_enter(device, 0, 6, &mut was_enabled, &mut had_dtype, error)
    })
}
