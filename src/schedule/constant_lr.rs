use serde::{Deserialize, Serialize};

use super::Schedule;
use super::check::{finite, within};
use super::recurrence::{Recurrence, Walk, recurrent};
use crate::error::Result;

/// `base * factor` for `total_iters` events, `base` from then on: torch's `ConstantLR`.
///
/// ```
/// use tch_ignite::schedule::{ConstantLR, Schedule};
/// let schedule = ConstantLR::new(1.0).factor(0.5).total_iters(2);
/// assert_eq!([0, 1, 2, 3].map(|i| schedule.at(i)), [0.5, 0.5, 1.0, 1.0]);
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConstantLR {
    base: f64,
    #[serde(default = "third")]
    factor: f64,
    #[serde(default = "five")]
    total_iters: u64,
    #[serde(skip)]
    walk: Walk,
}

pub(super) fn third() -> f64 {
    1. / 3.
}

pub(super) fn five() -> u64 {
    5
}

impl ConstantLR {
    /// Makes a schedule of a third of `base` for 5 events; [`factor`](Self::factor) and
    /// [`total_iters`](Self::total_iters) change that.
    pub fn new(base: f64) -> Self {
        Self { base, factor: third(), total_iters: five(), walk: Walk::default() }
    }

    /// Sets the factor at the start, above 0 and at most 1.
    pub fn factor(mut self, factor: f64) -> Self {
        self.walk = Walk::default();
        self.factor = factor;
        self
    }

    /// Sets for how many events the factor holds.
    pub fn total_iters(mut self, events: u64) -> Self {
        self.walk = Walk::default();
        self.total_iters = events;
        self
    }

    fn check(&self) -> Result<()> {
        within(
            "factor",
            self.factor,
            self.factor > 0. && self.factor <= 1.,
            "above 0 and at most 1",
        )?;
        // Event `total_iters` multiplies by the inverse of the factor, which must be finite.
        finite(&[("base", self.base), ("1 / factor", 1. / self.factor)])
    }
}

impl Recurrence for ConstantLR {
    fn base(&self) -> f64 {
        self.base
    }

    fn start(&self, previous: f64) -> f64 {
        previous * self.factor
    }

    fn next(&self, event: u64, previous: f64) -> f64 {
        if event == self.total_iters { previous * (1. / self.factor) } else { previous }
    }

    fn span(&self) -> Option<u64> {
        // The base is reached by a jump.
        Some(self.total_iters.saturating_add(1))
    }
}

recurrent!(ConstantLR);
