use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context, Result};

use super::{Dataset, SplitMix64};
use crate::bridge::Serial;
use crate::error::Panicked;
use crate::guard::guarded;

pub(super) type CollateFn<T, B> = dyn Fn(Vec<T>) -> Result<B> + Send + Sync;

/// Part of a pass, in batches.
pub(super) struct Plan {
    pub(super) pass: u64,
    /// None: in order.
    pub(super) order: Option<Arc<[usize]>>,
}

/// A batch, and what was left out of it.
pub(super) struct Fetched<B> {
    pub(super) batch: B,
    pub(super) samples: u64,
    pub(super) skipped: u64,
    pub(super) last_skipped: Option<String>,
}

/// Makes batches out of samples, on any thread.
pub(super) struct Fetcher<D: Dataset, B> {
    pub(super) dataset: Arc<D>,
    pub(super) collate: Arc<CollateFn<D::Item, B>>,
    pub(super) pin: Option<fn(B) -> Result<B>>,
    /// Of the samples' random numbers.
    pub(super) seed: u64,
    pub(super) repeats: bool,
    pub(super) skip_errors: bool,
}

impl<D: Dataset, B> Clone for Fetcher<D, B> {
    fn clone(&self) -> Self {
        Self { dataset: self.dataset.clone(), collate: self.collate.clone(), ..*self }
    }
}

impl<D: Dataset, B> Fetcher<D, B> {
    /// The batch of these positions of the pass; `None` where it was `cancelled` on the way.
    ///
    /// Without gradients, and libtorch's operations on this thread alone: many threads with many threads
    /// each would get into each other's way, and so a batch is the same on whichever thread it is made.
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
