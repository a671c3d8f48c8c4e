//! Forward and backward of a step, with or without `DistributedDataParallel`, so that callers need no `cfg`.

use tch::{Device, Tensor};

#[cfg(feature = "distributed")]
use crate::distributed::{DistributedDataParallel, NoSync};
use crate::error::Result;
use crate::optim;

/// A guard: while it lives, gradients stay on their rank.
#[cfg(feature = "distributed")]
pub(crate) type Local = Option<NoSync>;
#[cfg(not(feature = "distributed"))]
pub(crate) type Local = ();

/// Runs forward and backward of a step, through a `DistributedDataParallel` if there is one.
#[derive(Debug, Default)]
pub(crate) struct Parallel {
    #[cfg(feature = "distributed")]
    ddp: Option<DistributedDataParallel>,
}

impl Parallel {
    #[cfg(feature = "distributed")]
    pub(crate) fn new(ddp: DistributedDataParallel) -> Self {
        Self { ddp: Some(ddp) }
    }

    /// Returns a guard: until it is dropped, gradients stay on this rank.
    #[cfg(feature = "distributed")]
    pub(crate) fn no_sync(&self) -> Local {
        self.ddp.as_ref().map(DistributedDataParallel::no_sync)
    }

    #[cfg(not(feature = "distributed"))]
    pub(crate) fn no_sync(&self) -> Local {}

    /// Whether gradients are averaged over several ranks, and the ranks can exchange the weights of their batches.
    /// False with ranks in Python, which send no weights.
    pub(crate) fn is_shared(&self) -> bool {
        #[cfg(feature = "distributed")]
        if let Some(ddp) = &self.ddp {
            return ddp.exchanges();
        }
        false
    }

    /// Whether there is a `DistributedDataParallel`.
    pub(crate) fn is_parallel(&self) -> bool {
        #[cfg(feature = "distributed")]
        return self.ddp.is_some();
        #[cfg(not(feature = "distributed"))]
        false
    }

    /// Sums a tensor over all ranks, in place, and returns the number of ranks.
    pub(crate) fn sum(&self, tensor: &Tensor) -> Result<u64> {
        #[cfg(feature = "distributed")]
        if let Some(ddp) = &self.ddp {
            return ddp.sum(tensor);
        }
        let _ = tensor;
        Ok(1)
    }

    /// The device of the parameters of the data-parallel model; the CPU if there is none.
    pub(crate) fn device(&self) -> Device {
        #[cfg(feature = "distributed")]
        if let Some(ddp) = &self.ddp {
            return ddp.device();
        }
        Device::Cpu
    }

    pub(crate) fn forward(&self, forward: impl FnOnce() -> Result<Tensor>) -> Result<Tensor> {
        #[cfg(feature = "distributed")]
        if let Some(ddp) = &self.ddp {
            return ddp.forward(forward)?;
        }
        forward()
    }

    pub(crate) fn backward(&self, loss: &Tensor) -> Result<()> {
        #[cfg(feature = "distributed")]
        if let Some(ddp) = &self.ddp {
            return ddp.backward(loss);
        }
        optim::backward(loss)
    }

    /// Takes part in the backward of the other ranks, if there are any, and adds nothing to this rank's gradients.
    pub(crate) fn backward_nothing(&self, loss: &Tensor) -> Result<()> {
        #[cfg(feature = "distributed")]
        if let Some(ddp) = &self.ddp {
            return ddp.backward_nothing(loss);
        }
        let _ = loss;
        Ok(())
    }

    /// Averages gradients that stayed on this rank over all ranks.
    pub(crate) fn reduce_gradients(&self) -> Result<()> {
        #[cfg(feature = "distributed")]
        if let Some(ddp) = &self.ddp {
            return ddp.reduce_gradients();
        }
        Ok(())
    }
}
