use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Map, Value};

use super::SamplePosition;
use crate::error::{Error, Result};
use crate::optim::Knob;

/// The message for those who change a batch size that is not used.
pub(super) const FIXED_BY_SAMPLER: &str = "the loader's batches come from a batch sampler, so it has no batch size to change; change the sampler instead";

/// A shared handle to the batch size of a [`Loader`](super::Loader) or [`DataLoader`](super::DataLoader). Clones
/// share the size, so that it can be changed while the engine holds the loader.
#[derive(Debug, Clone)]
pub struct BatchSize {
    size: Arc<AtomicU64>,
    /// The size as a knob, by which two schedulers of one loader are found.
    knob: Knob,
    /// The size given at construction. A position names its batch size only where it differs from this one.
    made: u64,
    samples: u64,
    drop_last: bool,
    /// Whether a batch sampler makes the batches, so that the size is not used and cannot be changed.
    fixed: bool,
}

impl BatchSize {
    pub(super) fn new(size: usize, samples: u64) -> Result<Self> {
        if samples == 0 {
            return Err(Error::invalid("Input data has zero size. Please provide non-empty data"));
        }
        let made = size as u64;
        let size = Arc::<AtomicU64>::default();
        let (read, write) = (size.clone(), size.clone());
        let knob = Knob::new(
            "batch_size",
            move || read.load(Ordering::Relaxed) as f64,
            move |value| write.store((value as u64).max(1), Ordering::Relaxed),
        );
        let this = Self { size, knob, made, samples, drop_last: false, fixed: false };
        this.set(made)?;
        Ok(this)
    }

    /// Makes a handle of its own for a loader of `samples` samples, with the same size.
    pub(super) fn of(&self, samples: u64) -> Result<Self> {
        Ok(Self { drop_last: self.drop_last, ..Self::new(self.get() as usize, samples)? })
    }

    pub(super) fn drop_last(&mut self, on: bool) {
        self.drop_last = on;
    }

    /// Refuses changes of the size from now on, by this handle and those cloned from it.
    pub(super) fn fix(&mut self) {
        self.fixed = true;
    }

    /// Sets the number of samples in a pass. Clones share the batch size, not this number.
    pub(super) fn set_samples(&mut self, samples: u64) {
        self.samples = samples;
    }

    /// Returns the number of samples in a batch.
    pub fn get(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    /// Changes the batch size of the loader and its clones, from the next batch on.
    ///
    /// # Errors
    /// A batch size of 0, or a loader with a [batch sampler](super::DataLoader::batch_sampler).
    pub fn set(&self, samples: u64) -> Result<()> {
        if self.fixed {
            return Err(Error::invalid(FIXED_BY_SAMPLER));
        }
        if samples == 0 {
            return Err(Error::invalid("batch_size must be at least 1, but 0 was given"));
        }
        self.size.store(samples, Ordering::Relaxed);
        Ok(())
    }

    pub(crate) fn knob(&self) -> &Knob {
        &self.knob
    }

    /// Returns the number of samples in a pass.
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// Returns the number of batches in a pass.
    pub fn batches(&self) -> u64 {
        self.batches_from(0)
    }

    /// Returns the number of batches in a pass from sample `first` on.
    pub(super) fn batches_from(&self, first: u64) -> u64 {
        self.batches_of(self.samples.saturating_sub(first), self.get())
    }

    /// Returns the number of batches in a pass if batches had this size, which is not 0.
    pub(crate) fn batches_with(&self, size: u64) -> u64 {
        self.batches_of(self.samples, size)
    }

    fn batches_of(&self, samples: u64, size: u64) -> u64 {
        match self.drop_last {
            true => samples / size,
            false => samples.div_ceil(size),
        }
    }

    /// Returns whether the size is still the one given at construction.
    pub(super) fn is_as_made(&self) -> bool {
        self.get() == self.made
    }

    pub(super) fn drops_last(&self) -> bool {
        self.drop_last
    }

    /// Returns the position after `samples` samples of a pass.
    pub(super) fn place(&self, samples: u64) -> SamplePosition {
        SamplePosition { samples, batch_size: Some(self.get()).filter(|size| *size != self.made) }
    }

    /// Sets the batch size of a position, and returns the position's count of samples.
    pub(super) fn restore(&self, place: &SamplePosition) -> Result<u64> {
        self.set(place.batch_size.unwrap_or(self.made))?;
        Ok(place.samples)
    }

    /// The settings of a loader that come from its batch size; see [`Source::settings`](super::Source::settings).
    pub(super) fn settings(&self) -> Map<String, Value> {
        Map::from_iter([
            ("batch_size".to_owned(), self.made.into()),
            ("samples".to_owned(), self.samples.into()),
            ("drop_last".to_owned(), self.drop_last.into()),
        ])
    }

    /// Returns the number of samples in the batch of (at most) `size` that begins with sample `first`; 0 where no
    /// batch begins there.
    pub(super) fn batch_at(&self, first: u64, size: u64) -> u64 {
        let len = size.min(self.samples.saturating_sub(first));
        if self.drop_last && len < size { 0 } else { len }
    }

    /// Checks that a pass has at least one batch.
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
