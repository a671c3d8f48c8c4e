use std::fmt;
use std::time::Duration;

/// How a call of [`Engine::run`](super::Engine::run) ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stop {
    /// The budget is used up.
    Completed,
    /// The run was left early: by `terminate`, or in mid epoch by a limit of iterations, samples or
    /// time.
    Terminated,
    /// The run was suspended by `interrupt`; the next `run` continues.
    Interrupted,
    /// The run was suspended because the process got the signal of this number; the next `run`
    /// continues.
    Signal(i32),
}

/// Where the time of a call of [`Engine::run`](super::Engine::run) went: fetching data, steps, handlers. The handlers of
/// events that a step fires count for the step, and evaluations within a trainer for its handlers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct TimeSpent {
    /// Waiting for batches.
    pub data: Duration,
    /// Steps.
    pub steps: Duration,
    /// Handlers of the engine's own events.
    pub handlers: Duration,
}

impl TimeSpent {
    /// Adds the times of two records.
    pub(super) fn plus(self, other: Self) -> Self {
        Self {
            data: self.data + other.data,
            steps: self.steps + other.steps,
            handlers: self.handlers + other.handlers,
        }
    }

    /// The time since an earlier record.
    pub(super) fn since(self, earlier: Self) -> Self {
        Self {
            data: self.data.saturating_sub(earlier.data),
            steps: self.steps.saturating_sub(earlier.steps),
            handlers: self.handlers.saturating_sub(earlier.handlers),
        }
    }
}

/// The result of a call of [`Engine::run`](super::Engine::run).
#[derive(Debug, Clone)]
pub struct Summary {
    /// Why the call returned.
    pub stop: Stop,
    /// `state.epoch` at the end.
    pub epochs: u64,
    /// `state.iteration` at the end.
    pub iterations: u64,
    /// Duration of this call.
    pub elapsed: Duration,
    /// Where the time of this call went, if the engine records a [profile](super::Engine::profile).
    pub time: Option<TimeSpent>,
    /// Warnings about things that looked wrong without being errors.
    pub warnings: Vec<String>,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stop = match self.stop {
            Stop::Completed => "completed",
            Stop::Terminated => "terminated",
            Stop::Interrupted => "interrupted",
            Stop::Signal(number) => &format!("interrupted by signal {number}"),
        };
        write!(
            f,
            "{stop} after {} iterations in {} epochs; {:.1} s",
            self.iterations,
            self.epochs,
            self.elapsed.as_secs_f64()
        )?;
        if let Some(time) = self.time {
            let whole = self.elapsed.as_secs_f64().max(f64::MIN_POSITIVE);
            let share = |part: Duration| 100. * part.as_secs_f64() / whole;
            let (data, steps, handlers) =
                (share(time.data), share(time.steps), share(time.handlers));
            let rest = (100. - data - steps - handlers).max(0.);
            write!(
                f,
                " (steps {steps:.0} %, data {data:.0} %, handlers {handlers:.0} %, the engine {rest:.0} %)"
            )?;
        }
        self.warnings.iter().try_for_each(|warning| write!(f, "\nwarning: {warning}"))
    }
}
