use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Map, Value};

use super::SamplePosition;
use crate::error::{Error, Result};

/// The batch size of a [`Loader`](super::Loader) or [`DataLoader`](super::DataLoader): a handle,
/// whose clones share it, so that it can be changed while the engine has the loader.
#[derive(Debug, Clone)]
pub struct BatchSize {
    size: Arc<AtomicU64>,
    /// What it was made with.
    made: u64,
    samples: u64,
    drop_last: bool,
}

impl BatchSize {
    pub(super) fn new(size: usize, samples: u64) -> Result<Self> {
        if samples == 0 {
            return Err(Error::invalid("Input data has zero size. Please provide non-empty data"));
        }
        let made = size as u64;
        let this = Self { size: Arc::default(), made, samples, drop_last: false };
        this.set(made)?;
        Ok(this)
    }

    pub(super) fn drop_last(&mut self, on: bool) {
        self.drop_last = on;
    }

    /// Of a pass of this many samples. Shares the size.
    pub(super) fn set_samples(&mut self, samples: u64) {
        self.samples = samples;
    }

    /// Samples in a batch.
    pub fn get(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    /// Changes it, from the next batch on.
    ///
    /// # Errors
    /// A batch size of 0.
    pub fn set(&self, samples: u64) -> Result<()> {
        if samples == 0 {
            return Err(Error::invalid("batch_size must be at least 1, but 0 was given"));
        }
        self.size.store(samples, Ordering::Relaxed);
        Ok(())
    }

    /// Samples in a pass.
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// Batches in a pass.
    pub fn batches(&self) -> u64 {
        self.batches_from(0)
    }

    /// Batches of a pass from this sample on.
    pub(super) fn batches_from(&self, first: u64) -> u64 {
        let samples = self.samples.saturating_sub(first);
        match self.drop_last {
            true => samples / self.get(),
            false => samples.div_ceil(self.get()),
        }
    }

    /// The place after so many samples.
    pub(super) fn place(&self, samples: u64) -> SamplePosition {
        SamplePosition { samples, batch_size: Some(self.get()).filter(|size| *size != self.made) }
    }

    /// Makes the batch size that of a place; gives its samples.
    pub(super) fn restore(&self, place: &SamplePosition) -> Result<u64> {
        place.batch_size.map_or(Ok(()), |size| self.set(size))?;
        Ok(place.samples)
    }

    /// See [`Source::settings`](super::Source::settings).
    pub(super) fn settings(&self) -> Map<String, Value> {
        Map::from_iter([
            ("batch_size".to_owned(), self.made.into()),
            ("samples".to_owned(), self.samples.into()),
            ("drop_last".to_owned(), self.drop_last.into()),
        ])
    }

    /// Samples in the batch of (at most) `size` that begins with sample `first`; 0 where there is none.
    pub(super) fn batch_at(&self, first: u64, size: u64) -> u64 {
        let len = size.min(self.samples.saturating_sub(first));
        if self.drop_last && len < size { 0 } else { len }
    }

    /// That there is a batch at all.
    pub(super) fn validate(&self) -> anyhow::Result<()> {
        anyhow::ensure!(self.samples > 0, "the sampler gives no samples");
        anyhow::ensure!(
            self.batches() > 0,
            "the loader has no batch: it drops the last one where it is smaller than batch_size ({}), and there are {} samples; use a smaller batch_size or drop_last(false)",
            self.get(),
            self.samples
        );
        Ok(())
    }
}
