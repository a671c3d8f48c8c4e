use serde::{Deserialize, Serialize};

use super::check::{finite, starts};
use super::{OptimizerScheduler, Schedule};
use crate::error::{Error, Result};
use crate::optim::ParamGroups;

/// Straight lines between milestones: ignite's `PiecewiseLinear`. Before the first milestone the value is the first
/// one, from the last milestone on it is the last one; two values at one event are a jump.
///
/// ```
/// use tch_ignite::schedule::{PiecewiseLinear, Schedule};
/// let schedule = PiecewiseLinear::new([(1, 1.0), (3, 0.0)]);
/// assert_eq!([0, 1, 2, 3, 4].map(|i| schedule.at(i)), [1.0, 1.0, 0.5, 0.0, 0.0]);
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PiecewiseLinear {
    milestones_values: Vec<(i64, f64)>,
}

/// ignite's `PiecewiseLinear` handler, with its arguments: drives a hyper-parameter by a [`PiecewiseLinear`] schedule.
pub type PiecewiseLinearScheduler = OptimizerScheduler<PiecewiseLinear>;

impl OptimizerScheduler<PiecewiseLinear> {
    /// Makes ignite's scheduler: of this hyper-parameter (`"lr"`), in all groups of an optimizer (`&optimizer`) or in one
    /// (`&optimizer.group("fc")?`), through these (event, value) points.
    pub fn new(
        groups: &impl ParamGroups,
        param: impl Into<String>,
        milestones_values: impl IntoIterator<Item = (i64, f64)>,
    ) -> Self {
        Self::of(groups, param, PiecewiseLinear::new(milestones_values))
    }
}

impl PiecewiseLinear {
    /// Makes a schedule through these (event, value) points. Events must not decrease; they may begin before event 0.
    pub fn new(milestones_values: impl IntoIterator<Item = (i64, f64)>) -> Self {
        Self { milestones_values: milestones_values.into_iter().collect() }
    }
}

impl Schedule for PiecewiseLinear {
    fn at(&self, event: u64) -> f64 {
        let points = &self.milestones_values;
        let event = i64::try_from(event).unwrap_or(i64::MAX);
        // `after` is the first milestone past the event, so the one before it is the last at or before the event.
        let after = points.partition_point(|(milestone, _)| *milestone <= event);
        let (before, after) = (after.checked_sub(1).and_then(|i| points.get(i)), points.get(after));
        match (before, after) {
            (Some((start, from)), Some((end, to))) => {
                from + (to - from) * event.abs_diff(*start) as f64 / end.abs_diff(*start) as f64
            }
            (Some((_, value)), None) | (None, Some((_, value))) => *value,
            (None, None) => f64::NAN,
        }
    }

    fn validate(&self) -> Result<()> {
        if self.milestones_values.is_empty() {
            return Err(Error::invalid(
                "Argument milestones_values should be with at least one value, but given []",
            ));
        }
        for pair in self.milestones_values.windows(2) {
            if pair[1].0 < pair[0].0 {
                return Err(Error::invalid(format!(
                    "Milestones should be increasing integers, but given {} is smaller than the previous milestone {}",
                    pair[1].0, pair[0].0
                )));
            }
        }
        self.milestones_values.iter().try_for_each(|(_, value)| finite(&[("value", *value)]))?;
        starts(self)
    }

    fn length(&self) -> Option<u64> {
        let (last, value) = self.milestones_values.last()?;
        let mut same = self.milestones_values.iter().rev().take_while(|(event, _)| event == last);
        let jumps = same.any(|(_, other)| other != value);
        Some(u64::try_from(*last).map_or(0, |last| last.saturating_add(jumps.into())))
    }

    fn arguments(&self) -> Option<serde_json::Value> {
        super::written(self)
    }
}
