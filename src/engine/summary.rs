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
        self.warnings.iter().try_for_each(|warning| write!(f, "\nwarning: {warning}"))
    }
}
