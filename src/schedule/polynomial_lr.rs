use serde::{Deserialize, Serialize};

use super::Schedule;
use super::check::{finite, positive, within};
use super::constant_lr::five;
use super::cycle::one;
use super::recurrence::{Recurrence, Walk, recurrent};
use crate::error::Result;

/// `base * (1 - event / total_iters) ^ power`, 0 from `total_iters` on: torch's `PolynomialLR`.
///
/// ```
/// use tch_ignite::schedule::{PolynomialLR, Schedule};
/// let schedule = PolynomialLR::new(1.0).total_iters(4);
/// assert_eq!([0, 1, 2, 3, 4, 5].map(|i| schedule.at(i)), [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]);
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolynomialLR {
    base: f64,
    #[serde(default = "five")]
    total_iters: u64,
    #[serde(default = "one")]
    power: f64,
    #[serde(skip)]
    walk: Walk,
}

impl PolynomialLR {
    /// From `base` to 0 in 5 events, linearly, unless told otherwise.
    pub fn new(base: f64) -> Self {
        Self { base, total_iters: five(), power: 1., walk: Walk::default() }
    }

    /// How many events it takes.
    pub fn total_iters(mut self, events: u64) -> Self {
        self.walk = Walk::default();
        self.total_iters = events;
        self
    }

    /// The power, 1 unless given.
    pub fn power(mut self, power: f64) -> Self {
        self.walk = Walk::default();
        self.power = power;
        self
    }

    fn check(&self) -> Result<()> {
        positive("total_iters", self.total_iters)?;
        within(
            "power",
            self.power,
            self.power >= 0.,
            "at least 0: the last value is 0 to that power",
        )?;
        finite(&[("base", self.base), ("power", self.power)])
    }
}

impl Recurrence for PolynomialLR {
    fn base(&self) -> f64 {
        self.base
    }

    fn next(&self, event: u64, previous: f64) -> f64 {
        if event > self.total_iters {
            return previous;
        }
        let total = self.total_iters as f64;
        let factor = (1. - event as f64 / total) / (1. - (event - 1) as f64 / total);
        previous * factor.powf(self.power)
    }

    fn span(&self) -> Option<u64> {
        Some(self.total_iters)
    }
}

recurrent!(PolynomialLR);
