use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use super::Schedule;
use super::check::{finite, starts};
use crate::error::Result;

/// Up to `peak` in a line, there for a while, then down to `end`: warm-up–stable–decay
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

/// How the value falls at the end of a [`WarmupStableDecay`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Decay {
    /// In a straight line.
    #[default]
    Linear,
    /// Along half a cosine wave.
    Cosine,
    /// By `1 - sqrt(progress)` (<https://arxiv.org/abs/2405.18392>).
    OneMinusSqrt,
}

impl WarmupStableDecay {
    /// This many events of each.
    pub fn new(peak: f64, warmup: u64, stable: u64, decay: u64) -> Self {
        Self { peak, warmup, stable, decay, start: 0., end: 0., shape: Decay::default() }
    }

    /// The value at event 0, 0 unless given.
    pub fn start(mut self, value: f64) -> Self {
        self.start = value;
        self
    }

    /// The value at the end, 0 unless given.
    pub fn end(mut self, value: f64) -> Self {
        self.end = value;
        self
    }

    /// How it falls, in a line unless given.
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
        let share = match self.shape {
            Decay::Linear => 1. - progress,
            Decay::Cosine => (1. + (PI * progress).cos()) / 2.,
            Decay::OneMinusSqrt => 1. - progress.sqrt(),
        };
        self.end + (self.peak - self.end) * share
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
