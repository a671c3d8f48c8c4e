use std::fmt;
use std::ops::BitOr;
use std::sync::Arc;

use super::guarded::guarded_within;
use crate::{Error, Result};

/// A point of a run at which handlers are called: ignite's `Events`.
///
/// [`Engine`](super::Engine) draws the run with every event in its place. Each can be filtered, and
/// several joined with `|`:
///
/// ```
/// use tch_ignite::engine::Event;
/// let events = Event::IterationCompleted.every(100) | Event::EpochCompleted | Event::Started;
/// # let _ = events;
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Event {
    /// A run begins.
    Started,
    /// An epoch begins.
    EpochStarted,
    /// Before a batch is fetched.
    GetBatchStarted,
    /// A batch was fetched; it is in `engine.state.batch`.
    GetBatchCompleted,
    /// Before the step. Schedulers act here.
    IterationStarted,
    /// After the step; its output is in `engine.state.output`.
    IterationCompleted,
    /// The data is exhausted and will be restarted.
    DataloaderStopIteration,
    /// A step, a handler or the data failed; see [`Engine::exception`](super::Engine::exception).
    ExceptionRaised,
    /// An epoch was left by [`Engine::terminate_epoch`](super::Engine::terminate_epoch).
    TerminateSingleEpoch,
    /// An epoch ended.
    EpochCompleted,
    /// The run is left before its budget is used up within epochs.
    Terminate,
    /// The run ended.
    Completed,
    /// The run is suspended by [`Engine::interrupt`](super::Engine::interrupt).
    Interrupt,
    /// An event of your own, fired by [`Engine::fire_event`](super::Engine::fire_event).
    Custom(&'static str),
}

/// Fired by the trainer of [`create_supervised_trainer`](crate::supervised::create_supervised_trainer) after each step of
/// the optimizer that was made: not within a window of accumulation, and not where a
/// [`GradScaler`](crate::amp::GradScaler) skipped the step. A scheduler attached to it counts updates.
///
/// It is fired within the last iteration of a window, before `ITERATION_COMPLETED`; for a window that was cut short
/// (the end of an epoch of unknown length, `terminate`, a budget that is used up, a lost batch) at the event that ends
/// it. An engine with a step of its own registers it and fires it where it steps.
///
/// With a `GradScaler` on CUDA, and only if something is attached, the trainer has to hear whether there
/// was a step: a host sync.
pub const OPTIMIZER_STEPPED: Event = Event::custom("optimizer_stepped");

/// Fired where [`OPTIMIZER_STEPPED`] is, and also where a [`GradScaler`](crate::amp::GradScaler) skipped the step: after
/// each window of accumulation, without a host sync. Averages of the weights follow it.
pub const WINDOW_COMPLETED: Event = Event::custom("window_completed");

/// The events that come with the engine.
pub(super) const BUILT_IN_EVENTS: [Event; BUILT_IN] = {
    use Event::*;
    [
        Started,
        EpochStarted,
        GetBatchStarted,
        GetBatchCompleted,
        IterationStarted,
        IterationCompleted,
        DataloaderStopIteration,
        ExceptionRaised,
        TerminateSingleEpoch,
        EpochCompleted,
        Terminate,
        Completed,
        Interrupt,
    ]
};

/// How many there are.
pub(super) const BUILT_IN: usize = 13;

/// What a filter compares with.
pub(super) enum Count {
    Iteration,
    Epoch,
    Firings,
    None,
}

impl Event {
    /// An event of your own. Register it with [`Engine::register_events`](super::Engine::register_events).
    pub const fn custom(name: &'static str) -> Self {
        Self::Custom(name)
    }

    pub(super) fn built_in(self) -> Option<usize> {
        Some(match self {
            Self::Started => 0,
            Self::EpochStarted => 1,
            Self::GetBatchStarted => 2,
            Self::GetBatchCompleted => 3,
            Self::IterationStarted => 4,
            Self::IterationCompleted => 5,
            Self::DataloaderStopIteration => 6,
            Self::ExceptionRaised => 7,
            Self::TerminateSingleEpoch => 8,
            Self::EpochCompleted => 9,
            Self::Terminate => 10,
            Self::Completed => 11,
            Self::Interrupt => 12,
            Self::Custom(_) => return None,
        })
    }

    /// Whether the engine fires it before the step, so that a value written at it is the one of that step. Events of
    /// the user's own count as fired after it.
    pub(crate) fn is_before_step(self) -> bool {
        matches!(
            self,
            Self::Started
                | Self::EpochStarted
                | Self::GetBatchStarted
                | Self::GetBatchCompleted
                | Self::IterationStarted
        )
    }

    pub(super) fn count(self) -> Count {
        match self {
            Self::GetBatchStarted
            | Self::GetBatchCompleted
            | Self::IterationStarted
            | Self::IterationCompleted => Count::Iteration,
            Self::Started | Self::EpochStarted | Self::EpochCompleted | Self::Completed => {
                Count::Epoch
            }
            Self::Custom(_) => Count::Firings,
            _ => Count::None,
        }
    }

    /// This event where the engine has it, else `other`.
    pub(crate) fn or(self, other: impl Into<FilteredEvent>) -> FilteredEvent {
        FilteredEvent { or: Some(Box::new(other.into())), ..self.into() }
    }

    /// Every `n`-th time, by the number of the iteration, epoch or firing.
    pub fn every(self, n: u64) -> FilteredEvent {
        FilteredEvent::from(self).every(n)
    }

    /// Once, at number `n`.
    pub fn once(self, n: u64) -> FilteredEvent {
        self.once_at([n])
    }

    /// At each of these numbers.
    pub fn once_at(self, numbers: impl IntoIterator<Item = u64>) -> FilteredEvent {
        FilteredEvent::from(self).once_at(numbers)
    }

    /// At numbers smaller than `n`.
    pub fn before(self, n: u64) -> FilteredEvent {
        FilteredEvent::from(self).before(n)
    }

    /// At numbers greater than `n`.
    pub fn after(self, n: u64) -> FilteredEvent {
        FilteredEvent::from(self).after(n)
    }

    /// Where `passes` answers true for the number.
    pub fn filter(self, passes: impl Fn(u64) -> bool + Send + Sync + 'static) -> FilteredEvent {
        FilteredEvent::from(self).filter(passes)
    }
}

/// ignite's name of the event.
impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Started => "STARTED",
            Self::EpochStarted => "EPOCH_STARTED",
            Self::GetBatchStarted => "GET_BATCH_STARTED",
            Self::GetBatchCompleted => "GET_BATCH_COMPLETED",
            Self::IterationStarted => "ITERATION_STARTED",
            Self::IterationCompleted => "ITERATION_COMPLETED",
            Self::DataloaderStopIteration => "DATALOADER_STOP_ITERATION",
            Self::ExceptionRaised => "EXCEPTION_RAISED",
            Self::TerminateSingleEpoch => "TERMINATE_SINGLE_EPOCH",
            Self::EpochCompleted => "EPOCH_COMPLETED",
            Self::Terminate => "TERMINATE",
            Self::Completed => "COMPLETED",
            Self::Interrupt => "INTERRUPT",
            Self::Custom(name) => name,
        })
    }
}

/// An [`Event`] that only counts at some of its firings.
///
/// What is compared is the iteration for iteration and batch events (at the batch events: the last
/// one begun), the epoch for epoch events, started and completed, and for custom events how often
/// the event was fired. `every` goes with `before` and `after`, counting from `after + 1` then.
#[derive(Clone)]
pub struct FilteredEvent {
    pub(super) event: Event,
    every: Option<u64>,
    once: Option<Arc<[u64]>>,
    before: Option<u64>,
    after: Option<u64>,
    passes: Option<Arc<dyn Fn(u64) -> bool + Send + Sync>>,
    /// The event in its place for an engine that does not have it.
    pub(super) or: Option<Box<FilteredEvent>>,
}

impl From<Event> for FilteredEvent {
    fn from(event: Event) -> Self {
        Self { event, every: None, once: None, before: None, after: None, passes: None, or: None }
    }
}

impl FilteredEvent {
    /// The event without the filter.
    pub fn event(&self) -> Event {
        self.event
    }

    /// Every `n`-th time, from the first where `after` is given.
    pub fn every(mut self, n: u64) -> Self {
        self.every = Some(n);
        self
    }

    /// At each of these numbers.
    pub fn once_at(mut self, numbers: impl IntoIterator<Item = u64>) -> Self {
        self.once = Some(numbers.into_iter().collect());
        self
    }

    /// At numbers smaller than `n`.
    pub fn before(mut self, n: u64) -> Self {
        self.before = Some(n);
        self
    }

    /// At numbers greater than `n`.
    pub fn after(mut self, n: u64) -> Self {
        self.after = Some(n);
        self
    }

    /// Where `passes` answers true for the number.
    pub fn filter(mut self, passes: impl Fn(u64) -> bool + Send + Sync + 'static) -> Self {
        self.passes = Some(Arc::new(passes));
        self
    }

    pub(super) fn validate(&self) -> Result<()> {
        if self.every == Some(0) {
            return Err(Error::invalid(
                "Argument every should be integer and greater than zero, but 0 was given",
            ));
        }
        if let Some(once) = &self.once
            && (once.is_empty() || once.contains(&0))
        {
            return Err(Error::invalid(format!(
                "Argument once should either be a positive integer or a list of positive integers, got {once:?}"
            )));
        }
        let range = self.every.is_some() || self.before.is_some() || self.after.is_some();
        let kinds = [range, self.once.is_some(), self.passes.is_some()];
        if kinds.iter().filter(|given| **given).count() > 1 {
            return Err(Error::invalid(
                "Only one of the input arguments should be specified, except before, after and every",
            ));
        }
        if kinds.contains(&true) && matches!(self.event.count(), Count::None) {
            return Err(Error::invalid(format!(
                "{} has no number that a filter could compare with: register the handler without a filter",
                self.event
            )));
        }
        Ok(())
    }

    pub(super) fn always(&self) -> bool {
        matches!(self.every, None | Some(1))
            && self.once.is_none()
            && self.before.is_none()
            && self.after.is_none()
            && self.passes.is_none()
    }

    /// # Errors
    /// The user's filter panicked.
    pub(super) fn passes(&self, n: u64) -> anyhow::Result<bool> {
        match &self.passes {
            Some(passes) => {
                guarded_within(|| Ok(passes(n))).map_err(|panic| panic.context("its filter failed"))
            }
            None => Ok(self.passes_numbers(n)),
        }
    }

    fn passes_numbers(&self, n: u64) -> bool {
        if let Some(once) = &self.once {
            return once.contains(&n);
        }
        let ranged = self.before.is_some() || self.after.is_some();
        let after = self.after.unwrap_or(0);
        if ranged && (n <= after || self.before.is_some_and(|before| n >= before)) {
            return false;
        }
        match self.every {
            None => true,
            Some(every) if ranged => (n - after - 1).is_multiple_of(every),
            Some(every) => n.is_multiple_of(every),
        }
    }
}

impl fmt::Debug for FilteredEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.event)?;
        if self.always() { Ok(()) } else { f.write_str("(filtered)") }
    }
}

/// One or several events, each with its filter: ignite's `EventsList`. Made with `|`.
///
/// A handler is registered once for each, in order, so it can be called several times at one event.
#[derive(Debug, Clone)]
pub struct Events(pub(super) Vec<FilteredEvent>);

impl Events {
    pub(crate) fn none() -> Self {
        Self(vec![])
    }

    /// Whether the event is among them, with any filter.
    pub(crate) fn names(&self, event: Event) -> bool {
        self.0.iter().any(|filtered| filtered.event == event)
    }

    /// Whether all of them are fired after the step.
    pub(crate) fn are_after_step(&self) -> bool {
        self.0.iter().all(|filtered| !filtered.event.is_before_step())
    }

    /// Whether each of them only counts at some of its firings.
    pub(crate) fn are_filtered(&self) -> bool {
        self.0.iter().all(|filtered| !filtered.always())
    }
}

impl From<Event> for Events {
    fn from(event: Event) -> Self {
        Self(vec![event.into()])
    }
}

impl From<FilteredEvent> for Events {
    fn from(event: FilteredEvent) -> Self {
        Self(vec![event])
    }
}

impl FromIterator<FilteredEvent> for Events {
    fn from_iter<I: IntoIterator<Item = FilteredEvent>>(events: I) -> Self {
        Self(events.into_iter().collect())
    }
}

fn joined(left: impl Into<Events>, right: impl Into<Events>) -> Events {
    let mut events = left.into();
    events.0.extend(right.into().0);
    events
}

impl<R: Into<Events>> BitOr<R> for Event {
    type Output = Events;
    fn bitor(self, right: R) -> Events {
        joined(self, right)
    }
}

impl<R: Into<Events>> BitOr<R> for FilteredEvent {
    type Output = Events;
    fn bitor(self, right: R) -> Events {
        joined(self, right)
    }
}

impl<R: Into<Events>> BitOr<R> for Events {
    type Output = Events;
    fn bitor(self, right: R) -> Events {
        joined(self, right)
    }
}
