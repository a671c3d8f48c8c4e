use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use super::Schedule;
use super::check::{finite, starts};
use crate::error::Result;

/// Rises to `peak` in a line, stays there for a while, then falls to `end`: warm-up–stable–decay
/// (<https://arxiv.org/abs/2404.06395>). `end` holds from then on.
///
/// ```
/// use tch_ignite::schedule::{Schedule, WarmupStableDecay};
/// let schedule = WarmupStableDecay::new(1.0, 2, 3, 4).end(0.0);
/// assert_eq!([0, 1, 2, 5, 7, 9].map(|i| schedule.at(i)), [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]);
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WarmupStableDecay {
    peak: f64,
    warmup: u64,
    stable: u64,
    decay: u64,
    #[serde(default)]
    start: f64,
    #[serde(default)]
    end: f64,
    #[serde(default)]
    shape: Decay,
}

/// How the value falls at the end of a [`WarmupStableDecay`] or [`Power`](super::Power).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Decay {
    /// The value falls in a straight line.
    #[default]
    Linear,
    /// The value falls along half a cosine wave.
    Cosine,
    /// The value falls by `1 - sqrt(progress)` (<https://arxiv.org/abs/2405.18392>).
    OneMinusSqrt,
}

impl Decay {
    /// Returns what is left of the value at `progress`, from 0 to 1.
    pub(super) fn share(self, progress: f64) -> f64 {
        match self {
            Self::Linear => 1. - progress,
            Self::Cosine => (1. + (PI * progress).cos()) / 2.,
            Self::OneMinusSqrt => 1. - progress.sqrt(),
        }
    }
}

impl WarmupStableDecay {
    /// Makes a schedule with this many events of warm-up, of `peak`, and of decay.
    pub fn new(peak: f64, warmup: u64, stable: u64, decay: u64) -> Self {
        Self { peak, warmup, stable, decay, start: 0., end: 0., shape: Decay::default() }
    }

    /// Sets the value at event 0, 0 unless given.
    pub fn start(mut self, value: f64) -> Self {
        self.start = value;
        self
    }

    /// Sets the value at the end, 0 unless given.
    pub fn end(mut self, value: f64) -> Self {
        self.end = value;
        self
    }

    /// Sets how the value falls, in a line unless given.
    pub fn shape(mut self, shape: Decay) -> Self {
        self.shape = shape;
        self
    }
}

impl Schedule for WarmupStableDecay {
    fn at(&self, event: u64) -> f64 {
        let falling = self.warmup.saturating_add(self.stable);
        if event < self.warmup {
            return self.start + (self.peak - self.start) * (event as f64 / self.warmup as f64);
        }
        if event < falling {
            return self.peak;
        }
        if event - falling >= self.decay {
            return self.end;
        }
        let progress = (event - falling) as f64 / self.decay as f64;
        self.end + (self.peak - self.end) * self.shape.share(progress)
    }

    fn validate(&self) -> Result<()> {
        finite(&[("peak", self.peak), ("start", self.start), ("end", self.end)])?;
        starts(self)
    }

    fn length(&self) -> Option<u64> {
        Some(self.warmup.saturating_add(self.stable).saturating_add(self.decay))
    }

    fn arguments(&self) -> Option<serde_json::Value> {
        super::written(self)
    }
}
