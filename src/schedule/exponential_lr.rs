use serde::{Deserialize, Serialize};

use super::Schedule;
use super::check::finite;
use super::recurrence::{Recurrence, Walk, recurrent};
use crate::error::Result;

/// Multiplies the value by `gamma` at every event: torch's `ExponentialLR`.
///
/// ```
/// use tch_ignite::schedule::{ExponentialLR, Schedule};
/// let schedule = ExponentialLR::new(1.0, 0.5);
/// assert_eq!([0, 1, 2].map(|i| schedule.at(i)), [1.0, 0.5, 0.25]);
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExponentialLR {
    base: f64,
    gamma: f64,
    #[serde(skip)]
    walk: Walk,
}

impl ExponentialLR {
    /// From `base`, by the factor `gamma` an event.
    pub fn new(base: f64, gamma: f64) -> Self {
        Self { base, gamma, walk: Walk::default() }
    }

    fn check(&self) -> Result<()> {
        finite(&[("base", self.base), ("gamma", self.gamma)])
    }
}

impl Recurrence for ExponentialLR {
    fn base(&self) -> f64 {
        self.base
    }

    fn next(&self, _event: u64, previous: f64) -> f64 {
        previous * self.gamma
    }
}

recurrent!(ExponentialLR);
