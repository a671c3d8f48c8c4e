use serde::{Deserialize, Serialize};

use super::Schedule;
use super::check::{finite, starts, within};
use super::cycle::one;
use crate::error::Result;

/// Up and down between two values in straight lines: torch's `CyclicLR` (Smith 2015,
/// <https://arxiv.org/abs/1506.01186>).
///
/// ```
/// use tch_ignite::schedule::{CyclicLR, Schedule};
/// let schedule = CyclicLR::new(0.0, 1.0).step_size_up(2.0);
/// assert_eq!([0, 1, 2, 3, 4].map(|i| schedule.at(i)), [0.0, 0.5, 1.0, 0.5, 0.0]);
/// let momentum = schedule.momentum(0.8, 0.9); // as torch cycles it: high where lr is low
/// assert_eq!((momentum.at(0), momentum.at(2)), (0.9, 0.8));
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CyclicLR {
    base_lr: f64,
    max_lr: f64,
    #[serde(default = "step_size")]
    step_size_up: f64,
    #[serde(default)]
    step_size_down: Option<f64>,
    #[serde(default)]
    mode: CyclicMode,
    #[serde(default = "one")]
    gamma: f64,
    /// Measured from `max_lr` downwards, as torch does with momentum.
    #[serde(default)]
    inverse: bool,
}

/// How the cycles of a [`CyclicLR`] shrink.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum CyclicMode {
    /// Not at all.
    #[default]
    Triangular,
    /// By half with each cycle.
    Triangular2,
    /// By `gamma` with each event.
    ExpRange,
}

fn step_size() -> f64 {
    2000.
}

impl CyclicLR {
    /// Between `base_lr` and `max_lr`, 2000 events each way unless told otherwise.
    pub fn new(base_lr: f64, max_lr: f64) -> Self {
        Self {
            base_lr,
            max_lr,
            step_size_up: step_size(),
            step_size_down: None,
            mode: CyclicMode::default(),
            gamma: 1.,
            inverse: false,
        }
    }

    /// Events from `base_lr` to `max_lr`.
    pub fn step_size_up(mut self, events: f64) -> Self {
        self.step_size_up = events;
        self
    }

    /// Events back, as many as up unless given.
    pub fn step_size_down(mut self, events: f64) -> Self {
        self.step_size_down = Some(events);
        self
    }

    /// How the cycles shrink.
    pub fn mode(mut self, mode: CyclicMode) -> Self {
        self.mode = mode;
        self
    }

    /// The factor of each event in mode [`ExpRange`](CyclicMode::ExpRange).
    pub fn gamma(mut self, gamma: f64) -> Self {
        self.gamma = gamma;
        self
    }

    /// The schedule of the momentum that goes with it, from `max_momentum` to `base_momentum` and back
    /// (torch's `cycle_momentum`).
    pub fn momentum(&self, base_momentum: f64, max_momentum: f64) -> Self {
        Self {
            base_lr: base_momentum,
            max_lr: max_momentum,
            inverse: !self.inverse,
            ..self.clone()
        }
    }
}

impl Schedule for CyclicLR {
    fn at(&self, event: u64) -> f64 {
        let e = event as f64;
        let total = self.step_size_up + self.step_size_down.unwrap_or(self.step_size_up);
        let ratio = self.step_size_up / total;
        let cycle = (1. + e / total).floor();
        let x = 1. + e / total - cycle;
        let height = if x <= ratio { x / ratio } else { (x - 1.) / (ratio - 1.) };
        let scale = match self.mode {
            CyclicMode::Triangular => 1.,
            CyclicMode::Triangular2 => 1. / 2f64.powf(cycle - 1.),
            CyclicMode::ExpRange => self.gamma.powf(e),
        };
        let height = (self.max_lr - self.base_lr) * height * scale;
        if self.inverse { self.max_lr - height } else { self.base_lr + height }
    }

    fn validate(&self) -> Result<()> {
        let (up, down) = (self.step_size_up, self.step_size_down.unwrap_or(self.step_size_up));
        within("step_size_up", up, up > 0. && up.is_finite(), "positive and finite")?;
        within("step_size_down", down, down > 0. && down.is_finite(), "positive and finite")?;
        // The place in a cycle is computed with both, so neither may vanish beside the other.
        let (total, share) = (up + down, up / (up + down));
        let computes = total.is_finite() && 1. / total < 1e6 && share > 0. && share < 1.;
        within("step_size_up", up, computes, &format!("comparable with step_size_down ({down})"))?;
        finite(&[("base_lr", self.base_lr), ("max_lr", self.max_lr), ("gamma", self.gamma)])?;
        starts(self)
    }

    fn length(&self) -> Option<u64> {
        let down = self.step_size_down.unwrap_or(self.step_size_up);
        Some((self.step_size_up + down).ceil() as u64)
    }

    fn arguments(&self) -> Option<serde_json::Value> {
        super::written(self)
    }
}
