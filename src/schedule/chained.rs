use serde::{Deserialize, Serialize};

use super::recurrence::{Recurrence, Walk, recurrent};
use super::{AnySchedule, Schedule};
use crate::error::{Error, Result};

/// Several of torch's schedules on one value, each changing what the one before left: torch's
/// `ChainedScheduler`.
///
/// For schedules that torch computes from the value before: `StepLR`, `MultiStepLR`, `ConstantLR`,
/// `LinearLR`, `ExponentialLR`, `PolynomialLR`, `CosineAnnealingLR`, `MultiplicativeLR`; all with the
/// same base.
///
/// ```
/// use tch_ignite::schedule::{AnySchedule, ChainedScheduler, ConstantLR, ExponentialLR, Schedule};
/// let schedule = ChainedScheduler::new([
///     AnySchedule::from(ConstantLR::new(1.0).factor(0.1).total_iters(2)),
///     ExponentialLR::new(1.0, 0.5).into(),
/// ]);
/// assert_eq!([0, 1, 2].map(|i| schedule.at(i)), [0.1, 0.05, 0.25]);
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChainedScheduler {
    schedules: Vec<AnySchedule>,
    #[serde(skip)]
    walk: Walk,
}

impl ChainedScheduler {
    /// In this order at every event.
    pub fn new<S: Into<AnySchedule>>(schedules: impl IntoIterator<Item = S>) -> Self {
        let schedules = schedules.into_iter().map(Into::into).collect();
        Self { schedules, walk: Walk::default() }
    }

    fn check(&self) -> Result<()> {
        let mut base = None;
        for schedule in &self.schedules {
            schedule.validate()?;
            let Some(recurrence) = schedule.recurrence() else {
                return Err(Error::invalid(format!(
                    "{} cannot be chained: its values do not follow from the one before",
                    schedule.class()
                )));
            };
            if *base.get_or_insert(recurrence.base()) != recurrence.base() {
                return Err(Error::invalid(format!(
                    "chained schedules should have the same base, but given {} and {}",
                    base.unwrap_or(f64::NAN),
                    recurrence.base()
                )));
            }
        }
        match base {
            Some(_) => Ok(()),
            None => Err(Error::invalid("ChainedScheduler needs at least one schedule")),
        }
    }

    fn links(&self) -> impl Iterator<Item = &dyn Recurrence> {
        self.schedules.iter().filter_map(AnySchedule::recurrence)
    }
}

impl Recurrence for ChainedScheduler {
    fn base(&self) -> f64 {
        self.links().next().map_or(f64::NAN, Recurrence::base)
    }

    fn start(&self, previous: f64) -> f64 {
        self.links().fold(previous, |value, link| link.start(value))
    }

    fn next(&self, event: u64, previous: f64) -> f64 {
        self.links().fold(previous, |value, link| link.next(event, value))
    }

    fn span(&self) -> Option<u64> {
        self.links().filter_map(Recurrence::span).max()
    }
}

recurrent!(ChainedScheduler);
