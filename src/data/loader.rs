use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result as AnyResult};
use tch::{Device, Kind, Tensor};

use super::{IntoSource, Source, permutation};
use crate::{Error, Result};

/// A batch of the [`Loader`]: inputs and targets, samples along the first dimension.
pub type Batch = (Tensor, Tensor);

/// Batches of inputs and targets that lie in memory.
///
/// Shuffled orders are a function of seed and pass, so a run can be continued anywhere at no cost.
/// A batch costs one gather of inputs and one of targets (without shuffling: two views, no copy), and
/// a copy to the device where that is another one than the data's. A pass of a shuffled loader costs
/// 8 bytes a sample.
///
/// ```
/// use tch::{Kind, Tensor};
/// use tch_ignite::data::Loader;
/// # let (x, y) = (Tensor::rand([10, 3], (Kind::Float, tch::Device::Cpu)), Tensor::arange(10, (Kind::Int64, tch::Device::Cpu)));
/// let loader = Loader::new(&x, &y, 4)?.shuffle(42);
/// assert_eq!(loader.batches(), 3);
/// assert_eq!(loader.drop_last(true).batches(), 2);
/// # Ok::<(), tch_ignite::Error>(())
/// ```
#[derive(Debug)]
pub struct Loader {
    inputs: Tensor,
    targets: Tensor,
    samples: u64,
    /// Shared by clones, so that it can be changed while the engine has one.
    batch_size: Arc<AtomicU64>,
    seed: Option<u64>,
    drop_last: bool,
    device: Device,
}

impl Clone for Loader {
    /// Shares the data and the batch size.
    fn clone(&self) -> Self {
        Self {
            inputs: self.inputs.shallow_clone(),
            targets: self.targets.shallow_clone(),
            batch_size: self.batch_size.clone(),
            ..*self
        }
    }
}

impl Loader {
    /// Batches of `batch_size` along the first dimension of both tensors, in order, the last one
    /// possibly smaller, on the device of `inputs`. Shares the tensors, copies nothing.
    ///
    /// # Errors
    /// Batch size 0, tensors without a first dimension or of different lengths, no samples.
    pub fn new(inputs: &Tensor, targets: &Tensor, batch_size: usize) -> Result<Self> {
        let (x, y) = (inputs.size(), targets.size());
        let (Some(&samples), Some(&labels)) = (x.first(), y.first()) else {
            return Err(Error::invalid(format!(
                "inputs and targets need a first dimension, the samples; their shapes are {x:?} and {y:?}"
            )));
        };
        if samples != labels {
            return Err(Error::invalid(format!(
                "there are {samples} inputs but {labels} targets (shapes {x:?} and {y:?})"
            )));
        }
        if samples == 0 {
            return Err(Error::invalid("Input data has zero size. Please provide non-empty data"));
        }
        if batch_size == 0 {
            return Err(Error::invalid("batch_size must be at least 1, but 0 was given"));
        }
        Ok(Self {
            inputs: inputs.shallow_clone(),
            targets: targets.shallow_clone(),
            samples: samples as u64,
            batch_size: Arc::new(AtomicU64::new(batch_size as u64)),
            seed: None,
            drop_last: false,
            device: inputs.device(),
        })
    }

    /// Shuffles each pass anew, by this seed.
    pub fn shuffle(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// Leaves out the last batch of a pass where it is smaller.
    pub fn drop_last(mut self, on: bool) -> Self {
        self.drop_last = on;
        self
    }

    /// Gives batches on this device.
    pub fn to_device(mut self, device: Device) -> Self {
        self.device = device;
        self
    }

    /// Batches in a pass.
    pub fn batches(&self) -> u64 {
        match self.drop_last {
            true => self.samples / self.batch_size(),
            false => self.samples.div_ceil(self.batch_size()),
        }
    }

    /// Samples in a batch.
    pub fn batch_size(&self) -> u64 {
        self.batch_size.load(Ordering::Relaxed)
    }

    /// Changes the batch size of this loader and its clones, from the next batch on; see
    /// [`BatchSizeScheduler`](crate::schedule::BatchSizeScheduler).
    pub fn set_batch_size(&self, samples: u64) -> Result<()> {
        if samples == 0 {
            return Err(Error::invalid("batch_size must be at least 1, but 0 was given"));
        }
        self.batch_size.store(samples, Ordering::Relaxed);
        Ok(())
    }

    /// Samples in the data.
    pub fn samples(&self) -> u64 {
        self.samples
    }
}

struct Cursor {
    loader: Loader,
    /// The order of this pass, on each tensor's device; None where it is not shuffled.
    order: Option<(Tensor, Tensor)>,
    /// The first sample of the next batch.
    next: u64,
    last_samples: u64,
}

impl Cursor {
    fn fetch(&mut self, len: u64) -> AnyResult<Batch> {
        let loader = &self.loader;
        let (start, size) = (self.next as i64, len as i64);
        let (x, y) = match &self.order {
            None => {
                (loader.inputs.f_narrow(0, start, size)?, loader.targets.f_narrow(0, start, size)?)
            }
            Some((for_inputs, for_targets)) => (
                loader.inputs.f_index_select(0, &for_inputs.f_narrow(0, start, size)?)?,
                loader.targets.f_index_select(0, &for_targets.f_narrow(0, start, size)?)?,
            ),
        };
        self.next += len;
        self.last_samples = len;
        Ok((x.f_to_device(loader.device)?, y.f_to_device(loader.device)?))
    }
}

impl Source<Batch> for Cursor {
    fn validate(&self) -> AnyResult<()> {
        let Loader { samples, .. } = self.loader;
        anyhow::ensure!(
            self.loader.batches() > 0,
            "the loader has no batch: it drops the last one where it is smaller than batch_size ({}), and there are {samples} samples; use a smaller batch_size or drop_last(false)",
            self.loader.batch_size()
        );
        Ok(())
    }

    fn batches(&self) -> Option<u64> {
        Some(self.loader.batches())
    }

    fn seek(&mut self, pass: u64, batch: u64) -> AnyResult<()> {
        if let Some(seed) = self.loader.seed {
            let order = permutation(usize::try_from(self.loader.samples)?, seed, pass);
            let order = Tensor::f_from_slice(&order)?.f_to_kind(Kind::Int64)?;
            self.order = Some((
                order.f_to_device(self.loader.inputs.device())?,
                order.f_to_device(self.loader.targets.device())?,
            ));
        }
        self.next = batch.saturating_mul(self.loader.batch_size());
        Ok(())
    }

    fn next(&mut self) -> Option<AnyResult<Batch>> {
        let size = self.loader.batch_size();
        let len = size.min(self.loader.samples.saturating_sub(self.next));
        if len == 0 || (self.loader.drop_last && len < size) {
            return None;
        }
        let first = self.next;
        Some(self.fetch(len).with_context(|| format!("batch of the loader from sample {first}")))
    }

    fn samples(&self) -> Option<u64> {
        Some(self.last_samples)
    }
}

impl<'a> IntoSource<'a, Batch> for &Loader {
    fn into_source(self) -> Box<dyn Source<Batch> + 'a> {
        self.clone().into_source()
    }
}

impl<'a> IntoSource<'a, Batch> for Loader {
    fn into_source(self) -> Box<dyn Source<Batch> + 'a> {
        Box::new(Cursor { loader: self, order: None, next: 0, last_samples: 0 })
    }
}
