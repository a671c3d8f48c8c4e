use std::fmt;
use std::sync::Arc;

use anyhow::{Context, Result as AnyResult};
use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

use super::normalize::Normalize;
use super::sampler::{order_of, seed_of};
use super::{BatchSize, IntoSource, RandomSampler, SamplePosition, Sampler, Source, common_len};
use crate::bridge::Rows;
use crate::error::{Error, Result};

/// A batch of the [`Loader`]: inputs and targets, samples along the first dimension.
pub type Batch = (Tensor, Tensor);

/// Batches of inputs and targets in memory: the fast path. Data that is not in memory, or is changed sample by
/// sample, needs a [`DataLoader`](super::DataLoader).
///
/// A shuffled order depends on seed and pass alone, so a run can be continued anywhere at no cost. A batch costs
/// one gather of the inputs and one of the targets (without shuffling two views and no copy), and a copy to the
/// device where the data is on another one. A pass of a shuffled loader costs 8 bytes a sample (16 with
/// [`normalize`](Self::normalize)).
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
#[doc(alias = "TensorDataset")]
#[doc(alias = "Iter2")]
pub struct Loader {
    inputs: Tensor,
    targets: Tensor,
    len: usize,
    batch_size: BatchSize,
    /// `None` for samples in order.
    sampler: Option<Arc<dyn Sampler>>,
    normalize: Option<Normalize>,
    device: Device,
}

impl Clone for Loader {
    /// Clones share the data and the batch size.
    fn clone(&self) -> Self {
        Self {
            inputs: self.inputs.shallow_clone(),
            targets: self.targets.shallow_clone(),
            batch_size: self.batch_size.clone(),
            sampler: self.sampler.clone(),
            normalize: self.normalize.clone(),
            ..*self
        }
    }
}

impl fmt::Debug for Loader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loader")
            .field("inputs", &self.inputs)
            .field("targets", &self.targets)
            .field("batch_size", &self.batch_size)
            .field("in_order", &self.sampler.is_none())
            .field("normalize", &self.normalize)
            .field("device", &self.device)
            .finish()
    }
}

impl Loader {
    /// Makes batches of `batch_size` samples along the first dimension of both tensors, in order, the last one
    /// possibly smaller, on the device of `inputs`. The loader shares the tensors and copies nothing.
    ///
    /// # Errors
    /// A batch size of 0, tensors without a first dimension or of different lengths, or no samples.
    pub fn new(inputs: &Tensor, targets: &Tensor, batch_size: usize) -> Result<Self> {
        let len = common_len(inputs, targets)?;
        Ok(Self {
            inputs: inputs.shallow_clone(),
            targets: targets.shallow_clone(),
            len,
            batch_size: BatchSize::new(batch_size, len as u64)?,
            sampler: None,
            normalize: None,
            device: inputs.device(),
        })
    }

    /// Shuffles each pass anew with a [`RandomSampler`] of this seed.
    pub fn shuffle(self, seed: u64) -> Self {
        let sampler = RandomSampler::new(self.len, seed);
        self.sampler(sampler)
    }

    /// Takes the samples that `sampler` names, in its order.
    pub fn sampler(mut self, sampler: impl Sampler + 'static) -> Self {
        self.batch_size.set_samples(sampler.num_samples() as u64);
        self.sampler = Some(Arc::new(sampler));
        self
    }

    /// Leaves out the last batch of a pass where it is smaller than the others.
    pub fn drop_last(mut self, on: bool) -> Self {
        self.batch_size.drop_last(on);
        self
    }

    /// Keeps the inputs as bytes, and gives batches of `(x / 255 - mean) / std` in f32: torchvision's `ToTensor` and
    /// `Normalize`. `mean` and `std` have one value for all, or one for each channel (dimension 1).
    ///
    /// On the CPU this takes one pass over the bytes, and the values equal those of libtorch's operations bit for
    /// bit. For another device the bytes are moved (a quarter of the size in f32), and libtorch's operations run
    /// there. This method copies inputs that are not contiguous.
    ///
    /// ```
    /// # use tch::{Device, Kind, Tensor};
    /// use tch_ignite::data::Loader;
    /// # let images = Tensor::zeros([10, 1, 28, 28], (Kind::Uint8, Device::Cpu));
    /// # let labels = Tensor::zeros([10], (Kind::Int64, Device::Cpu));
    /// let train = Loader::new(&images, &labels, 4)?.shuffle(42).normalize(&[0.1307], &[0.3081])?;
    /// # Ok::<(), tch_ignite::Error>(())
    /// ```
    ///
    /// # Errors
    /// Inputs that are not uint8, numbers of values that do not fit, a mean that is not finite, or a std that is
    /// not above 0 and finite.
    pub fn normalize(mut self, mean: &[f64], std: &[f64]) -> Result<Self> {
        let kind = self.inputs.kind();
        if kind != Kind::Uint8 {
            return Err(Error::invalid(format!(
                "normalize needs inputs of kind Uint8, but they are {kind:?}; normalise those once, before"
            )));
        }
        self.normalize = Some(Normalize::new(&self.inputs.size(), mean, std)?);
        self.inputs =
            self.inputs.f_contiguous().map_err(|error| Error::libtorch("normalize", error))?;
        Ok(self)
    }

    /// Gives batches on this device. The copy of a batch waits for the device.
    pub fn to_device(mut self, device: Device) -> Self {
        self.device = device;
        self
    }

    /// Returns the number of batches in a pass.
    pub fn batches(&self) -> u64 {
        self.batch_size.batches()
    }

    /// Returns the number of samples in a batch.
    pub fn batch_size(&self) -> u64 {
        self.batch_size.get()
    }

    /// Changes the batch size of this loader and its clones, from the next batch on; see
    /// [`BatchSizeScheduler`](crate::schedule::BatchSizeScheduler).
    ///
    /// # Errors
    /// A batch size of 0.
    pub fn set_batch_size(&self, samples: u64) -> Result<()> {
        self.batch_size.set(samples)
    }

    /// Returns the number of samples in a pass.
    pub fn samples(&self) -> u64 {
        self.batch_size.samples()
    }
}

impl From<&Loader> for BatchSize {
    fn from(loader: &Loader) -> Self {
        loader.batch_size.clone()
    }
}

/// The order of a pass, on the device of each tensor.
struct Order {
    pass: u64,
    for_inputs: Tensor,
    for_targets: Tensor,
    /// The same order for the kernel that normalises; empty where nothing is normalised.
    rows: Vec<i64>,
}

struct Cursor {
    loader: Loader,
    /// `None` where batches come in order, and before the first `seek`.
    order: Option<Order>,
    /// First samples of the next batch and of the last one.
    next: u64,
    last: u64,
    last_samples: u64,
}

impl Cursor {
    fn fetch(&mut self, len: u64) -> AnyResult<Batch> {
        let (start, size) = (self.next as i64, len as i64);
        let take = |data: &Tensor, order: Option<&Tensor>| match order {
            None => data.f_narrow(0, start, size),
            Some(order) => data.f_index_select(0, &order.f_narrow(0, start, size)?),
        };
        let Loader { inputs, targets, device, normalize, .. } = &self.loader;
        let order = self.order.as_ref();
        let x = match normalize {
            Some(normalize) if inputs.device() == Device::Cpu && *device == Device::Cpu => {
                let (start, size) = (start as usize, size as usize);
                let rows = match order {
                    None => Rows::Consecutive(start, size),
                    Some(order) => Rows::These(&order.rows[start..start + size]),
                };
                normalize.rows(inputs, rows)?
            }
            _ => {
                let x = take(inputs, order.map(|order| &order.for_inputs))?.f_to_device(*device)?;
                match normalize {
                    Some(normalize) => normalize.batch(&x)?,
                    None => x,
                }
            }
        };
        let y = take(targets, order.map(|order| &order.for_targets))?.f_to_device(*device)?;
        self.last = self.next;
        self.next += len;
        self.last_samples = len;
        Ok((x, y))
    }
}

impl Source<Batch> for Cursor {
    fn validate(&self) -> AnyResult<()> {
        self.loader.batch_size.validate()
    }

    fn batches(&self) -> Option<u64> {
        Some(self.loader.batches())
    }

    fn seek(&mut self, pass: u64, batch: u64) -> AnyResult<()> {
        let samples = self.loader.samples();
        let Loader { inputs, targets, len, sampler, normalize, device, .. } = &mut self.loader;
        if let Some(normalize) = normalize {
            *normalize = normalize.on(*device)?;
        }
        if let Some(sampler) = sampler
            && self.order.as_ref().is_none_or(|order| order.pass != pass)
        {
            let rows = order_of(&**sampler, pass, samples, *len)?;
            let rows: Vec<i64> = rows.into_iter().map(|index| index as i64).collect();
            let order = Tensor::f_from_slice(&rows)?;
            self.order = Some(Order {
                pass,
                for_inputs: order.f_to_device(inputs.device())?,
                for_targets: order.f_to_device(targets.device())?,
                rows: if normalize.is_some() { rows } else { vec![] },
            });
        }
        self.next = batch.saturating_mul(self.loader.batch_size());
        Ok(())
    }

    fn next(&mut self) -> Option<AnyResult<Batch>> {
        let len = self.loader.batch_size.batch_at(self.next, self.loader.batch_size());
        if len == 0 {
            return None;
        }
        let first = self.next;
        Some(self.fetch(len).with_context(|| format!("batch of the loader from sample {first}")))
    }

    fn samples(&self) -> Option<u64> {
        Some(self.last_samples)
    }

    fn batches_left(&self) -> Option<u64> {
        Some(self.loader.batch_size.batches_from(self.next))
    }

    fn is_random(&self) -> bool {
        false
    }

    fn sample_position(&self, again: bool) -> Option<SamplePosition> {
        Some(self.loader.batch_size.place(if again { self.last } else { self.next }))
    }

    fn seek_samples(&mut self, pass: u64, place: &SamplePosition) -> AnyResult<bool> {
        self.seek(pass, 0)?;
        self.next = self.loader.batch_size.restore(place)?;
        Ok(true)
    }

    fn settings(&self) -> Map<String, Value> {
        let mut settings = self.loader.batch_size.settings();
        settings.extend(seed_of(self.loader.sampler.as_deref()));
        settings
    }
}

impl<'a> IntoSource<'a, Batch> for &Loader {
    fn into_source(self) -> Box<dyn Source<Batch> + 'a> {
        self.clone().into_source()
    }
}

impl<'a> IntoSource<'a, Batch> for Loader {
    fn into_source(self) -> Box<dyn Source<Batch> + 'a> {
        Box::new(Cursor { loader: self, order: None, next: 0, last: 0, last_samples: 0 })
    }
}
