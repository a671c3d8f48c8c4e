use serde::{Deserialize, Serialize};

use super::check::starts;
use super::{AnySchedule, Schedule};
use crate::error::{Error, Result};

/// Schedules one after the other, each from its own event 0: ignite's `ConcatScheduler`, torch's
/// `SequentialLR`. The last one goes on for ever. [`Schedule::then`] makes one of two schedules.
///
/// ```
/// use tch_ignite::schedule::{CosineAnnealing, LinearCyclical, Schedule};
/// let schedule = LinearCyclical::new(0.0, 1.0, 4).then(CosineAnnealing::new(1.0, 0.0, 10), 2);
/// assert_eq!([0, 1, 2, 7].map(|i| schedule.at(i)), [0.0, 0.5, 1.0, 0.5]);
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Concat {
    schedules: Vec<AnySchedule>,
    durations: Vec<u64>,
}

/// torch's name for [`Concat`]; see [`Concat::sequential`].
pub type SequentialLR = Concat;

impl Concat {
    /// Makes a schedule of several. The first is used for `durations[0]` events, and so on; there is one duration
    /// fewer than schedules.
    pub fn new<S: Into<AnySchedule>>(
        schedules: impl IntoIterator<Item = S>,
        durations: impl IntoIterator<Item = u64>,
    ) -> Self {
        Self {
            schedules: schedules.into_iter().map(Into::into).collect(),
            durations: durations.into_iter().collect(),
        }
    }

    /// Makes a schedule of several, the next of which starts at each milestone, as torch's `SequentialLR` counts.
    pub fn sequential<S: Into<AnySchedule>>(
        schedules: impl IntoIterator<Item = S>,
        milestones: impl IntoIterator<Item = u64>,
    ) -> Self {
        let mut last = 0;
        let durations = milestones.into_iter().map(|milestone: u64| {
            let duration = milestone.saturating_sub(last);
            last = milestone;
            duration
        });
        let durations: Vec<_> = durations.collect();
        Self::new(schedules, durations)
    }
}

impl Schedule for Concat {
    fn at(&self, event: u64) -> f64 {
        let mut left = event;
        for (schedule, duration) in self.schedules.iter().zip(&self.durations) {
            if left < *duration {
                return schedule.at(left);
            }
            left -= duration;
        }
        self.schedules.get(self.durations.len()).map_or(f64::NAN, |last| last.at(left))
    }

    fn validate(&self) -> Result<()> {
        if self.schedules.len() < 2 {
            return Err(Error::invalid(format!(
                "Argument schedulers should be of more than one parameter schedulers, but given {}",
                self.schedules.len()
            )));
        }
        if self.schedules.len() != self.durations.len() + 1 {
            return Err(Error::invalid(format!(
                "Incorrect number schedulers or duration values, given {} and {}",
                self.schedules.len(),
                self.durations.len()
            )));
        }
        self.schedules.iter().try_for_each(Schedule::validate)?;
        starts(self)
    }

    fn end(&self) -> Option<(u64, String)> {
        // The whole ends where one of its schedules ends before its time, or where the last one ends.
        let mut first = 0u64;
        for (index, schedule) in self.schedules.iter().enumerate() {
            let duration = self.durations.get(index);
            if let Some((end, why)) = schedule.end()
                && duration.is_none_or(|duration| end < *duration)
            {
                return Some((first.saturating_add(end), why));
            }
            first = first.saturating_add(*duration?);
        }
        None
    }

    fn length(&self) -> Option<u64> {
        let before =
            self.durations.iter().fold(0u64, |sum, duration| sum.saturating_add(*duration));
        // The last schedule is only there once one of its values is.
        let last = self.schedules.last().and_then(Schedule::length).unwrap_or(1).max(1);
        Some(before.saturating_add(last))
    }

    fn arguments(&self) -> Option<serde_json::Value> {
        super::written(self)
    }
}
