//! The cycles that linear and cosine schedules share: ignite's `CyclicalScheduler`.

use std::cell::Cell;

use serde_json::{Map, Value};

use super::read;
use crate::error::{Error, Result};

/// Makes the methods that set the arguments of a cyclical schedule.
macro_rules! cyclical_arguments {
    ($schedule:ident) => {
        impl $schedule {
            /// Multiplies the cycle size (and the warm-up) at the end of each cycle, rounding down.
            pub fn cycle_mult(mut self, factor: f64) -> Self {
                self.last = LastCycle::default();
                self.cycle_mult = factor;
                self
            }

            /// Multiplies the start value at the end of each cycle.
            pub fn start_value_mult(mut self, factor: f64) -> Self {
                self.last = LastCycle::default();
                self.start_value_mult = factor;
                self
            }

            /// Multiplies the end value at the end of each cycle.
            pub fn end_value_mult(mut self, factor: f64) -> Self {
                self.last = LastCycle::default();
                self.end_value_mult = factor;
                self
            }

            /// Sets in how many events the value goes from the end of a cycle back to the start value, linearly; 0
            /// for a jump.
            pub fn warmup_duration(mut self, events: u64) -> Self {
                self.last = LastCycle::default();
                self.warmup_duration = events;
                self
            }

            fn cycles(&self) -> Cycles {
                Cycles {
                    start_value: self.start_value,
                    end_value: self.end_value,
                    cycle_size: self.cycle_size,
                    cycle_mult: self.cycle_mult,
                    start_value_mult: self.start_value_mult,
                    end_value_mult: self.end_value_mult,
                    warmup_duration: self.warmup_duration,
                }
            }
        }

        impl OptimizerScheduler<$schedule> {
            /// Makes ignite's scheduler: of this hyper-parameter (`"lr"`), in all groups of an optimizer (`&optimizer`) or
            /// in one (`&optimizer.group("fc")?`), with cycles of `cycle_size` events (at least 2).
            pub fn new(
                groups: &impl ParamGroups,
                param: impl Into<String>,
                start_value: f64,
                end_value: f64,
                cycle_size: u64,
            ) -> Self {
                Self::of(groups, param, $schedule::new(start_value, end_value, cycle_size))
            }

            /// Multiplies the cycle size (and the warm-up) at the end of each cycle, rounding down.
            pub fn cycle_mult(self, factor: f64) -> Self {
                self.with(|schedule| schedule.cycle_mult(factor))
            }

            /// Multiplies the start value at the end of each cycle.
            pub fn start_value_mult(self, factor: f64) -> Self {
                self.with(|schedule| schedule.start_value_mult(factor))
            }

            /// Multiplies the end value at the end of each cycle.
            pub fn end_value_mult(self, factor: f64) -> Self {
                self.with(|schedule| schedule.end_value_mult(factor))
            }

            /// Sets in how many events the value goes from the end of a cycle back to the start value, linearly; 0
            /// for a jump.
            pub fn warmup_duration(self, events: u64) -> Self {
                self.with(|schedule| schedule.warmup_duration(events))
            }
        }
    };
}
pub(super) use cyclical_arguments;

/// The most cycles that `load` walks through; each takes one or two nanoseconds.
const MAX_LOADED_CYCLE: u64 = 100_000_000;

/// The default of the multipliers.
pub(super) fn one() -> f64 {
    1.
}

/// The arguments that cyclical schedules share.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cycles {
    pub(super) start_value: f64,
    pub(super) end_value: f64,
    pub(super) cycle_size: u64,
    pub(super) cycle_mult: f64,
    pub(super) start_value_mult: f64,
    pub(super) end_value_mult: f64,
    pub(super) warmup_duration: u64,
}

/// One cycle: where it starts, how long it is, between which values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Cycle {
    first: u64,
    number: u64,
    size: u64,
    warmup: u64,
    start: f64,
    end: f64,
}

/// A point of a cycle, in the terms of ignite's formulas.
pub(super) enum Point {
    /// A point at `progress`, from 0 to 1, between `start` and `end`.
    Cycle { start: f64, end: f64, progress: f64 },
    /// A value on the way back to `start`, after the cycle.
    Warmup(f64),
}

/// The cycle that was last asked for, so that walking forward costs O(1).
#[derive(Debug, Clone, Default)]
pub(super) struct LastCycle(Cell<Option<Cycle>>);

// Two schedules are equal whatever their caches hold.
impl PartialEq for LastCycle {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Cycle {
    fn len(&self) -> u64 {
        self.size.saturating_add(self.warmup)
    }

    /// Returns the next cycle; `None` where it would have no events.
    fn next(&self, cycles: &Cycles) -> Option<Self> {
        let next = Self {
            first: self.first.saturating_add(self.len()),
            number: self.number + 1,
            // ignite's `int()` rounds towards zero, and so does `as`.
            size: (self.size as f64 * cycles.cycle_mult) as u64,
            warmup: (self.warmup as f64 * cycles.cycle_mult) as u64,
            start: self.start * cycles.start_value_mult,
            end: self.end * cycles.end_value_mult,
        };
        (next.size > 0).then_some(next)
    }
}

impl Cycles {
    fn first(&self) -> Cycle {
        Cycle {
            first: 0,
            number: 0,
            size: self.cycle_size,
            warmup: self.warmup_duration,
            start: self.start_value,
            end: self.end_value,
        }
    }

    /// Returns whether all cycles are alike, so that the cycle of an event is found by division.
    fn uniform(&self) -> bool {
        self.cycle_mult == 1. && self.start_value_mult == 1. && self.end_value_mult == 1.
    }

    fn cycle_of(&self, event: u64, last: &LastCycle) -> Option<Cycle> {
        if self.cycle_size == 0 {
            return None;
        }
        let mut cycle = match last.0.get() {
            Some(cycle) if cycle.first <= event => {
                if event - cycle.first < cycle.len() {
                    return Some(cycle);
                }
                cycle
            }
            _ => self.first(),
        };
        if self.uniform() {
            let ahead = (event - cycle.first) / cycle.len();
            cycle.first += ahead * cycle.len();
            cycle.number += ahead;
        } else {
            while event - cycle.first >= cycle.len() {
                cycle = cycle.next(self)?;
            }
        }
        last.0.set(Some(cycle));
        Some(cycle)
    }

    /// Returns the point of an event; `None` past the end.
    pub(super) fn point(&self, event: u64, last: &LastCycle) -> Option<Point> {
        let cycle = self.cycle_of(event, last)?;
        let index = event - cycle.first;
        // The start value changes when the cycle is over, before the warm-up.
        let start =
            if index < cycle.size { cycle.start } else { cycle.start * self.start_value_mult };
        if index > cycle.size {
            let progress = (index - cycle.size) as f64 / cycle.warmup as f64;
            return Some(Point::Warmup(cycle.end + (start - cycle.end) * progress));
        }
        Some(Point::Cycle { start, end: cycle.end, progress: index as f64 / cycle.size as f64 })
    }

    pub(super) fn validate(&self) -> Result<()> {
        if self.cycle_size < 2 {
            return Err(Error::invalid(format!(
                "Argument cycle_size should be positive and larger than 1, but given {}",
                self.cycle_size
            )));
        }
        for (name, value) in [
            ("start_value", self.start_value),
            ("end_value", self.end_value),
            ("cycle_mult", self.cycle_mult),
            ("start_value_mult", self.start_value_mult),
            ("end_value_mult", self.end_value_mult),
        ] {
            if !value.is_finite() {
                return Err(Error::invalid(format!(
                    "Argument {name} should be finite, but given {value}"
                )));
            }
        }
        if self.cycle_mult <= 0. {
            return Err(Error::invalid(format!(
                "Argument cycle_mult should be positive, but given {}: the second cycle would have no events",
                self.cycle_mult
            )));
        }
        Ok(())
    }

    pub(super) fn end(&self) -> Option<(u64, String)> {
        if self.cycle_mult >= 1. || self.cycle_mult <= 0. {
            return None;
        }
        let mut cycle = self.first();
        while let Some(next) = cycle.next(self) {
            cycle = next;
        }
        let why = format!(
            "cycle_mult {} shrinks the cycle of {} events to 0 after cycle {}",
            self.cycle_mult, self.cycle_size, cycle.number
        );
        Some((cycle.first + cycle.len(), why))
    }

    /// Writes ignite's `state_dict` of a cyclical scheduler. In ignite the next cycle begins at the start of the
    /// event that follows, so after the last event of a cycle the state is still that of the old cycle.
    pub(super) fn save(&self, events: u64, last: &LastCycle) -> Map<String, Value> {
        let mut state = Map::new();
        let Some(cycle) = self.cycle_of(events.saturating_sub(1), last) else {
            return state;
        };
        let index = events - cycle.first;
        let start =
            if index > cycle.size { cycle.start * self.start_value_mult } else { cycle.start };
        state.insert("event_index".into(), index.into());
        state.insert("start_value".into(), start.into());
        state.insert("end_value".into(), cycle.end.into());
        state.insert("cycle_size".into(), cycle.size.into());
        state.insert("cycle_mult".into(), self.cycle_mult.into());
        state.insert("cycle".into(), cycle.number.into());
        state.insert("start_value_mult".into(), self.start_value_mult.into());
        state.insert("end_value_mult".into(), self.end_value_mult.into());
        state.insert("warmup_duration".into(), cycle.warmup.into());
        state.insert("total_cycle_size".into(), cycle.len().into());
        state
    }

    pub(super) fn load(&self, state: &Map<String, Value>) -> Result<u64> {
        let index: u64 = read(state, "event_index")?;
        let number: u64 = read(state, "cycle")?;
        let mut cycle = self.first();
        if self.uniform() {
            cycle.number = number;
            cycle.first = number.saturating_mul(cycle.len());
        } else if number > MAX_LOADED_CYCLE {
            return Err(Error::State(format!(
                "state attribute 'cycle' is {number}; no run gets beyond {MAX_LOADED_CYCLE}"
            )));
        } else {
            while cycle.number < number {
                cycle = cycle.next(self).ok_or_else(|| {
                    Error::State(format!(
                        "state attribute 'cycle' is {number}, but this schedule ends in cycle {}",
                        cycle.number
                    ))
                })?;
            }
        }
        if index > cycle.len() {
            return Err(Error::State(format!(
                "state attribute 'event_index' is {index}, but cycle {number} of this schedule has {} events",
                cycle.len()
            )));
        }
        let events = cycle.first + index;
        for (key, ours) in self.save(events, &LastCycle::default()) {
            let theirs: Value = read(state, &key)?;
            if theirs.as_f64() != ours.as_f64() {
                return Err(Error::State(format!(
                    "state attribute '{key}' is {theirs}, but {ours} in this schedule: it was saved from one with other arguments"
                )));
            }
        }
        Ok(events)
    }
}
