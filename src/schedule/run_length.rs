use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How long a run is, as far as that is known. It turns epochs and shares of the run into numbers of events.
///
/// ```
/// use tch_ignite::schedule::RunLength;
/// let run = RunLength::new(938, 8); // iterations in an epoch, epochs
/// assert_eq!(run.iterations(), Some(7504));
/// assert_eq!(run.epochs(2.0)?, 1876);
/// assert_eq!(run.fraction(0.25)?, 1876);
/// assert_eq!(run.length("1run - 500it")?, 7004);
/// assert_eq!(run.accumulate(4).updates(), Some(8 * 235)); // 234 windows of 4 batches and one of 2 in each epoch
/// # Ok::<(), tch_ignite::Error>(())
/// ```
///
/// In the default nothing is known.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RunLength {
    epoch_length: Option<u64>,
    iterations: Option<u64>,
    /// Number of batches that share an update, where more than one does.
    accumulate: Option<u64>,
}

impl RunLength {
    /// Makes the length of a run of `epochs` epochs with `epoch_length` iterations each.
    pub const fn new(epoch_length: u64, epochs: u64) -> Self {
        let iterations = Some(epoch_length.saturating_mul(epochs));
        Self { epoch_length: Some(epoch_length), iterations, accumulate: None }
    }

    /// Makes the length of a run of this many iterations.
    pub const fn of_iterations(iterations: u64) -> Self {
        Self { epoch_length: None, iterations: Some(iterations), accumulate: None }
    }

    /// Sets the number of iterations in an epoch.
    pub const fn epoch_length(mut self, iterations: u64) -> Self {
        self.epoch_length = Some(iterations);
        self
    }

    /// Sets how many batches share an update, as by [`Accumulation`](crate::Accumulation). The last window of an
    /// epoch may be shorter, and so may the last one of the run.
    pub const fn accumulate(mut self, steps: u64) -> Self {
        self.accumulate = Some(steps);
        self
    }

    /// Returns the iterations of the whole run.
    pub fn iterations(&self) -> Option<u64> {
        self.iterations
    }

    /// Returns the updates of the optimizer in the whole run: as many as iterations without
    /// [`accumulate`](Self::accumulate). With it, they are unknown where the length of an epoch is.
    pub fn updates(&self) -> Option<u64> {
        let (iterations, steps) = (self.iterations?, self.steps());
        match self.epoch_length {
            Some(length) => {
                let whole = (iterations / length.max(1)).saturating_mul(length.div_ceil(steps));
                Some(whole.saturating_add((iterations % length.max(1)).div_ceil(steps)))
            }
            None => (steps == 1).then_some(iterations),
        }
    }

    fn steps(&self) -> u64 {
        self.accumulate.unwrap_or(1).max(1)
    }

    /// Returns the updates in an epoch.
    fn epoch_updates(&self) -> Option<u64> {
        Some(self.epoch_length?.div_ceil(self.steps()))
    }

    /// Returns the iterations in so many epochs, rounded down.
    ///
    /// # Errors
    /// A number that is negative or not finite, or a run whose epoch length is not known.
    pub fn epochs(&self, epochs: f64) -> Result<u64> {
        Length::of(epochs, Unit::Epochs)?.events(self, Clock::Iteration)
    }

    /// Returns the iterations in a share of the run, rounded down.
    ///
    /// # Errors
    /// A share that is negative or not finite, or a run whose length is not known.
    pub fn fraction(&self, share: f64) -> Result<u64> {
        Length::of(share, Unit::Runs)?.events(self, Clock::Iteration)
    }

    /// Returns the iterations in a length as in files: `"2ep"`, `"500it"`, `"100up"` (updates), `"0.3run"`,
    /// `"30%"`, or several of them with `+` and `-` between; rounded down.
    ///
    /// # Errors
    /// A text that is no length, a negative result, or a length that needs something unknown about the run.
    pub fn length(&self, text: &str) -> Result<u64> {
        text.parse::<Length>()?.events(self, Clock::Iteration)
    }

    /// Returns how many events the whole run has on this clock.
    pub(super) fn events(&self, clock: Clock) -> Option<u64> {
        match clock {
            Clock::Iteration => self.iterations,
            Clock::Update => self.updates(),
            Clock::Epoch => Some(self.iterations?.div_ceil(self.epoch_length?.max(1))),
        }
    }

    /// Returns how many iterations come before the first one that uses the value of this event.
    pub(super) fn before(&self, event: u64, clock: Clock) -> Option<u64> {
        match (clock, self.epoch_length, self.epoch_updates()) {
            (Clock::Iteration, ..) => Some(event),
            (Clock::Epoch, length, _) => Some(event.saturating_mul(length?)),
            (Clock::Update, Some(length), Some(updates)) => {
                let rest = (event % updates.max(1)).saturating_mul(self.steps());
                Some((event / updates.max(1)).saturating_mul(length).saturating_add(rest))
            }
            (Clock::Update, ..) => (self.steps() == 1).then_some(event),
        }
    }

    pub(super) fn validate(&self) -> Result<()> {
        for (name, value) in [
            ("epoch_length", self.epoch_length),
            ("iterations", self.iterations),
            ("accumulate", self.accumulate),
        ] {
            if value == Some(0) {
                return Err(Error::invalid(format!(
                    "the run's {name} should be positive, but given 0"
                )));
            }
        }
        Ok(())
    }
}

/// The events that a schedule counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Clock {
    #[default]
    Iteration,
    Update,
    Epoch,
}

impl Clock {
    pub(super) fn plural(self) -> &'static str {
        match self {
            Self::Iteration => "iterations",
            Self::Update => "updates",
            Self::Epoch => "epochs",
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Unit {
    Epochs,
    Iterations,
    Updates,
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
            Unit::Updates => format!("{number}up"),
            Unit::Runs => format!("{number}run"),
        };
        if number >= 0. && number.is_finite() {
            return Ok(Self { text, terms: vec![(number, unit)] });
        }
        Err(Error::invalid(format!("a length should be finite and not negative, but given {text}")))
    }

    /// Returns the events of this length in a run, on a clock; rounded down.
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
        let epoch_updates = || known(run.epoch_updates(), "the number of iterations in an epoch");
        // Without accumulation each batch is an update.
        let one_each = run.steps() == 1;
        let mut sum = 0.;
        for (signed, unit) in &self.terms {
            // Whole windows and epochs are counted in a positive number; the sign comes back at the end.
            let number = signed.abs();
            let events = match (unit, clock) {
                (Unit::Iterations, Clock::Iteration)
                | (Unit::Updates, Clock::Update)
                | (Unit::Epochs, Clock::Epoch) => number,
                (Unit::Iterations, Clock::Update) | (Unit::Updates, Clock::Iteration)
                    if one_each =>
                {
                    number
                }
                (Unit::Epochs, Clock::Iteration) => number * epoch_length()?,
                (Unit::Epochs, Clock::Update) => number * epoch_updates()?,
                (Unit::Iterations, Clock::Epoch) => number / epoch_length()?,
                (Unit::Updates, Clock::Epoch) => number / epoch_updates()?,
                // Windows end with the epoch, so whole epochs are counted first.
                (Unit::Iterations, Clock::Update) => {
                    let (length, updates) = (epoch_length()?, epoch_updates()?);
                    (number / length).floor() * updates + number % length / run.steps() as f64
                }
                (Unit::Updates, Clock::Iteration) => {
                    let (length, updates) = (epoch_length()?, epoch_updates()?);
                    let rest = (number % updates * run.steps() as f64).min(length);
                    (number / updates).floor() * length + rest
                }
                (Unit::Runs, _) => number * known(run.events(clock), "the length of the run")?,
            };
            sum += events.copysign(*signed);
        }
        // A share that would be whole but for rounding stays whole: 29 % of 100.
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
                    "{text:?} is no length: give a whole number, or a text such as \"2ep\" (epochs), \"500it\" (iterations), \"100up\" (updates), \"0.3run\" or \"30%\" (of the run), \"1run - 500it\""
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
        ("up", Unit::Updates, 1.),
        ("run", Unit::Runs, 1.),
        ("%", Unit::Runs, 0.01),
    ];
    let (number, unit, factor) = units.into_iter().find_map(|(suffix, unit, factor)| {
        Some((text.strip_suffix(suffix)?.trim_end(), unit, factor))
    })?;
    let number: f64 = number.parse().ok()?;
    (number.is_finite() && number >= 0.).then_some((number * factor, unit))
}
