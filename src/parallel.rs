use tch::Tensor;

#[cfg(feature = "distributed")]
use crate::distributed::{DistributedDataParallel, NoSync};
use crate::{Result, optim};

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
    pub(crate) fn no_sync(&self) -> Option<NoSync> {
        self.ddp.as_ref().map(DistributedDataParallel::no_sync)
    }

    #[cfg(not(feature = "distributed"))]
    pub(crate) fn no_sync(&self) {}

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
