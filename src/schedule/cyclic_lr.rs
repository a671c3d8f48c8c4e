use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize, Serializer, ser};

use super::Schedule;
use super::check::{finite, starts, within};
use super::cycle::one;
use crate::error::Result;

/// Goes up and down between two values in straight lines: torch's `CyclicLR` (Smith 2015,
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
    /// Whether the cycle is measured from `max_lr` downwards, as torch does with momentum.
    #[serde(default)]
    inverse: bool,
    #[serde(
        skip_deserializing,
        skip_serializing_if = "Option::is_none",
        serialize_with = "refused"
    )]
    scale_fn: Option<ScaleFn>,
    #[serde(skip)]
    scale_mode: ScaleMode,
}

/// A function of the user's that scales the cycles. Two are equal if they are clones of one.
#[derive(Clone)]
struct ScaleFn(Arc<dyn Fn(u64) -> f64 + Send + Sync>);

impl PartialEq for ScaleFn {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl fmt::Debug for ScaleFn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a function")
    }
}

fn refused<S: Serializer>(_: &Option<ScaleFn>, _: S) -> Result<S::Ok, S::Error> {
    Err(ser::Error::custom("scale_fn is a function, which cannot be written down"))
}

/// The number that [`CyclicLR::scale_fn`] is a function of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum ScaleMode {
    /// The number of the cycle, from 1.
    #[default]
    Cycle,
    /// The number of the event, from 0.
    Iterations,
}

/// How the cycles of a [`CyclicLR`] shrink.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum CyclicMode {
    /// The cycles keep their height.
    #[default]
    Triangular,
    /// The height is halved with each cycle.
    Triangular2,
    /// The height is multiplied by `gamma` with each event.
    ExpRange,
}

fn step_size() -> f64 {
    2000.
}

impl CyclicLR {
    /// Makes a schedule between `base_lr` and `max_lr`, with 2000 events each way unless
    /// [`step_size_up`](Self::step_size_up) is given.
    pub fn new(base_lr: f64, max_lr: f64) -> Self {
        Self {
            base_lr,
            max_lr,
            step_size_up: step_size(),
            step_size_down: None,
            mode: CyclicMode::default(),
            gamma: 1.,
            inverse: false,
            scale_fn: None,
            scale_mode: ScaleMode::default(),
        }
    }

    /// Sets the number of events from `base_lr` to `max_lr`.
    pub fn step_size_up(mut self, events: f64) -> Self {
        self.step_size_up = events;
        self
    }

    /// Sets the number of events back to `base_lr`, as many as up unless given.
    pub fn step_size_down(mut self, events: f64) -> Self {
        self.step_size_down = Some(events);
        self
    }

    /// Sets how the cycles shrink.
    pub fn mode(mut self, mode: CyclicMode) -> Self {
        self.mode = mode;
        self
    }

    /// Sets the factor of each event in mode [`ExpRange`](CyclicMode::ExpRange), 1 unless given.
    pub fn gamma(mut self, gamma: f64) -> Self {
        self.gamma = gamma;
        self
    }

    /// Scales the height of the cycles by a function of the number of the cycle, or of the event with
    /// [`scale_mode`](Self::scale_mode), instead of by the [`mode`](Self::mode). The schedule cannot be written to a file
    /// then, and a resume compares only its other arguments.
    ///
    /// ```
    /// use tch_ignite::schedule::{CyclicLR, Schedule};
    /// let schedule = CyclicLR::new(0.0, 1.0).step_size_up(2.0).scale_fn(|cycle| 1.0 / cycle as f64);
    /// assert_eq!([2, 6, 10].map(|i| schedule.at(i)), [1.0, 1.0 / 2.0, 1.0 / 3.0]);
    /// ```
    pub fn scale_fn(mut self, scale: impl Fn(u64) -> f64 + Send + Sync + 'static) -> Self {
        self.scale_fn = Some(ScaleFn(Arc::new(scale)));
        self
    }

    /// Sets what [`scale_fn`](Self::scale_fn) is a function of: the number of the cycle unless given.
    pub fn scale_mode(mut self, mode: ScaleMode) -> Self {
        self.scale_mode = mode;
        self
    }

    /// Makes the schedule of the momentum that goes with this one, from `max_momentum` to `base_momentum` and back
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
        let scale = match (&self.scale_fn, self.scale_mode, self.mode) {
            (Some(ScaleFn(scale)), ScaleMode::Cycle, _) => scale(cycle as u64),
            (Some(ScaleFn(scale)), ScaleMode::Iterations, _) => scale(event),
            (None, _, CyclicMode::Triangular) => 1.,
            (None, _, CyclicMode::Triangular2) => 1. / 2f64.powf(cycle - 1.),
            (None, _, CyclicMode::ExpRange) => self.gamma.powf(e),
        };
        let height = (self.max_lr - self.base_lr) * height * scale;
        if self.inverse { self.max_lr - height } else { self.base_lr + height }
    }

    fn validate(&self) -> Result<()> {
        let (up, down) = (self.step_size_up, self.step_size_down.unwrap_or(self.step_size_up));
        within("step_size_up", up, up > 0. && up.is_finite(), "positive and finite")?;
        within("step_size_down", down, down > 0. && down.is_finite(), "positive and finite")?;
        // The point in a cycle is computed from both lengths, so neither may vanish beside the other.
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

    /// A function cannot be written down: `"scale_fn": true` stands for it beside the other arguments.
    fn arguments(&self) -> Option<serde_json::Value> {
        let mut arguments = super::written(&Self { scale_fn: None, ..self.clone() })?;
        if let (Some(_), Some(all)) = (&self.scale_fn, arguments.as_object_mut()) {
            all.insert("scale_fn".into(), true.into());
            let mode = match self.scale_mode {
                ScaleMode::Cycle => "cycle",
                ScaleMode::Iterations => "iterations",
            };
            all.insert("scale_mode".into(), mode.into());
        }
        Some(arguments)
    }
}
