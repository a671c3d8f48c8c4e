//! Schedules made from others.

use serde::{Deserialize, Serialize};

use super::check::{finite, starts};
use super::{AnySchedule, Schedule};
use crate::error::Result;

/// Another schedule's values times a factor. Made by [`Schedule::scale`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scaled {
    schedule: Box<AnySchedule>,
    factor: f64,
}

impl Scaled {
    /// `factor * schedule.at(event)`.
    pub fn new(schedule: impl Into<AnySchedule>, factor: f64) -> Self {
        Self { schedule: Box::new(schedule.into()), factor }
    }
}

impl Schedule for Scaled {
    fn at(&self, event: u64) -> f64 {
        self.factor * self.schedule.at(event)
    }

    fn validate(&self) -> Result<()> {
        finite(&[("factor", self.factor)])?;
        self.schedule.validate()?;
        starts(self)
    }

    fn end(&self) -> Option<(u64, String)> {
        self.schedule.end()
    }

    fn length(&self) -> Option<u64> {
        self.schedule.length()
    }

    fn arguments(&self) -> Option<serde_json::Value> {
        super::written(self)
    }
}

/// Another schedule without its first events. Made by [`Schedule::skip`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Skipped {
    schedule: Box<AnySchedule>,
    events: u64,
}

impl Skipped {
    /// `schedule.at(event + events)`.
    pub fn new(schedule: impl Into<AnySchedule>, events: u64) -> Self {
        Self { schedule: Box::new(schedule.into()), events }
    }
}

impl Schedule for Skipped {
    fn at(&self, event: u64) -> f64 {
        self.schedule.at(event.saturating_add(self.events))
    }

    fn validate(&self) -> Result<()> {
        self.schedule.validate()?;
        starts(self)
    }

    fn end(&self) -> Option<(u64, String)> {
        self.schedule.end().map(|(end, why)| (end.saturating_sub(self.events), why))
    }

    fn length(&self) -> Option<u64> {
        self.schedule.length().map(|length| length.saturating_sub(self.events))
    }

    fn arguments(&self) -> Option<serde_json::Value> {
        super::written(self)
    }
}
