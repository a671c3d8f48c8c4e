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

/// Batches of inputs and targets that lie in memory: the fast path. For data that does not, or that is
/// changed sample by sample, see [`DataLoader`](super::DataLoader).
///
/// Shuffled orders are a function of seed and pass, so a run can be continued anywhere at no cost.
/// A batch costs one gather of inputs and one of targets (without shuffling: two views, no copy), and
/// a copy to the device where that is another one than the data's. A pass of a shuffled loader costs
/// 8 bytes a sample (16 with [`normalize`](Self::normalize)).
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
pub struct Loader {
    inputs: Tensor,
    targets: Tensor,
    len: usize,
    batch_size: BatchSize,
    /// None: in order.
    sampler: Option<Arc<dyn Sampler>>,
    normalize: Option<Normalize>,
    device: Device,
}

impl Clone for Loader {
    /// Shares the data and the batch size.
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
    /// Batches of `batch_size` along the first dimension of both tensors, in order, the last one
    /// possibly smaller, on the device of `inputs`. Shares the tensors, copies nothing.
    ///
    /// # Errors
    /// Batch size 0, tensors without a first dimension or of different lengths, no samples.
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

    /// Shuffles each pass anew, by this seed: a [`RandomSampler`].
    pub fn shuffle(self, seed: u64) -> Self {
        let sampler = RandomSampler::new(self.len, seed);
        self.sampler(sampler)
    }

    /// Takes the samples that this one names, in its order.
    pub fn sampler(mut self, sampler: impl Sampler + 'static) -> Self {
        self.batch_size.set_samples(sampler.num_samples() as u64);
        self.sampler = Some(Arc::new(sampler));
        self
    }

    /// Leaves out the last batch of a pass where it is smaller.
    pub fn drop_last(mut self, on: bool) -> Self {
        self.batch_size.drop_last(on);
        self
    }

    /// Keeps inputs as the bytes they are, and gives batches of `(x / 255 - mean) / std` in float:
    /// torchvision's `ToTensor` and `Normalize`. One value each for all, or one for each channel
    /// (dimension 1).
    ///
    /// On the CPU one pass over the bytes, with the values of libtorch's operations bit for bit. On
    /// another device the bytes are moved, a quarter of the floats, and libtorch's operations follow
    /// there. Inputs that are not contiguous are copied once, here.
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
    /// Inputs that are not uint8, numbers of values that do not fit, a std that is not above 0.
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

    /// Gives batches on this device.
    pub fn to_device(mut self, device: Device) -> Self {
        self.device = device;
        self
    }

    /// Batches in a pass.
    pub fn batches(&self) -> u64 {
        self.batch_size.batches()
    }

    /// Samples in a batch.
    pub fn batch_size(&self) -> u64 {
        self.batch_size.get()
    }

    /// Changes the batch size of this loader and its clones, from the next batch on; see
    /// [`BatchSizeScheduler`](crate::schedule::BatchSizeScheduler).
    pub fn set_batch_size(&self, samples: u64) -> Result<()> {
        self.batch_size.set(samples)
    }

    /// Samples in a pass.
    pub fn samples(&self) -> u64 {
        self.batch_size.samples()
    }
}

impl From<&Loader> for BatchSize {
    fn from(loader: &Loader) -> Self {
        loader.batch_size.clone()
    }
}

/// The order of a pass, on each tensor's device.
struct Order {
    pass: u64,
    for_inputs: Tensor,
    for_targets: Tensor,
    /// For the kernel.
    rows: Vec<i64>,
}

struct Cursor {
    loader: Loader,
    /// None where batches come in order.
    order: Option<Order>,
    /// The first sample of the next batch, and of the last one.
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
