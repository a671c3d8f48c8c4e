//! Schedules: pure functions from an event number to a value, and the handler that applies them.
//!
//! A [`Schedule`] knows nothing of optimizers or engines: `at(i)` is the value of event `i`, from 0.
//! [`ParamScheduler`] joins a name, a [`Knob`](crate::optim::Knob) and a schedule, and is a handler of the engine;
//! [`CosineAnnealingScheduler`] and its kin take ignite's arguments. The values equal ignite's bit for bit.

mod any;
mod batch_size;
mod chained;
mod check;
mod concat;
mod constant_lr;
mod cosine;
mod cosine_annealing_lr;
mod cosine_annealing_warm_restarts;
mod cycle;
mod cyclic_lr;
mod exponential_lr;
mod inverse_sqrt;
mod lambda_lr;
mod linear;
mod linear_lr;
mod multi_step_lr;
mod noam;
mod one_cycle_lr;
mod optimizer_scheduler;
mod param_group;
mod param_state;
mod piecewise_linear;
mod plan;
mod plateau;
mod polynomial_lr;
mod power;
mod recurrence;
mod rex;
mod run_length;
mod scaled;
mod scheduler;
mod step_lr;
mod warmup;
mod warmup_stable_decay;

use serde_json::{Map, Value};

pub use any::AnySchedule;
pub use batch_size::BatchSizeScheduler;
pub use chained::ChainedScheduler;
pub use concat::{Concat, SequentialLR};
pub use constant_lr::ConstantLR;
pub use cosine::{CosineAnnealing, CosineAnnealingScheduler};
pub use cosine_annealing_lr::CosineAnnealingLR;
pub use cosine_annealing_warm_restarts::CosineAnnealingWarmRestarts;
pub use cyclic_lr::{CyclicLR, CyclicMode, ScaleMode};
pub use exponential_lr::ExponentialLR;
pub use inverse_sqrt::InverseSqrt;
pub use lambda_lr::{LambdaLR, MultiplicativeLR};
pub use linear::{LinearCyclical, LinearCyclicalScheduler};
pub use linear_lr::LinearLR;
pub use multi_step_lr::MultiStepLR;
pub use noam::Noam;
pub use one_cycle_lr::{Anneal, OneCycleLR, OneCycleMomentum, one_cycle};
pub use optimizer_scheduler::OptimizerScheduler;
pub use param_group::ParamGroupScheduler;
pub use param_state::{ExpState, MultiStepState, StepState, piecewise_linear_state};
pub use piecewise_linear::{PiecewiseLinear, PiecewiseLinearScheduler};
pub use plan::{PlannedSchedule, SchedulePlan};
pub use plateau::{ReduceLROnPlateauScheduler, ThresholdMode};
pub use polynomial_lr::PolynomialLR;
pub use power::Power;
pub use rex::Rex;
pub use run_length::RunLength;
pub use scaled::{Scaled, Skipped};
pub use scheduler::ParamScheduler;
pub use step_lr::StepLR;
pub use warmup::create_lr_scheduler_with_warmup;
pub use warmup_stable_decay::{Decay, WarmupStableDecay};

use crate::error::{Error, Result};
use crate::state::StateDict;

/// A pure function from the number of an event, from 0, to a value.
pub trait Schedule: Send {
    /// Returns the value of event `event`; NaN where the schedule has [ended](Self::end).
    ///
    /// Calls with growing `event` cost O(1) each; going back may cost a walk from event 0.
    fn at(&self, event: u64) -> f64;

    /// Checks the arguments. Schedulers call this before the first event.
    ///
    /// # Errors
    /// Wrong arguments; the error names the first.
    fn validate(&self) -> Result<()>;

    /// Returns after how many events the schedule ends, and why; `None` for one that goes on for ever. May cost
    /// a walk to the end.
    fn end(&self) -> Option<(u64, String)> {
        None
    }

    /// Returns how many events it takes until all that the schedule describes has happened (one cycle, the last
    /// milestone, a warm-up); `None` where it describes no end.
    ///
    /// A line or curve of `n` events takes `n`: its last value is that of event `n`, the first one after it. A jump to
    /// another value at event `n` takes `n + 1`, because no event before it has that value.
    fn length(&self) -> Option<u64> {
        None
    }

    /// Checks before a run of `events` events that the schedule comes to its [length](Self::length) within it, does
    /// not [end](Self::end) before, and has a finite value at each event. Computes the values of all events, up to
    /// ten million.
    ///
    /// ```
    /// use tch_ignite::schedule::{CosineAnnealing, Schedule};
    /// let schedule = CosineAnnealing::new(1.0, 0.0, 1000);
    /// assert!(schedule.fits(1000).is_ok() && schedule.fits(999).is_err());
    /// ```
    ///
    /// # Errors
    /// Wrong arguments, or the first of these that does not hold.
    fn fits(&self, events: u64) -> Result<()> {
        self.validate()?;
        let wrong = too_long(self, events).or_else(|| too_short(self, events));
        match wrong.or_else(|| not_finite(self, events)) {
            Some(text) => Err(Error::invalid(format!("the schedule {text}"))),
            None => Ok(()),
        }
    }

    /// Returns the schedule with its arguments as JSON, where it can be written down. They are saved with the
    /// position, so that a state is loaded only into the schedule that it was saved from.
    fn arguments(&self) -> Option<Value> {
        None
    }

    /// Writes the position after `events` events, in ignite's terms where ignite has the schedule.
    fn save(&self, events: u64) -> Map<String, Value> {
        let position = [("event_index".to_owned(), events.into())];
        let arguments = self.arguments().map(|arguments| ("schedule".to_owned(), arguments));
        position.into_iter().chain(arguments).collect()
    }

    /// Reads the number of events that [`save`](Self::save) was given.
    ///
    /// # Errors
    /// A missing key, or the state of a schedule with other arguments.
    fn load(&self, state: &Map<String, Value>) -> Result<u64> {
        let events = read(state, "event_index")?;
        if let Some(ours) = self.arguments() {
            let theirs: Value = read(state, "schedule")?;
            if theirs != ours {
                return Err(Error::State(format!(
                    "the state is of a schedule with other arguments: {theirs}, not {ours}"
                )));
            }
        }
        Ok(events)
    }

    /// Returns the first `events` values with their event numbers, without any training.
    ///
    /// ```
    /// use tch_ignite::schedule::{CosineAnnealing, Schedule};
    /// let values = CosineAnnealing::new(1.0, 0.0, 4).simulate_values(4)?;
    /// assert_eq!(values[0], (0, 1.0));
    /// assert_eq!(values[2].1, 0.5);
    /// # Ok::<(), tch_ignite::Error>(())
    /// ```
    ///
    /// # Errors
    /// Wrong arguments, or a schedule that ends before.
    fn simulate_values(&self, events: u64) -> Result<Vec<(u64, f64)>> {
        self.validate()?;
        (0..events).map(|event| Ok((event, value(self, event)?))).collect()
    }

    /// Uses this schedule for `after` events, then another from its own event 0.
    fn then(self, next: impl Into<AnySchedule>, after: u64) -> Concat
    where
        Self: Into<AnySchedule> + Sized,
    {
        Concat::new([self.into(), next.into()], [after])
    }

    /// Multiplies all values by a factor.
    fn scale(self, factor: f64) -> Scaled
    where
        Self: Into<AnySchedule> + Sized,
    {
        Scaled::new(self, factor)
    }

    /// Leaves out the first `events` events.
    fn skip(self, events: u64) -> Skipped
    where
        Self: Into<AnySchedule> + Sized,
    {
        Skipped::new(self, events)
    }

    /// Puts a line before this schedule, from `start` to the schedule's first value, which is then at event `events
    /// - 1`.
    ///
    /// ```
    /// use tch_ignite::schedule::{CosineAnnealing, Schedule};
    /// let schedule = CosineAnnealing::new(1.0, 0.0, 10).warmup(0.0, 5)?;
    /// assert_eq!([0, 2, 4, 9].map(|i| schedule.at(i)), [0.0, 0.5, 1.0, 0.5]);
    /// # Ok::<(), tch_ignite::Error>(())
    /// ```
    ///
    /// # Errors
    /// Fewer than 2 events, or a schedule with wrong arguments.
    fn warmup(self, start: f64, events: u64) -> Result<AnySchedule>
    where
        Self: Into<AnySchedule> + Sized,
    {
        let end = self.at(0);
        create_lr_scheduler_with_warmup(self, start, events, end)
    }
}

impl<S: Schedule + ?Sized> Schedule for Box<S> {
    fn at(&self, event: u64) -> f64 {
        (**self).at(event)
    }
    fn validate(&self) -> Result<()> {
        (**self).validate()
    }
    fn end(&self) -> Option<(u64, String)> {
        (**self).end()
    }
    fn length(&self) -> Option<u64> {
        (**self).length()
    }
    fn fits(&self, events: u64) -> Result<()> {
        (**self).fits(events)
    }
    fn simulate_values(&self, events: u64) -> Result<Vec<(u64, f64)>> {
        (**self).simulate_values(events)
    }
    fn arguments(&self) -> Option<Value> {
        (**self).arguments()
    }
    fn save(&self, events: u64) -> Map<String, Value> {
        (**self).save(events)
    }
    fn load(&self, state: &Map<String, Value>) -> Result<u64> {
        (**self).load(state)
    }
}

fn too_long<S: Schedule + ?Sized>(schedule: &S, events: u64) -> Option<String> {
    let length = schedule.length().filter(|length| *length > events)?;
    Some(format!("takes {length} events, but the run has only {events}"))
}

fn too_short<S: Schedule + ?Sized>(schedule: &S, events: u64) -> Option<String> {
    let (end, why) = schedule.end().filter(|(end, _)| *end < events)?;
    Some(format!("ends after {end} events ({why}), but the run has {events}"))
}

/// Puts the position of a schedule into a checkpoint: how many of its events are done, and its arguments.
fn save_position<S: Schedule + ?Sized>(
    schedule: &S,
    events: u64,
    state: &mut StateDict,
) -> Result<()> {
    state.set_value(EVENTS_DONE, events)?;
    state.set_value(ARGUMENTS, schedule.arguments())
}

/// Reads the position that [`save_position`] wrote: how many events are done. Where the state has other arguments
/// than the schedule, that is an error with `strict`, and without it a text that describes the change. `None` for a
/// state without such a position.
fn load_position<S: Schedule + ?Sized>(
    schedule: &S,
    state: &StateDict,
    strict: bool,
) -> Result<Option<(u64, Option<String>)>> {
    if !state.values().contains_key(EVENTS_DONE) {
        return Ok(None);
    }
    let events: u64 = state.value(EVENTS_DONE)?;
    let theirs: Value = state.value(ARGUMENTS)?;
    let ours = schedule.arguments().unwrap_or_default();
    if theirs == ours {
        return Ok(Some((events, None)));
    }
    if strict {
        return Err(Error::State(format!(
            "the state is of a schedule with other arguments: {theirs}, not {ours}; with resume_with(.., strict = false) it goes on with these, at event {events}"
        )));
    }
    let changed = format!("its schedule was {theirs} and is {ours}: it goes on at event {events}");
    Ok(Some((events, Some(changed))))
}

const EVENTS_DONE: &str = "events_done";
const ARGUMENTS: &str = "arguments";

fn not_finite<S: Schedule + ?Sized>(schedule: &S, events: u64) -> Option<String> {
    let mut values = (0..events.min(MOST_CHECKED)).map(|event| (event, schedule.at(event)));
    let (event, value) = values.find(|(_, value)| !value.is_finite())?;
    Some(format!("gives {value} after {event} events, but the run has {events}"))
}

/// How many events [`Schedule::fits`] looks at.
const MOST_CHECKED: u64 = 10_000_000;

/// Writes a schedule as JSON, for [`Schedule::arguments`].
fn written<S: serde::Serialize>(schedule: &S) -> Option<Value> {
    serde_json::to_value(schedule).ok()
}

/// Returns the value of an event; an error where the schedule has ended before.
#[inline]
fn value<S: Schedule + ?Sized>(schedule: &S, event: u64) -> Result<f64> {
    let value = schedule.at(event);
    if value.is_nan()
        && let Some((end, why)) = schedule.end()
    {
        return Err(Error::invalid(format!(
            "the schedule ends after {end} events ({why}), but event {event} was asked for"
        )));
    }
    Ok(value)
}

fn read<T: serde::de::DeserializeOwned>(state: &Map<String, Value>, key: &str) -> Result<T> {
    let value = state.get(key).ok_or_else(|| {
        Error::State(format!(
            "Required state attribute '{key}' is absent in provided state_dict '{:?}'",
            state.keys().collect::<Vec<_>>()
        ))
    })?;
    serde_json::from_value(value.clone())
        .map_err(|error| Error::State(format!("state attribute '{key}' is {value}: {error}")))
}
