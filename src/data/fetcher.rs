use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context, Result};

use super::finish::Finish;
use super::{BatchSize, Dataset, SplitMix64};
use crate::bridge::Serial;
use crate::error::Panicked;
use crate::guard::guarded;

pub(super) type CollateFn<T, B> = dyn Fn(Vec<T>) -> Result<B> + Send + Sync;

/// The order of a pass, from which workers and consumer find the samples of a batch.
pub(super) struct Plan {
    pub(super) pass: u64,
    /// `None` for samples in order.
    pub(super) order: Option<Arc<[usize]>>,
    /// The position behind each batch; `None` where all batches have one size.
    pub(super) ends: Option<Arc<[u64]>>,
}

impl Plan {
    /// Returns the number of batches that end at or before this position, where batches have sizes of their own.
    fn batches_before(ends: &[u64], first: u64) -> u64 {
        ends.partition_point(|end| *end <= first) as u64
    }

    /// Returns the position where a batch of the pass begins.
    pub(super) fn first_of(&self, batch: u64, sizes: &BatchSize) -> u64 {
        match &self.ends {
            None => batch.saturating_mul(sizes.get()),
            Some(ends) => match batch.min(ends.len() as u64) {
                0 => 0,
                batch => ends[batch as usize - 1],
            },
        }
    }

    /// Returns the number of samples in the batch of (at most) `size` that begins at this position; 0 at the end.
    pub(super) fn batch_at(&self, first: u64, size: u64, sizes: &BatchSize) -> u64 {
        match &self.ends {
            None => sizes.batch_at(first, size),
            Some(ends) => {
                let end = ends.get(Self::batches_before(ends, first) as usize);
                end.map_or(0, |end| end - first)
            }
        }
    }

    /// Returns the number of batches from this position on.
    pub(super) fn batches_from(&self, first: u64, sizes: &BatchSize) -> u64 {
        match &self.ends {
            None => sizes.batches_from(first),
            Some(ends) => ends.len() as u64 - Self::batches_before(ends, first),
        }
    }

    /// Returns the positions of the batch that comes `number` batches after the one at `first`; `None` past the end.
    pub(super) fn batch_after(
        &self,
        first: u64,
        number: u64,
        size: u64,
        sizes: &BatchSize,
    ) -> Option<Range<usize>> {
        let first = match &self.ends {
            None => first.saturating_add(number.saturating_mul(size)),
            Some(_) if number == 0 => first,
            Some(ends) => self.first_of(Self::batches_before(ends, first) + number, sizes),
        };
        let len = self.batch_at(first, size, sizes);
        (len > 0).then(|| first as usize..(first + len) as usize)
    }
}

/// A batch, with the number of samples in it and of those left out.
pub(super) struct Fetched<B> {
    pub(super) batch: B,
    pub(super) samples: u64,
    pub(super) skipped: u64,
    pub(super) last_skipped: Option<String>,
}

/// Makes batches of samples, on any thread.
pub(super) struct Fetcher<D: Dataset, B> {
    pub(super) dataset: Arc<D>,
    pub(super) collate: Arc<CollateFn<D::Item, B>>,
    /// Finishes batches that stay on the CPU.
    pub(super) finish: Finish<B>,
    pub(super) pin: Option<fn(B) -> Result<B>>,
    /// Seed of the samples' random numbers.
    pub(super) seed: u64,
    pub(super) repeats: bool,
    pub(super) skip_errors: bool,
}

impl<D: Dataset, B> Clone for Fetcher<D, B> {
    fn clone(&self) -> Self {
        Self {
            dataset: self.dataset.clone(),
            collate: self.collate.clone(),
            finish: self.finish.clone(),
            ..*self
        }
    }
}

impl<D: Dataset, B> Fetcher<D, B> {
    /// Makes the batch of these positions of the pass; `None` where it was `cancelled` on the way.
    ///
    /// The batch is made without gradients, and libtorch works on this thread alone: several workers with several
    /// libtorch threads each would compete for the cores, and with one each a batch is the same on any thread.
    pub(super) fn fetch(
        &self,
        plan: &Plan,
        positions: Range<usize>,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Option<Fetched<B>>> {
        let _no_grad = tch::no_grad_guard();
        let _serial = Serial::begin();
        let (start, len) = (positions.start, positions.len());
        let mut samples = Vec::with_capacity(len);
        let mut last_error = None;
        for position in positions {
            if cancelled() {
                return Ok(None);
            }
            match self.sample(plan, position) {
                Ok(sample) => samples.push(sample),
                Err(error) if self.skip_errors && error.downcast_ref::<Panicked>().is_none() => {
                    last_error = Some(error);
                }
                Err(error) => return Err(error),
            }
        }
        let count = samples.len();
        if let Some(error) = last_error.take_if(|_| count == 0) {
            return Err(
                error.context(format!("none of the {len} samples of a batch could be read"))
            );
        }
        let place =
            || format!("collating {count} samples from position {start} of pass {}", plan.pass);
        let batch = guarded(|| (self.collate)(samples)).with_context(place)?;
        let batch = self.finish.on_cpu(batch, [self.seed, plan.pass, start as u64])?;
        let batch = match self.pin {
            Some(pin) => pin(batch).context("pin_memory")?,
            None => batch,
        };
        Ok(Some(Fetched {
            batch,
            samples: count as u64,
            skipped: (len - count) as u64,
            last_skipped: last_error.map(|error| format!("{error:#}")),
        }))
    }

    fn sample(&self, plan: &Plan, position: usize) -> Result<D::Item> {
        let index = plan.order.as_ref().map_or(position, |order| order[position]);
        let mut rng = match self.repeats {
            true => SplitMix64::keyed([self.seed, plan.pass, index as u64, position as u64]),
            false => SplitMix64::keyed([self.seed, plan.pass, index as u64]),
        };
        guarded(|| self.dataset.get(index, &mut rng))
            .with_context(|| format!("sample {index} of the dataset"))
    }
}
