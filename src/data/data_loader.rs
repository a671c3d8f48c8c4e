use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result as AnyResult};
use serde_json::{Map, Value};
use tch::{Cuda, Device, Tensor};

use super::batch_sampler::batches_of;
use super::batch_size::FIXED_BY_SAMPLER;
use super::fetcher::{Fetched, Fetcher, Plan};
use super::finish::Finish;
use super::map_batches::after;
use super::normalize::{Normalize, OnDevice};
use super::sampler::{order_of, seed_of};
use super::workers::{Work, Workers};
use super::{
    BatchSampler, BatchSize, Collate, Dataset, IntoSource, RandomSampler, SamplePosition, Sampler,
    Source, SplitMix64, Transfer,
};
use crate::error::Result;

/// Batches of a [`Dataset`], read sample by sample, on worker threads if wanted: PyTorch's `DataLoader`.
///
/// The samples and their order depend on the seeds and the pass alone, not on the number of workers or on where a run
/// was continued. The loader reaches any position without reading the samples before it.
///
/// Samples that have no index, such as records of a stream, need a [`StreamLoader`](super::StreamLoader).
/// For tensors in memory that need no work sample by sample, a [`Loader`](super::Loader) is about 5 times as fast.
///
/// ```
/// use tch::{Device, Kind, Tensor};
/// use tch_ignite::data::{DataLoader, from_fn};
/// use tch_ignite::engine::{Engine, Until};
///
/// let waves = from_fn(100, |index, rng| {
///     let t = Tensor::f_arange(32, (Kind::Float, Device::Cpu))?;
///     let noise = 0.1 * rng.uniform();
///     Ok(((t * (index as f64 / 100.) + noise).f_sin()?, (index / 50) as i64))
/// });
/// let loader = DataLoader::new(waves, 8)?.shuffle(42).num_workers(2);
/// let mut trainer = Engine::new(|seen: &mut i64, _, (x, y): (Tensor, Tensor)| {
///     assert_eq!(x.size()[0], y.size()[0]);
///     *seen += x.size()[0];
///     Ok(())
/// });
/// let mut seen = 0;
/// trainer.run(&mut seen, &loader, Until::epochs(2))?;
/// assert_eq!(seen, 200);
/// # Ok::<(), tch_ignite::Error>(())
/// ```
///
/// # Errors and panics
/// An error or a panic of the dataset ends the run at the batch that the sample belongs to, with an error that names
/// the sample's index; [`skip_errors`](Self::skip_errors) leaves such samples out instead. The loader can be used
/// again afterwards.
///
/// # Threads
/// Workers live as long as a run. The end of a run waits for the samples that are being read. Workers make batches
/// without gradients, and each worker uses one libtorch thread.
pub struct DataLoader<D: Dataset, B> {
    fetcher: Fetcher<D, B>,
    len: usize,
    batch_size: BatchSize,
    /// `None` for samples in order.
    sampler: Option<Arc<dyn Sampler>>,
    /// `None` for batches of one size.
    batch_sampler: Option<Arc<dyn BatchSampler>>,
    /// Seed of the random numbers that the dataset gets; `None` for the seed of [`shuffle`](Self::shuffle).
    seed: Option<u64>,
    shuffle_seed: u64,
    num_workers: usize,
    prefetch_factor: usize,
    device: Option<(Device, MoveFn<B>)>,
    skipped: Arc<Skipped>,
}

type MoveFn<B> = fn(B, Device, bool) -> AnyResult<B>;

#[derive(Default)]
struct Skipped {
    count: AtomicU64,
    last: Mutex<Option<String>>,
}

impl<D: Dataset + 'static, B> DataLoader<D, B> {
    /// Makes batches of `batch_size` samples, in order, the last one possibly smaller. The sample type's [`Collate`]
    /// puts them together.
    ///
    /// # Errors
    /// A batch size of 0, or a dataset without samples.
    pub fn new(dataset: D, batch_size: usize) -> Result<Self>
    where
        D::Item: Collate<Batch = B>,
    {
        Self::with_collate(dataset, batch_size, D::Item::collate)
    }

    /// Makes a loader like [`new`](Self::new) whose batches are put together by `collate`. The function gets at
    /// least one sample, in order.
    ///
    /// ```
    /// # use tch::{Device, Kind, Tensor};
    /// use tch_ignite::data::{DataLoader, from_fn};
    /// // Texts of different lengths, filled up with zeros to the longest of the batch.
    /// let texts = from_fn(10, |index, _| Ok(Tensor::f_ones([index as i64 + 1], (Kind::Int64, Device::Cpu))?));
    /// let pad = |texts: Vec<Tensor>| Ok(Tensor::f_pad_sequence(&texts, true, 0., "right")?);
    /// let loader = DataLoader::with_collate(texts, 4, pad)?;
    /// # Ok::<(), tch_ignite::Error>(())
    /// ```
    ///
    /// # Errors
    /// The errors of [`new`](Self::new).
    pub fn with_collate(
        dataset: D,
        batch_size: usize,
        collate: impl Fn(Vec<D::Item>) -> AnyResult<B> + Send + Sync + 'static,
    ) -> Result<Self> {
        let len = dataset.len();
        Ok(Self {
            fetcher: Fetcher {
                dataset: Arc::new(dataset),
                collate: Arc::new(collate),
                finish: Finish::default(),
                pin: None,
                seed: 0,
                repeats: false,
                skip_errors: false,
            },
            len,
            batch_size: BatchSize::new(batch_size, len as u64)?,
            sampler: None,
            batch_sampler: None,
            seed: None,
            shuffle_seed: 0,
            num_workers: 0,
            prefetch_factor: 2,
            device: None,
            skipped: Arc::default(),
        })
    }

    /// Shuffles each pass anew with a [`RandomSampler`] of this seed.
    pub fn shuffle(mut self, seed: u64) -> Self {
        self.shuffle_seed = seed;
        let sampler = RandomSampler::new(self.len, seed);
        self.sampler(sampler)
    }

    /// Takes the samples that `sampler` names, in its order.
    pub fn sampler(mut self, sampler: impl Sampler + 'static) -> Self {
        self.batch_size.set_samples(sampler.num_samples() as u64);
        self.fetcher.repeats = sampler.repeats();
        self.sampler = Some(Arc::new(sampler));
        self
    }

    /// Takes the batches that `sampler` names, in its order. They replace those of the batch size that
    /// [`new`](Self::new) was given; there is then no [`shuffle`](Self::shuffle), [`sampler`](Self::sampler) or
    /// [`drop_last`](Self::drop_last), and no batch size to change.
    ///
    /// ```
    /// # use tch::{Device, Kind, Tensor};
    /// use tch_ignite::data::{BucketBatchSampler, DataLoader, Padded, from_fn};
    /// // Texts and their classes; each batch has texts of similar lengths, filled up to at most 64 tokens together.
    /// let lengths: Vec<usize> = (0..100).map(|index| 1 + index % 17).collect();
    /// let texts = from_fn(100, |index, _| {
    ///     let tokens = Tensor::f_ones([1 + index as i64 % 17], (Kind::Int64, Device::Cpu))?;
    ///     Ok((Padded::new(tokens), index as i64 % 2))
    /// });
    /// let buckets = BucketBatchSampler::by_tokens(&lengths, 64)?.shuffle(42);
    /// let train = DataLoader::new(texts, 1)?.batch_sampler(buckets);
    /// # Ok::<(), tch_ignite::Error>(())
    /// ```
    pub fn batch_sampler(mut self, sampler: impl BatchSampler + 'static) -> Self {
        self.batch_size.fix();
        self.fetcher.repeats = sampler.repeats();
        self.batch_sampler = Some(Arc::new(sampler));
        self
    }

    /// Changes each batch with `map`, after it was put together and [normalised](DataLoader::normalize). Changes that
    /// need several samples belong here, such as [`mixup`](super::transforms::mixup); those of one sample belong into
    /// [`Dataset::map`].
    ///
    /// The random numbers of `rng` belong to seed, pass and batch, so that a run which is continued anywhere, with any
    /// number of workers, gets the same batches. The function runs without gradients: on the workers where batches stay
    /// on the CPU, and otherwise when the engine asks for a batch, on the batch that was moved to the
    /// [device](Self::to_device). A loader that has such a function already calls the new one after it.
    ///
    /// Processes of a group that have the same seed draw the same numbers; [`.seed(seed + rank)`](Self::seed) gives each
    /// its own, beside a sampler that has the common seed. Ranks above 0 then warn, when a run is resumed, that their seed is
    /// not the one of rank 0, which the checkpoint has.
    pub fn map_batches(
        mut self,
        map: impl Fn(B, &mut SplitMix64) -> AnyResult<B> + Send + Sync + 'static,
    ) -> Self
    where
        B: 'static,
    {
        let finish = &mut self.fetcher.finish;
        finish.map = Some(after(finish.map.take(), map));
        self
    }

    /// Sets the seed of the random numbers that the dataset and [`map_batches`](Self::map_batches) get. The default is
    /// the seed of [`shuffle`](Self::shuffle), or 0 without it.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// Leaves out the last batch of a pass where it is smaller than the others.
    pub fn drop_last(mut self, on: bool) -> Self {
        self.batch_size.drop_last(on);
        self
    }

    /// Makes batches ahead of their use on this many threads. With 0, the default, each batch is made when the engine
    /// asks for it.
    pub fn num_workers(mut self, threads: usize) -> Self {
        self.num_workers = threads;
        self
    }

    /// Sets how many batches each worker may have begun or ready, 2 by default. Workers times this many batches are
    /// in memory.
    pub fn prefetch_factor(mut self, batches: usize) -> Self {
        self.prefetch_factor = batches;
        self
    }

    /// Gives batches on this device. The copy is made when the engine asks for a batch, and waits for the device
    /// unless the batch is in [pinned memory](Self::pin_memory).
    pub fn to_device(mut self, device: Device) -> Self
    where
        B: Transfer,
    {
        self.device = Some((device, B::transfer));
        self
    }

    /// Makes the workers put batches into pinned memory, so that the copy to a CUDA device does not block the
    /// program. Without CUDA this changes nothing.
    pub fn pin_memory(mut self, on: bool) -> Self
    where
        B: Transfer,
    {
        self.fetcher.pin = (on && Cuda::is_available()).then_some(B::pin_memory);
        self
    }

    /// Leaves out samples that cannot be read, so that their batches are smaller; [`skipped`](Self::skipped) counts
    /// them. A batch without any sample is still an error, and so is a panic.
    pub fn skip_errors(mut self, on: bool) -> Self {
        self.fetcher.skip_errors = on;
        self
    }

    /// Returns how many samples were left out of the batches that this loader and its clones gave.
    pub fn skipped(&self) -> u64 {
        self.skipped.count.load(Ordering::Relaxed)
    }

    /// Returns the index and the error of the sample that was left out last.
    pub fn last_skipped(&self) -> Option<String> {
        self.skipped.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns the number of batches in a pass.
    pub fn batches(&self) -> u64 {
        match &self.batch_sampler {
            Some(sampler) => sampler.num_batches() as u64,
            None => self.batch_size.batches(),
        }
    }

    /// Returns the number of samples in a batch; with a [batch sampler](Self::batch_sampler) the number that
    /// [`new`](Self::new) was given, which is not used.
    pub fn batch_size(&self) -> u64 {
        self.batch_size.get()
    }

    /// Changes the batch size of this loader and its clones, from the next batch on. Batches that the workers made
    /// ahead are made again. See [`BatchSizeScheduler`](crate::schedule::BatchSizeScheduler).
    ///
    /// # Errors
    /// A batch size of 0, or a loader with a [batch sampler](Self::batch_sampler).
    pub fn set_batch_size(&self, samples: u64) -> Result<()> {
        self.batch_size.set(samples)
    }

    /// Returns the number of samples in a pass; with a [batch sampler](Self::batch_sampler) that of the dataset.
    pub fn samples(&self) -> u64 {
        self.batch_size.samples()
    }
}

impl<D: Dataset + 'static> DataLoader<D, (Tensor, Tensor)> {
    /// Gives `(x / 255 - mean) / std` in f32 for inputs that are bytes, such as pictures: torchvision's `ToTensor` and
    /// `Normalize`. `mean` and `std` have one value for all, or one for each channel (dimension 1 of a batch).
    ///
    /// Where batches stay on the CPU, the workers do this in one pass over the bytes. For another device the bytes are
    /// moved (a quarter of the size in f32), and libtorch's operations run there; mean and std are copied to the device
    /// with the first batch. A batch that is not of bytes, or has other channels, is an error that ends the run.
    ///
    /// # Errors
    /// Numbers of values that do not fit, a mean that is not finite, or a std that is not above 0 and finite.
    pub fn normalize(mut self, mean: &[f64], std: &[f64]) -> Result<Self> {
        let normalize = Normalize::new(mean, std)?;
        self.fetcher.finish.normalize = Some((normalize, |(x, y), change| Ok((change(&x)?, y))));
        Ok(self)
    }
}

impl<D: Dataset, B> Clone for DataLoader<D, B> {
    /// Clones share the dataset, the batch size and the count of skipped samples.
    fn clone(&self) -> Self {
        Self {
            fetcher: self.fetcher.clone(),
            batch_size: self.batch_size.clone(),
            sampler: self.sampler.clone(),
            batch_sampler: self.batch_sampler.clone(),
            skipped: self.skipped.clone(),
            ..*self
        }
    }
}

impl<D: Dataset, B> fmt::Debug for DataLoader<D, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DataLoader")
            .field("len", &self.len)
            .field("batch_size", &self.batch_size)
            .field("in_order", &self.sampler.is_none())
            .field("num_workers", &self.num_workers)
            .field("prefetch_factor", &self.prefetch_factor)
            .finish_non_exhaustive()
    }
}

impl<D: Dataset, B> From<&DataLoader<D, B>> for BatchSize {
    fn from(loader: &DataLoader<D, B>) -> Self {
        loader.batch_size.clone()
    }
}

struct Cursor<D: Dataset, B> {
    loader: DataLoader<D, B>,
    /// Finishes batches on a device other than the CPU; the fetcher then has nothing to finish.
    finish: Finish<B>,
    on_device: Option<OnDevice>,
    plan: Option<Arc<Plan>>,
    /// First samples of the next batch and of the last one.
    next: u64,
    last: u64,
    /// Set while a batch is made, and left set where that fails: the failed batch is then fetched again.
    failed: bool,
    last_samples: u64,
    /// Started with the first batch.
    workers: Option<Workers<Fetched<B>>>,
    /// Batch size the workers prefetch with; `None` if they must restart.
    under_way: Option<u64>,
}

impl<D: Dataset + 'static, B: Send + 'static> Cursor<D, B> {
    /// Makes the next batch, of `len` samples; `size` is the batch size, which is larger where too few samples are
    /// left.
    fn fetch(&mut self, size: u64, len: u64) -> AnyResult<B> {
        let plan = self.plan.as_ref().context("no pass has begun")?;
        let first = self.next;
        (self.last, self.next, self.failed) = (first, first + len, true);
        let fetched = if self.loader.num_workers == 0 {
            let positions = first as usize..(first + len) as usize;
            self.loader.fetcher.fetch(plan, positions, &|| false)?
        } else {
            if self.workers.is_none() {
                self.workers = Some(self.loader.spawn()?);
            }
            let workers = self.workers.as_ref().context("no workers")?;
            if self.under_way != Some(size) {
                let (plan, bounds) = (plan.clone(), self.loader.batch_size.clone());
                workers.begin(Some(Work { plan, first, batch_size: size, bounds }));
                self.under_way = Some(size);
            }
            workers.next().transpose()?
        };
        let fetched = fetched.context("the workers have no further batch")?;
        let batch = match self.loader.device {
            Some((device, transfer)) => {
                let pinned = self.loader.fetcher.pin.is_some();
                let batch = transfer(fetched.batch, device, pinned)
                    .with_context(|| format!("moving a batch to {device:?}"))?;
                let key = [self.loader.fetcher.seed, plan.pass, first];
                self.finish.on(device, &mut self.on_device, batch, key)?
            }
            None => fetched.batch,
        };
        (self.last_samples, self.failed) = (fetched.samples, false);
        self.loader.skipped.add(fetched.skipped, fetched.last_skipped);
        Ok(batch)
    }
}

impl Skipped {
    fn add(&self, count: u64, last: Option<String>) {
        if last.is_some() {
            self.count.fetch_add(count, Ordering::Relaxed);
            *self.last.lock().unwrap_or_else(PoisonError::into_inner) = last;
        }
    }
}

impl<D: Dataset + 'static, B: Send + 'static> DataLoader<D, B> {
    fn spawn(&self) -> AnyResult<Workers<Fetched<B>>> {
        let fetcher = self.fetcher.clone();
        let ahead = self.num_workers.saturating_mul(self.prefetch_factor);
        let make = move |plan: &Plan, positions, cancelled: &dyn Fn() -> bool| {
            fetcher.fetch(plan, positions, cancelled)
        };
        Workers::spawn(self.num_workers, ahead, Arc::new(make))
    }
}

impl<D: Dataset + 'static, B: Send + 'static> Source<B> for Cursor<D, B> {
    fn validate(&self) -> AnyResult<()> {
        anyhow::ensure!(
            self.loader.prefetch_factor > 0 || self.loader.num_workers == 0,
            "prefetch_factor must be at least 1 with workers, but 0 was given"
        );
        let Some(sampler) = &self.loader.batch_sampler else {
            return self.loader.batch_size.validate();
        };
        anyhow::ensure!(
            self.loader.sampler.is_none() && !self.loader.batch_size.drops_last(),
            "a loader with a batch sampler takes neither shuffle, sampler nor drop_last; shuffle in the batch sampler"
        );
        anyhow::ensure!(sampler.num_batches() > 0, "the batch sampler gives no batches");
        Ok(())
    }

    fn batches(&self) -> Option<u64> {
        Some(self.loader.batches())
    }

    fn seek(&mut self, pass: u64, batch: u64) -> AnyResult<()> {
        (self.under_way, self.failed) = (None, false);
        if let Some(workers) = &self.workers {
            workers.begin(None);
        }
        if self.plan.as_ref().is_none_or(|plan| plan.pass != pass) {
            let (samples, len) = (self.loader.samples(), self.loader.len);
            let (order, ends) = match (&self.loader.batch_sampler, &self.loader.sampler) {
                (Some(sampler), _) => {
                    let (order, ends) = batches_of(&**sampler, pass, len)?;
                    (Some(order.into()), Some(ends.into()))
                }
                (None, Some(sampler)) => {
                    (Some(order_of(&**sampler, pass, samples, len)?.into()), None)
                }
                (None, None) => (None, None),
            };
            self.plan = Some(Arc::new(Plan { pass, order, ends }));
        }
        let plan = self.plan.as_ref().context("no pass has begun")?;
        self.next = plan.first_of(batch, &self.loader.batch_size);
        Ok(())
    }

    fn next(&mut self) -> Option<AnyResult<B>> {
        let size = self.loader.batch_size();
        // A clone that shares the size, and was made before the batch sampler was given, can change it.
        if self.loader.batch_sampler.is_some() && !self.loader.batch_size.is_as_made() {
            return Some(Err(anyhow::anyhow!(FIXED_BY_SAMPLER)));
        }
        if self.plan.is_none()
            && let Err(error) = self.seek(0, 0)
        {
            return Some(Err(error));
        }
        let len = self.plan.as_ref()?.batch_at(self.next, size, &self.loader.batch_size);
        (len > 0).then(|| self.fetch(size, len))
    }

    fn samples(&self) -> Option<u64> {
        Some(self.last_samples)
    }

    fn batches_left(&self) -> Option<u64> {
        match &self.plan {
            Some(plan) => Some(plan.batches_from(self.next, &self.loader.batch_size)),
            None => Some(self.loader.batches()),
        }
    }

    fn is_random(&self) -> bool {
        false
    }

    fn sample_position(&self, again: bool) -> Option<SamplePosition> {
        // The batches of one number have other sizes in other processes, so they are counted.
        if self.loader.batch_sampler.is_some() {
            return None;
        }
        let again = again || self.failed;
        Some(self.loader.batch_size.place(if again { self.last } else { self.next }))
    }

    fn seek_samples(&mut self, pass: u64, place: &SamplePosition) -> AnyResult<bool> {
        if self.loader.batch_sampler.is_some() {
            return Ok(false);
        }
        self.seek(pass, 0)?;
        self.next = self.loader.batch_size.restore(place)?;
        Ok(true)
    }

    fn settings(&self) -> Map<String, Value> {
        let mut settings = self.loader.batch_size.settings();
        settings.insert("seed of samples".into(), self.loader.fetcher.seed.into());
        settings.extend(seed_of(self.loader.sampler.as_deref()));
        if let Some(sampler) = &self.loader.batch_sampler {
            let batches = "number of batches, which count the place in a pass,";
            settings.insert(batches.into(), sampler.num_batches().into());
            settings.extend(sampler.seed().map(|seed| ("seed of the order".into(), seed.into())));
        }
        settings
    }
}

impl<'a, D: Dataset + 'static, B: Send + 'static> IntoSource<'a, B> for &DataLoader<D, B> {
    fn into_source(self) -> Box<dyn Source<B> + 'a> {
        self.clone().into_source()
    }
}

impl<'a, D: Dataset + 'static, B: Send + 'static> IntoSource<'a, B> for DataLoader<D, B> {
    fn into_source(mut self) -> Box<dyn Source<B> + 'a> {
        self.fetcher.seed = self.seed.unwrap_or(self.shuffle_seed);
        let moves = matches!(self.device, Some((device, _)) if device != Device::Cpu);
        let finish =
            if moves { std::mem::take(&mut self.fetcher.finish) } else { Finish::default() };
        Box::new(Cursor {
            loader: self,
            finish,
            on_device: None,
            plan: None,
            next: 0,
            last: 0,
            failed: false,
            last_samples: 0,
            workers: None,
            under_way: None,
        })
    }
}
