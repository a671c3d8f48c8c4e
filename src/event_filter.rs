//! Events with filters, and lists of events.

use std::fmt;
use std::ops::BitOr;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::event::{Count, Event};
use crate::guard::guarded_within;

impl Event {
    /// This event where the engine has it, otherwise `other`.
    pub(crate) fn or(self, other: impl Into<FilteredEvent>) -> FilteredEvent {
        FilteredEvent { or: Some(Box::new(other.into())), ..self.into() }
    }

    /// Passes every `n`-th time, by the number of the iteration, epoch or firing.
    pub fn every(self, n: u64) -> FilteredEvent {
        FilteredEvent::from(self).every(n)
    }

    /// Passes once, at number `n`.
    pub fn once(self, n: u64) -> FilteredEvent {
        self.once_at([n])
    }

    /// Passes at each of these numbers.
    pub fn once_at(self, numbers: impl IntoIterator<Item = u64>) -> FilteredEvent {
        FilteredEvent::from(self).once_at(numbers)
    }

    /// Passes at numbers smaller than `n`.
    pub fn before(self, n: u64) -> FilteredEvent {
        FilteredEvent::from(self).before(n)
    }

    /// Passes at numbers greater than `n`.
    pub fn after(self, n: u64) -> FilteredEvent {
        FilteredEvent::from(self).after(n)
    }

    /// Passes where `passes` returns true for the number.
    pub fn filter(self, passes: impl Fn(u64) -> bool + Send + Sync + 'static) -> FilteredEvent {
        FilteredEvent::from(self).filter(passes)
    }
}

/// An [`Event`] with a filter, which decides at which of its firings the handler is called.
///
/// The filter compares a number: for iteration and batch events the iteration (at batch events the last one that
/// began); for epoch events, `Started` and `Completed` the epoch; for custom events the number of times that the event
/// was fired in this run, which starts again where iterations do. `every` can be combined with `before` and `after`,
/// and then counts from `after + 1`. Other combinations are refused when the handler is registered.
#[derive(Clone)]
pub struct FilteredEvent {
    pub(crate) event: Event,
    every: Option<u64>,
    once: Option<Arc<[u64]>>,
    before: Option<u64>,
    after: Option<u64>,
    passes: Option<Arc<dyn Fn(u64) -> bool + Send + Sync>>,
    /// The alternative to this event, for an engine that does not know it.
    pub(crate) or: Option<Box<FilteredEvent>>,
}

impl From<Event> for FilteredEvent {
    fn from(event: Event) -> Self {
        Self { event, every: None, once: None, before: None, after: None, passes: None, or: None }
    }
}

impl FilteredEvent {
    /// Returns the event without the filter.
    pub fn event(&self) -> Event {
        self.event
    }

    /// Passes every `n`-th time; with `before` or `after` counted from the first number that passes these.
    pub fn every(mut self, n: u64) -> Self {
        self.every = Some(n);
        self
    }

    /// Passes at each of these numbers.
    pub fn once_at(mut self, numbers: impl IntoIterator<Item = u64>) -> Self {
        self.once = Some(numbers.into_iter().collect());
        self
    }

    /// Passes at numbers smaller than `n`.
    pub fn before(mut self, n: u64) -> Self {
        self.before = Some(n);
        self
    }

    /// Passes at numbers greater than `n`.
    pub fn after(mut self, n: u64) -> Self {
        self.after = Some(n);
        self
    }

    /// Passes where `passes` returns true for the number.
    pub fn filter(mut self, passes: impl Fn(u64) -> bool + Send + Sync + 'static) -> Self {
        self.passes = Some(Arc::new(passes));
        self
    }

    /// # Errors
    /// Refuses numbers that are 0, an empty list, combinations that make no sense, and filters on events without a
    /// number.
    pub(crate) fn validate(&self) -> Result<()> {
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

    /// Whether the filter passes every firing.
    pub(crate) fn always(&self) -> bool {
        matches!(self.every, None | Some(1))
            && self.once.is_none()
            && self.before.is_none()
            && self.after.is_none()
            && self.passes.is_none()
    }

    /// Whether the filter passes a number.
    ///
    /// # Errors
    /// The user's filter panicked.
    #[inline]
    pub(crate) fn passes(&self, n: u64) -> anyhow::Result<bool> {
        match &self.passes {
            Some(passes) => {
                guarded_within(|| Ok(passes(n))).map_err(|panic| panic.context("its filter failed"))
            }
            None => Ok(self.passes_numbers(n)),
        }
    }

    #[inline]
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

/// One or several events, each with its filter: ignite's `EventsList`. Join events with `|`.
///
/// A handler is registered once for each event of the list, in order, so it can be called several times at one event.
#[derive(Debug, Clone)]
pub struct Events(pub(crate) Vec<FilteredEvent>);

impl Events {
    pub(crate) fn none() -> Self {
        Self(vec![])
    }

    /// Whether the list has this event, with any filter.
    pub(crate) fn names(&self, event: Event) -> bool {
        self.0.iter().any(|filtered| filtered.event == event)
    }

    /// Whether all events of the list are fired after the step.
    pub(crate) fn are_after_step(&self) -> bool {
        self.0.iter().all(|filtered| !filtered.event.is_before_step())
    }

    /// Whether every event of the list has a filter that may hold it back.
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
