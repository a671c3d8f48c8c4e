//! Schedules whose value follows from the value before, as torch computes them.

use std::cell::Cell;

/// A schedule in torch's chainable form: each value is made from the one before.
pub(super) trait Recurrence {
    /// Returns the value that the factors apply to.
    fn base(&self) -> f64;

    /// Returns the value of event 0; `previous` is the base after the schedules chained before this one.
    fn start(&self, previous: f64) -> f64 {
        previous
    }

    /// Returns the value of `event`, from 1, made from `previous`.
    fn next(&self, event: u64, previous: f64) -> f64;

    /// Returns the [`Schedule::length`](super::Schedule::length).
    fn span(&self) -> Option<u64> {
        None
    }
}

/// The value that was last asked for, so that walking forward costs O(1). Going back walks from the start.
#[derive(Debug, Clone, Default)]
pub(super) struct Walk(Cell<Option<(u64, f64)>>);

// Two schedules are equal whatever their caches hold.
impl PartialEq for Walk {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Walk {
    pub(super) fn at(&self, recurrence: &impl Recurrence, event: u64) -> f64 {
        let (mut at, mut value) = match self.0.get() {
            Some((at, value)) if at <= event => (at, value),
            _ => (0, recurrence.start(recurrence.base())),
        };
        while at < event {
            at += 1;
            value = recurrence.next(at, value);
        }
        self.0.set(Some((at, value)));
        value
    }
}

/// Implements [`Schedule`](super::Schedule) for a [`Recurrence`] with a field `walk` and a method `check`.
macro_rules! recurrent {
    ($schedule:ident) => {
        recurrent!($schedule, |schedule| super::written(schedule));
    };
    ($schedule:ident, $arguments:expr) => {
        impl Schedule for $schedule {
            fn at(&self, event: u64) -> f64 {
                self.walk.at(self, event)
            }

            fn validate(&self) -> Result<()> {
                self.check()?;
                super::check::starts(self)
            }

            fn arguments(&self) -> Option<serde_json::Value> {
                let arguments: fn(&Self) -> Option<serde_json::Value> = $arguments;
                arguments(self)
            }

            fn length(&self) -> Option<u64> {
                self.span()
            }
        }
    };
}
pub(super) use recurrent;
