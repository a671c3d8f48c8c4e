use serde::{Deserialize, Serialize};

use super::Schedule;
use super::check::finite;
use super::recurrence::{Recurrence, Walk, recurrent};
use super::step_lr::gamma;
use crate::error::Result;

/// Multiplies the value by `gamma` at each milestone, once more where a milestone is given twice:
/// torch's `MultiStepLR`.
///
/// ```
/// use tch_ignite::schedule::{MultiStepLR, Schedule};
/// let schedule = MultiStepLR::new(1.0, [1, 3]).gamma(0.5);
/// assert_eq!([0, 1, 2, 3].map(|i| schedule.at(i)), [1.0, 0.5, 0.5, 0.25]);
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MultiStepLR {
    base: f64,
    milestones: Vec<u64>,
    #[serde(default = "gamma")]
    gamma: f64,
    #[serde(skip)]
    walk: Walk,
}

impl MultiStepLR {
    /// From `base`, with steps at these events.
    pub fn new(base: f64, milestones: impl IntoIterator<Item = u64>) -> Self {
        let milestones = milestones.into_iter().collect();
        Self { base, milestones, gamma: gamma(), walk: Walk::default() }
    }

    /// The factor of each milestone, 0.1 unless given.
    pub fn gamma(mut self, gamma: f64) -> Self {
        self.walk = Walk::default();
        self.gamma = gamma;
        self
    }

    fn check(&self) -> Result<()> {
        finite(&[("base", self.base), ("gamma", self.gamma)])
    }
}

impl Recurrence for MultiStepLR {
    fn base(&self) -> f64 {
        self.base
    }

    fn next(&self, event: u64, previous: f64) -> f64 {
        match self.milestones.iter().filter(|milestone| **milestone == event).count() {
            0 => previous,
            count => previous * self.gamma.powf(count as f64),
        }
    }

    fn span(&self) -> Option<u64> {
        self.milestones.iter().max().map(|last| last.saturating_add(1))
    }
}

recurrent!(MultiStepLR);
