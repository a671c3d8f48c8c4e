//! Autocast on the current thread; the C++ is in autocast.cpp.

use std::ffi::{c_char, c_int};
use std::marker::PhantomData;

use tch::Kind;

use super::abi::AutocastDevice;
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

/// A region with autocast of a device on or off. Dropping it restores the settings from before, so it must stay on its
/// thread.
#[derive(Debug)]
pub(crate) struct AutocastRegion {
    device: c_int,
    was_enabled: c_int,
    had_dtype: c_int,
    // Autocast is a setting of the thread.
    of_thread: PhantomData<*const ()>,
}

impl AutocastRegion {
    /// Begins a region with autocast to `kind`, f16 or bf16; `None` switches autocast off.
    pub(crate) fn enter(cuda: bool, kind: Option<Kind>) -> Result<Self, BridgeError> {
        let dtype = match kind {
            Some(Kind::Half) => 5,
            Some(Kind::BFloat16) => 15,
            None => 6,
            Some(other) => return Err(format!("autocast to {other:?} is not possible")),
        };
        let mut region = Self {
            device: match cuda {
                true => AutocastDevice::Cuda as c_int,
                false => AutocastDevice::Cpu as c_int,
            },
            was_enabled: 0,
            had_dtype: 6,
            of_thread: PhantomData,
        };
        // SAFETY: the C++ side writes two numbers, and catches its exceptions.
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
                // The region was not entered, so `drop` must not leave it.
                std::mem::forget(region);
                Err(text)
            }
        }
    }
}

impl Drop for AutocastRegion {
    fn drop(&mut self) {
        // SAFETY: as above. Restoring settings that were valid before does not fail, so the error is ignored.
        let _ = checked(|error| unsafe {
            tig_autocast_leave(self.device, self.was_enabled, self.had_dtype, error)
        });
    }
}

/// Enters autocast of a device by a number that the C++ side does not know, to test that it is refused.
#[cfg(test)]
pub(super) fn enter_device(device: c_int) -> Result<(), BridgeError> {
    let (mut was_enabled, mut had_dtype) = (0, 0);
    // SAFETY: as in `AutocastRegion::enter`.
    checked(|error| unsafe {
        tig_autocast_enter(device, 0, 6, &mut was_enabled, &mut had_dtype, error)
    })
}
