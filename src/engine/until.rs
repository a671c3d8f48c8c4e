use std::time::Duration;

use crate::error::{Error, Result};

/// How far a run goes, and how long its epochs are.
///
/// Several limits may be given; the run ends at the first that is reached. Limits in epochs and in iterations exclude
/// each other, as in ignite. `Until::default()` uses the remaining budget of an earlier run or a loaded state, or one
/// epoch where there is none.
///
/// ```
/// use std::time::Duration;
/// use tch_ignite::engine::Until;
/// let until = Until::epochs(20).or_time(Duration::from_secs(3600));
/// let until = Until::iterations(100_000).epoch_length(1000);
/// # let _ = until;
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[doc(alias = "max_epochs")]
#[doc(alias = "max_steps")]
pub struct Until {
    pub(super) max_epochs: Option<u64>,
    pub(super) max_iters: Option<u64>,
    pub(super) max_samples: Option<u64>,
    pub(super) max_time: Option<Duration>,
    pub(super) epoch_length: Option<u64>,
}

impl Until {
    /// A budget of this many epochs in total, including those of an earlier part of the run.
    pub fn epochs(epochs: u64) -> Self {
        Self { max_epochs: Some(epochs), ..Self::default() }
    }

    /// A budget of this many iterations in total, including those of an earlier part of the run.
    pub fn iterations(iterations: u64) -> Self {
        Self { max_iters: Some(iterations), ..Self::default() }
    }

    /// A budget of this many samples in this call of `run`, rounded up to whole batches. A run that is resumed from a
    /// checkpoint written in mid call has the rest of them; one that is resumed from a checkpoint written after the
    /// limit was reached has all of them again. The data source has to count its samples
    /// ([`Source::samples`](crate::data::Source::samples)), as the loader does.
    pub fn samples(samples: u64) -> Self {
        Self::default().or_samples(samples)
    }

    /// A budget of time from the start of this call of `run`. The run checks it after each iteration and between
    /// epochs.
    pub fn time(time: Duration) -> Self {
        Self::default().or_time(time)
    }

    /// Also ends the run after this many iterations in total.
    pub fn or_iterations(mut self, iterations: u64) -> Self {
        self.max_iters = Some(iterations);
        self
    }

    /// Also ends the run after this many samples of this call of `run`.
    pub fn or_samples(mut self, samples: u64) -> Self {
        self.max_samples = Some(samples);
        self
    }

    /// Also ends the run after this time.
    pub fn or_time(mut self, time: Duration) -> Self {
        self.max_time = Some(time);
        self
    }

    /// Sets the number of iterations in an epoch, where that is not the length of the data. The data goes on in the
    /// next epoch where it stopped, and restarts when it is exhausted.
    pub fn epoch_length(mut self, iterations: u64) -> Self {
        self.epoch_length = Some(iterations);
        self
    }

    /// # Errors
    /// Refuses two budgets that exclude each other, and a budget of 0.
    pub(super) fn validate(&self) -> Result<()> {
        if self.max_epochs.is_some() && self.max_iters.is_some() {
            return Err(Error::invalid(
                "Arguments max_iters and max_epochs are mutually exclusive. Please provide only max_epochs or max_iters.",
            ));
        }
        for (name, value) in [
            ("max_epochs", self.max_epochs),
            ("max_iters", self.max_iters),
            ("max_samples", self.max_samples),
        ] {
            if value == Some(0) {
                return Err(Error::invalid(format!(
                    "Argument {name} is invalid. Please, set a correct {name} positive value: 0 was given, and it is the number after which the run ends"
                )));
            }
        }
        Ok(())
    }

    /// Whether only samples or time limit the run, with as many epochs as that takes.
    pub(super) fn open_ended(&self) -> bool {
        (self.max_samples.is_some() || self.max_time.is_some())
            && self.max_epochs.is_none()
            && self.max_iters.is_none()
    }
}
