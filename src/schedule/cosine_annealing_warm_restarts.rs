use std::cell::Cell;
use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use super::Schedule;
use super::check::{finite, positive, starts};
use crate::error::Result;

/// Half a cosine wave from `base` to `eta_min`, again and again, each `t_mult` times as long as the
/// last: torch's `CosineAnnealingWarmRestarts`, SGDR (<https://arxiv.org/abs/1608.03983>).
///
/// ```
/// use tch_ignite::schedule::{CosineAnnealingWarmRestarts, Schedule};
/// let schedule = CosineAnnealingWarmRestarts::new(1.0, 2).t_mult(2);
/// assert_eq!([0, 1, 2, 4, 6].map(|i| schedule.at(i)), [1.0, 0.5, 1.0, 0.5, 1.0]);
/// ```
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CosineAnnealingWarmRestarts {
    base: f64,
    #[serde(rename = "T_0")]
    t_0: u64,
    #[serde(rename = "T_mult", default = "one")]
    t_mult: u64,
    #[serde(default)]
    eta_min: f64,
    /// First event and length of the wave last asked for.
    #[serde(skip)]
    wave: Cell<Option<(u64, u64)>>,
}

// The cache is no part of the value.
impl PartialEq for CosineAnnealingWarmRestarts {
    fn eq(&self, other: &Self) -> bool {
        (self.base, self.t_0, self.t_mult, self.eta_min)
            == (other.base, other.t_0, other.t_mult, other.eta_min)
    }
}

fn one() -> u64 {
    1
}

impl CosineAnnealingWarmRestarts {
    /// From `base` to 0; the first wave has `t_0` events.
    pub fn new(base: f64, t_0: u64) -> Self {
        Self { base, t_0, t_mult: 1, eta_min: 0., wave: Cell::new(None) }
    }

    /// How many times as long each wave is as the last, 1 unless given.
    pub fn t_mult(mut self, factor: u64) -> Self {
        self.wave = Cell::new(None);
        self.t_mult = factor;
        self
    }

    /// The lowest value, 0 unless given.
    pub fn eta_min(mut self, value: f64) -> Self {
        self.wave = Cell::new(None);
        self.eta_min = value;
        self
    }
}

impl Schedule for CosineAnnealingWarmRestarts {
    fn at(&self, event: u64) -> f64 {
        if self.t_0 == 0 || self.t_mult == 0 {
            return f64::NAN;
        }
        let (mut first, mut length) = match self.wave.get() {
            Some(wave) if wave.0 <= event => wave,
            _ => (0, self.t_0),
        };
        if self.t_mult == 1 {
            first = event - event % length;
        }
        while event - first >= length {
            first += length;
            length = length.saturating_mul(self.t_mult);
        }
        self.wave.set(Some((first, length)));
        let (t_cur, t_i) = ((event - first) as f64, length as f64);
        self.eta_min + (self.base - self.eta_min) * (1. + (PI * t_cur / t_i).cos()) / 2.
    }

    fn validate(&self) -> Result<()> {
        positive("T_0", self.t_0)?;
        positive("T_mult", self.t_mult)?;
        finite(&[("base", self.base), ("eta_min", self.eta_min)])?;
        starts(self)
    }

    fn length(&self) -> Option<u64> {
        Some(self.t_0)
    }

    fn arguments(&self) -> Option<serde_json::Value> {
        super::written(self)
    }
}
