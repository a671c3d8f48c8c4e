use serde::{Deserialize, Serialize};

use super::Schedule;
use super::check::{finite, positive, within};
use super::constant_lr::{five, third};
use super::cycle::one;
use super::recurrence::{Recurrence, Walk, recurrent};
use crate::error::Result;

/// From `base * start_factor` to `base * end_factor` in `total_iters` events: torch's `LinearLR`.
///
/// ```
/// use tch_ignite::schedule::{LinearLR, Schedule};
/// let schedule = LinearLR::new(1.0).start_factor(0.5).total_iters(2);
/// assert_eq!([0, 1, 2, 3].map(|i| schedule.at(i)), [0.5, 0.75, 1.0, 1.0]);
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinearLR {
    base: f64,
    #[serde(default = "third")]
    start_factor: f64,
    #[serde(default = "one")]
    end_factor: f64,
    #[serde(default = "five")]
    total_iters: u64,
    #[serde(skip)]
    walk: Walk,
}

impl LinearLR {
    /// From a third of `base` to `base` in 5 events, unless told otherwise.
    pub fn new(base: f64) -> Self {
        Self {
            base,
            start_factor: third(),
            end_factor: 1.,
            total_iters: five(),
            walk: Walk::default(),
        }
    }

    /// The factor at the start, above 0 and at most 1.
    pub fn start_factor(mut self, factor: f64) -> Self {
        self.walk = Walk::default();
        self.start_factor = factor;
        self
    }

    /// The factor at the end, from 0 to 1.
    pub fn end_factor(mut self, factor: f64) -> Self {
        self.walk = Walk::default();
        self.end_factor = factor;
        self
    }

    /// How many events it takes.
    pub fn total_iters(mut self, events: u64) -> Self {
        self.walk = Walk::default();
        self.total_iters = events;
        self
    }

    fn check(&self) -> Result<()> {
        let (start, end) = (self.start_factor, self.end_factor);
        within("start_factor", start, start > 0. && start <= 1., "above 0 and at most 1")?;
        within("end_factor", end, (0. ..=1.).contains(&end), "from 0 to 1")?;
        positive("total_iters", self.total_iters)?;
        // The first step is made by a factor relative to it.
        finite(&[("base", self.base), ("1 / start_factor", 1. / start)])
    }
}

impl Recurrence for LinearLR {
    fn base(&self) -> f64 {
        self.base
    }

    fn start(&self, previous: f64) -> f64 {
        previous * self.start_factor
    }

    fn next(&self, event: u64, previous: f64) -> f64 {
        if event > self.total_iters {
            return previous;
        }
        let (rise, total) = (self.end_factor - self.start_factor, self.total_iters as f64);
        previous * (1. + rise / (total * self.start_factor + (event - 1) as f64 * rise))
    }

    fn span(&self) -> Option<u64> {
        Some(self.total_iters)
    }
}

recurrent!(LinearLR);
