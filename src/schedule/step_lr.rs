use serde::{Deserialize, Serialize};

use super::Schedule;
use super::check::{finite, positive};
use super::recurrence::{Recurrence, Walk, recurrent};
use crate::error::Result;

/// Multiplies the value by `gamma` every `step_size` events: torch's `StepLR`.
///
/// ```
/// use tch_ignite::schedule::{Schedule, StepLR};
/// let schedule = StepLR::new(1.0, 2).gamma(0.5);
/// assert_eq!([0, 1, 2, 3, 4].map(|i| schedule.at(i)), [1.0, 1.0, 0.5, 0.5, 0.25]);
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepLR {
    base: f64,
    step_size: u64,
    #[serde(default = "gamma")]
    gamma: f64,
    #[serde(skip)]
    walk: Walk,
}

pub(super) fn gamma() -> f64 {
    0.1
}

impl StepLR {
    /// From `base`, in steps of `step_size` events.
    pub fn new(base: f64, step_size: u64) -> Self {
        Self { base, step_size, gamma: gamma(), walk: Walk::default() }
    }

    /// The factor of each step, 0.1 unless given.
    pub fn gamma(mut self, gamma: f64) -> Self {
        self.walk = Walk::default();
        self.gamma = gamma;
        self
    }

    fn check(&self) -> Result<()> {
        positive("step_size", self.step_size)?;
        finite(&[("base", self.base), ("gamma", self.gamma)])
    }
}

impl Recurrence for StepLR {
    fn base(&self) -> f64 {
        self.base
    }

    fn next(&self, event: u64, previous: f64) -> f64 {
        if event.is_multiple_of(self.step_size) { previous * self.gamma } else { previous }
    }

    fn span(&self) -> Option<u64> {
        Some(self.step_size)
    }
}

recurrent!(StepLR);
