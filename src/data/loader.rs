use std::fmt;
use std::sync::Arc;

use anyhow::{Context, Result as AnyResult};
use serde_json::{Map, Value};
use tch::{Device, Tensor};

use super::map_batches::{MapFn, after, map_batch};
use super::normalize::{Normalize, OnDevice};
use super::sampler::{order_of, seed_of};
use super::subset::check_indices;
use super::{
    BatchSize, IntoSource, RandomSampler, SamplePosition, Sampler, Source, SplitMix64, common_len,
};
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
    /// The rows of the data that this loader's samples are, where they are not all.
    rows: Option<Arc<[usize]>>,
    len: usize,
    batch_size: BatchSize,
    /// `None` for samples in order.
    sampler: Option<Arc<dyn Sampler>>,
    normalize: Option<Normalize>,
    map: Option<Arc<MapFn<Batch>>>,
    /// Seed of the random numbers that `map` gets; `None` for the sampler's.
    seed: Option<u64>,
    device: Device,
}

impl Clone for Loader {
    /// Clones share the data and the batch size.
    fn clone(&self) -> Self {
        Self {
            inputs: self.inputs.shallow_clone(),
            targets: self.targets.shallow_clone(),
            rows: self.rows.clone(),
            batch_size: self.batch_size.clone(),
            sampler: self.sampler.clone(),
            normalize: self.normalize.clone(),
            map: self.map.clone(),
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
            .finish_non_exhaustive()
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
            rows: None,
            len,
            batch_size: BatchSize::new(batch_size, len as u64)?,
            sampler: None,
            normalize: None,
            map: None,
            seed: None,
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
        let normalize = Normalize::new(mean, std)?;
        normalize.check(self.inputs.kind(), &self.inputs.size())?;
        self.inputs =
            self.inputs.f_contiguous().map_err(|error| Error::libtorch("normalize", error))?;
        self.normalize = Some(normalize);
        Ok(self)
    }

    /// Changes each batch with `map` when it is fetched, after it was normalised and moved to the device. Augmentation
    /// of whole batches belongs here, and so do labels as vectors or windows over a text.
    ///
    /// The random numbers of `rng` belong to seed, pass and batch, so that a run which is continued anywhere gets the
    /// same batches; `tch::vision::dataset::augmentation` draws from a generator that no checkpoint knows. The function
    /// runs without gradients, on the thread of the run. Without shuffling a batch is a view of the data, so the
    /// function makes new tensors instead of writing into it. Where it changes the number of samples, the engine still
    /// counts those of the data. A loader that has such a function already calls the new one after it.
    ///
    /// ```
    /// # use tch::{Device, Kind, Tensor};
    /// use tch_ignite::data::{Loader, transforms};
    /// # let images = Tensor::zeros([10, 3, 32, 32], (Kind::Uint8, Device::Cpu));
    /// # let labels = Tensor::zeros([10], (Kind::Int64, Device::Cpu));
    /// let train = Loader::new(&images, &labels, 4)?
    ///     .shuffle(42)
    ///     .normalize(&[0.49, 0.48, 0.45], &[0.25, 0.24, 0.26])?
    ///     .map_batches(|(x, y), rng| {
    ///         let x = transforms::each(&x, |image| {
    ///             let image = transforms::random_crop(image, [32, 32], 4, rng)?;
    ///             transforms::random_horizontal_flip(&image, 0.5, rng)
    ///         })?;
    ///         Ok((x, y.f_one_hot(10)?.f_to_kind(Kind::Float)?))
    ///     });
    /// # Ok::<(), tch_ignite::Error>(())
    /// ```
    pub fn map_batches(
        mut self,
        map: impl Fn(Batch, &mut SplitMix64) -> AnyResult<Batch> + Send + Sync + 'static,
    ) -> Self {
        self.map = Some(after(self.map.take(), map));
        self
    }

    /// Sets the seed of the random numbers that [`map_batches`](Self::map_batches) gives. The default is the seed of
    /// the sampler or of [`shuffle`](Self::shuffle), or 0 without it. Processes of a group that have the same seed draw
    /// the same numbers.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// Makes a loader of some samples of this one, in the order of `indices`. Both share the data; each has a batch
    /// size of its own, the same at first. The new loader has all that was set before: also
    /// [`drop_last`](Self::drop_last), which leaves out samples, and [`map_batches`](Self::map_batches), which may
    /// augment. Call after `subset` what is for training alone.
    ///
    /// ```
    /// # use tch::{Device, Kind, Tensor};
    /// use tch_ignite::data::{KFold, Loader};
    /// # let (x, y) = (Tensor::rand([10, 3], (Kind::Float, Device::Cpu)), Tensor::arange(10, (Kind::Int64, Device::Cpu)));
    /// let all = Loader::new(&x, &y, 4)?;
    /// for (train, test) in KFold::new(5)?.split(10)? {
    ///     let (train, test) = (all.subset(train)?.shuffle(42), all.subset(test)?);
    ///     assert_eq!((train.samples(), test.samples()), (8, 2));
    /// }
    /// # Ok::<(), tch_ignite::Error>(())
    /// ```
    ///
    /// # Errors
    /// No index, an index that the data does not have, or a loader that has a sampler: choose first, then shuffle.
    pub fn subset(&self, indices: impl Into<Vec<usize>>) -> Result<Self> {
        let mut rows: Vec<usize> = indices.into();
        if self.sampler.is_some() {
            return Err(Error::invalid(
                "subset was called after shuffle or sampler, which then would not fit; call subset first",
            ));
        }
        if rows.is_empty() {
            return Err(Error::invalid("a subset needs at least one index, but none was given"));
        }
        check_indices(&rows, self.len, "the loader")?;
        if let Some(own) = &self.rows {
            rows.iter_mut().for_each(|row| *row = own[*row]);
        }
        let mut subset = self.clone();
        subset.len = rows.len();
        subset.batch_size = self.batch_size.of(rows.len() as u64)?;
        subset.rows = Some(rows.into());
        Ok(subset)
    }

    /// Gives batches on this device. The copy of a batch waits for the device.
    pub fn to_device(mut self, device: Device) -> Self {
        self.device = device;
        self
    }

    fn map_seed(&self) -> u64 {
        let of_order = || self.sampler.as_ref().and_then(|sampler| sampler.seed());
        self.seed.or_else(of_order).unwrap_or(0)
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
    for_inputs: Tensor,
    for_targets: Tensor,
    /// The same order for the kernel that normalises; empty where nothing is normalised.
    rows: Vec<i64>,
}

struct Cursor {
    loader: Loader,
    /// The pass that `order` belongs to; `None` before the first `seek`.
    pass: Option<u64>,
    /// `None` where batches are all rows in order.
    order: Option<Order>,
    /// `None` where the kernel normalises, or nothing does.
    on_device: Option<OnDevice>,
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
            Some(normalize) if self.on_device.is_none() => {
                let (start, size) = (start as usize, size as usize);
                let rows = match order {
                    None => Rows::Consecutive(start, size),
                    Some(order) => Rows::These(&order.rows[start..start + size]),
                };
                normalize.rows(inputs, rows)?
            }
            _ => {
                let x = take(inputs, order.map(|order| &order.for_inputs))?.f_to_device(*device)?;
                match &self.on_device {
                    Some(on_device) => on_device.batch(&x)?,
                    None => x,
                }
            }
        };
        let y = take(targets, order.map(|order| &order.for_targets))?.f_to_device(*device)?;
        let batch = match &self.loader.map {
            Some(map) => {
                let pass = self.pass.unwrap_or(0);
                map_batch(&**map, (x, y), [self.loader.map_seed(), pass, self.next])?
            }
            None => (x, y),
        };
        self.last = self.next;
        self.next += len;
        self.last_samples = len;
        Ok(batch)
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
        let Loader { inputs, targets, rows, len, sampler, normalize, device, .. } = &self.loader;
        if let Some(normalize) = normalize
            && !(inputs.device() == Device::Cpu && *device == Device::Cpu)
            && self.on_device.is_none()
        {
            self.on_device = Some(normalize.on(*device, inputs.dim())?);
        }
        let order = match (sampler, rows) {
            (Some(sampler), rows) if self.pass != Some(pass) => {
                let mut order = order_of(&**sampler, pass, samples, *len)?;
                if let Some(rows) = rows {
                    order.iter_mut().for_each(|index| *index = rows[*index]);
                }
                Some(order)
            }
            // Rows without a sampler come in the same order in each pass.
            (None, Some(rows)) if self.pass.is_none() => Some(rows.to_vec()),
            _ => None,
        };
        if let Some(order) = order {
            let order: Vec<i64> = order.into_iter().map(|index| index as i64).collect();
            let tensor = Tensor::f_from_slice(&order)?;
            self.order = Some(Order {
                for_inputs: tensor.f_to_device(inputs.device())?,
                for_targets: tensor.f_to_device(targets.device())?,
                rows: if normalize.is_some() { order } else { vec![] },
            });
        }
        self.pass = Some(pass);
        self.next = batch.saturating_mul(self.loader.batch_size());
        Ok(())
    }

    fn next(&mut self) -> Option<AnyResult<Batch>> {
        if self.pass.is_none()
            && let Err(error) = self.seek(0, 0)
        {
            return Some(Err(error));
        }
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
        if self.loader.map.is_some() {
            settings.insert("seed of batches".into(), self.loader.map_seed().into());
        }
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
        Box::new(Cursor {
            loader: self,
            pass: None,
            order: None,
            on_device: None,
            next: 0,
            last: 0,
            last_samples: 0,
        })
    }
}
