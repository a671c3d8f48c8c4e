//! Schedules whose value follows from the one before, as torch computes them.

use std::cell::Cell;

/// torch's chainable form: each value is made from the last.
pub(super) trait Recurrence {
    /// The value that the factors apply to.
    fn base(&self) -> f64;

    /// The value of event 0, after others were applied to the base.
    fn start(&self, previous: f64) -> f64 {
        previous
    }

    /// The value of `event`, from 1, after `previous`.
    fn next(&self, event: u64, previous: f64) -> f64;

    /// [`Schedule::length`](super::Schedule::length).
    fn span(&self) -> Option<u64> {
        None
    }
}

/// The value last asked for, so that walking forward costs O(1). Going back walks from the start.
#[derive(Debug, Clone, Default)]
pub(super) struct Walk(Cell<Option<(u64, f64)>>);

// The cache is no part of the value.
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

/// `Schedule::at` of a recurrence with a field `walk`.
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
