use std::time::{Duration, Instant};

use crate::engine::{Engine, Handler, HandlerSpec};
use crate::error::{Error, Result};
use crate::event::Event;
use crate::event_filter::Events;

/// Ends the run when this much time has passed since the handler was made: ignite's `TimeLimit`.
///
/// Use it for jobs that may only take a limited time, and make it when the program begins. The limit of one call of
/// `run` is [`Until::time`](crate::engine::Until::time). Costs a reading of the clock at each of its events, by default
/// each iteration.
///
/// The next process has a limit of its own: a run that it resumes from a checkpoint goes on with the rest of the
/// budget, also where the checkpoint was written at the event that ended the run, or at the end of the run.
///
/// ```
/// use std::time::Duration;
/// use tch_ignite::engine::{Engine, Until};
/// use tch_ignite::handlers::TimeLimit;
/// let limit = TimeLimit::new(Duration::from_millis(1))?;
/// let mut trainer = Engine::new(|_: &mut (), _, _: ()| Ok(()));
/// trainer.attach(limit);
/// let summary = trainer.run(&mut (), vec![(); 10], Until::iterations(u64::MAX))?;
/// assert!(summary.elapsed < Duration::from_secs(10));
/// # Ok::<(), tch_ignite::Error>(())
/// ```
#[derive(Debug, Clone)]
#[must_use = "a handler is called only once it is attached: `Engine::attach`"]
pub struct TimeLimit {
    begun: Instant,
    limit: Duration,
    events: Events,
}

impl TimeLimit {
    /// A limit that is counted from now.
    ///
    /// # Errors
    /// The limit is zero.
    pub fn new(limit: Duration) -> Result<Self> {
        if limit.is_zero() {
            return Err(Error::invalid(
                "TimeLimit: Argument limit_sec should be a positive integer. The limit given is zero: give the time after which the run ends, such as Duration::from_secs(3600)",
            ));
        }
        Ok(Self { begun: Instant::now(), limit, events: Event::IterationCompleted.into() })
    }

    /// Checks the clock at these events instead of each iteration.
    pub fn on(mut self, events: impl Into<Events>) -> Self {
        self.events = events.into();
        self
    }
}

impl<C, B, O> Handler<C, B, O> for TimeLimit {
    fn spec(&self) -> Result<HandlerSpec> {
        Ok(HandlerSpec::new("time limit", self.events.clone()))
    }

    fn call(
        &mut self,
        _event: Event,
        _cx: &mut C,
        engine: &mut Engine<'_, C, B, O>,
    ) -> anyhow::Result<()> {
        if self.begun.elapsed() > self.limit {
            engine.terminate_at_limit();
        }
        Ok(())
    }
}
