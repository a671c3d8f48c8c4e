use std::fmt;
use std::time::Duration;

/// How a call of [`Engine::run`](super::Engine::run) ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stop {
    /// The budget is used up.
    Completed,
    /// Left early: by `terminate`, or in mid epoch by a limit of iterations, samples or time.
    Terminated,
    /// Suspended by `interrupt`; the next `run` continues.
    Interrupted,
    /// The same, because the process got the signal of this number.
    Signal(i32),
}

/// What a call of [`Engine::run`](super::Engine::run) did.
#[derive(Debug, Clone)]
pub struct Summary {
    /// How it ended.
    pub stop: Stop,
    /// `state.epoch` at the end.
    pub epochs: u64,
    /// `state.iteration` at the end.
    pub iterations: u64,
    /// How long this call took.
    pub elapsed: Duration,
    /// What looked wrong without being an error.
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
