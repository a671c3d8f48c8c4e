//! The points of a run at which handlers are called.

use std::fmt;

/// A point of a run at which handlers are called: ignite's `Events`.
///
/// [`Engine`](crate::engine::Engine) has a diagram of a run with every event in its place. Events can be filtered, and
/// several can be joined with `|`:
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
    /// Before the step. Schedulers act here by default.
    IterationStarted,
    /// After the step; its output is in `engine.state.output`.
    IterationCompleted,
    /// The data is exhausted and will be restarted.
    DataloaderStopIteration,
    /// A step, a handler or the data failed; see [`Engine::exception`](crate::engine::Engine::exception).
    ExceptionRaised,
    /// The epoch was left by [`Engine::terminate_epoch`](crate::engine::Engine::terminate_epoch).
    TerminateSingleEpoch,
    /// An epoch ended.
    EpochCompleted,
    /// The run ends early, or its budget in iterations, samples or time is used up in mid epoch.
    Terminate,
    /// The run has ended.
    Completed,
    /// The run is suspended by [`Engine::interrupt`](crate::engine::Engine::interrupt).
    Interrupt,
    /// An event of your own, fired by [`Engine::fire_event`](crate::engine::Engine::fire_event).
    Custom(&'static str),
}

/// Fired by the trainer of [`create_supervised_trainer`](crate::supervised::create_supervised_trainer) after each
/// optimizer step that was made: not within an accumulation window, and not where a
/// [`GradScaler`](crate::amp::GradScaler) skipped the step. A scheduler attached to this event counts updates.
///
/// The event is fired within the last iteration of a window, before `ITERATION_COMPLETED`. For a window that was cut
/// short (by the end of an epoch of unknown length, `terminate`, a budget that is used up, a lost batch) it is fired at
/// the event that ends the window. An engine with your own step has to register this event, and to fire it after its
/// optimizer steps.
///
/// With a `GradScaler` on CUDA, and only if a handler is attached to this event, the trainer has to find out whether
/// there was a step. That costs a host sync.
pub const OPTIMIZER_STEPPED: Event = Event::custom("optimizer_stepped");

/// Fired after each accumulation window: like [`OPTIMIZER_STEPPED`], but also where a
/// [`GradScaler`](crate::amp::GradScaler) skipped the step, and without a host sync. Averages of the weights are
/// updated at this event.
pub const WINDOW_COMPLETED: Event = Event::custom("window_completed");

/// All built-in events.
pub(crate) const BUILT_IN_EVENTS: [Event; BUILT_IN] = {
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

/// Number of built-in events.
pub(crate) const BUILT_IN: usize = 13;

/// The number that filters on an event compare with.
pub(crate) enum Count {
    Iteration,
    Epoch,
    Firings,
    None,
}

impl Event {
    /// Makes an event of your own. Register it with
    /// [`Engine::register_events`](crate::engine::Engine::register_events).
    pub const fn custom(name: &'static str) -> Self {
        Self::Custom(name)
    }

    /// The index of a built-in event; `None` for a custom one.
    #[inline]
    pub(crate) fn built_in(self) -> Option<usize> {
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

    /// Whether the engine fires the event before the step, so that a value logged at the event belongs to that step.
    /// Custom events count as fired after the step.
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

    #[inline]
    pub(crate) fn count(self) -> Count {
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
}

/// Shows ignite's name of the event.
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
