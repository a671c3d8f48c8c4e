use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use super::Schedule;
use super::check::{finite, positive};
use super::recurrence::{Recurrence, Walk, recurrent};
use crate::error::Result;

/// From `base` to `eta_min` along half a cosine wave in `t_max` events, and back in the next `t_max`:
/// torch's `CosineAnnealingLR` (Loshchilov and Hutter 2016, <https://arxiv.org/abs/1608.03983>,
/// without the restarts).
///
/// ```
/// use tch_ignite::schedule::{CosineAnnealingLR, Schedule};
/// let schedule = CosineAnnealingLR::new(1.0, 10);
/// assert_eq!(schedule.at(0), 1.0);
/// assert!(schedule.at(10).abs() < 1e-15);
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CosineAnnealingLR {
    base: f64,
    #[serde(rename = "T_max")]
    t_max: u64,
    #[serde(default)]
    eta_min: f64,
    #[serde(skip)]
    walk: Walk,
}

impl CosineAnnealingLR {
    /// From `base` to 0 in `t_max` events.
    pub fn new(base: f64, t_max: u64) -> Self {
        Self { base, t_max, eta_min: 0., walk: Walk::default() }
    }

    /// The lowest value, 0 unless given.
    pub fn eta_min(mut self, value: f64) -> Self {
        self.walk = Walk::default();
        self.eta_min = value;
        self
    }

    fn check(&self) -> Result<()> {
        positive("T_max", self.t_max)?;
        finite(&[("base", self.base), ("eta_min", self.eta_min)])
    }
}

impl Recurrence for CosineAnnealingLR {
    fn base(&self) -> f64 {
        self.base
    }

    fn next(&self, event: u64, previous: f64) -> f64 {
        let (t, e) = (self.t_max as f64, event as f64);
        // The step away from the lowest point, where the quotient below is 0 / 0.
        if event > self.t_max && (event - 1 - self.t_max).is_multiple_of(2 * self.t_max) {
            return previous + (self.base - self.eta_min) * (1. - (PI / t).cos()) / 2.;
        }
        (1. + (PI * e / t).cos()) / (1. + (PI * (e - 1.) / t).cos()) * (previous - self.eta_min)
            + self.eta_min
    }

    fn span(&self) -> Option<u64> {
        Some(self.t_max)
    }
}

recurrent!(CosineAnnealingLR);
