use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// How long a run is, as far as that is known: turns epochs and shares of it into numbers of events.
///
/// ```
/// use tch_ignite::schedule::RunLength;
/// let run = RunLength::new(938, 8); // iterations in an epoch, epochs
/// assert_eq!(run.iterations(), Some(7504));
/// assert_eq!(run.epochs(2.0)?, 1876);
/// assert_eq!(run.fraction(0.25)?, 1876);
/// assert_eq!(run.length("1run - 500it")?, 7004);
/// # Ok::<(), tch_ignite::Error>(())
/// ```
///
/// The default knows nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RunLength {
    epoch_length: Option<u64>,
    iterations: Option<u64>,
}

impl RunLength {
    /// A run of `epochs` epochs with `epoch_length` iterations each.
    pub const fn new(epoch_length: u64, epochs: u64) -> Self {
        let iterations = Some(epoch_length.saturating_mul(epochs));
        Self { epoch_length: Some(epoch_length), iterations }
    }

    /// A run of this many iterations.
    pub const fn of_iterations(iterations: u64) -> Self {
        Self { epoch_length: None, iterations: Some(iterations) }
    }

    /// With epochs of this many iterations.
    pub const fn epoch_length(mut self, iterations: u64) -> Self {
        self.epoch_length = Some(iterations);
        self
    }

    /// The iterations of the whole run.
    pub fn iterations(&self) -> Option<u64> {
        self.iterations
    }

    /// The iterations of so many epochs, rounded down.
    pub fn epochs(&self, epochs: f64) -> Result<u64> {
        Length::of(epochs, Unit::Epochs)?.events(self, Clock::Iteration)
    }

    /// The iterations of a share of the run, rounded down.
    pub fn fraction(&self, share: f64) -> Result<u64> {
        Length::of(share, Unit::Runs)?.events(self, Clock::Iteration)
    }

    /// The iterations of a length as in files: `"2ep"`, `"500it"`, `"0.3run"`, `"30%"`, or several of
    /// them with `+` and `-` between; rounded down.
    pub fn length(&self, text: &str) -> Result<u64> {
        text.parse::<Length>()?.events(self, Clock::Iteration)
    }

    /// Events of the whole run.
    pub(super) fn events(&self, clock: Clock) -> Option<u64> {
        match clock {
            Clock::Iteration => self.iterations,
            Clock::Epoch => Some(self.iterations?.div_ceil(self.epoch_length?.max(1))),
        }
    }

    /// Iterations from one event to the next.
    pub(super) fn period(&self, clock: Clock) -> Option<u64> {
        match clock {
            Clock::Iteration => Some(1),
            Clock::Epoch => self.epoch_length,
        }
    }

    pub(super) fn validate(&self) -> Result<()> {
        for (name, value) in [("epoch_length", self.epoch_length), ("iterations", self.iterations)]
        {
            if value == Some(0) {
                return Err(Error::invalid(format!(
                    "the run's {name} should be positive, but given 0"
                )));
            }
        }
        Ok(())
    }
}

/// What a schedule counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Clock {
    #[default]
    Iteration,
    Epoch,
}

impl Clock {
    pub(super) fn plural(self) -> &'static str {
        match self {
            Self::Iteration => "iterations",
            Self::Epoch => "epochs",
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Unit {
    Epochs,
    Iterations,
    Runs,
}

/// A sum of numbers with units.
pub(super) struct Length {
    text: String,
    terms: Vec<(f64, Unit)>,
}

impl Length {
    fn of(number: f64, unit: Unit) -> Result<Self> {
        let text = match unit {
            Unit::Epochs => format!("{number}ep"),
            Unit::Iterations => format!("{number}it"),
            Unit::Runs => format!("{number}run"),
        };
        if number >= 0. && number.is_finite() {
            return Ok(Self { text, terms: vec![(number, unit)] });
        }
        Err(Error::invalid(format!("a length should be finite and not negative, but given {text}")))
    }

    /// Of a run, on a clock; rounded down.
    pub(super) fn events(&self, run: &RunLength, clock: Clock) -> Result<u64> {
        let known = |value: Option<u64>, what: &str| {
            value.map(|value| value as f64).ok_or_else(|| {
                Error::invalid(format!(
                    "{self} cannot be turned into {}: {what} is not known",
                    clock.plural()
                ))
            })
        };
        let epoch_length = || known(run.epoch_length, "the number of iterations in an epoch");
        let mut sum = 0.;
        for (number, unit) in &self.terms {
            sum += match (unit, clock) {
                (Unit::Iterations, Clock::Iteration) | (Unit::Epochs, Clock::Epoch) => *number,
                (Unit::Epochs, Clock::Iteration) => number * epoch_length()?,
                (Unit::Iterations, Clock::Epoch) => number / epoch_length()?,
                (Unit::Runs, _) => number * known(run.events(clock), "the length of the run")?,
            };
        }
        // A share that is whole, but for rounding, stays whole: 29 % of 100.
        let whole = (sum + 1e-6).floor();
        if whole < 0. {
            let plural = clock.plural();
            return Err(Error::invalid(format!("{self} is less than nothing: {whole} {plural}")));
        }
        Ok(whole as u64)
    }
}

impl fmt::Display for Length {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.text)
    }
}

impl FromStr for Length {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut terms = vec![];
        let (mut rest, mut sign) = (text, 1.);
        loop {
            let end = rest.find(['+', '-']).unwrap_or(rest.len());
            let (number, unit) = term(rest[..end].trim()).ok_or_else(|| {
                Error::invalid(format!(
                    "{text:?} is no length: give a whole number, or a text such as \"2ep\" (epochs), \"500it\" (iterations), \"0.3run\" or \"30%\" (of the run), \"1run - 500it\""
                ))
            })?;
            terms.push((sign * number, unit));
            if end == rest.len() {
                return Ok(Self { text: text.into(), terms });
            }
            sign = if rest[end..].starts_with('-') { -1. } else { 1. };
            rest = &rest[end + 1..];
        }
    }
}

fn term(text: &str) -> Option<(f64, Unit)> {
    let units = [
        ("ep", Unit::Epochs, 1.),
        ("it", Unit::Iterations, 1.),
        ("run", Unit::Runs, 1.),
        ("%", Unit::Runs, 0.01),
    ];
    let (number, unit, factor) = units.into_iter().find_map(|(suffix, unit, factor)| {
        Some((text.strip_suffix(suffix)?.trim_end(), unit, factor))
    })?;
    let number: f64 = number.parse().ok()?;
    (number.is_finite() && number >= 0.).then_some((number * factor, unit))
}
