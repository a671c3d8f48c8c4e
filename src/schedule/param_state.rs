//! ignite's state-parameter schedules: their first value is that of event 1.

use serde::{Deserialize, Serialize};

use super::check::{finite, positive, starts};
use super::{ParamScheduler, PiecewiseLinear, Schedule, Skipped};
use crate::error::{Error, Result};
use crate::event::Event;
use crate::optim::Knob;

/// `initial_value * gamma ^ n` at the n-th event, from 1: ignite's `ExpStateScheduler`.
///
/// ```
/// use tch_ignite::schedule::{ExpState, Schedule};
/// assert_eq!(ExpState::new(1.0, 0.5).at(0), 0.5);
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpState {
    initial_value: f64,
    gamma: f64,
}

/// `initial_value * gamma ^ (n / step_size)`, rounded down, at the n-th event, from 1: ignite's
/// `StepStateScheduler`.
///
/// ```
/// use tch_ignite::schedule::{Schedule, StepState};
/// let schedule = StepState::new(1.0, 0.5, 2);
/// assert_eq!([0, 1, 2, 3].map(|i| schedule.at(i)), [1.0, 0.5, 0.5, 0.25]);
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepState {
    initial_value: f64,
    gamma: f64,
    step_size: u64,
}

/// `initial_value * gamma ^ (milestones at or before n)` at the n-th event, from 1: ignite's
/// `MultiStepStateScheduler`.
///
/// ```
/// use tch_ignite::schedule::{MultiStepState, Schedule};
/// let schedule = MultiStepState::new(1.0, 0.5, [2, 3]);
/// assert_eq!([0, 1, 2].map(|i| schedule.at(i)), [1.0, 0.5, 0.25]);
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MultiStepState {
    initial_value: f64,
    gamma: f64,
    milestones: Vec<u64>,
}

impl ExpState {
    /// From `initial_value`, by the factor `gamma` an event.
    pub fn new(initial_value: f64, gamma: f64) -> Self {
        Self { initial_value, gamma }
    }
}

impl StepState {
    /// From `initial_value`, by the factor `gamma` every `step_size` events.
    pub fn new(initial_value: f64, gamma: f64, step_size: u64) -> Self {
        Self { initial_value, gamma, step_size }
    }
}

impl MultiStepState {
    /// From `initial_value`, by the factor `gamma` at each milestone, in order.
    pub fn new(initial_value: f64, gamma: f64, milestones: impl IntoIterator<Item = u64>) -> Self {
        Self { initial_value, gamma, milestones: milestones.into_iter().collect() }
    }
}

impl Schedule for ExpState {
    fn at(&self, event: u64) -> f64 {
        self.initial_value * self.gamma.powf((event + 1) as f64)
    }

    fn validate(&self) -> Result<()> {
        finite(&[("initial_value", self.initial_value), ("gamma", self.gamma)])?;
        starts(self)
    }

    fn arguments(&self) -> Option<serde_json::Value> {
        super::written(self)
    }
}

impl Schedule for StepState {
    fn at(&self, event: u64) -> f64 {
        let steps = (event + 1).checked_div(self.step_size).unwrap_or(0);
        self.initial_value * self.gamma.powf(steps as f64)
    }

    fn validate(&self) -> Result<()> {
        positive("step_size", self.step_size)?;
        finite(&[("initial_value", self.initial_value), ("gamma", self.gamma)])?;
        starts(self)
    }

    fn length(&self) -> Option<u64> {
        Some(self.step_size)
    }

    fn arguments(&self) -> Option<serde_json::Value> {
        super::written(self)
    }
}

impl Schedule for MultiStepState {
    fn at(&self, event: u64) -> f64 {
        let steps = self.milestones.partition_point(|milestone| *milestone <= event + 1);
        self.initial_value * self.gamma.powf(steps as f64)
    }

    fn validate(&self) -> Result<()> {
        if !self.milestones.is_sorted() {
            return Err(Error::invalid(format!(
                "Argument milestones should be in increasing order, but given {:?}",
                self.milestones
            )));
        }
        finite(&[("initial_value", self.initial_value), ("gamma", self.gamma)])?;
        starts(self)
    }

    fn length(&self) -> Option<u64> {
        self.milestones.last().copied()
    }

    fn arguments(&self) -> Option<serde_json::Value> {
        super::written(self)
    }
}

/// ignite's `PiecewiseLinearStateScheduler`: a [`PiecewiseLinear`] that begins with event 1.
pub fn piecewise_linear_state(milestones_values: impl IntoIterator<Item = (i64, f64)>) -> Skipped {
    PiecewiseLinear::new(milestones_values).skip(1)
}

impl<S: Schedule> ParamScheduler<S> {
    /// A scheduler of a knob of your own after each step, as ignite's state schedulers are attached:
    /// [`new`](Self::new) on [`Event::IterationCompleted`]. It writes nothing before the first event.
    pub fn state(name: impl Into<String>, knob: Knob, schedule: S) -> Self {
        Self::new(name, knob, schedule).on(Event::IterationCompleted).write_at_start(false)
    }
}
