//! Checks of arguments, with the words that users see.

use super::Schedule;
use crate::error::{Error, Result};

/// Checks that there is a value for the first event, after all arguments were checked one by one.
pub(super) fn starts<S: Schedule + ?Sized>(schedule: &S) -> Result<()> {
    let value = schedule.at(0);
    if value.is_finite() {
        return Ok(());
    }
    Err(Error::invalid(match schedule.end() {
        Some((0, why)) => format!("the schedule ends before its first event ({why})"),
        _ => format!("the arguments of the schedule give {value} at event 0"),
    }))
}

pub(super) fn finite(values: &[(&str, f64)]) -> Result<()> {
    match values.iter().find(|(_, value)| !value.is_finite()) {
        Some((name, value)) => {
            Err(Error::invalid(format!("Argument {name} should be finite, but given {value}")))
        }
        None => Ok(()),
    }
}

pub(super) fn positive(name: &str, value: u64) -> Result<()> {
    if value > 0 {
        return Ok(());
    }
    Err(Error::invalid(format!("Argument {name} should be positive, but given {value}")))
}

pub(super) fn within(name: &str, value: f64, fits: bool, bounds: &str) -> Result<()> {
    if fits {
        return Ok(());
    }
    Err(Error::invalid(format!("Argument {name} should be {bounds}, but given {value}")))
}
