use std::fmt;
use std::sync::Arc;

use super::Schedule;
use super::check::{finite, starts};
use super::recurrence::{Recurrence, Walk, recurrent};
use crate::error::Result;

type Factor = Arc<dyn Fn(u64) -> f64 + Send + Sync>;

/// `base` times a function of the event: torch's `LambdaLR`. Cannot be written to a file.
///
/// ```
/// use tch_ignite::schedule::{LambdaLR, Schedule};
/// let schedule = LambdaLR::new(2.0, |event| 0.5f64.powi(event as i32));
/// assert_eq!([0, 1, 2].map(|i| schedule.at(i)), [2.0, 1.0, 0.5]);
/// ```
#[derive(Clone)]
pub struct LambdaLR {
    base: f64,
    factor: Factor,
}

impl LambdaLR {
    /// `base * factor(event)`.
    pub fn new(base: f64, factor: impl Fn(u64) -> f64 + Send + Sync + 'static) -> Self {
        Self { base, factor: Arc::new(factor) }
    }
}

impl Schedule for LambdaLR {
    fn at(&self, event: u64) -> f64 {
        self.base * (self.factor)(event)
    }

    fn validate(&self) -> Result<()> {
        finite(&[("base", self.base)])?;
        starts(self)
    }
}

impl PartialEq for LambdaLR {
    /// Equal if it is the same function.
    fn eq(&self, other: &Self) -> bool {
        self.base == other.base && Arc::ptr_eq(&self.factor, &other.factor)
    }
}

impl fmt::Debug for LambdaLR {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LambdaLR").field("base", &self.base).finish_non_exhaustive()
    }
}

/// Multiplies the value at each event by a function of it: torch's `MultiplicativeLR`. Cannot be
/// written to a file.
///
/// ```
/// use tch_ignite::schedule::{MultiplicativeLR, Schedule};
/// let schedule = MultiplicativeLR::new(1.0, |event| if event == 2 { 0.1 } else { 1.0 });
/// assert_eq!([0, 1, 2, 3].map(|i| schedule.at(i)), [1.0, 1.0, 0.1, 0.1]);
/// ```
#[derive(Clone)]
pub struct MultiplicativeLR {
    base: f64,
    factor: Factor,
    walk: Walk,
}

impl MultiplicativeLR {
    /// `base` at event 0, then the last value times `factor(event)`.
    pub fn new(base: f64, factor: impl Fn(u64) -> f64 + Send + Sync + 'static) -> Self {
        Self { base, factor: Arc::new(factor), walk: Walk::default() }
    }

    fn check(&self) -> Result<()> {
        finite(&[("base", self.base)])
    }
}

impl Recurrence for MultiplicativeLR {
    fn base(&self) -> f64 {
        self.base
    }

    fn next(&self, event: u64, previous: f64) -> f64 {
        previous * (self.factor)(event)
    }
}

// A function cannot be written down.
recurrent!(MultiplicativeLR, |_| None);

impl PartialEq for MultiplicativeLR {
    /// Equal if it is the same function.
    fn eq(&self, other: &Self) -> bool {
        self.base == other.base && Arc::ptr_eq(&self.factor, &other.factor)
    }
}

impl fmt::Debug for MultiplicativeLR {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MultiplicativeLR").field("base", &self.base).finish_non_exhaustive()
    }
}
