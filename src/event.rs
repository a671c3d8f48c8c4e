//! The points of a run at which handlers are called.

use std::fmt;

/// A point of a run at which handlers are called: ignite's `Events`.
///
/// [`Engine`](crate::engine::Engine) draws the run with every event in its place. Each can be filtered, and
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
    /// A step, a handler or the data failed; see [`Engine::exception`](crate::engine::Engine::exception).
    ExceptionRaised,
    /// An epoch was left by [`Engine::terminate_epoch`](crate::engine::Engine::terminate_epoch).
    TerminateSingleEpoch,
    /// An epoch ended.
    EpochCompleted,
    /// The run is left before its budget is used up within epochs.
    Terminate,
    /// The run ended.
    Completed,
    /// The run is suspended by [`Engine::interrupt`](crate::engine::Engine::interrupt).
    Interrupt,
    /// An event of your own, fired by [`Engine::fire_event`](crate::engine::Engine::fire_event).
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

/// How many there are.
pub(crate) const BUILT_IN: usize = 13;

/// What a filter compares with.
pub(crate) enum Count {
    Iteration,
    Epoch,
    Firings,
    None,
}

impl Event {
    /// An event of your own. Register it with [`Engine::register_events`](crate::engine::Engine::register_events).
    pub const fn custom(name: &'static str) -> Self {
        Self::Custom(name)
    }

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
