use anyhow::{Result, anyhow};
use tch::{Device, Tensor};

use crate::bridge;

/// Batches that can be moved to a device.
///
/// Implemented for tensors, for lists and tuples of batches, and for strings, which stay where they are. Implement it
/// for a batch type of your own by calling it on the type's tensors.
pub trait Transfer: Sized {
    /// Moves the batch to `device`; tensors that are there already are shared. With `non_blocking`, a copy from
    /// pinned memory to a CUDA device runs beside the program, in the order of its stream.
    ///
    /// # Errors
    /// A copy that libtorch cannot make, for instance to a device that does not exist.
    fn transfer(self, device: Device, non_blocking: bool) -> Result<Self>;

    /// Copies the batch into pinned memory, from which copies to a CUDA device need not wait.
    ///
    /// # Errors
    /// There is no CUDA.
    fn pin_memory(self) -> Result<Self>;
}

impl Transfer for Tensor {
    fn transfer(self, device: Device, non_blocking: bool) -> Result<Self> {
        match self.device() == device {
            true => Ok(self),
            false => Ok(self.f_to_device_(device, self.kind(), non_blocking, false)?),
        }
    }

    fn pin_memory(self) -> Result<Self> {
        match self.device() {
            Device::Cpu => bridge::pin_memory(&self).map_err(|message| anyhow!(message)),
            _ => Ok(self),
        }
    }
}

impl Transfer for String {
    fn transfer(self, _device: Device, _non_blocking: bool) -> Result<Self> {
        Ok(self)
    }

    fn pin_memory(self) -> Result<Self> {
        Ok(self)
    }
}

impl<T: Transfer> Transfer for Vec<T> {
    fn transfer(self, device: Device, non_blocking: bool) -> Result<Self> {
        self.into_iter().map(|part| part.transfer(device, non_blocking)).collect()
    }

    fn pin_memory(self) -> Result<Self> {
        self.into_iter().map(T::pin_memory).collect()
    }
}

impl<A: Transfer, B: Transfer> Transfer for (A, B) {
    fn transfer(self, device: Device, non_blocking: bool) -> Result<Self> {
        Ok((self.0.transfer(device, non_blocking)?, self.1.transfer(device, non_blocking)?))
    }

    fn pin_memory(self) -> Result<Self> {
        Ok((self.0.pin_memory()?, self.1.pin_memory()?))
    }
}

impl<A: Transfer, B: Transfer, C: Transfer> Transfer for (A, B, C) {
    fn transfer(self, device: Device, non_blocking: bool) -> Result<Self> {
        let (a, (b, c)) = (self.0, (self.1, self.2).transfer(device, non_blocking)?);
        Ok((a.transfer(device, non_blocking)?, b, c))
    }

    fn pin_memory(self) -> Result<Self> {
        let (a, (b, c)) = (self.0, (self.1, self.2).pin_memory()?);
        Ok((a.pin_memory()?, b, c))
    }
}
