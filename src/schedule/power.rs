use serde::{Deserialize, Serialize};

use super::check::{finite, positive, starts, within};
use super::{Decay, Schedule};
use crate::error::Result;

/// Falls by a power law of the tokens that were trained on, whatever the length of the run: the Power scheduler (Shen et
/// al. 2024, <https://arxiv.org/abs/2408.13359>).
///
/// With `n` tokens done, the value is
///
/// ```text
/// power(n) = min(lr_max, batch_size · a · n^b)
/// ```
///
/// During a [`warmup`](Self::warmup) it rises in a line from 0 to the law's value at the end of the warm-up. With
/// [`decay`](Self::decay) it falls at the end of the run from the law's value there to 0.
///
/// ```
/// use tch_ignite::schedule::{Power, Schedule};
/// // 64 sequences of 1024 tokens in a batch; a = 4 and b = -0.51, as in the paper.
/// let schedule = Power::new(0.02, 64, 64 * 1024).warmup(100).decay(1000, 200);
/// let law = |event: f64| (64.0 * 4.0 * (event * 64.0 * 1024.0).powf(-0.51)).min(0.02);
/// assert_eq!([50, 500, 900].map(|i| schedule.at(i)), [law(100.0) / 2.0, law(500.0), law(800.0) / 2.0]);
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Power {
    lr_max: f64,
    batch_size: u64,
    tokens: u64,
    #[serde(default = "amplitude")]
    a: f64,
    #[serde(default = "exponent")]
    b: f64,
    #[serde(default)]
    warmup: u64,
    #[serde(default)]
    total_iters: Option<u64>,
    #[serde(default)]
    decay: u64,
    #[serde(default)]
    shape: Decay,
}

fn amplitude() -> f64 {
    4.
}

fn exponent() -> f64 {
    -0.51
}

impl Power {
    /// Makes a schedule of at most `lr_max`, for batches of `batch_size` sequences, with `tokens` tokens in each event: in
    /// a batch, where events are iterations.
    pub fn new(lr_max: f64, batch_size: u64, tokens: u64) -> Self {
        Self {
            lr_max,
            batch_size,
            tokens,
            a: amplitude(),
            b: exponent(),
            warmup: 0,
            total_iters: None,
            decay: 0,
            shape: Decay::default(),
        }
    }

    /// Sets the law's amplitude, 4 unless given.
    pub fn a(mut self, a: f64) -> Self {
        self.a = a;
        self
    }

    /// Sets the law's exponent, -0.51 unless given.
    pub fn b(mut self, b: f64) -> Self {
        self.b = b;
        self
    }

    /// Sets the number of events of the warm-up, 0 unless given.
    pub fn warmup(mut self, events: u64) -> Self {
        self.warmup = events;
        self
    }

    /// Lets the value fall to 0 in the last `events` of a run of `total_iters` events.
    pub fn decay(mut self, total_iters: u64, events: u64) -> Self {
        (self.total_iters, self.decay) = (Some(total_iters), events);
        self
    }

    /// Sets how the value falls at the end, in a line unless given.
    pub fn shape(mut self, shape: Decay) -> Self {
        self.shape = shape;
        self
    }

    fn law(&self, event: u64) -> f64 {
        let tokens = event as f64 * self.tokens as f64;
        (self.batch_size as f64 * self.a * tokens.powf(self.b)).min(self.lr_max)
    }
}

impl Schedule for Power {
    fn at(&self, event: u64) -> f64 {
        if event < self.warmup {
            return self.law(self.warmup) * (event as f64 / self.warmup as f64);
        }
        let Some(total) = self.total_iters else { return self.law(event) };
        let falling = total.saturating_sub(self.decay);
        match event.min(total) {
            event if event < falling => self.law(event),
            event if event >= total => 0.,
            event => {
                self.law(falling) * self.shape.share((event - falling) as f64 / self.decay as f64)
            }
        }
    }

    fn validate(&self) -> Result<()> {
        positive("batch_size", self.batch_size)?;
        positive("tokens", self.tokens)?;
        finite(&[("lr_max", self.lr_max), ("a", self.a), ("b", self.b)])?;
        let (decay, most) = (self.decay, self.total_iters.unwrap_or(0));
        let left = most.saturating_sub(self.warmup);
        let bounds = format!("at most what the warm-up leaves of total_iters, which is {left}");
        within("decay", decay as f64, decay <= left, &bounds)?;
        starts(self)
    }

    fn length(&self) -> Option<u64> {
        Some(self.total_iters.unwrap_or(self.warmup))
    }

    fn arguments(&self) -> Option<serde_json::Value> {
        super::written(self)
    }
}
