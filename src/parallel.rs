use tch::{Device, Tensor};

#[cfg(feature = "distributed")]
use crate::distributed::{DistributedDataParallel, NoSync};
use crate::error::Result;
use crate::optim;

/// Keeps gradients on their rank while it lives.
#[cfg(feature = "distributed")]
pub(crate) type Local = Option<NoSync>;
#[cfg(not(feature = "distributed"))]
pub(crate) type Local = ();

/// Forward and backward of a step, by a `DistributedDataParallel` where there is one.
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

    /// Until it is dropped, gradients stay here.
    #[cfg(feature = "distributed")]
    pub(crate) fn no_sync(&self) -> Local {
        self.ddp.as_ref().map(DistributedDataParallel::no_sync)
    }

    #[cfg(not(feature = "distributed"))]
    pub(crate) fn no_sync(&self) -> Local {}

    /// Whether gradients are averaged over several ranks whose weights can be exchanged: not with ranks in Python, which
    /// send none.
    pub(crate) fn is_shared(&self) -> bool {
        #[cfg(feature = "distributed")]
        if let Some(ddp) = &self.ddp {
            return ddp.exchanges();
        }
        false
    }

    /// Whether the last backward of a window waits for other ranks.
    pub(crate) fn reduces(&self) -> bool {
        #[cfg(feature = "distributed")]
        if let Some(ddp) = &self.ddp {
            return ddp.reduces();
        }
        false
    }

    /// Makes a tensor the sum over all ranks, and returns their number.
    pub(crate) fn sum(&self, tensor: &Tensor) -> Result<u64> {
        #[cfg(feature = "distributed")]
        if let Some(ddp) = &self.ddp {
            return ddp.sum(tensor);
        }
        let _ = tensor;
        Ok(1)
    }

    /// Where the parameters are, if ranks share them.
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

    /// Averages gradients that stayed here.
    pub(crate) fn reduce_gradients(&self) -> Result<()> {
        #[cfg(feature = "distributed")]
        if let Some(ddp) = &self.ddp {
            return ddp.reduce_gradients();
        }
        Ok(())
    }
}
