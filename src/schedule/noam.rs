use serde::{Deserialize, Serialize};

use super::Schedule;
use super::check::{finite, positive, starts};
use super::cycle::one;
use crate::error::Result;

/// `factor * d_model^-0.5 * min(n^-0.5, n * warmup^-1.5)` for the n-th event, from 1: the schedule of
/// "Attention is all you need" (<https://arxiv.org/abs/1706.03762>).
///
/// ```
/// use tch_ignite::schedule::{Noam, Schedule};
/// let schedule = Noam::new(512, 4000);
/// assert!((schedule.at(3999) - 512f64.powf(-0.5) * 4000f64.powf(-0.5)).abs() < 1e-18);
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Noam {
    d_model: u64,
    warmup: u64,
    #[serde(default = "one")]
    factor: f64,
}

impl Noam {
    /// For a model of width `d_model`; the peak is the event number `warmup`, from 1.
    pub fn new(d_model: u64, warmup: u64) -> Self {
        Self { d_model, warmup, factor: 1. }
    }

    /// A factor for all values, 1 unless given.
    pub fn factor(mut self, factor: f64) -> Self {
        self.factor = factor;
        self
    }
}

impl Schedule for Noam {
    fn at(&self, event: u64) -> f64 {
        let (n, warmup) = (event as f64 + 1., self.warmup as f64);
        let rise = n / (warmup * warmup.sqrt());
        self.factor / (self.d_model as f64).sqrt() * (1. / n.sqrt()).min(rise)
    }

    fn validate(&self) -> Result<()> {
        positive("d_model", self.d_model)?;
        positive("warmup", self.warmup)?;
        finite(&[("factor", self.factor)])?;
        starts(self)
    }

    fn length(&self) -> Option<u64> {
        Some(self.warmup)
    }

    fn arguments(&self) -> Option<serde_json::Value> {
        super::written(self)
    }
}
