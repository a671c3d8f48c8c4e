use tch::{Device, Kind};

use crate::bridge::AutocastRegion;
use crate::error::{Error, Result};

/// Calls `forward` with libtorch's autocast: matrix products and convolutions on devices of this type run in `kind`,
/// f16 or bf16, and operations that need the range of f32 run in f32. Put the forward pass and the loss inside; leave
/// backward and the step outside.
///
/// Autocast applies to this thread, may be nested, and ends with the call, also after a panic. f16 needs a
/// [`GradScaler`](super::GradScaler), bf16 does not. No host sync.
///
/// ```
/// use tch::{Device, Kind, Tensor};
/// use tch_ignite::amp::autocast;
///
/// let x = Tensor::ones([2, 2], (Kind::Float, Device::Cpu));
/// assert_eq!(autocast(Device::Cpu, Kind::BFloat16, || x.matmul(&x).kind())?, Kind::BFloat16);
/// assert_eq!(x.matmul(&x).kind(), Kind::Float);
/// # Ok::<(), tch_ignite::Error>(())
/// ```
///
/// # Errors
/// `kind` is neither f16 nor bf16, or the device is neither CPU nor CUDA.
pub fn autocast<R>(device: Device, kind: Kind, forward: impl FnOnce() -> R) -> Result<R> {
    let _region = enter(device, Some(kind))?;
    Ok(forward())
}

/// Calls `forward` without autocast, within [`autocast`].
///
/// # Errors
/// The device is neither CPU nor CUDA.
pub fn without_autocast<R>(device: Device, forward: impl FnOnce() -> R) -> Result<R> {
    let _region = enter(device, None)?;
    Ok(forward())
}

/// Begins a region with autocast to `kind`, or without autocast.
fn enter(device: Device, kind: Option<Kind>) -> Result<AutocastRegion> {
    let cuda = match device {
        Device::Cpu => false,
        Device::Cuda(_) => true,
        other => {
            return Err(Error::invalid(format!(
                "autocast is for CPU and CUDA, but the device is {other:?}"
            )));
        }
    };
    if kind.is_some_and(|kind| !matches!(kind, Kind::Half | Kind::BFloat16)) {
        return Err(Error::invalid(format!(
            "autocast is to Half or BFloat16, but {:?} was given",
            kind.unwrap_or(Kind::Float)
        )));
    }
    AutocastRegion::enter(cuda, kind).map_err(|text| Error::libtorch("autocast", text))
}
