//! Checks of arguments, with the words that users see.

use crate::{Error, Result};

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
